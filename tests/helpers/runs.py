"""Training runs from options by name, as on the command line."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image

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
# The program of a process that trains in the folder that its first argument names, with the options in its second.
TRAIN = "import json, sys; from runs import train; train(sys.argv[1], **json.loads(sys.argv[2]))"
NAMES = {struct: {each.name for each in options_of(struct)} for struct in STRUCTS}
SHARED = {name: value for name, value in QUIET.items() if name in NAMES[TrainOptions]}


def train(run_dir: str | Path, **options: Any) -> TrainResult:
    """Train with options of any of the three structs."""
    unknown = options.keys() - set().union(*NAMES.values())
    assert not unknown, unknown
    kinds = (TrainOptions, DataOptions, ModelOptions)
    structs = (kind(**{name: options[name] for name in NAMES[kind] & options.keys()}) for kind in kinds)
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


def assert_same_runs(a: Path, b: Path) -> None:
    """Expect the same weights, averages, optimizer states and rows of the log, bit for bit."""
    assert_same_weights(a, b)
    assert log_rows(a) == log_rows(b)


def resume_and_compare(begin: Callable[..., object], run_dir: Path, **options: Any) -> None:
    """Resume a run, and expect the weights of one that nothing has disturbed. It is made in the folder "whole" next to it."""
    begin(run_dir, **options, resume=True)
    whole = run_dir.with_name("whole")
    begin(whole, **options)
    assert_same_weights(whole, run_dir)


def pictures(folder: Path, count: int = 3, size: tuple[int, int] = (8, 8), mode: str = "RGB", seed: int = 0) -> Path:
    """Write smooth pictures of (width, height), 0.png, 1.png and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        small = Image.fromarray(rng.integers(0, 256, (2, 3, 3), dtype=np.uint8)).convert(mode)
        small.resize(size, Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


def log_rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["images_per_second"], row["seconds"]  # the only columns that depend on the clock
    return rows
