"""Samplers as tables of coefficients.

A plan has one row for each step. `reverse_step` applies one row in one kernel. A new sampler is a new table, not a new kernel.
"""

from .ddim import ddim_inversion_plan, ddim_plan
from .ddpm import ddpm_plan
from .dpm_solver import dpm_solver_plan
from .heun import heun_plan
from .named import default_plan, named_plan
from .repaint import repaint_plan
from .sampling_plan import COLUMNS, VARIANCE_TYPES, Clip, PlanPrediction, SamplingPlan
from .timesteps import INTEGERS, checked_timesteps, spaced_timesteps

__all__ = [
    "COLUMNS",
    "INTEGERS",
    "VARIANCE_TYPES",
    "Clip",
    "PlanPrediction",
    "SamplingPlan",
    "checked_timesteps",
    "ddim_inversion_plan",
    "ddim_plan",
    "ddpm_plan",
    "default_plan",
    "dpm_solver_plan",
    "heun_plan",
    "named_plan",
    "repaint_plan",
    "spaced_timesteps",
]
