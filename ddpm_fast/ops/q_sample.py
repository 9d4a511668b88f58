"""q_sample: noise x_0 to timestep t in one pass (eq. 3, Ho et al. 2020, eq. 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..schedule import NoiseSchedule
from ._library import (
    check_float,
    check_like,
    check_noise_or_seeds,
    check_range,
    check_seeds,
    check_type,
    define,
    dense,
    dense_like,
    dtype_code,
    index_tensor,
    is_plain_inference,
    pointer,
    sizes,
)
from .backend import FLOATS, choose, launch


def q_sample(
    x_0: Tensor,
    t: int | Tensor,
    schedule: NoiseSchedule,
    *,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Draw x_t ~ q(x_t | x_0).

        x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) epsilon

    With `seeds`, epsilon is drawn in the kernel and never stored. Source: derivation eq. 3 (Ho et al. 2020,
    eq. 4).

    Args:
        x_0: [N, ...], floating, or uint8 images. Values 0..255 of uint8 stand for -1..1, and no floating
            copy of them is made.
        t: Timestep, 0..T-1: an int, or int64 [N]. Values on a GPU are not checked.
        schedule: Noise schedule, which has abar.
        noise: epsilon, shaped like x_t. Pass either `noise` or `seeds`.
        seeds: int64 [N]. epsilon is `noise(x_0.shape, seeds, stream=STREAM_Q_SAMPLE)`, which
            `denoising_loss` draws too.
        dtype: Dtype of x_t for a uint8 x_0. None: float32. A floating x_0 keeps its dtype.
        backend: "native", "triton" or "reference". None: the first that can run, and "reference" inside
            torch.func transforms and forward-mode differentiation.

    Returns:
        x_t with the shape and memory format of x_0, differentiable in x_0 and noise.

    Raises:
        ValueError: An argument has an unsupported value, shape or device.
        TypeError: An argument has an unsupported type or dtype.
        BackendUnavailable: The named backend cannot run.
    """
    dtype = _checked_dtype(x_0, dtype)
    check_noise_or_seeds("q_sample", noise, seeds)
    check_type("q_sample", "schedule", schedule, NoiseSchedule)
    t = index_tensor("q_sample", "t", t, schedule.num_timesteps, x_0.shape[0], x_0.device)
    if noise is not None:
        check_like("q_sample", "noise", noise, "x_t", x_0.new_empty(0, dtype=dtype), tuple(x_0.shape))
    if seeds is not None:
        seeds = check_seeds("q_sample", seeds, x_0.shape[0], x_0.device)
    table = schedule.coefficients(x_0.device)
    family = choose("q_sample", backend, x_0.device, dtype)
    if family == "reference":
        check_range("q_sample", "t", t, table.shape[0])
        return reference.q_sample(x_0, t, table, noise, seeds, dtype)
    run = _impl if is_plain_inference(x_0, t, noise, seeds) else torch.ops.ddpm_fast.q_sample
    x_t: Tensor = run(x_0, t, table, noise, seeds, dtype, family)
    return x_t


def _checked_dtype(x_0: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of x_t, or raise."""
    if isinstance(x_0, Tensor) and x_0.dtype == torch.uint8 and x_0.dim() >= 1:
        if dtype is not None and dtype not in FLOATS:
            raise TypeError(f"q_sample: expected dtype to be float32, float64, float16 or bfloat16, got {dtype}")
        return dtype or torch.float32
    check_float("q_sample", "x_0", x_0)
    if dtype not in (None, x_0.dtype):
        raise TypeError(f"q_sample: expected dtype to be that of x_0, {x_0.dtype}, or None, as x_0 is not uint8, got {dtype}")
    return x_0.dtype


def _impl(
    x_0: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    dtype: torch.dtype,
    family: str,
) -> Tensor:
    check_range("q_sample", "t", t, table.shape[0])
    x_0 = dense(x_0)
    noise = None if noise is None else dense_like(noise, x_0)
    out = torch.empty_like(x_0, dtype=dtype)
    if family == "native":
        launch(
            "q_sample",
            x_0.device,
            dtype_code(out),
            *(pointer(out), pointer(x_0), dtype_code(x_0)),
            *(pointer(p) for p in (t, table, noise, seeds)),
            *sizes(x_0),
        )
    else:
        from ..triton_kernels.q_sample import q_sample as run

        run(out, x_0, t, table, noise, seeds)
    return out


def _fake(
    x_0: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    dtype: torch.dtype,
    family: str,
) -> Tensor:
    return torch.empty_like(dense(x_0), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, t, table, *_ = inputs
    ctx.save_for_backward(t, table)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    t, table = ctx.saved_tensors
    grad_x_0 = grad_noise = None
    if ctx.needs_input_grad[0]:
        grad_x_0 = (reference.per_sample(table[t, 0], grad) * grad).to(grad.dtype)
    if ctx.needs_input_grad[3]:
        grad_noise = (reference.per_sample(table[t, 1], grad) * grad).to(grad.dtype)
    return grad_x_0, None, None, grad_noise, None, None, None


define(
    "q_sample",
    "(Tensor x_0, Tensor t, Tensor table, Tensor? noise, Tensor? seeds, ScalarType dtype, str family) -> Tensor",
    _impl,
    _fake,
    _backward,
    _setup_context,
)
