"""DDIM and its inversion (Song et al. 2021) as plans."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch

from ..errors import InvalidValue, expect
from ..options import within
from ..schedule import NoiseSchedule, Objective
from .posterior_path import PosteriorPath
from .rows import plan_from_columns
from .sampling_plan import Clip, PlanPrediction, SamplingPlan, builds_plan
from .timesteps import Spacing


@builds_plan
def ddim_plan(
    schedule: NoiseSchedule | Objective,
    num_steps: int | None = 50,
    *,
    spacing: Spacing | Sequence[int] = "leading",
    previous: Sequence[int] | None = None,
    prediction: PlanPrediction | None = None,
    eta: Annotated[float, within(low=0)] = 0.0,
    clip: Clip = 1.0,
    use_clipped_model_output: bool = True,
    final_alpha_bar: Annotated[float, within(above=0, high=1)] = 1.0,
    learned_variance: bool = False,
) -> SamplingPlan:
    """Build a plan for DDIM (Song et al. 2021, eq. 12 and 16).

    The sampler is deterministic if eta is 0. It has the variance of ancestral sampling if eta is 1. With a clip, epsilon
    follows from the clipped x_0^:

        epsilon^ = (x_t - sqrt(abar_t) x_0^) / sqrt(1 - abar_t)

    Args:
        schedule: The noise schedule, with T timesteps, or an objective.
        num_steps: The number of steps S, as in `ddpm_plan`.
        spacing: The timesteps, as in `ddpm_plan`.
        previous: The timestep where each step arrives, as in `ddpm_plan`.
        prediction: The meaning of the model's output, see `SamplingPlan`. None: that of an objective, or "epsilon".
        eta: The scale of sigma, at least 0. An eta that is too large for a step is an error that names the largest one.
        clip: Clamp x_0^ to [-clip, clip]. None disables the clip.
        use_clipped_model_output: Derive epsilon again from the clipped x_0^, as guided-diffusion does. False keeps the
            model's own epsilon, which is diffusers' default. It tends to leave more noise. Both agree without a clip.
        final_alpha_bar: abar after the last step, in (0, 1]. The default 1 arrives at x_0. Latent diffusion uses abar_0
            ("set_alpha_to_one": false in diffusers).
        learned_variance: True if the model's output has variance channels. DDIM ignores them.

    Returns:
        The plan, with S rows.

    Raises:
        TypeError: `schedule` is neither a NoiseSchedule nor an Objective.
        ValueError: An argument is out of range, or the model predicts epsilon where abar is 0.
    """
    path = PosteriorPath(schedule, num_steps, spacing, previous, prediction, clip, learned_variance, final_alpha_bar)
    sigma = eta * path.beta_tilde.sqrt()
    if bool((sigma.square() > 1 - path.abar_prev).any()):
        noisy = path.beta_tilde > 0
        largest = float(((1 - path.abar_prev) / path.beta_tilde)[noisy].min().sqrt())
        raise InvalidValue(
            "eta",
            f"to be at most {math.floor(largest * 1e4) / 1e4}, which leaves sigma_t^2 at most 1 - abar_prev at every step",
            eta,
        )
    # Without a clip both epsilons are equal. The model's own needs no division by sqrt(1 - abar).
    rederive = use_clipped_model_output and clip is not None
    return path.ddim(path.abar_prev, sigma, rederive)


@builds_plan
def ddim_inversion_plan(
    schedule: NoiseSchedule | Objective,
    num_steps: int | None = 50,
    *,
    evaluate_at: Literal["start", "arrival"] = "start",
    spacing: Spacing | Sequence[int] = "leading",
    previous: Sequence[int] | None = None,
    prediction: PlanPrediction | None = None,
    clip: Clip = 1.0,
    initial_alpha_bar: Annotated[float, within(above=0, high=1)] = 1.0,
    learned_variance: bool = False,
) -> SamplingPlan:
    """Build a plan for DDIM inversion, from an image to its x_T (Song et al. 2021, section 4.3).

    The plan runs DDIM with eta = 0 backwards. The timesteps ascend. With evaluate_at="start" the image counts as x_0 at the
    first timestep, each step goes to the next larger timestep, and the last goes to abar = 0 (guided-diffusion). With
    evaluate_at="arrival" the image is at abar = 1, each step goes to the timestep that the model is given, and the last
    arrives at the timestep where `ddim_plan` begins (diffusers' DDIMInverseScheduler).

    Args:
        schedule: The noise schedule, with T timesteps, or an objective.
        num_steps: The number of steps S, as in `ddpm_plan`.
        evaluate_at: The timestep that the model is given: that of the state ("start"), or that where the step arrives
            ("arrival").
        spacing: The timesteps, as in `ddpm_plan`. A sequence descends here too.
        previous: The timestep where each step starts with evaluate_at="arrival", below the one of `spacing` where it arrives.
            -1 is the image. It needs a sequence as `spacing`, which may then have any order. None starts at the next timestep
            of `spacing`. The rows come in the reverse order of `spacing`.
        prediction: The meaning of the model's output, see `SamplingPlan`. "arrival" needs "epsilon", "v_prediction" or
            "flow", or "sample" with an initial_alpha_bar below 1.
        clip: Clamp x_0^ to [-clip, clip]. None disables the clip. With "start", epsilon is derived again from the clipped
            x_0^. With "arrival" it is the model's own, as x_0^ does not determine it at abar = 1. `ddim_plan` with a clip does
            not undo that, so pass None to both.
        initial_alpha_bar: abar of an image with evaluate_at="arrival", in (0, 1]. Latent diffusion uses abar_0
            ("set_alpha_to_one": false in diffusers).
        learned_variance: True if the model's output has variance channels. DDIM ignores them.

    Returns:
        The plan, with S rows.

    Raises:
        TypeError: `schedule` is neither a NoiseSchedule nor an Objective.
        ValueError: An argument is out of range, or the model predicts epsilon where abar is 0.
    """
    expect(
        evaluate_at != "start" or initial_alpha_bar == 1,
        "initial_alpha_bar",
        'to be 1 with evaluate_at="start"',
        initial_alpha_bar,
    )
    expect(evaluate_at != "start" or previous is None, "previous", 'to be None with evaluate_at="start"', previous)
    path = PosteriorPath(schedule, num_steps, spacing, previous, prediction, clip, learned_variance, initial_alpha_bar)
    zero = torch.zeros_like(path.abar)
    if evaluate_at == "start":
        plan = path.ddim(torch.cat([zero[:1], path.abar[:-1]]), zero, True)
    else:
        plan = _evaluated_at_arrival(path)
    return replace(
        plan,
        timesteps=plan.timesteps.flip(0),
        coefficients=plan.coefficients.flip(0),
        alpha_bars_prev=plan.alpha_bars_prev.flip(0),
        alpha_bars=plan.alpha_bars.flip(0),
    )


def _evaluated_at_arrival(path: PosteriorPath) -> SamplingPlan:
    """Return the inversion that gives the model the timestep where a step arrives, in the order of the path."""
    signal, noise = path.abar_prev.sqrt(), (1 - path.abar_prev).sqrt()  # a step starts at the cleaner end
    p, q = path.objective.x_0_weights_at(signal, noise, path.timesteps)
    from_x_t, from_m = path.objective.epsilon_weights_at(signal, noise, path.timesteps)
    expect(
        bool(from_m.isfinite().all()) and not path.gives_mean,
        "prediction",
        'to be "epsilon", "v_prediction" or "flow", or "sample" with initial_alpha_bar below 1, with evaluate_at="arrival", '
        "as an image alone does not determine epsilon",
        repr("previous_sample" if path.gives_mean else path.objective.name),
    )
    columns = {"k0": path.signal, "k1": path.noise * from_x_t, "k2": path.noise * from_m}  # path.noise weighs epsilon^
    return plan_from_columns(path.objective, path.timesteps, path.abar_prev, path.abar, path.clip, p=p, q=q, **columns)
