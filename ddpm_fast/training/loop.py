"""The training loop: Algorithm 1 of Ho et al. (2020) on `q_sample` and `denoising_loss`.

Both ops draw a step's noise from the seeds of its samples, so the noise is never stored. Every draw is a function of
(seed, step), so a checkpoint holds no generator state. A run that was stopped and resumed ends with the same weights, bit
for bit, as one that was not. That holds on one machine with one number of threads, for any number of processes that is a
power of two.

Several processes hold the same state. Each computes the gradients of its part of a batch. Rank 0 alone writes to the run's
folder.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..distributed import ProcessLost
from ..errors import ArgumentError
from ..memory import kept_memory
from .export import write_scheduler
from .records import Forecast, TensorBoard, draw_samples, summary
from .resuming import open_run
from .run_folder import LOG_COLUMNS, RunFolder
from .starting import Start
from .state import State, Task
from .step import batches, take_step
from .stopping import Stops, StopSignals

_log = logging.getLogger("ddpm_fast")


@dataclass(frozen=True)
class TrainResult:
    """How a call of `train` or `Trainer.run` ended.

    Attributes:
        step: Steps since the run began.
        loss: Mean loss since the last row of the log, or in the row that the last step wrote. NaN if there is neither.
        seconds: Time spent in steps since the run began, in seconds.
        stopped_by: "SIGINT", "SIGTERM", "SIGHUP", "max_minutes", or None if all steps are done.
    """

    step: int
    loss: float
    seconds: float
    stopped_by: str | None


class _CallbackError(Exception):
    """The error of a callback, told from errors of the run.

    Attributes:
        error: The error.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


def run_steps(
    start: Start,
    task: Task,
    state: State,
    *,
    max_minutes: float | None,
    progress: bool,
    data_check: str,
    lock: bool,
) -> TrainResult:
    """Run the task's steps from the beginning or from the newest checkpoint.

    Args:
        start: The run.
        task: The task.
        state: The state before the first step. It becomes the state after the last one.
        max_minutes: See `train`, for the others too.
        progress: Show a progress bar.
        data_check: Comparison of a resumed run's images.
        lock: Lock the folder.
    """
    locks, keeps = lock and task.team.is_first, task.device.type == "cpu"
    with start.run.locked() if locks else nullcontext(), kept_memory() if keeps else nullcontext():
        try:
            return _run(start, task, state, max_minutes=max_minutes, progress=progress, data_check=data_check)
        except _CallbackError as failed:
            raise failed.error from None


def _run(start: Start, task: Task, state: State, *, max_minutes: float | None, progress: bool, data_check: str) -> TrainResult:
    """Run the task's steps in a folder that is locked."""
    run = start.run
    options, team = task.options, task.team
    steps, batch_size = options["steps"], options["batch_size"]
    checkpoint_every, checkpoint_minutes = options["checkpoint_every"], options["checkpoint_minutes"]
    team.check_same("train", task.identity() if team.size > 1 else {})
    config = team.on_first(lambda: open_run(run, task, state, start.resume, data_check))
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
    logged_step, logged_seconds, loss = state.step, state.seconds, math.nan
    mark = time.perf_counter()  # end of the last stretch that is counted in state.seconds
    saved = nullcontext() if config is None else _saved_if_it_fails(run, config, task, state)
    stops = Stops(team)
    with (
        StopSignals(once=team.size == 1) as signals,
        generators,
        bar,
        saved,
        closing(batches(task, state.step)) as batch,
        closing(stops),
    ):
        while state.step < steps and stopped_by is None:
            grad_norm, rate = take_step(task, state, *next(batch))
            step_loss = state.losses[-1]
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
            if task.on_step is not None:
                _call(task.on_step, state.step, step_loss.clone())  # the log needs it unchanged

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
                    saved_to = _save_checkpoint(run, task, state)
                    if task.on_checkpoint is not None:
                        _call(task.on_checkpoint, saved_to)
                last_checkpoint = time.monotonic()
                mark = time.perf_counter()
        team.largest(0)()  # a launcher ends the others soon after the first process ends, so all wait for the checkpoint
    tensorboard.write("close")
    if stopped_by and team.is_first:
        _log.info("stopped by %s at step %d of %d; checkpoint saved", stopped_by, state.step, steps)
    return TrainResult(state.step, state.mean_loss() if state.losses else loss, state.seconds, stopped_by)


def _finite_loss(state: State, grad_norm: Tensor) -> float:
    """Return the mean loss since the last row of the log. Raise FloatingPointError if it or the gradient is not finite."""
    loss = state.mean_loss()
    if math.isinf(loss) or (math.isnan(loss) and state.losses) or not math.isfinite(grad_norm):
        raise FloatingPointError(
            f"train: the loss became {loss} and its gradient's norm {float(grad_norm)} by step {state.step}; "
            "resume with what was saved, or start again with a smaller lr or precision float32"
        )
    return loss


def _call(callback: Callable[..., object], *arguments: object) -> None:
    """Call a callback. Raise its error within a _CallbackError."""
    try:
        callback(*arguments)
    except Exception as error:
        raise _CallbackError(error) from error


def _save_checkpoint(run: RunFolder, task: Task, state: State) -> Path:
    """Write a checkpoint, and return its folder."""

    def write(folder: Path) -> None:
        state.write(folder)
        write_scheduler(folder / "scheduler", task.schedule, task.options["prediction"])

    entries = {"seconds": state.seconds, "losses": [float(loss) for loss in state.losses], "row": state.row}
    return run.save_checkpoint(state.step, entries, write, task.options["keep"])


@contextmanager
def _saved_if_it_fails(run: RunFolder, config: Mapping[str, Any], task: Task, state: State) -> Iterator[None]:
    """Save a checkpoint, if possible, when a file cannot be read or written, a callback fails, or another process ends.

    Raise the error with the name of the last good checkpoint. A callback's error stays as it is.
    """
    try:
        yield
    except _CallbackError:
        with suppress(OSError):
            if state.is_finite():
                _save_checkpoint(run, task, state)
        raise
    except (ProcessLost, ValueError) as error:  # ValueError: an image is damaged that was not decoded before
        # A GPU may still wait for the lost process, or have used half of a sum.
        if (task.device.type == "cpu" or isinstance(error, ValueError)) and state.is_finite():
            _save_checkpoint(run, task, state)
        hint = f"the last good checkpoint is {run.latest_checkpoint() or 'none'}, from which --resume continues"
        if isinstance(error, ArgumentError):
            raise error.renamed(caller="train", got=f"{error.got}; {hint}") from error
        kind = ProcessLost if isinstance(error, ProcessLost) else ValueError
        raise kind(f"train: {error}; {hint}") from error
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
