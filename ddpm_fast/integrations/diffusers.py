"""diffusers' DDPMScheduler and DDIMScheduler on this package's kernels.

Both are subclasses of diffusers' own classes, with the same arguments, configuration, files, attributes
and methods. A step is one `reverse_step` with a row of a `SamplingPlan`. `add_noise` and
`get_velocity` are one `q_sample`. Noise comes from torch.Generator as in diffusers, or from each
sample's own seed with `scheduler.seeds`. docs/migrating.md lists the differences.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..checks import check_choice, check_float, check_number, check_strided, checked_device, index_tensor
from ..dtypes import opmath
from ..ops.q_sample import q_sample
from ..ops.reverse_step import reverse_step
from ..plan import COLUMNS, VARIANCE_TYPES, SamplingPlan, ddim_plan, ddpm_plan, spaced_timesteps
from ..reference import PREDICTIONS, per_sample
from ..schedule import NoiseSchedule, numbered
from . import needs_extra

with needs_extra("diffusers"):
    import diffusers
    from diffusers import SchedulerMixin as SchedulerMixin  # DiffusionPipeline.from_pretrained looks for it beside a scheduler
    from diffusers.configuration_utils import register_to_config
    from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
    from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
    from diffusers.utils.torch_utils import randn_tensor

_log = logging.getLogger("ddpm_fast")

_MAX_KEPT = 8  # a caller may pass another eta at every step, so old plans are dropped
_SPACINGS = ("linspace", "leading", "trailing")
_Betas = np.ndarray[Any, Any] | Sequence[float] | None


class _PlanScheduler:
    """Common part of both schedulers, a mixin before diffusers' class.

    Attributes:
        schedule: The configuration's noise schedule in float64. betas, alphas and alphas_cumprod are
            its float32 values.
    """

    config: Any
    num_inference_steps: int | None

    def _set_up(self) -> None:
        """Check the configuration and set diffusers' attributes."""
        config, name = self.config, type(self).__name__
        check_choice(name, "prediction_type", config.prediction_type, PREDICTIONS)
        check_choice(name, "timestep_spacing", config.timestep_spacing, _SPACINGS)
        if config.clip_sample:
            check_number(name, "clip_sample_range", config.clip_sample_range, above=0)
        if config.thresholding:
            check_number(name, "dynamic_thresholding_ratio", config.dynamic_thresholding_ratio, 0, 1)
            check_number(name, "sample_max_value", config.sample_max_value, above=0)
        self.schedule = NoiseSchedule.from_diffusers(config)
        self.betas = self.schedule.betas.float()
        self.alphas = self.schedule.alphas.float()
        self.alphas_cumprod = self.schedule.alpha_bars.float()
        self.init_noise_sigma = 1.0
        self.num_inference_steps = None
        self.timesteps = torch.arange(config.num_train_timesteps - 1, -1, -1)
        self._is_default = True

    def register_to_config(self, **kwargs: Any) -> None:
        """Record arguments in the configuration and reset what was derived from it."""
        super().register_to_config(**kwargs)  # type: ignore[misc]  # from diffusers' ConfigMixin
        self._kept: dict[tuple[Any, ...], _Steps] = {}

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
            raise ValueError(
                f"{type(self).__name__}: expected alphas_cumprod to be that of the configuration, on any device and in any "
                "dtype, got other values: pass trained_betas instead"
            )
        self._alphas_cumprod = alphas_cumprod

    # --------------------------------------------------------------------------------------------------------- timesteps

    @property
    def timesteps(self) -> Tensor:
        """Timesteps for the model and `step`, int64 [S], in this order."""
        return self._timesteps

    @timesteps.setter
    def timesteps(self, timesteps: Tensor) -> None:
        self._timesteps, self._chain = timesteps, timesteps.cpu()
        self._is_default = False
        self._kept = {}

    def _spaced(self, num_inference_steps: Any) -> Tensor:
        """Return int64 [num_inference_steps] in the configuration's spacing."""
        name, total = f"{type(self).__name__}.set_timesteps", self.config.num_train_timesteps
        if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, int | np.integer):
            raise TypeError(f"{name}: expected num_inference_steps to be an int, got {num_inference_steps!r}")
        if not 1 <= num_inference_steps <= total:
            raise ValueError(
                f"{name}: expected num_inference_steps to be in 1..{total} (num_train_timesteps), got {num_inference_steps}"
            )
        timesteps = spaced_timesteps(name, total, int(num_inference_steps), self.config.timestep_spacing)
        if self.config.timestep_spacing == "leading":
            timesteps = timesteps + self.config.steps_offset
            first, last = int(timesteps[0]), int(timesteps[-1])
            if first >= total or last < 0:
                raise ValueError(
                    f"{name}: expected steps_offset to keep the timesteps in 0..{total - 1}, got {self.config.steps_offset}, "
                    f"which makes {num_inference_steps} steps go from {first} to {last}"
                )
        return timesteps

    def _set_chain(self, timesteps: Tensor, num_inference_steps: int | None, device: torch.device | str | None) -> None:
        """Make this chain of timesteps the current one and move its tables to the device."""
        if device is not None:
            device = checked_device(f"{type(self).__name__}.set_timesteps", device)
        kinds = [*self._kept] or [self._plan_arguments()]
        same = not self._is_default and num_inference_steps == self.num_inference_steps and torch.equal(timesteps, self._chain)
        if not same:
            self._kept = {}
        self.num_inference_steps, self._is_default = num_inference_steps, False
        self._timesteps, self._chain = timesteps.to(device), timesteps
        for arguments in kinds:
            self._steps(*arguments).prepare(device or "cpu")

    # ------------------------------------------------------------------------------------------------------------- plans

    def _plan_arguments(self) -> tuple[Any, ...]:
        """Return the default arguments of `_plan` after the timesteps."""
        raise NotImplementedError

    def _plan(self, timesteps: Sequence[int], previous: Sequence[int] | None, *arguments: Any) -> SamplingPlan:
        """Return the plan of steps from `timesteps` to `previous`, by default each to the next."""
        raise NotImplementedError

    def _between(self, timesteps: Tensor) -> Tensor:
        """Return where steps arrive that start between timesteps of the chain, int64."""
        raise NotImplementedError

    def _chain_plan(self, *arguments: Any) -> SamplingPlan:
        """Return a plan with a row for each of `timesteps`."""
        total, chain = self.schedule.num_timesteps, self._chain
        if total != self.config.num_train_timesteps:
            raise ValueError(
                f"{type(self).__name__}: expected num_train_timesteps to be {total}, the number of trained_betas, "
                f"got {self.config.num_train_timesteps}"
            )
        if self._is_default:  # every timestep from which there is a step
            chain = chain[self._has_step()[chain]]
        return self._plan(chain.tolist(), None, *arguments)

    def _has_step(self) -> Tensor:
        """Return which timesteps have a step, bool [T].

        With abar = 0, predicted noise does not determine x_0.
        """
        has_step: Tensor = (self.schedule.alpha_bars > 0) | (self.config.prediction_type != "epsilon")
        return has_step

    def _steps(self, *arguments: Any) -> _Steps:
        if arguments not in self._kept:
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    f"{type(self).__name__}.step: expected a first step outside torch.compile, which makes the plan, got none "
                    f"since set_timesteps with {arguments}"
                )
            plan = self._chain_plan(*arguments)
            chain = frozenset(plan.timesteps.tolist())
            between = self._has_step()
            between[plan.timesteps] = False
            if between.any():
                timesteps = between.nonzero()[:, 0]
                others = self._plan(timesteps.tolist(), self._between(timesteps).tolist(), *arguments)
                plan = replace(
                    plan,
                    timesteps=torch.cat([plan.timesteps, others.timesteps]),
                    coefficients=torch.cat([plan.coefficients, others.coefficients]),
                    alpha_bars_prev=torch.cat([plan.alpha_bars_prev, others.alpha_bars_prev]),
                )
            if self.config.thresholding:
                plan = _with_given_x_0(plan)
            if len(self._kept) == _MAX_KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[arguments] = _Steps(plan, chain)
        return self._kept[arguments]

    # -------------------------------------------------------------------------------------------------------------- step

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
            raise ValueError(f"{type(self).__name__}: expected seeds to be int64 [N] (see sample_seeds) or None, got {got}")
        self._seeds = seeds

    _seeds: Tensor | None = None

    def _noise(self, generator: Any, model_output: Tensor, sample: Tensor) -> Tensor | None:
        """Return the noise that diffusers draws for a step, in the same dtype, or None with seeds."""
        if self._seeds is not None:
            return None
        noise: Tensor = randn_tensor(sample.shape, generator=generator, device=model_output.device, dtype=model_output.dtype)
        return noise

    def _known(self, timestep: Any, model_output: Tensor, sample: Tensor) -> list[int] | None:
        """Return the timesteps of a step if they are on the host, else None.

        Reading timesteps from a device would synchronize. The arguments that `reverse_step` does not check are
        checked here.
        """
        name = f"{type(self).__name__}.step"
        check_float(name, "model_output", model_output)
        check_float(name, "sample", sample)
        n = sample.shape[0]
        if isinstance(timestep, Tensor):
            if timestep.is_floating_point() or timestep.is_complex() or timestep.dtype == torch.bool:
                raise TypeError(f"{name}: expected timestep to be an int or an integer tensor, got {timestep.dtype}")
            if timestep.numel() not in (1, n):
                raise ValueError(f"{name}: expected timestep to have 1 or {n} elements, got shape {list(timestep.shape)}")
            if timestep.device.type != "cpu" or torch.compiler.is_compiling():
                return None
            return cast("list[int]", timestep.reshape(-1).tolist())
        if torch.compiler.is_compiling():
            return None
        if isinstance(timestep, bool) or not hasattr(timestep, "__index__"):  # NumPy's integers have it
            raise TypeError(f"{name}: expected timestep to be an int or an integer tensor, got {timestep!r}")
        return [operator.index(timestep)]

    def _advance(
        self,
        steps: _Steps,
        known: list[int] | None,
        timestep: Any,
        model_output: Tensor,
        sample: Tensor,
        noise: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return x_{t-1} and x_0^."""
        row = steps.find(timestep, sample.device) if known is None else self._find(steps, known, sample.device)
        x_t = sample.to(torch.promote_types(sample.dtype, model_output.dtype))
        if model_output.dtype != x_t.dtype and x_t.dtype != torch.float32:
            model_output = model_output.to(x_t.dtype)  # float32 takes half precision as it is
        noise = None if noise is None else noise.to(x_t.dtype)
        seeds = None
        if noise is None and self._seeds is not None and steps.plan.is_random:
            if self._seeds.device != x_t.device:
                self._seeds = self._seeds.to(x_t.device)
            seeds = self._seeds
        if not self.config.thresholding:
            stepped = reverse_step(x_t, model_output, row, steps.plan, noise=noise, seeds=seeds, return_x_0=True)
            return cast("tuple[Tensor, Tensor]", stepped)
        coefficients = steps.plan.table(x_t.device)[row]
        p, q = (per_sample(coefficients[..., i], x_t) for i in (COLUMNS.index("p"), COLUMNS.index("q")))
        m = model_output[:, : x_t.shape[1]].to(opmath(x_t.dtype))
        x_0 = self._threshold_sample(p * x_t + q * m).to(x_t.dtype)
        x_prev = reverse_step(x_t, model_output, row, steps.plan, noise=noise, seeds=seeds, x_0_prev=x_0)
        return cast(Tensor, x_prev), x_0

    def _threshold_sample(self, sample: Tensor) -> Tensor:
        """Apply dynamic thresholding to x_0^ (Saharia et al. 2022, section 2.3): clamp to +-s and divide by s.

        s is a quantile of each sample's |x_0^|, clamped to 1..sample_max_value. Half precision is thresholded
        in float32.
        """
        config, wide = self.config, sample.to(opmath(sample.dtype))
        s = torch.quantile(wide.abs().flatten(1), config.dynamic_thresholding_ratio, dim=1)
        s = per_sample(s.clamp(min=1, max=config.sample_max_value), wide)
        return (wide.clamp(-s, s) / s).to(sample.dtype)

    def _find(self, steps: _Steps, known: list[int], device: torch.device) -> int | Tensor:
        """Return the rows of timesteps that are on the host."""
        rows = [steps.rows.get(t, -1) for t in known]
        if -1 in rows:
            t = known[rows.index(-1)]
            name, total = f"{type(self).__name__}.step", self.schedule.num_timesteps
            if 0 <= t < total:
                raise ValueError(
                    f"{name}: expected prediction_type sample or v_prediction at timestep {t}, where abar is 0 and the noise "
                    "does not tell x_0, got epsilon"
                )
            raise ValueError(f"{name}: expected timestep to be in 0..{total - 1}, got {t}")
        return rows[0] if len(rows) == 1 else torch.tensor(rows, device=device)

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
        if isinstance(t, Tensor):
            check_strided(caller, "timesteps", t)
            t = t.reshape(-1)
            if not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool):
                t = t.to(torch.int64)
        try:
            shape = torch.broadcast_shapes(x_0.shape, noise.shape)
        except RuntimeError:
            got = f"{list(x_0.shape)} and {list(noise.shape)}"
            raise ValueError(f"{caller}: expected noise to broadcast with the samples, got {got}") from None
        if isinstance(t, Tensor) and t.numel() > 1 and shape[:1] == (1,):
            shape = (t.numel(), *shape[1:])
        t = index_tensor(caller, "timesteps", t, self.schedule.num_timesteps, shape[0], x_0.device)
        dtype = torch.promote_types(x_0.dtype, noise.dtype)
        return q_sample(x_0.to(dtype).expand(shape), t, self.schedule, noise=noise.to(dtype).expand(shape))


@dataclass(frozen=True, eq=False)
class _Steps:
    """A scheduler's step at each timestep.

    Attributes:
        plan: Rows of the scheduler's chain in order, then rows of the timesteps between.
        chain: Timesteps of the chain.
        rows: Row of each timestep that has one.
    """

    plan: SamplingPlan
    chain: frozenset[int]
    rows: dict[int, int] = field(init=False)
    _on_device: dict[torch.device, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", {t: row for row, t in enumerate(self.plan.timesteps.tolist())})
        self.prepare("cpu")

    def prepare(self, device: torch.device | str) -> Tensor:
        """Return `rows` as int64 [T], kept per device. A timestep without a row has that of the first step."""
        device = numbered("set_timesteps", device)
        if device not in self._on_device:
            self.plan.table(device)
            rows = [self.rows.get(t, 0) for t in range(self.plan.schedule.num_timesteps)]
            with torch.inference_mode(False):  # kept for all callers
                self._on_device[device] = torch.tensor(rows, device=device)
        return self._on_device[device]

    def find(self, timestep: int | Tensor, device: torch.device) -> Tensor:
        """Return the rows of timesteps, int64 [1 or N] on the device, without synchronization."""
        if not isinstance(timestep, Tensor):
            timestep = torch.full((1,), timestep, device=device)
        return self.prepare(timestep.device).index_select(0, timestep.reshape(-1)).to(device)


def _with_given_x_0(plan: SamplingPlan) -> SamplingPlan:
    """Return the same steps with x_0^ given as `reverse_step`'s x_0_prev instead of computed."""
    coefficients = plan.coefficients.clone()
    k0, k3, clip = (COLUMNS.index(name) for name in ("k0", "k3", "clip"))
    coefficients[:, k3], coefficients[:, k0], coefficients[:, clip] = coefficients[:, k0], 0, torch.inf
    return replace(plan, coefficients=coefficients)


class DDPMScheduler(_PlanScheduler, diffusers.DDPMScheduler):
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
        trained_betas: _Betas = None,
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
        if (num_inference_steps is None) == (timesteps is None):
            got = "neither" if timesteps is None else "both"
            raise ValueError(f"{name}: expected exactly one of num_inference_steps and timesteps, got {got}")
        if timesteps is None:
            chain = self._spaced(num_inference_steps)
        else:
            chain = torch.as_tensor(timesteps)
            descending = chain.dim() == 1 and chain.numel() > 0 and bool((chain.diff() < 0).all())
            if not descending or chain.is_floating_point() or chain[0] >= total or chain[-1] < 0:
                raise ValueError(
                    f"{name}: expected timesteps to be strictly descending integers in 0..{total - 1}, got {timesteps}"
                )
            num_inference_steps = self.num_inference_steps
        self.custom_timesteps = timesteps is not None
        self._set_chain(chain.to("cpu", torch.int64), num_inference_steps, device)

    def sampling_plan(self) -> SamplingPlan:
        """Return the chain as a plan for `ddpm_fast.sample` and `reverse_step`.

        Row i is what `step` does at `self.timesteps[i]`.

        Raises:
            ValueError: Thresholding is on. It depends on a whole image, so no row of coefficients has it.
        """
        _refuse_thresholding(self)
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
                raise ValueError(
                    f"{type(self).__name__}.step: expected timestep to be one of the {len(steps.chain)} of set_timesteps, "
                    f"got {missing[0]}"
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
            clip=_clip(config),
        )

    def _between(self, timesteps: Tensor) -> Tensor:
        """Return the next timestep of the chain below each timestep."""
        ascending = torch.cat([torch.tensor([-1]), self._chain.flip(0)])
        return ascending[torch.searchsorted(ascending, timesteps) - 1]


class DDIMScheduler(_PlanScheduler, diffusers.DDIMScheduler):
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
        trained_betas: _Betas = None,
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
        _refuse_thresholding(self)
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
                raise ValueError("DDIMScheduler.step: expected at most one of generator and variance_noise, got both")
            noise = self._noise(generator, model_output, sample) if variance_noise is None else variance_noise
        x_prev, x_0 = self._advance(steps, known, timestep, model_output, sample, noise)
        return DDIMSchedulerOutput(prev_sample=x_prev, pred_original_sample=x_0) if return_dict else (x_prev, x_0)

    def _check_set(self, method: str) -> None:
        if self.num_inference_steps is None:
            raise ValueError(f"{type(self).__name__}.{method}: expected set_timesteps to have been called, got no timesteps")

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
            clip=_clip(self.config),
            use_clipped_model_output=use_clipped_model_output,
            final_alpha_bar=1.0 if self.config.set_alpha_to_one else float(self.schedule.alpha_bars[0]),
        )

    def _between(self, timesteps: Tensor) -> Tensor:
        """Return timesteps lower by T / S, as in diffusers."""
        apart: int = self.config.num_train_timesteps // self.num_inference_steps
        return (timesteps - apart).clamp(min=-1)


def _clip(config: Any) -> float | None:
    """Return the bound on x_0^ for a plan, or None.

    Plans for `_with_given_x_0` always have a bound, so that x_0^ keeps its own weight.
    """
    if config.thresholding:
        return 1.0
    return config.clip_sample_range if config.clip_sample else None


def _refuse_thresholding(scheduler: Any) -> None:
    if scheduler.config.thresholding:
        raise ValueError(f"{type(scheduler).__name__}.sampling_plan: expected thresholding to be false, got true")
