"""Packages of extras, and torchvision's downloads."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any


def default_folder() -> Path:
    """Return the folder that holds downloads, in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm_fast"


def downloaded(name: str, root: Path | None, split: str, files: str, others: str = "") -> Any:
    """Return a data set of torchvision, downloaded if its files are missing. Errors say where from and what else to do."""
    source = getattr(import_extra("torchvision.datasets"), name)
    folder = root or default_folder()
    try:
        return source(folder, train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        urls = " or ".join(getattr(source, "mirrors", None) or [source.url])
        raise OSError(
            f"load_dataset: expected {name} in {str(folder)!r} or from {urls}, got: {' '.join(str(error).split())}; to do "
            f"without that connection, put {files} into a folder and pass it as data_dir (--data-dir){others}"
        ) from error


def import_extra(module: str, extra: str = "train") -> ModuleType:
    """Import a module of an extra."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        raise ImportError(f"{module} is missing: install it with pip install 'ddpm_fast[{extra}]'") from error
