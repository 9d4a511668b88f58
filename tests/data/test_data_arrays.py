"""Data that are no pictures: .npy and .npz files and folders of them, with any number of channels."""

from __future__ import annotations

import pickle
import reprlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from items import read_data, whole, write
from runs import QUIET, train

from ddpm_fast import NoiseSchedule, Trainer, TrainOptions, UNet, load_folder, write_samples
from ddpm_fast.plan import ddpm_plan

N, H, W, C = 7, 4, 6, 5
VALUES = np.random.default_rng(0).normal(3, 2, (N, H, W, C)).astype(np.float32)
LOW, HIGH = VALUES.min(axis=(0, 1, 2)).astype(np.float64), VALUES.max(axis=(0, 1, 2)).astype(np.float64)  # one per channel
SCALED = torch.from_numpy((VALUES.astype(np.float64) - LOW) * (2 / (HIGH - LOW)) - 1)
RANGES = tuple(zip(LOW.tolist(), HIGH.tolist(), strict=True))


FOLDER = {f"{index}.npy": each for index, each in enumerate(VALUES)}


@pytest.mark.parametrize(("file", "content"), [("a.npy", VALUES), ("a.npz", {"arr_0": VALUES}), ("folder", FOLDER)])
@pytest.mark.parametrize("memory", [None, 0])
def test_numbers_are_mapped_to_the_unit_range(file: str, content: Any, memory: int | None, tmp_path: Path) -> None:
    path = str(write(tmp_path / file, content))
    dataset = read_data(path, data_memory=memory)
    assert (dataset.info.shape, dataset.info.dtype, dataset.info.classes, len(dataset)) == ((C, H, W), torch.float32, ("",), N)
    images, labels, conditions = whole(dataset)
    assert (images.dtype, labels.tolist(), conditions) == (torch.float32, [0] * N, None)
    torch.testing.assert_close(images, SCALED.permute(0, 3, 1, 2).float(), rtol=0, atol=1e-6)
    assert images.amin(dim=(0, 2, 3)).tolist() == [-1] * C
    assert images.amax(dim=(0, 2, 3)).tolist() == [1] * C
    assert dataset.info.data_range == RANGES
    assert dataset.in_memory == (memory is None or file == "a.npz")  # an .npz has been read whole
    for data_range in ((-100, 100), [(-100.0 * c, 100.0 * c) for c in range(1, C + 1)]):
        expected = torch.from_numpy(VALUES[2] / np.array(data_range, np.float32)[..., 1]).permute(2, 0, 1)
        torch.testing.assert_close(read_data(path, data_memory=memory, data_range=data_range)[2].image, expected)


def test_bytes_are_pictures(tmp_path: Path) -> None:
    pixels, labels = (VALUES[..., 0] * 10).clip(0, 255).astype(np.uint8), [2, 0, 1, 0, 0, 0, 0]
    pictures = read_data(str(write(tmp_path / "a.npz", {"arr_0": pixels, "arr_1": np.array(labels)})))
    described = pictures.info
    assert (described.shape, described.dtype, described.classes) == ((1, H, W), torch.uint8, ("0", "1", "2"))
    assert described.data_range is None
    assert whole(pictures).labels.tolist() == labels
    assert np.array_equal(whole(pictures).images[:, 0], pixels)


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.float64, np.float16])
def test_numbers_of_each_dtype_are_read(dtype: Any, tmp_path: Path) -> None:
    values = VALUES.clip(0, None) if dtype == np.uint16 else VALUES  # negative ones would wrap
    found, expected = (
        whole(read_data(str(write(tmp_path / "a.npy", each)))).images for each in ((values * 100).astype(dtype), values)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)


def changed(place: Any, value: float) -> np.ndarray:
    """Return the values with another one at a place."""
    values = VALUES.copy()
    values[place] = value
    return values


FEW, DAMAGED = np.zeros((2, 4, 4), np.uint8), r"a whole \.npy or \.npz of numbers, got"


@pytest.mark.parametrize(
    ("file", "content", "wanted"),
    [
        ("a.npy", changed((4, 1, 1, 1), np.nan), r".*a\.npy\[4\] to be finite, got NaN or infinity"),
        ("folder", FOLDER | {"4.npy": changed((4, 1, 1, 1), np.inf)[4]}, r".*4\.npy to be finite, got NaN or infinity"),
        ("ranged.npy", VALUES, r".*ranged\.npy\[0\] to be in 0\.\.1, the data_range, got values from .* to .* in channel 0"),
        ("a.npy", np.ones((2, 4, 6, 5)), r".*a\.npy to have different values, got 1 alone in channel 0; state a data_range"),
        ("a.npy", changed((..., 2), 4), r".*a\.npy to have different values, got 4 alone in channel 2; state a data_range"),
        (
            "folder",
            FOLDER | {"5.npy": VALUES[5][:2]},
            r".*5\.npy to be float32 \[5, 4, 6\], as the first, got float32 \[5, 2, 6\]",
        ),
        ("a.npy", pickle.dumps(VALUES), rf".*a\.npy to be {DAMAGED} Python objects, .* or a damaged file$"),
        ("a.npy", np.array([[[{}]]], dtype=object), rf".*a\.npy to be {DAMAGED}: Array can't be memory-mapped"),
        ("a.npz", b"PK\x03\x04 damaged", rf".*a\.npz to be {DAMAGED}: "),
        ("a.npy", np.array([[["a"]]]), r".*a\.npy\[0\] to hold numbers, got <U1"),
        ("a.npy", np.ones(3), r".*a\.npy to be \[N, H, W\] or 4-d, got \[3\]"),
        ("a.npy", np.array(3.0), r".*a\.npy to be \[N, H, W\] or 4-d, got \[\]"),
        ("a.npz", {"x": FEW, "y": FEW}, r".*a\.npz to hold one array, or arr_0 with labels in arr_1, got x, y"),
        (
            "folder",
            {"0.npz": {"arr_0": FEW[0], "arr_1": np.array(1)}},
            r".*0\.npz to hold an image alone, as sub-folders are the classes, got arr_1",
        ),
        *(
            ("a.npz", {"arr_0": FEW, "arr_1": labels}, wanted)
            for labels, wanted in (
                (np.zeros(3), r"the labels of .*a\.npz to be integers \[2\], got float64 \[3\]"),
                (np.array(["a", "b"]), r"the labels of .*a\.npz to be integers \[2\], got <U1 \[2\]"),
                (np.array([0, np.nan]), r"the labels of .*a\.npz to be integers \[2\], got float64 \[2\]"),
                # An error, and no list of as many classes.
                (np.array([0, 1 << 62]), r"labels in 0\.\.65535, got 4611686018427387904, in '.*a\.npz'"),
            )
        ),
    ],
    ids=reprlib.repr,
)
def test_wrong_arrays_are_named_before_any_work(file: str, content: Any, wanted: str, tmp_path: Path) -> None:
    path = write(tmp_path / file, content)
    with pytest.raises(ValueError, match=f"^load_dataset: expected {wanted}"):
        read_data(str(path), data_range=(0, 1) if file == "ranged.npy" else None, data_memory=0)


@pytest.mark.parametrize("bounds", [(0, 1e-310), (1e8, 1e8 + 100), (0, 1e39), (-1e-38, 0)])
def test_ranges_that_float32_cannot_resolve_are_refused(bounds: tuple[float, float], tmp_path: Path) -> None:
    """Stated ones, and those of the values themselves, which would become NaN or a few levels."""
    path = write(tmp_path / "a.npy", np.linspace(*bounds, H * W).reshape(1, H, W))
    for stated in (bounds, None):
        with pytest.raises(ValueError, match=r"expected (data_range|.*a\.npy) to hold at least 256 values of float32, got "):
            read_data(str(path), data_range=stated)
    write(path, np.linspace(1e8, 1e8 + 1e4, H * W).reshape(1, H, W))
    assert read_data(str(path))[0].image.isfinite().all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_values_at_the_ends_of_a_range_are_rounded_to_their_dtype(dtype: Any, tmp_path: Path) -> None:
    """0.1 in float32 is larger than 0.1."""
    path = write(tmp_path / "a.npy", VALUES.astype(dtype).clip(-0.1, 0.1))
    images = whole(read_data(str(path), data_range=(-0.1, 0.1))).images
    assert (float(images.min()), float(images.max())) == pytest.approx((-1, 1), abs=1e-3)
    read_data(str(path), data_range=(-1e6, 1e6))  # beyond float16
    write(path, VALUES.astype(dtype).clip(-0.1, 0.101))
    with pytest.raises(ValueError, match=r"in channel 0; clip them, or train with more"):
        read_data(str(path), data_range=(-0.1, 0.1))


def test_a_part_of_a_data_set_keeps_its_ranges(tmp_path: Path) -> None:
    dataset = read_data(str(write(tmp_path / "a.npy", VALUES)))
    part = torch.utils.data.Subset(torch.utils.data.Subset(dataset, range(6)), [1, 3, 5])
    model = UNet(
        **{"in_channels": C, "out_channels": C, "block_out_channels": [8], "norm_num_groups": 8, "layers_per_block": 1},
        **{"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]},
    )
    options = TrainOptions(steps=1, batch_size=2, sample_every=0, progress=False, tensorboard=False)
    Trainer(model, NoiseSchedule.linear(), part, options, tmp_path / "run").run()
    assert load_folder(tmp_path / "run").model.config["data_range"] == [list(each) for each in RANGES]


def test_a_network_remembers_the_range(tmp_path: Path) -> None:
    """A run measures it once. Its samples are numbers of that range, and a resumed run keeps it."""
    data = str(write(tmp_path / "a.npy", VALUES))
    options: dict[str, Any] = QUIET | {"data": data, "channels": [8], "batch_size": 2}
    train(tmp_path / "run", **options, steps=2)
    np.save(data, VALUES.clip(2, 4))
    train(tmp_path / "run", **options, steps=3, resume=True, data_check="off")
    loaded = load_folder(tmp_path / "run")
    assert loaded.model.config["data_range"] == [list(each) for each in RANGES]
    assert loaded.model.config["sample_size"] == [H, W]
    sampler = loaded.sampler(ddpm_plan(loaded.objective.schedule, 2))
    with np.load(write_samples(tmp_path / "out.npz", sampler, 3, batch_size=2, progress=False)) as archive:
        drawn = archive["arr_0"]
    assert (drawn.dtype, drawn.shape) == (np.float32, (3, H, W, C))
    assert np.all((drawn.min(axis=(0, 1, 2)) >= LOW) & (drawn.max(axis=(0, 1, 2)) <= HIGH))
    assert len(set(drawn.max(axis=(0, 1, 2)).tolist())) == C
