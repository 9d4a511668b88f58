"""Autocast for ops that PyTorch's autocast does not know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def in_autocast(x: Tensor) -> bool:
    """Return whether autocast is on for x's device. Meta tensors have no autocast."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which an op computes x: autocast's if that is on for x's device, else x's own."""
    return torch.get_autocast_dtype(x.device.type) if in_autocast(x) else x.dtype


def autocast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Return the tensors in autocast's dtype if autocast is on for x's device. float64 is not cast."""
    if not in_autocast(x):
        return x, *others
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, *others))
