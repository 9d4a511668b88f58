"""Data that are no pictures: .npy and .npz files and folders of them, with any number of channels."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from items import whole
from refusals import refused
from runs import QUIET, assert_same_weights, newest_checkpoint, train

from ddpm_fast import NoiseSchedule, Trainer, TrainOptions, UNet, load_folder, write_samples
from ddpm_fast.errors import InvalidValue
from ddpm_fast.plan import ddpm_plan
from ddpm_fast.training.data import batches, load_dataset, to_unit_range

N, H, W, C = 7, 4, 6, 5
VALUES = np.random.default_rng(0).normal(3, 2, (N, H, W, C)).astype(np.float32)
LOW, HIGH = VALUES.min(axis=(0, 1, 2)).astype(np.float64), VALUES.max(axis=(0, 1, 2)).astype(np.float64)  # one a channel
SCALED = torch.from_numpy((VALUES.astype(np.float64) - LOW) * (2 / (HIGH - LOW)) - 1)
RANGES = tuple(zip(LOW.tolist(), HIGH.tolist(), strict=True))


def write_npy(path: Path, values: np.ndarray = VALUES) -> Path:
    np.save(path / "a.npy", values)
    return path / "a.npy"


def write_npz(path: Path, values: np.ndarray = VALUES) -> Path:
    np.savez(path / "a.npz", arr_0=values)
    return path / "a.npz"


def write_folder(path: Path, values: np.ndarray = VALUES) -> Path:
    for index, each in enumerate(values):
        np.save(path / f"{index}.npy", each)
    return path


@pytest.mark.parametrize("write", [write_npy, write_npz, write_folder])
@pytest.mark.parametrize("memory", [None, 0])
def test_numbers_are_mapped_to_the_unit_range(write: Callable[[Path], Path], memory: int | None, tmp_path: Path) -> None:
    dataset = load_dataset(str(write(tmp_path)), memory=memory)
    assert (dataset.info.shape, dataset.info.dtype, dataset.info.classes, len(dataset)) == ((C, H, W), torch.float32, ("",), N)
    images, labels, conditions = whole(dataset)
    assert (images.dtype, conditions) == (torch.float32, None)
    torch.testing.assert_close(images, SCALED.permute(0, 3, 1, 2).float(), rtol=0, atol=1e-6)
    assert images.amin(dim=(0, 2, 3)).tolist() == [-1] * C
    assert images.amax(dim=(0, 2, 3)).tolist() == [1] * C
    assert labels.tolist() == [0] * N
    assert dataset.info.data_range == RANGES
    assert dataset.in_memory == (memory is None or write is write_npz)  # an .npz has been read whole
    (batch,) = batches(dataset, [torch.arange(N)], 0)
    assert torch.equal(batch.images, images)
    assert torch.equal(batch.labels, labels)
    wider = load_dataset(str(write(tmp_path)), memory=memory, data_range=(-100, 100))
    torch.testing.assert_close(wider[2].image, torch.from_numpy(VALUES[2] / 100).permute(2, 0, 1))
    each = load_dataset(str(write(tmp_path)), memory=memory, data_range=[(-100.0 * c, 100.0 * c) for c in range(1, C + 1)])
    expected = torch.from_numpy(VALUES[2] / (100 * np.arange(1, C + 1, dtype=np.float32))).permute(2, 0, 1)
    torch.testing.assert_close(each[2].image, expected)


def test_dtypes_labels_and_sizes(tmp_path: Path) -> None:
    first = load_dataset(str(write_npy(tmp_path)))
    pixels = (VALUES * 10).clip(0, 255).astype(np.uint8)
    np.savez(tmp_path / "c.npz", arr_0=pixels[..., 0], arr_1=np.array([2, 0, 1, 0, 0, 0, 0]))
    pictures = load_dataset(str(tmp_path / "c.npz"))
    described = pictures.info
    assert (described.shape, described.dtype, described.classes) == ((1, H, W), torch.uint8, ("0", "1", "2"))
    assert described.data_range is None
    assert whole(pictures).labels.tolist() == [2, 0, 1, 0, 0, 0, 0]
    assert np.array_equal(whole(pictures).images[:, 0], pixels[..., 0])
    resized = load_dataset(str(tmp_path / "a.npy"), image_size=(2, 3), first=2)
    assert (len(resized), resized.info.shape, resized.info.preparation[:16]) == (2, (C, 2, 3), "resized from 6x4")
    for kind in (np.int16, np.uint16, np.float64, np.float16):
        np.save(tmp_path / "d.npy", (VALUES * 100).astype(kind))
        again = whole(load_dataset(str(tmp_path / "d.npy"))).images
        if kind != np.uint16:  # negative values wrap
            torch.testing.assert_close(again, whole(first).images, rtol=0, atol=5e-3)


def broken(kind: str, path: Path) -> Path:
    """Write a folder or file that is wrong in one way."""
    values = VALUES.copy()
    if kind == "nan":
        values[4, 1, 1, 1] = np.nan
        return write_npy(path, values)
    if kind == "nan in a folder":
        values[4, 1, 1, 1] = np.inf
        return write_folder(path, values)
    if kind == "outside":
        return write_npy(path, values)
    if kind == "alike":
        return write_npy(path, np.ones_like(values))
    if kind == "alike in a channel":
        values[..., 2] = 4
        return write_npy(path, values)
    if kind == "another shape":
        write_folder(path, values)
        np.save(path / "5.npy", values[5][:2])
        return path
    if kind == "pickle":
        (path / "a.npy").write_bytes(pickle.dumps(values))
        return path / "a.npy"
    if kind == "objects":
        np.save(path / "a.npy", np.array([[[{}]]], dtype=object), allow_pickle=True)
        return path / "a.npy"
    if kind == "text":
        return write_npy(path, np.array([[["a"]]]))
    if kind == "dimensions":
        return write_npy(path, np.ones(3))
    if kind == "two arrays":
        np.savez(path / "a.npz", x=values, y=values)
        return path / "a.npz"
    if kind == "a label in a folder":
        np.savez(path / "0.npz", arr_0=values[0], arr_1=np.array(1))
        return path
    if kind == "labels":
        np.savez(path / "a.npz", arr_0=values, arr_1=np.zeros(3))
        return path / "a.npz"
    (path / "a.npz").write_bytes(b"PK\x03\x04 damaged")
    return path / "a.npz"


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("nan", r".*a\.npy\[4\] to be finite, got NaN or infinity"),
        ("nan in a folder", r".*4\.npy to be finite, got NaN or infinity"),
        ("outside", r".*a\.npy\[0\] to be in 0\.\.1, the data_range, got values from .* to .* in channel 0"),
        ("alike", r".*a\.npy to have different values, got 1 alone in channel 0; state a data_range"),
        ("alike in a channel", r".*a\.npy to have different values, got 4 alone in channel 2; state a data_range"),
        ("another shape", r".*5\.npy to be float32 \[5, 4, 6\], as the first, got float32 \[5, 2, 6\]"),
        ("pickle", r".*a\.npy to be a whole \.npy or \.npz of numbers, got Python objects, .* or a damaged file$"),
        ("objects", r".*a\.npy to be a whole \.npy or \.npz of numbers, got: Array can't be memory-mapped"),
        ("text", r".*a\.npy\[0\] to hold numbers, got <U1"),
        ("dimensions", r".*a\.npy to be \[N, H, W\] or 4-d, got \[3\]"),
        ("two arrays", r".*a\.npz to hold one array, or arr_0 with labels in arr_1, got x, y"),
        ("a label in a folder", r".*0\.npz to hold an image alone, as sub-folders are the classes, got arr_1"),
        ("labels", r"the labels of .*a\.npz to be integers \[7\], got float64 \[3\]"),
        ("damaged", r".*a\.npz to be a whole \.npy or \.npz of numbers, got: "),
    ],
)
def test_wrong_arrays_are_named_before_any_work(kind: str, wanted: str, tmp_path: Path) -> None:
    path = broken(kind, tmp_path)
    with pytest.raises(ValueError, match=f"^load_dataset: expected {wanted}"):
        load_dataset(str(path), data_range=(0, 1) if kind == "outside" else "measured", memory=0)


def test_options_of_the_other_kind_of_files_are_refused(tmp_path: Path) -> None:
    path = str(write_npy(tmp_path))
    with refused(InvalidValue("load_dataset", "channels", f"to be those of {path}, 5", "1")):
        load_dataset(path, channels=1)
    for wrong in ((1,), "01", 5, [(0, 1), (1,)], []):
        with refused(InvalidValue("load_dataset", "data_range", "to be two numbers, or two a channel", repr(wrong))):
            load_dataset(path, data_range=wrong)  # type: ignore[arg-type]
    with refused(InvalidValue("load_dataset", "data_range", "to have the lower number first", (5, 1))):
        load_dataset(path, data_range=[(0, 1), (5, 1)])
    with refused(InvalidValue("load_dataset", "data_range", "to be one range, or one for each of 5 channels", 2)):
        load_dataset(path, data_range=[(-100, 100)] * 2)
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "pictures" / "a.png")
    with refused(
        InvalidValue("load_dataset", "data_range", "to be None for image files, as arrays alone have ranges", ((0.0, 1.0),))
    ):
        load_dataset(str(tmp_path / "pictures"), data_range=(0, 1))


@pytest.mark.parametrize("bounds", [(0, 1e-310), (1e8, 1e8 + 100), (0, 1e39), (-1e-38, 0)])
def test_ranges_that_float32_cannot_resolve_are_refused(bounds: tuple[float, float], tmp_path: Path) -> None:
    """Stated ones, and those of the values themselves, which would become NaN or a few levels."""
    path = write_npy(tmp_path, np.linspace(*bounds, H * W).reshape(1, H, W))
    for stated in (bounds, "measured"):
        with pytest.raises(ValueError, match=r"expected (data_range|.*a\.npy) to hold at least 256 values of float32, got "):
            load_dataset(str(path), data_range=stated)
    write_npy(tmp_path, np.linspace(1e8, 1e8 + 1e4, H * W).reshape(1, H, W))
    assert load_dataset(str(path))[0].image.isfinite().all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_values_at_the_ends_of_a_range_are_rounded_to_their_dtype(dtype: Any, tmp_path: Path) -> None:
    """0.1 in float32 is larger than 0.1."""
    path = write_npy(tmp_path, VALUES.astype(dtype).clip(-0.1, 0.1))
    images = whole(load_dataset(str(path), data_range=(-0.1, 0.1))).images
    assert (float(images.min()), float(images.max())) == pytest.approx((-1, 1), abs=1e-3)
    load_dataset(str(path), data_range=(-1e6, 1e6))  # beyond float16
    write_npy(tmp_path, VALUES.astype(dtype).clip(-0.1, 0.101))
    with pytest.raises(ValueError, match=r"in channel 0; clip them, or train with more"):
        load_dataset(str(path), data_range=(-0.1, 0.1))


def test_a_part_of_a_data_set_keeps_its_ranges(tmp_path: Path) -> None:
    dataset = load_dataset(str(write_npy(tmp_path)))
    part = torch.utils.data.Subset(torch.utils.data.Subset(dataset, range(6)), [1, 3, 5])
    model = UNet(
        **{"in_channels": C, "out_channels": C, "block_out_channels": [8], "norm_num_groups": 8, "layers_per_block": 1},
        **{"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]},
    )
    options = TrainOptions(steps=1, batch_size=2, sample_every=0, progress=False, tensorboard=False)
    Trainer(model, NoiseSchedule.linear(), part, options, tmp_path / "run").run()
    assert load_folder(tmp_path / "run").model.config["data_range"] == [list(each) for each in RANGES]
    pictures = Trainer(UNet(**model.config), NoiseSchedule.linear(), [dataset[0].image], options, tmp_path / "other")
    assert pictures.model.config["data_range"] == [list(each) for each in RANGES]  # the network's own


def test_a_network_remembers_the_range(tmp_path: Path) -> None:
    """A run measures it once. Its samples are numbers of that range, and a resumed run keeps it."""
    data = str(write_npy(tmp_path, np.concatenate([VALUES] * 2)))
    options: dict[str, Any] = QUIET | {"data": data, "channels": [8], "steps": 4, "batch_size": 2}
    train(tmp_path / "whole", **options)
    train(tmp_path / "run", **options | {"steps": 2})
    np.save(data, np.concatenate([VALUES, VALUES.clip(2, 4)]))
    train(tmp_path / "run", **options | {"steps": 3}, resume=True, data_check="off")
    loaded = load_folder(tmp_path / "run")
    assert loaded.model.config["data_range"] == [list(each) for each in RANGES]
    assert loaded.model.config["sample_size"] == [H, W]
    np.save(data, 2 * np.concatenate([VALUES] * 2))
    with pytest.raises(ValueError, match=r"a\.npy\[0\] to be in .*, the data_range"):
        train(tmp_path / "run", **options, resume=True, data_check="off")
    np.save(data, np.concatenate([VALUES] * 2))
    train(tmp_path / "again", **options | {"steps": 2})
    train(tmp_path / "again", **options, resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "again")
    sampler = loaded.sampler(ddpm_plan(loaded.objective.schedule, 2))
    out = write_samples(tmp_path / "out.npz", sampler, 3, batch_size=2, progress=False)
    with np.load(out) as archive:
        drawn = archive["arr_0"]
    assert (drawn.dtype, drawn.shape) == (np.float32, (3, H, W, C))
    assert np.all((drawn.min(axis=(0, 1, 2)) >= LOW) & (drawn.max(axis=(0, 1, 2)) <= HIGH))
    assert len(set(drawn.max(axis=(0, 1, 2)).tolist())) == C
    checkpoint = newest_checkpoint(tmp_path / "again")
    assert checkpoint is not None
    assert not (tmp_path / "out.npz.parts").exists()
    assert to_unit_range(whole(load_dataset(str(out), data_range=RANGES)).images).abs().max() <= 1


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        (np.array(["a", "b"]), r"the labels of .*a\.npz to be integers \[2\], got <U1 \[2\]"),
        (np.array([0, np.nan]), r"the labels of .*a\.npz to be integers \[2\], got float64 \[2\]"),
        (np.array([0, 1 << 62]), r"labels in 0\.\.65535, got 4611686018427387904, in '.*a\.npz'"),  # no list of as many classes
    ],
)
def test_labels_of_an_archive_are_checked_before_classes_are_counted(labels: np.ndarray, wanted: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((2, 4, 4), np.uint8), arr_1=labels)
    with pytest.raises(ValueError, match=f"^load_dataset: expected {wanted}"):
        load_dataset(str(tmp_path / "a.npz"))


def test_a_number_is_no_array_of_images(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", 3.0)
    with pytest.raises(ValueError, match=r"a\.npy to be \[N, H, W\] or 4-d, got \[\]"):
        load_dataset(str(tmp_path / "a.npy"))
