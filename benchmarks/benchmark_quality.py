"""Measure sample quality and time on Fashion-MNIST, by sampler and number of network evaluations.

    python benchmarks/benchmark_quality.py
    python benchmarks/benchmark_quality.py --samplers ddpm:100 sde --evaluations 10 20 --seeds 1
    python benchmarks/benchmark_quality.py --table --plot quality.png      (from the results, without measuring)

The script trains a small classifier once, in minutes, from a fixed recipe. Later runs read it from the user's cache.
Three figures describe each sampler. The first two use the images as 8-bit pixels:

- Frechet distance (classifier features): between Gaussians fitted to the classifier's 64 penultimate features.
  The reference is 5,000 test images, 500 of each class. This is not FID, which uses Inception's features.
- accuracy: the share of images that the classifier assigns to the class that was asked for.
- seconds an image: the median of the batches of a seed, then the median of the seeds. Building the sampler is not timed.

The floor is the same measurement of real images: disjoint sets from the other 5,000 test images, one a seed.
The classifier has seen neither half. The Frechet distance depends on N and on the classifier: compare figures of one
N and one classifier file only.

Every seed of every row is written when it is done. A later run with the same weights and options continues.
All rows of seed 0 come first, the cheapest ones first.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Final, NamedTuple

import common
import peers
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from ddpm_fast import (
    SamplingPlan,
    ddim_plan,
    ddpm_plan,
    dpm_solver_plan,
    frechet_distance,
    heun_plan,
    load_builtin,
    load_folder,
    sample_seeds,
)
from ddpm_fast.files.images import to_uint8
from ddpm_fast.files.writing import replacing
from ddpm_fast.pretrained import Pretrained
from ddpm_fast.training.data import FASHION_MNIST_CLASSES, load_dataset, read_batch, to_unit_range

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
DISTANCE: Final = "Frechet distance (classifier features)"
SECONDS: Final = "s/image"
REAL: Final = "real"
EVALUATIONS: Final = (4, 5, 6, 8, 10, 20, 50, 100, 1000)

Row = dict[str, Any]
Draw = Callable[[Tensor, Tensor], Tensor]  # from seeds and labels, int64 [n], to images in [-1, 1]


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


def recipe_text() -> str:
    return json.dumps(RECIPE, sort_keys=True)


def save_classifier(path: Path, classifier: Classifier) -> None:
    """Write a classifier and its recipe as safetensors, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        weights = {name: tensor.contiguous() for name, tensor in classifier.state_dict().items()}
        safetensors.torch.save_file(weights, temporary, metadata={"recipe": recipe_text()})


def load_classifier(path: Path) -> Classifier:
    """Read a classifier that `save_classifier` wrote.

    Raises:
        ValueError: The file holds no classifier of this recipe.
    """
    with safetensors.safe_open(path, framework="pt") as file:
        recipe = (file.metadata() or {}).get("recipe")
    if recipe != recipe_text():
        raise ValueError(
            f"benchmark_quality: expected {str(path)!r} to hold a classifier of this script's recipe, got recipe {recipe}; "
            "name another --classifier, or remove the file to train it again"
        )
    classifier = Classifier()
    classifier.load_state_dict(safetensors.torch.load_file(path))
    return classifier.eval()


def default_classifier() -> Path:
    """Return the classifier's place in the user's cache. Another recipe has another name."""
    digest = hashlib.sha256(recipe_text().encode()).hexdigest()[:8]
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


class Judge(NamedTuple):
    """A classifier and the real images that others are compared with.

    Attributes:
        classifier: The trained classifier.
        real: Real images to measure. Image i has class i % 10.
        reference: Other real images.
    """

    classifier: Classifier
    real: Measured
    reference: Measured

    def of_images(self, images: Tensor) -> dict[str, float]:
        """Return the figures of images in [-1, 1] of all classes in turn."""
        return self._figures(measure(self.classifier, to_uint8(images)), start=0)

    def of_real(self, num: int, seed: int) -> dict[str, float] | None:
        """Return the figures of a set of `num` real images, or None if no set is left. Sets are disjoint."""
        part = slice(seed * num, (seed + 1) * num)
        if part.stop > len(self.real.features):
            return None
        return self._figures(Measured(self.real.predicted[part], self.real.features[part]), start=part.start)

    def _figures(self, measured: Measured, start: int) -> dict[str, float]:
        wanted = torch.arange(start, start + len(measured.predicted)) % CLASSES
        distance = frechet_distance(measured.features, self.reference.features)
        return {DISTANCE: distance, "accuracy": measured.accuracy(wanted)}


# ------------------------------------------------------------------------------------------------------------ samplers


def _planned(build: Callable[..., SamplingPlan], **options: Any) -> Callable[[Pretrained, int], SamplingPlan]:
    """Return how to build a plan for a model from the number of evaluations."""

    def plan(loaded: Pretrained, evaluations: int) -> SamplingPlan:
        # Heun's method evaluates the network 2 S - 1 times in S steps.
        steps = (evaluations + 1) // 2 if build is heun_plan else evaluations
        return build(loaded.objective, steps, clip=loaded.clip, **options)

    return plan


class Method(NamedTuple):
    """A sampler.

    Attributes:
        label: Name in tables and plots.
        plan: How to build its plan. None: diffusers draws, see `peers.SAMPLING`.
        evaluations: Numbers of evaluations that are measured by default.
    """

    label: str
    plan: Callable[[Pretrained, int], SamplingPlan] | None
    evaluations: tuple[int, ...]


# Ordinary differential equations have converged at 50 evaluations. Only eq. 13 is used with all timesteps.
_CONVERGED: Final = EVALUATIONS[:-2]
_FEW: Final = EVALUATIONS[:5]  # where the levels end and begin matters most
_THIRD: Final = (5, 8, 10, 20)
_LEVELS: Final[dict[str, Any]] = {"solver": "heun", "spacing": "karras", "sigma_min": 0.06, "sigma_max": 80.0}
METHODS: Final = {
    "ddpm": Method("ancestral (eq. 13)", _planned(ddpm_plan), EVALUATIONS),
    "ddim": Method("DDIM", _planned(ddim_plan), EVALUATIONS[:-1]),
    "2m": Method("DPM-Solver++(2M)", _planned(dpm_solver_plan), _CONVERGED),
    "karras": Method("DPM-Solver++(2M), Karras", _planned(dpm_solver_plan, spacing="karras"), _CONVERGED),
    "heun": Method("Heun", _planned(heun_plan), _CONVERGED[1:]),  # 3 evaluations give noise
    "sde": Method("DPM-Solver++(2M) SDE", _planned(dpm_solver_plan, eta=1.0), EVALUATIONS[:-1]),
    "sde-karras": Method(
        "DPM-Solver++(2M) SDE, Karras, Heun",
        _planned(dpm_solver_plan, eta=1.0, spacing="karras", solver="heun"),
        EVALUATIONS[:-1],
    ),
    "2m-few": Method("DPM-Solver++(2M), levels 80 to 0.06", _planned(dpm_solver_plan, **_LEVELS), (*_FEW, 20)),
    "2m-few-0.3": Method("DPM-Solver++(2M), levels 80 to 0.06, eta 0.3", _planned(dpm_solver_plan, eta=0.3, **_LEVELS), _FEW),
    "2m-few-1": Method("DPM-Solver++(2M) SDE, levels 80 to 0.06", _planned(dpm_solver_plan, eta=1.0, **_LEVELS), _FEW),
    "2m-fewer": Method(
        "DPM-Solver++(2M), levels 40 to 0.06", _planned(dpm_solver_plan, **_LEVELS | {"sigma_max": 40.0}), _FEW[:3]
    ),
    "sde1": Method("first-order SDE", _planned(dpm_solver_plan, eta=1.0, order=1), _CONVERGED),
    "diffusers-ddpm": Method("diffusers DDPMScheduler", None, (100,)),
    "diffusers-ddim": Method("diffusers DDIMScheduler", None, (50,)),
    "diffusers-2m": Method("diffusers DPMSolverMultistep", None, (20,)),
    "diffusers-sde": Method("diffusers DPMSolverMultistep SDE", None, (20,)),
    # These are measured only if they are named: order 3, and DDIM with diffusers' treatment of the clip.
    "3m": Method("DPM-Solver++(3M)", _planned(dpm_solver_plan, order=3), _THIRD),
    "3m-few": Method("DPM-Solver++(3M), levels 80 to 0.06", _planned(dpm_solver_plan, order=3, **_LEVELS), _THIRD),
    "3m-sde": Method("DPM-Solver++(3M) SDE", _planned(dpm_solver_plan, eta=1.0, order=3), _THIRD),
    "ddim-model-epsilon": Method("DDIM, the model's epsilon", _planned(ddim_plan, use_clipped_model_output=False), (50, 100)),
}
DEFAULT: Final = tuple(METHODS)[:-4]


def chosen(samplers: Sequence[str], evaluations: Sequence[int]) -> list[tuple[str, int]]:
    """Return pairs of method and number of evaluations, the cheapest ones first.

    Args:
        samplers: METHOD:EVALUATIONS, or METHOD for those of its default evaluations that `evaluations` has. A peer
            has one number, and `evaluations` does not apply.
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
        method = METHODS[name]
        numbers = [int(number)] if colon else [n for n in method.evaluations if method.plan is None or n in evaluations]
        if name == "heun":
            numbers = [2 * ((n + 1) // 2) - 1 for n in numbers]
        pairs |= {(name, n) for n in numbers}
    names = list(METHODS)
    return sorted(pairs, key=lambda pair: (pair[1], names.index(pair[0])))


def build_draw(loaded: Pretrained, name: str, evaluations: int, dtype: torch.dtype, device: str, guidance: float = 1.0) -> Draw:
    """Build a sampler: a function from seeds and labels to images. Peers have no guidance."""
    plan = METHODS[name].plan
    if plan is None:
        draw: Draw = peers.SAMPLING[name].build(loaded, evaluations, dtype, device)
        return draw
    sampler = loaded.sampler(plan(loaded, evaluations), dtype=dtype, device=device)
    return lambda seeds, labels: sampler(len(seeds), seed=seeds, class_labels=labels, guidance_scale=guidance, progress=False)


def draw_timed(draw: Draw, num: int, batch: int, seed: int, device: str) -> tuple[Tensor, float]:
    """Draw images of all classes in turn. Return them on the CPU, with the median over the batches of seconds an image."""
    seconds, images = [], []
    seeds, labels = sample_seeds(seed, num), torch.arange(num) % CLASSES
    for some, wanted in zip(seeds.split(batch), labels.split(batch), strict=True):
        began = time.perf_counter()
        drawn = draw(some, wanted)
        common.synchronize(device)
        seconds.append((time.perf_counter() - began) / len(some))
        images.append(drawn.cpu())
    whole = seconds[: num // batch] or seconds  # a smaller last batch is slower an image
    return torch.cat(images), statistics.median(whole)


def load_model(name: str, device: str) -> Pretrained:
    """Load the built-in model, or one from a folder, and check that it draws Fashion-MNIST's classes.

    Raises:
        ValueError: The model has other images or classes.
    """
    loaded = load_builtin(device) if name == "builtin" else load_folder(name, device)
    config = loaded.model.config
    got = (config["in_channels"], config["sample_size"], tuple(config.get("class_names", ())))
    if got != (1, 32, FASHION_MNIST_CLASSES):
        raise ValueError(
            f"benchmark_quality: expected a model of 1x32x32 images with Fashion-MNIST's {CLASSES} classes, "
            f"got {got[0]} channels, size {got[1]}, classes {', '.join(got[2]) or 'none'}"
        )
    return loaded


def weights_hash(model: nn.Module) -> str:
    """Return a digest of the parameters and buffers, 12 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


# ---------------------------------------------------------------------------------------------------------------- rows


def add_seed(row: Row, seed: int, figures: Mapping[str, float | None]) -> None:
    """Add the figures of a seed to a row, and update its statistics. Real images take no seconds."""
    row["seeds"] = [*row["seeds"], seed]
    for key, value in figures.items():
        values = [*(row.get(key) or {"by seed": []})["by seed"], value]
        row[key] = None if value is None else spread(values)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return the statistics of the seeds' figures."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "median": statistics.median(values), "std": std, "by seed": values}


def table(rows: Sequence[Row]) -> str:
    """Return rows as a Markdown table, by sampler and evaluations."""

    def cell(figure: Mapping[str, Any], digits: str) -> str:
        return f"{figure['mean']:{digits}}" + ("" if figure["std"] is None else f" ± {figure['std']:.2g}")

    lines = ["| sampler | evaluations | Frechet distance | accuracy | ms an image | seeds |", "|---|---|---|---|---|---|"]
    order = [*METHODS, REAL]
    for row in sorted(rows, key=lambda row: (order.index(row["name"]), row["evaluations"] or 0)):
        seconds = "" if row[SECONDS] is None else f"{1e3 * row[SECONDS]['median']:.3g}"
        cells = [row["sampler"], row["evaluations"] or "", cell(row[DISTANCE], ".3g"), cell(row["accuracy"], ".3f"), seconds]
        lines.append(f"| {' | '.join(map(str, [*cells, len(row['seeds'])]))} |")
    return "\n".join(lines)


def plot(rows: Sequence[Row], title: str) -> Any:
    """Draw the Frechet distance over evaluations: a line for each sampler, a point for each peer, and the floor."""
    figure, axes = common.pyplot().subplots(figsize=(8, 6.4), layout="constrained")
    ours = [name for name, method in METHODS.items() if method.plan is not None]
    for place, (name, method) in enumerate(METHODS.items()):
        points = sorted((row for row in rows if row["name"] == name), key=lambda row: row["evaluations"])
        if not points:
            continue
        means, stds = ([row[DISTANCE][key] or 0 for row in points] for key in ("mean", "std"))
        # An error bar has to end above zero on a logarithmic axis.
        errors = [[min(std, 0.9 * mean) for std, mean in zip(stds, means, strict=True)], stds]
        style = {"color": f"C{place % 10}", "linestyle": ("-", "-.")[place // 10]}
        style = style if name in ours else {"color": "#777777", "linestyle": "none", "markerfacecolor": "white"}
        marker = "osD^vPX"[place % 7]
        evaluations = [row["evaluations"] for row in points]
        axes.errorbar(evaluations, means, errors, label=method.label, marker=marker, capsize=2, **style)
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
        "--model": {"default": "builtin", "help": "take builtin (default) or a model's or training run's folder"},
        "--samplers": {"nargs": "+", "default": DEFAULT, "metavar": "METHOD[:N]", "help": f"measure these (most). {methods}"},
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
        "--dtype": {"choices": common.DTYPES, "default": "float32", "help": "run the network in this dtype (float32)"},
        "--classifier": {"type": Path, "help": "read this classifier, or train it into this file if absent"},
        "--table": {"action": "store_true", "help": "print the results as a Markdown table, and measure nothing"},
        "--plot": {"type": Path, "help": "draw the results into this PNG, and measure nothing"},
    }
    args = common.parse(__doc__, arguments, options)
    if args.num <= RECIPE["features"]:
        raise SystemExit(f"--num: expected more images than the {RECIPE['features']} features, got {args.num}")
    pairs = chosen(args.samplers, args.evaluations)

    loaded = load_model(args.model, args.device)
    name = args.model if args.model == "builtin" else Path(args.model).name
    weights = weights_hash(loaded.model)
    section = f"benchmark_quality {name} {weights} {args.dtype} N={args.num}"
    section += "" if args.guidance == 1 else f" guidance {args.guidance:g}"
    # A run of hours goes on from what it has.
    path = common.default_output(args.device) if args.out in (None, common.RECORDED) else args.out
    before = common.read_results(path).get(section, {"machine": {}, "rows": []})
    rows: list[Row] = before["rows"]
    if args.table or args.plot:
        if (args.samplers, args.evaluations) != (DEFAULT, EVALUATIONS):
            rows = [row for row in rows if (row["name"], row["evaluations"]) in {(REAL, None), *pairs}]
        if not rows:
            raise SystemExit(
                f"--table, --plot: expected {str(path)!r} to have the section {section!r}, got none: measure first"
            )
        if args.table:
            print(table(rows))
        if args.plot:
            common.save_picture(args.plot, plot(rows, f"{name}, {args.dtype}, {args.num} images a point"))
        return

    skipped = {each: reason for each, peer in peers.SAMPLING.items() if (reason := peer.why_not(args.dtype)) is not None}
    if args.guidance != 1:
        skipped |= dict.fromkeys(peers.SAMPLING, "its pipeline has no guidance")
    for each, reason in skipped.items():
        print(f"left out: {each}: {reason}")
    dtype = common.DTYPES[args.dtype]
    test = load_dataset("fashion-mnist", split="test")
    images, labels, _ = read_batch(test, range(len(test)))
    file = args.classifier or default_classifier()
    classifier, of_test = trained_classifier(file, images, labels)
    judge = Judge(classifier, *(Measured(of_test.predicted[half], of_test.features[half]) for half in split_real(labels)))
    run = common.Run(args.device, path)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    about = {"test accuracy": round(of_test.accuracy(labels), 4), "sha256": digest, "recipe": RECIPE}
    options = {"weights": weights, "classifier": digest[:12], "batch": args.batch}
    options |= {key: run.machine[key] for key in ("device", "threads")}
    if rows and before["machine"].get("options") != options:
        print(f"the options were {before['machine'].get('options')}: all rows are measured again")
        rows = []
    by_key = {(row["name"], row["evaluations"]): row for row in rows}
    for seed, key in product(range(args.seeds), [(REAL, None), *(pair for pair in pairs if pair[0] not in skipped)]):
        method, evaluations = key
        label = "real images" if method == REAL else METHODS[method].label
        row = by_key.get(key) or {"name": method, "sampler": label, "evaluations": evaluations, "N": args.num, "seeds": []}
        if seed in row["seeds"]:
            continue
        if evaluations is None:
            found, seconds = judge.of_real(args.num, seed), None
        else:
            draw = build_draw(loaded, method, evaluations, dtype, args.device, args.guidance)
            drawn, seconds = draw_timed(draw, args.num, args.batch, seed, args.device)
            found = judge.of_images(drawn)
        if found is not None:
            by_key[key] = row
            add_seed(row, seed, found | {SECONDS: seconds})
            row["commit"] = common.commit()
            run.save(section, list(by_key.values()), classifier=about, options=options)
            words = ", ".join(f"{name} {value:.3g}" for name, value in {**found, SECONDS: seconds}.items() if value is not None)
            print(f"{method}:{evaluations or ''} seed {seed}: {words}", flush=True)
    print(f"\n{table(list(by_key.values()))}")
    run.finish()


if __name__ == "__main__":
    main()
