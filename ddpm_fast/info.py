"""Versions, devices and available backends, as `ddpm-fast info` shows them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping
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

_PACKAGES: Final = ("torch", "triton", "numpy", "safetensors")


def facts() -> dict[str, Any]:
    """Return versions, devices, the native module, and the backends of every op on every device as plain values.

    "ops" has for each device, op and backend null, or the reason for which it cannot run.
    """
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    return {
        "versions": {
            "ddpm_fast": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "devices": {
            "cpu": f"{_processor()}, {os.cpu_count()} processors, {torch.get_num_threads()} threads in torch",
            **{str(device): _gpu(device) for device in devices[1:]},
            **({} if torch.cuda.is_available() else {"cuda": "none" if torch.version.cuda else "not in this build of torch"}),
        },
        "native": _native_facts(),
        "ops": {
            str(device): {op.name: {backend: op.why_not(backend, device) for backend in BACKENDS} for op in OPS.values()}
            for device in devices
        },
    }


def info() -> str:
    """Return the `facts` as text, with a table for the ops of each device."""
    found = facts()
    sections = {f"Ops on {device}": [*_table(torch.device(device), ops)] for device, ops in found.pop("ops").items()}
    texts = {name.capitalize(): [f"{key}: {value}" for key, value in values.items()] for name, values in found.items()}
    return "\n\n".join("\n  ".join([title, *lines]) for title, lines in (texts | sections).items())


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


def _gpu(device: torch.device) -> str:
    """Return the name, the generation and the memory of a GPU, and how a MIG instance is selected."""
    found = torch.cuda.get_device_properties(device)
    mig = "; a process uses one MIG instance: CUDA_VISIBLE_DEVICES=MIG-<UUID> selects it; nvidia-smi -L lists them"
    said = f"{found.name}, compute capability {found.major}.{found.minor}, {found.total_memory / 2**30:.0f} GiB"
    return said + mig * (" MIG " in found.name)


def _native_facts() -> dict[str, Any]:
    """Return how the native module was built and what it uses here, or why it is not loaded."""
    if (error := native_error()) is not None:
        return {"not loaded": error}
    build, slow = native().build_info(), why_not_best_isa()
    archs, remedy = build["cuda_archs"], "set FORCE_CUDA=1, unset DDPM_FAST_CUDA_ARCHS"
    return {
        "version": build["version"],
        "compiler": build["compiler"],
        "OpenMP": "yes" if build["openmp"] else "no",
        "instruction set": f"{build['isa']}, of {', '.join(build['isas'])} (DDPM_FAST_ISA caps it)",
        "bfloat16 convolutions of a frozen network": _bfloat16_words(build),
        **({"AMX's tiles are not in use": build["tiles_refused"]} if build["tiles_refused"] else {}),
        **({} if slow is None else {"slower than it could be": slow}),
        "CUDA": ", ".join(archs) if archs else f"no kernels: {build['cuda_why_not']} ({remedy})",
    }


def _bfloat16_words(build: dict[str, Any]) -> str:
    reason = why_not_matrix_kernels(torch.device("cpu"), torch.bfloat16)
    if reason is not None:
        return f"PyTorch's, because {reason}"
    if BFLOAT16 is Bfloat16.MATRIX_UNITS:
        return "products in bfloat16, on the tiles of AMX: it pays"
    if BFLOAT16 is not Bfloat16.FULL_RATE:
        return f"maps in bfloat16 and products in float32, because {BFLOAT16.value}: about as fast as float32"
    return f"products in bfloat16, at twice the rate of float32 on {FULL_RATE_BFLOAT16[build['processor']]}: it pays"


def _table(device: torch.device, ops: Mapping[str, Mapping[str, str | None]]) -> Iterator[str]:
    """Yield one row per op and one column per backend: yes, or the number of a reason below."""
    width = max(map(len, ops))
    yield " " * width + "".join(f"  {backend:<9}" for backend in BACKENDS)
    reasons: list[str] = []
    for name, why_not in ops.items():
        cells = []
        for reason in why_not.values():
            if reason is not None and reason not in reasons:
                reasons.append(reason)
            cells.append("yes" if reason is None else f"no ({reasons.index(reason) + 1})")
        yield (f"{name:<{width}}" + "".join(f"  {cell:<9}" for cell in cells)).rstrip()
    for number, reason in enumerate(reasons, 1):
        yield f"({number}) {reason}"
    if device.type == "cuda" and native_error() is None and why_not_native(device, torch.float32) is not None:
        yield f"Compiled kernels on this GPU: {cuda_remedy(device)}"
