"""Arrays of numbers as images: .npy and .npz files, and folders of them. Nothing is unpickled."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import InvalidValue, expect
from .dataset import SAMPLED, ImageDataset, LazyImages, check_labels, fits, resized_tensor, size_of
from .image_files import ImageFiles

_Array = NDArray[Any]


@dataclass(frozen=True)
class Arrays:
    """Arrays of one shape, unread.

    Attributes:
        root: Path of the file or folder.
        count: N.
        read: A function that returns the array of a number, [H, W] or of three dimensions.
        labels: int64 [N].
        classes: Names of the classes; a single one if the arrays carry no labels.
        names: Names of the files of a folder.
    """

    root: str
    count: int
    read: Callable[[int], _Array]
    labels: Tensor
    classes: tuple[str, ...]
    names: Sequence[str] = ()

    @classmethod
    def of_file(cls, path: Path) -> Arrays:
        """Return the arrays of a file: those of a .npy, or `arr_0` or the only one of an .npz with labels in `arr_1`."""
        with path.open("rb") as file:
            found = _arrays(str(path), path if path.suffix.lower() == ".npy" else file)
        content, labels = _images(str(path), found), found.get("arr_1")
        shape = list(content.shape)
        expect(len(shape) in (3, 4) and content.size, "load_dataset", str(path), "to be [N, H, W] or 4-d", shape)
        numbers = torch.zeros(len(content), dtype=torch.int64)
        classes: tuple[str, ...] = ("",)
        if labels is not None:
            right = labels.dtype.kind in "iu" and labels.shape == (len(content),)
            got = f"{labels.dtype} {list(labels.shape)}"
            expect(right, "load_dataset", f"arr_1 of {path}", f"to be integers [{len(content)}]", got)
            numbers = torch.from_numpy(labels.astype(np.int64))
            check_labels(path, numbers, 1 << 16)
            classes = tuple(map(str, range(int(numbers.max()) + 1)))
        return cls(str(path), len(content), content.__getitem__, numbers, classes)

    @classmethod
    def of_files(cls, files: ImageFiles) -> Arrays:
        """Return the arrays of a folder, one in each file."""

        def read(index: int) -> _Array:
            name = f"{files.root}/{files.names[index]}"
            with files.open(files.names[index]) as file:
                return _images(name, _arrays(name, file))

        return cls(files.root, len(files.names), read, files.labels, files.classes, files.names)

    def place(self, index: int) -> str:
        """Return the name of an array, for error messages."""
        return f"{self.root}/{self.names[index]}" if self.names else f"{self.root}[{index}]"

    def image(self, index: int, like: _Array | None = None) -> _Array:
        """Return an array as [C, H, W]. Raise a ValueError if it is none, or of another shape or dtype than `like`."""
        array, place = self.read(index), self.place(index)
        expect(array.ndim in (2, 3) and array.size, "load_dataset", place, "to be 2-d or 3-d", list(array.shape))
        expect(array.dtype.kind in "uif", "load_dataset", place, "to hold numbers", array.dtype)
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
        wanted, got = (f"{each.dtype} {list(each.shape)}" for each in (array if like is None else like, array))
        expect(got == wanted, "load_dataset", place, f"to be {wanted}, as the first", got)
        return array


def load_arrays(
    name: str,
    arrays: Arrays,
    image_size: tuple[int, int] | None,
    value_range: Sequence[float] | None,
    first: int | None,
    memory: int | None,
) -> ImageDataset:
    """Return a data set of arrays: uint8 as pictures, other numbers mapped to [-1, 1].

    All values are looked at once.

    Args:
        name: Name of the data set.
        arrays: The arrays.
        image_size: Height and width that they are cropped and resized to. None: they stay.
        value_range: Values that are -1 and 1. None: those of all arrays, or 0..255 for uint8.
        first: Number of arrays to read. None: all.
        memory: Bytes that the images may take. More are read as they are used. None: any number.
    """
    count = min(arrays.count, first or arrays.count)
    start = arrays.image(0)
    pictures = start.dtype == np.uint8 and value_range is None
    measured = None if pictures else _measured(arrays, count, start, value_range)
    channels, height, width = start.shape
    sides = (height, width) if image_size is None else image_size

    def read(indices: Tensor) -> Tensor:
        images = torch.empty(len(indices), channels, *sides, dtype=torch.uint8 if pictures else torch.float32)
        for row, index in enumerate(indices.tolist()):
            array = arrays.image(index, start)
            if measured is not None:
                low, high = measured
                array = (array.astype(np.float64) - low) * (2 / (high - low)) - 1
            image = torch.from_numpy(np.array(array))[None]  # a copy, as a file that is mapped is read-only
            images[row] = image[0] if sides == (height, width) else resized_tensor(image, sides)[0]
        return images

    shape, itemsize = (count, channels, *sides), 1 if pictures else 4
    used: Tensor | LazyImages = LazyImages(shape, read, memory, itemsize)
    if fits(shape, memory, itemsize=itemsize):
        used = read(torch.arange(count))
    preparation = "as they are" if sides == (height, width) else f"resized from {size_of((height, width))}"
    if measured is not None:
        preparation += ", {:g} to {:g} as -1 to 1".format(*measured)
    return ImageDataset(
        name,
        used,
        arrays.labels[:count],
        arrays.classes,
        partial(_contents, arrays),
        preparation,
        arrays.names[:count],
        measured,
    )


def _measured(arrays: Arrays, count: int, start: _Array, stated: Sequence[float] | None) -> tuple[float, float]:
    """Return the range of the values. Raise a ValueError if one is not finite, or outside of the stated range."""
    low, high = math.inf, -math.inf
    for index in range(count):
        array = arrays.image(index, start)
        least, most = float(array.min()), float(array.max())  # NaN if one is
        place = arrays.place(index)
        expect(math.isfinite(least) and math.isfinite(most), "load_dataset", place, "to be finite", "NaN or infinity")
        if stated is not None and not stated[0] <= least <= most <= stated[1]:
            wanted = "to be in {:g}..{:g}, the data_range".format(*stated)
            raise InvalidValue("load_dataset", place, wanted, f"values from {least:g} to {most:g}")
        low, high = min(low, least), max(high, most)
    if stated is not None:
        return float(stated[0]), float(stated[1])
    expect(low < high, "load_dataset", arrays.root, "to have different values", f"{low:g} alone")
    return low, high


def _contents(arrays: Arrays, exact: bool) -> Iterator[bytes]:
    """Yield the names of files, and bytes of all arrays or of a sample."""
    yield from (f"{name}\n".encode(errors="surrogateescape") for name in arrays.names)
    for index in range(0, arrays.count, 1 if exact else max(1, arrays.count // SAMPLED)):
        yield np.ascontiguousarray(arrays.read(index)).tobytes()


def _arrays(place: str, file: Path | BinaryIO) -> dict[str, _Array]:
    """Return the arrays of an open .npy or .npz by name, or that of a .npy's path, mapped into memory."""
    try:
        content = np.load(file, mmap_mode="r" if isinstance(file, Path) else None, allow_pickle=False)
        return {"arr_0": content} if isinstance(content, np.ndarray) else {name: content[name] for name in content.files}
    except Exception as error:  # damaged files raise errors of many types, such as a MemoryError for a huge shape
        raise InvalidValue("load_dataset", place, "to be a whole .npy or .npz of numbers", error) from error


def _images(place: str, arrays: Mapping[str, _Array]) -> _Array:
    """Return arr_0, or the only array beside arr_1, which has labels."""
    names = [name for name in arrays if name != "arr_1"]
    one = "arr_0" in arrays or len(names) == 1
    expect(one, "load_dataset", place, "to hold one array, or arr_0", ", ".join(arrays) or "none")
    return arrays.get("arr_0", arrays[names[0]])
