"""Plans against the derivation and against diffusers' and guided-diffusion's samplers."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from refusals import by, refused

from ddpm_fast import NoiseSchedule, SamplingPlan, ddim_plan, ddpm_plan, reverse_step
from ddpm_fast.errors import ArgumentError, InvalidType, InvalidValue
from ddpm_fast.plan import COLUMNS, ddim_inversion_plan

SCHEDULE = NoiseSchedule.linear()
SPACINGS = ("leading", "trailing", "linspace")


def column(plan: SamplingPlan, name: str) -> torch.Tensor:
    return plan.coefficients[:, COLUMNS.index(name)]


def test_without_a_clip_a_ddpm_step_is_equation_13() -> None:
    plan, t = ddpm_plan(SCHEDULE, clip=None), torch.arange(999, -1, -1)
    assert torch.equal(plan.timesteps, t)
    slope = -SCHEDULE.betas / SCHEDULE.sqrt_one_minus_alpha_bars * SCHEDULE.sqrt_recip_alphas
    expected = {"k1": SCHEDULE.sqrt_recip_alphas, "k2": slope, "sigma": SCHEDULE.posterior_variance.sqrt()}
    for name, values in expected.items():
        torch.testing.assert_close(column(plan, name), values[t], rtol=1e-12, atol=0)
    assert (column(plan, "k0") == 0).all()


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_forms_with_log_are_the_same_numbers(variance: Any) -> None:
    a, b = (ddpm_plan(SCHEDULE, 50, variance=v) for v in (variance, variance + "_log"))
    assert torch.equal(a.coefficients, b.coefficients)


def test_learned_variance_is_the_models_logarithm() -> None:
    learned, fixed = (ddpm_plan(SCHEDULE, variance=variance) for variance in ("learned", "fixed_large"))
    x_t, m, noise = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64)
    with_variance = torch.cat([m, torch.full_like(m, float(column(learned, "log_beta")[100]))], dim=1)
    got = reverse_step(x_t, with_variance, 100, learned, noise=noise)
    torch.testing.assert_close(got, reverse_step(x_t, m, 100, fixed, noise=noise), rtol=1e-6, atol=1e-6)


def test_ddim_derives_epsilon_again_from_the_clipped_x_0_by_default() -> None:
    plan, *others = (
        ddim_plan(SCHEDULE, 50, **{"use_clipped_model_output": asked} if asked is not None else {})
        for asked in (None, True, False)
    )
    assert [torch.equal(plan.coefficients, other.coefficients) for other in others] == [True, False]


def test_ddim_with_eta_1_is_ddpm() -> None:
    a = ddpm_plan(SCHEDULE, 50, clip=None)
    b = ddim_plan(SCHEDULE, 50, eta=1.0, clip=None)
    same = [column for column, name in enumerate(COLUMNS) if not name.startswith("log_")]  # those of a learned variance differ
    torch.testing.assert_close(a.coefficients[:, same], b.coefficients[:, same], rtol=1e-9, atol=1e-12)


def test_a_model_of_the_mean_gives_the_steps_of_one_of_x_0() -> None:
    """The mean of x_{t-1} is linear in x_0 (eq. 7)."""
    x_t, x_0, noise = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64)
    for build in (ddpm_plan, ddim_plan):
        by_x_0, by_mean = (build(SCHEDULE, 50, prediction=p, clip=None) for p in ("sample", "previous_sample"))
        posterior, zeros = ddpm_plan(SCHEDULE, 50, prediction="sample", clip=None), torch.zeros_like(noise)
        for step in (0, 20, 49):
            expected = reverse_step(x_t, x_0, step, by_x_0, noise=noise, return_x_0=True)
            mean = reverse_step(x_t, x_0, step, posterior, noise=zeros)
            got = reverse_step(x_t, mean, step, by_mean, noise=noise, return_x_0=True)
            torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


def test_ddim_leaves_learned_variance_aside() -> None:
    x_t, m, v, noise = torch.randn(4, 2, 3, 4, 4, dtype=torch.float64)
    with_variance, without = (ddim_plan(SCHEDULE, 50, eta=1.0, learned_variance=learned) for learned in (True, False))
    expected = reverse_step(x_t, m, 20, without, noise=noise)
    assert torch.equal(reverse_step(x_t, torch.cat([m, v], dim=1), 20, with_variance, noise=noise), expected)


def test_ddim_walks_its_inversion_back() -> None:
    """With a model that knows epsilon whatever it is given, each step back undoes one step."""
    forth, back = ddim_plan(SCHEDULE, 50, clip=None), ddim_inversion_plan(SCHEDULE, 50, clip=None)
    assert torch.equal(back.timesteps, forth.timesteps.flip(0))
    x, epsilon = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    for step in range(49):
        noisier = reverse_step(x, epsilon, step, back)
        torch.testing.assert_close(reverse_step(noisier, epsilon, 48 - step, forth), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_an_inversion_that_tells_the_arrival(prediction: Any) -> None:
    """A model that knows x_0 and epsilon moves from one noise level to the next, in a chain and in single steps."""
    abar = SCHEDULE.alpha_bars
    x_0, epsilon = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    options: Any = {"evaluate_at": "arrival", "prediction": prediction, "clip": None, "initial_alpha_bar": float(abar[0])}
    chain = ddim_inversion_plan(SCHEDULE, None, spacing=[900, 500, 1], **options)
    assert chain.timesteps.tolist() == [1, 500, 900]
    for row, (start, arrival) in enumerate(((0, 1), (1, 500), (500, 900))):
        x, expected = (abar[t].sqrt() * x_0 + (1 - abar[t]).sqrt() * epsilon for t in (start, arrival))
        v = abar[start].sqrt() * epsilon - (1 - abar[start]).sqrt() * x_0
        m = {"epsilon": epsilon, "sample": x_0, "v_prediction": v}[prediction]
        torch.testing.assert_close(reverse_step(x, m, row, chain), expected, rtol=1e-5, atol=1e-5)
    single = ddim_inversion_plan(SCHEDULE, None, spacing=[1, 900, 30], previous=[-1, 500, 7], **options)
    for row, steps in enumerate(([30, 7], [900, 500], [1])):
        chain = ddim_inversion_plan(SCHEDULE, None, spacing=steps, **options)
        assert torch.equal(single.coefficients[row], chain.coefficients[-1])


@pytest.mark.parametrize("build", [ddpm_plan, ddim_plan])
def test_steps_that_are_no_chain(build: Any) -> None:
    """Each row is that of a chain with the same two timesteps one after the other."""
    plan = build(SCHEDULE, None, spacing=[30, 999, 7, 8], previous=[7, 500, -1, 0])
    for row, chain in enumerate(([30, 7], [999, 500], [7], [8, 0])):
        assert torch.equal(plan.coefficients[row], build(SCHEDULE, None, spacing=chain).coefficients[0])


def test_a_last_step_to_the_first_timestep() -> None:
    abar = SCHEDULE.alpha_bars
    plan = ddim_plan(SCHEDULE, None, spacing=[500, 1], clip=None, prediction="sample", final_alpha_bar=float(abar[0]))
    x_0, epsilon = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    x_t = abar[1].sqrt() * x_0 + (1 - abar[1]).sqrt() * epsilon
    expected = abar[0].sqrt() * x_0 + (1 - abar[0]).sqrt() * epsilon
    torch.testing.assert_close(reverse_step(x_t, x_0, 1, plan), expected, rtol=1e-6, atol=1e-6)
    stays = ddim_plan(SCHEDULE, None, spacing=[0], clip=None, final_alpha_bar=float(abar[0]))
    torch.testing.assert_close(reverse_step(x_t, epsilon, 0, stays), x_t, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_are_those_of_diffusers(spacing: Any) -> None:
    """For every number of steps, ties and all. diffusers' "trailing" goes on to -1 for some, such as 29 of 100."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(num_train_timesteps=100, timestep_spacing=spacing)
    schedule = NoiseSchedule.linear(100)
    for num_steps in range(1, 101):
        theirs.set_timesteps(num_steps)
        expected = theirs.timesteps[theirs.timesteps >= 0]
        assert torch.equal(ddpm_plan(schedule, num_steps, spacing=spacing).timesteps, expected)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: ddpm_plan(SCHEDULE, 0), by("ddpm_plan", InvalidValue("num_steps", "to be an integer in 1..1000", "0"))),
        (lambda: ddpm_plan(SCHEDULE, 1001), by("ddpm_plan", InvalidValue("num_steps", "to be an integer in 1..1000", "1001"))),
        (
            lambda: ddpm_plan(SCHEDULE, 10, spacing="even"),
            by(
                "ddpm_plan",
                InvalidValue("spacing", 'to be "leading", "trailing", "linspace" or a sequence of timesteps', "'even'"),
            ),
        ),
        (
            lambda: ddpm_plan(SCHEDULE, spacing=[1, 2]),
            by("ddpm_plan", InvalidValue("spacing", "to be strictly descending timesteps in 0..999", "[1, 2]")),
        ),
        (
            lambda: ddpm_plan(SCHEDULE, spacing=[1000]),
            by("ddpm_plan", InvalidValue("spacing", "to be strictly descending timesteps in 0..999", "[1000]")),
        ),
        (
            lambda: ddim_inversion_plan(SCHEDULE, None, spacing=[5, 2], previous=[3, 1]),
            by("ddim_inversion_plan", InvalidValue("previous", 'to be None with evaluate_at="start"', "[3, 1]")),
        ),
        (
            lambda: ddim_inversion_plan(SCHEDULE, evaluate_at="arrival", prediction="sample"),
            by(
                "ddim_inversion_plan",
                InvalidValue(
                    "prediction",
                    'to be "epsilon", "v_prediction" or "flow", or "sample" with initial_alpha_bar below 1, with '
                    'evaluate_at="arrival", '
                    "as an image alone does not determine epsilon",
                    "'sample'",
                ),
            ),
        ),
        (
            lambda: ddpm_plan(SCHEDULE, 3, spacing=[5, 2]),
            by("ddpm_plan", InvalidValue("num_steps", "to be None or 2, as spacing lists", "3")),
        ),
        (
            lambda: ddpm_plan(SCHEDULE, prediction="eps"),
            by(
                "ddpm_plan",
                InvalidValue(
                    "prediction", "to be one of epsilon, sample, v_prediction, flow, previous_sample or None", "'eps'"
                ),
            ),
        ),
        (
            lambda: ddpm_plan(SCHEDULE, variance="small"),
            by(
                "ddpm_plan",
                InvalidValue(
                    "variance",
                    "to be one of fixed_small, fixed_small_log, fixed_large, fixed_large_log, learned, learned_range or None",
                    "'small'",
                ),
            ),
        ),
        (lambda: ddpm_plan(SCHEDULE, clip=0.0), by("ddpm_plan", InvalidValue("clip", "to be positive or None", "0.0"))),
        (
            lambda: ddpm_plan(SCHEDULE, spacing=[-1], previous=[-2]),
            by("ddpm_plan", InvalidValue("spacing", "to be timesteps in 0..999", "[-1]")),
        ),
        (
            lambda: ddpm_plan(SCHEDULE, spacing=[5, 2], previous=[5, 1]),
            by(
                "ddpm_plan",
                InvalidValue(
                    "previous",
                    "to be 2 timesteps, each at least -1 and below the one that its step starts from",
                    "[5, 1]",
                ),
            ),
        ),
        (
            lambda: ddpm_plan(SCHEDULE, spacing=[5, 2], previous=[1]),
            by(
                "ddpm_plan",
                InvalidValue(
                    "previous",
                    "to be 2 timesteps, each at least -1 and below the one that its step starts from",
                    "[1]",
                ),
            ),
        ),
        (
            lambda: ddim_plan(SCHEDULE, final_alpha_bar=0.0),
            by("ddim_plan", InvalidValue("final_alpha_bar", "to be positive and at most 1", "0.0")),
        ),
        (lambda: ddim_plan(SCHEDULE, eta=-1.0), by("ddim_plan", InvalidValue("eta", "to be at least 0", "-1.0"))),
        (
            lambda: ddim_plan(SCHEDULE, eta=9.0),
            by(
                "ddim_plan",
                InvalidValue("eta", "to be at most 1.008, which leaves sigma_t^2 at most 1 - abar_prev at every step", "9.0"),
            ),
        ),
        (
            lambda: ddim_plan(SCHEDULE, 5, final_alpha_bar=0.5, spacing="leading"),
            by("ddim_plan", InvalidValue("final_alpha_bar", "to be at least abar of the last timestep, 0.9999", "0.5")),
        ),
        (lambda: ddpm_plan(SCHEDULE, True), by("ddpm_plan", InvalidType("num_steps", "to be an integer in 1..1000", "True"))),
        (lambda: ddim_plan(SCHEDULE, eta="x"), by("ddim_plan", InvalidType("eta", "to be a number", "str"))),
        (lambda: ddim_plan(SCHEDULE, clip="x"), by("ddim_plan", InvalidType("clip", "to be a number or None", "str"))),
        (
            lambda: ddpm_plan(SCHEDULE, spacing=["a"]),
            by("ddpm_plan", InvalidType("spacing", "to be a name or timesteps", "['a']")),
        ),
        (
            lambda: ddim_plan(object()),
            by(
                "ddim_plan",
                InvalidType("schedule", "to be a NoiseSchedule (NoiseSchedule.from_diffusers(scheduler.config))", "object"),
            ),
        ),
        (
            lambda: replace(ddpm_plan(SCHEDULE, 2), timesteps=torch.tensor([5, -7])),
            by("SamplingPlan", InvalidValue("timesteps", "in 0..999", "values from -7 to 5")),
        ),
        (
            lambda: replace(ddpm_plan(SCHEDULE, 2), timesteps=torch.tensor([5000, 1])),
            by("SamplingPlan", InvalidValue("timesteps", "in 0..999", "values from 1 to 5000")),
        ),
        (
            lambda: replace(ddpm_plan(SCHEDULE, 2), timesteps=torch.tensor([5.0, 1.0])),
            by(
                "SamplingPlan",
                InvalidValue(
                    "timesteps",
                    "to be torch.int64 of 1 dimension on the CPU, with elements",
                    "torch.float32 [2] on cpu",
                ),
            ),
        ),
        (
            lambda: replace(ddpm_plan(SCHEDULE, 2), timesteps=[5, 1]),
            by("SamplingPlan", InvalidType("timesteps", "to be a tensor", "list")),
        ),
        (
            lambda: replace(ddpm_plan(SCHEDULE, 2), coefficients=torch.zeros(2, 10)),
            by(
                "SamplingPlan",
                InvalidValue(
                    "coefficients",
                    "to be torch.float64 of 2 dimensions on the CPU, with elements",
                    "torch.float32 [2, 10] on cpu",
                ),
            ),
        ),
        (
            lambda: replace(ddpm_plan(SCHEDULE, 2), alpha_bars_prev=torch.tensor([0.5, 1.5], dtype=torch.float64)),
            by("SamplingPlan", InvalidValue("alpha_bars_prev", "to be 2 values in 0..1", "[0.5, 1.5]")),
        ),
        (
            lambda: replace(ddpm_plan(SCHEDULE, 2), alpha_bars_prev=torch.tensor([0.5], dtype=torch.float64)),
            by("SamplingPlan", InvalidValue("alpha_bars_prev", "to be 2 values in 0..1", "[0.5]")),
        ),
        (
            lambda: replace(ddpm_plan(SCHEDULE, 2), alpha_bars=torch.tensor([-0.5, 0.5], dtype=torch.float64)),
            by("SamplingPlan", InvalidValue("alpha_bars", "to be 2 values in 0..1", "[-0.5, 0.5]")),
        ),
    ],
)
def test_errors(make, error: ArgumentError) -> None:
    with refused(error):
        make()


@pytest.mark.parametrize("options", [{"spacing": "trailing"}, {"final_alpha_bar": float(SCHEDULE.alpha_bars[0])}])
def test_the_largest_eta_that_the_error_names_is_admissible_and_no_larger(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected eta to be at most") as raised:
        ddim_plan(SCHEDULE, 20, eta=9.0, **options)
    largest = float(re.findall(r"at most ([\d.]+),", str(raised.value))[0])
    assert ddim_plan(SCHEDULE, 20, eta=largest, **options).is_random
    with pytest.raises(ValueError, match=f"at most {largest},"):
        ddim_plan(SCHEDULE, 20, eta=largest + 2e-4, **options)
