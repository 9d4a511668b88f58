"""`ddpm-fast fit`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from commands import run, save_model
from drawing import tiny_unet
from PIL import Image
from runs import train

from ddpm_fast import NoiseSchedule

SCHEDULE = NoiseSchedule.linear(1000)
FIT = ("fit", "model", "--steps=3", "--teacher-steps=5", "--num=2", "--batch-size=8")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return save_model(Path("model"), tiny_unet(), SCHEDULE)


def test_a_plan_is_written_where_sampling_finds_it(model: Path) -> None:
    said = run(*FIT, "--data=digits")
    assert re.search(r"model/plan.json: 3 steps, error [\d.e-]+ -> [\d.e-]+, \d+ s\n", said)
    assert sorted(re.findall(r"  (\w+) +(\d+) steps  Frechet distance [\d.]+\n", said)) == [
        ("fitted", "3"),
        ("noise", "20"),
        ("teacher", "5"),
    ]
    assert json.loads((model / "plan.json").read_text())["fit"]["guidance_scale"] == 1.0
    for name in ("fitted", "teacher", "noise"):
        with Image.open(model / "fit" / f"{name}.png") as picture:
            assert picture.size[0] >= 8 * 8  # 64 images
    assert "in 3 steps (the model's plan)" in run("sample", "--model=model")
    assert "in 20 steps (dpm++2m-sde)" in run("sample", "--model=model", "--steps=20")


def test_a_run_is_compared_with_its_own_data(tmp_path: Path) -> None:
    train(tmp_path / "run", steps=1, channels=[8])
    said = run("fit", tmp_path / "run", *FIT[2:], f"--out={tmp_path / 'pictures'}", "--guidance=2")
    assert said.count("Frechet distance") == 3
    assert len([*(tmp_path / "pictures").iterdir()]) == 3
    assert "in 3 steps (the model's plan)" in run(
        "sample", f"--model={tmp_path / 'run'}", f"--out={tmp_path / 'a.png'}", "--guidance=2"
    )


def test_what_cannot_be_fitted_is_refused_before_any_work(model: Path) -> None:
    said = run("fit", model, "--steps=3", "--teacher-steps=3", code=2)
    assert "fit: expected --teacher-steps to be more than --steps, 3, got 3" in said
    assert not (model / "plan.json").exists()
    other = save_model(Path("other"), tiny_unet(in_channels=2), SCHEDULE)
    assert "fit: expected MODEL to read no condition: call fit_plan in Python with conditions" in run("fit", other, code=2)
