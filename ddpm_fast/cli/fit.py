"""`ddpm-fast fit`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import ddpm_fast

from ..errors import ArgumentError, expect, renaming
from ..samplers import DEFAULT_SAMPLER
from .console import Command
from .labels import labels_in_text
from .options import PathOption, Running, class_options, model_options
from .outputs import check_output, write

if TYPE_CHECKING:
    from torch import Tensor

    from ..pretrained import Pretrained

_GRID = 64  # images of a plan in its picture


@click.command("fit", cls=Command)
@click.argument("model", type=PathOption(exists=True, file_okay=False, path_type=Path))
@click.option("--steps", type=click.IntRange(2, 100), default=5, show_default=True, help="Fit a plan of this many steps.")
@click.option(
    "--teacher-steps", type=click.IntRange(3, 1000), default=8, show_default=True, help="Fit it to a plan of this many steps."
)
@click.option(
    "--num", type=click.IntRange(2), default=32, show_default=True, help="Fit with this many images, and judge by as many."
)
@click.option(
    "--data",
    help="Compare images with these: digits, fashion-mnist, cifar10, a folder or a zip file.  [default: those of the run]",
)
@click.option("--data-dir", type=PathOption(), help="Read the data set from this folder, or download it there.")
@class_options("all")
@model_options(named=False)
def fit_command(
    *,
    steps: int,
    teacher_steps: int,
    num: int,
    data: str | None,
    data_dir: str | None,
    class_labels: str | None,
    guidance_scale: float | None,
    running: Running,
) -> None:
    """Fit a plan of few steps to a slower one.

    Write it to plan.json in MODEL, where sampling finds it. Both plans are DPM-Solver++(2M) without noise. Draw 64 images by
    each and by dpm++2m-sde, which draws noise, to MODEL/fit. With data, print which images are nearest to them, by the
    Frechet distance of the network's own features.
    """
    from ..evaluation.frechet import network_features
    from ..files.images import shown_channels

    expect(teacher_steps > steps, "teacher_steps", f"to be more than --steps, {steps}", teacher_steps)
    loaded, model = running.load(), Path(running.model or "")  # a plan belongs to weights in float32
    loaded.interface.condition.expect_none("model", ": call fit_plan in Python with conditions")
    labels = loaded.interface.labels
    for path in (model / "plan.json", model / "fit" / "fitted.png"):
        check_output("model", path)
    with renaming({"steps": "teacher_steps"}):
        teacher = _without_noise(loaded, teacher_steps, 0.06, 80.0)
    sampler = loaded.sampler(_without_noise(loaded, steps, 0.07, 40.0), dtype=running.torch_dtype)
    real = _real_images(loaded, model, data, data_dir)
    draw = running.drawing(labels_in_text(labels, class_labels, 2 * num), guidance_scale)
    fitted = ddpm_fast.fit_plan(sampler, teacher=teacher, num_images=num, **draw)
    fit = fitted.fit
    if fit is None or not fit.error < fit.error_before:
        raise click.ClickException(
            "no round brought the images nearer to the teacher's, so no plan is written: try other --steps"
        )
    plans = {"fitted": fitted, "teacher": teacher, DEFAULT_SAMPLER: loaded.build_plan(sampler=DEFAULT_SAMPLER)[0]}
    count = max(_GRID, len(real))
    # The seed is another than that of the fit, and none is too large.
    draw |= {"seed": running.seed ^ 1, "class_labels": labels_in_text(labels, class_labels, count)}
    drawn = dict[str, Any]()
    for name, each in plans.items():
        if not running.quiet:
            click.echo(f"{count} images by {name}:", err=True)
        drawn[name] = sampler.with_plan(each)(count, **draw).cpu().float()
    distances = dict[str, float]()
    if len(real) and not running.quiet:
        features = {name: network_features(loaded.model, each) for name, each in (drawn | {"data": real}).items()}
        distances = {name: ddpm_fast.frechet_distance(features[name], features["data"]) for name in plans}
    write(model / "plan.json", lambda path: loaded.save_plan(fitted, path.parent))
    for name, images in drawn.items():
        save = partial(
            ddpm_fast.save_grid,
            images[:_GRID],
            channels=shown_channels(images.shape[1]),
            scale=max(1, 64 // images.shape[-1]),
        )
        write(model / "fit" / f"{name}.png", save)
    if running.quiet:
        return
    click.echo(f"{model / 'plan.json'}: {steps} steps, fitted to {fit.teacher}")
    click.echo(f"RMS distance from the teacher's images: {fit.error_before:.4g} before, {fit.error:.4g} now.")
    ranked = sorted(distances, key=distances.__getitem__)
    if ranked:
        nearest = ", ".join(f"{name} {distances[name]:.4g}" for name in ranked)
        click.echo(f"Frechet distance from {len(real)} real images, the nearest first: {nearest}")
    if DEFAULT_SAMPLER in ranked[:1]:
        click.echo(f"{DEFAULT_SAMPLER}, which draws noise, is nearest: with {model / 'plan.json'} deleted, it draws again.")
    click.echo(f"Look at their images in {model / 'fit'}. Delete {model / 'plan.json'} to undo the fit.")


def _without_noise(loaded: Pretrained, steps: int, low: float, high: float) -> ddpm_fast.SamplingPlan:
    """Return DPM-Solver++(2M) between two levels, as far as the schedule has them."""
    from ..plan.levels import level_range

    lowest, highest = level_range(loaded.objective.schedule)
    levels: Any = {"sigma_min": max(low, lowest), "sigma_max": min(high, highest)}
    return loaded.build_plan(sampler="dpm++2m", spacing="karras", steps=steps, **levels)[0]


def _real_images(loaded: Pretrained, model: Path, asked: str | None, folder: str | None) -> Tensor:
    """Return images of --data, or of the run's data if it can be read, twice as many as the network has features.

    They are spread over the data set, which may be sorted by class. Without data there are none.
    """
    import torch

    from ..data.items import read_batch, to_unit_range
    from ..data.load import load_dataset
    from ..data.options import DataOptions
    from ..training.run import RunFolder

    config = loaded.model.config
    run = {} if loaded.step is None else RunFolder(model).read_config()["options"]
    data, data_dir = asked or run.get("data"), folder or run.get("data_dir")
    if data is None:
        return torch.empty(0)
    try:
        dataset = load_dataset(DataOptions(data=data, data_dir=data_dir, data_memory=0), known=config)
    except (ArgumentError, OSError, ImportError):
        if asked:
            raise
        return torch.empty(0)  # the run's data are elsewhere now, or the extra that reads them
    wanted = 2 * config["block_out_channels"][-1]
    expect(
        2 * len(dataset) > wanted,
        "data",
        f"to have more than {wanted // 2} images, the network's features",
        len(dataset),
    )
    count = min(wanted, len(dataset))
    return to_unit_range(read_batch(dataset, [i * len(dataset) // count for i in range(count)]).images)
