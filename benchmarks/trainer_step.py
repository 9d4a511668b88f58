"""The step of training that benchmarks time: that of `Trainer`, without its folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import idioms
import torch

from ddpm_fast import Objective, TrainOptions
from ddpm_fast.data.items import DatasetInfo, Item, collate
from ddpm_fast.distributed import Processes
from ddpm_fast.interface import Labels
from ddpm_fast.training.rng import TrainingRng
from ddpm_fast.training.run import Run, RunFolder
from ddpm_fast.training.state import State
from ddpm_fast.training.step import take_step
from ddpm_fast.training.task import Task


class Images(list[Item]):
    """A data set for machines without Pillow."""

    info: DatasetInfo


def trainer_step(config: dict[str, Any], batch: int, device: str, **options: Any) -> Callable[[], object]:
    """Return a step of `Trainer`, without its folder. `options` are those of `TrainOptions`."""
    image = torch.zeros(3, config["sample_size"], config["sample_size"], dtype=torch.uint8)
    dataset = Images([Item(image, 0)] * batch)
    dataset.info = DatasetInfo("images", tuple(image.shape))
    settings = TrainOptions(**{"batch_size": batch, "micro_batch_size": batch, "precision": "bf16"} | options)
    run = Run(
        folder=RunFolder("none"),
        options=settings,
        data=None,
        network=None,
        objective=Objective(idioms.SCHEDULE),
        loss_weights=None,
        processes=Processes(),
        device=torch.device(device),
        rng=TrainingRng(0, batch),
        stored=None,
    )
    task = Task(
        run,
        model=idioms.random_unet(config),
        labels=Labels(),
        dataset=dataset,  # type: ignore[arg-type]
    )
    return partial(take_step, task, State.initial(task), collate(dataset))
