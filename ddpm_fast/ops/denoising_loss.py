"""denoising_loss: the denoising loss with noise regenerated in the kernel (eq. 12, Ho et al. eq. 14)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .. import reference
from ..schedule import NoiseSchedule
from ._library import (
    check_device,
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
    no_second_derivative,
    pointer,
    sizes,
)
from .backend import choose, launch, workspace


def denoising_loss(
    model_output: Tensor,
    x_0: Tensor,
    t: int | Tensor,
    schedule: NoiseSchedule,
    *,
    prediction: Literal["epsilon", "sample", "v_prediction"] = "epsilon",
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    backend: str | None = None,
) -> Tensor:
    """Return the mean squared error between the model's output and its target.

    The target for x_t = q_sample(x_0, t, ...) is epsilon, x_0, or
    v = sqrt(abar_t) epsilon - sqrt(1 - abar_t) x_0 (Salimans and Ho 2022). With `seeds`, epsilon is drawn
    again in the forward and the backward kernel and is never stored. Source: derivation eq. 12 (Ho et al.
    2020, eq. 14).

    Args:
        model_output: [N, ...], floating. Cast to x_0's dtype if it differs, as under autocast.
        x_0: Shape of model_output, floating.
        t: Timestep, 0..T-1: an int, or int64 [N]. The same as passed to `q_sample`.
        schedule: Noise schedule. The same as passed to `q_sample`.
        prediction: Target: "epsilon", "sample" (x_0) or "v_prediction".
        noise: epsilon, like x_0. Pass either `noise` or `seeds`.
        seeds: int64 [N]. The same as passed to `q_sample`.
        weight: [N], factor of each sample's loss, such as `NoiseSchedule.loss_weight`. None: 1.
        reduction: "mean" or "sum" of the N losses, or "none" for all of them. Each loss is the mean over
            a sample's elements.
        backend: "native", "triton" or "reference". None: the first that can run, and "reference" inside
            torch.func transforms and forward-mode differentiation.

    Returns:
        A scalar, or [N] for "none". float64 for float64 inputs, float32 for all others. Differentiable
        once in model_output, x_0, noise and weight, and any number of times with backend="reference".

    Raises:
        ValueError: An argument has an unsupported value, shape or device.
        TypeError: An argument has an unsupported type or dtype.
        BackendUnavailable: The named backend cannot run.
    """
    op = "denoising_loss"
    check_float(op, "x_0", x_0)
    check_float(op, "model_output", model_output)
    model_output = model_output.to(x_0.dtype)
    check_like(op, "model_output", model_output, "x_0", x_0)
    check_noise_or_seeds(op, noise, seeds)
    check_type(op, "schedule", schedule, NoiseSchedule)
    if prediction not in reference.PREDICTIONS:
        raise ValueError(f"{op}: expected prediction to be one of {', '.join(reference.PREDICTIONS)}, got {prediction!r}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'{op}: expected reduction to be "mean", "sum" or "none", got {reduction!r}')
    n = x_0.shape[0]
    if weight is not None:
        check_float(op, "weight", weight)
        check_device(op, "weight", weight, "x_0", x_0)
        if weight.shape != (n,):
            raise ValueError(f"{op}: expected weight to have shape [{n}], one a sample, got {list(weight.shape)}")
    t = index_tensor(op, "t", t, schedule.num_timesteps, n, x_0.device)
    if noise is not None:
        check_like(op, "noise", noise, "x_0", x_0)
    if seeds is not None:
        seeds = check_seeds(op, seeds, n, x_0.device)
    table = schedule.coefficients(x_0.device)
    code = reference.PREDICTIONS.index(prediction)
    family = choose(op, backend, x_0.device, x_0.dtype)
    losses: Tensor  # [N]
    if family == "reference":
        check_range(op, "t", t, table.shape[0])
        losses = reference.denoising_loss(model_output, x_0, t, table, noise, seeds, code)
    else:
        losses = torch.ops.ddpm_fast.denoising_loss(model_output, x_0, t, table, noise, seeds, code, family)
    if weight is not None:
        losses = losses * weight.to(losses.dtype)
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


def _impl(
    model_output: Tensor,
    x_0: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    prediction: int,
    family: str,
) -> Tensor:
    check_range("denoising_loss", "t", t, table.shape[0])
    model_output = dense(model_output)
    x_0 = dense_like(x_0, model_output)
    noise = None if noise is None else dense_like(noise, model_output)
    losses = _fake(model_output, x_0, t, table, noise, seeds, prediction, family)
    if family == "native":
        scratch = workspace("denoising_loss", x_0.device, *sizes(model_output)[:3])
        launch(
            "denoising_loss",
            x_0.device,
            dtype_code(x_0),
            *(pointer(p) for p in (losses, model_output, x_0, t, table, noise, seeds)),
            prediction,
            *sizes(model_output),
            pointer(scratch),
        )
    else:
        from ..triton_kernels.denoising_loss import denoising_loss as run

        run(losses, model_output, x_0, t, table, noise, seeds, prediction)
    return losses


def _fake(
    model_output: Tensor,
    x_0: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    prediction: int,
    family: str,
) -> Tensor:
    return model_output.new_empty(model_output.shape[0], dtype=reference.opmath(model_output.dtype))


def _backward_impl(
    grad_losses: Tensor,
    model_output: Tensor,
    x_0: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    prediction: int,
    family: str,
) -> Tensor:
    check_range("denoising_loss", "t", t, table.shape[0])
    model_output = dense(model_output)
    x_0 = dense_like(x_0, model_output)
    noise = None if noise is None else dense_like(noise, model_output)
    grad_losses = grad_losses.contiguous()
    grad_model_output = torch.empty_like(model_output)
    if family == "native":
        launch(
            "denoising_loss_backward",
            x_0.device,
            dtype_code(x_0),
            *(pointer(p) for p in (grad_model_output, grad_losses, model_output, x_0, t, table, noise, seeds)),
            prediction,
            *sizes(model_output),
        )
    else:
        from ..triton_kernels.denoising_loss import denoising_loss_backward as run

        run(grad_model_output, grad_losses, model_output, x_0, t, table, noise, seeds, prediction)
    return grad_model_output


def _backward_fake(
    grad_losses: Tensor,
    model_output: Tensor,
    x_0: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    prediction: int,
    family: str,
) -> Tensor:
    return torch.empty_like(dense(model_output))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    model_output, x_0, t, table, noise, seeds, ctx.prediction, ctx.family = inputs
    ctx.save_for_backward(model_output, x_0, t, table, noise, seeds)


def _backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
    model_output, x_0, t, table, noise, seeds = ctx.saved_tensors
    grad: Tensor = torch.ops.ddpm_fast.denoising_loss_backward(
        grad_losses, model_output, x_0, t, table, noise, seeds, ctx.prediction, ctx.family
    )
    # The loss sees output - target, so the target's inputs get -grad times their weight in the target.
    grad_x_0 = grad_noise = None
    prediction = reference.PREDICTIONS[ctx.prediction]
    if ctx.needs_input_grad[1]:
        if prediction == "sample":
            grad_x_0 = -grad
        elif prediction == "v_prediction":
            grad_x_0 = (reference.per_sample(table[t, 1], grad) * grad).to(grad.dtype)
        else:
            grad_x_0 = torch.zeros_like(x_0)
    if ctx.needs_input_grad[4]:
        if prediction == "epsilon":
            grad_noise = -grad
        elif prediction == "v_prediction":
            grad_noise = (-reference.per_sample(table[t, 0], grad) * grad).to(grad.dtype)
        else:
            grad_noise = torch.zeros_like(noise)
    return grad, grad_x_0, None, None, grad_noise, None, None, None


_ARGUMENTS = "Tensor model_output, Tensor x_0, Tensor t, Tensor table, Tensor? noise, Tensor? seeds, int prediction, str family"
define(
    "denoising_loss",
    f"({_ARGUMENTS}) -> Tensor",
    _impl,
    _fake,
    _backward,
    _setup_context,
)
define(
    "denoising_loss_backward",
    f"(Tensor grad_losses, {_ARGUMENTS}) -> Tensor",
    _backward_impl,
    _backward_fake,
    no_second_derivative("denoising_loss"),
)
