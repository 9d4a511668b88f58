"""The tiles of GroupNorm with modulation and SiLU, which its forward and its backward kernels share.

A tile covers GROUPS whole groups and all pixels, or one chunk of them. It is [channels, pixels] for
contiguous tensors and [pixels, channels] for channels_last ones. In channels_last, several groups make
a row long enough for wide accesses. Groups are padded to WIDTH channels, a power of two.

If a tile with all pixels fits into a program's registers, x is read once ("resident"). Otherwise a
first kernel writes partial results of each chunk, and a second kernel merges and applies them.

Statistics are the mean, then the mean square deviation from it. Partial statistics are merged as in
Chan et al. 1983. The order of every sum depends only on the shape of x, and there are no atomics.
Results are bit-identical from run to run.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..errors import InvalidValue

# Elements of a tile, padding included, that stay in registers: contiguous, channels_last (whose threads hold more channels).
RESIDENT_FORWARD = (32768, 16384)
RESIDENT_BACKWARD = (16384, 8192)
SPLIT_TILE = 4096
ELEMENTS_PER_WARP = (1024, 512)  # forward, backward
TILES_PER_CHUNK = 4
MAX_CHANNELS_PER_GROUP = 4096  # a tile holds whole groups
ROW_BYTES = (64, 32)  # in a channels_last tile: the first with which it is resident
SPLIT_ROW_BYTES = 64


@triton.jit
def tile_channels(group_tile, groups, CPG: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """Return index, group and mask of each channel in the tile, [GROUPS * WIDTH]."""
    k = tl.arange(0, GROUPS * WIDTH)
    group = group_tile * GROUPS + k // WIDTH
    channel = group_tile * (GROUPS * WIDTH) + k if CPG == WIDTH else group * CPG + k % WIDTH
    return channel, group, (k % WIDTH < CPG) & (group < groups)


@triton.jit
def tile_offsets(channel, pixel, c, hw, LAST: tl.constexpr):
    """Return offsets of the tile's elements from the sample's first element."""
    return pixel[:, None] * c + channel[None, :] if LAST else channel[:, None] * hw + pixel[None, :]


@triton.jit
def tile_mask(channel_exists, pixel, hw, LAST: tl.constexpr):
    """Return which elements of a tile exist."""
    return (pixel < hw)[:, None] & channel_exists[None, :] if LAST else channel_exists[:, None] & (pixel < hw)[None, :]


@triton.jit
def over_tile(per_channel, LAST: tl.constexpr):
    """Reshape [channels] to broadcast over the tile."""
    return per_channel[None, :] if LAST else per_channel[:, None]


@triton.jit
def zero_padding(value, mask, PADDED: tl.constexpr):
    """Return a value with zeros in the padding."""
    return tl.where(mask, value, 0.0) if PADDED else value


# Values per group are scalars if GROUPS == 1, else [GROUPS].


@triton.jit
def spread(per_group, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """Expand a value per group to the tile's channels, [GROUPS * WIDTH]. A scalar stays a scalar."""
    if GROUPS == 1:
        return per_group
    else:
        return tl.reshape(tl.broadcast_to(per_group[:, None], [GROUPS, WIDTH]), [GROUPS * WIDTH])


@triton.jit
def spread_tile(per_group, LAST: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """Expand a value per group to broadcast over the tile."""
    return per_group if GROUPS == 1 else over_tile(spread(per_group, WIDTH, GROUPS), LAST)


@triton.jit
def sum_channels(per_channel, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """Return the sum over each group's channels."""
    return tl.sum(per_channel, 0) if GROUPS == 1 else tl.sum(tl.reshape(per_channel, [GROUPS, WIDTH]), 1)


@triton.jit
def sum_tile(value, LAST: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """Return the sum over each group's channels and pixels."""
    if GROUPS == 1:  # all at once: a thread's own elements first, whatever their channel
        return tl.sum(value)
    else:
        return sum_channels(tl.sum(value, 0 if LAST else 1), WIDTH, GROUPS)


@triton.jit
def group_rows(sample, group_tile, groups, GROUPS: tl.constexpr):
    """Return offsets of the tile's groups in [N, groups], and their mask."""
    if GROUPS == 1:
        return sample * groups + group_tile, group_tile < groups
    else:
        group = group_tile * GROUPS + tl.arange(0, GROUPS)
        return sample * groups + group, group < groups


@triton.jit
def load_channels(values, index, mask, default: tl.constexpr):
    """Load a [C] or [N, C] input as float32 [channels], or `default` if it is absent."""
    if values is not None:
        return tl.load(values + index, mask, other=default).to(tl.float32)
    else:
        return tl.full(index.shape, default, tl.float32)


@triton.jit
def affine(weight, bias, scale, scale_shift, channel, modulation, exists):
    """Return the affine coefficients a and b of y = act(a xhat + b)."""
    a = load_channels(weight, channel, exists, 1.0)
    b = load_channels(bias, channel, exists, 0.0)
    if scale is not None:
        factor = 1.0 + load_channels(scale, modulation, exists, 0.0)
        a *= factor
        b *= factor
    if scale_shift is not None:
        b += load_channels(scale_shift, modulation, exists, 0.0)
    return a, b


@triton.jit
def load_tile(pointer, mask, PADDED: tl.constexpr):
    """Load a tile as float32, with zeros in the padding."""
    return (tl.load(pointer, mask, other=0.0) if PADDED else tl.load(pointer)).to(tl.float32)


@triton.jit
def load_h(x, shift, mask, LAST: tl.constexpr, HAS_SHIFT: tl.constexpr, PADDED: tl.constexpr):
    """Load x + shift as float32, with zeros in the padding."""
    h = load_tile(x, mask, PADDED)
    return zero_padding(h + over_tile(shift, LAST), mask, PADDED) if HAS_SHIFT else h


@triton.jit
def logistic(z, FAST: tl.constexpr):
    """Return the logistic function of z.

    FAST is for half precision. It has a relative error of 3e-7 and computes 1/x as (x^-1/2)^2, which takes two
    instructions instead of a division's eight.
    """
    z = tl.maximum(z, -87.0)  # exp(-z) stays finite
    if FAST:
        root = tl.rsqrt(1.0 + tl.exp2(z * -1.4426950408889634))
        return root * root
    else:
        return 1.0 / (1.0 + tl.exp(-z))


class Tiling(NamedTuple):
    """Programs per sample, and a kernel's arguments about them.

    Tiles are resident if chunks = 1 and `split` is false.
    """

    group_tiles: int
    chunks: int
    arguments: dict[str, Any]
    split: dict[str, int]


def norm_tiling(x: Tensor, groups: int, backward: bool) -> Tiling:
    """Return how the kernels of one direction divide x among programs."""
    n, c = x.shape[:2]
    hw = x.numel() // (n * c)
    if c * hw >= 2**31:
        raise InvalidValue("", "samples of fewer than 2^31 elements", c * hw)
    if c // groups > MAX_CHANNELS_PER_GROUP:
        raise InvalidValue("", f"at most {MAX_CHANNELS_PER_GROUP} channels in a group for the Triton kernels", c // groups)
    last = not x.is_contiguous()
    resident = (RESIDENT_BACKWARD if backward else RESIDENT_FORWARD)[last]
    cpg = c // groups
    width = triton.next_power_of_2(cpg)

    def groups_of_row(row_bytes: int) -> int:
        wanted = triton.next_power_of_2(triton.cdiv(row_bytes, cpg * x.element_size()))
        return min(wanted, triton.next_power_of_2(groups)) if last else 1

    pixels = triton.next_power_of_2(hw)
    fitting = [g for g in map(groups_of_row, ROW_BYTES) if g * width * pixels <= resident]
    if fitting:
        tile_groups = fitting[0]
        chunks, split = 1, {}
    else:
        tile_groups = groups_of_row(SPLIT_ROW_BYTES)
        pixels = min(pixels, max(SPLIT_TILE // (tile_groups * width), 4))
        chunks = triton.cdiv(hw, pixels * TILES_PER_CHUNK)
        split = {"chunks": chunks, "tiles_per_chunk": TILES_PER_CHUNK}
    arguments = {
        "groups": groups,
        "hw": hw,
        "PADDED": hw % pixels != 0 or cpg != width or groups % tile_groups != 0,
        "LAST": last,
        "CPG": cpg,
        "WIDTH": width,
        "GROUPS": tile_groups,
        "PIXELS": pixels,
        "num_warps": min(max(tile_groups * width * pixels // ELEMENTS_PER_WARP[backward], 1), 16),
        "enable_fp_fusion": True,
    }
    return Tiling(triton.cdiv(groups, tile_groups), chunks, arguments, split)
