"""Images that do not fit into the memory for data: they are decoded ahead, batch by batch."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import train

from ddpm_fast.checks import checked_bytes
from ddpm_fast.training.data import ImageDataset, load_dataset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of 30 images of 8x8 pixels in two classes."""
    random = np.random.default_rng(0)
    for i in range(30):
        file = tmp_path / "images" / "ab"[i % 2] / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)
    return tmp_path / "images"


def encoded(folder: Path, *, memory: int = 0, **options: Any) -> ImageDataset:
    dataset = load_dataset(str(folder), memory=0, **options)
    return replace(dataset, images=replace(dataset.images, memory=memory))


def decoding_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ddpm_fast-decode")]


@pytest.mark.parametrize("workers", [1, 2, 7])
@pytest.mark.parametrize("image_size", [None, 5])
def test_batches_are_those_of_images_in_memory(
    folder: Path, image_size: int | None, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: workers)
    whole = load_dataset(str(folder), image_size=image_size)
    dataset = encoded(folder, image_size=image_size)
    assert isinstance(whole.images, torch.Tensor)
    assert not isinstance(dataset.images, torch.Tensor)
    assert (dataset.shape, len(dataset), dataset.classes) == (whole.shape, 30, ("a", "b"))
    assert dataset.preparation == whole.preparation
    assert dataset.fingerprint(exact=True) == whole.fingerprint(exact=True)
    generator = torch.Generator().manual_seed(0)
    indices = [torch.randint(0, 30, (size,), generator=generator) for size in (16, 1, 0, 7, 30, 3, 16)]
    batches = list(dataset.batches(indices))
    for each, batch, expected in zip(indices, batches, whole.batches(indices), strict=True):
        assert torch.equal(batch[0], expected[0])
        assert torch.equal(batch[1], expected[1])
        assert torch.equal(dataset.batch(each)[0], expected[0])
    assert not decoding_threads()
    for index in (0, 29, -1):
        image, label = dataset[index]
        assert torch.equal(image, whole[index][0])
        assert (type(label), label) == (int, whole[index][1])


def test_memory_decides_where_images_are(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    needed = 30 * 3 * 8 * 8
    assert isinstance(load_dataset(str(folder), memory=needed).images, torch.Tensor)
    with caplog.at_level(logging.INFO):
        assert not isinstance(load_dataset(str(folder), memory=needed - 1).images, torch.Tensor)
    assert "batch by batch, as all take 0.0 MB and data_memory is 0.0 MB" in caplog.text


def test_sizes_are_checked_without_decoding(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddpm_fast.training.data.image_files.resized", lambda *_: pytest.fail("an image was decoded"))
    load_dataset(str(folder), memory=0)
    (folder / "a" / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"got 1 of 31 that it cannot: a/text\.png \(UnidentifiedImageError\); remove"):
        load_dataset(str(folder), memory=0, image_size=8)
    (folder / "a" / "text.png").unlink()
    Image.new("RGB", (9, 8)).save(folder / "b" / "wide.png")
    with pytest.raises(ValueError, match=r"got None with sizes 8x8 \(30\), 9x8 \(1\)"):
        load_dataset(str(folder), memory=0)


@pytest.mark.parametrize(("memory", "ahead"), [(0, 1), (3 * 4 * 192, 2), (10**9, 4)])
def test_few_decoded_images_wait(folder: Path, memory: int, ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Count images that are decoded, with batches of 4, of which each is in use until the next one is asked for."""
    from ddpm_fast.training.data import image_files

    resized, begun, lock = image_files.resized, [0], threading.Lock()

    def count(*arguments: Any) -> np.ndarray:
        with lock:
            begun[0] += 1
        return resized(*arguments)

    monkeypatch.setattr(image_files, "resized", count)
    dataset = encoded(folder, memory=memory)
    taken = [0]

    def indices() -> Iterator[torch.Tensor]:
        for _ in range(20):
            taken[0] += 1
            yield torch.arange(4)

    for number, _ in enumerate(dataset.batches(indices()), 1):
        assert taken[0] == min(20, number + ahead)
        assert begun[0] <= 4 * (number + ahead)


def break_image(file: Path) -> None:
    """Damage the pixels of a PNG and keep its header."""
    content = bytearray(file.read_bytes())
    content[50] ^= 255
    file.write_bytes(content)


def test_a_broken_image_is_an_error_of_its_batch(folder: Path) -> None:
    break_image(folder / "b" / "11.png")  # number 20
    dataset = encoded(folder)
    batches = dataset.batches(torch.arange(30).split(4))
    for _ in range(5):
        next(batches)
    wanted = r"Pillow can read in .*images, got b/11\.png \(.*\); remove them; in training, skip_broken=True"
    with pytest.raises(ValueError, match=wanted):
        next(batches)
    assert not decoding_threads()
    with pytest.raises(ValueError, match=wanted):
        dataset[20]


def test_broken_images_are_left_out_after_one_pass(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    break_image(folder / "b" / "11.png")
    with caplog.at_level(logging.INFO):
        dataset = encoded(folder, skip_broken=True)
    assert "once, to find broken ones" in caplog.text
    assert "1 of 30 images in" in caplog.text
    whole = load_dataset(str(folder), skip_broken=True)
    assert len(dataset) == 29
    assert torch.equal(dataset.batch(torch.arange(29))[0], whole.images)
    assert dataset.fingerprint(exact=True) == whole.fingerprint(exact=True)


def test_closing_early_stops_the_threads(folder: Path) -> None:
    dataset = encoded(folder)
    with closing(dataset.batches(torch.arange(4) for _ in itertools.count())) as batches:  # endless indices
        next(batches)
        assert decoding_threads()
    assert not decoding_threads()


def test_resized_arrays_are_resized_as_they_are_read() -> None:
    whole, dataset = load_dataset("digits", image_size=11), load_dataset("digits", image_size=11, memory=0)
    assert not isinstance(dataset.images, torch.Tensor)
    assert (dataset.shape, dataset.preparation) == (whole.shape, whole.preparation)
    indices = torch.randperm(1500, generator=torch.Generator().manual_seed(0)).split(64)
    for batch, expected in zip(dataset.batches(indices), whole.batches(indices), strict=True):
        assert torch.equal(batch[0], expected[0])
    assert isinstance(load_dataset("digits", memory=0).images, torch.Tensor)  # its source is in memory anyway


def test_training_has_the_same_bits(folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": folder, "channels": (32,), "attention": (), "layers": 1, "batch_size": 4, "steps": 4}
    options |= {"sample_every": 0, "tensorboard": False, "progress": False, "threads": 1}
    train(tmp_path / "whole", **options)
    train(tmp_path / "ahead", **options | {"steps": 2}, data_memory=0)
    train(tmp_path / "ahead", **options, data_memory="1kB", resume=True)  # a resumed run may change it
    whole, ahead = (tmp_path / run / "checkpoints" / "latest" / "optimizer.safetensors" for run in ("whole", "ahead"))
    assert whole.read_bytes() == ahead.read_bytes()


@pytest.mark.parametrize(
    ("value", "number"),
    [
        *[(0, 0), (5, 5), ("5", 5), ("5B", 5), ("200MiB", 200 << 20), ("2GiB", 2 << 30), ("500MB", 500_000_000)],
        *[("1.5 GiB", 3 << 29), ("2kb", 2000), ("1TiB", 1 << 40), (" 3KB ", 3000)],
    ],
)
def test_sizes_are_read(value: int | str, number: int) -> None:
    assert checked_bytes("train", "data_memory", value) == number


@pytest.mark.parametrize("value", ["", "GiB", "-1", "2iB", "2G", "2 XB", "1e9", "nan", "2GiBs", "٢GiB", -1])
def test_other_sizes_are_refused(value: int | str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="DataOptions: expected data_memory to be "):
        train(tmp_path / "run", data_memory=value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [None, 1.5, True])
def test_other_types_of_sizes_are_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="DataOptions: expected data_memory to be a number of bytes or text such as 2GiB, got "):
        train(tmp_path / "run", data_memory=value)
