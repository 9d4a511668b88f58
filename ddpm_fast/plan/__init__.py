"""Samplers as tables of coefficients.

A plan has one row for each step. `reverse_step` applies one row in one kernel. A new sampler is a new table, not a new kernel.
"""

from .ddim import ddim_inversion_plan as ddim_inversion_plan
from .ddim import ddim_plan as ddim_plan
from .ddpm import ddpm_plan as ddpm_plan
from .dpm_solver import dpm_solver_plan as dpm_solver_plan
from .heun import heun_plan as heun_plan
from .named import default_plan as default_plan
from .named import named_plan as named_plan
from .repaint import repaint_plan as repaint_plan
from .sampling_plan import COLUMNS as COLUMNS
from .sampling_plan import VARIANCE_TYPES as VARIANCE_TYPES
from .sampling_plan import Clip as Clip
from .sampling_plan import PlanPrediction as PlanPrediction
from .sampling_plan import SamplingPlan as SamplingPlan
from .timesteps import INTEGERS as INTEGERS
from .timesteps import Spacing as Spacing
from .timesteps import checked_timesteps as checked_timesteps
from .timesteps import spaced_timesteps as spaced_timesteps
