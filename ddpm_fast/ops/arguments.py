"""Checks of the tensors of an op."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..checks import check_device, check_storage, check_strided, check_values, dtype_names
from ..errors import InvalidType, InvalidValue


def check_apart(out: Tensor, inputs: Mapping[str, Any], *, may_be_same: bool = True) -> None:
    """Raise a ValueError if `out` has no memory, or overlaps an input there without being the same elements.

    An elementwise kernel may run in place. With an offset it would read elements that it has overwritten.

    Args:
        out: A dense tensor.
        inputs: Dense tensors by name. Other values are ignored.
        may_be_same: Whether `out` may be an input itself.
    """
    out_begin, out_end = _extent(out)
    if out_begin == (0, 0):  # its storage was freed, or it has no elements
        check_storage("out", out)
    for name, x in inputs.items():
        if not isinstance(x, Tensor):
            continue
        begin, end = _extent(x)
        if may_be_same and begin == out_begin and x.dtype == out.dtype and x.shape[1:] == out.shape[1:]:
            continue
        if begin < out_end and out_begin < end:
            wanted, got = (
                (f"{name} itself or apart from it", "a partial overlap")
                if may_be_same
                else (f"apart from {name}", "an overlap")
            )
            raise InvalidValue("out", f"to be {wanted} in memory", got)


def _extent(x: Tensor) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Return begin and end of a dense tensor in memory. Extents of different storages compare as apart."""
    if isinstance(x, FakeTensor) or x.is_meta:
        storage, begin = x.untyped_storage()._cdata, x.storage_offset() * x.element_size()
    else:
        storage, begin = 0, x.data_ptr()
    return (storage, begin), (storage, begin + x.numel() * x.element_size())  # `nbytes` takes no symbolic sizes


def check_like(
    name: str,
    x: Any,
    like_name: str,
    like: Tensor,
    shape: tuple[int | str, ...] | None = None,
    *,
    also: tuple[torch.dtype, ...] = (),
    optional: bool = False,
) -> None:
    """Raise unless x is a dense tensor that goes with `like`: of its dtype, on its device, and of its shape or the one given.

    Args:
        name: Name of the argument.
        x: The argument.
        like_name: Name of `like`.
        like: A dense tensor.
        shape: The shape. A name stands for any size. None: that of `like`.
        also: Further dtypes that x may have.
        optional: Accept None.
    """
    if optional and x is None:
        return
    if not isinstance(x, Tensor) or x.layout is not torch.strided or x.is_nested:
        check_strided(name, x)
    wanted = tuple(like.shape) if shape is None else shape
    given = tuple(x.shape)
    if given != wanted and not _fits(given, wanted):
        raise InvalidValue(name, f"to have shape [{', '.join(map(str, wanted))}]", list(given))
    if x.dtype != like.dtype and x.dtype not in also:
        others = ", ".join(dtype_names([dtype for dtype in also if dtype != like.dtype]))
        dtypes = f"to be {others} or of {like_name}'s dtype" if others else f"to have the dtype of {like_name}"
        raise InvalidType(name, f"{dtypes}, {like.dtype}", x.dtype)
    check_device(name, x, like_name, like)


def _fits(shape: tuple[int, ...], wanted: tuple[int | str, ...]) -> bool:
    """Return whether a shape is the wanted one but for sizes that have names."""
    if len(shape) != len(wanted):
        return False
    wrong = [size for size, each in zip(shape, wanted, strict=True) if size != each and not isinstance(each, str)]
    return not wrong


def index_tensor(name: str, index: int | Tensor, bound: int, n: int, device: torch.device) -> Tensor:
    """Return the samples' timesteps as int64 [n] on the device.

    `index` is an int, or int64 with one or n elements. An int is checked here. A CPU tensor is checked by
    `check_range` when the op runs. A GPU tensor is not checked, because that would synchronize with the
    host: the caller must keep it in range.
    """
    if isinstance(index, Tensor):
        if index.layout is not torch.strided:
            check_strided(name, index)
        if index.dtype != torch.int64:
            raise InvalidType(name, "to be an int or an int64 tensor", index.dtype)
        try:
            if index.numel() == 1 or index.shape == (n,):
                return index.to(device).reshape(-1).expand(n).contiguous()
        except RuntimeError:
            check_values(name, index)
            raise
        raise InvalidValue(name, f"to be an int or of shape [{n}]", list(index.shape))
    if not isinstance(index, int) or isinstance(index, bool):
        raise InvalidType(name, "to be an int or an int64 tensor", type(index).__name__)
    if not 0 <= index < bound:
        raise InvalidValue(name, f"in 0..{bound - 1}", index)
    return torch.full((n,), index, dtype=torch.int64, device=device)
