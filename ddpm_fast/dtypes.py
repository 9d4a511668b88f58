"""Dtypes of storage and of arithmetic."""

from __future__ import annotations

from typing import Final

import torch

FLOATS: Final = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # the index is the native module's dtype code


def opmath(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of intermediate results: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
