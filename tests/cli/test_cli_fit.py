"""`ddpm-fast fit`."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from commands import run, save_model
from drawing import tiny_unet
from PIL import Image
from runs import train

import ddpm_fast
from ddpm_fast import NoiseSchedule, load_folder
from ddpm_fast.cli import fit
from ddpm_fast.sampling import fitting

SCHEDULE = NoiseSchedule.linear(1000)
FIT = ("fit", "model", "--steps=3", "--teacher-steps=5", "--num=2", "--batch-size=8")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return save_model(Path("model"), tiny_unet(), SCHEDULE)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_plan_is_written_where_sampling_finds_it(dtype: str, model: Path) -> None:
    said = run(*FIT, "--data=digits", f"--dtype={dtype}")
    assert "plan.json: 3 steps, fitted to dpm_solver_plan(num_steps=5" in said
    assert re.search(r"RMS distance from the teacher's images: [\d.]+ before, [\d.]+ now\.\n", said)
    assert "64 images by fitted:\n" in said
    assert "Look at their images in model/fit. Delete model/plan.json to undo the fit." in said
    assert re.search(r"Frechet distance from 32 real images, the nearest first: \S+ [\d.]+, \S+ [\d.]+, \S+ [\d.]+\n", said)
    assert json.loads((model / "plan.json").read_text())["fit"]["guidance_scale"] == 1.0
    for name in ("fitted", "teacher", "dpm++2m-sde"):
        with Image.open(model / "fit" / f"{name}.png") as picture:
            assert picture.size[0] >= 8 * 8  # 64 images
    assert "in 3 steps (the model's plan)" in run("sample", "--model=model")


@pytest.mark.parametrize("is_nearest", [True, False])
def test_a_sampler_with_noise_that_is_nearer_to_the_data_is_named(
    is_nearest: bool, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distances = iter([2.0, 3.0, 1.0 if is_nearest else 4.0])  # fitted, teacher, dpm++2m-sde
    monkeypatch.setattr(ddpm_fast, "frechet_distance", lambda a, b: next(distances))
    said = run(*FIT, "--data=digits")
    assert ("dpm++2m-sde, which draws noise, is nearest: with model/plan.json deleted, it draws again." in said) == is_nearest
    assert (model / "plan.json").is_file()


def test_a_run_is_compared_with_its_own_data(tmp_path: Path) -> None:
    """Spread over the data set, whose files are sorted by class, as long as the data are there."""
    for shade, name in ((0, "black"), (255, "white")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("L", (8, 8), shade).save(tmp_path / "data" / name / f"{i}.png")
    train(tmp_path / "run", steps=1, channels=[8], data=str(tmp_path / "data"))
    model = load_folder(tmp_path / "run")
    real = fit._real_images(model, tmp_path / "run", None, None)
    assert sorted(real.mean(dim=(1, 2, 3)).tolist()) == [-1.0] * 8 + [1.0] * 8
    assert "Frechet distance from 16 real images" in run("fit", tmp_path / "run", *FIT[2:], "--guidance=2")
    assert "in 3 steps (the model's plan)" in run(
        "sample", f"--model={tmp_path / 'run'}", f"--out={tmp_path / 'a.png'}", "--guidance=2"
    )
    shutil.rmtree(tmp_path / "data")
    assert "Frechet" not in run("fit", tmp_path / "run", *FIT[2:])


def test_a_folder_with_the_network_at_its_root_and_two_channels(tmp_path: Path) -> None:
    tiny_unet(in_channels=2, out_channels=2).save_pretrained(tmp_path)
    (tmp_path / "scheduler_config.json").write_text('{"_class_name": "DDPMScheduler"}')
    run("fit", tmp_path, *FIT[2:], "--quiet")
    assert load_folder(tmp_path).plan is not None


def test_a_plan_that_is_no_better_is_not_written(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "_moves", lambda sampler, request, targets, numbers: [numbers])
    assert "no round brought the images nearer to the teacher's, so no plan is written" in run(*FIT, code=1)
    assert not (model / "plan.json").exists()


def test_what_cannot_be_fitted_is_refused_before_any_work(model: Path) -> None:
    said = run("fit", model, "--steps=3", "--teacher-steps=3", code=2)
    assert "fit: expected --teacher-steps to be more than --steps, 3, got 3" in said
    other = save_model(Path("other"), tiny_unet(in_channels=2), SCHEDULE)
    assert "fit: expected MODEL to be one without a condition: call fit_plan in Python with conditions" in run(
        "fit", other, code=2
    )
    short = save_model(Path("short"), tiny_unet(), NoiseSchedule.linear(6))
    assert "fit: expected --teacher-steps to be in 1..6 with dpm++2m, got 9" in run("fit", short, "--teacher-steps=9", code=2)
    Path("model/fit").write_text("")
    assert "fit: expected MODEL" in run(*FIT, code=2)
    assert not (model / "plan.json").exists()
