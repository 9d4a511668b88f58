"""`ddpm-fast evaluate`."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import InvalidValue, expect
from .options import VARIANCES, PathOption, model_options, refusing
from .outputs import check_output, make_writable, save_result

if TYPE_CHECKING:
    import torch


@click.command("evaluate")
@click.option(
    "--num", type=click.IntRange(1), default=256, show_default=True, help="Evaluate this many images, from the first."
)
@click.option(
    "--data",
    default="fashion-mnist",
    show_default=True,
    help="Evaluate the test images of digits, fashion-mnist or cifar10, or all of a folder or zip file.",
)
@click.option("--data-dir", type=PathOption(), help="Read the data set from this folder, or download it there.")
@click.option("--variance", type=click.Choice(VARIANCES), help="Choose the reverse steps' variance.  [default: the model's]")
@click.option("--labels/--no-labels", default=True, show_default=True, help="Give the network the class of each image.")
@click.option(
    "--json",
    type=PathOption(dir_okay=False, path_type=Path),
    help="Write the figures to this JSON file.  [default: none]",
)
@model_options("Run the network in this dtype.  [default: float32]")
def evaluate_command(
    num: int,
    data: str,
    data_dir: str | None,
    variance: Any,
    labels: bool,
    json: Path | None,
    model: Path | None,
    seed: int,
    batch_size: int,
    dtype: str | None,
    device: str | None,
    quiet: bool,
) -> None:
    """Compute the variational bound of test images.

    Print L_T, L_{T-1} + ... + L_1, L_0 and their sum in bits per dimension (eq. 9-11).
    """
    import torch

    from ..checks import computing_device
    from ..evaluation import variational_bound
    from ..files.writing import write_json
    from ..pretrained import BUILTIN, load_folder
    from ..training.data import load_dataset, to_unit_range

    failures: list[str] = []
    with refusing():
        if json is not None:
            check_output("evaluate", "json", json)
            if json.exists() and json.stat().st_size and "bits_per_dim" not in json.read_text(errors="replace"):
                raise InvalidValue("evaluate", "json", "to be new or of an earlier evaluation", repr(str(json)))
        dtype = dtype or "float32"
        loaded = load_folder(model or BUILTIN, computing_device("evaluate", device), getattr(torch, dtype))
        variance = variance or loaded.variance
        dataset = load_dataset(data, data_dir, split="test", image_size=loaded.model.config["sample_size"], first=num)
        expect(num <= len(dataset), "evaluate", "num", f"to be at most {len(dataset)}, the test images of {data}", num)
        if dataset.shape[0] != loaded.model.config["in_channels"]:
            channels = loaded.model.config["in_channels"]
            raise InvalidValue(
                "evaluate", "data", f"to have {channels} channels, as the model has", f"{data!r} with {dataset.shape[0]}"
            )
        images, classes = dataset.batch(torch.arange(num))
        embeddings = loaded.model.config["num_class_embeds"]
        labelled = labels and embeddings is not None
        if labelled and classes.max() >= embeddings - 1:
            raise InvalidValue(
                "evaluate",
                "labels",
                f"to be in 0..{embeddings - 2}, as the model has",
                f"{int(classes.max())}; --no-labels evaluates without",
            )
        if json is not None:
            make_writable("evaluate", "json", json.parent)
        began = time.perf_counter()
        bound = variational_bound(
            loaded.model,
            to_unit_range(images),
            loaded.schedule,
            prediction=loaded.prediction,
            variance=variance,
            clip=loaded.clip,
            class_labels=classes if labelled else None,
            seed=seed,
            batch_size=batch_size,
            progress=not quiet,
        )
        seconds = time.perf_counter() - began
        bad = int((~bound.total.isfinite()).sum())
        if bad:
            failures.append(f"the bound of {bad} of {num} images is not finite")
    last = loaded.schedule.num_timesteps
    parts = {
        f"L_{last}": bound.prior,
        f"L_{last - 1} + ... + L_1": bound.transitions,
        "L_0": bound.reconstruction,
        "total": bound.total,
    }
    if json is not None:
        settings = {"data": data, "num": num, "variance": variance, "labels": labelled, "seed": seed, "dtype": dtype}
        keys = ("prior", "transitions", "reconstruction", "total")
        figures = dict(zip(keys, parts.values(), strict=True))
        curves = {"terms": bound.terms, "x_0_mse": bound.x_0_mse, "epsilon_mse": bound.epsilon_mse}
        result = {
            **settings,
            "bits_per_dim": {key: _finite(bits.mean(dim=0, keepdim=True))[0] for key, bits in figures.items()},
            "per_image": {key: _finite(bits) for key, bits in figures.items()},
            "per_timestep": {key: _finite(values.mean(dim=0)) for key, values in curves.items()},
            "seconds": seconds,
        }
        save_result(lambda path: write_json(path, result), json, failures)
    if not quiet:
        counted = "1 test image" if num == 1 else f"{num} test images"
        click.echo(f"{counted} of {data}, {variance}: bits/dim (standard error of the mean), {seconds:.1f} s")
        for name, bits in parts.items():
            error = float(bits.std(correction=0)) / math.sqrt(num)
            click.echo(f"  {name:<18} {float(bits.mean()):9.5f}  ({error:.5f})")
    if failures:
        raise click.ClickException("; ".join(failures))


def _finite(values: torch.Tensor) -> list[float | None]:
    """Return the values of a vector, with None, which JSON can hold, for those that are not finite."""
    return [value if math.isfinite(value) else None for value in values.tolist()]
