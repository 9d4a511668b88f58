"""`fit_plan`: fewer steps that draw what a slower plan draws."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_fast import (
    NoiseSchedule,
    Sampler,
    SamplingPlan,
    ddpm_plan,
    dpm_solver_plan,
    fit_plan,
    heun_plan,
    load_builtin,
    sample_seeds,
)
from ddpm_fast.sampling import fitting

SCHEDULE = NoiseSchedule.linear(1000)
LOG_LEVELS = ((1 - SCHEDULE.alpha_bars) / SCHEDULE.alpha_bars).sqrt().log().numpy()
SHAPE = (1, 4, 4)


def normal(x_t: Tensor, t: Tensor) -> Tensor:
    """Return epsilon as the best network for normal data of variance 1/4 would, with a bend, also between timesteps."""
    level = torch.from_numpy(np.interp(t.numpy(), np.arange(1000), LOG_LEVELS)).exp().view(-1, 1, 1, 1)
    signal = 1 / (1 + level.square()).sqrt()
    return (signal * level / (signal.square() / 4 + (signal * level).square()) * x_t + 0.05 * torch.sin(3 * x_t)).float()


def levels(num_steps: int, **options: Any) -> SamplingPlan:
    return dpm_solver_plan(SCHEDULE, num_steps, solver="heun", spacing="karras", sigma_min=0.1, sigma_max=40, **options)


TEACHER = levels(12)
GIVEN = torch.rand(64, *SHAPE, generator=torch.Generator().manual_seed(0))  # for 32 images and the 32 that judge


def difference(sampler: Sampler, plan: SamplingPlan, **options: Any) -> float:
    """Return the root of the mean squared difference from the teacher's images of seeds that no fit has seen."""
    seeds = sample_seeds(9, 16)
    drawn, taught = (sampler.with_plan(each)(16, seed=seeds, progress=False, **options) for each in (plan, TEACHER))
    return float((drawn - taught).square().mean().sqrt())


def test_a_fitted_plan_draws_nearly_what_its_teacher_draws() -> None:
    sampler = Sampler(normal, levels(4), shape=SHAPE)
    fitted, again = (fit_plan(sampler, teacher=TEACHER, progress=False) for _ in range(2))
    assert fitted.fit is not None
    assert fitted.fit.error < 0.5 * fitted.fit.error_before
    assert difference(sampler, fitted) < 0.5 * difference(sampler, sampler.plan)
    assert torch.equal(fitted.coefficients, again.coefficients)
    assert fitted.num_steps == 4
    assert "fitted to dpm_solver_plan(num_steps=12" in str(fitted)
    # A second fit begins where the first ended.
    more = fit_plan(sampler.with_plan(fitted), teacher=TEACHER, progress=False).fit
    assert more is not None
    assert more.error_before == fitted.fit.error


@pytest.mark.parametrize(
    "options", [{}, {"batch_size": 3, "class_labels": "bag"}, {"guidance_scale": 2.0, "class_labels": "bag"}], ids=str
)
def test_a_network_with_classes(options: dict[str, Any]) -> None:
    garments = load_builtin()
    sampler = garments.sampler(
        dpm_solver_plan(garments.objective, 3, solver="heun", spacing="karras", sigma_min=0.2, sigma_max=40)
    )
    fit = fit_plan(sampler, teacher=garments.plan, num_images=6, rounds=1, progress=False, **options).fit
    assert fit is not None
    assert fit.error < 0.9 * fit.error_before
    assert fit.guidance_scale == options.get("guidance_scale", 1.0)


def worse(sampler: Sampler, request: object, targets: Tensor, numbers: Tensor) -> list[Tensor]:
    numbers = numbers.clone()
    numbers[1, -1] += 0.5  # The image is x_0^ of this step.
    return [numbers]


def test_a_round_that_does_not_help_other_images_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler(normal, levels(4), shape=SHAPE)
    monkeypatch.setattr(fitting, "_moves", worse)
    fitted = fit_plan(sampler, teacher=TEACHER, num_images=2, progress=False)
    # Levels go through their logarithms.
    torch.testing.assert_close(fitted.coefficients, sampler.plan.coefficients, rtol=1e-12, atol=1e-12)
    assert fitted.fit is not None
    assert fitted.fit.error == fitted.fit.error_before


def test_a_fitted_plan_starts_later() -> None:
    sampler = Sampler(normal, levels(4), shape=SHAPE)
    fitted = fit_plan(sampler, teacher=TEACHER, num_images=4, rounds=1, progress=False)
    later = fitted.starting_at(int(fitted.timesteps[1]))
    assert torch.equal(later.alpha_bars, fitted.alpha_bars[1:])
    assert not later.coefficients[0, 5]  # no x_0^ of a step before
    assert torch.equal(later.coefficients[1:], fitted.coefficients[2:])
    assert torch.equal(fitted.starting_at(int(fitted.timesteps[0])).coefficients, fitted.coefficients)


def learned(x_t: Tensor, t: Tensor) -> Tensor:
    return torch.cat([normal(x_t, t), torch.zeros_like(x_t)], dim=1)


def restoring(x: Tensor, t: Tensor) -> Tensor:
    """Return epsilon of the image, with a part of the condition."""
    return normal(x[:, :1], t) + 0.1 * x[:, 1:]


@pytest.mark.parametrize(
    ("model", "plan", "teacher", "options"),
    [
        # Levels that are close to each other at the end, and the schedule's highest level.
        (normal, dpm_solver_plan(SCHEDULE, 8), dpm_solver_plan(SCHEDULE, 40), {}),
        (normal, levels(2), levels(12), {}),
        (normal, levels(4), heun_plan(SCHEDULE, 8, spacing="karras", sigma_min=0.1, sigma_max=40), {}),
        (learned, levels(4, learned_variance=True), levels(12, learned_variance=True), {}),
        (restoring, levels(4), levels(12), {"condition": GIVEN}),
        (normal, levels(4), levels(12), {"x_T": GIVEN, "batch_size": 7}),
    ],
    ids=["linspace", "two steps", "Heun", "learned variance", "condition", "x_T"],
)
def test_any_model_and_plan(model: Any, plan: SamplingPlan, teacher: SamplingPlan, options: dict[str, Any]) -> None:
    fit = fit_plan(Sampler(model, plan, shape=SHAPE), teacher=teacher, progress=False, **options).fit
    assert fit is not None
    assert fit.error < 0.5 * fit.error_before


def broken(x_t: Tensor, t: Tensor) -> Tensor:
    return torch.full_like(x_t, torch.nan)


@pytest.mark.parametrize(
    ("model", "plan", "options", "message"),
    [
        (normal, levels(4), {"teacher": levels(12, eta=1.0)}, "expected teacher to draw no noise, got a plan with noise"),
        (
            normal,
            levels(4),
            {"teacher": levels(4)},
            "expected teacher to have more than the 4 steps of the sampler's plan, got 4",
        ),
        (normal, levels(4, order=3), {}, "expected sampler to have a whole dpm_solver_plan of order 2 without noise"),
        (normal, levels(4, eta=0.5), {}, "expected sampler to have a whole dpm_solver_plan of order 2 without noise"),
        (normal, ddpm_plan(SCHEDULE, 4), {}, "expected sampler to have a whole dpm_solver_plan of order 2 without noise"),
        (
            normal,
            levels(4),
            {"teacher": dpm_solver_plan(NoiseSchedule.cosine(1000), 12, lambda_min=-5.1)},
            "expected teacher to have the schedule of the sampler's plan, got another one",
        ),
        (
            normal,
            levels(4),
            {"teacher": levels(12, prediction="sample")},
            "expected teacher to have the prediction of the sampler's plan, got sample",
        ),
        (
            normal,
            levels(4),
            {"teacher": levels(12, learned_variance=True)},
            "expected teacher to have the variance of the sampler's plan, got learned_range",
        ),
        (
            normal,
            dpm_solver_plan(SCHEDULE, levels=[40.0, 3.0, 2.99, 0.1]),
            {},
            "expected sampler to have finite levels that are more than 2 % apart, got [40.",
        ),
        (
            normal,
            dpm_solver_plan(SCHEDULE.rescale_zero_terminal_snr(), 3, spacing="trailing", prediction="v_prediction"),
            {},
            "expected sampler to have finite levels that are more than 2 % apart, got [inf",
        ),
        (normal, levels(4), {"callback": print}, "expected callback to be None, got a function"),
        (normal, levels(4), {"rounds": 0}, "expected rounds to be an integer in 1..1000, got 0"),
        (broken, levels(4), {}, "expected model to return finite values, got others"),
    ],
)
def test_what_cannot_be_fitted_is_named(model: Any, plan: SamplingPlan, options: dict[str, Any], message: str) -> None:
    sampler = Sampler(model, plan, shape=SHAPE)
    with pytest.raises(ValueError, match="fit_plan: ") as caught:
        fit_plan(sampler, **{"teacher": TEACHER, "num_images": 2, "progress": False} | options)
    assert message in str(caught.value)
