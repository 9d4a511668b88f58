"""Common part of all schedulers: schedule, seeds, thresholding, forward process."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...checks import check_choice, check_float, check_number, check_one_of, check_strided, index_tensor
from ...dtypes import opmath
from ...errors import InvalidType, InvalidValue, renaming
from ...ops.q_sample import q_sample
from ...plan import COLUMNS, SamplingPlan
from ...reference import PREDICTIONS, per_sample
from ...schedule import NoiseSchedule
from .. import needs_extra

with needs_extra("diffusers"):
    from diffusers.utils.torch_utils import randn_tensor

Betas = np.ndarray[Any, Any] | Sequence[float] | None

_SPACINGS = ("linspace", "leading", "trailing")


class KernelScheduler:
    """Common part of the schedulers, a mixin before diffusers' class.

    Attributes:
        schedule: The configuration's noise schedule in float64. betas, alphas and alphas_cumprod are
            its float32 values.
    """

    config: Any
    num_inference_steps: int | None

    def _set_up(self, build: Callable[[Any], NoiseSchedule] = NoiseSchedule.from_diffusers) -> None:
        """Check the configuration and set diffusers' attributes."""
        config, name = self.config, type(self).__name__
        check_choice(name, "prediction_type", config.prediction_type, PREDICTIONS)
        check_choice(name, "timestep_spacing", config.timestep_spacing, _SPACINGS)
        if self._clips:
            check_number(name, "clip_sample_range", config.clip_sample_range, above=0)
        if self._thresholds:
            check_number(name, "dynamic_thresholding_ratio", config.dynamic_thresholding_ratio, 0, 1)
            check_number(name, "sample_max_value", config.sample_max_value, above=0)
        with renaming(name):
            self.schedule = build(config)
        self.betas = self.schedule.betas.float()
        self.alphas = self.schedule.alphas.float()
        self.alphas_cumprod = self.schedule.alpha_bars.float()
        self.init_noise_sigma = 1.0
        self.num_inference_steps = None

    def _check_set(self, method: str) -> None:
        """Raise if there are no timesteps yet."""
        if self.num_inference_steps is None:
            raise InvalidValue(f"{type(self).__name__}.{method}", "set_timesteps", "to have been called", "no timesteps")

    # The configuration may have keys of other schedulers that this one does not read.
    @property
    def _clips(self) -> bool:
        """True if x_0^ is clipped."""
        return bool(self.config.clip_sample)

    @property
    def _thresholds(self) -> bool:
        """True if x_0^ is thresholded."""
        return bool(self.config.thresholding)

    def register_to_config(self, **kwargs: Any) -> None:
        """Record arguments in the configuration and reset what was derived from it."""
        super().register_to_config(**kwargs)  # type: ignore[misc]  # from diffusers' ConfigMixin
        self._forget()

    def _forget(self) -> None:
        """Drop what was derived from the configuration."""
        raise NotImplementedError

    @property
    def alphas_cumprod(self) -> Tensor:
        """abar, float32 [T], read-only.

        Training scripts may move it to another device. Steps do not use it.
        """
        return self._alphas_cumprod

    @alphas_cumprod.setter
    def alphas_cumprod(self, alphas_cumprod: Tensor) -> None:
        own = self.schedule.alpha_bars
        given = alphas_cumprod.detach().to("cpu", torch.float64)
        if given.shape != own.shape or not torch.allclose(given, own, rtol=1e-2, atol=1e-6):  # half precision is the same
            raise InvalidValue(
                type(self).__name__,
                "alphas_cumprod",
                "to be that of the configuration, on any device and in any dtype",
                "other values: pass trained_betas instead",
            )
        self._alphas_cumprod = alphas_cumprod

    @property
    def seeds(self) -> Tensor | None:
        """Seeds of the samples, int64 [N], or None. See `ddpm_fast.sample_seeds`.

        With seeds, the noise of step i is `ddpm_fast.noise(sample.shape, seeds, stream=i)`. It is bit-identical
        in any batch and on any device, and equals the noise of `ddpm_fast.sample`. `step` then does not use
        its generator. Seeds are not part of the configuration.
        """
        return self._seeds

    @seeds.setter
    def seeds(self, seeds: Tensor | None) -> None:
        if seeds is not None and not (isinstance(seeds, Tensor) and seeds.dtype == torch.int64 and seeds.dim() == 1):
            got = f"{seeds.dtype} {list(seeds.shape)}" if isinstance(seeds, Tensor) else repr(seeds)
            raise InvalidValue(type(self).__name__, "seeds", "to be int64 [N] (see sample_seeds) or None", got)
        self._seeds = seeds

    _seeds: Tensor | None = None

    def _seeds_for(self, plan: SamplingPlan, device: torch.device) -> Tensor | None:
        """Return the seeds on the device if the plan draws noise from them, else None."""
        if self._seeds is None or not plan.is_random:
            return None
        if self._seeds.device != device:
            self._seeds = self._seeds.to(device)
        return self._seeds

    def _noise(self, generator: Any, model_output: Tensor, sample: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
        """Return the noise that diffusers draws for a step, by default in the output's dtype, or None with seeds."""
        if self._seeds is not None:
            return None
        dtype = model_output.dtype if dtype is None else dtype
        noise: Tensor = randn_tensor(sample.shape, generator=generator, device=model_output.device, dtype=dtype)
        return noise

    # -------------------------------------------------------------------------------------------------------------- x_0^

    def _thresholded(self, coefficients: Tensor, x_t: Tensor, model_output: Tensor) -> Tensor:
        """Return the thresholded x_0^, for rows of a plan's table."""
        p, q = (per_sample(coefficients[..., i], x_t) for i in (COLUMNS.index("p"), COLUMNS.index("q")))
        m = model_output[:, : x_t.shape[1]].to(opmath(x_t.dtype))
        return self._threshold_sample(p * x_t + q * m).to(x_t.dtype)

    def _threshold_sample(self, sample: Tensor) -> Tensor:
        """Apply dynamic thresholding to x_0^ (Saharia et al. 2022, section 2.3): clamp to +-s and divide by s.

        s is a quantile of each sample's |x_0^|, clamped to 1..sample_max_value. Half precision is thresholded
        in float32.
        """
        config, wide = self.config, sample.to(opmath(sample.dtype))
        s = torch.quantile(wide.abs().flatten(1), config.dynamic_thresholding_ratio, dim=1)
        s = per_sample(s.clamp(min=1, max=config.sample_max_value), wide)
        return (wide.clamp(-s, s) / s).to(sample.dtype)

    # ---------------------------------------------------------------------------------------------------- forward process

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """Return x_t for noise and timesteps: one `q_sample`, rounded once, in any floating dtype.

            x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise

        Args:
            original_samples: x_0, [N, ...], floating.
            noise: Broadcastable with x_0.
            timesteps: An int, or an integer tensor with 1 or N elements.
        """
        caller = f"{type(self).__name__}.add_noise"
        check_float(caller, "original_samples", original_samples)
        check_float(caller, "noise", noise)
        return self._q_sample(caller, original_samples, noise, timesteps)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """Return the velocity of a sample: one `q_sample` (Salimans and Ho 2022).

            v = sqrt(abar_t) noise - sqrt(1 - abar_t) x_0

        Args:
            sample: x_0, [N, ...], floating.
            noise: Broadcastable with x_0.
            timesteps: An int, or an integer tensor with 1 or N elements.
        """
        caller = f"{type(self).__name__}.get_velocity"
        check_float(caller, "sample", sample)
        check_float(caller, "noise", noise)
        return self._q_sample(caller, noise, -sample, timesteps)

    def _q_sample(self, caller: str, x_0: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        x_0, noise, t = self._forward_arguments(caller, x_0, noise, t)
        return q_sample(x_0, t, self.schedule, noise=noise)

    def _forward_arguments(self, caller: str, x_0: Tensor, noise: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return samples and noise in one shape and dtype, and timesteps int64 [N], after a check."""
        if isinstance(t, Tensor):
            check_strided(caller, "timesteps", t)
            t = t.reshape(-1)
            if not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool):
                t = t.to(torch.int64)
        try:
            shape = torch.broadcast_shapes(x_0.shape, noise.shape)
        except RuntimeError:
            got = f"{list(x_0.shape)} and {list(noise.shape)}"
            raise InvalidValue(caller, "noise", "to broadcast with the samples", got) from None
        if isinstance(t, Tensor) and t.numel() > 1 and shape[:1] == (1,):
            shape = (t.numel(), *shape[1:])
        t = index_tensor(caller, "timesteps", t, self.schedule.num_timesteps, shape[0], x_0.device)
        dtype = torch.promote_types(x_0.dtype, noise.dtype)
        return x_0.to(dtype).expand(shape), noise.to(dtype).expand(shape), t


def refuse_thresholding(scheduler: KernelScheduler) -> None:
    """Raise if thresholding is on, which no row of coefficients has."""
    if scheduler._thresholds:
        raise InvalidValue(f"{type(scheduler).__name__}.sampling_plan", "thresholding", "to be false", "true")


def given_timesteps(name: str, num_inference_steps: Any, timesteps: Any, total: int) -> Tensor | None:
    """Return given timesteps, int64 [S] on the CPU, or None if their number is given instead. Raise for both or neither."""
    check_one_of(name, "num_inference_steps", num_inference_steps, "timesteps", timesteps)
    if timesteps is None:
        return None
    chain = torch.as_tensor(timesteps)
    descending = chain.dim() == 1 and chain.numel() > 0 and bool((chain.diff() < 0).all())
    if not descending or chain.is_floating_point() or chain[0] >= total or chain[-1] < 0:
        raise InvalidValue(name, "timesteps", f"to be strictly descending integers in 0..{total - 1}", timesteps)
    return chain.to("cpu", torch.int64)


def checked_offset(name: str, offset: int, timesteps: Tensor, total: int) -> Tensor:
    """Return spaced timesteps with an offset. Raise if it takes all steps out of 0..total-1."""
    timesteps = timesteps + offset
    first, last = int(timesteps[0]), int(timesteps[-1])
    if first >= total or last < 0:
        raise InvalidValue(
            name,
            "steps_offset",
            f"to keep the timesteps in 0..{total - 1}",
            f"{offset}, which makes {len(timesteps)} steps go from {first} to {last}",
        )
    return timesteps


def check_steps(name: str, num_steps: Any) -> None:
    """Raise a TypeError unless a number of steps is an int of Python or NumPy."""
    if isinstance(num_steps, bool) or not isinstance(num_steps, int | np.integer):
        raise InvalidType(name, "num_inference_steps", "to be an int", repr(num_steps))


def checked_timestep(name: str, timestep: Any) -> Tensor | int:
    """Return the timestep of a step as a tensor or an int. Raise a TypeError if it is no integer."""
    if isinstance(timestep, Tensor):
        if timestep.is_floating_point() or timestep.is_complex() or timestep.dtype == torch.bool:
            raise InvalidType(name, "timestep", "to be an int or an integer tensor", timestep.dtype)
        return timestep
    if isinstance(timestep, bool) or not hasattr(timestep, "__index__"):  # NumPy's integers have it
        raise InvalidType(name, "timestep", "to be an int or an integer tensor", repr(timestep))
    return operator.index(timestep)
