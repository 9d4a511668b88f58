"""diffusers' DDIMScheduler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...checks import check_number
from ...errors import InvalidValue
from ...plan import SamplingPlan, ddim_plan
from .. import needs_extra
from .chain import PlanScheduler
from .common import Betas, refuse_thresholding

with needs_extra("diffusers"):
    import diffusers
    from diffusers.configuration_utils import register_to_config
    from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput


class DDIMScheduler(PlanScheduler, diffusers.DDIMScheduler):
    """DDIM (Song et al. 2021) with the arguments of `diffusers.DDIMScheduler`.

    It supports all beta schedules of DDPMScheduler.

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
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._set_up()
        self.final_alpha_cumprod = torch.tensor(1.0) if set_alpha_to_one else self.alphas_cumprod[0]

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Set the timesteps of the chain.

        Args:
            num_inference_steps: Number of timesteps, in the configuration's spacing.
            device: Device of `self.timesteps`. On a GPU `step` does not wait for it.

        Raises:
            ValueError: A value is out of range, or the prediction is epsilon at a timestep with abar = 0.
            TypeError: An argument has an unsupported type.
        """
        self._set_chain(self._spaced(num_inference_steps), int(num_inference_steps), device)

    def sampling_plan(self, eta: float = 0.0, use_clipped_model_output: bool = False) -> SamplingPlan:
        """Return the chain as a plan for `ddpm_fast.sample` and `reverse_step`.

        Row i is what `step` does at `self.timesteps[i]`.

        Args:
            eta: As in `step`.
            use_clipped_model_output: As in `step`.

        Raises:
            ValueError: set_timesteps was not called, or thresholding is on. Thresholding depends on a whole
                image, so no row of coefficients has it.
        """
        self._check_set("sampling_plan")
        refuse_thresholding(self)
        return self._chain_plan(float(eta), bool(use_clipped_model_output))

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """Return the sample at the previous timestep of the chain.

        A timestep that is not in the chain moves down by T // num_inference_steps.

        Args:
            model_output: Like sample.
            timestep: An int, or an integer tensor with 1 or N elements. A tensor on a GPU is read there,
                without synchronization, so a CUDA graph of a step serves every step.
            sample: x_t, [N, ...], floating.
            eta: Scale of the noise. 0 is deterministic, 1 has the variance of DDPM.
            use_clipped_model_output: Re-derive epsilon from the clipped x_0^.
            generator: Draws the noise if eta > 0. With `seeds` it is not used.
            variance_noise: The noise itself, like sample, instead of a generator.
            return_dict: Return a DDIMSchedulerOutput, else a tuple.

        Returns:
            prev_sample and pred_original_sample (x_0^), in the wider dtype of model_output and sample.
            Differentiable.

        Raises:
            ValueError: An argument has an unsupported value or shape, or set_timesteps was not called.
            TypeError: An argument has an unsupported type or dtype.
        """
        self._check_set("step")
        number: Any = eta
        if not isinstance(number, np.floating):  # float() below takes NumPy's numbers
            check_number("DDIMScheduler.step", "eta", eta, 0, finite=True)
        known = self._known(timestep, model_output, sample)
        steps = self._steps(float(eta), bool(use_clipped_model_output))
        noise = None
        if eta > 0:
            if variance_noise is not None and generator is not None:
                raise InvalidValue("DDIMScheduler.step", "", "at most one of generator and variance_noise", "both")
            noise = self._noise(generator, model_output, sample) if variance_noise is None else variance_noise
        x_prev, x_0 = self._advance(steps, known, timestep, model_output, sample, noise)
        return DDIMSchedulerOutput(prev_sample=x_prev, pred_original_sample=x_0) if return_dict else (x_prev, x_0)

    def _plan_arguments(self) -> tuple[Any, ...]:
        return 0.0, False

    def _plan(self, timesteps: Sequence[int], previous: Sequence[int] | None, *arguments: Any) -> SamplingPlan:
        eta, use_clipped_model_output = arguments
        return ddim_plan(
            self.schedule,
            None,
            spacing=timesteps,
            previous=previous,
            prediction=self.config.prediction_type,
            eta=eta,
            clip=self._clip(),
            use_clipped_model_output=use_clipped_model_output,
            final_alpha_bar=1.0 if self.config.set_alpha_to_one else float(self.schedule.alpha_bars[0]),
        )

    def _between(self, timesteps: Tensor) -> Tensor:
        """Return timesteps lower by T / S, as in diffusers."""
        apart: int = self.config.num_train_timesteps // self.num_inference_steps
        return (timesteps - apart).clamp(min=-1)
