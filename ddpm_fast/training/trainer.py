"""Training of a given network on a given data set. `train` makes one from its options."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..checks import check_callable, check_int, check_path, check_type, computing_device
from ..distributed import joined
from ..errors import expect, renaming
from ..nn import UNet
from ..nn.unet import describe_images
from ..schedule import NoiseSchedule
from .data import ImageDataset, MappedDataset
from .loop import TrainResult, run_steps
from .options import check_call, check_options, plain_options
from .rng import TrainingRng
from .run_folder import RunFolder
from .starting import Start, check_sizes, prepared
from .state import State, Task

# The options of `train` that a Trainer takes, too.
OPTIONS: Final = (
    *("prediction", "loss_weight", "label_dropout", "flip", "steps", "batch_size", "micro_batch_size"),
    *("lr", "warmup_steps", "lr_decay", "lr_decay_steps", "weight_decay", "clip_grad", "ema_decay"),
    *("precision", "channels_last", "seed", "device", "threads"),
    *("log_every", "sample_every", "sample_steps", "checkpoint_every", "checkpoint_minutes", "keep", "tensorboard"),
)


class Trainer:
    """A resumable training run of your own network, schedule and data set (Algorithm 1 of Ho et al. 2020).

    `run` trains. The other arguments are those of `train`, with the same meanings and defaults. So are the run's folder,
    the checkpoints, and training in several processes.

    An item of the data set is an image, or (image, label). An image is a uint8 tensor [C, H, W], a floating tensor
    [C, H, W] in [-1, 1], or a PIL image. A PIL image is converted to the network's 1, 3 or 4 channels. A label is an
    integer in 0..num_classes-1. A network without classes ignores labels. An item must be a function of its index:
    a random transform makes a resumed run differ from an uninterrupted one. `flip` mirrors images reproducibly.

    Args:
        model: Train this network in place. Its `num_class_embeds` is the number of classes plus one, or None. Its configuration
            gets the data set's `sample_size` and `class_names` if it has none.
        schedule: Use this noise schedule.
        dataset: Train on these images: any map-style data set, with `__len__` and `__getitem__`.
        run_folder: Write to this folder. It must be new or empty unless `run` resumes.
        ema_warmup: Let the moving average forget the first weights soon. Pass False for weights that are trained.
        num_workers: Read items in this many processes. Default: in this one.
        on_step: Call this after each step, in every process, with the number of steps done and the loss as a 0-d tensor.
            Reading the loss of a GPU waits for the step.
        on_checkpoint: Call this in rank 0 after each checkpoint, with its folder.

    Attributes:
        model: The network. After `run` it has the trained weights and is in train mode.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, the network does not fit the images, or the first item is wrong.
    """

    def __init__(
        self,
        model: UNet,
        schedule: NoiseSchedule,
        dataset: Dataset[Any] | ImageDataset,
        *,
        run_folder: str | os.PathLike[str],
        # diffusion
        prediction: Literal["epsilon", "sample", "v_prediction"] = "epsilon",
        loss_weight: Literal["min_snr"] | None = None,
        label_dropout: float = 0.1,
        flip: bool = False,
        # optimisation
        steps: int = 20_000,
        batch_size: int = 64,
        micro_batch_size: int | None = None,
        lr: float = 2e-4,
        warmup_steps: int = 500,
        lr_decay: Literal["linear", "cosine"] = "linear",
        lr_decay_steps: int = 0,
        weight_decay: float = 0.0,
        clip_grad: float = 1.0,
        ema_decay: float = 0.9999,
        ema_warmup: bool = True,
        precision: Literal["float32", "bf16"] = "float32",
        channels_last: bool = True,
        seed: int = 0,
        # machine
        device: str | None = None,
        threads: int | None = None,
        num_workers: int = 0,
        # records
        log_every: int = 50,
        sample_every: int = 1000,
        sample_steps: int | None = None,
        checkpoint_every: int = 0,
        checkpoint_minutes: float = 5.0,
        keep: int = 2,
        tensorboard: bool = True,
        on_step: Callable[[int, Tensor], object] | None = None,
        on_checkpoint: Callable[[Path], object] | None = None,
    ) -> None:
        options = {name: value for name, value in locals().items() if name in (*OPTIONS, "ema_warmup")}
        check_type("Trainer", "model", model, UNet)
        check_type("Trainer", "schedule", schedule, NoiseSchedule)
        check_path("Trainer", "run_folder", run_folder)
        check_int("Trainer", "num_workers", num_workers, 0, 1024)
        check_callable("Trainer", "on_step", on_step)
        check_callable("Trainer", "on_checkpoint", on_checkpoint)
        self._options = plain_options("Trainer", options)
        check_options("Trainer", self._options, schedule.num_timesteps)
        computing_device("Trainer", device)
        _check_model(model)
        self._dataset = _adapted(dataset, model, num_workers)
        _check_fit(model, self._dataset)
        describe_images(model, size=self._dataset.shape[1:], classes=self._dataset.classes)
        self.model = model
        self._schedule, self._folder = schedule, RunFolder(run_folder)
        self._on_step, self._on_checkpoint = on_step, on_checkpoint
        self._ema: UNet | None = None

    @property
    def ema(self) -> UNet:
        """The moving average of the network, in eval mode. It exists from the start of `run`."""
        if self._ema is None:
            raise RuntimeError("Trainer: expected run to be called before ema is read, got no call")
        return self._ema

    def run(
        self,
        *,
        resume: bool = False,
        auto_resume: bool = False,
        max_minutes: float | None = None,
        progress: bool = True,
        data_check: Literal["sample", "exact", "off"] = "sample",
        lock: bool = True,
    ) -> TrainResult:
        """Train until all steps are done, or a signal or `max_minutes` stops the run with a checkpoint.

        The arguments, the result and the errors are those of `train`. An error of a callback ends the run. It is raised
        after a checkpoint is saved.

        Raises:
            ValueError: The resumed run has other options, another network, another schedule or other images, or an item
                is wrong. The message names it.
        """
        check_call("Trainer.run", resume, auto_resume, max_minutes, progress, data_check, lock)
        with joined("Trainer.run") as team:
            start = prepared(self._folder, self._options, team, resume=resume, auto_resume=auto_resume)
            return self._run(start, max_minutes=max_minutes, progress=progress, data_check=data_check, lock=lock)

    def _run(self, start: Start, *, max_minutes: float | None, progress: bool, data_check: str, lock: bool) -> TrainResult:
        """Run in a folder, with processes and a device that are checked."""
        options, weight = self._options, None
        if options["loss_weight"] is not None:
            weight = self._schedule.loss_weight(options["loss_weight"], options["prediction"]).to(start.device, torch.float32)
        task = Task(
            options=start.options,
            model=self.model,
            dataset=self._dataset,
            schedule=self._schedule,
            loss_weight=weight,
            rng=TrainingRng(options["seed"], options["batch_size"]),
            device=start.device,
            team=start.team,
            format=start.format,
            ema_warmup=options["ema_warmup"],
            on_step=self._on_step,
            on_checkpoint=self._on_checkpoint,
        )
        check_sizes(start.run, task)
        state = State.initial(task)
        init = start.options.get("init")  # `train` alone has it
        if init is not None and not start.resume:  # before a folder is made
            start.team.on_first(lambda: state.load_weights(init))
        self._ema = state.ema
        return run_steps(*(start, task, state), max_minutes=max_minutes, progress=progress, data_check=data_check, lock=lock)


def _check_model(model: UNet) -> None:
    """Raise a ValueError unless the network can be trained, and checkpoints can hold it and its optimizer's state."""
    expect(
        model.config["num_class_embeds"] != 1,
        "Trainer",
        "model",
        "to have num_class_embeds = None or the number of classes plus one",
        "1",
    )
    for name, parameter in model.named_parameters():
        expect(
            parameter.dtype == torch.float32,
            "Trainer",
            "model",
            "to be float32",
            f'{parameter.dtype} in {name}; use precision="bf16" for speed',
        )
        expect(parameter.requires_grad, "Trainer", "model", "to have parameters that require gradients", f"{name} without")


def _adapted(dataset: Any, model: UNet, num_workers: int) -> ImageDataset | MappedDataset:
    """Return a data set as training uses it. The network says which images and labels are wanted."""
    if isinstance(dataset, ImageDataset):
        return dataset
    embeds = model.config["num_class_embeds"]
    classes = None if embeds is None else _class_names(dataset, model, embeds - 1)
    with renaming("Trainer"):
        return MappedDataset(dataset, model.config["in_channels"], classes, num_workers)


def _class_names(dataset: Any, model: UNet, number: int) -> tuple[str, ...]:
    """Return names of classes: the network's, those that torchvision's data sets have as `classes`, or numbers."""
    for names in (model.config.get("class_names"), getattr(dataset, "classes", None)):
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
            continue
        if len(names) == number == len(set(names)):
            return tuple(names)
    return tuple(map(str, range(number)))


def _check_fit(model: UNet, dataset: ImageDataset | MappedDataset) -> None:
    """Raise a ValueError unless the network takes the images and labels, and predicts as many channels."""
    channels, height, width = dataset.shape
    for name in ("in_channels", "out_channels"):
        expect(
            model.config[name] == channels,
            "Trainer",
            "model",
            f"to have {name} = {channels}, as the images of dataset",
            model.config[name],
        )
    factor = 2 ** (len(model.config["block_out_channels"]) - 1)
    expect(
        height % factor == 0 and width % factor == 0,
        "Trainer",
        "dataset",
        f"to have images whose sides are multiples of {factor} for the levels of model",
        f"{height}x{width}",
    )
    embeds = model.config["num_class_embeds"]
    expect(
        embeds is None or embeds == len(dataset.classes) + 1,
        "Trainer",
        "model",
        f"to have num_class_embeds = {len(dataset.classes) + 1}, the number of classes plus one",
        embeds,
    )
