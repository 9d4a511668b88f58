"""`ddpm-fast sample`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import InvalidValue, expect
from ..resources import check_free_memory
from .console import Refused, Stopped
from .options import RANGE, SAMPLING_DTYPE_HELP, PathOption, model_options, numbers, refusing
from .outputs import check_output, check_pictures, make_writable, save_result
from .samplers import class_options, labels_of_option, plan_of_options, sampler_options

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..checks import Ranges
    from ..plan import SamplingPlan
    from ..pretrained import Pretrained

_FRAMES = 51  # at most, in an animation
_COLUMNS = 8  # at most, of a grid with conditions


@click.command("sample")
# torchrun takes --num for an abbreviation of its own options.
@click.option(
    "--num",
    "--num-samples",
    "num",
    type=click.IntRange(1),
    help="Draw this many images.  [default: 16, or one for each of --condition]",
)
@sampler_options(None)
@class_options("all")
@click.option(
    "--condition",
    type=PathOption(exists=True),
    help="Restore the images or arrays of this folder or file, in turn. For models that were trained with --condition.",
)
@click.option(
    "--condition-range",
    help="Map these values of arrays to -1 and 1: one pair, or one a channel.  [default: those that the model keeps]",
    **RANGE,
)
@click.option(
    "--out",
    type=PathOption(),
    default="samples.png",
    show_default=True,
    help="Write the grid of images here, or one image in its own size, or each: to a folder (dir/) or a .npz.",
)
@click.option(
    "--gif",
    type=PathOption(dir_okay=False, path_type=Path),
    help="Write the denoising here: an animation (.gif, .webp) or a strip (.png).  [default: none]",
)
@click.option(
    "--show-channels",
    metavar="N,N,...",
    callback=numbers,
    help="Show these channels in the picture: one, three or four.  [default: all, or 0 if a picture cannot have as many]",
)
@model_options(SAMPLING_DTYPE_HELP)
def sample_command(
    num: int | None,
    steps: int | None,
    sampler: str | None,
    eta: float | None,
    spacing: str | None,
    sigma_min: float | None,
    sigma_max: float | None,
    variance: str | None,
    classes: str | None,
    guidance: float | None,
    condition: str | None,
    condition_range: Ranges | None,
    out: str,
    gif: Path | None,
    show_channels: list[int] | None,
    model: Path | None,
    seed: int,
    batch_size: int,
    dtype: str | None,
    device: str | None,
    quiet: bool,
) -> None:
    """Draw images from a model and write them as one grid.

    With a folder or an .npz as --out, write each image. torchrun can then start several processes, and the same
    command continues what was stopped. torchrun needs --num-samples for --num.
    """
    import torch

    from ..checks import computing_device
    from ..distributed import Processes, ranks
    from ..pretrained import BUILTIN, load_folder

    writes_each = _writes_each(out)
    failures: list[str] = []
    with refusing():
        rank, size, local_rank = ranks("sample", os.environ)
        if writes_each:
            expect(gif is None, "sample", "gif", "to go with --out as one picture", f"{str(gif)!r} and {out!r}")
        else:
            expect(size <= 1, "sample", "out", f"to be a folder (dir/) or .npz with {size} processes", repr(out))
            expect(Path(out).suffix, "sample", "out", "to be a picture (.png), a folder (dir/) or .npz", repr(out))
            _check_paths(Path(out), gif)
        precision = None if dtype is None else getattr(torch, dtype)
        target = computing_device("sample", device)
        if size > 1 and target == torch.device("cuda"):  # without a number
            target = Processes(rank, size, local_rank).own_gpu("sample")
        loaded = load_folder(model or BUILTIN, target, precision)
        chosen = (sampler, steps, eta, spacing, sigma_min, sigma_max, variance)
        plan, sampler = plan_of_options("sample", loaded, *chosen)
        restored = _conditions(loaded, condition, seed, num, condition_range)
        if restored is not None and classes is None:
            classes = "none"  # nobody knows what the images show
        num = num or (16 if restored is None else len(restored))
        check_free_memory("sample", "num", num, 64 * num)  # labels and seeds
        shown = _shown(loaded, show_channels)
        arguments: dict[str, Any] = {
            "seed": seed,
            "guidance_scale": guidance,
            "condition": None if restored is None else restored[torch.arange(num) % len(restored)],
            "batch_size": batch_size,
            "progress": not quiet,
        }
        if writes_each:
            arguments["device"] = target
            seconds = _write_each(loaded, plan, num, out, classes, precision, arguments, rank)
        else:
            seconds = _write_grid(loaded, plan, num, Path(out), gif, shown, classes, precision, arguments, failures)
    if not quiet and rank == 0:
        names = ", ".join(map(str, click.get_current_context().obj))
        images = "1 image" if num == 1 else f"{num} images"
        steps_taken = "1 step" if plan.num_steps == 1 else f"{plan.num_steps} steps"
        rate = "" if writes_each else f", {num / seconds:.3g} images/s"  # some images may be there already
        part = "" if writes_each or len(shown) == loaded.shape[0] else f" Shown channels: {', '.join(map(str, shown))}."
        trained = "" if loaded.step is None else f", from step {loaded.step} of {model}"
        click.echo(f"{names}: {images} of {steps_taken} ({sampler}){trained} in {seconds:.1f} s{rate}.{part}")
    if failures:
        raise click.ClickException("; ".join(failures))


def _conditions(loaded: Pretrained, path: str | None, seed: int, num: int | None, ranges: Ranges | None) -> Tensor | None:
    """Return the conditions of --condition, or None for a model without. Raise unless they go together."""
    from ..training.data.conditions import read_conditions

    channels, kind = loaded.condition_channels, loaded.model.config.get("condition")
    if path is None:
        wanted = f"to be given, as the model reads a condition of {channels} channels ({kind})"
        expect(channels == 0, "sample", "condition", wanted, "none")
        expect(ranges is None, "sample", "condition_range", "to go with --condition", ranges)
        return None
    expect(channels > 0, "sample", "condition", "to be left out, as the model reads none", repr(path))
    return read_conditions(path, loaded.model.config, _shape(loaded), seed, first=num, condition_range=ranges)


def _shape(loaded: Pretrained) -> tuple[int, int, int]:
    """Return (C, H, W) of an image. Raise if the model does not say."""
    channels, height, width = loaded.shape
    if height is None or width is None:
        raise InvalidValue("sample", "model", "to have a sample_size in its config.json", "null")
    return channels, height, width


def _shown(loaded: Pretrained, channels: list[int] | None) -> list[int]:
    """Return the channels that pictures show."""
    from ..files.images import shown_channels

    total = loaded.shape[0]
    if channels is None:
        return shown_channels(total)
    wanted = f"to be one, three or four of 0..{total - 1}"
    expect(
        len(channels) in (1, 3, 4) and 0 <= min(channels) <= max(channels) < total, "sample", "show_channels", wanted, channels
    )
    return channels


def _writes_each(out: str) -> bool:
    """Return whether images go to a folder or an archive, one by one."""
    separators = tuple(filter(None, (os.sep, os.altsep)))
    return out.endswith(separators) or out.lower().endswith(".npz") or os.path.isdir(out)


def _write_each(
    loaded: Pretrained,
    plan: SamplingPlan,
    num: int,
    out: str,
    classes: str | None,
    dtype: torch.dtype | None,
    arguments: dict[str, Any],
    rank: int,
) -> float:
    """Write images one by one, and return the seconds that it took."""
    from ..distributed import FirstFailed, ProcessLost
    from ..sampling.sample_files import write_samples

    labels = _labels(loaded, num, classes, arguments["guidance_scale"])
    began = time.perf_counter()
    try:
        written = write_samples(out, loaded.model, plan, num, class_labels=labels, dtype=dtype, **arguments)
    except FirstFailed:
        sys.exit(Refused.exit_code)  # rank 0 says why
    except ProcessLost as error:
        raise click.ClickException(f"{error}. The same command draws the images that are missing.") from error
    except KeyboardInterrupt as error:
        if rank > 0:
            sys.exit(Stopped.exit_code)  # rank 0 says what is written
        if not error.args:  # before the first image
            raise
        raise Stopped(f"Stopped by Ctrl-C. {error}") from None
    click.get_current_context().obj.append(written)
    return time.perf_counter() - began


def _check_paths(out: Path, gif: Path | None) -> None:
    """Raise unless the grid and the animation are files that Pillow can write, and two."""
    from ..files.images import image_format

    check_output("sample", "out", out)
    image_format(out, name="out")
    if gif is not None:
        check_output("sample", "gif", gif)
        image_format(gif, name="gif")
        same = out.exists() and gif.exists() and out.samefile(gif)
        if same or str(out.resolve()).casefold() == str(gif.resolve()).casefold():  # some file systems ignore case
            raise InvalidValue("sample", "gif", "to be another file than --out", f"{str(gif)!r} and {str(out)!r}")


def _write_grid(
    loaded: Pretrained,
    plan: SamplingPlan,
    num: int,
    out: Path,
    gif: Path | None,
    shown: list[int],
    classes: str | None,
    dtype: torch.dtype | None,
    arguments: dict[str, Any],
    failures: list[str],
) -> float:
    """Draw images, write the grid and the animation, and return the seconds that drawing took."""
    from ..files.images import in_bands, save_grid, save_trajectory
    from ..sampling.sampler import Sampler

    frames = 0 if gif is None else min(_FRAMES, plan.num_steps + 1)
    image, condition = _shape(loaded), arguments["condition"]
    columns = None if condition is None or num == 1 else min(_COLUMNS, num)
    count = num if columns is None else 2 * columns * -(-num // columns)  # images in the grid
    pixels = max(image[1:])
    scale, gif_scale = 1 if num == 1 else max(1, 128 // pixels), max(1, 64 // pixels)  # one image can be edited as it is
    check_pictures((count, len(shown), *image[1:]), frames, out, scale, gif, gif_scale)
    labels = _labels(loaded, num, classes, arguments["guidance_scale"])
    make_writable("sample", "out", out.parent)
    if gif is not None:
        make_writable("sample", "gif", gif.parent)
    began = time.perf_counter()
    draw = Sampler(loaded.model, plan, dtype=dtype)
    states = None
    if gif is None:
        images = draw(num, class_labels=labels, **arguments)
    else:
        images, states = draw.trajectory(num, num_frames=_FRAMES, class_labels=labels, **arguments)
    images = images.cpu()  # waits for a GPU
    seconds = time.perf_counter() - began
    finite = images.flatten(1).isfinite().all(dim=1)
    if not finite.all():
        bad = (~finite).nonzero().flatten().tolist()
        failures.append(f"{len(bad)} of {num} images are not finite and drawn grey, from number {bad[0]} (of 0..{num - 1})")
        images = images.nan_to_num(0, 0, 0)
        states = None if states is None else states.nan_to_num(0, 0, 0)
    if columns is not None:
        images = in_bands([condition, images], columns)
    save_result(lambda path: save_grid(images, path, columns=columns, scale=scale, channels=shown), out, failures, (".png",))
    if states is not None and gif is not None:
        trajectory = states
        save_result(lambda path: save_trajectory(trajectory, path, scale=gif_scale, channels=shown), gif, failures, (".png",))
    return seconds


def _labels(loaded: Pretrained, num: int, classes: str | None, guidance: float | None) -> list[int] | None:
    """Return a label for each image, or None. Raise if guidance needs labels and there are none."""
    labels = labels_of_option("sample", loaded, classes, num)
    expect(
        guidance in (None, 1) or labels is not None,
        "sample",
        "guidance",
        "to be 1 or to go with classes",
        f"{guidance} and no labels",
    )
    return labels
