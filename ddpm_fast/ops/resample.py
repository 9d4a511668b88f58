"""resample: the kernel of residual blocks that resample by 2, after a norm and an activation."""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from ._op import FusedOp
from .backend import why_not_matrix_kernels


def _reference(x: Tensor, affine: Tensor | None, silu: bool, up: bool) -> Tensor:
    h = x
    if affine is not None:
        center, slope, intercept = affine.to(x.dtype)[..., None, None].unbind(1)
        h = (x - center) * slope + intercept
        h = F.silu(h) if silu else h
    return F.interpolate(h, scale_factor=2.0, mode="nearest") if up else F.avg_pool2d(h, 2)


def _output(arguments: Any) -> Tensor:
    n, channels, height, width = arguments.x.shape
    height, width = (2 * height, 2 * width) if arguments.up else (height // 2, width // 2)
    x: Tensor = arguments.x
    return torch.empty((n, channels, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


# y = up(act((x - center) slope + intercept)) by nearest neighbour, or the mean of each 2x2 square without `up`. x is
# [N, C, H, W] and affine is float32 [N, 3, C], or None for neither norm nor act. H and W are even without `up`.
resample_kernel: Final = FusedOp(
    "resample",
    "Tensor x, Tensor? affine, bool silu, bool up",
    outputs={"y": _output},
    reference=_reference,
    dense=("x",),
    layout=torch.channels_last,
    derived={
        "height": lambda a: a.x.shape[2],
        "width": lambda a: a.x.shape[3],
        "channels": lambda a: a.x.shape[1],
    },
    limits=why_not_matrix_kernels,
)
