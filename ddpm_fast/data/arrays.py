"""Arrays of numbers as sources and as data sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InvalidValue, expect
from ..forms import Pairs, Ranges
from .items import DatasetInfo, ItemDataset
from .labels import checked_labels
from .sources import Decoded, Opened, Source

# -------------------------------------------------------------------------------------------------------------------- files


def read_array_file(path: Path) -> Source:
    """Return the rows of a .npy, mapped into memory, or of `arr_0` or the only array of an .npz with labels in `arr_1`."""
    mapped = path.suffix.lower() == ".npy"
    found = loaded_arrays(str(path), mapped=mapped)
    opened = Opened(np.load, path, "r") if mapped else None
    return read_rows(str(path), only_images(str(path), found), found.get("arr_1"), opened=opened)


def read_rows(
    root: str, images: NDArray[Any], labels: Any | None, classes: Sequence[str] | None = None, opened: Opened | None = None
) -> Source:
    """Return the rows of an array [N, H, W] or [N, H, W, C] as a source.

    Args:
        root: Path of the array's file.
        images: The array.
        labels: Integers [N]. None: the images carry no labels.
        classes: Names of the classes. None: their numbers.
        opened: A function that returns the array, if it is not in memory.

    Raises:
        ValueError: The array or the labels have other shapes, or a label is out of range.
    """
    expect(images.ndim in (3, 4) and images.size, root, "to be [N, H, W] or 4-d", list(images.shape))
    numbers, names = checked_labels(root, labels, len(images), classes)
    return Source(
        root=root,
        names=range(len(images)),
        labels=numbers,
        classes=names,
        read=images.__getitem__ if opened is None else partial(_row, opened),
        has_arrays=True,
        in_memory=opened is None,
    )


def _row(opened: Callable[[], NDArray[Any]], number: int) -> NDArray[Any]:
    row: NDArray[Any] = opened()[number]
    return row


def loaded_arrays(path: str, *, mapped: bool = False) -> dict[str, NDArray[Any]]:
    """Return the arrays of a .npy or .npz by name, or that of a .npy mapped into memory. Nothing is unpickled."""
    try:
        with open(path, "rb") as file:
            content = np.load(path, "r") if mapped else np.load(file)
            return {"arr_0": content} if isinstance(content, np.ndarray) else {name: content[name] for name in content.files}
    except Exception as error:  # damaged files raise errors of many types, such as a MemoryError for a huge shape
        unsafe = isinstance(error, ValueError) and "allow_pickle" in str(error)  # numpy says so of any odd file
        got = "Python objects, as images of different sizes are, or a damaged file" if unsafe else error
        raise InvalidValue(path, "to be a whole .npy or .npz of numbers", got) from error


def only_images(place: str, arrays: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """Return arr_0, or the only array next to arr_1, which has labels."""
    names = [name for name in arrays if name != "arr_1"]
    one = "arr_0" in arrays or len(names) == 1
    expect(one, place, "to hold one array, or arr_0 with labels in arr_1", ", ".join(arrays) or "none")
    return arrays.get("arr_0", arrays[names[0]])


# ---------------------------------------------------------------------------------------------------------------- data sets


def arrays(name: str, source: Source, value_range: Pairs | None, *, measure: bool) -> ItemDataset:
    """Return a data set of arrays: uint8 as pictures, other numbers mapped to [-1, 1]. All numbers are looked at.

    Args:
        name: Name of the data set.
        source: The source. Its arrays have one shape, [H, W] or [H, W, C], and one dtype.
        value_range: (low, high) of the values, which become -1 and 1, for all channels or for each. None: uint8 are pictures.
        measure: Without a range, take the least and the largest of each channel of other numbers. They are an error otherwise.

    Raises:
        ValueError: An array is no image, has another shape or dtype than the first, or has values not finite or outside
            of the range. The message names it.
    """
    first = _array(source, None, 0)
    info = DatasetInfo(name, first.shape, classes=source.classes, preparation=source.preparation)
    wanted = f"to be given for numbers, as {source.place(0)} has {first.dtype} and no range is kept for them"
    expect(first.dtype == np.uint8 or value_range or measure, "data_range", wanted, None)
    ranges = None
    if first.dtype != np.uint8 or value_range is not None:
        ranges = _measured(source, first, value_range)
        mapped = "the range of each channel" if len(ranges) > 1 else "{:g} to {:g}".format(*ranges[0])
        preparation = f"{source.preparation}, {mapped} as -1 to 1"
        info = replace(info, dtype=torch.float32, preparation=preparation, data_range=ranges)
    return Decoded(source, info, partial(_read_array, source, first, ranges))


def _read_array(source: Source, first: NDArray[Any], ranges: Pairs | None, index: int) -> Tensor:
    array = _array(source, first, index)
    if ranges is None:
        return torch.from_numpy(np.array(array))  # a copy, as a file that is mapped is read-only
    low, high = np.array(ranges).T[:, :, None, None]  # [C, 1, 1]
    return torch.from_numpy((array.astype(np.float64) - low) * (2 / (high - low)) - 1).float()


def _array(source: Source, first: NDArray[Any] | None, index: int) -> NDArray[Any]:
    """Return an array as [C, H, W]. Raise a ValueError if it is no image, or unlike the first."""
    place, item = source.place(index), source[index]
    if not isinstance(item, np.ndarray):  # a file
        found = loaded_arrays(str(item))
        expect("arr_1" not in found, place, "to hold an image alone, as sub-folders are the classes", "arr_1")
        item = only_images(place, found)
    expect(item.ndim in (2, 3) and item.size, place, "to be 2-d or 3-d", list(item.shape))
    expect(item.dtype.kind in "uif", place, "to hold numbers", item.dtype)
    array = item[None] if item.ndim == 2 else item.transpose(2, 0, 1)
    wanted, got = (f"{each.dtype} {list(each.shape)}" for each in (array if first is None else first, array))
    expect(got == wanted, place, f"to be {wanted}, as the first", got)
    return array


def _measured(source: Source, first: NDArray[Any], stated: Pairs | None) -> Pairs:
    """Return the range of each channel, or the stated ones after a look at all values."""
    low, high = np.full(len(first), np.inf), np.full(len(first), -np.inf)
    bounds = np.array(stated or [(-np.inf, np.inf)])  # [C or 1, 2]
    if first.dtype.kind == "f" and stated is not None:  # values at the ends are rounded to their dtype
        bounds = bounds.clip(np.finfo(first.dtype).min, np.finfo(first.dtype).max).astype(first.dtype).astype(np.float64)
    wanted = f"to be one range, or one for each of {len(first)} channels"
    expect(len(bounds) in (1, len(first)), "data_range", wanted, len(bounds))
    for index in range(len(source)):
        array, place = _array(source, first, index), source.place(index)
        with np.errstate(invalid="ignore"):  # a signalling NaN would be a warning
            least, most = (each(array, axis=(1, 2)).astype(np.float64) for each in (np.min, np.max))  # NaN if one is
        expect(np.isfinite([least, most]).all(), place, "to be finite", "NaN or infinity")
        outside = (least < bounds[:, 0]) | (most > bounds[:, 1])
        channel = int(outside.argmax())
        inside = "to be in {:g}..{:g}, the data_range".format(*bounds[channel % len(bounds)])
        got = f"values from {least[channel]:g} to {most[channel]:g} in channel {channel}; clip them, or train with more"
        expect(not outside.any(), place, inside, got)
        low, high = np.minimum(low, least), np.maximum(high, most)
    if stated is not None:
        return stated
    for channel in np.flatnonzero(low == high).tolist():
        got = f"{low[channel]:g} alone in channel {channel}; state a data_range"
        raise InvalidValue(source.root, "to have different values", got)
    return Ranges.parse(source.root, np.stack([low, high], axis=1).tolist())
