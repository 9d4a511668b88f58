"""Sources of images: named files of a folder or a zip file, rows of an array, or rows of a table.

A source can be pickled. It opens its file again in each process, because processes that share an open file share its
position.
"""

from __future__ import annotations

import io
import operator
import os
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InvalidValue, expect
from .items import DatasetInfo, Item, ItemDataset
from .labels import checked_labels, edm_labels

PICTURES: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
ARRAYS: Final = (".npy", ".npz")

_LABELS: Final = "dataset.json"
_MAX_FILE: Final = 256 << 20  # bytes of an archive's file, unpacked; the dataset.json of ImageNet has 50 MB
_SAMPLED: Final = 256  # items whose bytes a fingerprint's sample has


@dataclass(frozen=True, kw_only=True)
class Source:
    """Images in some container.

    Attributes:
        root: Path of the container.
        names: Names of the N files, in the order of the data set; or numbers of rows.
        labels: int64 [N], 0..len(classes)-1.
        classes: Names of the classes; a single one if the images carry no labels.
        read: A function that returns what has a name: a path, bytes as a file, or an array.
        has_arrays: True for arrays of numbers, false for encoded pictures.
        by_folder: True if the classes are sub-folders.
        preparation: What was done to the images, in words.
        in_memory: True if `read` reads no file.
    """

    root: str
    names: Sequence[Any]
    labels: Tensor
    classes: tuple[str, ...] = ("",)
    read: Callable[[Any], str | io.BytesIO | NDArray[Any]]
    has_arrays: bool = False
    by_folder: bool = False
    preparation: str = "not resized"
    in_memory: bool = False

    @property
    def has_rows(self) -> bool:
        """True if items have numbers and no names."""
        return not isinstance(self.names[0], str)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> str | io.BytesIO | NDArray[Any]:
        return self.read(self.names[index])

    def label(self, index: int) -> str:
        """Return the name of an item in its container."""
        return f"row {self.names[index]}" if self.has_rows else str(self.names[index])

    def place(self, index: int) -> str:
        """Return the path of an item."""
        return f"{self.root}[{self.names[index]}]" if self.has_rows else f"{self.root}/{self.names[index]}"

    def chosen(self, numbers: Sequence[int]) -> Source:
        """Return the items of these numbers, in their order."""
        return replace(self, names=[self.names[number] for number in numbers], labels=self.labels[list(numbers)])


class Decoded(ItemDataset):
    """The images of a source with its labels.

    Args:
        source: The source.
        info: Their description.
        image: A function that returns the image of a number. It can be pickled.
    """

    def __init__(self, source: Source, info: DatasetInfo, image: Callable[[int], Tensor]) -> None:
        self._source, self.info, self._image, self.in_memory = source, info, image, source.in_memory

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self._source)

    def __getitem__(self, index: int) -> Item:
        """Return an image, decoded."""
        return Item(self._image(operator.index(index)), self._source.labels[index].tolist())

    def contents(self, exact: bool) -> Iterator[bytes]:
        """Yield the labels, names and sizes of files, and bytes of all items or of a sample."""
        source = self._source
        yield source.labels.numpy().tobytes()
        in_folder = isinstance(source[0], str)
        for index, name in enumerate(() if source.has_rows else source.names):
            yield os.fsencode(f"{name} {os.path.getsize(source[index]) if in_folder else ''}\n")  # type: ignore[arg-type]
        for index in range(0, len(self), 1 if exact else max(1, len(self) // _SAMPLED)):
            item = source[index]
            if isinstance(item, np.ndarray):
                yield item.tobytes()
            else:
                yield Path(item).read_bytes() if isinstance(item, str) else item.getvalue()


class Opened:
    """A file that each process opens for itself.

    Args:
        open_it: A function that opens it.
        *arguments: Its arguments.

    Attributes:
        lock: A lock for threads that share the file.
    """

    def __init__(self, open_it: Callable[..., Any], *arguments: Any) -> None:
        self._open, self._arguments = open_it, arguments
        self._process: int | None = None
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Opened, (self._open, *self._arguments)

    def __call__(self) -> Any:
        """Return the file."""
        if self._process != os.getpid():  # the first call, or the process was forked
            self._file, self._process = self._open(*self._arguments), os.getpid()
        return self._file


# ---------------------------------------------------------------------------------------------------- folders and zip files


def read_folder(root: Path, files: Iterable[str] | None = None) -> Source:
    """Return the images or the arrays of a folder and its sub-folders, sorted by the parts of their paths.

    Args:
        root: The folder.
        files: The files to choose from, relative to the folder. None: all.

    Raises:
        ValueError: The folder holds neither, or both.
    """
    names = list(files or _files(root))
    arrays, pictures = (_ending(names, endings) for endings in (ARRAYS, PICTURES))
    kinds = [f"{kind}, such as {found[0]}" for kind, found in (("images", pictures), ("arrays", arrays)) if found]
    got = f"{', and '.join(kinds)}; move one kind to another folder" if kinds else "none"
    expect(len(kinds) == 1, str(root), f"to hold images ({', '.join(PICTURES)}) or arrays", got)
    names = sorted(arrays or pictures, key=lambda name: name.replace(os.sep, "\0"))  # as a walk, folder by folder
    listing = root / _LABELS
    listed = edm_labels(str(listing), listing.read_bytes, names) if listing.is_file() else None
    folders = [os.path.dirname(name).partition(os.sep)[0] for name in names]  # "" for images in the root itself
    by_folder, numbers = np.unique(folders, return_inverse=True)
    labels, classes = listed or (torch.from_numpy(numbers), tuple(by_folder.tolist()))
    return Source(
        root=str(root),
        names=names,
        labels=labels,
        classes=classes,
        read=partial(os.path.join, root),
        has_arrays=bool(arrays),
        by_folder=listed is None,
    )


def _ending(names: Iterable[str], endings: tuple[str, ...]) -> list[str]:
    """Return the names with one of some endings, without the notes that macOS puts into archives."""
    return [name for name in names if name.lower().endswith(endings) and not name.startswith("__MACOSX")]


def _files(root: Path) -> Iterator[str]:
    """Yield the paths of files in a folder and its sub-folders, relative to it, without pipes and devices.

    A link to nothing is yielded, so that reading it fails.
    """

    def fail(error: OSError) -> None:
        raise error  # or a folder that must not be read would be left out in silence

    for folder, folders, names in os.walk(root, onerror=fail):
        for path in (os.path.join(folder, name) for name in folders):  # a link may lead to a folder above it
            expect(not os.path.islink(path), "", f"folders without links in {root}", repr(path))
        for path in (os.path.join(folder, name) for name in names):
            if os.path.isfile(path) or not os.path.exists(path):
                yield os.path.relpath(path, root)


def read_archive(path: Path) -> Source:
    """Return the images of a zip file, in any of its folders, sorted by name."""
    try:
        opened = Opened(zipfile.ZipFile, path)
        entries = {each.filename: each for each in opened().infolist()}
    except Exception as error:  # damaged files raise errors of many types
        raise InvalidValue(str(path), "to be a folder or a whole zip file", error) from error
    names = sorted(_ending(entries, PICTURES))
    for name in (*names, _LABELS):  # before anything is unpacked
        size = entries[name].file_size if name in entries else 0
        expect(size <= _MAX_FILE, name, f"to have at most {_MAX_FILE} bytes", size, str(path))
    expect(names, str(path), f"to hold images ({', '.join(PICTURES)})", "none")
    read_labels = partial(opened().read, _LABELS)
    found = edm_labels(f"{_LABELS} in {path}", read_labels, names) if _LABELS in entries else None
    labels, classes = found or checked_labels(str(path), None, len(names))
    return Source(root=str(path), names=names, labels=labels, classes=classes, read=partial(_read_entry, opened))


def _read_entry(opened: Opened, name: str) -> io.BytesIO:
    with opened.lock:  # the archive does not lock its count of users
        return io.BytesIO(opened().read(name))
