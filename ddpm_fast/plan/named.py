"""Plans of samplers by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Unpack

from ..errors import InvalidValue, expect, renaming
from ..options import checked, checked_options, taking, within
from ..samplers import DEFAULT_SAMPLER, LAMBDA_MIN, SAMPLERS, NamedSampler, PlanOptions
from ..schedule import NoiseSchedule, Objective
from .levels import count_levels
from .sampling_plan import Clip, SamplingPlan


@checked()
@taking(PlanOptions)
def named_plan(objective: Objective, *, clip: Clip = 1.0, **options: Unpack[PlanOptions]) -> SamplingPlan:
    """Build the plan of a sampler of `SAMPLERS`.

    Args:
        objective: What the model predicts.
        clip: Clamp x_0^ to [-clip, clip]. None disables the clip.
        **options: See `PlanOptions`.

    Raises:
        TypeError: An argument has an unsupported type, or is unknown.
        ValueError: There is no such sampler, it does not take an option, or an option is out of range.
    """
    chosen = checked_options(PlanOptions, options)
    name = chosen.pop("sampler") or DEFAULT_SAMPLER
    named = SAMPLERS[name]
    spacing, steps = chosen.pop("spacing") or named.spacing, chosen.pop("steps")
    most = _most_steps(named, objective.schedule, spacing)
    expect(steps is None or steps <= most, "steps", f"to be in 1..{most} with {name}", steps)
    even = spacing != "karras" or "sigma_min" in _arguments(named)
    expect(even, "spacing", f"to be leading, trailing or linspace with {name}", spacing)
    given = {option: value for option, value in chosen.items() if value is not None}
    for option, value in given.items():
        takers = [each for each, known in SAMPLERS.items() if option in _arguments(known)]
        expect(name in takers, option, f"to go with sampler {' or '.join(takers)}", f"{value} with {name}")
    variance = given.get("variance", objective.variance)
    if variance.startswith("learned") != objective.predicts_variance:
        wanted = "learned or learned_range, as the model predicts it"
        wanted = wanted if objective.predicts_variance else "fixed_small or fixed_large for this model"
        raise InvalidValue("variance", f"to be {wanted}", variance)
    arguments = {**named.defaults, **given, **named.fixed, **(named.with_karras if spacing == "karras" else {})}
    with renaming({"num_steps": "steps"}):
        return _builder(named)(objective, steps or min(named.steps, most), spacing=spacing, clip=clip, **arguments)


@checked()
def default_plan(objective: Objective, *, steps: Annotated[int | None, within(low=1)] = None, clip: Clip = 1.0) -> SamplingPlan:
    """Build the plan for models without one of their own: DPM-Solver++(2M) with noise, which corrects a model's errors.

    Args:
        objective: What the model predicts.
        steps: The number of steps. A number above that of the schedule's levels takes every level. None: 20.
        clip: Clamp x_0^ to [-clip, clip]. None disables the clip.

    Raises:
        TypeError: An argument has an unsupported type.
        ValueError: `steps` or `clip` is out of range.
    """
    named = SAMPLERS[DEFAULT_SAMPLER]
    most = _most_steps(named, objective.schedule, named.spacing)
    return named_plan(objective, steps=None if steps is None else min(steps, most), clip=clip)


def _builder(named: NamedSampler) -> Callable[..., SamplingPlan]:
    module, _, function = named.builder.rpartition(".")
    builder: Callable[..., SamplingPlan] = getattr(import_module(f".{module}", __package__), function)
    return builder


def _arguments(named: NamedSampler) -> set[str]:
    """Return the arguments of a sampler's builder that can be chosen."""
    return {*inspect.signature(_builder(named)).parameters} - named.fixed.keys()


def _most_steps(named: NamedSampler, schedule: NoiseSchedule, spacing: str) -> int:
    """Return the largest number of steps. Solvers leave out timesteps with too little signal."""
    if "lambda_min" not in named.fixed:
        return schedule.num_timesteps
    levels = count_levels(schedule, LAMBDA_MIN)
    return levels - 1 if spacing in ("linspace", "leading") else levels
