"""Commands run in this process, and models that they can load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from ddpm_fast import NoiseSchedule, UNet
from ddpm_fast.cli import main


def run(*arguments: object, code: int = 0) -> str:
    """Return the output of a command that has to end with `code`."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


def save_model(folder: Path, model: UNet, schedule: NoiseSchedule, **scheduler: Any) -> Path:
    """Write a model's folder, and return it."""
    model.save_pretrained(folder / "unet")
    config = {"_ddpm_fast": schedule.to_config(), **scheduler}
    (folder / "scheduler_config.json").write_text(json.dumps(config))
    return folder
