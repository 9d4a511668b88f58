"""The quality benchmark: the classifier and its file, the split of real images, the samplers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import benchmark_quality as quality
import pytest
import safetensors.torch
import torch

from ddpm_fast.pretrained import BUILTIN, load_folder


def test_a_classifier_comes_back_from_its_file(tmp_path: Path):
    classifier = quality.Classifier()
    path = tmp_path / "cache" / "classifier.safetensors"
    quality.save_classifier(path, classifier)
    images = torch.randint(256, (3, 1, 32, 32), dtype=torch.uint8)
    written, read = (quality.measure(c, images) for c in (classifier, quality.load_classifier(path)))
    assert torch.equal(written.features, read.features)
    assert read.features.dtype == torch.float64
    assert read.accuracy(written.predicted) == 1
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_wrong_classifier_file_is_refused(tmp_path: Path):
    path = tmp_path / "classifier.safetensors"
    weights = quality.Classifier().state_dict()
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"expected .*classifier.* to be a whole safetensors file"):
        quality.load_classifier(path)
    safetensors.torch.save_file(weights, path)
    with pytest.raises(ValueError, match=r"expected .* to hold a classifier of this script's recipe, got recipe None"):
        quality.load_classifier(path)
    recipe = {"recipe": json.dumps(quality.RECIPE, sort_keys=True)}
    safetensors.torch.save_file({"head.weight": weights["head.weight"]}, path, metadata=recipe)
    with pytest.raises(ValueError, match="to fit the classifier, got missing"):
        quality.load_classifier(path)


def test_a_weak_classifier_is_refused(tmp_path: Path):
    path = tmp_path / "weak"
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


def test_real_images_and_reference_are_disjoint_and_balanced():
    labels = torch.randint(10, (3000,), generator=torch.Generator().manual_seed(0))
    real, reference = quality.split_real(labels)
    assert labels[real].bincount().tolist() == [quality.REAL_PER_CLASS] * 10
    assert torch.equal(torch.cat([real, reference]).sort().values, torch.arange(3000))


def test_samplers_are_named_by_method_and_steps():
    loaded = load_folder(BUILTIN)
    ancestral, rederived, kept = (quality.build_plan(loaded, name) for name in ("ddpm:20", "ddim:20", "ddim-model-epsilon:20"))
    assert ancestral.is_random
    assert not rederived.is_random
    assert {plan.num_steps for plan in (ancestral, rederived, kept)} == {20}
    assert not torch.equal(rederived.coefficients, kept.coefficients)
    for name in ("euler:20", "ddim", "ddim:x"):
        with pytest.raises(ValueError, match=f"expected a sampler to be METHOD:STEPS, .* got '{name}'"):
            quality.build_plan(loaded, name)


def test_a_model_of_other_classes_is_refused(tmp_path: Path):
    shutil.copytree(BUILTIN, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "unet" / "config.json").read_text())
    del config["class_names"]
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"expected a model of 1x32x32 images with Fashion-MNIST's 10 classes, .*got 1 channels"
    ):
        quality.load_model(str(tmp_path), "cpu")
