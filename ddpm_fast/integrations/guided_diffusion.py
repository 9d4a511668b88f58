"""guided-diffusion's `GaussianDiffusion` and `SpacedDiffusion` on this package's kernels.

Names, arguments, defaults and results are those of openai/guided-diffusion (Nichol and Dhariwal 2021;
Dhariwal and Nichol 2021). improved-diffusion has a part of them. A sampling step is one `reverse_step`.
Noise comes from torch's global generator at the same places as in the original, so a seed gives the
original's images. With `seeds=` it is drawn in the kernels; see `ddpm_fast.noise`.

float64 inputs are computed in float64, all others in float32. Results of half-precision inputs are
float32, as in the original.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import accumulate, repeat
from typing import Any, Final, Literal, ParamSpec, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import (
    MAX_TIMESTEPS,
    check_device,
    check_float,
    check_int,
    check_like,
    check_one_of,
    check_range,
    check_type,
    checked_seeds,
)
from ..dtypes import opmath
from ..errors import InvalidType, InvalidValue
from ..evaluation.bound import prior_bits, reconstruction_bits, transition_bits
from ..models import Model
from ..ops import denoising_loss, q_sample, reverse_step
from ..ops import noise as counter_based_noise
from ..plan import Prediction, SamplingPlan, Variance, ddim_inversion_plan, ddim_plan, ddpm_plan
from ..reference import STREAM_X_T, per_sample, ranged_log_variance
from ..schedule import NoiseSchedule
from .guided_diffusion_unet import load_guided_diffusion

__all__ = [
    "GaussianDiffusion",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "SpacedDiffusion",
    "create_gaussian_diffusion",
    "get_named_beta_schedule",
    "load_guided_diffusion",
    "space_timesteps",
]

Array: TypeAlias = npt.NDArray[np.float64]
Kwargs: TypeAlias = Mapping[str, Any] | None
_P = ParamSpec("_P")
_Kind: TypeAlias = Literal["ddpm", "mean", "ddim", "inversion"]

_HALF: Final = (torch.float16, torch.bfloat16)
_MAX_PLANS: Final = 8  # per process: eta may differ at every step, so old plans are dropped


class ModelMeanType(enum.Enum):
    """Meaning of the model's output: the mean of x_{t-1}, x_0, or epsilon."""

    PREVIOUS_X = enum.auto()
    START_X = enum.auto()
    EPSILON = enum.auto()


class ModelVarType(enum.Enum):
    """Variance of p(x_{t-1} | x_t).

    LEARNED is the model's log variance. FIXED_SMALL is beta~, FIXED_LARGE beta. LEARNED_RANGE is the
    model's interpolation between their logarithms.
    """

    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()


class LossType(enum.Enum):
    """Training loss.

    MSE is the mean squared error, plus the bound's term if the variance is learned. RESCALED_MSE weights
    that term by T / 1000. KL is the bound's term alone, and RESCALED_KL is T times KL.
    """

    MSE = enum.auto()
    RESCALED_MSE = enum.auto()
    KL = enum.auto()
    RESCALED_KL = enum.auto()

    def is_vb(self) -> bool:
        """Return whether the loss is the bound's term alone."""
        return self in (LossType.KL, LossType.RESCALED_KL)


_PREDICTIONS: Final[dict[ModelMeanType, Prediction]] = {
    ModelMeanType.PREVIOUS_X: "previous_sample",
    ModelMeanType.START_X: "sample",
    ModelMeanType.EPSILON: "epsilon",
}
_VARIANCES: Final[dict[ModelVarType, Variance]] = {
    ModelVarType.LEARNED: "learned",
    ModelVarType.FIXED_SMALL: "fixed_small",
    ModelVarType.FIXED_LARGE: "fixed_large",
    ModelVarType.LEARNED_RANGE: "learned_range",
}


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> Array:
    """Return the betas of a named schedule, float64 [T].

    Args:
        schedule_name: "linear" (Ho et al. 2020, with ends scaled by 1000 / T) or "cosine" (Nichol and
            Dhariwal 2021).
        num_diffusion_timesteps: T.
    """
    if schedule_name == "linear":
        schedule = NoiseSchedule.linear(num_diffusion_timesteps, scale_to_num_timesteps=True)
    elif schedule_name == "cosine":
        schedule = NoiseSchedule.cosine(num_diffusion_timesteps)
    else:
        raise NotImplementedError(
            f'get_named_beta_schedule: expected schedule_name to be "linear" or "cosine", got {schedule_name!r}'
        )
    return _array(schedule.betas)


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """Return the timesteps to sample with.

    The T timesteps are split into sections of equal size. Each section contributes as many evenly spaced
    timesteps as its count.

    Args:
        num_timesteps: T.
        section_counts: Ints, or a string of them ("250", "10,10,10"). Or "ddimN" for N timesteps with an
            integer stride, starting from 0.

    Raises:
        ValueError: A section is smaller than its count, or no integer stride gives N timesteps.
    """
    op = "space_timesteps"
    if isinstance(section_counts, str) and section_counts.startswith("ddim"):
        wanted = _count(op, section_counts, section_counts.removeprefix("ddim"))
        strides = (stride for stride in range(1, num_timesteps) if len(range(0, num_timesteps, stride)) == wanted)
        stride = next(strides, None)
        if stride is None:
            raise InvalidValue(
                op, "", f"ddimN with an N that an integer stride through {num_timesteps} timesteps gives", repr(section_counts)
            )
        return set(range(0, num_timesteps, stride))
    if isinstance(section_counts, str):
        counts = [_count(op, section_counts, count) for count in section_counts.split(",")]
    elif isinstance(section_counts, Sequence):
        counts = [_count(op, section_counts, count) for count in section_counts]
    else:
        raise InvalidType(op, "section_counts", "to be a string or a sequence of ints", repr(section_counts))
    if not counts:
        raise InvalidValue(op, "section_counts", "to have at least one count", repr(section_counts))
    timesteps: set[int] = set()
    start = 0
    for i, count in enumerate(counts):
        size = num_timesteps // len(counts) + (i < num_timesteps % len(counts))
        if size < count:
            raise InvalidValue(op, "", f"counts of at most {size}, the size of section {i}", count)
        stride_ = (size - 1) / (count - 1) if count > 1 else 1.0
        # Added up rather than multiplied: the rounding decides some ties, and this is the published models' one.
        offsets = accumulate(repeat(stride_, count - 1), initial=0.0) if count else ()
        timesteps |= {start + round(offset) for offset in offsets}
        start += size
    return timesteps


def _count(op: str, section_counts: object, count: object) -> int:
    try:
        number = int(count)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        number = -1
    if number < 0:
        raise InvalidValue(op, "section_counts", 'to be "ddimN" or counts like "250" or "10,10,10"', repr(section_counts))
    return int(number)


def _arguments_of(other: Callable[_P, object]) -> Callable[[Callable[..., Tensor]], Callable[_P, Tensor]]:
    """Decorate a method that passes its arguments on to `other`, for type checkers and `help`."""

    def decorate(method: Callable[..., Tensor]) -> Callable[_P, Tensor]:
        method.__signature__ = inspect.signature(other).replace(return_annotation="Tensor")  # type: ignore[attr-defined]
        return method

    return decorate


class GaussianDiffusion:
    """A diffusion process, the meaning of the model's output, and the training loss.

    Timesteps t are int64 [N], one per sample, in 0..T-1. On a GPU a check would synchronize with the host,
    so the caller must keep them in range. A model is called as model(x, t, **model_kwargs). It returns
    [N, C, ...], or [N, 2 C, ...] with the variance in the last C channels.

    Args:
        betas: [T], each in (0, 1].
        model_mean_type: Meaning of the model's output.
        model_var_type: Variance of the reverse steps.
        loss_type: Training loss.
        rescale_timesteps: Pass t * 1000 / T (float32) to the model.

    Attributes:
        schedule: The `NoiseSchedule` of the betas.
        timestep_map: The process's timesteps among those of the model's training, here 0..T-1.
        original_num_steps: Number of timesteps of the model's training.
        num_timesteps: T.
        betas: float64 array [T]. alphas_cumprod, posterior_variance and the others are alike.
    """

    def __init__(
        self,
        *,
        betas: Any,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType,
        rescale_timesteps: bool = False,
    ) -> None:
        for name, value, kind in (
            ("model_mean_type", model_mean_type, ModelMeanType),
            ("model_var_type", model_var_type, ModelVarType),
            ("loss_type", loss_type, LossType),
        ):
            if not isinstance(value, kind):
                where = f"ddpm_fast.integrations.guided_diffusion.{kind.__name__}"
                raise InvalidType(type(self).__name__, name, f"to be a {where}", repr(value))
        self.model_mean_type, self.model_var_type, self.loss_type = model_mean_type, model_var_type, loss_type
        self.rescale_timesteps = rescale_timesteps
        self.schedule = schedule = NoiseSchedule.from_betas(torch.as_tensor(np.asarray(betas, dtype=np.float64)))
        self.num_timesteps = self.original_num_steps = schedule.num_timesteps
        self.timestep_map = list(range(self.num_timesteps))

        self.betas = _array(schedule.betas)
        self.alphas_cumprod = _array(schedule.alpha_bars)
        self.alphas_cumprod_prev = _array(schedule.alpha_bars_prev)
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)
        self.sqrt_alphas_cumprod = _array(schedule.sqrt_alpha_bars)
        self.sqrt_one_minus_alphas_cumprod = _array(schedule.sqrt_one_minus_alpha_bars)
        self._one_minus_alphas_cumprod = 1 - self.alphas_cumprod
        self.log_one_minus_alphas_cumprod = np.log(self._one_minus_alphas_cumprod)
        self.sqrt_recip_alphas_cumprod = _array(schedule.alpha_bars.rsqrt())
        self.sqrt_recipm1_alphas_cumprod = _array((1 / schedule.alpha_bars - 1).sqrt())
        self.posterior_variance = _array(schedule.posterior_variance)
        self.posterior_log_variance_clipped = _array(schedule.posterior_log_variance)
        self.posterior_mean_coef1 = _array(schedule.posterior_mean_coef_x_0)
        self.posterior_mean_coef2 = _array(schedule.posterior_mean_coef_x_t)
        # Variance of p(x_{t-1} | x_t). At t = 0 beta would distort L_0: beta~_1 is the better decoder (Ho et al.'s code).
        large = np.append(np.exp(self.posterior_log_variance_clipped[:1]), self.betas[1:])
        self._variances = {
            ModelVarType.FIXED_LARGE: (large, np.log(large)),
            ModelVarType.FIXED_SMALL: (self.posterior_variance, self.posterior_log_variance_clipped),
        }
        self._log_betas = np.log(self.betas)
        self._score_weights = self._one_minus_alphas_cumprod / self.sqrt_alphas_cumprod
        self._plans: dict[tuple[object, ...], SamplingPlan] = {}
        self._tables: dict[tuple[int, torch.device], tuple[Array, Tensor]] = {}

    # ------------------------------------------------------------------------------------------------- forward process

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, variance and log variance of q(x_t | x_0), each like x_start (eq. 3)."""
        x_start, t = self._checked("q_mean_variance", "x_start", x_start, t)
        mean = self._at(self.sqrt_alphas_cumprod, t, x_start) * x_start
        variance = self._at(self._one_minus_alphas_cumprod, t, x_start).expand_as(x_start)
        return mean, variance, self._at(self.log_one_minus_alphas_cumprod, t, x_start).expand_as(x_start)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None, *, seeds: Tensor | None = None) -> Tensor:
        """Draw x_t ~ q(x_t | x_0) (eq. 3).

        Args:
            x_start: x_0, [N, C, ...].
            t: int64 [N].
            noise: epsilon, like x_start. Without noise and seeds, torch's generator draws it.
            seeds: int64 [N], for noise drawn in the kernel.
        """
        x_start, t = self._checked("q_sample", "x_start", x_start, t)
        if noise is None and seeds is None:
            noise = torch.randn_like(x_start)
        return q_sample(x_start, t, self.schedule, noise=None if noise is None else _wide(noise), seeds=seeds)

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, variance and log variance of q(x_{t-1} | x_t, x_0) (eq. 6-8).

        The log variance at t = 0 is that of t = 1.
        """
        x_t, t = self._checked("q_posterior_mean_variance", "x_t", x_t, t)
        x_start = _wide(x_start)
        check_like("q_posterior_mean_variance", "x_start", x_start, "x_t", x_t)
        mean, _ = self._step(self._plan("mean", "sample", None, "fixed_small"), x_t, x_start, t)
        variance = self._at(self.posterior_variance, t, x_t).expand_as(x_t)
        return mean, variance, self._at(self.posterior_log_variance_clipped, t, x_t).expand_as(x_t)

    # ------------------------------------------------------------------------------------------------- reverse process

    def p_mean_variance(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Kwargs = None,
    ) -> dict[str, Tensor]:
        """Return p(x_{t-1} | x_t) and the predicted x_0.

        Args:
            model: The model.
            x: x_t, [N, C, ...].
            t: int64 [N].
            clip_denoised: Clamp the predicted x_0 to [-1, 1].
            denoised_fn: Applied to the predicted x_0 before the clamp.
            model_kwargs: Further keywords of the model.

        Returns:
            "mean", "variance", "log_variance" and "pred_xstart", each like x.
        """
        wide, t = self._checked("p_mean_variance", "x", x, t)
        return self._p_mean_variance(self._output(model, x, t, model_kwargs), wide, t, clip_denoised, denoised_fn)

    def _p_mean_variance(
        self, output: Tensor, x: Tensor, t: Tensor, clip: bool, denoised_fn: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, Tensor]:
        prediction = _PREDICTIONS[self.model_mean_type]
        plan = self._plan("mean", prediction, 1.0 if clip and denoised_fn is None else None)
        mean, x_0 = self._step(plan, x, output, t)
        if denoised_fn is not None:
            x_0 = denoised_fn(x_0)
            x_0 = x_0.clamp(-1, 1) if clip else x_0
            if prediction != "previous_sample":
                mean = self.q_posterior_mean_variance(x_0, x, t)[0]
        if self._learned:
            log_variance = output[:, x.shape[1] :].to(x.dtype)
            if self.model_var_type == ModelVarType.LEARNED_RANGE:
                low, high = self._at(self.posterior_log_variance_clipped, t, x), self._at(self._log_betas, t, x)
                log_variance = ranged_log_variance(log_variance, high, low)
            variance = log_variance.exp()
        else:
            variance, log_variance = (self._at(v, t, x).expand_as(x) for v in self._variances[self.model_var_type])
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": x_0}

    def condition_mean(
        self, cond_fn: Model, p_mean_var: Mapping[str, Tensor], x: Tensor, t: Tensor, model_kwargs: Kwargs = None
    ) -> Tensor:
        """Return the mean shifted by variance * cond_fn(x, t) (Dhariwal and Nichol 2021, Algorithm 1).

        cond_fn returns the gradient of log p(y | x_t).
        """
        gradient: Tensor = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        return p_mean_var["mean"] + p_mean_var["variance"] * gradient.to(p_mean_var["mean"].dtype)

    def condition_score(
        self, cond_fn: Model, p_mean_var: Mapping[str, Tensor], x: Tensor, t: Tensor, model_kwargs: Kwargs = None
    ) -> dict[str, Tensor]:
        """Return `p_mean_var` with its score shifted by cond_fn(x, t) (Dhariwal and Nichol 2021, Algorithm 2).

        x_0^ moves by (1 - abar) / sqrt(abar) times cond_fn(x, t).
        """
        x, t = self._checked("condition_score", "x", x, t)
        gradient: Tensor = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        x_0 = p_mean_var["pred_xstart"] + self._at(self._score_weights, t, x) * gradient.to(x.dtype)
        return {**p_mean_var, "pred_xstart": x_0, "mean": self.q_posterior_mean_variance(x_0, x, t)[0]}

    def p_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Kwargs = None,
        *,
        seeds: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Apply one step of ancestral sampling (eq. 13).

        Args:
            model: The model.
            x: x_t, [N, C, ...].
            t: int64 [N].
            clip_denoised: As in `p_mean_variance`.
            denoised_fn: As in `p_mean_variance`.
            cond_fn: Guidance, see `condition_mean`. Called like the model.
            model_kwargs: Further keywords of the model and cond_fn.
            seeds: int64 [N], one per sample. The stream is the number of steps before this one. None: torch's
                generator draws the noise.

        Returns:
            "sample" (x_{t-1}) and "pred_xstart", each like x.
        """
        if denoised_fn is None and cond_fn is None and self._is_plain:
            x_wide, t = self._checked("p_sample", "x", x, t)
            output = self._output(model, x, t, model_kwargs)
            noise = torch.randn_like(x) if seeds is None else None
            plan = self._plan("ddpm", _PREDICTIONS[self.model_mean_type], 1.0 if clip_denoised else None)
            sample, x_0 = self._step(plan, x_wide, output, t, noise, seeds)
            return {"sample": sample, "pred_xstart": x_0}
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        noise = torch.randn_like(x) if seeds is None else None  # before cond_fn, which may draw too
        if cond_fn is not None:
            out["mean"] = self.condition_mean(cond_fn, out, x, t, model_kwargs=model_kwargs)
        mean, variance = out["mean"], _VARIANCES[self.model_var_type]
        if self._learned:
            mean, variance = torch.cat([mean, out["log_variance"]], dim=1), "learned"
        plan = self._plan("ddpm", "previous_sample", None, variance)
        return {"sample": self._step(plan, _wide(x), mean, t, noise, seeds)[0], "pred_xstart": out["pred_xstart"]}

    def ddim_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Kwargs = None,
        eta: float = 0.0,
        *,
        seeds: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Apply one step of DDIM (Song et al. 2021, eq. 12).

        Args:
            model: The model.
            x: x_t, [N, C, ...].
            t: int64 [N].
            clip_denoised: As in `p_mean_variance`.
            denoised_fn: As in `p_mean_variance`.
            cond_fn: Guidance, see `condition_score`. Called like the model.
            model_kwargs: Further keywords of the model and cond_fn.
            eta: Scale of the noise. 0 is deterministic.
            seeds: As in `p_sample`.

        Returns:
            "sample" (x_{t-1}) and "pred_xstart", each like x.
        """
        return self._ddim("ddim", model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, eta, seeds)

    def ddim_reverse_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Kwargs = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        """Apply one step of DDIM towards noise.

        Args:
            model: The model.
            x: x_t, [N, C, ...].
            t: int64 [N].
            clip_denoised: As in `p_mean_variance`.
            denoised_fn: As in `p_mean_variance`.
            model_kwargs: Further keywords of the model.
            eta: Must be 0.

        Returns:
            "sample" (x_{t+1}) and "pred_xstart", each like x.
        """
        if eta != 0:
            raise InvalidValue("ddim_reverse_sample", "eta", "to be 0, as only that path can be walked back", eta)
        return self._ddim("inversion", model, x, t, clip_denoised, denoised_fn, None, model_kwargs, 0.0, None)

    def _ddim(
        self,
        sampler: Literal["ddim", "inversion"],
        model: Model,
        x: Tensor,
        t: Tensor,
        clip: bool,
        denoised_fn: Callable[[Tensor], Tensor] | None,
        cond_fn: Model | None,
        model_kwargs: Kwargs,
        eta: float,
        seeds: Tensor | None,
    ) -> dict[str, Tensor]:
        variance: Variance = "fixed_small"  # for an output without variance channels
        if denoised_fn is None and cond_fn is None and self._is_plain:
            wide, t = self._checked("ddim_sample" if sampler == "ddim" else "ddim_reverse_sample", "x", x, t)
            output = self._output(model, x, t, model_kwargs)
            prediction, bound, variance = _PREDICTIONS[self.model_mean_type], 1.0 if clip else None, self._variance
        else:
            out = self.p_mean_variance(model, x, t, clip, denoised_fn, model_kwargs)
            if cond_fn is not None:
                out = self.condition_score(cond_fn, out, x, t, model_kwargs=model_kwargs)
            wide, output, prediction, bound = _wide(x), out["pred_xstart"], "sample", None
        # For eta = 0 too, where it is not used: the generator goes on as the original's.
        noise = torch.randn_like(x) if seeds is None and sampler == "ddim" else None
        plan = self._plan(sampler, prediction, bound, variance, eta)
        at = t if sampler == "ddim" else self.num_timesteps - 1 - t  # an inversion's rows begin at the other end
        sample, x_0 = self._step(plan, wide, output, at, noise, seeds)
        return {"sample": sample, "pred_xstart": x_0}

    # -------------------------------------------------------------------------------------------------- sampling loops

    def p_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        *,
        seeds: Tensor | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """Yield the result of `p_sample` for t = T-1, ..., 0.

        The next step starts from "sample" in the yielded dict, which the caller may replace.

        Args:
            model: The model.
            shape: (N, C, ...).
            noise: x_T of this shape. None: drawn.
            clip_denoised: As in `p_sample`.
            denoised_fn: As in `p_sample`.
            cond_fn: As in `p_sample`.
            model_kwargs: As in `p_sample`.
            device: None: the device of the noise, or of the model's first parameter.
            progress: Show a progress bar.
            seeds: int64 [N]. Image i depends on seeds[i] alone and equals that of `ddpm_fast.sample` with
                `sampling_plan()`.

        Yields:
            Results of `p_sample`.
        """
        options: dict[str, Any] = {"clip_denoised": clip_denoised, "denoised_fn": denoised_fn, "cond_fn": cond_fn}
        options |= {"model_kwargs": model_kwargs}
        return self._loop("p_sample_loop", self.p_sample, model, shape, noise, device, progress, seeds, options)

    @_arguments_of(p_sample_loop_progressive)
    def p_sample_loop(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the last "sample" of `p_sample_loop_progressive`: x_0, [N, C, ...].

        Arguments are those of `p_sample_loop_progressive`.
        """
        return _last(self.p_sample_loop_progressive(*args, **kwargs))

    def ddim_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        *,
        seeds: Tensor | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """Yield the result of `ddim_sample` for t = T-1, ..., 0.

        Args:
            model: The model.
            shape: (N, C, ...).
            noise: x_T of this shape. None: drawn.
            clip_denoised: As in `ddim_sample`.
            denoised_fn: As in `ddim_sample`.
            cond_fn: As in `ddim_sample`.
            model_kwargs: As in `ddim_sample`.
            device: None: the device of the noise, or of the model's first parameter.
            progress: Show a progress bar.
            eta: As in `ddim_sample`.
            seeds: As in `p_sample_loop_progressive`.

        Yields:
            Results of `ddim_sample`.
        """
        self._plan("ddim", _PREDICTIONS[self.model_mean_type], 1.0 if clip_denoised else None, eta=eta)  # raises for a bad eta
        options: dict[str, Any] = {"clip_denoised": clip_denoised, "denoised_fn": denoised_fn, "cond_fn": cond_fn}
        options |= {"model_kwargs": model_kwargs, "eta": eta}
        return self._loop("ddim_sample_loop", self.ddim_sample, model, shape, noise, device, progress, seeds, options)

    @_arguments_of(ddim_sample_loop_progressive)
    def ddim_sample_loop(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the last "sample" of `ddim_sample_loop_progressive`: x_0, [N, C, ...].

        Arguments are those of `ddim_sample_loop_progressive`.
        """
        return _last(self.ddim_sample_loop_progressive(*args, **kwargs))

    def _loop(
        self,
        op: str,
        step: Callable[..., dict[str, Tensor]],
        model: Model,
        shape: Sequence[int],
        x_t: Tensor | None,
        device: torch.device | str | None,
        progress: bool,
        seeds: Tensor | None,
        options: dict[str, Any],
    ) -> Iterator[dict[str, Tensor]]:
        if not isinstance(shape, (tuple, list)) or len(shape) < 2:
            raise InvalidValue(op, "shape", "to be a tuple or list (N, C, ...)", repr(shape))
        if x_t is not None:
            check_float(op, "noise", x_t)
            if list(x_t.shape) != list(shape):
                raise InvalidValue(op, "noise", f"of the given shape {list(shape)}", list(x_t.shape))
        if device is None:
            parameter = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
            like = x_t if x_t is not None else parameter
            if like is None:
                raise InvalidValue(op, "device or noise", "to be given, as the model has no parameters", "neither")
            device = like.device
        if x_t is not None and x_t.device.type != torch.device(device).type:
            raise InvalidValue(op, "noise", f"on {device}", f"it on {x_t.device}")
        if seeds is not None:
            seeds = checked_seeds(op, seeds, shape[0], torch.device(device))
            options["seeds"] = seeds
        return self._steps(step, model, shape, x_t, torch.device(device), progress, options)

    def _steps(
        self,
        step: Callable[..., dict[str, Tensor]],
        model: Model,
        shape: Sequence[int],
        x_t: Tensor | None,
        device: torch.device,
        progress: bool,
        options: dict[str, Any],
    ) -> Iterator[dict[str, Tensor]]:
        if x_t is None and "seeds" in options:
            x_t = counter_based_noise(shape, options["seeds"], stream=STREAM_X_T, device=device)
        elif x_t is None:
            x_t = torch.randn(*shape, device=device)
        for i in tqdm(range(self.num_timesteps - 1, -1, -1), disable=not progress):
            t = torch.full((shape[0],), i, device=device)
            with torch.no_grad():
                out = step(model, x_t, t, **options)
            yield out
            x_t = out["sample"]

    def sampling_plan(self, *, eta: float | None = None, clip_denoised: bool = True) -> SamplingPlan:
        """Return these steps as a plan for `ddpm_fast.sample`.

        `ddpm_fast.sample` freezes a `UNet` and replays the steps as a CUDA graph.

        Args:
            eta: None: ancestral sampling, as in `p_sample_loop`. A number: DDIM, as in `ddim_sample_loop`.
            clip_denoised: Clamp the predicted x_0 to [-1, 1].

        Raises:
            ValueError: The model expects rescaled timesteps. A plan has integers only.
        """
        if self.rescale_timesteps and self.original_num_steps != 1000:
            raise InvalidValue(
                "sampling_plan",
                "rescale_timesteps",
                "to be False or the model to be trained with 1000 timesteps",
                f"True and {self.original_num_steps}",
            )
        sampler: _Kind = "ddpm" if eta is None else "ddim"
        return self._plan(sampler, _PREDICTIONS[self.model_mean_type], 1.0 if clip_denoised else None, eta=eta or 0.0)

    # ------------------------------------------------------------------------------------------------ training, the bound

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: Kwargs = None,
        noise: Tensor | None = None,
        *,
        seeds: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return each sample's loss at its timestep (eq. 12; Nichol and Dhariwal 2021, section 3.1).

        Args:
            model: The model.
            x_start: x_0, [N, C, ...].
            t: int64 [N].
            model_kwargs: Further keywords of the model.
            noise: As in `q_sample`.
            seeds: As in `q_sample`. The noise is then never stored.

        Returns:
            "loss" [N]. MSE losses also return "mse" and, for a learned variance, "vb".
        """
        x_start, t = self._checked("training_losses", "x_start", x_start, t)
        if noise is None and seeds is None:
            noise = torch.randn_like(x_start)
        check_one_of("training_losses", "noise", noise, "seeds", seeds)
        noise = None if noise is None else _wide(noise)
        x_t = self.q_sample(x_start, t, noise, seeds=seeds)
        if self.loss_type.is_vb():
            loss = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised=False, model_kwargs=model_kwargs)["output"]
            return {"loss": loss * self.num_timesteps if self.loss_type == LossType.RESCALED_KL else loss}
        output = self._output(model, x_t, t, model_kwargs)
        terms = {}
        m = output
        if self._learned:
            m, v = output.split(x_t.shape[1], dim=1)
            # The bound trains the variance; the mean is left to the squared error.
            out = self._p_mean_variance(torch.cat([m.detach(), v], dim=1), x_t, t, clip=False)
            rescaled = self.num_timesteps / 1000 if self.loss_type == LossType.RESCALED_MSE else 1.0
            terms["vb"] = self._bits(out, x_start, x_t, t) * rescaled
        target, prediction = x_start, _PREDICTIONS[self.model_mean_type]
        if prediction == "previous_sample":
            target, prediction = self.q_posterior_mean_variance(x_start, x_t, t)[0], "sample"
        terms["mse"] = denoising_loss(
            m, target, t, self.schedule, prediction=prediction, noise=noise, seeds=seeds, reduction="none"
        )
        terms["loss"] = terms["mse"] + terms["vb"] if self._learned else terms["mse"]
        return terms

    def calc_bpd_loop(
        self,
        model: Model,
        x_start: Tensor,
        clip_denoised: bool = True,
        model_kwargs: Kwargs = None,
        *,
        seeds: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the variational bound in bits per dimension (eq. 9-11).

        See also `ddpm_fast.variational_bound`.

        Args:
            model: The model.
            x_start: Images of 256 grey levels in [-1, 1], [N, C, ...].
            clip_denoised: Clamp the predicted x_0 to [-1, 1].
            model_kwargs: Further keywords of the model.
            seeds: int64 [N]. The stream of timestep t is t. None: torch's generator draws noise for
                t = T-1, ..., 0.

        Returns:
            "total_bpd" and "prior_bpd", [N]. "vb", "xstart_mse" and "mse" (of epsilon), [N, T] with the columns
            t = T-1, ..., 0.
        """
        op = "calc_bpd_loop"
        check_float(op, "x_start", x_start, min_dim=2)
        x_start = _wide(x_start)
        n, device = x_start.shape[0], x_start.device
        if seeds is not None:
            seeds = checked_seeds(op, seeds, n, device)
        columns: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        for i in range(self.num_timesteps - 1, -1, -1):
            t = torch.full((n,), i, device=device)
            if seeds is None:
                epsilon = torch.randn_like(x_start)
            else:
                epsilon = counter_based_noise(x_start.shape, seeds, stream=i, dtype=x_start.dtype, device=device)
            x_t = self.q_sample(x_start, t, epsilon)
            with torch.no_grad():
                out = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
            x_0_mse = (out["pred_xstart"] - x_start).square().flatten(1).mean(dim=1)
            columns["vb"].append(out["output"])
            columns["xstart_mse"].append(x_0_mse)
            # x_t is exact, so an error in x_0^ is one in epsilon^, times sqrt(abar / (1 - abar)).
            columns["mse"].append(x_0_mse * float(self.schedule.snr[i]))
        results = {name: torch.stack(values, dim=1) for name, values in columns.items()}
        prior = prior_bits(x_start, self.schedule).to(x_start.dtype)
        return {"total_bpd": results["vb"].sum(dim=1) + prior, "prior_bpd": prior, **results}

    def _vb_terms_bpd(
        self, model: Model, x_start: Tensor, x_t: Tensor, t: Tensor, clip_denoised: bool = True, model_kwargs: Kwargs = None
    ) -> dict[str, Tensor]:
        out = self.p_mean_variance(model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
        return {"output": self._bits(out, x_start, x_t, t), "pred_xstart": out["pred_xstart"]}

    def _bits(self, out: Mapping[str, Tensor], x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the bound's term of each sample at its timestep, [N]."""
        mean, _, log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        transition = transition_bits(mean - out["mean"], log_variance, out["log_variance"])
        return torch.where(t == 0, reconstruction_bits(x_start, out["mean"], out["log_variance"]), transition)

    # ------------------------------------------------------------------------------------------------------------ parts

    @property
    def _learned(self) -> bool:
        return self.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)

    @property
    def _variance(self) -> Variance:
        return _VARIANCES[self.model_var_type]

    @property
    def _is_plain(self) -> bool:
        """True if `p_mean_variance` is not overridden, so that a step can be one kernel."""
        return getattr(self.p_mean_variance, "__func__", None) is GaussianDiffusion.p_mean_variance

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        """Return the timesteps that the model gets."""
        return t.float() * (1000.0 / self.original_num_steps) if self.rescale_timesteps else t

    def _output(self, model: Model, x: Tensor, t: Tensor, model_kwargs: Kwargs) -> Tensor:
        """Return the model's output [N, C or 2 C, ...] in a dtype that `reverse_step` accepts beside x."""
        output = model(x, self._scale_timesteps(t), **(model_kwargs or {}))
        shape = [x.shape[0], x.shape[1] * (2 if self._learned else 1), *x.shape[2:]]
        if not isinstance(output, Tensor) or list(output.shape) != shape:
            why = f", for model_var_type {self.model_var_type.name}"
            got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise InvalidValue(type(self).__name__, "", f"the model to give a tensor of shape {shape}{why}", got)
        return output if x.dtype != torch.float64 and output.dtype in _HALF else output.to(opmath(x.dtype))

    def _plan(
        self, sampler: _Kind, prediction: Prediction, clip: float | None, variance: Variance | None = None, eta: float = 0.0
    ) -> SamplingPlan:
        """Return a plan of every timestep of this process, in the timesteps of the model's training."""
        variance = variance or self._variance
        key = (sampler, prediction, clip, variance, eta)
        if key not in self._plans:
            steps: dict[str, Any] = {"spacing": self.timestep_map[::-1], "prediction": prediction, "clip": clip}
            learned = variance in ("learned", "learned_range")
            if sampler in ("ddpm", "mean"):
                plan = ddpm_plan(self._original_schedule, variance=variance, **steps)
                plan = plan.mean() if sampler == "mean" else plan
            elif sampler == "inversion":
                plan = ddim_inversion_plan(self._original_schedule, None, learned_variance=learned, **steps)
            else:
                steps |= {"eta": eta, "use_clipped_model_output": True, "learned_variance": learned}
                plan = ddim_plan(self._original_schedule, None, **steps)
            if len(self._plans) == _MAX_PLANS:
                del self._plans[next(iter(self._plans))]
            self._plans[key] = plan
        return self._plans[key]

    @property
    def _original_schedule(self) -> NoiseSchedule:
        """Noise schedule of the model's training."""
        return self.schedule

    def _step(
        self,
        plan: SamplingPlan,
        x: Tensor,
        output: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the new x and x_0^ of the plan's step at timestep t."""
        rows = self.num_timesteps - 1 - t
        noise = None if noise is None else _wide(noise)
        stepped = reverse_step(x, output, rows, plan, noise=noise, seeds=seeds, return_x_0=True)
        assert isinstance(stepped, tuple)
        return stepped

    def _at(self, values: Array, t: Tensor, like: Tensor) -> Tensor:
        """Return values[t] rounded to float32, shaped to broadcast over `like`."""
        key = (id(values), t.device)
        kept = self._tables.get(key)
        if kept is None or kept[0] is not values:  # in a copy of this object an array has another id, or another's
            kept = self._tables[key] = (values, torch.from_numpy(values).to(t.device, torch.float32))
        return per_sample(kept[1][t], like)

    def _checked(self, op: str, name: str, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return x, in float32 or wider, and t, or raise."""
        check_float(op, name, x, min_dim=2)
        if not isinstance(t, Tensor) or t.dtype != torch.int64 or t.shape != x.shape[:1]:
            got = f"{t.dtype} {list(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
            raise InvalidValue(op, "t", f"to be int64 [{x.shape[0]}], one a sample", got)
        check_device(op, "t", t, name, x)
        check_range(op, "t", t, self.num_timesteps)
        return _wide(x), t


class SpacedDiffusion(GaussianDiffusion):
    """A diffusion process on some timesteps of a model's training.

    t = 0..T-1 counts these timesteps. The model and cond_fn get the original ones.

    Args:
        use_timesteps: Timesteps of the training, as from `space_timesteps`.
        **kwargs: Arguments of `GaussianDiffusion` for the process of the training.
    """

    def __init__(self, use_timesteps: Collection[int], *, betas: Any, **kwargs: Any) -> None:
        original = NoiseSchedule.from_betas(torch.as_tensor(np.asarray(betas, dtype=np.float64)))
        self.use_timesteps = set(use_timesteps)
        timesteps = sorted(self.use_timesteps)
        if not timesteps or timesteps[0] < 0 or timesteps[-1] >= original.num_timesteps:
            raise InvalidValue(
                "SpacedDiffusion",
                "use_timesteps",
                f"to be timesteps in 0..{original.num_timesteps - 1}, at least one",
                f"{timesteps[0]}..{timesteps[-1]}" if timesteps else "none",
            )
        abar = original.alpha_bars[timesteps]
        super().__init__(betas=1 - abar / torch.cat([torch.ones(1, dtype=abar.dtype), abar[:-1]]), **kwargs)
        self._schedule_of_training = original
        self.timestep_map, self.original_num_steps = timesteps, original.num_timesteps
        self._maps: dict[torch.device, Tensor] = {}

    @property
    def _original_schedule(self) -> NoiseSchedule:
        return self._schedule_of_training

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        if t.device not in self._maps:
            self._maps[t.device] = torch.tensor(self.timestep_map, device=t.device)
        return super()._scale_timesteps(self._maps[t.device][t])


def create_gaussian_diffusion(
    *,
    steps: int = 1000,
    learn_sigma: bool = False,
    sigma_small: bool = False,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False,
    timestep_respacing: str | Sequence[int] = "",
) -> SpacedDiffusion:
    """Return the process that script_util's flags describe.

    Args:
        steps: T of the model's training.
        learn_sigma: The model has variance channels (LEARNED_RANGE).
        sigma_small: Fixed variance beta~ instead of beta.
        noise_schedule: As in `get_named_beta_schedule`.
        use_kl: Use the loss RESCALED_KL.
        predict_xstart: The model predicts x_0 instead of epsilon.
        rescale_timesteps: As in `GaussianDiffusion`.
        rescale_learned_sigmas: Use the loss RESCALED_MSE.
        timestep_respacing: As in `space_timesteps`. Empty: every timestep.
    """
    caller = "create_gaussian_diffusion"
    check_int(caller, "steps", steps, 1, MAX_TIMESTEPS)
    for name, flag in (
        *(("learn_sigma", learn_sigma), ("sigma_small", sigma_small), ("use_kl", use_kl), ("predict_xstart", predict_xstart)),
        *(("rescale_timesteps", rescale_timesteps), ("rescale_learned_sigmas", rescale_learned_sigmas)),
    ):
        check_type(caller, name, flag, bool)
    loss_type = LossType.RESCALED_MSE if rescale_learned_sigmas else LossType.MSE
    fixed = ModelVarType.FIXED_SMALL if sigma_small else ModelVarType.FIXED_LARGE
    return SpacedDiffusion(
        use_timesteps=space_timesteps(steps, timestep_respacing or [steps]),
        betas=get_named_beta_schedule(noise_schedule, steps),
        model_mean_type=ModelMeanType.START_X if predict_xstart else ModelMeanType.EPSILON,
        model_var_type=ModelVarType.LEARNED_RANGE if learn_sigma else fixed,
        loss_type=LossType.RESCALED_KL if use_kl else loss_type,
        rescale_timesteps=rescale_timesteps,
    )


def _array(values: Tensor) -> Array:
    return np.array(values.numpy(), dtype=np.float64)


def _wide(x: Tensor) -> Tensor:
    """Return x, converted to float32 if it is half precision."""
    return x.float() if x.dtype in _HALF else x


def _last(outs: Iterator[dict[str, Tensor]]) -> Tensor:
    for out in outs:
        final = out
    return final["sample"]
