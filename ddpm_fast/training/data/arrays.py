"""Arrays of numbers as images: .npy and .npz files, and folders of them. Nothing is unpickled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...checks import Ranges, checked_ranges
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
                found = _arrays(name, file)
            expect(
                "arr_1" not in found, "load_dataset", name, "to hold an image alone, as sub-folders are the classes", "arr_1"
            )
            return _images(name, found)

        return cls(files.root, len(files.names), read, files.labels, files.classes, files.names)

    @property
    def numbered(self) -> bool:
        """True for the arrays of one file, which have numbers and no names."""
        return not self.names

    def chosen(self, numbers: Sequence[int]) -> Arrays:
        """Return the arrays of these numbers, in their order, without labels."""
        return replace(
            self,
            count=len(numbers),
            read=lambda index: self.read(numbers[index]),
            labels=torch.zeros(len(numbers), dtype=torch.int64),
            classes=("",),
            names=[self.names[number] for number in numbers] if self.names else (),
        )

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
    value_range: Ranges | Literal["measured"] | None,
    first: int | None,
    memory: int | None,
) -> ImageDataset:
    """Return a data set of arrays: uint8 as pictures, other numbers mapped to [-1, 1].

    All values are looked at once.

    Args:
        name: Name of the data set.
        arrays: The arrays.
        image_size: Height and width that they are cropped and resized to. None: they stay.
        value_range: (low, high) of the values, which become -1 and 1: of all, or of each channel. "measured": the least and
            the largest of each channel, or pictures if they are uint8. None: pictures.
        first: Number of arrays to read. None: all.
        memory: Bytes that the images may take. More are read as they are used. None: any number.
    """
    count = min(arrays.count, first or arrays.count)
    start = arrays.image(0)
    channels, height, width = start.shape
    pictures = start.dtype == np.uint8 and value_range in (None, "measured")
    wanted = f"to be given for numbers, as {arrays.place(0)} has {start.dtype} and no range is kept for them"
    expect(pictures or value_range is not None, "load_dataset", "data_range", wanted, None)
    ranges = None if pictures else _ranges(arrays, count, start, None if value_range == "measured" else value_range)
    sides = (height, width) if image_size is None else image_size

    def read(indices: Tensor) -> Tensor:
        images = torch.empty(len(indices), channels, *sides, dtype=torch.uint8 if ranges is None else torch.float32)
        for row, index in enumerate(indices.tolist()):
            array = arrays.image(index, start)
            if ranges is not None:
                low, high = np.array(ranges).T[:, :, None, None]  # [C, 1, 1]
                array = (array.astype(np.float64) - low) * (2 / (high - low)) - 1
            image = torch.from_numpy(np.array(array))[None]  # a copy, as a file that is mapped is read-only
            images[row] = image[0] if sides == (height, width) else resized_tensor(image, sides)[0]
        return images

    shape, itemsize = (count, channels, *sides), 1 if ranges is None else 4
    used: Tensor | LazyImages = LazyImages(shape, read, memory, itemsize)
    if fits(shape, memory, itemsize=itemsize):
        used = read(torch.arange(count))
    preparation = "as they are" if sides == (height, width) else f"resized from {size_of((height, width))}"
    if ranges is not None:
        mapped = "the range of each channel" if len(ranges) > 1 else "{:g} to {:g}".format(*ranges[0])
        preparation += f", {mapped} as -1 to 1"
    return ImageDataset(
        name,
        used,
        arrays.labels[:count],
        arrays.classes,
        partial(_contents, arrays),
        preparation,
        arrays.names[:count],
        ranges,
    )


def _ranges(arrays: Arrays, count: int, start: _Array, stated: Ranges | None) -> Ranges:
    """Return the range of each channel, or the stated ones. Raise a ValueError if a value is not finite or outside of them."""
    low, high = np.full(len(start), np.inf), np.full(len(start), -np.inf)
    bounds = np.array(stated or [(-np.inf, np.inf)])  # [C or 1, 2]
    if start.dtype.kind == "f" and stated is not None:  # values at the ends are rounded to their dtype
        bounds = bounds.clip(np.finfo(start.dtype).min, np.finfo(start.dtype).max).astype(start.dtype).astype(np.float64)
    wanted = f"to be one range, or one for each of {len(start)} channels"
    expect(len(bounds) in (1, len(start)), "load_dataset", "data_range", wanted, len(bounds))
    for index in range(count):
        array, place = arrays.image(index, start), arrays.place(index)
        with np.errstate(invalid="ignore"):  # a signalling NaN would be a warning
            least, most = (
                each.astype(np.float64) for each in (array.min(axis=(1, 2)), array.max(axis=(1, 2)))
            )  # NaN if one is
        finite = np.isfinite(least).all() and np.isfinite(most).all()
        expect(finite, "load_dataset", place, "to be finite", "NaN or infinity")
        outside = (least < bounds[:, 0]) | (most > bounds[:, 1])
        if outside.any():
            channel = int(outside.argmax())
            inside = "to be in {:g}..{:g}, the data_range".format(*bounds[channel % len(bounds)])
            got = f"values from {least[channel]:g} to {most[channel]:g} in channel {channel}; clip them, or train with more"
            raise InvalidValue("load_dataset", place, inside, got)
        low, high = np.minimum(low, least), np.maximum(high, most)
    if stated is not None:
        return stated
    for channel in np.flatnonzero(low == high).tolist():
        got = f"{low[channel]:g} alone in channel {channel}; state a data_range"
        raise InvalidValue("load_dataset", arrays.root, "to have different values", got)
    return checked_ranges("load_dataset", str(arrays.root), np.stack([low, high], axis=1).tolist())


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
