"""`ddpm-fast sample`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from .options import SAMPLING_DTYPE_HELP, PathOption, model_options, refusing
from .outputs import check_output, check_pictures, make_writable, save_result
from .samplers import class_options, labels_of_option, plan_of_options, sampler_options

_FRAMES = 51  # at most, in an animation


@click.command("sample")
@click.option("--num", type=click.IntRange(1), default=16, show_default=True, help="Draw this many images.")
@sampler_options
@class_options("all")
@click.option(
    "--out",
    type=PathOption(dir_okay=False, path_type=Path),
    default="samples.png",
    show_default=True,
    help="Write the grid of images here.",
)
@click.option(
    "--gif",
    type=PathOption(dir_okay=False, path_type=Path),
    help="Write the denoising here: an animation (.gif, .webp) or a strip (.png).  [default: none]",
)
@model_options(SAMPLING_DTYPE_HELP)
def sample_command(
    num: int,
    steps: int | None,
    sampler: str,
    eta: float | None,
    spacing: str | None,
    variance: str | None,
    classes: str | None,
    guidance: float | None,
    out: Path,
    gif: Path | None,
    model: Path | None,
    seed: int,
    batch_size: int,
    dtype: str | None,
    device: str | None,
    quiet: bool,
) -> None:
    """Draw images from a model and write them as one grid."""
    import torch

    from ..checks import computing_device
    from ..images import image_format, save_grid, save_trajectory
    from ..pretrained import BUILTIN, load_folder
    from ..sampling import Sampler

    failures: list[str] = []
    with refusing():
        check_output("sample", "out", out)
        image_format(out, name="out")
        if gif is not None:
            check_output("sample", "gif", gif)
            image_format(gif, name="gif")
            same = out.exists() and gif.exists() and out.samefile(gif)
            if same or str(out.resolve()).casefold() == str(gif.resolve()).casefold():  # some file systems ignore case
                raise ValueError(f"sample: expected gif to be another file than --out, got {str(gif)!r} and {str(out)!r}")
        precision = None if dtype is None else getattr(torch, dtype)
        loaded = load_folder(model or BUILTIN, computing_device("sample", device), precision)
        plan = plan_of_options("sample", loaded, sampler, steps, eta, spacing, variance)
        frames = 0 if gif is None else min(_FRAMES, plan.num_steps + 1)
        config = loaded.model.config
        size = config["sample_size"]
        height, width = size if isinstance(size, list | tuple) else (size, size)
        if height is None:
            raise ValueError("sample: expected model to have a sample_size in its config.json, got null")
        pixels, shape = max(height, width), (num, config["in_channels"], height, width)
        scale, gif_scale = max(1, 128 // pixels), max(1, 64 // pixels)
        check_pictures(shape, frames, out, scale, gif, gif_scale)
        labels = labels_of_option("sample", loaded, classes, num)
        if guidance not in (None, 1) and labels is None:
            raise ValueError(f"sample: expected guidance to be 1 or to go with classes, got {guidance} and no labels")
        make_writable("sample", "out", out.parent)
        if gif is not None:
            make_writable("sample", "gif", gif.parent)
        began = time.perf_counter()
        arguments: dict[str, Any] = {
            "seed": seed,
            "class_labels": labels,
            "guidance_scale": guidance,
            "batch_size": batch_size,
            "progress": not quiet,
        }
        draw = Sampler(loaded.model, plan, dtype=precision)
        states = None
        if gif is None:
            images = draw(num, **arguments)
        else:
            images, states = draw.trajectory(num, num_frames=_FRAMES, **arguments)
        images = images.cpu()  # waits for a GPU
        seconds = time.perf_counter() - began
        finite = images.flatten(1).isfinite().all(dim=1)
        if not finite.all():
            bad = (~finite).nonzero().flatten().tolist()
            failures.append(f"{len(bad)} of {num} images are not finite and drawn grey, from number {bad[0]} (of 0..{num - 1})")
            images = images.nan_to_num(0, 0, 0)
            states = None if states is None else states.nan_to_num(0, 0, 0)
        save_result(lambda path: save_grid(images, path, scale=scale), out, failures, (".png",))
        if states is not None and gif is not None:
            trajectory = states
            save_result(lambda path: save_trajectory(trajectory, path, scale=gif_scale), gif, failures, (".png",))
    if not quiet:
        names = ", ".join(map(str, click.get_current_context().obj))
        images_drawn = "1 image" if num == 1 else f"{num} images"
        steps_taken = "1 step" if plan.num_steps == 1 else f"{plan.num_steps} steps"
        click.echo(f"{names}: {images_drawn} of {steps_taken} ({sampler}) in {seconds:.1f} s, {num / seconds:.3g} images/s.")
    if failures:
        raise click.ClickException("; ".join(failures))
