"""The variational bound, term by term (eq. 9-11, Ho et al. 2020, eq. 5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from .. import ops
from ..checks import (
    check_callable,
    check_choice,
    check_dtype,
    check_int,
    check_map,
    check_number,
    check_type,
    computing_device,
)
from ..dtypes import opmath
from ..errors import InvalidValue, expect
from ..inference import inference_network
from ..inference.model import Model, device_and_dtype, evaluation_mode, model_config, predict
from ..plan import COLUMNS, VARIANCE_TYPES, Prediction, Variance, ddpm_plan
from ..reference import ranged_log_variance
from ..sampling.arguments import (
    ClassLabels,
    check_condition,
    check_image_shape,
    check_model,
    check_takes_labels,
    image_channels,
    resolve_labels,
    resolve_seeds,
)
from ..sampling.progress import progress_bar
from ..schedule import NoiseSchedule

_BIN = 2 / 255  # width of one of the 256 grey levels in [-1, 1]


@dataclass(frozen=True, repr=False)
class VariationalBound:
    """Upper bound on -log p(x_0) in bits per dimension, term by term.

        -log p(x_0) <= L_T + L_{T-1} + ... + L_1 + L_0

    Tensors are float64 on the CPU, one row per image.

    Attributes:
        prior: L_T [N], KL(q(x_T | x_0) || N(0, I)). It depends on the schedule and x_0 only.
        terms: [N, T]. Column t is L_t. Column 0 is the reconstruction -log p(x_0 | x_1).
        x_0_mse: [N, T]. Mean squared error of the (clipped) x_0^ at timestep t of the code.
        epsilon_mse: [N, T]. Mean squared error of the epsilon^ that belongs to x_0^, SNR_t x_0_mse.
    """

    prior: Tensor
    terms: Tensor
    x_0_mse: Tensor
    epsilon_mse: Tensor

    def __repr__(self) -> str:
        names = ("total", "prior", "transitions", "reconstruction")
        means = ", ".join(f"{name} {getattr(self, name).mean():.4f}" for name in names)
        return f"VariationalBound(N = {len(self.prior)}, T = {self.terms.shape[1]}; mean bits per dimension: {means})"

    @property
    def transitions(self) -> Tensor:
        """Sum of the transition terms, L_{T-1} + ... + L_1, [N]."""
        return self.terms[:, 1:].sum(dim=1)

    @property
    def reconstruction(self) -> Tensor:
        """Reconstruction term L_0, [N]."""
        return self.terms[:, 0]

    @property
    def total(self) -> Tensor:
        """The bound, [N]."""
        return self.prior + self.terms.sum(dim=1)


def variational_bound(
    model: Model,
    x_0: Tensor,
    schedule: NoiseSchedule,
    *,
    prediction: Prediction = "epsilon",
    variance: Variance = "fixed_small",
    clip: float | None = 1.0,
    class_labels: ClassLabels = None,
    condition: Tensor | None = None,
    seed: int | Tensor = 0,
    noise: Callable[[int], Tensor] | None = None,
    exact_cdf: bool = False,
    batch_size: int | None = None,
    progress: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> VariationalBound:
    """Compute the variational bound in bits per dimension on test images.

    This takes one network evaluation per image and timestep. Each term is estimated from one independent
    draw of x_t. At t = 0 beta~ is 0, and its log variance is replaced by that of t = 1, as in the code of
    Ho et al. This applies to "fixed_small", "fixed_large" and the lower end of "learned_range". Source:
    derivation eq. 9-11 (Ho et al. 2020, eq. 5).

    Args:
        model: Network, called as in `sample`.
        x_0: Images of 256 grey levels mapped to [-1, 1], floating [N, C, H, W].
        schedule: Noise schedule of the training.
        prediction: Meaning of the model's output, as in `ddpm_plan`.
        variance: Variance of the reverse steps, as in `ddpm_plan`.
        clip: Bound on x_0^, or None, as in `ddpm_plan`.
        class_labels: As in `sample`.
        condition: As in `sample`.
        seed: An int, or int64 [N] with a seed per image. The stream of timestep t is t.
        noise: Replaces `seed`. noise(t) returns epsilon of timestep t, shaped like x_0. It is called once
            for each t = T-1, ..., 0.
        exact_cdf: Use the exact normal distribution function in L_0. False: its tanh approximation, on
            which published figures are based.
        batch_size: Images per network evaluation. None: all.
        progress: Show a progress bar.
        device: Device to run on. None: the model's device.
        dtype: Dtype of the network. None: the model's dtype, on a GPU too. Everything after the network is
            float64.

    Returns:
        Every term of every image.

    Raises:
        ValueError: An argument is out of range or does not fit the model. Checked before any computation.
        TypeError: An argument has an unsupported type.
    """
    caller = "variational_bound"
    check_model(caller, model)
    check_map(caller, "x_0", x_0)
    expect(x_0.numel() > 0 and not x_0.is_meta, caller, "x_0", "to have values", f"shape {list(x_0.shape)} on {x_0.device}")
    if not x_0.abs().max() <= 1:  # NaN included
        raise InvalidValue(caller, "x_0", "in [-1, 1]", f"values from {x_0.min():.4g} to {x_0.max():.4g}")
    check_type(caller, "schedule", schedule, NoiseSchedule)
    check_choice(caller, "prediction", prediction, get_args(Prediction))
    check_choice(caller, "variance", variance, VARIANCE_TYPES)
    check_number(caller, "clip", clip, above=0, optional=True)
    check_callable(caller, "noise", noise)
    check_type(caller, "exact_cdf", exact_cdf, bool)
    check_type(caller, "progress", progress, bool)
    check_dtype(caller, "dtype", dtype, optional=True)
    check_int(caller, "batch_size", batch_size, 1, optional=True)
    total = len(x_0)
    wanted = image_channels(model_config(model), variance.startswith("learned"))
    expect(wanted in (None, x_0.shape[1]), caller, "x_0", f"to be [N, {wanted}, H, W]", tuple(x_0.shape))
    check_condition(caller, model, tuple(x_0.shape[1:]), total, condition)
    channels = x_0.shape[1] + (0 if condition is None else condition.shape[1])
    check_image_shape(caller, "x_0", model, (total, channels, *x_0.shape[2:]))
    labels, _ = resolve_labels(caller, model_config(model), class_labels, total)
    check_takes_labels(caller, model, class_labels)
    seeds = resolve_seeds(caller, seed, total)
    weights = ddpm_plan(schedule, prediction=prediction, variance=variance, clip=clip).coefficients.flip(0)  # row t

    model_device, model_dtype = device_and_dtype(model)
    device = computing_device(caller, model_device if device is None else device)
    dtype = model_dtype if dtype is None else dtype
    check_dtype(caller, "dtype", dtype)
    x_0 = x_0.detach().to(device, opmath(dtype))
    seeds, labels = seeds.to(device), None if labels is None else labels.to(device)
    condition = None if condition is None else condition.to(device, dtype)
    terms = torch.empty(total, schedule.num_timesteps, dtype=torch.float64, device=device)
    x_0_mse = torch.empty_like(terms)
    chunks = [slice(i, i + (batch_size or total)) for i in range(0, total, batch_size or total)]
    timesteps = range(schedule.num_timesteps - 1, -1, -1)

    with (
        evaluation_mode(network := inference_network(caller, model, device, dtype, schedule.num_timesteps)),
        torch.inference_mode(),
        progress_bar(len(timesteps), "variational bound", "timestep", shown=progress) as bar,
    ):
        weights_of_x_0, log_variances = schedule.posterior_mean_coef_x_0, schedule.posterior_log_variance
        bounds = torch.stack([log_variances, schedule.betas.log()])
        for t in timesteps:
            epsilon = None if noise is None else noise(t).to(x_0)
            for chunk in chunks:
                x = x_0[chunk]
                drawn = ops.noise(x.shape, seeds[chunk], stream=t, dtype=x.dtype) if epsilon is None else epsilon[chunk]
                x_t = ops.q_sample(x, t, schedule, noise=drawn)
                step = torch.full((len(x),), t, device=device)
                x_in = x_t.to(dtype) if condition is None else torch.cat([x_t.to(dtype), condition[chunk]], dim=1)
                output = predict(network, x_in, step, None if labels is None else labels[chunk]).double()
                m, log_variance = _split(output, x.shape[1], t, bounds[:, t], variance)
                p, q, clip_at = (float(weights[t, COLUMNS.index(name)]) for name in ("p", "q", "clip"))
                unclipped = p * x_t.double() + q * m
                x_0_hat = unclipped.clamp(-clip_at, clip_at)
                x_0_mse[chunk, t] = (x_0_hat - x).square().flatten(1).mean(dim=1)
                # The mean of p(x_{t-1} | x_t) is mu~(x_t, of_mean): a model that gives the mean itself is not clipped.
                of_mean = unclipped if prediction == "previous_sample" else x_0_hat
                if t > 0:
                    # The two means have the same x_t part (eq. 7): they differ by the weight of x_0.
                    distance = weights_of_x_0[t] * (x.double() - of_mean)
                    terms[chunk, t] = transition_bits(distance, log_variances[t], log_variance)
                else:
                    # mu~_1's weights of x_0 and x_t are 1 and 0.
                    terms[chunk, t] = reconstruction_bits(x.double(), of_mean, log_variance, exact_cdf=exact_cdf)
            bar.update()
    prior = prior_bits(x_0, schedule).cpu()
    x_0_mse = x_0_mse.cpu()
    return VariationalBound(prior, terms.cpu(), x_0_mse, x_0_mse * schedule.snr)


def _split(output: Tensor, channels: int, t: int, bounds: Tensor, variance: Variance) -> tuple[Tensor, Tensor]:
    """Return the prediction, and the log variance of p(x_{t-1} | x_t).

    The log variance is a 0-d tensor, or shaped like the prediction if it is learned.
    """
    lower, upper = bounds
    if variance in ("fixed_small", "fixed_small_log"):
        return output, lower
    if variance in ("fixed_large", "fixed_large_log"):
        return output, upper if t > 0 else lower
    m, v = output.split(channels, dim=1)
    if variance == "learned":
        return m, v
    return m, ranged_log_variance(v, upper, lower)


def prior_bits(x_0: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Return L_T = KL(q(x_T | x_0) || N(0, I)) in bits per dimension.

    Args:
        x_0: [N, ...].
        schedule: Noise schedule.

    Returns:
        float64 [N].
    """
    variance = 1 - schedule.alpha_bars[-1]
    mean = schedule.sqrt_alpha_bars[-1] * x_0.double()
    return _bits(0.5 * (mean.square() + variance - 1 - variance.log()))


def transition_bits(distance: Tensor, log_variance_q: Tensor, log_variance_p: Tensor) -> Tensor:
    """Return L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) in bits per dimension.

    Args:
        distance: Difference of the two means, [N, ...].
        log_variance_q: Log variance of q, broadcastable over `distance`.
        log_variance_p: Log variance of p, broadcastable over `distance`.

    Returns:
        [N].
    """
    log_ratio = log_variance_q - log_variance_p
    return _bits(0.5 * (distance.square() * torch.exp(-log_variance_p) + torch.expm1(log_ratio) - log_ratio))


def reconstruction_bits(x_0: Tensor, mean: Tensor, log_variance: Tensor, *, exact_cdf: bool = False) -> Tensor:
    """Return L_0 in bits per dimension (Ho et al. eq. 13).

    L_0 is -log of the Gaussian's mass in the grey level of x_0. The outermost levels extend to infinity.
    The mass is clamped to at least 1e-12.

    Args:
        x_0: Images of 256 grey levels in [-1, 1], [N, ...].
        mean: Mean of the Gaussian, like x_0.
        log_variance: Its log variance, broadcastable over x_0.
        exact_cdf: Use the exact normal distribution function, not its tanh approximation.

    Returns:
        [N].
    """
    cdf = torch.special.ndtr if exact_cdf else _tanh_cdf
    inverse_std = torch.exp(-0.5 * log_variance)
    above = torch.where(x_0 > 0.999, 1.0, cdf((x_0 - mean + _BIN / 2) * inverse_std))
    below = torch.where(x_0 < -0.999, 0.0, cdf((x_0 - mean - _BIN / 2) * inverse_std))
    return _bits(-(above - below).clamp(min=1e-12).log())


def _tanh_cdf(x: Tensor) -> Tensor:
    """Return the standard normal distribution function with an error of 3e-4 (Page 1977)."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _bits(nats: Tensor) -> Tensor:
    """Return the mean of nats per dimension [N, ...] in bits, [N]."""
    return nats.flatten(1).mean(dim=1) / math.log(2)
