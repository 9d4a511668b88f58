"""Labels of images by name, in a `dataset.json` as the data set tools of EDM and StyleGAN write it."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ...errors import InvalidValue, expect

LABELS_FILE: Final = "dataset.json"
MAX_BYTES: Final = 256 << 20  # that of ImageNet has 50 MB

_MAX_LABEL: Final = 65_535  # ImageNet-21k has 21,841 classes


def parsed_json(place: str, content: bytes) -> Any:
    """Return the content of a `dataset.json`. `place` is the file, for error messages."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidValue("load_dataset", place, "to be JSON", error) from error


def listed_labels(place: str, values: Any, names: Sequence[str]) -> Tensor | None:
    """Return the label of each name, int64 [N], or None if the file has none.

    Args:
        place: The file, for error messages.
        values: Its content.
        names: Paths of images, relative to the file's folder.

    Raises:
        ValueError: The labels are no pairs, or a name has none.
    """
    pairs = values.get("labels") if isinstance(values, dict) else values
    if pairs is None:
        return None
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise InvalidValue("load_dataset", "labels", "to be a list of pairs [name, label], or null", reprlib.repr(pairs), place)
    labels: dict[Any, Any] = {pair[0]: pair[1] for pair in pairs if isinstance(pair[0], str)}
    numbers = []
    for name in names:
        label = labels.get(name.replace("\\", "/"))
        if type(label) is not int or not 0 <= label <= _MAX_LABEL:
            got = "a vector" if isinstance(label, list) else "none" if label is None else repr(label)
            raise InvalidValue("load_dataset", "", f"the label of {name} in {place} to be in 0..{_MAX_LABEL}", got)
        numbers.append(label)
    return torch.tensor(numbers)


def chosen_labels(labels: Tensor | None, names: Sequence[str], kept: Sequence[str]) -> tuple[Tensor, tuple[str, ...]]:
    """Return the labels of those images that are kept, and the names of all classes.

    Args:
        labels: int64 [N], or None: one class without a name.
        names: The N images.
        kept: Those that were not left out, M.

    Returns:
        int64 [M], and the classes' numbers as text.
    """
    if labels is None:
        return torch.zeros(len(kept), dtype=torch.int64), ("",)
    rows = {name: row for row, name in enumerate(names)}
    return labels[[rows[name] for name in kept]], tuple(map(str, range(int(labels.max()) + 1)))


def check_labels(place: object, labels: Any, num_classes: int) -> None:
    """Raise a ValueError unless all labels, a tensor or an array [N], are in 0..num_classes-1. `place` has them."""
    low, high = int(labels.min()), int(labels.max())
    wrong = low if low < 0 else high
    expect(0 <= wrong < num_classes, "load_dataset", "labels", f"in 0..{num_classes - 1}", wrong, str(place))
