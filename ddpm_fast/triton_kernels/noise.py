"""Standard normals from seeds (`ddpm_fast.reference.noise`)."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .tiles import current_sample, draw, launch, locate, rounded, tiling


# Triton's launcher has a parameter `stream` of its own, the CUDA stream, so it refuses one of a kernel.
@triton.jit(do_not_specialize=["n", "noise_stream"])
def _noise_kernel(
    out, seeds, n, noise_stream, hw,
    C: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, VECTOR: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    sample = current_sample()
    if sample >= n:
        return
    tile = tl.program_id(0)
    offset, mask = locate(tile, hw, C, PIXELS, CHANNELS, C)
    z = draw(tl.load(seeds + sample), noise_stream, tile, hw, C, PIXELS, CHANNELS, VECTOR, QUADS)
    tl.store(out + sample * hw * C + offset, rounded(z, out.dtype.element_ty), mask)


def noise(results: Any, a: Any) -> None:
    """Launch the kernel for results and arguments of `ddpm_fast.ops.noise`."""
    if results.out.numel():
        tiles, values = tiling(results.out, ordered=True)
        launch(_noise_kernel, tiles, results, a, noise_stream=a.stream, **values)
