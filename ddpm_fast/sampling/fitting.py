"""Fitting the numbers of a plan to a slower plan, by forward evaluations of the network alone."""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated, Final, Unpack

import torch
from torch import Tensor

from ..errors import expect
from ..ops.modes import threads_after_fork
from ..options import checked, taking, within
from ..plan import SamplingPlan, dpm_solver_plan
from ..plan.dpm_solver import FITTED, MAX_CORRECTION
from ..plan.levels import fractional_timesteps, level_range, noise_ratios
from ..plan.sampling_plan import Fit, call_of
from .arguments import Request
from .options import DrawOptions
from .progress import progress_bar
from .sampler import Sampler

# A plan's numbers are float64 [4, S]: the logarithms of its levels, and the corrections of FITTED.
_STEP: Final = 0.01  # by which a number moves to find its derivative
_DAMPINGS: Final = (1e-3, 3e-2, 1.0, 30.0, 1000.0)  # Levenberg's, relative to the diagonal
_OTHERS: Final = ("num_steps", "spacing", "sigma_min", "sigma_max", "rho", "lambda_min", "start", "levels", "corrections")


@checked()
@taking(DrawOptions)
def fit_plan(
    sampler: Sampler,
    *,
    teacher: SamplingPlan,
    num_images: Annotated[int, within(1, 1 << 20)] = 32,
    rounds: Annotated[int, within(1, 1000)] = 2,
    **draw: Unpack[DrawOptions],
) -> SamplingPlan:
    """Fit a plan of few steps to a slower plan, so that both draw nearly the same images. Nothing is trained.

    The levels of the S steps are moved, and corrections are added to their columns k0, k1 and k3, by rounds of the Gauss-Newton
    method with Levenberg's damping on the squared differences from the teacher's images. Derivatives are differences, so the
    network only runs forward, in each round about 2 S^2 times for each image. On a CPU, the plan is the same bits for the same
    number of threads.

    A fitted plan suits one network and one scale of guidance. It repeats the teacher's errors.

    Args:
        sampler: A Sampler with the plan to fit, a whole `dpm_solver_plan` of order 2 without noise that ends at x_0. Its levels
            are finite and more than 2 % apart. The model must take timesteps between integers, as float32.
        teacher: A plan without noise that has more steps, such as the same with 8 to 20 steps.
        num_images: Images that the fit sees. As many more validate it: a round that does not bring these nearer to the
            teacher's is not taken, and ends the fit.
        rounds: Most rounds.
        **draw: See `DrawOptions`. Arguments for each image are for 2 `num_images`, of which the second half judges. A callback
            is refused.

    Returns:
        A plan of the same number of steps. `SamplingPlan.fit` says the teacher and the errors.

    Raises:
        ValueError: An argument is out of range or does not fit the model, or the model returns values that are not finite.
        TypeError: An argument has an unsupported type.
    """
    plan, numbers = sampler.plan, _numbers(sampler.plan)
    more, same = f"to have more than the {plan.num_steps} steps of the sampler's plan", "of the sampler's plan"
    for holds, wanted, got in (
        (not teacher.is_random, "to draw no noise", "a plan with noise"),
        (teacher.num_steps > plan.num_steps, more, teacher.num_steps),
        (teacher.schedule == plan.schedule, f"to have the schedule {same}", "another one"),
        (teacher.prediction == plan.prediction, f"to have the prediction {same}", teacher.prediction),
        (teacher.variance == plan.variance, f"to have the variance {same}", teacher.variance),
    ):
        expect(holds, "teacher", wanted, got)
    request, taught = sampler.request(2 * num_images, draw), sampler.with_plan(teacher)
    expect(request.given["callback"] is None, "callback", "to be None", "a function")
    with threads_after_fork(), progress_bar(rounds, "fitting", "round", shown=request.given["progress"]) as bar:
        request = request.changed(progress=False)
        targets, _ = taught.draw(request)
        error, unseen = partial(_error, sampler, request, targets), slice(num_images, 2 * num_images)
        before = least = error(unseen, numbers)
        expect(bool(targets.isfinite().all()) and math.isfinite(before), "model", "to return finite values", "others")
        for _ in range(rounds):
            moved = min(_moves(sampler, request, targets[:num_images], numbers), key=partial(error, slice(num_images)))
            bar.update()
            if not (now := error(unseen, moved)) < least:
                break
            numbers, least = moved, now
    fitted, scale = _built(plan, numbers), request.given["guidance_scale"]
    named = "a plan from coefficients" if teacher.builder is None else call_of(teacher.builder)
    object.__setattr__(fitted, "fit", Fit(named, 1.0 if scale is None else scale, before, least))
    return fitted


def _numbers(plan: SamplingPlan) -> Tensor:
    """Return the numbers of a plan. Raise unless it can be fitted."""
    options = {} if plan.builder is None or plan.builder.func is not dpm_solver_plan else plan.builder.keywords
    whole = options and not plan.is_random and options.get("start") is None and options.get("final", "zero") == "zero"
    wanted = "to have a whole dpm_solver_plan of order 2 without noise that ends at x_0"
    expect(whole and options.get("order", 2) == 2, "sampler", wanted, "another plan")
    added = options.get("corrections") or [[0.0] * len(FITTED)] * plan.num_steps
    numbers = torch.cat([noise_ratios(plan.alpha_bars).log()[None], torch.tensor(added, dtype=torch.float64).T])
    fits = bool(numbers.isfinite().all() and (numbers[0].diff() < -2 * _STEP).all())
    expect(fits, "sampler", "to have finite levels that are more than 2 % apart", numbers[0].exp().tolist())
    return numbers


def _built(plan: SamplingPlan, numbers: Tensor) -> SamplingPlan:
    """Return the plan with other numbers."""
    assert plan.builder is not None
    kept = {name: value for name, value in plan.builder.keywords.items() if name not in _OTHERS}
    return dpm_solver_plan(**kept, levels=numbers[0].exp().tolist(), corrections=numbers[1:].T.tolist())


def _error(sampler: Sampler, request: Request, targets: Tensor, images: slice, numbers: Tensor) -> float:
    """Return the root of the mean squared difference of some images from the teacher's."""
    part = request.part(images, batch_size=request.given["batch_size"])
    drawn, _ = sampler.with_plan(_built(sampler.plan, numbers)).draw(part)
    return float((drawn - targets[images]).double().square().mean().sqrt())


def _moves(sampler: Sampler, request: Request, targets: Tensor, numbers: Tensor) -> list[Tensor]:
    """Return the numbers, and where a round of the Gauss-Newton method moves them, for each damping that keeps the order.

    `targets` are the teacher's images of the first part of the request.
    """
    free = torch.ones_like(numbers, dtype=torch.bool)
    free[2:, -1] = free[3, 0] = False  # the last step keeps x_0^ alone, and the first has none before it
    places, size = free.nonzero().tolist(), request.given["batch_size"]
    steps = _STEP * torch.eye(numbers.numel(), dtype=torch.float64).view(-1, *numbers.shape)[free.flatten()]
    steps[0] *= -1  # the first level may be the highest
    gram, gradient = steps.new_zeros(len(steps), len(steps)), steps.new_zeros(len(steps))
    for i in range(0, len(targets), size):
        batch, kept = slice(i, min(i + size, len(targets))), list[list[Tensor]]()
        run = partial(_run, sampler, request.part(batch), kept)
        drawn = run(_built(sampler.plan, numbers))
        plans = [_built(sampler.plan, numbers + step) for step in steps]
        # A level also ends the step before.
        others = [run(plan, max(at - (row == 0), 0)) for plan, (row, at) in zip(plans, places, strict=True)]
        jacobian = torch.stack([(each - drawn).flatten().double().cpu() for each in others]) / steps.sum(dim=(1, 2))[:, None]
        gram += jacobian @ jacobian.T
        gradient += jacobian @ (drawn - targets[batch]).flatten().double().cpu()
    moves, (low, high) = [numbers], level_range(sampler.plan.schedule)
    for damping in _DAMPINGS:
        step = torch.linalg.solve(
            gram + damping * gram.diag().clamp(min=1e-9 * float(gram.diag().mean()) + 1e-99).diag(), gradient
        )
        moved = numbers.clone()
        moved[free] -= step
        moved[0].clamp_(math.log(low), math.log(high))
        moved[1:].clamp_(_STEP - MAX_CORRECTION, MAX_CORRECTION - _STEP)
        moves += [moved] if bool((moved[0].diff() < -2 * _STEP).all()) else []
    return moves


def _run(sampler: Sampler, request: Request, kept: list[list[Tensor]], plan: SamplingPlan, first: int = 0) -> Tensor:
    """Return the images of a plan, with timesteps between those of the schedule: rounded ones would make derivatives jump.

    Args:
        sampler: The Sampler.
        request: What it draws.
        kept: The state in front of each step, which the first run adds.
        plan: The plan.
        first: Begin with this step. The steps before it are those of the first run.
    """
    t = fractional_timesteps(plan.schedule, noise_ratios(plan.alpha_bars)).to(sampler.device, torch.float32)
    with sampler.with_plan(plan).steps(request, t) as (state, advance):
        tensors = [state.x_t, state.step, *state.history]
        for tensor, value in zip(tensors, kept[first] if first else (), strict=False):
            tensor.copy_(value)
        for step in range(first, plan.num_steps):
            if len(kept) == step:
                kept.append([tensor.clone() for tensor in tensors])
            advance()
        return state.x_t
