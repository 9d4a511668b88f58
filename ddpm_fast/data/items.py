"""Items to train on, data sets of them, and wrappers that each do one thing."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from ..checks import as_json
from ..forms import Pairs
from ..interface import Labels
from .degradation import Degradation


class Item(NamedTuple):
    """An image with its label and its condition.

    Attributes:
        image: uint8 [C, ...], or float32 [C, ...] in [-1, 1].
        label: A number in 0..len(classes)-1.
        condition: uint8 or float32 [K, ...]. None: the data set has none, or it is computed from the image.
    """

    image: Tensor
    label: Any
    condition: Tensor | None = None


class Batch(NamedTuple):
    """A batch of items.

    Attributes:
        images: uint8 or float32 [B, C, ...].
        labels: Labels [B, ...].
        conditions: uint8 or float32 [B, K, ...], or None.
    """

    images: Tensor
    labels: Tensor
    conditions: Tensor | None


@dataclass(frozen=True)
class DatasetInfo:
    """A description of a data set, as runs record it.

    Attributes:
        name: The name that `load_dataset` was given.
        shape: (C, H, W) of an image.
        dtype: uint8 or float32.
        classes: Names of the classes; a single one if the images carry no labels.
        preparation: What was done to the images' size, in words.
        data_range: (low, high) of the files' values, which became -1 and 1, for all channels or for each. None: pictures
            of 0..255.
        condition: What a network reads next to x_t: images, or a degradation that is computed from a batch as it is used.
        condition_channels: K of a condition, 0 without one.
        condition_range: The `data_range` of the conditions.
        knows_ranges: False for a user's own data set, whose ranges stand in the network's configuration.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.uint8
    classes: tuple[str, ...] = ("",)
    preparation: str = "not resized"
    data_range: Pairs | None = None
    condition: Degradation | Literal["images"] | None = None
    condition_channels: int = 0
    condition_range: Pairs | None = None
    knows_ranges: bool = True

    @property
    def labels(self) -> Labels:
        """The labels of the images, as training gives them to a network."""
        return Labels.of_classes(self.classes)

    @property
    def described(self) -> dict[str, Any]:
        """Entries of a network's configuration, as JSON has them."""
        ranges = {"condition_range": as_json(self.condition_range), "data_range": as_json(self.data_range)}
        condition = None if self.condition is None else str(self.condition)
        return {"condition": condition} | (ranges if self.knows_ranges else {})


class ItemDataset(Dataset[Item]):
    """A map-style data set whose items have one shape. It can be pickled, so any process can read it.

    Its `__getitem__` raises an IndexError for a number that is too large, and a ValueError for an item that cannot be read.

    Attributes:
        info: Its description.
        in_memory: True if items are neither read from files nor decoded or resized as they are used.
    """

    info: DatasetInfo
    in_memory: bool = False

    def __len__(self) -> int:
        """Return the number of items."""
        raise NotImplementedError

    def contents(self, exact: bool) -> Iterator[bytes]:
        """Yield bytes that identify this data set: those of all items, or of a sample."""
        raise NotImplementedError

    def fingerprint(self, *, exact: bool = False) -> dict[str, str]:
        """Return SHA-256 digests of the data set: "sample" of a sample of its bytes, and "exact" of all if wanted."""
        found = {}
        for kind in ("sample", "exact") if exact else ("sample",):
            digest = hashlib.sha256(f"{self.info.shape} {self.info.classes}".encode())
            for content in self.contents(kind == "exact"):
                digest.update(content)
            found[kind] = digest.hexdigest()
        return found


# ----------------------------------------------------------------------------------------------------------------- wrappers


class Wrapper(ItemDataset):
    """The items of a data set, unchanged. A wrapper changes one thing.

    Args:
        dataset: The data set.
        info: The description of the changed items. None: that of the data set.
    """

    def __init__(self, dataset: ItemDataset, info: DatasetInfo | None = None) -> None:
        self._dataset, self.info, self.in_memory = dataset, info or dataset.info, dataset.in_memory

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self._dataset)

    def __getitem__(self, index: int) -> Item:
        """Return an item."""
        return self._dataset[index]

    def contents(self, exact: bool) -> Iterator[bytes]:
        """Yield bytes of the data set."""
        return self._dataset.contents(exact)


class Cached(Wrapper):
    """Items that are held in memory. `fill` reads each before it is used.

    Args:
        dataset: The data set.
    """

    def __init__(self, dataset: ItemDataset) -> None:
        super().__init__(dataset)
        self.in_memory = True
        self._images = torch.empty(len(dataset), *self.info.shape, dtype=self.info.dtype)
        self._labels: list[Any] = [None] * len(dataset)

    def fill(self, index: int) -> None:
        """Read an item of the data set."""
        self._images[index], self._labels[index], _ = self._dataset[index]

    def __getitem__(self, index: int) -> Item:
        """Return an item."""
        return Item(self._images[operator.index(index)], self._labels[index])


class Resized(Wrapper):
    """Images that are cropped to the largest centred part of other proportions and resized as they are read.

    Args:
        dataset: The data set.
        sides: Height and width.
    """

    def __init__(self, dataset: ItemDataset, sides: tuple[int, int]) -> None:
        info = dataset.info
        others = [part for part in info.preparation.split(", ") if part != "not resized"]
        preparation = ", ".join([f"resized from {info.shape[2]}x{info.shape[1]}", *others])
        super().__init__(dataset, replace(info, shape=(info.shape[0], *sides), preparation=preparation))
        self._sides, self.in_memory = sides, False

    def __getitem__(self, index: int) -> Item:
        """Return a resized item."""
        item = self._dataset[index]
        left, top, right, bottom = central_box(item.image.shape[1], item.image.shape[2], *self._sides)
        part = item.image[None, :, top:bottom, left:right]
        resized = functional.interpolate(part.float(), self._sides, mode="bilinear", antialias=True)[0]
        return item._replace(image=resized if part.is_floating_point() else resized.round().to(part.dtype))


class Conditioned(Wrapper):
    """Items with conditions.

    Args:
        dataset: The data set.
        conditions: A data set whose images are the conditions of the items of the same number.
    """

    def __init__(self, dataset: ItemDataset, conditions: ItemDataset) -> None:
        shape, values = conditions.info.shape, conditions.info.data_range
        described = replace(dataset.info, condition="images", condition_channels=shape[0], condition_range=values)
        super().__init__(dataset, described)
        self._conditions, self.in_memory = conditions, dataset.in_memory and conditions.in_memory

    def __getitem__(self, index: int) -> Item:
        """Return an item with its condition."""
        return self._dataset[index]._replace(condition=self._conditions[index].image)

    def contents(self, exact: bool) -> Iterator[bytes]:
        """Yield bytes of both data sets."""
        return chain(self._dataset.contents(exact), self._conditions.contents(exact))


# ---------------------------------------------------------------------------------------------------------------- functions


def collate(items: Sequence[Item]) -> Batch:
    """Return items as a batch, as the `collate_fn` of a DataLoader.

    Args:
        items: Items of a data set of `load_dataset`, which have one shape.

    Returns:
        Images [B, C, ...] in uint8 or, in [-1, 1], float32; labels int64 [B]; conditions [B, K, ...], or None.
    """
    images, labels, conditions = zip(*items, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels), None if conditions[0] is None else torch.stack(conditions))


def read_batch(dataset: ItemDataset, indices: Sequence[int] | Tensor) -> Batch:
    """Return the items of these numbers as a batch."""
    return collate([dataset[int(index)] for index in indices])


def to_unit_range(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Map uint8 0..255 to -1..1, the range of x_0. Black is -1. Floating images are in that range, and stay unchanged."""
    return images.to(dtype) if images.is_floating_point() else images.to(dtype) * (2 / 255) - 1.0


def size_of(sides: Sequence[int]) -> str:
    """Return (H, W) as text, as `--image-size` takes it: 48x32 is wider than high, 32 is a square."""
    height, width = sides
    return f"{width}" if height == width else f"{width}x{height}"


def central_box(rows: int, columns: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of the largest centred part with the proportions of height and width."""
    part_columns, part_rows = min(columns, max(1, rows * width // height)), min(rows, max(1, columns * height // width))
    left, top = (columns - part_columns) // 2, (rows - part_rows) // 2
    return left, top, left + part_columns, top + part_rows
