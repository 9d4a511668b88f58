"""The judges: their training, their files, what they see, and the split of real images."""

from __future__ import annotations

from pathlib import Path

import judges
import pytest
import torch
from torch import Tensor

from ddpm_fast import frechet_distance

LABELS = torch.arange(256) % 10
IMAGES = (LABELS * 25).to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 32, 32)  # the class is the brightness


def checkered(n: int) -> Tensor:
    """Return uint8 images [n, 1, 32, 32] of squares of random brightness, with sharp edges and without noise."""
    generator = torch.Generator().manual_seed(0)
    squares = torch.randint(256, (n, 1, 4, 4), generator=generator, dtype=torch.uint8)
    return squares.repeat_interleave(8, 2).repeat_interleave(8, 3)


def test_a_weak_judge_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(judges, "judge_file", lambda recipe: tmp_path / "weak")
    for name, judge, what in (("class", judges.ClassJudge(), "accuracy"), ("grain", judges.GrainJudge(), r"R\^2")):
        judges.save_judge(tmp_path / "weak", judge)
        with pytest.raises(ValueError, match=rf"the {name} judge's {what} on test images to be at least 0.9.*from '.*weak'"):
            judges.judge_of(name, IMAGES[:100], LABELS[:100])


def test_the_recipes_train_and_are_seeded():
    recipe = judges.CLASS_RECIPE | {"batch": 32, "epochs": 12}
    one, other = (judges.train_class_judge(IMAGES, LABELS, recipe) for _ in range(2))
    assert judges.score(one, IMAGES, LABELS) > 0.9
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_the_grain_judge_sees_noise_and_blur():
    images, recipe = checkered(256), judges.GRAIN_RECIPE | {"batch": 16, "epochs": 8}
    judge = judges.train_grain_judge(images, recipe)
    assert judges.score(judge, images, LABELS) > 0.7
    reference = judges.measure(judge, images).features
    assert frechet_distance(reference, reference) == pytest.approx(0, abs=1e-9)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    distances = []
    for strength in (2, 8, 32):
        noisy = (images + strength * noise).round().clamp(0, 255).to(torch.uint8)
        distances.append(frechet_distance(judges.measure(judge, noisy).features, reference))
    assert distances == sorted(distances)
    assert distances[-1] > 10 * distances[0] > 0


def test_images_are_disturbed_as_the_strengths_say():
    images = torch.zeros(400, 1, 32, 32)
    images[..., 16:] = 1  # a vertical edge
    images = images - 0.5
    x, strengths = judges.disturbed(images, seed=3)
    low, high = judges.GRAIN_RECIPE["noise"]
    noise = low * (high / low) ** ((strengths[:, 0] + 1) / 2)
    found = x[..., :8].flatten(1).std(1)  # far from the edge
    torch.testing.assert_close(found, noise, rtol=0.3, atol=0.003)
    quiet = noise < 0.02
    slope = (x[..., 16] - x[..., 15]).mean((1, 2))[quiet]  # 1 without blur, less with more
    order = strengths[quiet, 1].argsort()
    assert slope[order[:5]].min() > 0.95
    assert slope[order[-5:]].max() < 0.4
    assert torch.equal(judges.disturbed(images, seed=3)[0], x)


def test_real_images_and_reference_are_disjoint_and_of_the_same_size():
    labels = torch.arange(3000) % 10
    labels = labels[torch.randperm(3000, generator=torch.Generator().manual_seed(0))]
    real, reference = judges.split_real(labels)
    assert torch.equal(labels[real], torch.arange(1500) % 10)
    assert torch.equal(labels[reference], torch.arange(1500) % 10)
    assert torch.equal(torch.cat([real, reference]).sort().values, torch.arange(3000))
