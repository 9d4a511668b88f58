"""The quality benchmark: the classifier and its file, the split of real images, the samplers."""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmark_quality as quality
import peers
import pytest
import safetensors.torch
import torch

import ddpm_fast
from ddpm_fast import dpm_solver_plan, load_builtin, sample_seeds
from ddpm_fast.training.data import Item, read_batch


def test_a_classifier_of_another_recipe_or_a_weak_one_is_refused(tmp_path: Path):
    path = tmp_path / "weak"
    safetensors.torch.save_file(quality.Classifier().state_dict(), path)
    with pytest.raises(ValueError, match=r"expected .* to hold a classifier of this script's recipe, got recipe None"):
        quality.load_classifier(path)
    quality.save_classifier(path, quality.Classifier())
    with pytest.raises(ValueError, match=r"accuracy on test images to be at least 0.91, got .* from '.*weak'"):
        quality.trained_classifier(path, torch.zeros(10, 1, 32, 32, dtype=torch.uint8), torch.arange(10))


def test_the_recipe_trains_and_is_seeded():
    labels = torch.arange(256) % 10
    images = (labels * 25).to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 32, 32)  # the class is the brightness
    recipe = quality.RECIPE | {"batch": 32, "epochs": 12}
    one, other = (quality.train_classifier(images, labels, recipe) for _ in range(2))
    assert quality.measure(one, images).accuracy(labels) > 0.9
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_real_images_and_reference_are_disjoint_and_of_the_same_size():
    labels = torch.arange(3000) % 10
    labels = labels[torch.randperm(3000, generator=torch.Generator().manual_seed(0))]
    real, reference = quality.split_real(labels)
    assert torch.equal(labels[real], torch.arange(1500) % 10)
    assert torch.equal(labels[reference], torch.arange(1500) % 10)
    assert torch.equal(torch.cat([real, reference]).sort().values, torch.arange(3000))


def test_samplers_are_named_by_method_and_evaluations():
    assert quality.chosen(["sde", "ddpm:7", "ddpm"], [4, 1000]) == [("ddpm", 4), ("sde", 4), ("ddpm", 7), ("ddpm", 1000)]
    assert quality.chosen(["heun"], quality.EVALUATIONS) == [("heun", n) for n in (5, 7, 9, 19, 49)]
    assert quality.chosen(["diffusers-ddim"], [4]) == [("diffusers-ddim", 50)]
    for name in ("euler:20", "ddim:", "ddim:x", "ddim:0"):
        with pytest.raises(ValueError, match=f"expected a sampler to be METHOD or METHOD:EVALUATIONS, .* got '{name}'"):
            quality.chosen([name], [4])


def test_each_plan_evaluates_as_often_as_its_name_says():
    loaded = load_builtin()
    ours = [name for name, method in quality.METHODS.items() if method.plan]
    plans: dict[str, Any] = {}
    for name, evaluations in quality.chosen(ours, [5, 20]):
        plans[name] = quality.METHODS[name].plan(loaded, evaluations)  # type: ignore[misc]
        assert plans[name].num_steps == evaluations
    assert {name for name, plan in plans.items() if plan.is_random} == {
        *("ddpm", "sde", "sde-karras", "2m-few-0.3", "2m-few-1", "sde1", "3m-sde")
    }
    assert {name for name, plan in plans.items() if plan.needs_x_0_prev2} == {"3m", "3m-few", "3m-sde"}
    levels = {name: (1 / plans[name].alpha_bars[[0, -1]] - 1).sqrt().tolist() for name in ("2m-few", "2m-fewer")}
    assert levels == {"2m-few": pytest.approx([80, 0.06]), "2m-fewer": pytest.approx([40, 0.06])}


def test_the_weights_hash_sees_each_weight():
    model = torch.nn.Linear(2, 2)
    other = copy.deepcopy(model)
    assert quality.weights_hash(model) == quality.weights_hash(other)
    torch.nn.init.constant_(other.bias[1:], 9)
    assert quality.weights_hash(model) != quality.weights_hash(other)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[dict[str, Any], str]]:
    """Run the script with 16 images, a random classifier of 8 features and 40 random test images."""
    monkeypatch.setitem(quality.RECIPE, "features", 8)
    monkeypatch.setattr(quality, "LEAST_ACCURACY", 0.0)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (80, 1, 32, 32), dtype=torch.uint8, generator=generator)
    items = [Item(image, number % 10) for number, image in enumerate(images)]
    monkeypatch.setattr(quality, "load_dataset", lambda *_, **__: items)
    torch.manual_seed(0)
    quality.save_classifier(tmp_path / "classifier", quality.Classifier())
    out = tmp_path / "results.json"

    def run(*arguments: str) -> tuple[dict[str, Any], str]:
        options = ["--num", "16", "--batch", "8", "--out", str(out), "--classifier", str(tmp_path / "classifier")]
        quality.main([*options, *arguments])
        results: dict[str, Any] = json.loads(out.read_text())
        assert len(results) == 1
        return next(iter(results.values())), out.read_text()

    return run


def test_a_run_writes_the_figures_of_the_functions(tmp_path: Path, small: Callable[..., tuple[dict[str, Any], str]]):
    section, _ = small("--samplers", "sde", "ddpm:3", "--evaluations", "4", "--seeds", "3")
    rows = {(row["name"], row["evaluations"]): row for row in section["rows"]}
    # 40 real images are two sets of 16, which are disjoint
    assert {key: row["seeds"] for key, row in rows.items()} == {
        ("real", None): [0, 1],
        ("ddpm", 3): [0, 1, 2],
        ("sde", 4): [0, 1, 2],
    }
    assert {"device", "torch", "commit", "classifier", "options"} <= set(section["machine"])

    loaded = load_builtin()
    classifier = quality.load_classifier(tmp_path / "classifier")
    test_images, labels, _ = read_batch(quality.load_dataset("fashion-mnist"), range(80))
    real, reference = (quality.measure(classifier, test_images[half]) for half in quality.split_real(labels))
    sampler, wanted = loaded.sampler(dpm_solver_plan(loaded.objective, 4, eta=1.0)), torch.arange(16) % 10
    drawn = [sampler(16, seed=seed, batch_size=8, class_labels=wanted) for seed in range(3)]
    ours = [quality.measure(classifier, ddpm_fast.to_uint8(images)) for images in drawn]
    floor = [quality.Measured(real.predicted[i : i + 16], real.features[i : i + 16]) for i in (0, 16)]
    for row, sets, first in ((rows["sde", 4], ours, 0), (rows["real", None], floor, 16)):
        distances = [ddpm_fast.frechet_distance(each.features, reference.features) for each in sets]
        accuracies = [each.accuracy(torch.arange(i * first, i * first + 16) % 10) for i, each in enumerate(sets)]
        assert row[quality.DISTANCE]["by seed"] == pytest.approx(distances, rel=1e-3)
        assert row[quality.DISTANCE]["mean"] == pytest.approx(statistics.fmean(distances), rel=1e-3)
        assert row[quality.DISTANCE]["std"] == pytest.approx(statistics.stdev(distances), rel=2e-2)
        assert row["accuracy"]["by seed"] == pytest.approx(accuracies, rel=1e-3)
    assert rows["sde", 4]["s/image"]["median"] > 0
    assert rows["real", None]["s/image"] is None


def test_a_run_continues(small: Callable[..., tuple[dict[str, Any], str]], monkeypatch: pytest.MonkeyPatch):
    drawn: list[tuple[str, int]] = []
    build = quality.build_draw

    def build_draw(loaded: Any, name: str, evaluations: int, *rest: Any) -> quality.Draw:
        draw = build(loaded, name, evaluations, *rest)

        def watched(seeds: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            drawn.append((name, evaluations))
            if len(drawn) == 4:  # the second batch of the second sampler
                raise RuntimeError("stopped")
            return draw(seeds, labels)

        return watched

    monkeypatch.setattr(quality, "build_draw", build_draw)
    arguments = ["--samplers", "ddpm:2", "ddim:3", "--seeds", "1"]
    with pytest.raises(RuntimeError, match="stopped"):
        small(*arguments)
    section, text = small(*arguments)
    assert drawn[4:] == [("ddim", 3)] * 2  # ddpm:2 was there
    assert [row["name"] for row in section["rows"]] == ["real", "ddpm", "ddim"]
    assert small(*arguments)[1] == text
    small("--samplers", "ddpm:2", "--seeds", "2")
    assert drawn[6:] == [("ddpm", 2)] * 2  # seed 1 alone
    section, _ = small("--samplers", "ddpm:2", "--seeds", "1", "--batch", "16")
    assert drawn[8:] == [("ddpm", 2)]  # another option measures again
    assert [row["name"] for row in section["rows"]] == ["real", "ddpm"]


def test_guidance_reaches_the_sampler_and_has_a_section_of_its_own(
    small: Callable[..., tuple[dict[str, Any], str]], monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    loaded, seeds, labels = load_builtin(), sample_seeds(0, 2), torch.tensor([3, 9])
    drawn = quality.build_draw(loaded, "2m-few", 4, torch.float32, "cpu", 2.0)(seeds, labels)
    plan = dpm_solver_plan(loaded.objective, 4, solver="heun", spacing="karras", sigma_min=0.06, sigma_max=80.0)
    expected = loaded.sampler(plan)(2, seed=seeds, class_labels=labels, guidance_scale=2.0, progress=False)
    assert torch.equal(drawn, expected)
    scales, build = [], quality.build_draw
    monkeypatch.setattr(quality, "build_draw", lambda *arguments: scales.append(arguments[-1]) or build(*arguments))
    section, _ = small("--guidance", "2", "--samplers", "ddpm:2", "diffusers-2m", "--seeds", "1")
    assert scales == [2.0]
    assert [row["name"] for row in section["rows"]] == ["real", "ddpm"]
    assert "left out: diffusers-2m: its pipeline has no guidance" in capsys.readouterr().out


def test_the_table_and_the_plot_come_from_the_results(
    tmp_path: Path, small: Callable[..., tuple[dict[str, Any], str]], monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit, match="to have the section"):
        small("--table")
    section, text = small("--samplers", "ddpm:2", "ddpm:3", "sde:2", "--seeds", "2")
    monkeypatch.setattr(quality, "build_draw", None)
    capsys.readouterr()
    assert small("--table", "--plot", str(tmp_path / "plot.png"))[1] == text
    lines = [line.split("|")[1:3] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    names = ["ancestral (eq. 13)", "ancestral (eq. 13)", "DPM-Solver++(2M) SDE", "real images"]
    assert [[cell.strip() for cell in line] for line in lines[2:]] == [
        list(pair) for pair in zip(names, ["2", "3", "2", ""], strict=True)
    ]
    small("--table", "--samplers", "ddpm:3")
    assert "(eq. 13) | 2 |" not in capsys.readouterr().out

    lines = quality.plot(section["rows"], "title").axes[0].lines
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in lines]
    means = {(row["name"], row["evaluations"]): row[quality.DISTANCE]["mean"] for row in section["rows"]}
    assert ([2, 3], [means["ddpm", 2], means["ddpm", 3]]) in drawn
    assert [means["real", None]] * 2 in [y for _, y in drawn]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers warns
@pytest.mark.parametrize(
    ("peer", "ours", "options"),
    [
        ("diffusers-ddim", ddpm_fast.ddim_plan, {"use_clipped_model_output": False}),
        ("diffusers-2m", ddpm_fast.dpm_solver_plan, {"clip": None}),
        ("diffusers-ddpm", ddpm_fast.ddpm_plan, {}),
        ("diffusers-sde", ddpm_fast.dpm_solver_plan, {"clip": None, "eta": 1.0}),
    ],
)
def test_diffusers_draws_the_images_of_the_same_weights_and_classes(peer: str, ours: Any, options: dict[str, Any]):
    pytest.importorskip("diffusers")
    loaded = load_builtin()
    labels, seeds = torch.tensor([1, 9]), ddpm_fast.sample_seeds(3, 2)
    got = peers.SAMPLING[peer].build(loaded, 4, torch.float32, "cpu")(seeds, labels)
    generator = torch.Generator().manual_seed(int(seeds[0]))
    x = torch.randn(2, 1, 32, 32, generator=generator)
    plan = ours(loaded.objective.schedule, 4, **options)
    x_0_prev = torch.zeros_like(x)
    network = ddpm_fast.freeze(loaded.model)
    with torch.inference_mode():
        for step, t in enumerate(plan.timesteps.tolist()):
            output = network(x, torch.full((2,), t), labels)
            draws = plan.is_random and t > 0
            noise = torch.randn(2, 1, 32, 32, generator=generator) if draws else torch.zeros_like(x)
            history = {"x_0_prev": x_0_prev} if plan.needs_x_0_prev else {}
            x, x_0_prev = ddpm_fast.reverse_step(x, output, step, plan, noise=noise, return_x_0=True, **history)
    assert float((got - x).abs().max()) < 1e-3


def test_a_model_of_other_classes_is_refused(monkeypatch: pytest.MonkeyPatch):
    loaded = load_builtin()
    monkeypatch.setattr(quality, "load_builtin", lambda device: loaded)
    monkeypatch.setitem(loaded.model.config, "class_names", [])
    with pytest.raises(
        ValueError, match=r"expected a model of 1x32x32 images with Fashion-MNIST's 10 classes, .*got 1 channels"
    ):
        quality.load_model("builtin", "cpu")
