"""The task of a training run, which stays, and its state, which is the content of a checkpoint."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..distributed import Processes
from ..errors import InvalidValue, UnusablePath
from ..files.writing import write_tensors
from ..nn import UNet, UNetConfig
from ..nn.checkpoint import check_finite, check_weights, load_safetensors
from ..resources import no_folder
from ..schedule import Objective
from ..version import __version__
from .checkpoint import read_state
from .data import ItemDataset
from .folder import FORMAT, RunFolder
from .options import LOCAL, TrainOptions
from .rng import TrainingRng

WEIGHTS: Final = {"unet": "model.safetensors", "unet_ema": "ema.safetensors"}
"""Files of a checkpoint for the weights and the moving average of a network that is no `UNet`."""
# Keys of a network's configuration that its weights do not depend on.
_NOT_IN_WEIGHTS: Final = frozenset(
    {"sample_size", "dropout", "num_train_timesteps", "class_names", "condition", "condition_range", "data_range"}
)


@dataclass(frozen=True)
class Task:
    """The parts of a run that do not change from step to step."""

    options: TrainOptions  # with the size of micro-batches
    data_and_model: Mapping[str, Any]  # the options of data and network, if `train` made them
    model: nn.Module
    labelled: bool  # the network is given the class
    dataset: ItemDataset
    objective: Objective
    loss_weights: Tensor | None  # float32 [T], on the device; None: 1
    rng: TrainingRng
    device: torch.device
    processes: Processes
    on_step: Callable[[int, Tensor], object] | None = None
    on_checkpoint: Callable[[Path], object] | None = None

    @property
    def recorded(self) -> dict[str, Any]:
        """The options that config.json has."""
        return {**self.data_and_model, **self.options.recorded()}

    def identity(self) -> dict[str, Any]:
        """Return what must be the same in all processes, by name."""
        options = {name: value for name, value in self.recorded.items() if name not in LOCAL}
        described = {"number of images": len(self.dataset), "classes": self.dataset.info.classes}
        images = {"dataset": (self.dataset.info.shape, self.dataset.fingerprint())}
        return {**options, "model": self.network, "objective": self.objective.to_config(), **described, **images}

    @property
    def micro_batch_size(self) -> int:
        """Number of images whose gradients are computed at a time."""
        assert self.options.micro_batch_size is not None
        return self.options.micro_batch_size

    @property
    def num_micro_batches(self) -> int:
        """Number of micro-batches of a step, all processes together."""
        return self.options.batch_size // self.micro_batch_size

    @property
    def micro_batches(self) -> range:
        """Numbers of this process's micro-batches within a step."""
        each = self.num_micro_batches // self.processes.size
        return range(self.processes.rank * each, (self.processes.rank + 1) * each)

    @property
    def sums_in_tree(self) -> bool:
        """True if gradients are the same bits for any number of processes that is a power of two."""
        return all(count & (count - 1) == 0 for count in (self.processes.size, len(self.micro_batches)))

    @property
    def memory_format(self) -> torch.memory_format:
        """Memory format of images and weights. Signals and volumes are contiguous."""
        is_image = len(self.dataset.info.shape) == 3
        return torch.channels_last if self.options.channels_last and is_image else torch.contiguous_format

    @property
    def network(self) -> dict[str, Any]:
        """The description of the network in config.json."""
        if isinstance(self.model, UNet):
            return {"unet": self.model.config}
        return {"network": f"{type(self.model).__module__}.{type(self.model).__qualname__}"}

    def config(self) -> dict[str, Any]:
        """Return the content of config.json."""
        info = self.dataset.info
        return {
            "format": FORMAT,
            "options": self.recorded,
            **self.network,
            "objective": self.objective.to_config(),
            "dataset": {
                "images": len(self.dataset),
                "shape": list(info.shape),
                "preparation": info.preparation,
                "classes": list(info.classes),
                **info.described,
            },
            "threads": torch.get_num_threads() if self.device.type == "cpu" else None,
            "versions": {"ddpm_fast": __version__, "torch": torch.__version__},
        }


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
    counted_until: float = 0.0  # the time up to which `seconds` counts

    @classmethod
    def initial(cls, task: Task) -> State:
        """Return the state before the first step, with the task's network, which it moves to the device."""
        model = task.model.to(device=task.device, memory_format=task.memory_format)  # type: ignore[call-overload]
        model.train().zero_grad()
        lr, weight_decay = task.options.lr, task.options.weight_decay
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, fused=True)
        return cls(model, copy.deepcopy(model).requires_grad_(False).eval(), optimizer)

    @property
    def trained(self) -> list[Tensor]:
        """The parameters that are trained."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def mean_loss(self) -> float:
        """Return the mean loss since the last row of the log, or NaN if there was no step."""
        return float(torch.stack(self.losses).mean()) if self.losses else math.nan

    def is_finite(self) -> bool:
        """Return whether all weights, their average and the optimizer's moments are finite."""
        moments = [value for values in self.optimizer.state.values() for key, value in values.items() if key != "step"]
        norms = torch._foreach_norm([*self.model.parameters(), *self.ema.parameters(), *moments], math.inf)
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
        """Let all processes have the state of rank 0."""
        step, seconds, num_losses = processes.from_first([self.step, self.seconds, len(self.losses)])
        self.step, self.seconds = int(step), seconds
        device = next(self.model.parameters()).device
        losses = processes.from_first([float(loss) for loss in self.losses] if processes.is_first else [0.0] * int(num_losses))
        self.losses = [torch.tensor(loss, dtype=torch.float32, device=device) for loss in losses]
        tensors = [*self.model.state_dict().values(), *self.ema.state_dict().values()]
        for parameter in self.trained if self.step else ():
            moments = self.optimizer.state[parameter]
            if not moments:
                moments["step"] = torch.zeros((), dtype=torch.float32, device=device)
                moments |= {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            tensors += moments.values()
        processes.copy_from_first(tensors)

    def write(self, folder: Path) -> None:
        """Write the networks and the optimizer's state into a checkpoint's folder."""
        for model, name in ((self.model, "unet"), (self.ema, "unet_ema")):
            if isinstance(model, UNet):
                model.save_pretrained(folder / name)
            else:
                write_tensors(
                    folder / WEIGHTS[name], {key: value.clone() for key, value in model.state_dict().items()}
                )  # some may be one
        tensors = {
            f"{key}.{name}": value
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
            for key, value in self.optimizer.state[parameter].items()
        }
        write_tensors(folder / "optimizer.safetensors", tensors)

    def load_initial_weights(self, task: Task) -> None:
        """Load the weights and their moving average from the folder that the option `init` names, if it names one."""
        init = task.data_and_model.get("init")
        if init is None:
            return
        assert isinstance(self.model, UNet)  # `train` has made it
        wanted = UNetConfig.from_dict(self.model.config).to_dict()
        for model, source in zip((self.model, self.ema), _read_networks(Path(init)), strict=True):
            found = UNetConfig.from_dict(source.config).to_dict()
            keys = [key for key in {**wanted, **found} if key not in _NOT_IN_WEIGHTS]
            differing = [key for key in keys if wanted.get(key) != found.get(key)]
            if differing:
                others = ", ".join(f"{key} is {found.get(key)!r} instead of {wanted.get(key)!r}" for key in differing)
                got = f"{init!r}, in which {others}"
                raise InvalidValue("train", "init", "to hold a network as the options describe it", got)
            model.load_state_dict(source.state_dict())

    def load(self, folder: Path) -> None:
        """Load a checkpoint. Raise a ValueError if it is another network's, or not finite."""
        for model, name in ((self.model, "unet"), (self.ema, "unet_ema")):
            if isinstance(model, UNet):
                weights = UNet.from_pretrained(folder / name).state_dict()
            else:
                weights = load_safetensors("train", folder / WEIGHTS[name])
            check_weights("train", folder / name, "the options", model.state_dict(), weights)
            model.load_state_dict(weights)
        file = folder / "optimizer.safetensors"
        tensors = load_safetensors("train", file)
        parameters = {name: each for name, each in self.model.named_parameters() if each.requires_grad}
        moments = {f"{key}.{name}": value for name, value in parameters.items() for key in ("exp_avg", "exp_avg_sq")}
        check_weights("train", file, "the network", moments | {f"step.{name}": torch.zeros(()) for name in parameters}, tensors)
        check_finite("train", file, tensors)
        for name, parameter in parameters.items():
            self.optimizer.state[parameter] = {
                "step": tensors[f"step.{name}"].to(parameter.device),
                # The parameter's memory format: fused optimizers walk through the storage.
                **{key: torch.empty_like(parameter).copy_(tensors[f"{key}.{name}"]) for key in ("exp_avg", "exp_avg_sq")},
            }
        state = read_state("train", folder)
        self.step, self.seconds, self.row = state.step, state.seconds, state.row
        device = next(self.model.parameters()).device
        self.losses = [torch.tensor(loss, dtype=torch.float32, device=device) for loss in state.losses]


def _read_networks(init: Path) -> tuple[UNet, UNet]:
    """Return a network and its moving average. A folder that has no average gives the same network twice."""

    def read(folder: Path) -> tuple[UNet, UNet]:
        if (folder / "unet_ema").is_dir():
            return UNet.from_pretrained(folder / "unet"), UNet.from_pretrained(folder / "unet_ema")
        network = UNet.from_pretrained(folder)
        return network, network

    run = RunFolder(init)
    found = None
    if run.checkpoints.is_dir():
        found = run.read_latest("", read)
    elif init.is_dir():
        with suppress(FileNotFoundError):
            found = read(init)
    if found is None:
        wanted = "to be the folder of a model, of a run with a checkpoint, or of a checkpoint"
        raise UnusablePath("train", "init", wanted, repr(str(init)) if init.is_dir() else no_folder(init))
    return found
