"""GroupNorm with modulation and SiLU (`ddpm_fast.reference.group_norm_silu`). See `group_norm_tiles.py`."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .group_norm_tiles import (
    affine,
    group_rows,
    load_channels,
    load_h,
    logistic,
    norm_tiling,
    over_tile,
    spread,
    spread_tile,
    sum_tile,
    tile_channels,
    tile_mask,
    tile_offsets,
    zero_padding,
)
from .tiles import current_sample, launch, rounded, scratch


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
    relative = zero_padding(h - spread_tile(pivot, LAST, WIDTH, GROUPS), mask, PADDED)
    mean = tl.div_rn(sum_tile(relative, LAST, WIDTH, GROUPS), count)
    deviation = zero_padding(relative - spread_tile(mean, LAST, WIDTH, GROUPS), mask, PADDED)
    return mean, sum_tile(deviation * deviation, LAST, WIDTH, GROUPS), deviation


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
    channel, _, exists = tile_channels(tl.program_id(0), groups, CPG, WIDTH, GROUPS)
    pixel = tl.arange(0, PIXELS)
    mask = tile_mask(exists, pixel, hw, LAST) if PADDED else None
    offset = tile_offsets(channel, pixel, c, hw, LAST)
    modulation = sample * c + channel
    first = sample * c * hw
    h = load_h(x + first + offset, load_channels(shift, modulation, exists, 0.0), mask, LAST, shift is not None, PADDED)

    count = 1.0 * CPG * hw
    pivot = _pivots(x, shift, sample, tl.program_id(0), groups, hw, LAST, CPG, GROUPS)
    about, squares, deviation = _statistics(h, pivot, mask, count, PADDED, LAST, WIDTH, GROUPS)
    r = _rstd(squares, count, eps)
    a, b = affine(weight, bias, scale, scale_shift, channel, modulation, exists)
    z = tl.fma(deviation, over_tile(a * spread(r, WIDTH, GROUPS), LAST), over_tile(b, LAST))
    tl.store(y + first + offset, rounded(z * logistic(z, FAST) if SILU else z, y.dtype.element_ty), mask)
    row, row_exists = group_rows(sample, tl.program_id(0), groups, GROUPS)
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
    channel, _, exists = tile_channels(group_tile, groups, CPG, WIDTH, GROUPS)
    shift_ = load_channels(shift, sample * c + channel, exists, 0.0)
    count = 0.0
    row, row_exists = group_rows(sample, group_tile, groups, GROUPS)
    pivot = _pivots(x, shift, sample, group_tile, groups, hw, LAST, CPG, GROUPS)
    mean = 0.0 if GROUPS == 1 else tl.zeros([GROUPS], tl.float32)
    squares = 0.0 if GROUPS == 1 else tl.zeros([GROUPS], tl.float32)
    first_pixel = chunk * tiles_per_chunk * PIXELS
    end = tl.minimum(first_pixel + tiles_per_chunk * PIXELS, hw)
    for start in range(first_pixel, end, PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        mask = tile_mask(exists, pixel, hw, LAST) if PADDED else None
        tile = x + sample * c * hw + tile_offsets(channel, pixel, c, hw, LAST)
        h = load_h(tile, shift_, mask, LAST, shift is not None, PADDED)
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

    row, row_exists = group_rows(sample, group_tile, groups, GROUPS)
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

    channel, _, exists = tile_channels(group_tile, groups, CPG, WIDTH, GROUPS)
    modulation = sample * c + channel
    a, b = affine(weight, bias, scale, scale_shift, channel, modulation, exists)
    a *= spread(r, WIDTH, GROUPS)
    b -= a * spread(rest, WIDTH, GROUPS)
    shift_ = load_channels(shift, modulation, exists, 0.0)
    first = sample * c * hw
    first_pixel = chunk * chunk_pixels
    for start in range(first_pixel, tl.minimum(first_pixel + chunk_pixels, hw), PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        mask = tile_mask(exists, pixel, hw, LAST) if PADDED else None
        offset = tile_offsets(channel, pixel, c, hw, LAST)
        h = load_h(x + first + offset, shift_, mask, LAST, shift is not None, PADDED)
        z = tl.fma(h - spread_tile(mu, LAST, WIDTH, GROUPS), over_tile(a, LAST), over_tile(b, LAST))
        tl.store(y + first + offset, rounded(z * logistic(z, FAST) if SILU else z, y.dtype.element_ty), mask)


def group_norm_silu(results: Any, a: Any) -> None:
    """Launch the kernels for results and arguments of `ddpm_fast.ops.group_norm_silu`."""
    x, groups = a.x, a.num_groups
    if x.numel() == 0:
        return
    n = x.shape[0]
    # The kernels write the statistics in any case.
    mean, rstd = scratch(x, 2, n, groups) if results.mean is None else (results.mean, results.rstd)
    group_tiles, chunks, arguments, split = norm_tiling(x, groups, backward=False)
    values = {"n": n, "mean": mean, "rstd": rstd, "SILU": a.silu, "FAST": x.element_size() == 2, **arguments, **split}
    if not split:
        launch(_forward_kernel, group_tiles, results, a, **values)
        return
    values["partial_mean"], values["partial_squares"] = scratch(x, 2, n, groups, chunks)
    launch(_partial_statistics_kernel, group_tiles * chunks, results, a, **values)
    launch(_apply_kernel, group_tiles * chunks, results, a, CHUNKS=triton.next_power_of_2(chunks), **values)
