"""Columns of a plan's table that every sampler needs."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..schedule import Objective
from .sampling_plan import COLUMNS, SamplingPlan


def plan_from_columns(
    objective: Objective,
    timesteps: Tensor,
    alpha_bars: Tensor,
    alpha_bars_prev: Tensor,
    clip: float | None,
    prediction: str | None = None,
    variance: Literal["fixed", "learned", "learned_range"] | None = None,
    /,
    **columns: Tensor,
) -> SamplingPlan:
    """Build a plan from its columns.

    Args:
        objective: The noise schedule, and what the model predicts.
        timesteps: The model's t for each step, int64 [S].
        alpha_bars: abar at the start, float64 [S].
        alpha_bars_prev: abar on arrival, float64 [S].
        clip: The bound on x_0^, or None.
        prediction: The name of the model's prediction. None: the objective's.
        variance: The kind of variance, see `SamplingPlan`. None: that of a sampler which has no use for one.
        **columns: Columns by name, float64 [S] each, for a step that computes x_0^. Those left out are 0.
    """
    zero = torch.zeros_like(columns["p"])
    columns = {name: columns.get(name, zero) for name in COLUMNS}
    if clip is None:
        # Without a clip, x_prev is linear in x_t and m: eliminate x_0^ in float64. For DDPM this gives eq. 13,
        #   k1 = 1 / sqrt(alpha)
        #   k2 = -beta / (sqrt(alpha) sqrt(1 - abar))
        # and avoids the cancellation that p causes at large t. Rows that read x_0_prev keep x_0^: they may multiply the
        # difference of the two by hundreds, and both then have the same rounding.
        k0 = torch.where(columns["k3"] == 0, columns["k0"], zero)
        columns["k0"] = columns["k0"] - k0
        columns["k1"] = columns["k1"] + k0 * columns["p"]
        columns["k2"] = columns["k2"] + k0 * columns["q"]
    columns["clip"] = torch.full_like(zero, torch.inf if clip is None else clip)
    coefficients = torch.stack([columns[name] for name in COLUMNS], dim=1)
    kinds = prediction or objective.name, variance or ("learned_range" if objective.predicts_variance else "fixed")
    return SamplingPlan(objective.schedule, timesteps, coefficients, *kinds, alpha_bars_prev, alpha_bars)
