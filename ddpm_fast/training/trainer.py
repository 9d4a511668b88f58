"""`Trainer`: training of a given network on a given data set. `train` makes both from options."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..checks import check_callable, check_int, check_path, check_type, checked_bytes
from ..distributed import joined
from ..errors import InvalidValue, expect, renaming
from ..inference import Interface
from ..inference.model import device_and_dtype, evaluation_mode, predict
from ..nn import UNet
from ..nn.unet import describe_images
from ..options import AnyOptions
from ..schedule import NoiseSchedule, Objective
from .data import DATASETS, Checked, DatasetInfo, Degradation, ItemDataset, load_dataset
from .data.items import size_of
from .folder import RunFolder
from .loop import TrainResult, run_steps
from .opening import Start, prepared
from .options import DataOptions, ModelOptions, TrainOptions
from .rng import TrainingRng
from .state import State, Task


class Trainer:
    """A resumable training run of your own network, schedule and data set (Algorithm 1 of Ho et al. 2020).

    `run` trains. The run's folder, the checkpoints, and training in several processes are those of `train`.

    An item of the data set is an image, (image, label), (image, label, condition), or a mapping with these names. An image
    is a uint8 tensor [C, H, W], a floating tensor [C, H, W] in [-1, 1], or a PIL image. A PIL image is converted to the
    network's 1, 3 or 4 channels. A label is an integer in 0..num_classes-1. A network without classes ignores labels. A
    condition is of the image's size: uint8 [K, H, W], which is mapped to [-1, 1], finite floats, or a PIL image. The network
    reads it after the C channels of x_t. An item must be a function of its index: a random transform makes a resumed run
    differ from an uninterrupted one. `flip` mirrors images and conditions reproducibly.

    A network that is no `UNet` is called as model(x_t, t), or model(x_t, t, class_labels) with `num_classes`. It may also
    train on signals [C, L] or volumes [C, D, H, W]. Its checkpoints hold `model.safetensors` and `ema.safetensors`, its
    state_dict and the moving average's. If its forward changes buffers, as that of BatchNorm does, a warning says that
    weights are not bit-identical for other numbers of processes.

    Args:
        model: Train this network in place: a `UNet`, or any module with float32 parameters that predicts what `prediction`
            says. The `num_class_embeds` of a `UNet` is the number of classes plus one, or None. Its configuration gets the
            data set's `sample_size` and `class_names` if it has none.
        schedule: Use this noise schedule. Or an objective, which replaces the options `prediction`, `variance` and
            `loss_weight`; leave them out.
        dataset: Train on these images: any map-style data set, with `__len__` and `__getitem__`.
        options: Train in this way.
        run_dir: Write to this folder. It must be new or empty unless `options` resume a run.
        num_classes: Number of classes of a network that is no `UNet`. It gets labels in 0..num_classes, where num_classes
            is "no label". None: it gets no labels.
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
        model: nn.Module,
        schedule: NoiseSchedule | Objective,
        dataset: Dataset[Any],
        options: TrainOptions,
        run_dir: str | os.PathLike[str],
        *,
        num_classes: int | None = None,
        on_step: Callable[[int, Tensor], object] | None = None,
        on_checkpoint: Callable[[Path], object] | None = None,
    ) -> None:
        check_type("Trainer", "model", model, nn.Module)
        check_int("Trainer", "num_classes", num_classes, 1, optional=True)
        check_type("Trainer", "options", options, TrainOptions)
        self._objective = _objective(schedule, options)
        check_path("Trainer", "run_dir", run_dir)
        check_callable("Trainer", "on_step", on_step)
        check_callable("Trainer", "on_checkpoint", on_checkpoint)
        if options.sample_every:
            total = self._objective.schedule.num_timesteps
            check_int("Trainer", "sample_steps", options.sample_steps, 1, total, optional=True)
        _check_trainable(model)
        if isinstance(model, UNet):
            expect(num_classes is None, "Trainer", "num_classes", "to be None, as model has num_class_embeds", num_classes)
            num_classes = Interface.of(model).no_label
        self._labelled = num_classes is not None
        self._dataset = _adapted(dataset, model, self._objective, num_classes)
        with renaming("Trainer"):
            weights = self._objective.loss_weights
            self._loss_weights = None if self._objective.loss_weight is None else weights
            if self._objective.predicts_variance:
                _ = self._objective.bound_columns  # a ValueError if x_0^ is not determined
                kind = self._dataset.info.dtype
                wanted = "to have uint8 images, as the bound that trains a learned variance is one of 256 grey levels"
                expect(kind == torch.uint8, "", "dataset", wanted, kind)
        if isinstance(model, UNet):
            _check_fit(model, self._dataset.info, self._objective)
            info = self._dataset.info
            describe_images(model, size=info.shape[1:], classes=info.classes, **info.described)
        else:
            _check_call(model, self._dataset.info, self._objective, num_classes)
        self.model = model
        self._options, self._folder = options, RunFolder(run_dir)
        self._on_step, self._on_checkpoint = on_step, on_checkpoint
        self._ema: nn.Module | None = None

    @property
    def ema(self) -> nn.Module:
        """The moving average of the network, in eval mode. It exists from the start of `run`."""
        if self._ema is None:
            raise RuntimeError("Trainer: expected run to be called before ema is read, got no call")
        return self._ema

    def run(self) -> TrainResult:
        """Train until all steps are done, or a signal or `max_minutes` stops the run with a checkpoint.

        An error of a callback ends the run. It is raised after a checkpoint is saved. Only a Trainer whose options resume a run
        can be called again.

        Returns:
            How the call ended.

        Raises:
            ValueError: The resumed run has other options, another network, another schedule or other images, or an item
                is wrong. The message names it. Other errors are those of `train`.
        """
        with joined("Trainer.run") as processes:
            return self._run(prepared(self._folder, self._options, {}, processes))

    def _run(self, start: Start) -> TrainResult:
        """Run in a folder, with processes and a device that are checked."""
        options = start.options
        task = Task(
            options=options,
            data_and_model=start.data_and_model,
            model=self.model,
            labelled=self._labelled,
            dataset=self._dataset,
            objective=self._objective,
            loss_weights=None if self._loss_weights is None else self._loss_weights.to(start.device, torch.float32),
            rng=TrainingRng(options.seed, options.batch_size),
            device=start.device,
            processes=start.processes,
            on_step=self._on_step,
            on_checkpoint=self._on_checkpoint,
        )
        state = State.initial(task)
        if not start.resume:  # before a folder is made
            start.processes.on_first(lambda: state.load_initial_weights(task))
        self._ema = state.ema
        return run_steps(start, task, state)


def _objective(schedule: NoiseSchedule | Objective, options: TrainOptions) -> Objective:
    """Return the objective of a run, which the schedule or the options have."""
    if not isinstance(schedule, Objective):
        with renaming("Trainer"):
            return Objective(schedule, options.prediction, options.variance, options.loss_weight)
    for name in ("prediction", "variance", "loss_weight"):
        given = getattr(options, name)
        left_out = given == getattr(TrainOptions, name)
        expect(left_out, "Trainer", f"options.{name}", "to be left out, as schedule is an Objective", given)
    return schedule


def _check_trainable(model: nn.Module) -> None:
    """Raise a ValueError unless the network can be trained, and checkpoints can hold it and its optimizer's state."""
    if isinstance(model, UNet):
        wanted = "to have num_class_embeds = None or the number of classes plus one"
        expect(Interface.of(model).no_label != 0, "Trainer", "model", wanted, "1")
    for name, parameter in model.named_parameters():
        got = f'{parameter.dtype} in {name}; use precision="bf16" for speed'
        expect(parameter.dtype == torch.float32, "Trainer", "model", "to be float32", got)
        trained = parameter.requires_grad or not isinstance(model, UNet)
        expect(trained, "Trainer", "model", "to have parameters that require gradients", f"{name} without")
    for name, value in model.state_dict().items():
        tensor = isinstance(value, Tensor)
        expect(tensor, "Trainer", "model", "to have a state_dict of tensors", f"a {type(value).__name__} in {name}")
    trained = any(parameter.requires_grad for parameter in model.parameters())
    expect(trained, "Trainer", "model", "to have parameters that require gradients", "none")


def _adapted(dataset: Any, model: nn.Module, objective: Objective, num_classes: int | None) -> ItemDataset:
    """Return a data set as training uses it. The network says which images and labels are wanted."""
    if isinstance(dataset, ItemDataset):
        return dataset
    config, classes = model.config if isinstance(model, UNet) else {}, None
    if num_classes is not None:  # the names are the network's, those that torchvision's data sets have, or numbers
        classes = tuple(map(str, range(num_classes)))
        for names in (getattr(dataset, "classes", None), config.get("class_names")):
            if isinstance(names, (list, tuple)) and all(isinstance(name, str) and name for name in names):
                classes = tuple(names) if len(names) == num_classes == len(set(names)) else classes
    with renaming("Trainer"):
        interface = Interface.from_config(config, predicts_variance=objective.predicts_variance)
        odd = objective.predicts_variance and (interface.predicted_channels or 0) % 2
        wanted = "to have an even number of out_channels, to predict the variance too"
        expect(not odd, "", "model", wanted, interface.predicted_channels)
        return Checked(dataset, interface.channels, classes, interface.read_channels)


def _check_fit(model: UNet, info: DatasetInfo, objective: Objective) -> None:
    """Raise a ValueError unless the network takes the images and labels, and predicts as many channels."""
    for name, value in info.described.items():
        known = model.config.get(name)
        expect(known in (None, value), "Trainer", "dataset", f"to have the {name} of model, {known}", value)
    expect(len(info.shape) == 3, "Trainer", "dataset", "to have images [C, H, W] for a UNet", list(info.shape))
    channels, height, width = info.shape
    reads, of = channels + info.condition_channels, "the images of dataset"
    predicted = f"{of} and their variance" if objective.predicts_variance else of
    interface = Interface.of(model, predicts_variance=objective.predicts_variance)
    for name, found, number, whose in (
        ("out_channels", interface.predicted_channels, objective.out_channels(channels), predicted),
        ("in_channels", interface.read_channels, reads, f"{of} and their conditions" if reads > channels else of),
    ):
        expect(found == number, "Trainer", "model", f"to have {name} = {number}, as {whose}", found)
    factor = interface.multiple
    wanted = f"to have images whose sides are multiples of {factor} for the levels of model"
    expect(height % factor == 0 and width % factor == 0, "Trainer", "dataset", wanted, f"{height}x{width}")
    label, number = interface.no_label, len(info.classes)
    wanted = f"to have num_class_embeds = {number + 1}, the number of classes plus one"
    expect(label in (None, number), "Trainer", "model", wanted, None if label is None else label + 1)


def _check_call(model: nn.Module, info: DatasetInfo, objective: Objective, num_classes: int | None) -> None:
    """Raise a ValueError unless a network takes two items of the data set's shape and predicts the objective's channels."""
    if num_classes is not None:
        number = len(info.classes)
        expect(number == num_classes, "Trainer", "num_classes", f"to be {number}, the classes of dataset", num_classes)
    device, _ = device_and_dtype(model)
    channels, *sides = info.shape
    x = torch.zeros(2, channels + info.condition_channels, *sides, device=device)
    t = torch.zeros(2, dtype=torch.int64, device=device)
    labels = None if num_classes is None else torch.tensor([0, num_classes], device=device)  # the last is "no label"
    returned = [2, objective.out_channels(channels), *sides]
    wanted = f"to take {list(x.shape)}, t [2]{'' if num_classes is None else ' and labels [2]'} and return {returned}"
    try:
        with torch.random.fork_rng([]), evaluation_mode(model), torch.no_grad():
            out = predict(model, x, t, labels)
    except Exception as error:  # whatever the network raises
        raise InvalidValue("Trainer", "model", wanted, error) from error
    got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
    expect(got == returned, "Trainer", "model", wanted, got)


# -------------------------------------------------------------------------------------------------- a run made from options


def train(
    run_dir: str | os.PathLike[str],
    options: TrainOptions | None = None,
    data: DataOptions | None = None,
    model: ModelOptions | None = None,
) -> TrainResult:
    """Train a network on images (Algorithm 1 of Ho et al. 2020).

    The run's folder receives the configuration, the log, grids of samples and checkpoints. Its layout is in
    `ddpm_fast.training.folder`. Ctrl-C, SIGTERM and SIGHUP end the run after the current step and save a
    checkpoint. A process that is killed loses only the steps since the last checkpoint. On a CPU the run keeps freed
    memory for its next step (`kept_memory`).

    Under torchrun, `accelerate launch` or Slurm, all processes make this call and share each batch. They end with the same
    weights. These are bit-identical for any number of processes that is a power of two, with the same `micro_batch_size` and
    `threads`. Rank 0 alone writes to the run's folder, which all processes see.

    Args:
        run_dir: Write to this folder. It must be new or empty unless `options` resume a run.
        options: Train in this way. Default: `TrainOptions()`.
        data: Read these images. Default: `DataOptions()`.
        model: Make this network and noise schedule. Default: `ModelOptions()`.

    Returns:
        How the call ended.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An option differs from the one that the resumed run was started with. Or memory is too small for the
            network or the images.
        OSError: A file cannot be written. The message names the last good checkpoint.
        UnusablePath: `run_dir` is not empty and no run is resumed, or it cannot be written to, or `init` holds no model. It
            is an OSError.
        FileNotFoundError: There is no run to resume.
        FloatingPointError: The loss or the weights are no longer finite.
        BlockingIOError: Another process trains in `run_dir`. Where there are no locks, a warning is logged.
        ProcessLost: Another of the processes has failed or ended. It is a RuntimeError.
    """
    options = TrainOptions() if options is None else options
    data = DataOptions() if data is None else data
    model = ModelOptions() if model is None else model
    for name, value, kind in (("options", options, TrainOptions), ("data", data, DataOptions), ("model", model, ModelOptions)):
        check_type("train", name, value, kind)
    check_path("train", "run_dir", run_dir)
    if model.schedule is None:
        model = replace(model, schedule="flow" if options.prediction == "flow" else "linear")
    if options.sample_every:
        check_int("train", "sample_steps", options.sample_steps, 1, model.num_timesteps, optional=True)
    data, model, run = _with_absolute_paths(data), _with_absolute_paths(model), RunFolder(run_dir)
    with joined("train") as processes:
        start = prepared(run, options, {**data.recorded(), **model.recorded()}, processes)
        stored = run.read_config()["unet"] if start.resume else {}
        # Rank 0 downloads.
        load = partial(_dataset, data, stored)
        dataset = processes.machine_by_machine(load) if data.data in DATASETS else load()
        objective = _objective(getattr(NoiseSchedule, str(model.schedule))(model.num_timesteps), options)
        config = _unet_config(model, dataset.info, objective)
        with torch.random.fork_rng([]):
            torch.manual_seed(TrainingRng(options.seed, options.batch_size).weights_seed)
            with renaming("train", {"block_out_channels": "channels", "attention_head_dim": "head_dim"}):
                network = UNet(**config)
        return Trainer(network, objective.schedule, dataset, options, run_dir)._run(start)


def _with_absolute_paths(options: AnyOptions) -> AnyOptions:
    """Return options whose paths, if they exist, are absolute, so that a run is resumed from any working directory."""
    paths = {name: getattr(options, name, None) for name in ("data", "data_dir", "condition", "init")}
    if Degradation.named(os.fspath(paths["condition"] or "")) is not None:  # a folder may have its name
        del paths["condition"]
    found = {name: path for name, path in paths.items() if path is not None and path not in DATASETS and os.path.exists(path)}
    return replace(options, **{name: os.path.abspath(path) for name, path in found.items()})


def _dataset(data: DataOptions, stored: Mapping[str, Any]) -> ItemDataset:
    """Load the images. A run that is resumed has the ranges of their values in its network's configuration."""
    unknown = None if stored else "measured"
    with renaming("train", {"name": "data", "channels": "colors"}):
        return load_dataset(
            os.fspath(data.data),
            data.data_dir,
            image_size=data.image_size,
            channels=None if data.colors is None else {"grey": 1, "rgb": 3, "rgba": 4}[data.colors],
            data_range=data.data_range or stored.get("data_range", unknown),
            condition=data.condition,
            condition_range=data.condition_range or stored.get("condition_range", unknown),
            skip_broken=data.skip_broken,
            memory=checked_bytes("train", "data_memory", data.data_memory),
        )


def _unet_config(options: ModelOptions, info: DatasetInfo, objective: Objective) -> dict[str, Any]:
    """Return the configuration of the network that the options describe. Raise ValueError if the images do not fit it."""
    channels, height, width = info.shape
    labelled = options.conditional and len(info.classes) > 1
    widths = options.channels
    factor = 2 ** (len(widths) - 1)
    wanted = f"images whose sides are multiples of {factor} for {len(widths)} levels of channels"
    fitting = [-(-side // factor) * factor for side in (height, width)]
    got = f"{width}x{height}; choose another image_size, such as {size_of(fitting)}, or fewer levels: fewer numbers in channels"
    expect(height % factor == 0 and width % factor == 0, "train", "", wanted, got)
    attended = [min(height, width) >> level in options.attention for level in range(len(widths))]
    return {
        "sample_size": height if height == width else [height, width],
        "in_channels": channels + info.condition_channels,
        "out_channels": objective.out_channels(channels),
        "block_out_channels": list(widths),
        "layers_per_block": options.layers,
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attended],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attended)],
        "attention_head_dim": options.head_dim,
        "norm_num_groups": math.gcd(32, *widths),
        "dropout": options.dropout,
        "resnet_time_scale_shift": "scale_shift" if options.scale_shift else "default",
        "num_class_embeds": len(info.classes) + 1 if labelled else None,
        **({"variance": objective.variance} if objective.predicts_variance else {}),
        # Images beside sub-folders make a class without a name.
        **({"class_names": list(info.classes)} if labelled and all(info.classes) else {}),
        # Ho et al.'s choices
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
    }
