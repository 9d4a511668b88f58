"""Data sets of other packages: published ones, read from files or downloaded, and tables of Hugging Face's `datasets`."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidValue, UnusablePath, expect
from ..files.writing import replacing
from ..resources import import_extra
from .arrays import read_rows
from .labels import checked_labels
from .sources import Source

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

_MAX_IDX: Final = 64 << 20  # bytes of Fashion-MNIST's file, unpacked; it has 47 MB
_RECORD: Final = 1 + 3 * 32 * 32  # bytes of an item of CIFAR-10: the label, then the pixels [3, 32, 32]
_CIFAR10_URL: Final = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_CIFAR10_MD5: Final = "c32a1d4ab5d03f1284b67883e8d87530"


def read_digits(root: Path | None, split: str, size: tuple[int, int] | None) -> Source:
    """Return scikit-learn's digits, 8x8."""
    digits = import_extra("sklearn.datasets", "train").load_digits()
    part = slice(None, 1500) if split == "train" else slice(1500, None)
    images = np.rint(digits.images[part] * (255 / 16)).astype(np.uint8)  # [N, 8, 8], of 0..16
    return read_rows("digits", images, digits.target[part], "0123456789")


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
        remedy = f"to do without that connection, put {files} into a folder and pass it as data_dir (--data-dir){others}"
        got = f"{' '.join(str(error).split())}; {remedy}"
        raise UnusablePath("", f"{name} in {str(folder)!r} or from {' or '.join(urls)}", got) from error


def read_fashion_mnist(root: Path | None, split: str, size: tuple[int, int] | None) -> Source:
    """Return Fashion-MNIST in its own size 28x28 if that is wanted, else padded to 32x32, which a U-Net can halve often."""
    stem = "train" if split == "train" else "t10k"
    names = [f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"]
    plain = [(root or FASHION_MNIST_DEBIAN) / name for name in names]
    files = [file if file.is_file() else file.with_name(f"{file.name}.gz") for file in plain]
    if not all(file.is_file() for file in files):
        download = import_extra("torchvision.datasets", "train").FashionMNIST
        folder, others = root or _default_folder(), ", or install Debian's package dataset-fashion-mnist"
        with _downloading("FashionMNIST", folder, download.mirrors, f"{names[0]} and {names[1]} (.gz)", others):
            downloaded = download(folder, train=split == "train", download=True)
        files = [Path(downloaded.raw_folder) / name for name in names]
    images, labels = read_idx(files[0], (28, 28)), read_idx(files[1], ())
    source = read_rows(str(files[1]), images, labels, FASHION_MNIST_CLASSES)
    if size == (28, 28):
        return source
    padded = np.pad(images, [(0, 0), (2, 2), (2, 2)])
    return replace(source, read=padded.__getitem__, preparation="padded with black from 28x28")


def read_idx(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes, gzipped or not. Return its items, [N, *shape]."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(_MAX_IDX)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InvalidValue(str(path), "to be a whole gzip file", error) from error
    sizes = np.frombuffer(content[4:], ">u4", min(len(shape) + 1, len(content[4:]) // 4)).tolist()
    head = content[:4] == bytes([0, 0, 8, len(sizes)]) and sizes[1:] == list(shape)  # 8: the type code of unsigned bytes
    wanted = f"to be an IDX file of unsigned bytes [N{''.join(f', {side}' for side in shape)}]"
    expect(head, str(path), wanted, f"header {content[:4]!r} {sizes}")
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * len(sizes))
    expect(len(values) == np.prod(sizes, dtype=object) and sizes[0] > 0, str(path), f"to hold {sizes} bytes", len(values))
    return values.reshape(sizes)


def read_cifar10(root: Path | None, split: str, size: tuple[int, int] | None) -> Source:
    """Return CIFAR-10, 32x32 in RGB, from its binary archive. Nothing is extracted."""
    archive = (root or _default_folder()) / "cifar-10-binary.tar.gz"
    if not archive.is_file():
        download_url = import_extra("torchvision.datasets", "train").utils.download_url
        with _downloading("CIFAR10", archive.parent, [_CIFAR10_URL], archive.name):
            archive.parent.mkdir(parents=True, exist_ok=True)
            with replacing(archive) as unfinished:
                download_url(_CIFAR10_URL, unfinished.parent, unfinished.name, _CIFAR10_MD5)
    # The checksum is compared first, so what is unpacked is what was published.
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "md5").hexdigest()
    expect(digest == _CIFAR10_MD5, str(archive), f"to have the MD5 sum {_CIFAR10_MD5}", digest)
    names = [f"data_batch_{number}.bin" for number in range(1, 6)] if split == "train" else ["test_batch.bin"]
    with tarfile.open(archive) as opened:
        files = [opened.extractfile(f"cifar-10-batches-bin/{name}") for name in names]
        content = b"".join(file.read() for file in files if file is not None)
    records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return read_rows(str(archive), images, records[:, 0], _CIFAR10_CLASSES)


def read_table(path: Path, split: str) -> Source:
    """Return the rows of a folder that `save_to_disk` of Hugging Face's `datasets` has written, or of one of its splits."""
    datasets = import_extra("datasets", "datasets")
    try:
        table = datasets.load_from_disk(path)
        if isinstance(table, datasets.DatasetDict):
            expect(split in table, "splits", f"to have {split}", ", ".join(table))
            table = table[split]
        table.data.table.validate(full=True)  # or an offset in a damaged file would lead anywhere
    except Exception as error:  # damaged files raise errors of many types
        raise InvalidValue(str(path), "to be a whole folder of save_to_disk", error) from error
    images, labels = (
        [name for name, kind in table.features.items() if isinstance(kind, wanted)]
        for wanted in (datasets.Image, datasets.ClassLabel)
    )
    got = f"{', '.join(images) or 'none'} and {', '.join(labels) or 'none'}"
    expect(len(images) == 1 and len(labels) <= 1, str(path), "to have one Image and at most one ClassLabel", got)
    expect(len(table), str(path), "to hold images", "none")
    given, names = (table.with_format(None)[labels[0]][:], table.features[labels[0]].names) if labels else (None, None)
    numbers, classes = checked_labels(str(path), given, len(table), names)
    return Source(
        root=str(path),
        names=range(len(table)),
        labels=numbers,
        classes=classes,
        read=partial(_cell, table.cast_column(images[0], datasets.Image(decode=False)).select_columns(images)),
    )


def _cell(table: Any, number: int) -> io.BytesIO:
    (cell,) = table[number].values()
    if cell is None or cell["bytes"] is None:
        raise ValueError("the table has no bytes of the image")
    return io.BytesIO(cell["bytes"])


DATASETS: Final = {"digits": read_digits, "fashion-mnist": read_fashion_mnist, "cifar10": read_cifar10}
"""Functions that read a published data set, by name. They get its folder, a split, and the size that is wanted."""
