"""The variational bound: derivation eq. 9-11, term by term (Ho et al. 2020, eq. 5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import graph, ops
from .networks import device_and_dtype, evaluation_mode, predict
from .plan import COLUMNS, Prediction, Variance, ddpm_plan
from .sampling import check_images, resolve_labels, resolve_seeds
from .schedule import NoiseSchedule

_BIN = 2 / 255  # width of one of the 256 grey levels in [-1, 1]


@dataclass(frozen=True, repr=False)
class VariationalBound:
    """-log p(x_0) <= L_T + L_{T-1} + ... + L_1 + L_0, in bits per dimension: float64 tensors on the CPU, one row an image.

    Attributes:
        prior: L_T [N]: KL(q(x_T | x_0) || N(0, I)). It depends on the schedule only.
        terms: [N, T]: column t is L_t, and column 0 the reconstruction -log p(x_0 | x_1).
        x_0_mse: [N, T]: mean squared error of the (clipped) prediction x_0^ at timestep t of the code.
        epsilon_mse: [N, T]: the same of the epsilon^ that goes with x_0^: SNR_t x_0_mse.
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
        """L_{T-1} + ... + L_1 [N]."""
        return self.terms[:, 1:].sum(dim=1)

    @property
    def reconstruction(self) -> Tensor:
        """L_0 [N]."""
        return self.terms[:, 0]

    @property
    def total(self) -> Tensor:
        """The bound [N]."""
        return self.prior + self.terms.sum(dim=1)


def variational_bound(
    model: nn.Module,
    x_0: Tensor,
    schedule: NoiseSchedule,
    *,
    prediction: Prediction = "epsilon",
    variance: Variance = "fixed_small",
    clip: float | None = 1.0,
    class_labels: int | Sequence[int] | Tensor | None = None,
    seed: int | Tensor = 0,
    noise: Callable[[int], Tensor] | None = None,
    exact_cdf: bool = False,
    batch_size: int | None = None,
    progress: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> VariationalBound:
    """Bounds how many bits a dimension the model needs to store images, one network evaluation an image and timestep.

    Each term is estimated with one draw of x_t, independent from term to term. At t = 0, where beta~ is 0, the log variance
    is that of t = 1 ("fixed_small", "fixed_large", and the lower end of "learned_range"), as in Ho et al.'s code.

    Args:
        model: called as in `sample`.
        x_0: images of 256 grey levels mapped to [-1, 1], floating [N, C, H, W].
        prediction, variance, clip: what the model's output means, the reverse steps' variance, and the bound on x_0^, as in
            `ddpm_plan`.
        class_labels: as in `sample`.
        seed: an int, or int64 [N]: image i has its own seed, and timestep t is its stream.
        noise: instead of seed: noise(t) is the epsilon of timestep t, shaped like x_0; called once for T-1, ..., 0.
        exact_cdf: the normal distribution function in L_0; False takes the tanh approximation that published figures use.
        batch_size: images at a time; None: all.
        progress: show a progress bar.
        device, dtype: as in `sample`, but None is the dtype of the model on a GPU too. What comes after the network is computed
            in float64.

    Returns:
        Every term, an image.

    Raises:
        ValueError, TypeError: before any work, for an argument that is out of range or does not fit the model.
    """
    if not x_0.is_floating_point() or x_0.dim() < 2 or x_0.numel() == 0:
        raise ValueError(f"variational_bound: expected x_0 to be floating [N, C, ...], got {x_0.dtype} {list(x_0.shape)}")
    if not x_0.abs().max() <= 1:  # NaN included
        raise ValueError(f"variational_bound: expected x_0 in [-1, 1], got values from {x_0.min():.4g} to {x_0.max():.4g}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"variational_bound: expected batch_size to be a positive integer, got {batch_size}")
    check_images("variational_bound", "x_0", model, x_0.shape)
    total = len(x_0)
    labels, _ = resolve_labels("variational_bound", model, class_labels, total)
    seeds = resolve_seeds("variational_bound", seed, total)
    weights = ddpm_plan(schedule, prediction=prediction, variance=variance, clip=clip).coefficients.flip(0)  # row t

    model_device, model_dtype = device_and_dtype(model)
    device, dtype = torch.device(device or model_device), dtype or model_dtype
    x_0 = x_0.detach().to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    seeds, labels = seeds.to(device), None if labels is None else labels.to(device)
    terms = torch.empty(total, schedule.num_timesteps, dtype=torch.float64, device=device)
    x_0_mse = torch.empty_like(terms)
    chunks = [slice(i, i + (batch_size or total)) for i in range(0, total, batch_size or total)]
    timesteps = range(schedule.num_timesteps - 1, -1, -1)

    with (
        graph.session(model, device, dtype, schedule.num_timesteps, cuda_graph=False) as running,
        evaluation_mode(network := model if running.network is None else running.network),
        torch.inference_mode(),
    ):
        from tqdm.auto import tqdm

        for t in tqdm(timesteps, desc="variational bound", unit="timestep", disable=not progress):
            epsilon = None if noise is None else noise(t).to(x_0)
            for chunk in chunks:
                x = x_0[chunk]
                drawn = ops.noise(x.shape, seeds[chunk], stream=t, dtype=x.dtype) if epsilon is None else epsilon[chunk]
                x_t = ops.q_sample(x, t, schedule, noise=drawn)
                step = torch.full((len(x),), t, device=device)
                output = predict(network, x_t.to(dtype), step, None if labels is None else labels[chunk]).double()
                m, log_variance = _split(output, x.shape[1], t, schedule, variance)
                p, q, clip_at = (float(weights[t, COLUMNS.index(name)]) for name in ("p", "q", "clip"))
                unclipped = p * x_t.double() + q * m
                x_0_hat = unclipped.clamp(-clip_at, clip_at)
                x_0_mse[chunk, t] = (x_0_hat - x).square().flatten(1).mean(dim=1)
                # The mean of p(x_{t-1} | x_t) is mu~(x_t, of_mean): a model that gives the mean itself is not clipped.
                of_mean = unclipped if prediction == "previous_sample" else x_0_hat
                if t > 0:
                    # The two means have the same x_t part (eq. 7): they differ by the weight of x_0.
                    distance = schedule.posterior_mean_coef_x_0[t] * (x.double() - of_mean)
                    terms[chunk, t] = transition_bits(distance, schedule.posterior_log_variance[t], log_variance)
                else:
                    # mu~_1's weights of x_0 and x_t are 1 and 0.
                    terms[chunk, t] = reconstruction_bits(x.double(), of_mean, log_variance, exact_cdf=exact_cdf)
    prior = prior_bits(x_0, schedule).cpu()
    x_0_mse = x_0_mse.cpu()
    return VariationalBound(prior, terms.cpu(), x_0_mse, x_0_mse * schedule.snr)


def _split(output: Tensor, channels: int, t: int, schedule: NoiseSchedule, variance: Variance) -> tuple[Tensor, Tensor]:
    """The prediction, and the log variance of p(x_{t-1} | x_t): a 0-d tensor, or one for every dimension if it is learned."""
    lower = schedule.posterior_log_variance[t]
    upper = schedule.betas[t].log()
    if variance in ("fixed_small", "fixed_small_log"):
        return output, lower
    if variance in ("fixed_large", "fixed_large_log"):
        return output, upper if t > 0 else lower
    m, v = output.split(channels, dim=1)
    if variance == "learned":
        return m, v
    f = (v + 1) / 2
    return m, f * upper + (1 - f) * lower


def prior_bits(x_0: Tensor, schedule: NoiseSchedule) -> Tensor:
    """L_T = KL(q(x_T | x_0) || N(0, I)), bits per dimension: [N, ...] -> float64 [N]."""
    variance = 1 - schedule.alpha_bars[-1]
    mean = schedule.sqrt_alpha_bars[-1] * x_0.double()
    return _bits(0.5 * (mean.square() + variance - 1 - variance.log()))


def transition_bits(distance: Tensor, log_variance_q: Tensor, log_variance_p: Tensor) -> Tensor:
    """L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), `distance` between their means: [N, ...] -> [N]."""
    log_ratio = log_variance_q - log_variance_p
    return _bits(0.5 * (distance.square() * torch.exp(-log_variance_p) + torch.expm1(log_ratio) - log_ratio))


def reconstruction_bits(x_0: Tensor, mean: Tensor, log_variance: Tensor, *, exact_cdf: bool = False) -> Tensor:
    """L_0 = -log of the Gaussian's mass in the grey level of x_0 (Ho et al. eq. 13): [N, ...] -> [N].

    The outermost levels reach to infinity. The mass is taken as at least 1e-12.
    """
    cdf = torch.special.ndtr if exact_cdf else _tanh_cdf
    inverse_std = torch.exp(-0.5 * log_variance)
    above = torch.where(x_0 > 0.999, 1.0, cdf((x_0 - mean + _BIN / 2) * inverse_std))
    below = torch.where(x_0 < -0.999, 0.0, cdf((x_0 - mean - _BIN / 2) * inverse_std))
    return _bits(-(above - below).clamp(min=1e-12).log())


def _tanh_cdf(x: Tensor) -> Tensor:
    """The standard normal distribution function, to 3e-4 (Page 1977)."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _bits(nats: Tensor) -> Tensor:
    """[N, ...] nats a dimension -> [N] mean bits."""
    return nats.flatten(1).mean(dim=1) / math.log(2)
