"""Ancestral sampling (Ho et al. 2020, Algorithm 2; derivation eq. 13) as a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from ..predictions import Variance
from ..schedule import NoiseSchedule, Objective
from .posterior_path import PosteriorPath
from .sampling_plan import Clip, PlanPrediction, SamplingPlan, builds_plan
from .timesteps import Spacing


@builds_plan
def ddpm_plan(
    schedule: NoiseSchedule | Objective,
    num_steps: int | None = None,
    *,
    spacing: Spacing | Sequence[int] = "leading",
    previous: Sequence[int] | None = None,
    prediction: PlanPrediction | None = None,
    variance: Variance | None = None,
    clip: Clip = 1.0,
) -> SamplingPlan:
    """Build a plan for ancestral sampling (Ho et al. 2020, Algorithm 2; derivation eq. 13).

    Each step uses the posterior of derivation eq. 6-8. A step of a strided plan goes from t to the plan's next timestep s < t
    (Nichol and Dhariwal 2021, section 4):

        alpha = abar_t / abar_s
        beta  = 1 - alpha

    The last step gives the mean, without noise.

    Args:
        schedule: The noise schedule, with T timesteps, or an objective, which also has prediction and variance.
        num_steps: The number of steps S, in 1..T. None takes every timestep. A single step is timestep 0 with "leading" and
            "linspace", as in diffusers. It is T - 1 with "trailing".
        spacing: The timesteps: "leading", "trailing" or "linspace" (Lin et al. 2023, Table 2), or a strictly descending
            sequence in 0..T-1.
        previous: The timestep where each step arrives, below the one where it starts. -1 is x_0. It needs a sequence as
            `spacing`, which may then have any order. None steps to the next timestep of `spacing`.
        prediction: The meaning of the model's output, see `SamplingPlan`. None: that of an objective, or "epsilon".
        variance: The choice of sigma^2: beta~ ("fixed_small"), beta ("fixed_large") or the model's ("learned",
            "learned_range"). The names with "_log" are synonyms. None: that of an objective, or "fixed_small".
        clip: Clamp x_0^ to [-clip, clip]. None disables the clip, and a step is then exactly eq. 13.

    Returns:
        The plan, with S rows.

    Raises:
        TypeError: `schedule` is neither a NoiseSchedule nor an Objective.
        ValueError: An argument is out of range, or the model predicts epsilon where abar is 0.
    """
    path = PosteriorPath(schedule, num_steps, spacing, previous, prediction, clip)
    variance = path.objective.variance if variance is None else variance
    zero = torch.zeros_like(path.beta)
    if path.gives_mean:  # m is the mean, whatever the clip does to x_0^
        k0, k1, k2 = zero, zero, torch.ones_like(zero)
    else:
        k0, k1, k2 = path.from_x_0, path.from_x_t, zero
    sigmas = {"fixed_small": path.beta_tilde.sqrt(), "fixed_large": path.beta.sqrt()}
    sigma = sigmas.get(variance.removesuffix("_log"), torch.ones_like(path.beta))
    sigma[path.previous < 0] = 0
    kind: Literal["fixed", "learned", "learned_range"]
    kind = "fixed" if variance not in ("learned", "learned_range") else variance
    log_variances = (path.beta.clamp(min=1e-20).log(), path.beta_tilde.clamp(min=1e-20).log())
    return path.plan(path.abar_prev, k0=k0, k1=k1, k2=k2, sigma=sigma, log_variances=log_variances, variance=kind)
