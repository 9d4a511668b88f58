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
    checked_seeds,
)
from ..dtypes import FLOATS, opmath
from ..errors import expect, public
from ..predictions import TARGETS, Prediction
from ..schedule import NoiseSchedule, Objective, objective_of
from .arguments import check_like, index_tensor
from .derivative import gradients_of
from .fused_op import FusedOp
from .op_spec import Gradient, OpSpec, schema_of


@public(traced=True)
def denoising_loss(
    model_output: Tensor,
    x_0: Tensor,
    t: int | Tensor,
    schedule: NoiseSchedule | Objective,
    *,
    prediction: Prediction | None = None,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    backend: str | None = None,
) -> Tensor:
    """Return the mean squared error between the model's output and its target.

    The target for x_t = q_sample(x_0, t, ...) is a x_0 + b epsilon, with the columns a and b of `Objective`. With `seeds`,
    epsilon is drawn again in the forward and the backward kernel and is never stored. Source: derivation eq. 12 (Ho et al.
    2020, eq. 14).

    Args:
        model_output: Shape of x_0, floating. Cast to x_0's dtype if it differs, as under autocast. With an objective whose
            variance is learned it has twice the channels, of which the first half counts.
        x_0: [N, ...], floating.
        t: Timestep, 0..T-1: an int, or int64 [N]. The same as passed to `q_sample`.
        schedule: Noise schedule, the same as passed to `q_sample`. Or an objective, which also has the prediction. Its loss
            weights are not applied: pass `weight`.
        prediction: Target: "epsilon", "sample" (x_0), "v_prediction" or "flow". None: that of an objective, or "epsilon".
        noise: epsilon, like x_0. Pass either `noise` or `seeds`.
        seeds: int64 [N]. The same as passed to `q_sample`.
        weight: [N], factor of each sample's loss, such as `Objective.loss_weights[t]`. None: 1.
        reduction: "mean" or "sum" of the N losses, or "none" for all of them. Each loss is the mean over
            a sample's elements.
        backend: "native", "triton" or "reference". None: the first that can run, and "reference" inside
            torch.func transforms and forward-mode differentiation.

    Returns:
        A scalar, or [N] for "none". float64 for float64 inputs, float32 for all others. Differentiable
        any number of times in model_output and weight, and in x_0 and noise if the target depends on them.

    Raises:
        ValueError: An argument has an unsupported value, shape or device.
        TypeError: An argument has an unsupported type or dtype.
        BackendUnavailable: The named backend cannot run.
    """
    check_float("x_0", x_0)
    if isinstance(schedule, NoiseSchedule):  # a look-up, as torch.compile cannot trace the computation
        name = "epsilon" if prediction is None else prediction
        check_choice("prediction", name, TARGETS)
        target, factor = schedule.target(name, x_0.device), 1
    else:
        objective = objective_of(schedule, prediction)
        target, factor = objective.on(x_0.device), objective.out_channels(1)
        check_float("x_0", x_0, min_dim=2 if factor > 1 else 1)  # a learned variance doubles the channels
    total = target.table.shape[0]
    model_output, t, seeds = checked_loss(model_output, x_0, t, total, noise, seeds, reduction, factor)
    model_output = model_output if factor == 1 else model_output[:, : x_0.shape[1]]
    if weight is not None:
        check_float("weight", weight)
        check_device("weight", weight, "x_0", x_0)
        check_storage("weight", weight)
        expect(weight.shape == x_0.shape[:1], "weight", f"to have shape [{len(x_0)}], one per sample", list(weight.shape))
    source = (noise, seeds) if target.reads_epsilon else (None, None)
    x = x_0 if target.reads_x_0 else None
    losses: Tensor = denoising_loss_op(model_output, x, t, target.table, *source, backend=backend)  # [N]
    return reduced(losses if weight is None else losses * weight.to(losses.dtype), reduction)


def checked_loss(
    model_output: Tensor,
    x_0: Tensor,
    t: int | Tensor,
    num_timesteps: int,
    noise: Tensor | None,
    seeds: Tensor | None,
    reduction: str,
    factor: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check a loss's arguments besides x_0. Return the model's output in x_0's dtype, the samples' timesteps and seeds.

    Args:
        model_output: As in `denoising_loss`, like the following ones.
        x_0: [N, C, ...].
        t: Timestep.
        num_timesteps: Number of timesteps T.
        noise: epsilon, or None.
        seeds: Seeds, or None.
        reduction: "mean", "sum" or "none".
        factor: Channels that the model predicts for each of x_0's.
    """
    n, *sizes = x_0.shape
    shape = (n, sizes[0] * factor, *sizes[1:]) if factor > 1 else (n, *sizes)
    check_like("model_output", model_output, "x_0", x_0, shape, also=FLOATS)
    model_output = model_output.to(x_0.dtype)
    check_one_of("noise", noise, "seeds", seeds)
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    check_like("noise", noise, "x_0", x_0, optional=True)
    if seeds is not None:
        seeds = checked_seeds(seeds, n, x_0.device)
    return model_output, index_tensor("t", t, num_timesteps, n, x_0.device), seeds


def reduced(losses: Tensor, reduction: str) -> Tensor:
    """Return the losses [N], or their mean or sum."""
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


def _check(arguments: Any) -> None:
    check_range("t", arguments.t, arguments.table.shape[0])


def _gradient_by_reference(model_output: Tensor, *arguments: Any) -> Tensor | None:
    *others, grad_losses = arguments
    return gradients_of(lambda m: reference.denoising_loss(m, *others), (model_output,), grad_losses)[0]


denoising_loss_backward_op = FusedOp(
    OpSpec(
        "denoising_loss_backward",
        _gradient_by_reference,
        schema=f"{schema_of(reference.denoising_loss)}, Tensor grad_losses",
        outputs={"grad_model_output": lambda a: torch.empty_like(a.model_output)},
        has_triton=True,
        check=_check,
    )
)


def _backward(arguments: Any, results: Any, grads: Any, needs: Any) -> dict[str, Tensor | None]:
    """Return gradients: the loss sees output - target, so inputs of the target get -grad times their coefficient."""
    a = arguments
    grad: Tensor = denoising_loss_backward_op(*a[:-1], grads[0], backend=a.backend)
    gradients: dict[str, Tensor | None] = {"model_output": grad}
    for column, name in enumerate(("x_0", "noise")):
        if getattr(needs, name):
            gradients[name] = (-reference.per_sample(a.table[a.t, column], grad) * grad).to(grad.dtype)
    return gradients


denoising_loss_op = FusedOp(
    OpSpec(
        "denoising_loss",
        reference.denoising_loss,
        outputs={
            "losses": lambda a: a.model_output.new_empty(a.model_output.shape[0], dtype=opmath(a.model_output.dtype)),
        },
        has_triton=True,
        gradient=Gradient(_backward),
        check=_check,
    )
)
