"""`ddpm-fast evaluate`."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

import ddpm_fast

from ..errors import InvalidValue, expect
from .console import Command
from .fid import compare
from .options import RANGE, VARIANCES, PathOption, load_model, model_options
from .outputs import check_output, close, try_writing, write

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..data.items import ItemDataset
    from ..forms import Pairs
    from ..pretrained import Pretrained

_OF_TESTS = ("data", "data_dir", "condition", "data_range", "condition_range", "samples", "variance", "labels")
_OF_FID = ("images", "features", "inception")
_SSIM = 6  # pixels per side that its window needs


@click.command("evaluate", cls=Command)
@click.option(
    *("--num", "--num-samples", "num"),  # torchrun parses --num as one of its own options
    type=click.IntRange(1),
    help="Evaluate this many images, from the first.  [default: 256; with --fid all, or 50000 that --model draws]",
)
@click.option(
    "--data",
    default="fashion-mnist",
    show_default=True,
    help="Evaluate the test images of digits, fashion-mnist or cifar10, or all of a folder or zip file.",
)
@click.option("--data-dir", type=PathOption(), help="Read the data set from this folder, or download it there.")
@click.option(
    "--condition",
    type=PathOption(exists=True),
    help="Restore the images or arrays of this folder or file, for a model that was trained with --condition.",
)
@click.option(
    "--data-range",
    help="Map these values of arrays to -1 and 1, for models that restore images: one pair, or one per channel.  "
    "[default: those that the model keeps]",
    **RANGE,
)
@click.option("--condition-range", help="Map these values of the arrays of --condition to -1 and 1.", **RANGE)
@click.option(
    "--samples", type=click.IntRange(1), default=8, show_default=True, help="Draw this many samples of each image to restore."
)
@click.option("--variance", type=click.Choice(VARIANCES), help="Choose the reverse steps' variance.  [default: the model's]")
@click.option(
    "--fid",
    metavar="REFERENCE",
    type=PathOption(exists=True),
    help="Compare --images with these: a folder or an .npz of images, or an .npz with mu and sigma.",
)
@click.option(
    "--images", type=PathOption(), help="Compare these with --fid: a folder or an .npz. With --model, draw them there first."
)
@click.option(
    "--features",
    type=PathOption(file_okay=False, path_type=Path),
    default="features",
    show_default=True,
    help="Keep the features of --fid in this folder, so that the same command goes on if it was stopped.",
)
@click.option(
    "--inception",
    type=PathOption(exists=True, dir_okay=False),
    help="Read Inception's weights from this file.  [default: those of torch-fidelity, downloaded]",
)
@click.option("--labels/--no-labels", default=True, show_default=True, help="Give the network the class of each image.")
@click.option(
    "--json",
    type=PathOption(dir_okay=False, path_type=Path),
    help="Write the figures to this JSON file.  [default: none]",
)
@model_options("Run the network in this dtype.  [default: float32]")
def evaluate_command(
    num: int | None,
    data: str,
    data_dir: str | None,
    condition: str | None,
    data_range: Pairs | None,
    condition_range: Pairs | None,
    samples: int,
    variance: Any,
    fid: str | None,
    images: str | None,
    features: Path,
    inception: str | None,
    labels: bool,
    json: Path | None,
    **options: Any,
) -> None:
    """Compute the variational bound of test images, their PSNR, or FID.

    Print L_T, L_{T-1} + ... + L_1, L_0 and their sum in bits per dimension (eq. 9-11). For a model with a condition, print
    PSNR and SSIM of the condition (bicubic, for low resolution), of one sample, and of the mean of several.

    With --fid, print the Frechet Inception Distance, KID and the Inception Score of --images. torchrun can start several
    processes, and needs --num-samples for --num.
    """
    from ..data.condition import evaluated_images
    from ..data.items import read_batch
    from ..data.options import DataOptions
    from ..files.writing import write_json

    failures: list[str] = []
    if json is not None:
        check_output("evaluate", "json", json)
        present = json.read_text(errors="replace") if json.exists() else ""
        if present and "per_image" not in present and "frechet_distance" not in present:
            raise InvalidValue("evaluate", "json", "to be new or of an earlier evaluation", repr(str(json)))
    dtype = options["dtype"] = options["dtype"] or "float32"
    source = click.get_current_context().get_parameter_source
    for name in _OF_FID if fid is None else _OF_TESTS:
        wanted = "to go with --fid" if fid is None else "to be left out with --fid"
        expect(source(name) == ParameterSource.DEFAULT, "evaluate", name, wanted, "a value")
    if fid is not None:
        compare(fid, images, num, features, inception, json, **options)
        return
    num = 256 if num is None else num
    loaded = load_model("evaluate", options)
    interface, reads = loaded.interface, loaded.interface.condition
    why = f"restores {reads.kind}" if reads.is_computed else "reads none"
    fits = condition is None or (reads.channels and not reads.is_computed)
    expect(fits, "evaluate", "condition", f"to be left out, as the model {why}", condition)
    restored = reads.kind if reads.is_computed else condition
    images_of = DataOptions(
        data=data, data_dir=data_dir, condition=restored, data_range=data_range, condition_range=condition_range
    )
    dataset = evaluated_images(images_of, loaded.model.config, num)
    expect(num <= len(dataset), "evaluate", "num", f"to be at most {len(dataset)}, the test images of {data}", num)
    classes, known = read_batch(dataset, range(num)).labels, interface.labels.classes or []
    unused = variance is not None and reads.channels
    expect(not unused, "evaluate", "variance", "to be left out, as the model restores images", variance)
    labelled = bool(labels and known)
    fits, got = not labelled or {*classes.tolist()} <= {*known}, f"{int(classes.max())}; --no-labels evaluates without"
    expect(fits, "evaluate", "labels", f"to be in {min(known, default=0)}..{max(known, default=0)}, as the model has", got)
    if json is not None:
        try_writing("evaluate", "json", json)
    arguments: dict[str, Any] = {
        "class_labels": classes if labelled else None,
        "seed": options["seed"],
        "batch_size": options["batch_size"],
        "progress": not options["quiet"],
    }
    began = time.perf_counter()
    if reads.channels:
        head, lines, result = _restored(loaded, dataset, num, samples, arguments, failures)
    else:
        head, lines, result = _bounded(loaded, dataset, num, variance or loaded.objective.variance, arguments, failures)
    seconds = time.perf_counter() - began
    if not options["quiet"]:
        counted = "1 test image" if num == 1 else f"{num} test images"
        click.echo(f"{counted} of {data}, {head}, {seconds:.1f} s")
        for line in lines:
            click.echo(f"  {line}")
    if json is not None:
        settings = {"data": data, "num": num, "labels": labelled, "seed": options["seed"], "dtype": dtype}
        values = {**settings, **result, "seconds": seconds}
        write(json, lambda path: write_json(path, values))
    close("; ".join(failures))


def _bounded(
    loaded: Pretrained, dataset: ItemDataset, num: int, variance: Any, arguments: dict[str, Any], failures: list[str]
) -> tuple[str, list[str], dict[str, Any]]:
    """Return the head, the lines and the figures of the variational bound."""
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
    if bad:
        failures.append(f"the bound of {bad} of {num} images is not finite")
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
    return f"{variance}: bits/dim (standard error of the mean)", lines, result


def _restored(
    loaded: Pretrained, dataset: ItemDataset, num: int, samples: int, arguments: dict[str, Any], failures: list[str]
) -> tuple[str, list[str], dict[str, Any]]:
    """Return the head, the lines and the figures of restored images."""
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
    if bad:
        failures.append(f"{bad} of {num} images are not finite")
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
    return f"{kind}, {plan.num_steps} steps of {sampler}: means of PSNR and SSIM", lines, result


def _finite(values: torch.Tensor) -> list[float | None]:
    """Return the values of a vector, with None, which JSON can hold, for those that are not finite."""
    return [value if math.isfinite(value) else None for value in values.tolist()]
