"""DDPMScheduler and DDIMScheduler in place of diffusers' own: the same results where diffusers is right, and what it is not.

What all four schedulers share is here, too.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawing import Gaussian
from parameters import parametrize
from pipelines import assert_same, diffusers, generator, images, make, make_unet
from scheduler_pairs import EPS, KINDS, LISTED, NOISY, SHAPE, THEIRS, assert_same_image, made, normals, pair
from torch import Tensor

import ddpm_fast
from ddpm_fast import NoiseSchedule, freeze, load_folder, plan_of, reverse_step, sample_seeds
from ddpm_fast.integrations.diffusers import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from ddpm_fast.reference import STREAM_X_T

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # NumPy's, of diffusers' other schedulers

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SDE = {"algorithm_type": "sde-dpmsolver++"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def test_without_diffusers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, DDPMScheduler.__module__)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    message = r"diffusers is missing: install it with pip install 'ddpm_fast\[diffusers\]'"
    with pytest.raises(ModuleNotFoundError, match=message) as raised:
        importlib.import_module(DDPMScheduler.__module__)
    assert raised.value.name == "diffusers"


@pytest.mark.filterwarnings("ignore")  # deprecated schedulers warn
def test_a_saved_scheduler_of_diffusers_has_its_own_levels_or_is_refused(tmp_path: Path) -> None:
    read, refused = set(), {}
    for name in (name for name in dir(diffusers) if name.endswith("Scheduler")):
        try:
            scheduler = getattr(diffusers, name)()
            scheduler.save_pretrained(tmp_path)
        except (TypeError, ImportError, AttributeError):  # it has no defaults, needs another package, or cannot be saved
            continue
        try:
            schedule = NoiseSchedule.from_pretrained(tmp_path)
        except ValueError as error:
            refused[name] = str(error)
            continue
        torch.testing.assert_close(schedule.alpha_bars.float(), scheduler.alphas_cumprod, rtol=0, atol=1e-6)
        read.add(name)
    assert len(read) >= 20
    assert {"FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "CogVideoXDDIMScheduler"} <= refused.keys()
    assert all(
        f"_class_name to be a scheduler of diffusers that has the noise levels of DDPM, such as DDPMScheduler, got '{name}'"
        in said
        for name, said in refused.items()
    )


def test_flow_sigmas_and_files_that_name_no_scheduler_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "scheduler_config.json"
    diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="epsilon").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use_flow_sigmas to be false"):
        NoiseSchedule.from_pretrained(tmp_path)
    file.write_text(json.dumps({"beta_schedule": "linear"}))
    with pytest.raises(ValueError, match=r"_class_name to be a scheduler of diffusers .* got None"):
        NoiseSchedule.from_pretrained(tmp_path)
    own = NoiseSchedule.cosine(50)
    file.write_text(json.dumps({"_ddpm_fast": own.to_config()}))
    assert NoiseSchedule.from_pretrained(tmp_path) == own
    file.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "_ddpm_fast": own.to_config()}))
    with pytest.raises(ValueError, match="got 'FlowMatchEulerDiscreteScheduler'"):
        NoiseSchedule.from_pretrained(tmp_path)


GRID: list[tuple[type, dict[str, Any], dict[str, Any]]] = [
    *(
        (DDPMScheduler, {"beta_schedule": s}, {})
        for s in ("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid")
    ),
    *((DDPMScheduler, {"timestep_spacing": s}, {}) for s in ("linspace", "trailing")),
    *((DDPMScheduler, {"prediction_type": p, "clip_sample": c}, {}) for p in ("sample", "v_prediction") for c in (True, False)),
    *((DDPMScheduler, {"variance_type": v}, {}) for v in ("fixed_small_log", "fixed_large", "learned_range", "other")),
    *((DDPMScheduler, {"variance_type": v, "clip_sample": False}, {}) for v in ("fixed_large", "learned_range")),
    (DDPMScheduler, {"clip_sample_range": 0.5}, {}),
    (DDPMScheduler, {"clip_sample": False}, {}),
    *((DDPMScheduler, {"thresholding": True, "sample_max_value": v}, {}) for v in (1.0, 1.5)),
    (DDPMScheduler, {"thresholding": True, "variance_type": "learned_range", "sample_max_value": 2.0}, {}),
    (DDPMScheduler, ZERO_SNR | {"prediction_type": "v_prediction"}, {}),
    (DDPMScheduler, {"trained_betas": [0.01, 0.02, 0.05, 0.1, 0.2] * 8, "num_train_timesteps": 40}, {}),
    *((DDIMScheduler, {"prediction_type": p}, {"eta": e}) for p in ("epsilon", "sample", "v_prediction") for e in (0.0, 1.0)),
    *(
        (DDIMScheduler, {"prediction_type": p}, {"eta": e, "use_clipped_model_output": True})
        for p in ("epsilon", "sample", "v_prediction")
        for e in (0.0, 0.5, 1.0)
    ),
    (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "beta_schedule": "scaled_linear"}, {}),
    (DDIMScheduler, {"set_alpha_to_one": False}, {"eta": 1.0}),
    (DDIMScheduler, {"timestep_spacing": "trailing", "clip_sample_range": 2.0}, {"eta": 1.0}),
    *((DDIMScheduler, {"thresholding": True, "sample_max_value": 1.5}, {"use_clipped_model_output": u}) for u in (True, False)),
    (DDIMScheduler, ZERO_SNR | {"prediction_type": "v_prediction"}, {}),
]

CASES = [
    *((*case, steps) for case, steps in product(GRID, (125, 20))),
    *(
        (DDPMScheduler, config, {}, LISTED)
        for config in ({}, {"variance_type": "learned_range", "timestep_spacing": "trailing"}, {"clip_sample": False})
    ),
]


@pytest.mark.parametrize(("kind", "config", "options", "steps"), CASES, ids=str)
def test_the_same_seed_gives_the_same_image(
    kind: type, config: dict[str, Any], options: dict[str, Any], steps: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 40 if steps == 125 and "trained_betas" in config else steps
    assert_same_image(*pair(kind, steps, **config), monkeypatch, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", NOISY)
def test_half_precision_is_rounded_once_a_step(kind: Any, dtype: torch.dtype) -> None:
    """The float32 step of the same noise, rounded; diffusers rounds after every operation."""
    ours, theirs = pair(kind, 50)
    plan, (x_t, m) = ours.sampling_plan(**NOISY[kind]), normals(2, *SHAPE, dtype=dtype)
    noise = torch.randn(SHAPE, generator=generator(), dtype=dtype)
    errors = {ours: 0.0, theirs: 0.0}
    for row in range(0, 50, 7):
        exact = reverse_step(x_t.double(), m.double(), row, plan, noise=noise.double())
        for scheduler in errors:
            got = scheduler.step(m, plan.timesteps[row], x_t, generator=generator(), **NOISY[kind]).prev_sample
            assert got.dtype == dtype
            errors[scheduler] = max(errors[scheduler], float(((got - exact) / exact.abs().clamp(min=0.1)).abs().max()))
    assert errors[ours] <= torch.finfo(dtype).eps < errors[theirs]


# ------------------------------------------------------------------------------------------- configuration, files, classes


SETTINGS: dict[type, dict[str, Any]] = {
    DDPMScheduler: {"num_train_timesteps": 50, "beta_schedule": "scaled_linear", "steps_offset": 1},
    DDIMScheduler: {"num_train_timesteps": 50, "beta_schedule": "scaled_linear", "steps_offset": 1},
    DPMSolverMultistepScheduler: {"beta_schedule": "scaled_linear", "use_karras_sigmas": True, **SDE, "steps_offset": 1},
    DDIMInverseScheduler: {"beta_schedule": "scaled_linear", "set_alpha_to_one": False, "steps_offset": 1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_configurations_and_files(kind: Any, tmp_path: Path) -> None:
    """They are the same as diffusers', in both directions."""
    ours, theirs = pair(kind, **SETTINGS[kind])
    assert isinstance(ours, THEIRS[kind])
    assert ours.to_json_string() == theirs.to_json_string()
    for scheduler in (ours, theirs):
        scheduler.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "scheduler_config.json").read_text(encoding="utf-8"))
        assert saved["_class_name"] == kind.__name__
        for other in (kind, THEIRS[kind]):
            for loaded in (other.from_pretrained(tmp_path), other.from_config(scheduler.config)):
                assert json.loads(loaded.to_json_string()) == saved
                loaded.set_timesteps(7)


@pytest.mark.parametrize("kind", KINDS)
def test_configurations_go_to_every_compatible_scheduler_and_back(kind: Any) -> None:
    ours = kind(beta_end=0.03, prediction_type="v_prediction")
    for other in {*THEIRS[kind]._compatibles, "DDPMScheduler", "DDIMScheduler"}:
        try:
            there = getattr(diffusers, other).from_config(ours.config)
        except ImportError:  # DPMSolverSDEScheduler needs another package
            continue
        back = kind.from_config(there.config)
        assert (back.config.beta_end, back.config.prediction_type) == (0.03, "v_prediction")
        back.set_timesteps(5)


@pytest.mark.parametrize("kind", KINDS)
def test_signatures_and_attributes_are_those_of_diffusers(kind: Any) -> None:
    """Names, order and defaults of the constructor and of every public method; `sampling_plan` is ours."""
    theirs = THEIRS[kind]
    methods = ("add_noise", "get_velocity", "scale_model_input", "set_begin_index", "convert_model_output", "__len__")
    for name in ("__init__", "set_timesteps", "step", *(method for method in methods if hasattr(theirs, method))):
        parameters = [inspect.signature(getattr(each, name)).parameters.values() for each in (kind, theirs)]
        assert [(p.name, p.default) for p in parameters[0]] == [(p.name, p.default) for p in parameters[1]]
    assert set(vars(theirs())) - {"timesteps", "alphas_cumprod"} <= set(vars(kind()))  # properties of some
    for name in ("betas", "alphas", "alphas_cumprod", "timesteps", "init_noise_sigma", "num_inference_steps"):
        torch.testing.assert_close(getattr(kind(), name), getattr(theirs(), name), rtol=1e-6, atol=0)


def test_a_configuration_that_changes_changes_the_steps() -> None:
    scheduler = DDPMScheduler()
    x_t, m = normals(2, *SHAPE)
    scheduler.step(m, 500, x_t)
    scheduler.register_to_config(prediction_type="sample", clip_sample=False)
    assert torch.equal(scheduler.step(m, 500, x_t).pred_original_sample, m)


def test_timesteps_may_be_assigned() -> None:
    scheduler, listed = made(DDPMScheduler, 10), made(DDPMScheduler, [500, 300, 20])
    scheduler.timesteps = torch.tensor([500, 300, 20])
    assert torch.equal(scheduler.sampling_plan().coefficients, listed.sampling_plan().coefficients)
    assert scheduler.previous_timestep(300) == 20


def test_every_step_may_have_an_eta_of_its_own() -> None:
    schedulers, (x_t, m) = pair(DDIMScheduler, 10), normals(2, *SHAPE)
    for eta in (0.0, 0.1, 0.9):
        results = [each.step(m, 500, x_t, eta=eta, generator=generator()).prev_sample for each in schedulers]
        torch.testing.assert_close(*results, rtol=0, atol=1e-4)
    schedulers[0].set_timesteps(20)
    assert schedulers[0].sampling_plan(eta=0.9).num_steps == 20


@pytest.mark.parametrize(
    ("kind", "config"), [(DDPMScheduler, {}), (DPMSolverMultistepScheduler, {**SDE, "prediction_type": "v_prediction"})]
)
def test_a_pipeline_of_diffusers_takes_them_and_saves_them(kind: Any, config: dict[str, Any], tmp_path: Path) -> None:
    pipe = make()
    ours, pipe.scheduler = pair(kind, **config)
    expected = images(pipe)
    pipe.scheduler = ours
    drawn = images(pipe)
    assert_same(drawn, expected)
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.scheduler, kind)
    assert torch.equal(images(loaded), drawn)


# ------------------------------------------------------------------------------------------------------------- timesteps


@pytest.mark.parametrize("kind", NOISY)
def test_a_timestep_for_each_sample(kind: Any) -> None:
    scheduler = made(kind, 10, num_train_timesteps=100)
    plan, (x_t, m) = scheduler.sampling_plan(**NOISY[kind]), normals(2, *SHAPE)
    timesteps, seeds = torch.tensor([90, 10, 0]), sample_seeds(0, 3)
    drawn = torch.randn(SHAPE, generator=generator(3))
    by_generator = scheduler.step(m, timesteps, x_t, generator=generator(3), **NOISY[kind]).prev_sample
    scheduler.seeds = seeds
    by_seeds = scheduler.step(m, timesteps, x_t, **NOISY[kind]).prev_sample
    for i, t in enumerate(timesteps.tolist()):
        row, own = plan.timesteps.tolist().index(t), slice(i, i + 1)
        for got, noise in ((by_generator, {"noise": drawn[own]}), (by_seeds, {"seeds": seeds[own]})):
            assert torch.equal(got[own], reverse_step(x_t[own], m[own], row, plan, **noise))


@pytest.mark.parametrize("make", [int, torch.tensor, lambda t: torch.tensor([t], dtype=torch.int32), np.int64])
@pytest.mark.parametrize("kind", NOISY)
def test_every_form_of_a_timestep(kind: Any, make: Callable[[int], Any]) -> None:
    scheduler, (x_t, m) = made(kind, 10), normals(2, *SHAPE)
    assert torch.equal(*(scheduler.step(m, t, x_t, generator=generator()).prev_sample for t in (make(300), 300)))


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        *product(NOISY, ({}, {"thresholding": True})),
        *product([DPMSolverMultistepScheduler], ({}, {"thresholding": True}, SDE, {"variance_type": "learned"})),
        (DDIMInverseScheduler, {}),
    ],
)
def test_a_timestep_on_a_device_is_not_read_by_the_host(kind: Any, config: dict[str, Any]) -> None:
    """Tensors on "meta" have shapes and no values: what would wait for a GPU's fails.

    Diffusers moves its table to the samples' device, where `step` then reads it number by number.
    """
    scheduler = kind(**config)
    scheduler.set_timesteps(10, device="meta")
    x_t, timesteps = torch.empty(SHAPE, device="meta"), scheduler.timesteps
    assert timesteps.device.type == "meta"
    given = [timesteps[0], timesteps[:3], timesteps[:1].int()]
    for method in (scheduler.add_noise, scheduler.get_velocity):
        assert method(x_t, x_t, timesteps[:3]).shape == SHAPE
    assert scheduler.alphas_cumprod.device.type == "cpu"
    if kind is DPMSolverMultistepScheduler:
        scheduler.set_begin_index(0)  # without it the first step of a chain is looked up
        given = list(timesteps)
    for t in given:
        out = scheduler.step(x_t, t, x_t, return_dict=False, **NOISY.get(kind, {}))
        assert {x.shape for x in out} == {SHAPE}


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        *product([*NOISY, DDIMInverseScheduler], [{}]),
        *(
            pytest.param(
                kind,
                {"thresholding": True},
                marks=pytest.mark.skipif(
                    torch.__version__ < "2.10", reason="torch 2.9 compiles no torch.quantile in one graph"
                ),
            )
            for kind in NOISY
        ),
    ],
)
def test_compiled_in_one_graph(kind: Any, config: dict[str, Any]) -> None:
    """And not again for another timestep, or another number of steps."""
    scheduler, (x_t, m) = made(kind, 10, num_train_timesteps=100, **config), normals(2, *SHAPE)
    scheduler.seeds = sample_seeds(0, len(x_t))

    def step(m: Tensor, t: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor]:
        stepped: tuple[Tensor, Tensor] = scheduler.step(m, t, x_t, return_dict=False, **NOISY.get(kind, {}))
        return stepped

    step(m, scheduler.timesteps[0], x_t)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for steps in (10, 10, 20):
            scheduler.set_timesteps(steps)
            for t in scheduler.timesteps:
                assert all(map(torch.equal, compiled(m, t, x_t), step(m, int(t), x_t)))
    scheduler.seeds = None
    assert compiled(m, scheduler.timesteps[0], x_t)[0].shape == SHAPE


def test_the_first_step_of_an_eta_is_not_compiled() -> None:
    scheduler, (x_t, m) = made(DDIMScheduler, 10), normals(2, *SHAPE)
    compiled = torch.compile(lambda: scheduler.step(m, torch.tensor(0), x_t, eta=0.3), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="expected a first step outside"):
        compiled()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", NOISY)
def test_on_a_gpu_nothing_waits_and_one_graph_serves_every_step(kind: Any) -> None:
    scheduler, (x_t, m) = kind(num_train_timesteps=100), normals(2, *SHAPE).cuda()
    scheduler.set_timesteps(10, device="cuda")
    scheduler.seeds = sample_seeds(0, len(x_t))

    def step(t: Tensor) -> Tensor:
        x_prev: Tensor = scheduler.step(m, t, x_t, **NOISY[kind]).prev_sample
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


@pytest.mark.parametrize("steps", [1, 7, 30, 50, 600])
@pytest.mark.parametrize("config", [{}, {"clip_sample": False}, {"prediction_type": "v_prediction"}], ids=str)
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_ddim_arrives_where_that_of_diffusers_does(
    spacing: str, eta: float, config: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It steps to t - T // S, which may be between two timesteps of these spacings, and above x_0 at last."""
    ours, theirs = pair(DDIMScheduler, steps, timestep_spacing=spacing, **config)
    abar = torch.cat([ours.schedule.alpha_bars, torch.ones(1, dtype=torch.float64)])
    assert torch.equal(ours.sampling_plan(eta).alpha_bars_prev, abar[(theirs.timesteps - 1000 // steps).clamp(min=-1)])
    assert_same_image(ours, theirs, monkeypatch, eta=eta)


def test_ddim_goes_on_from_the_middle_of_a_chain_as_diffusers_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Image to image may assign the timesteps that are left."""
    schedulers = pair(DDIMScheduler, 7, timestep_spacing="linspace")
    for scheduler in schedulers:
        scheduler.timesteps = scheduler.timesteps[3:]
    assert_same_image(*schedulers, monkeypatch)


def test_ddim_without_set_timesteps_goes_to_the_next_timestep_that_is_listed() -> None:
    """Diffusers has no such steps."""
    scheduler = _given(DDIMScheduler(), timesteps=torch.tensor([500, 300, 20]))
    listed = ddpm_fast.ddim_plan(scheduler.schedule, None, spacing=[500, 300, 20], use_clipped_model_output=False)
    assert torch.equal(scheduler.sampling_plan().coefficients, listed.coefficients)


# ----------------------------------------------------------------------------------------------------------------- seeds


@pytest.mark.parametrize(
    ("kind", "config", "options"),
    [
        (DDPMScheduler, {}, {}),
        (DDIMScheduler, {}, {}),
        (DDIMScheduler, {}, {"eta": 1.0}),
        (DDIMScheduler, {}, {"eta": 0.5, "use_clipped_model_output": True}),
        (DPMSolverMultistepScheduler, SDE, {}),
    ],
    ids=str,
)
def test_with_seeds_a_loop_is_what_sample_draws(kind: Any, config: dict[str, Any], options: dict[str, Any]) -> None:
    """And sample 2 is the same in a batch and alone."""
    scheduler, seeds = made(kind, 10, num_train_timesteps=50, **config), sample_seeds(0, 4)
    network = Gaussian(scheduler.schedule, mean=0.9, std=0.5)
    plan = scheduler.sampling_plan(**options)
    expected = ddpm_fast.sample(network, plan, 4, seed=0, shape=(3, 4, 4), progress=False)
    for part in (slice(None), slice(2, 3)):
        scheduler.set_timesteps(10)
        scheduler.seeds = seeds[part]
        x = ddpm_fast.noise((len(seeds[part]), 3, 4, 4), seeds[part], stream=STREAM_X_T)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x, **options).prev_sample
        assert torch.equal(x, expected[part])


def test_seeds_leave_the_generator_alone() -> None:
    scheduler, draws, (x_t, m) = DDPMScheduler(), generator(), normals(2, *SHAPE)
    scheduler.seeds = sample_seeds(0, 3)
    scheduler.step(m, 500, x_t, draws)
    assert torch.equal(draws.get_state(), generator().get_state())
    assert "seeds" not in scheduler.config


# ----------------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("x", FLOATS)
@pytest.mark.parametrize("m", FLOATS)
def test_dtypes_meet_as_in_diffusers(kind: Any, x: torch.dtype, m: torch.dtype) -> None:
    results = []
    for scheduler in pair(kind, 10):
        torch.manual_seed(0)
        args = normals(*SHAPE, dtype=m), scheduler.timesteps[5], normals(*SHAPE, seed=1, dtype=x)
        results.append(scheduler.step(*args, **NOISY.get(kind, {})).prev_sample)
    assert results[0].dtype == results[1].dtype == torch.promote_types(x, m)
    torch.testing.assert_close(*results, rtol=0, atol=16 * max(torch.finfo(m).eps, torch.finfo(x).eps, EPS))


@pytest.mark.parametrize("kind", NOISY)
def test_gradients_flow(kind: Any) -> None:
    """Also where the tables were made in inference mode."""
    with torch.inference_mode():
        scheduler = made(kind, 10, clip_sample=False)
    x_t, m = (x.requires_grad_() for x in normals(2, *SHAPE))
    out = scheduler.step(m, 300, x_t)
    (out.prev_sample.sum() + out.pred_original_sample.sum()).backward()
    plan = scheduler.sampling_plan()
    p, q, _, k1, k2 = plan.coefficients[plan.timesteps.tolist().index(300), :5].tolist()
    torch.testing.assert_close([x_t.grad, m.grad], [torch.full(SHAPE, p + k1), torch.full(SHAPE, q + k2)])


# -------------------------------------------------------------------------------------------------------- forward process


@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
def test_forward_process_equals_diffusers(method: str) -> None:
    ours, theirs = (getattr(each, method) for each in pair(DDPMScheduler))
    x_0, noise = normals(2, *SHAPE)
    t = torch.tensor([0, 500, 999])
    for arguments in (
        *((x_0, noise, each) for each in (t, torch.tensor([7]), torch.tensor(7), t.int())),
        *((x_0[:1], noise, t), (x_0[:1], noise[:1], t)),
    ):
        torch.testing.assert_close(ours(*arguments), theirs(*arguments))
    assert ours(x_0.half(), noise, t).dtype == theirs(x_0.half(), noise, t).dtype == torch.float32


# --------------------------------------------------------------------------------------------- where diffusers is not right


def test_a_variance_that_is_not_a_number_in_diffusers() -> None:
    """It takes the square root of a logarithm."""
    x_t, m = normals(2, *SHAPE)
    ours, theirs = pair(DDPMScheduler, variance_type="fixed_large_log")
    assert theirs.step(m, 500, x_t).prev_sample.isnan().all()
    got = ours.step(m, 500, x_t, generator()).prev_sample
    plain = DDPMScheduler().step(m, 500, x_t, generator()).prev_sample
    more = float(ours.schedule.betas[500].sqrt()) - float(ours.schedule.posterior_variance[500].sqrt())
    torch.testing.assert_close(got, plain + more * normals(*SHAPE), rtol=0, atol=1e-6)


def test_a_learned_variance_is_refused(tmp_path: Path) -> None:
    """Diffusers takes its square root, so negative ones give NaN. Here "learned" are logarithms."""
    pipe = make(unet=make_unet(out_channels=4), variance_type="learned")
    wanted = "expected variance_type to be 'learned_range' or fixed, got 'learned'"
    with pytest.raises(ValueError, match=wanted):
        freeze(pipe)
    with pytest.raises(ValueError, match=wanted):
        plan_of(pipe.scheduler)
    pipe.scheduler.save_pretrained(tmp_path)
    pipe.unet.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"variance_type to be learned_range or fixed, .* got learned"):
        load_folder(tmp_path)
    file = tmp_path / "scheduler_config.json"  # a file of this package that diffusers has saved again
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_ddpm_fast": NoiseSchedule.linear().to_config()}))
    assert load_folder(tmp_path).objective.variance == "learned"


def test_a_timestep_between_those_of_a_chain_goes_to_the_next_of_them() -> None:
    """A timestep on a GPU is not read, so it may be any."""
    scheduler = made(DDPMScheduler, [999, 500, 10])
    steps, abar = scheduler._steps(), scheduler.schedule.alpha_bars
    arrivals = steps.plan.alpha_bars_prev[[steps.rows[t] for t in (600, 501, 400, 11, 5)]]
    assert arrivals.tolist() == [*abar[[500, 500, 10, 10]].tolist(), 1]


def test_trailing_timesteps_end_above_minus_one() -> None:
    """For some counts diffusers' list has one more, -1, at which it takes the last abar for the first."""
    ours, theirs = pair(DDPMScheduler, 29, num_train_timesteps=100, timestep_spacing="trailing")
    assert theirs.timesteps.tolist() == [*ours.timesteps.tolist(), -1]


@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_the_last_step_has_no_noise_wherever_it_starts(variance: str) -> None:
    """Ho et al. 2020, Algorithm 2. diffusers leaves it out at t = 0 only: "trailing" ends elsewhere, and so may a list."""
    x_t, m = normals(2, *SHAPE)
    output = torch.cat([m, torch.ones_like(m)], dim=1) if variance == "learned_range" else m
    generators = generator(), generator()
    schedulers = pair(DDPMScheduler, 10, timestep_spacing="trailing", variance_type=variance)
    got, noisy = (s.step(output, 99, x_t, g) for s, g in zip(schedulers, generators, strict=True))
    torch.testing.assert_close(got.prev_sample, got.pred_original_sample, rtol=0, atol=1e-6)
    assert float((noisy.prev_sample - noisy.pred_original_sample).std()) > 0.2
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_noise_at_small_timesteps_in_half_precision(dtype: torch.dtype) -> None:
    """Diffusers rounds abar to the dtype before it subtracts it from 1: at t = 0 it adds no noise at all."""
    noise, t = normals(*SHAPE).to(dtype), torch.tensor([0])
    (ours, theirs), zero, rtol = pair(DDPMScheduler), torch.zeros_like(noise), torch.finfo(dtype).eps
    expected = (math.sqrt(1e-4) * noise.double()).to(dtype)
    assert (theirs.add_noise(zero, noise, t) == 0).all()
    torch.testing.assert_close(ours.add_noise(zero, noise, t), expected, rtol=rtol, atol=0)
    torch.testing.assert_close(ours.get_velocity(noise, zero, t), -expected, rtol=rtol, atol=0)


def test_zero_terminal_snr_with_epsilon_prediction() -> None:
    """The noise alone does not tell x_0: diffusers divides by 0, and clips what comes of it."""
    x_t, m = normals(2, *SHAPE)
    theirs = diffusers.DDPMScheduler(**ZERO_SNR, clip_sample=False)
    assert not theirs.step(m, 999, x_t).prev_sample.isfinite().any()
    for kind, config in product(NOISY, ({"prediction_type": "v_prediction"}, {"timestep_spacing": "leading"})):
        made(kind, 10, **ZERO_SNR | config)  # "leading" has no timestep 999
    scheduler = DDPMScheduler(**ZERO_SNR)  # and to train with it is no mistake
    assert torch.equal(scheduler.add_noise(x_t, m, torch.tensor([999])), m)
    assert scheduler.step(m, 998, x_t).prev_sample.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------- errors


X = torch.zeros(SHAPE)


def _given(scheduler: Any, **attributes: Any) -> Any:
    for name, value in attributes.items():
        setattr(scheduler, name, value)
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
    (
        lambda: made(DDPMScheduler, 0),
        "DDPMScheduler.set_timesteps: expected num_inference_steps to be an integer in 1..1000, got 0",
    ),
    (
        lambda: made(DDIMScheduler, -3),
        "DDIMScheduler.set_timesteps: expected num_inference_steps to be an integer in 1..1000, got -3",
    ),
    (lambda: made(DDPMScheduler, 1001), "expected num_inference_steps to be an integer in 1..1000, got 1001"),
    (lambda: made(DDPMScheduler, 10.0), "expected num_inference_steps to be an integer in 1..1000, got 10.0"),
    (lambda: DDPMScheduler().set_timesteps(), "expected exactly one of num_inference_steps and timesteps, got neither"),
    (lambda: DDIMScheduler().set_timesteps(None), "expected num_inference_steps to be an integer in 1..1000, got None"),
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
        lambda: made(DDPMScheduler, 1000, steps_offset=1),
        "DDPMScheduler.set_timesteps: expected timesteps with steps_offset in 0..999, got values from 1 to 1000",
    ),
    (
        lambda: made(DDPMScheduler, 1, trained_betas=[0.1, 0.3]),
        "expected num_train_timesteps to be 2, .* got 1000",
    ),
    (lambda: DDPMScheduler(trained_betas=[0.1, 0.3]).step(X, 0, X), "expected num_train_timesteps to be 2, .* got 1000"),
    (lambda: DDIMScheduler().step(X, 0, X), "DDIMScheduler: expected set_timesteps to have been called"),
    (lambda: DDIMScheduler().sampling_plan(), "DDIMScheduler: expected set_timesteps to have been called"),
    (
        lambda: made(DDPMScheduler, 10).step(X, 899, X),
        r"DDPMScheduler.step: expected timestep to be one of the scheduler's timesteps, got \[899\]",
    ),
    (lambda: DDPMScheduler().step(X, 1000, X), "DDPMScheduler.step: expected timestep to be in 0..999, got 1000"),
    (lambda: made(DDIMScheduler, 10).step(X, -1, X), "DDIMScheduler.step: expected timestep to be in 0..999, got -1"),
    (
        lambda: made(DDPMScheduler, 10).step(None, 900, X),
        "DDPMScheduler.step: expected model_output to be a tensor, got NoneType",
    ),
    (
        lambda: made(DDPMScheduler, 10).step(X, 900, X.int()),
        "DDPMScheduler.step: expected sample to be float32, .*, got torch.int32",
    ),
    (lambda: made(DDPMScheduler, 10).step(X, 900.0, X), "expected timestep to be an int or an int64 tensor, got float"),
    (
        lambda: made(DDPMScheduler, 10).step(X, torch.tensor(900.0), X),
        "expected timestep to be an int or an int64 tensor, got torch.float32",
    ),
    (lambda: made(DDPMScheduler, 10).step(X, torch.tensor([900, 0]), X), "expected timestep to have 1 element or 3, got 2"),
    (
        lambda: made(DDPMScheduler, 10).step(X[:, :2], 900, X),
        r"expected model_output to have shape \[3, 3, 6, 6\], got \[3, 2, 6, 6\]",
    ),
    (
        lambda: made(DDPMScheduler, 10, variance_type="learned_range").step(X, 900, X),
        r"model_output to have shape \[3, 6, 6, 6\] \(twice the channels",
    ),
    (lambda: made(DDIMScheduler, 10).step(X, 900, X, eta=-0.1), "expected eta to be at least 0 and finite, got -0.1"),
    (lambda: made(DDIMScheduler, 10).step(X, 900, X, eta=9.0), r"expected eta to be at most \d.* got 9.0"),
    (
        lambda: made(DDIMScheduler, 10).step(X, 900, X, eta=1.0, generator=torch.Generator(), variance_noise=X),
        "DDIMScheduler.step: expected at most one of generator and variance_noise, got both",
    ),
    (
        lambda: _given(made(DDPMScheduler, 10), seeds=3).step(X, 900, X),
        r"expected seeds to be an int64 tensor \(see sample_seeds\), got int",
    ),
    (
        lambda: _given(made(DDPMScheduler, 10), seeds=torch.zeros(2, dtype=torch.int64)).step(X, 900, X),
        r"expected seeds to .*\[3\]",
    ),
    (
        lambda: made(DDPMScheduler, 10, thresholding=True).sampling_plan(),
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
    *(
        (
            lambda scheduler=scheduler, timesteps=timesteps: _given(scheduler, timesteps=timesteps).sampling_plan(),
            r"expected spacing to be strictly descending timesteps in 0\.\.999, got \[",
        )
        for scheduler in (DDPMScheduler(), made(DDPMScheduler, 10), DDIMScheduler())
        for timesteps in (torch.tensor([500, 1000]), torch.tensor([500, 300, 400]), torch.tensor([2.5, 1.0]))
    ),
    *(
        (
            lambda kind=kind: made(kind, 10, **ZERO_SNR),
            r"at timestep 999 \(abar = 0\) with prediction 'epsilon'",
        )
        for kind in NOISY
    ),
    (
        lambda: DDPMScheduler(**ZERO_SNR).step(X, 999, X),
        r"DDPMScheduler.step: expected prediction_type .* at timestep 999",
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


@pytest.mark.parametrize("kind", NOISY)
def test_another_alphas_cumprod_is_no_silent_mistake(kind: type[Any]) -> None:
    """Scripts put it on a device, and some assign one of another schedule, which diffusers' steps then follow."""
    scheduler = kind()
    # The largest change that a float32 table may hide is its rounding, which is 4e-7 of abar_0.
    levels = scheduler.alphas_cumprod
    other = kind(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    given = (other, other[:10], 0.995 * levels, (1 - 1e-6) * levels, levels.where(levels < 0.9999, 0.9998))
    changes: list[Callable[[], Any]] = [partial(setattr, scheduler, "alphas_cumprod", each) for each in given]
    changes.append(lambda: (scheduler.alphas_cumprod.mul_(0.995), scheduler.set_timesteps(10)))  # no assignment sees it
    for change in changes:
        with pytest.raises(ValueError, match=f"{kind.__name__}: expected alphas_cumprod to be that of the configuration"):
            change()


@parametrize(kind=KINDS, schedule=["linear", "scaled_linear", "squaredcos_cap_v2"], zero_snr=[False, True], total=[10, 1000])
def test_the_alphas_cumprod_of_diffusers_is_that_of_the_configuration(
    kind: Any, schedule: str, zero_snr: bool, total: int
) -> None:
    """Levels may have any dtype, come from float32 or float64, and have the solver's 2^-24 in the place of 0."""
    config = {"beta_schedule": schedule, "rescale_betas_zero_snr": zero_snr, "num_train_timesteps": total}
    ours, theirs = pair(kind, **config, prediction_type="v_prediction")
    assert (float(theirs.alphas_cumprod[-1]) == 2**-24) == (zero_snr and kind is DPMSolverMultistepScheduler)
    tables = [theirs.alphas_cumprod, *((1 - theirs.betas.to(dtype)).cumprod(0) for dtype in (torch.float32, torch.float64))]
    if total == 1000:  # the last levels of a short schedule with zero SNR differ by more than their rounding
        tables.append(ours.schedule.alpha_bars)
    for levels, dtype in product(tables, FLOATS):
        theirs.alphas_cumprod = levels.to(dtype)
        assert plan_of(theirs, 5).num_steps == 5
        if total == 1000:
            ours.alphas_cumprod = theirs.alphas_cumprod
            assert ours.alphas_cumprod.dtype == dtype
