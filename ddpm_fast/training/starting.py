"""Checks before a run starts: its folder, processes, device and micro-batches, memory and disk space."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from ..checks import computing_device
from ..distributed import Processes
from ..errors import InvalidValue, expect
from ..limits import check_free_memory, check_free_space, check_writable
from ..nn import UNetConfig
from .run_folder import FORMAT, RunFolder, read_state
from .state import Task

COPIES: Final = 5  # each parameter in memory: itself, its average, its gradient and two moments
_SAVED: Final = 4  # the same in a checkpoint, without the gradient


@dataclass(frozen=True)
class Start:
    """A run that may start: its folder, processes and device are checked.

    Attributes:
        run: The folder.
        options: The options that config.json records, with the size of micro-batches.
        team: The processes.
        device: The device of this process.
        resume: Continue the run from its newest checkpoint.
        format: The format of its config.json.
    """

    run: RunFolder
    options: Mapping[str, Any]
    team: Processes
    device: torch.device
    resume: bool
    format: int


def prepared(run: RunFolder, options: Mapping[str, Any], team: Processes, *, resume: bool, auto_resume: bool) -> Start:
    """Check what needs neither the data set nor the network, and set the number of threads.

    Args:
        run: The run's folder.
        options: Options that are checked and complete.
        team: The processes.
        resume: Continue the run.
        auto_resume: Continue the run if there is one.
    """
    if auto_resume:
        resume = bool(team.from_first([run.config_file.is_file()])[0])
    device = _device(options["device"], team)
    team.on_first(lambda: _check_folder(run, options["steps"], resume))
    options = {**options, "micro_batch_size": _micro_batch_size(options, run, resume, team)}
    if options["threads"] is not None:
        torch.set_num_threads(options["threads"])
    if device.type == "cpu":
        _check_threads(torch.get_num_threads())
    return Start(run, options, team, device, resume, run.read_config()["format"] if resume else FORMAT)


def _device(name: str | None, team: Processes) -> torch.device:
    """Return the device to train on: of several processes on a machine each takes another GPU."""
    device = computing_device("train", name)
    if team.size == 1 or device.type != "cuda":
        return device
    team.check_gpu_backend("train")
    if device == torch.device("cuda"):  # without a number
        device = team.own_gpu("train")
    torch.cuda.set_device(device)  # collectives use the current one
    return device


def _micro_batch_size(options: Mapping[str, Any], run: RunFolder, resume: bool, team: Processes) -> int:
    """Return the number of images whose gradients are computed at a time. A resumed run keeps its own."""
    batch_size: int = options["batch_size"]
    size: int | None = options["micro_batch_size"]
    if size is None and resume:
        size = run.read_config()["options"].get("micro_batch_size", batch_size)  # older runs had one micro-batch
    if size is None:
        expect(
            batch_size % team.size == 0,
            "train",
            "batch_size",
            f"to be a multiple of {team.size}, one for each process",
            batch_size,
        )
        size = batch_size // team.size
    if batch_size % (size * team.size):
        processes = f"{team.size} process" + ("es" if team.size > 1 else "")
        largest = 0 if batch_size % team.size else _largest_divisor(batch_size // team.size, size)
        fits = f"; {largest} fits" if largest else ""
        kept = ", as the run had" if options["micro_batch_size"] is None and resume else ""
        raise InvalidValue(
            "train",
            "micro_batch_size",
            f"times {processes} to divide batch_size {batch_size}",
            f"micro_batch_size {size}{kept}{fits}",
        )
    return size


def _largest_divisor(number: int, most: int) -> int:
    """Return the largest divisor of a number that is at most `most`."""
    lower = [each for each in range(1, math.isqrt(number) + 1) if number % each == 0]
    return max(each for each in (*lower, *(number // each for each in lower)) if each <= most)


def _check_threads(threads: int) -> None:
    """Raise a ValueError if OpenMP may start fewer threads than PyTorch asks for.

    The backward pass of oneDNN's convolutions then waits for the missing threads forever.
    """
    dynamic, limit = (os.environ.get(name, "").strip() for name in ("OMP_DYNAMIC", "OMP_THREAD_LIMIT"))
    if dynamic.lower() == "true":
        name, wanted, got = "OMP_DYNAMIC", "false", dynamic
    elif limit.isdecimal() and int(limit) < threads:
        name, wanted, got = "OMP_THREAD_LIMIT", f"at least {threads}", limit
    else:
        return
    expect(
        threads <= 1,
        "train",
        f"the environment's {name}",
        f"to be {wanted}, as PyTorch would wait for {threads} threads forever",
        f"{got!r}; unset it, or pass threads=1 (--threads 1)",
    )


def _check_folder(run: RunFolder, steps: int, resume: bool) -> None:
    """Raise unless a run can begin in the folder, or go on.

    To go on, its checkpoints must be there, and it must not have done more steps than are wanted.
    """
    if resume:
        run.read_config()  # refuses a folder without a run before a lock is written into it
        logged = run.last_row()
        if logged and not run.checkpoints.is_dir():
            raise FileNotFoundError(
                f"train: expected {run.checkpoints} to have the checkpoints of the run, whose log.csv has {logged} steps, got "
                "no such folder; mount its disk, or remove log.csv to start again from step 0"
            )
        if logged and not run.checkpoint_folders() and (run.checkpoints / "latest").is_symlink():
            raise FileNotFoundError(
                f"train: expected {run.checkpoints} to have the checkpoint that its link `latest` names, got no checkpoint; "
                "bring it back, or remove log.csv to start again from step 0"
            )
        # Comparing checksums would read all files, which opening the run does once more.
        done = run.read_latest(None, lambda checkpoint: read_state("train", checkpoint).step) or 0
        expect(done <= steps, "train", "steps", f"to be at least {done}, the step of the run in {run.path}", steps)
    else:
        run.check_new()
    check_writable("train", "run_dir", run.path, run.path)


def check_sizes(run: RunFolder, task: Task) -> None:
    """Raise if the training does not fit into memory, or checkpoints onto the disk. The estimates are low."""
    options, config = task.options, UNetConfig.from_dict(task.model.config)
    channels, height, width = task.dataset.shape
    per_image = channels * (1 + 4)
    if task.device.type == "cpu":
        check_free_memory("train", "model", "a UNet", (COPIES - 1) * 4 * config.num_parameters)  # it is there itself
        # Each block keeps the inputs of two convolutions for the gradient; the widest pictures have the first channels.
        bytes_each = 4 if options["precision"] == "float32" else 2
        per_image += config.block_out_channels[0] * 4 * config.layers_per_block * bytes_each
    size = task.micro_batch_size
    name = "batch_size" if size == options["batch_size"] else "micro_batch_size"
    check_free_memory("train", name, size, size * per_image * height * width)
    saves = options["steps"] if options["checkpoint_minutes"] else 1
    if options["checkpoint_every"]:
        saves = max(saves, math.ceil(options["steps"] / options["checkpoint_every"]))
    more = max(0, min(options["keep"], saves) - len(run.checkpoint_folders()))
    # Old checkpoints are removed after the new one.
    check_free_space("train", "run_dir", run.path, (more + 1) * _SAVED * 4 * config.num_parameters)
