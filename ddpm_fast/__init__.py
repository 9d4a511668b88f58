"""Denoising diffusion probabilistic models (Ho et al. 2020), fast, exact and reproducible."""

from .builtin import load_builtin
from .evaluate import VariationalBound, variational_bound
from .images import image_grid, save_grid, save_trajectory, to_uint8
from .integrations.accelerate import accelerate, restore
from .integrations.fuse import FuseReport, fuse, unfuse
from .memory import kept_memory
from .nn import UNet, freeze
from .ops import BackendUnavailable, denoising_loss, group_norm_silu, noise, q_sample, reverse_step, sample_seeds
from .plan import SamplingPlan, ddim_plan, ddpm_plan
from .sampling import sample
from .schedule import NoiseSchedule
from .training import TrainResult, export_checkpoint, train
from .version import __version__ as __version__

__all__ = [
    "BackendUnavailable",
    "FuseReport",
    "NoiseSchedule",
    "SamplingPlan",
    "TrainResult",
    "UNet",
    "VariationalBound",
    "accelerate",
    "ddim_plan",
    "ddpm_plan",
    "denoising_loss",
    "export_checkpoint",
    "freeze",
    "fuse",
    "group_norm_silu",
    "image_grid",
    "kept_memory",
    "load_builtin",
    "noise",
    "q_sample",
    "restore",
    "reverse_step",
    "sample",
    "sample_seeds",
    "save_grid",
    "save_trajectory",
    "to_uint8",
    "train",
    "unfuse",
    "variational_bound",
]
