"""Samplers by name, and the options that choose among them. Nothing here needs PyTorch, so help texts come at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Final, Literal, TypedDict

from .options import Option, document
from .predictions import Variance

LAMBDA_MIN: Final = -5.1
"""Least ln(alpha / sigma) of a timestep at which solvers of order 2 start, as diffusers advises for cosine schedules."""


@dataclass(frozen=True)
class NamedSampler:
    """A sampler that has a name.

    Attributes:
        builder: The function that builds its plans, as module.function within `ddpm_fast.plan`. It is called as
            builder(objective, num_steps, spacing=..., clip=..., **arguments).
        steps: Number of steps, unless another is chosen.
        spacing: Spacing of the timesteps, unless another is chosen.
        defaults: Arguments of the builder, unless others are chosen.
        fixed: Arguments of the builder that cannot be chosen.
        with_karras: Further arguments with the spacing "karras".
    """

    builder: str
    steps: int
    spacing: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    with_karras: Mapping[str, Any] = field(default_factory=dict)


_SOLVES: Final = {"lambda_min": LAMBDA_MIN}

SAMPLERS: Final[dict[str, NamedSampler]] = {
    "dpm++2m": NamedSampler(
        "dpm_solver.dpm_solver_plan", 20, "linspace", fixed=_SOLVES | {"eta": 0.0}, with_karras={"solver": "heun"}
    ),
    "dpm++2m-sde": NamedSampler(
        "dpm_solver.dpm_solver_plan", 20, "karras", defaults={"eta": 1.0}, fixed=_SOLVES | {"solver": "heun"}
    ),
    "ddpm": NamedSampler("ddpm.ddpm_plan", 100, "leading"),
    "ddim": NamedSampler("ddim.ddim_plan", 50, "leading"),
    "heun": NamedSampler(
        "heun.heun_plan", 10, "linspace", fixed=_SOLVES
    ),  # evaluates the network twice in each step but the last
}
"""Samplers of `named_plan` and of the command line. A new one is a line here and a module that builds its plans."""

DEFAULT_SAMPLER: Final = "dpm++2m-sde"
"""The sampler of models without a plan of their own. Its noise corrects a model's errors."""

_plan = partial(Option, "Sampler")


def _listed(attribute: str) -> str:
    return ", ".join(f"{getattr(each, attribute)} with {name}" for name, each in SAMPLERS.items())


class PlanOptions(TypedDict, total=False):
    """The options that choose a plan. None of them has to be given."""

    sampler: Annotated[
        str | None,
        _plan(
            "Choose DPM-Solver++(2M) with or without noise, ancestral steps (eq. 13), DDIM or Heun's method. "
            f"Default: the plan in the model's folder, or {DEFAULT_SAMPLER}.",
            choices=tuple(SAMPLERS),
        ),
    ]
    steps: Annotated[
        int | None,
        _plan(f"Take this many steps per image. Default: {_listed('steps')}, or as the model's plan if that is used.", low=1),
    ]
    eta: Annotated[float | None, _plan("Scale the noise of ddim (default: 0) or dpm++2m-sde (1); 0 is deterministic.", low=0)]
    spacing: Annotated[
        Literal["leading", "trailing", "linspace", "karras"] | None,
        _plan(f"Choose the spacing of the timesteps. Default: {_listed('spacing')}."),
    ]
    sigma_min: Annotated[
        float | None,
        _plan("Start the last step at this noise level, with karras spacing. Default: the lowest.", low=0),
    ]
    sigma_max: Annotated[
        float | None,
        _plan("Start the first step at this noise level, with karras spacing. Default: the highest.", low=0),
    ]
    order: Annotated[int | None, _plan("Choose the order of dpm++2m or dpm++2m-sde. Default: 2.", low=1, high=3)]
    variance: Annotated[Variance | None, _plan("Choose the variance of ddpm's steps. Default: the model's.")]


document(PlanOptions)
