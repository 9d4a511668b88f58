"""Heun's method for the probability flow (Karras et al. 2022, Algorithm 1) as a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..errors import expect
from ..predictions import Prediction
from ..schedule import NoiseSchedule, Objective
from .levels import RHO, LambdaMin, Level, LevelSpacing, Rho, Start, noise_levels
from .sampling_plan import Clip, SamplingPlan, builds_plan


@builds_plan
def heun_plan(
    schedule: NoiseSchedule | Objective,
    num_steps: int | None = 10,
    *,
    spacing: LevelSpacing | Sequence[int] = "linspace",
    sigma_min: Level = None,
    sigma_max: Level = None,
    rho: Rho = RHO,
    lambda_min: LambdaMin = -math.inf,
    start: Start = None,
    prediction: Prediction | None = None,
    clip: Clip = 1.0,
    learned_variance: bool = False,
) -> SamplingPlan:
    """Build a plan for Heun's method without noise (Karras et al. 2022, Algorithm 1).

    A step of the method takes an Euler step to the next level, evaluates the model there, and corrects the step by the change
    of x_0^. The last step is Euler's, as it ends without noise. A plan of S steps therefore has 2 S - 1 rows, and each is one
    network evaluation. With ratio = sigma / alpha, the rows are:

        x   = sigma_{i+1} / sigma_i x + (alpha_{i+1} - alpha_i sigma_{i+1} / sigma_i) x_0^
        x   = x + alpha_{i+1} (ratio_i / ratio_{i+1} - 1) / 2 (x_0^ - x_0_prev)

    Args:
        schedule: The noise schedule, with T timesteps, or an objective.
        num_steps: The number of steps S, as in `dpm_solver_plan`.
        spacing: The timesteps, as in `dpm_solver_plan`.
        sigma_min: The level at which the last step starts, as in `dpm_solver_plan`.
        sigma_max: The level at which the first step starts, as in `dpm_solver_plan`.
        rho: The exponent of "karras", as in `dpm_solver_plan`.
        lambda_min: Leave out timesteps with a smaller lambda, as in `dpm_solver_plan`.
        start: Begin at this timestep of the plan instead of the first.
        prediction: The meaning of the model's output, see `Objective`. None: that of an objective, or "epsilon".
        clip: Clamp x_0^ to [-clip, clip]. None disables the clip.
        learned_variance: True if the model's output has variance channels. The method ignores them.

    Returns:
        The plan, with 2 S - 1 rows, or those from `start` on.

    Raises:
        TypeError: An argument has an unsupported type.
        ValueError: An argument is out of range, `start` is not a timestep of the plan, or abar is 0 at its first timestep.
    """
    levels = noise_levels(
        schedule,
        num_steps,
        spacing=spacing,
        sigma_min=sigma_min,
        sigma_max=sigma_max,
        rho=rho,
        final="zero",
        lambda_min=lambda_min,
        start=start,
        prediction=prediction,
        learned_variance=learned_variance,
    )
    alpha, sigma, t = levels.alpha, levels.sigma, levels.timesteps
    expect(
        float(alpha[0]) != 0,
        "",
        "abar to be above 0 at the first timestep",
        f"0 at {int(t[0])}: pass a finite lambda_min",
    )
    # Row 2 i is the Euler step from level i, and row 2 i + 1 the correction at level i + 1.
    rows = 2 * len(t) - 1
    euler = torch.arange(rows) % 2 == 0
    level = (torch.arange(rows) + 1) // 2  # where the model is evaluated
    ratio = sigma / alpha
    shrink = sigma[1:] / sigma[:-1]
    change = alpha[1:-1] * (ratio[:-2] / ratio[1:-1] - 1) / 2
    k0, k1, k3 = torch.zeros(rows).double(), torch.ones(rows).double(), torch.zeros(rows).double()
    k0[euler], k1[euler] = alpha[1:] - alpha[:-1] * shrink, shrink
    k0[~euler], k3[~euler] = change, -change
    return levels.plan(level, torch.arange(rows) // 2 + 1, clip, k0=k0, k1=k1, k3=k3)
