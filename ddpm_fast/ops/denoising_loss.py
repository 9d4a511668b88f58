"""denoising_loss: the denoising loss with noise regenerated in the kernel (eq. 12, Ho et al. eq. 14)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .. import reference
from ..checks import (
    check_choice,
    check_device,
    check_float,
    check_one_of,
    check_range,
    check_storage,
    check_type,
    checked_seeds,
)
from ..dtypes import opmath
from ..errors import InvalidValue
from ..schedule import NoiseSchedule
from .arguments import check_like, index_tensor
from .derivative import gradients_of
from .fused_op import FusedOp, schema_of


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
        any number of times in model_output, x_0, noise and weight.

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
    check_one_of(op, "noise", noise, "seeds", seeds)
    check_type(op, "schedule", schedule, NoiseSchedule)
    check_choice(op, "prediction", prediction, reference.PREDICTIONS)
    check_choice(op, "reduction", reduction, ("mean", "sum", "none"))
    n = x_0.shape[0]
    if weight is not None:
        check_float(op, "weight", weight)
        check_device(op, "weight", weight, "x_0", x_0)
        check_storage(op, "weight", weight)
        if weight.shape != (n,):
            raise InvalidValue(op, "weight", f"to have shape [{n}], one a sample", list(weight.shape))
    t = index_tensor(op, "t", t, schedule.num_timesteps, n, x_0.device)
    if noise is not None:
        check_like(op, "noise", noise, "x_0", x_0)
    if seeds is not None:
        seeds = checked_seeds(op, seeds, n, x_0.device)
    table = schedule._table(x_0.device)
    code = reference.PREDICTIONS.index(prediction)
    losses: Tensor = denoising_loss_op(model_output, x_0, t, table, noise, seeds, code, backend=backend)  # [N]
    if weight is not None:
        losses = losses * weight.to(losses.dtype)
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


def _check(arguments: Any) -> None:
    check_range("denoising_loss", "t", arguments.t, arguments.table.shape[0])


def _gradient_by_reference(model_output: Tensor, *arguments: Any) -> Tensor | None:
    *others, grad_losses = arguments
    return gradients_of(lambda m: reference.denoising_loss(m, *others), (model_output,), grad_losses)[0]


denoising_loss_backward_op = FusedOp(
    "denoising_loss_backward",
    _gradient_by_reference,
    schema=f"{schema_of(reference.denoising_loss)}, Tensor grad_losses",
    outputs={"grad_model_output": lambda a: torch.empty_like(a.model_output)},
    has_triton=True,
    check=_check,
)


def _backward(arguments: Any, results: Any, grads: Any, needs: Any) -> dict[str, Tensor | None]:
    """Return gradients: the loss sees output - target, so inputs of the target get -grad times their coefficient."""
    a = arguments
    grad: Tensor = denoising_loss_backward_op(*a[:-1], grads[0], backend=a.backend)
    gradients: dict[str, Tensor | None] = {"model_output": grad}
    prediction = reference.PREDICTIONS[a.prediction]
    if needs.x_0:
        if prediction == "sample":
            gradients["x_0"] = -grad
        elif prediction == "v_prediction":
            gradients["x_0"] = (reference.per_sample(a.table[a.t, 1], grad) * grad).to(grad.dtype)
        else:
            gradients["x_0"] = torch.zeros_like(a.x_0)
    if needs.noise:
        if prediction == "epsilon":
            gradients["noise"] = -grad
        elif prediction == "v_prediction":
            gradients["noise"] = (-reference.per_sample(a.table[a.t, 0], grad) * grad).to(grad.dtype)
        else:
            gradients["noise"] = torch.zeros_like(a.noise)
    return gradients


denoising_loss_op = FusedOp(
    "denoising_loss",
    reference.denoising_loss,
    outputs={
        "losses": lambda a: a.model_output.new_empty(a.model_output.shape[0], dtype=opmath(a.model_output.dtype)),
    },
    has_triton=True,
    backward=_backward,
    check=_check,
)
