"""DPM-Solver++ and Heun's method against their formulas in float64, and against diffusers."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from refusals import refused
from torch import Tensor

from ddpm_fast import NoiseSchedule, SamplingPlan, ddim_plan, dpm_solver_plan, heun_plan, noise, reverse_step
from ddpm_fast.errors import ArgumentError, InvalidType, InvalidValue
from ddpm_fast.plan import COLUMNS
from ddpm_fast.schedule import NoiseSchedule as Schedule

SCHEDULES = {
    "linear": (NoiseSchedule.linear(), -math.inf),
    "scaled_linear": (NoiseSchedule.scaled_linear(), -math.inf),
    "cosine": (NoiseSchedule.cosine(), -5.1),
    "sigmoid": (NoiseSchedule.sigmoid(), -5.1),
}
SHAPE = (2, 3, 5, 4)
SEEDS = torch.tensor([3, 4])


def model(schedule: Schedule, prediction: str, x: Tensor, t: int) -> Tensor:
    """Return what the best network for normal data of variance 1/4 would, with a bend that keeps the solvers from exactness."""
    signal, noise_level = math.sqrt(schedule.alpha_bars[t]), math.sqrt(1 - schedule.alpha_bars[t])
    variance = signal**2 / 4 + noise_level**2
    slope = {
        "epsilon": noise_level / variance,
        "sample": signal / 4 / variance,
        "v_prediction": signal * noise_level * 0.75 / variance,
    }[prediction]
    return slope * x + 0.05 * torch.sin(3 * x)


def run(plan: SamplingPlan, x: Tensor) -> Tensor:
    """Run a plan by `reverse_step` with the model, in x's dtype."""
    x_0 = x_0_prev = torch.zeros_like(x)
    for step in range(plan.num_steps):
        output = model(plan.schedule, plan.prediction, x, int(plan.timesteps[step]))
        before = {"x_0_prev": x_0 if plan.needs_x_0_prev else None, "x_0_prev2": x_0_prev if plan.needs_x_0_prev2 else None}
        x_0_prev = x_0
        x, x_0 = reverse_step(x, output, step, plan, seeds=SEEDS, **before, return_x_0=True)
    return x


def run_in_float64(plan: SamplingPlan, x: Tensor) -> Tensor:
    """Run a plan's float64 rows, which `reverse_step` rounds to float32."""
    x_0_prev = x_0_prev2 = torch.zeros_like(x)
    for step, row in enumerate(plan.coefficients):
        p, q, k0, k1, k2, k3, k4, sigma, _, _, clip = row.tolist()
        m = model(plan.schedule, plan.prediction, x, int(plan.timesteps[step]))
        x_0 = (p * x + q * m).clamp(-clip, clip)
        x = k0 * x_0 + k1 * x + k2 * m + k3 * x_0_prev + k4 * x_0_prev2
        x = x + sigma * noise(SHAPE, SEEDS, stream=step, dtype=x.dtype)
        x_0_prev, x_0_prev2 = x_0, x_0_prev
    return x


def textbook_levels(
    schedule: Schedule,
    spacing: str,
    num_steps: int,
    final: str,
    lambda_min: float,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7,
) -> Any:
    """Return timesteps and sigma / alpha of the levels, from the formulas, with Python's numbers."""
    ratios = [math.sqrt((1 - abar) / abar) if abar > 0 else math.inf for abar in schedule.alpha_bars.tolist()]
    last = sum(-math.log(ratio) >= lambda_min for ratio in ratios)
    if spacing == "linspace":
        t = [round(float(i)) for i in np.linspace(0, last - 1, num_steps + 1)][:0:-1]
    elif spacing == "leading":
        t = [i * (last // (num_steps + 1)) for i in range(num_steps, 0, -1)]
    elif spacing == "trailing":
        t = [round(float(i)) - 1 for i in np.arange(last, 0, -last / num_steps)[:num_steps]]  # ties round as in NumPy
    if spacing == "karras":
        low, high = ((sigma_min or ratios[0]) ** (1 / rho), (sigma_max or ratios[last - 1]) ** (1 / rho))
        levels = [(high + i / max(num_steps - 1, 1) * (low - high)) ** rho for i in range(num_steps)]
        t = [round(float(np.interp(math.log(r), [math.log(r) for r in ratios[:last]], range(last)))) for r in levels]
    else:
        levels = [ratios[i] for i in t]
    return t, [*levels, 0.0 if final == "zero" else ratios[0]]


def to_x_0(prediction: str, x: Tensor, m: Tensor, alpha: float, sigma: float, clip: float | None) -> Tensor:
    x_0 = {"epsilon": lambda: (x - sigma * m) / alpha, "sample": lambda: m, "v_prediction": lambda: alpha * x - sigma * m}[
        prediction
    ]()
    return x_0 if clip is None else x_0.clamp(-clip, clip)


def textbook_dpm_solver(
    schedule: Schedule,
    levels: Any,
    x: Tensor,
    prediction: str,
    order: int,
    solver: str,
    eta: float,
    final: str,
    clip: float | None,
) -> Tensor:
    """Run DPM-Solver++ in the terms of Lu et al.: D_0 and D_1 of the data prediction, one equation a case."""
    timesteps, ratios = levels
    alphas = [1 / math.sqrt(1 + r * r) for r in ratios]
    sigmas = [r * a for r, a in zip(ratios, alphas, strict=True)]
    lambdas = [-math.log(r) if r > 0 else math.inf for r in ratios]
    before: Tensor | None = None
    earlier: Tensor | None = None
    for i, t in enumerate(timesteps):
        x_0 = to_x_0(prediction, x, model(schedule, prediction, x, t), alphas[i], sigmas[i], clip)
        h = lambdas[i + 1] - lambdas[i]
        grown = math.exp(-(1 + eta) * h)
        is_last = i == len(timesteps) - 1
        few = len(timesteps) < 15
        limit = 1 if is_last and (final == "zero" or few) else 2 if i == len(timesteps) - 2 and few else 3
        taken = min(order, i + 1, limit)
        x_next = sigmas[i + 1] / sigmas[i] * (math.exp(-eta * h) if eta else 1) * x + alphas[i + 1] * (1 - grown) * x_0
        if taken == 2:
            assert before is not None
            d_1 = (x_0 - before) * h / (lambdas[i] - lambdas[i - 1])
            if solver == "midpoint":
                x_next = x_next + 0.5 * alphas[i + 1] * (1 - grown) * d_1
            else:
                x_next = x_next + alphas[i + 1] * ((grown - 1) / ((1 + eta) * h) + 1) * d_1
        if taken == 3:
            assert before is not None
            assert earlier is not None
            r_0, r_1 = (lambdas[i] - lambdas[i - 1]) / h, (lambdas[i - 1] - lambdas[i - 2]) / h
            d_10, d_11 = (x_0 - before) / r_0, (before - earlier) / r_1
            d_1, d_2 = d_10 + r_0 / (r_0 + r_1) * (d_10 - d_11), (d_10 - d_11) / (r_0 + r_1)
            big = (1 + eta) * h
            x_next = x_next + alphas[i + 1] * ((grown - 1) / big + 1) * d_1
            half = 0.5 if eta == 0 else -0.5  # diffusers has this sign
            x_next = x_next + alphas[i + 1] * ((1 - grown - big) / big**2 + half) * d_2
        if eta:
            std = sigmas[i + 1] * math.sqrt(1 - math.exp(-2 * eta * h))
            x_next = x_next + std * noise(SHAPE, SEEDS, stream=i, dtype=torch.float64)
        x, before, earlier = x_next, x_0, before
    return x


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_trajectories_equal_the_formulas(name: str, prediction: Any) -> None:
    """Orders, solvers, eta, spacings and last levels: rows agree within 1e-10, the float32 kernel within 1e-5.

    The errors are relative to the largest value of a result. The reference knows nothing of rows.
    """
    schedule, lambda_min = SCHEDULES[name]
    x = noise(SHAPE, SEEDS, stream=99, dtype=torch.float64)
    for spacing, (order, solver), eta, final, num_steps, clip in itertools.product(
        ("linspace", "leading", "trailing", "karras"),
        ((1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint"), (3, "heun")),
        (0.0, 0.5, 1.0),
        ("zero", "sigma_min"),
        (7, 20),
        (1.0, None),
    ):
        if spacing in ("trailing", "karras") and final == "sigma_min":
            continue  # the last step goes from a level to itself, where the formula is 0 / 0
        if order == 3 and eta == 0.5:
            continue
        options: Any = {"spacing": spacing, "final": final, "lambda_min": lambda_min, "prediction": prediction, "clip": clip}
        plan = dpm_solver_plan(schedule, num_steps, order=order, solver=solver, eta=eta, **options)  # type: ignore[arg-type]
        levels = textbook_levels(schedule, spacing, num_steps, final, lambda_min)
        assert plan.timesteps.tolist() == levels[0]
        assert plan.is_random == (eta > 0)
        assert (plan.needs_x_0_prev, plan.needs_x_0_prev2) == (order >= 2, order == 3)
        expected = textbook_dpm_solver(schedule, levels, x, prediction, order, solver, eta, final, clip)
        scale = float(expected.abs().max())
        for got, bound in ((run_in_float64(plan, x), 1e-10), (run(plan, x.float()).double(), 1e-5)):
            error = float((got - expected).abs().max()) / scale
            assert error < bound, (spacing, order, solver, eta, final, num_steps, clip, error)


@pytest.mark.parametrize("num_steps", [2, 3, 20, 31])
@pytest.mark.parametrize("spacing", ["karras", "listed"])
def test_a_last_step_from_a_level_to_itself_changes_nothing(spacing: Any, num_steps: int) -> None:
    """Its h is 0, for which formulas are 0 / 0. Rounding must not make h negative: sigma is a root of it."""
    # Rounding of (sigma / alpha)^(1/7), up to 2.1, is relative to 0.5 at the last level. The power multiplies it by 7.
    h = 64 * torch.finfo(torch.float64).eps
    for schedule, eta, solver in itertools.product(
        (NoiseSchedule.linear(), NoiseSchedule.scaled_linear(), NoiseSchedule.cosine()), (0.0, 1.0), ("midpoint", "heun")
    ):
        plan = dpm_solver_plan(
            schedule,
            num_steps,
            eta=eta,
            solver=solver,  # type: ignore[arg-type]
            spacing=spacing if spacing == "karras" else list(range(num_steps - 1, -1, -1)),
            final="sigma_min",
            lower_order_final=False,
        )
        k0, k1, k3, sigma = plan.coefficients[-1, [COLUMNS.index(name) for name in ("k0", "k1", "k3", "sigma")]].tolist()
        assert k1 == pytest.approx(1, abs=h)
        assert max(abs(k0), abs(k3)) <= 4 * h
        assert sigma <= math.sqrt(2 * h)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_last_step_may_be_eulers_in_a_plan_that_ends_at_a_level(order: int) -> None:
    """The row is that of order 1, the others stay, and a start at a timestep keeps it."""
    options: Any = {"final": "sigma_min", "lower_order_final": False}
    plan, first = (dpm_solver_plan(NoiseSchedule.linear(), 20, order=o, euler_at_final=True, **options) for o in (order, 1))
    without = dpm_solver_plan(NoiseSchedule.linear(), 20, order=order, **options)
    assert torch.equal(plan.coefficients[-1], first.coefficients[-1])
    assert torch.equal(plan.coefficients[:-1], without.coefficients[:-1])
    assert torch.equal(plan.coefficients, without.coefficients) == (order == 1)
    later = plan.starting_at(int(plan.timesteps[10]))
    assert torch.equal(later.coefficients[-1], plan.coefficients[-1])


def textbook_heun(schedule: Schedule, levels: Any, x: Tensor, prediction: str, clip: float | None) -> Tensor:
    """Run Karras et al. 2022, algorithm 1 in y = x / alpha: its derivative by r = sigma / alpha is (y - x_0^) / r."""
    timesteps, ratios = levels

    def derivative(y: Tensor, level: int) -> Tensor:
        alpha = 1 / math.sqrt(1 + ratios[level] ** 2)
        m = model(schedule, prediction, alpha * y, timesteps[level])
        return (y - to_x_0(prediction, alpha * y, m, alpha, ratios[level] * alpha, clip)) / ratios[level]

    y = x * math.sqrt(1 + ratios[0] ** 2)
    for i in range(len(timesteps)):
        step = ratios[i + 1] - ratios[i]
        slope = derivative(y, i)
        euler = y + step * slope
        y = euler if i == len(timesteps) - 1 else y + step * (slope + derivative(euler, i + 1)) / 2
    return y


@pytest.mark.parametrize("spacing", ["linspace", "trailing", "karras"])
@pytest.mark.parametrize("clip", [1.0, None])
def test_heun_equals_its_algorithm(spacing: Any, clip: float | None) -> None:
    schedule = NoiseSchedule.linear()
    levels = textbook_levels(schedule, spacing, 6, "zero", -math.inf)
    x = noise(SHAPE, SEEDS, stream=99, dtype=torch.float64)
    expected = textbook_heun(schedule, levels, x, "epsilon", clip)
    plan = heun_plan(schedule, 6, spacing=spacing, clip=clip)
    assert plan.num_steps == 11
    assert plan.timesteps.tolist() == [levels[0][(row + 1) // 2] for row in range(11)]
    torch.testing.assert_close(run_in_float64(plan, x), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(run(plan, x.float()).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_chosen_levels_equal_the_formulas(name: str, prediction: Any) -> None:
    """The ends of the range and levels inside it, any rho: rows agree within 1e-8, relative to the largest value."""
    schedule, lambda_min = SCHEDULES[name]
    lowest = float((1 / schedule.alpha_bars[0] - 1).sqrt())
    highest = max(ratio for ratio in (1 / schedule.alpha_bars - 1).sqrt().tolist() if -math.log(ratio) >= lambda_min)
    x = noise(SHAPE, SEEDS, stream=99, dtype=torch.float64)
    for sigma_min, sigma_max, rho, num_steps, clip in itertools.product(
        (lowest, 0.1), (highest, 40.0), (7.0, 3), (1, 5, 16), (1.0, None)
    ):
        given: Any = {"sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho, "lambda_min": lambda_min}
        options: Any = given | {"spacing": "karras", "prediction": prediction, "clip": clip}
        levels = textbook_levels(schedule, "karras", num_steps, "zero", **given)
        abar = [1 / (1 + ratio**2) for ratio in levels[1]]
        cases = [(dpm_solver_plan(schedule, num_steps, eta=eta, solver="heun", **options), eta) for eta in (0.0, 0.3, 1.0)] + [
            (heun_plan(schedule, num_steps, **options), None)
        ]
        for plan, eta in cases:
            starts = range(num_steps) if eta is not None else [(row + 1) // 2 for row in range(2 * num_steps - 1)]
            arrivals = [i + 1 if eta is not None else row // 2 + 1 for row, i in enumerate(starts)]
            assert plan.timesteps.tolist() == [levels[0][i] for i in starts]
            assert plan.alpha_bars.tolist() == pytest.approx([abar[i] for i in starts], rel=1e-12)
            assert plan.alpha_bars_prev.tolist() == pytest.approx([abar[i] for i in arrivals], rel=1e-12)
            if eta is None:
                expected = textbook_heun(schedule, levels, x, prediction, clip)
            else:
                expected = textbook_dpm_solver(schedule, levels, x, prediction, 2, "heun", eta, "zero", clip)
            error = float((run_in_float64(plan, x) - expected).abs().max() / expected.abs().max())
            assert error < 1e-8, (given, num_steps, clip, eta, error)


def test_an_edit_starts_at_the_levels_that_were_chosen() -> None:
    levels: Any = {"spacing": "karras", "sigma_min": 0.1, "sigma_max": 40.0, "rho": 5.0}
    for plan in (dpm_solver_plan(NoiseSchedule.linear(), 6, **levels), heun_plan(NoiseSchedule.linear(), 6, **levels)):
        later = plan.starting_at(int(plan.timesteps[-3]))
        assert torch.equal(later.alpha_bars, plan.alpha_bars[-later.num_steps :])
        ratios = textbook_levels(plan.schedule, num_steps=6, final="zero", lambda_min=-math.inf, **levels)[1]
        abar, told = float(later.alpha_bars[0]), float(plan.schedule.alpha_bars[plan.timesteps[-3]])
        assert abar in [pytest.approx(1 / (1 + ratio**2), rel=1e-12) for ratio in ratios]
        assert abar != pytest.approx(told, rel=1e-6)  # the timestep is rounded, the level is not
        assert "sigma_min=0.1, sigma_max=40.0, rho=5.0" in str(later)
        assert f"{float(later.alpha_bars[0]):.4g}" in str(later).splitlines()[3]


def test_order_1_is_ddim() -> None:
    """DPM-Solver++ of order 1 with eta = 0 is DDIM between the same levels (Lu et al. 2022, section 4)."""
    schedule = NoiseSchedule.linear()
    solver = dpm_solver_plan(schedule, order=1)
    ddim = ddim_plan(schedule, None, spacing=solver.timesteps.tolist())
    torch.testing.assert_close(solver.coefficients, ddim.coefficients, rtol=1e-10, atol=1e-12)


def test_a_plan_with_a_start_begins_with_order_1() -> None:
    plan = dpm_solver_plan(NoiseSchedule.linear(), 20, eta=1.0)
    later = plan.starting_at(500)
    assert torch.equal(later.timesteps, plan.timesteps[10:])
    assert torch.equal(later.alpha_bars_prev, plan.alpha_bars_prev[10:])
    assert torch.equal(later.coefficients[1:], plan.coefficients[11:])
    third = dpm_solver_plan(NoiseSchedule.linear(), 20, order=3, eta=1.0)
    for name, rows in (("k3", 1), ("k4", 2)):  # without the history that they weigh
        column = third.starting_at(500).coefficients[:, COLUMNS.index(name)]
        assert [bool(k) for k in column] == rows * [False] + (9 - rows) * [True] + [False]
    assert torch.equal(third.starting_at(500).coefficients[2:], third.coefficients[12:])
    k3 = COLUMNS.index("k3")
    assert float(plan.coefficients[10, k3]) != 0
    assert float(later.coefficients[0, k3]) == 0
    assert torch.equal(later.coefficients, dpm_solver_plan(NoiseSchedule.linear(), 20, eta=1.0, start=500).coefficients)
    # The number of steps of the whole plan decides on the order of the last step.
    options: Any = {"final": "sigma_min", "start": 300}
    assert float(dpm_solver_plan(NoiseSchedule.linear(), 20, **options).coefficients[-1, k3]) != 0
    assert float(dpm_solver_plan(NoiseSchedule.linear(), 14, final="sigma_min").coefficients[-1, k3]) == 0


def test_heun_restarts_with_a_pair_of_steps() -> None:
    plan = heun_plan(NoiseSchedule.linear(), 5)
    later = plan.starting_at(599)
    assert later.timesteps.tolist() == [599, 400, 400, 200, 200]
    assert torch.equal(later.coefficients, plan.coefficients[4:])


def test_zero_terminal_snr_begins_from_pure_noise() -> None:
    """The first step, of order 1, has a finite row at abar = 0 if the model predicts x_0 or v."""
    schedule = NoiseSchedule.linear().rescale_zero_terminal_snr()
    for eta in (0.0, 1.0):
        plan = dpm_solver_plan(schedule, 10, eta=eta, prediction="v_prediction")
        assert float(schedule.alpha_bars[plan.timesteps[0]]) == 0
        x = noise(SHAPE, SEEDS, stream=99, dtype=torch.float64)
        assert run(plan, x).isfinite().all()
    with refused(
        InvalidValue(
            "SamplingPlan",
            "",
            "finite coefficients",
            "p = inf at timestep 999 (abar = 0) with prediction 'epsilon', which does not determine x_0 and epsilon there; "
            '"sample", "v_prediction" and "flow" do',
        )
    ):
        dpm_solver_plan(schedule, 10)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"num_steps": 0}, InvalidValue("dpm_solver_plan", "num_steps", "to be an integer in 1..999", "0")),
        ({"num_steps": 1000}, InvalidValue("dpm_solver_plan", "num_steps", "to be an integer in 1..999", "1000")),
        (
            {"num_steps": 1001, "spacing": "trailing"},
            InvalidValue("dpm_solver_plan", "num_steps", "to be an integer in 1..1000", "1001"),
        ),
        ({"num_steps": None}, InvalidType("dpm_solver_plan", "num_steps", "to be an integer in 1..999", "None")),
        ({"order": 4}, InvalidValue("dpm_solver_plan", "order", "to be an integer in 1..3", "4")),
        ({"order": 3, "eta": 0.5}, InvalidValue("dpm_solver_plan", "eta", "to be 0 or 1 with order 3", 0.5)),
        ({"eta": -0.1}, InvalidValue("dpm_solver_plan", "eta", "to be at least 0 and at most 1", "-0.1")),
        ({"eta": 1.1}, InvalidValue("dpm_solver_plan", "eta", "to be at least 0 and at most 1", "1.1")),
        ({"solver": "euler"}, InvalidValue("dpm_solver_plan", "solver", "to be one of midpoint, heun", "'euler'")),
        (
            {"spacing": "log"},
            InvalidValue("dpm_solver_plan", "spacing", "to be one of linspace, leading, trailing, karras", "'log'"),
        ),
        ({"final": "one"}, InvalidValue("dpm_solver_plan", "final", "to be one of zero, sigma_min", "'one'")),
        (
            {"start": 501},
            InvalidValue("dpm_solver_plan", "start", "to be one of the plan's timesteps", "501; the nearest is 500"),
        ),
        (
            {"lambda_min": 10.0},
            InvalidValue("dpm_solver_plan", "lambda_min", "to be at most 4.211, lambda at timestep 1", "10.0"),
        ),
        (
            {"lambda_min": math.nan},
            InvalidValue("dpm_solver_plan", "lambda_min", "to be at most 4.211, lambda at timestep 1", "nan"),
        ),
        (
            {"prediction": "previous_sample"},
            InvalidValue(
                "dpm_solver_plan", "prediction", "to be one of epsilon, sample, v_prediction, flow or None", "'previous_sample'"
            ),
        ),
        ({"clip": 0.0}, InvalidValue("dpm_solver_plan", "clip", "to be positive or None", "0.0")),
        *(
            (
                {name: value},
                InvalidValue("dpm_solver_plan", name, 'to go with spacing="karras"', f"{value} with 'linspace'"),
            )
            for name, value in (("sigma_min", 0.1), ("sigma_max", 40.0), ("rho", 5.0))
        ),
        (
            {"spacing": [3, 2, 1], "num_steps": None, "sigma_min": 0.1},
            InvalidValue("dpm_solver_plan", "sigma_min", 'to go with spacing="karras"', "0.1 with [3, 2, 1]"),
        ),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], error: ArgumentError) -> None:
    with refused(error):
        dpm_solver_plan(NoiseSchedule.linear(), **options)


@pytest.mark.parametrize("build", [dpm_solver_plan, heun_plan])
def test_levels_outside_the_schedule_are_named(build: Any) -> None:
    abar = NoiseSchedule.linear().alpha_bars
    low = float(((1 - abar) / abar).sqrt()[0])
    caller, within = build.__name__, "to be in 0.0100005..157.407, the levels of the timesteps"
    for name, value in (
        *(("sigma_max", value) for value in (158.0, math.inf, math.nan, 0.009)),
        *(("sigma_min", value) for value in (158.0, 0.009, -math.inf, math.nan)),
    ):
        with refused(InvalidValue(caller, name, within, value)):
            build(NoiseSchedule.linear(), 5, spacing="karras", **{name: value})
    for sigma_max in (1.0, 2.0, math.nextafter(2, 3)):
        with refused(InvalidValue(caller, "sigma_max", "to be above the last level, 2", sigma_max)):
            build(NoiseSchedule.linear(), 5, spacing="karras", sigma_min=2.0, sigma_max=sigma_max)
    with refused(InvalidValue(caller, "sigma_max", "to be above the last level, 0.0100005", low)):
        build(NoiseSchedule.linear(), 5, spacing="karras", sigma_max=low)
    for rho in (0.5, math.inf):
        with refused(InvalidValue(caller, "rho", "to be at least 1 and at most 100", rho)):
            build(NoiseSchedule.linear(), 5, spacing="karras", rho=rho)
    assert build(NoiseSchedule.linear(), 5, spacing="karras", sigma_min=0.01, sigma_max=157.41)  # rounded
    for name, value in (("sigma_min", 0.00999), ("sigma_max", 157.5)):
        with refused(InvalidValue(caller, name, within, value)):
            build(NoiseSchedule.linear(), 5, spacing="karras", **{name: value})
    with refused(InvalidType(build.__name__, "sigma_min", "to be a number or None", "str")):
        build(NoiseSchedule.linear(), 5, spacing="karras", sigma_min="0.1")
    with refused(InvalidValue(build.__name__, "num_steps", "to be an integer in 1..1000", "1001")):
        build(NoiseSchedule.linear(), 1001, spacing="karras", sigma_min=0.1)


def test_a_schedule_of_one_timestep_is_refused() -> None:
    with refused(InvalidValue("dpm_solver_plan", "schedule", "to have at least 2 timesteps", "1")):
        dpm_solver_plan(NoiseSchedule.linear(1), 1)


def test_heun_refuses_zero_terminal_snr() -> None:
    schedule = NoiseSchedule.linear().rescale_zero_terminal_snr()
    with refused(
        InvalidValue("heun_plan", "", "abar to be above 0 at the first timestep", "0 at 999: pass a finite lambda_min")
    ):
        heun_plan(schedule, 5, prediction="v_prediction")
    with refused(InvalidValue("dpm_solver_plan", "sigma_max", "to be given, as abar is 0 at the last timestep", "None")):
        dpm_solver_plan(schedule, 5, spacing="karras", prediction="v_prediction")
    ratios = (1 / schedule.alpha_bars - 1).sqrt()
    highest = float(ratios[-2])
    with refused(
        InvalidValue("heun_plan", "sigma_max", f"to be in 0.0100005..{highest:.6g}, the levels of the timesteps", 1e6)
    ):
        heun_plan(schedule, 5, spacing="karras", sigma_max=1e6)
    for sigma_max in (100.0, highest):
        plan = heun_plan(schedule, 5, spacing="karras", sigma_max=sigma_max)
        assert float(plan.alpha_bars[0]) == pytest.approx(1 / (1 + sigma_max**2))
        assert int(plan.timesteps[0]) == int((ratios.log() - math.log(sigma_max)).abs().argmin())
