"""Checkpoints on disk: folders of files, whose sizes and checksums are in their state.json.

A checkpoint is written under a temporary name and then renamed. A name that begins with "step-" is therefore a complete
checkpoint, even after a crash. Nothing is pickled. Files, links and folders that no run has written are left alone. If one
has a checkpoint's name, the checkpoint's name gets a number.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from ..errors import InvalidValue
from ..files.writing import PREFIX, file_sha256, flush_names, read_json, remove_leftovers, write_json

if TYPE_CHECKING:
    from ..schemas import Checkpoint

WEIGHTS: Final = {"unet": "model.safetensors", "unet_ema": "ema.safetensors"}
"""Files of a checkpoint for the weights and the moving average of a network that is no `UNet`."""
_NAME: Final = re.compile(r"step-\d{8,}(-\d+)?")

_log = logging.getLogger("ddpm_fast")

T = TypeVar("T")


class Checkpoints:
    """The checkpoints of a run.

    Args:
        run_dir: The run's folder. It need not exist.

    Attributes:
        path: The folder of the checkpoints, in `run_dir`.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "checkpoints"

    def folders(self) -> list[Path]:
        """Return the folders that are named as checkpoints, newest first, without links and files."""
        named = (entry for entry in self.path.glob("step-*") if _NAME.fullmatch(entry.name))
        return sorted((each for each in named if each.is_dir() and not each.is_symlink()), key=_numbers, reverse=True)

    def are_lost(self) -> bool:
        """Return whether checkpoints that the run has written, or their folder, are gone."""
        return not self.path.is_dir() or (not self.folders() and (self.path / "latest").is_symlink())

    def newest(self, part: str | None = "") -> Path | None:
        """Return the newest whole checkpoint, or None. A damaged one is left out with a warning.

        The run may go on meanwhile, so read from the checkpoint with `read_newest` unless the lock is held.

        Args:
            part: The files whose names begin with it are compared with their checksums, such as "unet_ema/".
                Empty: all are. None: no file is.
        """
        for folder in self.folders():
            why = why_damaged(folder, part)
            if why is None:
                return folder
            if not folder.is_dir():  # the run has replaced it by a newer one
                return self.newest(part)
            _log.warning("%s is damaged and left out: %s", folder, why)
        return None

    def read_newest(self, part: str | None, read: Callable[[Path], T]) -> T | None:
        """Return what `read` reads from the newest whole checkpoint, or None if there is none.

        A run that goes on removes old checkpoints. If this one was removed before it was read, the newest is read instead.

        Args:
            part: See `newest`.
            read: A function of a checkpoint's folder.
        """
        while (checkpoint := self.newest(part)) is not None:
            try:
                return read(checkpoint)
            except (OSError, ValueError):
                if checkpoint.is_dir():
                    raise
        return None

    def add(self, step: int, state: Mapping[str, Any], write: Callable[[Path], None], keep: int) -> Path:
        """Write a checkpoint, then remove damaged and old ones.

        Args:
            step: Number of finished steps.
            state: Entries of state.json, as JSON types.
            write: Writes the other files into the folder that it gets, by `files.writing`, which flushes them to disk.
            keep: Number of newest checkpoints to keep, this one included, at least 1.

        Returns:
            The checkpoint's folder.
        """
        same = [folder for folder in self.folders() if _numbers(folder)[0] == step]
        final = next((folder for folder in same if not why_damaged(folder)), None)
        if final is None:
            self.remove_leftovers()
            temporary = self.path / f".step-{step:08d}-{secrets.token_hex(8)}.tmp"
            _write(temporary, {"step": step, **state}, write)
            for folder in same:
                _remove(folder)  # damaged
            final = self._free_name(step)
            temporary.rename(final)
            flush_names(self.path)
        self._point_to(final)
        older = [folder for folder in self.folders() if _numbers(folder) < _numbers(final) and not why_damaged(folder, None)]
        for folder in self.folders():
            if folder not in (final, *older[: keep - 1]):  # a newer one was damaged, or not used
                _remove(folder)
        return final

    def remove_leftovers(self) -> None:
        """Remove what a killed process left half written or half removed. The caller holds the run's lock."""
        for leftover in self.path.glob(".*.tmp"):
            if re.fullmatch(r"\.(removed-)?step-.*", leftover.name) and leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
        remove_leftovers(self.path)

    def _free_name(self, step: int) -> Path:
        """Return the path of a new checkpoint, with a number if its name is taken by what no run has written."""
        names = (f"step-{step:08d}-{number}" if number else f"step-{step:08d}" for number in itertools.count())
        return next(self.path / name for name in names if not os.path.lexists(self.path / name))

    def _point_to(self, checkpoint: Path) -> None:
        """Let `latest` point to a checkpoint, unless something else has that name or the file system has no links."""
        latest = self.path / "latest"
        link = self.path / f"{PREFIX}{secrets.token_hex(8)}.tmp"
        if latest.is_symlink() or not latest.exists():
            with suppress(OSError):
                link.symlink_to(checkpoint.name, target_is_directory=True)
                link.replace(latest)


def why_damaged(checkpoint: Path, part: str | None = "") -> str | None:
    """Return why a checkpoint is not whole, or None if it is.

    Args:
        checkpoint: Its folder.
        part: The files whose names begin with it are compared with their checksums. None: no file is. The sizes of
            all are compared.
    """
    try:
        for name, entry in read_state(checkpoint).files.items():
            if not (checkpoint / name).is_file() or (checkpoint / name).stat().st_size != entry.size:
                return f"{name} is missing or has another size"
            if part is not None and name.startswith(part) and file_sha256(checkpoint / name) != entry.sha256:
                return f"{name} has other bytes than were written"
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def read_state(checkpoint: Path) -> Checkpoint:
    """Return the content of a checkpoint's state.json.

    Args:
        checkpoint: The checkpoint's folder.

    Raises:
        FileNotFoundError: There is no state.json.
        ValueError: The file is damaged.
    """
    import msgspec

    from ..schemas import Checkpoint

    def parse(values: dict[str, Any]) -> Checkpoint:
        state = msgspec.convert(values, Checkpoint)
        digest = values.pop("sha256", None)
        if digest != _sha256_of(values):
            raise InvalidValue("sha256", f"to be {_sha256_of(values)}", f"{digest!r}: the file has been changed")
        return state

    return read_json(checkpoint / "state.json", parse)


def _write(folder: Path, state: Mapping[str, Any], write: Callable[[Path], None]) -> None:
    """Write the files of a checkpoint. state.json comes last, so that the names of the others are flushed with its own."""
    folder.mkdir(parents=True)
    write(folder)
    files = {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": file_sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    entries = {**state, "files": files}
    write_json(folder / "state.json", {**entries, "sha256": _sha256_of(entries)})


def _remove(checkpoint: Path) -> None:
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


def _numbers(checkpoint: Path) -> tuple[int, ...]:
    """Return the step of a checkpoint, and its number among those of one step."""
    return tuple(map(int, checkpoint.name.split("-")[1:]))


def _sha256_of(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
