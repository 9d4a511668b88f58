"""The mixin that makes a scheduler of diffusers follow a `SamplingPlan`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...checks import check_choice, check_device, check_float, check_number, check_strided, checked_device
from ...dtypes import opmath
from ...errors import InvalidType, InvalidValue, expect, renaming
from ...ops.arguments import index_tensor
from ...ops.q_sample import q_sample
from ...ops.reverse_step import reverse_step
from ...plan import COLUMNS, SamplingPlan, spaced_timesteps
from ...plan.timesteps import checked_timesteps
from ...predictions import DIFFUSERS_PREDICTIONS
from ...reference import per_sample
from ...schedule import NoiseSchedule, numbered

Betas = np.ndarray[Any, Any] | Sequence[float] | None

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Tables:
    """The plans of a chain, and a row for each timestep.

    Attributes:
        plans: The chain's plan for `sampling_plan`, then those that the scheduler steps with.
        rows: Row of each timestep in the last plan, T ints. -1: none.
    """

    def __init__(self, plans: tuple[SamplingPlan, ...], rows: Tensor) -> None:
        self.plans = plans
        self.rows: list[int] = rows.tolist()
        self._on_device: dict[torch.device, Tensor] = {}
        self.prepare("cpu")

    def prepare(self, device: torch.device | str) -> Tensor:
        """Return `rows` as int64 [T], with 0 instead of -1. They and the plans' tables are kept per device."""
        device = numbered("set_timesteps", device)
        if device not in self._on_device:
            for plan in self.plans:
                plan.table(device)
            with torch.inference_mode(False):  # kept for all callers
                self._on_device[device] = torch.tensor(self.rows, device=device).clamp(min=0)
        return self._on_device[device]

    def find(self, known: list[int] | None, timestep: int | Tensor, device: torch.device) -> int | Tensor:
        """Return the row of timesteps that are known on the host, or else rows on the device, without synchronization."""
        if known is not None:
            rows = [self.rows[t] for t in known]
            return rows[0] if len(rows) == 1 else torch.tensor(rows, device=device)
        t = timestep if isinstance(timestep, Tensor) else torch.full((1,), timestep, device=device)
        return self.prepare(t.device).index_select(0, t.reshape(-1)).to(device)


class PlanScheduler:
    """Mixin before a scheduler's class of diffusers. It has all that the schedulers share.

    A subclass has diffusers' constructor and `step`, and a function from its configuration to a plan: `_plan`, or
    `_build` if it steps with several plans.

    Attributes:
        schedule: The configuration's noise schedule in float64. betas, alphas and alphas_cumprod are
            its float32 values.
        seeds: Seeds of the samples, int64 [N], or None. See `ddpm_fast.sample_seeds`. With seeds, the noise of step i is
            `ddpm_fast.noise(sample.shape, seeds, stream=i)`. It is bit-identical in any batch and on any device, and
            equals the noise of `ddpm_fast.sample`. `step` then does not use its generator. Seeds are not part of the
            configuration.
    """

    config: Any
    num_inference_steps: int | None
    # (timesteps, previous, *options) -> plan of steps from `timesteps` to `previous`. None: each to the next.
    _plan: Callable[..., SamplingPlan]
    _options: tuple[Any, ...] = ()  # the arguments of `_tables` for a step with default arguments
    seeds: Tensor | None = None

    def _set_up(self, build: Callable[[Any], NoiseSchedule] = NoiseSchedule.from_diffusers) -> None:
        """Check the configuration and set diffusers' attributes."""
        config, name = self.config, type(self).__name__
        check_choice(name, "prediction_type", config.prediction_type, DIFFUSERS_PREDICTIONS)
        check_choice(name, "timestep_spacing", config.timestep_spacing, ("linspace", "leading", "trailing"))
        if self._clip is not None:
            check_number(name, "clip_sample_range", self._clip, above=0)
        if self._thresholds:
            check_number(name, "dynamic_thresholding_ratio", config.dynamic_thresholding_ratio, 0, 1)
            check_number(name, "sample_max_value", config.sample_max_value, above=0)
        with renaming(name):
            self.schedule = build(config)
        self.betas, self.alphas = self.schedule.betas.float(), self.schedule.alphas.float()
        self.alphas_cumprod = self.schedule.alpha_bars.float()
        self.init_noise_sigma = 1.0
        self.num_inference_steps = None
        self._timesteps = torch.arange(config.num_train_timesteps - 1, -1, -1)
        self._chain: Any = None  # `timesteps` on the CPU

    # The configuration may have keys of other schedulers, which a subclass does not read.
    @property
    def _thresholds(self) -> bool:
        """True if x_0^ is thresholded."""
        return bool(self.config.thresholding)

    @property
    def _clip(self) -> float | None:
        """Bound on x_0^ in a plan, or None.

        With thresholding there is always a bound, so that x_0^ keeps its own weight. See `_with_given_x_0`.
        """
        if self._thresholds:
            return 1.0
        return self.config.clip_sample_range if self.config.clip_sample else None

    def register_to_config(self, **kwargs: Any) -> None:
        """Record arguments in the configuration and reset what was derived from it."""
        super().register_to_config(**kwargs)  # type: ignore[misc]  # from diffusers' ConfigMixin
        self._kept: dict[tuple[Any, ...], Tables] = {}

    @property
    def alphas_cumprod(self) -> Tensor:
        """abar, float32 [T], read-only.

        Training scripts may move it to another device or dtype. Steps do not use it, so other values are an error.
        """
        return self._alphas_cumprod

    @alphas_cumprod.setter
    def alphas_cumprod(self, alphas_cumprod: Tensor) -> None:
        expect(
            isinstance(alphas_cumprod, Tensor) and self._is_rounded(alphas_cumprod, self.schedule.alpha_bars),
            type(self).__name__,
            "alphas_cumprod",
            "to be that of the configuration, on any device and in any dtype",
            "other values: pass trained_betas instead",
        )
        self._alphas_cumprod = alphas_cumprod

    def _is_rounded(self, table: Tensor, exact: Tensor) -> bool:
        """Return whether a table holds `exact`, which is abar, up to the rounding of betas in float32 and of its dtype."""
        given, exact = table.detach().to("cpu", torch.float64), exact.double()
        # Each step rounds beta, alpha and their product in float32, which moves abar by beta / alpha, 1 and 1 times its eps.
        relative = 2**-23 * (1 + 1 / self.schedule.alphas.clamp(min=2**-23)).cumsum(0)
        relative += torch.finfo(table.dtype).eps if table.is_floating_point() else 0
        # 2^-24 is the smallest positive number of float16, and what diffusers puts in the place of 0.
        return given.shape == exact.shape and bool(((given - exact).abs() <= exact * relative + 2**-24).all())

    # --------------------------------------------------------------------------------------------------------- timesteps

    @property
    def timesteps(self) -> Tensor:
        """Timesteps for the model and `step`, int64 [S], in this order."""
        return self._timesteps

    @timesteps.setter
    def timesteps(self, timesteps: Tensor) -> None:
        self._timesteps, self._chain = timesteps, timesteps.cpu()
        self._kept = {}

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Set the timesteps of the chain.

        Args:
            num_inference_steps: Number of timesteps, in the configuration's spacing.
            device: Device of `self.timesteps`. On a GPU `step` does not wait for it.

        Raises:
            ValueError: A value is out of range or not supported, or the prediction is epsilon at a timestep with
                abar = 0.
            TypeError: An argument has an unsupported type.
        """
        self._set_chain(num_inference_steps, device, None)

    def _set_chain(self, num_inference_steps: Any, device: torch.device | str | None, timesteps: Any) -> None:
        """Make a number of timesteps, or a list of them, the chain. Move its tables to the device."""
        name, total = f"{type(self).__name__}.set_timesteps", self.config.num_train_timesteps
        count = int(num_inference_steps) if isinstance(num_inference_steps, np.integer) else num_inference_steps
        with renaming(name, {"num_steps": "num_inference_steps", "spacing": "timesteps"}):
            chain = self._spaced(name, count) if timesteps is None else checked_timesteps(name, total, None, timesteps, True)
        device = checked_device(name, "cpu" if device is None else device)
        options = next(iter(self._kept), self._options)  # those of the last step
        self._timesteps, self._chain, self._kept = chain.to(device), chain, {}
        if timesteps is None:
            self.num_inference_steps = count
        self._tables(*options).prepare(device)

    def _spaced(self, name: str, num_steps: Any) -> Tensor:
        """Return timesteps in the configuration's spacing, int64 [num_steps]."""
        spacing = self.config.timestep_spacing
        timesteps = spaced_timesteps(name, self.config.num_train_timesteps, num_steps, spacing)
        return self._with_offset(name, timesteps) if spacing == "leading" else timesteps

    def _with_offset(self, name: str, timesteps: Tensor) -> Tensor:
        """Return descending timesteps with the configuration's offset. Raise if it moves one out of 0..T-1."""
        offset, total = self.config.steps_offset, self.config.num_train_timesteps
        first, last = int(timesteps[0]) + offset, int(timesteps[-1]) + offset
        expect(
            first < total and last >= 0,
            name,
            "steps_offset",
            f"to keep the timesteps in 0..{total - 1}",
            f"{offset}, which makes {len(timesteps)} steps go from {first} to {last}",
        )
        return cast(Tensor, timesteps + offset)

    # ------------------------------------------------------------------------------------------------------------- plans

    def sampling_plan(self) -> SamplingPlan:
        """Return the chain as a plan for `ddpm_fast.sample`, `ddpm_fast.Sampler` and `reverse_step`.

        Row i is what `step` does at `self.timesteps[i]`, in a chain from the first timestep on.

        Raises:
            ValueError: set_timesteps was not called, or thresholding is on. Thresholding depends on a whole
                image, so no row of coefficients has it.
        """
        return self._sampling_plan()

    def _sampling_plan(self, *options: Any) -> SamplingPlan:
        expect(not self._thresholds, f"{type(self).__name__}.sampling_plan", "thresholding", "to be false", "true")
        return self._tables(*options).plans[0]

    def _tables(self, *options: Any) -> Tables:
        """Return the tables of the chain for these options of a step, such as eta."""
        if options not in self._kept:
            name, total, given = type(self).__name__, self.schedule.num_timesteps, self.config.num_train_timesteps
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    f"{name}.step: expected a first step outside torch.compile, which makes the plan, got none "
                    f"since set_timesteps with {options}"
                )
            expect(self._chain is not None, name, "set_timesteps", "to have been called", "no timesteps")
            self.alphas_cumprod = self._alphas_cumprod  # the setter checks it, as a change in place would go unnoticed
            expect(total == given, name, "num_train_timesteps", f"to be {total}, the number of trained_betas", given)
            self._kept = {options: self._build(*options)}  # one at a time, as a caller may pass another eta at every step
        return self._kept[options]

    def _build(self, *options: Any) -> Tables:
        """Return the chain's plan, and that plan with further rows for the timesteps between."""
        # diffusers has no steps before set_timesteps: assigned timesteps then go each to the next.
        previous = None if self.num_inference_steps is None else self._previous(self._chain).tolist()
        chain = steps = self._plan(self._chain.tolist(), previous, *options)
        between = self._has_step()
        between[self._chain] = False
        if between.any():
            timesteps = between.nonzero()[:, 0]
            others = self._plan(timesteps.tolist(), self._previous(timesteps).tolist(), *options)
            steps = replace(
                chain,
                timesteps=torch.cat([chain.timesteps, others.timesteps]),
                coefficients=torch.cat([chain.coefficients, others.coefficients]),
                alpha_bars_prev=torch.cat([chain.alpha_bars_prev, others.alpha_bars_prev]),
                alpha_bars=torch.cat([chain.alpha_bars, others.alpha_bars]),
            )
        rows = torch.full((self.schedule.num_timesteps,), -1)
        rows[steps.timesteps] = torch.arange(steps.num_steps)
        return Tables((chain, _with_given_x_0(steps) if self._thresholds else steps), rows)

    def _previous(self, timesteps: Tensor) -> Tensor:
        """Return where steps go: lower by T // S, as in diffusers, which may be between the chain's timesteps."""
        return (timesteps - self.schedule.num_timesteps // (self.num_inference_steps or len(self._chain))).clamp(min=-1)

    def _has_step(self) -> Tensor:
        """Return which timesteps have a step, bool [T]. With abar = 0, predicted noise does not determine x_0."""
        return cast(Tensor, (self.schedule.alpha_bars > 0) | (self.config.prediction_type != "epsilon"))

    # -------------------------------------------------------------------------------------------------------------- step

    def _known(self, timestep: Any, model_output: Tensor, sample: Tensor) -> list[int] | None:
        """Return a step's timesteps if they are on the host, else None. Reading a device would synchronize.

        The arguments that `reverse_step` does not check are checked here.
        """
        name, total = f"{type(self).__name__}.step", self.schedule.num_timesteps
        check_float(name, "model_output", model_output)
        check_float(name, "sample", sample)
        check_device(name, "model_output", model_output, "sample", sample)
        is_tensor, is_bool = isinstance(timestep, Tensor), isinstance(timestep, bool)
        if is_bool or not (timestep.dtype in _INTEGERS if is_tensor else isinstance(timestep, int | np.integer)):
            raise InvalidType(
                name, "timestep", "to be an int or an integer tensor", timestep.dtype if is_tensor else repr(timestep)
            )
        if is_tensor and timestep.numel() not in (1, sample.shape[0]):
            raise InvalidValue(name, "timestep", f"to have 1 or {sample.shape[0]} elements", f"shape {list(timestep.shape)}")
        if torch.compiler.is_compiling() or (is_tensor and timestep.device.type != "cpu"):
            return None
        known: list[int] = timestep.reshape(-1).tolist() if is_tensor else [int(timestep)]
        outside = [t for t in known if not 0 <= t < total]
        expect(not outside, name, "timestep", f"to be in 0..{total - 1}", ", ".join(map(str, outside)))
        return known

    def _noise(
        self, model_output: Tensor, sample: Tensor, generator: Any, given: Tensor | None = None, dtype: Any = None
    ) -> Tensor | None:
        """Return the noise that is given or that diffusers draws for a step, or None with seeds."""
        expect(
            given is None or generator is None,
            f"{type(self).__name__}.step",
            "",
            "at most one of generator and variance_noise",
            "both",
        )
        if given is not None or self.seeds is not None:
            return given
        return cast(Tensor, randn_tensor(sample.shape, generator, model_output.device, dtype or model_output.dtype))

    def _advance(
        self,
        tables: Tables,
        known: list[int] | None,
        timestep: Any,
        model_output: Tensor,
        sample: Tensor,
        noise: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return x_{t-1} and x_0^ of a step from any timestep."""
        missing = ", ".join(str(t) for t in known or () if tables.rows[t] < 0)
        expect(
            not missing,
            f"{type(self).__name__}.step",
            "prediction_type",
            f"sample or v_prediction at timestep {missing}, where abar is 0 and the noise does not tell x_0",
            "epsilon",
        )
        plan, row = tables.plans[-1], tables.find(known, timestep, sample.device)
        x_0 = self._thresholded(plan, row, model_output, sample) if self._thresholds else None
        x_prev, computed = self._reverse_step(plan, row, model_output, sample, noise, x_0)
        return x_prev, computed if x_0 is None else x_0

    def _reverse_step(
        self,
        plan: SamplingPlan,
        row: int | Tensor,
        model_output: Tensor,
        sample: Tensor,
        noise: Tensor | None,
        x_0_prev: Tensor | None = None,
        x_0_prev2: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return x_{t-1} and x_0^ of one `reverse_step`, in the wider dtype of model_output and sample."""
        x_t = sample.to(torch.promote_types(sample.dtype, model_output.dtype))
        m = model_output if x_t.dtype == torch.float32 else model_output.to(x_t.dtype)  # float32 takes half precision as it is
        seeds = None
        if noise is None and self.seeds is not None and plan.is_random:
            seeds = self.seeds = self.seeds.to(x_t.device) if isinstance(self.seeds, Tensor) else self.seeds
        maps = {"noise": noise, "x_0_prev": x_0_prev, "x_0_prev2": x_0_prev2}
        given: Any = {name: x.to(x_t) for name, x in maps.items() if x is not None}
        return cast("tuple[Tensor, Tensor]", reverse_step(x_t, m, row, plan, seeds=seeds, return_x_0=True, **given))

    def _thresholded(self, plan: SamplingPlan, row: int | Tensor, model_output: Tensor, sample: Tensor) -> Tensor:
        """Return x_0^ after dynamic thresholding: clamped to +-s and divided by s (Saharia et al. 2022, section 2.3).

        s is a quantile of each sample's |x_0^|, clamped to 1..sample_max_value. Half precision is thresholded in float32.
        """
        dtype = torch.promote_types(sample.dtype, model_output.dtype)
        coefficients = plan.table(sample.device)[row]
        p, q = (per_sample(coefficients[..., COLUMNS.index(name)], sample) for name in ("p", "q"))
        x_t, m = (x.to(opmath(dtype)) for x in (sample, model_output[:, : sample.shape[1]]))
        x_0 = p * x_t + q * m
        s = torch.quantile(x_0.abs().flatten(1), self.config.dynamic_thresholding_ratio, dim=1)
        s = per_sample(s.clamp(min=1, max=self.config.sample_max_value), x_0)
        return (x_0.clamp(-s, s) / s).to(dtype)

    # ---------------------------------------------------------------------------------------------------- forward process

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """Return x_t for noise and timesteps: one `q_sample`, rounded once, in any floating dtype.

            x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise

        Args:
            original_samples: x_0, [N, ...], floating.
            noise: Broadcastable with x_0.
            timesteps: An int, or an integer tensor with 1 or N elements.
        """
        x_0, noise, t = self._broadcast("add_noise", "original_samples", original_samples, noise, timesteps)
        return q_sample(x_0, t, self.schedule, noise=noise)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """Return the velocity of a sample: one `q_sample` (Salimans and Ho 2022).

            v = sqrt(abar_t) noise - sqrt(1 - abar_t) x_0

        Args:
            sample: x_0, [N, ...], floating.
            noise: Broadcastable with x_0.
            timesteps: An int, or an integer tensor with 1 or N elements.
        """
        x_0, noise, t = self._broadcast("get_velocity", "sample", sample, noise, timesteps)
        return q_sample(noise, t, self.schedule, noise=-x_0)

    def _broadcast(
        self, method: str, name: str, samples: Tensor, noise: Tensor, timesteps: int | Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return samples and noise in one shape and dtype, and timesteps int64 [N], after a check."""
        caller = f"{type(self).__name__}.{method}"
        check_float(caller, name, samples)
        check_float(caller, "noise", noise)
        check_device(caller, "noise", noise, name, samples)
        t, count = timesteps, 1
        if isinstance(t, Tensor):
            check_strided(caller, "timesteps", t)
            t, count = t.reshape(-1).to(torch.int64 if t.dtype in _INTEGERS else t.dtype), t.numel()
        try:
            shape = torch.broadcast_shapes(samples.shape, noise.shape, (count, *[1] * (samples.dim() - 1)))
        except RuntimeError:
            raise InvalidValue(
                caller,
                "noise",
                f"to broadcast with {name} and timesteps",
                f"{list(noise.shape)}, {list(samples.shape)} and {count} timesteps",
            ) from None
        t = index_tensor(caller, "timesteps", t, self.schedule.num_timesteps, shape[0], samples.device)
        dtype = torch.promote_types(samples.dtype, noise.dtype)
        return samples.to(dtype).expand(shape), noise.to(dtype).expand(shape), t


def _with_given_x_0(plan: SamplingPlan) -> SamplingPlan:
    """Return the same steps with x_0^ given as `reverse_step`'s x_0_prev instead of computed."""
    coefficients = plan.coefficients.clone()
    k0, k3, clip = (COLUMNS.index(name) for name in ("k0", "k3", "clip"))
    coefficients[:, k3], coefficients[:, k0], coefficients[:, clip] = coefficients[:, k0], 0, torch.inf
    return replace(plan, coefficients=coefficients)
