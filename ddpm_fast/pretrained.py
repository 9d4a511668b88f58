"""Trained models on disk, including the built-in one."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Unpack

import torch
from torch import Tensor

from .checks import check_float, check_number, check_type, computing_device
from .errors import MissingPath, expect, public, public_methods, renaming
from .files.images import in_range
from .files.models import model_folder, scheduler_file
from .files.writing import read_json, write_json
from .inference import interface_of
from .inference.adapter import weights_digest
from .interface import Interface
from .nn.checkpoint import read_unet_config
from .nn.unet import UNet, describe_images
from .options import checked, taking
from .plan import SamplingPlan, named_plan
from .samplers import DEFAULT_SAMPLER, PlanOptions
from .sampling.sampler import Sampler
from .schedule import Objective
from .training.checkpoint import Checkpoints, read_state
from .training.export import check_is_unet

if TYPE_CHECKING:
    from .schemas import Scheduler

_PLAN: Final = "plan.json"
BUILTIN: Final = Path(__file__).parent / "builtin"
"""Folder of the built-in model: class-conditional, trained by `ddpm-fast train` on Fashion-MNIST padded to 32x32."""

_logger = logging.getLogger(__name__)


@public_methods
@dataclass(frozen=True)
class Pretrained:
    """A trained model with its sampling settings.

        garments = load_builtin()
        images = garments.sampler()(16)  # as `ddpm-fast sample` draws them
        fewer = garments.sampler(sampler="ddim", steps=10)

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

    def __repr__(self) -> str:
        """Return what the model draws, and how, in a few lines."""
        size, found = sum(each.numel() for each in self.model.parameters()), self.interface
        lines = [f"Pretrained: a UNet of {size:,} parameters for images {found.shape}", f"objective: {self.objective}"]
        lines += [str(found.labels)] if found.labels.classes else []
        lines += [f"plan: {len(self.plan)} steps{', fitted' * (self.plan.fit is not None)}"] if self.plan is not None else []
        return "\n".join(lines)

    @property
    def interface(self) -> Interface:
        """The input and output of the network, as its configuration says."""
        return interface_of(self.model, predicts_variance=self.objective.predicts_variance)

    @taking(PlanOptions)
    def sampler(
        self,
        plan: SamplingPlan | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        shape: Sequence[int] | None = None,
        cuda_graph: bool | None = None,
        no_label: int | None = None,
        guidance_scale: float | None = None,
        **options: Unpack[PlanOptions],
    ) -> Sampler:
        """Return a `Sampler` of the model.

        Args:
            plan: The plan. None: that of `build_plan`, with the options.
            dtype: See `Sampler`.
            device: See `Sampler`.
            shape: See `Sampler`.
            cuda_graph: See `Sampler`.
            no_label: See `Sampler`.
            guidance_scale: See `build_plan`. Calls of the Sampler take their own.
            **options: See `PlanOptions`. With a plan there can be none.

        Raises:
            TypeError: An argument has an unsupported type, or is unknown.
            ValueError: An option is out of range, or is given with a plan.
        """
        given = ", ".join(name for name, value in options.items() if value is not None)
        expect(plan is None or not given, "plan", "to be None with options that choose one", given)
        plan = self.build_plan(guidance_scale=guidance_scale, **options)[0] if plan is None else plan
        return Sampler(self.model, plan, dtype=dtype, device=device, shape=shape, cuda_graph=cuda_graph, no_label=no_label)

    @taking(PlanOptions)
    def build_plan(self, *, guidance_scale: float | None = None, **options: Unpack[PlanOptions]) -> tuple[SamplingPlan, str]:
        """Return the plan that options choose, and its name: a name of `SAMPLERS`, or "the model's plan".

        Without options that ask for another, it is the model's plan if it has one, in its number of steps or fewer. In fewer
        steps, a fitted plan is one between its first and its last level that is not fitted.

        Args:
            guidance_scale: The scale with which it will draw, None for 1. A fitted plan is used at its own scale alone.
            **options: See `PlanOptions`.

        Raises:
            TypeError: An option has an unsupported type, or is unknown.
            ValueError: An option is out of range.
        """
        with renaming({"num_steps": "steps"}):
            check_number("guidance_scale", guidance_scale, -1e4, 1e4, optional=True)
            steps = options.get("steps")
            chosen = [name for name, value in options.items() if name != "steps" and value is not None]
            fit = None if self.plan is None else self.plan.fit
            suits = fit is None or fit.guidance_scale == (1.0 if guidance_scale is None else guidance_scale)
            if self.plan is not None and suits and not chosen:
                if steps in (None, self.plan.num_steps):
                    return self.plan, "the model's plan"
                fewer = None if self.plan.builder is None else self.plan.in_steps(steps)
                if fewer is not None and fewer.num_steps <= self.plan.num_steps:
                    return fewer, "the model's plan"
            return named_plan(self.objective, clip=self.clip, **options), options.get("sampler") or DEFAULT_SAMPLER

    def digest(self) -> str:
        """Return the SHA-256 of the network, its objective and the clip, to which a fitted plan belongs."""
        return weights_digest(self.model, self.objective.to_config(), self.clip) or ""

    @checked()
    def save_plan(self, plan: SamplingPlan, folder: str | os.PathLike[str]) -> None:
        """Write a plan to the plan.json of the model's folder, where `load_folder` finds it.

        A fitted plan is used only while the folder holds this network.

        Args:
            plan: A plan of `ddpm_plan`, `ddim_plan`, `dpm_solver_plan` or `heun_plan` for this model, such as that of
                `fit_plan`. Its arguments are plain numbers, texts and lists.
            folder: The folder of the model, or of its training run. It exists.

        Raises:
            ValueError: Another plan would be read, or a fitted plan belongs to a model that was loaded in float32.
        """
        from .schemas import described_plan

        values = described_plan(plan)
        if plan.fit is not None:
            dtype = self.model.conv_in.weight.dtype
            expect(dtype == torch.float32, "model", "to be loaded in float32, for a fitted plan", dtype)
            values["fit"] = vars(plan.fit) | {"network": self.digest()}
        try:
            read = self._read_plan(json.loads(json.dumps(values)))
            same, got = read is not None and torch.equal(read.coefficients, plan.coefficients), "another plan"
        except (TypeError, ValueError) as error:  # among them those of msgspec
            same, got = False, str(error)
        expect(same, "plan", "to be built by a plan's function from plain values, for what this model predicts", got)
        write_json(Path(folder) / _PLAN, values)

    def _read_plan(self, values: dict[str, Any]) -> SamplingPlan | None:
        """Return the plan that the content of a plan.json describes, or None if it was fitted to another network."""
        import msgspec

        from .schemas import Plan

        stored = msgspec.convert(values, Plan)
        if stored.fit is not None and stored.fit.network != self.digest():
            return None
        return stored.build(self.objective, self.clip)

    def to_data(self, images: Tensor) -> Tensor:
        """Map images from [-1, 1] to the numbers of the model's data: its `data_range`, or 0..255 for pictures.

        Args:
            images: Floating [..., C, H, W].

        Returns:
            Floating like `images`. Nothing is rounded or clipped.
        """
        return in_range(images, self._ranges(images)).to(images.dtype)

    def from_data(self, images: Tensor) -> Tensor:
        """Map images from the numbers of the model's data to [-1, 1], the inverse of `to_data`.

        Args:
            images: [..., C, H, W] of any dtype.

        Returns:
            Floating: float32 for integers.
        """
        check_type("images", images, Tensor)
        expect(not images.is_complex(), "images", "to be real", images.dtype)
        images = images if images.is_floating_point() else images.float()
        low, high = images.new_tensor(self._ranges(images), dtype=torch.float64).T[:, :, None, None]  # [C, 1, 1]
        mapped: Tensor = (images - low) * (2 / (high - low)) - 1
        return mapped.to(images.dtype)

    def _ranges(self, images: Tensor) -> Sequence[Sequence[float]]:
        """Return what -1 and 1 stand for. Raise unless the images have the model's channels."""
        check_float("images", images, 3)
        channels = self.interface.channels
        expect(images.shape[-3] == channels, "images", f"to have {channels} channels", list(images.shape))
        return self.model.config.get("data_range") or [(0, 255)]


@public()
def load_builtin(device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Pretrained:
    """Load the built-in model. No internet access is needed.

    The model predicts v for 32x32 grey images of garments. Labels 0..9 are T-shirt, trouser,
    pullover, dress, coat, sandal, shirt, sneaker, bag and ankle boot. Label 10 is "no label".

    Args:
        device: Device of the weights. None: the CPU.
        dtype: Dtype of the weights. None: float32.
    """
    return load_folder(BUILTIN, device, dtype)


@checked()
def load_folder(
    path: str | os.PathLike[str], device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Pretrained:
    """Load a trained model from a folder, or by its name on the Hugging Face hub.

    Args:
        path: A folder in diffusers' layout, with unet/ and scheduler/ or the files of both at its root.
            Or the folder of a training run: the averaged network of the newest checkpoint is loaded. A plan.json in the
            folder becomes `Pretrained.plan`, unless it was fitted to other weights.
            Or "owner/name" or "owner/name@revision", which huggingface_hub downloads, unless there is such a folder, or a
            folder `owner`.
        device: Device of the weights. None: the CPU.
        dtype: Dtype of the weights. None: float32.

    Raises:
        FileNotFoundError: A file is missing.
        OSError: The hub does not have the model, does not give it, or is out of reach.
        ImportError: huggingface_hub is missing.
        ValueError: A file is damaged, or describes a model that is not supported. The message names it.
    """
    device = None if device is None else computing_device(device)

    def check(folder: Path) -> None:
        read_unet_config(folder)
        _read_scheduler(folder)

    folder = model_folder("path", path, check)
    planned = (folder / _PLAN).is_file()

    def read(folder: Path, network: Path) -> tuple[UNet, Objective, Scheduler]:
        check_is_unet("path", folder)
        own = None if planned else dtype  # a fitted plan belongs to weights in float32
        return UNet.from_pretrained(network, dtype=own, device=device), *_read_scheduler(folder)

    def read_checkpoint(checkpoint: Path) -> tuple[int, tuple[UNet, Objective, Scheduler]]:
        return read_state(checkpoint).step, read(checkpoint, checkpoint / "unet_ema")

    checkpoints = Checkpoints(folder)
    if checkpoints.path.is_dir():
        found = checkpoints.read_newest("unet_ema/", read_checkpoint)
        if found is None:
            raise MissingPath("", f"a whole checkpoint in {str(checkpoints.path)!r}", "none")
        step, (model, objective, scheduler) = found
    else:
        step, (model, objective, scheduler) = None, read(folder, folder)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types leave it out
    reads, gives = model.config["in_channels"], interface_of(model).predicted_channels
    kept = model.config.get("variance")
    if scheduler.variance_type is None and (kept or gives == 2 * reads):  # the scheduler is one that ignores variances
        objective = replace(objective, variance=kept or "learned_range")
    fits = gives is not None and (gives % 2 == 0 if objective.predicts_variance else gives != 2 * reads)
    expect(fits, "variance_type", f"to suit a network of {gives} output channels", objective.variance)
    if objective.predicts_variance:  # the scheduler alone may say so
        describe_images(model, None, {"variance": objective.variance})
    loaded = Pretrained(
        model=model,
        objective=objective,
        clip=scheduler.clip,
        step=step,
    )
    if not planned:
        return loaded
    sampling = read_json(folder / _PLAN, loaded._read_plan)
    if sampling is None:
        _logger.warning("%s was fitted to another network, so it is not used: fit again", folder / _PLAN)
    model.to(dtype=dtype or torch.float32)
    return replace(loaded, plan=sampling)


def _read_scheduler(folder: Path) -> tuple[Objective, Scheduler]:
    from .schemas import read_scheduler

    return read_json(scheduler_file(folder), read_scheduler)
