"""The training loop: Algorithm 1 of Ho et al. (2020) on `q_sample` and `denoising_loss`.

Both ops draw a step's noise from the seeds of its samples, so the noise is never stored. Every draw is a function of
(seed, step), so a checkpoint holds no generator state. A run that was stopped and resumed ends with the same weights, bit
for bit, as one that was not. That holds on one machine with one number of threads, for any number of processes that is a
power of two.

Several processes hold the same state. Each computes the gradients of its part of a batch. Rank 0 alone writes to the run's
folder.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Final

import torch
from torch import Tensor

from ..allocator import kept_memory
from ..distributed import Processes, ProcessLost
from ..errors import ArgumentError
from ..files.writing import write_json
from .export import write_scheduler
from .folder import RunFolder
from .opening import Start, open_run
from .records import CallbackError, Records, call_back
from .state import State, Task
from .step import batches_from, take_step


@dataclass(frozen=True)
class TrainResult:
    """The end of a call of `train` or `Trainer.run`.

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


def run_steps(start: Start, task: Task, state: State) -> TrainResult:
    """Run the task's steps from the beginning, or from the newest checkpoint.

    Args:
        start: The run.
        task: The task.
        state: The state before the first step. It becomes the state after the last one.
    """
    options, processes, stopped_by = task.options, task.processes, None
    with ExitStack() as stack:
        if processes.is_first:
            stack.enter_context(start.run.locked())
        if task.device.type == "cpu":
            stack.enter_context(kept_memory())
        processes.check_same("train", task.identity() if processes.size > 1 else {})
        config = processes.on_first(lambda: open_run(start, task, state))
        state.copy_from_first(processes)
        stack.enter_context(torch.random.fork_rng([task.device] if task.device.type == "cuda" else []))  # the caller's stay
        records = stack.enter_context(Records(start.run, task, state))
        checkpoints = Checkpoints(start.run, task, state, config)

        state.counted_until = time.perf_counter()
        with (
            Stops(processes, options.max_minutes) as stops,
            checkpoints.saved_if_it_fails(),
            closing(batches_from(task, state.step)) as batches,
        ):
            while state.step < options.steps and stopped_by is None:
                grad_norm, rate = take_step(task, state, next(batches))
                records.after_step(grad_norm, rate)
                stopped_by = stops.agreed()
                checkpoints.after_step(grad_norm, stops=stopped_by is not None)

        records.at_end(stopped_by)
        processes.largest(0)()  # a launcher ends the others soon after the first process ends, so all wait for the checkpoint
    return TrainResult(state.step, state.mean_loss() if state.losses else records.loss, state.seconds, stopped_by)


class Stops:
    """A context that knows why a run should stop.

    The first SIGINT, SIGTERM or SIGHUP is a reason. Later ones are ignored, as launchers repeat them while a checkpoint is
    written. A SIGINT after the first signal acts as usual in a single process. Only the main thread receives signals. A SIGHUP
    that is ignored, as under nohup, stays so.

    Args:
        processes: The processes. They stop after the same step, which is the one after a process has a reason.
        max_minutes: The time after which to stop, or None.
    """

    _REASONS: Final[tuple[str | None, ...]] = (None, "max_minutes", "SIGHUP", "SIGTERM", "SIGINT")

    def __init__(self, processes: Processes, max_minutes: float | None) -> None:
        self._processes, self._received = processes, ""
        self._deadline = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._previous: dict[signal.Signals, Any] = {}
        self._largest = processes.largest(0)

    def __enter__(self) -> Stops:
        if threading.current_thread() is threading.main_thread():
            hangup = getattr(signal, "SIGHUP", None)  # a terminal that is closed; Windows has none
            for number in (signal.SIGINT, signal.SIGTERM, hangup):
                if number is not None and not (number == hangup and signal.getsignal(number) is signal.SIG_IGN):
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._received:
            self._received = signal.Signals(number).name
            if self._processes.size == 1:
                signal.signal(signal.SIGINT, self._previous.pop(signal.SIGINT))

    def agreed(self) -> str | None:
        """Tell the others this process's reason to stop. Return the reason of all: of several processes, of the step before."""
        reason = self._received or ("max_minutes" if time.monotonic() > self._deadline else None)
        if self._processes.size == 1:
            return reason
        agreed = self._REASONS[self._largest()]
        self._largest = self._processes.largest(self._REASONS.index(reason))
        return agreed

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        with suppress(ProcessLost):  # the error that ends the run is raised already, or all steps are done
            self._largest()


class Checkpoints:
    """The checkpoints of a run. Rank 0 writes them.

    Args:
        run: The run.
        task: The task.
        state: Its state.
        config: The content of config.json in rank 0.
    """

    def __init__(self, run: RunFolder, task: Task, state: State, config: Mapping[str, Any] | None) -> None:
        self._run, self._task, self._state, self._config = run, task, state, config
        self._last = time.monotonic()

    def after_step(self, grad_norm: Tensor, *, stops: bool) -> None:
        """Save a checkpoint if one is due, or if the run stops.

        Raises:
            FloatingPointError: The loss or the weights are no longer finite.
        """
        options, state = self._task.options, self._state
        due = bool(options.checkpoint_every) and state.step % options.checkpoint_every == 0
        due |= bool(options.checkpoint_minutes) and time.monotonic() - self._last > 60 * options.checkpoint_minutes
        if not (due or stops or state.step == options.steps):
            return
        state.finite_loss(grad_norm)
        if not state.is_finite():  # a spoilt state must not replace a good one
            raise FloatingPointError(
                f"train: the weights are no longer finite after step {state.step}, so they are not saved; "
                f"the last good checkpoint is {self._run.latest_checkpoint() or 'none'}"
            )
        with state.uncounted():
            if self._task.processes.is_first:
                folder = self._save()
                call_back(self._task.on_checkpoint, folder)
        self._last = time.monotonic()

    @contextmanager
    def saved_if_it_fails(self) -> Iterator[None]:
        """Save a checkpoint if a file cannot be read or written, an image is wrong, a callback fails, or another process ends.

        Raise the error with the name of the last good checkpoint. A callback's error stays as it is.
        """
        try:
            yield
        except CallbackError as failed:
            with suppress(OSError):
                self._save_if_finite()
            raise failed.error from None
        except (ProcessLost, ValueError, OSError) as error:
            if not self._task.processes.is_first:
                raise
            raise self._saved_after(error) from error

    def _saved_after(self, error: Exception) -> Exception:
        """Save a checkpoint if possible. Return the error with the name of the last good one."""
        run, state, is_lost = self._run, self._state, isinstance(error, ProcessLost)
        if isinstance(error, OSError):
            run.remove_leftovers()  # they take space
            with suppress(OSError):
                if not run.record.exists():  # the folder was removed
                    run.path.mkdir(parents=True, exist_ok=True)
                    write_json(run.record, self._config or {})
                self._save_if_finite()
            run.remove_leftovers()
        # A GPU may still wait for the lost process, or have used half of a sum.
        elif self._task.device.type == "cpu" or not is_lost:
            self._save_if_finite()
        hint = f"the last good checkpoint is {run.latest_checkpoint() or 'none'}, from which --resume continues"
        if isinstance(error, OSError):
            return OSError(f"train: expected to write to {run.path} at step {state.step}, got: {error}; {hint}")
        if isinstance(error, ArgumentError):  # an image is damaged that was not decoded before
            return error.renamed(caller="train", got=f"{error.got}; {hint}")
        return (ProcessLost if is_lost else ValueError)(f"train: {error}; {hint}")

    def _save_if_finite(self) -> None:
        if self._task.processes.is_first and self._state.is_finite():
            self._save()

    def _save(self) -> Path:
        """Write a checkpoint, and return its folder."""
        task, state = self._task, self._state

        def write(folder: Path) -> None:
            state.write(folder)
            write_scheduler(folder / "scheduler", task.objective)

        entries = {"seconds": state.seconds, "losses": [float(loss) for loss in state.losses], "row": state.row}
        return self._run.save_checkpoint(state.step, entries, write, task.options.keep)
