"""A data set: images, integer labels and conditions, read by index."""

from __future__ import annotations

import hashlib
import math
import operator
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from ...checks import Ranges, as_json
from ...errors import expect
from ...resources import check_free_memory
from .degradation import Degradation

SAMPLED: Final = 256  # images in a sample, at least

_AHEAD: Final = 4  # batches that are read before they are asked for, at most
_A_TASK: Final = 4  # images that a thread reads before it takes the next task


@dataclass(frozen=True)
class ImageDataset(Dataset[tuple[Any, ...]]):
    """A map-style data set of images of one size, with labels. Worker processes that read it must be forked.

    Attributes:
        name: The name that `load_dataset` was given.
        images: uint8, or float32 in [-1, 1], [N, C, H, W]. What does not fit into memory is read, decoded or resized as it
            is used.
        labels: int64 [N], 0..len(classes)-1.
        classes: Names of the classes; a single one if the images carry no labels.
        contents: A function that yields bytes of the images: all, or a sample.
        preparation: What was done to the images' size, in words.
        names: Names of the images' files. Empty if they are in one file.
        value_range: (low, high) of the files' values, which are -1 and 1 here: of all, or of each channel. None: pictures of
            0..255.
        condition: What a network reads beside x_t: images of the same number and size, or a degradation of these images,
            which is computed as they are used.
    """

    name: str
    images: Tensor | LazyImages
    labels: Tensor
    classes: tuple[str, ...]
    contents: Callable[[bool], Iterator[bytes]]
    preparation: str = "as they are"
    names: Sequence[str] = ()
    value_range: Ranges | None = None
    condition: ImageDataset | Degradation | None = None

    @property
    def condition_channels(self) -> int:
        """Channels of a condition, 0 without one."""
        if isinstance(self.condition, ImageDataset):
            return self.condition.shape[0]
        return 0 if self.condition is None else self.condition.channels(self.shape[0])

    @property
    def described(self) -> dict[str, Any]:
        """Entries of a network's configuration, as JSON has them: the kind of condition, and the ranges of values."""
        paired = isinstance(self.condition, ImageDataset)
        return {
            "condition": "images" if paired else None if self.condition is None else str(self.condition),
            "condition_range": as_json(self.condition.value_range) if isinstance(self.condition, ImageDataset) else None,
            "data_range": as_json(self.value_range),
        }

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """Return an image [C, H, W], its label, and its condition [K, H, W] if it has one. `batch` returns several at once.

        Raises:
            IndexError: There is no such item.
            ValueError: The image cannot be decoded.
        """
        label = int(self.labels[operator.index(index)])
        image, _, *condition = self.batch(torch.tensor([index]))
        return image[0], label, *(each[0] for each in condition)

    def batch(self, indices: Tensor) -> tuple[Tensor, ...]:
        """Return images [B, C, H, W], labels, int64 [B], and conditions [B, K, H, W] if there are any, at int64 indices [B]."""
        condition = (self.condition.images[indices],) if isinstance(self.condition, ImageDataset) else ()
        return self.images[indices], self.labels[indices], *condition

    def batches(self, indices: Iterable[Tensor]) -> Generator[tuple[Tensor, ...], None, None]:
        """Yield what `batch` returns at each of the int64 indices [B].

        Images that are not in memory are decoded ahead by threads, so a few more indices are taken than batches are
        given. Close the iterator to stop these threads.

        Raises:
            ValueError: An image of this batch cannot be decoded. The message names its file.
        """
        read = [self.images, self.condition.images] if isinstance(self.condition, ImageDataset) else [self.images]
        decoded = [each for each in read if isinstance(each, LazyImages) and each.memory is not None]
        if not decoded:
            yield from map(self.batch, indices)
            return
        memory, image = decoded[0].memory or 0, sum(each.image_bytes for each in decoded)
        waiting: deque[list[Future[tuple[Tensor, ...]]]] = deque()
        pool = ThreadPoolExecutor(min(32, os.cpu_count() or 1), thread_name_prefix="ddpm_fast-decode")
        try:
            for batch in indices:
                waiting.append([pool.submit(self.batch, part) for part in batch.split(_A_TASK)])
                ahead = min(_AHEAD, max(1, memory // max(1, len(batch) * image) - 1))  # one more is in use
                while len(waiting) > ahead:
                    yield _joined(waiting.popleft())
            while waiting:
                yield _joined(waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def fingerprint(self, *, exact: bool = False) -> dict[str, str]:
        """Return SHA-256 digests of the data set: "sample" of labels, names, sizes and some bytes, and "exact" of all bytes."""
        contents = [self.contents, self.condition.contents] if isinstance(self.condition, ImageDataset) else [self.contents]
        return digests(
            f"{self.shape} {self.classes}",
            lambda exact: chain([self.labels.numpy().tobytes()], *(each(exact) for each in contents)),
            exact,
        )


def _joined(tasks: list[Future[tuple[Tensor, ...]]]) -> tuple[Tensor, ...]:
    """Return the tensors of a batch once its tasks are done. Raise the first of their errors."""
    return tuple(map(torch.cat, zip(*(task.result() for task in tasks), strict=True)))


@dataclass(frozen=True)
class LazyImages:
    """Images that are decoded or resized each time they are read. They are indexed like a tensor [N, C, H, W].

    Attributes:
        shape: (N, C, H, W).
        read: A function that returns the images at int64 indices [B].
        memory: Bytes of images that may wait to be used. Two batches may always. None: nothing is read ahead.
        itemsize: Bytes of a value.
    """

    shape: tuple[int, int, int, int]
    read: Callable[[Tensor], Tensor]
    memory: int | None = None
    itemsize: int = 1

    @property
    def image_bytes(self) -> int:
        """Bytes of an image."""
        return math.prod(self.shape[1:]) * self.itemsize

    def __getitem__(self, indices: Tensor) -> Tensor:
        return self.read(indices)


def size_of(sides: Sequence[int]) -> str:
    """Return (H, W) as text, as `--image-size` takes it: 48x32 is wider than high, 32 is a square."""
    height, width = sides
    return f"{width}" if height == width else f"{width}x{height}"


def resized_tensor(images: Tensor, sides: tuple[int, int]) -> Tensor:
    """Return the largest centred part of images [N, C, H, W] with the proportions of (H, W), resized, in their dtype."""
    left, top, right, bottom = central_box(images.shape[2], images.shape[3], *sides)
    part = images[:, :, top:bottom, left:right]
    wide = part if part.is_floating_point() else part.float()
    resized = functional.interpolate(wide, sides, mode="bilinear", antialias=True)
    return resized if part.is_floating_point() else resized.round().to(images.dtype)


def central_box(rows: int, columns: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of the largest centred part with the proportions of height and width."""
    part_columns, part_rows = min(columns, max(1, rows * width // height)), min(rows, max(1, columns * height // width))
    left, top = (columns - part_columns) // 2, (rows - part_rows) // 2
    return left, top, left + part_columns, top + part_rows


def fits(shape: tuple[int, int, int, int], memory: int | None, copies: int = 1, itemsize: int = 1) -> bool:
    """Return whether images [N, C, H, W] take at most `memory` bytes. None: any number.

    Raises:
        ValueError: They do, but the host has too little free memory for this many copies.
    """
    needed = math.prod(shape) * itemsize
    if memory is not None and needed > memory:
        return False
    check_free_memory("load_dataset", "image_size", f"{size_of(shape[-2:])} for {shape[0]} images", copies * needed)
    return True


def check_labels(place: object, labels: Any, num_classes: int) -> None:
    """Raise a ValueError unless all labels, a tensor or an array [N], are in 0..num_classes-1. `place` has them."""
    low, high = int(labels.min()), int(labels.max())
    wrong = low if low < 0 else high
    expect(0 <= wrong < num_classes, "load_dataset", "labels", f"in 0..{num_classes - 1}", wrong, str(place))


def digests(head: str, contents: Callable[[bool], Iterable[bytes]], exact: bool) -> dict[str, str]:
    """Return SHA-256 digests of a text and contents: "sample" of `contents(False)`, "exact" of `contents(True)` if wanted."""
    found = {}
    for kind in ("sample", "exact") if exact else ("sample",):
        digest = hashlib.sha256(head.encode())
        for content in contents(kind == "exact"):
            digest.update(content)
        found[kind] = digest.hexdigest()
    return found


def to_unit_range(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Map uint8 0..255 to -1..1, the range of x_0. Black is -1. Floating images are in that range, and stay as they are."""
    return images.to(dtype) if images.is_floating_point() else images.to(dtype) * (2 / 255) - 1.0


def import_extra(module: str, extra: str = "train") -> ModuleType:
    """Import a module of an extra."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        raise ImportError(f"{module} is missing: install it with pip install 'ddpm_fast[{extra}]'") from error
