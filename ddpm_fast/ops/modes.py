"""Modes of PyTorch: those in which kernels may not be called directly, and its threads after a fork."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor

PLAIN_TYPES: Final = (Tensor, torch.nn.Parameter)
_PROCESS: Final = os.getpid()
_VMAP_OF_GRADIENTS: Any = torch._C._parse_dispatch_key("VmapMode")  # torch.autograd.grad(..., is_grads_batched=True)


def is_transformed() -> bool:
    """Return whether a torch.func transform or forward-mode differentiation is active.

    Do not call this from compiled code.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def is_transformed_tensor(tensor: Tensor) -> bool:
    """Return whether a torch.func transform wraps a tensor, or forward mode gave it a tangent."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor) or torch._VF._unpack_dual(tensor, level=0)[1] is not None


def is_traced() -> bool:
    """Return whether torch.jit, a dispatch mode or the vmap of batched gradients is active."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_OF_GRADIENTS)
    )


def runs_eagerly(*tensors: Tensor | None) -> bool:
    """Return whether kernels may be called directly.

    That needs plain tensors, and no compiler, tracer, dispatch mode or transform.
    """
    if torch.compiler.is_compiling() or is_transformed() or is_traced():
        return False
    return all(tensor is None or (type(tensor) in PLAIN_TYPES and not tensor.is_neg()) for tensor in tensors)


@contextmanager
def threads_after_fork() -> Iterator[None]:
    """Use one thread in a forked child. It lacks PyTorch's other threads, and would wait for them forever."""
    threads = torch.get_num_threads()
    if os.getpid() != _PROCESS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
