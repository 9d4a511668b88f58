"""DDPMScheduler and DDIMScheduler in place of diffusers' own: the same results where diffusers is right, and what it is not."""

from __future__ import annotations

import copy
import importlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ddpm_fast
from ddpm_fast.reference import STREAM_X_T

diffusers = pytest.importorskip("diffusers")

from diffusers.schedulers import scheduling_ddim, scheduling_ddpm  # noqa: E402

from ddpm_fast.integrations import diffusers as integration  # noqa: E402
from ddpm_fast.integrations.diffusers import DDIMScheduler, DDPMScheduler  # noqa: E402

THEIRS = {DDPMScheduler: diffusers.DDPMScheduler, DDIMScheduler: diffusers.DDIMScheduler}
EPS = torch.finfo(torch.float32).eps
SHAPE = (3, 3, 6, 6)


def test_without_diffusers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, DDPMScheduler.__module__)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    message = r"diffusers is missing: install it with pip install 'ddpm_fast\[diffusers\]'"
    with pytest.raises(ModuleNotFoundError, match=message) as raised:
        importlib.import_module(DDPMScheduler.__module__)
    assert raised.value.name == "diffusers"


def normals(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def in_float64(theirs: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Diffusers' scheduler as it would be without rounding: float64 tables, and float32 noise for samples in float64."""
    schedule = ddpm_fast.NoiseSchedule.from_diffusers(theirs.config)
    theirs.alphas_cumprod = schedule.alpha_bars
    theirs.one = torch.tensor(1.0, dtype=torch.float64)
    if not theirs.config.get("set_alpha_to_one", True):
        theirs.final_alpha_cumprod = schedule.alpha_bars[0]
    draw = diffusers.utils.torch_utils.randn_tensor

    def drawn(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None) -> Tensor:
        return draw(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    for module in (scheduling_ddpm, scheduling_ddim):
        monkeypatch.setattr(module, "randn_tensor", drawn)
    return theirs


def model(scheduler: Any, x_t: Tensor, t: Any) -> Tensor:
    """Near what the best model says of images that are noise; amplifies no difference, and has some x_0 beyond the clip."""
    abar = scheduler.alphas_cumprod[int(t)].to(x_t.dtype)
    best = {"epsilon": (1 - abar).sqrt() * x_t, "sample": abar.sqrt() * x_t, "v_prediction": torch.zeros_like(x_t)}
    m = 0.9 * best[scheduler.config.prediction_type] + 0.1 * (1 - abar).sqrt() * torch.sin(x_t.roll(1, -1))
    if scheduler.config.get("variance_type") in ("learned", "learned_range"):
        m = torch.cat([m, torch.cos(2 * x_t)], dim=1)
    return m


def loop(scheduler: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    x = normals(*SHAPE, dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    for t in scheduler.timesteps:
        x = scheduler.step(model(scheduler, x, t), t, x, generator=generator, **options).prev_sample
    assert torch.isfinite(x).all()
    return torch.cat([x.flatten(), torch.randn(4, generator=generator).to(dtype)])  # as many numbers were drawn


def assert_same_image(ours: Any, theirs: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """From the same seed, and as near to that of diffusers without rounding as diffusers is."""
    assert torch.equal(ours.timesteps, theirs.timesteps)
    got, rounded = loop(ours, **options), loop(theirs, **options)
    exact = loop(in_float64(theirs, monkeypatch), torch.float64, **options)
    scale = max(1.0, float(exact.abs().max()))  # without a clip, values leave [-1, 1]
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=2 * float((rounded - exact).abs().max()) + 4 * EPS * scale)


GRID: list[tuple[type, dict[str, Any], dict[str, Any]]] = [
    *(
        (DDPMScheduler, {"beta_schedule": s}, {})
        for s in ("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid")
    ),
    *((DDPMScheduler, {"timestep_spacing": s}, {}) for s in ("linspace", "trailing")),
    *((DDPMScheduler, {"prediction_type": p, "clip_sample": c}, {}) for p in ("sample", "v_prediction") for c in (True, False)),
    *((DDPMScheduler, {"variance_type": v}, {}) for v in ("fixed_small_log", "fixed_large", "learned_range", "other")),
    (DDPMScheduler, {"clip_sample_range": 0.5}, {}),
    (DDPMScheduler, {"clip_sample": False}, {}),
    *((DDPMScheduler, {"thresholding": True, "sample_max_value": v}, {}) for v in (1.0, 1.5)),
    (DDPMScheduler, {"thresholding": True, "variance_type": "learned_range", "sample_max_value": 2.0}, {}),
    (DDPMScheduler, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}, {}),
    (DDPMScheduler, {"trained_betas": [0.01, 0.02, 0.05, 0.1, 0.2] * 8, "num_train_timesteps": 40}, {}),
    *((DDIMScheduler, {"prediction_type": p}, {"eta": e}) for p in ("epsilon", "sample", "v_prediction") for e in (0.0, 1.0)),
    (DDIMScheduler, {}, {"eta": 0.5, "use_clipped_model_output": True}),
    (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "beta_schedule": "scaled_linear"}, {}),
    (DDIMScheduler, {"set_alpha_to_one": False}, {"eta": 1.0}),
    (DDIMScheduler, {"timestep_spacing": "trailing", "clip_sample_range": 2.0}, {"eta": 1.0}),
    *((DDIMScheduler, {"thresholding": True, "sample_max_value": 1.5}, {"use_clipped_model_output": u}) for u in (True, False)),
    (DDIMScheduler, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}, {}),
]


@pytest.mark.parametrize("steps", [1000, 20])
@pytest.mark.parametrize(("kind", "config", "options"), GRID, ids=str)
def test_the_same_seed_gives_the_same_image(
    kind: type, config: dict[str, Any], options: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = kind(**config), THEIRS[kind](**config)
    steps = min(steps, 40 if "trained_betas" in config else 125 if steps > 20 else 20)
    ours.set_timesteps(steps)
    theirs.set_timesteps(steps)
    assert_same_image(ours, theirs, monkeypatch, **options)


@pytest.mark.parametrize(
    "config", [{}, {"variance_type": "learned_range", "timestep_spacing": "trailing"}, {"clip_sample": False}], ids=str
)
def test_a_list_of_timesteps(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = DDPMScheduler(**config), diffusers.DDPMScheduler(**config)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(timesteps=[999, 990, 700, 500, 499, 100, 20, 3, 2, 0])
    assert ours.custom_timesteps
    assert_same_image(ours, theirs, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", THEIRS)
def test_half_precision_is_rounded_once_a_step(kind: Any, dtype: torch.dtype) -> None:
    """The float32 step of the same noise, rounded; diffusers rounds after every operation."""
    options = {} if kind is DDPMScheduler else {"eta": 1.0}
    ours, theirs = kind(), THEIRS[kind]()
    errors = {}
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(50)
        errors[scheduler] = 0.0
        for t in scheduler.timesteps[::7]:
            x_t, m = normals(*SHAPE, seed=1).to(dtype), normals(*SHAPE, seed=2).to(dtype)
            got = scheduler.step(m, t, x_t, generator=torch.Generator().manual_seed(0), **options).prev_sample
            noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=dtype)
            plan = ours.sampling_plan(**options)
            row = plan.timesteps.tolist().index(int(t))
            exact = ddpm_fast.reverse_step(x_t.double(), m.double(), row, plan, noise=noise.double())
            assert got.dtype == dtype
            errors[scheduler] = max(errors[scheduler], float(((got - exact) / exact.abs().clamp(min=0.1)).abs().max()))
    assert errors[ours] <= torch.finfo(dtype).eps < errors[theirs]


# ------------------------------------------------------------------------------------------- configuration, files, classes


def test_they_are_schedulers_of_diffusers(tmp_path: Path) -> None:
    for kind in (DDPMScheduler, DDIMScheduler):
        ours = kind(num_train_timesteps=50, beta_schedule="scaled_linear", steps_offset=1)
        assert isinstance(ours, THEIRS[kind])
        ours.save_pretrained(tmp_path)
        for loaded in (kind.from_pretrained(tmp_path), THEIRS[kind].from_pretrained(tmp_path)):
            config = {key: value for key, value in ours.config.items() if key != "_use_default_values"}
            assert dict(loaded.config) == config
        saved = json.loads((tmp_path / "scheduler_config.json").read_text(encoding="utf-8"))
        theirs = json.loads(
            THEIRS[kind](num_train_timesteps=50, beta_schedule="scaled_linear", steps_offset=1).to_json_string()
        )
        assert saved == theirs
    assert DDIMScheduler.from_config(DDPMScheduler(beta_schedule="sigmoid").config).config.beta_schedule == "sigmoid"


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # NumPy's, of diffusers' other schedulers
@pytest.mark.parametrize("kind", THEIRS)
def test_configurations_go_to_every_compatible_scheduler_and_back(kind: Any) -> None:
    ours = kind(beta_end=0.03, prediction_type="v_prediction")
    for other in THEIRS[kind]().compatibles:
        try:
            there = other.from_config(ours.config)
        except ImportError:  # DPMSolverSDEScheduler wants a package of its own
            continue
        back = kind.from_config(there.config)
        assert (back.config.beta_end, back.config.prediction_type) == (0.03, "v_prediction")
        assert set(back.config) >= set(ours.config)


def test_signatures_are_those_of_diffusers() -> None:
    """Names, order and defaults of the constructor and of every public method; `sampling_plan` is ours."""
    import inspect

    for kind, theirs in THEIRS.items():
        for name in ("__init__", "set_timesteps", "step", "add_noise", "get_velocity", "scale_model_input", "__len__"):
            ours_parameters = inspect.signature(getattr(kind, name)).parameters
            theirs_parameters = inspect.signature(getattr(theirs, name)).parameters
            assert [(p.name, p.default) for p in ours_parameters.values()] == [
                (p.name, p.default) for p in theirs_parameters.values()
            ]
        for name in ("betas", "alphas", "alphas_cumprod", "timesteps", "init_noise_sigma", "num_inference_steps"):
            torch.testing.assert_close(getattr(kind(), name), getattr(theirs(), name), rtol=1e-6, atol=0)
    for kind, theirs in THEIRS.items():
        assert set(vars(theirs())) - {"timesteps", "alphas_cumprod"} <= set(vars(kind()))  # those are properties


def test_a_configuration_that_changes_changes_the_steps() -> None:
    scheduler = DDPMScheduler()
    x_t, m = normals(2, *SHAPE)
    scheduler.step(m, 500, x_t)
    scheduler.register_to_config(prediction_type="sample", clip_sample=False)
    assert torch.equal(scheduler.step(m, 500, x_t).pred_original_sample, m)


def test_timesteps_may_be_assigned() -> None:
    scheduler, listed = DDPMScheduler(), DDPMScheduler()
    scheduler.set_timesteps(10)
    scheduler.timesteps = torch.tensor([500, 300, 20])
    listed.set_timesteps(timesteps=[500, 300, 20])
    x_t, m = normals(2, *SHAPE)
    results = [s.step(m, 500, x_t, torch.Generator().manual_seed(1), return_dict=False)[0] for s in (scheduler, listed)]
    assert torch.equal(*results)
    assert scheduler.previous_timestep(300) == 20


def test_every_step_may_have_an_eta_of_its_own() -> None:
    ours, theirs = _set(DDIMScheduler), _set(diffusers.DDIMScheduler)
    results = []
    for scheduler in (ours, theirs):
        x, generator = normals(*SHAPE), torch.Generator().manual_seed(0)
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(model(scheduler, x, t), t, x, eta=i / 10, generator=generator).prev_sample
        results.append(x)
    torch.testing.assert_close(*results, rtol=0, atol=1e-4)
    ours.set_timesteps(20)
    assert ours.sampling_plan(eta=0.9).num_steps == 20


def test_ddim_keeps_the_models_epsilon_by_default() -> None:
    """Diffusers keeps it, while `ddim_plan` derives epsilon again. The coefficients were recorded earlier."""
    scheduler = _set(DDIMScheduler, 50)
    plan = scheduler.sampling_plan()
    assert plan.prediction == "epsilon"
    recorded = {
        0: [130.1475419882165, -130.1437001378652, 0.009349494847880077, 0.0, 0.9999562925178727],
        25: [3.2466728723592606, -3.0888322615696584, 0.33876251182687483, 0.0, 0.9408719150770452],
        48: [1.003147079786928, -0.07939813401485595, 0.9999499987499375, 0.0, 0.009999999999999449],
    }
    for row, expected in recorded.items():
        torch.testing.assert_close(plan.coefficients[row, :5].tolist(), expected, rtol=1e-12, atol=0)
    kept, derived = (
        ddpm_fast.ddim_plan(scheduler.schedule, 50, use_clipped_model_output=clipped).coefficients for clipped in (False, True)
    )
    assert torch.equal(plan.coefficients, kept)
    assert torch.equal(scheduler.sampling_plan(use_clipped_model_output=True).coefficients, derived)
    x_t, m = normals(2, *SHAPE)
    default, explicit, rederived = (
        scheduler.step(m, 500, x_t, **options).prev_sample
        for options in ({}, {"use_clipped_model_output": False}, {"use_clipped_model_output": True})
    )
    assert torch.equal(default, explicit)
    assert not torch.equal(default, rederived)


def test_a_copy_is_a_scheduler_of_its_own() -> None:
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(10)
    other = copy.deepcopy(scheduler)
    other.set_timesteps(5)
    assert (len(scheduler.timesteps), len(other.timesteps)) == (10, 5)
    assert scheduler.sampling_plan().num_steps == 10


# ------------------------------------------------------------------------------------------------------------- pipelines


def _tiny_unet() -> Any:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    return diffusers.UNet2DModel(sample_size=8, in_channels=3, out_channels=3, norm_num_groups=4, layers_per_block=1, **blocks)


def _images(pipeline: Any, **options: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    images: Tensor = pipeline(batch_size=2, num_inference_steps=10, output_type="pt", **options).images
    return images


def test_a_pipeline_of_diffusers_takes_them_and_saves_them(tmp_path: Path) -> None:
    unet = _tiny_unet()
    theirs = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    ours = diffusers.DDPMPipeline(unet, DDPMScheduler())
    expected = _images(theirs, generator=torch.Generator().manual_seed(1))
    images = _images(ours, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    ours.save_pretrained(tmp_path)
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.scheduler, DDPMScheduler)
    assert torch.equal(_images(loaded, generator=torch.Generator().manual_seed(1)), images)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    first = _images(ours, generator=generators)[0]
    alone = ours(batch_size=1, generator=torch.Generator().manual_seed(0), num_inference_steps=10, output_type="pt").images[0]
    torch.testing.assert_close(first, alone, rtol=0, atol=1e-5)


def test_ddim_pipeline_is_given_the_scheduler_after_it_is_made() -> None:
    """Its constructor makes a scheduler of diffusers from the configuration of the one it gets."""
    pipeline = diffusers.DDIMPipeline(_tiny_unet(), DDIMScheduler())
    assert not isinstance(pipeline.scheduler, DDIMScheduler)
    expected = _images(pipeline, generator=torch.Generator().manual_seed(1), eta=0.5)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    images = _images(pipeline, generator=torch.Generator().manual_seed(1), eta=0.5)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- timesteps


@pytest.mark.parametrize("kind", THEIRS)
def test_a_timestep_for_each_sample(kind: Any) -> None:
    scheduler = kind(num_train_timesteps=100)
    scheduler.set_timesteps(10)
    x_t, m = normals(2, *SHAPE)
    noise = {} if kind is DDPMScheduler else {"eta": 1.0}
    timesteps = torch.tensor([90, 10, 0])
    generator = torch.Generator().manual_seed(3)
    together = scheduler.step(m, timesteps, x_t, generator=generator, **noise)
    scheduler.seeds = ddpm_fast.sample_seeds(0, 3)
    seeded = scheduler.step(m, timesteps, x_t, **noise).prev_sample
    drawn = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    for i, t in enumerate(timesteps.tolist()):
        plan = scheduler.sampling_plan(**noise)
        row = plan.timesteps.tolist().index(t)
        alone = ddpm_fast.reverse_step(x_t[i : i + 1], m[i : i + 1], row, plan, noise=drawn[i : i + 1])
        torch.testing.assert_close(together.prev_sample[i : i + 1], alone, rtol=0, atol=0)
        alone = ddpm_fast.reverse_step(x_t[i : i + 1], m[i : i + 1], row, plan, seeds=scheduler.seeds[i : i + 1])
        torch.testing.assert_close(seeded[i : i + 1], alone, rtol=0, atol=0)


@pytest.mark.parametrize("make", [int, torch.tensor, lambda t: torch.tensor([t], dtype=torch.int32), np.int64])
def test_every_form_of_a_timestep(make: Callable[[int], Any]) -> None:
    x_t, m = normals(2, *SHAPE)
    for kind in THEIRS:
        scheduler = kind()
        scheduler.set_timesteps(10)
        expected = scheduler.step(m, 300, x_t, generator=torch.Generator().manual_seed(0)).prev_sample
        got = scheduler.step(m, make(300), x_t, generator=torch.Generator().manual_seed(0)).prev_sample
        assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize("config", [{}, {"thresholding": True}])
def test_a_timestep_on_a_device_is_not_read_by_the_host(kind: Any, config: dict[str, Any]) -> None:
    """Tensors on "meta" have shapes and no values: what would wait for a GPU's fails."""
    scheduler = kind(**config)
    scheduler.set_timesteps(10, device="meta")
    x_t = torch.empty(SHAPE, device="meta")
    options = {} if kind is DDPMScheduler else {"eta": 1.0}
    for t in (scheduler.timesteps[0], scheduler.timesteps[:3], scheduler.timesteps[:1].int()):
        out = scheduler.step(x_t, t, x_t, **options)
        assert (out.prev_sample.shape, out.pred_original_sample.shape) == (SHAPE, SHAPE)
    assert scheduler.add_noise(x_t, x_t, scheduler.timesteps[:3]).shape == SHAPE


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize(
    "config",
    [
        {},
        pytest.param(
            {"thresholding": True},
            marks=pytest.mark.skipif(torch.__version__ < "2.10", reason="torch 2.9 compiles no torch.quantile in one graph"),
        ),
    ],
)
def test_compiled_in_one_graph(kind: Any, config: dict[str, Any]) -> None:
    """And not again for another timestep."""
    scheduler = kind(num_train_timesteps=100, **config)
    scheduler.set_timesteps(10)
    options = {} if kind is DDPMScheduler else {"eta": 1.0}
    x_t, m = normals(2, *SHAPE)
    scheduler.seeds = ddpm_fast.sample_seeds(0, len(x_t))
    scheduler.step(m, 90, x_t, **options)
    torch._dynamo.reset()

    def step(m: Tensor, t: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor]:
        stepped: tuple[Tensor, Tensor] = scheduler.step(m, t, x_t, return_dict=False, **options)
        return stepped

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for t in scheduler.timesteps:
            for got, expected in zip(compiled(m, t, x_t), step(m, t, x_t), strict=True):
                torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_compiled_once_for_any_number_of_steps_and_any_form() -> None:
    scheduler = DDPMScheduler(num_train_timesteps=100)
    x_t, m = normals(2, *SHAPE)
    torch._dynamo.reset()
    compiled = torch.compile(lambda m, t, x_t: scheduler.step(m, t, x_t).prev_sample, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for steps in (10, 10, 20):
            scheduler.set_timesteps(steps)
            for t in scheduler.timesteps:
                assert compiled(m, t, x_t).shape == SHAPE
        assert torch.equal(compiled(m, torch.tensor(0), x_t), scheduler.step(m, 0, x_t).prev_sample)
    ddim = _set(DDIMScheduler)
    compiled = torch.compile(lambda: ddim.step(m, torch.tensor(0), x_t, eta=0.3), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="expected a first step outside"):
        compiled()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", THEIRS)
def test_on_a_gpu_nothing_waits_and_one_graph_serves_every_step(kind: Any) -> None:
    scheduler = kind(num_train_timesteps=100)
    scheduler.set_timesteps(10, device="cuda")
    options = {} if kind is DDPMScheduler else {"eta": 1.0}
    x_t, m = normals(2, *SHAPE).cuda()
    scheduler.seeds = ddpm_fast.sample_seeds(0, len(x_t))
    expected = [scheduler.step(m, t, x_t, return_dict=False, **options)[0] for t in scheduler.timesteps]
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = [scheduler.step(m, t, x_t, return_dict=False, **options)[0] for t in scheduler.timesteps]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, got, expected))
    static, graph = scheduler.timesteps[0].clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x_prev = scheduler.step(m, static, x_t, return_dict=False, **options)[0]
    for t, wanted in zip(scheduler.timesteps, expected, strict=True):
        static.copy_(t)
        graph.replay()
        assert torch.equal(x_prev, wanted)


@pytest.mark.parametrize("steps", [1, 7, 30, 50, 600])
@pytest.mark.parametrize("config", [{}, {"clip_sample": False}, {"prediction_type": "v_prediction"}], ids=str)
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_ddim_arrives_where_that_of_diffusers_does(
    spacing: str, eta: float, config: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It steps to t - T // S, which may be between two timesteps of these spacings, and above x_0 at last."""
    ours, theirs = (kind(timestep_spacing=spacing, **config) for kind in (DDIMScheduler, diffusers.DDIMScheduler))
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(steps)
    abar = torch.cat([ours.schedule.alpha_bars, torch.ones(1, dtype=torch.float64)])
    plan = ours.sampling_plan(eta)
    assert torch.equal(plan.alpha_bars_prev, abar[(theirs.timesteps - 1000 // steps).clamp(min=-1)])
    assert_same_image(ours, theirs, monkeypatch, eta=eta)


def test_ddim_goes_on_from_the_middle_of_a_chain_as_diffusers_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Image to image may assign the timesteps that are left."""
    ours, theirs = (kind(timestep_spacing="linspace") for kind in (DDIMScheduler, diffusers.DDIMScheduler))
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(7)
        scheduler.timesteps = scheduler.timesteps[3:]
    assert_same_image(ours, theirs, monkeypatch)


def test_ddim_without_set_timesteps_goes_to_the_next_timestep_that_is_listed() -> None:
    """Diffusers has no such steps."""
    scheduler = DDIMScheduler()
    scheduler.timesteps = torch.tensor([500, 300, 20])
    listed = ddpm_fast.ddim_plan(scheduler.schedule, None, spacing=[500, 300, 20], use_clipped_model_output=False)
    assert torch.equal(scheduler.sampling_plan().coefficients, listed.coefficients)


@pytest.mark.parametrize(("kind", "steps"), [(DDPMScheduler, None), (DDPMScheduler, 10), (DDIMScheduler, None)])
@pytest.mark.parametrize("timesteps", [[500, 1000], [500, 300, 400], [2.5, 1.0]])
def test_timesteps_that_no_chain_can_have_are_named(kind: Any, steps: int | None, timesteps: list[float]) -> None:
    scheduler = kind() if steps is None else _set(kind, steps)
    scheduler.timesteps = torch.tensor(timesteps)
    with pytest.raises(ValueError, match=r"expected spacing to be strictly descending timesteps in 0\.\.999, got \["):
        scheduler.sampling_plan()


# ----------------------------------------------------------------------------------------------------------------- seeds


@pytest.mark.parametrize("kind", THEIRS)
def test_with_seeds_a_loop_is_what_sample_draws(kind: Any) -> None:
    """And sample 2 is the same in a batch and alone."""
    options = {} if kind is DDPMScheduler else {"eta": 1.0}
    scheduler = kind(num_train_timesteps=50)
    scheduler.set_timesteps(10)

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        return 0.5 * x_t + 0.01 * t.reshape(-1, 1, 1, 1)

    def draw(seeds: Tensor) -> Tensor:
        scheduler.seeds = seeds
        x = ddpm_fast.noise((len(seeds), 3, 4, 4), seeds, stream=STREAM_X_T)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x, **options).prev_sample
        return x

    seeds = ddpm_fast.sample_seeds(0, 4)
    module = torch.nn.Module()
    module.forward = network  # type: ignore[method-assign]
    module.register_parameter("weight", torch.nn.Parameter(torch.zeros(1)))
    plan = scheduler.sampling_plan(**options)
    expected = ddpm_fast.sample(module, plan, 4, seed=0, shape=(3, 4, 4), progress=False)
    images = draw(seeds)
    assert torch.equal(images, expected)
    assert torch.equal(draw(seeds[2:3]), images[2:3])


def test_seeds_leave_the_generator_alone() -> None:
    scheduler = DDPMScheduler()
    scheduler.seeds = ddpm_fast.sample_seeds(0, 3)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    x_t, m = normals(2, *SHAPE)
    scheduler.step(m, 500, x_t, generator)
    assert torch.equal(generator.get_state(), before)
    assert "seeds" not in scheduler.config
    scheduler.seeds = None
    scheduler.step(m, 500, x_t, generator)
    assert not torch.equal(generator.get_state(), before)


# ----------------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize("x", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_dtypes_meet_as_in_diffusers(kind: Any, x: torch.dtype, m: torch.dtype) -> None:
    ours, theirs = kind(), THEIRS[kind]()
    results = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
        options = {} if kind is DDPMScheduler else {"eta": 1.0}
        generator = torch.Generator().manual_seed(0)
        args = normals(*SHAPE, dtype=m), 300, normals(*SHAPE, seed=1, dtype=x)
        results.append(scheduler.step(*args, generator=generator, **options).prev_sample)
    assert results[0].dtype == results[1].dtype == torch.promote_types(x, m)
    coarse = max(torch.finfo(m).eps, torch.finfo(x).eps)
    torch.testing.assert_close(*results, rtol=0, atol=16 * max(coarse, EPS))


@pytest.mark.parametrize("kind", THEIRS)
def test_gradients_flow(kind: Any) -> None:
    """Also where the tables were made in inference mode."""
    scheduler = kind(clip_sample=False)
    with torch.inference_mode():
        scheduler.set_timesteps(10)
    x_t, m = (x.requires_grad_() for x in normals(2, *SHAPE))
    out = scheduler.step(m, 300, x_t)
    (out.prev_sample.sum() + out.pred_original_sample.sum()).backward()
    plan = scheduler.sampling_plan()
    p, q, _, k1, k2 = plan.coefficients[plan.timesteps.tolist().index(300), :5].tolist()
    torch.testing.assert_close(x_t.grad, torch.full(SHAPE, p + k1))
    torch.testing.assert_close(m.grad, torch.full(SHAPE, q + k2))


# -------------------------------------------------------------------------------------------------------- forward process


@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
def test_forward_process_equals_diffusers(method: str) -> None:
    ours, theirs = DDPMScheduler(), diffusers.DDPMScheduler()
    x_0, noise = normals(2, *SHAPE)
    for t in (torch.tensor([0, 500, 999]), torch.tensor([7]), torch.tensor(7), torch.tensor([1, 2, 3], dtype=torch.int32)):
        torch.testing.assert_close(getattr(ours, method)(x_0, noise, t), getattr(theirs, method)(x_0, noise, t))
    one = x_0[:1]
    t = torch.tensor([0, 500, 999])
    torch.testing.assert_close(getattr(ours, method)(one, noise, t), getattr(theirs, method)(one, noise, t))
    torch.testing.assert_close(getattr(ours, method)(one, noise[:1], t), getattr(theirs, method)(one, noise[:1], t))
    wide = getattr(ours, method)(x_0.half(), noise, t)
    assert wide.dtype == getattr(theirs, method)(x_0.half(), noise, t).dtype == torch.float32


# --------------------------------------------------------------------------------------------- where diffusers is not right


@pytest.mark.parametrize("variance", ["fixed_large_log", "learned"])
def test_variances_that_are_not_a_number_in_diffusers(variance: str) -> None:
    """It takes the square root of a logarithm."""
    x_t, m = normals(2, *SHAPE)
    log_variance = torch.full_like(m, math.log(0.01))
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    output = torch.cat([m, log_variance], dim=1) if variance == "learned" else m
    theirs = diffusers.DDPMScheduler(variance_type=variance).step(output, 500, x_t)
    assert theirs.prev_sample.isnan().all()
    got = DDPMScheduler(variance_type=variance).step(output, 500, x_t, torch.Generator().manual_seed(0)).prev_sample
    plain = DDPMScheduler().step(m, 500, x_t, torch.Generator().manual_seed(0)).prev_sample
    std = 0.1 if variance == "learned" else float(DDPMScheduler().schedule.betas[500].sqrt())
    small = float(DDPMScheduler().schedule.posterior_variance[500].sqrt())
    torch.testing.assert_close(got, plain + (std - small) * noise, rtol=0, atol=1e-6)


def test_a_timestep_between_those_of_a_chain_goes_to_the_next_of_them() -> None:
    """A timestep on a GPU is not read, so it may be any."""
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(timesteps=[999, 500, 10])
    steps, abar = scheduler._steps(), scheduler.schedule.alpha_bars
    for t, next_one in ((600, 500), (501, 500), (400, 10), (11, 10)):
        assert steps.plan.alpha_bars_prev[steps.rows[t]] == abar[next_one]
    assert steps.plan.alpha_bars_prev[steps.rows[5]] == 1


def test_trailing_timesteps_end_above_minus_one() -> None:
    """For some counts diffusers' list has one more, -1, at which it takes the last abar for the first."""
    theirs, ours = (
        kind(num_train_timesteps=100, timestep_spacing="trailing") for kind in (diffusers.DDPMScheduler, DDPMScheduler)
    )
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(29)
    assert theirs.timesteps.tolist() == [*ours.timesteps.tolist(), -1]


@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_the_last_step_has_no_noise_wherever_it_starts(variance: str) -> None:
    """Ho et al. 2020, Algorithm 2. diffusers leaves it out at t = 0 only: "trailing" ends elsewhere, and so may a list."""
    x_t, m = normals(2, *SHAPE)
    output = torch.cat([m, torch.ones_like(m)], dim=1) if variance == "learned_range" else m
    ours, theirs = (
        kind(timestep_spacing="trailing", variance_type=variance) for kind in (DDPMScheduler, diffusers.DDPMScheduler)
    )
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
    got, noisy = (s.step(output, 99, x_t, g) for s, g in zip((ours, theirs), generators, strict=True))
    torch.testing.assert_close(got.prev_sample, got.pred_original_sample, rtol=0, atol=1e-6)
    assert float((noisy.prev_sample - noisy.pred_original_sample).std()) > 0.2
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_noise_at_small_timesteps_in_half_precision(dtype: torch.dtype) -> None:
    """Diffusers rounds abar to the dtype before it subtracts it from 1: at t = 0 it adds no noise at all."""
    noise, t = normals(*SHAPE).to(dtype), torch.tensor([0])
    expected = (math.sqrt(1e-4) * noise.double()).to(dtype)
    assert (diffusers.DDPMScheduler().add_noise(torch.zeros_like(noise), noise, t) == 0).all()
    torch.testing.assert_close(
        DDPMScheduler().add_noise(torch.zeros_like(noise), noise, t), expected, rtol=torch.finfo(dtype).eps, atol=0
    )
    v = DDPMScheduler().get_velocity(noise, torch.zeros_like(noise), t)
    torch.testing.assert_close(v, -expected, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("kind", THEIRS)
def test_adding_noise_leaves_the_scheduler_as_it_was(kind: Any) -> None:
    """Diffusers moves its table to the samples' device, where `step` then reads it number by number."""
    x_0 = torch.empty(SHAPE, device="meta")
    t = torch.tensor([5], device="meta")
    ours, theirs = kind(), THEIRS[kind]()
    for scheduler in (ours, theirs):
        scheduler.add_noise(x_0, x_0, t)
        scheduler.get_velocity(x_0, x_0, t)
    assert (ours.alphas_cumprod.device.type, theirs.alphas_cumprod.device.type) == ("cpu", "meta")


def test_zero_terminal_snr_with_epsilon_prediction() -> None:
    """The noise alone does not tell x_0: diffusers divides by 0, and clips what comes of it."""
    x_t, m = normals(2, *SHAPE)
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    theirs = diffusers.DDPMScheduler(**config, clip_sample=False)
    assert not theirs.step(m, 999, x_t).prev_sample.isfinite().any()
    for kind in THEIRS:
        with pytest.raises(ValueError, match=r"at timestep 999 \(abar = 0\) with prediction 'epsilon'"):
            kind(**config).set_timesteps(10)
        kind(**config, prediction_type="v_prediction").set_timesteps(10)
        kind(**{**config, "timestep_spacing": "leading"}).set_timesteps(10)  # which has no timestep 999
    scheduler = DDPMScheduler(**config)  # and to train with it is no mistake
    assert torch.equal(scheduler.add_noise(x_t, m, torch.tensor([999])), m)
    assert scheduler.step(m, 998, x_t).prev_sample.isfinite().all()
    with pytest.raises(ValueError, match=r"DDPMScheduler.step: expected prediction_type .* at timestep 999"):
        scheduler.step(m, 999, x_t)


# ---------------------------------------------------------------------------------------------------------------- errors


X = torch.zeros(SHAPE)


def _set(kind: Any = DDPMScheduler, steps: Any = 10, **config: Any) -> Any:
    scheduler = kind(**config)
    scheduler.set_timesteps(steps)
    return scheduler


def _seeded(seeds: Any) -> Any:
    scheduler = _set()
    scheduler.seeds = seeds
    return scheduler


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: DDPMScheduler(beta_schedule="exp"), "expected beta_schedule to be one of linear, .*, got 'exp'"),
    (lambda: DDPMScheduler(beta_end=2.0), "expected beta_end to be positive and at most 1, got 2.0"),
    (
        lambda: DDPMScheduler(trained_betas=[0.1, 0.0]),
        r"DDPMScheduler: expected trained_betas to be in \(0, 1\], got 0 at index 1",
    ),
    (lambda: DDPMScheduler(trained_betas=[]), r"expected trained_betas to be a floating tensor of shape \[T\] with values"),
    (lambda: DDPMScheduler(num_train_timesteps=0), "expected num_train_timesteps to be an integer in 1..100000, got 0"),
    (
        lambda: DDPMScheduler(prediction_type="eps"),
        "DDPMScheduler: expected prediction_type to be one of epsilon, .* got 'eps'",
    ),
    (
        lambda: DDIMScheduler(timestep_spacing="even"),
        "DDIMScheduler: expected timestep_spacing to be one of linspace, .*'even'",
    ),
    (
        lambda: DDPMScheduler(clip_sample_range=-1.0),
        "DDPMScheduler: expected clip_sample_range to be positive or None, got -1.0",
    ),
    (lambda: DDPMScheduler(thresholding=True, sample_max_value=0.0), "expected sample_max_value to be positive, got 0.0"),
    (
        lambda: DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=2.0),
        "dynamic_thresholding_ratio to be at least 0 and at most 1, got 2",
    ),
    (lambda: _set(steps=0), "DDPMScheduler.set_timesteps: expected num_inference_steps to be an integer in 1..1000, got 0"),
    (
        lambda: _set(DDIMScheduler, -3),
        "DDIMScheduler.set_timesteps: expected num_inference_steps to be an integer in 1..1000, got -3",
    ),
    (lambda: _set(steps=1001), "expected num_inference_steps to be an integer in 1..1000, got 1001"),
    (lambda: _set(steps=10.0), "expected num_inference_steps to be an integer in 1..1000, got 10.0"),
    (lambda: _set(steps=None), "expected exactly one of num_inference_steps and timesteps, got neither"),
    (lambda: _set(DDIMScheduler, None), "expected num_inference_steps to be an integer in 1..1000, got None"),
    (
        lambda: DDPMScheduler().set_timesteps(3, timesteps=[2, 1, 0]),
        "exactly one of num_inference_steps and timesteps, got both",
    ),
    (
        lambda: DDPMScheduler().set_timesteps(timesteps=[3, 3]),
        r"timesteps to be strictly descending timesteps in 0..999, got \[3, 3\]",
    ),
    (
        lambda: DDPMScheduler().set_timesteps(timesteps=[1000, 3]),
        r"timesteps to be strictly descending timesteps in 0..999, got \[1000, 3\]",
    ),
    (
        lambda: DDPMScheduler().set_timesteps(timesteps=[3, -1]),
        r"timesteps to be strictly descending timesteps in 0..999, got \[3, -1\]",
    ),
    (lambda: DDPMScheduler().set_timesteps(timesteps=[]), r"timesteps to be strictly descending timesteps in 0..999, got \[\]"),
    (
        lambda: DDPMScheduler().set_timesteps(timesteps=[2.5, 1]),
        r"timesteps to be strictly descending timesteps in 0..999, got \[2.5, 1.0\]",
    ),
    (
        lambda: _set(steps=1000, steps_offset=1),
        "DDPMScheduler.set_timesteps: expected timesteps with steps_offset in 0..999, got values from 1 to 1000",
    ),
    (
        lambda: _set(steps=1, trained_betas=[0.1, 0.3]),
        "expected num_train_timesteps to be 2, .* got 1000",
    ),
    (lambda: DDPMScheduler(trained_betas=[0.1, 0.3]).step(X, 0, X), "expected num_train_timesteps to be 2, .* got 1000"),
    (lambda: DDIMScheduler().step(X, 0, X), "DDIMScheduler: expected set_timesteps to have been called"),
    (lambda: DDIMScheduler().sampling_plan(), "DDIMScheduler: expected set_timesteps to have been called"),
    (
        lambda: _set().step(X, 899, X),
        r"DDPMScheduler.step: expected timestep to be one of the scheduler's timesteps, got \[899\]",
    ),
    (lambda: DDPMScheduler().step(X, 1000, X), "DDPMScheduler.step: expected timestep to be in 0..999, got 1000"),
    (lambda: _set(DDIMScheduler).step(X, -1, X), "DDIMScheduler.step: expected timestep to be in 0..999, got -1"),
    (lambda: _set().step(None, 900, X), "DDPMScheduler.step: expected model_output to be a tensor, got NoneType"),
    (lambda: _set().step(X, 900, X.int()), "DDPMScheduler.step: expected sample to be float32, .*, got torch.int32"),
    (lambda: _set().step(X, 900.0, X), "expected timestep to be an int or an int64 tensor, got float"),
    (lambda: _set().step(X, torch.tensor(900.0), X), "expected timestep to be an int or an int64 tensor, got torch.float32"),
    (lambda: _set().step(X, torch.tensor([900, 0]), X), "expected timestep to have 1 element or 3, got 2"),
    (lambda: _set().step(X[:, :2], 900, X), r"expected model_output to have shape \[3, 3, 6, 6\], got \[3, 2, 6, 6\]"),
    (
        lambda: _set(variance_type="learned_range").step(X, 900, X),
        r"model_output to have shape \[3, 6, 6, 6\] \(twice the channels",
    ),
    (lambda: _set(DDIMScheduler).step(X, 900, X, eta=-0.1), "expected eta to be at least 0 and finite, got -0.1"),
    (lambda: _set(DDIMScheduler).step(X, 900, X, eta=9.0), r"expected eta to be at most \d.* got 9.0"),
    (
        lambda: _set(DDIMScheduler).step(X, 900, X, eta=1.0, generator=torch.Generator(), variance_noise=X),
        "DDIMScheduler.step: expected at most one of generator and variance_noise, got both",
    ),
    (lambda: _seeded(3).step(X, 900, X), r"expected seeds to be an int64 tensor \(see sample_seeds\), got int"),
    (lambda: _seeded(torch.zeros(2, dtype=torch.int64)).step(X, 900, X), r"expected seeds to .*\[3\]"),
    (
        lambda: _set(thresholding=True).sampling_plan(),
        "DDPMScheduler.sampling_plan: expected thresholding to be false, got true",
    ),
    (
        lambda: DDPMScheduler().add_noise(X, X, torch.tensor([1000])),
        "q_sample: expected t in 0..999, got values from 1000 to 1000",
    ),
    (lambda: DDPMScheduler().add_noise(X, X, torch.tensor([-1])), "q_sample: expected t in 0..999, got values from -1 to -1"),
    (
        lambda: DDPMScheduler().add_noise(X, X, torch.tensor([0.5])),
        "expected timesteps to be an int or an int64 tensor, got torch.float32",
    ),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_errors(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_an_unknown_variance_is_taken_for_fixed_small_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Diffusers does the same, and its tests ask for it."""
    assert DDPMScheduler(variance_type="other").sampling_plan().variance == "fixed"
    assert "expected variance_type to be one of fixed_small, " in caplog.text


@pytest.mark.parametrize("kind", THEIRS)
def test_another_alphas_cumprod_is_no_silent_mistake(kind: type[Any]) -> None:
    """Scripts put it on a device, and some assign one of another schedule, which diffusers' steps then follow."""
    scheduler = kind()
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(dtype)
        assert scheduler.alphas_cumprod.dtype == dtype
    # The largest change that a float32 table may hide is its rounding, which is 4e-7 of abar_0.
    levels = scheduler.alphas_cumprod.float()
    other = kind(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    for given in (other, other[:10], 0.995 * levels, (1 - 1e-6) * levels, levels.where(levels < 0.9999, 0.9998)):
        with pytest.raises(ValueError, match=f"{kind.__name__}: expected alphas_cumprod to be that of the configuration"):
            scheduler.alphas_cumprod = given
    with pytest.raises(ValueError, match=f"{kind.__name__}: expected alphas_cumprod to be that of the configuration"):
        scheduler.alphas_cumprod *= 0.995
    fresh = kind()
    fresh.alphas_cumprod.mul_(0.995)  # no assignment sees it, so the next chain does
    with pytest.raises(ValueError, match=f"{kind.__name__}: expected alphas_cumprod to be that of the configuration"):
        fresh.set_timesteps(10)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("kind", ["DDPM", "DDIM", "DDIMInverse", "DPMSolverMultistep"])
def test_the_alphas_cumprod_of_diffusers_is_that_of_the_configuration(kind: str, schedule: str, zero_snr: bool) -> None:
    """Levels may have any dtype, come from float32 or float64, and have the solver's 2^-24 in the place of 0."""
    config = {"beta_schedule": schedule, "rescale_betas_zero_snr": zero_snr}
    theirs, ours = (getattr(module, f"{kind}Scheduler")(**config) for module in (diffusers, integration))
    for levels in (theirs.alphas_cumprod, ours.schedule.alpha_bars, (1 - theirs.betas).cumprod(0)):
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            ours.alphas_cumprod = levels.to(dtype)
    assert (float(theirs.alphas_cumprod[-1]) == 2**-24) == (zero_snr and kind == "DPMSolverMultistep")
