"""A run with its network and its images: what a step needs, and what config.json says of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..checks import check_same
from ..data.items import ItemDataset
from ..errors import expect
from ..interface import Labels
from ..nn import UNet, UNetConfig
from ..schedule import Objective
from ..version import __version__
from .log import Logger
from .options import LOCAL
from .run import FORMAT, Run

# Keys of a network's configuration that neither the weights nor the training depend on.
_DESCRIPTIVE: Final = frozenset({"sample_size", *Labels.KEYS, "num_train_timesteps"})

_log = logging.getLogger("ddpm_fast")


@dataclass(frozen=True)
class Task:
    """A run with its network and its images.

    Attributes:
        run: The run.
        model: The network.
        labels: The labels that it is given.
        dataset: The images.
        on_step: A function to call after each step, with its number and loss.
        on_checkpoint: A function to call in rank 0 after each checkpoint, with its folder.
        loggers: Loggers besides log.csv.
    """

    run: Run
    model: nn.Module
    labels: Labels
    dataset: ItemDataset
    on_step: Callable[[int, Tensor], object] | None = None
    on_checkpoint: Callable[[Path], object] | None = None
    loggers: Sequence[Logger] = ()

    @property
    def micro_batch_size(self) -> int:
        """Number of images whose gradients are computed at a time."""
        assert self.run.options.micro_batch_size is not None
        return self.run.options.micro_batch_size

    @property
    def num_micro_batches(self) -> int:
        """Number of micro-batches of a step, all processes together."""
        return self.run.options.batch_size // self.micro_batch_size

    @property
    def micro_batches(self) -> range:
        """Numbers of this process's micro-batches within a step."""
        each = self.num_micro_batches // self.run.processes.size
        return range(self.run.processes.rank * each, (self.run.processes.rank + 1) * each)

    @property
    def sums_in_tree(self) -> bool:
        """True if gradients are summed in one tree, so that 1, 2, 4, ... processes compute the same bits."""
        return all(count & (count - 1) == 0 for count in (self.run.processes.size, len(self.micro_batches)))

    @property
    def memory_format(self) -> torch.memory_format:
        """Memory format of images and weights. Signals and volumes are contiguous."""
        is_image = len(self.dataset.info.shape) == 3
        return torch.channels_last if self.run.options.channels_last and is_image else torch.contiguous_format

    @property
    def described(self) -> dict[str, Any]:
        """The description of the network and the objective in config.json."""
        kind = type(self.model)
        named = {"network": f"{kind.__module__}.{kind.__qualname__}"}
        network: dict[str, Any] = {"unet": self.model.config} if isinstance(self.model, UNet) else named
        return {**network, "objective": self.run.objective.to_config()}

    def identity(self) -> dict[str, Any]:
        """Return what must be the same in all processes, by name."""
        options = {name: value for name, value in self.run.recorded.items() if name not in LOCAL}
        info = self.dataset.info
        images = {"number of images": len(self.dataset), "classes": info.classes}
        return {**options, **self.described, **images, "dataset": (info.shape, self.dataset.fingerprint())}

    def config(self) -> dict[str, Any]:
        """Return the content of config.json."""
        info, exact = self.dataset.info, self.run.options.data_check == "exact"
        fingerprint = self.dataset.fingerprint(exact=exact)
        return {
            "format": FORMAT,
            "starter": "Trainer" if self.run.network is None else "train",
            "options": self.run.recorded,
            **self.described,
            "dataset": {
                "images": len(self.dataset),
                "shape": list(info.shape),
                "preparation": info.preparation,
                "classes": list(info.classes),
                **info.described,
                "fingerprint": fingerprint,
            },
            "threads": torch.get_num_threads() if self.run.device.type == "cpu" else None,
            "versions": {"ddpm_fast": __version__, "torch": torch.__version__},
        }

    def continuing(self, stored: Mapping[str, Any], config: Mapping[str, Any], *, warn: bool) -> dict[str, Any]:
        """Return the content of config.json for a run that goes on. Raise if it differs from the one that was started.

        Args:
            stored: The content of config.json.
            config: Its content if the run were started now, whose fingerprint may lack parts of the stored one.
            warn: Warn if gradients are summed in another order than before.
        """
        old, new, path = _kept(stored), _kept(config), self.run.folder.path
        check_same({**dict.fromkeys(old), **new}, old, repr(str(path)))
        dataset = config["dataset"]
        if self.run.options.data_check != "off":
            before, now = stored["dataset"]["fingerprint"], dataset["fingerprint"]
            same_number = stored["dataset"]["images"] == len(self.dataset)  # a sample of a data set may not show it
            expect(
                same_number and all(before.get(kind, digest) == digest for kind, digest in now.items()),
                "",
                f"the images that the run in {path} was started with",
                f'{len(self.dataset)} others; pass data_check="off" (--data-check off) to go on with them',
            )
            dataset = dataset | {"fingerprint": before | now}
        size = "micro_batch_size"
        changes = {"threads": (stored["threads"], config["threads"]), size: (stored["options"][size], config["options"][size])}
        for name, (before, now) in changes.items():
            if warn and before not in (None, now):
                text = "%s was trained with %s %s and goes on with %s: gradients are summed in another order, "
                _log.warning(text + "so weights are equal up to rounding", path, name, before, now)
        return {**config, "dataset": dataset}


def _kept(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a resumed run must have in common with the run that it continues, by name."""
    names = ("shape", "classes", "condition", "condition_range", "data_range")
    dataset = {name: config["dataset"].get(name) for name in names}
    layers = {"model": config.get("network")}
    if config.get("unet") is not None:
        network = UNetConfig.from_dict(config["unet"]).to_dict()
        layers |= {f"model.{name}": value for name, value in network.items() if name not in _DESCRIPTIVE}
    objective = Objective.from_config(config["objective"])
    return {**dataset, **layers, **objective.parts(), "objective": objective}
