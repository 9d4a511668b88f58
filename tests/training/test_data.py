"""Data sets."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast.training.data import FASHION_MNIST_CLASSES, load_dataset, to_unit_range


def write_idx(path: Path, values: np.ndarray) -> None:
    header = b"\0\0\x08" + bytes([values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    content = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def fashion_folder(tmp_path: Path) -> tuple[Path, np.ndarray]:
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28))
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.array([3, 0, 9, 1, 1]))
    return tmp_path, images


def test_fashion_mnist_is_padded_with_black(fashion_folder: tuple[Path, np.ndarray]) -> None:
    folder, images = fashion_folder
    dataset = load_dataset("fashion-mnist", folder)
    batch, labels = dataset[torch.tensor([4, 0])]
    assert (len(dataset), dataset.shape, dataset.classes) == (5, (1, 32, 32), FASHION_MNIST_CLASSES)
    assert labels.tolist() == [1, 3]
    assert batch.dtype == torch.uint8
    np.testing.assert_array_equal(batch[:, 0, 2:-2, 2:-2], images[[4, 0]])
    black = to_unit_range(batch)
    assert black[:, :, :2].eq(-1).all()
    assert black[..., -2:].eq(-1).all()
    assert load_dataset("fashion-mnist", folder, image_size=28).shape == (1, 28, 28)


def test_damaged_idx_file_is_refused(fashion_folder: tuple[Path, np.ndarray]) -> None:
    folder, _ = fashion_folder
    labels = folder / "train-labels-idx1-ubyte"
    whole = labels.read_bytes()
    labels.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"load_dataset: expected .* to hold \[5\] bytes, got 4"):
        load_dataset("fashion-mnist", folder)
    labels.write_bytes(b"\0\0\x0d" + whole[3:])
    with pytest.raises(ValueError, match="to be an IDX file of unsigned bytes"):
        load_dataset("fashion-mnist", folder)
    labels.write_bytes(whole + b"x")
    with pytest.raises(ValueError, match=r"to hold \[5\] bytes, got 6 or more"):
        load_dataset("fashion-mnist", folder)
    labels.write_bytes(b"\0\0\x08\xff" + b"\xff" * 40)
    with pytest.raises(
        ValueError, match=r"expected .*labels-idx1-ubyte to hold 1 to \d+ bytes, got a header of shape \[4294967295, "
    ):
        load_dataset("fashion-mnist", folder)
    images = folder / "train-images-idx3-ubyte.gz"
    packed = images.read_bytes()
    for damaged in (packed[:-9], packed[2:], packed[:20] + b"x" + packed[21:]):
        images.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"load_dataset: expected .*images-idx3-ubyte\.gz to (be a whole gzip file|hold)"):
            load_dataset("fashion-mnist", folder)
    images.write_bytes(packed)
    write_idx(labels, np.array([0, 1]))
    with pytest.raises(ValueError, match=r"expected images \[N, H, W\] and labels \[N\]"):
        load_dataset("fashion-mnist", folder)


def test_digits_cover_the_range_and_splits_differ() -> None:
    train, test = load_dataset("digits"), load_dataset("digits", split="test")
    images, labels = train[torch.arange(len(train))]
    assert (len(train), len(test), train.shape) == (1500, 297, (1, 8, 8))
    assert (int(images.min()), int(images.max())) == (0, 255)
    assert labels.unique().tolist() == list(range(10))
    resized = load_dataset("digits", image_size=16)
    assert resized.shape == (1, 16, 16)
    # Resizing keeps the mean grey value; digits leave the border, where the antialiasing kernel is cut, almost black.
    assert abs(float(resized[torch.arange(1500)][0].float().mean() - images.float().mean())) < 1


def test_folder_is_cropped_resized_and_labelled_by_sub_folder(tmp_path: Path) -> None:
    # A wide red image with green sides, which the centred crop cuts off; a grey image; something that is no image.
    for name in ("cat", "dog/deep"):
        (tmp_path / name).mkdir(parents=True)
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, :10, 1] = wide[:, 20:, 1] = 255
    wide[:, 10:20, 0] = 255
    Image.fromarray(wide).save(tmp_path / "dog" / "deep" / "wide.png")
    Image.fromarray(np.full((40, 40), 77, dtype=np.uint8)).save(tmp_path / "cat" / "grey.PNG")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    dataset = load_dataset(str(tmp_path), image_size=20)
    images, labels = dataset[torch.tensor([1, 0, 1])]
    assert (len(dataset), dataset.shape, dataset.classes) == (2, (3, 20, 20), ("cat", "dog"))
    assert labels.tolist() == [1, 0, 1]
    assert images[1].eq(77).all()
    assert images[0][0].eq(255).all()
    assert images[0][1:].eq(0).all()
    assert torch.equal(images[0], images[2])
    for file in tmp_path.rglob("*.png"):
        file.unlink()  # decoded images are kept
    assert torch.equal(dataset[torch.tensor([1])][0][0], images[0])


def test_images_without_sub_folders_share_one_class(tmp_path: Path) -> None:
    Image.new("RGB", (6, 6)).save(tmp_path / "a.png")
    dataset = load_dataset(str(tmp_path))
    assert (dataset.shape, dataset.classes, dataset.labels.tolist()) == ((3, 6, 6), ("",), [0])
    assert dataset.preparation == "as they are"


def test_a_folder_of_other_sizes_needs_image_size(tmp_path: Path) -> None:
    for i, size in enumerate([(4, 6), (4, 6), (8, 8)]):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match=r"expected image_size, .* got None with sizes 4x6 \(2\), 8x8 \(1\); .*--image-size"):
        load_dataset(str(tmp_path))
    dataset = load_dataset(str(tmp_path), image_size=4)
    assert (dataset.shape, dataset.preparation) == ((3, 4, 4), "cropped to squares and resized")
    (tmp_path / "2.png").unlink()
    with pytest.raises(ValueError, match=r"with sizes 4x6 \(2\);"):  # one size, but no squares
        load_dataset(str(tmp_path))


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"load_dataset: expected name to be one of .* or a folder, got 'mnist'"):
        load_dataset("mnist")
    with pytest.raises(ValueError, match="load_dataset: expected split"):
        load_dataset("digits", split="val")
    with pytest.raises(ValueError, match="load_dataset: expected image_size to be a positive integer or None, got 0"):
        load_dataset("digits", image_size=0)
    with pytest.raises(ValueError, match=r"to hold images .* got none"):
        load_dataset(str(tmp_path))


@pytest.mark.parametrize(("name", "module"), [("cifar10", "torchvision.datasets"), ("digits", "sklearn.datasets")])
def test_missing_package_names_the_extra(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module.split(".")[0], None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ImportError, match=rf"{module} is missing: install it with pip install 'ddpm_fast\[train\]'"):
        load_dataset(name)
