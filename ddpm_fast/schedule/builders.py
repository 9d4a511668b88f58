"""The betas of each noise schedule, float64 [T] on the CPU. `NoiseSchedule` documents their arguments."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import MAX_TIMESTEPS, check_int, check_number, check_type
from ..errors import expect


def linear(num_timesteps: int, beta_start: float, beta_end: float, scale_to_num_timesteps: bool) -> Tensor:
    """Return evenly spaced betas."""
    _check_numbers("linear", num_timesteps)
    _check_ends("linear", beta_start, beta_end)
    check_type("NoiseSchedule.linear", "scale_to_num_timesteps", scale_to_num_timesteps, bool)
    scale = 1000 / num_timesteps if scale_to_num_timesteps else 1.0
    return torch.linspace(beta_start * scale, beta_end * scale, num_timesteps, dtype=torch.float64)


def scaled_linear(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """Return betas with evenly spaced square roots."""
    _check_numbers("scaled_linear", num_timesteps)
    _check_ends("scaled_linear", beta_start, beta_end)
    return torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64).square()


def cosine(num_timesteps: int, s: float, max_beta: float) -> Tensor:
    """Return the betas of Nichol and Dhariwal 2021."""
    _check_numbers("cosine", num_timesteps, max_beta)
    check_number("NoiseSchedule.cosine", "s", s, 0, finite=True)

    def alpha_bar(u: Tensor) -> Tensor:
        return torch.cos((u + s) / (1 + s) * (math.pi / 2)).square()

    return _from_alpha_bar(alpha_bar, num_timesteps, max_beta)


def sigmoid(num_timesteps: int, start: float, end: float, tau: float, max_beta: float) -> Tensor:
    """Return the betas of Jabri et al. 2022."""
    caller = "NoiseSchedule.sigmoid"
    _check_numbers("sigmoid", num_timesteps, max_beta)
    for name, value in (("start", start), ("end", end), ("tau", tau)):
        check_number(caller, name, value, finite=True)
    fits = start != end and tau != 0
    expect(fits, caller, "start", "unequal to end, and tau unequal to 0", f"{start}, {end} and {tau}")
    first, last = (torch.tensor(v / tau, dtype=torch.float64).sigmoid() for v in (start, end))

    def alpha_bar(u: Tensor) -> Tensor:
        return (last - torch.sigmoid((u * (end - start) + start) / tau)) / (last - first)

    return _from_alpha_bar(alpha_bar, num_timesteps, max_beta)


def sigmoid_betas(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """Return betas along a sigmoid."""
    _check_numbers("sigmoid_betas", num_timesteps)
    _check_ends("sigmoid_betas", beta_start, beta_end, zero=True)
    ramp = torch.linspace(-6, 6, num_timesteps, dtype=torch.float64).sigmoid()
    return ramp * (beta_end - beta_start) + beta_start


def laplace(num_timesteps: int, max_beta: float) -> Tensor:
    """Return the betas that diffusers calls "laplace"."""
    _check_numbers("laplace", num_timesteps, max_beta)

    def alpha_bar(u: Tensor) -> Tensor:
        side = torch.where(u <= 0.5, 1.0, -1.0)
        log_snr = -0.5 * side * torch.log(1 - 2 * (0.5 - u).abs() + 1e-6)
        return torch.sigmoid(log_snr).sqrt()

    return _from_alpha_bar(alpha_bar, num_timesteps, max_beta)


def flow(num_timesteps: int) -> Tensor:
    """Return the betas of flow matching."""
    _check_numbers("flow", num_timesteps)

    def alpha_bar(u: Tensor) -> Tensor:
        return (1 - u).square() / ((1 - u).square() + u.square())

    return _from_alpha_bar(alpha_bar, num_timesteps, max_beta=1.0)


def _check_numbers(builder: str, num_timesteps: int, max_beta: float = 1.0) -> None:
    """Raise unless num_timesteps is in 1..MAX_TIMESTEPS and max_beta in (0, 1]."""
    caller = f"NoiseSchedule.{builder}"
    check_int(caller, "num_timesteps", num_timesteps, 1, MAX_TIMESTEPS)
    check_number(caller, "max_beta", max_beta, above=0, high=1)


def _check_ends(builder: str, beta_start: float, beta_end: float, *, zero: bool = False) -> None:
    """Raise unless both betas are finite numbers in (0, 1], or in [0, 1] with `zero`."""
    for name, value in (("beta_start", beta_start), ("beta_end", beta_end)):
        low, above = (0, None) if zero else (None, 0)
        check_number(f"NoiseSchedule.{builder}", name, value, low, 1, above=above)


def _from_alpha_bar(alpha_bar: Callable[[Tensor], Tensor], num_timesteps: int, max_beta: float) -> Tensor:
    """Return the betas of a continuous abar(u): min(1 - abar((t + 1) / T) / abar(t / T), max_beta)."""
    edges = alpha_bar(torch.linspace(0, 1, num_timesteps + 1, dtype=torch.float64))  # [T + 1]
    return (1 - edges[1:] / edges[:-1]).clamp(max=max_beta)
