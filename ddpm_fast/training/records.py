"""Records of a training run for its user: the description at the start, a forecast, TensorBoard's files, grids of samples."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from typing import Any

import torch

from ..images import save_grid
from ..plan import Prediction, SamplingPlan, ddim_plan, dpm_solver_plan
from ..plan.dpm_solver import measured_options
from ..sampling import sample
from ..schedule import NoiseSchedule
from .run_folder import RunFolder
from .state import State, Task

_log = logging.getLogger("ddpm_fast")


def summary(run: RunFolder, task: Task, state: State) -> str:
    """Describe what is about to be trained, on what, and where the records go."""
    options, dataset = task.options, task.dataset
    channels, height, width = dataset.shape
    classes = f"{len(dataset.classes)} classes" if len(dataset.classes) > 1 else "no classes"
    parameters = sum(parameter.numel() for parameter in state.model.parameters())
    machine = f"{options['precision']} on {task.device}"
    if task.device.type == "cpu":
        threads = torch.get_num_threads()
        machine += f", {threads} thread" + ("s" if threads > 1 else "")
    epochs = options["steps"] * options["batch_size"] / len(dataset)
    batch = f"{options['batch_size']} images a step"
    if task.num_micro_batches > 1:
        given = f" --threads {torch.get_num_threads()}" if task.device.type == "cpu" else ""
        same = f"the same on 1, 2, 4, ... processes with --micro-batch-size {task.micro_batch_size}{given}"
        sums = same if task.sums_in_tree else "equal up to rounding on other numbers of processes"
        batch += f" in micro-batches of {task.micro_batch_size} on {task.team.size} process"
        batch += f"{'es' if task.team.size > 1 else ''}; weights are {sums}"
    records = [f"log.csv every {options['log_every']} steps"]
    if options["sample_every"]:
        records.append(f"samples/ every {options['sample_every']} steps")
    every = [f"{options['checkpoint_every']} steps"] if options["checkpoint_every"] else []
    every += [f"{options['checkpoint_minutes']:g} minutes"] if options["checkpoint_minutes"] else []
    records.append(f"checkpoints/ every {' and every '.join(every)}" if every else "checkpoints/ at the end")
    rows = {
        "data": f"{dataset.name}: {len(dataset)} images, {classes}",
        "images": f"{width}x{height} pixels, {channels} channel{'s' if channels > 1 else ''}, {dataset.preparation}",
        "network": f"{parameters / 1e6:.2f} million parameters, "
        + ("class-conditional" if task.labelled else "unconditional")
        + (f", started from {options['init']}" if options.get("init") else ""),
        "machine": machine,
        **({"batch": batch} if task.num_micro_batches > 1 else {}),
        "steps": f"{options['steps']} of {options['batch_size']} images: {epochs:,.0f} epochs"
        if epochs >= 100
        else f"{options['steps']} of {options['batch_size']} images: {epochs:.2g} epochs",
        "records": f"{run.path}/: {', '.join(records)}",
    }
    title = f"Resuming {run.path} at step {state.step}" if state.step else f"Training {run.path}"
    return "\n".join([title, *(f"  {name:<8} {text}" for name, text in rows.items())])


class Forecast:
    """A line of the log, soon after the start, that says how long the rest of the steps will take."""

    _FIRST, _LAST = 3, 13  # the first steps of a call are slower

    def __init__(self, steps: int, device: torch.device) -> None:
        self._steps, self._device, self._done, self._began = steps, device, 0, 0.0

    def after_step(self, step: int) -> None:
        """Count a step of this call, and write the line once the speed is known."""
        self._done += 1
        if self._done in (self._FIRST, self._LAST) and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if self._done == self._FIRST:
            self._began = time.perf_counter()
        elif self._done == self._LAST:
            seconds = (time.perf_counter() - self._began) / (self._LAST - self._FIRST) * (self._steps - step)
            _log.info("  %-8s about %s", "time", duration(seconds))


def duration(seconds: float) -> str:
    """Return a rough duration in the unit that suits it."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


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


def grid_plan(schedule: NoiseSchedule, num_steps: int | None, prediction: Prediction) -> SamplingPlan:
    """Build the plan of the grids, where None takes the default number of steps (`train`'s `sample_steps`)."""
    if measured := measured_options(schedule):
        return dpm_solver_plan(schedule, prediction=prediction, **measured | {"num_steps": num_steps or measured["num_steps"]})
    return ddim_plan(schedule, num_steps or min(50, schedule.num_timesteps), prediction=prediction)


def draw_samples(run: RunFolder, task: Task, state: State, tensorboard: TensorBoard) -> None:
    """Draw a grid with the averaged weights, with one column a class or 8 columns."""
    options = task.options
    columns = min(len(task.dataset.classes), 16) if task.labelled else 8
    labels = torch.arange(4 * columns) % columns if task.labelled else None
    plan = grid_plan(task.schedule, options["sample_steps"], options["prediction"])
    path = run.samples / f"step-{state.step:08d}.png"
    try:
        images = sample(
            *(state.ema, plan, 4 * columns),
            seed=options["seed"],
            class_labels=labels,
            progress=False,
            cuda_graph=False,  # a graph takes memory beside that of the training
        )
        save_grid(images, path, columns=columns)
    except (OSError, ValueError) as error:  # a run does not end for want of a picture
        _log.warning("%s could not be drawn: %s", path, error)
        return
    tensorboard.write("add_images", "samples", images.clamp(-1, 1) / 2 + 0.5, state.step)
