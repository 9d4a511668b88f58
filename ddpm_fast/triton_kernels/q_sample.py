"""x_t ~ q(x_t | x_0) in one pass (`ddpm_fast.reference.q_sample`, eq. 3)."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..reference import STREAM_Q_SAMPLE
from .tiles import current_sample, epsilon, launch, locate, rounded, tiling

STREAM = tl.constexpr(STREAM_Q_SAMPLE)


@triton.jit(do_not_specialize=["n"])
def _q_sample_kernel(
    x_t, x_0, t, table, noise, seeds, n, hw,
    C: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, VECTOR: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    sample = current_sample()
    if sample >= n:
        return
    tile = tl.program_id(0)
    row = table + 2 * tl.load(t + sample)
    signal = tl.load(row)
    sigma = tl.load(row + 1)
    offset, mask = locate(tile, hw, C, PIXELS, CHANNELS, C)
    first = sample * hw * C
    x = tl.load(x_0 + first + offset, mask).to(tl.float32)
    if x_0.dtype.element_ty == tl.uint8:
        x = x * (2 / 255) - 1  # 0..255 stand for -1..1
    z = epsilon(noise, seeds, sample, STREAM, tile, offset, mask, hw, C, PIXELS, CHANNELS, VECTOR, QUADS)
    tl.store(x_t + first + offset, rounded(tl.fma(sigma, z, signal * x), x_t.dtype.element_ty), mask)


def q_sample(results: Any, a: Any) -> None:
    """Launch the kernel for results and arguments of `ddpm_fast.ops.q_sample`."""
    if a.x_0.numel():
        tiles, values = tiling(a.x_0, *results, *a, ordered=a.noise is None)
        launch(_q_sample_kernel, tiles, results, a, **values)
