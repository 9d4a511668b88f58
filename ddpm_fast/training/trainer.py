"""`Trainer`: training of a given network on a given data set. `train` makes both from options."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from ..checks import check_callable, check_type
from ..data.degradation import Degradation
from ..data.options import DataOptions
from ..data.published import DATASETS
from ..distributed import joined
from ..errors import public_methods
from ..options import AnyOptions, checked, within
from ..schedule import NoiseSchedule, Objective
from .log import Logger
from .loop import TrainResult, run_steps
from .options import ModelOptions, TrainOptions
from .preparation import built_from, prepared, run_objective
from .run import RunFolder, open_run
from .state import State
from .task import Task


@public_methods
class Trainer:
    """A resumable training run of your own network, schedule and data set (Algorithm 1 of Ho et al. 2020).

    `run` trains. The run's folder, the checkpoints, and training in several processes are those of `train`.

    An item of the data set is an image, (image, label), (image, label, condition), or a mapping with these names. An image
    is a uint8 tensor [C, H, W], a floating tensor [C, H, W] in [-1, 1], or a PIL image. A PIL image is converted to the
    network's 1, 3 or 4 channels. A label is an integer in 0..num_classes-1. A network without classes ignores labels. A
    condition is of the image's size: uint8 [K, H, W], which is mapped to [-1, 1], finite floats, or a PIL image. The network
    reads it after the C channels of x_t. An item must depend on its index alone, because a random transform makes a
    resumed run differ from an uninterrupted one. `flip` mirrors images and conditions reproducibly.

    A network that is no `UNet` is called as model(x_t, t), or model(x_t, t, class_labels) with `num_classes`. It may also
    train on signals [C, L] or volumes [C, D, H, W]. Its checkpoints hold `model.safetensors` and `ema.safetensors`, its
    state_dict and the moving average's. If its forward changes buffers, as that of BatchNorm does, a warning says that
    weights are not bit-identical for other numbers of processes.

    Args:
        model: Train this network in place: a `UNet`, or any module with float32 parameters that predicts what `prediction`
            says. The `num_class_embeds` of a `UNet` is the number of classes plus one, or None. Its configuration gets the
            data set's `sample_size`, `class_names` and `no_label` if it has none.
        schedule: Use this noise schedule. Or an objective, which replaces the options `prediction`, `variance` and
            `loss_weight`; leave them out.
        dataset: Train on these images: any map-style data set, with `__len__` and `__getitem__`.
        options: Train with these options.
        run_dir: Write to this folder. It must be new or empty unless `options` resume a run.
        num_classes: Number of classes of a network that is no `UNet`. It gets labels in 0..num_classes, where num_classes
            is "no label". None: it gets no labels.
        on_step: Call this after each step, in every process, with the number of steps done and the loss as a 0-d tensor.
            Reading the loss of a GPU waits for the step.
        on_checkpoint: Call this in rank 0 after each checkpoint, with its folder.
        loggers: Give the rows of the log and the images of grids to these, too, in rank 0.

    Attributes:
        model: The network. After `run` it has the trained weights and is in train mode.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, the network does not fit the images, or the first item is wrong.
    """

    @checked()
    def __init__(
        self,
        model: nn.Module,
        schedule: NoiseSchedule | Objective,
        dataset: Dataset[Any],
        options: TrainOptions,
        run_dir: str | os.PathLike[str],
        *,
        num_classes: Annotated[int | None, within(low=1)] = None,
        on_step: Callable[[int, Tensor], object] | None = None,
        on_checkpoint: Callable[[Path], object] | None = None,
        loggers: Sequence[Logger] = (),
    ) -> None:
        check_callable("on_step", on_step)
        check_callable("on_checkpoint", on_checkpoint)
        for logger in loggers:
            check_type("loggers", logger, Logger)
        self.model = model
        self._ema: nn.Module | None = None
        self._folder, self._options, self._objective = RunFolder(run_dir), options, run_objective(schedule, options)
        self._dataset, self._labels = prepared(model, self._objective, dataset, num_classes)
        self._on_step, self._on_checkpoint, self._loggers = on_step, on_checkpoint, tuple(loggers)

    @property
    def ema(self) -> nn.Module:
        """The moving average of the network, in eval mode. `run` makes it, so reading it before is an error."""
        if self._ema is None:
            raise RuntimeError("Trainer: expected run to be called before ema is read, got no call")
        return self._ema

    def run(self) -> TrainResult:
        """Train until all steps are done, or a signal or `max_minutes` stops the run with a checkpoint.

        An error of a callback or a logger ends the run. It is raised after a checkpoint is saved. Only a Trainer whose options
        resume a run can be called again.

        Returns:
            How the call ended.

        Raises:
            ValueError: The resumed run has other options, another network, another schedule or other images, or an item
                is wrong. The message names it. Other errors are those of `train`.
        """
        with joined() as processes:
            run = open_run(self._folder, self._options, self._objective, processes)
            task = Task(
                run,
                model=self.model,
                dataset=self._dataset,
                labels=self._labels,
                on_step=self._on_step,
                on_checkpoint=self._on_checkpoint,
                loggers=self._loggers,
            )
            state = State.initial(task)
            self._ema = state.ema
            return run_steps(task, state)


# -------------------------------------------------------------------------------------------------- a run made from options


@checked()
def train(
    run_dir: str | os.PathLike[str],
    options: TrainOptions | None = None,
    data: DataOptions | None = None,
    model: ModelOptions | None = None,
) -> TrainResult:
    """Train a network on images (Algorithm 1 of Ho et al. 2020).

    The run's folder receives the configuration, the log, grids of samples and checkpoints. Its layout is in
    `ddpm_fast.training.run`. Ctrl-C, SIGTERM and SIGHUP end the run after the current step and save a
    checkpoint. A process that is killed loses only the steps since the last checkpoint. On a CPU the run keeps freed
    memory for its next step (`kept_memory`).

    Under torchrun, `accelerate launch` or Slurm, all processes make this call and share each batch. They end with the same
    weights. These are bit-identical for any number of processes that is a power of two, with the same `micro_batch_size` and
    `threads`. Rank 0 alone writes to the run's folder, which all processes see.

    Args:
        run_dir: Write to this folder. It must be new or empty unless `options` resume a run.
        options: Train with these options. Default: `TrainOptions()`.
        data: Read these images. Default: `DataOptions()`.
        model: Make this network and noise schedule. Default: `ModelOptions()`.

    Returns:
        How the call ended.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An option differs from the one that the resumed run was started with.
        OSError: A file cannot be written. A note on it names the last good checkpoint, as on the next two.
        MemoryError: Memory has run out. PyTorch raises a RuntimeError for that of a CPU.
        UnusablePath: `run_dir` is not empty and no run is resumed, or it cannot be written to, or `init` holds no model. It
            is an OSError.
        FileNotFoundError: There is no run to resume.
        FloatingPointError: The loss or the weights are no longer finite.
        BlockingIOError: Another process trains in `run_dir`. If the file system has no locks, a warning is logged.
        ProcessLost: Another of the processes has failed or ended. It is a RuntimeError.
    """
    options = TrainOptions() if options is None else options
    data = DataOptions() if data is None else data
    model = ModelOptions() if model is None else model
    return train_in(RunFolder(run_dir), options, data, model)


def train_in(
    folder: RunFolder,
    options: TrainOptions,
    data: DataOptions,
    model: ModelOptions,
    stored: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Do what `train` does, for a caller that may have read the run's configuration.

    Args:
        folder: The run's folder.
        options: See `train`.
        data: See `train`.
        model: See `train`.
        stored: The content of config.json, if the caller has read it to continue the run.
    """
    if model.schedule is None:
        model = replace(model, schedule="flow" if options.prediction == "flow" else "linear")
    objective = run_objective(getattr(NoiseSchedule, str(model.schedule))(model.num_timesteps), options)
    data, model = _with_absolute_paths(data), _with_absolute_paths(model)
    with joined() as processes:
        run = open_run(folder, options, objective, processes, data, model, stored)
        network, images = built_from(run, data, model)
        dataset, labels = prepared(network, objective, images)
        task = Task(run, model=network, dataset=dataset, labels=labels)
        return run_steps(task, State.initial(task))


def _with_absolute_paths(options: AnyOptions) -> AnyOptions:
    """Return options whose paths, if they exist, are absolute, so that a run is resumed from any working directory."""
    paths = {name: getattr(options, name, None) for name in ("data", "data_dir", "condition", "init")}
    if Degradation.named(os.fspath(paths["condition"] or "")) is not None:  # a folder may have its name
        del paths["condition"]
    found = {name: path for name, path in paths.items() if path is not None and path not in DATASETS and os.path.exists(path)}
    return replace(options, **{name: os.path.abspath(path) for name, path in found.items()})
