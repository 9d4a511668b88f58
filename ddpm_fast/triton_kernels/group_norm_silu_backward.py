"""The gradients of GroupNorm with modulation and SiLU. See `group_norm_tiles.py`."""
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
    load_tile,
    logistic,
    norm_tiling,
    over_tile,
    spread,
    spread_tile,
    sum_channels,
    tile_channels,
    tile_mask,
    tile_offsets,
    zero_padding,
)
from .tiles import current_sample, device_of, launch, rounded, scratch

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
    h = load_h(x, shift, mask, LAST, HAS_SHIFT, PADDED)
    xhat = (h - spread_tile(mu, LAST, WIDTH, GROUPS)) * spread_tile(r, LAST, WIDTH, GROUPS)
    xhat = zero_padding(xhat, mask, PADDED)
    dz = load_tile(dy, mask, PADDED)
    if SILU:
        z = tl.fma(xhat, over_tile(a, LAST), over_tile(b, LAST))
        sigmoid = logistic(z, FAST)
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
    m1 = tl.div_rn(sum_channels(a * dz_sums, WIDTH, GROUPS), count)
    m2 = tl.div_rn(sum_channels(a * dz_xhat_sums, WIDTH, GROUPS), count)
    if sum_dz is not None:
        tl.store(sum_dz + modulation, dz_sums, exists)
        tl.store(sum_dz_xhat + modulation, dz_xhat_sums, exists)
    if dshift is not None:
        total = a * dz_sums - spread(m1 * hw, WIDTH, GROUPS) - spread(m2, WIDTH, GROUPS) * xhat_sums
        tl.store(dshift + modulation, spread(r, WIDTH, GROUPS) * total, exists)
    if dscale is not None:
        w = load_channels(weight, channel, exists, 1.0)
        b = load_channels(bias, channel, exists, 0.0)
        tl.store(dscale + modulation, tl.fma(w, dz_xhat_sums, b * dz_sums), exists)
    if dscale_shift is not None:
        tl.store(dscale_shift + modulation, dz_sums, exists)
    return m1, m2


@triton.jit
def _dx(dz, xhat, r, a, m1, m2, LAST: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    common = tl.fma(xhat, spread_tile(r * m2, LAST, WIDTH, GROUPS), spread_tile(r * m1, LAST, WIDTH, GROUPS))
    return tl.fma(dz, over_tile(a * spread(r, WIDTH, GROUPS), LAST), -common)


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
    channel, _, exists = tile_channels(tl.program_id(0), groups, CPG, WIDTH, GROUPS)
    modulation = sample * c + channel
    row, row_exists = group_rows(sample, tl.program_id(0), groups, GROUPS)
    mu = tl.load(mean + row, row_exists)
    r = tl.load(rstd + row, row_exists)
    a, b = affine(weight, bias, scale, scale_shift, channel, modulation, exists)
    shift_ = load_channels(shift, modulation, exists, 0.0)
    pixel = tl.arange(0, PIXELS)
    mask = tile_mask(exists, pixel, hw, LAST) if PADDED else None
    offset = sample * c * hw + tile_offsets(channel, pixel, c, hw, LAST)
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
    channel, _, exists = tile_channels(group_tile, groups, CPG, WIDTH, GROUPS)
    modulation = sample * c + channel
    row, row_exists = group_rows(sample, group_tile, groups, GROUPS)
    mu = tl.load(mean + row, row_exists)
    r = tl.load(rstd + row, row_exists)
    a, b = affine(weight, bias, scale, scale_shift, channel, modulation, exists)
    shift_ = load_channels(shift, modulation, exists, 0.0)
    dz_sums = tl.zeros([PIXELS, GROUPS * WIDTH] if LAST else [GROUPS * WIDTH, PIXELS], tl.float32)
    dz_xhat_sums = tl.zeros_like(dz_sums)
    xhat_sums = tl.zeros_like(dz_sums)
    first_pixel = chunk * tiles_per_chunk * PIXELS
    for start in range(first_pixel, tl.minimum(first_pixel + tiles_per_chunk * PIXELS, hw), PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        mask = tile_mask(exists, pixel, hw, LAST) if PADDED else None
        offset = sample * c * hw + tile_offsets(channel, pixel, c, hw, LAST)
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
    channel, _, exists = tile_channels(tl.program_id(0), groups, CPG, WIDTH, 1)
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
    a, _ = affine(weight, None, scale, None, channel, modulation, exists)
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
    channel, _, exists = tile_channels(program // chunks, groups, CPG, WIDTH, GROUPS)
    modulation = sample * c + channel
    row, row_exists = group_rows(sample, program // chunks, groups, GROUPS)
    mu = tl.load(mean + row, row_exists)
    r = tl.load(rstd + row, row_exists)
    m1 = tl.load(means + row, row_exists)
    m2 = tl.load(means + n.to(tl.int64) * groups + row, row_exists)
    a, b = affine(weight, bias, scale, scale_shift, channel, modulation, exists)
    shift_ = load_channels(shift, modulation, exists, 0.0)
    first_pixel = program % chunks * tiles_per_chunk * PIXELS
    for start in range(first_pixel, tl.minimum(first_pixel + tiles_per_chunk * PIXELS, hw), PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        mask = tile_mask(exists, pixel, hw, LAST) if PADDED else None
        offset = sample * c * hw + tile_offsets(channel, pixel, c, hw, LAST)
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
        factor = 1.0 + load_channels(scale, index, exists, 0.0)
        weight_sums = tl.fma(factor, tl.load(sum_dz_xhat + index, exists, other=0.0), weight_sums)
        bias_sums = tl.fma(factor, tl.load(sum_dz + index, exists, other=0.0), bias_sums)
    if dweight is not None:
        tl.store(dweight + channel, tl.sum(weight_sums, 0)[None, :], channel < c)
    if dbias is not None:
        tl.store(dbias + channel, tl.sum(bias_sums, 0)[None, :], channel < c)


def group_norm_silu_backward(results: Any, a: Any) -> None:
    """Launch the kernels of the gradients. Those of absent inputs are None."""
    x = a.x
    if x.numel() == 0:
        for gradient in results[1:]:
            if gradient is not None:
                gradient.zero_()
        return
    n, c = x.shape[:2]
    group_tiles, chunks, arguments, split = norm_tiling(x, a.num_groups, backward=True)
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
