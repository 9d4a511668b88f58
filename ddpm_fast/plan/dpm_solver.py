"""DPM-Solver++ (Lu et al. 2022) as a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..checks import check_choice, check_int, check_number, check_type
from ..schedule import NoiseSchedule
from .levels import RHO, LevelSpacing, noise_levels
from .rows import plan_from_columns, x_0_weights
from .sampling_plan import Prediction, SamplingPlan, builds_plan

FEW_STEPS = 15  # plans with fewer steps end with a step of order 1 (`lower_order_final`)


def measured_options(schedule: NoiseSchedule) -> dict[str, Any]:
    """Return the arguments of `dpm_solver_plan` that draw the best images in 8 steps, or {} if they are not known.

    docs/sampling.md has the measurements, on the built-in model. They hold for its schedule only, `NoiseSchedule.linear()`.
    """
    linear = NoiseSchedule.linear()
    # A folder may have rounded betas.
    if schedule.num_timesteps != linear.num_timesteps or not torch.allclose(schedule.betas, linear.betas, rtol=1e-5, atol=0):
        return {}
    return {"num_steps": 8, "solver": "heun", "spacing": "karras", "sigma_min": 0.06, "sigma_max": 80.0}


@builds_plan
def dpm_solver_plan(
    schedule: NoiseSchedule,
    num_steps: int | None = 20,
    *,
    order: int = 2,
    eta: float = 0.0,
    solver: Literal["midpoint", "heun"] = "midpoint",
    spacing: LevelSpacing | Sequence[int] = "linspace",
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = RHO,
    final: Literal["zero", "sigma_min"] = "zero",
    lower_order_final: bool = True,
    lambda_min: float = -math.inf,
    start: int | None = None,
    prediction: Prediction = "epsilon",
    clip: float | None = 1.0,
    learned_variance: bool = False,
) -> SamplingPlan:
    """Build a plan for DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095).

    With x = alpha x_0 + sigma epsilon and lambda = ln(alpha / sigma), a step goes from level i to level i + 1:

        h   = lambda_{i+1} - lambda_i
        phi = 1 - exp(-(1 + eta) h)
        x   = sigma_{i+1} / sigma_i exp(-eta h) x + alpha_{i+1} phi D + sigma_{i+1} sqrt(1 - exp(-2 eta h)) z

    D is x_0^ for order 1, which is DDIM if eta is 0. Order 2 extrapolates from the x_0^ of the step before, where h' is the h
    of that step ("midpoint", algorithm 2 of the paper):

        D   = x_0^ + h / (2 h') (x_0^ - x_0_prev)

    The clip acts on x_0^ before it is remembered.

    Args:
        schedule: The noise schedule, with T timesteps.
        num_steps: The number of steps S, each one network evaluation: 1..T-1, or 1..T with "trailing" and "karras". None takes
            the length of the list in `spacing`.
        order: 1 or 2. A step of order 2 uses x_0_prev, so the first one has order 1.
        eta: 0 solves the ordinary differential equation, without noise. 1 solves the stochastic one ("sde-dpmsolver++").
            Values between scale the noise.
        solver: The estimate of D: "midpoint", or "heun", which integrates the extrapolation exactly.
        spacing: The timesteps: "linspace", "leading" or "trailing" as in diffusers, "karras" (evenly spaced in
            (sigma / alpha)^(1 / rho), Karras et al. 2022, eq. 5), or a strictly descending sequence in 0..T-1. With "karras"
            the model is told the nearest timestep, and two levels may share one. The noise level is not rounded.
        sigma_min: The level at which the last step starts, as sigma / alpha = sqrt((1 - abar) / abar), with "karras".
            It lies between the levels of the timesteps. None is the level of timestep 0.
        sigma_max: The level at which the first step starts, like `sigma_min`. None is the level of the last timestep.
            A single step starts here. `sample` starts from unit noise at any level.
        rho: The exponent of "karras", 1..100. A larger one puts more levels near `sigma_min`.
        final: The level at which the last step ends: "zero" is x_0, "sigma_min" is the level of timestep 0, whatever
            the argument `sigma_min` is.
        lower_order_final: Take order 1 in the last step of plans of fewer than 15 steps. With final="zero" the last
            step always has order 1.
        lambda_min: Leave out timesteps with a smaller lambda. Cosine schedules need -5.1 with order 2.
        start: Begin at this timestep of the plan instead of the first, with a step of order 1.
        prediction: The meaning of the model's output: "epsilon", "sample" or "v_prediction".
        clip: Clamp x_0^ to [-clip, clip]. None disables the clip.
        learned_variance: True if the model's output has variance channels. The solver ignores them.

    Returns:
        The plan, with S rows, or those from `start` on.

    Raises:
        TypeError: An argument has an unsupported type.
        ValueError: An argument is out of range, `start` is not a timestep of the plan, or the model predicts epsilon where abar
            is 0.
    """
    caller = "dpm_solver_plan"
    check_int(caller, "order", order, 1, 2)
    check_number(caller, "eta", eta, 0, 1)
    check_choice(caller, "solver", solver, ("midpoint", "heun"))
    check_type(caller, "lower_order_final", lower_order_final, bool)
    levels = noise_levels(
        caller,
        schedule,
        num_steps,
        spacing=spacing,
        sigma_min=sigma_min,
        sigma_max=sigma_max,
        rho=rho,
        final=final,
        lambda_min=lambda_min,
        start=start,
        prediction=prediction,
        clip=clip,
        learned_variance=learned_variance,
    )
    second = torch.full_like(levels.timesteps, order == 2, dtype=torch.bool)
    second[0] = False
    if final == "zero" or (lower_order_final and levels.num_steps < FEW_STEPS):
        second[-1] = False
    alpha, sigma = levels.alpha, levels.sigma
    # Karras's last level is timestep 0 up to rounding, which must not make a step to that level go back.
    h = levels.log_snr.diff().clamp(min=0)
    phi = -torch.expm1(-(1 + eta) * h)
    k1, std = sigma[1:] / sigma[:-1], torch.zeros_like(h)
    if eta > 0:
        k1, std = k1 * torch.exp(-eta * h), sigma[1:] * (-torch.expm1(-2 * eta * h)).sqrt()
    extrapolation = torch.where(second, alpha[1:] * _extrapolation(h, phi, eta, solver), 0.0)
    p, q = x_0_weights(prediction, alpha[:-1], sigma[:-1])
    return plan_from_columns(
        schedule,
        levels.timesteps,
        alpha[:-1].square(),
        alpha[1:].square(),
        prediction,
        "learned_range" if learned_variance else "fixed",
        clip,
        p=p,
        q=q,
        k0=alpha[1:] * phi + extrapolation,
        k1=k1,
        k3=-extrapolation,
        sigma=std,
    )


def _extrapolation(h: Tensor, phi: Tensor, eta: float, solver: str) -> Tensor:
    """Return the weight of alpha_{i+1} (x_0^ - x_0_prev) in a step of order 2, float64 [S]. The first is unused."""
    h_prev = torch.cat([torch.ones(1, dtype=torch.float64), h[:-1]])
    if solver == "midpoint":
        return phi * h / (2 * h_prev)
    # A step from a level to itself has h = 0, where 1 - phi / ((1 + eta) h) tends to 0.
    return torch.where(h > 0, 1 - phi / ((1 + eta) * h), 0.0) * h / h_prev
