"""The terms of the bound as a loss, against guided-diffusion's formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from refusals import by, refused
from torch import Tensor

from ddpm_fast import NoiseSchedule, Objective, noise, sample_seeds, variational_loss
from ddpm_fast.errors import InvalidType, InvalidValue
from ddpm_fast.predictions import TARGETS
from ddpm_fast.reference import STREAM_Q_SAMPLE

SCHEDULES = {"linear": NoiseSchedule.linear(50, scale_to_num_timesteps=True), "cosine": NoiseSchedule.cosine(50)}
ZERO = {"zero terminal SNR": SCHEDULES["linear"].rescale_zero_terminal_snr(), "flow": NoiseSchedule.flow(50)}
VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")
SHAPE = (50, 2, 3, 4)


def batch(factor: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """A model's output, images of grey levels with black and white, and their seeds: an image for each timestep."""
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randint(0, 256, SHAPE, generator=generator).double() * (2 / 255) - 1
    x_0[:, 0, 0, :2] = torch.tensor([-1.0, 1.0])
    output = torch.randn(SHAPE[0], factor * SHAPE[1], *SHAPE[2:], generator=generator, dtype=torch.float64)
    return 0.3 * output, x_0, sample_seeds(1, SHAPE[0])


def guided(output: Tensor, x_0: Tensor, epsilon: Tensor, schedule: NoiseSchedule, prediction: str, variance: str) -> Tensor:
    """Return guided-diffusion's `_vb_terms_bpd` without a clip, by the formulas of its gaussian_diffusion.py and losses.py.

    t is the index of a sample. x_0^ comes from x_t, by each prediction's own equation.
    """
    abar = schedule.alpha_bars[:, None, None, None]
    abar_prev = torch.cat([torch.ones(1, 1, 1, 1, dtype=torch.float64), abar[:-1]])
    beta = 1 - abar / abar_prev
    x_t = abar.sqrt() * x_0 + (1 - abar).sqrt() * epsilon
    small = beta * (1 - abar_prev) / (1 - abar)
    small = torch.cat([small[1:2], small[1:]]).log()
    if variance == "fixed_small":
        m, log_variance = output, small.expand_as(x_0)
    elif variance == "fixed_large":
        m, log_variance = output, torch.cat([small[:1], beta[1:].log()]).expand_as(x_0)
    else:
        m, log_variance = output.chunk(2, dim=1)
        if variance == "learned_range":
            fraction = (log_variance + 1) / 2
            log_variance = fraction * beta.log() + (1 - fraction) * small
    predicted = {
        "epsilon": lambda: (1 / abar).sqrt() * x_t - (1 / abar - 1).sqrt() * m,
        "sample": lambda: m,
        "v_prediction": lambda: abar.sqrt() * x_t - (1 - abar).sqrt() * m,
        "flow": lambda: (x_t - (1 - abar).sqrt() * m) / (abar.sqrt() + (1 - abar).sqrt()),  # m = epsilon - x_0
    }[prediction]()

    def posterior_mean(x: Tensor) -> Tensor:
        return beta * abar_prev.sqrt() / (1 - abar) * x + (1 - abar_prev) * (1 - beta).sqrt() / (1 - abar) * x_t

    true_mean, mean = posterior_mean(x_0), posterior_mean(predicted)
    kl = 0.5 * (-1 + log_variance - small + (small - log_variance).exp() + (true_mean - mean) ** 2 * (-log_variance).exp())

    def cdf(x: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    centered, inverse = x_0 - mean, (-0.5 * log_variance).exp()
    plus, minus = cdf(inverse * (centered + 1 / 255)), cdf(inverse * (centered - 1 / 255))
    log_probability = torch.where(
        x_0 < -0.999,
        plus.clamp(min=1e-12).log(),
        torch.where(x_0 > 0.999, (1 - minus).clamp(min=1e-12).log(), (plus - minus).clamp(min=1e-12).log()),
    )
    terms = kl.flatten(1).mean(dim=1) / math.log(2)
    return torch.cat([-log_probability[:1].flatten(1).mean(dim=1) / math.log(2), terms[1:]])


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("name", [*SCHEDULES, *ZERO])
def test_terms_are_guided_diffusions(name: str, variance: Any) -> None:
    """At every timestep, t = 0 and T - 1 among them. epsilon does not determine x_0 where abar is 0."""
    schedule = (SCHEDULES | ZERO)[name]
    output, x_0, seeds = batch(2 if variance.startswith("learned") else 1)
    epsilon = noise(SHAPE, seeds, stream=STREAM_Q_SAMPLE, dtype=torch.float64)
    for prediction in TARGETS:
        if prediction == "epsilon" and name in ZERO:
            continue
        wanted = guided(output, x_0, epsilon, schedule, prediction, variance)
        arguments: dict[str, Any] = {"prediction": prediction, "variance": variance, "reduction": "none"}
        t = torch.arange(50)
        terms = variational_loss(output, x_0, t, schedule, seeds=seeds, **arguments)
        torch.testing.assert_close(terms[1:], wanted[1:], rtol=1e-10, atol=1e-11)
        # The original subtracts from 1 what is small: the mass of a level has 16 digits, not more than 1e-16.
        torch.testing.assert_close(terms[:1], wanted[:1], rtol=1e-8, atol=0)
        given = {"noise": epsilon, "prediction": prediction, "variance": variance}
        for reduction in ("none", "mean", "sum"):
            reduced = variational_loss(output, x_0, t, schedule, reduction=reduction, **given)
            assert torch.equal(reduced, terms if reduction == "none" else getattr(terms, reduction)())
        half = variational_loss(output.float(), x_0.float(), t, schedule, seeds=seeds, **arguments)
        assert half.dtype == torch.float32
        torch.testing.assert_close(half.double(), wanted, rtol=2e-6, atol=1e-6)


def test_gradients_reach_the_variance_and_with_a_wish_the_mean() -> None:
    output, x_0, seeds = batch()
    objective, t = Objective(SCHEDULES["linear"], variance="learned_range"), torch.arange(50)
    gradients = []
    for detach in (True, False):
        leaf = output.clone().requires_grad_()
        variational_loss(leaf, x_0, t, objective, seeds=seeds, detach_mean=detach).backward()
        gradients.append(leaf.grad.chunk(2, dim=1))
    (mean, variance), (other_mean, other_variance) = gradients
    assert not mean.any()
    assert other_mean.flatten(1).any(dim=1).all()
    assert torch.equal(variance, other_variance)
    assert variance.flatten(1).any(dim=1).all()
    leaf = output[:4].clone().requires_grad_()
    chosen = torch.tensor([0, 1, 25, 49])

    def loss(leaf: Tensor) -> Tensor:
        return variational_loss(leaf, x_0[chosen], chosen, objective, seeds=seeds[chosen], detach_mean=False)

    assert torch.autograd.gradcheck(loss, (leaf,), eps=1e-7, atol=1e-5)


def test_extreme_variances_leave_gradients() -> None:
    """At t = 0 the transition's exp(-v) is infinite, and infinity times 0 is no gradient."""
    output, x_0, seeds = batch()
    output = output[:2].float()
    output[:, 2:] = -95.0
    output.requires_grad_()
    variational_loss(output, x_0[:2].float(), 0, LINEAR, variance="learned", seeds=seeds[:2]).backward()
    assert output.grad.isfinite().all()


X, SEEDS = torch.zeros(2, 3, 4, 4), sample_seeds(0, 2)
LINEAR = SCHEDULES["linear"]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (
            {"variance": "learned_range"},
            by("variational_loss", InvalidValue("model_output", "to have shape [2, 6, 4, 4]", "[2, 3, 4, 4]")),
        ),
        (
            {"schedule": NoiseSchedule.flow(9)},
            by(
                "variational_loss",
                InvalidValue(
                    "prediction",
                    "to determine x_0 at every timestep",
                    "epsilon, for which D = 0 at timestep 8",
                ),
            ),
        ),
        ({"noise": X}, by("variational_loss", InvalidValue("", "exactly one of noise and seeds", "both"))),
        ({"seeds": None}, by("variational_loss", InvalidValue("", "exactly one of noise and seeds", "neither"))),
        ({"t": 50}, by("variational_loss", InvalidValue("t", "in 0..49", "50"))),
        ({"t": torch.tensor([0, 50])}, by("variational_loss", InvalidValue("t", "in 0..49", "values from 0 to 50"))),
        ({"reduction": "max"}, by("variational_loss", InvalidValue("reduction", "to be one of mean, sum, none", "'max'"))),
        ({"detach_mean": 1}, by("variational_loss", InvalidType("detach_mean", "to be a bool", "int"))),
        (
            {"x_0": torch.zeros(2), "model_output": torch.zeros(2)},
            by("variational_loss", InvalidValue("x_0", "to have at least 2 dimensions [N, ...]", "shape [2]")),
        ),
    ],
)
def test_bad_input(changes: dict[str, Any], wanted: InvalidValue) -> None:
    arguments = {"model_output": X, "x_0": X, "t": 3, "schedule": LINEAR, "seeds": SEEDS} | changes
    with refused(wanted):
        variational_loss(**arguments)
