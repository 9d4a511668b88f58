"""Small ops of a sampling step: its time terms, the network's input, and the counter. Programs call them."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from .. import reference
from ..checks import check_range
from .backend import why_not_matrix_kernels
from .fused_op import FusedOp
from .op_spec import OpSpec


def _input(a: Any) -> Tensor:
    shape = (a.copies * len(a.x_t), *a.x_t.shape[1:])
    return torch.empty(shape, dtype=a.dtype, device=a.x_t.device, memory_format=torch.channels_last)


def _why_not_float32(dtype: torch.dtype) -> str | None:
    return None if dtype == torch.float32 else f"it copies float32, not {dtype}"


def _check_steps(a: Any) -> None:
    check_range("step", a.step, len(a.timesteps))
    check_range("timesteps", a.timesteps, a.table.shape[1])


time_terms_op: Final = FusedOp(
    OpSpec(
        "time_terms",
        reference.time_terms,
        outputs={"terms": lambda a: a.table.new_empty(len(a.table), a.samples, a.table.shape[2])},
        fields={
            "tables": lambda a: len(a.table),
            "num_timesteps": lambda a: a.table.shape[1],
            "width": lambda a: a.table.shape[2],
        },
        limits={"native": lambda device, dtype, _: why_not_matrix_kernels(device, dtype) or _why_not_float32(dtype)},
        check=_check_steps,
    )
)

network_input_op: Final = FusedOp(
    OpSpec(
        "network_input",
        reference.network_input,
        outputs={"x": _input},
        fields={"count": lambda a: a.x_t.numel()},
        limits={"native": why_not_matrix_kernels},
    )
)

count_step_op: Final = FusedOp(
    OpSpec(
        "count_step",
        reference.count_step,
        outputs={"next_step": lambda a: torch.empty_like(a.step)},
        limits={"native": lambda device, *_: why_not_matrix_kernels(device, torch.float32)},
    )
)
