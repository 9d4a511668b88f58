"""Models from folders: every layout, every schedule of diffusers, and the built-in model."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from drawing import tiny_unet
from refusals import by, refused

import ddpm_fast
from ddpm_fast import (
    NoiseSchedule,
    Objective,
    SamplingPlan,
    ddim_plan,
    dpm_solver_plan,
    fit_plan,
    load_builtin,
    repaint_plan,
    sample,
)
from ddpm_fast.data.published import FASHION_MNIST_CLASSES
from ddpm_fast.errors import InvalidType, InvalidValue
from ddpm_fast.inference import interface_of
from ddpm_fast.interface import Interface
from ddpm_fast.nn import UNet
from ddpm_fast.pretrained import BUILTIN, load_folder
from ddpm_fast.samplers import PlanOptions
from ddpm_fast.schedule.noise_schedule import schedule_from_config
from ddpm_fast.training.checkpoint import Checkpoints


def write_scheduler(folder: Path, **config: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDPMScheduler", **config}))


@pytest.mark.parametrize("at_the_root", [False, True])
def test_load_folder_reads_diffusers_layout(tmp_path: Path, at_the_root: bool) -> None:
    model = tiny_unet()
    model.save_pretrained(tmp_path if at_the_root else tmp_path / "unet")
    write_scheduler(
        tmp_path if at_the_root else tmp_path / "scheduler",
        beta_schedule="squaredcos_cap_v2",
        num_train_timesteps=30,
        prediction_type="v_prediction",
        variance_type="fixed_large",
        clip_sample_range=2.0,
    )
    loaded = load_folder(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(loaded.model.state_dict(), model.double().state_dict(), rtol=0, atol=0)
    assert not loaded.model.training
    assert loaded.model.conv_out.weight.is_contiguous(memory_format=torch.channels_last)
    assert loaded.objective == Objective(NoiseSchedule.cosine(30), "v_prediction", "fixed_large")
    assert loaded.clip == 2.0
    assert loaded.model.config == model.config  # without names of the classes


def test_what_a_scheduler_leaves_out_has_diffusers_defaults(tmp_path: Path) -> None:
    tiny_unet().save_pretrained(tmp_path / "unet")
    with pytest.raises(FileNotFoundError, match=r"expected scheduler/scheduler_config\.json or scheduler_config\.json in"):
        load_folder(tmp_path)
    write_scheduler(tmp_path / "scheduler")
    loaded = load_folder(tmp_path)
    assert loaded.objective == Objective(NoiseSchedule.linear())
    assert loaded.clip == 1.0
    write_scheduler(tmp_path / "scheduler", clip_sample=False)
    assert load_folder(tmp_path).clip is None


def test_load_folder_takes_the_newest_average_of_a_training_run(tmp_path: Path) -> None:
    own = NoiseSchedule.linear(7)  # it goes before what diffusers reads
    for step in (1, 2):

        def write(folder: Path, step: int = step) -> None:
            for name in ("unet", "unet_ema"):
                tiny_unet(classes=1, class_names=[f"{name} {step}"]).save_pretrained(folder / name)
            write_scheduler(folder / "scheduler", trained_betas=own.betas.float().tolist(), _ddpm_fast=own.to_config())

        Checkpoints(tmp_path / "run").add(step, {}, write, keep=2)
    loaded = load_folder(tmp_path / "run")
    assert loaded.model.config["class_names"] == ["unet_ema 2"]
    assert loaded.objective.schedule == own

    for checkpoint in (tmp_path / "run" / "checkpoints").glob("step-*"):
        (checkpoint / "state.json").unlink()
    with pytest.raises(FileNotFoundError, match="expected a whole checkpoint"):
        load_folder(tmp_path / "run")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"beta_schedule": "linear", "beta_start": 1e-3, "beta_end": 0.05, "num_train_timesteps": 50},
        {"beta_schedule": "scaled_linear", "beta_start": 8.5e-4, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100},
        {"beta_schedule": "sigmoid"},
        {"beta_schedule": "laplace", "num_train_timesteps": 200},
        {"trained_betas": [0.1, 0.2, 0.4], "num_train_timesteps": 3},
        {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
    ],
)
def test_schedules_are_those_of_diffusers(config: dict[str, Any]) -> None:
    theirs = pytest.importorskip("diffusers").DDPMScheduler(**config)
    ours = schedule_from_config({"_class_name": "DDPMScheduler", **theirs.config})
    # Theirs are float32; 1 - abar of the cosine and rescaled ones cancels.
    torch.testing.assert_close(ours.betas.float(), theirs.betas.float(), rtol=1e-5, atol=5e-7)
    assert schedule_from_config({"_class_name": "DDPMScheduler", **config}) == ours  # without the keys that have their default


VALID = r"'.*scheduler_config\.json' to have valid fields, got: "


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"num_train_timesteps": "x"}, rf"{VALID}Expected `int \| null`, got `str` - at `\$\.num_train_timesteps`"),
        ({"num_train_timesteps": 8}, "num_train_timesteps to be 7, as in _ddpm_fast, got 8"),
        ({"beta_start": "x"}, rf"{VALID}Expected `float \| null`, got `str` - at `\$\.beta_start`"),
        ({"clip_sample_range": "x"}, rf"{VALID}Expected `float`, got `str` - at `\$\.clip_sample_range`"),
        ({"_ddpm_fast": 5}, rf"{VALID}Expected `object \| null`, got `int` - at `\$\._ddpm_fast`"),
        ({"_ddpm_fast": {}}, "name to be one of linear, .*, got None"),
        (
            {"_ddpm_fast": {"name": "linear", "num_timesteps": 10**6}},
            r"num_timesteps to be an integer in 1\.\.100000, got 1000000",
        ),
        ({"_ddpm_fast": {"name": "from_betas", "betas": "x"}}, "betas to be T numbers, got 'x'"),
        ({"_ddpm_fast": None, "beta_schedule": "x"}, "beta_schedule to be one of linear, .*, got 'x'"),
        ({"_ddpm_fast": None, "beta_schedule": "linear", "beta_end": 2}, "beta_end to be positive and at most 1, got 2"),
        ({"thresholding": True}, "thresholding to be false, got true"),
        ({"prediction_type": "noise"}, rf"{VALID}Invalid enum value 'noise' - at `\$\.prediction_type`"),
    ],
)
def test_a_wrong_value_of_a_scheduler_is_named_with_the_file(tmp_path: Path, change: dict[str, Any], wanted: str) -> None:
    tiny_unet().save_pretrained(tmp_path)
    config = {"num_train_timesteps": 7, "_ddpm_fast": NoiseSchedule.linear(7).to_config()}
    write_scheduler(tmp_path, **config | change)
    where = "" if wanted.startswith(VALID) else r", in '.*scheduler_config\.json'"
    with pytest.raises(ValueError, match=f"^load_folder: expected {wanted}{where}$"):
        load_folder(tmp_path)


# ------------------------------------------------------------------------------------------------------ the built-in model


def test_the_builtin_model_is_what_its_record_says() -> None:
    builtin = load_builtin()
    config = builtin.model.config
    assert (config["in_channels"], config["sample_size"], config["num_class_embeds"]) == (1, 32, 11)
    assert (tuple(config["class_names"]), builtin.objective.prediction) == (FASHION_MNIST_CLASSES, "v_prediction")
    assert {parameter.dtype for parameter in builtin.model.parameters()} == {torch.float32}
    assert builtin.objective.schedule.num_timesteps == 1000
    assert sum(file.stat().st_size for file in BUILTIN.rglob("*") if file.is_file()) <= 8e6
    record = json.loads((BUILTIN / "training.json").read_text(encoding="utf-8"))
    assert (record["dataset"]["images"], record["options"]["data"]) == (60_000, "fashion-mnist")
    assert record["unet"].items() >= {"norm_num_groups": 8, "resnet_time_scale_shift": "scale_shift"}.items()
    with (BUILTIN / "training_log.csv").open(newline="", encoding="utf-8") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == sorted(steps)
    assert steps[-1] == record["step"] == record["options"]["steps"]


def test_the_builtin_model_draws_garments() -> None:
    """Things that every picture of the data set has, at the price of 10 steps; how good they are is for `evaluate`."""
    garments = load_builtin()
    images = sample(garments.model, ddim_plan(garments.objective, 10), 20, progress=False)  # the classes in turn
    assert float(images[:, :, [0, -1]].mean()) < -0.75  # the padding is black
    assert float(images.mean()) > -0.8  # and what is inside is not
    brightness = images.reshape(2, 10, -1).mean(dim=(0, 2))
    pullover, coat, sandal, bag = (
        float(brightness[FASHION_MNIST_CLASSES.index(c)]) for c in ("pullover", "coat", "sandal", "bag")
    )
    assert min(pullover, coat, bag) > sandal + 0.1


def test_default_number_of_steps_is_quick_and_within_the_schedule() -> None:
    names = ("ddpm", "ddim", "dpm++2m", "dpm++2m-sde", "heun")
    for schedule, counts in (
        (NoiseSchedule.linear(), [100, 50, 20, 20, 19]),
        (NoiseSchedule.linear(15), [15, 15, 14, 15, 19]),
        (NoiseSchedule.cosine(10), [10, 10, 8, 9, 15]),  # its last timestep is left out; Karras's levels include timestep 0
    ):
        model = dataclasses.replace(load_builtin(), objective=Objective(schedule))
        assert [model.build_plan(sampler=name)[0].num_steps for name in names] == counts
    with refused(by("Pretrained.build_plan", InvalidValue("steps", "to be in 1..8 with dpm++2m", "9"))):
        model.build_plan(sampler="dpm++2m", steps=9)


def test_a_model_brings_its_plan_and_others_draw_with_noise() -> None:
    builtin = load_builtin()
    common: Any = {"solver": "heun", "spacing": "karras"}
    own = common | {"sigma_min": 0.06, "sigma_max": 80.0}
    fitted = json.loads((BUILTIN / "plan.json").read_text())["arguments"]
    unfitted = common | {"sigma_max": fitted["levels"][0], "sigma_min": fitted["levels"][-1]}
    with_plan = dataclasses.replace(builtin, plan=dpm_solver_plan(builtin.objective, 8, clip=builtin.clip, **own))
    other = dataclasses.replace(builtin, plan=None)  # the same schedule
    sde = common | {"eta": 1.0, "lambda_min": -5.1}
    cases: list[tuple[Any, dict[str, Any], str, dict[str, Any]]] = [
        (builtin, {}, "the model's plan", fitted),
        (builtin, {"steps": 6, "guidance_scale": 1.0}, "the model's plan", fitted),
        (builtin, {"steps": 5}, "the model's plan", unfitted | {"num_steps": 5}),
        (builtin, {"steps": 7}, "dpm++2m-sde", {"num_steps": 7} | sde),
        (builtin, {"guidance_scale": 2.0}, "dpm++2m-sde", {"num_steps": 20} | sde),
        (with_plan, {"guidance_scale": 2.0}, "the model's plan", {"num_steps": 8} | own),
        (with_plan, {"steps": 5, "sampler": None}, "the model's plan", {"num_steps": 5} | own),
        (with_plan, {"steps": 9}, "dpm++2m-sde", {"num_steps": 9} | sde),
        (builtin, {"sigma_min": 0.1}, "dpm++2m-sde", {"num_steps": 20} | sde | {"sigma_min": 0.1}),
        (builtin, {"eta": 0.5}, "dpm++2m-sde", {"num_steps": 20} | sde | {"eta": 0.5}),
        (builtin, {"order": 3}, "dpm++2m-sde", {"num_steps": 20} | sde | {"order": 3}),
        (builtin, {"sampler": "dpm++2m"}, "dpm++2m", {"num_steps": 20, "lambda_min": -5.1}),
        (
            builtin,
            {"sampler": "dpm++2m", "steps": 5, "spacing": "karras", "sigma_max": 40.0},
            "dpm++2m",
            {"num_steps": 5} | common | {"sigma_max": 40.0},
        ),
        (other, {}, "dpm++2m-sde", {"num_steps": 20} | sde),
        (
            other,
            {"steps": 8, "sigma_min": 0.1, "sigma_max": 40.0},
            "dpm++2m-sde",
            sde | {"num_steps": 8, "sigma_min": 0.1, "sigma_max": 40.0},
        ),
    ]
    for model, options, name, expected in cases:
        plan, called = model.build_plan(**options)
        wanted = dpm_solver_plan(model.objective, clip=model.clip, **expected)
        assert called == name
        assert torch.equal(plan.coefficients, wanted.coefficients)
        assert torch.equal(plan.timesteps, wanted.timesteps)
    with refused(
        by(
            "Pretrained.build_plan",
            InvalidType("", f"arguments among {', '.join(PlanOptions.__annotations__)}", "'step'; did you mean 'steps'?"),
        )
    ):
        builtin.build_plan(step=3)  # type: ignore[call-arg]


def test_a_model_and_its_sampler_print_in_a_few_lines() -> None:
    garments = ddpm_fast.load_builtin()
    lines = repr(garments).splitlines()
    assert re.fullmatch(r"Pretrained: a UNet of \d{1,3}(,\d{3})+ parameters for images \(1, 32, 32\)", lines[0])
    assert lines[2].startswith("10 classes: T-shirt, trouser, ")
    assert lines[3:] == ["plan: 6 steps, fitted"]
    assert all(len(line) < 200 for line in lines)
    first, second = repr(garments.sampler(sampler="ddim", steps=10)).splitlines()
    assert first == "Sampler: images (1, 32, 32) by a FrozenUNet, torch.float32 on cpu"
    assert second == "10 steps of ddim_plan"


def test_a_sampler_has_a_plan_or_the_options_that_choose_one() -> None:
    loaded = load_builtin()
    assert loaded.sampler().plan is loaded.plan is not None
    chosen = loaded.sampler(sampler="ddim", steps=3, shape=(1, 16, 16))
    assert torch.equal(chosen.plan.table(), ddim_plan(loaded.objective, 3).table())
    assert chosen.shape == (1, 16, 16)
    with refused(by("Pretrained.sampler", InvalidValue("plan", "to be None with options that choose one", "steps"))):
        loaded.sampler(chosen.plan, steps=3, eta=None)


@pytest.mark.parametrize(
    ("arguments", "options", "labels", "printed"),
    [
        (["--classes", "9", "--num", "2"], {}, 9, "2 images of class ankle boot in 6 steps (the model's plan)"),
        (
            ["--num", "12", "--steps", "2"],
            {"steps": 2},
            [*range(10), 0, 1],
            "12 images of 10 classes in turn in 2 steps (the model's plan)",
        ),
    ],
)
def test_the_sampler_of_the_builtin_model_draws_what_the_command_draws(
    arguments: list[str], options: Any, labels: Any, printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[torch.Tensor] = []
    monkeypatch.setattr(ddpm_fast, "save_grid", lambda images, *_, **__: drawn.append(images))
    out = tmp_path / "a.png"
    assert f"{out}: {printed}, " in run("sample", *arguments, "--out", out, "--device=cpu", "--dtype=float32")
    sampler = load_builtin().sampler(dtype=torch.float32, **options)
    assert torch.equal(drawn[0], sampler(len(drawn[0]), progress=False, class_labels=labels))


@pytest.mark.parametrize(
    ("data_range", "lows", "highs"),
    [
        (None, (0, 0), (255, 255)),
        ([[-4.0, 6.0]], (-4, -4), (6, 6)),
        ([[0, 1], [-3, 5]], (0, -3), (1, 5)),
    ],
)
def test_images_are_mapped_to_the_numbers_of_the_data_and_back(
    data_range: Any, lows: tuple[int, int], highs: tuple[int, int]
) -> None:
    config = tiny_unet().config | {"in_channels": 2, "out_channels": 2, "data_range": data_range}
    loaded = ddpm_fast.Pretrained(UNet(**config), Objective(NoiseSchedule.linear(10)), 1.0)
    images = torch.linspace(-1, 1, 3 * 2 * 4 * 4, dtype=torch.float64).reshape(3, 2, 4, 4)
    ends = torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 2, 1, 1)
    assert loaded.to_data(ends).flatten(1).tolist() == [[*map(float, lows)], [*map(float, highs)]]
    data = loaded.to_data(images)
    assert data.dtype == torch.float64
    torch.testing.assert_close(loaded.from_data(data), images, rtol=0, atol=1e-14)
    torch.testing.assert_close(loaded.to_data(loaded.from_data(data[0])), data[0], rtol=0, atol=1e-13)  # one image
    integers = data.round().to(torch.int16)
    assert torch.equal(loaded.from_data(integers), loaded.from_data(integers.float()))
    for name in ("to_data", "from_data"):
        with refused(by(f"Pretrained.{name}", InvalidValue("images", "to have 2 channels", "[3, 1, 4, 4]"))):
            getattr(loaded, name)(images[:, :1])


def test_a_wide_range_is_mapped_back_from_half_precision() -> None:
    """Its width is beyond the numbers of float16."""
    config = tiny_unet().config | {"data_range": [[-50000.0, 50000.0]]}
    loaded = ddpm_fast.Pretrained(UNet(**config), Objective(NoiseSchedule.linear(10)), 1.0)
    images = torch.tensor([-1.0, -0.5, 0.0, 1.0]).reshape(1, 2, 2)
    mapped = loaded.from_data(loaded.to_data(images).half())
    torch.testing.assert_close(mapped, images.half())


def test_a_configuration_says_which_variance_a_network_predicts(tmp_path: Path) -> None:
    config = tiny_unet().config | {"out_channels": 2}
    for variance in ("learned", "learned_range"):
        model = UNet(**config, variance=variance)
        model.save_pretrained(tmp_path / variance)
        assert UNet.from_pretrained(tmp_path / variance).config["variance"] == variance
        assert (interface_of(model).shape, interface_of(model).predicts_variance) == ((1, 8, 8), True)
    with pytest.raises(
        ValueError, match=r"UNet: expected variance to be one of learned, learned_range or None, got 'fixed_small'"
    ):
        UNet(**config, variance="fixed_small")


def test_a_loaded_network_knows_the_variance_of_its_scheduler(tmp_path: Path) -> None:
    """Without it, these would be six channels of an image, and no condition."""
    UNet(**tiny_unet().config | {"in_channels": 6, "out_channels": 6}).save_pretrained(tmp_path / "unet")
    write_scheduler(tmp_path / "scheduler", variance_type="learned_range")
    loaded = load_folder(tmp_path)
    assert loaded.model.config["variance"] == "learned_range"
    for interface in (loaded.interface, Interface.from_config(loaded.model.config)):
        assert (interface.channels, interface.condition.channels) == (3, 3)


OBJECTIVE = Objective(NoiseSchedule.linear(1000))
PLANS: list[tuple[str, dict[str, Any]]] = [
    ("ddpm_plan", {"num_steps": 7, "spacing": "trailing"}),
    ("ddim_plan", {"num_steps": 7, "eta": 0.5}),
    ("heun_plan", {"num_steps": 7}),
    ("heun_plan", {}),
    ("heun_plan", {"num_steps": None, "spacing": [900, 500, 100]}),
    ("dpm_solver_plan", {"num_steps": 7, "order": 3}),
]


def with_plan(folder: Path, content: Any) -> Path:
    """Write a small model that predicts v, with a plan.json."""
    tiny_unet().save_pretrained(folder / "unet")
    write_scheduler(folder / "scheduler", prediction_type="v_prediction", clip_sample=False, variance_type="fixed_large")
    (folder / "plan.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize(("builder", "arguments"), PLANS)
def test_a_plan_is_built_for_what_the_model_was_trained_for(builder: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    loaded = load_folder(with_plan(tmp_path, {"builder": builder, "arguments": arguments}))
    trained: dict[str, Any] = {"prediction": "v_prediction", "clip": None}
    trained |= {"variance": "fixed_large"} if builder == "ddpm_plan" else {}
    wanted = getattr(ddpm_fast, builder)(loaded.objective.schedule, **trained, **arguments)
    assert torch.equal(loaded.plan.coefficients, wanted.coefficients)
    assert torch.equal(loaded.plan.timesteps, wanted.timesteps)


CORRECTED = {"levels": [1.0], "corrections": [[1e30, 0, 0]]}
FIT = {"teacher": "", "guidance_scale": 1.0, "error_before": 1.0, "error": 0.5, "network": "0" * 64}


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("[", "to be JSON"),
        ({"builder": "exec", "arguments": {}}, "to have valid fields"),
        ({"builder": "ddim_plan"}, "to have valid fields"),
        ({"builder": "ddim_plan", "arguments": {}, "more": 1}, "to have valid fields"),
        ({"builder": "ddim_plan", "arguments": {"steps": 3}}, "steps"),
        ({"builder": "ddim_plan", "arguments": {"prediction": "epsilon"}}, "arguments to leave out .*, got prediction"),
        ({"builder": "ddpm_plan", "arguments": {"variance": "learned"}}, "arguments to leave out .*, got variance"),
        (
            {"builder": "ddim_plan", "arguments": {"num_steps": 10**9}},
            r"num_steps to be an integer in 1\.\.1000, got 1000000000",
        ),
        ({"builder": "dpm_solver_plan", "arguments": {"spacing": "karras", "sigma_max": 1e9}}, "sigma_max to be in"),
        ({"builder": "dpm_solver_plan", "arguments": CORRECTED}, "corrections to go with a fit"),
        (
            {"builder": "dpm_solver_plan", "arguments": CORRECTED, "fit": FIT | {"guidance_scale": math.nan}},
            "fit to have finite",
        ),
        ({"builder": "dpm_solver_plan", "arguments": {"levels": [1.0, 2.0]}}, "levels to be strictly descending numbers"),
    ],
)
def test_a_plan_that_cannot_be_built_is_refused_with_its_file(content: Any, wanted: str, tmp_path: Path) -> None:
    with_plan(tmp_path, content)
    with pytest.raises(ValueError, match=f"load_folder: expected .*{wanted}.*") as caught:
        load_folder(tmp_path)
    assert str(tmp_path / "plan.json") in str(caught.value)


def test_corrections_beyond_those_of_a_fit_are_refused(tmp_path: Path) -> None:
    fit = FIT | {"network": load_folder(with_plan(tmp_path, {"builder": "ddim_plan", "arguments": {}})).digest()}
    with_plan(tmp_path, {"builder": "dpm_solver_plan", "arguments": CORRECTED, "fit": fit})
    with pytest.raises(ValueError, match=r"corrections to be numbers \[1, 3\] in -1\.0"):
        load_folder(tmp_path)


def test_a_fitted_plan_is_used_for_its_weights_and_its_guidance(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_unet().save_pretrained(tmp_path / "unet")
    write_scheduler(tmp_path / "scheduler", prediction_type="v_prediction")
    loaded = load_folder(tmp_path)
    few, teacher = (dpm_solver_plan(loaded.objective, steps, clip=loaded.clip) for steps in (3, 6))
    fitted = fit_plan(loaded.sampler(few), teacher=teacher, num_images=2, rounds=1, progress=False)
    loaded.save_plan(fitted, tmp_path)
    for dtype in (None, torch.bfloat16):
        again = load_folder(tmp_path, dtype=dtype)
        assert again.plan is not None
        assert torch.equal(again.plan.coefficients, fitted.coefficients)
        assert again.plan.fit == fitted.fit
    names = [again.build_plan(**options)[1] for options in ({}, {"steps": 3}, {"guidance_scale": 1.0})]
    assert set(names) == {"the model's plan"}
    others = [again.build_plan(**options)[1] for options in ({"steps": 4}, {"guidance_scale": 2.0})]
    assert set(others) == {"dpm++2m-sde"}
    fewer, name = again.build_plan(steps=2)
    assert (name, fewer.num_steps, fewer.fit) == ("the model's plan", 2, None)
    assert again.sampler(guidance_scale=2.0).plan.is_random
    assert not caplog.records
    # The levels of the plan are not among those of this schedule.
    write_scheduler(tmp_path / "scheduler", prediction_type="v_prediction", beta_end=0.0003)
    assert load_folder(tmp_path, dtype=torch.bfloat16).plan is None
    write_scheduler(tmp_path / "scheduler", prediction_type="v_prediction")
    model = tiny_unet()
    with torch.no_grad():
        model.conv_out.bias += 1
    model.save_pretrained(tmp_path / "unet")
    assert load_folder(tmp_path).plan is None
    expected = f"{tmp_path / 'plan.json'} was fitted to another network, so it is not used: fit again"
    assert [record.getMessage() for record in caplog.records] == [expected] * 2
    with refused(
        by("Pretrained.save_plan", InvalidValue("model", "to be loaded in float32, for a fitted plan", torch.bfloat16))
    ):
        again.save_plan(fitted, tmp_path)


@pytest.mark.parametrize(
    ("plan", "got"),
    [
        (repaint_plan(OBJECTIVE), "Invalid enum value 'repaint_plan'"),
        (dpm_solver_plan(OBJECTIVE, 5, clip=None), "another plan$"),  # The model has a clip.
        (ddim_plan(OBJECTIVE, None, spacing=torch.tensor([900, 500])), "Object of type Tensor is"),  # type: ignore[arg-type]
        (dpm_solver_plan(NoiseSchedule.cosine(1000), 5, lambda_min=-5.1), "another plan$"),
        (dpm_solver_plan(OBJECTIVE, levels=[1.0], corrections=[[0.1, 0, 0]], clip=1.0), ".*corrections to go with a fit"),
    ],
    ids=["another function", "clip", "tensor", "schedule", "corrections"],
)
def test_a_plan_that_would_be_read_as_another_is_not_saved(plan: SamplingPlan, got: str, tmp_path: Path) -> None:
    loaded = load_builtin()
    wanted = "to be built by a plan's function from plain values, for what this model predicts, got"
    with pytest.raises(ValueError, match=f"^Pretrained.save_plan: expected plan {wanted}:? {got}"):
        loaded.save_plan(plan, tmp_path)
    assert not [*tmp_path.iterdir()]
