"""Measure sample quality on Fashion-MNIST, by sampler and number of network evaluations.

    python benchmarks/benchmark_quality.py
    python benchmarks/benchmark_quality.py --samplers ddpm:100 sde --evaluations 10 20 --seeds 1
    python benchmarks/benchmark_quality.py --table --plot quality.png      (from the results, without measuring)

The judges of judges.py judge images of the built-in model, as 8-bit pixels. They are trained once, in minutes, into the user's
cache. Their reference is 5,000 test images, 500 of each class.

- Frechet distance: of the class judge's features, which tell shapes apart.
- accuracy: the share of images to which the class judge assigns the class that was asked for.
- grain: the Frechet distance of the grain judge's features, which see noise and blur.

The floor is the same measurement of real images: disjoint sets from the other 5,000 test images, one a seed.
The judges have seen neither half. The distances depend on N and on the judges: compare figures of one N and the same files.

Every seed of every row is written when it is done. A later run with the same weights and options continues.
All rows of seed 0 come first, the cheapest ones first.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Final, NamedTuple

import common
import torch
from judges import CLASS_RECIPE, CLASSES, Jury
from torch import Tensor, nn

from ddpm_fast import SamplingPlan, load_builtin
from ddpm_fast.data.items import read_batch
from ddpm_fast.data.load import load_dataset
from ddpm_fast.data.options import DataOptions
from ddpm_fast.files.images import to_uint8
from ddpm_fast.pretrained import Pretrained

REAL: Final = "real"
EVALUATIONS: Final = (5, 6, 8, 10, 12, 20, 50)

Row = dict[str, Any]


# ------------------------------------------------------------------------------------------------------------ samplers


def _planned(sampler: str, **options: Any) -> Callable[[Pretrained, int, float], SamplingPlan]:
    """Return how to build the plan of a sampler, as the command does, from a model, evaluations and the scale of guidance."""

    def plan(loaded: Pretrained, evaluations: int, guidance: float) -> SamplingPlan:
        # Heun's method evaluates the network 2 S - 1 times in S steps.
        steps = (evaluations + 1) // 2 if sampler == "heun" else evaluations
        return loaded.build_plan(sampler=sampler, steps=steps, **options)[0]

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


_LEVELS: Final[dict[str, Any]] = {"spacing": "karras", "sigma_min": 0.02, "sigma_max": 80.0}


def _own(loaded: Pretrained, evaluations: int, guidance: float) -> SamplingPlan:
    """Return the plan that the command takes by default, in this number of steps."""
    return loaded.build_plan(steps=evaluations, guidance_scale=guidance)[0]


METHODS: Final = {
    "ddpm": Method("ancestral (eq. 13)", _planned("ddpm"), (10, 20, 50)),
    "ddim": Method("DDIM", _planned("ddim"), (10, 20, 50)),
    "2m": Method("DPM-Solver++(2M)", _planned("dpm++2m"), (6, 10, 20)),
    "heun": Method("Heun", _planned("heun"), (5, 10, 20)),
    "sde": Method("DPM-Solver++(2M) SDE", _planned("dpm++2m-sde"), (6, 10, 20, 50)),
    "few": Method("DPM-Solver++(2M), levels 80 to 0.02", _planned("dpm++2m", **_LEVELS), (6, 8, 12, 20)),
    "own": Method("the built-in model's plan", _own, (6,)),
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

    lines = ["| sampler | evaluations | Frechet distance | accuracy | grain | seeds |", "|---|---|---|---|---|---|"]
    order = [*METHODS, REAL]
    for row in sorted(rows, key=lambda row: (order.index(row["name"]), row["evaluations"] or 0)):
        cells = [row["sampler"], row["evaluations"] or "", cell(row["class"], ".3g"), cell(row["accuracy"], ".3f")]
        cells.append(cell(row["grain"], ".2g"))
        lines.append(f"| {' | '.join(map(str, [*cells, len(row['seeds'])]))} |")
    return "\n".join(lines)


def plot(rows: Sequence[Row], title: str) -> Any:
    """Draw the Frechet distance over evaluations: a line for each sampler, and the floor."""
    figure, axes = common.pyplot().subplots(figsize=(8, 6.4), layout="constrained")
    for place, (name, method) in enumerate(METHODS.items()):
        points = sorted((row for row in rows if row["name"] == name), key=lambda row: row["evaluations"])
        if not points:
            continue
        means, stds = ([row["class"][key] or 0 for row in points] for key in ("mean", "std"))
        # An error bar has to end above zero on a logarithmic axis.
        errors = [[min(std, 0.9 * mean) for std, mean in zip(stds, means, strict=True)], stds]
        style = {"color": f"C{place}", "marker": "osD^vPX"[place % 7], "capsize": 2}
        axes.errorbar([row["evaluations"] for row in points], means, errors, label=method.label, **style)
    for row in rows:
        if row["name"] == REAL:
            mean = row["class"]["mean"]
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
    features = CLASS_RECIPE["features"]
    if args.num <= features:
        raise SystemExit(f"--num: expected more images than the {features} features, got {args.num}")
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

    test = load_dataset(DataOptions(data="fashion-mnist"), split="test")
    images, labels, _ = read_batch(test, range(len(test)))
    jury = Jury(images, labels)
    run = common.Run(args.device, path)
    options = {"weights": weights, "batch": args.batch} | {name: about["sha256"][:12] for name, about in jury.about.items()}
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
            if part.stop > len(jury.real):
                continue
            judged, wanted = jury.real[part], torch.arange(part.start, part.stop) % CLASSES
        else:
            judged = to_uint8(draw(loaded, method, evaluations, seed, args))
            wanted = torch.arange(args.num) % CLASSES
        found = jury.figures(judged, wanted)
        by_key[key] = row
        add_seed(row, seed, found)
        row["commit"] = common.commit()
        run.save(section, list(by_key.values()), judges=jury.about, options=options)
        words = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
        print(f"{method}:{evaluations or ''} seed {seed}: {words}", flush=True)
    print(f"\n{table([by_key[key] for key in keys if key in by_key])}")
    run.finish()


if __name__ == "__main__":
    main()
