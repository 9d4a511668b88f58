"""Fitting the numbers of a plan to a slower plan, by forward evaluations of the network alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Final, Unpack

import torch
from torch import Tensor

from ..errors import expect, renaming
from ..inference.model import evaluation_mode
from ..options import checked, taking, within
from ..plan import SamplingPlan, dpm_solver_plan
from ..plan.dpm_solver import FITTED
from ..plan.levels import fractional_timesteps, noise_ratios
from ..plan.sampling_plan import Fit, call_of
from .arguments import Request
from .options import DrawOptions
from .progress import progress_bar
from .sampler import Sampler

_STEP: Final = 0.01  # by which a number moves to find its derivative
# Levenberg's damping, relative to the diagonal. The next one is tried if the images do not come nearer by this factor.
_DAMPINGS: Final = (1e-3, 3e-2, 1.0)
_NEARER: Final = 0.98
# The arguments of `dpm_solver_plan` that a fitted plan keeps.
_KEPT: Final = ("schedule", "solver", "prediction", "clip", "learned_variance", "lower_order_final", "euler_at_final")


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
    network only runs forward: in each round about 2 S^2 times for each image. The plan is the same bits for the same number of
    threads.

    A fitted plan suits one network and one scale of guidance. It repeats the teacher's errors.

    Args:
        sampler: A Sampler with the plan to fit, a `dpm_solver_plan` of order 2 without noise.
        teacher: A plan without noise that has more steps, such as the same with 8 to 20 steps.
        num_images: Images that the fit sees. As many others judge it: a round that does not bring these nearer to the teacher's
            is not taken, and ends the fit.
        rounds: Most rounds.
        **draw: See `DrawOptions`. Arguments for each image are for 2 `num_images`, of which the second half judges. A callback
            is refused.

    Returns:
        A plan of the same number of steps. `SamplingPlan.fit` says the teacher and the errors.

    Raises:
        ValueError: An argument is out of range or does not fit the model, or the model returns values that are not finite. Of
            the latter the teacher's images tell, before the fit.
        TypeError: An argument has an unsupported type.
    """
    plan = sampler.plan
    build, numbers = _builder(plan)
    expect(not teacher.is_random, "fit_plan", "teacher", "to draw no noise", "a plan with noise")
    more = f"to have more than the {plan.num_steps} steps of the sampler's plan"
    expect(teacher.num_steps > plan.num_steps, "fit_plan", "teacher", more, teacher.num_steps)
    fits = teacher.prediction == plan.prediction and torch.equal(teacher.schedule.alpha_bars, plan.schedule.alpha_bars)
    expect(fits, "fit_plan", "teacher", "to have the schedule and the prediction of the sampler's plan", "another one")
    with renaming("fit_plan"):
        request, taught = sampler._request("fit_plan", 2 * num_images, draw), sampler.with_plan(teacher)
    expect(request.given["callback"] is None, "fit_plan", "callback", "to be None", "a function")
    targets, _ = taught._draw(request)
    expect(bool(targets.isfinite().all()), "fit_plan", "model", "to return finite values", "others")
    fitting = _Fitting(sampler, request.changed(progress=False), targets, build)
    seen, unseen = range(num_images), range(num_images, 2 * num_images)
    before = error = fitting.error(numbers, unseen)
    with progress_bar(rounds, "fitting", "round", shown=request.given["progress"]) as bar:
        for _ in range(rounds):
            moved = fitting.moved(numbers, seen)
            found = fitting.error(moved, unseen)
            bar.update()
            if not found < error:
                break
            numbers, error = moved, found
    fitted, scale = build(numbers), request.given["guidance_scale"]
    named = "a plan from coefficients" if teacher.builder is None else call_of(teacher.builder)
    object.__setattr__(fitted, "fit", Fit(named, 1.0 if scale is None else scale, before, error))
    return fitted


def _builder(plan: SamplingPlan) -> tuple[Callable[[Tensor], SamplingPlan], Tensor]:
    """Return a function that builds plans from their numbers, and the numbers of a plan.

    They are float64 [4, S]: the logarithms of the levels, and the corrections of FITTED.
    """
    options = {} if plan.builder is None or plan.builder.func is not dpm_solver_plan else dict(plan.builder.keywords)
    fits = options and options.get("order", 2) == 2 and not plan.is_random and options.get("final", "zero") == "zero"
    wanted = "to have a whole dpm_solver_plan of order 2 without noise that ends at x_0"
    expect(fits and "start" not in options, "fit_plan", "sampler", wanted, "another plan")
    kept = {name: value for name, value in options.items() if name in _KEPT}
    ratios = noise_ratios(plan.schedule.alpha_bars)
    low, high = float(ratios[0]), float(ratios[ratios.isfinite()][-1])

    def build(numbers: Tensor) -> SamplingPlan:
        levels = numbers[0].exp().clamp(low, high)
        return dpm_solver_plan(**kept, levels=levels.tolist(), corrections=numbers[1:].T.tolist())

    corrections = torch.tensor(options.get("corrections") or [[0.0] * len(FITTED)] * plan.num_steps, dtype=torch.float64)
    return build, torch.cat([noise_ratios(plan.alpha_bars).log()[None], corrections.T])


class _Fitting:
    """Images that plans draw from the same noise, next to the teacher's.

    Args:
        sampler: The Sampler.
        request: What it draws.
        targets: The teacher's images, [N, C, H, W].
        build: Builds a plan from its numbers.
    """

    def __init__(self, sampler: Sampler, request: Request, targets: Tensor, build: Callable[[Tensor], SamplingPlan]) -> None:
        self._sampler, self._request, self._targets, self._build = sampler, request, targets, build

    def error(self, numbers: Tensor, images: range) -> float:
        """Return the root of the mean squared difference of some images from the teacher's."""
        some = slice(images.start, images.stop)
        part = self._request.part(some, batch_size=self._request.given["batch_size"])
        drawn, _ = self._sampler.with_plan(self._build(numbers))._draw(part)
        return float((drawn - self._targets[some]).double().square().mean().sqrt())

    def moved(self, numbers: Tensor, images: range) -> Tensor:
        """Return the numbers after a round of the Gauss-Newton method, with the first damping that suffices, or the best."""
        free = torch.ones_like(numbers, dtype=torch.bool)
        free[2:, -1] = free[3, 0] = False  # the last step keeps x_0^ alone, and the first has none before it
        gram, gradient = self._normal_equations(numbers, free, images)
        scale, least = gram.diag().diag(), 1e-9 * gram.diag().mean() * torch.eye(len(gram), dtype=torch.float64)
        here = lowest = self.error(numbers, images)
        best = numbers
        for damping in _DAMPINGS:
            moved = numbers.clone()
            moved[free] -= torch.linalg.solve(gram + damping * scale + least, gradient)
            error = self.error(moved, images) if bool((moved[0].diff() < 0).all()) else here
            if error < lowest:
                lowest, best = error, moved
            if lowest < _NEARER * here:
                break
        return best

    def _normal_equations(self, numbers: Tensor, free: Tensor, images: range) -> tuple[Tensor, Tensor]:
        """Return J J^T and J r, float64 [P, P] and [P], with the images' derivatives J and differences from the teacher's r."""
        places, sampler, request = free.nonzero().tolist(), self._sampler, self._request
        gram, gradient = (torch.zeros(*shape, dtype=torch.float64) for shape in ([len(places)] * 2, [len(places)]))
        step, size = torch.zeros_like(numbers), request.given["batch_size"]
        for first in images[::size]:
            batch = slice(first, min(first + size, images.stop))
            chain = _Chain(sampler, request.part(batch))
            drawn, rows = chain.run(self._build(numbers)), []
            for column, row in places:
                step.zero_()[column, row] = _STEP
                moved = chain.run(self._build(numbers + step), max(row - (column == 0), 0))  # a level ends the step before
                rows.append(((moved - drawn) / _STEP).double().flatten().cpu())
            jacobian = torch.stack(rows)
            gram += jacobian @ jacobian.T
            gradient += jacobian @ (drawn - self._targets[batch]).double().flatten().cpu()
        return gram, gradient


class _Chain:
    """A batch on its way from x_T, with timesteps between those of the schedule: rounded ones would make derivatives jump.

    Args:
        sampler: The Sampler.
        request: What it draws.
    """

    def __init__(self, sampler: Sampler, request: Request) -> None:
        self._sampler, self._scale = sampler, request.given["guidance_scale"]
        self._state = sampler._new_loop(request.num_samples, request).state
        inputs = (request.labels, request.given["x_T"], request.given["condition"])
        self._start: Any = (request.seeds.to(sampler.device), *(None if x is None else x.to(sampler.device) for x in inputs))
        self._kept: list[list[Tensor]] = []

    def run(self, plan: SamplingPlan, first: int = 0) -> Tensor:
        """Return the images of a plan, from a step on which the plan before it reached in the same way."""
        state, sampler = self._state, self._sampler
        tensors = [state.x_t, *state.history]
        t = fractional_timesteps(plan.schedule, noise_ratios(plan.alpha_bars)).to(sampler.device, torch.float32)
        with sampler._turns.taken(), evaluation_mode(sampler.network), torch.inference_mode():
            advance = sampler._adapter.bind_at(t, plan, state, self._scale)
            state.start(*self._start)
            state.step.fill_(first)
            for tensor, value in zip(tensors, self._kept[first] if first else (), strict=False):
                tensor.copy_(value)
            for step in range(first, plan.num_steps):
                if len(self._kept) == step:
                    self._kept.append([tensor.clone() for tensor in tensors])
                advance()
            return state.x_t.clone()
