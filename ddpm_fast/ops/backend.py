"""Who computes an op: the three families, and why one of them cannot."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from types import ModuleType
from typing import Final

import torch

FAMILIES: Final = ("native", "triton", "reference")  # in the order that backend=None tries them
OPS: Final = ("noise", "q_sample", "reverse_step", "group_norm_silu", "denoising_loss")
FLOATS: Final = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # the index is the native module's dtype code


def _load_native() -> ModuleType | str:
    """The compiled module, or why it is absent."""
    try:
        # torch is imported above, so its OpenMP runtime is the one that the module's -lgomp resolves to.
        return importlib.import_module("ddpm_fast._native")
    except ModuleNotFoundError as error:
        return str(error)  # built without it
    except ImportError as error:
        warnings.warn(f"ddpm_fast: the compiled module is there but did not load: {error}", RuntimeWarning, stacklevel=2)
        return str(error)


# Found out once, at import, so that torch.compile sees constants.
_NATIVE: Final = _load_native()
_TRITON_INSTALLED: Final = importlib.util.find_spec("triton") is not None
_TRITON_INTERPRETED: Final = os.environ.get("TRITON_INTERPRET") == "1"


class BackendUnavailable(RuntimeError):
    """A family was asked for by name and cannot run; the message says why."""


def why_not(family: str, op: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """The reason why `family` cannot compute `op` for tensors of this device and dtype; None where it can.

    Raises:
        ValueError: an unknown family or op.
    """
    if family not in FAMILIES:
        raise ValueError(f"backend: expected one of {', '.join(FAMILIES)}, got {family!r}")
    if op not in OPS:
        raise ValueError(f"why_not: expected op to be one of {', '.join(OPS)}, got {op!r}")
    if family == "reference":
        return None
    if family == "native":
        if native_error() is not None:
            return f"the compiled module did not load: {native_error()}"
        if device.type != "cpu":
            return f"it has no kernels for {device.type} tensors"
        return (
            None if hasattr(native(), op) else f"the compiled module is older than this source and lacks {op}: build it again"
        )
    return _why_not_triton(device, dtype)


def _why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    if not _TRITON_INSTALLED:
        return "triton is not installed (pip install triton)"
    if dtype == torch.float64:
        return "it has no float64 kernels"
    if device.type == "cuda" or (device.type == "cpu" and _TRITON_INTERPRETED):
        return None
    if device.type == "cpu":
        return "CPU tensors need Triton's interpreter (set TRITON_INTERPRET=1 before the first import)"
    return f"it has no kernels for {device.type} tensors"


def choose(op: str, backend: str | None, device: torch.device, dtype: torch.dtype, unfit: tuple[str, str] | None = None) -> str:
    """The family that computes `op`: the one named, or the first that can.

    unfit: a family that cannot take these arguments, and the reason.

    Triton's interpreter is for tests: on CPU tensors that family runs only by name.

    Raises:
        BackendUnavailable: the family named cannot run. Nothing else is tried.
        ValueError: an unknown family.
    """
    if backend is not None:
        reason = unfit[1] if unfit is not None and unfit[0] == backend else why_not(backend, op, device, dtype)
        if reason is not None:
            raise BackendUnavailable(f'{op}: backend "{backend}" cannot run: {reason}')
        return backend
    for family in FAMILIES:
        if (family == "triton" and device.type == "cpu") or (unfit is not None and family == unfit[0]):
            continue
        if why_not(family, op, device, dtype) is None:
            return family
    raise AssertionError("unreachable: the reference family always runs")


def native_error() -> str | None:
    """Why the compiled module is absent, or None."""
    return _NATIVE if isinstance(_NATIVE, str) else None


def native() -> ModuleType:
    """The compiled module. `choose` has made sure of it."""
    assert not isinstance(_NATIVE, str), _NATIVE
    return _NATIVE
