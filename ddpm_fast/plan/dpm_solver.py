"""DPM-Solver++ (Lu et al. 2022) as a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from ..errors import expect
from ..options import within
from ..predictions import Prediction
from ..schedule import NoiseSchedule, Objective
from .levels import RHO, LambdaMin, Level, LevelSpacing, Rho, Start, noise_levels
from .sampling_plan import Clip, SamplingPlan, builds_plan
from .timesteps import checked_tensor

FEW_STEPS = 15  # plans with fewer steps end with steps of lower order (`lower_order_final`)
FITTED = ("k0", "k1", "k3")  # the columns that `corrections` change
MAX_CORRECTION = 1.0  # in absolute value, as the columns are hardly larger themselves
_STEPS = 20


@builds_plan
def dpm_solver_plan(
    schedule: NoiseSchedule | Objective,
    num_steps: int | None = _STEPS,
    *,
    order: Annotated[int, within(1, 3)] = 2,
    eta: Annotated[float, within(0, 1)] = 0.0,
    solver: Literal["midpoint", "heun"] = "midpoint",
    spacing: LevelSpacing | Sequence[int] = "linspace",
    sigma_min: Level = None,
    sigma_max: Level = None,
    rho: Rho = RHO,
    levels: Sequence[float] | None = None,
    corrections: Sequence[Sequence[float]] | None = None,
    final: Literal["zero", "sigma_min"] = "zero",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    lambda_min: LambdaMin = -math.inf,
    start: Start = None,
    prediction: Prediction | None = None,
    clip: Clip = 1.0,
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

    Order 3 extrapolates from two steps before (appendix B of Lu et al. 2022a, arXiv 2206.00927, in terms of x_0^), where h'' is
    the h of the earlier one:

        D1  = (x_0^ - x_0_prev) h / h'        E1 = (x_0_prev - x_0_prev2) h / h''        D2 = (D1 - E1) h / (h' + h'')
        phi D = phi x_0^ + b (D1 + D2 h' / h) + c D2,        b = 1 - phi / H,  c = 1/2 - b / H,  H = (1 + eta) h

    With eta 1 this plan has c = -1/2 - b / H, as diffusers has it and not as the derivation gives it. It is then less exact
    than order 2.

    The clip acts on x_0^ before it is remembered.

    Args:
        schedule: The noise schedule, with T timesteps, or an objective.
        num_steps: The number of steps S, each one network evaluation: 1..T-1, or 1..T with "trailing" and "karras". None takes
            the length of the list in `spacing`.
        order: 1, 2 or 3. A step of order 2 uses x_0_prev, one of order 3 x_0_prev2 too. The first step has order 1, the second
            at most 2. See `lower_order_final` for the last ones.
        eta: 0 solves the ordinary differential equation, without noise. 1 solves the stochastic one ("sde-dpmsolver++").
            Values between scale the noise. With order 3 it is 0 or 1.
        solver: The estimate of D in steps of order 2: "midpoint", or "heun", which integrates the extrapolation exactly.
        spacing: The timesteps: "linspace", "leading" or "trailing" as in diffusers, "karras" (evenly spaced in
            (sigma / alpha)^(1 / rho), Karras et al. 2022, eq. 5), or a strictly descending sequence in 0..T-1. With "karras"
            the model is given the nearest timestep, and two levels may share one. The noise level is not rounded.
        sigma_min: The level at which the last step starts, as sigma / alpha = sqrt((1 - abar) / abar), with "karras".
            It lies between the levels of the timesteps. None is the level of timestep 0.
        sigma_max: The level at which the first step starts, like `sigma_min`. None is the level of the last timestep.
            A single step starts here. `sample` starts from unit noise at any level.
        rho: The exponent of "karras", 1..100. A larger one puts more levels near `sigma_min`.
        levels: The levels at which the S steps start, as sigma / alpha, strictly descending between those of the timesteps.
            The model is given the nearest timesteps, and the last step ends at x_0. They take the place of `num_steps`,
            `spacing`, `sigma_min`, `sigma_max`, `rho`, `lambda_min` and `final`.
        corrections: What `fit_plan` adds to the columns k0, k1 and k3 of the steps: [S, 3] in -1..1, with `levels`, order 2 and
            eta 0. A plan with `start` leaves the correction of its first step out.
        final: The level at which the last step ends: "zero" is x_0, "sigma_min" is the level of timestep 0, whatever
            the argument `sigma_min` is.
        lower_order_final: In plans of fewer than 15 steps, take order 1 in the last step and at most 2 in the one before.
            With final="zero" the last step always has order 1.
        euler_at_final: Take order 1 in the last step of any plan.
        lambda_min: Leave out timesteps with a smaller lambda. Cosine schedules need -5.1 with orders 2 and 3.
        start: Begin at this timestep of the plan instead of the first, with a step of order 1.
        prediction: The meaning of the model's output, see `Objective`. None: that of an objective, or "epsilon".
        clip: Clamp x_0^ to [-clip, clip]. None disables the clip.
        learned_variance: True if the model's output has variance channels. The solver ignores them.

    Returns:
        The plan, with S rows, or those from `start` on.

    Raises:
        TypeError: An argument has an unsupported type.
        ValueError: An argument is out of range, `start` is not a timestep of the plan, or the model predicts epsilon where abar
            is 0.
    """
    expect(order < 3 or eta in (0, 1), "eta", "to be 0 or 1 with order 3", eta)
    if levels is not None:
        for name, value, default in (
            *(("num_steps", num_steps, _STEPS), ("spacing", spacing, "linspace"), ("final", final, "zero")),
            *(("sigma_min", sigma_min, None), ("sigma_max", sigma_max, None), ("rho", rho, RHO)),
            ("lambda_min", lambda_min, -math.inf),
        ):
            left_out = value is None or (isinstance(value, type(default)) and value == default)
            expect(left_out, name, "to be left out with levels", repr(value))
    chain = noise_levels(
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
        learned_variance=learned_variance,
        levels=levels,
    )
    orders = torch.arange(1, len(chain.timesteps) + 1).clamp(max=order)
    ends_low = lower_order_final and chain.num_steps < FEW_STEPS
    if ends_low:
        orders[-2:] = orders[-2:].clamp(max=2)
    if ends_low or euler_at_final or final == "zero":
        orders[-1] = 1
    alpha, sigma = chain.alpha, chain.sigma
    # Karras's last level is timestep 0 up to rounding, which must not make a step to that level go back.
    h = (alpha / sigma).log().diff().clamp(min=0)  # differences of lambda
    phi = -torch.expm1(-(1 + eta) * h)
    k1, std = sigma[1:] / sigma[:-1], torch.zeros_like(h)
    if eta > 0:
        k1, std = k1 * torch.exp(-eta * h), sigma[1:] * (-torch.expm1(-2 * eta * h)).sqrt()
    change, change_prev = alpha[1:] * _extrapolation(orders, h, phi, eta, solver)
    level = torch.arange(len(h))
    columns = {"k0": alpha[1:] * phi + change, "k1": k1, "k3": change_prev - change, "k4": -change_prev}
    if corrections is not None:
        expect(levels is not None and order == 2 and eta == 0, "corrections", "to go with levels, order 2 and eta 0", "others")
        shape, free = (chain.num_steps, len(FITTED)), "without k3 in the first and last step and k1 in the last"
        wanted = f"to be numbers {[*shape]} in {-MAX_CORRECTION}..{MAX_CORRECTION}, {free}"
        added = checked_tensor("corrections", corrections, wanted, torch.float64).clone()
        usable = added.shape == shape and bool((added.abs() <= MAX_CORRECTION).all())  # NaN is not
        expect(usable and not added[0, 2] and not added[-1, 1:].any(), "corrections", wanted, corrections)
        added = added[-len(h) :]
        if len(h) < chain.num_steps:  # a step that another one preceded is now the first
            added[0] = 0
        columns |= {name: columns[name] + column for name, column in zip(FITTED, added.unbind(1), strict=True)}
    return chain.plan(level, level + 1, clip, sigma=std, **columns)


def _extrapolation(orders: Tensor, h: Tensor, phi: Tensor, eta: float, solver: str) -> Tensor:
    """Return the weights of x_0^ - x_0_prev and of x_0_prev - x_0_prev2 in phi (D - x_0^), float64 [2, S]."""
    # The two ones are not used, because the first step has order 1 and the second at most 2.
    padded = torch.cat([torch.ones(2, dtype=torch.float64), h])
    before, earlier = padded[1:-1], padded[:-2]  # h' and h''
    # A step from a level to itself has h = 0, where 1 - phi / ((1 + eta) h) tends to 0.
    scaled = (1 + eta) * h
    b = torch.where(h > 0, 1 - phi / scaled, 0.0)
    second = phi * h / (2 * before) if solver == "midpoint" else b * h / before
    c = torch.where(h > 0, (0.5 if eta == 0 else -0.5) - b / scaled, 0.0)
    of_d2 = (b * before + c * h) / (before + earlier)
    third, third_prev = (b + of_d2) * h / before, -of_d2 * h / earlier
    zero = torch.zeros_like(h)
    change = torch.where(orders == 3, third, torch.where(orders == 2, second, zero))
    return torch.stack([change, torch.where(orders == 3, third_prev, zero)])
