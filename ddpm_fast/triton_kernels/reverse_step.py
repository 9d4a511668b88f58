"""One step of any sampler in one pass (`ddpm_fast.reference.reverse_step`, eq. 13)."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .tiles import current_sample, device_of, epsilon, grid, locate, rounded, tiling


@triton.jit(do_not_specialize=["n", "guidance_scale"])
def _reverse_step_kernel(
    out, x_0_out, x_t, model_output, table, steps, noise, seeds, x_0_prev, guidance_scale, n, hw,
    PER_SAMPLE: tl.constexpr, VARIANCE: tl.constexpr,
    C: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, VECTOR: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    sample = current_sample()
    if sample >= n:
        return
    tile = tl.program_id(0)
    step = tl.load(steps + sample if PER_SAMPLE else steps)
    row = table + 10 * step
    offset, mask = locate(tile, hw, C, PIXELS, CHANNELS, C)
    first = sample * hw * C
    x = tl.load(x_t + first + offset, mask).to(tl.float32)

    # m, and with learned variance v: the second C channels of a model output that has 2 C.
    learned: tl.constexpr = VARIANCE != 0
    model_channels: tl.constexpr = 2 * C if learned else C
    model_offset, _ = locate(tile, hw, C, PIXELS, CHANNELS, model_channels)
    conditional = model_output + sample * hw * model_channels + model_offset
    m = tl.load(conditional, mask).to(tl.float32)
    if guidance_scale is not None:
        unconditional = conditional + n.to(tl.int64) * hw * model_channels
        m_u = tl.load(unconditional, mask).to(tl.float32)
        m = tl.fma(m - m_u, guidance_scale, m_u)

    clip = tl.load(row + 9)
    x_0 = tl.fma(tl.load(row + 1), m, tl.load(row) * x)
    x_0 = tl.minimum(x_0, clip, propagate_nan=tl.PropagateNan.ALL)
    x_0 = tl.maximum(x_0, -clip, propagate_nan=tl.PropagateNan.ALL)
    x_prev = tl.fma(tl.load(row + 2), x_0, tl.fma(tl.load(row + 3), x, tl.load(row + 4) * m))
    if x_0_prev is not None:
        x_prev = tl.fma(tl.load(row + 5), tl.load(x_0_prev + first + offset, mask).to(tl.float32), x_prev)
    if noise is not None or seeds is not None:
        sigma = tl.load(row + 6)
        if sigma != 0:
            z = epsilon(noise, seeds, sample, step, tile, offset, mask, hw, C, PIXELS, CHANNELS, VECTOR, QUADS)
            if learned:
                v = tl.load(conditional + (C if CHANNELS else hw), mask).to(tl.float32)
                if VARIANCE == 2:
                    high = tl.load(row + 7)
                    low = tl.load(row + 8)
                    v = tl.fma(0.5 * (v + 1.0), high - low, low)
                z = tl.exp(0.5 * v) * z
            x_prev = tl.fma(sigma, z, x_prev)
    tl.store(out + first + offset, rounded(x_prev, out.dtype.element_ty), mask)
    if x_0_out is not None:
        tl.store(x_0_out + first + offset, rounded(x_0, x_0_out.dtype.element_ty), mask)


def reverse_step(results: Any, a: Any) -> None:
    """Launch the kernels for results and arguments of `ddpm_fast.ops.reverse_step`. x_prev may be x_t itself."""
    x_prev, x_0 = results.x_prev, results.x_0
    if x_prev.numel() == 0:
        return
    n, ordered = x_prev.shape[0], a.seeds is not None or a.variance != 0
    tiles, arguments = tiling(a.x_t, a.model_output, x_prev, x_0, a.noise, a.x_0_prev, ordered=ordered)
    with device_of(x_prev):
        _reverse_step_kernel[grid(n, tiles)](
            x_prev, x_0, a.x_t, a.model_output, a.table, a.steps, a.noise, a.seeds, a.x_0_prev, a.guidance_scale, n,
            PER_SAMPLE=a.steps.numel() > 1, VARIANCE=a.variance, **arguments,
        )  # fmt: skip
