"""A data set: uint8 images and integer labels, read by index."""

from __future__ import annotations

import hashlib
import math
import operator
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...errors import expect
from ...resources import check_free_memory

SAMPLED: Final = 256  # images in a sample, at least

_AHEAD: Final = 4  # batches that are read before they are asked for, at most
_A_TASK: Final = 4  # images that a thread reads before it takes the next task


@dataclass(frozen=True)
class ImageDataset(Dataset[tuple[Tensor, int]]):
    """A map-style data set of images of one size, with labels. Worker processes that read it must be forked.

    Attributes:
        name: The name that `load_dataset` was given.
        images: uint8 [N, C, H, W]. What does not fit into memory is decoded or resized as it is read.
        labels: int64 [N], 0..len(classes)-1.
        classes: Names of the classes; a single one if the images carry no labels.
        contents: A function that yields bytes of the images: all, or a sample.
        preparation: What was done to the images' size, in words.
    """

    name: str
    images: Tensor | LazyImages
    labels: Tensor
    classes: tuple[str, ...]
    contents: Callable[[bool], Iterator[bytes]]
    preparation: str = "as they are"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image, uint8 [C, H, W], and its label. `batch` returns several at once.

        Raises:
            IndexError: There is no such item.
            ValueError: The image cannot be decoded.
        """
        label = int(self.labels[operator.index(index)])
        return self.images[torch.tensor([index])][0], label

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return images, uint8 [B, C, H, W], and labels, int64 [B], at the int64 indices [B]."""
        return self.images[indices], self.labels[indices]

    def batches(self, indices: Iterable[Tensor]) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield images, uint8 [B, C, H, W], and labels, int64 [B], at each of the int64 indices [B].

        Images that are not in memory are decoded ahead by threads, so a few more indices are taken than batches are
        given. Close the iterator to stop these threads.

        Raises:
            ValueError: An image of this batch cannot be decoded. The message names its file.
        """
        if isinstance(self.images, Tensor) or self.images.memory is None:
            yield from map(self.batch, indices)
            return
        waiting: deque[list[Future[tuple[Tensor, Tensor]]]] = deque()
        pool = ThreadPoolExecutor(min(32, os.cpu_count() or 1), thread_name_prefix="ddpm_fast-decode")
        try:
            for batch in indices:
                waiting.append([pool.submit(self.batch, part) for part in batch.split(_A_TASK)])
                size = len(batch) * math.prod(self.shape)
                ahead = min(_AHEAD, max(1, self.images.memory // max(1, size) - 1))  # one more is in use
                while len(waiting) > ahead:
                    yield _joined(waiting.popleft())
            while waiting:
                yield _joined(waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def fingerprint(self, *, exact: bool = False) -> dict[str, str]:
        """Return SHA-256 digests of the data set: "sample" of labels, names, sizes and some bytes, and "exact" of all bytes."""
        return digests(
            f"{self.shape} {self.classes}",
            lambda exact: chain([self.labels.numpy().tobytes()], self.contents(exact)),
            exact,
        )


def _joined(tasks: list[Future[tuple[Tensor, Tensor]]]) -> tuple[Tensor, Tensor]:
    """Return the images and labels of a batch once its tasks are done. Raise the first of their errors."""
    images, labels = zip(*(task.result() for task in tasks), strict=True)
    return torch.cat(images), torch.cat(labels)


@dataclass(frozen=True)
class LazyImages:
    """Images that are decoded or resized each time they are read. They are indexed like a tensor uint8 [N, C, H, W].

    Attributes:
        shape: (N, C, H, W).
        read: A function that returns the images at int64 indices [B].
        memory: Bytes of images that may wait to be used. Two batches may always. None: nothing is read ahead.
    """

    shape: tuple[int, int, int, int]
    read: Callable[[Tensor], Tensor]
    memory: int | None = None

    def __getitem__(self, indices: Tensor) -> Tensor:
        return self.read(indices)


def fits(shape: tuple[int, int, int, int], memory: int | None, copies: int = 1) -> bool:
    """Return whether uint8 images [N, C, size, size] take at most `memory` bytes. None: any number.

    Raises:
        ValueError: They do, but the host has too little free memory for this many copies.
    """
    needed = math.prod(shape)
    if memory is not None and needed > memory:
        return False
    check_free_memory("load_dataset", "image_size", f"{shape[-1]} for {shape[0]} images", copies * needed)
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
