"""DPMSolverMultistepScheduler and DDIMInverseScheduler in place of diffusers' own."""

from __future__ import annotations

import inspect
import itertools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ddpm_fast
from ddpm_fast.plan import COLUMNS
from ddpm_fast.reference import STREAM_X_T

diffusers = pytest.importorskip("diffusers")

from diffusers.schedulers import scheduling_dpmsolver_multistep as their_module  # noqa: E402

from ddpm_fast.integrations.diffusers import DDIMInverseScheduler, DDPMScheduler, DPMSolverMultistepScheduler  # noqa: E402

THEIRS = {
    DPMSolverMultistepScheduler: diffusers.DPMSolverMultistepScheduler,
    DDIMInverseScheduler: diffusers.DDIMInverseScheduler,
}
EPS, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
SHAPE = (3, 3, 6, 6)

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # NumPy's, of diffusers


def normals(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Wide:
    """A module of numbers whose float32 is float64."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.float32 = module.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def in_float64(ours: Any, theirs: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Diffusers' scheduler as it would be without rounding: float64 throughout, with the noise of float32."""
    timesteps, index = theirs.timesteps, getattr(theirs, "begin_index", None)
    theirs.alphas_cumprod = ours.schedule.alpha_bars
    if isinstance(ours, DDIMInverseScheduler):
        if not theirs.config.set_alpha_to_one:
            theirs.initial_alpha_cumprod = ours.schedule.alpha_bars[0]
        return theirs
    draw = diffusers.utils.torch_utils.randn_tensor

    def drawn(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None) -> Tensor:
        return draw(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    monkeypatch.setattr(their_module, "randn_tensor", drawn)
    monkeypatch.setattr(their_module, "torch", Wide(torch))
    monkeypatch.setattr(their_module, "np", Wide(np))
    if theirs.config.use_karras_sigmas:
        theirs.set_timesteps(len(timesteps))
        theirs.timesteps = timesteps  # rounded from float32 levels
    else:
        theirs.set_timesteps(timesteps=timesteps)
    if index is not None:
        theirs.set_begin_index(index)
    return theirs


def model(schedule: Any, config: Any, x: Tensor, t: Any) -> Tensor:
    """Near what the best model says of images that are noise; it amplifies no difference."""
    abar = schedule.alpha_bars[int(t)].to(x.dtype)
    best = {"epsilon": (1 - abar).sqrt() * x, "sample": abar.sqrt() * x, "v_prediction": torch.zeros_like(x)}
    m = 0.9 * best[config.prediction_type] + 0.1 * (1 - abar).sqrt() * torch.sin(x.roll(1, -1))
    return torch.cat([m, torch.cos(2 * x)], dim=1) if config.get("variance_type") in ("learned", "learned_range") else m


def loop(scheduler: Any, schedule: Any, dtype: torch.dtype = torch.float32, begin: int = 0) -> Tensor:
    """Run the chain from step `begin` on. The result ends with what the generator draws next."""
    x = normals(*SHAPE, dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    if begin:
        noise = normals(*SHAPE, seed=7, dtype=dtype)
        x = scheduler.add_noise(0.5 * x.clamp(-1, 1), noise, scheduler.timesteps[begin : begin + 1])
    elif scheduler.config.get("use_karras_sigmas"):
        scheduler.set_begin_index(0)  # as pipelines do: the first timestep may be listed twice, and the second one is found
    for t in scheduler.timesteps[begin:]:
        x = scheduler.step(model(schedule, scheduler.config, x, t), t, x, **options).prev_sample
    assert torch.isfinite(x).all()
    return torch.cat([x.flatten(), torch.randn(4, generator=generator).to(dtype)])


def rows_in_float64(plan: ddpm_fast.SamplingPlan, config: Any) -> Tensor:
    """Run a plan's float64 rows, with the noise that diffusers draws."""
    x, generator = normals(*SHAPE, dtype=torch.float64), torch.Generator().manual_seed(5)
    x_0_prev = x_0_prev2 = torch.zeros_like(x)
    for t, row in zip(plan.timesteps, plan.coefficients.tolist(), strict=True):
        p, q, k0, k1, k2, k3, k4, sigma, _, _, clip = row
        m = model(plan.schedule, config, x, t)[:, : x.shape[1]]
        x_0 = (p * x + q * m).clamp(-clip, clip)
        x = k0 * x_0 + k1 * x + k2 * m + k3 * x_0_prev + k4 * x_0_prev2
        if config.get("algorithm_type", "").startswith("sde"):
            x = x + sigma * torch.randn(SHAPE, generator=generator).double()
        x_0_prev, x_0_prev2 = x_0, x_0_prev
    return torch.cat([x.flatten(), torch.randn(4, generator=generator).double()])


def assert_same_image(ours: Any, theirs: Any, monkeypatch: pytest.MonkeyPatch, begin: int = 0) -> float:
    """From the same seed, and as near to that of diffusers without rounding as diffusers is.

    Returns:
        The difference of the plan's float64 rows from diffusers in float64, relative to the largest value.
    """
    schedule = ours.schedule
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert ours.num_inference_steps == theirs.num_inference_steps
    got, rounded = loop(ours, schedule, begin=begin), loop(theirs, schedule, begin=begin)
    exact = loop(in_float64(ours, theirs, monkeypatch), schedule, torch.float64, begin)
    scale = max(1.0, float(exact.abs().max()))
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=2 * float((rounded - exact).abs().max()) + 4 * EPS * scale)
    if begin or ours._thresholds:
        return 0.0
    return float((rows_in_float64(ours.sampling_plan(), ours.config) - exact).abs().max()) / scale


SDE = {"algorithm_type": "sde-dpmsolver++"}
KARRAS = {"use_karras_sigmas": True}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
GRID: list[dict[str, Any]] = [
    *(
        {"algorithm_type": a, "solver_type": s, "solver_order": o}
        for a, s, o in itertools.product(("dpmsolver++", "sde-dpmsolver++"), ("midpoint", "heun"), (1, 2, 3))
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


@pytest.mark.parametrize("steps", [10, 33])
@pytest.mark.parametrize("config", GRID, ids=str)
def test_the_same_seed_gives_the_same_image(config: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = DPMSolverMultistepScheduler(**config), diffusers.DPMSolverMultistepScheduler(**config)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(steps)
    difference = assert_same_image(ours, theirs, monkeypatch)
    # Weights take logarithms of the levels, which are rounded relative to the largest one, in about eight operations a step.
    largest = float(ours.lambda_t.abs().max()) + 1
    assert difference <= steps * 8 * EPS64 * largest


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 14, 15])
@pytest.mark.parametrize("config", [{}, SDE, {**SIGMA_MIN, "lower_order_final": False}, KARRAS], ids=str)
def test_order_3_in_few_steps(config: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first and last steps have lower orders."""
    config = {"solver_order": 3, **config}
    ours, theirs = DPMSolverMultistepScheduler(**config), diffusers.DPMSolverMultistepScheduler(**config)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(steps)
    exact = loop(in_float64(ours, theirs, monkeypatch), ours.schedule, torch.float64)
    difference = (rows_in_float64(ours.sampling_plan(), ours.config) - exact).abs().max()
    largest = float(ours.lambda_t.abs().max()) + 1  # as above
    assert difference <= steps * 8 * EPS64 * largest * max(1.0, float(exact.abs().max()))


def test_order_3_from_the_middle_of_a_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step has order 1 and the second order 2, wherever the chain begins."""
    for config in ({}, SDE):
        ours = DPMSolverMultistepScheduler(solver_order=3, **config)
        theirs = diffusers.DPMSolverMultistepScheduler(solver_order=3, **config)
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(20)
            scheduler.set_begin_index(9)
        assert_same_image(ours, theirs, monkeypatch, 9)


def test_a_chain_that_ends_with_order_1_anyway_can_start_at_each_timestep() -> None:
    scheduler = DPMSolverMultistepScheduler(solver_order=3, euler_at_final=True)
    scheduler.set_timesteps(20)
    plan = scheduler.sampling_plan()
    assert plan.starting_at(int(plan.timesteps[5])).num_steps == 15


def test_levels_are_those_of_diffusers() -> None:
    """Diffusers computes 1 - abar in float32: at t = 0, where it is 1e-4, that loses four digits."""
    for config in ({}, KARRAS, SIGMA_MIN, {**COSINE, "lambda_min_clipped": -5.1}):
        ours, theirs = DPMSolverMultistepScheduler(**config), diffusers.DPMSolverMultistepScheduler(**config)
        for name in ("alpha_t", "sigma_t", "lambda_t", "sigmas"):
            torch.testing.assert_close(getattr(ours, name)[:-1], getattr(theirs, name)[:-1], rtol=EPS / 4e-5, atol=EPS / 4e-5)
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(20)
        torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=EPS / 4e-5, atol=0)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing", "karras", "karras, cosine"])
@pytest.mark.parametrize("lambda_min", [-float("inf"), -5.1])
def test_timesteps_are_those_of_diffusers(spacing: str, lambda_min: float) -> None:
    """For every number of steps of 100. A timestep is not listed twice, nor is -1."""
    config: dict[str, Any] = {"num_train_timesteps": 100, "lambda_min_clipped": lambda_min, "beta_end": 0.2}
    config |= {"use_karras_sigmas": True} if "karras" in spacing else {"timestep_spacing": spacing}
    config |= COSINE if "cosine" in spacing or lambda_min > -10 else {}
    ours, theirs = DPMSolverMultistepScheduler(**config), diffusers.DPMSolverMultistepScheduler(**config)
    last = int((theirs.lambda_t >= lambda_min).sum())
    for steps in range(1, last if spacing == "leading" else 101):
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(steps)
        expected = theirs.timesteps
        if "karras" not in spacing:
            expected = expected[expected >= 0].unique_consecutive()
        assert torch.equal(ours.timesteps, expected)
        assert ours.num_inference_steps == len(expected)
        assert len(expected) == steps or spacing == "trailing" or steps >= last


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_karras_timesteps_of_zero_snr_are_those_of_diffusers(schedule: str) -> None:
    """They depend on the last bits of its rescaled table in float32."""
    config = {"beta_schedule": schedule, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction", **KARRAS}
    ours, theirs = DPMSolverMultistepScheduler(**config), diffusers.DPMSolverMultistepScheduler(**config)
    for steps in range(1, 41):
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(steps)
        assert torch.equal(ours.timesteps, theirs.timesteps)


def test_a_list_of_timesteps(monkeypatch: pytest.MonkeyPatch) -> None:
    timesteps = [999, 990, 700, 500, 499, 100, 20, 3, 2, 0]
    for given in (timesteps, torch.tensor(timesteps), np.array(timesteps)):
        ours, theirs = DPMSolverMultistepScheduler(), diffusers.DPMSolverMultistepScheduler()
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(timesteps=given)
        assert_same_image(ours, theirs, monkeypatch)
        monkeypatch.undo()


# --------------------------------------------------------------------------------------------------------- image to image


@pytest.mark.parametrize("is_set", [True, False])
@pytest.mark.parametrize("config", [{}, SDE, KARRAS, {"thresholding": True, **SDE}], ids=str)
def test_a_chain_may_start_in_the_middle(config: dict[str, Any], is_set: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = DPMSolverMultistepScheduler(**config), diffusers.DPMSolverMultistepScheduler(**config)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(20)
        if is_set:
            scheduler.set_begin_index(8)
    assert_same_image(ours, theirs, monkeypatch, begin=8)
    assert ours.begin_index == (8 if is_set else None)
    assert ours.step_index == 20


def test_levels_of_add_noise() -> None:
    """They are the chain's: Karras's lie between timesteps, and inpainting asks for that of the next step."""
    x_0, noise = normals(2, *SHAPE, dtype=torch.float64)
    for config in ({}, KARRAS, {**KARRAS, **SIGMA_MIN}):
        ours, theirs = DPMSolverMultistepScheduler(**config), diffusers.DPMSolverMultistepScheduler(**config)
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(10)
        t = ours.timesteps[[0, 3, 9]]
        bound = EPS / 4e-5  # diffusers rounds 1 - abar in float32
        torch.testing.assert_close(ours.add_noise(x_0, noise, t), theirs.add_noise(x_0, noise, t), rtol=0, atol=bound)
        for scheduler in (ours, theirs):
            scheduler.set_begin_index(6)
        t = ours.timesteps[6:7]
        torch.testing.assert_close(ours.add_noise(x_0, noise, t), theirs.add_noise(x_0, noise, t), rtol=0, atol=bound)
        for t in ours.timesteps[6:]:
            for scheduler in (ours, theirs):
                scheduler.step(noise, t, x_0)
            mixed = [scheduler.add_noise(x_0, noise, t[None]) for scheduler in (ours, theirs)]
            torch.testing.assert_close(*mixed, rtol=0, atol=bound)


def test_add_noise_outside_a_chain() -> None:
    """The schedule's level. Diffusers takes that of the last step, or before set_timesteps that of T - 1 - t."""
    x_0, noise = normals(2, *SHAPE)
    scheduler, t = DPMSolverMultistepScheduler(), torch.tensor([0, 500, 998])
    expected = DDPMScheduler().add_noise(x_0, noise, t)
    torch.testing.assert_close(scheduler.add_noise(x_0, noise, t), expected)
    scheduler.set_timesteps(10)
    torch.testing.assert_close(scheduler.add_noise(x_0, noise, t), expected)


# ------------------------------------------------------------------------------------------------------------ noise, state


def test_with_seeds_a_loop_is_what_sample_draws() -> None:
    """Sample 2 is the same in a batch and alone, and a chain that starts in the middle has the same noise."""
    scheduler = DPMSolverMultistepScheduler(num_train_timesteps=50, **SDE)

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        return 0.5 * x_t + 0.01 * t.reshape(-1, 1, 1, 1)

    def draw(seeds: Tensor) -> Tensor:
        scheduler.set_timesteps(10)
        scheduler.seeds = seeds
        x = ddpm_fast.noise((len(seeds), 3, 4, 4), seeds, stream=STREAM_X_T)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x).prev_sample
        return x

    seeds = ddpm_fast.sample_seeds(0, 4)
    images = draw(seeds)
    module = torch.nn.Module()
    module.forward = network  # type: ignore[method-assign]
    module.register_parameter("weight", torch.nn.Parameter(torch.zeros(1)))
    expected = ddpm_fast.sample(module, scheduler.sampling_plan(), 4, seed=0, shape=(3, 4, 4), progress=False)
    assert torch.equal(images, expected)
    assert torch.equal(draw(seeds[2:3]), images[2:3])

    scheduler.set_timesteps(10)
    scheduler.seeds = seeds
    x_t, m = normals(2, 4, 3, 4, 4)
    seeded = scheduler.step(m, scheduler.timesteps[6], x_t).prev_sample
    scheduler.set_timesteps(10)
    scheduler.seeds = None
    z = ddpm_fast.noise(x_t.shape, seeds, stream=6)
    given = scheduler.step(m, scheduler.timesteps[6], x_t, variance_noise=z).prev_sample
    torch.testing.assert_close(seeded, given, rtol=0, atol=4 * EPS)


def test_a_deterministic_solver_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    scheduler = DPMSolverMultistepScheduler()
    scheduler.set_timesteps(3)
    x = normals(*SHAPE)
    for t in scheduler.timesteps:
        x = scheduler.step(x, t, x, generator=generator).prev_sample
    assert torch.equal(generator.get_state(), before)


def test_set_timesteps_begins_another_chain() -> None:
    scheduler = DPMSolverMultistepScheduler()
    images = []
    for steps in (10, 10, 4, 10):
        scheduler.set_timesteps(steps)
        assert (scheduler.step_index, scheduler.begin_index, scheduler.model_outputs) == (None, None, [None, None])
        x = normals(*SHAPE)
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(0.1 * x, t, x, return_dict=False)[0]
            assert scheduler.step_index == i + 1
        images.append(x)
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[3])
    with pytest.raises(ValueError, match="expected one of the 10 steps of set_timesteps, got step 10: call"):
        scheduler.step(x, 0, x)


def test_a_first_order_step_of_a_second_order_plan_has_the_same_bits() -> None:
    """The scheduler has a table for each order, `sampling_plan` one for both."""
    scheduler = DPMSolverMultistepScheduler(**SIGMA_MIN, euler_at_final=True)
    scheduler.set_timesteps(20)
    plan, k3 = scheduler.sampling_plan(), COLUMNS.index("k3")
    assert [bool(k) for k in plan.coefficients[:, k3]] == [False] + 18 * [True] + [False]
    x = y = normals(*SHAPE)
    before = torch.zeros_like(x)
    for row, t in enumerate(scheduler.timesteps):
        x = scheduler.step(0.1 * x, t, x).prev_sample
        y, before = ddpm_fast.reverse_step(y, 0.1 * y, row, plan, x_0_prev=before, return_x_0=True)
        assert torch.equal(x, y)


def test_an_output_with_or_without_variance_channels() -> None:
    """Diffusers keeps the first three channels of either."""
    for config in ({}, {"thresholding": True}):
        scheduler = DPMSolverMultistepScheduler(variance_type="learned_range", **config)
        x_t, m, v = normals(3, *SHAPE)
        results = []
        for output in (m, torch.cat([m, v], dim=1)):
            scheduler.set_timesteps(10)
            results.append(scheduler.step(output, scheduler.timesteps[0], x_t).prev_sample)
        assert torch.equal(*results)


@pytest.mark.parametrize("x", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", THEIRS)
def test_dtypes_meet_as_in_diffusers(kind: Any, x: torch.dtype, m: torch.dtype) -> None:
    ours, theirs = kind(), THEIRS[kind]()
    results = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
        args = normals(*SHAPE, dtype=m), scheduler.timesteps[5], normals(*SHAPE, seed=1, dtype=x)
        results.append(scheduler.step(*args).prev_sample)
    assert results[0].dtype == results[1].dtype == torch.promote_types(x, m)
    coarse = max(torch.finfo(m).eps, torch.finfo(x).eps)
    torch.testing.assert_close(*results, rtol=0, atol=16 * max(coarse, EPS))


def test_gradients_flow_through_the_remembered_x_0() -> None:
    scheduler = DPMSolverMultistepScheduler()
    with torch.inference_mode():
        scheduler.set_timesteps(10)
    x, m = (tensor.requires_grad_() for tensor in normals(2, *SHAPE))
    scheduler.set_begin_index(0)
    scheduler.step(m, 0, x.detach())
    (step,) = torch.autograd.grad(scheduler.step(m.detach(), 0, x.detach()).prev_sample.sum(), m)
    plan = scheduler.sampling_plan()
    q, k3 = float(plan.coefficients[0, COLUMNS.index("q")]), float(plan.coefficients[1, COLUMNS.index("k3")])
    torch.testing.assert_close(step, torch.full(SHAPE, q * k3))


@pytest.mark.parametrize("config", [{}, {"thresholding": True}, SDE, {"variance_type": "learned"}], ids=str)
def test_a_timestep_on_a_device_is_not_read_by_the_host(config: dict[str, Any]) -> None:
    """Tensors on "meta" have shapes and no values. Without set_begin_index the first step of a chain is looked up."""
    scheduler = DPMSolverMultistepScheduler(**config)
    scheduler.set_timesteps(10, device="meta")
    assert scheduler.timesteps.device.type == "meta"
    x_t = torch.empty(SHAPE, device="meta")
    assert scheduler.add_noise(x_t, x_t, scheduler.timesteps[:3]).shape == SHAPE
    scheduler.set_begin_index(0)
    for t in scheduler.timesteps:
        assert scheduler.step(x_t, t, x_t).prev_sample.shape == SHAPE


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
    ours, theirs = DDIMInverseScheduler(**config), diffusers.DDIMInverseScheduler(**config)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(steps)
    if config.get("prediction_type") == "sample":  # 1 - abar_0 = 1e-4 as float32's root of a difference
        theirs.alphas_cumprod = ours.schedule.alpha_bars
        theirs.initial_alpha_cumprod = ours.schedule.alpha_bars[0]
    difference = assert_same_image(ours, theirs, monkeypatch)
    # A step has about eight operations, and the first divides a rounded 1 - abar of at least 1e-4.
    assert difference <= steps * 8 * EPS64 / (1e-4 if config.get("prediction_type") == "sample" else 1)


def test_single_steps_of_an_inversion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps to timesteps outside the chain begin T // n below, as in diffusers, also one for each sample."""
    ours, theirs = DDIMInverseScheduler(), diffusers.DDIMInverseScheduler()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
    in_float64(ours, theirs, monkeypatch)
    x, m = normals(2, *SHAPE)
    for t in (0, 1, 99, 101, 555, 900, 999):
        for got, expected in zip(ours.step(m, t, x, False), theirs.step(m.double(), t, x.double(), False), strict=True):
            # Rounding of x_0^ = (x - sqrt(1 - abar) m) / sqrt(abar), relative to its terms.
            terms = float((x.abs() + m.abs()).max()) * float(ours.schedule.alpha_bars[max(t - 100, 0)]) ** -0.5
            torch.testing.assert_close(got.double(), expected, rtol=0, atol=4 * EPS * terms)
    together = ours.step(m, torch.tensor([0, 500, 555]), x).prev_sample
    for i, t in enumerate((0, 500, 555)):
        assert torch.equal(together[i : i + 1], ours.step(m[i : i + 1], t, x[i : i + 1]).prev_sample)


@pytest.mark.parametrize("steps", [7, 30, 50, 600])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_inversion_starts_where_that_of_diffusers_does(spacing: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At t - T // n. In "trailing" that is the timestep before only if n divides T."""
    ours, theirs = (
        kind(timestep_spacing=spacing, clip_sample=False) for kind in (DDIMInverseScheduler, diffusers.DDIMInverseScheduler)
    )
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(steps)
    abar = torch.cat([ours.schedule.alpha_bars, torch.ones(1, dtype=torch.float64)])
    assert torch.equal(ours.sampling_plan().alpha_bars, abar[(theirs.timesteps - 1000 // steps).clamp(min=-1)])
    assert_same_image(ours, theirs, monkeypatch)


def test_inversion_is_undone_by_ddim() -> None:
    """With a model that knows epsilon whatever it is given."""
    from ddpm_fast.integrations.diffusers import DDIMScheduler

    inverse, forward = DDIMInverseScheduler(clip_sample=False), DDIMScheduler(clip_sample=False)
    x, epsilon = normals(2, *SHAPE, dtype=torch.float64)
    y = x
    for scheduler in (inverse, forward):
        scheduler.set_timesteps(20)
        for t in scheduler.timesteps:
            y = scheduler.step(epsilon, t, y).prev_sample
    # Each step rounds its coefficients to float32, and the way back divides by sqrt(abar) = 0.01 at last.
    torch.testing.assert_close(y, x, rtol=0, atol=40 * EPS * float(inverse.schedule.alpha_bars[950]) ** -0.5)


def test_the_deprecated_argument_of_inversion() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        ours, theirs = (
            kind(set_alpha_to_zero=False, clip_sample=False) for kind in (DDIMInverseScheduler, diffusers.DDIMInverseScheduler)
        )
    assert ours.initial_alpha_cumprod == pytest.approx(float(theirs.initial_alpha_cumprod), rel=EPS)
    ours.set_timesteps(10)
    # The image is at abar_0, where the first step goes.
    assert float(ours.sampling_plan().coefficients[0, COLUMNS.index("k1")]) == pytest.approx(1, rel=EPS64)


def test_inversion_on_a_device_and_compiled() -> None:
    scheduler = DDIMInverseScheduler()
    scheduler.set_timesteps(10, device="meta")
    x_t = torch.empty(SHAPE, device="meta")
    for t in (scheduler.timesteps[0], scheduler.timesteps[:3]):
        assert scheduler.step(x_t, t, x_t).prev_sample.shape == SHAPE
    scheduler.set_timesteps(10)
    x_t, m = normals(2, *SHAPE)
    torch._dynamo.reset()
    compiled = torch.compile(lambda m, t, x_t: scheduler.step(m, t, x_t).prev_sample, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for t in scheduler.timesteps:
            assert torch.equal(compiled(m, t, x_t), scheduler.step(m, t, x_t).prev_sample)


# ------------------------------------------------------------------------------------------- configuration, files, classes


SETTINGS: dict[type, dict[str, Any]] = {
    DPMSolverMultistepScheduler: {"beta_schedule": "scaled_linear", **KARRAS, **SDE, "steps_offset": 1},
    DDIMInverseScheduler: {"beta_schedule": "scaled_linear", "set_alpha_to_one": False, "steps_offset": 1},
}


@pytest.mark.parametrize("kind", THEIRS)
def test_configurations_and_files(kind: Any, tmp_path: Path) -> None:
    """They are the same as diffusers', in both directions."""
    ours, theirs = kind(**SETTINGS[kind]), THEIRS[kind](**SETTINGS[kind])
    assert isinstance(ours, THEIRS[kind])
    assert ours.to_json_string() == theirs.to_json_string()
    for made in (ours, theirs):
        made.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "scheduler_config.json").read_text(encoding="utf-8"))
        assert saved["_class_name"] == kind.__name__
        for other in (kind, THEIRS[kind]):
            for loaded in (other.from_pretrained(tmp_path), other.from_config(made.config)):
                assert json.loads(loaded.to_json_string()) == saved
                loaded.set_timesteps(7)


@pytest.mark.parametrize("kind", THEIRS)
def test_configurations_go_to_every_compatible_scheduler_and_back(kind: Any) -> None:
    ours = kind(beta_end=0.03, prediction_type="v_prediction")
    for other in [*THEIRS[kind]._compatibles, "DDPMScheduler", "DDIMScheduler"]:
        try:
            there = getattr(diffusers, other).from_config(ours.config)
        except ImportError:  # DPMSolverSDEScheduler needs another package
            continue
        back = kind.from_config(there.config)
        assert (back.config.beta_end, back.config.prediction_type) == (0.03, "v_prediction")
        back.set_timesteps(5)


def test_a_clip_of_another_scheduler_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    config = diffusers.DDPMScheduler(variance_type="fixed_large", clip_sample=True, clip_sample_range=0.1).config
    ours, theirs = (kind.from_config(config) for kind in (DPMSolverMultistepScheduler, diffusers.DPMSolverMultistepScheduler))
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
    assert_same_image(ours, theirs, monkeypatch)


@pytest.mark.parametrize("kind", THEIRS)
def test_signatures_and_attributes_are_those_of_diffusers(kind: Any) -> None:
    theirs = THEIRS[kind]
    names = ["__init__", "set_timesteps", "step", "scale_model_input", "__len__"]
    names += ["add_noise", "set_begin_index", "convert_model_output"] if kind is DPMSolverMultistepScheduler else []
    for name in names:
        parameters = [inspect.signature(getattr(k, name)).parameters.values() for k in (kind, theirs)]
        assert [(p.name, p.default) for p in parameters[0]] == [(p.name, p.default) for p in parameters[1]]
    assert set(vars(theirs())) - {"timesteps", "alphas_cumprod"} <= set(vars(kind()))  # properties of some
    for name in ("betas", "alphas", "alphas_cumprod", "timesteps", "init_noise_sigma", "num_inference_steps"):
        torch.testing.assert_close(getattr(kind(), name), getattr(theirs(), name), rtol=1e-6, atol=0)


def test_a_configuration_that_changes_changes_the_steps() -> None:
    scheduler = DPMSolverMultistepScheduler(**SIGMA_MIN)
    scheduler.set_timesteps(5)
    before = scheduler.sampling_plan()
    scheduler.register_to_config(solver_order=1)
    assert before.needs_x_0_prev
    assert not scheduler.sampling_plan().needs_x_0_prev


# ------------------------------------------------------------------------------------------------------------- pipelines


def test_a_pipeline_of_diffusers_takes_the_solver_and_saves_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = diffusers.UNet2DModel(sample_size=8, norm_num_groups=4, layers_per_block=1, **blocks)

    def images(pipeline: Any) -> Tensor:
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(1)
        drawn: Tensor = pipeline(batch_size=2, generator=generator, num_inference_steps=10, output_type="pt").images
        return drawn

    theirs, ours = (
        diffusers.DDPMPipeline(unet, kind(**SDE))
        for kind in (diffusers.DPMSolverMultistepScheduler, DPMSolverMultistepScheduler)
    )
    torch.testing.assert_close(images(ours), images(theirs), rtol=0, atol=1e-5)
    ours.save_pretrained(tmp_path)
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.scheduler, DPMSolverMultistepScheduler)
    assert torch.equal(images(loaded), images(ours))


# ---------------------------------------------------------------------------------------------------------------- errors


X = torch.zeros(SHAPE)


def _set(steps: Any = 10, kind: Any = DPMSolverMultistepScheduler, **config: Any) -> Any:
    scheduler = kind(**config)
    scheduler.set_timesteps(steps)
    return scheduler


def _made(**config: Any) -> Callable[[], Any]:
    return lambda: DPMSolverMultistepScheduler(**config)


def _listed(timesteps: Any, **config: Any) -> Callable[[], Any]:
    return lambda: DPMSolverMultistepScheduler(**config).set_timesteps(timesteps=timesteps)


NAME = "DPMSolverMultistepScheduler"
BAD: list[tuple[Callable[[], Any], str]] = [
    (_made(solver_order=4), f"{NAME}: expected solver_order to be an integer in 1..3, got 4"),
    (
        _made(algorithm_type="dpmsolver", **SIGMA_MIN),
        r"algorithm_type to be one of dpmsolver\+\+, sde-dpmsolver\+\+, got 'dpmsolver'",
    ),
    (_made(algorithm_type="sde-dpmsolver"), "algorithm_type to be one of .*, got 'sde-dpmsolver'"),
    (_made(solver_type="euler"), f"{NAME}: expected solver_type to be one of midpoint, heun, got 'euler'"),
    (_made(final_sigmas_type="one"), f"{NAME}: expected final_sigmas_type to be one of zero, sigma_min, got 'one'"),
    (
        _made(prediction_type="flow_prediction"),
        "prediction_type to be one of epsilon, sample, v_prediction, got 'flow_prediction'",
    ),
    (_made(timestep_spacing="even"), "expected timestep_spacing to be one of linspace, leading, trailing, got 'even'"),
    (_made(beta_schedule="exp"), "expected beta_schedule to be one of linear, .*, got 'exp'"),
    (_made(lambda_min_clipped="low"), f"{NAME}: expected lambda_min_clipped to be a number, got str"),
    (_made(thresholding=True, sample_max_value=0.0), "expected sample_max_value to be positive, got 0.0"),
    *(
        (
            _made(**{key: True}),
            f"{NAME}: expected {key} to be false, got True: timestep_spacing and use_karras_sigmas are supported",
        )
        for key in (
            *("use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas", "use_dynamic_shifting"),
        )
    ),
    (
        lambda: DPMSolverMultistepScheduler.from_config({**KARRAS, "sigma_min": 0.1}).set_timesteps(5),
        f"{NAME}.set_timesteps: expected no sigma_min with use_karras_sigmas, got 0.1",
    ),
    *(
        (
            lambda betas=betas: _set(**KARRAS, trained_betas=betas),
            rf"{NAME}.set_timesteps: expected use_karras_sigmas to be false, or betas .* in float32, got abar = {got}",
        )
        for betas, got in (
            ([0.3] * 1000, "2.69e-39 at timestep 248"),  # sigma / alpha overflows
            ([0.9] * 1000, "1e-39 at timestep 38"),  # abar is 0 in float64 too
            ([1e-9] + [0.01] * 999, "1 at timestep 0"),  # 1 - beta is 1
        )
    ),
    (lambda: _set(0), f"{NAME}.set_timesteps: expected num_inference_steps to be an integer in 1..1000, got 0"),
    (lambda: _set(1001), "expected num_inference_steps to be an integer in 1..1000, got 1001"),
    (lambda: _set(1000, timestep_spacing="leading"), "expected num_inference_steps to be an integer in 1..999, got 1000"),
    (lambda: _set(2.0), f"{NAME}.set_timesteps: expected num_inference_steps to be an integer in 1..1000, got 2.0"),
    (lambda: _set(None), "expected exactly one of num_inference_steps and timesteps, got neither"),
    (
        lambda: DPMSolverMultistepScheduler().set_timesteps(3, timesteps=[2, 1]),
        "exactly one of num_inference_steps and timesteps, got both",
    ),
    (lambda: DPMSolverMultistepScheduler().set_timesteps(3, mu=0.5), "expected mu to be None, as dynamic shifting .* got 0.5"),
    (
        lambda: _set(9, timestep_spacing="leading", steps_offset=150),
        "expected timesteps with steps_offset in 0..999, got values from 250 to 1050",
    ),
    (
        lambda: _set(10, timestep_spacing="leading", steps_offset=-91),
        "expected timesteps with steps_offset in 0..999, got values from -1 to",
    ),
    (lambda: _set(9, lambda_min_clipped=9.0), r"expected lambda_min_clipped to be at most \d.*, lambda at timestep 1, got 9.0"),
    (lambda: _set(1, trained_betas=[0.1, 0.3]), "expected num_train_timesteps to be 2, .* got 1000"),
    (_listed([3, 3]), r"timesteps to be strictly descending timesteps in 0..999, got \[3, 3\]"),
    (_listed([1000, 3]), r"timesteps to be strictly descending timesteps in 0..999, got \[1000, 3\]"),
    (_listed([3, 2], **KARRAS), r"expected timesteps to be None with use_karras_sigmas, got \[3, 2\]"),
    (lambda: DPMSolverMultistepScheduler().step(X, 0, X), f"{NAME}: expected set_timesteps to have been called"),
    (
        lambda: DPMSolverMultistepScheduler().sampling_plan(),
        f"{NAME}: expected set_timesteps to have been called",
    ),
    (lambda: _set(thresholding=True).sampling_plan(), f"{NAME}.sampling_plan: expected thresholding to be false, got true"),
    (lambda: _set().step(None, 900, X), f"{NAME}.step: expected model_output to be a tensor, got NoneType"),
    (lambda: _set().step(X, 900, X.int()), f"{NAME}.step: expected sample to be float32, .*, got torch.int32"),
    (lambda: _set().step(X, None, X), f"{NAME}.step: expected timestep to be an int or an int64 tensor, got NoneType"),
    (lambda: _set().step(X, 900.0, X), f"{NAME}.step: expected timestep to be an int or an int64 tensor, got float"),
    (lambda: _set().step(X, 1000, X), f"{NAME}.step: expected timestep to be in 0..999, got 1000"),
    (lambda: _set().step(X, torch.tensor([9, 8]), X), "expected timestep to have 1 element, got 2"),
    (lambda: _set().step(X[:, :2], 900, X), r"expected model_output to have shape \[3, 3, 6, 6\], got \[3, 2, 6, 6\]"),
    (
        lambda: _set(**SDE).step(X, 900, X, generator=torch.Generator(), variance_noise=X),
        f"{NAME}.step: expected at most one of generator and variance_noise, got both",
    ),
    (lambda: _set().add_noise(X, X, torch.tensor([1000])), "expected timesteps in 0..999, got values from 1000 to 1000"),
    (
        lambda: DDIMInverseScheduler(prediction_type="sample"),
        "DDIMInverseScheduler: expected prediction_type to be .* with set_alpha_to_one, .* got 'sample'",
    ),
    (
        lambda: _set(kind=DDIMInverseScheduler, timestep_spacing="linspace"),
        'DDIMInverseScheduler.set_timesteps: expected timestep_spacing to be "leading" or "trailing", got "linspace"',
    ),
    (lambda: DDIMInverseScheduler().step(X, 0, X), "DDIMInverseScheduler: expected set_timesteps to have been called"),
    (lambda: DDIMInverseScheduler().sampling_plan(), "DDIMInverseScheduler: expected set_timesteps to have been"),
    (
        lambda: _set(kind=DDIMInverseScheduler).step(X, 1000, X),
        "DDIMInverseScheduler.step: expected timestep to be in 0..999",
    ),
    (lambda: _set(2000, DDIMInverseScheduler), "expected num_inference_steps to be an integer in 1..1000, got 2000"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_errors(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()
