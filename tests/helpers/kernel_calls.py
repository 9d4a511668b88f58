"""Kernels and Triton launchers, called by the names of their values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_fast.ops import backend
from ddpm_fast.ops.fused_op import FusedOp

HAS_BFLOAT16 = backend.BUILD.get("isa") in ("avx512_bf16", "amx")  # instructions, in the kernels that are in use
TRAINS_BFLOAT16 = HAS_BFLOAT16 and not backend.BUILD.get("tiles")  # oneDNN uses AMX
MATRIX_OPS = ("group_norm_affine", "conv3x3", "attention")  # ops whose kernels are for CPUs only


def pretend(monkeypatch: pytest.MonkeyPatch, **build: Any) -> None:
    """Let the compiled module say other facts of its build and processor."""
    for name, value in build.items():
        monkeypatch.setitem(backend.BUILD, name, value)
    for module in ("ops.backend", "ops.conv3x3", "inference.packed_layers", "info"):
        monkeypatch.setattr(import_module(f"ddpm_fast.{module}"), "BFLOAT16", backend.bfloat16_of(backend.BUILD))


def for_any_cpu() -> dict[str, Any]:
    """Return the entries of `backend.BUILD` that make the kernels of convolution and attention by vectors serve any CPU."""
    isa = backend.BUILD["isa"]
    return {"isa": {"baseline": "avx2", "amx": "avx512_bf16"}.get(isa, isa), "tiles": False}


def launch(module: Any, name: str, **values: Any) -> Any:
    """Call a kernel of the compiled module or of the emulator, or ask for the size of its scratch buffer.

    Args:
        module: `ddpm_fast._native.cpu` or the emulator's module.
        name: Name of the kernel, or that name and "_workspace".
        values: Values by field. A tensor that is left out is absent. Numbers have no default.

    Returns:
        None, or the bytes of the scratch buffer.

    Raises:
        TypeError: A value has no field, or a number is left out.
    """
    fields = module.fields[name.removesuffix("_workspace")]
    unknown = [each for each in values if each not in fields]
    if unknown:
        raise TypeError(f"{name}: it has the fields {', '.join(fields)}, got {', '.join(unknown)}")
    return getattr(module, name)(*(values.get(field) for field in fields))


def with_threads(threads: int, function: Callable[[], Any]) -> Any:
    """Call a function while torch has this number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


@contextmanager
def defaulting_to(dtype: torch.dtype) -> Iterator[None]:
    """Make this torch's default dtype."""
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def launch_triton(name: str, results: dict[str, Tensor | None], **arguments: Any) -> None:
    """Call a Triton launcher.

    Args:
        name: Name of the op.
        results: Tensors to write, by name. One that is left out is None.
        arguments: Arguments by name. One that is left out is None.

    Raises:
        TypeError: A result or an argument is unknown.
    """
    op = fused_op(name)
    op._launcher()(op.spec.Results(**results), op.spec.Arguments(**arguments))


def fused_op(name: str) -> FusedOp:
    """Return the op or the backward op of this name."""
    module = import_module(f"ddpm_fast.ops.{name.removesuffix('_backward')}")
    return next(op for op in vars(module).values() if isinstance(op, FusedOp) and op.name == name)


class Recorder:
    """Kernels of the compiled module that note the name of each call in `calls`."""

    def __init__(self, module: Any) -> None:
        self.calls: list[str] = []
        self._module = module

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if name not in self._module.fields:
            return found
        return lambda *values: self.calls.append(name) or found(*values)  # type: ignore[func-returns-value]
