"""Any map-style data set of PyTorch as a data set to train on."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, Subset

from ..errors import InvalidType, InvalidValue, expect
from ..interface import Labels
from .items import DatasetInfo, Item, ItemDataset

_log = logging.getLogger("ddpm_fast")

_SAMPLED: Final = 64  # items in a fingerprint's sample
_OUTSIDE: Final = 1e-3  # the range's ends are rounded


class UserDataset(ItemDataset):
    """The items of a user's map-style data set, checked as they are read.

    An item must depend on its index alone. Otherwise a resumed run would train on other images than an uninterrupted one,
    and the fingerprint would not identify the data set.

    Args:
        source: An object with `__len__` and `__getitem__(int)`. See `Trainer` for its items.
        channels: Channels of an image. PIL images are converted to them. None: those of the first item.
        reads: Channels that the network reads: those of an image and its condition. None: any number.
        labels: The labels that items have. Those of the items are ignored if there are none.

    Raises:
        TypeError: The data set is not map-style.
        ValueError: The data set is empty, or its first item is not an image. The message names the item.
    """

    in_memory = True  # as far as is known: `num_workers` says how many processes read it

    def __init__(self, source: Any, channels: int | None, labels: Labels, reads: int | None = None) -> None:
        if isinstance(source, IterableDataset) or not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
            raise InvalidType("dataset", "to be map-style (__len__ and __getitem__)", type(source).__name__)
        expect(len(source), "dataset", "to have at least one item", "none")
        self._source, self._labels = source, labels
        first = self._item(0, channels, reads)
        self._kinds = _kinds(first)
        info = DatasetInfo(
            type(source).__name__, tuple(first.image.shape), first.image.dtype, **labels.in_data, knows_ranges=False
        )
        whole = source
        while isinstance(whole, Subset):
            whole = whole.dataset
        if isinstance(whole, ItemDataset):
            self.in_memory, of = whole.in_memory, whole.info  # a part of it keeps its ranges
            info = replace(info, data_range=of.data_range, condition_range=of.condition_range, knows_ranges=of.knows_ranges)
        elif first.image.is_floating_point() and first.image.min() >= 0:
            _log.warning("dataset[0] has no value below 0, and floats are taken to be in [-1, 1]: map [0, 1] by 2 * x - 1")
        if first.condition is not None:
            info = replace(info, condition="images", condition_channels=first.condition.shape[0])
        self.info = info

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self._source)

    def __getitem__(self, index: int) -> Item:
        """Return an item. Raise a ValueError that names it if it is wrong."""
        channels = self.info.shape[0]
        item = self._item(index, channels, channels + self.info.condition_channels)
        got = _kinds(item)
        expect(got == self._kinds, f"dataset[{index}]", f"to be {self._kinds}, as dataset[0]", got)
        return item

    def contents(self, exact: bool) -> Iterator[bytes]:
        """Yield the values of all items, or of items at even distances."""
        for index in range(0, len(self), 1 if exact else -(-len(self) // _SAMPLED)):
            image, label, condition = self[index]
            yield str(label).encode()
            yield from (each.numpy().tobytes() for each in (image, condition) if each is not None)

    def _item(self, index: int, channels: int | None, reads: int | None) -> Item:
        """Return an item with so many channels. Raise a ValueError that names it if it has others."""
        place = f"dataset[{index}]"
        try:
            item = self._source[index]
        except Exception as error:  # whatever the data set raises
            raise InvalidValue(place, "to be an item", f"{type(error).__name__}: {error}") from error
        image, label, given = _parts(place, item)
        shapes = "[C, H, W] (or [C, L], [C, D, H, W])" if channels is None else f"[{channels}, H, W]"
        pixels = _tensor(place, image, channels, f"to be uint8 {shapes}, floats {shapes} in [-1, 1] or a PIL image")
        low, high = map(float, torch.aminmax(pixels))
        inside = not pixels.is_floating_point() or (low >= -1 - _OUTSIDE and high <= 1 + _OUTSIDE)  # NaN is not
        expect(inside, place, "to be in [-1, 1]", f"values from {low:g} to {high:g}")
        free = None if reads is None else reads - pixels.shape[0]
        wanted = f"{f'a condition of {free} channels' if free else 'no condition'}, as the network reads {reads}"
        got, fits = "none" if given is None else "one", free is None or bool(free) == (given is not None)
        expect(fits, place, f"to have {wanted} and the image has {pixels.shape[0]}", got)
        condition = None if given is None else _condition(place, given, pixels, free)
        return Item(pixels, self._labels.of_item(place, label), condition)


def _parts(place: str, item: Any) -> tuple[Any, Any, Any]:
    """Return the image, label and condition of an item, unchecked, None for what it lacks."""
    if isinstance(item, Mapping):
        right = "image" in item and not item.keys() - {"image", "label", "condition"}
        expect(right, place, "to have image, label and condition", f"{', '.join(map(str, item))}")
        return item["image"], item.get("label"), item.get("condition")
    parts = tuple(item) if isinstance(item, (tuple, list)) else (item,)
    expect(1 <= len(parts) <= 3, place, "to be an image, (image, label) or (image, label, condition)", f"{len(parts)} values")
    return (*parts, None, None)[:3]


def _condition(place: str, given: Any, pixels: Tensor, channels: int | None) -> Tensor:
    """Return a condition as uint8 or float32 [K, ...] on the CPU. Raise a ValueError if it is no condition."""
    size = ", ".join(map(str, ["K" if channels is None else channels, *pixels.shape[1:]]))
    wanted = f"to have a condition of uint8 or finite floats [{size}], or a PIL image"
    values = _tensor(place, given, channels, wanted)
    expect(values.shape[1:] == pixels.shape[1:], place, wanted, f"{values.dtype} {list(values.shape)}")
    expect(values.isfinite().all(), place, wanted, "NaN or infinity")
    return values


def _tensor(place: str, image: Any, channels: int | None, wanted: str) -> Tensor:
    """Return a tensor or a PIL image as uint8 or float32 [C, ...] on the CPU."""
    if not isinstance(image, Tensor):  # a run on tensors needs no Pillow
        image = _pixels(place, image, channels, wanted)
    dense = image.layout is torch.strided and not image.is_nested and not image.is_meta
    shaped = dense and image.dim() >= 2 and image.numel() > 0 and channels in (None, image.shape[0])
    shape = list(image.shape) if dense else "without values in a dense layout"
    expect(shaped and (image.is_floating_point() or image.dtype == torch.uint8), place, wanted, f"{image.dtype} {shape}")
    values: Tensor = image.detach().cpu().contiguous()
    return values.float() if values.is_floating_point() else values


def _pixels(place: str, image: Any, channels: int | None, wanted: str) -> Tensor:
    """Return a PIL image as uint8 [C, H, W]. Raise a ValueError for anything else."""
    from PIL.Image import Image

    from .pictures import GREY, converted, pixels

    if not isinstance(image, Image):
        raise InvalidValue(place, wanted, type(image).__name__)
    found = channels or (1 if image.mode in GREY else 4 if image.mode == "RGBA" else 3)
    expect(found in (1, 3, 4), place, f"to be a tensor, as there are {found} channels", "a PIL image")
    try:
        return pixels(converted(image, image.format, found))
    except Exception as error:  # Pillow's formats raise errors of many types
        raise InvalidValue(place, "to be an image", error) from error


def _kinds(item: Item) -> str:
    kinds = [f"{each.dtype} {list(each.shape)}" for each in (item.image, item.condition) if each is not None]
    return " with a condition ".join(kinds)
