"""The gradient of the denoising loss. See `denoising_loss.py`."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .denoising_loss import loss_difference
from .tiles import current_sample, launch, rounded, tiling


@triton.jit(do_not_specialize=["n", "scale"])
def _denoising_loss_backward_kernel(
    grad_model_output, grad_losses, model_output, x_0, t, table, noise, seeds, n, scale, hw,
    C: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, VECTOR: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    sample = current_sample()
    if sample >= n:
        return
    difference, offset, mask = loss_difference(
        model_output, x_0, t, table, noise, seeds, sample, tl.program_id(0), hw,
        C, PIXELS, CHANNELS, VECTOR, QUADS,
    )  # fmt: skip
    gradient = rounded(scale * tl.load(grad_losses + sample) * difference, grad_model_output.dtype.element_ty)
    tl.store(grad_model_output + sample * hw * C + offset, gradient, mask)


def denoising_loss_backward(results: Any, a: Any) -> None:
    """Launch the kernel that computes the gradient.

        grad_model_output = 2 grad_losses (model_output - target) / elements of a sample

    The target is a x_0 + b epsilon.
    """
    m = a.model_output
    if m.numel():
        tiles, values = tiling(m, *results, *a, ordered=a.noise is None)
        launch(_denoising_loss_backward_kernel, tiles, results, a, scale=2 * len(m) / m.numel(), **values)
