"""Records of a training run for its user: description, progress bar, log, TensorBoard's files, grids of samples."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import listed
from ..files.images import in_bands, save_grid, shown_channels
from ..nn import UNet
from ..plan import default_plan
from ..sampling.progress import progress_bar
from ..sampling.sampler import sample
from .data import DatasetInfo
from .data.condition import examples
from .folder import LOG_COLUMNS, RunFolder
from .state import State, Task

_log = logging.getLogger("ddpm_fast")


def summary(run: RunFolder, task: Task, state: State) -> str:
    """Describe what is about to be trained, on what, and where the records go."""
    options, info, objective = task.options, task.dataset.info, task.objective
    channels, *sides = info.shape
    classes = f"{len(info.classes)} classes" if len(info.classes) > 1 else "no classes"
    parameters = sum(parameter.numel() for parameter in state.model.parameters())
    machine = f"{options.precision} on {task.device}"
    if task.device.type == "cpu":
        threads = torch.get_num_threads()
        machine += f", {threads} thread" + ("s" if threads > 1 else "")
    epochs = options.steps * options.batch_size / len(task.dataset)
    batch = f"{options.batch_size} images a step"
    if task.num_micro_batches > 1:
        given = f" --threads {torch.get_num_threads()}" if task.device.type == "cpu" else ""
        same = f"the same on 1, 2, 4, ... processes with --micro-batch-size {task.micro_batch_size}{given}"
        sums = same if task.sums_in_tree else "equal up to rounding on other numbers of processes"
        batch += f" in micro-batches of {task.micro_batch_size} on {task.processes.size} process"
        batch += f"{'es' if task.processes.size > 1 else ''}; weights are {sums}"
    records = [f"log.csv every {options.log_every} steps"]
    if options.sample_every and len(sides) == 2:
        shown = "" if channels in (1, 3, 4) else " of channel 0"
        records.append(f"samples/{shown} every {options.sample_every} steps")
    every = [f"{options.checkpoint_every} steps"] if options.checkpoint_every else []
    every += [f"{options.checkpoint_minutes:g} minutes"] if options.checkpoint_minutes else []
    records.append(f"checkpoints/ every {' and every '.join(every)}" if every else "checkpoints/ at the end")
    rows = {
        "data": f"{info.name}: {len(task.dataset)} images, {classes}",
        "images": f"{'x'.join(map(str, reversed(sides)))} {'pixels' if len(sides) == 2 else 'values'}, "
        + f"{channels} channel{'s' if channels > 1 else ''}, {info.preparation}",
        **({"reads": _condition(info)} if info.condition_channels else {}),
        "network": f"{parameters / 1e6:.2f} million parameters, "
        + ("class-conditional, " if task.labelled else "unconditional, ")
        + _attention(task.model, min(sides))
        + (f", started from {task.data_and_model['init']}" if task.data_and_model.get("init") else ""),
        "predicts": f"{objective.name} on the schedule {objective.schedule.name}"
        + (", and the variance" if objective.predicts_variance else ""),
        "machine": machine,
        **({"batch": batch} if task.num_micro_batches > 1 else {}),
        "steps": f"{options.steps} of {options.batch_size} images: {epochs:{',.0f' if epochs >= 100 else '.2g'}} epochs",
        "records": f"{run.path}/: {', '.join(records)}",
    }
    title = f"Resuming {run.path} at step {state.step}" if state.step else f"Training {run.path}"
    return "\n".join([title, *(f"  {name:<8} {text}" for name, text in rows.items())])


def _attention(model: nn.Module, side: int) -> str:
    """Say where a network has attention, or its class if it is no `UNet`."""
    if not isinstance(model, UNet):
        return type(model).__name__
    levels = enumerate(model.config["down_block_types"])
    attended = [str(side >> level) for level, kind in levels if kind.startswith("Attn")]
    return f"attention at {', '.join(attended)} pixels" if attended else "attention in the middle block alone"


def _condition(info: DatasetInfo) -> str:
    """Say what the network reads beside x_t."""
    channels = f"{info.condition_channels} channel{'s' if info.condition_channels > 1 else ''} of a condition"
    return channels if info.condition == "images" else f"{channels}: {info.condition}"


class CallbackError(Exception):
    """The error of a callback, told from errors of the run.

    Attributes:
        error: The error.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


def call_back(callback: Callable[..., object] | None, *arguments: object) -> None:
    """Call a callback if there is one. Raise its error within a CallbackError."""
    try:
        if callback is not None:
            callback(*arguments)
    except Exception as error:
        raise CallbackError(error) from error


class Records:
    """A context that shows and writes what a run does. Rank 0 does so.

    Args:
        run: The run.
        task: The task.
        state: Its state.

    Attributes:
        loss: Mean loss in the last row of the log that this call wrote, or NaN.
    """

    _FIRST, _LAST = 3, 13  # the first steps of a call are slower

    def __init__(self, run: RunFolder, task: Task, state: State) -> None:
        self._run, self._task, self._state, self.loss = run, task, state, math.nan
        first = task.processes.is_first
        if first:
            _log.info("%s", summary(run, task, state))
            if task.options.warmup_steps >= task.options.steps:
                _log.warning(
                    "the learning rate rises over warmup_steps = %d, more steps than there are", task.options.warmup_steps
                )
        self._tensorboard = TensorBoard(run, state.step, enabled=task.options.tensorboard and first)
        shown = task.options.progress and first
        self._bar = progress_bar(task.options.steps, "training", "step", shown=shown, done=state.step)
        self._logged_step, self._logged_seconds = state.step, state.seconds
        self._first_step, self._timed_from = state.step, 0.0
        self._buffers = {name: buffer.clone() for name, buffer in state.model.named_buffers()}

    def __enter__(self) -> Records:
        return self

    def after_step(self, grad_norm: Tensor, rate: float) -> None:
        """Record a step: its gradient's norm before clipping, 0-d, and its learning rate.

        Raises:
            FloatingPointError: The loss or the gradient is no longer finite.
        """
        options, state = self._task.options, self._state
        step_loss = state.losses[-1]
        self._bar.update()
        if self._task.processes.is_first:
            self._forecast()
            if self._buffers:
                self._say_which_buffers_change()
        if state.step % options.log_every == 0 or state.step in (1, options.steps):
            self._write_row(grad_norm, rate)
        if options.sample_every and state.step % options.sample_every == 0:
            self._draw_grid()
        call_back(self._task.on_step, state.step, step_loss.clone())  # the log needs it unchanged

    def at_end(self, stopped_by: str | None) -> None:
        """Record the end of the run, and the reason if not all steps are done."""
        options, state = self._task.options, self._state
        is_new = state.step > self._first_step and options.sample_every and state.step % options.sample_every
        if is_new and stopped_by in (None, "max_minutes"):
            self._draw_grid()
        self._tensorboard.write("close")
        if stopped_by and self._task.processes.is_first:
            early = "; the learning rate was still rising (warmup_steps)" if state.step < options.warmup_steps else ""
            text = "stopped by %s at step %d of %d; checkpoint saved%s; continue with resume=True (--resume)"
            _log.info(text, stopped_by, state.step, options.steps, early)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._bar.close()

    def _write_row(self, grad_norm: Tensor, rate: float) -> None:
        """Write a row of the log."""
        state, batch_size = self._state, self._task.options.batch_size
        self.loss = state.finite_loss(grad_norm)
        state.count_time()
        speed = (state.step - self._logged_step) * batch_size / (state.seconds - self._logged_seconds)
        self._logged_step, self._logged_seconds = state.step, state.seconds
        state.row = (state.step, state.step * batch_size, self.loss, float(grad_norm), rate, speed, state.seconds)
        if self._task.processes.is_first:
            self._run.append_log(state.row)
        state.losses.clear()
        self._bar.set_postfix_str(f"loss {self.loss:.4f}, {speed:.1f} images/s", refresh=False)
        for name, value in zip(LOG_COLUMNS[2:6], state.row[2:6], strict=True):
            self._tensorboard.write("add_scalar", f"train/{name}", value, state.step)
        state.row = None

    def _forecast(self) -> None:
        """Say once, soon after the start, how long the rest of the steps will take."""
        options, done = self._task.options, self._state.step - self._first_step
        if done in (self._FIRST, self._LAST) and self._task.device.type == "cuda":
            torch.cuda.synchronize(self._task.device)
        if done == self._FIRST:
            self._timed_from = time.perf_counter()
        elif done == self._LAST:
            each = (time.perf_counter() - self._timed_from) / (self._LAST - self._FIRST)
            text = duration(each * (options.steps - self._state.step))
            if options.max_minutes is not None and 60 * options.max_minutes < each * (options.steps - self._first_step):
                text += f", but at most {options.max_minutes:g} minutes in this call"
            _log.info("  %-8s about %s", "time", text)

    def _say_which_buffers_change(self) -> None:
        """Warn after the first step if the network's forward has changed buffers: bits are not promised then."""
        now = dict(self._state.model.named_buffers())
        changed = [name for name, buffer in self._buffers.items() if not torch.equal(buffer, now[name])]
        self._buffers = {}
        if changed:
            text = "the network's forward changes %s: weights are not bit-identical for other numbers of processes, nor, "
            text += "if a buffer is not persistent, after a resume"
            _log.warning(text, listed(changed))

    def _draw_grid(self) -> None:
        """Draw a grid with the averaged weights, with one column a class or 8 columns."""
        task, state, dataset, info = self._task, self._state, self._task.dataset, self._task.dataset.info
        if not task.processes.is_first or len(info.shape) != 3:  # signals and volumes are no pictures
            return
        columns = min(len(info.classes), 16) if task.labelled else 8
        num = columns * (2 if info.condition_channels else 4)
        path = self._run.samples / f"step-{state.step:08d}.png"
        with state.uncounted():
            try:
                shown = (
                    examples(dataset, [i * len(dataset) // num for i in range(num)], task.options.seed)
                    if info.condition_channels
                    else None
                )
                labels = torch.arange(num) % columns if shown is None else shown.labels
                images = sample(
                    state.ema,
                    default_plan(task.objective, steps=task.options.sample_steps),
                    num,
                    seed=task.options.seed,
                    class_labels=labels if task.labelled else None,
                    condition=None if shown is None else shown.condition,
                    device=task.device,
                    shape=info.shape,
                    progress=False,
                    cuda_graph=False,  # a graph takes memory beside that of the training
                )
                if shown is not None:
                    images = in_bands([shown.condition, images.cpu(), shown.images], columns)
                channels = shown_channels(images.shape[1])
                scale = max(1, 128 // max(images.shape[2:]))
                titles = info.classes[:columns] if task.labelled and shown is None else ()
                save_grid(images, path, columns=columns, channels=channels, scale=scale, titles=titles)
            except (OSError, ValueError) as error:  # a run does not end for want of a picture
                _log.warning("%s could not be drawn: %s", path, error)
                return
            self._tensorboard.write("add_images", "samples", images[:, channels].clamp(-1, 1) / 2 + 0.5, state.step)


class TensorBoard:
    """TensorBoard's event files of a run. If they cannot be written, that is said once and the run goes on without.

    Args:
        run: The run.
        step: Events after this step are written again.
        enabled: Write files, if TensorBoard is installed.
    """

    def __init__(self, run: RunFolder, step: int, *, enabled: bool) -> None:
        self._writer: Any = None
        if not enabled:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(run.tensorboard, purge_step=step + 1)
        except ImportError:
            _log.info("TensorBoard is not installed: no event files (pip install 'ddpm_fast[train]')")
        except OSError as error:
            self._stop(error)

    def write(self, method: str, *arguments: Any) -> None:
        """Call a method of SummaryWriter, if files are written."""
        if self._writer is None:
            return
        try:
            getattr(self._writer, method)(*arguments)
        except OSError as error:
            self._stop(error)

    def _stop(self, error: OSError) -> None:
        _log.warning("TensorBoard's event files cannot be written, so the run goes on without them: %s", error)
        writer, self._writer = self._writer, None
        with suppress(OSError):  # what is left cannot be written either
            if writer is not None:
                writer.close()


def duration(seconds: float) -> str:
    """Return a rough duration in the unit that suits it."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return "a second" if seconds < 1.5 else f"{seconds:.0f} seconds"
