"""diffusers' DPMSolverMultistepScheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ...checks import check_choice, check_device, check_float, check_number, check_range, checked_device
from ...errors import InvalidValue
from ...ops.reverse_step import reverse_step
from ...plan import COLUMNS, SamplingPlan, dpm_solver_plan
from ...plan.dpm_solver import FEW_STEPS
from ...schedule import NoiseSchedule, numbered
from .. import needs_extra
from .common import Betas, KernelScheduler, check_steps, checked_offset, checked_timestep, given_timesteps, refuse_thresholding

with needs_extra("diffusers"):
    import diffusers
    from diffusers.configuration_utils import register_to_config
    from diffusers.schedulers.scheduling_utils import SchedulerOutput

_ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++")
_LEARNED = ("learned", "learned_range")
_UNSUPPORTED = (
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "use_flow_sigmas",
    "use_dynamic_shifting",
)
_ZERO_SNR = 2**-24  # diffusers puts it in the place of abar = 0, so that sigma / alpha is finite


@dataclass(frozen=True, eq=False)
class _Solver:
    """Tables of a chain. Row i of each is the step from `timesteps[i]`.

    Attributes:
        first: Steps of order 1.
        second: Steps of the configuration's order, the first of order 1.
        x_0: A table whose p and q give x_0^. The steps take the thresholded x_0^ then. None without thresholding.
        learned: The same steps for outputs with variance channels, which they ignore.
    """

    first: SamplingPlan
    second: SamplingPlan
    x_0: SamplingPlan | None
    learned: dict[SamplingPlan, SamplingPlan] = field(init=False)

    def __post_init__(self) -> None:
        learned = {plan: replace(plan, variance="learned_range") for plan in (self.first, self.second)}
        object.__setattr__(self, "learned", learned)


@dataclass(frozen=True, eq=False)
class _NoiseLevels:
    """The noise levels of `add_noise`.

    Attributes:
        plan: x_t = k1 x_0 + k2 noise. The rows are the chain's levels and its end, then one for each timestep of the schedule.
        rows: Row of each timestep, int64 [T], by device. A timestep of the chain has the chain's level.
    """

    plan: SamplingPlan
    rows: dict[torch.device, Tensor]


class DPMSolverMultistepScheduler(KernelScheduler, diffusers.DPMSolverMultistepScheduler):
    """DPM-Solver++ (Lu et al. 2022) with the arguments of `diffusers.DPMSolverMultistepScheduler`.

    It supports orders 1 and 2, algorithm_type "dpmsolver++" and "sde-dpmsolver++", and Karras's sigmas. See
    `ddpm_fast.dpm_solver_plan`. It also supports all beta schedules of DDPMScheduler.

    Raises:
        ValueError: An argument is out of range or not supported, or a beta is outside (0, 1].
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Betas = None,
        solver_order: int = 2,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        final_sigmas_type: str = "zero",
        lambda_min_clipped: float = -float("inf"),
        variance_type: str | None = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
    ) -> None:
        if algorithm_type == "deis":  # configurations of other solvers, as in diffusers
            self.register_to_config(algorithm_type="dpmsolver++")
        if solver_type in ("logrho", "bh1", "bh2"):
            self.register_to_config(solver_type="midpoint")
        self._check_supported()
        self._set_up(_schedule)
        alpha_bars = self.schedule.alpha_bars
        self.alpha_t, self.sigma_t = (level.sqrt().float() for level in (alpha_bars, 1 - alpha_bars))
        ratios = _ratios(alpha_bars)
        self.lambda_t, self.sigmas = -ratios.log().float(), ratios.float()
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1, dtype=torch.float32)
        self._restart()

    def _check_supported(self) -> None:
        """Raise if a kernel cannot do what the configuration asks for."""
        config, name = self.config, type(self).__name__
        check_choice(name, "solver_order", config.solver_order, (1, 2))
        check_choice(name, "algorithm_type", config.algorithm_type, _ALGORITHMS)
        check_choice(name, "solver_type", config.solver_type, ("midpoint", "heun"))
        check_choice(name, "final_sigmas_type", config.final_sigmas_type, ("zero", "sigma_min"))
        check_number(name, "lambda_min_clipped", config.lambda_min_clipped)
        for key in _UNSUPPORTED:
            if config[key]:
                raise InvalidValue(
                    name, key, "to be false", f"{config[key]}: timestep_spacing and use_karras_sigmas are supported"
                )

    _chain: Tensor

    # The configuration may have clip_sample from another scheduler. This one has no clip.
    @property
    def _clips(self) -> bool:
        return False

    def _forget(self) -> None:
        self._solver: _Solver | None = None
        self._noise_levels: _NoiseLevels | None = None

    def _restart(self) -> None:
        """Forget the steps taken."""
        self.model_outputs: list[Tensor | None] = [None] * self.config.solver_order
        self.lower_order_nums = 0
        self._step_index: int | None = None
        self._begin_index: int | None = None

    # --------------------------------------------------------------------------------------------------------- timesteps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        mu: float | None = None,
        timesteps: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Set the timesteps of the chain, and begin it.

        Args:
            num_inference_steps: Number of timesteps, in the configuration's spacing. Pass this or
                `timesteps`.
            device: Device of `self.timesteps`.
            mu: Must be None. Dynamic shifting is not supported.
            timesteps: Strictly descending timesteps. Not with use_karras_sigmas.

        Raises:
            ValueError: Both or neither are given, or a value is out of range or not supported.
            TypeError: An argument has an unsupported type.
        """
        config, name, total = self.config, f"{type(self).__name__}.set_timesteps", self.schedule.num_timesteps
        if mu is not None:
            raise InvalidValue(name, "mu", "to be None, as dynamic shifting is not supported", mu)
        if total != config.num_train_timesteps:
            raise InvalidValue(
                name, "num_train_timesteps", f"to be {total}, the number of trained_betas", config.num_train_timesteps
            )
        chain = given_timesteps(name, num_inference_steps, timesteps, total)
        if chain is None:
            chain = self._spaced(name, num_inference_steps)
        elif config.use_karras_sigmas:
            raise InvalidValue(name, "timesteps", "to be None with use_karras_sigmas", timesteps)
        if device is not None:
            device = checked_device(name, device)
        if self.num_inference_steps is None or not torch.equal(chain, self._chain):
            self._forget()
        self._chain, self.timesteps, self.num_inference_steps = chain, chain.to(device), len(chain)
        solver = self._tables()
        for plan in solver.learned.values() if self._is_learned else solver.learned:
            plan.table(device or "cpu")
        self.sigmas = _ratios(self._levels(solver.first)).float()
        self._restart()

    def _spaced(self, name: str, num_steps: Any) -> Tensor:
        """Return diffusers' timesteps, int64 [S], in the configuration's spacing."""
        config, total = self.config, self.schedule.num_timesteps
        check_steps(name, num_steps)
        last = int((-_ratios(self.schedule.alpha_bars).log() >= config.lambda_min_clipped).sum())
        if last < 2:
            highest = float(self.lambda_t[min(1, total - 1)])
            raise InvalidValue(
                name, "lambda_min_clipped", f"to be at most {highest:.4g}, lambda at timestep 1", config.lambda_min_clipped
            )
        spacing = "karras" if config.use_karras_sigmas else config.timestep_spacing
        most = last - 1 if spacing == "leading" else total
        if not 1 <= num_steps <= most:
            raise InvalidValue(name, "num_inference_steps", f"to be in 1..{most}", num_steps)
        if spacing == "karras":
            for key in ("sigma_min", "sigma_max"):  # keys of another scheduler, which diffusers reads
                if config.get(key) is not None:
                    raise InvalidValue(name, "", f"no {key} with use_karras_sigmas", config[key])
            return self._karras(int(num_steps))
        if spacing == "linspace":
            descending = np.linspace(0, last - 1, num_steps + 1).round()[:0:-1]
        elif spacing == "leading":
            descending = np.arange(num_steps, 0, -1) * (last // (num_steps + 1))
        else:
            descending = np.arange(last, 0, -total / num_steps).round() - 1
        timesteps = torch.from_numpy(descending.astype(np.int64))
        if spacing == "leading":
            timesteps = checked_offset(name, config.steps_offset, timesteps, total)
        # diffusers lists -1 for some numbers of "trailing", and a timestep twice for as many as there are.
        kept: Tensor = timesteps[timesteps >= 0].unique_consecutive()
        return kept

    def _karras(self, num_steps: int) -> Tensor:
        """Return the timesteps of Karras's levels, int64 [S].

        diffusers rounds them, and truncates those of cosine betas. Either depends on the last bits of its
        float32 table, which is therefore computed as there.
        """
        alpha_bars = torch.cumprod(1 - NoiseSchedule.from_diffusers(self.config).betas.float(), dim=0)
        if self.config.rescale_betas_zero_snr:
            alpha_bars[-1] = _ZERO_SNR
        ratios = (((1 - alpha_bars) / alpha_bars) ** 0.5).numpy()
        theirs: Any = self  # methods of diffusers' class
        levels = theirs._convert_to_karras(in_sigmas=ratios[::-1].copy(), num_inference_steps=num_steps)
        log_ratios = np.log(ratios)
        timesteps = np.array([theirs._sigma_to_t(level, log_ratios) for level in levels])
        if self.config.beta_schedule != "squaredcos_cap_v2":
            timesteps = timesteps.round()
        return torch.from_numpy(timesteps.astype(np.int64))

    # ------------------------------------------------------------------------------------------------------------- plans

    def sampling_plan(self) -> SamplingPlan:
        """Return the chain as a plan for `ddpm_fast.sample`, `ddpm_fast.Sampler` and `reverse_step`.

        Row i is what `step` does at `self.timesteps[i]` in a chain from the first timestep on.

        Raises:
            ValueError: set_timesteps was not called, or thresholding is on. Thresholding depends on a whole
                image, so no row of coefficients has it.
        """
        self._check_set("sampling_plan")
        refuse_thresholding(self)
        solver = self._tables()
        return solver.learned[solver.second] if self._is_learned else solver.second

    @property
    def _is_learned(self) -> bool:
        """True if the model's output may have variance channels, which are not used."""
        return self.config.variance_type in _LEARNED and self.config.prediction_type == "epsilon"

    def _tables(self) -> _Solver:
        if self._solver is None:
            order, prediction = self.config.solver_order, self.config.prediction_type
            if self.config.thresholding:  # the steps take x_0^ in the place of the model's output
                x_0, prediction = self._plan(1, prediction), "sample"
            else:
                x_0 = None
            first = self._plan(1, prediction)
            second = first if order == 1 else self._plan(order, prediction)
            if order == 2 and self.config.euler_at_final and not torch.equal(second.coefficients[-1], first.coefficients[-1]):
                coefficients = torch.cat([second.coefficients[:-1], first.coefficients[-1:]])
                second = replace(second, coefficients=coefficients)
            self._solver = _Solver(first, second, x_0)
        return self._solver

    def _plan(self, order: int, prediction: Any) -> SamplingPlan:
        config = self.config
        plan = dpm_solver_plan(
            self.schedule,
            len(self._chain),
            order=order,
            eta=1.0 if config.algorithm_type == "sde-dpmsolver++" else 0.0,
            solver=config.solver_type,
            spacing="karras" if config.use_karras_sigmas else self._chain.tolist(),
            final=config.final_sigmas_type,
            lower_order_final=bool(config.lower_order_final),
            prediction=prediction,
            clip=None,
        )
        return plan if torch.equal(plan.timesteps, self._chain) else replace(plan, timesteps=self._chain)

    def _levels(self, plan: SamplingPlan) -> Tensor:
        """Return abar at each timestep of the chain and at its end, float64 [S + 1]."""
        first = -1 if self.config.use_karras_sigmas else int(self._chain[0])
        return torch.cat([self.schedule.alpha_bars[first].reshape(1), plan.alpha_bars_prev])

    def _has_order_1(self, index: int) -> bool:
        """Return True if step `index` has order 1 in a chain that remembers an x_0^."""
        config, last = self.config, len(self._chain) - 1
        few = config.lower_order_final and len(self._chain) < FEW_STEPS
        return index == last and (config.euler_at_final or few or config.final_sigmas_type == "zero")

    # -------------------------------------------------------------------------------------------------------------- step

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Return the sample at the next timestep of the chain.

        The scheduler counts its steps and remembers x_0^ of the last one in `model_outputs`, as diffusers
        does. A chain that starts in the middle, such as image to image, has order 1 in its first step.

        Args:
            model_output: Like sample. With a learned variance and predicted noise it may have twice the
                channels, the prediction first.
            timestep: An int or an integer tensor with one element. Only the first step of a chain reads it, and not
                after `set_begin_index`.
            sample: x_t, [N, ...], floating.
            generator: Draws the noise of "sde-dpmsolver++", in float32. With `seeds` it is not used.
            variance_noise: The noise itself, like sample, instead of a generator.
            return_dict: Return a SchedulerOutput, else a tuple.

        Returns:
            prev_sample, in the wider dtype of model_output and sample. Differentiable.

        Raises:
            ValueError: An argument has an unsupported value or shape, set_timesteps was not called, or the
                chain has ended.
            TypeError: An argument has an unsupported type or dtype.
        """
        name = f"{type(self).__name__}.step"
        self._check_set("step")
        check_float(name, "model_output", model_output)
        check_float(name, "sample", sample)
        if self._step_index is None:
            theirs: Any = self  # a method of diffusers' class
            theirs._init_step_index(self._first_timestep(name, timestep))
        index = cast(int, self._step_index)
        if not 0 <= index < len(self._chain):
            raise InvalidValue(
                name,
                "",
                f"one of the {len(self._chain)} steps of set_timesteps",
                f"step {index}: call set_timesteps again to begin another chain",
            )
        solver = self._tables()
        is_second = self.config.solver_order == 2 and self.lower_order_nums > 0 and not self._has_order_1(index)
        plan = solver.second if is_second else solver.first
        x_t = sample.to(torch.promote_types(sample.dtype, model_output.dtype))
        if model_output.dtype != x_t.dtype and x_t.dtype != torch.float32:
            model_output = model_output.to(x_t.dtype)  # float32 takes half precision as it is
        noise = None
        if plan.is_random or self.config.algorithm_type == "sde-dpmsolver++":  # a plan of one step is not random
            noise = self._step_noise(generator, variance_noise, model_output, sample)
            noise = None if noise is None else noise.to(x_t.dtype)
        seeds = self._seeds_for(plan, x_t.device) if noise is None else None
        if solver.x_0 is not None:
            model_output = self._thresholded(solver.x_0.table(x_t.device)[index], x_t, model_output)
        elif self._is_learned and x_t.dim() > 1 and model_output.shape[1:2] != x_t.shape[1:2]:
            plan = solver.learned[plan]
        x_0_prev = self.model_outputs[-1] if is_second else None
        x_prev, x_0 = reverse_step(
            *(x_t, model_output, index, plan),
            noise=noise,
            seeds=seeds,
            x_0_prev=None if x_0_prev is None else x_0_prev.to(x_t.dtype),
            return_x_0=True,
        )
        self.model_outputs = [*self.model_outputs[1:], x_0]
        self.lower_order_nums = min(self.lower_order_nums + 1, self.config.solver_order)
        self._step_index = index + 1
        return SchedulerOutput(prev_sample=x_prev) if return_dict else (cast(Tensor, x_prev),)

    def _first_timestep(self, name: str, timestep: Any) -> Any:
        """Return the timestep of a chain's first step, after a check."""
        t, total = checked_timestep(name, timestep), self.schedule.num_timesteps
        if isinstance(t, Tensor):
            if t.numel() != 1:
                raise InvalidValue(name, "timestep", "to have 1 element", f"shape {list(t.shape)}")
            return t.reshape(())
        if not 0 <= t < total:
            raise InvalidValue(name, "timestep", f"to be in 0..{total - 1}", t)
        return t

    def _step_noise(self, generator: Any, variance_noise: Tensor | None, model_output: Tensor, sample: Tensor) -> Tensor | None:
        """Return the noise of a step, or None with seeds."""
        if variance_noise is None:
            return self._noise(generator, model_output, sample, torch.float32)
        if generator is not None:
            raise InvalidValue(f"{type(self).__name__}.step", "", "at most one of generator and variance_noise", "both")
        return variance_noise.to(model_output.device)

    # ---------------------------------------------------------------------------------------------------- forward process

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """Return samples at the chain's noise levels: one kernel, rounded once, in any floating dtype.

            x_t = alpha_t x_0 + sigma_t noise

        After `set_begin_index`, the level is that of the next step, as in diffusers. A timestep outside the chain
        has the level of the schedule.

        Args:
            original_samples: x_0, [N, ...], floating.
            noise: Broadcastable with x_0.
            timesteps: An int, or an integer tensor with 1 or N elements.
        """
        caller = f"{type(self).__name__}.add_noise"
        check_float(caller, "original_samples", original_samples)
        check_float(caller, "noise", noise)
        if self.num_inference_steps is None:
            return self._q_sample(caller, original_samples, noise, timesteps)
        check_device(caller, "noise", noise, "original_samples", original_samples)
        x_0, noise, t = self._forward_arguments(caller, original_samples, noise, timesteps)
        check_range(caller, "timesteps", t, self.schedule.num_timesteps)
        levels = self._chain_levels()
        row: int | Tensor
        if self._begin_index is not None:
            row = self._begin_index if self._step_index is None else self._step_index
        else:
            device = numbered(caller, x_0.device)
            if device not in levels.rows:
                with torch.inference_mode(False):  # kept for all callers
                    levels.rows[device] = next(iter(levels.rows.values())).to(device)
            row = levels.rows[device].index_select(0, t.reshape(-1))
        return cast(Tensor, reverse_step(x_0, noise, row, levels.plan))

    def _chain_levels(self) -> _NoiseLevels:
        if self._noise_levels is None:
            chain, total = self._chain, self.schedule.num_timesteps
            abar = torch.cat([self._levels(self._tables().first), self.schedule.alpha_bars])
            coefficients = torch.zeros(len(abar), len(COLUMNS), dtype=torch.float64)
            coefficients[:, COLUMNS.index("k1")] = abar.sqrt()
            coefficients[:, COLUMNS.index("k2")] = (1 - abar).sqrt()
            coefficients[:, COLUMNS.index("clip")] = torch.inf
            timesteps = torch.cat([chain, torch.zeros(1, dtype=torch.int64), torch.arange(total)])
            rows = torch.arange(len(chain) + 1, len(abar))
            theirs: Any = self  # a method of diffusers' class
            for t in chain.tolist():
                rows[t] = theirs.index_for_timestep(t, chain)
            plan = SamplingPlan(self.schedule, timesteps, coefficients, "epsilon", "fixed")
            self._noise_levels = _NoiseLevels(plan, {torch.device("cpu"): rows})
        return self._noise_levels


def _schedule(config: Any) -> NoiseSchedule:
    """Return the configuration's noise schedule, with abar = 2^-24 in the place of 0, as in diffusers.

    Timesteps before the last may have a smaller abar, which diffusers keeps. It is raised, so that noise levels descend.
    """
    schedule = NoiseSchedule.from_diffusers(config)
    if not config.rescale_betas_zero_snr:
        return schedule
    steps_left = torch.arange(schedule.num_timesteps - 1, -1, -1, dtype=torch.float64)
    alpha_bars = torch.maximum(schedule.alpha_bars, _ZERO_SNR * (1 + 1e-6 * steps_left))
    return NoiseSchedule(1 - alpha_bars / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bars[:-1]]))


def _ratios(alpha_bars: Tensor) -> Tensor:
    """Return sigma / alpha."""
    return ((1 - alpha_bars) / alpha_bars).sqrt()
