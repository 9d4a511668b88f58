"""Objectives: what follows from the two columns of a prediction, for every name, and for columns of one's own."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from refusals import by, refused
from torch import Tensor

from ddpm_fast import (
    NoiseSchedule,
    Objective,
    SamplingPlan,
    ddim_inversion_plan,
    ddim_plan,
    ddpm_plan,
    denoising_loss,
    dpm_solver_plan,
    heun_plan,
    q_sample,
    repaint_plan,
    sample_seeds,
)
from ddpm_fast.errors import ArgumentError, InvalidType, InvalidValue
from ddpm_fast.predictions import TARGETS

SCHEDULES = {
    "linear": NoiseSchedule.linear(),
    "cosine": NoiseSchedule.cosine(),
    "zero terminal SNR": NoiseSchedule.linear().rescale_zero_terminal_snr(),
    "flow": NoiseSchedule.flow(),
}
SMALL = NoiseSchedule.cosine(10)


def columns(schedule: NoiseSchedule) -> Tensor:
    """Columns of no name: halfway from v to flow."""
    return (Objective(schedule, "v_prediction").target + Objective(schedule, "flow").target) / 2


def of(schedule: NoiseSchedule, name: str) -> Objective:
    return Objective(schedule, columns(schedule) if name == "custom" else name)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- the formula


def test_targets_are_what_their_papers_say() -> None:
    for schedule in SCHEDULES.values():
        alpha, sigma = schedule.alpha_bars.sqrt(), (1 - schedule.alpha_bars).sqrt()
        one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
        wanted = {
            "epsilon": (zero, one),  # Ho et al. 2020
            "sample": (one, zero),
            "v_prediction": (-sigma, alpha),  # Salimans and Ho 2022, appendix D
            "flow": (-one, one),  # Lipman et al. 2023, eq. 23, without a sigma_min and with time reversed
        }
        assert wanted.keys() == TARGETS.keys()
        for name, pair in wanted.items():
            assert torch.equal(of(schedule, name).target, torch.stack(pair, dim=1)), name


@pytest.mark.parametrize("name", [*TARGETS, "custom"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_x_0_and_epsilon_come_back(schedule: NoiseSchedule, name: str) -> None:
    """At every timestep where D is not 0, t = 0 and T - 1 among them. The tolerance is for what D magnifies."""
    objective = of(schedule, name)
    alpha, sigma, t = schedule.sqrt_alpha_bars, schedule.sqrt_one_minus_alpha_bars, torch.arange(1000)
    x_0, epsilon = torch.randn(2, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_t, m = alpha * x_0 + sigma * epsilon, (objective.target * torch.stack([x_0, epsilon], dim=1)).sum(dim=1)
    determinant = alpha * objective.target[:, 1] - sigma * objective.target[:, 0]
    known = determinant != 0
    assert bool(known.all()) != (name == "epsilon" and alpha[-1] == 0)
    for truth, (p, q) in (
        (x_0, objective.x_0_weights_at(alpha, sigma, t)),
        (epsilon, objective.epsilon_weights_at(alpha, sigma, t)),
    ):
        error = ((p * x_t + q * m - truth) * determinant)[known].abs()
        assert float(error.max()) < 3e-15
    if known.all():
        assert torch.equal(objective.x_0_weights, torch.stack(objective.x_0_weights_at(alpha, sigma, t), dim=1))
        assert torch.equal(objective.epsilon_weights, torch.stack(objective.epsilon_weights_at(alpha, sigma, t), dim=1))


def test_weights_have_the_bytes_of_their_own_formulas() -> None:
    """Manifests of samples hold digests of the bytes of plans, where -0.0 is not 0.0."""
    schedule = SCHEDULES["cosine"]
    alpha, sigma = schedule.sqrt_alpha_bars, schedule.sqrt_one_minus_alpha_bars
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    for name, of_x_0, of_epsilon in (
        ("epsilon", (1 / alpha, -sigma / alpha), (zero, one)),
        ("sample", (zero, one), (1 / sigma, -alpha / sigma)),
        ("v_prediction", (alpha, -sigma), (sigma, alpha)),
    ):
        objective = Objective(schedule, name)  # type: ignore[arg-type]
        for got, wanted in ((objective.x_0_weights, of_x_0), (objective.epsilon_weights, of_epsilon)):
            assert torch.equal(got.view(torch.int64), torch.stack(wanted, dim=1).view(torch.int64)), name


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_min_snr_is_one_bound_on_the_loss_on_x_0(schedule: NoiseSchedule) -> None:
    """The squared error of x_0^ is (sigma / D)^2 that of m, so all predictions share one weight of it (Hang et al. 2023)."""
    bounded = schedule.snr.clamp(max=5.0)
    for name in (*TARGETS, "custom"):
        objective = Objective(schedule, of(schedule, name).prediction, loss_weight="min_snr")
        weights = objective.loss_weights
        if name == "epsilon":
            assert weights[schedule.snr <= 5].eq(1).all()
            torch.testing.assert_close(weights * schedule.snr, bounded)
        else:
            torch.testing.assert_close(weights, bounded * objective.x_0_weights[:, 1].square())
        assert Objective(schedule, objective.prediction).loss_weights.eq(1).all()
    assert Objective(schedule, "sample", loss_weight="min_snr", gamma=1.0).loss_weights.max() == 1.0


def test_channels_follow_the_variance() -> None:
    for variance, factor in (("fixed_small", 1), ("fixed_large_log", 1), ("learned", 2), ("learned_range", 2)):
        objective = Objective(SMALL, variance=variance)  # type: ignore[arg-type]
        assert (objective.out_channels(3), objective.predicts_variance) == (3 * factor, factor == 2)


# ------------------------------------------------------------------------------------------------------- who takes columns


@pytest.mark.parametrize("name", [*TARGETS, "custom"])
@pytest.mark.parametrize("source", ["seeds", "noise"])
def test_the_loss_is_on_the_target(name: str, source: str) -> None:
    objective, t = of(SCHEDULES["cosine"], name), torch.tensor([0, 500, 999])
    x_0, epsilon, m = torch.randn(3, 3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    given: dict[str, Any] = {"noise": epsilon} if source == "noise" else {"seeds": sample_seeds(3, 3)}
    epsilon = q_sample(torch.zeros_like(x_0), 999, SCHEDULES["flow"], **given)  # alpha is 0 and sigma 1
    a, b = objective.target.float().double()[t].reshape(3, 2, 1, 1, 1).unbind(1)  # as kernels read them
    wanted = (m - (a * x_0 + b * epsilon)).square().flatten(1).mean(dim=1)
    losses = denoising_loss(m, x_0, t, objective, reduction="none", **given)
    torch.testing.assert_close(losses, wanted, rtol=1e-13, atol=0)
    if name != "custom":
        by_name = denoising_loss(m, x_0, t, objective.schedule, prediction=name, reduction="none", **given)  # type: ignore[arg-type]
        assert torch.equal(by_name, losses)
    learned = Objective(objective.schedule, objective.prediction, "learned_range")
    both = denoising_loss(torch.cat([m, m], dim=1), x_0, t, learned, reduction="none", **given)
    assert torch.equal(both, losses)  # the variance is not its business


@pytest.mark.parametrize("name", [*TARGETS, "custom"])
def test_a_new_objective_compiles(name: str) -> None:
    """Its tables are in place before a compiler traces."""
    x_0, m, seeds = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4), sample_seeds(0, 2)
    objective = of(NoiseSchedule.cosine(10), name)
    torch._dynamo.reset()
    compiled = torch.compile(lambda m: denoising_loss(m, x_0, 3, objective, seeds=seeds), fullgraph=True, backend="eager")
    assert torch.equal(compiled(m), denoising_loss(m, x_0, 3, objective, seeds=seeds))


@pytest.mark.parametrize("build", [ddpm_plan, ddim_plan, dpm_solver_plan])
@pytest.mark.parametrize("name", TARGETS)
def test_columns_of_a_name_give_the_plans_of_that_name(name: Any, build: Callable[..., SamplingPlan]) -> None:
    named = Objective(SCHEDULES["cosine"], name)
    one, other = build(named, 7), build(Objective(named.schedule, named.target), 7)
    # A solver computes alpha again from its levels, with other roundings than the timesteps' columns.
    torch.testing.assert_close(one.coefficients, other.coefficients, rtol=1e-14, atol=1e-14)
    assert (one.prediction, other.prediction) == (name, "custom")


PLANS: dict[str, Callable[..., SamplingPlan]] = {
    "ddpm": lambda *a, **k: ddpm_plan(*a, 5, **k),
    "ddim": lambda *a, **k: ddim_plan(*a, 5, **k),
    "inversion": lambda *a, **k: ddim_inversion_plan(*a, 5, evaluate_at="arrival", **k),
    "solver": lambda *a, **k: dpm_solver_plan(*a, 5, **k),
    "heun": lambda *a, **k: heun_plan(*a, 5, **k),
    "repaint": lambda *a, **k: repaint_plan(*a, 5, 2, 2, **k),
}


@pytest.mark.parametrize("build", PLANS.values(), ids=PLANS)
def test_plans_take_an_objective_for_its_parts(build: Callable[..., SamplingPlan]) -> None:
    own = {"variance": "learned_range"} if build is PLANS["ddpm"] else {"learned_variance": True}
    plan = build(Objective(SMALL, "v_prediction", "learned_range"))
    wanted = build(SMALL, prediction="v_prediction", **own)
    assert torch.equal(plan.coefficients, wanted.coefficients)
    assert (plan.prediction, plan.variance) == (wanted.prediction, wanted.variance) == ("v_prediction", "learned_range")
    assert plan.schedule is SMALL
    assert build(Objective(SMALL, "v_prediction", "fixed_large")).variance == "fixed"
    caller = build(SMALL).builder.func.__name__  # type: ignore[union-attr]
    wanted_error = InvalidValue("prediction", "to be left out with an Objective, which has it", "'epsilon'")
    with refused(by(caller, wanted_error)):
        build(Objective(SMALL, "v_prediction"), prediction="epsilon")


# ---------------------------------------------------------------------------------------------------------- flow matching


def test_ddim_on_the_flow_schedule_is_eulers_method() -> None:
    """The unscaled x_s = (1 - s) x_0 + s epsilon moves along the velocity that the network predicts."""
    total, steps = 60, 6
    schedule = NoiseSchedule.flow(total)
    s = (torch.arange(total, dtype=torch.float64) + 1) / total
    length = ((1 - s).square() + s.square()).sqrt()
    torch.testing.assert_close(schedule.sqrt_alpha_bars, (1 - s) / length, rtol=1e-12, atol=1e-15)
    assert schedule.alpha_bars[-1] == 0
    plan = ddim_plan(schedule, steps, spacing="trailing", prediction="flow", clip=None)
    x = y = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for row, t in zip(plan.coefficients, plan.timesteps.tolist(), strict=True):
        m = torch.tanh(2 * x) + s[t]  # any network of the rescaled x_t
        p, q, k0, k1, k2 = row[:5]
        x = k0 * (p * x + q * m) + k1 * x + k2 * m
        y = y - m / steps
        arrived = s[t] - 1 / steps
        scale = ((1 - arrived).square() + arrived.square()).sqrt()
        torch.testing.assert_close(x * scale, y, rtol=0, atol=1e-13)


def test_samplers_say_what_they_need_where_abar_is_0() -> None:
    objective = Objective(NoiseSchedule.flow(100), "flow")
    for plan in (
        *(ddpm_plan(objective, 5), ddim_plan(objective, 5, spacing="trailing"), dpm_solver_plan(objective, 5)),
        dpm_solver_plan(objective, 5, spacing="karras", lambda_min=-5.1),
    ):
        assert plan.coefficients[:, :8].isfinite().all()
    with pytest.raises(ValueError, match="heun_plan: expected abar to be above 0 at the first timestep, got 0 at 99: pass"):
        heun_plan(objective, 5)
    with pytest.raises(ValueError, match="sigma_max to be given, as abar is 0 at the last timestep"):
        dpm_solver_plan(objective, 5, spacing="karras")
    with pytest.raises(ValueError, match=r"got p = inf at timestep 99 .* with prediction 'epsilon', which does not determine"):
        ddim_plan(objective.schedule, 5, spacing="trailing")
    assert ddim_plan(objective.schedule, 5).prediction == "epsilon"  # "leading" does not reach it


# --------------------------------------------------------------------------------------------------------- files and errors


def test_a_configuration_gives_the_objective_back() -> None:
    for objective in (
        Objective(SMALL),
        Objective(NoiseSchedule.flow(7), "flow", "learned_range", "min_snr", 3.0),
        Objective(SMALL, columns(SMALL).float(), "fixed_large"),
        Objective(NoiseSchedule.from_betas([0.1, 0.2]), "sample"),
    ):
        config = json.loads(json.dumps(objective.to_config()))
        again = Objective.from_config(config)
        assert again == objective
        assert again.to_config() == config
        assert again != Objective(SMALL, "sample")
    assert repr(Objective(SMALL, columns(SMALL), loss_weight="min_snr")) == (
        "Objective(schedule=NoiseSchedule.cosine(num_timesteps=10, s=0.008, max_beta=0.999), prediction=custom, "
        "variance=fixed_small, loss_weight=min_snr, gamma=5.0)"
    )
    by_betas = Objective(NoiseSchedule.from_betas(SMALL.betas), "v_prediction", "fixed_small_log", gamma=1.0)
    assert by_betas == Objective(SMALL, "v_prediction")  # the same in other words, with a bound on nothing
    assert hash(by_betas) == hash(Objective(NoiseSchedule.from_betas(SMALL.betas), "v_prediction", "fixed_small_log"))
    assert Objective(SMALL, columns(SMALL)) != Objective(SMALL, 2 * columns(SMALL))
    assert copy.deepcopy(by_betas) is by_betas
    given = torch.ones(10, 2)
    objective = Objective(SMALL, given)
    given.zero_()
    assert objective.target.eq(1).all()


CONFIG = Objective(SMALL).to_config()
NAMES = "one of epsilon, sample, v_prediction, flow"
LOST = torch.stack([SMALL.sqrt_alpha_bars, SMALL.sqrt_one_minus_alpha_bars], dim=1)  # x_t itself, so D = 0


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        (
            lambda: Objective(None),
            by(
                "Objective",
                InvalidType("schedule", "to be a NoiseSchedule (NoiseSchedule.from_diffusers(scheduler.config))", "NoneType"),
            ),
        ),  # type: ignore[arg-type]
        (lambda: Objective(SMALL, [[0, 1]] * 10), by("Objective", InvalidType("prediction", "to be a tensor", "list"))),  # type: ignore[arg-type]
        (lambda: Objective(SMALL, "noise"), by("Objective", InvalidValue("prediction", f"to be {NAMES}", "'noise'"))),  # type: ignore[arg-type]
        (
            lambda: Objective(SMALL, "previous_sample"),  # type: ignore[arg-type]
            by("Objective", InvalidValue("prediction", f"to be {NAMES}", "'previous_sample'")),
        ),
        (
            lambda: Objective(SMALL, torch.ones(9, 2)),
            by("Objective", InvalidValue("prediction", "to be a name, or two columns of shape [10, 2]", "[9, 2]")),
        ),
        *(
            (
                lambda value=value: Objective(SMALL, torch.full((10, 2), value)),
                by(
                    "Objective",
                    InvalidValue("prediction", "to have finite columns that are not both 0", "others at timestep 0"),
                ),
            )
            for value in (0.0, torch.nan, torch.inf)
        ),
        (
            lambda: Objective(SMALL, loss_weight="p2"),  # type: ignore[arg-type]
            by("Objective", InvalidValue("loss_weight", "to be min_snr or None", "'p2'")),
        ),
        (lambda: Objective(SMALL, gamma=0), by("Objective", InvalidValue("gamma", "to be positive and finite", "0"))),
        (
            lambda: Objective(NoiseSchedule.flow(9)).x_0_weights,
            by(
                "Objective.x_0_weights",
                InvalidValue(
                    "prediction",
                    "to determine x_0 at every timestep",
                    "epsilon, for which D = 0 at timestep 8",
                ),
            ),
        ),
        (
            lambda: Objective(SMALL, LOST).epsilon_weights,
            by(
                "Objective.epsilon_weights",
                InvalidValue(
                    "prediction",
                    "to determine epsilon at every timestep",
                    "custom, for which D = 0 at timestep 0",
                ),
            ),
        ),
        (
            lambda: Objective(SMALL, LOST, loss_weight="min_snr").loss_weights,
            by(
                "Objective.loss_weights",
                InvalidValue(
                    "prediction",
                    "to determine x_0 at every timestep",
                    "custom, for which D = 0 at timestep 0",
                ),
            ),
        ),
        (
            lambda: Objective.from_config(CONFIG | {"prediction": [[1, 2], 3]}),
            by("Objective.from_config", InvalidValue("prediction", "to be a name, or T pairs of numbers", "*")),
        ),
        (
            lambda: Objective.from_config(CONFIG | {"variance": "none"}),
            by(
                "Objective.from_config",
                InvalidValue(
                    "variance",
                    "to be one of fixed_small, fixed_small_log, fixed_large, fixed_large_log, learned, learned_range",
                    "'none'",
                ),
            ),
        ),
        (
            lambda: Objective.from_config({"prediction": "flow"}),
            by(
                "Objective.from_config",
                InvalidValue("", "the keys schedule, prediction, variance, loss_weight, gamma", "prediction"),
            ),
        ),
        (
            lambda: denoising_loss(
                torch.zeros(1, 2), torch.zeros(1, 2), 0, Objective(SMALL), prediction="flow", noise=LOST[:1]
            ),
            by("denoising_loss", InvalidValue("prediction", "to be left out with an Objective, which has it", "'flow'")),
        ),
    ],
)
def test_bad_objectives_are_refused(call: Callable[[], Any], wanted: ArgumentError) -> None:
    if wanted.got == "*":  # the words are torch's
        with pytest.raises(type(wanted), match=wanted.expected):
            call()
        return
    with refused(wanted):
        call()


def test_epsilon_is_trained_where_it_does_not_determine_x_0() -> None:
    objective = Objective(NoiseSchedule.flow(9), loss_weight="min_snr")
    assert objective.loss_weights[-1] == 1
    losses = denoising_loss(torch.ones(2, 3), torch.zeros(2, 3), 8, objective, noise=torch.zeros(2, 3), reduction="none")
    assert losses.tolist() == [1, 1]
