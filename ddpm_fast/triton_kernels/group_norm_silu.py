"""GroupNorm with modulation and SiLU, forward and backward (`ddpm_fast.reference.group_norm_silu`).

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
from .tiles import current_sample, device_of, launch, rounded, scratch

# Elements of a tile, padding included, that stay in registers: contiguous, channels_last (whose threads hold more channels).
RESIDENT_FORWARD = (32768, 16384)
RESIDENT_BACKWARD = (16384, 8192)
SPLIT_TILE = 4096
ELEMENTS_PER_WARP = (1024, 512)  # forward, backward
TILES_PER_CHUNK = 4
MAX_CHANNELS_PER_GROUP = 4096  # a tile holds whole groups
ROW_BYTES = (64, 32)  # in a channels_last tile: the first with which it is resident
SPLIT_ROW_BYTES = 64


# ------------------------------------------------------------------------------------------------------------- the tile


@triton.jit
def _channels(group_tile, groups, CPG: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """Return index, group and mask of each channel in the tile, [GROUPS * WIDTH]."""
    k = tl.arange(0, GROUPS * WIDTH)
    group = group_tile * GROUPS + k // WIDTH
    channel = group_tile * (GROUPS * WIDTH) + k if CPG == WIDTH else group * CPG + k % WIDTH
    return channel, group, (k % WIDTH < CPG) & (group < groups)


@triton.jit
def _offsets(channel, pixel, c, hw, LAST: tl.constexpr):
    """Return offsets of the tile's elements from the sample's first element."""
    return pixel[:, None] * c + channel[None, :] if LAST else channel[:, None] * hw + pixel[None, :]


@triton.jit
def _mask(channel_exists, pixel, hw, LAST: tl.constexpr):
    return (pixel < hw)[:, None] & channel_exists[None, :] if LAST else channel_exists[:, None] & (pixel < hw)[None, :]


@triton.jit
def _tile(per_channel, LAST: tl.constexpr):
    """Reshape [channels] to broadcast over the tile."""
    return per_channel[None, :] if LAST else per_channel[:, None]


@triton.jit
def _zero_padding(value, mask, PADDED: tl.constexpr):
    return tl.where(mask, value, 0.0) if PADDED else value


# Values per group are scalars if GROUPS == 1, else [GROUPS].


@triton.jit
def _spread(per_group, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """Expand a value per group to the tile's channels, [GROUPS * WIDTH]. A scalar stays a scalar."""
    if GROUPS == 1:
        return per_group
    else:
        return tl.reshape(tl.broadcast_to(per_group[:, None], [GROUPS, WIDTH]), [GROUPS * WIDTH])


@triton.jit
def _spread_tile(per_group, LAST: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """Expand a value per group to broadcast over the tile."""
    return per_group if GROUPS == 1 else _tile(_spread(per_group, WIDTH, GROUPS), LAST)


@triton.jit
def _sum_channels(per_channel, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """Return the sum over each group's channels."""
    return tl.sum(per_channel, 0) if GROUPS == 1 else tl.sum(tl.reshape(per_channel, [GROUPS, WIDTH]), 1)


@triton.jit
def _sum_tile(value, LAST: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """Return the sum over each group's channels and pixels."""
    if GROUPS == 1:  # all at once: a thread's own elements first, whatever their channel
        return tl.sum(value)
    else:
        return _sum_channels(tl.sum(value, 0 if LAST else 1), WIDTH, GROUPS)


@triton.jit
def _rows(sample, group_tile, groups, GROUPS: tl.constexpr):
    """Return offsets of the tile's groups in [N, groups], and their mask."""
    if GROUPS == 1:
        return sample * groups + group_tile, group_tile < groups
    else:
        group = group_tile * GROUPS + tl.arange(0, GROUPS)
        return sample * groups + group, group < groups


@triton.jit
def _load_channels(values, index, mask, default: tl.constexpr):
    """Load a [C] or [N, C] input as float32 [channels], or `default` if it is absent."""
    if values is not None:
        return tl.load(values + index, mask, other=default).to(tl.float32)
    else:
        return tl.full(index.shape, default, tl.float32)


@triton.jit
def _affine(weight, bias, scale, scale_shift, channel, modulation, exists):
    """Return the affine coefficients a and b of y = act(a xhat + b)."""
    a = _load_channels(weight, channel, exists, 1.0)
    b = _load_channels(bias, channel, exists, 0.0)
    if scale is not None:
        factor = 1.0 + _load_channels(scale, modulation, exists, 0.0)
        a *= factor
        b *= factor
    if scale_shift is not None:
        b += _load_channels(scale_shift, modulation, exists, 0.0)
    return a, b


@triton.jit
def _load_tile(pointer, mask, PADDED: tl.constexpr):
    """Load a tile as float32, with zeros in the padding."""
    return (tl.load(pointer, mask, other=0.0) if PADDED else tl.load(pointer)).to(tl.float32)


@triton.jit
def _load_h(x, shift, mask, LAST: tl.constexpr, HAS_SHIFT: tl.constexpr, PADDED: tl.constexpr):
    """Load x + shift as float32, with zeros in the padding."""
    h = _load_tile(x, mask, PADDED)
    return _zero_padding(h + _tile(shift, LAST), mask, PADDED) if HAS_SHIFT else h


@triton.jit
def _sigmoid(z, FAST: tl.constexpr):
    """Return sigmoid(z).

    FAST is for half precision. It has a relative error of 3e-7 and computes 1/x as (x^-1/2)^2, which takes two
    instructions instead of a division's eight.
    """
    z = tl.maximum(z, -87.0)  # exp(-z) stays finite
    if FAST:
        root = tl.rsqrt(1.0 + tl.exp2(z * -1.4426950408889634))
        return root * root
    else:
        return 1.0 / (1.0 + tl.exp(-z))


# -------------------------------------------------------------------------------------------------------------- forward


@triton.jit
def _pivots(x, shift, sample, group_tile, groups, hw, LAST: tl.constexpr, CPG: tl.constexpr, GROUPS: tl.constexpr):
    """Return the first element of each group, the pivot of its statistics.

    Values relative to the pivot are about as small as their spread, so sums lose no precision.
    """
    group = group_tile if GROUPS == 1 else group_tile * GROUPS + tl.arange(0, GROUPS)
    channel = (sample * groups + group) * CPG
    offset = sample * groups * CPG * hw + group * CPG if LAST else channel * hw
    pivot = tl.load(x + offset, group < groups, other=0.0).to(tl.float32)
    if shift is not None:
        pivot += tl.load(shift + channel, group < groups, other=0.0).to(tl.float32)
    return pivot


@triton.jit
def _statistics(
    h, pivot, mask, count,
    PADDED: tl.constexpr, LAST: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Return each group's mean relative to the pivot, its sum of squared deviations, and the deviations."""
    relative = _zero_padding(h - _spread_tile(pivot, LAST, WIDTH, GROUPS), mask, PADDED)
    mean = tl.div_rn(_sum_tile(relative, LAST, WIDTH, GROUPS), count)
    deviation = _zero_padding(relative - _spread_tile(mean, LAST, WIDTH, GROUPS), mask, PADDED)
    return mean, _sum_tile(deviation * deviation, LAST, WIDTH, GROUPS), deviation


@triton.jit
def _rstd(squares, count, eps):
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, count) + eps))


@triton.jit(do_not_specialize=["n"])
def _forward_kernel(
    y, mean, rstd, x, weight, bias, shift, scale, scale_shift, n, groups, hw, eps,
    SILU: tl.constexpr, FAST: tl.constexpr, PADDED: tl.constexpr,
    LAST: tl.constexpr, CPG: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    sample = current_sample()
    if sample >= n:
        return
    c = groups * CPG
    channel, _, exists = _channels(tl.program_id(0), groups, CPG, WIDTH, GROUPS)
    pixel = tl.arange(0, PIXELS)
    mask = _mask(exists, pixel, hw, LAST) if PADDED else None
    offset = _offsets(channel, pixel, c, hw, LAST)
    modulation = sample * c + channel
    first = sample * c * hw
    h = _load_h(x + first + offset, _load_channels(shift, modulation, exists, 0.0), mask, LAST, shift is not None, PADDED)

    count = 1.0 * CPG * hw
    pivot = _pivots(x, shift, sample, tl.program_id(0), groups, hw, LAST, CPG, GROUPS)
    about, squares, deviation = _statistics(h, pivot, mask, count, PADDED, LAST, WIDTH, GROUPS)
    r = _rstd(squares, count, eps)
    a, b = _affine(weight, bias, scale, scale_shift, channel, modulation, exists)
    z = tl.fma(deviation, _tile(a * _spread(r, WIDTH, GROUPS), LAST), _tile(b, LAST))
    tl.store(y + first + offset, rounded(z * _sigmoid(z, FAST) if SILU else z, y.dtype.element_ty), mask)
    row, row_exists = _rows(sample, tl.program_id(0), groups, GROUPS)
    tl.store(mean + row, pivot + about, row_exists)
    tl.store(rstd + row, r, row_exists)


@triton.jit(do_not_specialize=["n"])
def _partial_statistics_kernel(
    partial_mean, partial_squares, x, shift, n, groups, hw, chunks, tiles_per_chunk,
    PADDED: tl.constexpr,
    LAST: tl.constexpr, CPG: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Write relative mean and sum of squared deviations of one chunk of pixels: [N, groups, chunks]."""
    sample = current_sample()
    if sample >= n:
        return
    chunk = tl.program_id(0) % chunks
    c = groups * CPG
    group_tile = tl.program_id(0) // chunks
    channel, _, exists = _channels(group_tile, groups, CPG, WIDTH, GROUPS)
    shift_ = _load_channels(shift, sample * c + channel, exists, 0.0)
    count = 0.0
    row, row_exists = _rows(sample, group_tile, groups, GROUPS)
    pivot = _pivots(x, shift, sample, group_tile, groups, hw, LAST, CPG, GROUPS)
    mean = 0.0 if GROUPS == 1 else tl.zeros([GROUPS], tl.float32)
    squares = 0.0 if GROUPS == 1 else tl.zeros([GROUPS], tl.float32)
    first_pixel = chunk * tiles_per_chunk * PIXELS
    end = tl.minimum(first_pixel + tiles_per_chunk * PIXELS, hw)
    for start in range(first_pixel, end, PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        mask = _mask(exists, pixel, hw, LAST) if PADDED else None
        tile = x + sample * c * hw + _offsets(channel, pixel, c, hw, LAST)
        h = _load_h(tile, shift_, mask, LAST, shift is not None, PADDED)
        tile_count = (CPG * tl.minimum(PIXELS, hw - start)).to(tl.float32)
        tile_mean, tile_squares, _deviation = _statistics(h, pivot, mask, tile_count, PADDED, LAST, WIDTH, GROUPS)
        difference = tile_mean - mean
        share = tl.div_rn(tile_count, count + tile_count)
        mean = tl.fma(difference, share, mean)
        squares += tl.fma(difference * difference, count * share, tile_squares)
        count += tile_count
    tl.store(partial_mean + row * chunks + chunk, mean, row_exists)
    tl.store(partial_squares + row * chunks + chunk, squares, row_exists)


@triton.jit(do_not_specialize=["n"])
def _apply_kernel(
    y, mean, rstd, x, weight, bias, shift, scale, scale_shift, partial_mean, partial_squares,
    n, groups, hw, eps, chunks, tiles_per_chunk,
    SILU: tl.constexpr, FAST: tl.constexpr, PADDED: tl.constexpr, CHUNKS: tl.constexpr,
    LAST: tl.constexpr, CPG: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Merge the chunks' statistics and normalize one chunk.

    Chunks are visited in reverse order, because the last one read may still be in the cache.
    """
    sample = n - 1 - current_sample()
    if sample < 0:
        return
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    chunk = program % chunks
    group_tile = program // chunks
    c = groups * CPG

    row, row_exists = _rows(sample, group_tile, groups, GROUPS)
    index = tl.arange(0, CHUNKS)
    exists = index < chunks
    slot = row * chunks + index if GROUPS == 1 else row[:, None] * chunks + index[None, :]
    slot_exists = exists if GROUPS == 1 else exists[None, :] & row_exists[:, None]
    means = tl.load(partial_mean + slot, slot_exists, other=0.0)
    squares = tl.load(partial_squares + slot, slot_exists, other=0.0)
    chunk_pixels = tiles_per_chunk * PIXELS
    counts = tl.where(exists, CPG * tl.minimum(chunk_pixels, hw - index * chunk_pixels), 0).to(tl.float32)
    counts = counts if GROUPS == 1 else counts[None, :]
    count = 1.0 * CPG * hw
    axis: tl.constexpr = 0 if GROUPS == 1 else 1
    about = tl.div_rn(tl.sum(counts * means, axis), count)
    difference = means - (about if GROUPS == 1 else about[:, None])
    r = _rstd(tl.sum(tl.fma(counts * difference, difference, squares), axis), count, eps)
    pivot = _pivots(x, shift, sample, group_tile, groups, hw, LAST, CPG, GROUPS)
    mu = pivot + about
    rest = about - (mu - pivot)  # what rounding took from mu
    if chunk == 0:
        tl.store(mean + row, mu, row_exists)
        tl.store(rstd + row, r, row_exists)

    channel, _, exists = _channels(group_tile, groups, CPG, WIDTH, GROUPS)
    modulation = sample * c + channel
    a, b = _affine(weight, bias, scale, scale_shift, channel, modulation, exists)
    a *= _spread(r, WIDTH, GROUPS)
    b -= a * _spread(rest, WIDTH, GROUPS)
    shift_ = _load_channels(shift, modulation, exists, 0.0)
    first = sample * c * hw
    first_pixel = chunk * chunk_pixels
    for start in range(first_pixel, tl.minimum(first_pixel + chunk_pixels, hw), PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        mask = _mask(exists, pixel, hw, LAST) if PADDED else None
        offset = _offsets(channel, pixel, c, hw, LAST)
        h = _load_h(x + first + offset, shift_, mask, LAST, shift is not None, PADDED)
        z = tl.fma(h - _spread_tile(mu, LAST, WIDTH, GROUPS), _tile(a, LAST), _tile(b, LAST))
        tl.store(y + first + offset, rounded(z * _sigmoid(z, FAST) if SILU else z, y.dtype.element_ty), mask)


# ------------------------------------------------------------------------------------------------------------- backward
# With xhat = (h - mean) rstd, z = a xhat + b, y = act(z) and dz = dy act'(z): the gradient of x is
# rstd (a dz - m1 - m2 xhat), m1 and m2 being the means of a dz and of a dz xhat over the group. Sums over pixels of dz, dz xhat
# and xhat of each channel give m1, m2 and all the small gradients.


@triton.jit
def _load_gradient(
    dy, x, shift, mu, r, a, b, mask,
    HAS_SHIFT: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr, PADDED: tl.constexpr,
    LAST: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Load tiles of dz and xhat, with zeros in the padding."""
    h = _load_h(x, shift, mask, LAST, HAS_SHIFT, PADDED)
    xhat = (h - _spread_tile(mu, LAST, WIDTH, GROUPS)) * _spread_tile(r, LAST, WIDTH, GROUPS)
    xhat = _zero_padding(xhat, mask, PADDED)
    dz = _load_tile(dy, mask, PADDED)
    if SILU:
        z = tl.fma(xhat, _tile(a, LAST), _tile(b, LAST))
        sigmoid = _sigmoid(z, FAST)
        dz = dz * sigmoid * tl.fma(z, 1.0 - sigmoid, 1.0)
    return dz, xhat


@triton.jit
def _small_gradients(
    sum_dz, sum_dz_xhat, dshift, dscale, dscale_shift, weight, bias,
    dz_sums, dz_xhat_sums, xhat_sums, r, a, channel, modulation, exists, hw,
    CPG: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Write one sample's small gradients from the sums of each channel, and return m1 and m2 of each group."""
    count = 1.0 * CPG * hw
    m1 = tl.div_rn(_sum_channels(a * dz_sums, WIDTH, GROUPS), count)
    m2 = tl.div_rn(_sum_channels(a * dz_xhat_sums, WIDTH, GROUPS), count)
    if sum_dz is not None:
        tl.store(sum_dz + modulation, dz_sums, exists)
        tl.store(sum_dz_xhat + modulation, dz_xhat_sums, exists)
    if dshift is not None:
        total = a * dz_sums - _spread(m1 * hw, WIDTH, GROUPS) - _spread(m2, WIDTH, GROUPS) * xhat_sums
        tl.store(dshift + modulation, _spread(r, WIDTH, GROUPS) * total, exists)
    if dscale is not None:
        w = _load_channels(weight, channel, exists, 1.0)
        b = _load_channels(bias, channel, exists, 0.0)
        tl.store(dscale + modulation, tl.fma(w, dz_xhat_sums, b * dz_sums), exists)
    if dscale_shift is not None:
        tl.store(dscale_shift + modulation, dz_sums, exists)
    return m1, m2


@triton.jit
def _dx(dz, xhat, r, a, m1, m2, LAST: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    common = tl.fma(xhat, _spread_tile(r * m2, LAST, WIDTH, GROUPS), _spread_tile(r * m1, LAST, WIDTH, GROUPS))
    return tl.fma(dz, _tile(a * _spread(r, WIDTH, GROUPS), LAST), -common)


@triton.jit(do_not_specialize=["n"])
def _backward_kernel(
    dx, sum_dz, sum_dz_xhat, dshift, dscale, dscale_shift, dy, x, mean, rstd, weight, bias, shift, scale, scale_shift,
    n, groups, hw,
    SILU: tl.constexpr, FAST: tl.constexpr, PADDED: tl.constexpr,
    LAST: tl.constexpr, CPG: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    sample = current_sample()
    if sample >= n:
        return
    c = groups * CPG
    channel, _, exists = _channels(tl.program_id(0), groups, CPG, WIDTH, GROUPS)
    modulation = sample * c + channel
    row, row_exists = _rows(sample, tl.program_id(0), groups, GROUPS)
    mu = tl.load(mean + row, row_exists)
    r = tl.load(rstd + row, row_exists)
    a, b = _affine(weight, bias, scale, scale_shift, channel, modulation, exists)
    shift_ = _load_channels(shift, modulation, exists, 0.0)
    pixel = tl.arange(0, PIXELS)
    mask = _mask(exists, pixel, hw, LAST) if PADDED else None
    offset = sample * c * hw + _offsets(channel, pixel, c, hw, LAST)
    dz, xhat = _load_gradient(
        dy + offset, x + offset, shift_, mu, r, a, b, mask, shift is not None, SILU, FAST, PADDED, LAST, WIDTH, GROUPS
    )  # fmt: skip
    axis: tl.constexpr = 0 if LAST else 1
    xhat_sums = tl.sum(xhat, axis) if dshift is not None else None
    m1, m2 = _small_gradients(
        sum_dz, sum_dz_xhat, dshift, dscale, dscale_shift, weight, bias,
        tl.sum(dz, axis), tl.sum(dz * xhat, axis), xhat_sums, r, a, channel, modulation, exists, hw, CPG, WIDTH, GROUPS,
    )  # fmt: skip
    tl.store(dx + offset, rounded(_dx(dz, xhat, r, a, m1, m2, LAST, WIDTH, GROUPS), dx.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["n"])
def _partial_sums_kernel(
    partial, dy, x, mean, rstd, weight, bias, shift, scale, scale_shift, n, groups, hw, chunks, tiles_per_chunk,
    XHAT_SUMS: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr, PADDED: tl.constexpr,
    LAST: tl.constexpr, CPG: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Write sums of dz, dz xhat and xhat over one chunk of pixels: [3, N, chunks, C]."""
    sample = current_sample()
    if sample >= n:
        return
    chunk = tl.program_id(0) % chunks
    c = groups * CPG
    group_tile = tl.program_id(0) // chunks
    channel, _, exists = _channels(group_tile, groups, CPG, WIDTH, GROUPS)
    modulation = sample * c + channel
    row, row_exists = _rows(sample, group_tile, groups, GROUPS)
    mu = tl.load(mean + row, row_exists)
    r = tl.load(rstd + row, row_exists)
    a, b = _affine(weight, bias, scale, scale_shift, channel, modulation, exists)
    shift_ = _load_channels(shift, modulation, exists, 0.0)
    dz_sums = tl.zeros([PIXELS, GROUPS * WIDTH] if LAST else [GROUPS * WIDTH, PIXELS], tl.float32)
    dz_xhat_sums = tl.zeros_like(dz_sums)
    xhat_sums = tl.zeros_like(dz_sums)
    first_pixel = chunk * tiles_per_chunk * PIXELS
    for start in range(first_pixel, tl.minimum(first_pixel + tiles_per_chunk * PIXELS, hw), PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        mask = _mask(exists, pixel, hw, LAST) if PADDED else None
        offset = sample * c * hw + _offsets(channel, pixel, c, hw, LAST)
        dz, xhat = _load_gradient(
        dy + offset, x + offset, shift_, mu, r, a, b, mask, shift is not None, SILU, FAST, PADDED, LAST, WIDTH, GROUPS
    )  # fmt: skip
        dz_sums += dz
        dz_xhat_sums = tl.fma(dz, xhat, dz_xhat_sums)
        if XHAT_SUMS:
            xhat_sums += xhat
    axis: tl.constexpr = 0 if LAST else 1
    slot = (sample * chunks + chunk) * c + channel
    plane = n.to(tl.int64) * chunks * c
    tl.store(partial + slot, tl.sum(dz_sums, axis), exists)
    tl.store(partial + plane + slot, tl.sum(dz_xhat_sums, axis), exists)
    if XHAT_SUMS:
        tl.store(partial + 2 * plane + slot, tl.sum(xhat_sums, axis), exists)


@triton.jit(do_not_specialize=["n"])
def _merge_sums_kernel(
    means, sum_dz, sum_dz_xhat, dshift, dscale, dscale_shift, partial, rstd, weight, bias, scale, n, groups, hw, chunks,
    CPG: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add up one group's chunks, and write m1 and m2, [2, N, groups], and the small gradients."""
    sample = current_sample()
    if sample >= n:
        return
    c = groups * CPG
    channel, _, exists = _channels(tl.program_id(0), groups, CPG, WIDTH, 1)
    modulation = sample * c + channel
    dz_sums = tl.zeros([WIDTH], tl.float32)
    dz_xhat_sums = tl.zeros([WIDTH], tl.float32)
    xhat_sums = tl.zeros([WIDTH], tl.float32)
    plane = n.to(tl.int64) * chunks * c
    for chunk in range(chunks):
        slot = partial + (sample * chunks + chunk) * c + channel
        dz_sums += tl.load(slot, exists, other=0.0)
        dz_xhat_sums += tl.load(slot + plane, exists, other=0.0)
        if dshift is not None:
            xhat_sums += tl.load(slot + 2 * plane, exists, other=0.0)
    r = tl.load(rstd + sample * groups + tl.program_id(0))
    a, _ = _affine(weight, None, scale, None, channel, modulation, exists)
    m1, m2 = _small_gradients(
        sum_dz, sum_dz_xhat, dshift, dscale, dscale_shift, weight, bias,
        dz_sums, dz_xhat_sums, xhat_sums, r, a, channel, modulation, exists, hw, CPG, WIDTH, 1,
    )  # fmt: skip
    row = sample * groups + tl.program_id(0)
    tl.store(means + row, m1)
    tl.store(means + n.to(tl.int64) * groups + row, m2)


@triton.jit(do_not_specialize=["n"])
def _apply_backward_kernel(
    dx, dy, x, mean, rstd, means, weight, bias, shift, scale, scale_shift, n, groups, hw, chunks, tiles_per_chunk,
    SILU: tl.constexpr, FAST: tl.constexpr, PADDED: tl.constexpr,
    LAST: tl.constexpr, CPG: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Write dx of one chunk of pixels from m1 and m2, in reverse order as in the forward pass."""
    sample = n - 1 - current_sample()
    if sample < 0:
        return
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    c = groups * CPG
    channel, _, exists = _channels(program // chunks, groups, CPG, WIDTH, GROUPS)
    modulation = sample * c + channel
    row, row_exists = _rows(sample, program // chunks, groups, GROUPS)
    mu = tl.load(mean + row, row_exists)
    r = tl.load(rstd + row, row_exists)
    m1 = tl.load(means + row, row_exists)
    m2 = tl.load(means + n.to(tl.int64) * groups + row, row_exists)
    a, b = _affine(weight, bias, scale, scale_shift, channel, modulation, exists)
    shift_ = _load_channels(shift, modulation, exists, 0.0)
    first_pixel = program % chunks * tiles_per_chunk * PIXELS
    for start in range(first_pixel, tl.minimum(first_pixel + tiles_per_chunk * PIXELS, hw), PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        mask = _mask(exists, pixel, hw, LAST) if PADDED else None
        offset = sample * c * hw + _offsets(channel, pixel, c, hw, LAST)
        dz, xhat = _load_gradient(
        dy + offset, x + offset, shift_, mu, r, a, b, mask, shift is not None, SILU, FAST, PADDED, LAST, WIDTH, GROUPS
    )  # fmt: skip
        tl.store(dx + offset, rounded(_dx(dz, xhat, r, a, m1, m2, LAST, WIDTH, GROUPS), dx.dtype.element_ty), mask)


@triton.jit
def _parameter_gradients_kernel(
    dweight, dbias, sum_dz, sum_dz_xhat, scale, n, c, SAMPLES: tl.constexpr, CHANNELS: tl.constexpr
):
    """Write the parameters' gradients, summed over the samples.

        dweight[c] = sum_n (1 + scale) sum dz xhat
        dbias[c]   = sum_n (1 + scale) sum dz

    Sums have a fixed order.
    """
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    weight_sums = tl.zeros([SAMPLES, CHANNELS], tl.float32)
    bias_sums = tl.zeros([SAMPLES, CHANNELS], tl.float32)
    for start in range(0, n, SAMPLES):
        sample = start + tl.arange(0, SAMPLES)[:, None]
        exists = (sample < n) & (channel < c)
        index = sample.to(tl.int64) * c + channel
        factor = 1.0 + _load_channels(scale, index, exists, 0.0)
        weight_sums = tl.fma(factor, tl.load(sum_dz_xhat + index, exists, other=0.0), weight_sums)
        bias_sums = tl.fma(factor, tl.load(sum_dz + index, exists, other=0.0), bias_sums)
    if dweight is not None:
        tl.store(dweight + channel, tl.sum(weight_sums, 0)[None, :], channel < c)
    if dbias is not None:
        tl.store(dbias + channel, tl.sum(bias_sums, 0)[None, :], channel < c)


# ------------------------------------------------------------------------------------------------------------ launchers


class _Tiling(NamedTuple):
    """Programs per sample, and a kernel's arguments about them.

    Tiles are resident if chunks = 1 and `split` is false.
    """

    group_tiles: int
    chunks: int
    arguments: dict[str, Any]
    split: dict[str, int]


def _tiling(x: Tensor, groups: int, backward: bool) -> _Tiling:
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
    return _Tiling(triton.cdiv(groups, tile_groups), chunks, arguments, split)


def group_norm_silu(results: Any, a: Any) -> None:
    """Launch the kernels for results and arguments of `ddpm_fast.ops.group_norm_silu`."""
    x, groups = a.x, a.num_groups
    if x.numel() == 0:
        return
    n = x.shape[0]
    # The kernels write the statistics in any case.
    mean, rstd = scratch(x, 2, n, groups) if results.mean is None else (results.mean, results.rstd)
    group_tiles, chunks, arguments, split = _tiling(x, groups, backward=False)
    values = {"n": n, "mean": mean, "rstd": rstd, "SILU": a.silu, "FAST": x.element_size() == 2, **arguments, **split}
    if not split:
        launch(_forward_kernel, group_tiles, results, a, **values)
        return
    values["partial_mean"], values["partial_squares"] = scratch(x, 2, n, groups, chunks)
    launch(_partial_statistics_kernel, group_tiles * chunks, results, a, **values)
    launch(_apply_kernel, group_tiles * chunks, results, a, CHUNKS=triton.next_power_of_2(chunks), **values)


def group_norm_silu_backward(results: Any, a: Any) -> None:
    """Launch the kernels of the gradients. Those of absent inputs are None."""
    x = a.x
    if x.numel() == 0:
        for gradient in results[1:]:
            if gradient is not None:
                gradient.zero_()
        return
    n, c = x.shape[:2]
    group_tiles, chunks, arguments, split = _tiling(x, a.num_groups, backward=True)
    values = {f"d{name.removeprefix('grad_')}": value for name, value in results._asdict().items()}
    values |= {"dy": a.grad_y, "n": n, "SILU": a.silu, "FAST": x.element_size() == 2, **arguments, **split}
    sum_dz = sum_dz_xhat = None
    if values["dweight"] is not None or values["dbias"] is not None:
        sum_dz, sum_dz_xhat = scratch(x, 2, n, c)
    values |= {"sum_dz": sum_dz, "sum_dz_xhat": sum_dz_xhat}
    if not split:
        launch(_backward_kernel, group_tiles, results, a, **values)
    else:
        has_shift = values["dshift"] is not None
        values["partial"] = scratch(x, 3 if has_shift else 2, n, chunks, c)
        values["means"] = scratch(x, 2, n, a.num_groups)
        launch(_partial_sums_kernel, group_tiles * chunks, results, a, XHAT_SUMS=has_shift, **values)
        launch(_merge_sums_kernel, a.num_groups, results, a, **values | {"num_warps": 1})
        launch(_apply_backward_kernel, group_tiles * chunks, results, a, **values)
    if sum_dz is not None:
        with device_of(x):
            _parameter_gradients_kernel[(triton.cdiv(c, 32),)](
                *(values["dweight"], values["dbias"], sum_dz, sum_dz_xhat, a.scale, n, c),
                **{"SAMPLES": 32, "CHANNELS": 32, "num_warps": 4, "enable_fp_fusion": True},
            )
