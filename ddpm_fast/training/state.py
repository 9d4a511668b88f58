"""The state of a training run, which changes from step to step: the content of a checkpoint."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..distributed import Processes
from ..errors import InvalidValue, UnusablePath, expect
from ..files.models import model_folder
from ..files.writing import remove_leftovers, write_json, write_tensors
from ..interface import Condition, Labels
from ..nn import UNet, UNetConfig
from ..nn.checkpoint import check_finite, check_weights, load_safetensors, read_unet_config
from .checkpoint import WEIGHTS, Checkpoints, read_state
from .export import write_scheduler
from .log import COLUMNS
from .task import Task

# Keys of a network's configuration that its weights do not depend on.
_NOT_IN_WEIGHTS: Final = frozenset(
    {"sample_size", "dropout", "num_train_timesteps", "data_range", *Labels.KEYS, *Condition.KEYS}
)


_log = logging.getLogger("ddpm_fast")


@dataclass
class State:
    """The parts of a run that change from step to step: the content of a checkpoint."""

    model: nn.Module
    ema: nn.Module  # moving average of the weights
    optimizer: torch.optim.Optimizer
    step: int = 0  # steps done
    seconds: float = 0.0  # spent in steps
    losses: list[Tensor] = field(default_factory=list)  # since the last row of the log; 0-d, on the device
    row: Sequence[float] | None = None  # a row that is not in the log yet
    is_whole: bool = True  # False while a step changes the weights
    counted_until: float = 0.0  # the time up to which `seconds` counts

    @classmethod
    def initial(cls, task: Task) -> State:
        """Return the state before the first step, with the task's network, which it moves to the device."""
        model = task.model.to(device=task.run.device, memory_format=task.memory_format)  # type: ignore[call-overload]
        model.train().zero_grad()
        lr, weight_decay = task.run.options.lr, task.run.options.weight_decay
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, fused=True)
        for parameter in trained:  # as the first step makes them, so that a checkpoint always has them
            moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.zeros((), dtype=torch.float32, device=task.run.device), **moments}
        return cls(model, copy.deepcopy(model).requires_grad_(False).eval(), optimizer)

    @property
    def trained(self) -> list[Tensor]:
        """The parameters that are trained."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @property
    def moments(self) -> dict[str, Tensor]:
        """The optimizer's state as a checkpoint names it, `<key>.<parameter>`."""
        named = [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        return {f"{key}.{name}": value for name, each in named for key, value in self.optimizer.state[each].items()}

    def mean_loss(self) -> float:
        """Return the mean loss since the last row of the log, or NaN if there was no step."""
        return float(torch.stack(self.losses).mean()) if self.losses else math.nan

    def is_finite(self) -> bool:
        """Return whether all weights, their average and the optimizer's moments are finite."""
        tensors = [*self.model.parameters(), *self.ema.parameters(), *self.moments.values()]
        norms = torch._foreach_norm(tensors, math.inf)
        return bool(torch.stack(norms).isfinite().all())

    def finite_loss(self, grad_norm: Tensor) -> float:
        """Return the mean loss since the last row of the log. Raise FloatingPointError if it or the gradient is not finite."""
        loss = self.mean_loss()
        if math.isinf(loss) or (math.isnan(loss) and self.losses) or not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"train: the loss became {loss} and its gradient's norm {float(grad_norm)} by step {self.step}; "
                "resume with what was saved, or start again with a smaller lr or precision float32"
            )
        return loss

    def count_time(self) -> None:
        """Add the time since it was counted last to `seconds`."""
        now = time.perf_counter()
        self.seconds += now - self.counted_until
        self.counted_until = now

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Count the time until here, and not that of the body."""
        self.count_time()
        yield
        self.counted_until = time.perf_counter()

    def copy_from_first(self, processes: Processes) -> None:
        """Copy the state of rank 0 to all processes."""
        self.step, self.seconds, losses = processes.from_first((self.step, self.seconds, [float(loss) for loss in self.losses]))
        device = next(self.model.parameters()).device
        self.losses = [torch.tensor(loss, dtype=torch.float32, device=device) for loss in losses]
        tensors = [self.model.state_dict(), self.ema.state_dict(), self.moments]
        processes.copy_from_first([tensor for named in tensors for tensor in named.values()])

    def write(self, task: Task) -> Path:
        """Write a checkpoint, and return its folder."""

        def write(folder: Path) -> None:
            for model, name in ((self.model, "unet"), (self.ema, "unet_ema")):
                if isinstance(model, UNet):
                    model.save_pretrained(folder / name)
                else:  # some weights may be one
                    write_tensors(folder / WEIGHTS[name], {key: value.clone() for key, value in model.state_dict().items()})
            write_tensors(folder / "optimizer.safetensors", self.moments)
            write_scheduler(folder / "scheduler", task.run.objective)

        entries = {"seconds": self.seconds, "losses": [float(loss) for loss in self.losses], "row": self.row}
        return task.run.folder.checkpoints.add(self.step, entries, write, task.run.options.keep)

    def load_initial_weights(self, task: Task) -> None:
        """Load the weights and their average that the option `init` names, unless it names none or the run has checkpoints."""
        init = None if task.run.network is None else task.run.network.init
        if init is None or task.run.folder.checkpoints.folders():
            return
        assert isinstance(self.model, UNet)  # `train` has made it
        wanted = UNetConfig.from_dict(self.model.config).to_dict()
        for model, source in zip((self.model, self.ema), _read_networks(Path(init)), strict=True):
            found = UNetConfig.from_dict(source.config).to_dict()
            keys = [key for key in {**wanted, **found} if key not in _NOT_IN_WEIGHTS]
            differing = [key for key in keys if wanted.get(key) != found.get(key)]
            if differing:
                others = ", ".join(f"{key} is {found.get(key)!r} instead of {wanted.get(key)!r}" for key in differing)
                raise InvalidValue("init", "to hold a network as the options describe it", f"{init!r}, in which {others}")
            model.load_state_dict(source.state_dict())

    def load(self, folder: Path) -> None:
        """Load a checkpoint. Raise a ValueError if it is another network's, or not finite."""
        for model, name in ((self.model, "unet"), (self.ema, "unet_ema")):
            if isinstance(model, UNet):
                weights = UNet.from_pretrained(folder / name).state_dict()
            else:
                weights = load_safetensors(folder / WEIGHTS[name])
            check_weights(folder / name, "the options", model.state_dict(), weights)
            model.load_state_dict(weights)
        file = folder / "optimizer.safetensors"
        tensors, moments = load_safetensors(file), self.moments
        check_weights(file, "the network", moments, tensors)
        check_finite(file, tensors)
        for name, moment in moments.items():
            moment.copy_(tensors[name])  # in the parameter's memory format: fused optimizers walk through the storage
        state = read_state(folder)
        self.step, self.seconds, self.row = state.step, state.seconds, state.row
        device = next(self.model.parameters()).device
        self.losses = [torch.tensor(loss, dtype=torch.float32, device=device) for loss in state.losses]


def begin(task: Task, state: State) -> dict[str, Any]:
    """Begin or continue the run in its folder. Load its newest checkpoint into the state. Return the content of config.json."""
    folder, checkpoints, config = task.run.folder, task.run.folder.checkpoints, task.config()
    checkpoint = checkpoints.newest()
    if task.run.stored is None:
        folder.check_new()  # it was before the images were read
    else:
        config = task.continuing(task.run.stored, config, warn=checkpoint is not None)
    if checkpoint is not None:
        state.load(checkpoint)
    elif task.run.stored is not None:
        # A disk may have failed, so nothing is replaced.
        expect(not checkpoints.folders(), "", f"a whole checkpoint in {checkpoints.path}", "none that can be read")
        if folder.log.last_step():
            _log.warning("%s has no checkpoint yet: the run starts again from step 0, and its log too", folder.path)
    write_json(folder.record, config)  # with the options that a resumed run changes
    checkpoints.path.mkdir(exist_ok=True)  # a run without this folder has lost it
    checkpoints.remove_leftovers()
    remove_leftovers(folder.path)
    folder.log.cut(state.step)
    if state.row is not None and folder.log.last_step() < state.step:  # a full disk has ended the run before this row
        folder.log.row(dict(zip(COLUMNS, state.row[1:], strict=True)), int(state.row[0]))
    if folder.log.last_step() == state.step:  # a full disk can end a run between the row and the end of the losses that it has
        state.losses.clear()
    state.row = None
    return config


def _read_networks(init: Path) -> tuple[UNet, UNet]:
    """Return a network and its moving average. A folder that has no average gives the same network twice."""

    def read(folder: Path) -> tuple[UNet, UNet]:
        if (folder / "unet_ema").is_dir():
            return UNet.from_pretrained(folder / "unet"), UNet.from_pretrained(folder / "unet_ema")
        network = UNet.from_pretrained(folder)
        return network, network

    init = model_folder("init", init, read_unet_config)
    checkpoints, found = Checkpoints(init), None
    with suppress(FileNotFoundError):
        found = checkpoints.read_newest("", read) if checkpoints.path.is_dir() else read(init)
    if found is None:
        wanted = "to be the folder of a model, of a run with a checkpoint, or of a checkpoint"
        raise UnusablePath("init", wanted, repr(str(init)))
    return found
