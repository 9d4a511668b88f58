"""DPM-Solver++ and Heun's method against their formulas in float64, and against diffusers."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import some
from refusals import by, refused
from torch import Tensor

from ddpm_fast import NoiseSchedule, SamplingPlan, ddim_plan, ddpm_plan, dpm_solver_plan, heun_plan, noise, reverse_step
from ddpm_fast.errors import ArgumentError, InvalidType, InvalidValue
from ddpm_fast.plan import COLUMNS
from ddpm_fast.schedule import NoiseSchedule as Schedule

SCHEDULES = {
    "linear": (NoiseSchedule.linear(), -math.inf),
    "scaled_linear": (NoiseSchedule.scaled_linear(), -math.inf),
    "cosine": (NoiseSchedule.cosine(), -5.1),
    "sigmoid": (NoiseSchedule.sigmoid(), -5.1),
}
LINEAR = SCHEDULES["linear"][0]
ZERO_SNR = LINEAR.rescale_zero_terminal_snr()
HIGHEST = float((1 / ZERO_SNR.alpha_bars[-2] - 1).sqrt())
WITHIN = "to be in 0.0100005..157.407, the levels of the timesteps"
LEVELS = f"to be strictly descending numbers in {WITHIN[9:]}"
CORRECTIONS = "to be numbers [2, 3] in -1.0..1.0, without k3 in the first and last step and k1 in the last"
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
    known: list[Tensor] = []  # x_0^ of the steps before
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
            d_1 = (x_0 - known[-1]) * h / (lambdas[i] - lambdas[i - 1])
            if solver == "midpoint":
                x_next = x_next + 0.5 * alphas[i + 1] * (1 - grown) * d_1
            else:
                x_next = x_next + alphas[i + 1] * ((grown - 1) / ((1 + eta) * h) + 1) * d_1
        if taken == 3:
            r_0, r_1 = (lambdas[i] - lambdas[i - 1]) / h, (lambdas[i - 1] - lambdas[i - 2]) / h
            d_10, d_11 = (x_0 - known[-1]) / r_0, (known[-1] - known[-2]) / r_1
            d_1, d_2 = d_10 + r_0 / (r_0 + r_1) * (d_10 - d_11), (d_10 - d_11) / (r_0 + r_1)
            big = (1 + eta) * h
            x_next = x_next + alphas[i + 1] * ((grown - 1) / big + 1) * d_1
            half = 0.5 if eta == 0 else -0.5  # diffusers has this sign
            x_next = x_next + alphas[i + 1] * ((1 - grown - big) / big**2 + half) * d_2
        if eta:
            std = sigmas[i + 1] * math.sqrt(1 - math.exp(-2 * eta * h))
            x_next = x_next + std * noise(SHAPE, SEEDS, stream=i, dtype=torch.float64)
        x = x_next
        known.append(x_0)
    return x


@pytest.mark.again  # with --full it has the whole product
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_trajectories_equal_the_formulas(name: str, prediction: Any, pytestconfig: pytest.Config) -> None:
    """Orders, solvers, eta, spacings and last levels: rows agree within 1e-10, the float32 kernel within 1e-5.

    The errors are relative to the largest value of a result. The reference knows nothing of rows.
    """
    schedule, lambda_min = SCHEDULES[name]
    x = noise(SHAPE, SEEDS, stream=99, dtype=torch.float64)
    rows = [
        (spacing, order, eta, *others)
        for spacing, order, eta, *others in itertools.product(
            ("linspace", "leading", "trailing", "karras"),
            ((1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint"), (3, "heun")),
            (0.0, 0.5, 1.0),
            ("zero", "sigma_min"),
            (7, 20),
            (1.0, None),
        )
        # With "sigma_min" their last step goes from a level to itself, where the formula is 0 / 0.
        if (spacing in ("linspace", "leading") or others[0] == "zero") and (order[0] < 3 or eta != 0.5)
    ]
    for spacing, (order, solver), eta, final, num_steps, clip in rows if pytestconfig.getoption("full") else some(rows):
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


@pytest.mark.parametrize(
    ("spacing", "given"),
    [("linspace", {}), ("trailing", {}), ("karras", {}), ("karras", {"sigma_min": 0.1, "sigma_max": 40.0, "rho": 3.0})],
)
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("clip", [1.0, None])
def test_heun_equals_its_algorithm(spacing: Any, given: Any, prediction: Any, clip: float | None) -> None:
    levels = textbook_levels(LINEAR, spacing, 6, "zero", -math.inf, **given)
    x = noise(SHAPE, SEEDS, stream=99, dtype=torch.float64)
    expected = textbook_heun(LINEAR, levels, x, prediction, clip)
    plan = heun_plan(LINEAR, 6, spacing=spacing, prediction=prediction, clip=clip, **given)
    torch.testing.assert_close(run_in_float64(plan, x), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(run(plan, x.float()).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_chosen_levels_equal_the_formulas(name: str) -> None:
    """The ends of the range and levels inside it, any rho."""
    schedule, lambda_min = SCHEDULES[name]
    lowest = float((1 / schedule.alpha_bars[0] - 1).sqrt())
    highest = max(ratio for ratio in (1 / schedule.alpha_bars - 1).sqrt().tolist() if -math.log(ratio) >= lambda_min)
    for sigma_min, sigma_max, rho, num_steps in itertools.product((lowest, 0.1), (highest, 40.0), (7.0, 3), (1, 5, 16)):
        given: Any = {"sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho, "lambda_min": lambda_min}
        t, ratios = textbook_levels(schedule, "karras", num_steps, "zero", **given)
        abar, rows = [1 / (1 + ratio**2) for ratio in ratios], range(2 * num_steps - 1)
        for build, starts, arrivals in (
            (dpm_solver_plan, list(range(num_steps)), list(range(1, num_steps + 1))),
            (heun_plan, [(row + 1) // 2 for row in rows], [row // 2 + 1 for row in rows]),
        ):
            plan = build(schedule, num_steps, spacing="karras", **given)
            assert plan.timesteps.tolist() == [t[i] for i in starts]
            assert plan.alpha_bars.tolist() == pytest.approx([abar[i] for i in starts], rel=1e-12)
            assert plan.alpha_bars_prev.tolist() == pytest.approx([abar[i] for i in arrivals], rel=1e-12)
            if build is dpm_solver_plan:
                listed = build(schedule, levels=ratios[:-1])
                assert torch.equal(listed.timesteps, plan.timesteps)
                # The textbook rounds its levels otherwise, and a step divides by their differences.
                torch.testing.assert_close(listed.coefficients, plan.coefficients, rtol=1e-9, atol=1e-12)


def test_corrections_are_added_to_three_columns() -> None:
    levels, corrections = [40.0, 3.0, 0.5, 0.1], [[0.1, 0.2, 0.0], [0.3, 0.4, 0.5], [0.6, 0.7, 0.8], [-1.0, 0.0, 0.0]]
    plain, plan = (dpm_solver_plan(LINEAR, levels=levels, corrections=each) for each in (None, corrections))
    columns = [COLUMNS.index(name) for name in ("k0", "k1", "k3")]
    expected = plain.coefficients.clone()
    expected[:, columns] += torch.tensor(corrections, dtype=torch.float64)
    assert torch.equal(plan.coefficients, expected)
    start = int(plan.timesteps[1])
    later, expected = plan.starting_at(start), plain.starting_at(start).coefficients.clone()
    expected[1:, columns] += torch.tensor(corrections[2:], dtype=torch.float64)
    assert torch.equal(later.coefficients, expected)


@pytest.mark.parametrize("build", [dpm_solver_plan, heun_plan])
def test_an_edit_starts_at_the_levels_that_were_chosen(build: Any) -> None:
    plan = build(LINEAR, 6, spacing="karras", sigma_min=0.1, sigma_max=40.0, rho=5.0)
    later = plan.starting_at(int(plan.timesteps[-3]))
    abar, told = float(plan.alpha_bars[-later.num_steps]), float(LINEAR.alpha_bars[plan.timesteps[-3]])
    assert float(later.alpha_bars[0]) == abar
    assert abar != pytest.approx(told, rel=1e-6)  # the timestep is rounded, the level is not
    assert "sigma_min=0.1, sigma_max=40.0, rho=5.0" in str(later)
    assert f"{abar:.4g}" in str(later).splitlines()[3]


def test_order_1_is_ddim() -> None:
    """DPM-Solver++ of order 1 with eta = 0 is DDIM between the same levels (Lu et al. 2022, section 4)."""
    schedule = NoiseSchedule.linear()
    solver = dpm_solver_plan(schedule, order=1)
    ddim = ddim_plan(schedule, None, spacing=solver.timesteps.tolist())
    torch.testing.assert_close(solver.coefficients, ddim.coefficients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_a_plan_with_a_start_begins_with_order_1(order: int, final: Any) -> None:
    """The steps before it are not known. The number of steps of the whole plan decides on the order of the last one."""
    options: Any = {"final": final, "eta": 1.0}
    later = dpm_solver_plan(LINEAR, 20, order=order, **options).starting_at(500)
    given = dpm_solver_plan(LINEAR, 20, order=order, **options, start=500)
    assert torch.equal(later.coefficients, given.coefficients)
    for row in range(later.num_steps):
        whole = dpm_solver_plan(LINEAR, 20, order=min(order, row + 1), **options)
        assert torch.equal(later.coefficients[row], whole.coefficients[10 + row])


def test_heun_restarts_with_a_pair_of_steps() -> None:
    plan = heun_plan(NoiseSchedule.linear(), 5)
    later = plan.starting_at(599)
    assert later.timesteps.tolist() == [599, 400, 400, 200, 200]
    assert torch.equal(later.coefficients, plan.coefficients[4:])


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (ddpm_plan, {"spacing": "trailing"}),
        (ddim_plan, {"spacing": "trailing"}),
        (dpm_solver_plan, {}),
        (dpm_solver_plan, {"eta": 1.0}),
    ],
)
def test_zero_terminal_snr_begins_from_pure_noise_unless_the_model_predicts_epsilon(build: Any, options: Any) -> None:
    plan = build(ZERO_SNR, 10, prediction="v_prediction", **options)
    assert float(ZERO_SNR.alpha_bars[plan.timesteps[0]]) == 0
    assert run(plan, noise(SHAPE, SEEDS, stream=99, dtype=torch.float64)).isfinite().all()
    with refused(
        by(
            build.__name__,
            InvalidValue(
                "",
                "finite coefficients",
                "p = inf at timestep 999 (abar = 0) with prediction 'epsilon', which does not determine x_0 and epsilon there; "
                '"sample", "v_prediction" and "flow" do',
            ),
        )
    ):
        build(ZERO_SNR, 10, **options)


@pytest.mark.parametrize("ratio", [100.0, HIGHEST])
def test_zero_terminal_snr_may_begin_at_a_chosen_level(ratio: float) -> None:
    plan = heun_plan(ZERO_SNR, 5, spacing="karras", sigma_max=ratio)
    assert float(plan.alpha_bars[0]) == pytest.approx(1 / (1 + ratio**2))
    logarithms = (1 / ZERO_SNR.alpha_bars - 1).sqrt().log()
    assert int(plan.timesteps[0]) == int((logarithms - math.log(ratio)).abs().argmin())


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"num_steps": 0}, by("dpm_solver_plan", InvalidValue("num_steps", "to be an integer in 1..999", "0"))),
        ({"num_steps": 1000}, by("dpm_solver_plan", InvalidValue("num_steps", "to be an integer in 1..999", "1000"))),
        (
            {"num_steps": 1001, "spacing": "trailing"},
            by("dpm_solver_plan", InvalidValue("num_steps", "to be an integer in 1..1000", "1001")),
        ),
        ({"num_steps": None}, by("dpm_solver_plan", InvalidType("num_steps", "to be an integer in 1..999", "None"))),
        ({"order": 4}, by("dpm_solver_plan", InvalidValue("order", "to be an integer in 1..3", "4"))),
        ({"order": 3, "eta": 0.5}, by("dpm_solver_plan", InvalidValue("eta", "to be 0 or 1 with order 3", 0.5))),
        ({"eta": -0.1}, by("dpm_solver_plan", InvalidValue("eta", "to be at least 0 and at most 1", "-0.1"))),
        ({"eta": 1.1}, by("dpm_solver_plan", InvalidValue("eta", "to be at least 0 and at most 1", "1.1"))),
        ({"solver": "euler"}, by("dpm_solver_plan", InvalidValue("solver", "to be one of midpoint, heun", "'euler'"))),
        (
            {"spacing": "log"},
            by("dpm_solver_plan", InvalidValue("spacing", "to be one of linspace, leading, trailing, karras", "'log'")),
        ),
        ({"final": "one"}, by("dpm_solver_plan", InvalidValue("final", "to be one of zero, sigma_min", "'one'"))),
        (
            {"start": 501},
            by("dpm_solver_plan", InvalidValue("start", "to be one of the plan's timesteps", "501; the nearest is 500")),
        ),
        (
            {"lambda_min": 10.0},
            by("dpm_solver_plan", InvalidValue("lambda_min", "to be at most 4.211, lambda at timestep 1", "10.0")),
        ),
        (
            {"lambda_min": math.nan},
            by("dpm_solver_plan", InvalidValue("lambda_min", "to be at most 4.211, lambda at timestep 1", "nan")),
        ),
        (
            {"prediction": "previous_sample"},
            by(
                "dpm_solver_plan",
                InvalidValue("prediction", "to be one of epsilon, sample, v_prediction, flow or None", "'previous_sample'"),
            ),
        ),
        ({"clip": 0.0}, by("dpm_solver_plan", InvalidValue("clip", "to be positive or None", "0.0"))),
        *(
            ({"levels": levels}, by("dpm_solver_plan", kind("levels", LEVELS, got)))
            for levels, kind, got in (
                *(([1.0, 2.0], InvalidValue, [1.0, 2.0]), ([2.0, 2.0], InvalidValue, [2.0, 2.0]), ([], InvalidValue, [])),
                *(([158.0, 1.0], InvalidValue, [158.0, 1.0]), ([1.0, 0.009], InvalidValue, [1.0, 0.009])),
                *(([math.nan], InvalidValue, [math.nan]), ("high", InvalidType, "'high'")),
            )
        ),
        *(
            (
                {"levels": [2.0, 1.0], name: value},
                by("dpm_solver_plan", InvalidValue(name, "to be left out with levels", repr(value))),
            )
            for name, value in (
                *(("num_steps", 2), ("spacing", "karras"), ("sigma_min", 0.1), ("sigma_max", 40.0), ("rho", 5.0)),
                *(("lambda_min", -5.1), ("final", "sigma_min")),
            )
        ),
        *(
            (
                {"levels": [2.0, 1.0], "corrections": value},
                by("dpm_solver_plan", kind("corrections", CORRECTIONS, got)),
            )
            for value, kind, got in (
                ([[0.0, 0.0]] * 2, InvalidValue, [[0.0, 0.0]] * 2),
                ([[0.0, 0.0, 0.1], [0.0] * 3], InvalidValue, [[0.0, 0.0, 0.1], [0.0] * 3]),
                ([[0.0] * 3, [0.0, 0.1, 0.0]], InvalidValue, [[0.0] * 3, [0.0, 0.1, 0.0]]),
                ([[math.nan, 0.0, 0.0], [0.0] * 3], InvalidValue, [[math.nan, 0.0, 0.0], [0.0] * 3]),
                ([[1.01, 0.0, 0.0], [0.0] * 3], InvalidValue, [[1.01, 0.0, 0.0], [0.0] * 3]),
                ("none", InvalidType, "'none'"),
            )
        ),
        *(
            (
                {"corrections": [[0.0] * 3] * 2, **options},
                by("dpm_solver_plan", InvalidValue("corrections", "to go with levels, order 2 and eta 0", got)),
            )
            for options, got in (({}, "others"), ({"levels": [2.0, 1.0], "eta": 1.0}, "others"))
        ),
        *(
            (
                {name: value},
                by("dpm_solver_plan", InvalidValue(name, 'to go with spacing="karras"', f"{value} with 'linspace'")),
            )
            for name, value in (("sigma_min", 0.1), ("sigma_max", 40.0), ("rho", 5.0))
        ),
        (
            {"spacing": [3, 2, 1], "num_steps": None, "sigma_min": 0.1},
            by("dpm_solver_plan", InvalidValue("sigma_min", 'to go with spacing="karras"', "0.1 with [3, 2, 1]")),
        ),
        (
            {"schedule": NoiseSchedule.linear(1), "num_steps": 1},
            by("dpm_solver_plan", InvalidValue("schedule", "to have at least 2 timesteps", "1")),
        ),
        (
            {"schedule": ZERO_SNR, "spacing": "karras", "prediction": "v_prediction"},
            by("dpm_solver_plan", InvalidValue("sigma_max", "to be given, as abar is 0 at the last timestep", "None")),
        ),
        (
            {"build": heun_plan, "schedule": ZERO_SNR, "prediction": "v_prediction"},
            by("heun_plan", InvalidValue("", "abar to be above 0 at the first timestep", "0 at 999: pass a finite lambda_min")),
        ),
        (
            {"build": heun_plan, "schedule": ZERO_SNR, "spacing": "karras", "sigma_max": 1e6},
            by("heun_plan", InvalidValue("sigma_max", f"to be in 0.0100005..{HIGHEST:.6g}, the levels of the timesteps", 1e6)),
        ),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], error: ArgumentError) -> None:
    build, schedule = options.get("build", dpm_solver_plan), options.get("schedule", LINEAR)
    with refused(error):
        build(schedule, **{name: value for name, value in options.items() if name not in ("build", "schedule")})


LOWEST = float((1 / LINEAR.alpha_bars[0] - 1).sqrt())


@pytest.mark.parametrize("build", [dpm_solver_plan, heun_plan])
@pytest.mark.parametrize(
    ("options", "error"),
    [
        *(
            ({name: value}, InvalidValue(name, WITHIN, value))
            for name, values in (
                ("sigma_max", (158.0, 157.5, math.inf, math.nan, 0.009)),
                ("sigma_min", (158.0, 0.009, 0.00999, -math.inf, math.nan)),
            )
            for value in values
        ),
        *(
            ({"sigma_min": 2.0, "sigma_max": value}, InvalidValue("sigma_max", "to be above the last level, 2", value))
            for value in (1.0, 2.0, math.nextafter(2, 3))
        ),
        ({"sigma_max": LOWEST}, InvalidValue("sigma_max", "to be above the last level, 0.0100005", LOWEST)),
        *(({"rho": value}, InvalidValue("rho", "to be at least 1 and at most 100", value)) for value in (0.5, math.inf)),
        ({"sigma_min": "0.1"}, InvalidType("sigma_min", "to be a number or None", "str")),
        (
            {"num_steps": 1001, "sigma_min": 0.1},
            InvalidValue("num_steps", "to be an integer in 1..1000", "1001"),
        ),
    ],
)
def test_levels_outside_the_schedule_are_named(build: Any, options: dict[str, Any], error: ArgumentError) -> None:
    with refused(error.renamed(caller=build.__name__)):
        build(LINEAR, **{"num_steps": 5, "spacing": "karras"} | options)


@pytest.mark.parametrize("build", [dpm_solver_plan, heun_plan])
def test_the_ends_of_the_levels_may_be_given_as_they_are_printed(build: Any) -> None:
    assert build(LINEAR, 5, spacing="karras", sigma_min=0.01, sigma_max=157.41)
