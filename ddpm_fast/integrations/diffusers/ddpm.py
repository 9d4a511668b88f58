"""diffusers' DDPMScheduler."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidValue
from ...plan import VARIANCE_TYPES, SamplingPlan, ddpm_plan
from .. import needs_extra
from .chain import PlanScheduler
from .common import Betas, given_timesteps, refuse_thresholding

with needs_extra("diffusers"):
    import diffusers
    from diffusers.configuration_utils import register_to_config
    from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput

_log = logging.getLogger("ddpm_fast")


class DDPMScheduler(PlanScheduler, diffusers.DDPMScheduler):
    """Ancestral sampling (Ho et al. 2020, Algorithm 2) with the arguments of `diffusers.DDPMScheduler`.

    Raises:
        ValueError: An argument is out of range, or a beta is outside (0, 1].
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Betas = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self.custom_timesteps = False
        self._set_up()
        self.one = torch.tensor(1.0)
        self.variance_type = variance_type
        if variance_type not in VARIANCE_TYPES:
            _log.warning(
                "DDPMScheduler: expected variance_type to be one of %s, got %r: taken for fixed_small, as in diffusers",
                *(", ".join(VARIANCE_TYPES), variance_type),
            )

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Set the timesteps of the chain.

        Args:
            num_inference_steps: Number of timesteps, in the configuration's spacing. Pass this or
                `timesteps`.
            device: Device of `self.timesteps`. On a GPU `step` does not wait for it.
            timesteps: Strictly descending timesteps.

        Raises:
            ValueError: Both or neither are given, a value is out of range, or the prediction is epsilon at a
                timestep with abar = 0.
            TypeError: An argument has an unsupported type.
        """
        name, total = f"{type(self).__name__}.set_timesteps", self.config.num_train_timesteps
        given = given_timesteps(name, num_inference_steps, timesteps, total)
        chain = self._spaced(num_inference_steps) if given is None else given
        self.custom_timesteps = given is not None
        self._set_chain(chain, num_inference_steps if given is None else self.num_inference_steps, device)

    def sampling_plan(self) -> SamplingPlan:
        """Return the chain as a plan for `ddpm_fast.sample` and `reverse_step`.

        Row i is what `step` does at `self.timesteps[i]`.

        Raises:
            ValueError: Thresholding is on. It depends on a whole image, so no row of coefficients has it.
        """
        refuse_thresholding(self)
        return self._chain_plan()

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """Return the sample at the previous timestep of the chain.

        Args:
            model_output: Like sample. With learned variance it has twice the channels, the prediction first.
            timestep: An int, or an integer tensor with 1 or N elements. A tensor on a GPU is read there,
                without synchronization, so a CUDA graph of a step serves every step.
            sample: x_t, [N, ...], floating.
            generator: Draws the noise. With `seeds` it is not used.
            return_dict: Return a DDPMSchedulerOutput, else a tuple.

        Returns:
            prev_sample and pred_original_sample (x_0^), in the wider dtype of model_output and sample.
            Differentiable.

        Raises:
            ValueError: An argument has an unsupported value or shape, or a timestep on the host is not in the
                chain.
            TypeError: An argument has an unsupported type or dtype.
        """
        known = self._known(timestep, model_output, sample)
        steps = self._steps()
        if known is not None and (self.custom_timesteps or self.num_inference_steps is not None):
            missing = [t for t in known if t not in steps.chain]
            if missing:
                raise InvalidValue(
                    f"{type(self).__name__}.step",
                    "timestep",
                    f"to be one of the {len(steps.chain)} of set_timesteps",
                    missing[0],
                )
        if known is None or max(known, default=0) > 0:
            noise = self._noise(generator, model_output, sample)
        else:  # sigma is 0 there, and diffusers draws nothing
            noise = torch.zeros_like(sample)
        x_prev, x_0 = self._advance(steps, known, timestep, model_output, sample, noise)
        return DDPMSchedulerOutput(prev_sample=x_prev, pred_original_sample=x_0) if return_dict else (x_prev, x_0)

    def _plan_arguments(self) -> tuple[Any, ...]:
        return ()

    def _plan(self, timesteps: Sequence[int], previous: Sequence[int] | None, *arguments: Any) -> SamplingPlan:
        config = self.config
        return ddpm_plan(
            self.schedule,
            spacing=timesteps,
            previous=previous,
            prediction=config.prediction_type,
            variance=config.variance_type if config.variance_type in VARIANCE_TYPES else "fixed_small",
            clip=self._clip(),
        )

    def _between(self, timesteps: Tensor) -> Tensor:
        """Return the next timestep of the chain below each timestep."""
        ascending = torch.cat([torch.tensor([-1]), self._chain.flip(0)])
        return ascending[torch.searchsorted(ascending, timesteps) - 1]
