"""Labels in files: integers by image, and the dataset.json of EDM and StyleGAN."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidValue, expect

_MAX_LABEL: Final = 65_535  # ImageNet-21k has 21,841 classes


def checked_labels(
    root: str, labels: Any | None, count: int, classes: Sequence[str] | None = None
) -> tuple[Tensor, tuple[str, ...]]:
    """Return labels as int64 [count], and the names of the classes.

    Args:
        root: The file of the labels, for errors.
        labels: Integers. None: there is one class "".
        count: Number of images.
        classes: Names of the classes. None: their numbers.

    Raises:
        ValueError: `labels` are not `count` integers, or one is out of range.
    """
    if labels is None:
        return torch.zeros(count, dtype=torch.int64), ("",)
    values, most = np.asarray(labels), _MAX_LABEL if classes is None else len(classes) - 1
    right, got = values.dtype.kind in "iu" and values.shape == (count,), f"{values.dtype} {list(values.shape)}"
    expect(right, f"the labels of {root}", f"to be integers [{count}]", got)
    low, high = int(values.min()), int(values.max())
    expect(low >= 0 and high <= most, "labels", f"in 0..{most}", low if low < 0 else high, root)
    return torch.from_numpy(values.astype(np.int64)), tuple(classes or map(str, range(high + 1)))


def edm_labels(place: str, read: Callable[[], bytes], names: Sequence[str]) -> tuple[Tensor, tuple[str, ...]] | None:
    """Return the labels in a `dataset.json`, as the data set tools of EDM and StyleGAN write it, and the classes: numbers.

    Args:
        place: The file, for errors.
        read: A function that reads it.
        names: Paths of images, relative to the file's folder.

    Returns:
        int64 [N], and one class "" if the labels are null. None: the file is of another kind.

    Raises:
        ValueError: The labels are not pairs of name and number, or a name has none.
    """
    try:
        values = json.loads(read())
    except Exception as error:  # damaged archives raise errors of many types
        raise InvalidValue(place, "to be JSON", error) from error
    if not (isinstance(values, dict) and "labels" in values):
        return None
    pairs = values["labels"]
    if pairs is None:
        return checked_labels(place, None, len(names))
    paired = isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)
    expect(paired, "labels", "to be a list of pairs [name, label], or null", reprlib.repr(pairs), place)
    given = {str(name): label for name, label in pairs}
    labels = [given.get(name.replace("\\", "/"), "none") for name in names]
    for name, label in zip(names, labels, strict=True):
        right = type(label) is int and 0 <= label <= _MAX_LABEL
        wanted = f"the label of {name} in {place} to be in 0..{_MAX_LABEL}"
        expect(right, "", wanted, "none" if label == "none" else reprlib.repr(label))
    return checked_labels(place, labels, len(names))
