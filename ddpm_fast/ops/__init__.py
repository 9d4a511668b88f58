"""Ops: pure functions on tensors, each computed by one of three backends (native, triton, reference)."""

from typing import Final

import torch

from ..checks import check_choice
from ..errors import public
from .attention import attention, attention_op
from .backend import BACKENDS, BackendUnavailable
from .conv3x3 import conv3x3, conv3x3_op
from .denoising_loss import denoising_loss, denoising_loss_op
from .fused_op import FusedOp
from .group_norm_affine import group_norm_affine, group_norm_affine_op
from .group_norm_silu import group_norm_silu, group_norm_silu_op
from .noise import initial_noise, noise, noise_op, sample_seeds
from .q_sample import q_sample, q_sample_op
from .reverse_step import reverse_step, reverse_step_op

OPS: Final[dict[str, FusedOp]] = {
    op.name: op
    for op in (
        *(noise_op, q_sample_op, reverse_step_op, denoising_loss_op, group_norm_silu_op),
        *(group_norm_affine_op, conv3x3_op, attention_op),
    )
}
"""Public ops by name."""


@public()
def why_not(backend: str, op: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Return why a backend cannot compute an op for this device and dtype, or None if it can.

    Raises:
        ValueError: The backend or the op is unknown.
    """
    check_choice("op", op, OPS)
    return OPS[op].why_not(backend, device, dtype)


__all__ = [
    "BACKENDS",
    "OPS",
    "BackendUnavailable",
    "attention",
    "conv3x3",
    "denoising_loss",
    "group_norm_affine",
    "group_norm_silu",
    "initial_noise",
    "noise",
    "q_sample",
    "reverse_step",
    "sample_seeds",
    "why_not",
]
