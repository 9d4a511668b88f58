"""Data sets to train on: uint8 images and integer labels, read by index."""

from __future__ import annotations

import gzip
import hashlib
import logging
import math
import os
import threading
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..checks import check_choice, check_int, check_path, listed
from ..limits import check_free_memory, free_memory

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
    from PIL.ImageFile import ImageFile

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
_AT_ONCE: Final = 4096  # images whose reading is planned ahead
_BYTES_A_PIXEL: Final = 16  # while an image is decoded, converted and laid on white

_MAX_IDX: Final = 2 << 30  # bytes of an IDX file, unpacked; EMNIST has 0.5 GiB

_IMAGE_SUFFIXES: Final = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})

_Read = TypeVar("_Read")

_log = logging.getLogger("ddpm_fast")


@dataclass(frozen=True)
class ImageDataset:
    """Images of one size, with labels.

    Attributes:
        name: The name that `load_dataset` was given.
        images: uint8 [N, C, H, W].
        labels: int64 [N], 0..len(classes)-1.
        classes: Names of the classes; a single one if the images carry no labels.
        contents: A function that yields bytes of the images: all, or a sample.
        preparation: What was done to the images' size, in words.
    """

    name: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    contents: Callable[[bool], Iterator[bytes]]
    preparation: str = "as they are"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return images, uint8 [B, C, H, W], and labels, int64 [B], at the int64 indices [B]."""
        return self.images[indices], self.labels[indices]

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
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    split: str = "train",
    image_size: int | None = None,
    skip_broken: bool = False,
    first: int | None = None,
) -> ImageDataset:
    """Load a data set by name. All of its images are read, so what cannot be read is found before any work.

    Args:
        name: "digits" (scikit-learn's 8x8 digits, no download), "fashion-mnist" (28x28, padded with black to 32x32),
            "cifar10" (32x32), or the path of a folder of images. A folder's sub-folders are its classes.
        data_dir: Folder that holds the files of fashion-mnist or cifar10, or receives torchvision's download. By default
            the files of Debian's package dataset-fashion-mnist if installed, else a folder in the user's cache.
        split: "train" or "test". A folder of images has no split: all of it is read.
        image_size: Height and width in pixels. Images of another size are resized. Those of a folder are first cropped to
            their central square. By default nothing is resized, and a folder's images must be squares of one size.
        skip_broken: Leave out images of a folder that cannot be read, and log a warning that names the first of them.
        first: Read only this many images of a folder, from the first. By default all are read.

    Raises:
        ValueError: The name, split or size is unknown, the images' sizes differ, no image was found, a file is damaged, or
            the images do not fit into memory.
        OSError: A download failed.
        ImportError: A package of the `train` extra is missing.
    """
    check_choice("load_dataset", "split", split, ("train", "test"))
    check_int("load_dataset", "image_size", image_size, 1, optional=True)
    check_int("load_dataset", "first", first, 1, optional=True)
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
        return _read_folder(Path(name), image_size, skip_broken, first)
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
    source = images  # other machines may resize with other roundings
    if image_size is not None and tuple(images.shape[-2:]) != (image_size, image_size):
        preparation = f"resized from {images.shape[3]}x{images.shape[2]}"
        needed = 2 * len(images) * images.shape[1] * image_size**2  # the parts and the whole
        check_free_memory("load_dataset", "image_size", image_size, needed)
        images = torch.cat([_resized(part, image_size) for part in images.split(256)])

    def contents(exact: bool) -> Iterator[bytes]:
        step = 1 if exact else max(1, len(source) // _SAMPLED)
        for image in source[::step]:
            yield image.numpy().tobytes()

    return ImageDataset(name, images, labels, classes, contents, preparation)


def _resized(images: Tensor, size: int) -> Tensor:
    resized = functional.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
    return resized.round().to(torch.uint8)


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
        if images.dim() != 3 or labels.shape != images.shape[:1] or not len(labels):
            raise ValueError(
                f"load_dataset: expected images [N, H, W] and labels [N] in {folder}, "
                f"got {list(images.shape)} and {list(labels.shape)}"
            )
        if labels.max() >= len(FASHION_MNIST_CLASSES):
            raise ValueError(f"load_dataset: expected labels in 0..9 in {found[1]}, got {int(labels.max())}")
    else:
        others = ", or install Debian's package dataset-fashion-mnist"
        downloaded = _downloaded("FashionMNIST", root, split, f"{files[0]} and {files[1]} (.gz)", others)
        images, labels = downloaded.data, downloaded.targets
    return images.unsqueeze(1), labels.long()


def _read_cifar10(root: Path | None, split: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    downloaded = _downloaded("CIFAR10", root, split, "cifar-10-python.tar.gz")
    images = torch.from_numpy(downloaded.data).permute(0, 3, 1, 2).contiguous()  # [N, 3, 32, 32]
    return images, torch.tensor(downloaded.targets), tuple(downloaded.classes)


def _downloaded(name: str, root: Path | None, split: str, files: str, others: str = "") -> Any:
    """Return a data set of torchvision, downloaded if its files are missing. Errors say where from and what else to do."""
    source = getattr(_import("torchvision.datasets"), name)
    folder = root or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm_fast"
    try:
        return source(folder, train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        urls = " or ".join(getattr(source, "mirrors", None) or [source.url])
        raise OSError(
            f"load_dataset: expected {name} in {str(folder)!r} or from {urls}, got: {' '.join(str(error).split())}; to do "
            f"without that connection, put {files} into a folder and pass it as data_dir (--data-dir){others}"
        ) from error


# ------------------------------------------------------------------------------------------------------ folders of images


def _read_folder(root: Path, image_size: int | None, skip_broken: bool, first: int | None) -> ImageDataset:
    """Return the images of a folder and its sub-folders, decoded."""
    files = _image_files(root)
    if not files:
        raise ValueError(f"load_dataset: expected {root} to hold images ({', '.join(sorted(_IMAGE_SUFFIXES))}), got none")
    all_files, files = files, files[:first]
    if len(files) > _AT_ONCE:
        _log.info("reading %d images in %s", len(files), root)
    broken: dict[Path, str] = {}
    preparation = RESIZED
    if image_size is None:
        sizes = _try_each(_size, files, broken)
        _check_broken(root, files, broken, skip_broken)
        image_size, preparation = _common_size(root, [size for size in sizes if size is not None]), "as they are"
    needed = len(files) * 3 * image_size**2
    check_free_memory("load_dataset", "image_size", f"{image_size} for {len(files)} images", needed)
    images = torch.empty(len(files), 3, image_size, image_size, dtype=torch.uint8)
    rows = {file: row for row, file in enumerate(files)}

    shared = _SharedPixels((free_memory() or 4 << 30) // (4 * _BYTES_A_PIXEL))  # a quarter of the memory

    def fill(file: Path) -> None:
        images[rows[file]] = _decode(file, image_size, shared)

    _try_each(fill, [file for file in files if file not in broken], broken)
    _check_broken(root, files, broken, skip_broken)
    if broken:
        _log.warning("%d of %d images in %s left out: %s", len(broken), len(files), root, _reasons(root, broken))
        whole = [file for file in files if file not in broken]
        for row, file in enumerate(whole):  # in place, as there may be no memory for a second copy
            images[row] = images[rows[file]]
        files, images = whole, images[: len(whole)]
    classes = _class_names(root, [file for file in all_files if file not in broken])
    numbers = {name: number for number, name in enumerate(classes)}
    labels = torch.tensor([numbers[_class_name(root, file)] for file in files])

    def contents(exact: bool) -> Iterator[bytes]:
        for file in files:
            yield os.fsencode(f"{file.relative_to(root)} {file.stat().st_size}\n")
        for file in files if exact else files[:: max(1, len(files) // _SAMPLED)]:
            with file.open("rb") as opened:
                while block := opened.read(1 << 20):
                    yield block
                    if not exact:
                        break

    return ImageDataset(str(root), images, labels, classes, contents, preparation)


def _image_files(root: Path) -> list[Path]:
    """Return the files with the endings of images, sorted. Folders, pipes and devices with such names are no images."""

    def fail(error: OSError) -> None:
        raise error  # or a folder that must not be read would be left out in silence

    paths = []
    for folder, folders, names in os.walk(root, onerror=fail):
        links = [name for name in folders if Path(folder, name).is_symlink()]
        if links:  # one may lead to a folder above it
            raise ValueError(f"load_dataset: expected folders without links in {root}, got {str(Path(folder, links[0]))!r}")
        paths += [Path(folder, name) for name in names]
    # A link to nothing is a missing image.
    return sorted(
        path for path in paths if path.suffix.lower() in _IMAGE_SUFFIXES and (path.is_file() or not os.path.exists(path))
    )


def _class_name(root: Path, file: Path) -> str:
    """Return the first folder on the way to an image. Images in `root` itself share one class without a name."""
    return file.relative_to(root).parts[0] if file.parent != root else ""


def _class_names(root: Path, files: Sequence[Path]) -> tuple[str, ...]:
    return tuple(sorted({_class_name(root, file) for file in files}))


class _SharedPixels:
    """A number of pixels that threads may hold in memory together. An image that has more is held alone."""

    def __init__(self, total: int) -> None:
        self._total, self._held, self._changed = total, 0, threading.Condition()

    @contextmanager
    def held(self, pixels: int) -> Iterator[None]:
        """Hold these pixels, after waiting for others to release theirs if they are too many."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + pixels <= self._total)
            self._held += pixels
        try:
            yield
        finally:
            with self._changed:
                self._held -= pixels
                self._changed.notify_all()


def _try_each(read: Callable[[Path], _Read], files: Sequence[Path], broken: dict[Path, str]) -> list[_Read | None]:
    """Return what `read` returns for each file, or None and the reason in `broken` if it raises.

    Pillow releases the interpreter's lock while it decodes, so threads read.
    """
    from PIL import Image

    def attempt(file: Path) -> _Read | None:
        try:
            return read(file)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's formats raise errors of many types
            broken[file] = f"{type(error).__name__}: {error}"  # the error itself would keep the pixels alive
            return None

    with ThreadPoolExecutor(thread_name_prefix="ddpm_fast-decode") as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        parts = (files[i : i + _AT_ONCE] for i in range(0, len(files), _AT_ONCE))
        return [result for part in parts for result in pool.map(attempt, part)]


def _check_broken(root: Path, files: Sequence[Path], broken: Mapping[Path, str], skip_broken: bool) -> None:
    """Raise a ValueError if there are broken images and they must not be left out, or if there are no others."""
    if broken and (not skip_broken or len(broken) == len(files)):
        raise ValueError(
            f"load_dataset: expected images that Pillow can read in {root}, got {len(broken)} of {len(files)} that it cannot: "
            f"{_reasons(root, broken)}; skip_broken=True (--skip-broken) leaves them out if others remain"
        )


def _reasons(root: Path, broken: Mapping[Path, str]) -> str:
    """Return the names of the first broken images, with reasons."""
    return listed([f"{file.relative_to(root)} ({reason})" for file, reason in broken.items()])


def _size(file: Path) -> tuple[int, int]:
    from PIL import Image

    with Image.open(file) as image:  # reads the header alone
        return image.width, image.height


def _common_size(root: Path, all_sizes: Sequence[tuple[int, int]]) -> int:
    """Return the side of the squares that all images are. Raise ValueError, with the sizes, if they are not."""
    sizes = Counter(all_sizes)
    (width, height), _ = sizes.most_common(1)[0]
    if len(sizes) == 1 and width == height:
        return width
    listed = ", ".join(f"{width}x{height} ({count})" for (width, height), count in sizes.most_common(5))
    more = f" and {len(sizes) - 5} other sizes" if len(sizes) > 5 else ""
    raise ValueError(
        f"load_dataset: expected image_size, as the images in {root} are not squares of one size, got None with sizes "
        f"{listed}{more}; image_size=64 (--image-size 64) crops each to its central square and resizes it to 64x64"
    )


def read_image(
    path: str | os.PathLike[str], size: int, channels: int, *, caller: str = "read_image", name: str = "path"
) -> Tensor:
    """Read the largest centred square of an image, resized.

    Args:
        path: A file that Pillow can read.
        size: Height and width in pixels.
        channels: 1 for grey or 3 for RGB.
        caller: The function or command that error messages name.
        name: The argument that error messages name.

    Returns:
        uint8 [channels, size, size].

    Raises:
        ValueError: The file is damaged, or holds no image.
        OSError: The file cannot be opened.
    """
    from PIL import Image, UnidentifiedImageError

    check_path(caller, name, path)
    try:
        with Image.open(path) as opened:
            picture = _resized_square(opened, size)
    except (UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None and not isinstance(error, UnidentifiedImageError):
            raise
        raise ValueError(f"{caller}: expected {name} to be an image, got {str(path)!r}: {error}") from error
    if channels == 3:
        return picture
    return torch.from_numpy(np.array(Image.fromarray(picture.permute(1, 2, 0).numpy()).convert("L")))[None]


def _decode(file: Path, size: int, shared: _SharedPixels) -> Tensor:
    """Return the largest centred square of a file, resized to uint8 [3, size, size]."""
    from PIL import Image

    with Image.open(file) as opened, shared.held(opened.width * opened.height):
        return _resized_square(opened, size)


def _resized_square(opened: ImageFile, size: int) -> Tensor:
    from PIL import Image, ImageOps

    image = _rgb(ImageOps.exif_transpose(opened), opened.format)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # Crop first, as `resize(box=...)` mixes in pixels from outside the box.
    square = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def _rgb(image: Picture, kind: str | None) -> Picture:
    """Return a picture as RGB. 16 bits a channel become 8, and what is transparent lies on white."""
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):  # Pillow itself cuts off at 255
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"expected 8 or 16 bits a channel, got pixels of mode {image.mode}, whose range is unknown")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


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
