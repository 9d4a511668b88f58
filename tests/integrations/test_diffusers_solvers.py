"""DPMSolverMultistepScheduler and DDIMInverseScheduler in place of diffusers' own."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import diffusers, generator
from scheduler_pairs import EPS, EPS64, LISTED, SHAPE, assert_same_image, in_float64, made, model, normals, pair
from torch import Tensor

import ddpm_fast
from ddpm_fast.integrations.diffusers import DDIMInverseScheduler, DDPMScheduler
from ddpm_fast.integrations.diffusers import DPMSolverMultistepScheduler as SOLVER
from ddpm_fast.plan import COLUMNS

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # NumPy's, of diffusers


def rows_in_float64(plan: ddpm_fast.SamplingPlan, config: Any) -> Tensor:
    """Run a plan's float64 rows, with the noise that diffusers draws."""
    x, draws = normals(*SHAPE, dtype=torch.float64), generator(5)
    x_0_prev = x_0_prev2 = torch.zeros_like(x)
    for t, row in zip(plan.timesteps, plan.coefficients.tolist(), strict=True):
        p, q, k0, k1, k2, k3, k4, sigma, _, _, clip = row
        m = model(plan.schedule, config, x, t)[:, : x.shape[1]]
        x_0 = (p * x + q * m).clamp(-clip, clip)
        x = k0 * x_0 + k1 * x + k2 * m + k3 * x_0_prev + k4 * x_0_prev2
        if config.get("algorithm_type", "").startswith("sde"):
            x = x + sigma * torch.randn(SHAPE, generator=draws).double()
        x_0_prev, x_0_prev2 = x_0, x_0_prev
    return torch.cat([x.flatten(), torch.randn(4, generator=draws).double()])


SDE = {"algorithm_type": "sde-dpmsolver++"}
KARRAS = {"use_karras_sigmas": True}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
GRID: list[dict[str, Any]] = [
    *(
        {"algorithm_type": a, "solver_type": s, "solver_order": o}
        for a, s, o in product(("dpmsolver++", "sde-dpmsolver++"), ("midpoint", "heun"), (1, 2, 3))
    ),
    *({"prediction_type": p, **sde} for p in ("sample", "v_prediction") for sde in ({}, SDE)),
    *({"timestep_spacing": s, **sde} for s in ("leading", "trailing") for sde in ({}, SDE)),
    {"timestep_spacing": "leading", "steps_offset": 1, "beta_schedule": "scaled_linear", "beta_end": 0.012},
    *({**SIGMA_MIN, **e, **sde} for e in ({"euler_at_final": True}, {"lower_order_final": False}, {}) for sde in ({}, SDE)),
    {**SIGMA_MIN, "timestep_spacing": "trailing"},
    *({**KARRAS, **sde} for sde in ({}, SDE)),
    {**KARRAS, **SIGMA_MIN},
    {**KARRAS, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "v_prediction"},
    {**KARRAS, **COSINE, **SDE},
    *({**COSINE, "lambda_min_clipped": -5.1, "timestep_spacing": s} for s in ("linspace", "leading", "trailing")),
    *({"variance_type": v, **sde} for v in ("learned", "learned_range") for sde in ({}, SDE)),
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", **SDE},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", **KARRAS},
    *({"thresholding": True, "sample_max_value": v, **sde} for v in (1.0, 1.5) for sde in ({}, SDE)),
    {"thresholding": True, "variance_type": "learned_range", "prediction_type": "epsilon", **KARRAS},
    {"thresholding": True, "prediction_type": "v_prediction", "solver_order": 1},
    *(
        {"solver_order": 3, **SIGMA_MIN, **e, **sde}
        for e in ({"euler_at_final": True}, {"lower_order_final": False})
        for sde in ({}, SDE)
    ),
    {"solver_order": 3, "prediction_type": "v_prediction", "timestep_spacing": "leading"},
    {"solver_order": 3, "prediction_type": "sample", "timestep_spacing": "trailing", **SDE},
    {"solver_order": 3, **KARRAS},
    {"solver_order": 3, "thresholding": True, "sample_max_value": 1.5},
    {"trained_betas": [0.01, 0.02, 0.05, 0.1, 0.2] * 8, "num_train_timesteps": 40},
    {"algorithm_type": "deis", "solver_type": "bh2", **SIGMA_MIN},
]

# Order 3 has lower orders in its first and last steps.
FEW = [{"solver_order": 3, **config} for config in ({}, SDE, {**SIGMA_MIN, "lower_order_final": False}, KARRAS)]


@pytest.mark.parametrize(("config", "steps"), [*product(GRID, (10, 33)), *product(FEW, (1, 2, 3, 4, 14, 15))], ids=str)
def test_the_same_seed_gives_the_same_image(config: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair(SOLVER, steps, **config)
    exact = assert_same_image(ours, theirs, monkeypatch)
    if not config.get("thresholding"):
        difference = (rows_in_float64(ours.sampling_plan(), ours.config) - exact).abs().max()
        # Weights take logarithms of levels, which are rounded relative to the largest one, in about eight operations a step.
        largest = float(ours.lambda_t.abs().max()) + 1
        assert difference <= steps * 8 * EPS64 * largest * max(1.0, float(exact.abs().max()))


def test_levels_are_those_of_diffusers() -> None:
    """Diffusers computes 1 - abar in float32: at t = 0, where it is 1e-4, that loses four digits."""
    for config in ({}, KARRAS, SIGMA_MIN, {**COSINE, "lambda_min_clipped": -5.1}):
        ours, theirs = pair(SOLVER, **config)
        for name in ("alpha_t", "sigma_t", "lambda_t", "sigmas"):
            torch.testing.assert_close(getattr(ours, name)[:-1], getattr(theirs, name)[:-1], rtol=EPS / 4e-5, atol=EPS / 4e-5)
        ours, theirs = pair(SOLVER, 20, **config)
        torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=EPS / 4e-5, atol=0)


SPACINGS: list[dict[str, Any]] = [
    *({"timestep_spacing": spacing} for spacing in ("linspace", "leading", "trailing")),
    *(KARRAS, KARRAS | COSINE),
    # These depend on the last bits of a rescaled table in float32.
    *(
        {**KARRAS, "beta_schedule": schedule, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
        for schedule in ("linear", "scaled_linear", "squaredcos_cap_v2")
    ),
]


@pytest.mark.parametrize("config", SPACINGS, ids=str)
@pytest.mark.parametrize("lambda_min", [-float("inf"), -5.1])
def test_timesteps_are_those_of_diffusers(config: dict[str, Any], lambda_min: float) -> None:
    """For every number of steps of 100. A timestep is not listed twice, nor is -1."""
    config = {"num_train_timesteps": 100, "lambda_min_clipped": lambda_min, "beta_end": 0.2} | config
    config |= COSINE if lambda_min > -10 else {}
    schedulers = ours, theirs = pair(SOLVER, **config)
    last = int((theirs.lambda_t >= lambda_min).sum())
    for steps in range(1, last if config.get("timestep_spacing") == "leading" else 101):
        for scheduler in schedulers:
            scheduler.set_timesteps(steps)
        expected = theirs.timesteps
        if "use_karras_sigmas" not in config:
            expected = expected[expected >= 0].unique_consecutive()
        assert torch.equal(ours.timesteps, expected)
        assert ours.num_inference_steps == len(expected)
        assert len(expected) == steps or config.get("timestep_spacing") == "trailing" or steps >= last


@pytest.mark.parametrize("given", [LISTED, torch.tensor(LISTED), np.array(LISTED)], ids=["list", "tensor", "array"])
def test_a_list_of_timesteps(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same_image(*pair(SOLVER, given), monkeypatch)


# --------------------------------------------------------------------------------------------------------- image to image


@pytest.mark.parametrize("is_set", [True, False])
@pytest.mark.parametrize(
    "config", [{}, SDE, KARRAS, {"thresholding": True, **SDE}, *({"solver_order": 3, **sde} for sde in ({}, SDE))], ids=str
)
def test_a_chain_may_start_in_the_middle(config: dict[str, Any], is_set: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first step has order 1 and the second at most order 2."""
    schedulers = ours, _ = pair(SOLVER, 20, **config)
    for scheduler in schedulers:
        scheduler.set_begin_index(8 if is_set else None)
    assert_same_image(*schedulers, monkeypatch, begin=8)
    assert ours.begin_index == (8 if is_set else None)
    assert ours.step_index == 20


def test_levels_of_add_noise() -> None:
    """They are the chain's: Karras's lie between timesteps, and inpainting asks for that of the next step."""
    x_0, noise = normals(2, *SHAPE, dtype=torch.float64)

    def assert_same_levels(schedulers: tuple[Any, Any], t: Tensor) -> None:
        noised = (scheduler.add_noise(x_0, noise, t) for scheduler in schedulers)
        torch.testing.assert_close(*noised, rtol=0, atol=EPS / 4e-5)  # diffusers rounds 1 - abar in float32

    for config in ({}, KARRAS, {**KARRAS, **SIGMA_MIN}):
        schedulers = pair(SOLVER, 10, **config)
        timesteps = schedulers[0].timesteps
        assert_same_levels(schedulers, timesteps[[0, 3, 9]])
        for scheduler in schedulers:
            scheduler.set_begin_index(6)
        assert_same_levels(schedulers, timesteps[6:7])
        for t in timesteps[6:]:
            for scheduler in schedulers:
                scheduler.step(noise, t, x_0)
            assert_same_levels(schedulers, t[None])


def test_add_noise_outside_a_chain() -> None:
    """The schedule's level. Diffusers takes that of the last step, or before set_timesteps that of T - 1 - t."""
    x_0, noise = normals(2, *SHAPE)
    t = torch.tensor([0, 500, 998])
    for scheduler in (SOLVER(), made(SOLVER, 10)):
        torch.testing.assert_close(scheduler.add_noise(x_0, noise, t), DDPMScheduler().add_noise(x_0, noise, t))


# ------------------------------------------------------------------------------------------------------------ noise, state


def test_a_chain_that_starts_in_the_middle_has_the_noise_of_a_whole_one() -> None:
    x_t, m = normals(2, 4, 3, 4, 4)
    seeds = ddpm_fast.sample_seeds(0, 4)
    seeded, plain = (made(SOLVER, 10, **SDE) for _ in range(2))
    seeded.seeds = seeds
    got = seeded.step(m, seeded.timesteps[6], x_t).prev_sample
    z = ddpm_fast.noise(x_t.shape, seeds, stream=6)
    given = plain.step(m, plain.timesteps[6], x_t, variance_noise=z).prev_sample
    torch.testing.assert_close(got, given, rtol=0, atol=4 * EPS)


def test_set_timesteps_begins_another_chain() -> None:
    scheduler, images = SOLVER(), []
    for steps in (10, 10, 4, 10):
        scheduler.set_timesteps(steps)
        assert (scheduler.step_index, scheduler.begin_index, scheduler.model_outputs) == (None, None, [None, None])
        x = normals(*SHAPE)
        for t in scheduler.timesteps:
            x = scheduler.step(0.1 * x, t, x, return_dict=False)[0]
        images.append(x)
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[3])
    with pytest.raises(ValueError, match="expected one of the 10 steps of set_timesteps, got step 10: call"):
        scheduler.step(x, 0, x)


@pytest.mark.parametrize("config", [{}, {"thresholding": True}])
def test_an_output_with_or_without_variance_channels(config: dict[str, Any]) -> None:
    """Diffusers keeps the first three channels of either."""
    x_t, m, v = normals(3, *SHAPE)
    results = [
        made(SOLVER, 10, variance_type="learned_range", **config).step(output, 999, x_t).prev_sample
        for output in (m, torch.cat([m, v], dim=1))
    ]
    assert torch.equal(*results)


def test_gradients_flow_through_the_remembered_x_0() -> None:
    with torch.inference_mode():
        scheduler = made(SOLVER, 10)
    scheduler.set_begin_index(0)
    x, m = normals(2, *SHAPE)
    scheduler.step(m.requires_grad_(), 0, x)
    scheduler.step(m.detach(), 0, x).prev_sample.sum().backward()
    plan = scheduler.sampling_plan()
    q, k3 = float(plan.coefficients[0, COLUMNS.index("q")]), float(plan.coefficients[1, COLUMNS.index("k3")])
    torch.testing.assert_close(m.grad, torch.full(SHAPE, q * k3))


# ---------------------------------------------------------------------------------------------------------- DDIM inversion


@pytest.mark.parametrize(
    "config",
    [
        *({"beta_schedule": s} for s in ("linear", "scaled_linear", "squaredcos_cap_v2")),
        *({"prediction_type": "v_prediction", "clip_sample": c, "timestep_spacing": "trailing"} for c in (True, False)),
        {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "beta_schedule": "scaled_linear"},
        {"prediction_type": "sample", "set_alpha_to_one": False, "clip_sample_range": 2.0},
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {"thresholding": True, "sample_max_value": 0.5},  # keys of other schedulers
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [10, 50])
def test_inversion_is_that_of_diffusers(config: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair(DDIMInverseScheduler, steps, **config)
    is_sample = config.get("prediction_type") == "sample"
    if is_sample:  # 1 - abar_0 = 1e-4 as float32's root of a difference
        theirs.alphas_cumprod = ours.schedule.alpha_bars
        theirs.initial_alpha_cumprod = ours.schedule.alpha_bars[0]
    exact = assert_same_image(ours, theirs, monkeypatch)
    difference = float((rows_in_float64(ours.sampling_plan(), ours.config) - exact).abs().max())
    # A step has about eight operations, and the first divides a rounded 1 - abar of at least 1e-4.
    assert difference <= steps * 8 * EPS64 / (1e-4 if is_sample else 1) * max(1.0, float(exact.abs().max()))


def test_single_steps_of_an_inversion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps to timesteps outside the chain begin T // n below, as in diffusers, also one for each sample."""
    ours, theirs = pair(DDIMInverseScheduler, 10)
    in_float64(ours, theirs, monkeypatch)
    x, m = normals(2, *SHAPE)
    for t in (0, 1, 99, 101, 555, 900, 999):
        for got, expected in zip(ours.step(m, t, x, False), theirs.step(m.double(), t, x.double(), False), strict=True):
            # Rounding of x_0^ = (x - sqrt(1 - abar) m) / sqrt(abar), relative to its terms.
            terms = float((x.abs() + m.abs()).max()) * float(ours.schedule.alpha_bars[max(t - 100, 0)]) ** -0.5
            torch.testing.assert_close(got.double(), expected, rtol=0, atol=4 * EPS * terms)
    together = ours.step(m, torch.tensor([0, 500, 555]), x).prev_sample
    alone = [ours.step(m[i : i + 1], t, x[i : i + 1]).prev_sample for i, t in enumerate((0, 500, 555))]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("steps", [7, 30, 50, 600])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_inversion_starts_where_that_of_diffusers_does(spacing: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At t - T // n. In "trailing" that is the timestep before only if n divides T."""
    ours, theirs = pair(DDIMInverseScheduler, steps, timestep_spacing=spacing, clip_sample=False)
    abar = torch.cat([ours.schedule.alpha_bars, torch.ones(1, dtype=torch.float64)])
    assert torch.equal(ours.sampling_plan().alpha_bars, abar[(theirs.timesteps - 1000 // steps).clamp(min=-1)])
    assert_same_image(ours, theirs, monkeypatch)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_deprecated_argument_of_inversion() -> None:
    ours, theirs = pair(DDIMInverseScheduler, 10, set_alpha_to_zero=False, clip_sample=False)
    assert ours.initial_alpha_cumprod == pytest.approx(float(theirs.initial_alpha_cumprod), rel=EPS)
    # The image is at abar_0, where the first step goes.
    assert float(ours.sampling_plan().coefficients[0, COLUMNS.index("k1")]) == pytest.approx(1, rel=EPS64)


def test_a_clip_of_another_scheduler_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    config = diffusers.DDPMScheduler(variance_type="fixed_large", clip_sample=True, clip_sample_range=0.1).config
    schedulers = [kind.from_config(config) for kind in (SOLVER, diffusers.DPMSolverMultistepScheduler)]
    for scheduler in schedulers:
        scheduler.set_timesteps(10)
    assert_same_image(*schedulers, monkeypatch)


# ---------------------------------------------------------------------------------------------------------------- errors


X = torch.zeros(SHAPE)
NAME = "DPMSolverMultistepScheduler"
BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: SOLVER(solver_order=4), f"{NAME}: expected solver_order to be an integer in 1..3, got 4"),
    (
        lambda: SOLVER(algorithm_type="dpmsolver", **SIGMA_MIN),
        r"algorithm_type to be one of dpmsolver\+\+, sde-dpmsolver\+\+, got 'dpmsolver'",
    ),
    (lambda: SOLVER(algorithm_type="sde-dpmsolver"), "algorithm_type to be one of .*, got 'sde-dpmsolver'"),
    (lambda: SOLVER(solver_type="euler"), f"{NAME}: expected solver_type to be one of midpoint, heun, got 'euler'"),
    (lambda: SOLVER(final_sigmas_type="one"), f"{NAME}: expected final_sigmas_type to be one of zero, sigma_min, got 'one'"),
    (
        lambda: SOLVER(prediction_type="flow_prediction"),
        "prediction_type to be one of epsilon, sample, v_prediction, got 'flow_prediction'",
    ),
    (lambda: SOLVER(timestep_spacing="even"), "expected timestep_spacing to be one of linspace, leading, trailing, got 'even'"),
    (lambda: SOLVER(beta_schedule="exp"), "expected beta_schedule to be one of linear, .*, got 'exp'"),
    (lambda: SOLVER(lambda_min_clipped="low"), f"{NAME}: expected lambda_min_clipped to be a number, got str"),
    (lambda: SOLVER(thresholding=True, sample_max_value=0.0), "expected sample_max_value to be positive, got 0.0"),
    *(
        (
            lambda key=key: SOLVER(**{key: True}),
            f"{NAME}: expected {key} to be false, got True: timestep_spacing and use_karras_sigmas are supported",
        )
        for key in (
            *("use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas", "use_dynamic_shifting"),
        )
    ),
    (
        lambda: SOLVER.from_config({**KARRAS, "sigma_min": 0.1}).set_timesteps(5),
        f"{NAME}.set_timesteps: expected no sigma_min with use_karras_sigmas, got 0.1",
    ),
    *(
        (
            lambda betas=betas: made(SOLVER, 10, **KARRAS, trained_betas=betas),
            rf"{NAME}.set_timesteps: expected use_karras_sigmas to be false, or betas .* in float32, got abar = {got}",
        )
        for betas, got in (
            ([0.3] * 1000, "2.69e-39 at timestep 248"),  # sigma / alpha overflows
            ([0.9] * 1000, "1e-39 at timestep 38"),  # abar is 0 in float64 too
            ([1e-9] + [0.01] * 999, "1 at timestep 0"),  # 1 - beta is 1
        )
    ),
    (lambda: made(SOLVER, 0), f"{NAME}.set_timesteps: expected num_inference_steps to be an integer in 1..1000, got 0"),
    (lambda: made(SOLVER, 1001), "expected num_inference_steps to be an integer in 1..1000, got 1001"),
    (
        lambda: made(SOLVER, 1000, timestep_spacing="leading"),
        "expected num_inference_steps to be an integer in 1..999, got 1000",
    ),
    (lambda: made(SOLVER, 2.0), f"{NAME}.set_timesteps: expected num_inference_steps to be an integer in 1..1000, got 2.0"),
    (lambda: SOLVER().set_timesteps(), "expected exactly one of num_inference_steps and timesteps, got neither"),
    (
        lambda: SOLVER().set_timesteps(3, timesteps=[2, 1]),
        "exactly one of num_inference_steps and timesteps, got both",
    ),
    (lambda: SOLVER().set_timesteps(3, mu=0.5), "expected mu to be None, as dynamic shifting .* got 0.5"),
    (
        lambda: made(SOLVER, 9, timestep_spacing="leading", steps_offset=150),
        "expected timesteps with steps_offset in 0..999, got values from 250 to 1050",
    ),
    (
        lambda: made(SOLVER, 10, timestep_spacing="leading", steps_offset=-91),
        "expected timesteps with steps_offset in 0..999, got values from -1 to",
    ),
    (
        lambda: made(SOLVER, 9, lambda_min_clipped=9.0),
        r"expected lambda_min_clipped to be at most \d.*, lambda at timestep 1, got 9.0",
    ),
    (lambda: made(SOLVER, 1, trained_betas=[0.1, 0.3]), "expected num_train_timesteps to be 2, .* got 1000"),
    (lambda: made(SOLVER, [3, 3]), r"timesteps to be strictly descending timesteps in 0..999, got \[3, 3\]"),
    (lambda: made(SOLVER, [1000, 3]), r"timesteps to be strictly descending timesteps in 0..999, got \[1000, 3\]"),
    (lambda: made(SOLVER, [3, 2], **KARRAS), r"expected timesteps to be None with use_karras_sigmas, got \[3, 2\]"),
    (lambda: SOLVER().step(X, 0, X), f"{NAME}: expected set_timesteps to have been called"),
    (
        lambda: SOLVER().sampling_plan(),
        f"{NAME}: expected set_timesteps to have been called",
    ),
    (
        lambda: made(SOLVER, 10, thresholding=True).sampling_plan(),
        f"{NAME}.sampling_plan: expected thresholding to be false, got true",
    ),
    (lambda: made(SOLVER, 10).step(None, 900, X), f"{NAME}.step: expected model_output to be a tensor, got NoneType"),
    (lambda: made(SOLVER, 10).step(X, 900, X.int()), f"{NAME}.step: expected sample to be float32, .*, got torch.int32"),
    (
        lambda: made(SOLVER, 10).step(X, None, X),
        f"{NAME}.step: expected timestep to be an int or an int64 tensor, got NoneType",
    ),
    (lambda: made(SOLVER, 10).step(X, 900.0, X), f"{NAME}.step: expected timestep to be an int or an int64 tensor, got float"),
    (lambda: made(SOLVER, 10).step(X, 1000, X), f"{NAME}.step: expected timestep to be in 0..999, got 1000"),
    (lambda: made(SOLVER, 10).step(X, torch.tensor([9, 8]), X), "expected timestep to have 1 element, got 2"),
    (
        lambda: made(SOLVER, 10).step(X[:, :2], 900, X),
        r"expected model_output to have shape \[3, 3, 6, 6\], got \[3, 2, 6, 6\]",
    ),
    (
        lambda: made(SOLVER, 10, **SDE).step(X, 900, X, generator=torch.Generator(), variance_noise=X),
        f"{NAME}.step: expected at most one of generator and variance_noise, got both",
    ),
    (
        lambda: made(SOLVER, 10).add_noise(X, X, torch.tensor([1000])),
        "expected timesteps in 0..999, got values from 1000 to 1000",
    ),
    (
        lambda: DDIMInverseScheduler(prediction_type="sample"),
        "DDIMInverseScheduler: expected prediction_type to be .* with set_alpha_to_one, .* got 'sample'",
    ),
    (
        lambda: made(DDIMInverseScheduler, 10, timestep_spacing="linspace"),
        'DDIMInverseScheduler.set_timesteps: expected timestep_spacing to be "leading" or "trailing", got "linspace"',
    ),
    (lambda: DDIMInverseScheduler().step(X, 0, X), "DDIMInverseScheduler: expected set_timesteps to have been called"),
    (lambda: DDIMInverseScheduler().sampling_plan(), "DDIMInverseScheduler: expected set_timesteps to have been"),
    (
        lambda: made(DDIMInverseScheduler, 10).step(X, 1000, X),
        "DDIMInverseScheduler.step: expected timestep to be in 0..999",
    ),
    (lambda: made(DDIMInverseScheduler, 2000), "expected num_inference_steps to be an integer in 1..1000, got 2000"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_errors(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()
