"""diffusers' schedulers on this package's kernels.

Each is a subclass of diffusers' own class, with the same arguments, configuration, files, attributes
and methods. A step is one `reverse_step` with a row of a `SamplingPlan`. `add_noise` and
`get_velocity` are one kernel each. Noise comes from torch.Generator as in diffusers, or from each
sample's own seed with `scheduler.seeds`. docs/migrating/diffusers.md lists the differences.
"""

try:
    # DiffusionPipeline.from_pretrained looks for it in the module of a scheduler.
    from diffusers import SchedulerMixin as SchedulerMixin
except ModuleNotFoundError as error:
    message = f"{error.name} is missing: install it with pip install 'ddpm_fast[diffusers]'"
    raise ModuleNotFoundError(message, name=error.name) from error

from .schedulers import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

__all__ = ["DDIMInverseScheduler", "DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"]

for _scheduler in (DDIMInverseScheduler, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler):
    _scheduler.__module__ = __name__  # saved pipelines name it, so it does not change
