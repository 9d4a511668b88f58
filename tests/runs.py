"""Training runs from options by name, as on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ddpm_fast
from ddpm_fast import DataOptions, ModelOptions, TrainOptions, TrainResult
from ddpm_fast.training.options import STRUCTS, options_of

NAMES = {struct: {each.name for each in options_of(struct)} for struct in STRUCTS}


def train(run_dir: str | Path, **options: Any) -> TrainResult:
    """Train with options of any of the three structs."""
    unknown = options.keys() - set().union(*NAMES.values())
    assert not unknown, unknown
    structs = (kind.from_values(options) for kind in (TrainOptions, DataOptions, ModelOptions))
    return ddpm_fast.train(run_dir, *structs)  # type: ignore[arg-type]
