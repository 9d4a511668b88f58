"""Images out: tensors in [-1, 1] to 8 bits, grids and animations on disk."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .atomic import replacing

_ANIMATED = ("GIF", "WEBP")


def to_uint8(images: Tensor) -> Tensor:
    """The inverse of x = 2 u / 255 - 1, rounded to nearest; values outside [-1, 1] saturate.

    Args:
        images: any shape and floating dtype.

    Returns:
        uint8, same shape and device.
    """
    return images.detach().float().add(1).mul(127.5).round_().clamp_(0, 255).to(torch.uint8)


def image_grid(
    images: Tensor, *, columns: int | None = None, padding: int = 2, scale: int = 1, background: int = 255
) -> Tensor:
    """Tiles images into one picture, row by row.

    Args:
        images: [N, C, H, W] in [-1, 1], N >= 1; C is 1 (grey), 3 (RGB) or 4 (RGBA).
        columns: images a row; None: the smallest square that holds all.
        padding: pixels between the images and around them.
        scale: every pixel of an image becomes scale x scale pixels.
        background: grey value 0..255 of the padding and of the cells left over.

    Returns:
        uint8 [height, width, C] on the CPU.
    """
    _check_images("image_grid", images)
    for name, value, least in (("columns", columns, 1), ("padding", padding, 0), ("scale", scale, 1)):
        if value is not None and value < least:
            raise ValueError(f"image_grid: expected {name} to be at least {least}, got {value}")
    n, channels, height, width = images.shape
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows = math.ceil(n / columns)
    step_y, step_x = height * scale + padding, width * scale + padding
    grid = torch.full((rows * step_y + padding, columns * step_x + padding, channels), background, dtype=torch.uint8)
    pixels = to_uint8(images).cpu().repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    for i, image in enumerate(pixels):
        y, x = padding + i // columns * step_y, padding + i % columns * step_x
        grid[y : y + height * scale, x : x + width * scale] = image.permute(1, 2, 0)
    return grid


def save_grid(
    images: Tensor,
    path: str | os.PathLike[str],
    *,
    columns: int | None = None,
    padding: int = 2,
    scale: int = 1,
) -> Path:
    """Writes images, tiled as `image_grid` does, to one file; folders on the way are made.

    The file appears whole or not at all.

    Args:
        images: [N, C, H, W] in [-1, 1].
        path: its ending chooses the format (.png, .webp, .jpg, ...).
        columns, padding, scale: as in `image_grid`.

    Returns:
        The path.
    """
    kind = image_format(path)
    return _write(path, kind, [image_grid(images, columns=columns, padding=padding, scale=scale)])


def save_trajectory(
    trajectory: Tensor,
    path: str | os.PathLike[str],
    *,
    frames: int | None = None,
    seconds: float = 4.0,
    columns: int | None = None,
    padding: int = 2,
    scale: int = 1,
) -> Path:
    """Shows how images come out of noise: an animation (.gif, .webp), or a strip (.png, ...) with one row an image.

    Args:
        trajectory: [F, N, C, H, W]: x_T first, x_0 last, as `sample(..., return_trajectory=True)` gives it.
        path: its ending chooses the form.
        frames: take this many of the F, evenly spaced, first and last among them; None: all for an animation, 11 for a strip.
        seconds: length of an animation, which then rests on x_0 for a third of that.
        columns: images a row of an animation; as padding and scale, see `image_grid`.

    Returns:
        The path.
    """
    kind = image_format(path)
    if trajectory.dim() != 5 or trajectory.shape[0] == 0:
        raise ValueError(f"save_trajectory: expected trajectory to be [F, N, C, H, W], F >= 1, got {list(trajectory.shape)}")
    if frames is not None and frames < 1:
        raise ValueError(f"save_trajectory: expected frames to be at least 1, got {frames}")
    if not seconds > 0:
        raise ValueError(f"save_trajectory: expected seconds to be positive, got {seconds}")
    total = trajectory.shape[0]
    if frames is None:
        frames = total if kind in _ANIMATED else 11
    picked = evenly_spaced(total, frames)
    shown = trajectory[picked]
    if kind in _ANIMATED:
        grids = [image_grid(images, columns=columns, padding=padding, scale=scale) for images in shown]
        return _write(path, kind, grids, milliseconds=1000 * seconds / len(grids), rest=1000 * seconds / 3)
    strip = shown.transpose(0, 1).flatten(0, 1)  # [N * frames, C, H, W]
    return _write(path, kind, [image_grid(strip, columns=len(picked), padding=padding, scale=scale)])


def evenly_spaced(total: int, count: int) -> list[int]:
    """At most `count` different indices of 0 .. total - 1, evenly spaced, first and last among them (count 1: the last)."""
    if count == 1:
        return [total - 1]
    return sorted({round(i * (total - 1) / (count - 1)) for i in range(count)})


def image_format(path: str | os.PathLike[str]) -> str:
    """Pillow's name of the format that the path's ending stands for; ValueError if Pillow cannot write it."""
    ending = Path(path).suffix.lower()
    kind = Image.registered_extensions().get(ending)
    if kind is None or kind not in Image.SAVE:
        raise ValueError(f"images: expected path to end in .png, .webp, .gif, .jpg or another image format, got {str(path)!r}")
    return kind


def _check_images(function: str, images: Tensor) -> None:
    if images.dim() != 4 or images.shape[0] == 0 or images.shape[1] not in (1, 3, 4) or not images.is_floating_point():
        raise ValueError(
            f"{function}: expected images to be floating [N, C, H, W] with N >= 1 and C = 1, 3 or 4, "
            f"got {images.dtype} {list(images.shape)}"
        )
    if not images.isfinite().all():
        raise ValueError(f"{function}: expected images to be finite, got NaN or infinity")


def _write(
    path: str | os.PathLike[str], kind: str, pictures: Sequence[Tensor], milliseconds: float = 0, rest: float = 0
) -> Path:
    """Writes uint8 [height, width, C] pictures: one, or an endless animation whose last picture stays `rest` longer."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *others = (Image.fromarray(np.asarray(p.squeeze(2) if p.shape[2] == 1 else p)) for p in pictures)
    options: dict[str, object] = {}
    if others:
        durations = [round(milliseconds)] * len(pictures)
        durations[-1] += round(rest)
        options = {"save_all": True, "append_images": others, "duration": durations, "loop": 0}
    with replacing(path) as temporary:
        first.save(temporary, format=kind, **options)
    return path
