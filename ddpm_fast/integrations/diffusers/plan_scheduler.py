"""The mixin that makes a scheduler of diffusers follow a `SamplingPlan`."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...checks import check_choice, check_device, check_float, check_number, check_range, check_strided, checked_device
from ...errors import InvalidValue, expect, renaming
from ...ops import q_sample, reverse_step
from ...ops.arguments import index_tensor
from ...plan import COLUMNS, INTEGERS, SamplingPlan, checked_timesteps, spaced_timesteps
from ...predictions import DIFFUSERS_PREDICTIONS
from ...reference import per_sample
from ...schedule import NoiseSchedule

Betas = np.ndarray[Any, Any] | Sequence[float] | None

_KEYS = {  # an argument of a plan's builder -> the key of the configuration that it comes from
    "schedule": "num_train_timesteps",
    "prediction": "prediction_type",
    "clip": "clip_sample_range",
    "order": "solver_order",
    "solver": "solver_type",
    "final": "final_sigmas_type",
}


@dataclass(frozen=True)
class Steps:
    """The steps of a chain, and those from other timesteps.

    Attributes:
        chain: The chain's plan, for `sampling_plan`.
        plan: The plan that has the rows.
        rows: Row of each timestep in `plan`, T ints. -1: none.
        index: `rows` as int64 [T] with 0 instead of -1, on each device that had timesteps.
        orders: A solver's plans of order 1 and up, with a row for each step of the chain.
    """

    chain: SamplingPlan
    plan: SamplingPlan
    rows: list[int]
    index: dict[torch.device, Tensor]
    orders: tuple[SamplingPlan, ...] = ()

    def row(self, t: Tensor, known: list[int], device: torch.device) -> int | Tensor:
        """Return the row of a timestep that is known on the host, or else rows on the device, without synchronization."""
        if len(known) == 1:
            return self.rows[known[0]]
        if t.device not in self.index:
            self.index[t.device] = torch.tensor(self.rows, device=t.device).clamp(min=0)
        return self.index[t.device].index_select(0, t).to(device)


class PlanScheduler:
    """Mixin before a scheduler's class of diffusers. It has all that the schedulers share.

    A subclass has diffusers' constructor and `step`, and `_plan`, a function from its configuration to a plan.

    Attributes:
        schedule: The configuration's noise schedule in float64. betas, alphas and alphas_cumprod are
            its float32 values.
        seeds: Seeds of the samples, int64 [N], or None. See `ddpm_fast.sample_seeds`. With seeds, the noise of step i is
            `ddpm_fast.noise(sample.shape, seeds, stream=i)`. It is bit-identical in any batch and on any device, and
            equals the noise of `ddpm_fast.sample`. `step` then does not use its generator. Seeds are not part of the
            configuration.
    """

    config: Any
    # (timesteps, previous, *options) -> plan of steps from `timesteps` to `previous`. None: each to the next.
    _plan: Callable[..., SamplingPlan]
    _options: tuple[Any, ...] = ()  # the arguments of `_steps` for a step with default arguments
    _to_next = False  # each step of a chain goes to the next timestep, however far, instead of T // S lower
    seeds: Tensor | None = None

    def _set_up(self, build: Callable[[Any], NoiseSchedule] = NoiseSchedule.from_diffusers) -> None:
        """Check the configuration and set diffusers' attributes."""
        config, name = self.config, type(self).__name__
        check_choice(name, "prediction_type", config.prediction_type, DIFFUSERS_PREDICTIONS)
        check_choice(name, "timestep_spacing", config.timestep_spacing, ("linspace", "leading", "trailing"))
        if self._thresholds:
            check_number(name, "dynamic_thresholding_ratio", config.dynamic_thresholding_ratio, 0, 1)
            check_number(name, "sample_max_value", config.sample_max_value, above=0)
        with renaming(name, _KEYS):
            self.schedule = build(config)
            self._plan([0], [-1], *self._options)  # its builder checks the other values
        self.betas, self.alphas = self.schedule.betas.float(), self.schedule.alphas.float()
        self.alphas_cumprod = self.schedule.alpha_bars.float()
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
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
        return 1.0 if self._thresholds else self.config.clip_sample_range if self.config.clip_sample else None

    def register_to_config(self, **kwargs: Any) -> None:
        """Record arguments in the configuration and reset what was derived from it."""
        super().register_to_config(**kwargs)  # type: ignore[misc]  # from diffusers' ConfigMixin
        self._kept: dict[tuple[Any, ...], Steps] = {}

    @property
    def alphas_cumprod(self) -> Tensor:
        """abar, float32 [T], read-only.

        Training scripts may move it to another device or dtype. Steps do not use it, so other values are an error.
        """
        return self._alphas_cumprod

    @alphas_cumprod.setter
    def alphas_cumprod(self, alphas_cumprod: Tensor) -> None:
        expect(
            isinstance(alphas_cumprod, Tensor) and self.is_rounded(alphas_cumprod, self.schedule.alpha_bars),
            type(self).__name__,
            "alphas_cumprod",
            "to be that of the configuration, on any device and in any dtype",
            "other values: pass trained_betas instead",
        )
        self._alphas_cumprod = alphas_cumprod

    def is_rounded(self, table: Tensor, exact: Tensor) -> bool:
        """Return whether a table holds `exact`, which is abar, up to the rounding of betas in float32 and of its dtype."""
        given, exact = table.detach().to("cpu", torch.float64), exact.double()
        eps = torch.finfo(table.dtype).eps if table.is_floating_point() else 0
        # Each step rounds beta, alpha and their product in float32, which moves abar by beta / alpha, 1 and 1 times its eps.
        relative = 2**-23 * (1 + 1 / self.schedule.alphas.clamp(min=2**-23)).cumsum(0) + eps
        # 2^-24 is the smallest positive number of float16, and diffusers replaces 0 by it.
        return given.shape == exact.shape and bool(((given - exact).abs() <= exact * relative + 2**-24).all())

    # --------------------------------------------------------------------------------------------------------- timesteps

    @property
    def timesteps(self) -> Tensor:
        """Timesteps for the model and `step`, int64 [S], in this order."""
        return self._timesteps

    @timesteps.setter
    def timesteps(self, timesteps: Tensor) -> None:
        self._timesteps, self._chain, self._kept = timesteps, timesteps.cpu(), {}

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
        with renaming(name, {"num_steps": "num_inference_steps", "spacing": "timesteps", "lambda_min": "lambda_min_clipped"}):
            chain = self._spaced(name, count) if timesteps is None else checked_timesteps(name, total, None, timesteps, True)
        check_range(name, "timesteps with steps_offset", chain, total)
        device = checked_device(name, "cpu" if device is None else device)
        options = next(iter(self._kept), self._options)  # those of the last step
        self._timesteps, self._chain, self._kept = chain.to(device), chain, {}
        self.num_inference_steps = len(chain)
        self._steps(*options).plan.table(device)

    def _spaced(self, name: str, num_steps: Any) -> Tensor:
        """Return timesteps in the configuration's spacing, int64 [num_steps]."""
        timesteps = spaced_timesteps(name, self.config.num_train_timesteps, num_steps, self.config.timestep_spacing)
        return timesteps + self.config.steps_offset if self.config.timestep_spacing == "leading" else timesteps

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
        return self._steps(*options).chain

    def _steps(self, *options: Any) -> Steps:
        """Return the plan of the timesteps that are set, for these options of `step`, such as eta."""
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
            with renaming(name, _KEYS):
                self._kept = {options: self._build(*options)}  # one at a time, as a caller may pass another eta at every step
        return self._kept[options]

    def _build(self, *options: Any) -> Steps:
        """Return the steps of the chain's plan, and further ones from the timesteps between."""
        # diffusers' steps go T // S lower, which may be between the chain's timesteps. Before set_timesteps there is no S, so
        # assigned timesteps go each to the next.
        stride = self.schedule.num_timesteps // (self.num_inference_steps or len(self._chain))
        previous = None if self._to_next or self.num_inference_steps is None else (self._chain - stride).clamp(min=-1).tolist()
        chain = plan = self._plan(self._chain.tolist(), previous, *options)
        between = sorted({*self._has_step().nonzero()[:, 0].tolist()} - {*chain.timesteps.tolist()})
        if between:
            ascending = [-1, *sorted(self._chain.tolist())]
            below = [ascending[bisect_left(ascending, t) - 1] if self._to_next else max(t - stride, -1) for t in between]
            others = self._plan(between, below, *options)
            plan = replace(
                chain,
                timesteps=torch.cat([chain.timesteps, others.timesteps]),
                coefficients=torch.cat([chain.coefficients, others.coefficients]),
                alpha_bars_prev=torch.cat([chain.alpha_bars_prev, others.alpha_bars_prev]),
                alpha_bars=torch.cat([chain.alpha_bars, others.alpha_bars]),
            )
        rows = torch.full((self.schedule.num_timesteps,), -1)
        rows[plan.timesteps] = torch.arange(plan.num_steps)
        index = {device: rows.clamp(min=0).to(device) for device in (rows.device, self._timesteps.device)}
        return Steps(chain, _with_given_x_0(plan) if self._thresholds else plan, rows.tolist(), index)

    def _has_step(self) -> Tensor:
        """Return which timesteps have a step, bool [T]. With abar = 0, x_t is noise alone, so predicted noise gives no x_0."""
        return cast(Tensor, (self.schedule.alpha_bars > 0) | (self.config.prediction_type != "epsilon"))

    # -------------------------------------------------------------------------------------------------------------- step

    def _checked(self, caller: str, name: str, timesteps: Any, device: torch.device | None = None) -> Tensor:
        """Return timesteps as int64 in one dimension, after a check. A tensor stays where it is, unless a device is given."""
        t = int(timesteps) if isinstance(timesteps, np.integer) else timesteps
        if not isinstance(t, Tensor):
            return index_tensor(caller, name, t, self.schedule.num_timesteps, 1, device or torch.device("cpu"))
        check_strided(caller, name, t)
        t = t.reshape(-1).to(torch.int64 if t.dtype in INTEGERS else t.dtype)
        return index_tensor(caller, name, t, self.schedule.num_timesteps, len(t), device or t.device)

    def _read(
        self, timestep: Any, model_output: Tensor, sample: Tensor, *options: Any, most: int | None = None
    ) -> tuple[Steps, Any, list[int]]:
        """Return the steps, and the timesteps of this one: as int64 or an int, and as ints if they are on the host, else none.

        Reading a device would synchronize. The arguments that `reverse_step` does not check are checked here.

        Args:
            timestep: As in `step`.
            model_output: As in `step`.
            sample: As in `step`.
            *options: As in `_steps`.
            most: The number of timesteps that may be given instead of 1. None: the number of samples.
        """
        name, last = f"{type(self).__name__}.step", self.schedule.num_timesteps - 1
        check_float(name, "model_output", model_output)
        check_float(name, "sample", sample)
        check_device(name, "model_output", model_output, "sample", sample)
        t, most, traced = timestep, most or sample.shape[0], torch.compiler.is_compiling()
        if type(t) is int and not traced:  # no tensor is made, which would take as long as the rest
            known = [t]
        else:
            is_index = isinstance(t, Tensor) and t.dtype == torch.int64 and t.layout is torch.strided
            t = t.reshape(-1) if is_index else self._checked(name, "timestep", t)
            expect(len(t) in (1, most), name, "timestep", f"to have 1 element{f' or {most}' * (most != 1)}", len(t))
            known = [] if traced or t.device.type != "cpu" else t.tolist()
        outside = [each for each in known if not 0 <= each <= last]
        expect(not outside, name, "timestep", f"to be in 0..{last}", ", ".join(map(str, outside)))
        return self._steps(*options), t, known

    def _noise(
        self, model_output: Tensor, sample: Tensor, generator: Any, given: Tensor | None = None, dtype: Any = None
    ) -> Tensor | None:
        """Return the noise that is given or that diffusers draws for a step, or None with seeds."""
        name, draws = f"{type(self).__name__}.step", given is None and self.seeds is None
        expect(given is None or generator is None, name, "", "at most one of generator and variance_noise", "both")
        return randn_tensor(sample.shape, generator, model_output.device, dtype or model_output.dtype) if draws else given

    def _advance(
        self, steps: Steps, t: Tensor, known: list[int], model_output: Tensor, sample: Tensor, noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return x_{t-1} and x_0^ of a step from any timestep."""
        expect(
            all(steps.rows[each] >= 0 for each in known),
            f"{type(self).__name__}.step",
            "prediction_type",
            # abar descends, so the largest timestep is one without a step.
            f"sample or v_prediction at timestep {max(known, default=-1)}, where abar is 0 and the noise does not tell x_0",
            "epsilon",
        )
        row = steps.row(t, known, sample.device)
        x_0 = self._thresholded(steps.plan, row, model_output, sample) if self._thresholds else None
        x_prev, computed = self._reverse_step(steps.plan, row, model_output, sample, noise, x_0)
        return x_prev, computed if x_0 is None else x_0

    def _reverse_step(
        self,
        plan: SamplingPlan,
        row: int | Tensor,
        model_output: Tensor,
        sample: Tensor,
        noise: Tensor | None,
        *before: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return x_{t-1} and x_0^ of one `reverse_step`, in the wider dtype of model_output and sample.

        `before` holds the x_0^ of earlier steps, the latest first.
        """
        x_t = sample.to(torch.promote_types(sample.dtype, model_output.dtype))
        m = model_output if x_t.dtype == torch.float32 else model_output.to(x_t.dtype)  # float32 takes half precision as it is
        seeds = None
        if noise is None and plan.is_random:
            seeds = self.seeds = self.seeds.to(x_t.device) if isinstance(self.seeds, Tensor) else self.seeds
        names = ("noise", "x_0_prev", "x_0_prev2")[: 1 + len(before)]
        given: Any = {name: x.to(x_t) for name, x in zip(names, (noise, *before), strict=True) if x is not None}
        return cast("tuple[Tensor, Tensor]", reverse_step(x_t, m, row, plan, seeds=seeds, return_x_0=True, **given))

    def _thresholded(self, plan: SamplingPlan, row: int | Tensor, model_output: Tensor, sample: Tensor) -> Tensor:
        """Return x_0^ after dynamic thresholding: clamped to +-s and divided by s (Saharia et al. 2022, section 2.3).

        s is a quantile of each sample's |x_0^|, clamped to 1..sample_max_value. Half precision is thresholded in float32.
        """
        dtype = torch.promote_types(sample.dtype, model_output.dtype)
        coefficients = plan.table(sample.device)[row]
        p, q = (per_sample(coefficients[..., COLUMNS.index(name)], sample) for name in ("p", "q"))
        x_t, m = (x.to(torch.promote_types(dtype, torch.float32)) for x in (sample, model_output[:, : sample.shape[1]]))
        x_0 = p * x_t + q * m
        quantile = torch.quantile(x_0.abs().flatten(1), self.config.dynamic_thresholding_ratio, dim=1)
        s = per_sample(quantile, x_0).clamp(min=1, max=self.config.sample_max_value)
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
        t = self._checked(caller, "timesteps", timesteps, samples.device)
        try:
            shape = torch.broadcast_shapes(samples.shape, noise.shape, (len(t), *[1] * (samples.dim() - 1)))
        except RuntimeError:
            got = f"{list(noise.shape)}, {list(samples.shape)} and {len(t)} timesteps"
            raise InvalidValue(caller, "noise", f"to broadcast with {name} and timesteps", got) from None
        dtype = torch.promote_types(samples.dtype, noise.dtype)
        return samples.to(dtype).expand(shape), noise.to(dtype).expand(shape), t.expand(shape[0])


def _with_given_x_0(plan: SamplingPlan) -> SamplingPlan:
    """Return the same steps with x_0^ given as `reverse_step`'s x_0_prev instead of computed."""
    columns = dict(zip(COLUMNS, plan.coefficients.unbind(1), strict=True))
    columns |= {"k0": torch.zeros_like(columns["k0"]), "k3": columns["k0"], "clip": torch.full_like(columns["clip"], torch.inf)}
    return replace(plan, coefficients=torch.stack([*columns.values()], dim=1))
