"""Several ops in one call of the compiled module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch

from .backend import KERNELS
from .execution import Outs
from .fused_op import FusedOp


def is_op(function: Callable[..., Any]) -> TypeGuard[FusedOp]:
    """Return whether a function is an op, which has a CPU kernel."""
    return isinstance(function, FusedOp)


def in_one_region(calls: Sequence[tuple[FusedOp, tuple[Any, ...], Outs]], threads: int) -> Callable[[], None]:
    """Return a function that makes calls of ops in one parallel region of a CPU, without Python in between.

    Args:
        calls: For each call the op, its arguments, and the tensors for its first results. The function keeps their
            memory and uses it at every run. Tensors must be plain, dense and of one memory format a call.
        threads: Number of threads.
    """
    # Kernels run one after the other, so they share the largest scratch buffer.
    kernels = KERNELS["cpu"]
    values = [(op.kernel, op.kernel_values(arguments, out)) for op, arguments, out in calls]
    size = max((kernel.workspace_size(kernels, each) for kernel, each in values), default=0)
    workspace = torch.empty(size, dtype=torch.uint8, device="cpu") if size else None
    calls_of_kernels = [(kernel.name, kernel.replaced(each, "workspace", workspace)) for kernel, each in values]
    run: Callable[[], None] = kernels.Program(calls_of_kernels, threads)
    return run
