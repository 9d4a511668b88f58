"""The one writer of files: whole, durable, and under a random name until it is done. JSON and tensors on top.

`tests/repository/test_writers.py` lists the exceptions, such as rows that are appended to a log.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from ..errors import ArgumentError, InvalidValue, MissingPath, expect

if TYPE_CHECKING:
    from torch import Tensor

PREFIX: Final = ".ddpm_fast-"  # begins the names of temporary files
_LEFT_OVER: Final = 24 * 3600  # seconds after which a temporary file belongs to no living process
_MAX_JSON: Final = 16 << 20  # bytes of a JSON file: a scheduler's with the most timesteps has 6 MB
_MAX_REASON: Final = 600  # characters of an error that quotes a file's content

T = TypeVar("T")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file to write to. On exit, flush it to disk and rename it to `path` in one step.

    `path` holds either all old or all new bytes, even after a crash. Of several writers the last one wins. A link at
    `path` is replaced, not followed. If the body raises, `path` stays unchanged.

    Args:
        path: File to replace. Its folder exists.
    """
    # The file is made here, so that nobody can have put a link in its place.
    temporary = path.with_name(f"{PREFIX}{secrets.token_hex(8)}.tmp")
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0)
    os.close(os.open(temporary, flags, 0o666))
    try:
        mode = temporary.stat().st_mode  # by the user's umask; safetensors makes files that only their owner can read
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno and not error.filename:  # a full disk's error names no file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    flush_names(path.parent)


def flush_names(folder: Path) -> None:
    """Flush the names in a folder to disk, so that a rename is durable. Only POSIX systems can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(folder: Path, age: float = _LEFT_OVER) -> None:
    """Remove the temporary files that killed processes left in a folder.

    Args:
        folder: The folder. It need not exist.
        age: Leave files that are younger than this, in seconds, as a living process may write them. By default a day.
    """
    with suppress(OSError):
        for leftover in folder.glob(f"{PREFIX}*.tmp"):
            with suppress(OSError):
                if time.time() - leftover.lstat().st_mtime > age:
                    leftover.unlink()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, parse: Callable[[dict[str, Any]], T]) -> T:
    """Return the value that a JSON file describes.

    Args:
        path: The file.
        parse: A function from the file's object to the value. Its TypeError or ValueError says what is wrong in the object.

    Raises:
        FileNotFoundError: There is no such file, or it is a folder, a device or a pipe, which could have no end.
        ValueError: The file is too large, holds no JSON object, or `parse` refuses the object. The message names the file.
    """
    if not path.is_file():
        raise MissingPath(repr(str(path)), "to be a file", "something else" if path.exists() else "none")
    with path.open("rb") as file:
        content = file.read(_MAX_JSON + 1)
    expect(len(content) <= _MAX_JSON, repr(str(path)), f"to have at most {_MAX_JSON >> 20} MiB", "more")
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InvalidValue(repr(str(path)), "to be JSON", error) from error
    expect(isinstance(value, dict), repr(str(path)), "to hold a JSON object", type(value).__name__)
    try:
        return parse(value)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        # msgspec quotes the errors of a schema's __post_init__.
        found = error if isinstance(error, ArgumentError) else error.__cause__
        if not isinstance(found, ArgumentError):
            found = InvalidValue(repr(str(path)), "to have valid fields", error)
            raise found.renamed(got=_shortened(found.got)) from error
        name, expected, got = map(_shortened, (found.name, found.expected, found.got))
        raise InvalidValue(name, expected, got, str(path)) from error


def _shortened(text: str) -> str:
    """Return what an error says of a file's content, without the middle of a long text."""
    half = _MAX_REASON // 2
    return text if len(text) <= _MAX_REASON else f"{text[:half]} ... {text[-half:]}"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a JSON file."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a text file."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Replace a safetensors file.

    Args:
        path: The file.
        tensors: Tensors by name, on any device and in any memory format.
        metadata: Strings for the file's header.

    Raises:
        OSError: The file cannot be written.
    """
    import safetensors
    import safetensors.torch

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            safetensors.torch.save_file(contiguous, temporary, metadata=dict(metadata) if metadata else None)
        except safetensors.SafetensorError as error:  # it has no errno
            raise OSError(f"{path} cannot be written: {error}") from error
