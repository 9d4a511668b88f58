"""The quality benchmark: the samplers, the figures, the table and the plot."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmark_quality as quality
import judges
import pytest
import torch

import ddpm_fast
from ddpm_fast import dpm_solver_plan, load_builtin
from ddpm_fast.data.items import Item, read_batch


def test_samplers_are_named_by_method_and_evaluations():
    assert quality.chosen(["sde", "ddpm:7", "ddpm"], [4, 10, 50]) == [
        ("ddpm", 7),
        ("ddpm", 10),
        ("sde", 10),
        ("ddpm", 50),
        ("sde", 50),
    ]
    assert quality.chosen(["heun"], quality.EVALUATIONS) == [("heun", n) for n in (5, 9, 19)]
    for name in ("euler:20", "ddim:", "ddim:x", "ddim:0"):
        with pytest.raises(ValueError, match=f"expected a sampler to be METHOD or METHOD:EVALUATIONS, .* got '{name}'"):
            quality.chosen([name], [4])


def test_each_plan_evaluates_as_often_as_its_name_says():
    loaded = load_builtin()
    plans: dict[str, Any] = {}
    for name, evaluations in quality.chosen(list(quality.METHODS), [5, 20]):
        plans[name] = quality.METHODS[name].plan(loaded, evaluations, 1.0)
        assert plans[name].num_steps == evaluations
    assert {name for name, plan in plans.items() if plan.is_random} == {"ddpm", "sde"}
    assert (1 / plans["few"].alpha_bars[[0, -1]] - 1).sqrt().tolist() == pytest.approx([80, 0.02])


@pytest.fixture
def items() -> list[Item]:
    """Random images of ten classes."""
    images = torch.randint(256, (80, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return [Item(image, number % 10) for number, image in enumerate(images)]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, items: list[Item]) -> Callable[..., tuple[dict[str, Any], str]]:
    """Run the script with 16 images, random judges of 8 features and 40 random test images."""
    for name, recipe in (("class", judges.CLASS_RECIPE), ("grain", judges.GRAIN_RECIPE)):
        monkeypatch.setitem(recipe, "features", 8)
        monkeypatch.setitem(judges.LEAST, name, -math.inf)
    monkeypatch.setattr(quality, "load_dataset", lambda *_, **__: items)
    torch.manual_seed(0)
    judges.save_judge(tmp_path / "class", judges.ClassJudge())
    judges.save_judge(tmp_path / "grain", judges.GrainJudge())
    monkeypatch.setattr(judges, "judge_file", lambda recipe: tmp_path / ("grain" if "noise" in recipe else "class"))
    out = tmp_path / "results.json"

    def run(*arguments: str) -> tuple[dict[str, Any], str]:
        quality.main(["--num", "16", "--batch", "8", "--out", str(out), *arguments])
        results: dict[str, Any] = json.loads(out.read_text())
        assert len(results) == 1
        return next(iter(results.values())), out.read_text()

    return run


def test_a_run_writes_the_figures_of_the_functions(
    tmp_path: Path, items: Any, small: Callable[..., tuple[dict[str, Any], str]]
):
    section, _ = small("--samplers", "sde:4", "ddpm:3", "--seeds", "3")
    rows = {(row["name"], row["evaluations"]): row for row in section["rows"]}
    # 40 real images are two sets of 16, which are disjoint
    assert {key: row["seeds"] for key, row in rows.items()} == {
        ("real", None): [0, 1],
        ("ddpm", 3): [0, 1, 2],
        ("sde", 4): [0, 1, 2],
    }
    assert {"device", "torch", "commit", "judges", "options"} <= set(section["machine"])

    loaded = load_builtin()
    test_images, labels, _ = read_batch(items, range(80))
    real, reference = (test_images[half] for half in judges.split_real(labels))
    sampler, wanted = loaded.sampler(sampler="dpm++2m-sde", steps=4), torch.arange(16) % 10
    ours = [ddpm_fast.to_uint8(sampler(16, seed=seed, batch_size=8, class_labels=wanted)) for seed in range(3)]
    floor = [real[:16], real[16:32]]
    for name, build in (("class", judges.ClassJudge), ("grain", judges.GrainJudge)):
        judge = judges.load_judge(tmp_path / name, build())
        known = judges.measure(judge, reference).features
        for row, sets, first in ((rows["sde", 4], ours, 0), (rows["real", None], floor, 16)):
            measured = [judges.measure(judge, images) for images in sets]
            distances = [ddpm_fast.frechet_distance(each.features, known) for each in measured]
            assert row[name]["by seed"] == pytest.approx(distances, rel=1e-3)
            assert row[name]["mean"] == pytest.approx(statistics.fmean(distances), rel=1e-3)
            assert row[name]["std"] == pytest.approx(statistics.stdev(distances), rel=2e-2)
            if name == "class":
                accuracies = [each.accuracy(torch.arange(i * first, i * first + 16) % 10) for i, each in enumerate(measured)]
                assert row["accuracy"]["by seed"] == pytest.approx(accuracies, rel=1e-3)


def test_a_run_continues(small: Callable[..., tuple[dict[str, Any], str]], monkeypatch: pytest.MonkeyPatch):
    drawn: list[tuple[str, int, int]] = []
    draw = quality.draw

    def watched(loaded: Any, name: str, evaluations: int, seed: int, args: Any) -> torch.Tensor:
        drawn.append((name, evaluations, seed))
        if len(drawn) == 2:
            raise RuntimeError("stopped")
        return draw(loaded, name, evaluations, seed, args)

    monkeypatch.setattr(quality, "draw", watched)
    arguments = ["--samplers", "ddpm:2", "ddim:3", "--seeds", "1"]
    with pytest.raises(RuntimeError, match="stopped"):
        small(*arguments)
    section, text = small(*arguments)
    assert drawn[2:] == [("ddim", 3, 0)]  # ddpm:2 was there
    assert [row["name"] for row in section["rows"]] == ["real", "ddpm", "ddim"]
    assert small(*arguments)[1] == text
    small("--samplers", "ddpm:2", "--seeds", "2")
    assert drawn[3:] == [("ddpm", 2, 1)]
    section, _ = small("--samplers", "ddpm:2", "--seeds", "1", "--batch", "16")
    assert drawn[4:] == [("ddpm", 2, 0)]  # another option measures again
    assert [row["name"] for row in section["rows"]] == ["real", "ddpm"]


def test_guidance_reaches_the_sampler():
    loaded = load_builtin()
    args = argparse.Namespace(num=11, batch=4, guidance=2.0, device="cpu")
    drawn = quality.draw(loaded, "few", 4, 0, args)
    plan = dpm_solver_plan(loaded.objective, 4, solver="heun", spacing="karras", sigma_min=0.02, sigma_max=80.0)
    options = {"batch_size": 4, "guidance_scale": 2.0, "progress": False}
    assert torch.equal(drawn, loaded.sampler(plan)(11, seed=0, class_labels=torch.arange(11) % 10, **options))


def test_the_table_and_the_plot_come_from_the_results(
    tmp_path: Path, small: Callable[..., tuple[dict[str, Any], str]], monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit, match=r"to have the section 'benchmark_quality builtin .* float32 N=16 guidance 2'"):
        small("--table", "--guidance", "2")
    samplers = ["--samplers", "ddpm:2", "ddpm:3", "sde:2"]
    section, text = small(*samplers, "--seeds", "2")
    monkeypatch.setattr(quality, "draw", None)
    capsys.readouterr()
    assert small(*samplers, "--table", "--plot", str(tmp_path / "plot.png"))[1] == text
    lines = [line.split("|")[1:3] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    names = ["ancestral (eq. 13)", "ancestral (eq. 13)", "DPM-Solver++(2M) SDE", "real images"]
    assert [[cell.strip() for cell in line] for line in lines[2:]] == [
        list(pair) for pair in zip(names, ["2", "3", "2", ""], strict=True)
    ]
    small("--table", "--samplers", "ddpm:3")
    assert "(eq. 13) | 2 |" not in capsys.readouterr().out

    lines = quality.plot(section["rows"], "title").axes[0].lines
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in lines]
    means = {(row["name"], row["evaluations"]): row["class"]["mean"] for row in section["rows"]}
    assert ([2, 3], [means["ddpm", 2], means["ddpm", 3]]) in drawn
    assert [means["real", None]] * 2 in [y for _, y in drawn]
