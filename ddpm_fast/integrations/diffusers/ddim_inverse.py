"""diffusers' DDIMInverseScheduler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import expect
from ...plan import SamplingPlan, ddim_inversion_plan
from .. import needs_extra
from .chain import PlanScheduler
from .common import Betas

with needs_extra("diffusers"):
    import diffusers
    from diffusers.configuration_utils import register_to_config
    from diffusers.schedulers.scheduling_ddim_inverse import DDIMSchedulerOutput
    from diffusers.utils.deprecation_utils import deprecate


class DDIMInverseScheduler(PlanScheduler, diffusers.DDIMInverseScheduler):
    """DDIM inversion (Song et al. 2021) with the arguments of `diffusers.DDIMInverseScheduler`.

    Timesteps ascend. A step arrives at the timestep that the model is told. See
    `ddpm_fast.ddim_inversion_plan` with told="arrival".

    Raises:
        ValueError: An argument is out of range, a beta is outside (0, 1], or the prediction is "sample" with
            set_alpha_to_one, as an image alone does not determine epsilon.
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
        clip_sample_range: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("set_alpha_to_zero") is not None:
            message = "The argument `set_alpha_to_zero` is deprecated. Use `set_alpha_to_one` instead."
            deprecate("set_alpha_to_zero", "1.0.0", message, standard_warn=False)
            set_alpha_to_one = kwargs["set_alpha_to_zero"]
        self._set_up()
        expect(
            prediction_type != "sample" or not set_alpha_to_one,
            type(self).__name__,
            "prediction_type",
            'to be "epsilon" or "v_prediction" with set_alpha_to_one, as an image alone does not determine epsilon',
            "'sample'",
        )
        self.initial_alpha_cumprod = torch.tensor(1.0) if set_alpha_to_one else self.alphas_cumprod[0]
        self._initial_alpha_bar = 1.0 if set_alpha_to_one else float(self.schedule.alpha_bars[0])
        self.timesteps = torch.arange(num_train_timesteps)
        self._is_default = True

    @property
    def _thresholds(self) -> bool:
        return False  # the configuration may have the key, from another scheduler

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Set the timesteps of the chain, ascending.

        Args:
            num_inference_steps: Number of timesteps, in the configuration's spacing, "leading" or "trailing".
            device: Device of `self.timesteps`. On a GPU `step` does not wait for it.

        Raises:
            ValueError: A value is out of range, or the spacing is "linspace".
            TypeError: An argument has an unsupported type.
        """
        expect(
            self.config.timestep_spacing != "linspace",
            f"{type(self).__name__}.set_timesteps",
            "timestep_spacing",
            'to be "leading" or "trailing"',
            '"linspace"',
        )
        self._set_chain(self._spaced(num_inference_steps).flip(0), int(num_inference_steps), device)

    def sampling_plan(self) -> SamplingPlan:
        """Return the chain as a plan for `ddpm_fast.sample` and `reverse_step`.

        Row i is what `step` does at `self.timesteps[i]`.

        Raises:
            ValueError: set_timesteps was not called.
        """
        self._check_set("sampling_plan")
        return self._chain_plan()

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """Return the sample at `timestep`, from the one at the previous timestep of the chain.

        The first step starts at the image. At a timestep that is not in the chain, a step starts
        T // num_inference_steps below it.

        Args:
            model_output: Like sample.
            timestep: Where the step arrives: an int, or an integer tensor with 1 or N elements. A tensor on a
                GPU is read there, without synchronization, so a CUDA graph of a step serves every step.
            sample: [N, ...], floating.
            return_dict: Return a DDIMSchedulerOutput, else a tuple.

        Returns:
            prev_sample, which is the noisier one, and pred_original_sample (x_0^), in the wider dtype of
            model_output and sample. Differentiable.

        Raises:
            ValueError: An argument has an unsupported value or shape, or set_timesteps was not called.
            TypeError: An argument has an unsupported type or dtype.
        """
        self._check_set("step")
        known = self._known(timestep, model_output, sample)
        x_next, x_0 = self._advance(self._steps(), known, timestep, model_output, sample, None)
        return DDIMSchedulerOutput(prev_sample=x_next, pred_original_sample=x_0) if return_dict else (x_next, x_0)

    def _plan_arguments(self) -> tuple[Any, ...]:
        return ()

    def _plan(self, timesteps: Sequence[int], previous: Sequence[int] | None, *arguments: Any) -> SamplingPlan:
        return ddim_inversion_plan(
            self.schedule,
            None,
            told="arrival",
            spacing=timesteps[::-1],
            previous=None if previous is None else previous[::-1],
            prediction=self.config.prediction_type,
            clip=self._clip(),
            initial_alpha_bar=self._initial_alpha_bar,
        )

    def _has_step(self) -> Tensor:
        """Return that every timestep has a step: its start is cleaner, where abar is positive."""
        return torch.ones(self.schedule.num_timesteps, dtype=torch.bool)

    def _between(self, timesteps: Tensor) -> Tensor:
        """Return where steps start that arrive between timesteps of the chain: lower by T // S, as in diffusers."""
        apart: int = self.config.num_train_timesteps // self.num_inference_steps
        return (timesteps - apart).clamp(min=-1)
