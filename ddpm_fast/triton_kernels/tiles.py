"""Tiles of the elementwise kernels, and their noise.

A program handles one tile of one sample, so t, seed and coefficients are scalars. A contiguous sample is
a line of `hw` elements, with `hw` = C x H x W and CHANNELS = 0. A channels_last sample is `hw` rows of C
channels, and its tiles are PIXELS x CHANNELS. Both kinds of tile hold whole Philox blocks, which are
four neighbours in C, H, W order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import InvalidValue
from .philox import normal_at, normal_quad

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

TILE_ELEMENTS = 1024
ELEMENTS_PER_WARP = 256  # 8 a thread: two 16-byte accesses of float32, one of a half type
MAX_GRID_Y = 65535
OPTIONS = ("num_warps", "enable_fp_fusion")  # what a launch takes besides parameters


@triton.jit
def current_sample():
    """Return the index (int64) of the program's sample. The last indices of a `grid` may be >= N."""
    return tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)


@triton.jit
def locate(tile, hw, C: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """Return offsets (int32) of the tile's elements from the sample's first element, and their mask.

    WIDTH is the number of channels in a row.
    """
    if CHANNELS == 0:
        offset = tile * PIXELS + tl.arange(0, PIXELS)
        return offset, offset < hw
    else:
        tiles_across: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
        pixel = (tile // tiles_across * PIXELS + tl.arange(0, PIXELS))[:, None]
        channel = (tile % tiles_across * CHANNELS + tl.arange(0, CHANNELS))[None, :]
        return pixel * WIDTH + channel, (pixel < hw) & (channel < C)


@triton.jit
def draw(
    seed, stream, tile, hw,
    C: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, VECTOR: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """Return the tile's normals (float32), shaped like its offsets.

    VECTOR is the number of neighbours per thread, 4 or 8. QUADS is hw % 4 == 0: no Philox block then
    crosses a channel.
    """
    if CHANNELS == 0:
        # Values joined first become the outer of the new axes. A thread owns all joined values, so none is exchanged.
        if VECTOR == 4:
            z0, z1, z2, z3 = normal_quad(seed, stream, tile * (PIXELS // 4) + tl.arange(0, PIXELS // 4))
            z = tl.join(tl.join(z0, z2), tl.join(z1, z3))
        else:
            block = tile * (PIXELS // 4) + 2 * tl.arange(0, PIXELS // 8)
            z0, z1, z2, z3 = normal_quad(seed, stream, block)
            z4, z5, z6, z7 = normal_quad(seed, stream, block + 1)
            z = tl.join(
                tl.join(tl.join(z0, z4), tl.join(z2, z6)),
                tl.join(tl.join(z1, z5), tl.join(z3, z7)),
            )
        return tl.reshape(z, [PIXELS])
    else:
        tiles_across: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
        channel = (tile % tiles_across * CHANNELS + tl.arange(0, CHANNELS))[None, :]
        if QUADS:
            block = tile // tiles_across * (PIXELS // 4) + tl.arange(0, PIXELS // 4)
            z0, z1, z2, z3 = normal_quad(seed, stream, channel * (hw // 4) + block[:, None])
            z = tl.join(tl.join(z0, z2), tl.join(z1, z3))  # [PIXELS / 4, CHANNELS, 2, 2]
            return tl.reshape(tl.permute(z, (0, 2, 3, 1)), [PIXELS, CHANNELS])
        else:
            pixel = tile // tiles_across * PIXELS + tl.arange(0, PIXELS)
            return normal_at(seed, stream, channel * hw + pixel[:, None])


@triton.jit
def epsilon(
    noise, seeds, sample, stream, tile, offset, mask, hw,
    C: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, VECTOR: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """Return the tile of the given noise, or draw it from the seed (float32)."""
    if noise is not None:
        return tl.load(noise + sample * hw * C + offset, mask).to(tl.float32)
    else:
        return draw(tl.load(seeds + sample), stream, tile, hw, C, PIXELS, CHANNELS, VECTOR, QUADS)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """Round float32 to `dtype`, to nearest even.

    The interpreter truncates float32 to bfloat16, so there the bits are rounded explicitly.
    """
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)


def tiling(first: Tensor, *values: Any, ordered: bool) -> tuple[int, dict[str, Any]]:
    """Return the number of tiles per sample, and the keyword arguments that describe them to a kernel.

    Args:
        first: A map of the kernel, dense [N, C, ...]. It sets samples and channels.
        *values: Arguments and results of the op, with maps in the memory format of the first. With any
            half-precision tensor a thread handles 8 neighbours.
        ordered: Whether the kernel depends on the C, H, W order because it draws noise or needs channels.
            If not, a sample is a line of elements in any memory format.
    """
    present = [first, *(value for value in values if isinstance(value, Tensor))]
    size = first.numel() // first.shape[0]
    if size >= 2**31:
        raise InvalidValue("", "samples of fewer than 2^31 elements", size)
    channels_last = ordered and not all(tensor.is_contiguous() for tensor in present)
    c = first.shape[1] if channels_last else 1
    hw = size // c
    channels = min(triton.next_power_of_2(c), 64) if channels_last else 0
    pixels = max(8, min(triton.next_power_of_2(hw), TILE_ELEMENTS // max(channels, 1)))
    return triton.cdiv(hw, pixels) * triton.cdiv(c, max(channels, 1)), {
        "n": first.shape[0],
        "hw": hw,
        "C": c,
        "PIXELS": pixels,
        "CHANNELS": channels,
        "VECTOR": 8 if any(tensor.element_size() == 2 for tensor in present) else 4,
        "QUADS": hw % 4 == 0,
        "num_warps": max(1, pixels * max(channels, 1) // ELEMENTS_PER_WARP),
        "enable_fp_fusion": False,
    }


def grid(n: int, programs: int) -> tuple[int, int, int]:
    """Return a grid with `programs` programs for each of n samples.

    Rounding up creates programs with samples >= n, which must return at once.
    """
    return programs, min(n, MAX_GRID_Y), triton.cdiv(n, MAX_GRID_Y)


def launch(kernel: Any, programs: int, results: Any, a: Any, **values: Any) -> None:
    """Launch a kernel with `programs` programs for each sample, on the device of the op's first result.

    A parameter takes the value, the result or the argument of its name, whichever is found first.

    Args:
        kernel: The kernel.
        programs: Number of programs for a sample.
        results: Results of the op by name.
        a: Arguments of the op by name.
        **values: Values of other parameters, `n` among them, and `OPTIONS`. The kernel may lack some of the parameters.
    """
    given = {**a._asdict(), **results._asdict(), **values}
    taken = {name: value for name, value in given.items() if name in kernel.arg_names or name in OPTIONS}
    with device_of(results[0]):
        kernel[grid(values["n"], programs)](**taken)


def scratch(like: Tensor, *shape: int) -> Tensor:
    """Return unwritten float32 on the tensor's device, whatever torch's default dtype is."""
    return torch.empty(*shape, dtype=torch.float32, device=like.device)


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a context that makes the tensor's device current. Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
