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

# The steps of each sampler, if `measured_options` has none. Heun's method evaluates the network twice in each but the last.
DEFAULT_STEPS = {"dpm++2m": 20, "dpm++2m-sde": 20, "ddpm": 100, "ddim": 50, "heun": 10}
_SPACING = {"dpm++2m": "linspace", "dpm++2m-sde": "karras", "ddpm": "leading", "ddim": "leading", "heun": "linspace"}
MAX_GUIDANCE = 1e4  # beyond it, differences of predictions leave the range of float32 within a few steps

_FEW = 10  # with more steps, dpm++2m draws worse images than dpm++2m-sde (docs/sampling.md)
_LAMBDA_MIN = -5.1  # solvers of order 2 leave out timesteps with less signal, as diffusers advises for cosine schedules


def sampler_options(default: str | None) -> Callable[[Command], Command]:
    """Return a decorator that adds the options that choose the sampler. None is the default of `default_sampler`."""
    few = "with dpm++2m and the built-in model's schedule"
    steps = ", ".join(f"{steps} with {name}" for name, steps in DEFAULT_STEPS.items())
    spacings = ", ".join(f"{spacing} with {name}" for name, spacing in _SPACING.items())
    shown = default or f"dpm++2m for at most {_FEW} steps with the built-in model's schedule, else dpm++2m-sde"
    options = [
        click.option(
            "--sampler",
            type=click.Choice([*DEFAULT_STEPS]),
            default=default,
            help="Choose DPM-Solver++(2M) with or without noise, ancestral steps (eq. 13), DDIM or Heun's method.  "
            f"[default: {shown}]",
        ),
        click.option(
            "--steps",
            type=click.IntRange(1),
            help=f"Take this many steps per image.  [default: {steps}; 8 {few}, spaced karras]",
        ),
        click.option(
            "--eta", type=Finite(0), help="Scale the noise of ddim (0 by default) or dpm++2m-sde (1); 0 is deterministic."
        ),
        click.option(
            "--spacing",
            type=click.Choice(["leading", "trailing", "linspace", "karras"]),
            help=f"Choose the spacing of the timesteps.  [default: {spacings}; karras {few}]",
        ),
        click.option(
            "--sigma-min",
            type=Finite(0),
            help=f"Start the last step at this noise level, with --spacing karras.  [default: the lowest; 0.06 {few}]",
        ),
        click.option(
            "--sigma-max",
            type=Finite(0),
            help=f"Start the first step at this noise level, with --spacing karras.  [default: the highest; 80 {few}]",
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


def default_sampler(loaded: Pretrained, steps: int | None, eta: float | None, spacing: str | None) -> str:
    """Return the sampler of a command without --sampler: the one that was measured, if the other options suit it."""
    from ..plan.dpm_solver import measured_options

    few = (steps is None or steps <= _FEW) and eta is None and spacing in (None, "karras")
    return "dpm++2m" if few and measured_options(loaded.schedule) else "dpm++2m-sde"


def plan_of_options(
    command: str,
    loaded: Pretrained,
    sampler: str,
    steps: int | None,
    eta: float | None,
    spacing: Any,
    sigma_min: float | None,
    sigma_max: float | None,
    variance: Any,
) -> SamplingPlan:
    """Build the plan that the options ask for."""
    from ..plan import ddim_plan, ddpm_plan, dpm_solver_plan, heun_plan
    from ..plan.dpm_solver import measured_options

    expect(
        spacing != "karras" or sampler not in ("ddpm", "ddim"),
        command,
        "spacing",
        f"to be leading, trailing or linspace with {sampler}",
        "karras",
    )
    # docs/sampling.md has the measurements that chose the defaults.
    measured = measured_options(loaded.schedule) if sampler == "dpm++2m" and spacing in (None, "karras") else {}
    spacing = spacing or measured.get("spacing", _SPACING[sampler])
    total = loaded.schedule.num_timesteps
    solves = sampler in ("dpm++2m", "dpm++2m-sde", "heun")
    abar = loaded.schedule.alpha_bars
    if solves:  # by the timesteps that `_LAMBDA_MIN` leaves
        total = int(((abar / (1 - abar)).log() / 2 >= _LAMBDA_MIN).sum())
    most = total - 1 if solves and spacing in ("linspace", "leading") else total
    expect(steps is None or steps <= most, command, "steps", f"to be in 1..{most} with {sampler}", steps)
    steps = steps or measured.get("num_steps") or min(DEFAULT_STEPS[sampler], most)
    learned = loaded.predicts_variance
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
    common: dict[str, Any] = {"prediction": loaded.prediction, "clip": loaded.clip, "spacing": spacing}
    if sampler == "ddpm":
        return ddpm_plan(loaded.schedule, steps, variance=variance or loaded.variance, **common)
    common["learned_variance"] = learned
    if sampler == "ddim":
        return ddim_plan(loaded.schedule, steps, eta=eta or 0.0, **common)
    common |= {
        "lambda_min": _LAMBDA_MIN,
        "sigma_min": measured.get("sigma_min") if sigma_min is None else sigma_min,
        "sigma_max": measured.get("sigma_max") if sigma_max is None else sigma_max,
    }
    if sampler == "heun":
        return heun_plan(loaded.schedule, steps, **common)
    if sampler == "dpm++2m":
        return dpm_solver_plan(loaded.schedule, steps, solver="heun" if spacing == "karras" else "midpoint", **common)
    return dpm_solver_plan(loaded.schedule, steps, eta=1.0 if eta is None else eta, solver="heun", **common)


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
