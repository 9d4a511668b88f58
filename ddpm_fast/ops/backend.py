"""Backends: availability of native, triton and reference, and the reason if one cannot run."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

import torch

FAMILIES: Final = ("native", "triton", "reference")  # in the order that backend=None tries them
OPS: Final = ("noise", "q_sample", "reverse_step", "group_norm_silu", "denoising_loss")
FLOATS: Final = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # the index is the native module's dtype code


def _load_native() -> ModuleType | str:
    """Return the compiled module, or the reason why it is absent."""
    try:
        # torch is imported above, so its OpenMP runtime is the one that the module's -lgomp resolves to.
        return importlib.import_module("ddpm_fast._native")
    except ModuleNotFoundError as error:
        return str(error)  # built without it
    except ImportError as error:
        warnings.warn(f"ddpm_fast: the compiled module is there but did not load: {error}", RuntimeWarning, stacklevel=2)
        return str(error)


def _constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function as torch.compiler.assume_constant_result does.

    Calling assume_constant_result would import the whole compiler, which takes one to two seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# Found out once, at import, so that torch.compile sees constants.
_NATIVE: Final = _load_native()
BUILD: Final[dict[str, Any]] = {} if isinstance(_NATIVE, str) else _NATIVE.build_info()  # kept: a call takes 40 us
# The compiled kernels for tensors of a kind of device.
KERNELS: Final[dict[str, Any]] = {kind: getattr(_NATIVE, kind) for kind in ("cpu", "cuda") if hasattr(_NATIVE, kind)}
_TRITON_INSTALLED: Final = importlib.util.find_spec("triton") is not None
_TRITON_INTERPRETED: Final = os.environ.get("TRITON_INTERPRET") == "1"


class BackendUnavailable(RuntimeError):
    """Error for a backend that was requested by name and cannot run. The message has the reason."""


def why_not(family: str, op: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Return why a backend cannot compute `op` for this device and dtype, or None if it can.

    The first argument is the backend: "native", "triton" or "reference".

    Raises:
        ValueError: The backend or the op is unknown.
    """
    if family not in FAMILIES:
        raise ValueError(f"backend: expected one of {', '.join(FAMILIES)}, got {family!r}")
    if op not in OPS:
        raise ValueError(f"why_not: expected op to be one of {', '.join(OPS)}, got {op!r}")
    if family == "reference":
        return None
    if family == "native":
        return _why_not_native(op, device, dtype)
    return _why_not_triton(device, dtype)


def _why_not_native(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if native_error() is not None:
        return f"the compiled module did not load: {native_error()}"
    if device.type not in KERNELS:
        without = BUILD.get("cuda_why_not", "") if device.type == "cuda" else ""
        return f"it has no kernels for {device.type} tensors" + (f": {without}" if without else "")
    if not hasattr(KERNELS[device.type], op):
        return f"the compiled module is older than this source and lacks {op}: build it again"
    if device.type == "cuda":
        return "it has no float64 kernels for CUDA tensors" if dtype == torch.float64 else _why_not_cuda(device)
    return None


@functools.cache
def _warn_without_cuda() -> None:
    """Warn once that CUDA tensors cannot use the compiled kernels."""
    warnings.warn(
        f"ddpm_fast has no compiled CUDA kernels: {BUILD['cuda_why_not']}. CUDA tensors use Triton or PyTorch instead. "
        "To compile the kernels: FORCE_CUDA=1 pip install --force-reinstall --no-deps ...",
        RuntimeWarning,
        stacklevel=4,  # the caller of the op
    )


_CUDA_REASONS: dict[torch.device, str | None] = {}  # asked once: it starts the driver


@_constant
def _why_not_cuda(device: torch.device) -> str | None:
    """Return the CUDA runtime's reason why the compiled kernels cannot run on this GPU, or None."""
    if device not in _CUDA_REASONS:
        with torch.cuda.device(device):
            _CUDA_REASONS[device] = native().cuda.why_not() or None
    return _CUDA_REASONS[device]


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


def is_transformed() -> bool:
    """Return whether a torch.func transform or forward-mode differentiation is active.

    Do not call this from compiled code.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def choose(op: str, backend: str | None, device: torch.device, dtype: torch.dtype, unfit: tuple[str, str] | None = None) -> str:
    """Return the backend that computes `op`: the one named, or the first that can run.

    Triton's interpreter is for tests, so CPU tensors use "triton" only by name. Kernels do not support
    transforms of torch.func (grad, vmap, jvp, ...) or forward-mode differentiation. There the default is
    "reference", which PyTorch differentiates to any order.

    Args:
        op: Name of the op.
        backend: "native", "triton", "reference", or None for the first that can run.
        device: Device of the tensors.
        dtype: Dtype of the tensors.
        unfit: A backend that cannot take these arguments, and the reason.

    Raises:
        BackendUnavailable: The named backend cannot run. No other is tried.
        ValueError: The named backend is unknown.
    """
    if backend is not None:
        reason = unfit[1] if unfit is not None and unfit[0] == backend else why_not(backend, op, device, dtype)
        if reason is not None:
            raise BackendUnavailable(f'{op}: backend "{backend}" cannot run: {reason}')
        return backend
    if not torch.compiler.is_compiling() and is_transformed():
        return "reference"
    if device.type == "cuda" and "cuda" not in KERNELS and native_error() is None and not torch.compiler.is_compiling():
        _warn_without_cuda()
    for family in FAMILIES:
        if (family == "triton" and device.type == "cpu") or (unfit is not None and family == unfit[0]):
            continue
        if why_not(family, op, device, dtype) is None:
            return family
    raise AssertionError("unreachable: the reference backend always runs")


def launch(op: str, device: torch.device, *arguments: Any) -> None:
    """Run a native kernel on torch's number of threads, or on the device's current stream."""
    on_gpu = device.type == "cuda"
    run_on = torch._C._cuda_getCurrentRawStream(device.index) if on_gpu else torch.get_num_threads()
    _on(device, getattr(KERNELS[device.type], op), *arguments, run_on)


def workspace(op: str, device: torch.device, *arguments: Any) -> torch.Tensor | None:
    """Return the scratch buffer of a native kernel for these sizes on this GPU.

    CPU kernels and some GPU kernels need none; the result is then None.
    """
    size = vars(KERNELS[device.type]).get(op + "_workspace")
    if size is None:
        return None
    wanted = _on(device, size, *arguments)
    return torch.empty(wanted, dtype=torch.uint8, device=device) if wanted else None


def _on(device: torch.device, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return function(*arguments), called with a GPU `device` as the current device.

    Kernels query the current device for its properties.
    """
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return function(*arguments)
    with torch.cuda.device(device):
        return function(*arguments)


def native_error() -> str | None:
    """Return why the compiled module is absent, or None if it is loaded."""
    return _NATIVE if isinstance(_NATIVE, str) else None


def native() -> ModuleType:
    """Return the compiled module. Call it only after `choose` has selected it."""
    assert not isinstance(_NATIVE, str), _NATIVE
    return _NATIVE
