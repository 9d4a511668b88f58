"""Data sets."""

from __future__ import annotations

import gzip
import logging
import os
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from items import whole
from PIL import Image
from refusals import refused

from ddpm_fast.errors import InvalidValue
from ddpm_fast.training.data import FASHION_MNIST_CLASSES, Batch, collate, load_dataset, published, read_batch, to_unit_range
from ddpm_fast.training.data.pictures import attempted, check_whole
from ddpm_fast.training.data.sources import Source


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
    batch, labels, _ = read_batch(dataset, torch.tensor([4, 0]))
    assert (len(dataset), dataset.info.shape, dataset.info.classes) == (5, (1, 32, 32), FASHION_MNIST_CLASSES)
    assert dataset.info.preparation == "padded with black from 28x28"
    assert labels.tolist() == [1, 3]
    assert batch.dtype == torch.uint8
    np.testing.assert_array_equal(batch[:, 0, 2:-2, 2:-2], images[[4, 0]])
    black = to_unit_range(batch)
    assert black[:, :, :2].eq(-1).all()
    assert black[..., -2:].eq(-1).all()
    unpadded = load_dataset("fashion-mnist", folder, image_size=28)
    assert (unpadded.info.shape, unpadded.info.preparation) == ((1, 28, 28), "as they are")
    np.testing.assert_array_equal(whole(unpadded).images[:, 0], images)
    enlarged = load_dataset("fashion-mnist", folder, image_size=64).info
    assert enlarged.preparation == "resized from 32x32, padded with black from 28x28"


def test_damaged_idx_file_is_refused(fashion_folder: tuple[Path, np.ndarray]) -> None:
    folder, _ = fashion_folder
    labels = folder / "train-labels-idx1-ubyte"
    whole_file = labels.read_bytes()
    for damaged, wanted in (
        (whole_file[:-1], r"to hold \[5\] bytes, got 4"),
        (whole_file + b"x", r"to hold \[5\] bytes, got 6"),
        (b"\0\0\x08\x01" + b"\xff" * 40, r"to hold \[4294967295\] bytes, got 36"),
        (b"\0\0\x08\x01" + bytes(4), r"to hold \[0\] bytes, got 0"),
        (b"\0\0\x0d" + whole_file[3:], r"to be an IDX file of unsigned bytes \[N\], got header .* \[5\]"),
        (b"\0\0\x08\xff" + b"\xff" * 40, r"to be an IDX file of unsigned bytes \[N\], got header .* \[4294967295\]"),
        (b"\0\0\x08\x02\0\0", r"to be an IDX file of unsigned bytes \[N\], got header .* \[\]"),  # ends within its shape
        (b"", r"to be an IDX file of unsigned bytes \[N\], got header b'' \[\]"),
    ):
        labels.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"^load_dataset: expected .*labels-idx1-ubyte {wanted}"):
            load_dataset("fashion-mnist", folder)
    labels.write_bytes(whole_file)
    images = folder / "train-images-idx3-ubyte.gz"
    packed = images.read_bytes()
    wanted = r"load_dataset: expected .*images-idx3-ubyte\.gz to be (a whole gzip file|an IDX file)"
    for damaged in (packed[:-9], packed[2:], packed[:20] + b"x" + packed[21:]):
        images.write_bytes(damaged)
        with pytest.raises(ValueError, match=wanted):
            load_dataset("fashion-mnist", folder)
    images.write_bytes(packed[:-20])
    with pytest.raises(ValueError, match=r"expected .*images-idx3-ubyte\.gz to be a whole gzip file, got: "):
        load_dataset("fashion-mnist", folder)
    write_idx(images, np.zeros((5, 14, 56)))
    with pytest.raises(ValueError, match=r"to be an IDX file of unsigned bytes \[N, 28, 28\], got header .* \[5, 14, 56\]"):
        load_dataset("fashion-mnist", folder)
    images.write_bytes(packed)
    write_idx(labels, np.array([0, 1]))
    with pytest.raises(ValueError, match=r"expected the labels of .*labels-idx1-ubyte to be integers \[5\], got uint8 \[2\]"):
        load_dataset("fashion-mnist", folder)
    write_idx(labels, np.array([3, 0, 10, 1, 1]))
    with pytest.raises(ValueError, match=r"expected labels in 0\.\.9, got 10, in '.*labels-idx1-ubyte'"):
        load_dataset("fashion-mnist", folder)


def test_an_idx_file_is_unpacked_up_to_a_limit(
    fashion_folder: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = fashion_folder
    monkeypatch.setattr(published, "_MAX_IDX", 1000)
    with pytest.raises(ValueError, match=r"images-idx3-ubyte\.gz to hold \[5, 28, 28\] bytes, got 984"):
        load_dataset("fashion-mnist", folder)


def test_digits_cover_the_range_and_splits_differ() -> None:
    train, test = load_dataset("digits"), load_dataset("digits", split="test")
    images, labels, _ = whole(train)
    assert (len(train), len(test), train.info.shape) == (1500, 297, (1, 8, 8))
    assert (int(images.min()), int(images.max())) == (0, 255)
    assert labels.unique().tolist() == list(range(10))
    resized = load_dataset("digits", image_size=16)
    assert resized.info.shape == (1, 16, 16)
    # Resizing keeps the mean grey value; digits leave the border, where the antialiasing kernel is cut, almost black.
    assert abs(float(whole(resized).images.float().mean() - images.float().mean())) < 1


def test_shrunk_arrays_are_means_of_all_their_pixels() -> None:
    """Pillow takes the same means. Without antialiasing, most pixels would be left out."""
    images, shrunk = (whole(load_dataset("digits", image_size=size, first=9)).images[:, 0] for size in (8, 3))
    for image, small in zip(images, shrunk, strict=True):
        wanted = Image.fromarray(image.float().numpy()).resize((3, 3), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(small.numpy(), np.asarray(wanted), atol=0.501)  # rounded


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
    images, labels, _ = read_batch(dataset, torch.tensor([1, 0, 1]))
    assert (len(dataset), dataset.info.shape, dataset.info.classes) == (2, (3, 20, 20), ("cat", "dog"))
    assert labels.tolist() == [1, 0, 1]
    assert images[1].eq(77).all()
    assert images[0][0].eq(255).all()
    assert images[0][1:].eq(0).all()
    assert torch.equal(images[0], images[2])
    for file in tmp_path.rglob("*.png"):
        file.unlink()  # decoded images are kept
    assert torch.equal(dataset[1].image, images[0])


def test_images_without_sub_folders_share_one_class(tmp_path: Path) -> None:
    Image.new("RGB", (6, 6)).save(tmp_path / "a.png")
    dataset = load_dataset(str(tmp_path))
    assert (dataset.info.shape, dataset.info.classes, whole(dataset).labels.tolist()) == ((3, 6, 6), ("",), [0])
    assert dataset.info.preparation == "as they are, in RGB"


def test_a_folder_of_other_sizes_needs_image_size(tmp_path: Path) -> None:
    for i, size in enumerate([(4, 6), (4, 6), (8, 8)]):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    with pytest.raises(
        ValueError, match=r"expected image_size to be given, .* got None with sizes 4x6 \(2\), 8x8 \(1\); .*--image-size"
    ):
        load_dataset(str(tmp_path))
    dataset = load_dataset(str(tmp_path), image_size=4)
    assert (dataset.info.shape, dataset.info.preparation) == ((3, 4, 4), "cropped and resized, in RGB")
    (tmp_path / "2.png").unlink()
    assert load_dataset(str(tmp_path)).info.shape == (3, 6, 4)


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    with refused(
        InvalidValue(
            "load_dataset",
            "name",
            "to be one of digits, fashion-mnist, cifar10, a folder, or a .zip, .npy or .npz",
            "'mnist', which does not exist",
        )
    ):
        load_dataset("mnist")
    with refused(InvalidValue("load_dataset", "split", "to be one of train, test", "'val'")):
        load_dataset("digits", split="val")
    with refused(
        InvalidValue("load_dataset", "image_size", "to be a positive integer, (height, width) or None, each at least 1", [0, 0])
    ):
        load_dataset("digits", image_size=0)
    with refused(InvalidValue("load_dataset", "channels", "to be a positive integer or None", "0")):
        load_dataset("cifar10", str(tmp_path), channels=0)
    with pytest.raises(ValueError, match=r"to hold images .* got none"):
        load_dataset(str(tmp_path))


def test_a_mistyped_path_says_what_may_have_been_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "faces.zip").touch()
    (tmp_path / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    wanted = "to be one of digits, fashion-mnist, cifar10, a folder, or a .zip, .npy or .npz"
    cases = [
        ("imges", "; did you mean 'images'?"),
        (f"{tmp_path}/imges/", f"; did you mean '{tmp_path}/images'?"),
        ("face.zip", "; did you mean 'faces.zip'?"),
        ("cifar-10", "; did you mean 'cifar10'?"),
        ("note.txt", ""),  # a file of another kind is no data set
        ("no/where/images", ": there is no folder 'no/where'"),
    ]
    for name, hint in cases:
        with refused(InvalidValue("load_dataset", "name", wanted, f"{name!r}, which does not exist{hint}")):
            load_dataset(name)


def test_data_sets_are_map_style() -> None:
    dataset = load_dataset("digits")
    image, label, condition = dataset[7]
    assert (image.dtype, image.shape, type(label), condition) == (torch.uint8, (1, 8, 8), int, None)
    assert (dataset.info.dtype, dataset.info.condition, dataset.info.condition_channels) == (torch.uint8, None, 0)
    (batch,) = torch.utils.data.DataLoader(dataset, batch_size=1500, collate_fn=collate)  # each item by itself
    assert isinstance(batch, Batch)
    assert torch.equal(batch.images, whole(dataset).images)
    assert torch.equal(batch.labels, whole(dataset).labels)
    assert batch.labels.dtype == torch.int64
    assert batch.conditions is None
    assert len(list(dataset)) == len(dataset)  # type: ignore[call-overload]  # an index beyond the end is an IndexError
    assert torch.equal(dataset[-1].image, dataset[1499].image)
    with pytest.raises(IndexError):
        dataset[-1501]
    with pytest.raises(TypeError):
        dataset[torch.arange(2)]  # type: ignore[index]


@pytest.mark.parametrize(("name", "module"), [("cifar10", "torchvision.datasets"), ("digits", "sklearn.datasets")])
def test_missing_package_names_the_extra(name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module.split(".")[0], None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ImportError, match=rf"{module} is missing: install it with pip install 'ddpm_fast\[train\]'"):
        load_dataset(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "source", "download", "wanted"),
    [
        (
            "cifar10",
            "CIFAR10",
            "torchvision.datasets.utils.download_url",
            r"from https://www\.cs\.toronto\.edu/.*, got: .*unreachable.*put cifar-10-binary\.tar\.gz into .*",
        ),
        (
            "fashion-mnist",
            "FashionMNIST",
            "torchvision.datasets.FashionMNIST.__init__",
            r"from http.*, got: .*unreachable.*put train-images-idx3.* into .*",
        ),
    ],
)
def test_a_failed_download_says_where_from_and_what_else_to_do(
    name: str, source: str, download: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchvision.datasets")

    def fail(*_: object, **__: object) -> None:
        raise urllib.error.URLError("network is\nunreachable")

    monkeypatch.setattr(download, fail)
    with pytest.raises(OSError, match=rf"load_dataset: expected {source} in '{tmp_path}' or {wanted}--data-dir\)") as info:
        load_dataset(name, tmp_path)
    assert ("Debian's package dataset-fashion-mnist" in str(info.value)) == (name == "fashion-mnist")
    assert "\n" not in str(info.value)
    assert not list(tmp_path.iterdir())  # no part of a file


# ---------------------------------------------------------------------------------------------------------- kinds of images


def one_image(folder: Path) -> np.ndarray:
    """Return the only image of a folder, [H, W, 3]."""
    dataset = load_dataset(str(folder))
    assert len(dataset) == 1
    return dataset[0].image.permute(1, 2, 0).numpy()


GREYS = np.array([[0, 64], [128, 255]], dtype=np.uint8)


WRITTEN = {
    "png": ["1", "L", "P", "RGB", "LA", "RGBA"],
    "tif": ["1", "L", "P", "PA", "RGB", "CMYK", "YCbCr", "LAB", "LA", "RGBA"],
    "jpg": ["L", "RGB", "CMYK", "YCbCr"],
    "webp": ["RGB", "RGBA"],
    "gif": ["P"],
}


@pytest.mark.parametrize(("ending", "mode"), [(ending, mode) for ending, modes in WRITTEN.items() for mode in modes])
def test_colours_of_every_mode_come_out_as_rgb_or_grey(ending: str, mode: str, tmp_path: Path) -> None:
    colour = np.broadcast_to(np.array([200, 60, 60], dtype=np.uint8), (8, 8, 3))
    image = Image.fromarray(np.ascontiguousarray(colour))
    if mode == "LAB":
        ImageCms = pytest.importorskip("PIL.ImageCms")
        image = ImageCms.profileToProfile(image, *map(ImageCms.createProfile, ("sRGB", "LAB")), outputMode="LAB")
    elif mode in ("P", "PA"):
        image = image.convert("P", palette=Image.Palette.ADAPTIVE).convert(mode)
    elif mode == "1":
        image = Image.new("1", image.size, 1)
    elif mode == "LA":
        image = image.convert("L").convert("LA")
    else:
        image = image.convert(mode)
    # Pillow before 13 cannot read back a YCbCr TIFF that is not compressed.
    options = {"compression": "tiff_lzw"} if (ending, mode) == ("tif", "YCbCr") else {}
    image.save(tmp_path / f"a.{ending}", **options)
    grey = {"1": 255, "L": 102, "LA": 102}
    for wanted, channels in ((None, 1 if mode in grey else 3), (3, 3), (1, 1)):
        pixels = load_dataset(str(tmp_path), channels=wanted)[0].image.permute(1, 2, 0).numpy().astype(int)
        expected = colour if channels == 3 and mode not in grey else grey.get(mode, 102)
        np.testing.assert_allclose(pixels, np.broadcast_to(expected, (8, 8, channels)), atol=4)


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bits_are_scaled_to_eight(ending: str, tmp_path: Path) -> None:
    offsets = np.array([[100, 100], [-100, -100]])
    Image.fromarray((GREYS.astype(int) * 257 + offsets).astype(np.uint16)).save(tmp_path / f"a.{ending}")
    np.testing.assert_array_equal(one_image(tmp_path), GREYS[..., None])
    pixels = load_dataset(str(tmp_path), channels=4)[0].image.permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(pixels, np.concatenate([np.repeat(GREYS[..., None], 3, 2), np.full((2, 2, 1), 255)], axis=2))


def test_turned_photographs_have_the_sides_that_are_seen(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.new("RGB", (12, 8)).save(tmp_path / "a.jpg", exif=exif)
    assert load_dataset(str(tmp_path)).info.shape == (3, 12, 8)


def test_channels_that_images_do_not_have_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with refused(InvalidValue("load_dataset", "channels", "to be one of 1, 3, 4 or None", "2")):
        load_dataset(str(tmp_path), channels=2)
    with refused(InvalidValue("load_dataset", "channels", "to be those of digits, 1", "3")):
        load_dataset("digits", channels=3)


def test_digits_may_be_numbers_of_a_stated_range() -> None:
    dataset, pictures = load_dataset("digits", data_range=(0, 510)), load_dataset("digits")
    assert (dataset.info.data_range, dataset.info.dtype) == (((0.0, 510.0),), torch.float32)
    torch.testing.assert_close(whole(dataset).images, whole(pictures).images / 255 - 1)
    with pytest.raises(
        ValueError, match=r"load_dataset: expected digits\[0\] to be in 0\.\.1, the data_range, got values from 0 to "
    ):
        load_dataset("digits", data_range=(0, 1))


def test_few_items_of_a_published_data_set_are_read() -> None:
    few, all_digits = load_dataset("digits", first=7), load_dataset("digits")
    assert len(few) == 7
    assert few.info.classes == all_digits.info.classes
    assert torch.equal(whole(few).images, whole(all_digits).images[:7])
    assert torch.equal(whole(few).labels, whole(all_digits).labels[:7])


def test_a_range_that_is_unknown_is_refused_with_the_name(tmp_path: Path) -> None:
    for name, dtype in (("float", np.float32), ("int", np.int32)):
        Image.fromarray(GREYS.astype(dtype)).save(tmp_path / f"{name}.tif")
    wanted = (
        r"got 2 of 2 that it cannot: float\.tif \(InvalidValue: expected 8 or 16 bits a channel, got pixels of mode F.*int\.tif"
    )
    with pytest.raises(ValueError, match=wanted):
        load_dataset(str(tmp_path))


def test_transparent_pixels_lie_on_white(tmp_path: Path) -> None:
    pixels = np.zeros((1, 3, 4), dtype=np.uint8)
    pixels[0, :, 3] = 0, 128, 255
    tall = np.repeat(pixels, 3, axis=0)
    Image.fromarray(tall).save(tmp_path / "a.png")
    assert one_image(tmp_path)[0, :, 0].tolist() == [255, 127, 0]
    palette = Image.fromarray(np.array([[0, 1]] * 2, dtype=np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "a.png", transparency=0)
    assert one_image(tmp_path)[0].tolist() == [[255, 255, 255], [40, 50, 60]]
    Image.fromarray(GREYS).save(tmp_path / "a.png", transparency=64)
    assert one_image(tmp_path)[..., 0].tolist() == [[0, 255], [128, 255]]


def test_exif_turns_an_image(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(GREYS).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(one_image(tmp_path)[..., 0], GREYS[::-1, ::-1])


@pytest.mark.parametrize("ending", ["gif", "png", "webp", "tif"])
def test_an_animation_gives_its_first_frame(ending: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), (value, value, value)) for value in (200, 90, 10)]
    frames[0].save(tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(one_image(tmp_path), 200, atol=4)


def test_a_folder_that_is_a_link_is_refused_by_name(tmp_path: Path) -> None:
    for folder in ("data/a", "b"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / folder / "0.png")
    (tmp_path / "data" / "b").symlink_to(tmp_path / "b")
    with pytest.raises(ValueError, match=r"load_dataset: expected folders without links in .*data, got '.*data/b'"):
        load_dataset(str(tmp_path / "data"))


# ------------------------------------------------------------------------------------------------------------ broken images


def break_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Write two good images and one of every broken kind. Return the names of the broken ones, sorted."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for name in ("good.png", "cut.png", "cut.jpg", "cut.webp", "damaged.png"):
        Image.fromarray(noise).save(folder / name)
    Image.fromarray(noise).save(folder / "zz_good.bmp")
    for name in ("cut.png", "cut.jpg", "cut.webp"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-150])
    content = bytearray((folder / "damaged.png").read_bytes())
    content[50] ^= 255  # within the compressed pixels
    (folder / "damaged.png").write_bytes(content)
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("no image")
    (folder / "link.png").symlink_to("nowhere")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    Image.new("1", (17, 18)).save(folder / "bomb.png")
    Image.new("1", (60, 60)).save(folder / "greater_bomb.png")
    return sorted(path.name for path in folder.iterdir() if "good" not in path.name)


@pytest.mark.parametrize("image_size", [None, 8])
def test_broken_images_are_named_before_any_work(
    image_size: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = break_images(tmp_path, monkeypatch)
    with pytest.raises(
        ValueError, match=r"expected images that Pillow can read in .*\(--skip-broken\) leaves out those of data"
    ) as info:
        load_dataset(str(tmp_path), image_size=image_size)
    assert f"got {len(broken)} of {len(broken) + 2} that it cannot: bomb.png (Decompression" in str(info.value)
    assert "cut.jpg (OSError: " in str(info.value)
    assert f"and {len(broken) - 5} more" in str(info.value)


@pytest.mark.parametrize("image_size", [None, 8])
def test_broken_images_can_be_left_out(
    image_size: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "broken.png").touch()
    broken = break_images(tmp_path, monkeypatch)
    with caplog.at_level(logging.WARNING):
        dataset = load_dataset(str(tmp_path), image_size=image_size, skip_broken=True)
    images, labels, _ = whole(dataset)
    assert (len(dataset), dataset.info.classes, labels.tolist()) == (2, ("",), [0, 0])
    assert torch.equal(images[0], images[1])
    assert images.float().std() > 10
    assert f"{len(broken)} of {len(broken) + 2} images in {tmp_path} left out: bomb.png (Decomp" in caplog.text
    assert caplog.text.count("left out") == 1
    names = [content.split()[0].decode() for content in list(dataset.contents(True))[1:3]]
    assert names == ["good.png", "zz_good.bmp"]


def test_a_folder_of_broken_images_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    for image_size in (None, 8):
        with pytest.raises(ValueError, match=r"got 1 of 1 that it cannot: a\.png \(UnidentifiedImageError\)"):
            load_dataset(str(tmp_path), image_size=image_size, skip_broken=True)


def test_pipes_and_folders_with_names_of_images_are_none(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    assert len(load_dataset(str(tmp_path))) == 1


def test_a_folder_that_must_not_be_read_is_no_empty_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "a" / "a.png")
    scandir = os.scandir

    def forbid(path: str) -> object:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbid)  # root may read anything
    with pytest.raises(PermissionError, match=r"Permission denied: '.*b'"):
        load_dataset(str(tmp_path))


def test_names_that_are_no_text_are_read(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff.png"
    try:
        with open(path, "wb") as file:
            Image.new("RGB", (4, 4)).save(file, format="PNG")
    except OSError:
        pytest.skip("the file system has names of text alone")
    assert len(load_dataset(str(tmp_path)).fingerprint(exact=True)) == 2


def test_only_the_first_images_are_read_but_all_classes_counted(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (4, 4), "white").save(tmp_path / "a" / "0.png")
    (tmp_path / "b" / "broken.png").touch()
    dataset = load_dataset(str(tmp_path), first=1)
    assert (len(dataset), dataset.info.classes, whole(dataset).labels.tolist()) == (1, ("a", "b"), [0])


def test_skipping_broken_images_keeps_the_classes_beyond_the_first_images(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4), "white").save(tmp_path / name / "0.png")
    assert load_dataset(str(tmp_path), first=1, skip_broken=True).info.classes == ("a", "b")


# ------------------------------------------------------------------------------------------------------------------- memory


def test_broken_images_are_kept_as_texts(caplog: pytest.LogCaptureFixture) -> None:
    """An exception would keep the frames of its traceback alive, and with them the pixels of the image."""

    def fail(index: int) -> None:
        if index == 1:
            raise ValueError("damaged")

    source = Source(root="folder", names=list("abc"), labels=torch.zeros(3), read=str)
    broken = attempted(source, fail)
    assert broken == {1: "ValueError: damaged"}
    check_whole(source, broken, skip_broken=True)
    assert "1 of 3 images in folder left out: b (ValueError: damaged)" in caplog.text


@pytest.mark.parametrize("memory", [None, 0])
def test_a_lack_of_memory_is_no_broken_image(memory: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    monkeypatch.setattr("ddpm_fast.training.data.pictures.converted", fail)
    for skip_broken in (False, True):
        with pytest.raises(MemoryError):
            load_dataset(str(tmp_path), memory=memory, skip_broken=skip_broken)[0]
