"""Training runs from options by name, as on the command line."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import ddpm_fast
from ddpm_fast import DataOptions, ModelOptions, TrainOptions, TrainResult
from ddpm_fast.training.checkpoint import Checkpoints
from ddpm_fast.training.options import STRUCTS, options_of

# A network of two levels on 8x8 digits: milliseconds a step.
TINY: dict[str, Any] = {
    "data": "digits",
    "channels": [16, 32],
    "layers": 1,
    "attention": [],
    "batch_size": 6,
    "warmup_steps": 3,
    "lr": 1e-3,
    "threads": 1,
    "log_every": 4,
    "sample_every": 0,
    "checkpoint_minutes": 0.0,
    "tensorboard": False,
}
QUIET: dict[str, Any] = {**TINY, "progress": False}
NAMES = {struct: {each.name for each in options_of(struct)} for struct in STRUCTS}


def train(run_dir: str | Path, **options: Any) -> TrainResult:
    """Train with options of any of the three structs."""
    unknown = options.keys() - set().union(*NAMES.values())
    assert not unknown, unknown
    structs = (kind.from_values(options) for kind in (TrainOptions, DataOptions, ModelOptions))
    return ddpm_fast.train(run_dir, *structs)  # type: ignore[arg-type]


def newest_checkpoint(run_dir: Path) -> Path:
    """Return the newest whole checkpoint of a run that has one."""
    checkpoint = Checkpoints(run_dir).newest()
    assert checkpoint is not None
    return checkpoint


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """Everything that the newest checkpoint holds, under unique names."""
    files = newest_checkpoint(run_dir).rglob("*.safetensors")
    return {f"{f.parent.name}.{name}": value for f in files for name, value in safetensors.torch.load_file(f).items()}


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def log_rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["images_per_second"], row["seconds"]  # the only columns that depend on the clock
    return rows
