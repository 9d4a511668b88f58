"""Features of Inception, the figures that torchmetrics computes of them, and the command that prints them."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import run, save_model
from drawing import tiny_unet
from PIL import Image
from torch import Tensor, nn

from ddpm_fast import NoiseSchedule, frechet_distance
from ddpm_fast.distributed import Processes
from ddpm_fast.evaluation import inception
from ddpm_fast.evaluation.inception import STANDARD, inception_scores, load_inception

CPU = torch.device("cpu")


def pixels(count: int, channels: int = 3, size: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, channels, size, size), dtype=torch.uint8, generator=generator)


class Small(nn.Module):
    """A quick network with Inception's outputs."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3 * 4 * 4, 64, generator=generator))
        self.calls = 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert x.dtype == torch.uint8
        assert x.shape[1] == 3
        self.calls += 1
        pooled = nn.functional.adaptive_avg_pool2d(x.float() / 255, 4).flatten(1)
        features = (pooled @ self.weight).relu()
        return features, features[:, :50]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Small:
    pytest.importorskip("torchmetrics")
    monkeypatch.setattr(inception, "FEATURES", 64)
    monkeypatch.setattr(inception._Features, "num_features", 64)
    return Small()


def reading(images: Tensor) -> Callable[[range], Tensor]:
    return lambda part: images[part.start : part.stop]


def scores(network: nn.Module, a: Tensor, b: Tensor, batch_size: int = 50) -> dict[str, float]:
    sets: Any = (reading(a), reading(b), (len(a), len(b)))
    return inception_scores(network, *sets, Processes(), batch_size=batch_size, device=CPU, progress=False)


def test_figures_are_those_of_their_definitions(small: Small) -> None:
    """The figures that this package computed itself before, by `frechet_distance` and torch-fidelity's functions."""
    metric_kid = pytest.importorskip("torch_fidelity.metric_kid")
    metric_isc = pytest.importorskip("torch_fidelity.metric_isc")
    a, b = pixels(500), pixels(600, seed=1)
    found = scores(small, a, b)
    with torch.no_grad():
        (of_a, logits), (of_b, _) = small(a), small(b)
    assert found["frechet_distance"] == pytest.approx(frechet_distance(of_a, of_b), rel=1e-4)
    kid = metric_kid.kid_features_to_metric(of_a, of_b, kid_subset_size=500, verbose=False)
    # All of a and 500 of b are compared each time. Which those are is drawn.
    name = "kernel_inception_distance_mean"
    assert found[name] == pytest.approx(kid[name], abs=4 * kid["kernel_inception_distance_std"] / math.sqrt(100) + 1e-9)
    score = metric_isc.isc_features_to_metric(logits)
    assert found["inception_score_mean"] == pytest.approx(score["inception_score_mean"], rel=0.02)
    assert scores(small, a, a)["frechet_distance"] == pytest.approx(0, abs=1e-5)


def test_figures_do_not_depend_on_the_batch_or_on_generators(small: Small) -> None:
    a, b = pixels(90), pixels(80, seed=1)
    first = scores(small, a, b)
    torch.rand(3)
    assert scores(small, a, b, batch_size=7) == pytest.approx(first, rel=1e-6)


def test_grey_images_are_those_with_three_equal_channels(small: Small) -> None:
    grey, others = pixels(40, 1), pixels(40, seed=1)
    assert scores(small, grey, others) == scores(small, grey.repeat(1, 3, 1, 1), others)


def test_few_images_have_no_inception_score(small: Small) -> None:
    assert {*scores(small, pixels(64), pixels(65))} == {
        "frechet_distance",
        "kernel_inception_distance_mean",
        "kernel_inception_distance_std",
    }


def test_features_that_are_not_finite_are_refused(small: Small) -> None:
    with torch.no_grad():
        small.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"expected inception to give finite features of images 0 to 49, got NaN or infinity"):
        scores(small, pixels(60), pixels(60))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of weights of the network's shapes, which are drawn from a seed."""
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    file = tmp_path_factory.mktemp("weights") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(extractor, "load_state_dict", lambda *_: None)
        state = extractor("test", ["2048"], feature_extractor_weights_path="").state_dict()
    generator = torch.Generator().manual_seed(0)
    for name, weight in state.items():  # large enough to keep the features of different images apart
        if name.endswith("weight") and weight.dim() > 1:
            state[name] = torch.randn(weight.shape, generator=generator) * (2 / weight[0].numel()) ** 0.5
    torch.save(state, file)
    return file


@pytest.mark.slow
def test_features_are_those_of_torch_fidelity(weights: Path) -> None:
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    theirs = extractor("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights))
    images = pixels(4, size=32)
    with torch.no_grad():
        for mine, wanted in zip(load_inception(weights, CPU)[0](images), theirs(images), strict=True):
            assert torch.equal(mine, wanted)


def test_weights_that_would_run_code_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity")
    torch.save({"weight": Path("not a tensor")}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"expected .*weights.pth' to hold tensors and plain values, got a pathlib"):
        load_inception(tmp_path / "weights.pth", CPU)


def test_weights_that_cannot_be_had_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        OSError, match=r"^expected the weights of Inception from https://github\.com/.*; put them at .*pth or pass"
    ):
        load_inception(None, CPU)
    cached = tmp_path / "checkpoints" / Path(fidelity.URL_INCEPTION_V3).name
    torch.save({"weight": torch.ones(2)}, cached)
    with pytest.raises(ValueError, match=r"^expected '.*pth' to have a SHA-256 that begins with 6726825d, got "):
        load_inception(None, CPU)
    with pytest.raises(ValueError, match=r"^expected '.*pth' to hold torch-fidelity's weights of Inception, got Error"):
        load_inception(cached, CPU)


# ------------------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def place(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two sets of 300 images, and a network that is quick."""
    monkeypatch.setattr(inception, "load_inception", lambda file, _: (small, "f" * 64 if file else STANDARD + "f" * 56))
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a", 0), ("b", 1)):
        np.savez(f"{name}.npz", pixels(300, seed=seed).permute(0, 2, 3, 1).numpy())
    return tmp_path


def test_images_are_compared_with_others(small: Small, place: Path) -> None:
    text = run("evaluate", "fid", "b.npz", "a.npz", "--json=figures.json", "--quiet")
    assert text == ""
    found = json.loads(Path("figures.json").read_text())
    assert found | scores(small, pixels(300), pixels(300, seed=1), 64) == found
    assert found | {"num": 300, "reference_num": 300, "inception": STANDARD + "f" * 56, "size": [8, 8]} == found
    text = run("evaluate", "fid", "b.npz", "a.npz")
    figures = [found[name] for name in ("frechet_distance", "kernel_inception_distance_mean", "inception_score_mean")]
    assert "FID {:.4f}, KID {:.6f}, Inception Score {:.3f}: ".format(*figures) in text
    assert "300 images of a.npz and 300 of b.npz; 8x8 resized to 299x299 by torch-fidelity, weights 6726825d" in text


def test_few_images_have_a_distance_that_is_not_called_fid(place: Path) -> None:
    text = run("evaluate", "fid", "b.npz", "a.npz", "--num=30")
    assert re.search(r"Frechet distance \S+, KID \S+: 30 images of a.npz and 300 of b.npz", text)
    assert "FID needs 65 images in each set, because the covariance of 64 features needs as many." in text


def test_other_weights_give_a_distance_that_is_not_called_fid(place: Path) -> None:
    Path("mine.pth").touch()
    text = run("evaluate", "fid", "b.npz", "a.npz", "--inception=mine.pth")
    assert "Frechet distance " in text
    assert "FID" not in text
    assert "weights ffffffff" in text


def test_a_models_images_are_drawn_first(place: Path) -> None:
    save_model(Path("model"), tiny_unet(), NoiseSchedule.linear(50))
    (Path("model") / "plan.json").write_text('{"builder": "ddim_plan", "arguments": {"num_steps": 1}}')
    np.savez("grey.npz", pixels(300, 1).permute(0, 2, 3, 1).numpy())
    arguments = ["grey.npz", "drawn.npz", "--model=model", "--num=250", "--seed=3", "--json=figures.json"]
    text = run("evaluate", "fid", *arguments, "--dtype=float64")
    assert json.loads(Path("figures.json").read_text())["dtype"] == "float64"
    assert json.loads(zipfile.ZipFile("drawn.npz").comment)["dtype"] == "float64"
    assert "250 images of drawn.npz and 300 of grey.npz" in text
    assert "; model, 1 steps (the model's plan), seed 3" in text
    assert np.load("drawn.npz")["arr_0"].shape == (250, 8, 8, 1)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["b.npz"], "Missing argument 'IMAGES'"),
        (["b.npz", "few.npz"], "IMAGES to have 2 images or more, got 1"),
        (["few.npz", "a.npz"], "REFERENCE to have 2 images or more, got 1"),
        (["b.npz", "a.npz", "--num=1"], "IMAGES to have 2 images or more, got 1"),
        (["b.npz", "a.npz", "--num=301"], "IMAGES to have 301 images or more, got 300"),
        (
            ["b.npz", "nothing.npz"],
            "IMAGES to be a folder or an .npz of images, got 'nothing.npz', which does not exist",
        ),
        (["b.npz", "sizes"], "IMAGES to have images of one size, got None with sizes"),
        (["b.npz", "wide.npz"], r"IMAGES to have \[8, 8\] pixels as REFERENCE, got \[8, 9\]"),
        (
            ["b.npz", "numbers.npz"],
            "IMAGES to be pictures of 256 levels, grey or in RGB, got 3 channels of torch.float32",
        ),
        (["b.npz", "alpha.npz"], "IMAGES to be pictures of 256 levels, grey or in RGB, got 4 channels"),
        (
            ["wide.npz", "new", "--model=model"],
            r"--model to draw \(8, 9\) pixels as REFERENCE has, got \(1, 8, 8\)",
        ),
    ],
)
def test_what_cannot_be_compared_is_named_before_any_work(arguments: list[str], wanted: str, small: Small, place: Path) -> None:
    save_model(Path("model"), tiny_unet(), NoiseSchedule.linear(50))
    save_model(Path("conditional"), tiny_unet(in_channels=2), NoiseSchedule.linear(50))
    Path("sizes").mkdir()
    for side in (8, 9):
        Image.new("L", (side, 8)).save(f"sizes/{side}.png")
    shapes: dict[str, Any] = {"few": (1, 8, 8, 3), "wide": (300, 8, 9, 3), "alpha": (300, 8, 8, 4)}
    for name, shape in shapes.items():
        np.savez(f"{name}.npz", np.zeros(shape, np.uint8))
    np.savez("numbers.npz", np.linspace(0, 1, 300 * 192, dtype=np.float32).reshape(300, 8, 8, 3))
    assert re.search(wanted, " ".join(run("evaluate", "fid", *arguments, code=2).split()))
    assert small.calls == 0
    assert not Path("new").exists()


FEW = """
import json, sys, torch
from pathlib import Path
from ddpm_fast.distributed import joined
from ddpm_fast.evaluation.inception import inception_scores

weight = torch.randn(192, 2048, generator=torch.Generator().manual_seed(0))

def network(images):
    features = (images.float().flatten(1) / 255 @ weight).relu()
    return features, features[:, :50]

sets = [torch.randint(256, (n, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(n)) for n in (501, 1200)]
reads = [lambda part, each=each: each[part.start : part.stop] for each in sets]
with joined() as processes:
    found = inception_scores(network, *reads, (501, 1200), processes, batch_size=64, device=torch.device("cpu"))
    if processes.is_first:
        Path(sys.argv[1]).write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_a_process_alone_and_two_under_torchrun_find_the_same(tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    (tmp_path / "few.py").write_text(FEW)
    environment, found = os.environ | {"OMP_NUM_THREADS": "1"}, []
    for count in (1, 2):
        launch = [] if count == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command = [sys.executable, *launch, "few.py", f"{count}.json"]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
        found.append(json.loads((tmp_path / f"{count}.json").read_text()))
    assert found[1] == pytest.approx(found[0], rel=1e-6)
