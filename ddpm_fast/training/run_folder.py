"""A training run on disk: its configuration, its log and its checkpoints.

    RUN/
      config.json                       options of the run, checked when it is resumed
      log.csv                           one row every `log_every` steps
      samples/step-00001000.png         grids drawn during training
      tensorboard/                      event files, if TensorBoard is installed
      checkpoints/
        latest -> step-00001000         for people and scripts; resuming finds the newest complete one itself
        step-00001000/
          unet/, unet_ema/              the network and its moving average, as diffusers folders, float32
          scheduler/                    scheduler_config.json
          optimizer.safetensors         the optimizer's state, `<key>.<parameter>`
          state.json                    step, log state, and the size of every other file

A checkpoint is written under a temporary name, flushed to disk and then renamed. A name that begins with
"step-" is therefore a complete checkpoint, even after a crash. Nothing is pickled.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ..atomic import flush_names, read_json, write_json, write_text

FORMAT: Final = 1
LOG_COLUMNS: Final = ("step", "samples", "loss", "grad_norm", "lr", "images_per_second", "seconds")

_log = logging.getLogger("ddpm_fast")


class RunFolder:
    """The folder of a training run. The module's docstring has the layout.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.json"
        self.log_file = self.path / "log.csv"
        self.samples = self.path / "samples"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"

    # ---------------------------------------------------------------------------------------------------- configuration

    def create(self, config: Mapping[str, Any]) -> None:
        """Start a new run.

        Args:
            config: Options for config.json.

        Raises:
            FileExistsError: The folder is not empty.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if any(self.path.iterdir()):
            raise FileExistsError(
                f"train: expected {self.path} to be new or empty; continue the run in it with --resume, or name another folder"
            )
        self.write_config(config)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Replace the configuration."""
        write_json(self.config_file, {"format": FORMAT, **config})

    def read_config(self) -> dict[str, Any]:
        """Return the configuration with which the run was started.

        Raises:
            FileNotFoundError: There is no run.
            ValueError: The file is not such a configuration.
        """
        if not self.config_file.is_file():
            raise FileNotFoundError(f"train: expected a run to resume in {self.path}, which has no {self.config_file.name}")
        config = read_json("train", self.config_file)
        if config.get("format") != FORMAT:
            raise ValueError(f"train: expected {self.config_file} to have format {FORMAT}, got {config.get('format')}")
        for section, key in (("options", "prediction"), ("schedule", "name"), ("dataset", "classes")):
            if key not in (config.get(section) or {}):
                raise ValueError(f"train: expected {self.config_file} to have {section} with {key}, got {config.get(section)}")
        return config

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def latest_checkpoint(self) -> Path | None:
        """Return the newest complete checkpoint, or None."""
        for folder in sorted(self.checkpoints.glob("step-*"), reverse=True):
            if _is_whole(folder):
                return folder
            _log.warning("%s is damaged: left out", folder)
        return None

    def save_checkpoint(self, step: int, state: Mapping[str, Any], write: Callable[[Path], None], keep: int) -> Path:
        """Write a checkpoint, then remove damaged and old ones.

        Args:
            step: Number of finished steps.
            state: Contents of state.json, as JSON types.
            write: Writes the other files into the folder that it gets.
            keep: Number of newest checkpoints to keep, this one included, at least 1.

        Returns:
            The checkpoint's folder.
        """
        final = self.checkpoints / f"step-{step:08d}"
        if not _is_whole(final):
            temporary = self.checkpoints / f".{final.name}.tmp"
            self.remove_leftovers()
            temporary.mkdir(parents=True)
            write(temporary)
            sizes = {str(file.relative_to(temporary)): file.stat().st_size for file in _files(temporary)}
            write_json(temporary / "state.json", {"format": FORMAT, "step": step, **state, "files": sizes})
            _flush(temporary)
            if final.exists():
                self._remove(final)  # damaged
            temporary.rename(final)
            flush_names(self.checkpoints)
        self._point_to(final)
        others = sorted((folder for folder in self.checkpoints.glob("step-*") if folder != final), reverse=True)
        kept = list(filter(_is_whole, others))[: keep - 1]
        for folder in others:
            if folder not in kept:
                self._remove(folder)
        return final

    def remove_leftovers(self) -> None:
        """Remove what a killed process left half written or half removed."""
        for leftover in self.checkpoints.glob(".*.tmp"):
            if leftover.is_symlink():
                leftover.unlink()
            else:
                shutil.rmtree(leftover)

    def _remove(self, checkpoint: Path) -> None:
        hidden = checkpoint.with_name(f".removed-{checkpoint.name}.tmp")  # in one step; half a checkpoint is never seen
        checkpoint.rename(hidden)
        shutil.rmtree(hidden)

    def _point_to(self, checkpoint: Path) -> None:
        link = self.checkpoints / ".latest.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(checkpoint.name, target_is_directory=True)
        link.replace(self.checkpoints / "latest")

    # ---------------------------------------------------------------------------------------------------------- the log

    def append_log(self, row: Sequence[int | float]) -> None:
        """Append one row of `LOG_COLUMNS` to log.csv."""
        new = not self.log_file.exists()
        with self.log_file.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(LOG_COLUMNS)
            writer.writerow([format(value, ".6g") if isinstance(value, float) else value for value in row])

    def log_until(self, step: int) -> str:
        """Return the text of log.csv up to row `step`, without a truncated last row."""
        if not self.log_file.exists():
            return ""
        text = self.log_file.read_text(encoding="utf-8")
        lines = text[: text.rfind("\n") + 1].splitlines(keepends=True)
        return "".join(lines[:1] + [line for line in lines[1:] if int(line.split(",", 1)[0]) <= step])

    def cut_log(self, step: int) -> None:
        """Remove the rows after `step`, which a resumed run writes again."""
        if self.log_file.exists():
            write_text(self.log_file, self.log_until(step))


def _is_whole(checkpoint: Path) -> bool:
    """Return whether every file of the checkpoint exists with its recorded size."""
    try:
        sizes = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _flush(folder: Path) -> None:
    """Flush every file and folder under `folder` to disk."""
    for file in _files(folder):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            flush_names(path)
