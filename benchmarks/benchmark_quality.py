"""Measure sample quality on Fashion-MNIST, by sampler and number of network evaluations.

    python benchmarks/benchmark_quality.py
    python benchmarks/benchmark_quality.py --samplers ddpm:100 sde --evaluations 10 20 --seeds 1
    python benchmarks/benchmark_quality.py --table --plot quality.png      (from the results, without measuring)

The script trains a small classifier once, in minutes, from a fixed recipe. Later runs read it from the user's cache.
Two figures describe the images of the built-in model, as 8-bit pixels:

- Frechet distance (classifier features): between Gaussians fitted to the classifier's 64 penultimate features.
  The reference is 5,000 test images, 500 of each class. This is not FID, which uses Inception's features.
- accuracy: the share of images that the classifier assigns to the class that was asked for.

The floor is the same measurement of real images: disjoint sets from the other 5,000 test images, one a seed.
The classifier has seen neither half. The Frechet distance depends on N and on the classifier: compare figures of one
N and one classifier file only.

Every seed of every row is written when it is done. A later run with the same weights and options continues.
All rows of seed 0 come first, the cheapest ones first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Final, NamedTuple

import common
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from ddpm_fast import (
    SamplingPlan,
    ddim_plan,
    ddpm_plan,
    dpm_solver_plan,
    fit_plan,
    frechet_distance,
    heun_plan,
    load_builtin,
)
from ddpm_fast.files.images import to_uint8
from ddpm_fast.files.writing import replacing
from ddpm_fast.pretrained import Pretrained
from ddpm_fast.training.data import FASHION_MNIST_CLASSES, load_dataset, read_batch, to_unit_range

# Everything that decides the classifier's weights, up to rounding. The name of its file has its digest.
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
DISTANCE: Final = "Frechet distance (classifier features)"
REAL: Final = "real"
EVALUATIONS: Final = (4, 5, 6, 8, 10, 20, 50, 100, 1000)

Row = dict[str, Any]


# --------------------------------------------------------------------------------------------------------- classifier


class Classifier(nn.Module):
    """A small CNN for grey 32x32 images in [-1, 1]. It returns logits [N, 10] and penultimate features [N, 64]."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (1, *RECIPE["channels"])
        layers: list[nn.Module] = []
        for before, channels in pairwise(sizes):
            convolution = nn.Conv2d(before, channels, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(sizes[-1] * 4 * 4, RECIPE["features"]), nn.ReLU())
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
    for epoch in range(epochs):
        print(f"training the classifier: epoch {epoch + 1} of {epochs}", flush=True)
        order = torch.randperm(len(images), generator=generator)
        for indices in order[: len(images) // batch * batch].split(batch):
            logits, _ = classifier(to_unit_range(images[indices]))
            loss = functional.cross_entropy(logits, labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
    return classifier.eval()


def classifier_file() -> Path:
    """Return the classifier's place in the user's cache. Another recipe has another name."""
    digest = hashlib.sha256(json.dumps(RECIPE, sort_keys=True).encode()).hexdigest()[:8]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "ddpm_fast" / f"fashion-mnist-classifier-{digest}.safetensors"


def save_classifier(path: Path, classifier: Classifier) -> None:
    """Write a classifier as safetensors, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        safetensors.torch.save_file(classifier.state_dict(), temporary)


def load_classifier(path: Path) -> Classifier:
    classifier = Classifier()
    classifier.load_state_dict(safetensors.torch.load_file(path))
    return classifier.eval()


def trained_classifier(path: Path, test_images: Tensor, test_labels: Tensor) -> tuple[Classifier, Measured]:
    """Read the classifier, or train it into the file. Return it with what it makes of the test images.

    Raises:
        ValueError: It is too weak to measure with.
    """
    if path.is_file():
        classifier = load_classifier(path)
    else:
        train = load_dataset("fashion-mnist")
        images, labels, _ = read_batch(train, range(len(train)))
        classifier = train_classifier(images, labels)
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
    """Return the indices of two disjoint halves of the test images: those to measure, and the reference.

    Image i of a half has class i % 10, so its first N images are balanced.
    """
    of_class = [(labels == label).nonzero().flatten() for label in range(CLASSES)]
    half = min(len(indices) for indices in of_class) // 2
    parts = (slice(half), slice(half, 2 * half))
    first, second = (torch.stack([indices[part] for indices in of_class], dim=1).flatten() for part in parts)
    return first, second


def figures(measured: Measured, reference: Measured, start: int = 0) -> dict[str, float]:
    """Return the figures of images of all classes in turn, from `start` on."""
    wanted = torch.arange(start, start + len(measured.predicted)) % CLASSES
    distance = frechet_distance(measured.features, reference.features)
    return {DISTANCE: distance, "accuracy": measured.accuracy(wanted)}


# ------------------------------------------------------------------------------------------------------------ samplers


def _planned(build: Callable[..., SamplingPlan], **options: Any) -> Callable[[Pretrained, int, float], SamplingPlan]:
    """Return how to build a plan for a model from the number of evaluations, and the scale of guidance."""

    def plan(loaded: Pretrained, evaluations: int, guidance: float) -> SamplingPlan:
        # Heun's method evaluates the network 2 S - 1 times in S steps.
        steps = (evaluations + 1) // 2 if build is heun_plan else evaluations
        return build(loaded.objective, steps, clip=loaded.clip, **options)

    return plan


class Method(NamedTuple):
    """A sampler.

    Attributes:
        label: Name in tables and plots.
        plan: How to build its plan.
        evaluations: Numbers of evaluations that are measured by default.
    """

    label: str
    plan: Callable[[Pretrained, int, float], SamplingPlan]
    evaluations: tuple[int, ...]


# Ordinary differential equations have converged at 50 evaluations. Only eq. 13 is used with all timesteps.
_CONVERGED: Final = EVALUATIONS[:-2]
_FEW: Final = EVALUATIONS[:5]  # where the levels end and begin matters most
_LEVELS: Final[dict[str, Any]] = {"solver": "heun", "spacing": "karras", "sigma_min": 0.06, "sigma_max": 80.0}
_TEACHER: Final = _planned(dpm_solver_plan, **_LEVELS)


def _fitted(loaded: Pretrained, evaluations: int, guidance: float) -> SamplingPlan:
    """Return a plan that is fitted to one of 8 evaluations, as `ddpm-fast fit` does."""
    start = _planned(dpm_solver_plan, **_LEVELS | {"sigma_min": 0.07, "sigma_max": 40.0})(loaded, evaluations, guidance)
    teacher = _TEACHER(loaded, 8, guidance)
    scale = None if guidance == 1 else guidance
    return fit_plan(loaded.sampler(start), teacher=teacher, guidance_scale=scale, progress=False)


METHODS: Final = {
    "ddpm": Method("ancestral (eq. 13)", _planned(ddpm_plan), EVALUATIONS),
    "ddim": Method("DDIM", _planned(ddim_plan), EVALUATIONS[:-1]),
    "2m": Method("DPM-Solver++(2M)", _planned(dpm_solver_plan), _CONVERGED),
    "heun": Method("Heun", _planned(heun_plan), _CONVERGED[1:]),  # 3 evaluations give noise
    "sde": Method("DPM-Solver++(2M) SDE", _planned(dpm_solver_plan, eta=1.0), EVALUATIONS[:-1]),
    "sde-karras": Method(
        "DPM-Solver++(2M) SDE, Karras, Heun",
        _planned(dpm_solver_plan, eta=1.0, spacing="karras", solver="heun"),
        EVALUATIONS[:-1],
    ),
    "2m-few": Method("DPM-Solver++(2M), levels 80 to 0.06", _TEACHER, (*_FEW, 20)),
    "2m-fewer": Method(
        "DPM-Solver++(2M), levels 40 to 0.06", _planned(dpm_solver_plan, **_LEVELS | {"sigma_max": 40.0}), _FEW[:3]
    ),
    "fitted": Method("DPM-Solver++(2M), fitted to 8 evaluations", _fitted, _FEW[:3]),
}


def chosen(samplers: Sequence[str], evaluations: Sequence[int]) -> list[tuple[str, int]]:
    """Return pairs of method and number of evaluations, the cheapest ones first.

    Args:
        samplers: METHOD:EVALUATIONS, or METHOD for those of its default evaluations that `evaluations` has.
        evaluations: Numbers of evaluations.

    Raises:
        ValueError: A sampler is unknown, or a number is not positive.
    """
    pairs = set()
    for sampler in samplers:
        name, colon, number = sampler.partition(":")
        if name not in METHODS or (colon and not (number.isdecimal() and int(number) > 0)):
            raise ValueError(
                f"benchmark_quality: expected a sampler to be METHOD or METHOD:EVALUATIONS, METHOD of {', '.join(METHODS)}, "
                f"got {sampler!r}"
            )
        numbers = [int(number)] if colon else [n for n in METHODS[name].evaluations if n in evaluations]
        if name == "heun":
            numbers = [2 * ((n + 1) // 2) - 1 for n in numbers]
        pairs |= {(name, n) for n in numbers}
    names = list(METHODS)
    return sorted(pairs, key=lambda pair: (pair[1], names.index(pair[0])))


def draw(loaded: Pretrained, name: str, evaluations: int, seed: int, args: argparse.Namespace) -> Tensor:
    """Draw images of all classes in turn."""
    sampler = loaded.sampler(METHODS[name].plan(loaded, evaluations, args.guidance), dtype=torch.float32, device=args.device)
    labels = torch.arange(args.num) % CLASSES
    options = {"batch_size": args.batch, "guidance_scale": args.guidance, "progress": False}
    return sampler(args.num, seed=seed, class_labels=labels, **options).cpu()


def weights_hash(model: nn.Module) -> str:
    """Return a digest of the parameters and buffers, 12 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


# ---------------------------------------------------------------------------------------------------------------- rows


def add_seed(row: Row, seed: int, found: Mapping[str, float]) -> None:
    """Add the figures of a seed to a row, and update its statistics."""
    row["seeds"] = [*row["seeds"], seed]
    for key, value in found.items():
        values = [*(row[key]["by seed"] if key in row else []), value]
        std = statistics.stdev(values) if len(values) > 1 else None
        row[key] = {"mean": statistics.fmean(values), "std": std, "by seed": values}


def table(rows: Sequence[Row]) -> str:
    """Return rows as a Markdown table, by sampler and evaluations."""

    def cell(figure: Mapping[str, Any], digits: str) -> str:
        return f"{figure['mean']:{digits}}" + ("" if figure["std"] is None else f" ± {figure['std']:.2g}")

    lines = ["| sampler | evaluations | Frechet distance | accuracy | seeds |", "|---|---|---|---|---|"]
    order = [*METHODS, REAL]
    for row in sorted(rows, key=lambda row: (order.index(row["name"]), row["evaluations"] or 0)):
        cells = [row["sampler"], row["evaluations"] or "", cell(row[DISTANCE], ".3g"), cell(row["accuracy"], ".3f")]
        lines.append(f"| {' | '.join(map(str, [*cells, len(row['seeds'])]))} |")
    return "\n".join(lines)


def plot(rows: Sequence[Row], title: str) -> Any:
    """Draw the Frechet distance over evaluations: a line for each sampler, and the floor."""
    figure, axes = common.pyplot().subplots(figsize=(8, 6.4), layout="constrained")
    for place, (name, method) in enumerate(METHODS.items()):
        points = sorted((row for row in rows if row["name"] == name), key=lambda row: row["evaluations"])
        if not points:
            continue
        means, stds = ([row[DISTANCE][key] or 0 for row in points] for key in ("mean", "std"))
        # An error bar has to end above zero on a logarithmic axis.
        errors = [[min(std, 0.9 * mean) for std, mean in zip(stds, means, strict=True)], stds]
        style = {"color": f"C{place}", "marker": "osD^vPX"[place % 7], "capsize": 2}
        axes.errorbar([row["evaluations"] for row in points], means, errors, label=method.label, **style)
    for row in rows:
        if row["name"] == REAL:
            mean = row[DISTANCE]["mean"]
            axes.axhline(mean, color="#444444", linestyle="--", label=f"real images: {mean:.3g}")
    axes.set(xscale="log", yscale="log", title=title)
    axes.set(xlabel="network evaluations an image", ylabel="Frechet distance in classifier features")
    for axis in (axes.xaxis, axes.yaxis):  # plain numbers, also over less than a decade
        axis.get_major_locator().set_params(subs=(1, 2, 5))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.grid(which="major", color="#dddddd")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


# ----------------------------------------------------------------------------------------------------------------- run


def main(arguments: Sequence[str] | None = None) -> None:
    methods = "; ".join(f"{name}: {method.label}" for name, method in METHODS.items())
    options: dict[str, dict[str, Any]] = {
        "--samplers": {"nargs": "+", "default": METHODS, "metavar": "METHOD[:N]", "help": f"measure these (all). {methods}"},
        "--evaluations": {
            "type": int,
            "nargs": "+",
            "default": EVALUATIONS,
            "metavar": "N",
            "help": f"measure methods without :N at those of these numbers that suit them ({' '.join(map(str, EVALUATIONS))})",
        },
        "--num": {"type": int, "default": 1000, "help": "draw this many images for each row and seed (1000)"},
        "--guidance": {"type": float, "default": 1.0, "help": "set the scale of classifier-free guidance (1)"},
        "--seeds": {"type": int, "default": 3, "help": "repeat each row with this many seeds (3)"},
        "--batch": {"type": int, "default": 50, "help": "draw this many images at once (50)"},
        "--table": {"action": "store_true", "help": "print the results as a Markdown table, and measure nothing"},
        "--plot": {"type": Path, "help": "draw the results into this PNG, and measure nothing"},
    }
    args = common.parse(__doc__, arguments, options)
    if args.num <= RECIPE["features"]:
        raise SystemExit(f"--num: expected more images than the {RECIPE['features']} features, got {args.num}")
    keys = [(REAL, None), *chosen(args.samplers, args.evaluations)]

    loaded = load_builtin(args.device)
    weights = weights_hash(loaded.model)
    section = f"benchmark_quality builtin {weights} float32 N={args.num}"
    section += "" if args.guidance == 1 else f" guidance {args.guidance:g}"
    # A run of hours goes on from what it has.
    path = common.default_output(args.device) if args.out in (None, common.RECORDED) else args.out
    before = common.read_results(path).get(section, {"machine": {}, "rows": []})
    rows: list[Row] = before["rows"]
    if args.table or args.plot:
        rows = [row for row in rows if (row["name"], row["evaluations"]) in keys]
        if not rows:
            raise SystemExit(
                f"--table, --plot: expected {str(path)!r} to have the section {section!r}, got none: measure first"
            )
        if args.table:
            print(table(rows))
        if args.plot:
            common.save_picture(args.plot, plot(rows, f"builtin, float32, {args.num} images a point"))
        return

    test = load_dataset("fashion-mnist", split="test")
    images, labels, _ = read_batch(test, range(len(test)))
    file = classifier_file()
    classifier, of_test = trained_classifier(file, images, labels)
    real, reference = (Measured(of_test.predicted[half], of_test.features[half]) for half in split_real(labels))
    run = common.Run(args.device, path)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    about = {"test accuracy": round(of_test.accuracy(labels), 4), "sha256": digest, "recipe": RECIPE}
    options = {"weights": weights, "classifier": digest[:12], "batch": args.batch}
    options |= {key: run.machine[key] for key in ("device", "threads")}
    if rows and before["machine"].get("options") != options:
        print(f"the options were {before['machine'].get('options')}: all rows are measured again")
        rows = []
    by_key = {(row["name"], row["evaluations"]): row for row in rows}
    for seed, key in product(range(args.seeds), keys):
        method, evaluations = key
        label = "real images" if method == REAL else METHODS[method].label
        row = by_key.get(key) or {"name": method, "sampler": label, "evaluations": evaluations, "N": args.num, "seeds": []}
        if seed in row["seeds"]:
            continue
        if evaluations is None:
            part = slice(seed * args.num, (seed + 1) * args.num)  # sets of real images are disjoint
            if part.stop > len(real.features):
                continue
            found = figures(Measured(real.predicted[part], real.features[part]), reference, part.start)
        else:
            drawn = to_uint8(draw(loaded, method, evaluations, seed, args))
            found = figures(measure(classifier, drawn), reference)
        by_key[key] = row
        add_seed(row, seed, found)
        row["commit"] = common.commit()
        run.save(section, list(by_key.values()), classifier=about, options=options)
        words = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
        print(f"{method}:{evaluations or ''} seed {seed}: {words}", flush=True)
    print(f"\n{table([by_key[key] for key in keys if key in by_key])}")
    run.finish()


if __name__ == "__main__":
    main()
