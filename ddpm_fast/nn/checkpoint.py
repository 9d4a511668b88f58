"""Networks on disk in diffusers' folder layout: config.json and diffusion_pytorch_model.safetensors."""

from __future__ import annotations

import math
import os
import pickle
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import first_few
from ..dtypes import FLOATS
from ..errors import InvalidValue, MissingPath, UnusablePath, expect
from ..files.models import LEGACY_WEIGHTS, WEIGHTS, model_folder
from ..files.writing import read_json, write_json, write_tensors
from ..interface import OWN
from .config import DESCRIBING, UNetConfig

_CONFIG = "config.json"
_CLASS_NAME = "UNet2DModel"  # what diffusers calls this network

# Attention's names before diffusers 0.12, as in Google's published DDPMs.
_LEGACY_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LEGACY_PATTERN = re.compile(r"(\.attentions\.\d+\.)(query|key|value|proj_attn)(?=\.(?:weight|bias)$)")


def load_network(path: str | os.PathLike[str]) -> tuple[UNetConfig, dict[str, Tensor], Path]:
    """Read a network's configuration and weights without running code from the files.

    Args:
        path: A network's folder, or a pipeline's folder that holds it in unet/ or at its root, or a name on the hub, see
            `model_folder`.

    Returns:
        The configuration, the weights by their current names, and their file. Weights are on the CPU in their
        stored dtype.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, or the configuration is not supported.
    """
    folder = network_folder(model_folder("path", path, read_unet_config))
    return read_unet_config(folder), *_read_weights(folder)


def network_folder(folder: Path) -> Path:
    """Return the folder of the network in that of a pipeline, which may be the same."""
    return folder / "unet" if (folder / "unet").is_dir() else folder


def save_checkpoint(path: str | os.PathLike[str], config: UNetConfig, weights: Mapping[str, Tensor]) -> None:
    """Write a network's folder atomically.

    At any time `load_network` finds the old or the new network, never a mixture.

    Args:
        path: Folder to write, created if needed.
        config: Configuration for config.json.
        weights: Tensors by name.

    Raises:
        ValueError: The folder holds a network with another configuration.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    # Two files cannot be replaced at once: a configuration, once there, stays, and only the weights are replaced.
    new = not (folder / _CONFIG).exists()
    values = config.to_dict()
    if not new and (present := read_unet_config(folder).to_dict()) != values:
        changed = ", ".join(key for key in {**values, **present} if present.get(key) != values.get(key))
        raise InvalidValue(
            "path",
            "to be free or to hold a network of the same configuration",
            f"{os.fspath(path)!r} which differs in {changed}",
        )
    write_tensors(folder / WEIGHTS, weights, metadata={"format": "pt"})
    if new:
        own = {key: values.pop(key) for key in DESCRIBING if key in values}
        write_json(folder / _CONFIG, {"_class_name": _CLASS_NAME} | values | ({OWN: own} if own else {}))


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the CPU in their stored dtype.

    Args:
        path: The file.

    Raises:
        OSError: The file cannot be opened.
        ValueError: The file is damaged.
    """
    import safetensors.torch

    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
    except OSError:
        raise
    except RuntimeError as error:  # torch maps the file, and reports the system's errors so
        raise UnusablePath(repr(str(path)), "to be readable", error) from error
    except Exception as error:  # safetensors' own, or torch's about a dtype
        raise InvalidValue(repr(str(path)), "to be a whole safetensors file", error) from error
    return tensors


def load_tensors(path: str | os.PathLike[str]) -> Any:
    """Read tensors and plain values that torch.save wrote, without running code from the file.

    Args:
        path: File to read.

    Returns:
        The saved object, with tensors on the CPU.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged or holds objects that need pickle.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise MissingPath("path", "to be a file", repr(path))
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # has many types, as the unpickler takes the bytes as they come
        classes: list[str] = []
        with suppress(Exception):  # the file may be damaged, or older than the zip format
            classes = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if classes:
            raise InvalidValue(
                repr(path),
                "to hold tensors and plain values",
                f"a {min(classes)}, which needs pickle, and pickle may run any code: if you trust the file, load it by "
                "torch.load(weights_only=False) and save its tensors",
            ) from error
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if isinstance(error, pickle.UnpicklingError):  # its text is about options of torch.load
            reason = "one that is damaged, or older than the zip format with objects that need pickle, which may run any code"
        raise InvalidValue(repr(path), "to be a whole file of torch.save", reason) from error


def check_weights(
    path: str | os.PathLike[str], owner: str, expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> None:
    """Raise a ValueError unless weights are dense floating tensors of the expected names and shapes.

    Args:
        path: Origin of the weights for error messages.
        owner: Owner of the expected names for error messages.
        expected: Tensors with the expected names and shapes.
        weights: Tensors to check.
    """
    missing, unexpected = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    for kind, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            raise InvalidValue("", f"the weights in {os.fspath(path)!r} to fit {owner}", f"{kind} {first_few(names)}")
    for name, tensor in expected.items():
        weight: Any = weights[name]
        if not isinstance(weight, Tensor) or weight.layout is not torch.strided or weight.is_meta:
            got = f"a {weight.device.type} tensor of layout {weight.layout}" if isinstance(weight, Tensor) else repr(weight)
            raise InvalidValue(name, "to be a dense tensor", got, os.fspath(path))
        if weight.shape != tensor.shape:
            raise InvalidValue(name, f"to have shape {list(tensor.shape)} (by {owner})", list(weight.shape), os.fspath(path))
        if tensor.is_floating_point() and weight.dtype not in FLOATS:
            raise InvalidValue(name, "to be floating", weight.dtype, os.fspath(path))


def check_finite(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Raise a ValueError unless tensors are finite.

    Args:
        path: Origin of the tensors for error messages.
        tensors: Floating tensors of one device, none of them empty.
    """
    finite = torch.stack([norm.isfinite() for norm in torch._foreach_norm(list(tensors.values()), math.inf)]).tolist()
    names = [f"{name} ({tensors[name].dtype})" for name, is_finite in zip(tensors, finite, strict=True) if not is_finite]
    if names:
        raise InvalidValue("", f"the tensors in {os.fspath(path)!r} to be finite", f"NaN or infinity in {first_few(names)}")


def read_unet_config(folder: Path) -> UNetConfig:
    """Return the configuration in a network's folder or a pipeline's, or raise the error that says what is wrong with it."""
    file = network_folder(folder) / _CONFIG
    if not file.is_file():
        raise MissingPath("", f"{_CONFIG} in {str(file.parent)!r}", "none")

    def parse(values: dict[str, Any]) -> UNetConfig:
        name = values.get("_class_name", _CLASS_NAME)
        expect(name == _CLASS_NAME, "_class_name", f"to be {_CLASS_NAME}", repr(name))
        own = values.get(OWN, {})
        expect(isinstance(own, dict) and own.keys() <= set(DESCRIBING), OWN, f"to have keys among {', '.join(DESCRIBING)}", own)
        return UNetConfig.from_dict(values | own)

    return read_json(file, parse)


def _read_weights(folder: Path) -> tuple[dict[str, Tensor], Path]:
    if (file := folder / WEIGHTS).is_file():
        weights = load_safetensors(file)
    elif (file := folder / LEGACY_WEIGHTS).is_file():
        weights = load_tensors(file)
        if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
            got = f"names such as {first_few(weights)}" if isinstance(weights, dict) else f"a {type(weights).__name__}"
            raise InvalidValue(repr(str(file)), "to hold a dict of tensors by name", got)
    else:
        raise MissingPath("", f"{WEIGHTS} or {LEGACY_WEIGHTS} in {os.fspath(folder)!r}", "neither")
    named = {_LEGACY_PATTERN.sub(lambda m: m[1] + _LEGACY_NAMES[m[2]], name): tensor for name, tensor in weights.items()}
    if len(named) < len(weights):
        raise InvalidValue(repr(str(file)), "to hold each tensor once", "one under its names before and after diffusers 0.12")
    return named, file
