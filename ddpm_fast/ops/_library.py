"""Shared parts of the ops: registration with torch.library, dense memory formats and argument checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .backend import FLOATS, is_transformed

LIBRARY = torch.library.Library("ddpm_fast", "DEF")


def define(
    name: str,
    schema: str,
    impl: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> None:
    """Register torch.ops.ddpm_fast.<name>.

    `Library.define` and `Library.impl` replace `custom_op`, because a call then costs a third as much.

    Args:
        name: Name of the op.
        schema: Arguments and results in torch.library's syntax.
        impl: Implementation for every device.
        fake: Fake implementation for tracing.
        backward: Gradient, or None for an op without one.
        setup_context: Saves what `backward` needs.
    """
    LIBRARY.define(name + schema, tags=[torch.Tag.pt2_compliant_tag])
    LIBRARY.impl(name, impl, "CompositeExplicitAutograd")
    qualified = f"ddpm_fast::{name}"
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=LIBRARY)


def no_second_derivative(op: str) -> Callable[..., Any]:
    """Return the gradient of a backward op: a function that raises an error naming the remedy."""

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            f'{op}: the fused backward is not differentiable; for second derivatives pass backend="reference"'
        )

    return backward


def is_plain(*tensors: Tensor | None) -> bool:
    """Return whether an op may bypass the dispatcher.

    True in eager mode for plain tensors, if no transform, tracer or dispatch mode is active.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or is_transformed()
        or torch._C._get_tracing_state() is not None
    ):
        return False
    return all(
        t is None or (type(t) in (Tensor, torch.nn.Parameter) and not torch._C._functorch.is_legacy_batchedtensor(t))
        for t in tensors
    )


def is_plain_inference(*tensors: Tensor | None) -> bool:
    """Return whether an op may bypass the dispatcher and needs no gradient.

    Then calling its implementation directly saves the 10 us of the dispatcher.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return False
    return is_plain(*tensors)


# ---------------------------------------------------------------------------------------------------------------- layout


def dense(x: Tensor) -> Tensor:
    """Return x as a contiguous or channels_last tensor, copying only if it is neither."""
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x.contiguous()


def dense_like(x: Tensor, like: Tensor) -> Tensor:
    """Return x in the memory format of `like`, a dense tensor with as many dimensions."""
    return x.contiguous(memory_format=memory_format(like))


def memory_format(x: Tensor) -> torch.memory_format:
    """Return the memory format of a dense tensor."""
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def sizes(x: Tensor) -> tuple[int, int, int, int]:
    """Return n, c, hw and channels_last (0 or 1) of a dense tensor for the native module."""
    n = x.shape[0]
    if x.is_contiguous():
        c = x.shape[1] if x.dim() > 1 else 1
        return n, c, x.numel() // max(1, n * c), 0
    return n, x.shape[1], x.shape[2] * x.shape[3], 1


_CODES = {dtype: code for code, dtype in enumerate((*FLOATS, torch.uint8))}


def pointer(x: Tensor | None) -> int:
    """Return the address of a tensor for the native module, or 0 for None."""
    return 0 if x is None else x.data_ptr()


def dtype_code(x: Tensor | None) -> int:
    """Return the native module's code of a tensor's dtype, or 0 for None."""
    return 0 if x is None else _CODES[x.dtype]


def typed(x: Tensor | None) -> tuple[int, int]:
    """Return the address and dtype code of a small input, or zeros for None."""
    return (0, 0) if x is None else (x.data_ptr(), dtype_code(x))


# ---------------------------------------------------------------------------------------------------------------- checks


_NUMBERS = (float, int, torch.SymFloat, torch.SymInt)


def check_type(op: str, name: str, value: Any, kind: type) -> None:
    """Raise a TypeError unless `value` is a `kind`."""
    if not isinstance(value, kind):
        raise TypeError(f"{op}: expected {name} to be a {kind.__name__}, got {type(value).__name__}")


def check_number(op: str, name: str, value: Any) -> None:
    """Raise a TypeError unless `value` is a number and not a bool."""
    if not isinstance(value, _NUMBERS) or isinstance(value, bool):
        raise TypeError(f"{op}: expected {name} to be a number, got {type(value).__name__}")


def check_no_partial_overlap(op: str, out: Tensor, name: str, x: Tensor | None) -> None:
    """Raise a ValueError if `out` and `x` overlap in memory without being the same elements.

    An elementwise kernel may run in place. With an offset it would read elements that it has overwritten.
    """
    if x is None or out.device.type == "meta" or torch.compiler.is_compiling():
        return
    if x.data_ptr() == out.data_ptr() and x.dtype == out.dtype and x.shape[1:] == out.shape[1:]:
        return
    begin, end = (x.data_ptr(), x.data_ptr() + x.nbytes)
    if begin < out.data_ptr() + out.nbytes and out.data_ptr() < end:
        raise ValueError(f"{op}: expected out to be {name} itself or apart from it in memory, got a partial overlap")


def check_float(op: str, name: str, x: Tensor, min_dim: int = 1) -> None:
    """Raise a TypeError or ValueError unless x is a floating tensor of at least min_dim dimensions."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: expected {name} to be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: expected {name} to be float32, float64, float16 or bfloat16, got {x.dtype}")
    if x.dim() < min_dim:
        raise ValueError(f"{op}: expected {name} to have at least {min_dim} dimensions [N, ...], got shape {list(x.shape)}")


def check_like(op: str, name: str, x: Tensor, like_name: str, like: Tensor, shape: tuple[int, ...] | None = None) -> None:
    """Raise unless x has the dtype and device of `like`, and the shape of `like` or the one given."""
    wanted = tuple(like.shape) if shape is None else shape
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: expected {name} to be a tensor, got {type(x).__name__}")
    if tuple(x.shape) != wanted:
        raise ValueError(f"{op}: expected {name} to have shape {list(wanted)}, got {list(x.shape)}")
    if x.dtype != like.dtype:
        raise TypeError(f"{op}: expected {name} to have the dtype of {like_name}, {like.dtype}, got {x.dtype}")
    check_device(op, name, x, like_name, like)


def check_device(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """Raise a ValueError unless x is on the device of `like`."""
    if x.device != like.device:
        raise ValueError(f"{op}: expected {name} on the device of {like_name}, {like.device}, got {x.device}")


def check_seeds(op: str, seeds: Tensor, n: int, device: torch.device) -> Tensor:
    """Return int64 seeds [n] on the device, or raise."""
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64:
        got = seeds.dtype if isinstance(seeds, Tensor) else type(seeds).__name__
        raise TypeError(f"{op}: expected seeds to be an int64 tensor (see sample_seeds), got {got}")
    if seeds.shape != (n,):
        raise ValueError(f"{op}: expected seeds to have shape [{n}], one a sample, got {list(seeds.shape)}")
    return seeds.to(device).contiguous()


def check_noise_or_seeds(op: str, noise: Tensor | None, seeds: Tensor | None) -> None:
    """Raise a ValueError unless exactly one of noise and seeds is given."""
    if (noise is None) == (seeds is None):
        raise ValueError(f"{op}: expected exactly one of noise and seeds, got {'neither' if noise is None else 'both'}")


def index_tensor(op: str, name: str, index: int | Tensor, bound: int, n: int, device: torch.device) -> Tensor:
    """Return the samples' timesteps as int64 [n] on the device.

    `index` is an int, or int64 with one or n elements. An int is checked here. A CPU tensor is checked by
    `check_range` when the op runs. A GPU tensor is not checked, because that would synchronize with the
    host: the caller must keep it in range.
    """
    if isinstance(index, Tensor):
        if index.dtype != torch.int64:
            raise TypeError(f"{op}: expected {name} to be an int or an int64 tensor, got {index.dtype}")
        if index.numel() != 1 and index.shape != (n,):
            raise ValueError(f"{op}: expected {name} to be an int or of shape [{n}], got {list(index.shape)}")
        return index.to(device).reshape(-1).expand(n).contiguous()
    if not isinstance(index, int) or isinstance(index, bool):
        raise TypeError(f"{op}: expected {name} to be an int or an int64 tensor, got {type(index).__name__}")
    if not 0 <= index < bound:
        raise ValueError(f"{op}: expected {name} in 0..{bound - 1}, got {index}")
    return torch.full((n,), index, dtype=torch.int64, device=device)


def check_range(op: str, name: str, index: Tensor, bound: int) -> None:
    """Raise a ValueError if a CPU tensor has a value outside 0..bound-1.

    Kernels read tables at these indices. Inside torch.func transforms values are not available, and
    nothing is checked.
    """
    if index.device.type == "cpu" and index.numel() and not torch._C._functorch.is_functorch_wrapped_tensor(index):
        low, high = torch.aminmax(index)
        if low < 0 or high >= bound:
            raise ValueError(f"{op}: expected {name} in 0..{bound - 1}, got values from {int(low)} to {int(high)}")
