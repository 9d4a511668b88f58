"""A data set: uint8 images and integer labels, read by index."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ...limits import check_free_memory
from .image_files import SAMPLED, EncodedImages


@dataclass(frozen=True)
class ImageDataset:
    """Images of one size, with labels.

    Attributes:
        name: The name that `load_dataset` was given.
        images: uint8 [N, C, H, W]. What does not fit into memory is decoded or resized as it is read.
        labels: int64 [N], 0..len(classes)-1.
        classes: Names of the classes; a single one if the images carry no labels.
        contents: A function that yields bytes of the images: all, or a sample.
        preparation: What was done to the images' size, in words.
    """

    name: str
    images: Tensor | EncodedImages | ResizedImages
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

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return images, uint8 [B, C, H, W], and labels, int64 [B], at the int64 indices [B]."""
        return self.images[indices], self.labels[indices]

    def batches(self, indices: Iterable[Tensor]) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield images, uint8 [B, C, H, W], and labels, int64 [B], at each of the int64 indices [B].

        Images that are not in memory are decoded ahead by threads, so a few more indices are taken than batches are
        given. Close the iterator to stop these threads.

        Raises:
            ValueError: An image of this batch cannot be decoded. The message names its file.
        """
        if isinstance(self.images, EncodedImages):
            with closing(self.images.batches(indices)) as batches:
                for each, images in batches:
                    yield images, self.labels[each]
        else:
            for each in indices:
                yield self[each]

    def fingerprint(self, *, exact: bool = False) -> dict[str, str]:
        """Return SHA-256 digests of the data set: "sample" of labels, names, sizes and some bytes, and "exact" of all bytes."""
        digests = {}
        for kind in ("sample", "exact") if exact else ("sample",):
            digest = hashlib.sha256(f"{self.shape} {self.classes}".encode())
            digest.update(self.labels.numpy().tobytes())
            for content in self.contents(kind == "exact"):
                digest.update(content)
            digests[kind] = digest.hexdigest()
        return digests


@dataclass(frozen=True)
class ResizedImages:
    """Images uint8 [N, C, H, W] that are resized each time they are read. They are indexed like a tensor."""

    source: Tensor
    size: int

    @property
    def shape(self) -> torch.Size:
        """[N, C, size, size]."""
        return torch.Size((*self.source.shape[:2], self.size, self.size))

    def __getitem__(self, indices: Tensor) -> Tensor:
        return _resized(self.source[indices], self.size)


def in_memory(
    name: str,
    images: Tensor,
    labels: Tensor,
    classes: tuple[str, ...],
    image_size: int | None,
    memory: int | None,
    preparation: str = "as they are",
) -> ImageDataset:
    """Return a data set that holds its images, uint8 [N, C, H, W], resized if another size is wanted.

    Resized images that take more than `memory` bytes are resized as they are read.
    """
    source = images  # other machines may resize with other roundings
    used: Tensor | ResizedImages = images
    if image_size is not None and tuple(images.shape[-2:]) != (image_size, image_size):
        preparation = f"resized from {images.shape[3]}x{images.shape[2]}"
        used = ResizedImages(images, image_size)
        needed = len(images) * images.shape[1] * image_size**2
        if memory is None or needed <= memory:
            check_free_memory("load_dataset", "image_size", image_size, 2 * needed)  # the parts and the whole
            used = torch.cat([_resized(part, image_size) for part in images.split(256)])

    def contents(exact: bool) -> Iterator[bytes]:
        step = 1 if exact else max(1, len(source) // SAMPLED)
        for image in source[::step]:
            yield image.numpy().tobytes()

    return ImageDataset(name, used, labels, classes, contents, preparation)


def _resized(images: Tensor, size: int) -> Tensor:
    resized = functional.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
    return resized.round().to(torch.uint8)


def to_unit_range(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Map uint8 0..255 to -1..1, the range of x_0. Black is -1. Floating images are in that range, and stay as they are."""
    return images.to(dtype) if images.is_floating_point() else images.to(dtype) * (2 / 255) - 1.0
