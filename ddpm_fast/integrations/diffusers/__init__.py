"""diffusers: `PlanScheduler`, and what `freeze` and `plan_of` need for its networks, pipelines and schedulers."""

from typing import NoReturn

try:
    # DiffusionPipeline.from_pretrained looks for it in the module of a scheduler.
    from diffusers import SchedulerMixin as SchedulerMixin
except ModuleNotFoundError as error:
    message = f"{error.name} is missing: install it with pip install 'ddpm_fast[diffusers]'"
    raise ModuleNotFoundError(message, name=error.name) from error

from .plan_scheduler import PlanScheduler

__all__ = ["PlanScheduler"]

PlanScheduler.__module__ = __name__  # saved pipelines name it, so it does not change


def __getattr__(name: str) -> NoReturn:
    """Say what to write for a scheduler that was here once, which a saved pipeline may name."""
    if name in ("DDPMScheduler", "DDIMScheduler", "DDIMInverseScheduler", "DPMSolverMultistepScheduler"):
        # diffusers would pass over an AttributeError.
        raise ImportError(f"{__name__} has no {name}: use diffusers.{name}, or PlanScheduler.of(scheduler, num_steps)")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
