"""`PlanScheduler`: any plan in diffusers' pipelines and loops, and the images of diffusers' own schedulers."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import assert_same, diffusers, generator, images, make, make_unet
from torch import Tensor, nn

import ddpm_fast
from ddpm_fast import (
    NoiseSchedule,
    Objective,
    SamplingPlan,
    ddim_inversion_plan,
    ddim_plan,
    ddpm_plan,
    dpm_solver_plan,
    freeze,
    heun_plan,
    load_folder,
    plan_of,
    reverse_step,
    sample,
    sample_seeds,
)
from ddpm_fast.integrations.diffusers import PlanScheduler
from ddpm_fast.plan import COLUMNS
from ddpm_fast.plan.sampling_plan import Fit
from ddpm_fast.reference import STREAM_X_T

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # NumPy's, of diffusers' solver

SHAPE = (3, 3, 6, 6)
LINEAR = NoiseSchedule.linear()
V = Objective(LINEAR, "v_prediction")
CORRECTIONS = [[0.01, 0.02, 0.0], *[[0.01, 0.02, -0.01]] * 3, [0.01, 0.0, 0.0]]
PLANS: dict[str, SamplingPlan] = {
    "ddpm": ddpm_plan(LINEAR, 10),
    "learned": ddpm_plan(LINEAR, 10, variance="learned_range"),
    "ddim": ddim_plan(LINEAR, 10, eta=0.5),
    "order 2": dpm_solver_plan(V, 10),
    "order 3": dpm_solver_plan(V, 10, order=3, eta=1.0),
    "karras": dpm_solver_plan(V, 12, spacing="karras"),
    "heun": heun_plan(V, 6, spacing="karras"),
    "fitted": dpm_solver_plan(V, None, levels=[80.0, 20.0, 5.0, 1.0, 0.1], corrections=CORRECTIONS),
}
object.__setattr__(PLANS["fitted"], "fit", Fit("ddpm_plan()", 1.0, 0.5, 0.1))
STATELESS = ("ddpm", "learned", "ddim")


def normals(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype)


class Network(nn.Module):
    """Near what the best model says of images that are noise; amplifies no difference, and has some x_0 beyond the clip."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, schedule: NoiseSchedule, prediction: str, learned: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(sample_size=SHAPE[2:], in_channels=SHAPE[1])
        self.abar, self.prediction, self.learned = schedule.alpha_bars, prediction, learned

    def output(self, x: Tensor, t: Tensor | int) -> Tensor:
        abar = self.abar[t].to(x.dtype).reshape(-1, 1, 1, 1)
        best = {"epsilon": (1 - abar).sqrt() * x, "sample": abar.sqrt() * x, "v_prediction": torch.zeros_like(x)}
        m = 0.9 * best[self.prediction] + 0.1 * (1 - abar).sqrt() * torch.sin(x.roll(1, -1))
        return torch.cat([m, torch.cos(2 * x)], dim=1) if self.learned else m

    def forward(self, x: Tensor, t: Tensor | int) -> Any:
        return SimpleNamespace(sample=self.output(x, t))


def network_of(plan: SamplingPlan) -> Network:
    return Network(plan.schedule, plan.prediction, plan.variance != "fixed")


def pipeline(network: Network, scheduler: Any, kind: str = "DDPM") -> Any:
    pipe = getattr(diffusers, f"{kind}Pipeline")(unet=network, scheduler=diffusers.DDIMScheduler())
    pipe.scheduler = scheduler  # DDIMPipeline replaces one that its constructor is given
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ------------------------------------------------------------------------------------------------ diffusers' own schedulers

ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
SDE = {"algorithm_type": "sde-dpmsolver++"}
KARRAS = {"use_karras_sigmas": True}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FEW = {"trained_betas": [0.01, 0.02, 0.05, 0.1, 0.2] * 8, "num_train_timesteps": 40}
PREDICTIONS = ("epsilon", "sample", "v_prediction")
GRID: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *(("DDPM", {"beta_schedule": s}, {}) for s in ("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid")),
    *(("DDPM", {"timestep_spacing": s}, {}) for s in ("linspace", "trailing")),
    *(("DDPM", {"prediction_type": p, "clip_sample": c}, {}) for p in PREDICTIONS for c in (True, False)),
    *(("DDPM", {"variance_type": v}, {}) for v in ("fixed_small_log", "fixed_large", "learned_range", "other")),
    *(("DDPM", {"variance_type": v, "clip_sample": False}, {}) for v in ("fixed_large", "learned_range")),
    *(("DDPM", config, {}) for config in ({"clip_sample_range": 0.5}, {**ZERO_SNR, "timestep_spacing": "trailing"}, FEW)),
    *(("DDIM", {"prediction_type": p}, {"eta": e}) for p in PREDICTIONS for e in (0.0, 1.0)),
    *(
        ("DDIM", {"prediction_type": p}, {"eta": e, "use_clipped_model_output": True})
        for p in PREDICTIONS
        for e in (0.0, 0.5, 1.0)
    ),
    ("DDIM", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "beta_schedule": "scaled_linear"}, {}),
    ("DDIM", {"set_alpha_to_one": False}, {"eta": 1.0}),
    *(("DDIM", {"timestep_spacing": s}, {"eta": e}) for s in ("linspace", "trailing") for e in (0.0, 0.7)),
    ("DDIM", {"timestep_spacing": "trailing", "clip_sample_range": 2.0}, {"eta": 1.0}),
    ("DDIM", {**ZERO_SNR, "timestep_spacing": "trailing"}, {}),
    *(
        ("DPMSolverMultistep", config, {})
        for config in (
            *(
                {"algorithm_type": a, "solver_type": s, "solver_order": o}
                for a, s, o in product(("dpmsolver++", "sde-dpmsolver++"), ("midpoint", "heun"), (1, 2, 3))
            ),
            *({"prediction_type": p, **sde} for p in ("sample", "v_prediction") for sde in ({}, SDE)),
            *({"timestep_spacing": s, **sde} for s in ("leading", "trailing") for sde in ({}, SDE)),
            {"timestep_spacing": "leading", "steps_offset": 1, "beta_schedule": "scaled_linear", "beta_end": 0.012},
            *(
                {**SIGMA_MIN, "solver_order": o, **e, **sde}
                for o in (2, 3)
                for e in ({"euler_at_final": True}, {"lower_order_final": False}, {})
                for sde in ({}, SDE)
            ),
            {**SIGMA_MIN, "timestep_spacing": "trailing"},
            *(
                {**KARRAS, **more}
                for more in ({}, SDE, SIGMA_MIN, {"solver_order": 3}, {**COSINE, **SDE, "prediction_type": "v_prediction"})
            ),
            {**KARRAS, **SCALED, "prediction_type": "v_prediction"},
            *({**COSINE, "lambda_min_clipped": -5.1, "timestep_spacing": s} for s in ("linspace", "leading", "trailing")),
            *({"variance_type": v, **sde} for v in ("learned", "learned_range") for sde in ({}, SDE)),
            *({**ZERO_SNR, **more} for more in ({"timestep_spacing": "trailing"}, SDE, KARRAS)),
            {"solver_order": 3, "prediction_type": "v_prediction", "timestep_spacing": "leading"},
            {"solver_order": 3, "prediction_type": "sample", "timestep_spacing": "trailing", **SDE},
            {"algorithm_type": "deis", "solver_type": "bh2", **SIGMA_MIN},
            FEW,
        )
    ),
]
CASES = [
    *product(GRID, (10, 33)),
    *product([case for case in GRID if case[0] == "DDIM" and "timestep_spacing" in case[1]], (1, 7, 30, 600)),
    *product([("DPMSolverMultistep", {"solver_order": 3, **c}, {}) for c in ({}, SDE, KARRAS)], (1, 2, 3, 4, 14, 15)),
]


@pytest.mark.parametrize(("case", "steps"), CASES, ids=str)
def test_a_pipeline_draws_the_images_of_diffusers(case: tuple[str, dict[str, Any], dict[str, Any]], steps: int) -> None:
    kind, config, options = case
    theirs = getattr(diffusers, f"{kind}Scheduler")(**config)
    schedule, learned = NoiseSchedule.from_diffusers(theirs.config), str(config.get("variance_type")).startswith("learned")
    network, drawn, last = Network(schedule, theirs.config.prediction_type, learned), [], []
    for scheduler in (theirs, PlanScheduler.of(theirs, steps)):
        pipe, draws = pipeline(network, scheduler, "DDIM" if kind == "DDIM" else "DDPM"), generator(1)
        if config.get("use_karras_sigmas"):  # a loop finds the second of two equal timesteps otherwise
            scheduler.set_timesteps = lambda n, of=scheduler, set_to=scheduler.set_timesteps: (set_to(n), of.set_begin_index(0))
        step, taken = scheduler.step, []
        scheduler.step = lambda *args, step=step, taken=taken, **more: taken.append(step(*args, **more)) or taken[-1]
        drawn.append(pipe(batch_size=3, generator=draws, num_inference_steps=steps, output_type="pt", **options).images)
        last.append(taken[-1].prev_sample)
    # Without a clip, some of order 3 with noise arrive at up to 12.
    torch.testing.assert_close(*last, rtol=0, atol=1e-4 * max(1.0, float(last[0].abs().max())))
    assert float(drawn[0].std()) > 0.02  # no picture of clipping
    assert torch.equal(drawn[1], (last[1] / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("config", [{}, {"timestep_spacing": "trailing"}, {"set_alpha_to_one": False}], ids=str)
@pytest.mark.parametrize("steps", [7, 10, 50])
def test_inversion_is_that_of_diffusers(config: dict[str, Any], steps: int) -> None:
    theirs, network = diffusers.DDIMInverseScheduler(**config), Network(LINEAR, "epsilon", False)
    theirs.set_timesteps(steps)
    ours = PlanScheduler.of(theirs)
    drawn = []
    for scheduler in (theirs, ours):
        x = 0.5 * normals(*SHAPE).clamp(-1, 1)
        for t in scheduler.timesteps:
            x = scheduler.step(network.output(x, t), t, x).prev_sample
        drawn.append(x)
    torch.testing.assert_close(*drawn, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ pipelines


@pytest.mark.parametrize("name", PLANS)
def test_a_pipeline_draws_what_sample_draws(name: str) -> None:
    plan, seeds = PLANS[name], sample_seeds(0, 4)
    network, scheduler = network_of(plan), PlanScheduler(plan)
    expected = sample(network.output, plan, 4, seed=0, shape=SHAPE[1:], progress=False)
    for part in (slice(None), slice(2, 3)):
        scheduler.seeds = seeds[part]
        scheduler.set_timesteps(scheduler.num_inference_steps)
        x = ddpm_fast.noise((len(seeds[part]), *SHAPE[1:]), seeds[part], stream=STREAM_X_T)
        for t in scheduler.timesteps:
            x = scheduler.step(network.output(x, t), t, x).prev_sample
        torch.testing.assert_close(x, expected[part], rtol=0, atol=2e-6)
    scheduler.seeds = None
    pipe = pipeline(network, scheduler)
    drawn = pipe(
        batch_size=2, generator=generator(), num_inference_steps=scheduler.num_inference_steps, output_type="pt"
    ).images
    assert drawn.isfinite().all()
    if not plan.is_random:
        x_T = torch.randn(2, *SHAPE[1:], generator=generator())
        alone = sample(network.output, plan, 2, x_T=x_T, shape=SHAPE[1:], progress=False)
        torch.testing.assert_close(drawn, (alone / 2 + 0.5).clamp(0, 1), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", PLANS)
def test_a_saved_pipeline_draws_the_same(name: str, tmp_path: Path) -> None:
    plan = PLANS[name]
    pipe = make(unet=make_unet(out_channels=4) if name == "learned" else make_unet())
    pipe.scheduler = PlanScheduler(plan)
    steps = {"num_inference_steps": pipe.scheduler.num_inference_steps}
    drawn = images(pipe, **steps)
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is PlanScheduler
    assert loaded.scheduler.plan.fit == plan.fit
    assert torch.equal(images(loaded, **steps), drawn)
    assert_same(images(freeze(loaded), **steps), drawn)
    clip = load_folder(tmp_path).clip  # the same file, read by this package
    assert clip == 1.0


def test_latent_pipelines(tmp_path: Path) -> None:
    """With random weights: LDM as it is saved, and a conditional loop without `freeze`."""
    torch.manual_seed(0)
    vae = diffusers.VQModel(block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=16, vq_embed_dim=2, latent_channels=2)
    unet = make_unet(in_channels=2, out_channels=2)
    theirs = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, **SCALED)
    pipe = diffusers.LDMPipeline(vqvae=vae, unet=unet, scheduler=theirs)
    pipe.set_progress_bar_config(disable=True)
    call = {"batch_size": 2, "num_inference_steps": 5, "output_type": "np"}
    expected = pipe(generator=generator(), **call).images
    frozen = freeze(pipe)
    assert frozen.scheduler is theirs
    np.testing.assert_allclose(frozen(generator=generator(), **call).images, expected, atol=2e-4)
    frozen.scheduler = PlanScheduler.of(theirs, 5)
    np.testing.assert_allclose(frozen(generator=generator(), **call).images, expected, atol=2e-4)

    conditional = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
    ).eval()
    text, drawn = normals(2, 3, 8, seed=2), []
    for scheduler in (theirs, PlanScheduler.of(theirs, 5)):
        scheduler.set_timesteps(5)
        x = normals(2, 2, 8, 8) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            with torch.no_grad():
                m = conditional(scheduler.scale_model_input(x, t), t, encoder_hidden_states=text).sample
            x = scheduler.step(m, t, x, eta=0.0).prev_sample
        drawn.append(x)
    torch.testing.assert_close(*drawn, rtol=0, atol=1e-4)


IMAGE_TO_IMAGE: list[tuple[str, dict[str, Any]]] = [
    ("DDIM", {}),
    ("DDPM", {}),
    *(("DPMSolverMultistep", c) for c in ({}, SDE, KARRAS, {"solver_order": 3}, {"solver_order": 3, **SDE})),
]


@pytest.mark.parametrize("is_set", [True, False])
@pytest.mark.parametrize(("kind", "config"), IMAGE_TO_IMAGE, ids=str)
def test_image_to_image_with_strength_one_half_is_that_of_diffusers(kind: str, config: dict[str, Any], is_set: bool) -> None:
    theirs, network, drawn = getattr(diffusers, f"{kind}Scheduler")(**config), Network(LINEAR, "epsilon", False), []
    image = 0.5 * normals(*SHAPE, seed=3).clamp(-1, 1)
    for scheduler in (theirs, PlanScheduler.of(theirs, 20)):
        draws = generator(1)
        scheduler.set_timesteps(20)
        begin = 10 * scheduler.order
        if is_set and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        timesteps = scheduler.timesteps[begin:]
        x = scheduler.add_noise(image, normals(*SHAPE, seed=7), timesteps[:1].repeat(len(image)))
        for t in timesteps:
            x = scheduler.step(network.output(x, t), t, x, generator=draws).prev_sample
        drawn.append(x)
    torch.testing.assert_close(*drawn, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in PLANS if name != "learned"])
def test_the_middle_of_a_chain_is_what_sample_draws_from_there(name: str) -> None:
    plan = PLANS[name]
    begin = 4 if name == "heun" else 3
    scheduler, network, start = PlanScheduler(plan), network_of(plan), int(plan.timesteps[begin - (name == "heun")])
    later, seeds = plan.starting_at(start), sample_seeds(0, 3)
    scheduler.seeds = seeds
    scheduler.set_begin_index(len(plan) - len(later))
    x = scheduler.add_noise(0.5 * normals(*SHAPE), normals(*SHAPE, seed=1), scheduler.timesteps[len(plan) - len(later)])
    alpha = later.alpha_bars[0].sqrt()
    noised = alpha * 0.5 * normals(*SHAPE) + (1 - alpha**2).sqrt() * normals(*SHAPE, seed=1)
    torch.testing.assert_close(x, noised.float(), rtol=0, atol=1e-6)
    expected = sample(network.output, later, 3, x_T=x, seed=0, shape=SHAPE[1:], progress=False)
    for t in scheduler.timesteps[len(plan) - len(later) :]:
        x = scheduler.step(network.output(x, t), t, x).prev_sample
    torch.testing.assert_close(x, expected, rtol=0, atol=2e-6)


# ---------------------------------------------------------------------------------------------------------- timesteps


def test_other_numbers_of_steps() -> None:
    scheduler = PlanScheduler(PLANS["order 2"])
    for steps in (4, 7, 10):
        scheduler.set_timesteps(steps)
        assert torch.equal(scheduler.plan.coefficients, dpm_solver_plan(V, steps).coefficients)
        assert (scheduler.num_inference_steps, len(scheduler.timesteps), scheduler.step_index) == (steps, steps, None)
    heun = PlanScheduler(PLANS["heun"])
    assert (heun.order, heun.num_inference_steps, len(heun.timesteps)) == (2, 6, 11)
    heun.set_timesteps(4)
    assert torch.equal(heun.timesteps, heun_plan(V, 4, spacing="karras").timesteps)
    listed = PlanScheduler(ddim_plan(LINEAR, None, spacing=[900, 500, 20], previous=[600, 30, -1]))
    for timesteps in ([800, 3], torch.tensor([700, 600, 500, 1])):
        listed.set_timesteps(timesteps=timesteps)
        assert torch.equal(listed.plan.coefficients, ddim_plan(LINEAR, None, spacing=[*timesteps]).coefficients)
    listed.set_timesteps(3)
    assert listed.timesteps.tolist() == [900, 500, 20]


def test_spacings_keep_their_names_where_they_are_the_same() -> None:
    """So that a pipeline may take another number of steps."""
    for kind, config in (
        *product(("DDPM", "DDIM", "DPMSolverMultistep"), ({}, {"timestep_spacing": "leading"})),
        ("DPMSolverMultistep", KARRAS),
    ):
        theirs = getattr(diffusers, f"{kind}Scheduler")(**config)
        scheduler = PlanScheduler.of(theirs, 10)
        for steps in (20, 5):
            scheduler.set_timesteps(steps)
            assert torch.equal(scheduler.plan.coefficients, plan_of(theirs, steps).coefficients)


@pytest.mark.parametrize("name", STATELESS)
def test_a_timestep_for_each_sample_in_any_order(name: str) -> None:
    plan, scheduler = PLANS[name], PlanScheduler(PLANS[name])
    x_t, timesteps, seeds = normals(*SHAPE), torch.tensor([700, 100, 0]), sample_seeds(0, 3)
    m, drawn = network_of(plan).output(x_t, timesteps), torch.randn(SHAPE, generator=generator(3))
    by_generator = scheduler.step(m, timesteps, x_t, generator=generator(3)).prev_sample
    scheduler.seeds = seeds
    by_seeds = scheduler.step(m, timesteps, x_t).prev_sample
    for i, t in enumerate(timesteps.tolist()):
        row, own = plan.timesteps.tolist().index(t), slice(i, i + 1)
        for got, noise in ((by_generator, {"noise": drawn[own]}), (by_seeds, {"seeds": seeds[own]})):
            assert torch.equal(got[own], reverse_step(x_t[own], m[own], row, plan, **noise))


@pytest.mark.parametrize("form", [int, torch.tensor, lambda t: torch.tensor([t], dtype=torch.int32), np.int64])
def test_every_form_of_a_timestep(form: Callable[[int], Any]) -> None:
    for name in ("ddpm", "order 2"):
        scheduler, (x_t, m) = PlanScheduler(PLANS[name]), normals(2, *SHAPE)
        t = int(scheduler.timesteps[4])
        results = []
        for each in (form(t), t):
            scheduler.set_timesteps(10)
            results.append(scheduler.step(m, each, x_t, generator=generator()).prev_sample)
        assert torch.equal(*results)


@pytest.mark.parametrize("name", PLANS)
def test_a_timestep_on_a_device_is_not_read_by_the_host(name: str) -> None:
    """Tensors on "meta" have shapes and no values: what would wait for a GPU's fails."""
    scheduler = PlanScheduler(PLANS[name])
    scheduler.set_timesteps(scheduler.num_inference_steps, device="meta")
    x_t, timesteps = torch.empty(SHAPE, device="meta"), scheduler.timesteps
    assert timesteps.device.type == "meta"
    assert scheduler.add_noise(x_t, x_t, timesteps[:3]).shape == SHAPE
    m = torch.cat([x_t, x_t], dim=1) if name == "learned" else x_t
    if name not in STATELESS:
        scheduler.set_begin_index(0)  # without it the first step of a chain is looked up
    for t in [timesteps[0], timesteps[:3], timesteps[:1].int()] if name in STATELESS else timesteps:
        assert {x.shape for x in scheduler.step(m, t, x_t, return_dict=False)} == {SHAPE}


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_compiled_in_one_graph(name: str) -> None:
    """And not again for another timestep."""
    scheduler, (x_t, m) = PlanScheduler(PLANS[name]), normals(2, *SHAPE)
    scheduler.seeds = sample_seeds(0, len(x_t))

    def step(m: Tensor, t: Tensor | int, x_t: Tensor) -> tuple[Tensor, Tensor]:
        stepped: tuple[Tensor, Tensor] = scheduler.step(m, t, x_t, return_dict=False)
        return stepped

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            scheduler.set_timesteps(10)
            for t in scheduler.timesteps:
                assert all(map(torch.equal, compiled(m, t, x_t), step(m, int(t), x_t)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_on_a_gpu_nothing_waits_and_one_graph_serves_every_step(name: str) -> None:
    scheduler, (x_t, m) = PlanScheduler(PLANS[name]), normals(2, *SHAPE).cuda()
    scheduler.set_timesteps(10, device="cuda")
    scheduler.seeds = sample_seeds(0, len(x_t)).cuda()

    def step(t: Tensor) -> Tensor:
        x_prev: Tensor = scheduler.step(m, t, x_t).prev_sample
        return x_prev

    expected = list(map(step, scheduler.timesteps))
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = list(map(step, scheduler.timesteps))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, got, expected))
    static, graph = scheduler.timesteps[0].clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x_prev = step(static)
    for t, wanted in zip(scheduler.timesteps, expected, strict=True):
        static.copy_(t)
        graph.replay()
        assert torch.equal(x_prev, wanted)


# --------------------------------------------------------------------------------------------------- options of a step


def test_eta_and_clipping_are_those_of_the_plan_unless_a_step_says_more() -> None:
    plan, (x_t, m) = ddim_plan(LINEAR, 10, eta=0.5, use_clipped_model_output=False), normals(2, *SHAPE)
    scheduler = PlanScheduler(plan)
    for options, changes in (
        ({}, {}),
        ({"eta": 0.9}, {"eta": 0.9}),
        ({"eta": 0.0}, {}),  # as pipelines pass it for every scheduler
        ({"use_clipped_model_output": True}, {"use_clipped_model_output": True}),
        ({"eta": 1.0, "use_clipped_model_output": False}, {"eta": 1.0}),
    ):
        wanted = plan.builder(**changes)  # type: ignore[misc]
        got = scheduler.step(m, 500, x_t, generator=generator(2), **options).prev_sample
        row = wanted.timesteps.tolist().index(500)
        assert torch.equal(got, reverse_step(x_t, m, row, wanted, noise=normals(*SHAPE, seed=2)))


def test_noise_that_is_given_and_seeds_leave_the_generator_alone() -> None:
    scheduler, draws, (x_t, m, z) = PlanScheduler(PLANS["ddpm"]), generator(), normals(3, *SHAPE)
    given = scheduler.step(m, 500, x_t, variance_noise=z).prev_sample
    assert torch.equal(given, reverse_step(x_t, m, 4, PLANS["ddpm"], noise=z))
    scheduler.seeds = sample_seeds(0, 3)
    scheduler.step(m, 500, x_t, generator=draws)
    assert torch.equal(draws.get_state(), generator().get_state())
    scheduler.seeds = None
    scheduler.step(m, 0, x_t, generator=draws)  # the last step has no noise
    assert torch.equal(draws.get_state(), generator().get_state())


FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("name", ["ddim", "order 3"])
@pytest.mark.parametrize("x", FLOATS)
@pytest.mark.parametrize("m", FLOATS)
def test_dtypes_meet_as_in_diffusers(name: str, x: torch.dtype, m: torch.dtype) -> None:
    scheduler, wide = PlanScheduler(PLANS[name]), torch.promote_types(x, m)
    for row in (0, 1, 2):
        t, args = int(scheduler.timesteps[row]), normals(2, *SHAPE, seed=row)
        got = scheduler.step(args[0].to(m), t, args[1].to(x), generator=generator()).prev_sample
        assert got.dtype == wide
    scheduler.set_timesteps(10)
    noise, rounding = normals(*SHAPE, dtype=m), torch.finfo(torch.bfloat16 if torch.bfloat16 in (x, m) else torch.float16)
    stepped = scheduler.step(args[0].to(m), int(scheduler.timesteps[0]), args[1].to(x), variance_noise=noise).prev_sample
    exact = reverse_step(
        args[1].to(x).double(),
        args[0].to(m).double(),
        0,
        PLANS[name],
        noise=noise.double(),
        **({"x_0_prev": torch.zeros(SHAPE).double(), "x_0_prev2": torch.zeros(SHAPE).double()} if name == "order 3" else {}),
    )
    eps = rounding.eps if {x, m} & {torch.float16, torch.bfloat16} else torch.finfo(torch.float32).eps
    torch.testing.assert_close(stepped.double(), exact, rtol=2 * eps, atol=4 * eps)


def test_gradients_flow_through_the_remembered_x_0() -> None:
    """Also where the tables were made in inference mode."""
    with torch.inference_mode():
        scheduler = PlanScheduler(dpm_solver_plan(LINEAR, 10, clip=None))
    x, m = normals(2, *SHAPE)
    scheduler.step(m.requires_grad_(), int(scheduler.timesteps[0]), x)
    scheduler.step(m.detach(), int(scheduler.timesteps[1]), x).prev_sample.sum().backward()
    q, k3 = (float(scheduler.plan.coefficients[row, COLUMNS.index(name)]) for row, name in ((0, "q"), (1, "k3")))
    torch.testing.assert_close(m.grad, torch.full(SHAPE, q * k3))


def test_noised_images_are_those_of_diffusers() -> None:
    theirs, scheduler, (x_0, noise) = diffusers.DDPMScheduler(), PlanScheduler(PLANS["ddpm"]), normals(2, *SHAPE)
    t = torch.tensor([0, 500, 999])
    for arguments in (
        *((x_0, noise, each) for each in (t, torch.tensor([7]), torch.tensor(7), t.int())),
        *((x_0[:1], noise, t), (x_0[:1], noise[:1], torch.tensor([3]))),
    ):
        torch.testing.assert_close(scheduler.add_noise(*arguments), theirs.add_noise(*arguments))
    assert scheduler.add_noise(x_0.half(), noise, t).dtype == torch.float32
    # Levels between timesteps are the plan's. A timestep outside of it has the level of the schedule.
    plan = PLANS["karras"]
    levels = torch.stack([plan.alpha_bars[0], LINEAR.alpha_bars[997], plan.alpha_bars[3]]).reshape(-1, 1, 1, 1)
    expected = levels.sqrt() * x_0 + (1 - levels).sqrt() * noise
    got = PlanScheduler(plan).add_noise(x_0, noise, torch.tensor([int(plan.timesteps[0]), 997, int(plan.timesteps[3])]))
    torch.testing.assert_close(got, expected.float(), rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------ what diffusers' tests ask of a scheduler


@pytest.mark.parametrize("name", PLANS)
def test_the_contract_of_a_scheduler(name: str, tmp_path: Path) -> None:
    """The checks of diffusers' SchedulerCommonTest that do not set keys of a constructor."""
    plan = PLANS[name]
    scheduler, x, network = PlanScheduler(plan), normals(*SHAPE), network_of(plan)
    assert isinstance(scheduler, diffusers.SchedulerMixin)
    assert scheduler.compatibles == []
    assert len(scheduler) == scheduler.config.num_train_timesteps == 1000
    assert scheduler.config.prediction_type == plan.prediction
    scheduler.save_pretrained(tmp_path)
    loaded, unused = PlanScheduler.from_pretrained(tmp_path, return_unused_kwargs=True, extra=3)
    assert unused == {"extra": 3}
    again = PlanScheduler.from_config(scheduler.config)
    results = []
    for each in (scheduler, loaded, again):
        each.set_timesteps(each.num_inference_steps)
        t = each.timesteps[0]
        results.append(each.step(network.output(x, t), t, x, generator=generator()).prev_sample)
    assert all(torch.equal(result, results[0]) for result in results)
    assert json.loads(loaded.to_json_string()) == json.loads((tmp_path / "scheduler_config.json").read_text())
    for t in scheduler.timesteps[1:3]:  # shapes; a dictionary and a tuple
        assert scheduler.scale_model_input(x, t) is x
        scheduler.set_timesteps(scheduler.num_inference_steps)
        by_name = scheduler.step(network.output(x, t), t, x, generator=generator())
        scheduler.set_timesteps(scheduler.num_inference_steps)
        in_order = scheduler.step(network.output(x, t), t, x, generator=generator(), return_dict=False)
        assert by_name.prev_sample.shape == x.shape
        assert torch.equal(by_name.prev_sample, in_order[0])
        assert torch.equal(by_name["pred_original_sample"], in_order[1])
    assert scheduler.init_noise_sigma == 1.0
    scheduler.dummy_attribute = 5
    scheduler.register_to_config(test_attribute=5)
    assert (scheduler.dummy_attribute, scheduler.config.test_attribute) == (5, 5)
    with pytest.raises(AttributeError, match="does_not_exist"):
        _ = scheduler.does_not_exist
    assert scheduler.add_noise(x, x, scheduler.timesteps[:1]).shape == x.shape


# -------------------------------------------------------------------------------------------------------------- errors

X = torch.zeros(SHAPE)
BY_HAND = SamplingPlan(LINEAR, PLANS["order 2"].timesteps, PLANS["order 2"].coefficients, "v_prediction", "fixed")


def changed(plan: SamplingPlan, **attributes: Any) -> PlanScheduler:
    scheduler = PlanScheduler(plan)
    vars(scheduler).update(attributes)
    return scheduler


def ended() -> PlanScheduler:
    scheduler = PlanScheduler(PLANS["order 2"])
    for t in scheduler.timesteps:
        scheduler.step(X, t, X)
    return scheduler


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: PlanScheduler(diffusers.DDPMScheduler()), "PlanScheduler: expected plan to be a SamplingPlan, got DDPMScheduler"),
    (
        lambda: PlanScheduler.from_config(diffusers.DDIMScheduler().config),
        "from_config: expected config to have a plan, got that of another scheduler: PlanScheduler.of",
    ),
    (lambda: PlanScheduler.of(diffusers.DDPMScheduler(thresholding=True), 5), "thresholding to be false"),
    (lambda: PlanScheduler(PLANS["ddpm"]).set_timesteps(), "exactly one of num_inference_steps and timesteps, got neither"),
    (lambda: PlanScheduler(PLANS["ddpm"]).set_timesteps(0), "set_timesteps: expected num_inference_steps to be .*, got 0"),
    (lambda: PlanScheduler(PLANS["ddpm"]).set_timesteps(1001), "num_inference_steps to be an integer in 1..1000, got 1001"),
    (
        lambda: PlanScheduler(PLANS["fitted"]).set_timesteps(50),
        "expected num_inference_steps to be 5, the number of the plan's steps, got 50",
    ),
    (
        lambda: PlanScheduler(PLANS["ddpm"]).set_timesteps(timesteps=[3, 3]),
        r"expected timesteps to be strictly descending timesteps in 0..999, got \[3, 3\]",
    ),
    (
        lambda: PlanScheduler(ddpm_plan(LINEAR, None, spacing=[500, 3])).set_timesteps(3),
        "expected num_inference_steps to be None or 2, as spacing lists, got 3",
    ),
    (lambda: PlanScheduler(BY_HAND).set_timesteps(20), "expected num_inference_steps to be 10, the number of the plan's steps"),
    (
        lambda: PlanScheduler(BY_HAND).set_begin_index(3),
        "PlanScheduler.set_begin_index: expected a plan that remembers how it was built",
    ),
    (lambda: PlanScheduler(PLANS["ddpm"]).set_begin_index(10), "expected begin_index in 0..9, got 10"),
    (
        lambda: PlanScheduler(PLANS["heun"]).set_begin_index(1),
        "begin_index to be where a step starts, got 1, in the middle of a step, or not the first row of timestep 880",
    ),
    (
        lambda: PlanScheduler(PLANS["ddpm"]).step(X, 899, X),
        "step: expected timestep to be one of the scheduler's timesteps, got 899",
    ),
    (lambda: PlanScheduler(PLANS["order 2"]).step(X, 3, X), "expected timestep to be one of the scheduler's timesteps, got 3"),
    (lambda: ended().step(X, 0, X), "expected one of the 10 steps of the chain, got another: call set_timesteps"),
    (lambda: PlanScheduler(PLANS["ddpm"]).step(None, 900, X), "step: expected model_output to be a tensor, got NoneType"),
    (lambda: PlanScheduler(PLANS["ddpm"]).step(X, 900, X.int()), "step: expected sample to be float32, .*, got torch.int32"),
    (lambda: PlanScheduler(PLANS["ddpm"]).step(X, 900.0, X), "'float' object cannot be interpreted as an integer"),
    (
        lambda: PlanScheduler(PLANS["ddpm"]).step(X, torch.tensor(900.0), X),
        r"expected timestep to be integers, 1 or 3, got torch.float32 \[\]",
    ),
    (
        lambda: PlanScheduler(PLANS["ddpm"]).step(X, torch.tensor([900, 0]), X),
        r"expected timestep to be integers, 1 or 3, got torch.int64 \[2\]",
    ),
    (
        lambda: PlanScheduler(PLANS["learned"]).step(X, 900, X),
        r"model_output to have shape \[3, 6, 6, 6\] \(twice the channels",
    ),
    (
        lambda: PlanScheduler(PLANS["ddpm"]).step(X, 900, X, eta=0.5),
        "expected eta 0 and use_clipped_model_output false for any plan but those of ddim_plan, got eta=0.5",
    ),
    (lambda: PlanScheduler(PLANS["ddim"]).step(X, 900, X, eta=9.0), r"step: expected eta to be at most \d.* got 9.0"),
    (
        lambda: PlanScheduler(PLANS["ddpm"]).step(X, 900, X, generator=torch.Generator(), variance_noise=X),
        "expected at most one of generator and variance_noise, got both",
    ),
    (
        lambda: changed(PLANS["ddpm"], seeds=3).step(X, 900, X),
        r"expected seeds to be an int64 tensor \(see sample_seeds\), got int",
    ),
    (
        lambda: PlanScheduler(PLANS["ddpm"]).add_noise(X, X, torch.tensor([1000])),
        r"expected t(imesteps)? in 0..999, got values from",
    ),
    (lambda: PlanScheduler(PLANS["ddpm"]).add_noise(X, X, -1), "expected t(imesteps)? in 0..999, got values from -1"),
    (
        lambda: PlanScheduler(PLANS["ddpm"]).add_noise(X, X, torch.tensor([0.5])),
        "expected timesteps to be an int or an int64 tensor, got torch.float32",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()


@pytest.mark.parametrize("plan", [BY_HAND, ddim_inversion_plan(LINEAR, 5), PLANS["ddpm"][3:]], ids=lambda plan: str(len(plan)))
def test_plans_that_no_file_can_describe_run_and_are_not_saved(plan: SamplingPlan, tmp_path: Path) -> None:
    scheduler = PlanScheduler(plan)
    scheduler.step(X, int(scheduler.timesteps[0]), X)
    wanted = r"^PlanScheduler\.save_pretrained: expected plan to be built by ddpm_plan, .* from plain values"
    with pytest.raises(ValueError, match=wanted):
        scheduler.save_pretrained(tmp_path)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["DDPM", "DDIM", "DDIMInverse", "DPMSolverMultistep"])
def test_a_saved_pipeline_with_an_earlier_scheduler_says_what_to_write(name: str, tmp_path: Path) -> None:
    pipe = make()
    pipe.save_pretrained(tmp_path)
    file = tmp_path / "model_index.json"
    described = json.loads(file.read_text()) | {"scheduler": ["ddpm_fast.integrations.diffusers", f"{name}Scheduler"]}
    file.write_text(json.dumps(described))
    with pytest.raises(ImportError, match=rf"has no {name}Scheduler: use diffusers\.{name}Scheduler, or PlanScheduler\.of"):
        diffusers.DDPMPipeline.from_pretrained(tmp_path)


def test_without_diffusers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, PlanScheduler.__module__)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    message = r"diffusers is missing: install it with pip install 'ddpm_fast\[diffusers\]'"
    with pytest.raises(ModuleNotFoundError, match=message) as raised:
        importlib.import_module(PlanScheduler.__module__)
    assert raised.value.name == "diffusers"
