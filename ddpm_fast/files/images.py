"""Image files: 8-bit pixels, grids and animations of tensors in [-1, 1]."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import numpy as np
import torch
from torch import Tensor

from ..checks import check_float, check_ints
from ..errors import InvalidType, InvalidValue, expect, public
from ..options import checked, within
from .writing import replacing

ANIMATED: Final = ("GIF", "WEBP")
STRIP: Final = 11  # images per row of a strip
_ICONS: Final = ("ICO", "ICNS")  # Pillow would shrink the picture to an icon's size
_LARGEST: Final = {"GIF": 65535, "JPEG": 65500, "MPO": 65500, "WEBP": 16383}  # pixels per side
_TITLE: Final = 14  # height of a title, in pixels
_MODES: Final = {1: "L", 3: "RGB", 4: "RGBA"}  # by the number of channels


def in_range(images: Tensor, ranges: Sequence[Sequence[float]]) -> Tensor:
    """Map images [..., C, H, W] from [-1, 1] to ranges of values, a pair (low, high) for all channels or one for each channel.

    The result is float64.
    """
    low, high = images.new_tensor(ranges, dtype=torch.float64).T[:, :, None, None]  # [C, 1, 1]
    values: Tensor = (images.double() + 1) * ((high - low) / 2) + low
    return values


@public()
def to_uint8(images: Tensor) -> Tensor:
    """Map [-1, 1] to 0..255, rounded to nearest: the inverse of x = 2 u / 255 - 1. Values outside saturate.

    Args:
        images: Any shape and floating dtype.

    Returns:
        uint8 of the same shape, on the same device.
    """
    check_float("images", images, min_dim=0)
    return images.detach().float().add(1).mul(127.5).round_().clamp_(0, 255).to(torch.uint8)


_Count = Annotated[int | None, within(low=1)]


@checked()
def image_grid(
    images: Tensor,
    *,
    columns: _Count = None,
    padding: Annotated[int | None, within(low=0)] = None,
    scale: Annotated[int, within(low=1)] = 1,
    background: Annotated[int, within(0, 255)] = 255,
    channels: Sequence[int] | None = None,
) -> Tensor:
    """Tile images into one picture, row by row.

    Args:
        images: [N, C, H, W] in [-1, 1], N >= 1. C is 1 (grey), 3 (RGB) or 4 (RGBA), unless `channels` are given.
        columns: Images per row. By default the grid is full and nearly square; if N allows no such grid, the cells that
            are left over are grey.
        padding: Pixels between the images and around them. None: 2, or 0 for one image, which needs no frame.
        scale: Draw every pixel of an image as scale x scale pixels.
        background: Grey value of the padding, 0..255.
        channels: Show these channels, by number: one as grey, three as RGB or four as RGBA. None: all.

    Returns:
        uint8 [height, width, C] on the CPU.

    Raises:
        ValueError: An argument is out of range, or the images are not finite.
    """
    images = _shown("images", images, channels)
    return _tiled(images, columns, padding, scale, background)


def _tiled(images: Tensor, columns: int | None, padding: int | None, scale: int, background: int = 255) -> Tensor:
    """Return the grid of checked images."""
    n, _, height, width = images.shape
    columns, rows, padding = _layout(n, columns, padding)
    step_y, step_x = height * scale + padding, width * scale + padding
    shape = grid_shape(images.shape, columns=columns, padding=padding, scale=scale)
    grid = torch.full(shape, background, dtype=torch.uint8)
    pixels = to_uint8(images).cpu().repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    for i, image in enumerate(pixels):
        y, x = padding + i // columns * step_y, padding + i % columns * step_x
        grid[y : y + height * scale, x : x + width * scale] = image.permute(1, 2, 0)
    for i in range(n, rows * columns):
        y, x = padding + i // columns * step_y, padding + i % columns * step_x
        grid[y : y + height * scale, x : x + width * scale] = 128
    return grid


def _titled(titles: Sequence[str], grid: Tensor) -> Tensor:
    """Return a white band, uint8 [_TITLE, width, C], with a title above each column of a grid."""
    from PIL import Image, ImageDraw

    _, width, channels = grid.shape
    band = Image.new(_MODES[channels], (width, _TITLE), "white")
    for column, title in enumerate(titles):
        left, right = (each * width // len(titles) for each in (column, column + 1))
        cell = Image.new(band.mode, (right - left, _TITLE), "white")  # a long title ends at its column
        # Without FreeType, Pillow has a font for Latin-1 alone.
        ImageDraw.Draw(cell).text((3, 1), title.encode("latin-1", "replace").decode("latin-1"), "black")
        band.paste(cell, (left, 0))
    return torch.from_numpy(np.array(band)).view(_TITLE, width, channels)


def grid_shape(
    shape: Sequence[int], *, columns: int | None = None, padding: int | None = None, scale: int = 1
) -> tuple[int, int, int]:
    """Return the shape [height, width, C] of the `image_grid` of images of shape [N, C, H, W]."""
    n, channels, height, width = shape
    columns, rows, padding = _layout(n, columns, padding)
    return rows * (height * scale + padding) + padding, columns * (width * scale + padding) + padding, channels


def _layout(n: int, columns: int | None, padding: int | None) -> tuple[int, int, int]:
    """Return the columns, rows and padding of a grid of n images.

    By default it is full and at most three times as wide as high, or square. One image has no padding.
    """
    if columns is None:
        square = math.isqrt(n - 1) + 1
        fitting = (columns for columns in range(square, math.isqrt(3 * n) + 1) if n % columns == 0)
        columns = next(fitting, square)
    columns = min(n, columns)
    return columns, math.ceil(n / columns), (2 if n > 1 else 0) if padding is None else padding


@checked()
def save_grid(
    images: Tensor,
    path: str | os.PathLike[str],
    *,
    columns: _Count = None,
    padding: Annotated[int | None, within(low=0)] = None,
    scale: Annotated[int, within(low=1)] = 1,
    channels: Sequence[int] | None = None,
    titles: Sequence[str] = (),
) -> Path:
    """Write images to one file, tiled by `image_grid`. Missing folders are made.

    The file appears whole or not at all.

    Args:
        images: [N, C, H, W] in [-1, 1].
        path: File to write. Its ending chooses the format (.png, .webp, .jpg, ...).
        columns: See `image_grid`.
        padding: See `image_grid`.
        scale: See `image_grid`.
        channels: See `image_grid`.
        titles: Texts above the columns, one for each, or none.

    Returns:
        The path.

    Raises:
        ValueError: An argument is out of range, or Pillow cannot write such a picture in the format.
    """
    images = _shown("images", images, channels)
    if not isinstance(titles, (list, tuple)) or not all(isinstance(title, str) for title in titles):
        raise InvalidType("titles", "to be a list of texts", repr(titles))
    count, *_ = _layout(len(images), columns, padding)
    expect(len(titles) in (0, count), "titles", f"to be {count}, one for each column, or none", len(titles))
    grid = _tiled(images, columns, padding, scale)
    if titles:
        grid = torch.cat([_titled(titles, grid), grid])
    return _write(path, image_format(path, grid.shape), [grid])


@checked()
def save_trajectory(
    trajectory: Tensor,
    path: str | os.PathLike[str],
    *,
    frames: _Count = None,
    seconds: Annotated[float, within(above=0, finite=True)] = 4.0,
    columns: _Count = None,
    padding: Annotated[int | None, within(low=0)] = None,
    scale: Annotated[int, within(low=1)] = 1,
    channels: Sequence[int] | None = None,
) -> Path:
    """Write an animation (.gif, .webp) of images coming out of noise, or a strip (.png, ...) with one row per image.

    Args:
        trajectory: [F, N, C, H, W], x_T first and x_0 last, from `Sampler.trajectory`.
        path: File to write. Its ending chooses the form.
        frames: Show this many of the F states, evenly spaced, including the first and the last. By default an animation
            shows all of them and a strip 11.
        seconds: Length of an animation. It then rests on x_0 for a third of that time.
        columns: Images per row of an animation. See `image_grid`.
        padding: See `image_grid`.
        scale: See `image_grid`.
        channels: See `image_grid`.

    Returns:
        The path.

    Raises:
        ValueError: An argument is out of range, or Pillow cannot write such a picture in the format.
    """
    check_float("trajectory", trajectory)
    if trajectory.dim() != 5 or trajectory.shape[0] == 0:
        raise InvalidValue("trajectory", "to be [F, N, C, H, W], F >= 1", list(trajectory.shape))
    flat = _shown("trajectory", trajectory.flatten(0, 1), channels)
    trajectory = flat.unflatten(0, trajectory.shape[:2])
    total = trajectory.shape[0]
    kind = image_format(path)
    if frames is None:
        frames = total if kind in ANIMATED else STRIP
    picked = evenly_spaced(total, frames)
    shown = trajectory[picked]
    if kind in ANIMATED:
        grids = [_tiled(images, columns, padding, scale) for images in shown]
        kind = image_format(path, grids[0].shape)
        return _write(path, kind, grids, milliseconds=1000 * seconds / len(grids), rest=1000 * seconds / 3)
    strip = shown.transpose(0, 1).flatten(0, 1)  # [N * frames, C, H, W]
    grid = _tiled(strip, len(picked), padding, scale)
    return _write(path, image_format(path, grid.shape), [grid])


def evenly_spaced(total: int, count: int) -> list[int]:
    """Return at most `count` indices of 0 .. total - 1, evenly spaced, with the first and the last (count 1: the last)."""
    count = min(count, total)
    if count == 1:
        return [total - 1]
    return sorted({round(i * (total - 1) / (count - 1)) for i in range(count)})


def image_format(path: str | os.PathLike[str], shape: Sequence[int] = (1, 1, 1), name: str = "path") -> str:
    """Return Pillow's name for the format of the path's ending.

    Args:
        path: File to write.
        shape: Shape [height, width, C] of the picture.
        name: Name of the argument for error messages.

    Raises:
        ValueError: Pillow cannot write such a picture in this format. A tiny one is written to memory to find out.
    """
    from PIL import Image

    height, width, channels = shape
    mode = _MODES.get(channels)
    if mode is None:
        wanted = "to be an .npz, or pictures to have 1, 3 or 4 channels (channels, --show-channels)"
        raise InvalidValue(name, wanted, f"{str(path)!r} for {channels} channels")
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    reason = ""
    if kind in Image.SAVE and kind not in _ICONS:
        try:
            Image.new(mode, (2, 2)).save(io.BytesIO(), format=kind)
        except Exception as error:  # formats raise errors of many types
            reason = f": {error}"
        else:
            largest = _LARGEST.get(kind)
            if largest is None or max(height, width) <= largest:
                return kind
            raise InvalidValue(
                name,
                f"to end in .png, as pictures in {kind} have at most {largest} pixels per side",
                f"{str(path)!r} for {width}x{height} pixels",
            )
    raise InvalidValue(
        name,
        f"to end in .png, .webp, .gif, .jpg or as another format for pictures of mode {mode}",
        f"{str(path)!r}{reason}",
    )


def shown_channels(channels: int) -> list[int]:
    """Return the channels that a picture shows by default: all, or the first if it can have no more."""
    return list(range(channels)) if channels in _MODES else [0]


def condition_as_image(condition: Tensor, channels: int) -> Tensor | None:
    """Return a condition [N, K, H, W] as images of this number of channels, or None if it has too few.

    A grey one is shown in all channels. Of more channels the first are shown.
    """
    if condition.shape[1] == 1:
        condition = condition.expand(-1, channels, -1, -1)
    return condition[:, :channels].clamp(-1, 1) if condition.shape[1] >= channels else None


def in_bands(kinds: Sequence[Tensor], columns: int) -> Tensor:
    """Return images of several kinds in the order of a grid: a row of each kind, then the next row of each.

    Args:
        kinds: A condition [N, K, H, W], see `condition_as_image`, then images [N, C, H, W].
        columns: Images per row. The last rows are filled with grey.
    """
    condition, *others = kinds
    first = condition_as_image(condition, others[0].shape[1])
    shown = others if first is None else [first, *others]
    missing = -len(condition) % columns
    rows = [torch.nn.functional.pad(each, [0] * 7 + [missing]).split(columns) for each in shown]
    return torch.cat([row for band in zip(*rows, strict=True) for row in band])


def _shown(name: str, images: Tensor, channels: Sequence[int] | None) -> Tensor:
    """Return the channels of images that are shown. Raise unless there are values for a picture."""
    check_float(name, images)
    if channels is not None:
        check_ints("channels", channels, 0, "a list of integers")
        in_range = images.dim() == 4 and max(channels) < images.shape[1]
        expect(in_range, "channels", f"to be those of {name}, {list(images.shape)}", list(channels))
        images = images[:, list(channels)]
    if images.dim() != 4 or images.shape[0] == 0 or images.shape[1] not in _MODES or images.is_meta:
        raise InvalidValue(
            name,
            "to be floating [N, C, H, W] with values, N >= 1 and C = 1, 3 or 4; or choose channels",
            f"{images.dtype} {list(images.shape)} on {images.device}",
        )
    expect(images.isfinite().all(), name, "to be finite", "NaN or infinity")
    return images


def _write(
    path: str | os.PathLike[str], kind: str, pictures: Sequence[Tensor], milliseconds: float = 0, rest: float = 0
) -> Path:
    """Write uint8 [height, width, C] pictures: one, or an endless animation whose last picture stays `rest` ms longer."""
    from PIL import Image

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
