"""Denoising loss per sample (`ddpm_fast.reference.denoising_loss`, eq. 12).

The forward and the backward kernel draw the noise again, so it is never stored. Sums run in an order
that depends only on a sample's size, without atomics. Results are bit-identical from run to run.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..reference import STREAM_Q_SAMPLE
from .tiles import current_sample, device_of, epsilon, launch, locate, scratch, tiling

STREAM = tl.constexpr(STREAM_Q_SAMPLE)
TILES_PER_PROGRAM = 8
MAX_PARTIALS = 512  # partial sums of one sample


@triton.jit
def loss_difference(
    model_output, x_0, t, table, noise, seeds, sample, tile, hw,
    C: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, VECTOR: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """Return three blocks of a tile: model_output - (a x_0 + b epsilon), the offsets and the mask."""
    offset, mask = locate(tile, hw, C, PIXELS, CHANNELS, C)
    first = sample * hw * C
    row = table + 2 * tl.load(t + sample)
    difference = tl.load(model_output + first + offset, mask).to(tl.float32)
    if x_0 is not None:
        target = tl.load(row) * tl.load(x_0 + first + offset, mask).to(tl.float32)
    if noise is not None or seeds is not None:
        z = epsilon(noise, seeds, sample, STREAM, tile, offset, mask, hw, C, PIXELS, CHANNELS, VECTOR, QUADS)
        if x_0 is not None:
            target = tl.fma(tl.load(row + 1), z, target)
        else:
            difference = tl.fma(-tl.load(row + 1), z, difference)
    if x_0 is not None:
        difference -= target
    return difference, offset, mask


@triton.jit(do_not_specialize=["n", "scale"])
def _denoising_loss_kernel(
    partial, model_output, x_0, t, table, noise, seeds, n, tiles, tiles_per_program, scale, hw,
    C: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, VECTOR: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    sample = current_sample()
    if sample >= n:
        return
    first_tile = tl.program_id(0) * tiles_per_program
    total = tl.zeros([PIXELS] if CHANNELS == 0 else [PIXELS, CHANNELS], tl.float32)
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_program, tiles)):
        difference, _, mask = loss_difference(
            model_output, x_0, t, table, noise, seeds, sample, tile, hw,
            C, PIXELS, CHANNELS, VECTOR, QUADS,
        )  # fmt: skip
        difference = tl.where(mask, difference, 0.0)
        total = tl.fma(difference, difference, total)
    tl.store(partial + sample * tl.num_programs(0) + tl.program_id(0), tl.sum(total) * scale)


@triton.jit
def _sum_kernel(out, partial, partials, PARTIALS: tl.constexpr):
    index = tl.arange(0, PARTIALS)
    row = partial + tl.program_id(0).to(tl.int64) * partials
    tl.store(out + tl.program_id(0), tl.sum(tl.load(row + index, index < partials, other=0.0)))


def denoising_loss(results: Any, a: Any) -> None:
    """Launch the kernels for results and arguments of `ddpm_fast.ops.denoising_loss`."""
    losses, m = results.losses, a.model_output
    if m.numel() == 0:
        losses.fill_(float("nan"))  # the mean of nothing
        return
    n = losses.shape[0]
    tiles, values = tiling(m, *a, ordered=a.noise is None)
    tiles_per_program = max(TILES_PER_PROGRAM, triton.cdiv(tiles, MAX_PARTIALS))
    partials = triton.cdiv(tiles, tiles_per_program)
    partial = losses if partials == 1 else scratch(losses, n, partials)
    values |= {"partial": partial, "tiles": tiles, "tiles_per_program": tiles_per_program, "scale": n / m.numel()}
    launch(_denoising_loss_kernel, partials, results, a, **values)
    if partials > 1:
        with device_of(losses):
            _sum_kernel[(n,)](losses, partial, partials, PARTIALS=triton.next_power_of_2(partials), num_warps=1)
