"""Ops: pure functions on tensors, each computed by one of three backends (native, triton, reference)."""

from .attention import attention
from .backend import BACKENDS, BackendUnavailable
from .conv3x3 import conv3x3
from .denoising_loss import denoising_loss
from .fused_op import OPS, why_not
from .group_norm_affine import group_norm_affine
from .group_norm_silu import group_norm_silu
from .noise import initial_noise, noise, sample_seeds
from .q_sample import q_sample
from .reverse_step import reverse_step

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
