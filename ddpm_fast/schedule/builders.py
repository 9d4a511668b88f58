"""The betas of each noise schedule, float64 [T] on the CPU. `NoiseSchedule` documents their arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor

from ..checks import MAX_TIMESTEPS
from ..errors import expect
from ..options import checked, within

_Timesteps = Annotated[int, within(1, MAX_TIMESTEPS)]
_Beta = Annotated[float, within(above=0, high=1)]
_BetaOrZero = Annotated[float, within(low=0, high=1)]
_Finite = Annotated[float, within(finite=True)]


@checked()
def linear(num_timesteps: _Timesteps, beta_start: _Beta, beta_end: _Beta, scale_to_num_timesteps: bool) -> Tensor:
    """Return evenly spaced betas."""
    scale = 1000 / num_timesteps if scale_to_num_timesteps else 1.0
    return torch.linspace(beta_start * scale, beta_end * scale, num_timesteps, dtype=torch.float64)


@checked()
def scaled_linear(num_timesteps: _Timesteps, beta_start: _Beta, beta_end: _Beta) -> Tensor:
    """Return betas with evenly spaced square roots."""
    return torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64).square()


@checked()
def cosine(num_timesteps: _Timesteps, s: Annotated[float, within(low=0, finite=True)], max_beta: _Beta) -> Tensor:
    """Return the betas of Nichol and Dhariwal 2021."""

    def alpha_bar(u: Tensor) -> Tensor:
        return torch.cos((u + s) / (1 + s) * (math.pi / 2)).square()

    return _from_alpha_bar(alpha_bar, num_timesteps, max_beta)


@checked()
def sigmoid(num_timesteps: _Timesteps, start: _Finite, end: _Finite, tau: _Finite, max_beta: _Beta) -> Tensor:
    """Return the betas of Jabri et al. 2022."""
    expect(start != end and tau != 0, "start", "unequal to end, and tau unequal to 0", f"{start}, {end} and {tau}")
    first, last = (torch.tensor(v / tau, dtype=torch.float64).sigmoid() for v in (start, end))

    def alpha_bar(u: Tensor) -> Tensor:
        return (last - torch.sigmoid((u * (end - start) + start) / tau)) / (last - first)

    return _from_alpha_bar(alpha_bar, num_timesteps, max_beta)


@checked()
def sigmoid_betas(num_timesteps: _Timesteps, beta_start: _BetaOrZero, beta_end: _BetaOrZero) -> Tensor:
    """Return betas along a sigmoid."""
    ramp = torch.linspace(-6, 6, num_timesteps, dtype=torch.float64).sigmoid()
    return ramp * (beta_end - beta_start) + beta_start


@checked()
def laplace(num_timesteps: _Timesteps, max_beta: _Beta) -> Tensor:
    """Return the betas that diffusers calls "laplace"."""

    def alpha_bar(u: Tensor) -> Tensor:
        side = torch.where(u <= 0.5, 1.0, -1.0)
        log_snr = -0.5 * side * torch.log(1 - 2 * (0.5 - u).abs() + 1e-6)
        return torch.sigmoid(log_snr).sqrt()

    return _from_alpha_bar(alpha_bar, num_timesteps, max_beta)


@checked()
def flow(num_timesteps: _Timesteps) -> Tensor:
    """Return the betas of flow matching."""

    def alpha_bar(u: Tensor) -> Tensor:
        return (1 - u).square() / ((1 - u).square() + u.square())

    return _from_alpha_bar(alpha_bar, num_timesteps, max_beta=1.0)


def _from_alpha_bar(alpha_bar: Callable[[Tensor], Tensor], num_timesteps: int, max_beta: float) -> Tensor:
    """Return the betas of a continuous abar(u): min(1 - abar((t + 1) / T) / abar(t / T), max_beta)."""
    edges = alpha_bar(torch.linspace(0, 1, num_timesteps + 1, dtype=torch.float64))  # [T + 1]
    return (1 - edges[1:] / edges[:-1]).clamp(max=max_beta)
