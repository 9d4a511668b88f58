"""Versions, devices and available backends, as `ddpm-fast info` shows them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch

from .ops import BACKENDS, OPS
from .ops.backend import (
    BFLOAT16,
    FULL_RATE_BFLOAT16,
    Bfloat16,
    cuda_remedy,
    native,
    native_error,
    why_not_best_isa,
    why_not_matrix_kernels,
    why_not_native,
)
from .version import __version__


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """Return the processor's name from /proc/cpuinfo, or Python's name for it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


_PACKAGES: Final = ("torch", "triton", "numpy", "safetensors")


def _versions() -> Iterator[str]:
    yield f"ddpm_fast {__version__}, Python {platform.python_version()}, {platform.platform()}"
    yield ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)


def _device_lines() -> Iterator[str]:
    yield f"cpu: {_processor()}, {os.cpu_count()} processors, {torch.get_num_threads()} threads in torch"
    for device in _devices()[1:]:
        properties = torch.cuda.get_device_properties(device)
        memory = properties.total_memory / 2**30
        yield f"{device}: {properties.name}, compute capability {properties.major}.{properties.minor}, {memory:.0f} GiB"
        if " MIG " in properties.name:
            yield "  a MIG instance: a process uses one. CUDA_VISIBLE_DEVICES=MIG-<UUID> selects it; nvidia-smi -L lists them"
    if not torch.cuda.is_available():
        yield "cuda: " + ("no device" if torch.version.cuda else "this build of torch has no CUDA")


def _bfloat16_words(build: dict[str, Any]) -> str:
    reason = why_not_matrix_kernels(torch.device("cpu"), torch.bfloat16)
    if reason is not None:
        return f"PyTorch's, because {reason}"
    if BFLOAT16 is Bfloat16.MATRIX_UNITS:
        return "products in bfloat16, on the tiles of AMX: it pays"
    if BFLOAT16 is not Bfloat16.FULL_RATE:
        return f"maps in bfloat16 and products in float32, because {BFLOAT16.value}: about as fast as float32"
    return f"products in bfloat16, at twice the rate of float32 on {FULL_RATE_BFLOAT16[build['processor']]}: it pays"


def _native_lines() -> Iterator[str]:
    error = native_error()
    if error is not None:
        yield f"not loaded: {error}"
        return
    build = native().build_info()
    yield f"version {build['version']}, compiler {build['compiler']}, OpenMP {'yes' if build['openmp'] else 'no'}"
    yield f"instruction set {build['isa']}, of {', '.join(build['isas'])} (DDPM_FAST_ISA caps it)"
    yield f"bfloat16 convolutions of a frozen network: {_bfloat16_words(build)}"
    if build["tiles_refused"]:
        yield f"AMX's tiles are not in use: {build['tiles_refused']}"
    slow = why_not_best_isa()
    if slow is not None:
        yield slow
    archs = ", ".join(build["cuda_archs"])
    yield (
        f"CUDA {archs}" if archs else f"no CUDA kernels: {build['cuda_why_not']} (set FORCE_CUDA=1, unset DDPM_FAST_CUDA_ARCHS)"
    )


def _table(device: torch.device) -> Iterator[str]:
    """Yield one row per op and one column per backend: yes, or the number of a reason below."""
    width = max(map(len, OPS))
    yield " " * width + "".join(f"  {backend:<9}" for backend in BACKENDS)
    reasons: list[str] = []
    for op in OPS.values():
        cells = []
        for backend in BACKENDS:
            reason = op.why_not(backend, device)
            if reason is not None and reason not in reasons:
                reasons.append(reason)
            cells.append("yes" if reason is None else f"no ({reasons.index(reason) + 1})")
        yield (f"{op.name:<{width}}" + "".join(f"  {cell:<9}" for cell in cells)).rstrip()
    for number, reason in enumerate(reasons, 1):
        yield f"({number}) {reason}"
    if device.type == "cuda" and native_error() is None and why_not_native(device, torch.float32) is not None:
        yield f"Compiled kernels on this GPU: {cuda_remedy(device)}"


def facts() -> dict[str, Any]:
    """Return what `info` says as plain values, for programs.

    "ops" has for each device, op and backend null, or the reason for which it cannot run.
    """
    error = native_error()
    return {
        "ddpm_fast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: None if (version := _version(name)) == "not installed" else version for name in _PACKAGES},
        "processor": _processor(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_properties(device).name for device in _devices()[1:]],
        "native": {"error": error} if error is not None else native().build_info(),
        "ops": {
            str(device): {op.name: {backend: op.why_not(backend, device) for backend in BACKENDS} for op in OPS.values()}
            for device in _devices()
        },
    }


def info() -> str:
    """Return versions, devices, the native module, and the backends of every op on every device as text.

    If a backend cannot run, the text has the reason.
    """
    sections = [("Versions", _versions()), ("Devices", _device_lines()), ("Native module", _native_lines())]
    sections += [(f"Ops on {device}", _table(device)) for device in _devices()]
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections)
