"""A model's files: in a folder, or in a repository of the Hugging Face hub."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from ..errors import InvalidValue, MissingPath, UnusablePath
from ..resources import import_extra, no_folder
from .writing import file_sha256

WEIGHTS: Final = "diffusion_pytorch_model.safetensors"
LEGACY_WEIGHTS: Final = "diffusion_pytorch_model.bin"
SCHEDULER: Final = ("scheduler/scheduler_config.json", "scheduler_config.json")
_DESCRIPTIONS: Final = (*SCHEDULER, "config.json", "unet/config.json", "model_index.json", "plan.json")
_NAME: Final = re.compile(r"(?P<id>(?P<owner>\w[\w.-]*)/\w[\w.-]*)(@(?P<revision>(?!.*\.\.)\w[\w./-]*))?", re.ASCII)


def model_folder(name: str, path: str | os.PathLike[str], check: Callable[[Path], object] | None = None) -> Path:
    """Return the folder of a model: a local one, or that of the snapshot of a hub's repository.

    A folder that exists wins. Else huggingface_hub downloads "owner/name" or "owner/name@revision" into its cache, unless there
    is a folder `owner`. HF_HUB_OFFLINE, HF_HOME and a login count as in its other programs.

    Args:
        name: Name of the argument.
        path: The folder, or the name of the repository.
        check: Raises if what the repository says without its weights is not wanted. It gets the snapshot. Then the weights are
            downloaded. None: they are not.

    Raises:
        FileNotFoundError: There is no such folder, or the repository or its snapshot lacks a file.
        ImportError: huggingface_hub is missing.
        OSError: The repository is unknown, gated or out of reach.
        ValueError: The weights in the hub's cache are damaged.
    """
    text = os.fspath(path)
    named = _NAME.fullmatch(text)
    if os.path.isdir(path):
        return Path(path)
    if named is None or os.path.exists(path) or os.path.isdir(named["owner"]):
        blocked = "" if named is None else f" (a local {named['owner']!r} hides the hub; rename it)"
        raise MissingPath(name, "to be a folder that holds a model", no_folder(path) + blocked)
    folder = _snapshot(name, named, named["revision"], _DESCRIPTIONS)
    if check is None:
        return folder
    if not any((folder / each).is_file() for each in ("config.json", "unet/config.json")):
        raise MissingPath(name, "to have a U-Net, with unet/config.json or config.json", f"{text!r}, without")
    check(folder)
    prefix = "unet/" if (folder / "unet").is_dir() else ""
    weights = [prefix + WEIGHTS, prefix + LEGACY_WEIGHTS]
    for file in [] if import_extra("huggingface_hub.constants", "hub").HF_HUB_OFFLINE else weights:
        if not any((folder / each).is_file() for each in weights):
            # The snapshot is the commit's. The name may have moved to another one.
            _snapshot(name, named, folder.name, (*_DESCRIPTIONS, file))
    if not any((folder / each).is_file() for each in weights):
        raise MissingPath(name, f"to have {' or '.join(weights)}", f"{text!r}, whose files in {folder} lack both")
    stored = next(folder / each for each in weights if (folder / each).is_file()).resolve()
    # The cache names a large file by its SHA-256. Other files, and copies on systems without links, have other names.
    if re.fullmatch("[0-9a-f]{64}", stored.name) and (found := file_sha256(stored)) != stored.name:
        raise InvalidValue(repr(str(stored)), "to have its name as SHA-256", f"{found}: delete it, then load it again")
    return folder


def is_hub_name(text: str) -> bool:
    """Return whether a text is "owner/name"."""
    named = _NAME.fullmatch(text)
    return named is not None and named["revision"] is None


def scheduler_file(folder: Path) -> Path:
    """Return the scheduler's configuration in a model's folder. Raise a FileNotFoundError if there is none."""
    for file in SCHEDULER:
        if (folder / file).is_file():
            return folder / file
    raise MissingPath("", f"{' or '.join(SCHEDULER)} in {str(folder)!r}", "neither")


def _snapshot(name: str, named: re.Match[str], revision: str | None, files: tuple[str, ...]) -> Path:
    """Return the folder of a repository's snapshot, with those of these files that it has."""
    wanted, absent = "to be a folder or a model of the Hugging Face hub", f"{no_folder(named[0])}; from the hub: "
    try:
        hub = import_extra("huggingface_hub", "hub")
    except ImportError as error:
        raise ImportError(f"expected {name} {wanted}, got {absent}{error}") from error
    with hub_errors(name, wanted, absent):
        return Path(hub.snapshot_download(named["id"], revision=revision, allow_patterns=list(files)))


@contextmanager
def hub_errors(name: str, wanted: str, got: str) -> Iterator[None]:
    """Raise huggingface_hub's errors as an UnusablePath that names the argument. `got` begins what came instead."""
    try:
        yield
    except Exception as error:  # those of the connection have many types
        kinds = {each.__name__ for each in type(error).__mro__}
        reasons = {
            "GatedRepoError": "it is gated: ask for access on its page, and log in with hf auth login",
            "RepositoryNotFoundError": "there is no such model, or it is private: log in with hf auth login",
            "RevisionNotFoundError": "it has no such revision",
            "LocalEntryNotFoundError": "not in its cache as a whole, and it cannot be reached, or HF_HUB_OFFLINE is set",
        }
        reason = next((words for kind, words in reasons.items() if kind in kinds), f"{type(error).__name__}: {error}")
        raise UnusablePath(name, wanted, got + " ".join(reason.split())[:400]) from error
