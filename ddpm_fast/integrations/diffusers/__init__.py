"""diffusers' schedulers on this package's kernels.

Each is a subclass of diffusers' own class, with the same arguments, configuration, files, attributes
and methods. A step is one `reverse_step` with a row of a `SamplingPlan`. `add_noise` and
`get_velocity` are one kernel each. Noise comes from torch.Generator as in diffusers, or from each
sample's own seed with `scheduler.seeds`. docs/migrating.md lists the differences.
"""

from .. import needs_extra

with needs_extra("diffusers"):
    # DiffusionPipeline.from_pretrained looks for it beside a scheduler.
    from diffusers import SchedulerMixin as SchedulerMixin

from .ddim import DDIMScheduler as DDIMScheduler
from .ddim_inverse import DDIMInverseScheduler as DDIMInverseScheduler
from .ddpm import DDPMScheduler as DDPMScheduler
from .dpm_solver import DPMSolverMultistepScheduler as DPMSolverMultistepScheduler

__all__ = ["DDIMInverseScheduler", "DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"]

for _scheduler in (DDIMInverseScheduler, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler):
    _scheduler.__module__ = __name__  # saved pipelines name it, so it does not change
