"""The training loop: Algorithm 1 of Ho et al. (2020) on `q_sample` and `denoising_loss`.

Both ops draw a step's noise from the seeds of its samples, so the noise is never stored. Every draw is a function of
(seed, step), so a checkpoint holds no generator state. A run that was stopped and resumed ends with the same weights, bit
for bit, as one that was not. That holds on one machine with one number of threads, for any number of processes that is a
power of two.

Several processes hold the same state. Each computes the gradients of its part of a batch. Rank 0 alone reads and writes the
run's folder.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Final

import torch
from torch import Tensor

from ..checks import checked_bytes, computing_device
from ..distributed import Processes, ProcessLost, joined
from ..limits import check_free_memory, check_free_space, check_writable
from ..memory import kept_memory
from ..nn import UNetConfig
from ..schedule import NoiseSchedule
from .data import DATASETS, RESIZED, ImageDataset, load_dataset
from .export import write_scheduler
from .records import Forecast, TensorBoard, draw_samples, summary
from .rng import TrainingRng
from .run_folder import LOG_COLUMNS, RunFolder, read_state
from .state import State, Task, unet_config
from .step import batches, take_step

# Options that a resumed run may change: they decide how long, where and with what records, not what is trained.
# `steps` and the learning rate's decay are among them so that a run can be prolonged, or brought to its end. `data` may name
# another folder, as the images themselves are compared. The data set's `preparation` is not compared, as older runs did not
# record it. Its shape is.
CHANGEABLE: Final = frozenset(
    {
        *(
            "fingerprint",
            "data",
            "data_dir",
            "steps",
            "lr_decay",
            "lr_decay_steps",
            "channels_last",
            "device",
            "threads",
            "log_every",
        ),
        *("sample_every", "sample_steps", "checkpoint_every", "checkpoint_minutes", "keep", "tensorboard", "preparation"),
        *("skip_broken", "data_memory"),
    }
)

_COPIES: Final = 5  # each parameter in memory: itself, its average, its gradient and two moments
_SAVED: Final = 4  # the same in a checkpoint, without the gradient

_log = logging.getLogger("ddpm_fast")


@dataclass(frozen=True)
class TrainResult:
    """How a call of `train` ended.

    Attributes:
        step: Steps since the run began.
        loss: Mean loss since the last row of the log; NaN if no step followed that row.
        seconds: Time spent in steps since the run began, in seconds.
        stopped_by: "SIGINT", "SIGTERM", "SIGHUP", "max_minutes", or None if all steps are done.
    """

    step: int
    loss: float
    seconds: float
    stopped_by: str | None


def run_training(
    run_dir: str | os.PathLike[str],
    options: Mapping[str, Any],
    *,
    resume: bool,
    auto_resume: bool,
    max_minutes: float | None,
    progress: bool,
    data_check: str,
    lock: bool,
) -> TrainResult:
    """Run `train` with options that are checked and complete."""
    run = RunFolder(run_dir)
    with joined("train") as team:
        if auto_resume:
            resume = bool(team.from_first([run.config_file.is_file()])[0])
        device = _device(options["device"], team)
        options = {**options, **_absolute_folders(options)}
        team.on_first(lambda: _check_folder(run, options["steps"], resume))
        options["micro_batch_size"] = _micro_batch_size(options, run, resume, team)
        if options["threads"] is not None:
            torch.set_num_threads(options["threads"])
        if device.type == "cpu":
            _check_threads(torch.get_num_threads())
        if options["data"] in DATASETS:  # rank 0 downloads
            dataset = team.machine_by_machine(lambda: _dataset(options, run, resume))
        else:
            dataset = _dataset(options, run, resume)
        schedule: NoiseSchedule = getattr(NoiseSchedule, options["schedule"])(options["num_timesteps"])
        weight = options["loss_weight"]
        weight = None if weight is None else schedule.loss_weight(weight, options["prediction"]).to(device, torch.float32)
        task = Task(
            options=options,
            dataset=dataset,
            labelled=options["conditional"] and len(dataset.classes) > 1,
            schedule=schedule,
            loss_weight=weight,
            rng=TrainingRng(options["seed"], options["batch_size"]),
            device=device,
            team=team,
        )
        _check_sizes(run, task)
        state = State.initial(task)  # before a folder is made, as it refuses options that make no network
        if options["init"] is not None and not resume:
            team.on_first(lambda: state.load_weights(options["init"]))
        locks, keeps = lock and team.is_first, task.device.type == "cpu"
        with run.locked() if locks else nullcontext(), kept_memory() if keeps else nullcontext():
            return _run(run, task, state, resume=resume, max_minutes=max_minutes, progress=progress, data_check=data_check)


def _open(run: RunFolder, task: Task, state: State, resume: bool, data_check: str) -> dict[str, Any]:
    """Begin or continue the run in its folder. Return the content of config.json, and let the state be the run's."""
    options = task.options
    checkpoint = run.latest_checkpoint() if resume else None
    if resume and checkpoint is None and run.checkpoint_folders():  # it may be the disk: nothing is replaced
        raise ValueError(f"train: expected a whole checkpoint in {run.checkpoints}, got none that can be read")
    if resume and checkpoint is None and run.last_row():
        _log.warning("%s has no checkpoint yet: the run starts again from step 0, and its log too", run.path)
    if options["init"] is not None and resume and checkpoint is None:
        state.load_weights(options["init"])
    config = task.config()
    config["dataset"]["fingerprint"] = task.dataset.fingerprint(exact=data_check == "exact")
    if resume:
        _check_same(run, config, data_check)
        threads = run.read_config().get("threads")
        if checkpoint is not None and threads is not None and threads != config["threads"]:
            _log.warning(
                "%s was trained with %s threads and goes on with %s: PyTorch's convolutions may then sum gradients in another "
                "order, so the weights are equal up to rounding",
                *(run.path, threads, config["threads"]),
            )
        run.write_config(config)  # with the options that were changed
    else:
        run.create(config)
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


def _run(
    run: RunFolder, task: Task, state: State, *, resume: bool, max_minutes: float | None, progress: bool, data_check: str
) -> TrainResult:
    """Run the task's steps from the beginning or from the newest checkpoint."""
    options, team = task.options, task.team
    steps, batch_size = options["steps"], options["batch_size"]
    checkpoint_every, checkpoint_minutes = options["checkpoint_every"], options["checkpoint_minutes"]
    config = team.on_first(lambda: _open(run, task, state, resume, data_check))
    state.copy_from_first(team)
    if team.is_first:
        _log.info("%s", summary(run, task, state))

    tensorboard = TensorBoard(run, state.step, enabled=options["tensorboard"] and team.is_first)
    from tqdm import tqdm

    bar = tqdm(
        total=steps,
        initial=state.step,
        unit="step",
        disable=not (progress and team.is_first),
        mininterval=0.5 if sys.stderr.isatty() else 30,  # a log file needs fewer lines than a terminal
    )
    generators = torch.random.fork_rng([task.device] if task.device.type == "cuda" else [])  # the caller's stay as they are
    stopped_by: str | None = None
    began = last_checkpoint = time.monotonic()
    forecast = Forecast(steps, task.device)
    logged_step, logged_seconds = state.step, state.seconds
    mark = time.perf_counter()  # end of the last stretch that is counted in state.seconds
    saved = nullcontext() if config is None else _saved_if_it_fails(run, config, task, state)
    stops = _Stops(team)
    with _StopSignals() as signals, generators, bar, saved, closing(batches(task, state.step)) as batch, closing(stops):
        while state.step < steps and stopped_by is None:
            grad_norm, rate = take_step(task, state, *next(batch))
            bar.update()
            if team.is_first:
                forecast.after_step(state.step)

            if state.step % options["log_every"] == 0 or state.step == steps:
                loss = _finite_loss(state, grad_norm)
                mark = state.count_time(mark)
                speed = (state.step - logged_step) * batch_size / (state.seconds - logged_seconds)
                logged_step, logged_seconds = state.step, state.seconds
                state.row = (state.step, state.step * batch_size, loss, float(grad_norm), rate, speed, state.seconds)
                if team.is_first:
                    run.append_log(state.row)
                state.losses.clear()
                bar.set_postfix_str(f"loss {loss:.4f}, {speed:.1f} images/s", refresh=False)
                for name, value in zip(LOG_COLUMNS[2:6], state.row[2:6], strict=True):
                    tensorboard.write("add_scalar", f"train/{name}", value, state.step)
                state.row = None
            if options["sample_every"] and state.step % options["sample_every"] == 0 and team.is_first:
                mark = state.count_time(mark)
                draw_samples(run, task, state, tensorboard)
                mark = time.perf_counter()

            if signals.received is not None:
                stopped_by = signals.received
            elif max_minutes is not None and time.monotonic() - began > 60 * max_minutes:
                stopped_by = "max_minutes"
            stopped_by = stops.agreed(stopped_by)
            due = bool(checkpoint_every) and state.step % checkpoint_every == 0
            due |= bool(checkpoint_minutes) and time.monotonic() - last_checkpoint > 60 * checkpoint_minutes
            if due or stopped_by is not None or state.step == steps:
                _finite_loss(state, grad_norm)
                if not state.is_finite():  # a spoilt state must not replace a good one
                    raise FloatingPointError(
                        f"train: the weights are no longer finite after step {state.step}, so they are not saved; "
                        f"the last good checkpoint is {run.latest_checkpoint() or 'none'}"
                    )
                mark = state.count_time(mark)
                if team.is_first:
                    _save_checkpoint(run, task, state)
                last_checkpoint = time.monotonic()
                mark = time.perf_counter()
    tensorboard.write("close")
    if stopped_by and team.is_first:
        _log.info("stopped by %s at step %d of %d; checkpoint saved", stopped_by, state.step, steps)
    return TrainResult(state.step, state.mean_loss(), state.seconds, stopped_by)


def _finite_loss(state: State, grad_norm: Tensor) -> float:
    """Return the mean loss since the last row of the log. Raise FloatingPointError if it or the gradient is not finite."""
    loss = state.mean_loss()
    if math.isinf(loss) or (math.isnan(loss) and state.losses) or not math.isfinite(grad_norm):
        raise FloatingPointError(
            f"train: the loss became {loss} and its gradient's norm {float(grad_norm)} by step {state.step}; "
            "resume with what was saved, or start again with a smaller lr or precision float32"
        )
    return loss


def _save_checkpoint(run: RunFolder, task: Task, state: State) -> None:
    def write(folder: Path) -> None:
        state.write(folder)
        write_scheduler(folder / "scheduler", task.schedule, task.options["prediction"])

    entries = {"seconds": state.seconds, "losses": [float(loss) for loss in state.losses], "row": state.row}
    run.save_checkpoint(state.step, entries, write, task.options["keep"])


@contextmanager
def _saved_if_it_fails(run: RunFolder, config: Mapping[str, Any], task: Task, state: State) -> Iterator[None]:
    """Save a checkpoint, if possible, when a file cannot be read or written, or another process ends.

    Raise the error with the name of the last good checkpoint.
    """
    try:
        yield
    except (ProcessLost, ValueError) as error:  # ValueError: an image that is decoded late is damaged
        if state.is_finite():
            _save_checkpoint(run, task, state)
        last = run.latest_checkpoint() or "none"
        kind = ProcessLost if isinstance(error, ProcessLost) else ValueError
        raise kind(f"train: {error}; the last good checkpoint is {last}, from which --resume continues") from error
    except OSError as error:
        run.remove_leftovers()  # they take space
        with suppress(OSError):
            if not run.config_file.exists():  # the folder was removed
                run.path.mkdir(parents=True, exist_ok=True)
                run.write_config(config)
            if state.is_finite():
                _save_checkpoint(run, task, state)
        run.remove_leftovers()
        raise OSError(
            f"train: expected to write to {run.path} at step {state.step}, got: {error}; the last good checkpoint is "
            f"{run.latest_checkpoint() or 'none'}, from which --resume continues"
        ) from error


def _check_sizes(run: RunFolder, task: Task) -> None:
    """Raise if networks and images do not fit into memory, or checkpoints onto the disk. The estimates are low."""
    options = task.options
    parameters = UNetConfig.from_dict(unet_config(options, task.dataset, task.labelled)).num_parameters
    channels, height, width = task.dataset.shape
    per_image = channels * (1 + 4)
    if task.device.type == "cpu":
        check_free_memory("train", "channels", options["channels"], _COPIES * 4 * parameters)
        # Each block keeps the inputs of two convolutions for the gradient; the widest pictures have channels[0].
        per_image += options["channels"][0] * 4 * options["layers"] * (4 if options["precision"] == "float32" else 2)
    check_free_memory("train", "batch_size", options["batch_size"], options["batch_size"] * per_image * height * width)
    saves = options["steps"] if options["checkpoint_minutes"] else 1
    if options["checkpoint_every"]:
        saves = max(saves, math.ceil(options["steps"] / options["checkpoint_every"]))
    more = max(0, min(options["keep"], saves) - len(run.checkpoint_folders()))
    # Old checkpoints are removed after the new one.
    check_free_space("train", "run_dir", run.path, (more + 1) * _SAVED * 4 * parameters)


class _StopSignals:
    """A context that records the first SIGINT, SIGTERM or SIGHUP. The second one acts as usual.

    Only the main thread receives signals. A SIGHUP that is ignored, as under nohup, stays so.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _StopSignals:
        if threading.current_thread() is threading.main_thread():
            hangup = getattr(signal, "SIGHUP", None)  # a terminal that is closed; Windows has none
            for number in (signal.SIGINT, signal.SIGTERM, hangup):
                if number is not None and not (number == hangup and signal.getsignal(number) is signal.SIG_IGN):
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._restore()


class _Stops:
    """An agreement of all processes to stop after the same step, which is the one after a process has a reason."""

    _REASONS: Final[tuple[str | None, ...]] = (None, "max_minutes", "SIGHUP", "SIGTERM", "SIGINT")

    def __init__(self, team: Processes) -> None:
        self._team = team
        self._largest = team.largest(0)

    def agreed(self, reason: str | None) -> str | None:
        """Tell the others this process's reason to stop. Return the reason of all, of the step before."""
        if self._team.size == 1:
            return reason
        agreed = self._REASONS[self._largest()]
        self._largest = self._team.largest(self._REASONS.index(reason))
        return agreed

    def close(self) -> None:
        """Wait for what is under way."""
        with suppress(ProcessLost):  # the error that ends the run is raised already, or all steps are done
            self._largest()


def _device(name: str | None, team: Processes) -> torch.device:
    """Return the device to train on: of several processes on a machine each takes another GPU."""
    device = computing_device("train", name)
    if team.size == 1 or device.type != "cuda":
        return device
    if device == torch.device("cuda"):  # without a number
        if team.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"train: expected at most {torch.cuda.device_count()} processes on a machine with as many GPUs, "
                f"got one with LOCAL_RANK {team.local_rank}"
            )
        device = torch.device("cuda", team.local_rank)
    torch.cuda.set_device(device)  # collectives use the current one
    return device


def _micro_batch_size(options: Mapping[str, Any], run: RunFolder, resume: bool, team: Processes) -> int:
    """Return the number of images whose gradients are computed at a time. A resumed run keeps its own."""
    batch_size: int = options["batch_size"]
    size: int | None = options["micro_batch_size"]
    if size is None and resume:
        size = run.read_config()["options"].get("micro_batch_size", batch_size)  # older runs had one micro-batch
    if size is None:
        if batch_size % team.size:
            raise ValueError(
                f"train: expected batch_size to be a multiple of {team.size}, one for each process, got {batch_size}"
            )
        size = batch_size // team.size
    if batch_size % (size * team.size):
        processes = f"{team.size} process" + ("es" if team.size > 1 else "")
        raise ValueError(
            f"train: expected micro_batch_size times {processes} to divide batch_size {batch_size}, got micro_batch_size {size}"
        )
    return size


def _dataset(options: Mapping[str, Any], run: RunFolder, resume: bool) -> ImageDataset:
    """Load the images."""
    arguments = (options["data"], options["data_dir"])
    reading = {"skip_broken": options["skip_broken"], "memory": checked_bytes("train", "data_memory", options["data_memory"])}
    try:
        return load_dataset(*arguments, image_size=options["image_size"], **reading)
    except ValueError:
        if not resume or options["image_size"] is not None:
            raise
        # Earlier versions resized a folder's images of several sizes without being asked. Such a run goes on.
        stored = run.read_config()["dataset"]
        if stored.get("preparation", RESIZED) != RESIZED:
            raise
        size = stored["shape"][-1]
        return load_dataset(*arguments, image_size=size, **reading)


def _absolute_folders(options: Mapping[str, Any]) -> dict[str, str]:
    """Return the options that name folders of data as absolute paths, so that a run is resumed from any working directory."""
    folders = {name: options[name] for name in ("data", "data_dir") if options[name] is not None}
    if options["data"] in DATASETS or not os.path.exists(options["data"]):
        del folders["data"]
    return {name: os.path.abspath(folder) for name, folder in folders.items()}


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
    if threads > 1:
        raise ValueError(
            f"train: expected the environment's {name} to be {wanted}, as PyTorch would wait for {threads} threads forever, "
            f"got {got!r}; unset it, or pass threads=1 (--threads 1)"
        )


def _check_folder(run: RunFolder, steps: int, resume: bool) -> None:
    """Raise unless a run can begin or go on in the folder."""
    if resume:
        run.read_config()  # refuses a folder without a run before a lock is written into it
        _check_resumable(run, steps)
    else:
        run.check_new()
    check_writable("train", "run_dir", run.path, run.path)


def _check_resumable(run: RunFolder, steps: int) -> None:
    """Refuse to resume a run whose checkpoints are lost, or that has done more steps than are wanted."""
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
    # Comparing checksums would read all files, which `_run` does once more.
    done = run.read_latest(None, lambda checkpoint: read_state("train", checkpoint).step) or 0
    if done > steps:
        raise ValueError(f"train: expected steps to be at least {done}, the step of the run in {run.path}, got {steps}")


def _check_same(run: RunFolder, config: dict[str, Any], data_check: str) -> None:
    """Refuse to resume a run as something else than it was started as. Complete the fingerprint of its data."""
    stored = run.read_config()
    for section in ("options", "dataset"):
        for name, value in config[section].items():
            if name == "micro_batch_size" and name not in stored[section]:
                continue  # an older run, which had one micro-batch a step
            if name not in CHANGEABLE and stored[section].get(name) != value:
                raise ValueError(
                    f"train: expected {name} to be {stored[section].get(name)!r}, as the run in {run.path} was started, "
                    f"got {value!r}"
                )
    before, now = stored["dataset"].get("fingerprint", {}), config["dataset"]["fingerprint"]  # older runs have none
    if data_check != "off":
        data = [os.path.abspath(each["options"]["data"]) for each in (stored, config)]
        if not before and data[0] != data[1]:
            raise ValueError(
                f"train: expected data to be {stored['options']['data']!r}, as the run in {run.path} has no fingerprint of its "
                f'images, got {config["options"]["data"]!r}; pass data_check="off" (--data-check off) to go on with them'
            )
        if any(before.get(kind, digest) != digest for kind, digest in now.items()):
            raise ValueError(
                f"train: expected the images that the run in {run.path} was started with, got others of the same number and "
                'size; pass data_check="off" (--data-check off) to go on with them'
            )
        config["dataset"]["fingerprint"] = before | now
