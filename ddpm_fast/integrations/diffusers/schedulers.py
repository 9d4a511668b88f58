"""diffusers' schedulers as plans."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Final

import diffusers
import torch
from torch import Tensor

from ...errors import ArgumentError, InvalidType, InvalidValue, expect, renaming
from ...plan import VARIANCE_TYPES, SamplingPlan, ddim_inversion_plan, ddim_plan, ddpm_plan, dpm_solver_plan
from ...schedule import NoiseSchedule
from ..foreign import check_unpatched
from .plan_scheduler import PlanScheduler

_KEYS: Final = {  # an argument of a plan's builder -> the key that it comes from
    "schedule": "num_train_timesteps",
    "spacing": "timesteps",
    "prediction": "prediction_type",
    "clip": "clip_sample_range",
    "order": "solver_order",
    "solver": "solver_type",
    "final": "final_sigmas_type",
    "lambda_min": "lambda_min_clipped",
}
# Options of diffusers' solver whose levels no plan builder supports, and keys of other schedulers that it also reads.
_OTHER_LEVELS: Final = (
    *("use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas", "use_dynamic_shifting"),
    *("sigma_min", "sigma_max"),
)


def plan_of_scheduler(scheduler: Any, num_steps: int | None, eta: float | None) -> SamplingPlan:
    """Return the plan of a scheduler. Arguments and errors are those of `ddpm_fast.plan_of`."""
    name = type(scheduler).__name__
    expect(eta is None or name == "DDIMScheduler", "eta", f"to be None for a {name}", eta)
    if isinstance(scheduler, PlanScheduler):
        given: SamplingPlan = scheduler.plan
        return given if num_steps is None else given.in_steps(num_steps)
    if name not in _READERS or type(scheduler) is not getattr(diffusers, name):
        raise InvalidType("x", f"to be one of {', '.join(_READERS)}, PlanScheduler", f"a {name}")
    fresh = _fresh(scheduler, num_steps)
    config, count = fresh.config, fresh.num_inference_steps
    wanted = "to be given, or x to have timesteps that were set"
    expect(count is not None or name == "DDPMScheduler", "num_steps", wanted, "neither")
    expect(not config.get("thresholding"), "thresholding", "to be false, as it depends on a whole image", "true")
    timesteps = fresh.timesteps[fresh.timesteps >= 0].to(torch.int64)  # for some numbers of steps, diffusers lists -1
    with renaming(_KEYS):
        build, listed = _READERS[name](config, timesteps, config.num_train_timesteps // (count or 1), eta or 0.0)
        plan: SamplingPlan = build(**listed)
    with suppress(ArgumentError):  # by the name of the spacing if that is the same, so that it can be built in other steps
        spacing = "karras" if config.get("use_karras_sigmas") else config.timestep_spacing
        named: SamplingPlan = build(num_steps=len(plan), spacing=spacing)
        if torch.equal(named.timesteps, timesteps) and torch.equal(named.coefficients, plan.coefficients):
            return named
    # Karras's levels lie between timesteps, which diffusers rounds from float32.
    return plan if len(plan) != len(timesteps) or torch.equal(plan.timesteps, timesteps) else replace(plan, timesteps=timesteps)


def _fresh(scheduler: Any, num_steps: int | None) -> Any:
    """Return a new scheduler with the configuration and the timesteps of one that was not changed otherwise."""
    check_unpatched("x", scheduler)
    # from_config leaves out the keys that were defaults once, even if they were changed since.
    config = {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}
    try:
        fresh = type(scheduler).from_config(config)
        if getattr(scheduler, "custom_timesteps", False):
            fresh.set_timesteps(timesteps=scheduler.timesteps.tolist())
        elif scheduler.num_inference_steps is not None:
            fresh.set_timesteps(scheduler.num_inference_steps)
        tables = {key: value for key, value in vars(fresh).items() if isinstance(value, Tensor)}
        wrong = [key for key, value in tables.items() if not _is_rounded(torch.as_tensor(getattr(scheduler, key)), value)]
        if num_steps is not None:
            fresh.set_timesteps(num_steps)
    except Exception as error:  # any value may be in a configuration
        raise InvalidValue("x", "to have a supported configuration", error) from error
    expect(not wrong, "x", f"to have the {', '.join(wrong)} of its configuration and set_timesteps", "others")
    return fresh


def _is_rounded(given: Tensor, exact: Tensor) -> bool:
    """Return whether a table is the exact one, which scripts move and round to half precision."""
    return given.shape == exact.shape and torch.allclose(given.cpu(), exact.to(given.dtype), 0, 0, equal_nan=True)


def _clip(config: Any) -> float | None:
    return config.clip_sample_range if config.clip_sample else None


# Each reader takes the configuration, the timesteps, how far a step goes in DDIM, and eta. It returns the plan's builder with
# all arguments but the steps, and the arguments of the steps.


def _read_ddpm(config: Any, timesteps: Tensor, stride: int, eta: float) -> tuple[Any, dict[str, Any]]:
    variance = config.variance_type
    got = "'learned', by which diffusers means a variance, and ddpm_plan its logarithm"
    expect(variance != "learned", "variance_type", "to be 'learned_range' or fixed", got)
    if variance not in VARIANCE_TYPES:
        text = "plan_of: expected variance_type to be one of %s, got %r: taken for fixed_small, as in diffusers"
        logging.getLogger("ddpm_fast").warning(text, ", ".join(VARIANCE_TYPES), variance)
        variance = "fixed_small"
    schedule, prediction = NoiseSchedule.from_diffusers(config), config.prediction_type
    build = partial(ddpm_plan, schedule, prediction=prediction, variance=variance, clip=_clip(config))
    return build, {"num_steps": None, "spacing": timesteps.tolist()}


def _read_ddim(config: Any, timesteps: Tensor, stride: int, eta: float) -> tuple[Any, dict[str, Any]]:
    schedule = NoiseSchedule.from_diffusers(config)
    build = partial(
        ddim_plan,
        schedule,
        prediction=config.prediction_type,
        eta=eta,
        clip=_clip(config),
        use_clipped_model_output=False,
        final_alpha_bar=1.0 if config.set_alpha_to_one else float(schedule.alpha_bars[0]),
    )
    # A step goes T // S lower, which may be between two timesteps of the chain.
    return build, {"num_steps": None, "spacing": timesteps.tolist(), "previous": (timesteps - stride).clamp(min=-1).tolist()}


def _read_inverse(config: Any, timesteps: Tensor, stride: int, eta: float) -> tuple[Any, dict[str, Any]]:
    schedule, starts_at_x_0 = NoiseSchedule.from_diffusers(config), config.get("set_alpha_to_zero", config.set_alpha_to_one)
    build = partial(
        ddim_inversion_plan,
        schedule,
        evaluate_at="arrival",
        prediction=config.prediction_type,
        clip=_clip(config),
        initial_alpha_bar=1.0 if starts_at_x_0 else float(schedule.alpha_bars[0]),
    )
    down = timesteps.flip(0)
    return build, {"num_steps": None, "spacing": down.tolist(), "previous": (down - stride).clamp(min=-1).tolist()}


def _read_solver(config: Any, timesteps: Tensor, stride: int, eta: float) -> tuple[Any, dict[str, Any]]:
    algorithms = {"dpmsolver++": 0.0, "sde-dpmsolver++": 1.0}
    wanted = f"to be one of {', '.join(algorithms)}"
    expect(config.algorithm_type in algorithms, "algorithm_type", wanted, config.algorithm_type)
    other = ", ".join(key for key in _OTHER_LEVELS if config.get(key))
    expect(not other, "x", "to have the levels of timestep_spacing or use_karras_sigmas", other)
    build = partial(
        dpm_solver_plan,
        _solver_schedule(config),
        order=config.solver_order,
        eta=algorithms[config.algorithm_type],
        solver=config.solver_type,
        final=config.final_sigmas_type,
        lower_order_final=bool(config.lower_order_final),
        euler_at_final=bool(config.euler_at_final),
        lambda_min=config.lambda_min_clipped,
        prediction=config.prediction_type,
        clip=None,
        learned_variance=config.variance_type in ("learned", "learned_range") and config.prediction_type == "epsilon",
    )
    if config.use_karras_sigmas:
        return build, {"num_steps": len(timesteps), "spacing": "karras"}
    return build, {"num_steps": None, "spacing": timesteps.unique_consecutive().tolist()}  # diffusers may list one twice


def _solver_schedule(config: Any) -> NoiseSchedule:
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


_READERS: Final = {
    "DDPMScheduler": _read_ddpm,
    "DDIMScheduler": _read_ddim,
    "DPMSolverMultistepScheduler": _read_solver,
    "DDIMInverseScheduler": _read_inverse,
}
