"""A data set: uint8 images and integer labels, read by index."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from ...limits import check_free_memory

SAMPLED: Final = 256  # images in a sample, at least


@dataclass(frozen=True)
class ImageDataset:
    """Images of one size, with labels.

    Attributes:
        name: The name that `load_dataset` was given.
        images: uint8 [N, C, H, W].
        labels: int64 [N], 0..len(classes)-1.
        classes: Names of the classes; a single one if the images carry no labels.
        contents: A function that yields bytes of the images: all, or a sample.
        preparation: What was done to the images' size, in words.
    """

    name: str
    images: Tensor
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


def in_memory(
    name: str,
    images: Tensor,
    labels: Tensor,
    classes: tuple[str, ...],
    image_size: int | None,
    preparation: str = "as they are",
) -> ImageDataset:
    """Return a data set that holds its images, uint8 [N, C, H, W], resized if another size is wanted."""
    source = images  # other machines may resize with other roundings
    if image_size is not None and tuple(images.shape[-2:]) != (image_size, image_size):
        preparation = f"resized from {images.shape[3]}x{images.shape[2]}"
        needed = 2 * len(images) * images.shape[1] * image_size**2  # the parts and the whole
        check_free_memory("load_dataset", "image_size", image_size, needed)
        images = torch.cat([_resized(part, image_size) for part in images.split(256)])

    def contents(exact: bool) -> Iterator[bytes]:
        step = 1 if exact else max(1, len(source) // SAMPLED)
        for image in source[::step]:
            yield image.numpy().tobytes()

    return ImageDataset(name, images, labels, classes, contents, preparation)


def _resized(images: Tensor, size: int) -> Tensor:
    resized = functional.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
    return resized.round().to(torch.uint8)


def to_unit_range(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Map uint8 0..255 to -1..1, the range of x_0. Black is -1."""
    return images.to(dtype) * (2 / 255) - 1.0
