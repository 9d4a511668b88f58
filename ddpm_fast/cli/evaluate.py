"""`ddpm-fast evaluate bound`, `psnr` and `fid`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import ddpm_fast

from ..errors import expect
from ..predictions import Variance
from ..sampling.options import ClassLabels
from .console import Command
from .fid import fid_command
from .options import RANGE, VARIANCES, Batches, Function, PathOption, Running, adding, gathering, json_option, model_options
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


class _Draw(Batches):
    """The arguments of a function that evaluates a network."""

    seed: int
    class_labels: ClassLabels


@dataclass(frozen=True)
class _Images:
    """The test images of a command, how the network sees them, and the file for figures."""

    num: int
    data: str
    data_dir: str | None
    labels: bool
    json: Path | None


def _image_options(command: Function) -> Function:
    """Add the options that choose the images, and those of `Running`."""
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
    gather = gathering("images", _Images, _Images.__annotations__)
    return adding(options)(json_option(model_options(dtype="float32")(gather(command))))


@evaluate_command.command("bound", cls=Command)
@click.option("--variance", type=click.Choice(VARIANCES), help="Choose the reverse steps' variance.  [default: the model's]")
@_image_options
def bound_command(*, variance: Variance | None, images: _Images, running: Running) -> None:
    """Compute the variational bound of test images.

    Print L_T, L_{T-1} + ... + L_1, L_0 and their sum in bits per dimension (eq. 9-11).
    """
    loaded = _loaded(images, running)
    reads, wanted = loaded.interface.condition, "to read no condition: evaluate psnr is for models that restore images"
    expect(not reads.channels, "model", wanted, f"{reads}")
    _evaluate(loaded, partial(_bounded, variance=variance or loaded.objective.variance), images, running)


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
    *,
    samples: int,
    condition: str | None,
    data_range: Pairs | None,
    condition_range: Pairs | None,
    images: _Images,
    running: Running,
) -> None:
    """Compute PSNR and SSIM of images that a model restores.

    Print those of the condition (bicubic, for low resolution), of one sample, and of the mean of several.
    """
    loaded = _loaded(images, running)
    reads = loaded.interface.condition
    expect(reads.channels, "model", "to restore images: evaluate bound is for any other", "one without a condition")
    fits, wanted = condition is None or not reads.is_computed, f"to be left out, as the model restores {reads.kind}"
    expect(fits, "condition", wanted, condition)
    ranges = {"data_range": data_range, "condition_range": condition_range}
    restores = reads.kind if reads.is_computed else condition
    _evaluate(loaded, partial(_restored, samples=samples), images, running, condition=restores, **ranges)


def _loaded(images: _Images, running: Running) -> Pretrained:
    """Load the model, after checking what needs none."""
    if images.json is not None:
        check_output("json", images.json)
    return running.load()


def _evaluate(
    loaded: Pretrained,
    compute: Callable[[Pretrained, ItemDataset, int, _Draw, torch.dtype | None], tuple[str, list[str], dict[str, Any], str]],
    given: _Images,
    running: Running,
    **read: Any,
) -> None:
    """Read the images, compute the figures, print them and write them to the JSON file."""
    from ..data.condition import evaluated_images
    from ..data.items import read_batch
    from ..data.options import DataOptions
    from ..files.writing import write_json

    data, num, json = given.data, given.num, given.json
    dataset = evaluated_images(DataOptions(data=data, data_dir=given.data_dir, **read), loaded.model.config, num)
    expect(num <= len(dataset), "num", f"to be at most {len(dataset)}, the test images of {data}", num)
    labels, reads = read_batch(dataset, range(num)).labels, loaded.interface.labels
    labelled = bool(given.labels and reads.classes)
    if labelled:
        reads.check_images(labels, "--no-labels evaluates without")
    draw: _Draw = {**running.batches, "seed": running.seed, "class_labels": labels if labelled else None}
    began = time.perf_counter()
    head, lines, result, failure = compute(loaded, dataset, num, draw, running.torch_dtype)
    seconds = time.perf_counter() - began
    if not running.quiet:
        counted = "1 test image" if num == 1 else f"{num} test images"
        click.echo("\n  ".join([f"{counted} of {data}, {head}, {seconds:.1f} s", *lines]))
    if json is not None:
        settings = {"data": data, "num": num, "labels": labelled, **running.record(loaded)}
        write(json, lambda path: write_json(path, settings | result | {"seconds": seconds}))
    close(failure)


def _bounded(
    loaded: Pretrained, dataset: ItemDataset, num: int, draw: _Draw, dtype: torch.dtype | None, variance: Variance
) -> tuple[str, list[str], dict[str, Any], str]:
    """Return the head, the lines and the figures of the variational bound, and what is wrong with them."""
    from ..data.items import read_batch, to_unit_range

    got = "numbers of another range"
    expect(dataset.info.data_range is None, "data", "to be pictures of 256 levels, for bits per dimension", got)
    images = to_unit_range(read_batch(dataset, range(num)).images)
    plan = ddpm_fast.ddpm_plan(loaded.objective, variance=variance, clip=loaded.clip)
    sampler = loaded.sampler(plan, dtype=dtype, shape=tuple(images.shape[1:]))
    bound = ddpm_fast.VariationalBound.of(sampler, images, **draw)
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
    loaded: Pretrained, dataset: ItemDataset, num: int, draw: _Draw, dtype: torch.dtype | None, samples: int
) -> tuple[str, list[str], dict[str, Any], str]:
    """Return the head, the lines and the figures of restored images, and what is wrong with them."""
    import torch

    from ..data.condition import examples
    from ..files.images import condition_as_image
    from ..resources import import_extra

    metrics = import_extra("torchmetrics.functional.image", "train")
    smallest = min(dataset.info.shape[1:])
    expect(smallest >= _SSIM, "data", f"to have images of at least {_SSIM} pixels per side, for SSIM", smallest)
    seed = draw["seed"]
    items = examples(dataset, range(num), seed)
    plan, name = loaded.build_plan()
    sampler = loaded.sampler(plan, dtype=dtype)
    seeds = ddpm_fast.sample_seeds(seed, num * samples).view(samples, num)
    drawn = torch.zeros_like(items.images, dtype=torch.float64)
    images: dict[str, Tensor] = {}
    for row in seeds:
        one = sampler(num, **{**draw, "condition": items.condition, "seed": row}).cpu()
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
    result = {"condition": kind, "samples": samples, "sampler": name, "steps": plan.num_steps, "per_image": per_image}
    failure = f"{bad} of {num} images are not finite" if bad else ""
    return f"{kind}, {plan.num_steps} steps of {name}: means of PSNR and SSIM", lines, result, failure


def _finite(values: torch.Tensor) -> list[float | None]:
    """Return the values of a vector, with None, which JSON can hold, for those that are not finite."""
    return [value if math.isfinite(value) else None for value in values.tolist()]
