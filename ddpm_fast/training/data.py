"""Data sets to train on: uint8 images and integer labels, read by index."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..checks import check_choice, check_int

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

RESIZED: Final = "cropped to squares and resized"  # the preparation of a folder's images with image_size

_SAMPLED: Final = 256  # images in a sample, at least

_MAX_IDX: Final = 2 << 30  # bytes of an IDX file, unpacked; EMNIST has 0.5 GiB

_DOWNLOADS: Final = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm_fast"
_IMAGE_SUFFIXES: Final = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


@dataclass(frozen=True)
class ImageDataset:
    """Images of one size, with labels.

    Attributes:
        name: The name that `load_dataset` was given.
        read: A function from int64 indices [B] to uint8 images [B, C, H, W].
        shape: (C, H, W).
        labels: int64 [N], 0..len(classes)-1.
        classes: Names of the classes; a single one if the images carry no labels.
        contents: A function that yields bytes of the images: all, or a sample.
        preparation: What was done to the images' size, in words.
    """

    name: str
    read: Callable[[Tensor], Tensor]
    shape: tuple[int, int, int]
    labels: Tensor
    classes: tuple[str, ...]
    contents: Callable[[bool], Iterator[bytes]]
    preparation: str = "as they are"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return images, uint8 [B, C, H, W], and labels, int64 [B], at the int64 indices [B]."""
        return self.read(indices), self.labels[indices]

    def fingerprint(self, *, exact: bool = False) -> dict[str, str]:
        """Return SHA-256 digests of the data set: "sample" of labels, names, sizes and some bytes, and "exact" of all bytes."""
        digests = {}
        for kind in ("sample", "exact") if exact else ("sample",):
            digest = hashlib.sha256(f"{self.shape} {self.classes}".encode())
            digest.update(self.labels.numpy().tobytes())
            for content in self.contents(kind == "exact"):
                digest.update(content)
            digests[kind] = digest.hexdigest()
        return digests


def load_dataset(
    name: str, data_dir: str | os.PathLike[str] | None = None, *, split: str = "train", image_size: int | None = None
) -> ImageDataset:
    """Load a data set by name.

    Args:
        name: "digits" (scikit-learn's 8x8 digits, no download), "fashion-mnist" (28x28, padded with black to 32x32),
            "cifar10" (32x32), or the path of a folder of images. A folder's sub-folders are its classes.
        data_dir: Folder that holds the files of fashion-mnist or cifar10, or receives torchvision's download. By default
            the files of Debian's package dataset-fashion-mnist if installed, else a folder in the user's cache.
        split: "train" or "test". A folder of images has no split: all of it is read.
        image_size: Height and width in pixels. Images of another size are resized. Those of a folder are first cropped to
            their central square. By default nothing is resized, and a folder's images must be squares of one size.

    Raises:
        ValueError: The name, split or size is unknown, the images' sizes differ, no image was found, or a file is damaged.
        ImportError: A package of the `train` extra is missing.
    """
    check_choice("load_dataset", "split", split, ("train", "test"))
    check_int("load_dataset", "image_size", image_size, 1, optional=True)
    root = None if data_dir is None else Path(data_dir)
    if name == "digits":
        return _in_memory(name, *_read_digits(split), tuple("0123456789"), image_size)
    if name == "fashion-mnist":
        images, labels = _read_fashion_mnist(root, split)
        padding = 2 if image_size != 28 else 0  # 32 = 2^5: a U-Net halves the size several times
        padded = functional.pad(images, [padding] * 4)
        preparation = "padded with black from 28x28" if padding else "as they are"
        return _in_memory(name, padded, labels, FASHION_MNIST_CLASSES, image_size, preparation)
    if name == "cifar10":
        return _in_memory(name, *_read_cifar10(root, split), image_size)
    if Path(name).is_dir():
        return _open_folder(name, image_size)
    raise ValueError(f"load_dataset: expected name to be one of {', '.join(DATASETS)} or a folder, got {name!r}")


def to_unit_range(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Map uint8 0..255 to -1..1, the range of x_0. Black is -1."""
    return images.to(dtype) * (2 / 255) - 1.0


# --------------------------------------------------------------------------------------------------------------- sources


def _in_memory(
    name: str,
    images: Tensor,
    labels: Tensor,
    classes: tuple[str, ...],
    image_size: int | None,
    preparation: str = "as they are",
) -> ImageDataset:
    """Return a data set that holds its images, uint8 [N, C, H, W], resized if another size is wanted."""
    if image_size is not None and tuple(images.shape[-2:]) != (image_size, image_size):
        preparation = f"resized from {images.shape[3]}x{images.shape[2]}"
        resized = functional.interpolate(images.float(), (image_size, image_size), mode="bilinear", antialias=True)
        images = resized.round().to(torch.uint8)
    channels, height, width = images.shape[1:]

    def contents(exact: bool) -> Iterator[bytes]:
        step = 1 if exact else max(1, len(images) // _SAMPLED)
        for image in images[::step]:
            yield image.numpy().tobytes()

    return ImageDataset(name, images.__getitem__, (channels, height, width), labels, classes, contents, preparation)


def _read_digits(split: str) -> tuple[Tensor, Tensor]:
    digits = _import("sklearn.datasets").load_digits()
    part = slice(None, 1500) if split == "train" else slice(1500, None)
    images = torch.from_numpy(digits.images[part]).unsqueeze(1)  # [N, 1, 8, 8], 0..16
    return (images * (255 / 16)).round().to(torch.uint8), torch.from_numpy(digits.target[part]).long()


def _read_fashion_mnist(root: Path | None, split: str) -> tuple[Tensor, Tensor]:
    stem = "train" if split == "train" else "t10k"
    files = [f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"]
    folder = root or FASHION_MNIST_DEBIAN
    found = [_first_file(folder / file, folder / f"{file}.gz") for file in files]
    if found[0] and found[1]:
        images, labels = _read_idx(found[0]), _read_idx(found[1])
        if images.dim() != 3 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"load_dataset: expected images [N, H, W] and labels [N] in {folder}, "
                f"got {list(images.shape)} and {list(labels.shape)}"
            )
    else:
        datasets = _import("torchvision.datasets")
        downloaded = datasets.FashionMNIST(root or _DOWNLOADS, train=split == "train", download=True)
        images, labels = downloaded.data, downloaded.targets
    return images.unsqueeze(1), labels.long()


def _read_cifar10(root: Path | None, split: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    downloaded = _import("torchvision.datasets").CIFAR10(root or _DOWNLOADS, train=split == "train", download=True)
    images = torch.from_numpy(downloaded.data).permute(0, 3, 1, 2).contiguous()  # [N, 3, 32, 32]
    return images, torch.tensor(downloaded.targets), tuple(downloaded.classes)


def _open_folder(name: str, image_size: int | None) -> ImageDataset:
    """Return the images of a folder. They are decoded when first read, and kept."""
    root = Path(name)
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in _IMAGE_SUFFIXES and path.is_file())
    if not files:
        raise ValueError(f"load_dataset: expected {root} to hold images ({', '.join(sorted(_IMAGE_SUFFIXES))}), got none")
    preparation = RESIZED
    if image_size is None:
        image_size, preparation = _common_size(root, files), "as they are"
    # The class of an image is the first folder on the way to it. Images in `root` itself share one class.
    names = [path.relative_to(root).parts[0] if path.parent != root else "" for path in files]
    classes = tuple(sorted(set(names)))
    labels = torch.tensor([classes.index(name) for name in names])
    reader = _FolderReader(files, image_size)

    def contents(exact: bool) -> Iterator[bytes]:
        for file in files:
            yield f"{file.relative_to(root)} {file.stat().st_size}\n".encode()
        for file in files if exact else files[:: max(1, len(files) // _SAMPLED)]:
            yield file.read_bytes()

    return ImageDataset(name, reader, (3, image_size, image_size), labels, classes, contents, preparation)


def _common_size(root: Path, files: Sequence[Path]) -> int:
    """Return the side of the squares that all images are. Raise ValueError, with the sizes, if they are not."""
    from PIL import Image

    def size(file: Path) -> tuple[int, int]:
        with Image.open(file) as image:  # reads the header alone
            return image.width, image.height

    with ThreadPoolExecutor() as pool:
        sizes = Counter(pool.map(size, files))
    (width, height), _ = sizes.most_common(1)[0]
    if len(sizes) == 1 and width == height:
        return width
    listed = ", ".join(f"{width}x{height} ({count})" for (width, height), count in sizes.most_common(5))
    more = f" and {len(sizes) - 5} other sizes" if len(sizes) > 5 else ""
    raise ValueError(
        f"load_dataset: expected image_size, as the images in {root} are not squares of one size, got None with sizes "
        f"{listed}{more}; image_size=64 (--image-size 64) crops each to its central square and resizes it to 64x64"
    )


class _FolderReader:
    """A reader that decodes images in threads and keeps them, so that each file is decoded once.

    Pillow releases the interpreter's lock while it decodes.
    """

    def __init__(self, files: Sequence[Path], image_size: int) -> None:
        self._files, self._size = files, image_size
        self._decoded = torch.zeros(len(files), dtype=torch.bool)
        self._images = torch.empty(len(files), 3, image_size, image_size, dtype=torch.uint8)  # paged in as it fills
        self._pool = ThreadPoolExecutor(thread_name_prefix="ddpm_fast-decode")

    def __call__(self, indices: Tensor) -> Tensor:
        missing = indices[~self._decoded[indices]].unique()
        for index, image in zip(missing.tolist(), self._pool.map(self._decode, missing.tolist()), strict=True):
            self._images[index] = image
        self._decoded[missing] = True
        return self._images[indices]

    def _decode(self, index: int) -> Tensor:
        """Return the largest centred square of a file, resized to uint8 [3, size, size]."""
        from PIL import Image, ImageOps

        with Image.open(self._files[index]) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        # Crop first, as `resize(box=...)` mixes in pixels from outside the box.
        square = image.crop((left, top, left + side, top + side))
        square = square.resize((self._size, self._size), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def _read_idx(path: Path) -> Tensor:
    """Read an IDX file of unsigned bytes, gzipped or not: uint8 of the shape in its header."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4)
            if header[:3] != b"\0\0\x08" or len(header) < 4:  # two zeros, then the type code of unsigned bytes
                raise ValueError(f"load_dataset: expected {path} to be an IDX file of unsigned bytes, got header {header!r}")
            sizes = file.read(4 * header[3])  # byte 3: the number of dimensions
            shape = [int.from_bytes(sizes[i : i + 4], "big") for i in range(0, len(sizes), 4)]
            count = math.prod(shape)
            if len(sizes) < 4 * header[3] or not 1 <= count <= _MAX_IDX:  # before anything of that size is read
                raise ValueError(f"load_dataset: expected {path} to hold 1 to {_MAX_IDX} bytes, got a header of shape {shape}")
            content = file.read(count + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"load_dataset: expected {path} to be a whole gzip file, got: {error}") from error
    if len(content) != count:
        got = f"{count + 1} or more" if len(content) > count else len(content)
        raise ValueError(f"load_dataset: expected {path} to hold {shape} bytes, got {got}")
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8).reshape(shape).copy())


def _first_file(*paths: Path) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


def _import(module: str) -> ModuleType:
    """Import a module of the `train` extra."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        raise ImportError(f"{module} is missing: install it with pip install 'ddpm_fast[train]'") from error
