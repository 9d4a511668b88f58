"""Checks of folders before any work, sizes as text, and packages that may be missing."""

from __future__ import annotations

import difflib
import os
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from types import ModuleType

from .errors import UnusablePath


def check_writable(name: str, path: Path, folder: Path) -> None:
    """Raise an UnusablePath if a folder cannot be made, or files in it.

    Args:
        name: Name of the argument.
        path: The argument.
        folder: The folder: `path`, or the one that will hold it. It need not exist, and is not made.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # such as a name that is too long
        raise UnusablePath(name, "to be a path that can be written", error) from error
    existing = existing_folder(folder)
    if not existing.is_dir():
        raise UnusablePath(name, "to be in a folder", f"{str(path)!r}, and {str(existing)!r} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UnusablePath(name, "to be in a folder that may be written to", f"{str(path)!r}, and {str(existing)!r} may not")


def no_folder(path: str | os.PathLike[str]) -> str:
    """Say for an error what a path is that should be a model's folder, and what may have been meant."""
    text, path = os.fspath(path), Path(path)
    if os.path.exists(path):
        return f"{text!r}, which is a file"
    # The folder, or the one that should hold it, may be misspelt.
    wrong, rest = (path, "") if path.parent.is_dir() else (path.parent, path.name)
    beside: list[str] = []
    with suppress(OSError):  # there is no parent, or it may not be read
        places = [each / rest for each in wrong.parent.iterdir()]
        beside = [at.parent.name if rest else at.name for at in places if any(at.glob("*.json")) or (at / "unet").is_dir()]
    for close in difflib.get_close_matches(wrong.name, beside, 1):
        return f"{text!r}, which does not exist; did you mean {str(wrong.with_name(close) / rest)!r}?"
    reason, parent = "", str(path.parent)
    if parent != ".":
        reason = f": {parent!r} has no such folder" if os.path.isdir(parent) else f": there is no folder {parent!r}"
    return f"{text!r}, which does not exist{reason}"


def import_extra(module: str, extra: str) -> ModuleType:
    """Import a module of an extra."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        raise ImportError(f"{module} is missing: install it with pip install 'ddpm_fast[{extra}]'") from error


def existing_folder(path: Path) -> Path:
    """Return the path or the closest of its parents that exists."""
    path = path.absolute()
    return next((folder for folder in (path, *path.parents) if os.path.exists(folder)), path)


def size_text(size: int) -> str:
    """Return a number of bytes as text in MB or GB."""
    if size >= 10**18:
        return f"{Decimal(size) / 10**9:.2g} GB"
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
