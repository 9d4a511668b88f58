"""RePaint (Lugmayr et al. 2022) as a plan, for `inpaint`."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch

from ..checks import check_int
from ..options import within
from ..schedule import NoiseSchedule, Objective
from .ddpm import ddpm_plan
from .sampling_plan import COLUMNS, Clip, PlanPrediction, SamplingPlan, builds_plan

_MOST_SAMPLES = 1000  # a row for each evaluation has to fit into memory


@builds_plan
def repaint_plan(
    schedule: NoiseSchedule | Objective,
    num_steps: Annotated[int, within(low=1)] = 250,
    jump_length: int = 10,
    jump_num_sample: Annotated[int, within(1, _MOST_SAMPLES)] = 10,
    *,
    prediction: PlanPrediction | None = None,
    clip: Clip = 1.0,
    learned_variance: bool = False,
) -> SamplingPlan:
    """Build a plan for `inpaint` that jumps back and resamples (Lugmayr et al. 2022, section 4.2 and appendix B).

    The plan samples ancestrally with `num_steps` timesteps. After every `jump_length` steps, it adds the noise of as many
    forward steps and takes the steps again, `jump_num_sample` times in all, so that the painted region fits the known one. A
    jump from timestep s up to t is merged into the step before it, with a = sqrt(abar_t / abar_s):

        x_t = a (k0 x_0^ + k1 x + k2 m) + sqrt(a^2 sigma^2 + 1 - a^2) z

    The defaults evaluate the network 2410 times.

    Args:
        schedule: The noise schedule, with T timesteps, or an objective.
        num_steps: The number of timesteps, 1..T.
        jump_length: The number of steps that a jump goes back, 1..num_steps - 1.
        jump_num_sample: The number of times that each stretch is sampled, 1..1000. 1 never jumps.
        prediction: The meaning of the model's output, see `SamplingPlan`. None: that of an objective, or "epsilon".
        clip: Clamp x_0^ to [-clip, clip]. None disables the clip.
        learned_variance: True if the model's output has variance channels. The plan ignores them.

    Returns:
        The plan, with a row for each network evaluation.

    Raises:
        TypeError: An argument has an unsupported type.
        ValueError: An argument is out of range, or the model predicts epsilon where abar is 0.
    """
    descent = ddpm_plan(schedule, num_steps, prediction=prediction, variance="fixed_small", clip=clip)
    check_int("jump_length", jump_length, 1, num_steps - 1 if jump_num_sample > 1 else descent.schedule.num_timesteps)
    learned = learned_variance or (isinstance(schedule, Objective) and schedule.predicts_variance)
    abar = torch.cat([torch.ones(1, dtype=torch.float64), descent.schedule.alpha_bars[descent.timesteps.flip(0)]])
    # A level counts the steps that are left: x_T is at level num_steps, x_0 at level 0.
    start, arrival = _levels(num_steps, jump_length, jump_num_sample)
    below = start - 1
    rows = descent.coefficients[num_steps - start]
    a = (abar[arrival] / abar[below]).sqrt()  # 1 without a jump
    k, sigma = slice(COLUMNS.index("k0"), COLUMNS.index("k4") + 1), COLUMNS.index("sigma")
    rows[:, k] *= a[:, None]
    rows[:, sigma] = (a.square() * rows[:, sigma].square() + (1 - a.square())).sqrt()
    for column in ("log_beta", "log_beta_tilde"):  # "learned_range" then multiplies sigma by 1
        rows[:, COLUMNS.index(column)] = 0
    return replace(
        descent,
        timesteps=descent.timesteps[num_steps - start],
        coefficients=rows,
        alpha_bars_prev=abar[arrival],
        alpha_bars=abar[start],
        variance="learned_range" if learned else "fixed",
    )


def _levels(num_steps: int, jump_length: int, jump_num_sample: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the levels where steps start and arrive, with jumps, int64 [S] each."""
    # Level 1 is timestep 0, the lowest one from which the paper jumps.
    jumps = dict.fromkeys(range(1, num_steps - jump_length + 1, jump_length), jump_num_sample - 1)
    steps, level = [], num_steps
    while level > 0:
        arrival = level - 1
        if jumps.get(arrival, 0) > 0:
            jumps[arrival] -= 1
            arrival += jump_length
        steps.append((level, arrival))
        level = arrival
    start, arrivals = torch.tensor(steps).unbind(1)
    return start, arrivals
