"""denoising-diffusion-pytorch 2.x on this package's kernels: `GaussianDiffusion`, and its Trainer's files."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..checks import (
    MAX_TIMESTEPS,
    check_choice,
    check_float,
    check_int,
    check_like,
    check_number,
    check_path,
    check_type,
    checked_seeds,
)
from ..dtypes import opmath
from ..errors import InvalidType, InvalidValue
from ..inference import inference_network
from ..models import Model, device_and_dtype, evaluation_mode, model_config
from ..nn.checkpoint import check_weights, load_tensors
from ..ops import denoising_loss, q_sample, reverse_step
from ..ops import noise as draw_noise
from ..plan import SamplingPlan, ddim_plan, ddpm_plan
from ..reference import STREAM_OFFSET, STREAM_Q_SAMPLE, STREAM_X_T
from ..requests import resolve_seeds
from ..schedule import NoiseSchedule

_Prediction = Literal["epsilon", "sample", "v_prediction"]
_PREDICTIONS: Final[dict[str, _Prediction]] = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}
_SCHEDULE_KWARGS: Final = {"linear": (), "cosine": ("s",), "sigmoid": ("start", "end", "tau", "clamp_min")}


class ModelPrediction(NamedTuple):
    """A model's epsilon and x_0, both [N, C, H, W]."""

    pred_noise: Tensor
    pred_x_start: Tensor


class GaussianDiffusion(nn.Module):
    """Training and sampling with the interface and state_dict of denoising-diffusion-pytorch 2.x.

    Calling the module returns the training loss. Images are in [0, 1] outside and [-1, 1] inside, unless
    auto_normalize is False. Draws from torch's global generator (and from Python's, for self-conditioning)
    are the original's, in its order. With `seed` or `seeds` an image's noise depends on its own seed alone.
    It is drawn in the kernels, and the generators do not change.

    Each sampling step is one kernel from the model's output to x_{t-1} (`reverse_step`). Memory is constant.
    The model runs in eval mode. A `UNet` of this package runs in its inference form, in its own dtype.

    Args:
        model: Called as model(x_t, t, x_self_cond) with x_t [N, C, H, W], t int64 [N] and x_self_cond like
            x_t or None. It has equal attributes `channels` and `out_dim`, and optionally
            `self_condition`, like the original's `Unet`. Or it has a config with in_channels and
            out_channels, like a `UNet` of this package or of diffusers.
        image_size: H = W, or (H, W).
        timesteps: T.
        sampling_timesteps: Steps S of `sample`. S < T is DDIM. None: T, ancestral sampling (Ho et al. 2020,
            Algorithm 2).
        objective: What the model predicts: "pred_noise", "pred_x0" or "pred_v" (Salimans and Ho 2022).
        beta_schedule: "linear" with the ends times 1000 / T, "cosine" (Nichol and Dhariwal 2021) or "sigmoid"
            (Jabri et al. 2022).
        schedule_fn_kwargs: s for "cosine". start, end and tau for "sigmoid"; clamp_min is accepted and
            ignored, as in the original.
        ddim_sampling_eta: Scale of the noise in DDIM, see `ddim_plan`. 0 is deterministic.
        auto_normalize: Map images from [0, 1] to [-1, 1] and back.
        offset_noise_strength: Scale of an additional normal per channel in training noise, at least 0.
        min_snr_loss_weight: Weight losses as if the signal-to-noise ratio were at most min_snr_gamma (Hang et
            al. 2023).
        min_snr_gamma: Bound on the signal-to-noise ratio.
        immiscible: Assign noise to nearby images of the batch (Li et al. 2024). Needs SciPy.

    Attributes:
        schedule: The `NoiseSchedule`. Loading a state_dict replaces it.
        betas: float32 [T]. This and 12 more buffers, up to `loss_weight`, have the original's names.

    Raises:
        ValueError: An argument has an unsupported value, or a beta is outside (0, 1].
        TypeError: An argument has an unsupported type.
    """

    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    log_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor
    loss_weight: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        image_size: int | Sequence[int],
        timesteps: int = 1000,
        sampling_timesteps: int | None = None,
        objective: Literal["pred_noise", "pred_x0", "pred_v"] = "pred_v",
        beta_schedule: Literal["linear", "cosine", "sigmoid"] = "sigmoid",
        schedule_fn_kwargs: Mapping[str, float] | None = None,
        ddim_sampling_eta: float = 0.0,
        auto_normalize: bool = True,
        offset_noise_strength: float = 0.0,
        min_snr_loss_weight: bool = False,
        min_snr_gamma: float = 5,
        immiscible: bool = False,
    ) -> None:
        super().__init__()
        self.channels, self.self_condition = _checked_model(model)
        self.image_size = _checked_size(image_size)
        caller = "GaussianDiffusion"
        check_int(caller, "timesteps", timesteps, 1, MAX_TIMESTEPS)
        check_int(caller, "sampling_timesteps", sampling_timesteps, 1, timesteps, optional=True)
        sampling_timesteps = timesteps if sampling_timesteps is None else sampling_timesteps
        check_choice(caller, "objective", objective, _PREDICTIONS)
        check_number(caller, "ddim_sampling_eta", ddim_sampling_eta, 0, finite=True)
        check_number(caller, "offset_noise_strength", offset_noise_strength, 0, finite=True)
        check_number(caller, "min_snr_gamma", min_snr_gamma, above=0)
        check_type(caller, "schedule_fn_kwargs", schedule_fn_kwargs, Mapping, optional=True)
        for name, flag in (
            *(("auto_normalize", auto_normalize), ("min_snr_loss_weight", min_snr_loss_weight)),
            ("immiscible", immiscible),
        ):
            check_type(caller, name, flag, bool)

        self.model = model
        self.objective = objective
        self.num_timesteps = timesteps
        self.sampling_timesteps, self.ddim_sampling_eta = sampling_timesteps, ddim_sampling_eta
        self.is_ddim_sampling = sampling_timesteps < timesteps
        self.auto_normalize = auto_normalize
        self.offset_noise_strength = offset_noise_strength
        self.immiscible = immiscible
        self.schedule = _schedule(beta_schedule, timesteps, schedule_fn_kwargs or {})
        for name, buffer in _buffers(self.schedule).items():
            self.register_buffer(name, buffer.to(torch.float32))
        gamma = min_snr_gamma if min_snr_loss_weight else math.inf
        self.register_buffer("loss_weight", _loss_weight(self.schedule, objective, gamma).to(torch.float32))
        self.plan  # noqa: B018  # raises where the schedule and the objective, or eta, do not go together

    @property
    def device(self) -> torch.device:
        """Device of the buffers."""
        return self.betas.device

    @property
    def plan(self) -> SamplingPlan:
        """Plan of `sample` for the current sampling_timesteps and the like. `ddpm_fast.sample` accepts it."""
        return self._ddim_plan() if self.is_ddim_sampling else self._ddpm_plan()

    def _ddpm_plan(self) -> SamplingPlan:
        return _ancestral(self.schedule, _PREDICTIONS[self.objective])

    def _ddim_plan(self) -> SamplingPlan:
        return _implicit(self.schedule, self.sampling_timesteps, _PREDICTIONS[self.objective], self.ddim_sampling_eta)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        betas = state_dict.get(prefix + "betas", self.betas).detach().cpu()  # those of a module in bfloat16 are rounded to it
        known = self.schedule.betas.to(betas.dtype)
        if betas.shape == known.shape and not torch.allclose(betas, known, rtol=1e-6, atol=0):  # no other roundings
            try:
                self.schedule = NoiseSchedule.from_betas(betas.double())
            except ValueError as error:
                args[-1].append(str(error))  # the errors that load_state_dict raises together

    # -------------------------------------------------------------------------------------------------------- formulas

    def normalize(self, img: Tensor) -> Tensor:
        """Map [0, 1] to [-1, 1] with auto_normalize, else return `img`."""
        return img * 2 - 1 if self.auto_normalize else img

    def unnormalize(self, t: Tensor) -> Tensor:
        """Map [-1, 1] to [0, 1] with auto_normalize, else return `t`."""
        return (t + 1) * 0.5 if self.auto_normalize else t

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return x_0 = (x_t - sqrt(1 - abar_t) epsilon) / sqrt(abar_t) (eq. 3). t is int64 [N]."""
        return _at(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t - _at(self.sqrt_recipm1_alphas_cumprod, t, x_t) * noise

    def predict_noise_from_start(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """Return epsilon = (x_t - sqrt(abar_t) x_0) / sqrt(1 - abar_t) (eq. 3). t is int64 [N]."""
        return (_at(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t - x0) / _at(self.sqrt_recipm1_alphas_cumprod, t, x_t)

    def predict_v(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return v = sqrt(abar_t) epsilon - sqrt(1 - abar_t) x_0 (Salimans and Ho 2022, appendix D)."""
        signal, sigma = (_at(table, t, x_start) for table in (self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod))
        return signal * noise - sigma * x_start

    def predict_start_from_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """Return x_0 = sqrt(abar_t) x_t - sqrt(1 - abar_t) v. t is int64 [N]."""
        return _at(self.sqrt_alphas_cumprod, t, x_t) * x_t - _at(self.sqrt_one_minus_alphas_cumprod, t, x_t) * v

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, variance and log variance of q(x_{t-1} | x_t, x_0) (eq. 6-8).

        Variance and log variance are [N, 1, 1, 1].
        """
        mean = _at(self.posterior_mean_coef1, t, x_t) * x_start + _at(self.posterior_mean_coef2, t, x_t) * x_t
        return mean, _at(self.posterior_variance, t, x_t), _at(self.posterior_log_variance_clipped, t, x_t)

    def model_predictions(
        self,
        x: Tensor,
        t: Tensor,
        x_self_cond: Tensor | None = None,
        clip_x_start: bool = False,
        rederive_pred_noise: bool = False,
    ) -> ModelPrediction:
        """Return the model's epsilon and x_0 for x_t.

        Args:
            x: x_t, [N, C, H, W].
            t: int64 [N].
            x_self_cond: x_0 for self-conditioning, like x, or None.
            clip_x_start: Clamp x_0 to [-1, 1].
            rederive_pred_noise: Derive epsilon from the clamped x_0 for "pred_noise" too, as for the other
                objectives.
        """
        output = _evaluate(self.model, x, t, x_self_cond)
        if self.objective == "pred_noise":
            x_start = self.predict_start_from_noise(x, t, output)
        else:
            x_start = output if self.objective == "pred_x0" else self.predict_start_from_v(x, t, output)
        if clip_x_start:
            x_start = x_start.clamp(-1, 1)
        if self.objective == "pred_noise" and not (clip_x_start and rederive_pred_noise):
            return ModelPrediction(output, x_start)
        return ModelPrediction(self.predict_noise_from_start(x, t, x_start), x_start)

    def p_mean_variance(
        self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None, clip_denoised: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return mean, variance and log variance of p(x_{t-1} | x_t), and x_0.

        Args:
            x: x_t, [N, C, H, W].
            t: int64 [N].
            x_self_cond: x_0 for self-conditioning, like x, or None.
            clip_denoised: Clamp x_0 to [-1, 1].
        """
        x_start = self.model_predictions(x, t, x_self_cond, clip_x_start=clip_denoised).pred_x_start
        return *self.q_posterior(x_start, x, t), x_start

    # -------------------------------------------------------------------------------------------------------- sampling

    @torch.no_grad()
    def p_sample(
        self, x: Tensor, t: int, x_self_cond: Tensor | None = None, *, seeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Apply one step of ancestral sampling (eq. 13).

        Args:
            x: x_t, [N, C, H, W].
            t: 0..T-1.
            x_self_cond: x_0 for self-conditioning, like x, or None.
            seeds: int64 [N]. None: torch's global generator, used if t > 0.

        Returns:
            x_{t-1}, and x_0 in [-1, 1].
        """
        check_float("p_sample", "x", x, min_dim=4)
        check_int("p_sample", "t", t, 0, self.num_timesteps - 1)
        if x_self_cond is not None:
            check_like("p_sample", "x_self_cond", x_self_cond, "x", x)
        if seeds is not None:
            seeds = checked_seeds("p_sample", seeds, x.shape[0], x.device)
        stepped = self._step(self.model, x, self.num_timesteps - 1 - t, self._ddpm_plan(), x_self_cond, seeds, return_x_0=True)
        assert isinstance(stepped, tuple)
        return stepped

    def p_sample_loop(
        self,
        shape: Sequence[int],
        return_all_timesteps: bool = False,
        *,
        seed: int | Tensor | None = None,
        progress: bool = True,
    ) -> Tensor:
        """Draw images by ancestral sampling in T steps (Ho et al. 2020, Algorithm 2).

        Args:
            shape: (N, C, H, W).
            return_all_timesteps: Also return x_T and the state after every step.
            seed: An int, or int64 [N] with a seed per image. None: torch's global generator.
            progress: Show a progress bar.

        Returns:
            [N, C, H, W], or [N, S + 1, C, H, W] from x_T on with return_all_timesteps. It is on `device`, in
            float32 (float64 for a float64 model), in [0, 1] with auto_normalize, else in [-1, 1]. Noisy
            states exceed this range.
        """
        return self._sample("p_sample_loop", self._ddpm_plan(), shape, return_all_timesteps, seed, progress)

    def ddim_sample(
        self,
        shape: Sequence[int],
        return_all_timesteps: bool = False,
        *,
        seed: int | Tensor | None = None,
        progress: bool = True,
    ) -> Tensor:
        """Draw images by DDIM (Song et al. 2021) in sampling_timesteps steps.

        epsilon is derived from the clamped x_0. Arguments and results are those of `p_sample_loop`.
        """
        return self._sample("ddim_sample", self._ddim_plan(), shape, return_all_timesteps, seed, progress)

    def sample(
        self,
        batch_size: int = 16,
        return_all_timesteps: bool = False,
        *,
        seed: int | Tensor | None = None,
        progress: bool = True,
    ) -> Tensor:
        """Draw images by `ddim_sample` if sampling_timesteps < T, else by `p_sample_loop`.

        With a seed, image i is that of `ddpm_fast.sample(model, diffusion.plan, batch_size, seed=seed)`,
        mapped to [0, 1].

        Args:
            batch_size: Number of images N.
            return_all_timesteps: As in `p_sample_loop`.
            seed: As in `p_sample_loop`.
            progress: Show a progress bar.
        """
        check_int("sample", "batch_size", batch_size, 1)
        loop = self.ddim_sample if self.is_ddim_sampling else self.p_sample_loop
        return loop((batch_size, self.channels, *self.image_size), return_all_timesteps, seed=seed, progress=progress)

    @torch.no_grad()
    def interpolate(
        self,
        x1: Tensor,
        x2: Tensor,
        t: int | None = None,
        lam: float | Tensor = 0.5,
        *,
        seed: int | Tensor | None = None,
        progress: bool = True,
    ) -> Tensor:
        """Interpolate two batches: noise both to t, mix them, and denoise by ancestral sampling.

        The first step is at t - 1, as in the original.

        Args:
            x1: [N, C, H, W] in [-1, 1]. This method does not normalize, as in the original.
            x2: Like x1.
            t: 0..T-1. None: T - 1.
            lam: Share of x2: a number, or a tensor that broadcasts, such as [N, 1, 1, 1].
            seed: As in `p_sample_loop`. x1 and x2 get different noise.
            progress: Show a progress bar.

        Returns:
            [N, C, H, W] in [-1, 1].
        """
        where = "interpolate"
        check_float(where, "x1", x1, min_dim=4)
        check_like(where, "x2", x2, "x1", x1)
        t = self.num_timesteps - 1 if t is None else t
        check_int(where, "t", t, 0, self.num_timesteps - 1)
        if not isinstance(lam, Tensor):
            check_number(where, "lam", lam)
        seeds = None if seed is None else resolve_seeds(where, seed, len(x1)).to(x1.device)
        noise_2 = None if seeds is None else draw_noise(x2.shape, seeds, stream=STREAM_X_T, dtype=x2.dtype)
        times = torch.full((len(x1),), t, device=x1.device)
        x_t_1, x_t_2 = self.q_sample(x1, times, seeds=seeds), self.q_sample(x2, times, noise_2)
        x_t = (1 - lam) * x_t_1 + lam * x_t_2
        return self._reverse(self._ddpm_plan(), x_t, seeds, progress, first=self.num_timesteps - t)

    @torch.no_grad()
    def _sample(
        self,
        where: str,
        plan: SamplingPlan,
        shape: Sequence[int],
        return_all_timesteps: bool,
        seed: int | Tensor | None,
        progress: bool,
    ) -> Tensor:
        wanted = f"shape to be (N, {self.channels}, H, W), positive integers"
        ints = isinstance(shape, Sequence) and len(shape) == 4 and all(_is_int(size) and size >= 1 for size in shape)
        _check(ints and shape[1] == self.channels, wanted, shape, where)
        shape = tuple(shape)
        seeds = None if seed is None else resolve_seeds(where, seed, shape[0]).to(self.device)
        _, dtype = device_and_dtype(self.model)
        dtype = opmath(dtype)
        if seeds is None:
            x_t = torch.randn(shape, device=self.device, dtype=dtype)
        else:
            x_t = draw_noise(shape, seeds, stream=STREAM_X_T, dtype=dtype)
        states = None
        if return_all_timesteps:
            states = x_t.new_empty((shape[0], plan.num_steps + 1, *shape[1:]))
        x_0 = self._reverse(plan, x_t, seeds, progress, states=states)
        images = x_0 if states is None else states
        return images.add_(1).mul_(0.5) if self.auto_normalize else images

    def _reverse(
        self,
        plan: SamplingPlan,
        x_t: Tensor,
        seeds: Tensor | None,
        progress: bool,
        *,
        first: int = 0,
        states: Tensor | None = None,
    ) -> Tensor:
        """Advance x_t in place through the plan from row `first` on.

        `states` gets x_t before the first step and after every step.
        """
        if states is not None:
            states[:, 0] = x_t
        _, dtype = device_and_dtype(self.model)
        network = inference_network("GaussianDiffusion", self.model, x_t.device, dtype, self.num_timesteps)
        x_0 = None  # from the step before
        with evaluation_mode(network):
            for step in tqdm(range(first, plan.num_steps), desc="sampling", unit="step", disable=not progress):
                stepped = self._step(network, x_t, step, plan, x_0, seeds, return_x_0=self.self_condition, out=x_t)
                if isinstance(stepped, tuple):
                    x_0 = stepped[1]
                if states is not None:
                    states[:, step + 1] = x_t
        return x_t

    def _step(
        self,
        network: Model,
        x_t: Tensor,
        step: int,
        plan: SamplingPlan,
        x_self_cond: Tensor | None,
        seeds: Tensor | None,
        *,
        return_x_0: bool,
        out: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        t = torch.full((len(x_t),), int(plan.timesteps[step]), device=x_t.device)
        output = _evaluate(network, x_t, t, x_self_cond)
        z = None
        if seeds is None:
            # The last step draws nothing. Others do even where eta is 0: the generator ends in the state the original leaves.
            z = torch.randn_like(x_t) if step < plan.num_steps - 1 else torch.zeros_like(x_t)
        return reverse_step(x_t, output, step, plan, noise=z, seeds=seeds, return_x_0=return_x_0, out=out)

    # -------------------------------------------------------------------------------------------------------- training

    @torch.no_grad()
    def noise_assignment(self, x_start: Tensor, noise: Tensor) -> Tensor:
        """Return the permutation of noise with the least sum of distances to the images (Li et al. 2024).

        Args:
            x_start: Images, [N, C, H, W].
            noise: Like x_start.

        Returns:
            int64 [N].

        Raises:
            ImportError: SciPy is missing.
        """
        try:
            from scipy.optimize import linear_sum_assignment
        except ImportError as error:
            raise ImportError("noise_assignment: immiscible noise needs SciPy (pip install scipy)") from error
        check_float("noise_assignment", "x_start", x_start)
        check_like("noise_assignment", "noise", noise, "x_start", x_start)
        distances = torch.cdist(x_start.flatten(1), noise.flatten(1))
        return torch.from_numpy(linear_sum_assignment(distances.cpu().numpy())[1]).to(x_start.device)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None, *, seeds: Tensor | None = None) -> Tensor:
        """Draw x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) epsilon (eq. 3). Arguments are those of `p_losses`."""
        noise, seeds = self._epsilon("q_sample", x_start, noise, seeds, offset_strength=0)
        return q_sample(x_start, t, self.schedule, noise=noise, seeds=seeds)

    def p_losses(
        self,
        x_start: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        offset_noise_strength: float | None = None,
        loss_reduction: Literal["mean", "none"] = "mean",
        *,
        seeds: Tensor | None = None,
    ) -> Tensor:
        """Return the loss, weighted by `loss_weight` (eq. 12 and its x_0 and v forms).

        With self-conditioning, half of the calls first make the model predict the x_0 that it then gets.
        Python's `random` selects these calls.

        Args:
            x_start: [N, C, H, W], floating, in [-1, 1].
            t: int64 [N].
            noise: epsilon, like x_start. Without noise and seeds, torch's global generator draws it.
            offset_noise_strength: As in the constructor. None: the constructor's value.
            loss_reduction: "mean", or "none" for [N].
            seeds: int64 [N]. The forward and backward kernels draw epsilon. It is stored only if noise is
                assigned (immiscible) or offset.
        """
        where = "p_losses"
        check_float(where, "x_start", x_start, min_dim=4)
        times = t.shape == x_start.shape[:1] if isinstance(t, Tensor) else False
        _check(
            times, f"t to be an int64 tensor of shape [{len(x_start)}]", list(t.shape) if isinstance(t, Tensor) else t, where
        )
        check_choice(where, "loss_reduction", loss_reduction, ("mean", "none"))
        strength = self.offset_noise_strength if offset_noise_strength is None else offset_noise_strength
        check_number(where, "offset_noise_strength", strength, 0, finite=True)
        noise, seeds = self._epsilon(where, x_start, noise, seeds, strength)
        x_t = q_sample(x_start, t, self.schedule, noise=noise, seeds=seeds)
        x_self_cond = None
        if self.self_condition and random.random() < 0.5:
            with torch.no_grad():
                x_self_cond = self.model_predictions(x_t, t).pred_x_start
        return denoising_loss(
            _evaluate(self.model, x_t, t, x_self_cond),
            x_start,
            t,
            self.schedule,
            prediction=_PREDICTIONS[self.objective],
            noise=noise,
            seeds=seeds,
            weight=self.loss_weight[t],
            reduction=loss_reduction,
        )

    def random_times(self, batch_size: int) -> Tensor:
        """Draw timesteps uniform in 0..T-1 from torch's global generator, int64 [batch_size]."""
        return torch.randint(0, self.num_timesteps, (batch_size,), device=self.device)

    def forward(
        self,
        img: Tensor,
        noise: Tensor | None = None,
        offset_noise_strength: float | None = None,
        *,
        times: Tensor | None = None,
        loss_reduction: Literal["mean", "none"] = "mean",
        seeds: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of a batch of images. See `p_losses`.

        Args:
            img: [N, C, H, W], floating, in [0, 1] with auto_normalize.
            noise: As in `p_losses`.
            offset_noise_strength: As in `p_losses`.
            times: int64 [N]. None: `random_times`.
            loss_reduction: As in `p_losses`.
            seeds: As in `p_losses`.
        """
        where = "GaussianDiffusion"
        check_float(where, "img", img, min_dim=4)
        if tuple(img.shape[1:]) != (self.channels, *self.image_size):
            wanted = ", ".join(str(size) for size in (self.channels, *self.image_size))
            raise InvalidValue(where, "img", f"to have shape [N, {wanted}]", list(img.shape))
        times = self.random_times(len(img)) if times is None else times
        return self.p_losses(self.normalize(img), times, noise, offset_noise_strength, loss_reduction, seeds=seeds)

    def _epsilon(
        self, where: str, x_start: Tensor, noise: Tensor | None, seeds: Tensor | None, offset_strength: float
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return noise and seeds for the training ops: seeds if the kernels can draw all of the noise."""
        if noise is not None and seeds is not None:
            raise InvalidValue(where, "", "at most one of noise and seeds", "both")
        if seeds is not None:
            seeds = checked_seeds(where, seeds, len(x_start), x_start.device)
            if offset_strength == 0 and not self.immiscible:
                return None, seeds
            noise = draw_noise(x_start.shape, seeds, stream=STREAM_Q_SAMPLE, dtype=x_start.dtype)
        elif noise is None:
            noise = torch.randn_like(x_start)
        check_like(where, "noise", noise, "x_start", x_start)
        if offset_strength > 0:
            shape, dtype = x_start.shape[:2], x_start.dtype
            if seeds is None:
                offset = torch.randn(shape, device=x_start.device, dtype=dtype)
            else:
                offset = draw_noise(shape, seeds, stream=STREAM_OFFSET, dtype=dtype)
            noise = noise + offset_strength * offset[:, :, None, None]
        if self.immiscible:
            noise = noise[self.noise_assignment(x_start, noise)]
        return noise, None


def load_checkpoint(
    diffusion: GaussianDiffusion, path: str | os.PathLike[str], *, weights: Literal["ema", "model"] = "ema"
) -> int:
    """Load a checkpoint of denoising-diffusion-pytorch's Trainer (model-N.pt) without running its code.

    Args:
        diffusion: Process with a model like the trained one. It is not modified if loading fails.
        path: The file.
        weights: "ema", the weights' moving average, with which the Trainer samples; or "model", the weights.

    Returns:
        The step of training.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged, needs pickle, is no checkpoint of the Trainer, or does not fit.
    """
    where = "load_checkpoint"
    check_path(where, "path", path)
    check_choice(where, "weights", weights, ("ema", "model"))
    if not isinstance(diffusion, GaussianDiffusion):
        raise InvalidType(where, "diffusion", "to be a GaussianDiffusion of this package", type(diffusion).__name__)
    checkpoint = load_tensors(where, path)
    content = checkpoint if isinstance(checkpoint, dict) else {}
    step, state = content.get("step"), content.get(weights)
    if not isinstance(step, int) or not isinstance(state, dict):
        got = f"one with {', '.join(map(str, content)) or 'no names'}"
        raise InvalidValue(where, repr(os.fspath(path)), "to be a Trainer's checkpoint, with step, model and ema", got)
    if weights == "ema":
        prefix = "ema_model."
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    check_weights(where, path, "the model", diffusion.state_dict(), state)
    diffusion.load_state_dict(state)
    return step


# ---------------------------------------------------------------------------------------------------------------- details


def _at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Return table[t], [N], shaped to broadcast over `like` [N, ...]."""
    return table[t].reshape(-1, *[1] * (like.dim() - 1))


def _evaluate(model: Model, x_t: Tensor, t: Tensor, x_self_cond: Tensor | None) -> Tensor:
    """Return the model's output as a tensor. diffusers' models return it as `.sample`."""
    _, dtype = device_and_dtype(model)
    output: Any = model(x_t.to(dtype), t, None if x_self_cond is None else x_self_cond.to(dtype))
    tensor: Tensor = getattr(output, "sample", output)
    if tensor.shape != x_t.shape:
        raise InvalidValue(
            "GaussianDiffusion", "", f"the model's output to have the shape of x_t, {list(x_t.shape)}", list(tensor.shape)
        )
    return tensor


def _schedule(name: str, timesteps: int, kwargs: Mapping[str, float]) -> NoiseSchedule:
    check_choice("GaussianDiffusion", "beta_schedule", name, _SCHEDULE_KWARGS)
    unknown = sorted(kwargs.keys() - set(_SCHEDULE_KWARGS[name]))
    known = ", ".join(_SCHEDULE_KWARGS[name]) or "nothing"
    _check(not unknown, f'schedule_fn_kwargs to have {known} for beta_schedule "{name}"', ", ".join(unknown))
    for key, value in kwargs.items():
        check_number("GaussianDiffusion", f"schedule_fn_kwargs[{key!r}]", value)
    given = {key: value for key, value in kwargs.items() if key != "clamp_min"}
    if name == "linear":
        return NoiseSchedule.linear(timesteps, scale_to_num_timesteps=True)
    if name == "cosine":
        return NoiseSchedule.cosine(timesteps, **given)
    return NoiseSchedule.sigmoid(timesteps, **given, float32_ends=True)


def _buffers(schedule: NoiseSchedule) -> dict[str, Tensor]:
    """Return the schedule's buffers, float64 [T], by the original's names."""
    return {
        "betas": schedule.betas,
        "alphas_cumprod": schedule.alpha_bars,
        "alphas_cumprod_prev": schedule.alpha_bars_prev,
        "sqrt_alphas_cumprod": schedule.sqrt_alpha_bars,
        "sqrt_one_minus_alphas_cumprod": schedule.sqrt_one_minus_alpha_bars,
        "log_one_minus_alphas_cumprod": (1 - schedule.alpha_bars).log(),
        "sqrt_recip_alphas_cumprod": (1 / schedule.alpha_bars).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / schedule.alpha_bars - 1).sqrt(),
        "posterior_variance": schedule.posterior_variance,
        "posterior_log_variance_clipped": schedule.posterior_variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": schedule.posterior_mean_coef_x_0,
        "posterior_mean_coef2": schedule.posterior_mean_coef_x_t,
    }


def _loss_weight(schedule: NoiseSchedule, objective: str, gamma: float) -> Tensor:
    """Return the weight of each timestep's loss: for "pred_x0" min(SNR, gamma) (Hang et al. 2023)."""
    clamped = schedule.snr.clamp(max=gamma)
    if objective == "pred_noise":
        return (gamma / schedule.snr).clamp(max=1)  # min(snr, gamma) / snr, also where snr is 0
    return clamped if objective == "pred_x0" else clamped / (schedule.snr + 1)


@lru_cache(maxsize=8)
def _ancestral(schedule: NoiseSchedule, prediction: _Prediction) -> SamplingPlan:
    return ddpm_plan(schedule, prediction=prediction)


@lru_cache(maxsize=8)
def _implicit(schedule: NoiseSchedule, num_steps: int, prediction: _Prediction, eta: float) -> SamplingPlan:
    # The original's timesteps, to the roundings of their float32.
    edges = torch.linspace(-1, schedule.num_timesteps - 1, num_steps + 1, dtype=torch.float32).to(torch.int64)
    spacing = edges[1:].flip(0).tolist()
    return ddim_plan(schedule, None, spacing=spacing, prediction=prediction, eta=eta, use_clipped_model_output=True)


def _checked_model(model: nn.Module) -> tuple[int, bool]:
    """Return the model's image channels, and whether it uses self-conditioning, or raise."""
    if not isinstance(model, nn.Module):
        raise InvalidType("GaussianDiffusion", "model", "to be a torch.nn.Module", type(model).__name__)
    config = model_config(model)
    channels: Any = getattr(model, "channels", config.get("in_channels"))
    out_dim = getattr(model, "out_dim", config.get("out_channels"))
    wanted = "model to have the attributes channels and out_dim, or a config with in_channels and out_channels"
    _check(_is_int(channels) and _is_int(out_dim), wanted, type(model).__name__)
    _check(channels == out_dim, "a model with as many channels out as in", f"channels {channels}, out_dim {out_dim}")
    fourier = getattr(model, "random_or_learned_sinusoidal_cond", False)
    _check(not fourier, "a model without random or learned sinusoidal embeddings of t", "random_or_learned_sinusoidal_cond")
    _check(config.get("num_class_embeds") is None, "a model without classes", "num_class_embeds in its config")
    return channels, bool(getattr(model, "self_condition", False))


def _checked_size(size: int | Sequence[int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, Sequence) else ()
    fits = len(pair) == 2 and all(_is_int(side) and side >= 1 for side in pair)
    _check(fits, "image_size to be a positive integer or two, (H, W)", size)
    return pair[0], pair[1]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(holds: bool, wanted: str, got: object, where: str = "GaussianDiffusion") -> None:
    if not holds:
        raise InvalidValue(where, "", wanted, repr(got))
