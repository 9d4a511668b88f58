"""Measure sample quality on Fashion-MNIST: class accuracy and a Frechet distance, in a small classifier.

    python benchmarks/benchmark_quality.py
    python benchmarks/benchmark_quality.py --model RUN --samplers ddpm:100 ddim:50 --dtype bf16

The script trains the classifier once, in minutes, from a fixed recipe. Later runs read it from the user's cache.
Two figures describe each sampler. Both use the images as 8-bit pixels:

- accuracy: the share of images that the classifier assigns to the class that was asked for.
- Frechet distance (classifier features): between Gaussians fitted to the classifier's 64 penultimate features.
  The reference is 9,000 test images, 900 of each class. This is not FID, which uses Inception's features.

The row of real images is the other 1,000 test images, 100 of each class. The classifier has seen neither set.
The Frechet distance depends on N and on the classifier: compare figures of one N and one classifier file only.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import common
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from ddpm_fast import SamplingPlan, ddim_plan, ddpm_plan, frechet_distance, sample, save_grid
from ddpm_fast.atomic import replacing
from ddpm_fast.images import to_uint8
from ddpm_fast.nn.checkpoint import check_weights
from ddpm_fast.pretrained import BUILTIN, Pretrained, load_folder
from ddpm_fast.training.data import FASHION_MNIST_CLASSES, load_dataset, to_unit_range

# Everything that decides the classifier's weights, up to rounding. Its file holds it, too.
RECIPE: Final[dict[str, Any]] = {
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
LEAST_ACCURACY: Final = 0.91  # a classifier has this on the 10,000 test images
CLASSES: Final = len(FASHION_MNIST_CLASSES)
REAL_PER_CLASS: Final = 100
DISTANCE: Final = "Frechet distance (classifier features)"
SAMPLERS: Final = ("ddpm:100", "ddim-model-epsilon:50", "ddim-model-epsilon:100", "ddim:50", "ddim:100")
METHODS: Final = {
    "ddpm": "ancestral (eq. 13)",
    "ddim": "DDIM, epsilon re-derived after the clip",
    "ddim-model-epsilon": "DDIM, the model's epsilon",
}


# --------------------------------------------------------------------------------------------------------- classifier


class Classifier(nn.Module):
    """A small CNN for grey 32x32 images in [-1, 1]. It returns logits [N, 10] and penultimate features [N, 64]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 1
        for channels in RECIPE["channels"]:
            layers += [
                nn.Conv2d(before, channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
            before = channels
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * 4 * 4, RECIPE["features"]), nn.ReLU())
        self.head = nn.Linear(RECIPE["features"], CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(images)
        return self.head(features), features


class Measured(NamedTuple):
    """Predicted classes, int64 [N], and penultimate features, float64 [N, 64], of a set of images."""

    predicted: Tensor
    features: Tensor

    def accuracy(self, labels: Tensor) -> float:
        """Return the share of images that are predicted as `labels`, int64 [N]."""
        return float((self.predicted == labels).double().mean())


def measure(classifier: Classifier, images: Tensor, batch: int = 500) -> Measured:
    """Apply the classifier to uint8 images [N, 1, 32, 32]."""
    classifier.eval()
    with torch.inference_mode():
        parts = [classifier(to_unit_range(chunk)) for chunk in images.split(batch)]
    return Measured(torch.cat([logits.argmax(1) for logits, _ in parts]), torch.cat([f for _, f in parts]).double())


def train_classifier(images: Tensor, labels: Tensor, recipe: Mapping[str, Any] = RECIPE) -> Classifier:
    """Train a classifier by the recipe on uint8 images [N, 1, 32, 32] of classes int64 [N]."""
    batch, epochs = recipe["batch"], recipe["epochs"]
    generator = torch.Generator().manual_seed(recipe["seed"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe["seed"])
        classifier = Classifier().train()
    rate = recipe["peak_learning_rate"]
    optimizer = torch.optim.AdamW(classifier.parameters(), rate, weight_decay=recipe["weight_decay"])
    steps = epochs * (len(images) // batch)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    with tqdm(total=steps, desc="training the classifier", unit="step") as bar:
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=generator)
            for indices in order[: len(images) // batch * batch].split(batch):
                logits, _ = classifier(to_unit_range(images[indices]))
                loss = functional.cross_entropy(logits, labels[indices])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                decay.step()
                bar.update()
    return classifier.eval()


def save_classifier(path: Path, classifier: Classifier) -> None:
    """Write a classifier and its recipe as safetensors, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        weights = {name: tensor.contiguous() for name, tensor in classifier.state_dict().items()}
        safetensors.torch.save_file(weights, temporary, metadata={"recipe": json.dumps(RECIPE, sort_keys=True)})


def load_classifier(path: Path) -> Classifier:
    """Read a classifier that `save_classifier` wrote.

    Raises:
        ValueError: The file is damaged, or holds no classifier of this recipe.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            recipe = (file.metadata() or {}).get("recipe")
        weights = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"benchmark_quality: expected {str(path)!r} to be a whole safetensors file, got: {error}") from error
    if recipe != json.dumps(RECIPE, sort_keys=True):
        raise ValueError(
            f"benchmark_quality: expected {str(path)!r} to hold a classifier of this script's recipe, got recipe {recipe}; "
            "name another --classifier, or remove the file to train it again"
        )
    classifier = Classifier()
    check_weights("benchmark_quality", path, "the classifier", classifier.state_dict(), weights)
    classifier.load_state_dict(weights)
    return classifier.eval()


def default_classifier() -> Path:
    """Return the classifier's place in the user's cache. Another recipe has another name."""
    digest = hashlib.sha256(json.dumps(RECIPE, sort_keys=True).encode()).hexdigest()[:8]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "ddpm_fast" / f"fashion-mnist-classifier-{digest}.safetensors"


def trained_classifier(path: Path, test_images: Tensor, test_labels: Tensor) -> tuple[Classifier, Measured]:
    """Read the classifier, or train it into the file. Return it with what it makes of the test images.

    Raises:
        ValueError: It is too weak to measure with.
    """
    if path.is_file():
        classifier = load_classifier(path)
    else:
        train = load_dataset("fashion-mnist")
        classifier = train_classifier(*train[torch.arange(len(train))])
    measured = measure(classifier, test_images)
    accuracy = measured.accuracy(test_labels)
    if not accuracy >= LEAST_ACCURACY:
        raise ValueError(
            f"benchmark_quality: expected the classifier's accuracy on test images to be at least {LEAST_ACCURACY}, "
            f"got {accuracy:.4f} from {str(path)!r}"
        )
    if not path.is_file():
        save_classifier(path, classifier)
    return classifier, measured


def split_real(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices of the first 100 test images of each class, which are measured, and of the others, the reference."""
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(CLASSES):
        chosen[(labels == label).nonzero().flatten()[:REAL_PER_CLASS]] = True
    return chosen.nonzero().flatten(), (~chosen).nonzero().flatten()


# ------------------------------------------------------------------------------------------------------------ samplers


def build_plan(loaded: Pretrained, sampler: str) -> SamplingPlan:
    """Build the plan of a sampler that is named METHOD:STEPS.

    Raises:
        ValueError: The method is unknown, or the steps are out of range.
    """
    method, _, steps = sampler.partition(":")
    if method not in METHODS or not steps.isdecimal():
        raise ValueError(
            f"benchmark_quality: expected a sampler to be METHOD:STEPS, METHOD of {', '.join(METHODS)}, got {sampler!r}"
        )
    common_options: dict[str, Any] = {"prediction": loaded.prediction, "clip": loaded.clip}
    if method == "ddpm":
        return ddpm_plan(loaded.schedule, int(steps), variance=loaded.variance, **common_options)
    learned = loaded.variance in ("learned", "learned_range")
    rederive = method == "ddim"
    return ddim_plan(loaded.schedule, int(steps), use_clipped_model_output=rederive, learned_variance=learned, **common_options)


def load_model(name: str, device: str) -> Pretrained:
    """Load the built-in model, or one from a folder, and check that it draws Fashion-MNIST's classes.

    Raises:
        ValueError: The model has other images or classes.
    """
    loaded = load_folder(BUILTIN if name == "builtin" else name, device)
    config = loaded.model.config
    got = (config["in_channels"], config["sample_size"], tuple(config.get("class_names", ())))
    if got != (1, 32, FASHION_MNIST_CLASSES):
        raise ValueError(
            f"benchmark_quality: expected a model of 1x32x32 images with Fashion-MNIST's {CLASSES} classes, "
            f"got {got[0]} channels, size {got[1]}, classes {', '.join(got[2]) or 'none'}"
        )
    return loaded


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="builtin", help="take builtin (default) or a model's or training run's folder")
    methods = "; ".join(f"{name}: {text}" for name, text in METHODS.items())
    parser.add_argument("--samplers", nargs="+", default=SAMPLERS, metavar="METHOD:STEPS", help=f"measure these. {methods}")
    parser.add_argument("--num", type=int, default=1000, help="draw this many images with each sampler (1000)")
    parser.add_argument("--batch", type=int, default=50, help="draw this many images at once (50)")
    parser.add_argument("--seed", type=int, default=0, help="seed the noise of the images (0)")
    parser.add_argument("--dtype", choices=common.DTYPES, default="float32", help="run the network in this dtype (float32)")
    parser.add_argument("--classifier", type=Path, help="read this classifier, or train it into this file if absent")
    parser.add_argument("--grids", type=Path, help="save the first 100 images of each sampler into this folder, as PNG")
    args = parser.parse_args(arguments)
    if args.num <= RECIPE["features"]:
        parser.error(f"--num: expected more images than the {RECIPE['features']} features, got {args.num}")

    loaded = load_model(args.model, args.device)
    plans = {sampler: build_plan(loaded, sampler) for sampler in args.samplers}
    test = load_dataset("fashion-mnist", split="test")
    images, labels = test[torch.arange(len(test))]
    path = args.classifier or default_classifier()
    classifier, of_test = trained_classifier(path, images, labels)
    run = common.Run(args.device, args.out)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    about = {"test accuracy": round(of_test.accuracy(labels), 4), "sha256": digest, "recipe": RECIPE}
    real, others = split_real(labels)

    def row(name: str, steps: int | None, measured: Measured, wanted: Tensor, seed: int | None) -> dict[str, object]:
        distance = frechet_distance(measured.features, of_test.features[others])
        found = {"accuracy": measured.accuracy(wanted), DISTANCE: distance}
        return {"images": name, "steps": steps, "N": len(wanted), "seed": seed} | found

    rows = [row("real images", None, Measured(of_test.predicted[real], of_test.features[real]), labels[real], None)]
    wanted = torch.arange(args.num) % CLASSES
    name = args.model if args.model == "builtin" else Path(args.model).name
    for sampler, plan in plans.items():
        print(f"\n{sampler}, {args.num} images", flush=True)
        options = {"class_labels": wanted, "batch_size": args.batch, "dtype": common.DTYPES[args.dtype]}
        drawn = sample(loaded.model, plan, args.num, seed=args.seed, **options).cpu()
        if args.grids:
            save_grid(drawn[:100], args.grids / f"{name}_{sampler.replace(':', '_')}_seed{args.seed}.png", columns=CLASSES)
        method = METHODS[sampler.partition(":")[0]]
        rows.append(row(method, plan.num_steps, measure(classifier, to_uint8(drawn)), wanted, args.seed))
        # A run that is stopped keeps what is done.
        run.save(f"benchmark_quality {name} {args.dtype} N={args.num} seed {args.seed}", rows, classifier=about)
    common.print_table(f"{name}, {args.dtype}: {args.num} images a row, reference: {len(others)} test images", rows)
    run.finish()


if __name__ == "__main__":
    main()
