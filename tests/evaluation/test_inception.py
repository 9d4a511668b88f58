"""Features of Inception in fixed blocks, their files and moments, and the figures that `evaluate fid` prints of them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
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
from ddpm_fast.evaluation import Moments, inception
from ddpm_fast.evaluation.inception import Inception, load_inception, moments, read_features, write_features

CPU = torch.device("cpu")


def pixels(count: int, channels: int = 3, size: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, channels, size, size), dtype=torch.uint8, generator=generator)


class Small(nn.Module):
    """A network with Inception's shapes, which reads blocks of 32 images."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3 * 4 * 4, inception.FEATURES, generator=generator))
        self.calls = 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert x.dtype == torch.uint8
        assert x.shape[:2] == (32, 3)
        self.calls += 1
        pooled = nn.functional.adaptive_avg_pool2d(x.float() / 255, 4).flatten(1)
        features = (pooled @ self.weight).relu()
        return features, features[:, :50]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Inception:
    monkeypatch.setattr(inception, "FEATURES", 64)
    return Inception(Small(), "f" * 64)


def written(small: Inception, images: Tensor, folder: Path, processes: Processes | None = None) -> list[Path]:
    folder.mkdir(exist_ok=True)

    def read(part: range) -> Tensor:
        return images[part.start : part.stop]

    return write_features(small, folder, len(images), read, processes or Processes(), progress=False)


def test_features_are_kept_and_not_computed_again(small: Inception, tmp_path: Path) -> None:
    images = pixels(300)
    files = written(small, images, tmp_path)
    assert len(files) == 2
    calls = small.network.calls
    assert calls == 8 + 2
    assert written(small, images, tmp_path) == files
    assert small.network.calls == calls
    files[1].unlink()  # as if the run had been stopped
    assert written(small, images, tmp_path) == files
    assert small.network.calls == calls + 2
    one_by_one = torch.cat([small(image[None])["features"] for image in images[250:260]])
    torch.testing.assert_close(read_features(files)[250:260], one_by_one, rtol=0, atol=0)
    other = Inception(small.network, "0" * 64)  # other weights
    assert not set(written(other, images, tmp_path)) & set(files)


def test_a_damaged_file_is_written_again(small: Inception, tmp_path: Path) -> None:
    images = pixels(300)
    files = written(small, images, tmp_path)
    content = files[0].read_bytes()
    for damaged in (content[:-1] + bytes([content[-1] ^ 1]), content[:-1], b"", content[:100]):
        files[0].write_bytes(damaged)
        assert written(small, images, tmp_path) == files
        assert files[0].read_bytes() == content


def test_features_that_are_not_finite_are_refused_and_not_kept(small: Inception, tmp_path: Path) -> None:
    with torch.no_grad():
        small.network.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="expected inception to give finite features of images 0 to 9, got NaN or infinity"):
        written(small, pixels(10), tmp_path)
    assert [*tmp_path.iterdir()] == []


def test_grey_images_are_those_with_three_equal_channels(small: Inception) -> None:
    grey = pixels(40, 1)
    for mine, theirs in zip(small(grey).values(), small(grey.repeat(1, 3, 1, 1)).values(), strict=True):
        assert torch.equal(mine, theirs)


def test_two_processes_write_the_files_of_one(small: Inception, tmp_path: Path) -> None:
    images, names = pixels(700), dict[int, list[str]]()

    class Two(Processes):
        def from_all(self, value: Any) -> list[Any]:
            names[self.rank] = value
            return [names[0], value] if self.rank else [value, [""]]

    alone = written(small, images, tmp_path / "one")
    written(small, images, tmp_path / "two", Two(0, 2))  # does not yet know the files of the second
    together = written(small, images, tmp_path / "two", Two(1, 2))
    assert [file.name for file in together] == [file.name for file in alone]
    assert [file.read_bytes() for file in together] == [file.read_bytes() for file in alone]


def test_moments_are_those_of_all_features(small: Inception, tmp_path: Path) -> None:
    files = written(small, pixels(900), tmp_path)
    features, found = read_features(files).double(), moments(files)
    # Sums in float64, in another order.
    torch.testing.assert_close(found.mean, features.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.cov, torch.cov(features.T), rtol=1e-9, atol=1e-11)


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
def test_features_are_those_of_torch_fidelity(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image has the same bits in each block, as blocks have one size."""
    monkeypatch.setattr(inception, "_BLOCK", 4)
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3("test", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights))
    ours, images = load_inception("evaluate", weights, CPU), pixels(5, size=16)
    assert ours.digest == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert not ours.is_standard
    with torch.no_grad():
        expected = theirs(images)
    found = ours(images)
    assert found["features"].std(dim=0).mean() > 0.003  # far above the tolerance
    for mine, other in zip(found.values(), expected, strict=True):  # float32, in blocks of another size
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    assert torch.equal(ours(images[4:])["features"], found["features"][4:])


def test_weights_with_nan_are_refused(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    state["fc.bias"][3] = torch.nan
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(ValueError, match=r"expected the tensors in '.*nan\.pth' to be finite, got NaN or infinity in fc\.bias"):
        load_inception("evaluate", tmp_path / "nan.pth", CPU)


def test_weights_that_cannot_be_had_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch_fidelity")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    place = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(
        OSError, match=rf"evaluate: expected .* in '{place}' or from https://github\.com/.* SHA-256 begins with"
    ):
        load_inception("evaluate", None, CPU)
    place.write_bytes(b"another")
    with pytest.raises(
        ValueError, match=r"expected '.*6726825d\.pth' to have a SHA-256 that begins with 6726825d, got [0-9a-f]{64}"
    ):
        load_inception("evaluate", None, CPU)
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"expected '.*other\.pth' to hold torch-fidelity's weights of Inception, got Error"):
        load_inception("evaluate", tmp_path / "other.pth", CPU)


# ------------------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def place(small: Inception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two sets of 2,100 images, and a network that is quick."""
    pytest.importorskip("torch_fidelity")
    monkeypatch.setattr(inception, "load_inception", lambda *_: small)
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a", 0), ("b", 1)):
        np.savez(f"{name}.npz", pixels(2100, seed=seed).permute(0, 2, 3, 1).numpy())
    return tmp_path


def test_images_are_compared_with_others_and_with_moments(small: Inception, place: Path) -> None:
    text = run("evaluate", "fid", "b.npz", "a.npz", "--json=figures.json", "--quiet")
    assert text == ""
    found = json.loads(Path("figures.json").read_text())
    of_a, of_b = (read_features(written(small, pixels(2100, seed=seed), place / "again")) for seed in (0, 1))
    assert found["frechet_distance"] == pytest.approx(frechet_distance(of_a, of_b), rel=1e-6)  # roots of eigenvalues near 0
    assert found | {"num": 2100, "reference_num": 2100, "inception": "f" * 64, "size": [8, 8]} == found
    np.savez("moments.npz", mu=of_b.double().mean(0).numpy(), sigma=torch.cov(of_b.double().T).numpy())
    text = run("evaluate", "fid", "moments.npz", "a.npz", "--json=figures.json")
    again = json.loads(Path("figures.json").read_text())
    assert again["frechet_distance"] == pytest.approx(found["frechet_distance"], rel=1e-6)
    assert again["inception_score_mean"] == found["inception_score_mean"]
    assert not [key for key in again if key.startswith("kernel")]
    assert f"Frechet distance {again['frechet_distance']:.4f}, Inception Score " in text
    assert (
        "2100 images of a.npz and the moments in moments.npz; 8x8 resized to 299x299 by torch-fidelity, weights ffffffff"
        in text
    )
    assert "they are of another extractor" in text


def test_few_images_have_a_distance_that_is_not_called_fid(small: Inception, place: Path) -> None:
    for name, seed in (("few", 2), ("fewer", 3)):
        np.savez(f"{name}.npz", pixels(60 - 10 * seed, seed=seed).permute(0, 2, 3, 1).numpy())
    text = run("evaluate", "fid", "few.npz", "fewer.npz", "--json=figures.json")
    found = json.loads(Path("figures.json").read_text())
    assert re.search(r"Frechet distance \S+, KID \S+: 30 images of fewer.npz and 40 of few.npz", text)
    assert "FID needs 65 images in each set, because the covariance of 64 features needs as many." in text
    of_few, of_fewer = (
        read_features(written(small, pixels(60 - 10 * seed, seed=seed), place / "again")).double() for seed in (2, 3)
    )
    expected = frechet_distance(*(Moments(each.mean(0), torch.cov(each.T)) for each in (of_few, of_fewer)))
    assert found["frechet_distance"] == pytest.approx(expected, rel=1e-6)


def test_a_models_images_are_drawn_first(small: Inception, place: Path) -> None:
    save_model(Path("model"), tiny_unet(), NoiseSchedule.linear(50))
    (Path("model") / "plan.json").write_text('{"builder": "ddim_plan", "arguments": {"num_steps": 1}}')
    np.savez("grey.npz", pixels(2100, 1).permute(0, 2, 3, 1).numpy())
    arguments = ["grey.npz", "drawn.npz", "--model=model", "--num=2050", "--seed=3", "--json=figures.json"]
    text = run("evaluate", "fid", *arguments, "--dtype=float64")
    assert json.loads(Path("figures.json").read_text())["dtype"] == "float64"
    assert json.loads(zipfile.ZipFile("drawn.npz").comment)["dtype"] == "float64"
    assert "2050 images of drawn.npz and 2100 of grey.npz" in text
    assert "; model, 1 steps (the model's plan), seed 3" in text
    assert np.load("drawn.npz")["arr_0"].shape == (2050, 8, 8, 1)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["b.npz"], "Missing argument 'IMAGES'"),
        (["b.npz", "few.npz"], "IMAGES to have 2 images or more, got 1"),
        (["few.npz", "a.npz"], "REFERENCE to have 2 images or more, got 1"),
        (["b.npz", "a.npz", "--num=1"], "IMAGES to have 2 images or more, got 1"),
        (["b.npz", "a.npz", "--num=2101"], "IMAGES to have 2101 images or more, got 2100"),
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
            ["moments.npz", "a.npz"],
            r"REFERENCE to have finite floats mu \[64\] and sigma \[64, 64\], got float64 \[3\] and float64 \[3, 3\]",
        ),
        (
            ["wide.npz", "new", "--model=model"],
            r"--model to draw \(8, 9\) pixels as REFERENCE has, got \(1, 8, 8\)",
        ),
    ],
)
def test_what_cannot_be_compared_is_named_before_any_work(
    arguments: list[str], wanted: str, small: Inception, place: Path
) -> None:
    save_model(Path("model"), tiny_unet(), NoiseSchedule.linear(50))
    save_model(Path("conditional"), tiny_unet(in_channels=2), NoiseSchedule.linear(50))
    Path("sizes").mkdir()
    for side in (8, 9):
        Image.new("L", (side, 8)).save(f"sizes/{side}.png")
    shapes: dict[str, Any] = {"few": (1, 8, 8, 3), "wide": (2100, 8, 9, 3), "alpha": (2100, 8, 8, 4)}
    for name, shape in shapes.items():
        np.savez(f"{name}.npz", np.zeros(shape, np.uint8))
    np.savez("numbers.npz", np.linspace(0, 1, 2100 * 192, dtype=np.float32).reshape(2100, 8, 8, 3))
    np.savez("moments.npz", mu=np.zeros(3), sigma=np.zeros((3, 3)))
    assert re.search(wanted, " ".join(run("evaluate", "fid", *arguments, code=2).split()))
    assert small.network.calls == 0
    assert not Path("new").exists()


FEW = """
import sys, json, torch
from pathlib import Path
from ddpm_fast.distributed import joined
from ddpm_fast.evaluation import inception

inception._BLOCK, inception._PART = 4, 8
network = inception.load_inception("evaluate", sys.argv[1], torch.device("cpu"))
images = torch.randint(256, (20, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
with joined("evaluate") as processes:
    read = lambda part: images[part.start : part.stop]
    files = inception.write_features(network, Path(sys.argv[2]), len(images), read, processes)
    if processes.is_first:
        torch.save(tuple(inception.moments(files)), sys.argv[3])
"""


@pytest.mark.slow
def test_a_process_alone_and_two_under_torchrun_find_the_same_bits(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "few.py").write_text(FEW)
    environment, found = os.environ | {"OMP_NUM_THREADS": "1"}, []
    for count in (1, 2):
        (tmp_path / f"of{count}").mkdir()
        launch = [] if count == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command = [sys.executable, *launch, "few.py", weights, f"of{count}", f"{count}.pt"]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
        files = {file.name: file.read_bytes() for file in (tmp_path / f"of{count}").iterdir()}
        found.append((files, torch.load(tmp_path / f"{count}.pt", weights_only=True)))
    assert found[0][0] == found[1][0]
    assert len(found[0][0]) == 3
    assert all(map(torch.equal, found[0][1], found[1][1]))
