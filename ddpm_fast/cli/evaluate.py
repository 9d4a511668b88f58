"""`ddpm-fast evaluate bound`, `psnr` and `fid`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import click

import ddpm_fast

from ..errors import expect
from .console import Command
from .fid import fid_command
from .options import RANGE, VARIANCES, Function, PathOption, adding, json_option, load_model, model_options
from .outputs import check_output, close, write

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..data.items import ItemDataset
    from ..forms import Pairs
    from ..pretrained import Pretrained

_SSIM = 6  # pixels per side that its window needs


@click.group("evaluate")
def evaluate_command() -> None:
    """Measure models and images: the variational bound, PSNR or FID."""


evaluate_command.add_command(fid_command)


def _image_options(command: Function) -> Function:
    """Add the options that choose the images, and how the network sees them."""
    data = "Evaluate the test images of digits, fashion-mnist or cifar10, or all of a folder or zip file."
    options = [
        click.Option(
            ["--num"], type=click.IntRange(1), default=256, show_default=True, help="Evaluate this many images, from the first."
        ),
        click.Option(["--data"], default="fashion-mnist", show_default=True, help=data),
        click.Option(["--data-dir"], type=PathOption(), help="Read the data set from this folder, or download it there."),
        click.Option(
            ["--labels/--no-labels"], default=True, show_default=True, help="Give the network the class of each image."
        ),
    ]
    return adding(options)(json_option(model_options(dtype="float32")(command)))


@evaluate_command.command("bound", cls=Command)
@click.option("--variance", type=click.Choice(VARIANCES), help="Choose the reverse steps' variance.  [default: the model's]")
@_image_options
def bound_command(variance: Any, **options: Any) -> None:
    """Compute the variational bound of test images.

    Print L_T, L_{T-1} + ... + L_1, L_0 and their sum in bits per dimension (eq. 9-11).
    """
    loaded = _loaded(options)
    reads, wanted = loaded.interface.condition, "to read no condition: evaluate psnr is for models that restore images"
    expect(not reads.channels, "bound", "model", wanted, f"{reads}")
    _evaluate(loaded, partial(_bounded, variance=variance or loaded.objective.variance), options)


@evaluate_command.command("psnr", cls=Command)
@click.option(
    "--condition",
    type=PathOption(exists=True),
    help="Restore the images or arrays of this folder or file, for a model that was trained with --condition.",
)
@click.option(
    "--data-range",
    help="Map these values of arrays to -1 and 1: one pair, or one per channel.  [default: those that the model keeps]",
    **RANGE,
)
@click.option("--condition-range", help="Map these values of the arrays of --condition to -1 and 1.", **RANGE)
@click.option(
    "--samples", type=click.IntRange(1), default=8, show_default=True, help="Draw this many samples of each image to restore."
)
@_image_options
def psnr_command(
    samples: int, condition: str | None, data_range: Pairs | None, condition_range: Pairs | None, **options: Any
) -> None:
    """Compute PSNR and SSIM of images that a model restores.

    Print those of the condition (bicubic, for low resolution), of one sample, and of the mean of several.
    """
    loaded = _loaded(options)
    reads = loaded.interface.condition
    expect(reads.channels, "psnr", "model", "to restore images: evaluate bound is for any other", "one without a condition")
    fits, wanted = condition is None or not reads.is_computed, f"to be left out, as the model restores {reads.kind}"
    expect(fits, "psnr", "condition", wanted, condition)
    ranges = {"data_range": data_range, "condition_range": condition_range}
    restores = reads.kind if reads.is_computed else condition
    _evaluate(loaded, partial(_restored, samples=samples), options, condition=restores, **ranges)


def _loaded(options: dict[str, Any]) -> Pretrained:
    """Load the model, after checking what needs none."""
    if options["json"] is not None:
        check_output("evaluate", "json", options["json"])
    return load_model("evaluate", options)


def _evaluate(
    loaded: Pretrained,
    compute: Callable[[Pretrained, ItemDataset, int, dict[str, Any]], tuple[str, list[str], dict[str, Any], str]],
    options: dict[str, Any],
    **read: Any,
) -> None:
    """Read the images, compute the figures, print them and write them to the JSON file."""
    from ..data.condition import evaluated_images
    from ..data.items import read_batch
    from ..data.options import DataOptions
    from ..files.writing import write_json

    data, num, json = options["data"], options["num"], options["json"]
    dataset = evaluated_images(DataOptions(data=data, data_dir=options["data_dir"], **read), loaded.model.config, num)
    expect(num <= len(dataset), "evaluate", "num", f"to be at most {len(dataset)}, the test images of {data}", num)
    classes, known = read_batch(dataset, range(num)).labels, loaded.interface.labels.classes or []
    labelled = bool(options["labels"] and known)
    fits, got = not labelled or {*classes.tolist()} <= {*known}, f"{int(classes.max())}; --no-labels evaluates without"
    expect(fits, "evaluate", "labels", f"to be in {min(known, default=0)}..{max(known, default=0)}, as the model has", got)
    arguments: dict[str, Any] = {
        "class_labels": classes if labelled else None,
        "seed": options["seed"],
        "batch_size": options["batch_size"],
        "progress": not options["quiet"],
    }
    began = time.perf_counter()
    head, lines, result, failure = compute(loaded, dataset, num, arguments)
    seconds = time.perf_counter() - began
    if not options["quiet"]:
        counted = "1 test image" if num == 1 else f"{num} test images"
        click.echo("\n  ".join([f"{counted} of {data}, {head}, {seconds:.1f} s", *lines]))
    if json is not None:
        settings = {"data": data, "num": num, "labels": labelled, "seed": options["seed"], "dtype": options["dtype"]}
        write(json, lambda path: write_json(path, settings | result | {"seconds": seconds}))
    close(failure)


def _bounded(
    loaded: Pretrained, dataset: ItemDataset, num: int, arguments: dict[str, Any], variance: Any
) -> tuple[str, list[str], dict[str, Any], str]:
    """Return the head, the lines and the figures of the variational bound, and what is wrong with them."""
    from ..data.items import read_batch, to_unit_range

    got = "numbers of another range"
    expect(dataset.info.data_range is None, "evaluate", "data", "to be pictures of 256 levels, for bits per dimension", got)
    images = to_unit_range(read_batch(dataset, range(num)).images)
    bound = ddpm_fast.variational_bound(
        *(loaded.model, images, loaded.objective),
        variance=variance,
        clip=loaded.clip,
        **arguments,
    )
    bad = int((~bound.total.isfinite()).sum())
    last = loaded.objective.schedule.num_timesteps
    parts = {
        f"L_{last}": bound.prior,
        f"L_{last - 1} + ... + L_1": bound.transitions,
        "L_0": bound.reconstruction,
        "total": bound.total,
    }
    figures = dict(zip(("prior", "transitions", "reconstruction", "total"), parts.values(), strict=True))
    curves = {"terms": bound.terms, "x_0_mse": bound.x_0_mse, "epsilon_mse": bound.epsilon_mse}
    result = {
        "variance": variance,
        "bits_per_dim": {key: _finite(bits.mean(dim=0, keepdim=True))[0] for key, bits in figures.items()},
        "per_image": {key: _finite(bits) for key, bits in figures.items()},
        "per_timestep": {key: _finite(values.mean(dim=0)) for key, values in curves.items()},
    }
    errors = {name: float(bits.std(correction=0)) / math.sqrt(num) for name, bits in parts.items()}
    lines = [f"{name:<18} {float(bits.mean()):9.5f}  ({errors[name]:.5f})" for name, bits in parts.items()]
    failure = f"the bound of {bad} of {num} images is not finite" if bad else ""
    return f"{variance}: bits/dim (standard error of the mean)", lines, result, failure


def _restored(
    loaded: Pretrained, dataset: ItemDataset, num: int, arguments: dict[str, Any], samples: int
) -> tuple[str, list[str], dict[str, Any], str]:
    """Return the head, the lines and the figures of restored images, and what is wrong with them."""
    import torch

    from ..data.condition import examples
    from ..files.images import condition_as_image
    from ..inference.model import device_and_dtype
    from ..resources import import_extra

    metrics = import_extra("torchmetrics.functional.image", "train")
    smallest = min(dataset.info.shape[1:])
    expect(smallest >= _SSIM, "evaluate", "data", f"to have images of at least {_SSIM} pixels per side, for SSIM", smallest)
    items = examples(dataset, range(num), arguments["seed"])
    plan, sampler = loaded.build_plan()
    draw = loaded.sampler(plan, dtype=device_and_dtype(loaded.model)[1])
    seeds = ddpm_fast.sample_seeds(arguments["seed"], num * samples).view(samples, num)
    drawn = torch.zeros_like(items.images, dtype=torch.float64)
    images: dict[str, Tensor] = {}
    for row in seeds:
        one = draw(num, condition=items.condition, **arguments | {"seed": row}).cpu()
        drawn += one
        images.setdefault("one sample", one)
    if samples > 1:
        images[f"mean of {samples}"] = (drawn / samples).float()
    bad = int((~drawn.flatten(1).isfinite().all(dim=1)).sum())
    kind = loaded.model.config.get("condition") or "images"
    if (given := condition_as_image(items.condition, dataset.info.shape[0])) is not None:
        images = {"bicubic" if kind.startswith("low-resolution") else "condition": given} | images
    per_image, lines = {}, []
    for name, each in images.items():
        pair = each.clamp(-1, 1), items.images
        decibels = metrics.peak_signal_noise_ratio(*pair, data_range=2.0, reduction="none", dim=(1, 2, 3))
        alike = metrics.structural_similarity_index_measure(*pair, data_range=2.0, reduction="none").view(-1)
        per_image[name] = {"psnr": _finite(decibels), "ssim": _finite(alike)}
        lines.append(f"{name:<12} {float(decibels.mean()):6.2f} dB  {float(alike.mean()):.4f}")
    result = {"condition": kind, "samples": samples, "sampler": sampler, "steps": plan.num_steps, "per_image": per_image}
    failure = f"{bad} of {num} images are not finite" if bad else ""
    return f"{kind}, {plan.num_steps} steps of {sampler}: means of PSNR and SSIM", lines, result, failure


def _finite(values: torch.Tensor) -> list[float | None]:
    """Return the values of a vector, with None, which JSON can hold, for those that are not finite."""
    return [value if math.isfinite(value) else None for value in values.tolist()]
