"""The four schedulers: diffusers' constructor and `step` of each, and the plan of its configuration."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers import (
    scheduling_ddim,
    scheduling_ddim_inverse,
    scheduling_ddpm,
    scheduling_dpmsolver_multistep,
    scheduling_utils,
)
from torch import Tensor

from ...checks import check_choice, check_int, check_number, check_one_of, check_range
from ...errors import expect
from ...ops import reverse_step
from ...plan import VARIANCE_TYPES, SamplingPlan, ddim_inversion_plan, ddim_plan, ddpm_plan, dpm_solver_plan
from ...plan.levels import count_levels, noise_ratios
from ...plan.rows import plan_from_columns
from ...schedule import NoiseSchedule, Objective
from .plan_scheduler import Betas, PlanScheduler, Steps


class DDPMScheduler(PlanScheduler, diffusers.DDPMScheduler):
    """Ancestral sampling (Ho et al. 2020, Algorithm 2) with the arguments of `diffusers.DDPMScheduler`.

    Raises:
        ValueError: An argument is out of range, or a beta is outside (0, 1].
    """

    _to_next = True

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
        self._chain = self._has_step().nonzero()[:, 0].flip(0)  # steps need no set_timesteps
        self.one = torch.tensor(1.0)
        self.variance_type = variance_type
        got = "'learned', by which diffusers means a variance, and ddpm_plan its logarithm"
        expect(variance_type != "learned", "DDPMScheduler", "variance_type", "to be 'learned_range' or fixed", got)
        if variance_type not in VARIANCE_TYPES:
            logging.getLogger("ddpm_fast").warning(
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
        check_one_of(f"{type(self).__name__}.set_timesteps", "num_inference_steps", num_inference_steps, "timesteps", timesteps)
        self.custom_timesteps = timesteps is not None
        self._set_chain(num_inference_steps, device, timesteps)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> scheduling_ddpm.DDPMSchedulerOutput | tuple[Tensor, Tensor]:
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
        steps, t, known = self._read(timestep, model_output, sample)
        outside = [each for each in known if steps.rows[each] >= steps.chain.num_steps]
        expect(not outside, f"{type(self).__name__}.step", "timestep", "to be one of the scheduler's timesteps", outside)
        # At t = 0 sigma is 0, and diffusers draws nothing.
        noise = self._noise(model_output, sample, generator) if not known or any(known) else torch.zeros_like(sample)
        pair = self._advance(steps, t, known, model_output, sample, noise)
        return scheduling_ddpm.DDPMSchedulerOutput(*pair) if return_dict else pair

    def _plan(self, timesteps: Sequence[int], previous: Sequence[int] | None) -> SamplingPlan:
        return ddpm_plan(
            self.schedule,
            spacing=timesteps,
            previous=previous,
            prediction=self.config.prediction_type,
            variance=self.config.variance_type if self.config.variance_type in VARIANCE_TYPES else "fixed_small",
            clip=self._clip,
        )


class DDIMScheduler(PlanScheduler, diffusers.DDIMScheduler):
    """DDIM (Song et al. 2021) with the arguments of `diffusers.DDIMScheduler`.

    It supports all beta schedules of DDPMScheduler.

    Raises:
        ValueError: An argument is out of range, or a beta is outside (0, 1].
    """

    _options = (0.0, False)

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

    def sampling_plan(self, eta: float = 0.0, use_clipped_model_output: bool = False) -> SamplingPlan:
        """Return the chain as a plan for `ddpm_fast.sample` and `reverse_step`.

        Row i is what `step` does at `self.timesteps[i]`.

        Args:
            eta: As in `step`.
            use_clipped_model_output: As in `step`.

        Raises:
            ValueError: set_timesteps was not called, or thresholding is on. Thresholding depends on a whole
                image, so coefficients cannot express it.
        """
        return self._sampling_plan(eta, bool(use_clipped_model_output))

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
    ) -> scheduling_ddim.DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """Return the sample T // num_inference_steps below `timestep`, or x_0.

        In "linspace", and in "trailing" if num_inference_steps does not divide T, that may be between two timesteps of
        the chain, as in diffusers. Timesteps that were assigned without `set_timesteps` go each to the next.

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
        eta = eta.item() if isinstance(eta, np.generic) else eta
        check_number(f"{type(self).__name__}.step", "eta", eta, 0, finite=True)
        steps, t, known = self._read(timestep, model_output, sample, eta, bool(use_clipped_model_output))
        noise = self._noise(model_output, sample, generator, variance_noise) if eta > 0 else None
        pair = self._advance(steps, t, known, model_output, sample, noise)
        return scheduling_ddim.DDIMSchedulerOutput(*pair) if return_dict else pair

    def _plan(
        self, timesteps: Sequence[int], previous: Sequence[int] | None, eta: float, use_clipped_model_output: bool
    ) -> SamplingPlan:
        return ddim_plan(
            self.schedule,
            None,
            spacing=timesteps,
            previous=previous,
            prediction=self.config.prediction_type,
            eta=eta,
            clip=self._clip,
            use_clipped_model_output=use_clipped_model_output,
            final_alpha_bar=1.0 if self.config.set_alpha_to_one else float(self.schedule.alpha_bars[0]),
        )


class DDIMInverseScheduler(PlanScheduler, diffusers.DDIMInverseScheduler):
    """DDIM inversion (Song et al. 2021) with the arguments of `diffusers.DDIMInverseScheduler`.

    Timesteps ascend. A step arrives at the timestep that the model is given. See
    `ddpm_fast.ddim_inversion_plan` with evaluate_at="arrival".

    Raises:
        ValueError: An argument is out of range, a beta is outside (0, 1], or the prediction is "sample" with
            set_alpha_to_one, as an image alone does not determine epsilon.
    """

    _thresholds = False

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
        if kwargs.get("set_alpha_to_zero") is not None:  # its deprecated name
            set_alpha_to_one = kwargs["set_alpha_to_zero"]
        self._starts_at_x_0 = set_alpha_to_one
        expect(  # its plan's builder would name an argument that this scheduler does not have
            prediction_type != "sample" or not set_alpha_to_one,
            type(self).__name__,
            "prediction_type",
            'to be "epsilon" or "v_prediction" with set_alpha_to_one, as an image alone does not determine epsilon',
            "'sample'",
        )
        self._set_up()
        self.initial_alpha_cumprod = torch.tensor(1.0) if set_alpha_to_one else self.alphas_cumprod[0]
        self._timesteps = torch.arange(num_train_timesteps)

    def _spaced(self, name: str, num_steps: Any) -> Tensor:
        expect(
            self.config.timestep_spacing != "linspace", name, "timestep_spacing", 'to be "leading" or "trailing"', '"linspace"'
        )
        return super()._spaced(name, num_steps).flip(0)

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> scheduling_ddim_inverse.DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """Return the sample at `timestep`, from the one T // num_inference_steps below it, or from the image.

        In "trailing", if num_inference_steps does not divide T, that may be between two timesteps of the chain, as in
        diffusers. Timesteps that were assigned without `set_timesteps` start each at the one before.

        Args:
            model_output: Like sample.
            timestep: Where the step arrives: an int, or an integer tensor with 1 or N elements. A tensor on a
                GPU is read there, without synchronization, so a CUDA graph of a step serves every step.
            sample: [N, ...], floating.
            return_dict: Return a DDIMInverseSchedulerOutput, else a tuple.

        Returns:
            prev_sample, which is the noisier one, and pred_original_sample (x_0^), in the wider dtype of
            model_output and sample. Differentiable.

        Raises:
            ValueError: An argument has an unsupported value or shape, or set_timesteps was not called.
            TypeError: An argument has an unsupported type or dtype.
        """
        steps, t, known = self._read(timestep, model_output, sample)
        pair = self._advance(steps, t, known, model_output, sample, None)
        return scheduling_ddim_inverse.DDIMSchedulerOutput(*pair) if return_dict else pair

    def _plan(self, timesteps: Sequence[int], previous: Sequence[int] | None) -> SamplingPlan:
        return ddim_inversion_plan(
            self.schedule,
            None,
            evaluate_at="arrival",
            spacing=timesteps[::-1],
            previous=None if previous is None else previous[::-1],
            prediction=self.config.prediction_type,
            clip=self._clip,
            initial_alpha_bar=1.0 if self._starts_at_x_0 else float(self.schedule.alpha_bars[0]),
        )

    def _has_step(self) -> Tensor:
        """Return that every timestep has a step: its start is cleaner, where abar is positive."""
        return torch.ones(self.schedule.num_timesteps, dtype=torch.bool)


class DPMSolverMultistepScheduler(PlanScheduler, diffusers.DPMSolverMultistepScheduler):
    """DPM-Solver++ (Lu et al. 2022) with the arguments of `diffusers.DPMSolverMultistepScheduler`.

    It supports orders 1 to 3, algorithm_type "dpmsolver++" and "sde-dpmsolver++", and Karras's sigmas. See
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
        self.register_to_config(  # configurations of other solvers, as in diffusers
            algorithm_type="dpmsolver++" if algorithm_type == "deis" else algorithm_type,
            solver_type="midpoint" if solver_type in ("logrho", "bh1", "bh2") else solver_type,
        )
        check_choice(type(self).__name__, "algorithm_type", self.config.algorithm_type, ("dpmsolver++", "sde-dpmsolver++"))
        check_number(type(self).__name__, "lambda_min_clipped", lambda_min_clipped)
        for key in (
            "use_exponential_sigmas",
            "use_beta_sigmas",
            "use_lu_lambdas",
            "use_flow_sigmas",
            "use_dynamic_shifting",
        ):
            expect(
                not self.config[key],
                type(self).__name__,
                key,
                "to be false",
                f"{self.config[key]}: timestep_spacing and use_karras_sigmas are supported",
            )
        self._set_up(_schedule)
        ratios = noise_ratios(self.schedule.alpha_bars)
        self.lambda_t, self.sigmas = -ratios.log().float(), ratios.float()
        self.alpha_t, self.sigma_t = self.schedule.sqrt_alpha_bars.float(), self.schedule.sqrt_one_minus_alpha_bars.float()
        self._timesteps = self._timesteps.float()
        self._restart()

    def _restart(self) -> None:
        """Forget the steps taken."""
        self.model_outputs: list[Tensor | None] = [None] * self.config.solver_order
        self.lower_order_nums = 0
        self._step_index: Any = None
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
        name, is_karras = f"{type(self).__name__}.set_timesteps", self.config.use_karras_sigmas
        check_one_of(name, "num_inference_steps", num_inference_steps, "timesteps", timesteps)
        expect(mu is None, name, "mu", "to be None, as dynamic shifting is not supported", mu)
        expect(timesteps is None or not is_karras, name, "timesteps", "to be None with use_karras_sigmas", timesteps)
        self._set_chain(num_inference_steps, device, timesteps)
        self._restart()

    def _spaced(self, name: str, num_steps: Any) -> Tensor:
        """Return the timesteps of diffusers' scheduler, without those that it should not list.

        It rounds Karras's, and truncates those of cosine betas. Either depends on the last bits of its float32 table.
        """
        spacing = "karras" if self.config.use_karras_sigmas else self.config.timestep_spacing
        last = count_levels(name, self.schedule, self.config.lambda_min_clipped)
        check_int(name, "num_steps", num_steps, 1, last - 1 if spacing == "leading" else self.config.num_train_timesteps)
        theirs = cast(Any, scheduling_dpmsolver_multistep.DPMSolverMultistepScheduler)(
            self.config.num_train_timesteps,
            trained_betas=NoiseSchedule.from_diffusers({**self.config, "rescale_betas_zero_snr": False}).betas.tolist(),
            **{key: self.config[key] for key in ("beta_schedule", "timestep_spacing", "steps_offset")},
            **{key: self.config[key] for key in ("use_karras_sigmas", "lambda_min_clipped", "rescale_betas_zero_snr")},
        )
        if spacing == "karras":
            for key in ("sigma_min", "sigma_max"):  # keys of another scheduler, which diffusers reads
                expect(self.config.get(key) is None, name, "", f"no {key} with use_karras_sigmas", self.config.get(key))
            t = int(theirs.sigmas.log().isfinite().int().argmin())  # the first that is not usable, if any
            expect(
                theirs.sigmas[t].log().isfinite(),
                name,
                "use_karras_sigmas",
                "to be false, or betas with a positive and finite sqrt((1 - abar) / abar) in float32",
                f"abar = {float(theirs.alphas_cumprod[t]):.3g} at timestep {t}",
            )
        theirs.alphas_cumprod = theirs.alphas_cumprod.numpy()  # NumPy 2 deprecates how diffusers turns a tensor to an array
        theirs.set_timesteps(num_steps)
        listed: Tensor = theirs.timesteps
        if spacing == "trailing":  # for some numbers of steps diffusers lists -1
            listed = listed[listed != -1]
        return listed if spacing == "karras" else listed.unique_consecutive()  # diffusers may list a timestep twice

    # ------------------------------------------------------------------------------------------------------------- plans

    def _build(self, *options: Any) -> Steps:
        config, count, spacing = self.config, len(self._chain), self._chain.tolist()
        levels: dict[str, Any] = {"spacing": "karras", "num_steps": count} if config.use_karras_sigmas else {}
        orders = tuple(
            self._plan(
                spacing,
                order=order,
                # With thresholding, the steps take x_0^ instead of the model's output.
                prediction="sample" if config.thresholding else config.prediction_type,
                **levels,
            )
            for order in range(1, config.solver_order + 1)
        )
        chain = self._plan(
            spacing,
            learned_variance=config.variance_type in ("learned", "learned_range") and config.prediction_type == "epsilon",
            **levels,
        )
        chain = chain if torch.equal(chain.timesteps, self._chain) else replace(chain, timesteps=self._chain)
        abar = torch.cat([chain.alpha_bars, chain.alpha_bars_prev[-1:], self.schedule.alpha_bars])
        self.sigmas = noise_ratios(abar[: count + 1]).float()
        unused, columns = torch.zeros_like(abar), {"k1": abar.sqrt(), "k2": (1 - abar).sqrt()}
        plan = plan_from_columns(Objective(self.schedule), unused.long(), abar, abar, None, p=unused, **columns)
        rows = torch.arange(count + 1, len(abar))
        rows[self._chain] = torch.tensor([self.index_for_timestep(t, self._chain) for t in spacing])  # type: ignore[attr-defined]
        return Steps(chain, plan, rows.tolist(), {}, orders)

    def _plan(self, timesteps: Sequence[int], previous: Sequence[int] | None = None, **options: Any) -> SamplingPlan:
        """Return the plan whose steps start at `timesteps`. `options` replace arguments of `dpm_solver_plan`."""
        defaults = {
            "num_steps": None,
            "order": self.config.solver_order,
            "eta": 1.0 if self.config.algorithm_type == "sde-dpmsolver++" else 0.0,
            "solver": self.config.solver_type,
            "spacing": timesteps,
            "final": self.config.final_sigmas_type,
            "lower_order_final": bool(self.config.lower_order_final),
            "euler_at_final": bool(self.config.euler_at_final),
            "prediction": self.config.prediction_type,
            "clip": None,
        }
        return dpm_solver_plan(self.schedule, **{**defaults, **options})

    # -------------------------------------------------------------------------------------------------------------- step

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> scheduling_utils.SchedulerOutput | tuple[Tensor]:
        """Return the sample at the next timestep of the chain.

        The scheduler counts its steps and remembers x_0^ of the last ones in `model_outputs`, as diffusers
        does. If sampling starts in the middle, as image to image does, there is no x_0^ before, so the first step has order 1.

        Args:
            model_output: Like sample. With a learned variance and predicted noise it may have twice the
                channels, the prediction first.
            timestep: An int or an integer tensor with one element. The first step looks up its place in the
                timesteps, unless `set_begin_index` gave it. Later steps do not read it.
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
        steps, t, _ = self._read(timestep, model_output, sample, most=1)
        if self._step_index is None:
            self._init_step_index(t)  # type: ignore[attr-defined]  # diffusers'
        expect(
            0 <= self._step_index < len(self._chain),
            f"{type(self).__name__}.step",
            "",
            f"one of the {len(self._chain)} steps of set_timesteps",
            f"step {self._step_index}: call set_timesteps again to begin another chain",
        )
        noise = (
            self._noise(model_output, sample, generator, variance_noise, torch.float32)
            if self.config.algorithm_type == "sde-dpmsolver++"
            else None
        )
        if steps.chain.variance != "fixed" and model_output.shape[1] == 2 * sample.shape[1]:
            model_output = model_output[:, : sample.shape[1]]
        if self._thresholds:
            model_output = self._thresholded(steps.chain, self._step_index, model_output, sample)
        plan = steps.orders[min(self.lower_order_nums, len(steps.orders) - 1)]
        x_prev, x_0 = self._reverse_step(plan, self._step_index, model_output, sample, noise, *reversed(self.model_outputs[1:]))
        self.model_outputs = [*self.model_outputs[1:], x_0]
        self.lower_order_nums = min(self.lower_order_nums + 1, self.config.solver_order)
        self._step_index += 1
        return scheduling_utils.SchedulerOutput(prev_sample=x_prev) if return_dict else (x_prev,)

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
        if self.num_inference_steps is None:
            return super().add_noise(original_samples, noise, timesteps)
        x_0, noise, t = self._broadcast("add_noise", "original_samples", original_samples, noise, timesteps)
        check_range(f"{type(self).__name__}.add_noise", "timesteps", t, self.schedule.num_timesteps)
        steps, index = self._steps(), self._begin_index if self._step_index is None else self._step_index
        row = steps.row(t, [], x_0.device) if self._begin_index is None else cast(int, index)
        return cast(Tensor, reverse_step(x_0, noise, row, steps.plan))


def _schedule(config: Any) -> NoiseSchedule:
    """Return the configuration's noise schedule, with abar = 2^-24 instead of 0, as in diffusers.

    sigma / alpha is then finite. Timesteps before the last may have a smaller abar, which diffusers keeps. It is raised, so
    that noise levels descend.
    """
    schedule = NoiseSchedule.from_diffusers(config)
    if not config.rescale_betas_zero_snr:
        return schedule
    steps_left = torch.arange(schedule.num_timesteps - 1, -1, -1, dtype=torch.float64)
    alpha_bars = torch.maximum(schedule.alpha_bars, 2**-24 * (1 + 1e-6 * steps_left))
    return NoiseSchedule(1 - alpha_bars / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bars[:-1]]))
