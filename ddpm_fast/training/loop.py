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
from types import FrameType, TracebackType
from typing import Any, Final

import torch
from torch import Tensor

from ..allocator import kept_memory
from ..distributed import Processes, ProcessLost
from ..files.writing import write_json
from .report import CallbackError, Report, call_back
from .state import State, begin
from .step import batches_from, take_step
from .task import Task


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


def run_steps(task: Task, state: State) -> TrainResult:
    """Run the task's steps from the beginning, or from the newest checkpoint.

    Args:
        task: The task.
        state: The state before the first step. It becomes the state after the last one.
    """
    options, processes, stopped_by = task.run.options, task.run.processes, None
    processes.on_first(lambda: state.load_initial_weights(task))  # before a folder is made
    with ExitStack() as stack:
        if processes.is_first:
            stack.enter_context(task.run.folder.locked())
        if task.run.device.type == "cpu":
            stack.enter_context(kept_memory())
        processes.check_same(task.identity() if processes.size > 1 else {})
        config = processes.on_first(lambda: begin(task, state))
        state.copy_from_first(processes)
        gpus = [task.run.device] if task.run.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(gpus))  # the caller's stay
        saving = Saving(task, state, config)
        stops = stack.enter_context(Stops(processes, options.max_minutes))
        stack.enter_context(saving.if_it_fails())  # signals are kept off: a launcher ends all processes after one is lost
        report = stack.enter_context(closing(Report(task, state)))
        state.counted_until = time.perf_counter()
        with closing(batches_from(task, state.step)) as batches:
            while state.step < options.steps and stopped_by is None:
                grad_norm, rate = take_step(task, state, next(batches))
                report.after_step(grad_norm, rate)
                stopped_by = stops.agreed()
                saving.after_step(grad_norm, stops=stopped_by is not None)
        report.at_end(stopped_by)
        processes.largest(0)()  # a launcher ends the others soon after the first process ends, so all wait for the checkpoint
    return TrainResult(state.step, state.mean_loss() if state.losses else report.loss, state.seconds, stopped_by)


class Stops:
    """A context that knows why a run should stop.

    The first SIGINT, SIGTERM or SIGHUP is a reason. Later ones are ignored, as launchers repeat them while a checkpoint is
    written. A SIGINT after the first signal acts as usual in a single process. Only the main thread receives signals. A SIGHUP
    that is ignored, as under nohup, stays ignored.

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
        """Return the reason to stop that all processes share. With more than one process, it is known one step later."""
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


class Saving:
    """The saving of checkpoints: when one is due, and when the run stops or fails. Rank 0 writes them.

    Args:
        task: The task.
        state: Its state.
        config: The content of config.json in rank 0.
    """

    def __init__(self, task: Task, state: State, config: Mapping[str, Any] | None) -> None:
        self._task, self._state, self._config = task, state, config
        self._last = time.monotonic()

    def after_step(self, grad_norm: Tensor, *, stops: bool) -> None:
        """Save a checkpoint if one is due, or if the run stops.

        Raises:
            FloatingPointError: The loss or the weights are no longer finite.
        """
        options, state = self._task.run.options, self._state
        due = bool(options.checkpoint_every) and state.step % options.checkpoint_every == 0
        due |= bool(options.checkpoint_minutes) and time.monotonic() - self._last > 60 * options.checkpoint_minutes
        if not (due or stops or state.step == options.steps):
            return
        state.finite_loss(grad_norm)
        if not state.is_finite():  # a spoilt state must not replace a good one
            raise FloatingPointError(
                f"train: the weights are no longer finite after step {state.step}, so they are not saved; {self._last_good()}"
            )
        with state.uncounted():
            if self._task.run.processes.is_first:
                call_back(self._task.on_checkpoint, state.write(self._task))
        self._last = time.monotonic()

    @contextmanager
    def if_it_fails(self) -> Iterator[None]:
        """Save the finished steps if the body fails, and note the last good checkpoint on its error.

        The error of a callback stays unchanged.
        """
        try:
            yield
        except CallbackError as failed:
            self._try_to_save()
            raise failed.args[0] from failed.args[0].__context__  # as it was raised, perhaps after an error of the run
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            is_lost = isinstance(error, ProcessLost)
            is_known = is_lost or _is_out_of_memory(error) or not isinstance(error, RuntimeError)
            if not (is_known and self._task.run.processes.is_first):
                raise
            # A GPU may still wait for the lost process, or have used half of a sum.
            if not is_lost or self._task.run.device.type == "cpu":
                self._try_to_save()
            error.add_note(f"the run in {self._task.run.folder.path} ended at step {self._state.step}; {self._last_good()}")
            raise

    def _try_to_save(self) -> None:
        """Save the finished steps if the weights are finite. A full disk, a lost folder or a lack of memory may prevent it."""
        task, state, folder = self._task, self._state, self._task.run.folder
        if not (task.run.processes.is_first and state.is_whole):
            return
        with suppress(OSError, MemoryError, RuntimeError):
            if state.is_finite():
                if not folder.record.exists():
                    folder.path.mkdir(parents=True, exist_ok=True)
                    write_json(folder.record, self._config or {})
                state.write(task)
        folder.checkpoints.remove_leftovers()

    def _last_good(self) -> str:
        newest = self._task.run.folder.checkpoints.newest()
        found = f"the last good checkpoint is {newest}, from which --resume continues"
        return found if newest else "there is no checkpoint yet"


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether memory is exhausted. PyTorch has no type of error for the memory of the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
