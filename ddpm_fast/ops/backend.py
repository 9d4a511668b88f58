"""Backends: availability of native, triton and reference, and the reason if one cannot run."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import warnings
from collections.abc import Callable, Mapping
from enum import Enum
from types import ModuleType
from typing import Any, Final

import torch

BACKENDS: Final = ("native", "triton", "reference")  # in the order that backend=None tries them

MATRIX_DTYPES: Final = (torch.float32, torch.bfloat16)  # dtypes of convolution and attention kernels


# Processors on which VDPBF16PS, which makes two products a lane, issues as often as float32's FMA. On two cores of Zen 4,
# products of 2048 x 2048 reach 410 GFLOP/s in bfloat16 and 201 in float32. On a Xeon they reach 166 and 332.
FULL_RATE_BFLOAT16: Final = {"AuthenticAMD 25": "Zen 4", "AuthenticAMD 26": "Zen 5"}


class Bfloat16(Enum):
    """The way in which this processor multiplies bfloat16, in words."""

    FLOAT32 = "there are no bfloat16 multiply instructions in use"
    UNKNOWN_RATE = "this processor's bfloat16 instructions are not known to be faster than those of float32"
    FULL_RATE = "its bfloat16 instructions make twice the products of those of float32"
    MATRIX_UNITS = "it has matrix units for bfloat16"


def bfloat16_of(build: Mapping[str, Any]) -> Bfloat16:
    """Return the way of a processor for which the compiled module gives these facts. Without a module there are none."""
    if build.get("isa") == "amx":
        return Bfloat16.MATRIX_UNITS
    if build.get("isa") != "avx512_bf16":
        return Bfloat16.FLOAT32
    return Bfloat16.FULL_RATE if build["processor"] in FULL_RATE_BFLOAT16 else Bfloat16.UNKNOWN_RATE


_LEAST_STACK: Final = 256 << 10  # bytes; the kernels' largest frame has 62 KB


def _check_stacks() -> None:
    """Raise an ImportError if the environment gives OpenMP's threads too small stacks for the kernels."""
    units = {"B": 1, "K": 1 << 10, "": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    for name in ("OMP_STACKSIZE", "GOMP_STACKSIZE"):
        value = os.environ.get(name, "")
        size = re.fullmatch(r"\s*(\d{1,18})\s*([BKMG]?)\s*", value, re.IGNORECASE)
        if size and int(size[1]) * units[size[2].upper()] < _LEAST_STACK:
            raise ImportError(f"expected the environment's {name} to be unset or at least {_LEAST_STACK >> 10}K, got {value!r}")


def _load_native() -> ModuleType | str:
    """Return the compiled module, or the reason why it is absent."""
    try:
        # torch is imported above, so its OpenMP runtime is the one that the module's -lgomp resolves to.
        module = importlib.import_module("ddpm_fast._native")
        _check_stacks()
        return module
    except ModuleNotFoundError as error:
        return str(error)  # built without it
    except ImportError as error:
        warnings.warn(f"ddpm_fast: the compiled module is there but cannot be used: {error}", RuntimeWarning, stacklevel=2)
        return str(error)


def _constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function as torch.compiler.assume_constant_result does.

    Calling assume_constant_result would import the whole compiler, which takes one to two seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# These are set once, at import, so that torch.compile sees constants.
_NATIVE: Final = _load_native()
BUILD: Final[dict[str, Any]] = {} if isinstance(_NATIVE, str) else _NATIVE.build_info()  # stored, because a call takes 40 us
BFLOAT16: Final = bfloat16_of(BUILD)
# Compiled kernels by type of device.
KERNELS: Final[dict[str, Any]] = {kind: getattr(_NATIVE, kind) for kind in ("cpu", "cuda") if hasattr(_NATIVE, kind)}
_TRITON_INSTALLED: Final = importlib.util.find_spec("triton") is not None
_TRITON_INTERPRETED: Final = os.environ.get("TRITON_INTERPRET") == "1"


_REINSTALL: Final = "pip install --force-reinstall --no-deps -e . (in the folder of its sources)"


def why_not_best_isa() -> str | None:
    """Return that the CPU kernels were compiled for another processor, and the remedy, or None if this one's best set runs."""
    isa = BUILD.get("isa")
    # A module that is older than the sources lacks the field. Do not fail here, so that a later check can report it.
    if os.environ.get("DDPM_FAST_ISA") or isa == BUILD.get("processor_isa", isa):
        return None
    return (
        f"the CPU kernels were compiled for {' and '.join(BUILD['isas'])}. This processor has {BUILD['processor_isa']} "
        f"and runs those for {isa}, which are slower. To compile for it: {_REINSTALL}"
    )


if (_slow := why_not_best_isa()) is not None:
    warnings.warn(f"ddpm_fast: {_slow}", RuntimeWarning, stacklevel=2)


class BackendUnavailable(RuntimeError):
    """Error for a backend that was requested by name and cannot run. The message has the reason."""


def why_not_native(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why native kernels cannot run for this device and dtype, or None if they can."""
    if native_error() is not None:
        return f"the compiled module did not load: {native_error()}"
    kind = device.type
    if kind not in KERNELS:
        without = BUILD.get("cuda_why_not", "") if kind == "cuda" else ""
        return f"it has no kernels for {kind} tensors" + (f": {without}" if without else "")
    if kind == "cuda":
        return "it has no float64 kernels for CUDA tensors" if dtype == torch.float64 else _why_not_cuda(device)
    return None


def why_not_matrix_kernels(device: torch.device, dtype: torch.dtype, arguments: Any = None) -> str | None:
    """Return why convolution and attention kernels cannot run for this device and dtype, or None if they can.

    They take any arguments, which an op passes as one of its limits.
    """
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device.type}, where PyTorch's convolution and attention are the reference"
    if native_error() is not None:
        return f"the compiled module did not load: {native_error()}"
    if dtype not in MATRIX_DTYPES:
        return f"it computes in float32 and bfloat16, not in {dtype}"
    if BUILD["isa"] == "baseline":
        return why_not_best_isa() or "it needs AVX2 or AVX-512, and the CPU kernels in use are for neither"
    return None


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which this CPU computes convolutions of maps in `dtype` fastest without matrix units."""
    return torch.float32 if dtype == torch.bfloat16 and BFLOAT16 is not Bfloat16.FULL_RATE else dtype


def warn_without_cuda(device: torch.device) -> None:
    """Warn once per GPU that its tensors cannot use the compiled kernels, if they cannot."""
    if native_error() is None and not torch.compiler.is_compiling():
        reason = why_not_native(device, torch.float32)
        if reason is not None:
            _warn_once_without_cuda(device, reason)


@functools.cache
def _warn_once_without_cuda(device: torch.device, reason: str) -> None:
    warnings.warn(
        f"ddpm_fast's compiled kernels cannot run on {device}: {reason}. Triton or PyTorch compute its ops. "
        f"{cuda_remedy(device)}",
        RuntimeWarning,
        stacklevel=7,  # the caller of the op
    )


def cuda_remedy(device: torch.device) -> str:
    """Return what gives a GPU compiled kernels, where `why_not_native` says that it has none."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "They need a GPU of compute capability 8.0 or later."
    driver, toolkit = KERNELS["cuda"].versions() if "cuda" in KERNELS else (0, 0)
    if driver < toolkit // 1000 * 1000:
        return f"Update the driver to one for CUDA {toolkit // 1000}, or compile with an older nvcc: {_REINSTALL}"
    # CMake asks nvidia-smi, so that one build serves all GPUs of the machine.
    return f"To compile them for all visible GPUs, with nvcc 12 or later on PATH: {_REINSTALL}"


_CUDA_REASONS: dict[torch.device, str | None] = {}  # stored, because the question starts the driver


@_constant
def _why_not_cuda(device: torch.device) -> str | None:
    """Return the CUDA runtime's reason why the compiled kernels cannot run on this GPU, or None."""
    if device not in _CUDA_REASONS:
        with torch.cuda.device(device):
            reason = KERNELS["cuda"].why_not()
        if reason:
            driver, toolkit = (f"{version // 1000}.{version % 1000 // 10}" for version in KERNELS["cuda"].versions())
            archs = " ".join(BUILD["cuda_archs"])
            reason += f" (compiled with CUDA {toolkit} for {archs}, the driver supports CUDA {driver})"
        _CUDA_REASONS[device] = reason or None
    return _CUDA_REASONS[device]


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why Triton kernels cannot run for this device and dtype, or None if they can."""
    if not _TRITON_INSTALLED:
        return "triton is not installed (pip install triton)"
    if dtype == torch.float64:
        return "it has no float64 kernels"
    if device.type == "cuda" or (device.type == "cpu" and _TRITON_INTERPRETED):
        return None
    if device.type == "cpu":
        return "CPU tensors need Triton's interpreter (set TRITON_INTERPRET=1 before the first import)"
    return f"it has no kernels for {device.type} tensors"


def native_error() -> str | None:
    """Return why the compiled module is absent, or None if it is loaded."""
    return _NATIVE if isinstance(_NATIVE, str) else None


def native() -> ModuleType:
    """Return the compiled module. Call it only after a backend was chosen."""
    assert not isinstance(_NATIVE, str), _NATIVE
    return _NATIVE
