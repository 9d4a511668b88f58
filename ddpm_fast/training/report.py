"""The report of a run to its user: description, estimate, progress bar, rows of the log and grids of samples."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Final

import torch
from torch import Tensor

from ..checks import first_few
from ..data.condition import examples
from ..files.images import in_bands, save_grid, shown_channels
from ..plan import default_plan
from ..sampling.progress import progress_bar
from ..sampling.sampler import sample
from .log import COLUMNS, LOGGER_FAILS, Logger, tensorboard
from .state import State
from .task import Task

_TIMED: Final = (1, 3)  # steps of a call between which time is taken: the first one is slower

_log = logging.getLogger("ddpm_fast")


class CallbackError(Exception):
    """An exception that a callback or a logger raised, in `args[0]`."""


def call_back(callback: Callable[..., object] | None, *arguments: object) -> None:
    """Call a callback if there is one. Raise its error within a CallbackError."""
    try:
        if callback is not None:
            callback(*arguments)
    except Exception as error:
        raise CallbackError(error) from error


class Report:
    """The report of a run, which rank 0 shows and writes. Close it at the end.

    Args:
        task: The task.
        state: Its state.

    Attributes:
        loss: Mean loss in the last row that it wrote to the log. NaN: it wrote none.
    """

    def __init__(self, task: Task, state: State) -> None:
        self._task, self._state, self.loss = task, state, math.nan
        options, first = task.run.options, task.run.processes.is_first
        if first:
            _log.info("%s", summary(task, state))
        self._loggers: list[Logger] = list(task.loggers) if first else []
        if options.tensorboard and first:
            self._loggers += tensorboard(task.run.folder.tensorboard, state.step)
        self._bar = progress_bar(options.steps, "training", "step", shown=options.progress and first, done=state.step)
        self._logged_step, self._logged_seconds = state.step, state.seconds
        self._first_step, self._drawn_step, self._timed_from = state.step, -1, 0.0
        self._buffers = {name: buffer.clone() for name, buffer in state.model.named_buffers()}

    def after_step(self, grad_norm: Tensor, rate: float) -> None:
        """Record a step: its gradient's norm before clipping, 0-d, and its learning rate.

        Raises:
            FloatingPointError: The loss or the gradient is no longer finite.
        """
        options, state = self._task.run.options, self._state
        step_loss = state.losses[-1]
        self._bar.update()
        if self._task.run.processes.is_first:
            self._estimate()
            if self._buffers:
                self._say_which_buffers_change()
        if state.step % options.log_every == 0 or state.step in (1, options.steps):
            self._write_row(grad_norm, rate)
        early = state.step == options.steps // 100  # a grid that shows a wrong start before it costs hours
        if options.sample_every and (state.step % options.sample_every == 0 or early):
            self._draw_grid()
        call_back(self._task.on_step, state.step, step_loss.clone())  # the log needs it unchanged

    def at_end(self, stopped_by: str | None) -> None:
        """Record the end of the steps, and the reason if not all are done."""
        options, state = self._task.run.options, self._state
        is_new = state.step > self._first_step and options.sample_every and state.step != self._drawn_step
        if is_new and stopped_by in (None, "max_minutes"):
            self._draw_grid()
        if stopped_by and self._task.run.processes.is_first:
            text = "stopped by %s at step %d of %d; checkpoint saved; continue with resume=True (--resume)"
            _log.info(text, stopped_by, state.step, options.steps)

    def close(self) -> None:
        """Close the bar and the loggers."""
        self._bar.close()
        self._tell(lambda logger: logger.close())

    def _tell(self, call: Callable[[Logger], None]) -> None:
        """Call a method of each logger. One that fails is closed and left out from then on, and the others are called."""
        failed: Exception | None = None
        for logger in tuple(self._loggers):
            try:
                call(logger)
            except Exception as error:
                self._loggers.remove(logger)
                with suppress(Exception):  # what is left cannot be written either
                    logger.close()
                if isinstance(error, OSError):
                    _log.warning(LOGGER_FAILS, type(logger).__name__, error)
                else:
                    failed = failed or error
        if failed is not None:
            raise CallbackError(failed) from failed

    def _write_row(self, grad_norm: Tensor, rate: float) -> None:
        """Write a row of the log."""
        state, samples = self._state, self._state.step * self._task.run.options.batch_size
        self.loss = state.finite_loss(grad_norm)
        state.count_time()
        steps, seconds = state.step - self._logged_step, state.seconds - self._logged_seconds
        speed = steps * self._task.run.options.batch_size / seconds
        self._logged_step, self._logged_seconds = state.step, state.seconds
        row = dict(zip(COLUMNS, (samples, self.loss, float(grad_norm), rate, speed, state.seconds), strict=True))
        state.row = [state.step, *row.values()]  # a checkpoint has it if it cannot be written
        if self._task.run.processes.is_first:
            self._task.run.folder.log.row(row, state.step)
        state.losses.clear()
        self._bar.set_postfix_str(f"loss {self.loss:.4f}, {speed:.1f} images/s", refresh=False)
        state.row = None
        self._tell(lambda logger: logger.row(row, state.step))

    def _estimate(self) -> None:
        """Say once, soon after the start, how long the rest of the steps will take."""
        options, state, done = self._task.run.options, self._state, self._state.step - self._first_step
        if done not in _TIMED:
            return
        if self._task.run.device.type == "cuda":
            torch.cuda.synchronize(self._task.run.device)
        state.count_time()
        if done == _TIMED[0]:
            self._timed_from = state.seconds
            return
        each = (state.seconds - self._timed_from) / (_TIMED[1] - _TIMED[0])
        left = min(each * (options.steps - state.step), 1e12)  # a timedelta has at most 10^9 days
        _log.info("  %-8s about %s", "time", timedelta(seconds=round(left)))

    def _say_which_buffers_change(self) -> None:
        """Warn after the first step if the network's forward has changed buffers: bits are not promised then."""
        now = dict(self._state.model.named_buffers())
        changed = [name for name, buffer in self._buffers.items() if not torch.equal(buffer, now[name])]
        self._buffers = {}
        if changed:
            text = "the network's forward changes %s: weights are not bit-identical for other numbers of processes, nor, "
            text += "if a buffer is not persistent, after a resume"
            _log.warning(text, first_few(changed))

    def _draw_grid(self) -> None:
        """Draw a grid with the averaged weights, with one column per class, or 8 columns."""
        task, state, dataset, info = self._task, self._state, self._task.dataset, self._task.dataset.info
        seed = task.run.options.seed
        self._drawn_step = state.step
        if not task.run.processes.is_first or len(info.shape) != 3:  # signals and volumes are no pictures
            return
        labels, reads = task.labels, info.condition_channels
        columns = labels.columns or 8
        num = columns * (2 if reads else 4)
        path = task.run.folder.samples / f"step-{state.step:08d}.png"
        with state.uncounted():
            try:
                shown = examples(dataset, [i * len(dataset) // num for i in range(num)], seed) if reads else None
                images = sample(
                    state.ema,
                    default_plan(task.run.objective, steps=task.run.options.sample_steps),
                    num,
                    seed=seed,
                    class_labels=(labels.in_turn(num, columns) if shown is None else shown.labels) if labels.reads else None,
                    condition=None if shown is None else shown.condition,
                    device=task.run.device,
                    shape=info.shape,
                    progress=False,
                    cuda_graph=False,  # a graph would take memory that the training needs
                )
                if shown is not None:
                    images = in_bands([shown.condition, images.cpu(), shown.images], columns)
                channels = shown_channels(images.shape[1])
                scale = max(1, 128 // max(images.shape[2:]))
                titles = labels.names[:columns] if shown is None else ()
                save_grid(images, path, columns=columns, channels=channels, scale=scale, titles=titles)
            except (
                OSError,
                ValueError,
                MemoryError,
                torch.OutOfMemoryError,
            ) as error:  # no reason to end the run
                _log.warning("%s could not be drawn: %s", path, error)
                return
            self._tell(lambda logger: logger.images(images[:, channels], state.step))


def summary(task: Task, state: State) -> str:
    """Describe what is about to be trained, on what, and how."""
    options, info, objective = task.run.options, task.dataset.info, task.run.objective
    channels, *sides = info.shape
    parameters = sum(parameter.numel() for parameter in state.model.parameters())
    kind = "class-conditional" if task.labels.reads else "unconditional"
    epochs = options.steps * options.batch_size / len(task.dataset)
    threads = torch.get_num_threads() if task.run.device.type == "cpu" else None
    rows = {
        "data": f"{info.name}: {len(task.dataset)} images, {len(info.classes) if len(info.classes) > 1 else 'no'} classes",
        "images": f"{'x'.join(map(str, reversed(sides)))} {'pixels' if len(sides) == 2 else 'values'}, "
        f"{_number(channels, 'channel')}, {info.preparation}",
        "network": f"{parameters / 1e6:.2f} million parameters, {kind}",
        "predicts": f"{objective.name} on the schedule {objective.schedule.name}"
        + (", and the variance" if objective.predicts_variance else ""),
        "machine": f"{options.precision} on {task.run.device}" + (f", {_number(threads, 'thread')}" if threads else ""),
        "steps": f"{options.steps} of {options.batch_size} images: {epochs:{',.0f' if epochs >= 100 else '.2g'}} epochs"
        + (", in all of which the learning rate rises (warmup_steps)" if options.warmup_steps >= options.steps else ""),
    }
    if info.condition_channels:
        rows["reads"] = f"{_number(info.condition_channels, 'channel')} of a condition: {info.condition}"
    if task.num_micro_batches > 1:
        size, processes = task.micro_batch_size, _number(task.run.processes.size, "process", "es")
        same = f"the same on 1, 2, 4, ... processes with --micro-batch-size {size}" + (
            f" --threads {threads}" if threads else ""
        )
        weights = same if task.sums_in_tree else "equal up to rounding on other numbers of processes"
        rows["batch"] = f"{options.batch_size} images a step in micro-batches of {size} on {processes}; weights are {weights}"
    title = f"Resuming {task.run.folder.path} at step {state.step}" if state.step else f"Training {task.run.folder.path}"
    return "\n".join([title, *(f"  {name:<8} {text}" for name, text in rows.items())])


def _number(number: int, of: str, plural: str = "s") -> str:
    return f"{number} {of}{plural if number > 1 else ''}"
