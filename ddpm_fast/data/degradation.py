"""Degradations: conditions that are computed from the images themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import expect

_LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue (ITU-R BT.601), as in Pillow


@dataclass(frozen=True)
class Degradation:
    """A degradation of images, which a network learns to undo. It is written `low-resolution:4`, `grey` or `mask`.

    Attributes:
        name: "low-resolution": reduced and enlarged again, both bicubically. "grey": the brightness (luma). "mask": a box of
            random place and size is cut out, and a further channel is 1 in it and -1 outside.
        factor: Divisor of height and width of "low-resolution". 1 for others.
    """

    name: str
    factor: int = 1

    @classmethod
    def named(cls, text: str) -> Degradation | None:
        """Return the degradation of this name, or None if there is none."""
        name, colon, factor = text.partition(":")
        if name == "low-resolution" and factor.isdecimal() and 2 <= int(factor) <= 64:
            return cls(name, int(factor))
        return cls(name) if name in ("grey", "mask") and not colon else None

    def __str__(self) -> str:
        return f"{self.name}:{self.factor}" if self.factor > 1 else self.name

    def channels(self, channels: int) -> int:
        """Return the channels of the condition for images of this number of channels."""
        return {"low-resolution": channels, "grey": 1, "mask": channels + 1}[self.name]

    def check(self, shape: tuple[int, ...], ranges: int) -> None:
        """Raise a ValueError if images of the shape (C, H, W), in this number of ranges, cannot be degraded in this way."""
        channels, height, width = shape
        of = f"{channels} channels" if channels != 3 else "channels of several ranges"
        expect(self.name != "grey" or (channels == 3 and ranges == 1), "condition", f"to be another than grey for {of}", "grey")
        divides = height % self.factor == width % self.factor == 0
        expect(divides, "condition", f"to divide the images' sides, {width}x{height}", self)

    def __call__(self, x_0: Tensor, seeds: Tensor) -> Tensor:
        """Return the condition of images.

        Args:
            x_0: [N, C, H, W] in [-1, 1].
            seeds: int64 [N], random bits that place the boxes of "mask".

        Returns:
            [N, K, H, W] in [-1, 1].
        """
        if self.name == "low-resolution":
            small = resized_bicubically(x_0, [side // self.factor for side in x_0.shape[2:]])
            return resized_bicubically(small, x_0.shape[2:])
        if self.name == "grey":
            return (x_0 * x_0.new_tensor(_LUMA)[:, None, None]).sum(dim=1, keepdim=True)
        return masked(x_0, _boxes(seeds.to(x_0.device), *x_0.shape[2:]))


def masked(x_0: Tensor, holes: Tensor) -> Tensor:
    """Return images without what is in holes, and the holes, as "mask" conditions: [N, C + 1, H, W]. `holes`: [N, 1, H, W]."""
    return torch.cat([x_0.masked_fill(holes, 0), 2 * holes.to(x_0.dtype) - 1], dim=1)


def resized_bicubically(images: Tensor, sides: Sequence[int]) -> Tensor:
    """Return images of these sides, height and width, as "low-resolution" conditions are reduced and enlarged."""
    return functional.interpolate(images, list(sides), mode="bicubic", antialias=True).clamp(-1, 1)


def _boxes(seeds: Tensor, height: int, width: int) -> Tensor:
    """Return boxes, bool [N, 1, H, W]. Their sides are a quarter to three quarters of the image's."""
    inside = []
    for bits, side in ((0, height), (32, width)):
        low, high = (seeds >> bits) & 0xFFFF, (seeds >> (bits + 16)) & 0xFFFF
        lengths = max(1, side // 4) + low % (side // 2 + 1)
        first = high % (side - lengths.clamp(max=side) + 1)
        places = torch.arange(side, device=seeds.device)
        inside.append((places >= first[:, None]) & (places < (first + lengths)[:, None]))  # [N, side]
    rows, columns = inside
    return (rows[:, :, None] & columns[:, None, :])[:, None]
