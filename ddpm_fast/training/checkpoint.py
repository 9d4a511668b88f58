"""A checkpoint on disk: files in a folder, with their sizes and checksums in its state.json."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidValue
from ..files.writing import flush_names, read_json, write_json

if TYPE_CHECKING:
    from ..schemas import Checkpoint


def write_checkpoint(folder: Path, state: Mapping[str, Any], write: Callable[[Path], None]) -> None:
    """Write a checkpoint, and flush it to disk.

    Args:
        folder: Its folder, which is made.
        state: Entries of state.json, as JSON types.
        write: Writes the other files into the folder that it gets.
    """
    folder.mkdir(parents=True)
    write(folder)
    files = {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": _sha256(file)} for file in _files(folder)
    }
    entries = {**state, "files": files}
    write_json(folder / "state.json", {**entries, "sha256": _sha256_of(entries)})
    for file in _files(folder):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            flush_names(path)


def why_damaged(checkpoint: Path, part: str | None = "") -> str | None:
    """Return why a checkpoint is not whole, or None if it is.

    Args:
        checkpoint: Its folder.
        part: Beginning of the names of the files whose bytes are compared with their checksums. None: no file's.
            Sizes are compared for all files.
    """
    try:
        for name, entry in read_state("train", checkpoint).files.items():
            if not (checkpoint / name).is_file() or (checkpoint / name).stat().st_size != entry.size:
                return f"{name} is missing or has another size"
            if part is not None and name.startswith(part) and _sha256(checkpoint / name) != entry.sha256:
                return f"{name} has other bytes than were written"
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def read_state(caller: str, checkpoint: Path) -> Checkpoint:
    """Return the content of a checkpoint's state.json.

    Args:
        caller: Name of the calling function for error messages.
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
            raise InvalidValue("", "sha256", f"to be {_sha256_of(values)}", f"{digest!r}: the file has been changed")
        return state

    return read_json(caller, checkpoint / "state.json", parse)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sha256_of(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
