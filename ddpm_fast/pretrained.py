"""Trained models on disk, including the built-in one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from . import plan
from .checks import check_dtype, check_path, checked_device
from .errors import InvalidValue, expect, renaming
from .files.writing import read_json
from .nn.unet import UNet
from .plan import SamplingPlan
from .resources import no_folder
from .schedule import NoiseSchedule, Objective
from .schedule.objective import checked_columns
from .training.checkpoint import read_state
from .training.export import check_is_unet
from .training.folder import RunFolder

if TYPE_CHECKING:
    from .schemas import Scheduler

_SCHEDULER: Final = "scheduler_config.json"
BUILTIN: Final = Path(__file__).parent / "builtin"
"""Folder of the built-in model: class-conditional, trained by `ddpm-fast train` on Fashion-MNIST padded to 32x32."""


@dataclass(frozen=True)
class Pretrained:
    """A trained model with its sampling settings.

    Attributes:
        model: The network in eval mode, with channels_last weights. `model.config["class_names"]` has the names of
            its classes in the order of their labels. The key is missing if they are unknown.
        objective: The noise schedule of the training, what the network predicts, and the variance of the reverse steps.
            Builders of plans take it.
        clip: Bound on x_0^, or None.
        plan: The plan that `plan.json` in its folder describes, or None without one.
        step: Steps of training, of the checkpoint of a run. None: the folder does not say.
    """

    model: UNet
    objective: Objective
    clip: float | None
    plan: SamplingPlan | None = None
    step: int | None = None

    @property
    def shape(self) -> tuple[int, int | None, int | None]:
        """(C, H, W) of an image that it draws. Height and width are None if the configuration has no `sample_size`.

        Further input channels of the network are those of a condition.
        """
        size = self.model.config["sample_size"]
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return self.model.config["out_channels"] // self.objective.out_channels(1), height, width

    @property
    def condition_channels(self) -> int:
        """Channels of the condition that the network reads after x_t, 0 for none."""
        channels: int = self.model.config["in_channels"] - self.shape[0]
        return channels


def load_builtin(device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> tuple[UNet, NoiseSchedule]:
    """Load the built-in model and its noise schedule. No internet access is needed.

    The model predicts epsilon for 32x32 grey images of garments. Labels 0..9 are T-shirt, trouser,
    pullover, dress, coat, sandal, shirt, sneaker, bag and ankle boot. Label 10 is "no label".

    Args:
        device: Device of the weights. None: the CPU.
        dtype: Dtype of the weights. None: float32.

    Returns:
        The network in eval mode, and its noise schedule.
    """
    check_dtype("load_builtin", "dtype", dtype, optional=True)
    device = None if device is None else checked_device("load_builtin", device)
    model = UNet.from_pretrained(BUILTIN / "unet", dtype=dtype, device=device)
    # A test validates the files of the package, as `load_folder` does with others.
    config = json.loads((BUILTIN / "scheduler" / _SCHEDULER).read_bytes())
    return model.to(memory_format=torch.channels_last), schedule_from_config(config)  # type: ignore[call-overload]


def load_folder(
    path: str | os.PathLike[str], device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Pretrained:
    """Load a trained model from a folder.

    Args:
        path: A folder in diffusers' layout, with unet/ and scheduler/ or the files of both at its root.
            A plan.json beside them becomes `Pretrained.plan`. Or the folder of a training run: the averaged network of
            the newest checkpoint is loaded.
        device: Device of the weights. None: the CPU.
        dtype: Dtype of the weights. None: float32.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, or describes a model that is not supported. The message names it.
    """
    check_path("load_folder", "path", path)
    check_dtype("load_folder", "dtype", dtype, optional=True)
    device = None if device is None else checked_device("load_folder", device)
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"load_folder: expected path to be a folder that holds a model, got {no_folder(path)}")

    def read(folder: Path, network: Path) -> tuple[UNet, Objective, Scheduler]:
        check_is_unet("load_folder", "path", folder)
        return UNet.from_pretrained(network, dtype=dtype, device=device), *_read_scheduler(folder)

    def read_checkpoint(checkpoint: Path) -> tuple[int, tuple[UNet, Objective, Scheduler]]:
        return read_state("load_folder", checkpoint).step, read(checkpoint, checkpoint / "unet_ema")

    run = RunFolder(folder)
    if run.checkpoints.is_dir():
        found = run.read_latest("unet_ema/", read_checkpoint)
        if found is None:
            raise FileNotFoundError(f"load_folder: expected a whole checkpoint in {str(run.checkpoints)!r}, got none")
        step, (model, objective, scheduler) = found
    else:
        step, (model, objective, scheduler) = None, read(folder, folder)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types leave it out
    outputs, doubled = model.config["out_channels"], model.config["out_channels"] == 2 * model.config["in_channels"]
    if doubled and scheduler.variance_type is None:
        objective = replace(objective, variance="learned_range")  # the scheduler is one that ignores variances
    fits = outputs % 2 == 0 if objective.predicts_variance else not doubled
    expect(fits, "load_folder", "variance_type", f"to suit a network of {outputs} output channels", objective.variance)
    loaded = Pretrained(
        model=model,
        objective=objective,
        clip=scheduler.clip_sample_range if scheduler.clip_sample else None,
        step=step,
    )
    return loaded if step is not None else replace(loaded, plan=_read_plan(folder / "plan.json", loaded))


def schedule_from_config(config: Mapping[str, Any]) -> NoiseSchedule:
    """Return the noise schedule that a scheduler_config.json describes.

    Files written by this package describe it under the key "ddpm_fast".

    Args:
        config: The file's keys and values.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is out of range, or "num_train_timesteps" is not the length of the schedule.
    """
    if config.get("ddpm_fast") is None:
        return NoiseSchedule.from_diffusers(config)
    schedule = NoiseSchedule.from_config(config["ddpm_fast"])
    if (length := config.get("num_train_timesteps", schedule.num_timesteps)) != schedule.num_timesteps:
        wanted = f"{schedule.num_timesteps}, as in ddpm_fast"
        raise InvalidValue("schedule_from_config", "num_train_timesteps", f"to be {wanted}", repr(length))
    return schedule


def _read_plan(file: Path, loaded: Pretrained) -> SamplingPlan | None:
    """Return the plan that a plan.json describes, or None if there is no such file."""
    import msgspec

    from .schemas import Plan

    def parse(values: dict[str, Any]) -> SamplingPlan:
        stored = msgspec.convert(values, Plan)
        build = getattr(plan, stored.builder)
        built: SamplingPlan = build(loaded.objective, clip=loaded.clip, **stored.arguments)
        return built

    return read_json("load_folder", file, parse) if file.is_file() else None


def _read_scheduler(folder: Path) -> tuple[Objective, Scheduler]:
    import msgspec

    from .schemas import Scheduler

    def parse(values: dict[str, Any]) -> tuple[Objective, Scheduler]:
        scheduler = msgspec.convert(values, Scheduler)
        kind = checked_columns(scheduler.prediction_type), scheduler.variance_type or "fixed_small"
        with renaming("", {"prediction": "prediction_type"}):
            return Objective(schedule_from_config(values), *kind), scheduler

    for file in (folder / "scheduler" / _SCHEDULER, folder / _SCHEDULER):
        if file.is_file():
            return read_json("load_folder", file, parse)
    raise FileNotFoundError(
        f"load_folder: expected scheduler/{_SCHEDULER} or {_SCHEDULER} in {str(folder)!r}, which has neither"
    )
