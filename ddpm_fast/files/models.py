"""A model's files: in a folder, or in a repository of the Hugging Face hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from ..errors import MissingPath, UnusablePath, expect
from ..resources import import_extra, no_folder
from .writing import read_json

_SCHEDULER: Final = ("scheduler/scheduler_config.json", "scheduler_config.json")
_NAME: Final = re.compile(r"(?P<id>(?P<owner>\w[\w.-]*)/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?", re.ASCII)
_DESCRIPTIONS: Final = (*_SCHEDULER, "config.json", "unet/config.json", "model_index.json", "plan.json")
_WEIGHTS: Final = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")  # the first one that there is


def model_folder(caller: str, name: str, path: str | os.PathLike[str], *, network: bool = True) -> Path:
    """Return the folder of a model: a local one, or that of the snapshot of a hub's repository.

    A folder that exists wins. Else huggingface_hub downloads "owner/name" or "owner/name@revision" into its cache, unless there
    is a folder `owner`. HF_HUB_OFFLINE, HF_HOME and a login count as in its other programs. Weights are downloaded only if
    the configuration is that of a U-Net.

    Args:
        caller: Name of the calling function for error messages.
        name: Name of the argument.
        path: The folder, or the name of the repository.
        network: The network is wanted, and not the scheduler alone.

    Raises:
        FileNotFoundError: There is no such folder, or the repository or its snapshot lacks a file.
        ImportError: huggingface_hub is missing.
        OSError: The repository is unknown, gated or out of reach.
        ValueError: It holds another network.
    """
    text = os.fspath(path)
    named = _NAME.fullmatch(text)
    if os.path.isdir(path):
        return Path(path)
    if named is None or os.path.exists(path) or os.path.isdir(named["owner"]):
        raise MissingPath(caller, name, "to be a folder that holds a model", no_folder(path))

    def lacks(file: str) -> MissingPath:
        return MissingPath(caller, name, f"to have {file}", f"{text!r}, whose files in {folder} lack it")

    folder = _snapshot(caller, name, named, _DESCRIPTIONS)
    if not network:
        return folder
    root = next((each for each in (folder / "unet", folder) if (each / "config.json").is_file()), None)
    if root is None:
        raise lacks("a U-Net, with unet/config.json or config.json")
    read_json(caller, root / "config.json", lambda values: _check_class(values, text))
    prefix = "unet/" if root != folder else ""
    for file in _WEIGHTS:
        if (_snapshot(caller, name, named, (*_DESCRIPTIONS, prefix + file)) / prefix / file).is_file():
            return folder
    raise lacks(" or ".join(prefix + file for file in _WEIGHTS))


def is_hub_name(text: str) -> bool:
    """Return whether a text is "owner/name"."""
    named = _NAME.fullmatch(text)
    return named is not None and named["revision"] is None


def scheduler_file(caller: str, folder: Path) -> Path:
    """Return the scheduler's configuration in a model's folder. Raise a FileNotFoundError if there is none."""
    for file in _SCHEDULER:
        if (folder / file).is_file():
            return folder / file
    raise FileNotFoundError(f"{caller}: expected {' or '.join(_SCHEDULER)} in {str(folder)!r}, which has neither")


def _check_class(values: dict[str, Any], text: str) -> None:
    kind = values.get("_class_name", "UNet2DModel")
    expect(kind == "UNet2DModel", "", "_class_name", f"to be UNet2DModel, of {text}", repr(kind))


def _snapshot(caller: str, name: str, named: re.Match[str], files: tuple[str, ...]) -> Path:
    """Return the folder of a repository's snapshot, with those of these files that it has."""
    hub = import_extra("huggingface_hub", "hub")
    with hub_errors(caller, name, named[0]):
        return Path(hub.snapshot_download(named["id"], revision=named["revision"], allow_patterns=list(files)))


@contextmanager
def hub_errors(caller: str, name: str, text: str) -> Iterator[None]:
    """Raise huggingface_hub's errors as an UnusablePath that names the argument and says what to do."""
    try:
        yield
    except Exception as error:  # those of the connection have many types
        kinds = {each.__name__ for each in type(error).__mro__}
        reasons = {
            "GatedRepoError": "it is gated: ask for access on its page, and log in with hf auth login",
            "RepositoryNotFoundError": "there is no such model, or it is private: log in with hf auth login",
            "RevisionNotFoundError": f"it has no revision {text.partition('@')[2]!r}",
            "LocalEntryNotFoundError": "which is out of reach or HF_HUB_OFFLINE set, and its cache does not have all of it",
        }
        reason = next((words for kind, words in reasons.items() if kind in kinds), f"{type(error).__name__}: {error}")
        got = f"{no_folder(text)}; on the hub, {' '.join(reason.split())[:400]}"
        raise UnusablePath(caller, name, "to be a folder or a model of the Hugging Face hub", got) from error
