"""Two judges of images: small networks whose features the Frechet distance compares, trained once from fixed recipes.

- The class judge names the garment. Its features tell shapes apart, and hardly see noise.
- The grain judge tells how much noise and blur was added to an image. Its features see what the class judge does not.

Their files are in the user's cache, under the digest of their recipe. `python benchmarks/judges.py` trains those that are
missing, in four minutes on two cores. Compare figures only if they have the same number of images and the same judge file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from ddpm_fast import frechet_distance
from ddpm_fast.data.items import read_batch, to_unit_range
from ddpm_fast.data.load import load_dataset
from ddpm_fast.data.options import DataOptions
from ddpm_fast.data.published import FASHION_MNIST_CLASSES
from ddpm_fast.files.writing import replacing

CLASSES: Final = len(FASHION_MNIST_CLASSES)
# All that decides a judge's weights, up to rounding. The digest names its file, so raise `version` if the code changes.
CLASS_RECIPE: Final[dict[str, Any]] = {
    "version": 1,
    "data": "fashion-mnist, 32x32",
    "channels": [24, 48, 96],
    "features": 64,
    "epochs": 4,
    "batch": 128,
    "optimizer": "AdamW",
    "peak_learning_rate": 4e-3,
    "weight_decay": 0.05,
    "seed": 0,
}
GRAIN_RECIPE: Final[dict[str, Any]] = {
    "version": 1,
    "data": "fashion-mnist, 32x32",
    "channels": [16, 32, 32],
    "features": 32,
    "noise": [0.003, 0.3],  # standard deviations, of images in [-1, 1]; their logarithm is uniform
    "blur": [0.0, 1.5],  # standard deviations of a Gaussian kernel, in pixels; uniform
    "epochs": 2,
    "batch": 64,
    "optimizer": "AdamW",
    "peak_learning_rate": 4e-3,
    "weight_decay": 0.05,
    "seed": 0,
}
LEAST: Final = {"class": 0.91, "grain": 0.9}
"""Scores on test images below which a judge is too weak: accuracy, and the smaller R^2 of noise and blur."""


class ClassJudge(nn.Module):
    """A small CNN for grey 32x32 images in [-1, 1]. It returns logits [N, 10] and penultimate features [N, 64]."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (1, *CLASS_RECIPE["channels"])
        layers: list[nn.Module] = []
        for before, channels in pairwise(sizes):
            layers += [*_convolution(before, channels), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(sizes[-1] * 4 * 4, CLASS_RECIPE["features"]), nn.ReLU())
        self.head = nn.Linear(CLASS_RECIPE["features"], CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(images)
        return self.head(features), features


class GrainJudge(nn.Module):
    """A CNN for grey images in [-1, 1] that pools after its last convolution alone, so that it sees single pixels.

    It returns its estimates of noise and blur, in [-1, 1] over their ranges, [N, 2], and penultimate features [N, 32].
    """

    def __init__(self) -> None:
        super().__init__()
        sizes = (1, *GRAIN_RECIPE["channels"])
        layers = [layer for pair in pairwise(sizes) for layer in _convolution(*pair)]
        pooling = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.body = nn.Sequential(*layers, *pooling, nn.Linear(sizes[-1], GRAIN_RECIPE["features"]), nn.ReLU())
        self.head = nn.Linear(GRAIN_RECIPE["features"], 2)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(images)
        return self.head(features), features


def _convolution(before: int, channels: int) -> list[nn.Module]:
    return [nn.Conv2d(before, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]


class Measured(NamedTuple):
    """Outputs of the head, and penultimate features, float64 [N, D], of a set of images."""

    outputs: Tensor
    features: Tensor

    def accuracy(self, labels: Tensor) -> float:
        """Return the share of images that the class judge predicts as `labels`, int64 [N]."""
        return float((self.outputs.argmax(1) == labels).double().mean())


def measure(judge: nn.Module, images: Tensor, batch: int = 500) -> Measured:
    """Apply a judge to uint8 images [N, 1, 32, 32]."""
    judge.eval()
    with torch.inference_mode():
        parts = [judge(to_unit_range(chunk)) for chunk in images.split(batch)]
    return Measured(torch.cat([outputs for outputs, _ in parts]), torch.cat([f for _, f in parts]).double())


def disturbed(images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return images [N, 1, H, W] in [-1, 1] with noise and blur of random strengths, and these strengths, [N, 2] in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    strengths = torch.rand(len(images), 2, generator=generator)
    low, high = map(math.log, GRAIN_RECIPE["noise"])
    noise = (low + (high - low) * strengths[:, 0]).exp()
    blur = GRAIN_RECIPE["blur"][0] + (GRAIN_RECIPE["blur"][1] - GRAIN_RECIPE["blur"][0]) * strengths[:, 1]
    offsets = torch.arange(-4.0, 5.0)
    kernel = (-(offsets**2) / (2 * blur.clamp(min=0.05)[:, None] ** 2)).exp()  # [N, 9]
    kernel = kernel / kernel.sum(1, keepdim=True)
    n, _, height, width = images.shape
    x = functional.pad(images.view(1, n, height, width), (4, 4, 4, 4), mode="replicate")
    x = functional.conv2d(x, kernel.view(n, 1, 9, 1), groups=n)
    x = functional.conv2d(x, kernel.view(n, 1, 1, 9), groups=n).view(n, 1, height, width)
    x = x + noise.view(-1, 1, 1, 1) * torch.randn(x.shape, generator=generator)
    # Judged images have 256 levels in [-1, 1].
    return ((x.clamp(-1, 1) * 127.5).round() / 127.5), 2 * strengths - 1


def train_class_judge(images: Tensor, labels: Tensor, recipe: Mapping[str, Any] = CLASS_RECIPE) -> ClassJudge:
    """Train a judge by the recipe's optimization on uint8 images [N, 1, 32, 32] of classes int64 [N]."""

    def loss(judge: nn.Module, indices: Tensor, step: int) -> Tensor:
        return functional.cross_entropy(judge(to_unit_range(images[indices]))[0], labels[indices])

    judge: ClassJudge = _trained("class", ClassJudge, loss, len(images), recipe)
    return judge


def train_grain_judge(images: Tensor, recipe: Mapping[str, Any] = GRAIN_RECIPE) -> GrainJudge:
    """Train a judge by the recipe's optimization on uint8 images [N, 1, 32, 32]."""

    def loss(judge: nn.Module, indices: Tensor, step: int) -> Tensor:
        x, strengths = disturbed(to_unit_range(images[indices]), recipe["seed"] + step)
        return functional.mse_loss(judge(x)[0], strengths)

    judge: GrainJudge = _trained("grain", GrainJudge, loss, len(images), recipe)
    return judge


def _trained(
    name: str,
    build: Callable[[], nn.Module],
    loss: Callable[[nn.Module, Tensor, int], Tensor],
    num_images: int,
    recipe: Mapping[str, Any],
) -> Any:
    batch, epochs = recipe["batch"], recipe["epochs"]
    generator = torch.Generator().manual_seed(recipe["seed"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe["seed"])
        judge = build().train()
    rate = recipe["peak_learning_rate"]
    optimizer = torch.optim.AdamW(judge.parameters(), rate, weight_decay=recipe["weight_decay"])
    steps = epochs * (num_images // batch)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    step = 0
    for epoch in range(epochs):
        print(f"training the {name} judge: epoch {epoch + 1} of {epochs}", flush=True)
        order = torch.randperm(num_images, generator=generator)
        for indices in order[: num_images // batch * batch].split(batch):
            optimizer.zero_grad()
            loss(judge, indices, step).backward()
            optimizer.step()
            decay.step()
            step += 1
    return judge.eval()


def score(judge: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the class judge's accuracy on uint8 images, or the smaller R^2 of the grain judge's two estimates."""
    if isinstance(judge, ClassJudge):
        return measure(judge, images).accuracy(labels)
    x, strengths = disturbed(to_unit_range(images), seed=1_000_000)
    judge.eval()
    with torch.inference_mode():
        estimates = torch.cat([judge(chunk)[0] for chunk in x.split(500)])
    return float((1 - (estimates - strengths).square().mean(0) / strengths.var(0)).min())


def judge_file(recipe: Mapping[str, Any]) -> Path:
    """Return a judge's place in the user's cache. Another recipe has another name."""
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kind = "grain" if "noise" in recipe else "classifier"
    return cache / "ddpm_fast" / f"fashion-mnist-{kind}-{digest}.safetensors"


def save_judge(path: Path, judge: nn.Module) -> None:
    """Write a judge as safetensors, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        safetensors.torch.save_file(judge.state_dict(), temporary)


def load_judge(path: Path, judge: nn.Module) -> nn.Module:
    """Read weights into a judge, and return it."""
    judge.load_state_dict(safetensors.torch.load_file(path))
    return judge.eval()


def judge_of(name: str, test_images: Tensor, test_labels: Tensor) -> tuple[nn.Module, dict[str, Any]]:
    """Read the judge "class" or "grain", or train it into its file. Return it and a record of it.

    Raises:
        ValueError: It is too weak to measure with.
    """
    recipe, build = (CLASS_RECIPE, ClassJudge) if name == "class" else (GRAIN_RECIPE, GrainJudge)
    path = judge_file(recipe)
    trained: nn.Module | None = None
    if not path.is_file():
        train = load_dataset(DataOptions(data="fashion-mnist"))
        images, labels, _ = read_batch(train, range(len(train)))
        trained = train_class_judge(images, labels) if name == "class" else train_grain_judge(images)
    judge = trained or load_judge(path, build())
    found = score(judge, test_images, test_labels)
    if not found >= LEAST[name]:
        what = "accuracy" if name == "class" else "R^2"
        raise ValueError(
            f"judges: expected the {name} judge's {what} on test images to be at least {LEAST[name]}, "
            f"got {found:.4f} from {str(path)!r}"
        )
    if trained is not None and not path.is_file():  # another process may have been faster
        save_judge(path, trained)
    judge = load_judge(path, build())
    return judge, {"score": round(found, 4), "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "recipe": recipe}


def split_real(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices of two disjoint halves of the test images: those to measure, and the reference.

    Image i of a half has class i % 10, so its first N images are balanced.
    """
    of_class = [(labels == label).nonzero().flatten() for label in range(CLASSES)]
    half = min(len(indices) for indices in of_class) // 2
    parts = (slice(half), slice(half, 2 * half))
    first, second = (torch.stack([indices[part] for indices in of_class], dim=1).flatten() for part in parts)
    return first, second


class Jury:
    """Both judges, and the test images to which they compare others.

    Attributes:
        real: The other half of the test images, uint8 [N, 1, 32, 32]. Image i has class i % 10.
        about: The record of each judge.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        """Read or train the judges. Take all test images, uint8 [N, 1, 32, 32], and their classes, int64 [N]."""
        first, reference = split_real(labels)
        self.real = images[first]
        self.about: dict[str, dict[str, Any]] = {}
        self._judges: dict[str, tuple[nn.Module, Measured]] = {}
        for name in LEAST:
            judge, self.about[name] = judge_of(name, images, labels)
            self._judges[name] = judge, measure(judge, images[reference])

    def figures(self, images: Tensor, labels: Tensor | None) -> dict[str, float]:
        """Return the judges' Frechet distances of uint8 images [N, 1, 32, 32], "class" and "grain".

        With the classes that were asked for, int64 [N], there is also the "accuracy", their share that the class judge sees.
        """
        found = {}
        for name, (judge, reference) in self._judges.items():
            measured = measure(judge, images)
            found[name] = frechet_distance(measured.features, reference.features)
            if name == "class" and labels is not None:
                found["accuracy"] = measured.accuracy(labels)
        return found


def main() -> None:
    test = load_dataset(DataOptions(data="fashion-mnist"), split="test")
    images, labels, _ = read_batch(test, range(len(test)))
    jury = Jury(images, labels)
    found = jury.figures(jury.real[:1000], None)
    for name, about in jury.about.items():
        print(f"{name}: score {about['score']}, real images {found[name]:.3g}")


if __name__ == "__main__":
    main()
