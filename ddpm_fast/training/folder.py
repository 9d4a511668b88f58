"""A training run on disk: its configuration, its log and its checkpoints.

    RUN/
      config.json                       options of the run, checked when it is resumed
      log.csv                           one row every `log_every` steps
      samples/step-00001000.png         grids drawn during training
      tensorboard/                      event files, if TensorBoard is installed
      checkpoints/
        latest -> step-00001000         for people and scripts; resuming finds the newest whole one itself
        step-00001000/
          unet/, unet_ema/              the network and its moving average, as diffusers folders, float32
          scheduler/                    scheduler_config.json
          optimizer.safetensors         the optimizer's state, `<key>.<parameter>`
          state.json                    step, log state, and the size and SHA-256 of every other file

A checkpoint is written under a temporary name, flushed to disk and then renamed. A name that begins with
"step-" is therefore a complete checkpoint, even after a crash. Nothing is pickled. Files, links and folders that
no run has written are left alone. If one has a checkpoint's name, the checkpoint's name gets a number.
"""

from __future__ import annotations

import csv
import itertools
import logging
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

from ..checks import listed
from ..errors import expect, renaming
from ..files.result_folder import ResultFolder
from ..files.writing import PREFIX, flush_names, read_json, remove_leftovers, write_text
from .checkpoint import why_damaged, write_checkpoint
from .options import STRUCTS, TrainOptions

FORMAT: Final = 6
"""Version of config.json."""
LOG_COLUMNS: Final = ("step", "samples", "loss", "grad_norm", "lr", "images_per_second", "seconds")

_CHECKPOINT: Final = re.compile(r"step-\d{8,}(-\d+)?")

_log = logging.getLogger("ddpm_fast")

T = TypeVar("T")


class RunFolder(ResultFolder):
    """The folder of a training run. The module's docstring has the layout."""

    caller = "train"
    argument = "run_dir"
    record_name = "config.json"
    hint = "continue the run in it with resume=True (--resume), or name another folder"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(Path(path))
        self.log_file = self.path / "log.csv"
        self.samples = self.path / "samples"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"

    def read_config(self, caller: str = "train") -> dict[str, Any]:
        """Return the configuration with which the run was started.

        Args:
            caller: Name of the calling function for error messages.

        Raises:
            FileNotFoundError: There is no run.
            ValueError: The file is not such a configuration. The message names the field.
        """
        if not self.record.is_file():
            raise FileNotFoundError(f"{caller}: expected a run to resume in {self.path}, which has no {self.record.name}")
        import msgspec

        from ..schemas import Run

        def parse(values: dict[str, Any]) -> dict[str, Any]:
            got = f"{values.get('format')!r}: another version has written it; a new run can start from its checkpoints (init)"
            expect(values.get("format") == FORMAT, "", "format", f"to be {FORMAT}", got)
            options = msgspec.convert(values, Run).options
            structs = STRUCTS if "channels" in options else (TrainOptions,)  # a Trainer's run has no others
            missing = {name for struct in structs for name in struct().recorded()} - options.keys()
            expect(not missing, "", "options", "to have all options of a run", f"none named {listed(missing)}")
            with renaming("", {name: f"options.{name}" for name in options}):
                for struct in structs:
                    struct.from_values(options)
            return values

        return read_json(caller, self.record, parse)

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def latest_checkpoint(self, part: str | None = "") -> Path | None:
        """Return the newest whole checkpoint, or None. A damaged one is left out with a warning.

        The run may go on meanwhile, so read from the checkpoint with `read_latest` unless the lock is held.

        Args:
            part: Beginning of the names of the files to compare with their checksums, such as "unet_ema/".
                Empty: all. None: no file's.
        """
        for folder in self.checkpoint_folders():
            why = why_damaged(folder, part)
            if why is None:
                return folder
            if not folder.is_dir():  # the run has replaced it by a newer one
                return self.latest_checkpoint(part)
            _log.warning("%s is damaged and left out: %s", folder, why)
        return None

    def read_latest(self, part: str | None, read: Callable[[Path], T]) -> T | None:
        """Return what `read` reads from the newest whole checkpoint, or None if there is none.

        A run that goes on removes old checkpoints. If this one was removed before it was read, the newest is read instead.

        Args:
            part: See `latest_checkpoint`.
            read: A function of a checkpoint's folder.
        """
        while (checkpoint := self.latest_checkpoint(part)) is not None:
            try:
                return read(checkpoint)
            except (OSError, ValueError):
                if checkpoint.is_dir():
                    raise
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
        same = [folder for folder in self.checkpoint_folders() if _numbers(folder)[0] == step]
        final = next((folder for folder in same if why_damaged(folder) is None), None)
        if final is None:
            self.remove_leftovers()
            temporary = self.checkpoints / f".step-{step:08d}-{secrets.token_hex(8)}.tmp"
            write_checkpoint(temporary, {"step": step, **state}, write)
            for folder in same:
                self._remove(folder)  # damaged
            final = self._free_name(step)
            temporary.rename(final)
            flush_names(self.checkpoints)
        self._point_to(final)
        others = [folder for folder in self.checkpoint_folders() if folder != final]
        older = [folder for folder in others if _numbers(folder) < _numbers(final)]  # a newer one was damaged, or not used
        kept = [folder for folder in older if why_damaged(folder, part=None) is None][: keep - 1]
        for folder in others:
            if folder not in kept:
                self._remove(folder)
        return final

    def remove_leftovers(self) -> None:
        """Remove what a killed process left half written or half removed. The caller holds the lock."""
        for leftover in self.checkpoints.glob(".*.tmp"):
            if re.fullmatch(r"\.(removed-)?step-.*", leftover.name) and leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
        for folder in (self.path, self.checkpoints):
            remove_leftovers(folder)  # younger ones may be of another command, such as a picture

    def checkpoint_folders(self) -> list[Path]:
        """Return the folders that are named as checkpoints, newest first. Links and files are none."""
        named = (entry for entry in self.checkpoints.glob("step-*") if _CHECKPOINT.fullmatch(entry.name))
        return sorted((each for each in named if each.is_dir() and not each.is_symlink()), key=_numbers, reverse=True)

    def _free_name(self, step: int) -> Path:
        """Return the path of a new checkpoint, with a number if its name is taken by what no run has written."""
        names = (f"step-{step:08d}-{number}" if number else f"step-{step:08d}" for number in itertools.count())
        return next(self.checkpoints / name for name in names if not os.path.lexists(self.checkpoints / name))

    def _remove(self, checkpoint: Path) -> None:
        """Remove a checkpoint. A folder without a state.json is not one, and stays."""
        if not (checkpoint / "state.json").is_file():
            return
        hidden = checkpoint.with_name(f".removed-{checkpoint.name}-{secrets.token_hex(8)}.tmp")  # half of one is never seen
        try:
            checkpoint.rename(hidden)
        except OSError as error:
            _log.warning("%s could not be removed: %s", checkpoint, error)
            return
        shutil.rmtree(hidden, ignore_errors=True)

    def _point_to(self, checkpoint: Path) -> None:
        """Let `latest` point to a checkpoint, unless something else has that name or the file system has no links."""
        latest = self.checkpoints / "latest"
        if latest.exists() and not latest.is_symlink():
            return
        link = self.checkpoints / f"{PREFIX}{secrets.token_hex(8)}.tmp"
        with suppress(OSError):
            link.symlink_to(checkpoint.name, target_is_directory=True)
            link.replace(latest)

    # ---------------------------------------------------------------------------------------------------------- the log

    def append_log(self, row: Sequence[int | float]) -> None:
        """Append one row of `LOG_COLUMNS` to log.csv."""
        new = not self._has_log("train")

        def open_itself(path: str, flags: int) -> int:
            return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)

        with open(self.log_file, "a", newline="", encoding="utf-8", opener=open_itself) as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(LOG_COLUMNS)
            writer.writerow([format(value, ".6g") if isinstance(value, float) else value for value in row])

    def _has_log(self, caller: str) -> bool:
        """Return whether there is a log.csv. Raise an OSError for what is no file, such as a pipe that would be waited for."""
        if not os.path.lexists(self.log_file):
            return False
        if self.log_file.is_symlink() or not self.log_file.is_file():
            got = "a link" if self.log_file.is_symlink() else "a folder, a pipe or a device"
            raise OSError(f"{caller}: expected {str(self.log_file)!r} to be a file, got {got}")
        return True

    def log_until(self, step: int, caller: str = "train") -> str:
        """Return the text of log.csv up to row `step`, without a truncated last row."""
        if not self._has_log(caller):
            return ""
        text = self.log_file.read_text(encoding="utf-8", errors="replace")
        lines = text[: text.rfind("\n") + 1].splitlines(keepends=True)
        rows = [line for line in lines[1:] if re.match(r"[0-9]{1,18},", line)]
        return "".join(lines[:1] + [line for line in rows if int(line.split(",", 1)[0]) <= step])

    def last_row(self) -> int:
        """Return the step of the last row of log.csv, or 0 if there is none."""
        rows = self.log_until(sys.maxsize).splitlines()[1:]
        return int(rows[-1].split(",", 1)[0]) if rows else 0

    def cut_log(self, step: int) -> None:
        """Remove the rows after `step`, which a resumed run writes again."""
        if self._has_log("train"):
            write_text(self.log_file, self.log_until(step))


def check_by_options(run: RunFolder) -> None:
    """Raise a ValueError unless the options of a run describe its network, as those of `train` do."""
    got = "one of a Trainer; resume it with its Trainer"
    expect("channels" in run.read_config()["options"], "train", str(run.path), "to hold a run that `train` started", got)


def _numbers(checkpoint: Path) -> tuple[int, ...]:
    """Return the step of a checkpoint, and its number among those of one step."""
    return tuple(map(int, checkpoint.name.split("-")[1:]))
