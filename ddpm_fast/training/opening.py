"""Open a run: the checks before it, then its folder, begun or continued."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from ..checks import check_int, computing_device
from ..distributed import Processes
from ..errors import InvalidValue, expect, renaming
from ..files.writing import write_json
from ..nn import UNetConfig
from ..resources import check_writable
from ..schedule import Objective
from .checkpoint import read_state
from .folder import RunFolder, check_by_options
from .options import CHANGEABLE, TrainOptions
from .state import State, Task

# Keys of a network's configuration that neither the weights nor the training depend on.
_DESCRIPTIVE: Final = frozenset({"sample_size", "class_names", "num_train_timesteps"})

_log = logging.getLogger("ddpm_fast")


@dataclass(frozen=True)
class Start:
    """A run that may start.

    Attributes:
        run: The folder.
        options: The options, with the size of micro-batches.
        data_and_model: The options of data and network, if `train` made them.
        processes: The processes.
        device: The device of this process.
        resume: Continue the run from its newest checkpoint.
    """

    run: RunFolder
    options: TrainOptions
    data_and_model: Mapping[str, Any]
    processes: Processes
    device: torch.device
    resume: bool


# ---------------------------------------------------------------------------------------------------- checks before the run


def prepared(run: RunFolder, options: TrainOptions, data_and_model: Mapping[str, Any], processes: Processes) -> Start:
    """Check what needs neither the data set nor the network, and set the number of threads.

    Args:
        run: The run's folder.
        options: The options.
        data_and_model: The options of data and network, if `train` makes them.
        processes: The processes.
    """
    from .. import schemas  # noqa: F401 (that msgspec is missing is said here, and not when a checkpoint is read)

    if options.ema_warmup is None:
        options = replace(options, ema_warmup=data_and_model.get("init") is None)
    # Rank 0 decides, as another process may see the folder later.
    resume = bool(processes.from_first([options.resume or (options.auto_resume and run.record.is_file())])[0])
    check_int("train", "threads", options.threads, 1, max(1024, os.cpu_count() or 1), optional=True)  # more cannot be started
    device = _device(options.device, processes)
    recorded = {**data_and_model, **options.recorded()}
    processes.on_first(lambda: _check_folder(run, recorded, resume))
    options = replace(options, micro_batch_size=_micro_batch_size(options, run, resume, processes))
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if device.type == "cpu":
        _check_threads(torch.get_num_threads())
    return Start(run, options, data_and_model, processes, device, resume)


def _device(name: str | None, processes: Processes) -> torch.device:
    """Return the device to train on: of several processes on a machine each takes another GPU."""
    device = computing_device("train", name)
    if processes.size == 1 or device.type != "cuda":
        return device
    processes.check_gpu_backend("train")
    if device == torch.device("cuda"):  # without a number
        device = processes.own_gpu("train")
    torch.cuda.set_device(device)  # collectives use the current one
    return device


def _check_folder(run: RunFolder, options: Mapping[str, Any], resume: bool) -> None:
    """Raise unless a run can begin in the folder, or go on.

    To go on, its options must be these, its checkpoints must be there, and it must not have done more steps than are wanted.
    """
    if resume:
        stored = run.read_config()["options"]  # refuses a folder without a run before a lock is written into it
        if "channels" in options:
            check_by_options(run)
        run.check_same({name: value for name, value in options.items() if name not in CHANGEABLE}, stored)
        steps = options["steps"]
        logged = run.last_row()
        lost = not run.checkpoints.is_dir() or (not run.checkpoint_folders() and (run.checkpoints / "latest").is_symlink())
        if logged and lost:
            raise FileNotFoundError(
                f"train: expected {run.checkpoints} to have the checkpoints of the run, whose log.csv has {logged} steps, got "
                "none; mount its disk or bring them back, or remove log.csv to start again from step 0"
            )
        # Comparing checksums would read all files, which opening the run does once more.
        done = run.read_latest(None, lambda checkpoint: read_state("train", checkpoint).step) or 0
        expect(done <= steps, "train", "steps", f"to be at least {done}, the step of the run in {run.path}", steps)
    else:
        run.check_new()
    check_writable("train", "run_dir", run.path, run.path)


def _micro_batch_size(options: TrainOptions, run: RunFolder, resume: bool, processes: Processes) -> int:
    """Return the number of images whose gradients are computed at a time. A resumed run keeps its own."""
    batch_size, size, kept = options.batch_size, options.micro_batch_size, ""
    check_int("train", "micro_batch_size", size, 1, batch_size, optional=True)
    if size is None and resume:
        size, kept = int(run.read_config()["options"]["micro_batch_size"]), ", as the run had"
    if size is None:
        wanted = f"to be a multiple of {processes.size}, one for each process"
        expect(batch_size % processes.size == 0, "train", "batch_size", wanted, batch_size)
        size = batch_size // processes.size
    if batch_size % (size * processes.size):
        number = f"{processes.size} process" + ("es" if processes.size > 1 else "")
        divisors = (each for each in range(size, 0, -1) if batch_size % (each * processes.size) == 0)
        fits = "" if batch_size % processes.size else f"; {next(divisors)} fits"
        got = f"micro_batch_size {size}{kept}{fits}"
        raise InvalidValue("train", "micro_batch_size", f"times {number} to divide batch_size {batch_size}", got)
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
            "train",
            f"the environment's {name}",
            f"to be {wanted}, as PyTorch would wait for {threads} threads forever",
            f"{value!r}; unset it, or pass threads=1 (--threads 1)",
        )


# ------------------------------------------------------------------------------------------------ a run begun, or continued


def open_run(start: Start, task: Task, state: State) -> dict[str, Any]:
    """Begin or continue the run in its folder. Return the content of config.json, and let the state be the run's."""
    run, options = start.run, task.options
    checkpoint = run.latest_checkpoint() if start.resume else None
    if start.resume and checkpoint is None:
        # A disk may have failed, so nothing is replaced.
        expect(not run.checkpoint_folders(), "train", "", f"a whole checkpoint in {run.checkpoints}", "none that can be read")
        if run.last_row():
            _log.warning("%s has no checkpoint yet: the run starts again from step 0, and its log too", run.path)
        state.load_initial_weights(task)
    config = task.config()
    with renaming("train"):  # an item may be wrong
        config["dataset"]["fingerprint"] = task.dataset.fingerprint(exact=options.data_check == "exact")
    if start.resume:
        _check_same(run, config, options.data_check, warn=checkpoint is not None)
    else:
        run.check_new()
        run.path.mkdir(parents=True, exist_ok=True)
    write_json(run.record, config)  # with the options that a resumed run changes
    run.checkpoints.mkdir(exist_ok=True)  # a run without this folder has lost it
    if checkpoint is not None:
        state.load(checkpoint)
    run.remove_leftovers()
    run.cut_log(state.step)
    if state.row is not None and run.last_row() < state.step:  # a full disk has ended the run before this row
        run.append_log(state.row)
    if run.last_row() == state.step:  # a full disk can end a run between the row and the end of the losses that it has
        state.losses.clear()
    state.row = None
    return config


def _described(config: Mapping[str, Any], *, with_images: bool) -> dict[str, Any]:
    """Return what a resumed run must have in common with the run that it continues, by name."""
    names = ("shape", "classes", "condition", "condition_range", "data_range", *(["images"] if with_images else []))
    dataset = {name: config["dataset"].get(name) for name in names}
    layers = {"model": config.get("network")}
    if config.get("unet") is not None:
        network = UNetConfig.from_dict(config["unet"]).to_dict()
        layers |= {f"model.{name}": value for name, value in network.items() if name not in _DESCRIPTIVE}
    objective = Objective.from_config(config["objective"])
    return {**dataset, **layers, **objective.parts(), "objective": objective}


def _check_same(run: RunFolder, config: dict[str, Any], data_check: str, *, warn: bool) -> None:
    """Refuse to resume a run as something else than it was started as. Complete the fingerprint of its data.

    Args:
        run: The run.
        config: The content of config.json as it would be started now.
        data_check: Comparison of the images.
        warn: Warn if gradients are summed in another order than before.
    """
    stored = run.read_config()
    old, new = (_described(each, with_images=data_check != "off") for each in (stored, config))
    run.check_same({**dict.fromkeys(old), **new}, old)
    before, now = stored["dataset"]["fingerprint"], config["dataset"]["fingerprint"]
    if data_check != "off":
        expect(
            all(before.get(kind, digest) == digest for kind, digest in now.items()),
            "train",
            "",
            f"the images that the run in {run.path} was started with",
            'others of the same number and size; pass data_check="off" (--data-check off) to go on with them',
        )
        config["dataset"]["fingerprint"] = before | now
    for name, was, is_ in (
        ("threads", stored["threads"], config["threads"]),
        ("micro_batch_size", *(each["options"]["micro_batch_size"] for each in (stored, config))),
    ):
        if warn and was is not None and was != is_:
            _log.warning(
                "%s was trained with %s %s and goes on with %s: gradients are summed in another order, so weights are equal up "
                "to rounding",
                *(run.path, name, was, is_),
            )
