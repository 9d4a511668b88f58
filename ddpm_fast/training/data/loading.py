"""Load a data set by its name: scikit-learn's digits, Fashion-MNIST, CIFAR-10, or image files."""

from __future__ import annotations

import difflib
import gzip
import io
import math
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ...checks import Ranges, check_choice, check_int, check_ints, check_path, checked_ranges
from ...errors import InvalidValue, expect, renaming
from ...files.writing import replacing
from .arrays import Arrays, load_arrays
from .containers import ARRAYS, SUFFIXES, is_hub_folder, read_archive, read_file, read_folder, read_hub_folder
from .dataset import SAMPLED, ImageDataset, LazyImages, check_labels, fits, import_extra, resized_tensor
from .degradation import Degradation
from .image_files import ImageFiles, load_images
from .pairs import partners

DATASETS: Final = ("digits", "fashion-mnist", "cifar10")
FASHION_MNIST_CLASSES: Final = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
FASHION_MNIST_DEBIAN: Final = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
_CIFAR10_CLASSES: Final = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_MAX_IDX: Final = 2 << 30  # bytes of an IDX file, unpacked; EMNIST has 0.5 GiB
_MAX_ARCHIVE: Final = 256 << 20  # bytes of CIFAR-10's archive, unpacked; it has 184 MB
_RECORD: Final = 1 + 3 * 32 * 32  # bytes of an item of CIFAR-10: the label, then the pixels [3, 32, 32]
_CIFAR10_URL: Final = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_CIFAR10_MD5: Final = "c32a1d4ab5d03f1284b67883e8d87530"

_Range = Sequence[float] | Sequence[Sequence[float]] | Literal["measured"] | None
_Arrays = tuple[Tensor, Tensor, tuple[str, ...]]  # images uint8 [N, C, H, W], labels int64 [N], names of classes


def load_dataset(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    split: str = "train",
    image_size: int | Sequence[int] | None = None,
    channels: int | None = None,
    data_range: _Range = "measured",
    condition: str | os.PathLike[str] | None = None,
    condition_range: _Range = "measured",
    skip_broken: bool = False,
    first: int | None = None,
    memory: int | None = None,
) -> ImageDataset:
    """Load a data set by name.

    Images are decoded at once, so broken ones are found before any work. Images that take more than `memory` bytes are
    decoded batch by batch. Then only their headers are read at once, unless `skip_broken` is true.

    Args:
        name: "digits" (scikit-learn's 8x8 digits, no download), "fashion-mnist" (28x28, padded with black to 32x32),
            "cifar10" (32x32), or a path. A folder's sub-folders are its classes. If a folder or zip file has a
            `dataset.json`, as EDM and `write_samples` write it, the labels are those in it. A folder that Hugging Face's
            `datasets` has saved needs the `hub` extra. An .npy, an .npz, or a folder of them has arrays [H, W] or
            [H, W, C]: uint8 pictures, or other numbers, which are mapped to [-1, 1].
        data_dir: Folder that holds the files of fashion-mnist or cifar10, or receives torchvision's download. CIFAR-10 is
            read from `cifar-10-binary.tar.gz`. By default the files of Debian's package dataset-fashion-mnist if
            installed, else a folder in the user's cache.
        split: "train" or "test". A folder or zip file of images has no split: all of it is read.
        image_size: Height and width in pixels, or (height, width). Images of another size are cropped to the largest centred
            part of these proportions, and resized. By default nothing is resized, and all images must have one size.
        channels: Channels of an image: image files are read in grey (1), RGB (3) or RGBA (4). By default in grey if all files
            are grey, else in RGB.
        data_range: The two values of arrays that become -1 and 1, or two for each channel. Values outside are an error. By
            default the least and the largest of each channel, but 0 and 255 for uint8. None: pictures alone are read.
        condition: What a network reads beside x_t: "low-resolution:4", "grey" or "mask", computed from the images, or a
            second folder, archive or file. Files belong together by their paths without endings, rows by their numbers.
        condition_range: The `data_range` of the second folder.
        skip_broken: Leave out images of a folder or zip file that cannot be read, and log a warning that names the first of
            them.
        first: Read only this many images of a folder or zip file, from the first. By default all are read.
        memory: Bytes that decoded images may take. More are decoded, or resized, as they are read. By default all are
            held in memory.

    Raises:
        ValueError: The name, split or size is unknown, the images' sizes differ, no image was found, a file is damaged, or
            the images do not fit into memory.
        OSError: A download failed.
        ImportError: A package of the `train` or `hub` extra is missing.
    """
    check_choice("load_dataset", "split", split, ("train", "test"))
    check_int("load_dataset", "channels", channels, 1, optional=True)
    check_int("load_dataset", "first", first, 1, optional=True)
    check_int("load_dataset", "memory", memory, 0, optional=True)
    size = _sides(image_size)
    images_range, paired_range = _range("data_range", data_range), _range("condition_range", condition_range)
    if condition is not None:
        check_path("load_dataset", "condition", condition)
    degradation = None if condition is None else Degradation.named(os.fspath(condition))
    paired = None
    if condition is not None and degradation is None:
        wanted = "to be low-resolution:2 to low-resolution:64, grey, mask, or a folder or archive of images"
        expect(os.path.exists(condition), "load_dataset", "condition", wanted, repr(condition))
        paired = open_source(Path(condition), split)
    unused = paired is None and paired_range not in (None, "measured")
    expect(not unused, "load_dataset", "condition_range", "to go with a condition that is read from files", condition_range)
    if name in DATASETS:
        expect(paired is None, "load_dataset", "condition", f"to be computed from the images of {name}", repr(condition))
        expect(images_range in (None, "measured"), "load_dataset", "data_range", f"to be None for {name}", data_range)
        dataset = _load_published(name, None if data_dir is None else Path(data_dir), split, size, memory)
    else:
        if not os.path.exists(name):
            got = f"{name!r}, which does not exist{_hint(Path(name))}"
            raise InvalidValue(
                "load_dataset", "name", f"to be one of {', '.join(DATASETS)}, a folder, or a .zip, .npy or .npz", got
            )
        source = open_source(Path(name), split)
        if paired is not None:
            paired = paired.chosen(partners(source, paired))
        dataset = load_source(name, source, size, channels, images_range, skip_broken, first, memory)
    if channels is not None:
        got = f"{dataset.shape[0]} in {name}"
        expect(dataset.shape[0] == channels, "load_dataset", "channels", f"to be those of the images, {channels} wanted", got)
    if degradation is not None:
        degradation.check("load_dataset", dataset.shape)
        alike = degradation.name != "grey" or len(dataset.value_range or [0]) == 1
        expect(alike, "load_dataset", "condition", "to be another than grey for channels of several ranges", "grey")
        return replace(dataset, condition=degradation)
    if paired is None:
        return dataset
    if skip_broken and dataset.names:
        numbers = {file: number for number, file in enumerate(source.names)}
        paired = paired.chosen([numbers[file] for file in dataset.names])
    with renaming("load_dataset", {"data_range": "condition_range"}):
        second = load_source(str(condition), paired, dataset.shape[1:], None, paired_range, first=first, memory=memory)
    return replace(dataset, condition=second)


def _range(name: str, value: Any) -> Ranges | Literal["measured"] | None:
    """Return the ranges after a check, or "measured"."""
    if value is None or (isinstance(value, str) and value == "measured"):
        return value  # type: ignore[return-value]
    return checked_ranges("load_dataset", name, value)


def _sides(image_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """Return `image_size` as (height, width), or None."""
    if image_size is None:
        return None
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    check_ints("load_dataset", "image_size", sides, 1, "a positive integer, (height, width) or None")
    expect(len(sides) == 2, "load_dataset", "image_size", "to be a positive integer, (height, width) or None", sides)
    return sides[0], sides[1]


def open_source(path: Path, split: str) -> ImageFiles | Arrays:
    """Return the files of a folder or an archive, or the arrays of one file."""
    if is_hub_folder(path):
        return read_hub_folder(path, split)
    if path.is_dir():
        files = read_folder(path)
        return Arrays.of_files(files) if files.names[0].lower().endswith(ARRAYS) else files
    expect(path.is_file(), "load_dataset", "name", "to be a folder or a file", repr(str(path)))
    if path.suffix.lower() in ARRAYS:
        return Arrays.of_file(path)
    return read_file(path) if path.suffix.lower() in SUFFIXES else read_archive(path)


def load_source(
    name: str,
    source: ImageFiles | Arrays,
    size: tuple[int, int] | None,
    channels: int | None,
    value_range: Ranges | Literal["measured"] | None,
    skip_broken: bool = False,
    first: int | None = None,
    memory: int | None = None,
) -> ImageDataset:
    """Return the data set of image files or arrays. See `load_dataset`. The channels of arrays are not checked."""
    if isinstance(source, Arrays):
        return load_arrays(name, source, size, value_range, first, memory)
    expect(
        value_range in (None, "measured"),
        "load_dataset",
        "data_range",
        "to be None for image files, as arrays alone have ranges",
        value_range,
    )
    return load_images(name, source, size, channels, skip_broken, first, memory)


def _hint(path: Path) -> str:
    """Say for an error what may have been meant by a path that does not exist."""
    names = {name: name for name in DATASETS}
    with suppress(OSError):  # there is no such folder, or it may not be read
        names |= {each.name: str(each) for each in path.parent.iterdir() if each.is_dir() or each.suffix in (".zip", *ARRAYS)}
    for close in difflib.get_close_matches(path.name, names, 1):
        return f"; did you mean {names[close]!r}?"
    return "" if path.parent.is_dir() else f": there is no folder {str(path.parent)!r}"


# ----------------------------------------------------------------------------------------------------------------------- arrays


def _load_published(
    name: str, root: Path | None, split: str, image_size: tuple[int, int] | None, memory: int | None
) -> ImageDataset:
    """Return a published data set in memory, resized if another size is wanted.

    Resized images that take more than `memory` bytes are resized as they are read.
    """
    readers = {"digits": _read_digits, "fashion-mnist": _read_fashion_mnist, "cifar10": _read_cifar10}
    (images, labels, classes), preparation = readers[name](root, split), "as they are"
    if name == "fashion-mnist" and image_size != (28, 28):
        images, preparation = functional.pad(images, [2] * 4), "padded with black from 28x28"  # 32 = 2^5 is halved often
    number, channels, height, width = images.shape
    used: Tensor | LazyImages = images
    if image_size is not None and (height, width) != image_size:
        preparation = f"resized from {width}x{height}"
        used = LazyImages((number, channels, *image_size), lambda indices: resized_tensor(images[indices], image_size))
        if fits(used.shape, memory, copies=2):  # the parts and the whole
            used = torch.cat([used[each] for each in torch.arange(number).split(256)])

    def contents(exact: bool) -> Iterator[bytes]:
        # Not the resized ones, as other machines may round differently.
        for image in images[:: 1 if exact else max(1, number // SAMPLED)]:
            yield image.numpy().tobytes()

    return ImageDataset(name, used, labels, classes, contents, preparation)


def _read_digits(root: Path | None, split: str) -> _Arrays:
    """Return the images, uint8 [N, 1, 8, 8], and their labels, int64 [N]."""
    digits = import_extra("sklearn.datasets").load_digits()
    part = slice(None, 1500) if split == "train" else slice(1500, None)
    images = torch.from_numpy(digits.images[part]).unsqueeze(1)  # [N, 1, 8, 8], 0..16
    return (images * (255 / 16)).round().to(torch.uint8), torch.from_numpy(digits.target[part]).long(), tuple("0123456789")


# --------------------------------------------------------------------------------------------------------------- downloads


def _default_folder() -> Path:
    """Return the folder that holds downloads, in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm_fast"


@contextmanager
def _downloading(name: str, folder: Path, urls: Sequence[str], files: str, others: str = "") -> Iterator[None]:
    """Raise the body's errors as an OSError that says where from and what else to do.

    Args:
        name: The data set.
        folder: Folder that receives the files.
        urls: Addresses of the files.
        files: Names of the files.
        others: Other ways to get them.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"load_dataset: expected {name} in {str(folder)!r} or from {' or '.join(urls)}, got: "
            f"{' '.join(str(error).split())}; to do without that connection, put {files} into a folder and pass it as "
            f"data_dir (--data-dir){others}"
        ) from error


# ------------------------------------------------------------------------------------------------------------ Fashion-MNIST


def _read_fashion_mnist(root: Path | None, split: str) -> _Arrays:
    """Return the images, uint8 [N, 1, 28, 28], and their labels, int64 [N]."""
    stem = "train" if split == "train" else "t10k"
    names = [f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"]
    plain = [(root or FASHION_MNIST_DEBIAN) / name for name in names]
    files = [file if file.is_file() else file.with_name(f"{file.name}.gz") for file in plain]
    if all(file.is_file() for file in files):
        images, labels = map(read_idx, files)
        right = images.dim() == 3 and labels.shape == images.shape[:1] and len(labels)
        got = f"{list(images.shape)} and {list(labels.shape)}"
        expect(right, "load_dataset", "", f"images [N, H, W] and labels [N] in {files[0].parent}", got)
        check_labels(files[1], labels, len(FASHION_MNIST_CLASSES))
    else:
        download = import_extra("torchvision.datasets").FashionMNIST
        folder, others = root or _default_folder(), ", or install Debian's package dataset-fashion-mnist"
        with _downloading("FashionMNIST", folder, download.mirrors, f"{names[0]} and {names[1]} (.gz)", others):
            source = download(folder, train=split == "train", download=True)
        images, labels = source.data, source.targets
    return images.unsqueeze(1), labels.long(), FASHION_MNIST_CLASSES


def read_idx(path: Path) -> Tensor:
    """Read an IDX file of unsigned bytes, gzipped or not: uint8 of the shape in its header."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4)
            is_idx = len(header) == 4 and header[:3] == b"\0\0\x08"  # two zeros, then the type code of unsigned bytes
            expect(is_idx, "load_dataset", str(path), "to be an IDX file of unsigned bytes", f"header {header!r}")
            sizes = file.read(4 * header[3])  # byte 3: the number of dimensions
            shape = [int.from_bytes(sizes[i : i + 4], "big") for i in range(0, len(sizes), 4)]
            count = math.prod(shape)
            whole = len(sizes) == 4 * header[3] and 1 <= count <= _MAX_IDX  # before anything of that size is read
            expect(whole, "load_dataset", str(path), f"to hold 1 to {_MAX_IDX} bytes", f"a header of shape {shape}")
            content = file.read(count + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InvalidValue("load_dataset", str(path), "to be a whole gzip file", error) from error
    got = f"{count + 1} or more" if len(content) > count else len(content)
    expect(len(content) == count, "load_dataset", str(path), f"to hold {shape} bytes", got)
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8).reshape(shape).copy())


# ----------------------------------------------------------------------------------------------------------------- CIFAR-10


def _read_cifar10(root: Path | None, split: str) -> _Arrays:
    """Return the images, uint8 [N, 3, 32, 32], and their labels, int64 [N]."""
    archive = (root or _default_folder()) / "cifar-10-binary.tar.gz"
    if not archive.is_file():
        download_url = import_extra("torchvision.datasets").utils.download_url
        with _downloading("CIFAR10", archive.parent, [_CIFAR10_URL], archive.name):
            archive.parent.mkdir(parents=True, exist_ok=True)
            with replacing(archive) as partial:
                download_url(_CIFAR10_URL, partial.parent, partial.name, _CIFAR10_MD5)
    files = _read_archive(archive)
    names = [f"data_batch_{number}.bin" for number in range(1, 6)] if split == "train" else ["test_batch.bin"]
    parts = []
    for name in names:
        expect(name in files, "load_dataset", str(archive), f"to hold {', '.join(names)}", f"no {name}")
        place, size = f"{archive}/{name}", len(files[name])
        expect(size and size % _RECORD == 0, "load_dataset", place, f"to hold records of {_RECORD} bytes", f"{size} bytes")
        parts.append(files[name].reshape(-1, _RECORD))
        check_labels(place, parts[-1][:, 0], len(_CIFAR10_CLASSES))
    images = torch.from_numpy(np.concatenate([part[:, 1:] for part in parts])).view(-1, 3, 32, 32)
    labels = torch.from_numpy(np.concatenate([part[:, 0] for part in parts])).long()
    return images, labels, _CIFAR10_CLASSES


def _read_archive(archive: Path) -> dict[str, NDArray[np.uint8]]:
    """Return the bytes of an archive's files by name, without folders. Nothing is extracted.

    The archive is unpacked before it is parsed, so a header in it cannot ask for more memory than its bytes take.
    """
    files = {}
    try:
        with gzip.open(archive) as packed:
            content = packed.read(_MAX_ARCHIVE + 1)  # to the end, where gzip compares the checksum
        expect(len(content) <= _MAX_ARCHIVE, "load_dataset", str(archive), f"to hold at most {_MAX_ARCHIVE} bytes", "more")
        array = np.frombuffer(content, np.uint8)
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as opened:
            for member in opened:
                if not 0 <= member.size <= len(content):  # a negative size would lead back to the same header
                    raise tarfile.ReadError(f"a file of {member.size} bytes")
                files[PurePosixPath(member.name).name] = array[member.offset_data :][: member.size]
    except (tarfile.TarError, EOFError, zlib.error, OSError, RecursionError) as error:
        raise InvalidValue("load_dataset", str(archive), "to be a whole .tar.gz file", error) from error
    return files
