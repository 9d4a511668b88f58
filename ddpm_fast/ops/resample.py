"""resample: maps resampled by 2 after a norm and an activation, as in residual blocks that resample."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from .. import reference
from .backend import why_not_matrix_kernels
from .fused_op import FusedOp
from .op_spec import OpSpec


def _output(arguments: Any) -> Tensor:
    n, channels, height, width = arguments.x.shape
    height, width = (2 * height, 2 * width) if arguments.up else (height // 2, width // 2)
    x: Tensor = arguments.x
    return torch.empty((n, channels, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


resample_op: Final = FusedOp(
    OpSpec(
        "resample",
        reference.resample,
        outputs={"y": _output},
        fields={
            "height": lambda a: a.x.shape[2],
            "width": lambda a: a.x.shape[3],
            "channels": lambda a: a.x.shape[1],
        },
        limits={"native": why_not_matrix_kernels},
    )
)
