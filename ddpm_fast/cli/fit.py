"""`ddpm-fast fit`."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import ddpm_fast

from ..errors import expect
from .console import Command
from .options import (
    SAMPLING_DTYPE_HELP,
    PathOption,
    class_options,
    drawing,
    dtype_of,
    labels_of_option,
    load_model,
    model_options,
)
from .outputs import check_output, close, grey_for_bad, write

if TYPE_CHECKING:
    from torch import Tensor

    from ..plan import SamplingPlan
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
@click.option(
    "--out",
    type=PathOption(file_okay=False, path_type=Path),
    help="Write pictures of three plans to this folder.  [default: fit in MODEL]",
)
@class_options("all")
@model_options(SAMPLING_DTYPE_HELP, named=False)
def fit_command(model: Path, steps: int, teacher_steps: int, num: int, out: Path | None, **options: Any) -> None:
    """Fit a plan of few steps to a slower one.

    Write it to plan.json in MODEL, where sampling finds it. Both plans are DPM-Solver++(2M) without noise. Draw 64 images of
    each and of dpm++2m-sde, which draws noise. With data, print which images are nearest to them, by the Frechet distance
    of the network's own features.
    """
    from ..evaluation.frechet import network_features

    expect(teacher_steps > steps, "fit", "teacher_steps", f"to be more than --steps, {steps}", teacher_steps)
    loaded = load_model("fit", options | {"model": model})
    reads = loaded.interface.condition_channels
    expect(
        not reads, "fit", "model", "to read no condition: call fit_plan in Python with conditions", f"{reads} channels of one"
    )
    check_output("fit", "model", model / "plan.json")
    plans = {"teacher": _few_steps(loaded, teacher_steps, 0.06, 80.0)}
    sampler = loaded.sampler(_few_steps(loaded, steps, 0.07, 40.0), dtype=dtype_of(options))
    real = _real_images(loaded, model, options)
    arguments = drawing(options)
    began = time.perf_counter()
    labels = labels_of_option("fit", loaded, options["classes"], 2 * num)
    plan = ddpm_fast.fit_plan(sampler, teacher=plans["teacher"], num_images=num, class_labels=labels, **arguments)
    seconds = time.perf_counter() - began
    plans |= {"fitted": plan, "noise": loaded.build_plan(sampler="dpm++2m-sde")[0]}
    count, distances, failure = _GRID if real is None else max(_GRID, len(real)), {}, ""
    arguments["class_labels"] = labels_of_option("fit", loaded, options["classes"], count)
    arguments["seed"] = options["seed"] + 1  # others than those of the fit
    for name, each in plans.items():
        images = sampler.with_plan(each)(count, **arguments).cpu().float()
        shown, wrong = grey_for_bad(images[:_GRID])
        failure = failure or wrong
        write((out or model / "fit") / f"{name}.png", partial(ddpm_fast.save_grid, shown))
        if real is not None:
            distances[name] = ddpm_fast.frechet_distance(*(network_features(loaded.model, each) for each in (images, real)))
    loaded.save_plan(plan, model)
    click.get_current_context().obj.append(model / "plan.json")
    fit = plan.fit
    if fit is not None and not options["quiet"]:
        click.echo(f"{model / 'plan.json'}: {steps} steps, error {fit.error_before:.4g} -> {fit.error:.4g}, {seconds:.0f} s")
        for name, distance in sorted(distances.items(), key=lambda item: item[1]):
            click.echo(f"  {name:<8} {plans[name].num_steps:>3} steps  Frechet distance {distance:.4g}")
        if min(distances, key=distances.__getitem__, default="") == "noise":
            click.echo("Noise draws the nearest images: remove plan.json to keep dpm++2m-sde as the default.")
    close(failure)


def _few_steps(loaded: Pretrained, num_steps: int, sigma_min: float, sigma_max: float) -> SamplingPlan:
    """Return DPM-Solver++(2M) without noise between two levels, as far as the schedule has them."""
    from ..plan.levels import noise_ratios

    ratios = noise_ratios(loaded.objective.schedule.alpha_bars)
    low, high = max(sigma_min, float(ratios[0])), min(sigma_max, float(ratios[ratios.isfinite()][-1]))
    options: Any = {"solver": "heun", "spacing": "karras", "sigma_min": low, "sigma_max": high, "clip": loaded.clip}
    return ddpm_fast.dpm_solver_plan(loaded.objective, num_steps, **options)


def _real_images(loaded: Pretrained, model: Path, options: dict[str, Any]) -> Tensor | None:
    """Return images of --data, or of the run's data, twice as many as the network has features. None without data."""
    from ..training.data import load_dataset, read_batch, to_unit_range
    from ..training.run import RunFolder

    run = RunFolder(model)
    if options["data"] is None and run.record.is_file():
        options |= {name: run.read_config("fit")["options"][name] for name in ("data", "data_dir")}
    if options["data"] is None:
        return None
    config, wanted = loaded.model.config, 2 * loaded.model.config["block_out_channels"][-1]
    dataset = load_dataset(
        *(options["data"], options["data_dir"]),
        image_size=config["sample_size"],
        channels=loaded.interface.channels,
        data_range=config.get("data_range"),
        first=wanted,
    )
    count = min(wanted, len(dataset))
    expect(2 * count > wanted, "fit", "data", f"to have more than {wanted // 2} images, the network's features", count)
    return to_unit_range(read_batch(dataset, range(count)).images)
