"""Rows as sources: of an array in a file, and of a table of Hugging Face's `datasets`."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import InvalidValue, expect
from .sources import Opened, Source


def read_rows(root: str, images: NDArray[Any], labels: Any, classes: Sequence[str], opened: Any = None) -> Source:
    """Return the rows of an array [N, H, W] or [N, H, W, C] as a source.

    Args:
        root: Path of the array's file.
        images: The array.
        labels: Integers [N].
        classes: Names of the classes.
        opened: A function that returns the array, if it is not in memory.

    Raises:
        ValueError: The array or the labels have other shapes, or a label is out of range.
    """
    shape = list(images.shape)
    expect(images.ndim in (3, 4) and images.size, "load_dataset", root, "to be [N, H, W] or 4-d", shape)
    labels = checked_labels(root, labels, len(images), len(classes))
    return Source(
        root=root,
        names=range(len(images)),
        labels=labels,
        classes=tuple(classes),
        read=partial(_row, opened or partial(np.asarray, images)),
        has_arrays=True,
        in_memory=opened is None,
    )


def checked_labels(root: str, labels: Any, count: int, num_classes: int) -> Tensor:
    """Return labels as int64 [count]. Raise a ValueError unless they are so many integers in 0..num_classes-1."""
    values = np.asarray(labels)
    right, got = values.dtype.kind in "iu" and values.shape == (count,), f"{values.dtype} {list(values.shape)}"
    expect(right, "load_dataset", f"the labels of {root}", f"to be integers [{count}]", got)
    low, high = int(values.min()), int(values.max())
    wrong = low if low < 0 else high
    expect(0 <= wrong < num_classes, "load_dataset", "labels", f"in 0..{num_classes - 1}", wrong, root)
    return torch.from_numpy(values.astype(np.int64))


def _row(opened: Callable[[], NDArray[Any]], number: int) -> NDArray[Any]:
    row: NDArray[Any] = opened()[number]
    return row


def read_array_file(path: Path) -> Source:
    """Return the rows of a .npy, mapped into memory, or of `arr_0` or the only array of an .npz with labels in `arr_1`."""
    mapped = path.suffix.lower() == ".npy"
    found = loaded_arrays(str(path), mapped=mapped)
    images, labels = only_images(str(path), found), found.get("arr_1")
    opened = Opened(np.load, path, "r") if mapped else None
    if labels is None:
        return read_rows(str(path), images, np.zeros(len(images), np.int64), [""], opened)
    return read_rows(str(path), images, labels, [*map(str, range(int(labels.max(initial=0)) + 1))], opened)


def loaded_arrays(path: str, *, mapped: bool = False) -> dict[str, NDArray[Any]]:
    """Return the arrays of a .npy or .npz by name, or that of a .npy mapped into memory. Nothing is unpickled."""
    try:
        with open(path, "rb") as file:
            content = np.load(path, "r") if mapped else np.load(file)
            return {"arr_0": content} if isinstance(content, np.ndarray) else {name: content[name] for name in content.files}
    except Exception as error:  # damaged files raise errors of many types, such as a MemoryError for a huge shape
        raise InvalidValue("load_dataset", path, "to be a whole .npy or .npz of numbers", error) from error


def only_images(place: str, arrays: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """Return arr_0, or the only array next to arr_1, which has labels."""
    names = [name for name in arrays if name != "arr_1"]
    one = "arr_0" in arrays or len(names) == 1
    expect(one, "load_dataset", place, "to hold one array, or arr_0", ", ".join(arrays) or "none")
    return arrays.get("arr_0", arrays[names[0]])


def read_table(path: Path, split: str) -> Source:
    """Return the rows of a folder that `save_to_disk` of Hugging Face's `datasets` has written, or of one of its splits."""
    datasets = import_extra("datasets", "hub")
    try:
        table = datasets.load_from_disk(path)
        if isinstance(table, datasets.DatasetDict):
            expect(split in table, "", "splits", f"to have {split}", ", ".join(table))
            table = table[split]
        table.data.table.validate(full=True)  # or an offset in a damaged file would lead anywhere
    except Exception as error:  # damaged files raise errors of many types
        raise InvalidValue("load_dataset", str(path), "to be a whole folder of save_to_disk", error) from error
    images, labels = (
        [name for name, kind in table.features.items() if isinstance(kind, wanted)]
        for wanted in (datasets.Image, datasets.ClassLabel)
    )
    got = f"{', '.join(images) or 'none'} and {', '.join(labels) or 'none'}"
    right = len(images) == 1 and len(labels) <= 1
    expect(right, "load_dataset", str(path), "to have one Image and at most one ClassLabel", got)
    expect(len(table), "load_dataset", str(path), "to hold images", "none")
    classes = tuple(table.features[labels[0]].names) if labels else ("",)
    numbers = table.with_format(None)[labels[0]][:] if labels else [0] * len(table)
    return Source(
        root=str(path),
        names=range(len(table)),
        labels=checked_labels(str(path), numbers, len(table), len(classes)),
        classes=classes,
        read=partial(_cell, table.cast_column(images[0], datasets.Image(decode=False)).select_columns(images)),
    )


def _cell(table: Any, number: int) -> io.BytesIO:
    (cell,) = table[number].values()
    if cell is None or cell["bytes"] is None:
        raise ValueError("the table has no bytes of the image")
    return io.BytesIO(cell["bytes"])


def import_extra(module: str, extra: str = "train") -> ModuleType:
    """Import a module of an extra."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        raise ImportError(f"{module} is missing: install it with pip install 'ddpm_fast[{extra}]'") from error
