"""The terms of the variational bound (eq. 9-11, Ho et al. 2020, eq. 5), for evaluation and for training."""

from __future__ import annotations

import math
from typing import Literal, cast

import torch
from torch import Tensor

from . import ops
from .checks import check_float, check_range, check_type
from .dtypes import opmath
from .errors import public
from .ops.denoising_loss import checked_loss, reduced
from .predictions import Prediction, Variance
from .reference import STREAM_Q_SAMPLE, per_sample, ranged_log_variance
from .schedule import NoiseSchedule, Objective, objective_of

_BIN = 2 / 255  # width of one of the 256 grey levels in [-1, 1]


@public(traced=True)
def variational_loss(
    model_output: Tensor,
    x_0: Tensor,
    t: int | Tensor,
    schedule: NoiseSchedule | Objective,
    *,
    prediction: Prediction | None = None,
    variance: Variance | None = None,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    detach_mean: bool = True,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """Return the term of the variational bound at t, in bits per dimension, as `VariationalBound.terms` has it without a clip.

    With a learned variance this is the second part of the loss of Nichol and Dhariwal 2021, section 3.1. The reconstruction
    at t = 0 takes x_0 for an image of 256 grey levels. It is computed by PyTorch's ops, without a kernel.

    Args:
        model_output: [N, C, ...], or [N, 2 C, ...] with a learned variance, the prediction first. Floating. Cast to x_0's
            dtype if it differs.
        x_0: Images of 256 grey levels in [-1, 1], floating [N, C, ...].
        t: Timestep, 0..T-1: an int, or int64 [N]. The same as passed to `q_sample`.
        schedule: Noise schedule, the same as passed to `q_sample`. Or an objective, which also has prediction and variance.
        prediction: Meaning of the model's output, see `Objective`. None: that of an objective, or "epsilon".
        variance: Variance of the reverse steps, as in `ddpm_plan`. None: that of an objective, or "fixed_small".
        noise: epsilon, like x_0. Pass either `noise` or `seeds`.
        seeds: int64 [N]. The same as passed to `q_sample`.
        detach_mean: Let the gradient reach the learned variance alone, so that `denoising_loss` trains the prediction.
        reduction: "mean" or "sum" of the N terms, or "none" for all of them.

    Returns:
        A scalar, or [N] for "none". float64 for float64 inputs, float32 for all others.

    Raises:
        ValueError: An argument has an unsupported value, shape or device, or the prediction does not determine x_0 at a
            timestep of the schedule.
        TypeError: An argument has an unsupported type or dtype.
    """
    check_float("x_0", x_0, min_dim=2)
    check_type("detach_mean", detach_mean, bool)
    objective = objective_of(schedule, prediction, variance)
    total, factor = objective.schedule.num_timesteps, objective.out_channels(1)
    model_output, t, seeds = checked_loss(model_output, x_0, t, total, noise, seeds, reduction, factor)
    check_range("t", t, total)
    columns = objective.bound_columns.to(x_0.device, wide := opmath(x_0.dtype))
    if noise is None:
        noise = ops.noise(x_0.shape, cast(Tensor, seeds), stream=STREAM_Q_SAMPLE, dtype=wide)

    a, b, error, c_0, *bounds = (per_sample(each, x_0) for each in columns[:, t])
    m, log_variance = split_variance(model_output.to(wide), x_0.shape[1], bounds, objective.variance)
    # x_t is not needed: it cancels.
    distance = error * ((m.detach() if detach_mean else m) - (a * x_0 + b * noise))  # x_0 - x_0^
    return reduced(bound_terms(x_0.to(wide), t, distance, c_0, bounds[0], log_variance), reduction)


def bound_terms(
    x_0: Tensor,
    t: Tensor,
    distance: Tensor,
    c_0: Tensor,
    log_variance_q: Tensor,
    log_variance_p: Tensor,
    *,
    exact_cdf: bool = False,
) -> Tensor:
    """Return the terms L_t in bits per dimension [N]: the KL divergence of a step, or the reconstruction at t = 0.

    The means of q and p have the same x_t part (eq. 7), so they differ by the weight of x_0 times the distance. At t = 0 that
    weight is 1.

    Args:
        x_0: Images of 256 grey levels in [-1, 1], [N, ...].
        t: int64 [N].
        distance: x_0 - x_0^, like x_0.
        c_0: Weight of x_0 in the posterior mean, broadcastable over x_0. So are the others.
        log_variance_q: Log variance of q(x_{t-1} | x_t, x_0).
        log_variance_p: Log variance of p(x_{t-1} | x_t).
        exact_cdf: As in `reconstruction_bits`.
    """
    # Each branch gets a plain variance where the other is taken: infinity times 0 is no gradient.
    first = per_sample(t, x_0) == 0
    return torch.where(
        t == 0,
        reconstruction_bits(x_0, distance, torch.where(first, log_variance_p, 0.0), exact_cdf=exact_cdf),
        transition_bits(c_0 * distance, log_variance_q, torch.where(first, log_variance_q, log_variance_p)),
    )


def split_variance(output: Tensor, channels: int, bounds: Tensor | list[Tensor], variance: Variance) -> tuple[Tensor, Tensor]:
    """Return the prediction, and the log variance of p(x_{t-1} | x_t), broadcastable over the prediction.

    Args:
        output: The model's output, of as many channels as the variance asks for.
        channels: Channels of the prediction.
        bounds: The three `NoiseSchedule.reverse_log_variances` of the timestep, broadcastable over the prediction.
        variance: Kind of the variance.
    """
    small, beta, large = bounds
    if variance.startswith("fixed"):
        return output, small if variance.startswith("fixed_small") else large
    m, v = output.split(channels, dim=1)
    return m, v if variance == "learned" else ranged_log_variance(v, beta, small)


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


def reconstruction_bits(x_0: Tensor, distance: Tensor, log_variance: Tensor, *, exact_cdf: bool = False) -> Tensor:
    """Return L_0 in bits per dimension (Ho et al. eq. 13).

    L_0 is -log of the Gaussian's mass in the grey level of x_0. The outermost levels extend to infinity.
    The mass is clamped to at least 1e-12.

    Args:
        x_0: Images of 256 grey levels in [-1, 1], [N, ...].
        distance: x_0 minus the mean of the Gaussian, like x_0.
        log_variance: Its log variance, broadcastable over x_0.
        exact_cdf: Use the exact normal distribution function, not its tanh approximation.

    Returns:
        [N].
    """
    cdf = torch.special.ndtr if exact_cdf else _tanh_cdf
    inverse_std = torch.exp(-0.5 * log_variance)
    # The Gaussian is symmetric: its lower half keeps the digits of small masses.
    outermost = x_0.abs() > 0.999
    side = torch.where(outermost, -x_0.sign() * distance, -distance.abs())
    below = torch.where(outermost, 0.0, cdf((side - _BIN / 2) * inverse_std))
    return _bits(-(cdf((side + _BIN / 2) * inverse_std) - below).clamp(min=1e-12).log())


def _tanh_cdf(x: Tensor) -> Tensor:
    """Return the standard normal distribution function with an error of 3e-4 (Page 1977)."""
    x = x.clamp(-20, 20)  # beyond it is 0 or 1, and a square that overflows leaves no gradient
    return torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))  # (1 + tanh(y / 2)) / 2 = sigmoid(y)


def _bits(nats: Tensor) -> Tensor:
    """Return the mean of nats per dimension [N, ...] in bits, [N]."""
    return nats.flatten(1).mean(dim=1) / math.log(2)
