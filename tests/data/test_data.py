"""Data sets."""

from __future__ import annotations

import gzip
import logging
import os
import reprlib
import sys
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from items import assert_equal, encoded, flip_bits, read_data, whole, write
from PIL import Image
from refusals import by, refused

from ddpm_fast import DataOptions
from ddpm_fast.data import published
from ddpm_fast.data.items import collate, read_batch, to_unit_range
from ddpm_fast.data.published import FASHION_MNIST_CLASSES
from ddpm_fast.data.sources import PICTURES
from ddpm_fast.errors import InvalidValue


def idx(values: np.ndarray) -> bytes:
    """Return the content of an IDX file of unsigned bytes."""
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.astype(np.uint8).tobytes()


IMAGES = np.random.default_rng(0).integers(0, 256, (5, 28, 28))
PACKED, LABELS = gzip.compress(idx(IMAGES), mtime=0), idx(np.array([3, 0, 9, 1, 1]))
IMAGE_FILE, LABEL_FILE = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte"
GREYS = np.array([[0, 64], [128, 255]], dtype=np.uint8)


@pytest.fixture
def fashion_folder(tmp_path: Path) -> Path:
    (tmp_path / IMAGE_FILE).write_bytes(PACKED)
    (tmp_path / LABEL_FILE).write_bytes(LABELS)
    return tmp_path


def test_fashion_mnist_is_padded_with_black(fashion_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = read_data("fashion-mnist", fashion_folder)
    batch, labels, _ = read_batch(dataset, torch.tensor([4, 0]))
    assert (len(dataset), dataset.info.shape, dataset.info.classes) == (5, (1, 32, 32), FASHION_MNIST_CLASSES)
    assert dataset.info.preparation == "padded with black from 28x28"
    assert labels.tolist() == [1, 3]
    assert batch.dtype == torch.uint8
    np.testing.assert_array_equal(batch[:, 0], np.pad(IMAGES[[4, 0]], [(0, 0), (2, 2), (2, 2)]))
    assert to_unit_range(batch)[:, :, :2].eq(-1).all()  # black
    for file in fashion_folder.iterdir():
        file.rename(file.with_name(file.name.replace("train", "t10k")))
    monkeypatch.setattr(published, "FASHION_MNIST_DEBIAN", fashion_folder)  # a package's, read without an argument
    unpadded = read_data("fashion-mnist", split="test", image_size=28)
    assert (unpadded.info.shape, unpadded.info.preparation) == ((1, 28, 28), "not resized")
    np.testing.assert_array_equal(whole(unpadded).images[:, 0], IMAGES)
    enlarged = read_data("fashion-mnist", fashion_folder, split="test", image_size=64).info
    assert enlarged.preparation == "resized from 32x32, padded with black from 28x28"


NO_IDX, NO_GZIP = (
    r".*labels-idx1-ubyte to be an IDX file of unsigned bytes \[N\], got header",
    r".*images-idx3-ubyte\.gz to be ",
)


@pytest.mark.parametrize(
    ("file", "content", "wanted"),
    [
        (LABEL_FILE, LABELS[:-1], r".*labels-idx1-ubyte to hold \[5\] bytes, got 4"),
        (LABEL_FILE, LABELS + b"x", r".*labels-idx1-ubyte to hold \[5\] bytes, got 6"),
        (LABEL_FILE, b"\0\0\x08\x01" + b"\xff" * 40, r".*labels-idx1-ubyte to hold \[4294967295\] bytes, got 36"),
        (LABEL_FILE, b"\0\0\x08\x01" + bytes(4), r".*labels-idx1-ubyte to hold \[0\] bytes, got 0"),
        (LABEL_FILE, b"\0\0\x0d" + LABELS[3:], rf"{NO_IDX} .* \[5\]"),
        (LABEL_FILE, b"\0\0\x08\xff" + b"\xff" * 40, rf"{NO_IDX} .* \[4294967295\]"),
        (LABEL_FILE, b"\0\0\x08\x02\0\0", rf"{NO_IDX} .* \[\]"),  # ends within its shape
        (LABEL_FILE, b"", rf"{NO_IDX} b'' \[\]"),
        (LABEL_FILE, idx(np.array([0, 1])), r"the labels of .*labels-idx1-ubyte to be integers \[5\], got uint8 \[2\]"),
        (LABEL_FILE, idx(np.array([3, 0, 10, 1, 1])), r"labels in 0\.\.9, got 10, in '.*labels-idx1-ubyte'"),
        (IMAGE_FILE, PACKED[:-9], f"{NO_GZIP}(a whole gzip file|an IDX file)"),
        (IMAGE_FILE, PACKED[2:], f"{NO_GZIP}(a whole gzip file|an IDX file)"),
        (IMAGE_FILE, PACKED[:20] + b"x" + PACKED[21:], f"{NO_GZIP}(a whole gzip file|an IDX file)"),
        (IMAGE_FILE, PACKED[:-20], f"{NO_GZIP}a whole gzip file, got: "),
        (
            IMAGE_FILE,
            gzip.compress(idx(np.zeros((5, 14, 56))), mtime=0),
            rf"{NO_GZIP}an IDX file of unsigned bytes \[N, 28, 28\], got header .* \[5, 14, 56\]",
        ),
    ],
    ids=reprlib.repr,
)
def test_damaged_idx_file_is_refused(file: str, content: bytes, wanted: str, fashion_folder: Path) -> None:
    (fashion_folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"^load_dataset: expected {wanted}"):
        read_data("fashion-mnist", fashion_folder)


def test_an_idx_file_is_unpacked_up_to_a_limit(fashion_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "_MAX_IDX", 1000)
    with pytest.raises(ValueError, match=r"images-idx3-ubyte\.gz to hold \[5, 28, 28\] bytes, got 984"):
        read_data("fashion-mnist", fashion_folder)


def test_digits_cover_the_range_and_splits_differ() -> None:
    train, test = read_data("digits"), read_data("digits", split="test")
    images, labels, _ = whole(train)
    assert (len(train), len(test), train.info.shape) == (1500, 297, (1, 8, 8))
    assert (int(images.min()), int(images.max())) == (0, 255)
    assert labels.unique().tolist() == list(range(10))


@pytest.mark.parametrize("size", [3, 16])
def test_resized_arrays_are_means_of_all_their_pixels(size: int) -> None:
    """Pillow takes the same means. Without antialiasing, most pixels of shrunk images would be left out."""
    dataset = read_data("digits", image_size=size, first=9)
    assert (dataset.info.shape, dataset.info.preparation) == ((1, size, size), "resized from 8x8")
    for image, resized in zip(whole(read_data("digits")).images[:9, 0], whole(dataset).images[:, 0], strict=True):
        wanted = Image.fromarray(image.float().numpy()).resize((size, size), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(resized.numpy(), np.asarray(wanted), atol=0.501)  # rounded


def test_folder_is_cropped_resized_and_labelled_by_sub_folder(tmp_path: Path) -> None:
    # A wide red image with green sides, which the centred crop cuts off; a grey image; something that is no image.
    red, green = [255, 0, 0], [0, 255, 0]
    wide = np.full((10, 30, 3), green, dtype=np.uint8)
    wide[:, 10:20] = red
    grey = np.full((40, 40), 77, dtype=np.uint8)
    write(tmp_path, {"dog/deep/wide.png": encoded(wide), "cat/grey.PNG": encoded(grey), "cat/notes.txt": b"no image"})
    dataset = read_data(str(tmp_path), image_size=20)
    assert (dataset.info.shape, dataset.info.classes) == ((3, 20, 20), ("cat", "dog"))
    for file in tmp_path.rglob("*.*"):
        file.unlink()  # decoded images are kept
    images, labels, _ = whole(dataset)
    assert labels.tolist() == [0, 1]
    assert images[0].eq(77).all()
    np.testing.assert_array_equal(images[1].permute(1, 2, 0), np.full((20, 20, 3), red))


def test_a_folder_of_other_sizes_needs_image_size(tmp_path: Path) -> None:
    for i, size in enumerate([(4, 6), (4, 6), (8, 8)]):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    with pytest.raises(
        ValueError, match=r"expected image_size to be given, .* got None with sizes 4x6 \(2\), 8x8 \(1\); .*--image-size"
    ):
        read_data(str(tmp_path))
    dataset = read_data(str(tmp_path), image_size=4)
    assert (dataset.info.shape, dataset.info.preparation) == ((3, 4, 4), "cropped and resized, in RGB")
    (tmp_path / "2.png").unlink()
    assert read_data(str(tmp_path)).info.shape == (3, 6, 4)


UNKNOWN = ("data", "to be one of digits, fashion-mnist, cifar10, a folder, or a .zip, .npy or .npz")
KINDS = f"to hold images ({', '.join(PICTURES)}) or arrays"
PAIRS = ("data_range", "to be two numbers, or two a channel")


@pytest.mark.parametrize(
    ("name", "options", "expected", "got"),
    [
        ("mnist", {}, UNKNOWN, "'mnist', which does not exist"),
        ("imges", {}, UNKNOWN, "'imges', which does not exist; did you mean 'images'?"),
        ("images/../imges/", {}, UNKNOWN, "'images/../imges/', which does not exist; did you mean 'images/../images'?"),
        ("face.zip", {}, UNKNOWN, "'face.zip', which does not exist; did you mean 'faces.zip'?"),
        ("cifar-10", {}, UNKNOWN, "'cifar-10', which does not exist; did you mean 'cifar10'?"),
        ("note.txt", {}, UNKNOWN, "'note.txt', which does not exist"),  # a file of another kind is no data set
        ("no/where/images", {}, UNKNOWN, "'no/where/images', which does not exist: there is no folder 'no/where'"),
        ("empty", {}, ("empty", KINDS), "none"),
        ("mixed", {}, ("mixed", KINDS), "images, such as a.png, and arrays, such as a.npy; move one kind to another folder"),
        ("digits", {"split": "val"}, ("split", "to be one of train, test"), "'val'"),
        ("digits", {"colors": "rgb"}, ("colors", "to be those of digits, 1 channels"), "3"),
        ("a.npy", {"colors": "grey"}, ("colors", "to be those of a.npy, 5 channels"), "1"),
        (
            "images",
            {"data_range": (0, 1)},
            ("data_range", "to be None for image files, as arrays alone have ranges"),
            "((0.0, 1.0),)",
        ),
        (
            "images",
            {"condition": "mask", "condition_range": (0, 9)},
            ("condition_range", "to go with a condition that is read from files"),
            "((0.0, 9.0),)",
        ),
        ("a.npy", {"data_range": [(-9, 9)] * 2}, ("data_range", "to be one range, or one for each of 5 channels"), "2"),
    ],
)
def test_bad_requests_are_refused(
    name: str, options: Any, expected: tuple[str, str], got: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistyped path also says what may have been meant."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    image, numbers = encoded(GREYS), np.arange(240.0).reshape(2, 4, 6, 5)
    files = {"images/a.png": image, "a.npy": numbers, "mixed/a.png": image, "mixed/a.npy": numbers[0]}
    write(tmp_path, files | {"faces.zip": b"", "notes.txt": b""})
    with refused(by("load_dataset", InvalidValue(*expected, got))):
        read_data(name, **options)


@pytest.mark.parametrize("wrong", [(1,), "01", 5, [(0, 1), (1,)], [], [(0, 1), (5, 1)]])
def test_ranges_are_pairs_in_ascending_order(wrong: Any) -> None:
    ascends = isinstance(wrong, list) and len(wrong) > 1 and len(wrong[1]) == 2
    expected, got = (("data_range", "to have the lower number first"), "(5, 1)") if ascends else (PAIRS, repr(wrong))
    with refused(by("DataOptions", InvalidValue(*expected, got))):
        DataOptions(data_range=wrong)


def test_data_sets_are_map_style() -> None:
    dataset = read_data("digits")
    image, label, condition = dataset[7]
    assert (image.dtype, image.shape, type(label), condition) == (torch.uint8, (1, 8, 8), int, None)
    assert (dataset.info.dtype, dataset.info.condition, dataset.info.condition_channels) == (torch.uint8, None, 0)
    (batch,) = torch.utils.data.DataLoader(dataset, batch_size=1500, collate_fn=collate)  # each item by itself
    assert_equal(batch, whole(dataset))
    assert batch.labels.dtype == torch.int64
    assert len(list(dataset)) == len(dataset)  # type: ignore[call-overload]  # an index beyond the end is an IndexError
    assert torch.equal(dataset[-1].image, dataset[1499].image)
    with pytest.raises(IndexError):
        dataset[-1501]
    with pytest.raises(TypeError):
        dataset[torch.arange(2)]  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [("cifar10", "torchvision.datasets", "train"), ("digits", "sklearn.datasets", "train"), (".", "datasets", "datasets")],
)
def test_missing_package_names_the_extra(
    name: str, module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dataset_info.json").write_text("{}")  # as in a folder of Hugging Face's `datasets`
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, module.split(".")[0], None)
    with pytest.raises(ImportError, match=rf"{module} is missing: install it with pip install 'ddpm_fast\[{extra}\]'"):
        read_data(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "source", "download", "wanted"),
    [
        (
            "cifar10",
            "CIFAR10",
            "torchvision.datasets.utils.download_url",
            r"from https://www\.cs\.toronto\.edu/.*, got .*unreachable.*put cifar-10-binary\.tar\.gz into .*",
        ),
        (
            "fashion-mnist",
            "FashionMNIST",
            "torchvision.datasets.FashionMNIST.__init__",
            r"from http.*, got .*unreachable.*put train-images-idx3.* into .*",
        ),
    ],
)
def test_a_failed_download_says_where_from_and_what_else_to_do(
    name: str, source: str, download: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchvision.datasets")
    monkeypatch.setattr(download, Mock(side_effect=urllib.error.URLError("network is\nunreachable")))
    with pytest.raises(OSError, match=rf"load_dataset: expected {source} in '{tmp_path}' or {wanted}--data-dir\)") as info:
        read_data(name, tmp_path)
    assert ("Debian's package dataset-fashion-mnist" in str(info.value)) == (name == "fashion-mnist")
    assert "\n" not in str(info.value)
    assert not list(tmp_path.iterdir())  # no part of a file


# ---------------------------------------------------------------------------------------------------------- kinds of images


def one_image(folder: Path, colors: str | None = None) -> np.ndarray:
    """Return the only image of a folder, [H, W, C]."""
    dataset = read_data(str(folder), colors=colors)
    assert len(dataset) == 1
    return dataset[0].image.permute(1, 2, 0).numpy()


WRITTEN = {
    "png": ["1", "L", "P", "RGB", "LA", "RGBA"],
    "tif": ["1", "L", "P", "PA", "RGB", "CMYK", "YCbCr", "LAB", "LA", "RGBA"],
    "jpg": ["L", "RGB", "CMYK", "YCbCr"],
    "webp": ["RGB", "RGBA"],
    "gif": ["P"],
}


@pytest.mark.parametrize(("ending", "mode"), [(ending, mode) for ending, modes in WRITTEN.items() for mode in modes])
def test_colours_of_every_mode_come_out_as_rgb_or_grey(ending: str, mode: str, tmp_path: Path) -> None:
    colour = np.full((8, 8, 3), [240, 100, 100], dtype=np.uint8)
    image = Image.fromarray(colour)
    if mode == "LAB":
        ImageCms = pytest.importorskip("PIL.ImageCms")
        image = ImageCms.profileToProfile(image, *map(ImageCms.createProfile, ("sRGB", "LAB")), outputMode="LAB")
    else:
        for step in {"LA": ("L", "LA"), "PA": ("P", "PA")}.get(mode, (mode,)):
            image = image.convert(step, palette=Image.Palette.ADAPTIVE, dither=Image.Dither.NONE)
    # Pillow before 13 cannot read back a YCbCr TIFF that is not compressed.
    options = {"compression": "tiff_lzw"} if (ending, mode) == ("tif", "YCbCr") else {}
    image.save(tmp_path / f"a.{ending}", **options)
    grey = {"1": 255, "L": 142, "LA": 142}
    for wanted, channels in ((None, 1 if mode in grey else 3), ("rgb", 3), ("grey", 1)):
        expected = colour if channels == 3 and mode not in grey else grey.get(mode, 142)
        np.testing.assert_allclose(one_image(tmp_path, wanted).astype(int), np.broadcast_to(expected, (8, 8, channels)), atol=4)


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bits_are_scaled_to_eight(ending: str, tmp_path: Path) -> None:
    offsets = np.array([[100, 100], [-100, -100]])
    Image.fromarray((GREYS.astype(int) * 257 + offsets).astype(np.uint16)).save(tmp_path / f"a.{ending}")
    np.testing.assert_array_equal(one_image(tmp_path), GREYS[..., None])
    np.testing.assert_array_equal(one_image(tmp_path, "rgba"), np.dstack([GREYS, GREYS, GREYS, np.full((2, 2), 255)]))


@pytest.mark.parametrize(
    ("name", "orientation", "turned"),
    [
        ("a.png", 3, lambda pixels: np.rot90(pixels, 2)),
        ("a.jpg", 5, np.transpose),  # from 5 on, the sides change places
        ("a.jpg", 6, lambda pixels: np.rot90(pixels, -1)),  # the camera was held upright
        ("a.tiff", 6, lambda pixels: np.rot90(pixels, -1)),
    ],
)
def test_exif_turns_an_image(name: str, orientation: int, turned: Callable[[np.ndarray], np.ndarray], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.repeat(np.repeat(GREYS, 8, axis=0), 16, axis=1)  # JPEG compresses blocks of 8x8 pixels
    Image.fromarray(pixels).convert("RGB").save(tmp_path / name, exif=exif)  # Pillow misreads a turned TIFF in grey
    np.testing.assert_allclose(one_image(tmp_path)[..., 0], turned(pixels), atol=4)


def test_digits_may_be_numbers_of_a_stated_range() -> None:
    dataset, pictures = read_data("digits", data_range=(0, 510)), read_data("digits")
    assert (dataset.info.data_range, dataset.info.dtype) == (((0.0, 510.0),), torch.float32)
    torch.testing.assert_close(whole(dataset).images, whole(pictures).images / 255 - 1)


def test_a_range_that_is_unknown_is_refused_with_the_name(tmp_path: Path) -> None:
    for name, dtype in (("float", np.float32), ("int", np.int32)):
        Image.fromarray(GREYS.astype(dtype)).save(tmp_path / f"{name}.tif")
    wanted = r"got 2 of 2 that it cannot: float\.tif \(.*: expected 8 or 16 bits per channel, got pixels of mode F.*int\.tif"
    with pytest.raises(ValueError, match=wanted):
        read_data(str(tmp_path))


def test_transparent_pixels_lie_on_white(tmp_path: Path) -> None:
    pixels = np.zeros((3, 3, 4), dtype=np.uint8)
    pixels[..., 3] = 0, 128, 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert one_image(tmp_path)[0, :, 0].tolist() == [255, 127, 0]
    palette = Image.fromarray(np.array([[0, 1]] * 2, dtype=np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "a.png", transparency=0)
    assert one_image(tmp_path)[0].tolist() == [[255, 255, 255], [40, 50, 60]]
    Image.fromarray(GREYS).save(tmp_path / "a.png", transparency=64)
    assert one_image(tmp_path)[..., 0].tolist() == [[0, 255], [128, 255]]


@pytest.mark.parametrize("ending", ["gif", "png", "webp", "tif"])
def test_an_animation_gives_its_first_frame(ending: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), (value, value, value)) for value in (200, 90, 10)]
    frames[0].save(tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(one_image(tmp_path), 200, atol=4)


def test_a_folder_that_is_a_link_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "b").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"load_dataset: expected folders without links in .*data, got '.*data/b'"):
        read_data(str(tmp_path / "data"))


# ------------------------------------------------------------------------------------------------------------ broken images


BROKEN = 10


def break_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write two good images, and `BROKEN` that are broken, each in another way or of another kind."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for name in ("good.png", "cut.png", "cut.jpg", "cut.webp", "damaged.png", "zz_good.bmp"):
        Image.fromarray(noise).save(folder / name)
    for name in ("cut.png", "cut.jpg", "cut.webp"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-150])
    flip_bits(folder / "damaged.png", 50, 255)  # within the compressed pixels
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("no image")
    (folder / "link.png").symlink_to("nowhere")
    (folder / "class").mkdir()
    (folder / "class" / "empty.png").touch()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    Image.new("1", (17, 18)).save(folder / "bomb.png")
    Image.new("1", (60, 60)).save(folder / "greater_bomb.png")


@pytest.mark.parametrize("image_size", [None, 8])
def test_broken_images_are_named_before_any_work(
    image_size: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_images(tmp_path, monkeypatch)
    wanted = (
        rf"expected images that Pillow can read in .*, got {BROKEN} of {BROKEN + 2} that it cannot: bomb\.png \(Decompression"
        rf".*cut\.jpg \(OSError: .* and {BROKEN - 5} more; .*\(--skip-broken\) leaves out those of data"
    )
    with pytest.raises(ValueError, match=wanted):
        read_data(str(tmp_path), image_size=image_size)


@pytest.mark.parametrize(("image_size", "memory"), [(None, None), (8, None), (None, 0), (8, 0)])
def test_broken_images_can_be_left_out(
    image_size: int | None,
    memory: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    break_images(tmp_path, monkeypatch)
    with caplog.at_level(logging.WARNING):
        dataset = read_data(str(tmp_path), image_size=image_size, skip_broken=True, data_memory=memory)
    images, labels, _ = whole(dataset)
    assert (len(dataset), dataset.info.classes, labels.tolist()) == (2, ("",), [0, 0])
    assert dataset.in_memory == (memory is None)
    assert torch.equal(images[0], images[1])
    assert images.float().std() > 10
    assert f"{BROKEN} of {BROKEN + 2} images in {tmp_path} left out: bomb.png (Decomp" in caplog.text
    assert caplog.text.count("left out") == 1


def test_a_folder_of_broken_images_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    for image_size in (None, 8):
        with pytest.raises(ValueError, match=r"got 1 of 1 that it cannot: a\.png \(UnidentifiedImageError\)"):
            read_data(str(tmp_path), image_size=image_size, skip_broken=True)


def test_pipes_and_folders_with_names_of_images_are_none(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": encoded(GREYS), "folder.png/notes.txt": b""})
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    assert len(read_data(str(tmp_path))) == 1


def test_a_folder_that_must_not_be_read_is_no_empty_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"a/a.png": encoded(GREYS), "b/b.png": encoded(GREYS)})
    scandir = os.scandir

    def forbid(path: str) -> object:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbid)  # root may read anything
    with pytest.raises(PermissionError, match=r"Permission denied: '.*b'"):
        read_data(str(tmp_path))


def test_names_that_are_no_text_are_read(tmp_path: Path) -> None:
    try:
        write(tmp_path / os.fsdecode(b"\xff.png"), encoded(GREYS))
    except OSError:
        pytest.skip("the file system has names of text alone")
    assert len(read_data(str(tmp_path)).fingerprint(exact=True)) == 2


@pytest.mark.parametrize("skip_broken", [False, True])
def test_only_the_first_images_are_read_but_all_classes_counted(skip_broken: bool, tmp_path: Path) -> None:
    write(tmp_path, {"b/broken.png": b"", "a/0.png": encoded(GREYS)})
    dataset = read_data(str(tmp_path), first=1, skip_broken=skip_broken)
    assert (len(dataset), dataset.info.classes, whole(dataset).labels.tolist()) == (1, ("a", "b"), [0])


@pytest.mark.parametrize("memory", [None, 0])
def test_a_lack_of_memory_is_no_broken_image(memory: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    monkeypatch.setattr("ddpm_fast.data.pictures.converted", Mock(side_effect=MemoryError))
    for skip_broken in (False, True):
        with pytest.raises(MemoryError):
            read_data(str(tmp_path), data_memory=memory, skip_broken=skip_broken)[0]
