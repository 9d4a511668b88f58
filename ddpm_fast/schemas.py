"""Schemas of the JSON files that the package reads. A network's config.json has its schema in `UNetConfig`.

Only functions that read files import this module, so that `import ddpm_fast` needs no msgspec.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct
from msgspec import field as declared

from . import plan
from .checks import MAX_TIMESTEPS, as_json
from .errors import ArgumentError, InvalidValue, expect, renaming
from .nn.config import UNetConfig
from .plan import SamplingPlan
from .plan.sampling_plan import Fit
from .predictions import Prediction, Variance
from .schedule import Objective
from .schedule.noise_schedule import schedule_from_config
from .schedule.objective import checked_columns

Finite = Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
Size = Annotated[int, Meta(ge=0)]
Count = Annotated[int, Meta(ge=1)]
Builder = Literal["ddpm_plan", "ddim_plan", "dpm_solver_plan", "heun_plan"]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class Scheduler(Struct, frozen=True):
    """The scheduler_config.json of a scheduler of diffusers or of this package. Other keys are ignored."""

    num_train_timesteps: Annotated[int, Meta(ge=1, le=MAX_TIMESTEPS)] | None = None
    beta_schedule: str = "linear"
    beta_start: Finite | None = None
    beta_end: Finite | None = None
    trained_betas: Annotated[list[Finite], Meta(max_length=MAX_TIMESTEPS)] | None = None
    rescale_betas_zero_snr: bool = False
    prediction_type: Prediction | list[list[Finite]] = "epsilon"
    variance_type: Variance | None = None  # DPM-Solver has null
    clip_sample: bool | None = True
    clip_sample_range: Annotated[float, Meta(gt=0, le=sys.float_info.max)] = 1.0
    thresholding: bool = False
    # The schedule, as `NoiseSchedule.from_config` checks it.
    own: dict[str, Any] | None = declared(default=None, name="_ddpm_fast")

    def __post_init__(self) -> None:
        expect(not self.thresholding, "thresholding", "to be false", "true")

    @property
    def clip(self) -> float | None:
        """The bound on x_0^ in a plan."""
        return self.clip_sample_range if self.clip_sample else None


def read_scheduler(values: Mapping[str, Any]) -> tuple[Objective, Scheduler]:
    """Return the objective that a scheduler_config.json describes, and its other values."""
    scheduler = msgspec.convert(values, Scheduler)
    kind = checked_columns(scheduler.prediction_type), scheduler.variance_type or "fixed_small"
    wanted = "to be learned_range or fixed, as diffusers means a variance by learned, and ddpm_plan its logarithm"
    expect(scheduler.variance_type != "learned" or scheduler.own, "variance_type", wanted, "learned")
    with renaming({"prediction": "prediction_type"}):
        return Objective(schedule_from_config(values), *kind), scheduler


SAID_ELSEWHERE = frozenset({"schedule", "prediction", "variance", "learned_variance", "clip"})  # by the model's other files


class Plan(Struct, frozen=True, forbid_unknown_fields=True):
    """The plan.json of a model: a function that builds plans, and its arguments besides what the model's other files say."""

    builder: Builder
    arguments: dict[str, Any]
    fit: Fit | None = None

    def __post_init__(self) -> None:
        known = SAID_ELSEWHERE & self.arguments.keys()
        expect(not known, "arguments", "to leave out what the model's other files say", ", ".join(known))
        # Corrections for another network would spoil the images.
        wanted = "to go with a fit, which says to which network they belong"
        expect(self.fit or not self.arguments.get("corrections"), "corrections", wanted, "none")
        numbers = () if self.fit is None else (self.fit.guidance_scale, self.fit.error_before, self.fit.error)
        expect(all(map(math.isfinite, numbers)), "fit", "to have finite numbers", numbers)

    def build(self, objective: Objective, clip: float | None) -> SamplingPlan:
        """Return the plan, for what the model's other files say."""
        built: SamplingPlan = getattr(plan, self.builder)(objective, clip=clip, **self.arguments)
        object.__setattr__(built, "fit", self.fit and replace(self.fit, network=""))
        return built


def described_plan(described: SamplingPlan) -> dict[str, Any]:
    """Return the content of a plan.json without a fit. It is empty for a plan from coefficients."""
    builder = described.builder
    if builder is None:
        return {}
    arguments = {name: value for name, value in builder.keywords.items() if name not in SAID_ELSEWHERE}
    return {"builder": builder.func.__name__, "arguments": as_json(arguments)}


class Dataset(Struct, frozen=True):
    """The description of a run's data set."""

    images: Count
    shape: Annotated[list[Count], Meta(min_length=2)]  # C, H, W
    classes: Annotated[list[str], Meta(min_length=1)]  # "" is a class without a name
    preparation: str
    fingerprint: dict[Literal["sample", "exact"], Sha256]
    condition: str | None = None
    condition_range: list[list[Finite]] | None = None
    data_range: list[list[Finite]] | None = None

    def __post_init__(self) -> None:
        expect(len(set(self.classes)) == len(self.classes), "classes", "to be without repetitions", self.classes)


class RunConfig(Struct, frozen=True):
    """The config.json of a training run."""

    starter: Literal["train", "Trainer"]
    options: dict[str, Any]
    objective: dict[str, Any]
    dataset: Dataset
    threads: int | None
    versions: dict[str, str]
    unet: dict[str, Any] | None = None
    network: str | None = None  # the class of a network that is no `UNet`

    def __post_init__(self) -> None:
        expect((self.unet is None) != (self.network is None), "unet", "to be there, or network", "both or neither")
        for field, parse in (("unet", UNetConfig.from_dict), ("objective", Objective.from_config)):
            try:
                parse(getattr(self, field) or {})
            except ArgumentError as error:
                raise (error.renamed(name=f"{field}.{error.name}") if error.name else error) from error.__cause__


class StoredFile(Struct, frozen=True):
    """A file of a checkpoint."""

    size: Size
    sha256: Sha256


class Checkpoint(Struct, frozen=True):
    """The state.json of a checkpoint."""

    step: Size
    files: dict[str, StoredFile]
    seconds: Annotated[float, Meta(ge=0, le=sys.float_info.max)] = 0.0
    losses: list[Finite] = []
    row: list[int | Finite] | None = None  # a row that is not in log.csv yet

    def __post_init__(self) -> None:
        for name in self.files:
            if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or "\0" in name:
                raise InvalidValue("files", "to lie in the checkpoint's folder", repr(name))


class SampleManifest(Struct, frozen=True):
    """The manifest of images that `write_samples` has written: manifest.json in a folder, or the comment of an .npz."""

    format: Literal[1]
    kind: Literal["folder", "npz"]
    num_samples: Count
    shape: Annotated[list[Count], Meta(min_length=3, max_length=3)]  # C, H, W
    seed: int
    batch_size: Count
    guidance_scale: Finite | None
    dtype: str
    plan: Sha256
    weights: Sha256 | None
    labels: Sha256 | None
    condition: Sha256 | None = None
