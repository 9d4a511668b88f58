"""q_sample: noise x_0 to timestep t in one pass. Derivation eq. 3 (Ho et al. 2020, eq. 4)."""

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
    pointer,
    sizes,
)
from .backend import choose, native


def q_sample(
    x_0: Tensor,
    t: int | Tensor,
    schedule: NoiseSchedule,
    *,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) epsilon, with epsilon given or drawn in the kernel and never stored.

    Args:
        x_0: [N, ...], floating.
        t: the timestep, 0..T-1: an int, or int64 [N].
        schedule: gives abar.
        noise: epsilon, like x_0; or
        seeds: int64 [N]: epsilon is `noise(x_0.shape, seeds, stream=STREAM_Q_SAMPLE)`, and `denoising_loss` draws the same.
        backend: "native", "triton" or "reference"; by default the first that can run.

    Returns:
        x_t, with the shape, dtype and memory format of x_0. Differentiable in x_0 and noise.

    Raises:
        ValueError, TypeError: an argument that is not as above. BackendUnavailable: the family named cannot run.
    """
    check_float("q_sample", "x_0", x_0)
    check_noise_or_seeds("q_sample", noise, seeds)
    check_type("q_sample", "schedule", schedule, NoiseSchedule)
    t = index_tensor("q_sample", "t", t, schedule.num_timesteps, x_0.shape[0], x_0.device)
    if noise is not None:
        check_like("q_sample", "noise", noise, "x_0", x_0)
    if seeds is not None:
        seeds = check_seeds("q_sample", seeds, x_0.shape[0], x_0.device)
    table = schedule.coefficients(x_0.device)
    family = choose("q_sample", backend, x_0.device, x_0.dtype)
    if family == "reference":
        check_range("q_sample", "t", t, table.shape[0])
        return reference.q_sample(x_0, t, table, noise, seeds)
    x_t: Tensor = torch.ops.ddpm_fast.q_sample(x_0, t, table, noise, seeds, family)
    return x_t


def _impl(x_0: Tensor, t: Tensor, table: Tensor, noise: Tensor | None, seeds: Tensor | None, family: str) -> Tensor:
    check_range("q_sample", "t", t, table.shape[0])
    x_0 = dense(x_0)
    noise = None if noise is None else dense_like(noise, x_0)
    out = torch.empty_like(x_0)
    if family == "native":
        native().q_sample(
            dtype_code(x_0),
            *(pointer(p) for p in (out, x_0, t, table, noise, seeds)),
            *sizes(x_0),
            torch.get_num_threads(),
        )
    else:
        from ..triton_kernels.q_sample import q_sample as launch

        launch(out, x_0, t, table, noise, seeds)
    return out


def _fake(x_0: Tensor, t: Tensor, table: Tensor, noise: Tensor | None, seeds: Tensor | None, family: str) -> Tensor:
    return torch.empty_like(dense(x_0))


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
    return grad_x_0, None, None, grad_noise, None, None


define(
    "q_sample",
    "(Tensor x_0, Tensor t, Tensor table, Tensor? noise, Tensor? seeds, str family) -> Tensor",
    _impl,
    _fake,
    _backward,
    _setup_context,
)
