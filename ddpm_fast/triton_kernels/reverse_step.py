"""One step of any sampler in one pass (`ddpm_fast.reference.reverse_step`, eq. 13)."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..reference import PlanRow
from .tiles import current_sample, epsilon, launch, locate, rounded, tiling

WIDTH = tl.constexpr(len(PlanRow._fields))
P, Q, K0, K1, K2, K3, K4, SIGMA, LOG_BETA, LOG_BETA_TILDE, CLIP = map(tl.constexpr, range(len(PlanRow._fields)))


@triton.jit(do_not_specialize=["n", "guidance_scale"])
def _reverse_step_kernel(
    x_prev, x_0, x_t, model_output, table, steps, noise, seeds, x_0_prev, x_0_prev2, guidance_scale, n, hw,
    PER_SAMPLE: tl.constexpr, variance: tl.constexpr,
    C: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, VECTOR: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    sample = current_sample()
    if sample >= n:
        return
    tile = tl.program_id(0)
    step = tl.load(steps + sample if PER_SAMPLE else steps)
    row = table + WIDTH * step
    offset, mask = locate(tile, hw, C, PIXELS, CHANNELS, C)
    first = sample * hw * C
    x = tl.load(x_t + first + offset, mask).to(tl.float32)

    # m, and with learned variance v: the second C channels of a model output that has 2 C.
    learned: tl.constexpr = variance != 0
    model_channels: tl.constexpr = 2 * C if learned else C
    model_offset, _ = locate(tile, hw, C, PIXELS, CHANNELS, model_channels)
    conditional = model_output + sample * hw * model_channels + model_offset
    m = tl.load(conditional, mask).to(tl.float32)
    if guidance_scale is not None:
        unconditional = conditional + n.to(tl.int64) * hw * model_channels
        m_u = tl.load(unconditional, mask).to(tl.float32)
        m = tl.fma(m - m_u, guidance_scale, m_u)

    clip = tl.load(row + CLIP)
    clipped = tl.fma(tl.load(row + Q), m, tl.load(row + P) * x)
    clipped = tl.minimum(clipped, clip, propagate_nan=tl.PropagateNan.ALL)
    clipped = tl.maximum(clipped, -clip, propagate_nan=tl.PropagateNan.ALL)
    total = tl.fma(tl.load(row + K0), clipped, tl.fma(tl.load(row + K1), x, tl.load(row + K2) * m))
    if x_0_prev is not None:
        total = tl.fma(tl.load(row + K3), tl.load(x_0_prev + first + offset, mask).to(tl.float32), total)
    if x_0_prev2 is not None:
        total = tl.fma(tl.load(row + K4), tl.load(x_0_prev2 + first + offset, mask).to(tl.float32), total)
    if noise is not None or seeds is not None:
        sigma = tl.load(row + SIGMA)
        if sigma != 0:
            z = epsilon(noise, seeds, sample, step, tile, offset, mask, hw, C, PIXELS, CHANNELS, VECTOR, QUADS)
            if learned:
                v = tl.load(conditional + (C if CHANNELS else hw), mask).to(tl.float32)
                if variance == 2:
                    high = tl.load(row + LOG_BETA)
                    low = tl.load(row + LOG_BETA_TILDE)
                    v = tl.fma(0.5 * (v + 1.0), high - low, low)
                z = tl.exp(0.5 * v) * z
            total = tl.fma(sigma, z, total)
    tl.store(x_prev + first + offset, rounded(total, x_prev.dtype.element_ty), mask)
    if x_0 is not None:
        tl.store(x_0 + first + offset, rounded(clipped, x_0.dtype.element_ty), mask)


def reverse_step(results: Any, a: Any) -> None:
    """Launch the kernel for results and arguments of `ddpm_fast.ops.reverse_step`. x_prev may be x_t itself."""
    if a.x_t.numel():
        tiles, values = tiling(a.x_t, *results, *a, ordered=a.seeds is not None or a.variance != 0)
        launch(_reverse_step_kernel, tiles, results, a, PER_SAMPLE=a.steps.numel() > 1, **values)
