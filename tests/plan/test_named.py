"""Plans by name: the registry, its builders and their options."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import pytest
import torch
from refusals import by, refused

from ddpm_fast import NoiseSchedule, Objective, SamplingPlan, ddim_plan, ddpm_plan, default_plan, dpm_solver_plan, heun_plan
from ddpm_fast import named_plan as named
from ddpm_fast.errors import ArgumentError, InvalidType, InvalidValue
from ddpm_fast.samplers import DEFAULT_SAMPLER, LAMBDA_MIN, SAMPLERS, PlanOptions

OBJECTIVE = Objective(NoiseSchedule.linear(1000), "v_prediction")
HEUN: Any = {"solver": "heun", "lambda_min": LAMBDA_MIN}
SDE: Any = HEUN | {"eta": 1.0, "spacing": "karras"}


def plan_of(name: str) -> SamplingPlan:
    """Return the plan of a sampler in its own number of steps, by its builder."""
    return {
        "dpm++2m": lambda: dpm_solver_plan(OBJECTIVE, 20, lambda_min=LAMBDA_MIN),
        "dpm++2m-sde": lambda: dpm_solver_plan(OBJECTIVE, 20, **SDE),
        "ddpm": lambda: ddpm_plan(OBJECTIVE, 100),
        "ddim": lambda: ddim_plan(OBJECTIVE, 50),
        "heun": lambda: heun_plan(OBJECTIVE, 10, lambda_min=LAMBDA_MIN),
    }[name]()


def assert_same(plan: SamplingPlan, wanted: SamplingPlan) -> None:
    assert (plan.prediction, plan.variance) == (wanted.prediction, wanted.variance)
    assert torch.equal(plan.timesteps, wanted.timesteps)
    assert torch.equal(plan.table(), wanted.table())


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_name_builds_the_plan_of_its_builder(name: str) -> None:
    assert_same(named(OBJECTIVE, sampler=name), plan_of(name))


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_builder_exists_and_takes_the_arguments_that_are_listed(name: str) -> None:
    known = SAMPLERS[name]
    module, _, function = known.builder.rpartition(".")
    takes = inspect.signature(getattr(import_module(f"ddpm_fast.plan.{module}"), function)).parameters
    assert {"spacing", "clip", *known.defaults, *known.fixed, *known.with_karras} <= takes.keys()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, lambda: plan_of(DEFAULT_SAMPLER)),
        ({"sampler": None, "steps": None, "order": None}, lambda: plan_of(DEFAULT_SAMPLER)),
        ({"clip": None, "steps": 7}, lambda: dpm_solver_plan(OBJECTIVE, 7, **SDE, clip=None)),
        ({"eta": 0.5}, lambda: dpm_solver_plan(OBJECTIVE, 20, **SDE | {"eta": 0.5})),
        ({"order": 3, "eta": 0}, lambda: dpm_solver_plan(OBJECTIVE, 20, **SDE | {"eta": 0}, order=3)),
        (
            {"sampler": "dpm++2m", "spacing": "karras", "sigma_min": 0.1, "sigma_max": 40, "steps": 6},
            lambda: dpm_solver_plan(OBJECTIVE, 6, **HEUN, spacing="karras", sigma_min=0.1, sigma_max=40),
        ),
        ({"sampler": "ddim", "eta": 1, "spacing": "trailing"}, lambda: ddim_plan(OBJECTIVE, 50, eta=1, spacing="trailing")),
        ({"sampler": "ddpm", "variance": "fixed_large"}, lambda: ddpm_plan(OBJECTIVE, 100, variance="fixed_large")),
    ],
)
def test_options_are_arguments_of_the_builder(options: dict[str, Any], wanted: Any) -> None:
    assert_same(named(OBJECTIVE, **options), wanted())


def test_a_learned_variance_stays_learned() -> None:
    objective = Objective(NoiseSchedule.linear(20), variance="learned_range")
    assert_same(named(objective, sampler="ddpm"), ddpm_plan(objective, 20))
    assert named(objective, sampler="ddpm").variance == "learned_range"
    wanted = "to be learned or learned_range, as the model predicts it"
    with refused(by("named_plan", InvalidValue("variance", wanted, "fixed_small"))):
        named(objective, sampler="ddpm", variance="fixed_small")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (
            {"sampler": "euler"},
            by("named_plan", InvalidValue("sampler", f"to be one of {', '.join(SAMPLERS)} or None", "'euler'")),
        ),
        ({"steps": 0}, by("named_plan", InvalidValue("steps", "to be a positive integer or None", "0"))),
        ({"sampler": "ddim", "steps": 1001}, by("named_plan", InvalidValue("steps", "to be in 1..1000 with ddim", "1001"))),
        (
            {"sampler": "ddim", "order": 3},
            by("named_plan", InvalidValue("order", "to go with sampler dpm++2m or dpm++2m-sde", "3 with ddim")),
        ),
        (
            {"sampler": "dpm++2m", "eta": 0.5},
            by("named_plan", InvalidValue("eta", "to go with sampler dpm++2m-sde or ddim", "0.5 with dpm++2m")),
        ),
        (
            {"variance": "fixed_large"},
            by("named_plan", InvalidValue("variance", "to go with sampler ddpm", "fixed_large with dpm++2m-sde")),
        ),
        (
            {"sampler": "ddpm", "variance": "learned"},
            by("named_plan", InvalidValue("variance", "to be fixed_small or fixed_large for this model", "learned")),
        ),
        (
            {"num_steps": 5},
            by(
                "named_plan",
                InvalidType(
                    "",
                    f"arguments among {', '.join(PlanOptions.__annotations__)}",
                    "'num_steps'; did you mean 'steps'?",
                ),
            ),
        ),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], error: ArgumentError) -> None:
    with refused(error):
        named(OBJECTIVE, **options)


def test_the_default_plan_has_no_more_steps_than_levels() -> None:
    assert_same(default_plan(OBJECTIVE), plan_of(DEFAULT_SAMPLER))
    assert_same(default_plan(OBJECTIVE, steps=7, clip=None), dpm_solver_plan(OBJECTIVE, 7, **SDE, clip=None))
    short = Objective(NoiseSchedule.linear(15))
    assert [default_plan(short, steps=steps).num_steps for steps in (None, 4, 15, 16, 1000)] == [15, 4, 15, 15, 15]
