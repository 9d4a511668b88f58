"""Standard normals from seeds (`ddpm_fast.reference.noise`)."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .tiles import current_sample, device_of, draw, grid, locate, rounded, tiling


@triton.jit(do_not_specialize=["n", "stream"])
def _noise_kernel(
    out, seeds, n, stream, hw,
    C: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, VECTOR: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    sample = current_sample()
    if sample >= n:
        return
    tile = tl.program_id(0)
    offset, mask = locate(tile, hw, C, PIXELS, CHANNELS, C)
    z = draw(tl.load(seeds + sample), stream, tile, hw, C, PIXELS, CHANNELS, VECTOR, QUADS)
    tl.store(out + sample * hw * C + offset, rounded(z, out.dtype.element_ty), mask)


def noise(results: Any, a: Any) -> None:
    """Launch the kernels for results and arguments of `ddpm_fast.ops.noise`."""
    out = results.out
    if out.numel() == 0:
        return
    n = out.shape[0]
    tiles, arguments = tiling(out, ordered=True)
    with device_of(out):
        _noise_kernel[grid(n, tiles)](out, a.seeds, n, a.stream, **arguments)
