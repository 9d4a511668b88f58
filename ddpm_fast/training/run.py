"""A run before its images and its network: its folder, the configuration that it continues, its processes and device.

RUN/
  config.json                       options of the run, checked when it is resumed
  log.csv                           one row every `log_every` steps
  samples/step-00001000.png         grids drawn during training
  tensorboard/                      event files, if TensorBoard is installed
  checkpoints/
    latest -> step-00001000         for people and scripts; resuming finds the newest whole one itself
    step-00001000/
      unet/, unet_ema/              the network and its moving average, as diffusers folders, float32
      scheduler/                    scheduler_config.json
      optimizer.safetensors         the optimizer's state, `<key>.<parameter>`
      state.json                    step, log state, and the size and SHA-256 of every other file
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ..checks import check_int, check_path, check_same, computing_device, first_few
from ..data.options import DataOptions
from ..distributed import Processes
from ..errors import MissingPath, expect, renaming
from ..files.result_folder import ResultFolder
from ..files.writing import read_json
from ..options import Options
from ..resources import check_writable
from ..schedule import Objective
from .checkpoint import Checkpoints, read_state
from .log import CsvLog
from .options import CHANGEABLE, STRUCTS, ModelOptions, TrainOptions
from .rng import TrainingRng

FORMAT: Final = 7
"""Version of config.json."""


class RunFolder(ResultFolder):
    """The folder of a training run. The module's docstring has the layout.

    Args:
        path: The folder. It need not exist.
    """

    argument = "run_dir"
    record_name = "config.json"
    hint = "continue the run in it with resume=True (--resume), or name another folder"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        check_path("run_dir", path)
        super().__init__(Path(path))
        self.log = CsvLog(self.path / "log.csv")
        self.samples = self.path / "samples"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = Checkpoints(self.path)

    def read_config(self) -> dict[str, Any]:
        """Return the configuration with which the run was started.

        Raises:
            FileNotFoundError: There is no run.
            ValueError: The file is not such a configuration. The message names the field.
        """
        if not self.record.is_file():
            raise MissingPath("", f"a run to resume in {self.path}", f"none, as it has no {self.record.name}")
        import msgspec

        from ..schemas import RunConfig

        def parse(values: dict[str, Any]) -> dict[str, Any]:
            got = f"{values.get('format')!r}: another version has written it; a new run can start from its checkpoints (init)"
            expect(values.get("format") == FORMAT, "format", f"to be {FORMAT}", got)
            config = msgspec.convert(values, RunConfig)
            options, structs = config.options, STRUCTS if config.starter == "train" else (TrainOptions,)
            missing = {name for struct in structs for name in struct().recorded()} - options.keys()
            expect(not missing, "options", "to have all options of a run", f"none named {first_few(missing)}")
            with renaming({name: f"options.{name}" for name in options}):
                for struct in structs:
                    struct.from_values(options)
            return values

        return read_json(self.record, parse)


@dataclass(frozen=True)
class Run:
    """A run that may begin, or go on.

    Attributes:
        folder: Its folder.
        options: Its options, none of them left open.
        data: The options of its images, if `train` reads them.
        network: The options of its network, if `train` makes it.
        objective: Its noise schedule, and what the network predicts.
        loss_weights: The weight of each timestep's loss, float32 [T] on the device. None: 1.
        processes: The processes.
        device: The device of this process.
        rng: Its random draws.
        stored: The content of config.json if the run goes on. None: it begins.
    """

    folder: RunFolder
    options: TrainOptions
    data: DataOptions | None
    network: ModelOptions | None
    objective: Objective
    loss_weights: Tensor | None
    processes: Processes
    device: torch.device
    rng: TrainingRng
    stored: Mapping[str, Any] | None

    @property
    def recorded(self) -> dict[str, Any]:
        """The options that config.json has."""
        return _recorded(self.data, self.network, self.options)


def open_run(
    folder: RunFolder,
    options: TrainOptions,
    objective: Objective,
    processes: Processes,
    data: DataOptions | None = None,
    network: ModelOptions | None = None,
    stored: Mapping[str, Any] | None = None,
) -> Run:
    """Check what needs neither images nor network, and set the number of threads. Nothing is written.

    Args:
        folder: The run's folder.
        options: Its options.
        objective: Its objective.
        processes: The processes.
        data: The options of its images, if `train` reads them.
        network: The options of its network, if `train` makes it.
        stored: The content of config.json, if the caller has read it to continue the run.
    """
    from .. import schemas  # noqa: F401 (that msgspec is missing is said here, and not when a checkpoint is read)

    if options.ema_warmup is None:
        options = replace(options, ema_warmup=network is None or network.init is None)
    check_int("threads", options.threads, 1, max(1024, os.cpu_count() or 1), optional=True)  # more cannot be started
    device = _device(options.device, processes)
    # Rank 0 decides, as another process may see the folder later.
    resume = processes.from_first([options.resume or (options.auto_resume and folder.record.is_file())])[0]
    stored = (stored or folder.read_config()) if resume else None
    processes.on_first(lambda: _check_folder(folder, options, data, network, stored))
    options = replace(options, micro_batch_size=_micro_batch_size(options, stored, processes))
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if device.type == "cpu":
        _check_threads(torch.get_num_threads())
    weights = None if objective.loss_weight is None else objective.loss_weights.to(device, torch.float32)
    rng = TrainingRng(options.seed, options.batch_size)
    return Run(folder, options, data, network, objective, weights, processes, device, rng, stored)


def _device(name: str | None, processes: Processes) -> torch.device:
    """Return the device to train on: of several processes on a machine each takes another GPU."""
    device = computing_device(name)
    if processes.size == 1 or device.type != "cuda":
        return device
    processes.check_gpu_backend()
    if device == torch.device("cuda"):  # without a number
        device = processes.own_gpu()
    torch.cuda.set_device(device)  # collectives use the current one
    return device


def _recorded(*structs: Options | None) -> dict[str, Any]:
    return {name: value for struct in structs if struct is not None for name, value in struct.recorded().items()}


def _check_folder(
    folder: RunFolder,
    options: TrainOptions,
    data: DataOptions | None,
    network: ModelOptions | None,
    stored: Mapping[str, Any] | None,
) -> None:
    """Raise unless a run can begin in the folder, or go on.

    A run can go on if it has these options, its checkpoints exist, and it has not done more steps than are wanted.
    """
    if stored is None:
        folder.check_new()
    else:
        if network is not None:
            got = "one of a Trainer; resume it with its Trainer"
            expect(stored["starter"] == "train", str(folder.path), "to hold a run that `train` started", got)
        fixed = {name: value for name, value in _recorded(data, network, options).items() if name not in CHANGEABLE}
        check_same(fixed, stored["options"], repr(str(folder.path)))
        logged = folder.log.last_step()
        if logged and folder.checkpoints.are_lost():
            wanted = f"to have the checkpoints of the run, whose log.csv has {logged} steps"
            got = "none; mount its disk or bring them back, or remove log.csv to start again from step 0"
            raise MissingPath(str(folder.checkpoints.path), wanted, got)
        # Comparing checksums would read all files, which beginning the run does once more.
        done = folder.checkpoints.read_newest(None, lambda checkpoint: read_state(checkpoint).step) or 0
        expect(done <= options.steps, "steps", f"to be at least {done}, the step of the run in {folder.path}", options.steps)
    check_writable("run_dir", folder.path, folder.path)


def _micro_batch_size(options: TrainOptions, stored: Mapping[str, Any] | None, processes: Processes) -> int:
    """Return the number of images whose gradients are computed at a time. A run that goes on keeps its own."""
    batch_size, size, count = options.batch_size, options.micro_batch_size, processes.size
    check_int("micro_batch_size", size, 1, batch_size, optional=True)
    expect(batch_size % count == 0, "batch_size", f"to be a multiple of {count}, one for each process", batch_size)
    if size is None:
        size = batch_size // count if stored is None else int(stored["options"]["micro_batch_size"])
    fitting = next(each for each in range(size, 0, -1) if batch_size % (each * count) == 0)
    wanted = f"times {count} process{'es' if count > 1 else ''} to divide batch_size {batch_size}"
    expect(size == fitting, "micro_batch_size", wanted, f"micro_batch_size {size}; {fitting} fits")
    return size


def _check_threads(threads: int) -> None:
    """Raise a ValueError if OpenMP may start fewer threads than PyTorch asks for.

    The backward pass of oneDNN's convolutions then waits for the missing threads forever.
    """
    dynamic, limit = (os.environ.get(name, "").strip() for name in ("OMP_DYNAMIC", "OMP_THREAD_LIMIT"))
    for name, value, wanted, fewer in (
        ("OMP_DYNAMIC", dynamic, "false", dynamic.lower() == "true"),
        ("OMP_THREAD_LIMIT", limit, f"at least {threads}", limit.isdecimal() and int(limit) < threads),
    ):
        expect(
            threads == 1 or not fewer,
            f"the environment's {name}",
            f"to be {wanted}, as PyTorch would wait for {threads} threads forever",
            f"{value!r}; unset it, or pass threads=1 (--threads 1)",
        )
