"""Options that choose the sampler and the classes, for `sample` and `edit`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import click

from ..errors import InvalidValue, expect
from .options import VARIANCES, Command, Finite, adding

if TYPE_CHECKING:
    from ..plan import SamplingPlan
    from ..pretrained import Pretrained

# The steps of each sampler. Heun's method evaluates the network twice in each but the last.
DEFAULT_STEPS = {"dpm++2m": 20, "dpm++2m-sde": 20, "ddpm": 100, "ddim": 50, "heun": 10}
_SPACING = {"dpm++2m": "linspace", "dpm++2m-sde": "karras", "ddpm": "leading", "ddim": "leading", "heun": "linspace"}
MAX_GUIDANCE = 1e4  # beyond it, differences of predictions leave the range of float32 within a few steps
_DEFAULT = "dpm++2m-sde"


def sampler_options(default: str | None) -> Callable[[Command], Command]:
    """Return a decorator that adds the options that choose the sampler. None: the plan of the model, or dpm++2m-sde."""
    own = "" if default else "the plan in the model's folder, or "
    steps = ", ".join(f"{steps} with {name}" for name, steps in DEFAULT_STEPS.items())
    spacings = ", ".join(f"{spacing} with {name}" for name, spacing in _SPACING.items())
    options = [
        click.option(
            "--sampler",
            type=click.Choice([*DEFAULT_STEPS]),
            default=default,
            help="Choose DPM-Solver++(2M) with or without noise, ancestral steps (eq. 13), DDIM or Heun's method.  "
            f"[default: {own}{default or _DEFAULT}]",
        ),
        click.option(
            "--steps",
            type=click.IntRange(1),
            help=f"Take this many steps per image.  [default: {own}{steps}]",
        ),
        click.option(
            "--eta", type=Finite(0), help="Scale the noise of ddim (0 by default) or dpm++2m-sde (1); 0 is deterministic."
        ),
        click.option(
            "--spacing",
            type=click.Choice(["leading", "trailing", "linspace", "karras"]),
            help=f"Choose the spacing of the timesteps.  [default: {spacings}]",
        ),
        click.option(
            "--sigma-min",
            type=Finite(0),
            help="Start the last step at this noise level, with --spacing karras.  [default: the lowest]",
        ),
        click.option(
            "--sigma-max",
            type=Finite(0),
            help="Start the first step at this noise level, with --spacing karras.  [default: the highest]",
        ),
        click.option(
            "--variance", type=click.Choice(VARIANCES), help="Choose the variance of ddpm's steps.  [default: the model's]"
        ),
    ]
    return adding(options)


def class_options(default: str) -> Callable[[Command], Command]:
    """Return a decorator that adds the options that choose the classes and the guidance. Help names the default."""
    options = [
        click.option(
            "--classes",
            help=f"Draw these classes in turn: names or numbers with commas, or none for no label.  [default: {default}]",
        ),
        click.option(
            "--guidance",
            type=Finite(-MAX_GUIDANCE, MAX_GUIDANCE),
            help="Set the scale of classifier-free guidance; any but 1 doubles the cost.  [default: 1]",
        ),
    ]
    return adding(options)


def plan_of_options(
    command: str,
    loaded: Pretrained,
    sampler: str | None,
    steps: int | None,
    eta: float | None,
    spacing: Any,
    sigma_min: float | None,
    sigma_max: float | None,
    variance: Any,
) -> tuple[SamplingPlan, str]:
    """Build the plan that the options ask for. Return it with the sampler's name.

    Without options that ask for another, it is the plan that the model brings, in its number of steps or fewer.
    """
    from ..plan import ddim_plan, ddpm_plan, dpm_solver_plan, heun_plan
    from ..plan.dpm_solver import LAMBDA_MIN, count_levels, default_plan

    objective = loaded.objective
    own, asked = loaded.plan, any(each is not None for each in (sampler, eta, spacing, sigma_min, sigma_max, variance))
    if own is not None and own.builder is not None and not asked:
        fewer = own if steps is None else own.builder(num_steps=steps)
        if fewer.num_steps <= own.num_steps:
            return fewer, "the model's plan"
    sampler = sampler or _DEFAULT

    expect(
        spacing != "karras" or sampler not in ("ddpm", "ddim"),
        command,
        "spacing",
        f"to be leading, trailing or linspace with {sampler}",
        "karras",
    )
    spacing = spacing or _SPACING[sampler]
    solves = sampler in ("dpm++2m", "dpm++2m-sde", "heun")
    schedule = objective.schedule
    total = count_levels(schedule) if solves else schedule.num_timesteps
    most = total - 1 if solves and spacing in ("linspace", "leading") else total
    expect(steps is None or steps <= most, command, "steps", f"to be in 1..{most} with {sampler}", steps)
    steps = steps or min(DEFAULT_STEPS[sampler], most)
    learned = objective.predicts_variance
    if variance is not None and variance.startswith("learned") != learned:
        wanted = (
            "learned or learned_range, as the model predicts it" if learned else "fixed_small or fixed_large for this model"
        )
        raise InvalidValue(command, "variance", f"to be {wanted}", variance)
    expect(
        variance is None or sampler == "ddpm", command, "variance", "to go with --sampler ddpm", f"{variance} with {sampler}"
    )
    expect(
        eta is None or sampler in ("ddim", "dpm++2m-sde"),
        command,
        "eta",
        "to go with --sampler ddim or dpm++2m-sde",
        f"{eta} with {sampler}",
    )
    wanted = "to go with --spacing karras" if solves else "to go with --sampler dpm++2m, dpm++2m-sde or heun"
    for name, value in (("sigma_min", sigma_min), ("sigma_max", sigma_max)):
        expect(value is None or spacing == "karras", command, name, wanted, f"{value} with {spacing if solves else sampler}")
    common: dict[str, Any] = {"clip": loaded.clip, "spacing": spacing}
    if sampler == "ddpm":
        return ddpm_plan(objective, steps, variance=variance, **common), sampler
    if sampler == "ddim":
        return ddim_plan(objective, steps, eta=eta or 0.0, **common), sampler
    common |= {"lambda_min": LAMBDA_MIN, "sigma_min": sigma_min, "sigma_max": sigma_max}
    if sampler == "heun":
        return heun_plan(objective, steps, **common), sampler
    if sampler == "dpm++2m":
        return dpm_solver_plan(objective, steps, solver="heun" if spacing == "karras" else "midpoint", **common), sampler
    return default_plan(objective, steps, eta=1.0 if eta is None else eta, **common), sampler


def labels_of_option(
    command: str, loaded: Pretrained, classes: str | None, num: int, *, each: bool = False
) -> list[int] | None:
    """Return a label for each image, the classes in turn. Return None for "no label" or a model without classes.

    With `each`, a class that would get no image is an error.
    """
    from ..sampling.arguments import labels_of

    config = loaded.model.config
    embeddings = config["num_class_embeds"]
    names = [name.lower() for name in config.get("class_names", ())]
    unlabelled = classes == "none" and "none" not in names  # a class may be called none
    if unlabelled or (classes is None and embeddings is None):
        return None
    expect(embeddings is not None, command, "classes", "to be none, as the model has no classes", repr(classes))
    count = embeddings - 1  # the last is "no label"
    chosen = list(range(count))
    if classes is not None:
        entries = [part.strip() for part in classes.split(",")]
        numbered = [int(entry) if entry.isdecimal() and entry not in names else entry for entry in entries]
        chosen = cast("list[int]", labels_of(command, config, numbered))
        if max(chosen) >= count:
            raise InvalidValue(command, "classes", f"to be in 0..{count - 1}", max(chosen))
    if each and len(chosen) > num:
        wanted = "one class" if num == 1 else f"at most {num} classes"
        raise InvalidValue(command, "classes", f"to be {wanted}, as there are no more images", repr(classes))
    return [chosen[i % len(chosen)] for i in range(num)]
