"""Plans as text, as plots, sliced, and started at a timestep."""

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from refusals import by, refused

from ddpm_fast import (
    NoiseSchedule,
    SamplingPlan,
    ddim_inversion_plan,
    ddim_plan,
    ddpm_plan,
    dpm_solver_plan,
    heun_plan,
    repaint_plan,
)
from ddpm_fast.errors import InvalidType, InvalidValue
from ddpm_fast.plan import COLUMNS

SCHEDULE = NoiseSchedule.linear()
BUILDERS = (ddpm_plan, ddim_plan, dpm_solver_plan, heun_plan, ddim_inversion_plan)
TENSORS = ("timesteps", "coefficients", "alpha_bars_prev", "alpha_bars")


def test_a_plan_prints_as_a_short_table() -> None:
    title, summary, *rows = str(dpm_solver_plan(SCHEDULE, 20, eta=1.0)).split("\n")
    assert title == "dpm_solver_plan(num_steps=20, eta=1.0)"
    assert summary == "20 steps, the model predicts epsilon, random, uses the x_0^ of the step before"
    cells = [row.split() for row in rows]
    assert cells[0] == ["step", "t", "abar", "arrives", "at", "sigma"]
    assert [row[:2] for row in cells[1:7]] == [["0", "999"], ["1", "949"], ["2", "899"], ["3", "849"], ["4", "799"], ["..."]]
    assert (len(cells), cells[-1]) == (12, ["19", "50", "0.97", "1", "0"])
    by_hand = SamplingPlan(SCHEDULE, torch.tensor([7]), torch.ones(1, len(COLUMNS), dtype=torch.float64), "epsilon", "fixed")
    assert str(by_hand).startswith("SamplingPlan\n1 step, ")


@pytest.mark.parametrize("build", BUILDERS)
def test_a_plan_knows_abar_on_arrival(build: Any) -> None:
    """It is that of the next step's timestep, and x_0's in the end. Heun's Euler steps and corrections arrive at one level."""
    plan = build(SCHEDULE, 10)
    torch.testing.assert_close(plan.alpha_bars_prev[:-1], SCHEDULE.alpha_bars[plan.timesteps[1:]], rtol=1e-12, atol=0)
    assert float(plan.alpha_bars_prev[-1]) == (0.0 if build is ddim_inversion_plan else 1.0)
    torch.testing.assert_close(plan.alpha_bars, SCHEDULE.alpha_bars[plan.timesteps], rtol=1e-12, atol=0)


def test_alpha_bars_prev_follows_the_arguments() -> None:
    plan = ddim_plan(SCHEDULE, None, spacing=[600, 300], previous=[500, -1], final_alpha_bar=0.9999)
    assert plan.alpha_bars_prev.tolist() == [float(SCHEDULE.alpha_bars[500]), 0.9999]


@pytest.mark.parametrize(
    "plan",
    [
        ddim_inversion_plan(SCHEDULE, 10, evaluate_at="arrival"),
        repaint_plan(SCHEDULE, 20, 5, 3),
        heun_plan(SCHEDULE, 10, spacing="karras"),
        dpm_solver_plan(SCHEDULE, 10, spacing="karras", order=1),
        dpm_solver_plan(SCHEDULE, 10, spacing="karras", order=1)[3:],
    ],
)
def test_a_step_starts_where_the_one_before_arrives(plan: SamplingPlan) -> None:
    assert torch.equal(plan.alpha_bars[1:], plan.alpha_bars_prev[:-1])


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
@pytest.mark.parametrize("build", [ddpm_plan, dpm_solver_plan])
def test_a_plan_keeps_its_timesteps_when_the_caller_changes_theirs(build: Any, kind: Any) -> None:
    given = kind([900, 600, 300, 10])
    plan, expected = build(SCHEDULE, None, spacing=given), build(SCHEDULE, None, spacing=[900, 600, 300, 10])
    given[2] = 100
    assert torch.equal(plan.timesteps, expected.timesteps)
    later = plan.starting_at(600)
    assert torch.equal(later.timesteps, torch.tensor([600, 300, 10]))
    assert torch.equal(later.coefficients, expected.starting_at(600).coefficients)


def test_a_plan_keeps_its_tensors_when_the_caller_changes_theirs() -> None:
    known = ddpm_plan(SCHEDULE, 4)
    given = {name: getattr(known, name).clone() for name in TENSORS}
    plan = replace(known, **given)
    for name, tensor in given.items():
        tensor.zero_()
        assert torch.equal(getattr(plan, name), getattr(known, name))


def test_a_slice_has_some_of_the_rows() -> None:
    plan = ddpm_plan(SCHEDULE, 10)
    for steps in (slice(2, 5), slice(-1, None), slice(None)):
        assert len(plan[steps]) == len(range(10)[steps])
        for name in TENSORS:
            assert torch.equal(getattr(plan[steps], name), getattr(plan, name)[steps])
    for bad in (slice(3, 3), slice(0, 9, 2), slice(None, None, -1)):
        with pytest.raises(ValueError, match=r"expected a slice of consecutive steps in 0\.\.9"):
            plan[bad]
    with refused(by("SamplingPlan", InvalidType("steps", "to be a slice", "int"))):
        plan[3]  # type: ignore[index]


def test_a_multistep_plan_cannot_be_sliced() -> None:
    plan = dpm_solver_plan(SCHEDULE, 10)
    with refused(
        by(
            "SamplingPlan",
            InvalidValue(
                "",
                "a whole plan, as its steps use the x_0^ of earlier ones",
                "a slice: build it with start=, or call starting_at(timestep)",
            ),
        )
    ):
        plan[3:]
    with refused(
        by(
            "SamplingPlan.starting_at",
            InvalidValue(
                "",
                "a plan that remembers how it was built, as its steps use the x_0^ of earlier ones",
                "one from coefficients",
            ),
        )
    ):
        replace(plan, coefficients=plan.coefficients.clone()).starting_at(int(plan.timesteps[3]))


@pytest.mark.parametrize("build", BUILDERS)
def test_a_plan_starts_at_each_of_its_timesteps(build: Any) -> None:
    plan = later = build(SCHEDULE, 10)
    for t in dict.fromkeys(plan.timesteps.tolist()):
        direct, later = plan.starting_at(t), later.starting_at(t)
        assert int(later.timesteps[0]) == t
        for name in ("timesteps", "alpha_bars_prev", "alpha_bars"):
            assert torch.equal(getattr(direct, name), getattr(plan, name)[-later.num_steps :])
            assert torch.equal(getattr(later, name), getattr(direct, name))
    with pytest.raises(ValueError, match=r"SamplingPlan.starting_at: expected timestep to be one of the plan's, got 998"):
        plan.starting_at(998)


def test_a_plot_has_timesteps_levels_and_sigma() -> None:
    pytest.importorskip("matplotlib")
    plan = dpm_solver_plan(SCHEDULE, 12, eta=1.0)
    panels = plan.plot().axes
    assert [panel.get_title() for panel in panels] == ["timestep", "levels on arrival", "sigma"]
    assert panels[0].lines[0].get_ydata().tolist() == plan.timesteps.tolist()
    signal, noise = (torch.as_tensor(line.get_ydata()) for line in panels[1].lines)
    torch.testing.assert_close(signal.square() + noise.square(), torch.ones(12, dtype=torch.float64))


def test_a_plot_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"^matplotlib is missing: install it with pip install 'ddpm_fast\[bench\]'$"):
        ddpm_plan(SCHEDULE, 3).plot()


@pytest.mark.parametrize("build", [*BUILDERS, repaint_plan])
@pytest.mark.parametrize("spacing", [None, "linspace", "trailing"])
def test_a_plan_built_in_a_compiled_function_is_the_same(build: Any, spacing: str | None) -> None:
    options = {} if spacing is None or build is repaint_plan else {"spacing": spacing}
    expected = build(SCHEDULE, 20, **options)

    def compiled(x: torch.Tensor) -> Any:
        return build(SCHEDULE, 20, **options), x + 1

    plan, _ = torch.compile(compiled, backend="eager")(torch.ones(2))
    assert torch.equal(plan.timesteps, expected.timesteps)
    assert torch.equal(plan.coefficients, expected.coefficients)


def test_repaint_without_jumps_is_ancestral_sampling() -> None:
    plan, expected = repaint_plan(SCHEDULE, 50, jump_num_sample=1), ddpm_plan(SCHEDULE, 50)
    assert torch.equal(plan.timesteps, expected.timesteps)
    torch.testing.assert_close(plan.coefficients[:, :8], expected.coefficients[:, :8], rtol=1e-14, atol=1e-14)


def test_the_timesteps_of_repaint_are_those_of_the_paper() -> None:
    """Lugmayr et al. 2022, algorithm 1 and appendix B: single steps down, and from every tenth level up again, nine times.

    A step down evaluates the model.
    """
    again = [t for low in range(230, -1, -10) for _ in range(10) for t in range(low + 10, low, -1)]
    evaluated = [*range(249, 240, -1), *again, 0]
    plan = repaint_plan(SCHEDULE)
    assert plan.num_steps == len(evaluated) == 2410
    assert (plan.timesteps // 4).tolist() == evaluated


def test_a_jump_of_repaint_keeps_the_marginal() -> None:
    """For normal x_0 of variance 1, x_t has variance 1 at every t. A row has to keep that, jump or not."""
    plan = repaint_plan(SCHEDULE, 20, 3, 2, prediction="sample", clip=None)
    abar = SCHEDULE.alpha_bars[plan.timesteps]
    p, _, k0, k1, k2, k3, _, sigma = plan.coefficients[:, :8].unbind(1)
    assert ((p == 0) & (k0 == 0) & (k3 == 0)).all()
    # m = E[x_0 | x_t] = sqrt(abar) x_t, up to x_0's own variance 1 - abar given x_t
    assert bool((plan.alpha_bars_prev[:-1] < abar[:-1]).any()), "no jump up"
    variance = (k1 + k2 * abar.sqrt()).square() + k2.square() * (1 - abar) + sigma.square()
    torch.testing.assert_close(variance, torch.ones_like(variance), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [((0,), "num_steps"), ((50, 0), "jump_length"), ((50, 50), "jump_length"), ((50, 5, 0), "jump_num_sample")],
)
def test_bad_arguments_of_repaint_are_named(arguments: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"repaint_plan: expected {name} to be"):
        repaint_plan(SCHEDULE, *arguments)


def test_coefficients_are_copies() -> None:
    """A plan does not change: its steps, its text and its picture go on after a change of the attribute."""
    plan = ddim_plan(NoiseSchedule.linear(), 3, eta=1.0)
    text, before, drawn = repr(plan), plan.table().clone(), plan.plot().axes[2].lines[0].get_ydata().tolist()
    plan.coefficients.mul_(2)
    assert torch.equal(plan.table(), before)
    assert repr(plan) == text
    assert plan.plot().axes[2].lines[0].get_ydata().tolist() == drawn
