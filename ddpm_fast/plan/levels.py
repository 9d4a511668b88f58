"""Noise levels of the samplers that solve the diffusion's differential equation: `dpm_solver_plan` and `heun_plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from ..checks import check_choice, check_int
from ..errors import InvalidValue, expect
from ..options import within
from ..predictions import Prediction
from ..schedule import NoiseSchedule, Objective, objective_of
from .rows import plan_from_columns
from .sampling_plan import SamplingPlan
from .timesteps import checked_tensor, checked_timesteps, spaced_timesteps

LevelSpacing = Literal["linspace", "leading", "trailing", "karras"]

RHO = 7.0  # Karras et al. 2022, section 3 and table 1
Rho = Annotated[float, within(1, 100)]  # a level's relative rounding error grows with rho
Level = Annotated[float | None, within()]
LambdaMin = Annotated[float, within()]
Start = Annotated[int | None, within(low=0)]
_SLACK = 1e-4  # a level may be rounded, such as 0.01 for the lowest one of the linear schedule
_APART = 1 + 1e-6  # closer levels would be equal after the power 1 / rho


@dataclass(frozen=True)
class Levels:
    """The noise levels between which a solver steps, x = alpha x_0 + sigma epsilon.

    Tensors are float64 on the CPU, from the noisiest level to the cleanest.

    Attributes:
        timesteps: The model's t at each level but the last, int64 [S].
        alpha: The weight of x_0, [S + 1].
        sigma: The weight of epsilon, [S + 1].
        num_steps: The number of steps of the whole plan. A plan with a `start` has fewer.
        objective: What the model predicts.
    """

    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor
    num_steps: int
    objective: Objective

    def plan(self, level: Tensor, arrival: Tensor, clip: float | None, **columns: Tensor) -> SamplingPlan:
        """Build a plan whose steps evaluate the model at these levels.

        Args:
            level: The level at the start of each step, int64 [S].
            arrival: The level on arrival, int64 [S].
            clip: The bound on x_0^, or None.
            **columns: The columns but p and q, as in `plan_from_columns`.
        """
        alpha, sigma, t = self.alpha[level], self.sigma[level], self.timesteps[level]
        p, q = self.objective.x_0_weights_at(alpha, sigma, t)
        abar, abar_prev = alpha.square(), self.alpha[arrival].square()
        return plan_from_columns(self.objective, t, abar, abar_prev, clip, p=p, q=q, **columns)


def noise_levels(
    schedule: NoiseSchedule | Objective,
    num_steps: int | None,
    *,
    spacing: LevelSpacing | Sequence[int],
    sigma_min: float | None,
    sigma_max: float | None,
    rho: float,
    final: Literal["zero", "sigma_min"],
    lambda_min: float,
    start: int | None,
    prediction: Prediction | None,
    learned_variance: bool,
    levels: Sequence[float] | None = None,
) -> Levels:
    """Return the levels of these solvers.

    `caller` is the function that error messages name. The other arguments are those of `dpm_solver_plan`, whose signature
    checks their ranges.

    Raises:
        TypeError: An argument has an unsupported type.
        ValueError: An argument is out of range.
    """
    objective = objective_of(schedule, prediction, "learned_range" if learned_variance else None)
    schedule = objective.schedule
    ratios = noise_ratios(schedule.alpha_bars)  # ascending
    expect(len(ratios) >= 2, "schedule", "to have at least 2 timesteps", len(ratios))
    last = count_levels(schedule, lambda_min)
    expect(last >= 2, "lambda_min", f"to be at most {-ratios[1].log():.4g}, lambda at timestep 1", lambda_min)
    if levels is not None:
        ratio = _listed(schedule, levels)
        timesteps = fractional_timesteps(schedule, ratio).round().long()
    elif isinstance(spacing, str) and spacing == "karras":  # an array would be compared item by item
        ratio = _karras(ratios[:last], num_steps, sigma_min, sigma_max, rho)
        timesteps = fractional_timesteps(schedule, ratio).round().long()
    else:
        for name, value, unset in (("sigma_min", sigma_min, None), ("sigma_max", sigma_max, None), ("rho", rho, RHO)):
            expect(value == unset, name, 'to go with spacing="karras"', f"{value!r} with {spacing!r}")
        timesteps = _spaced(last, num_steps, spacing)
        ratio = ratios[timesteps]
    end = ratios[:1] if final == "sigma_min" else torch.zeros(1, dtype=torch.float64)
    ratio = torch.cat([ratio, end])
    # abar = 1 / (1 + ratio^2), and the limits at ratio = inf are exact.
    alpha = 1 / (1 + ratio.square()).sqrt()
    sigma = torch.where(ratio.isinf(), 1.0, ratio * alpha)
    first = 0
    if start is not None:
        listed = timesteps.tolist()
        if start not in listed:
            nearest = min(listed, key=lambda each: abs(each - start))
            raise InvalidValue("start", "to be one of the plan's timesteps", f"{start}; the nearest is {nearest}")
        first = listed.index(start)
    return Levels(timesteps[first:], alpha[first:], sigma[first:], len(timesteps), objective)


def noise_ratios(alpha_bars: Tensor) -> Tensor:
    """Return sigma / alpha."""
    return ((1 - alpha_bars) / alpha_bars).sqrt()


def fractional_timesteps(schedule: NoiseSchedule, levels: Tensor) -> Tensor:
    """Return the timesteps of levels, interpolated in the logarithm of the level, float64 like `levels`."""
    ratios = noise_ratios(schedule.alpha_bars)
    return torch.from_numpy(np.interp(levels.log().numpy(), ratios.log().numpy(), np.arange(len(ratios))))


def level_range(schedule: NoiseSchedule) -> tuple[float, float]:
    """Return the lowest and the highest finite level of a schedule."""
    ratios = noise_ratios(schedule.alpha_bars)
    return float(ratios[0]), float(ratios[ratios.isfinite()][-1])


def count_levels(schedule: NoiseSchedule, lambda_min: float) -> int:
    """Return how many timesteps have lambda >= lambda_min. They are the first ones."""
    return int((-noise_ratios(schedule.alpha_bars).log() >= lambda_min).sum())


def _spaced(last: int, num_steps: int | None, spacing: LevelSpacing | Sequence[int]) -> Tensor:
    """Return timesteps in 0..last - 1, int64 [S], strictly descending, as diffusers' solver rounds them.

    They differ from those of `ddpm_plan`: the last step ends at the final level, so no step starts at timestep 0, except with
    "trailing" (as in diffusers).
    """
    if not isinstance(spacing, str):
        return checked_timesteps(last, num_steps, spacing, True)
    check_choice("spacing", spacing, ("linspace", "leading", "trailing", "karras"))
    if spacing == "trailing":
        return spaced_timesteps(last, _checked_num_steps(num_steps, last), spacing)
    num_steps = _checked_num_steps(num_steps, last - 1)
    descending: np.ndarray
    if spacing == "leading":
        descending = np.arange(num_steps, 0, -1) * (last // (num_steps + 1))
    else:
        descending = np.linspace(0, last - 1, num_steps + 1).round()[1:][::-1]  # torch.compile reads [:0:-1] wrong
    return torch.from_numpy(descending.astype(np.int64))


def _listed(schedule: NoiseSchedule, levels: Sequence[float]) -> Tensor:
    """Return listed levels, sigma / alpha, float64 [S]. Raise unless they descend between the levels of the timesteps."""
    low, high = level_range(schedule)
    wanted = f"to be strictly descending numbers in {low:.6g}..{high:.6g}, the levels of the timesteps"
    listed = checked_tensor("levels", levels, wanted, torch.float64)
    usable = listed.dim() == 1 and listed.numel() > 0 and bool((listed.diff() < 0).all())
    within = usable and low * (1 - _SLACK) <= float(listed[-1]) and float(listed[0]) <= high * (1 + _SLACK)
    expect(within, "levels", wanted, levels)
    return listed


def _karras(ratios: Tensor, num_steps: int | None, sigma_min: float | None, sigma_max: float | None, rho: float) -> Tensor:
    """Return sigma / alpha, evenly spaced after the power 1 / rho (Karras et al. 2022, eq. 5).

    Args:
        ratios: sigma / alpha of each timestep, float64 [T].
        num_steps: The number of steps S.
        sigma_min: The last level. None: that of timestep 0.
        sigma_max: The first level. None: that of the last timestep.
        rho: The exponent.

    Returns:
        float64 [S]. The nearest timesteps of two levels may be one.
    """
    num_steps = _checked_num_steps(num_steps, len(ratios))
    is_whole = not bool(ratios[-1].isinf())
    ratios = ratios[ratios.isfinite()]
    low, high = float(ratios[0]), float(ratios[-1])
    for name, value in (("sigma_min", sigma_min), ("sigma_max", sigma_max)):
        within = value is None or low * (1 - _SLACK) <= value <= high * (1 + _SLACK)
        expect(within, name, f"to be in {low:.6g}..{high:.6g}, the levels of the timesteps", value)
    expect(is_whole or sigma_max is not None, "sigma_max", "to be given, as abar is 0 at the last timestep", sigma_max)
    low = low if sigma_min is None else float(sigma_min)
    high = high if sigma_max is None else float(sigma_max)
    expect(low * _APART < high, "sigma_max", f"to be above the last level, {low:.6g}", high)
    high, low = high ** (1 / rho), low ** (1 / rho)
    return torch.linspace(0, 1, num_steps, dtype=torch.float64).mul(low - high).add(high).pow(rho)


def _checked_num_steps(num_steps: int | None, most: int) -> int:
    """Return the number of steps, or the error that names its range."""
    check_int("num_steps", num_steps, 1, most)
    assert num_steps is not None
    return num_steps
