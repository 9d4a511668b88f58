"""`ddpm-fast sample`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

import ddpm_fast

from ..errors import InvalidValue, expect
from ..forms import Numbers
from ..samplers import PlanOptions
from ..sampling.options import EditOptions
from .console import Command, Refused, Stopped
from .labels import described_labels, labels_in_text
from .options import METAVARS, RANGE, PathOption, Running, class_options, model_options, plan_options, reading
from .outputs import check_output, close, grey_for_bad, write

if TYPE_CHECKING:
    from torch import Tensor

    from ..forms import Pairs
    from ..pretrained import Pretrained
    from ..sampling.sampler import Sampler

_FRAMES = 51  # at most, in an animation
_COLUMNS = 8  # at most, of a grid with conditions


@click.command("sample", cls=Command)
# torchrun parses --num as one of its own options.
@click.option(
    *("--num", "--num-samples", "num_samples"),
    type=click.IntRange(1, 1 << 32),
    help="Draw this many images.  [default: 16, or one for each of --condition]",
)
@plan_options()
@class_options("all, or none with --condition")
@click.option(
    "--condition",
    type=PathOption(exists=True),
    help="Restore the images or arrays of this folder or file, in turn. For models that were trained with --condition.",
)
@click.option(
    "--condition-range",
    help="Map these values of arrays to -1 and 1: one pair, or one per channel.  [default: those that the model keeps]",
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
    metavar=METAVARS[Numbers],
    callback=reading(Numbers),
    help="Show these channels in the picture: one, three or four.  [default: all, or 0 if a picture cannot have as many]",
)
@model_options()
def sample_command(
    *,
    num_samples: int | None,
    out: str,
    gif: Path | None,
    condition: str | None,
    condition_range: Pairs | None,
    show_channels: list[int] | None,
    class_labels: str | None,
    guidance_scale: float | None,
    plan: PlanOptions,
    running: Running,
) -> None:
    """Draw images from a model and write them as one grid.

    With a folder or an .npz as --out, write each image. torchrun can then start several processes, and the same
    command continues what was stopped. torchrun needs --num-samples for --num.
    """
    from ..distributed import ranks

    failure = ""
    rank, size, _ = ranks(os.environ)
    writes_each = _check_places(out, gif, size)
    loaded = running.load(running.torch_dtype)
    steps, name = loaded.build_plan(guidance_scale=guidance_scale, **plan)
    restored = _conditions(loaded, condition, running.seed, num_samples, condition_range)
    num = num_samples or (16 if restored is None else len(restored))
    shown = _shown(loaded, show_channels)
    labels = loaded.interface.labels
    chosen = labels_in_text(labels, class_labels, num)
    condition_each = None if restored is None else restored[[i % len(restored) for i in range(num)]]
    draw = running.drawing(chosen, guidance_scale, condition_each)
    sampler = loaded.sampler(steps, dtype=running.torch_dtype)
    if writes_each:
        # A device that is named may be that of several processes.
        seconds = write_each(sampler, num, out, draw, share_gpu=running.device is not None)
    else:
        seconds, failure = _write_grid(sampler, num, Path(out), gif, shown, draw)
    if not running.quiet and rank == 0:
        chosen = "none" if chosen is None and restored is not None else chosen
        of = f" of {described_labels(labels, chosen, num)}" if labels.reads else ""
        trained = "" if loaded.step is None else f", from step {loaded.step} of {running.model}"
        rate = "" if writes_each else f", {num / seconds:.3g} images/s"  # some images may be there already
        part = "" if writes_each or len(shown) == sampler.shape[0] else f" Shown channels: {', '.join(map(str, shown))}."
        files, drawn = ", ".join(map(str, click.get_current_context().obj)), f"{num} image{'s' * (num != 1)}{of}"
        taken = f"{steps.num_steps} step{'s' * (steps.num_steps != 1)}"
        click.echo(f"{files}: {drawn} in {taken} ({name}){trained}, {seconds:.1f} s{rate}.{part}")
    close(failure)


def _check_places(out: str, gif: Path | None, size: int) -> bool:
    """Return whether images go to a folder or an archive, one by one. Raise unless `out` and `gif` can be written."""
    from ..files.images import image_format
    from ..sampling.sample_formats import kind_of

    if kind_of(out):
        expect(gif is None, "gif", "to go with --out as one picture", f"{str(gif)!r} and {out!r}")
        return True
    expect(size <= 1, "out", f"to be a folder (dir/) or .npz with {size} processes", repr(out))
    for name, path in (("out", Path(out)), ("gif", gif)):
        if path is not None:
            check_output(name, path)
            try:
                image_format(path, name=name)
            except InvalidValue as error:
                also = ", in .npz, or to be a folder (dir/)" if name == "out" else ""
                raise error.renamed(expected=f"{error.expected}{also}") from None
    if gif is not None:
        same = os.path.exists(out) and gif.exists() and os.path.samefile(out, gif)
        if same or os.path.realpath(out).casefold() == os.path.realpath(gif).casefold():  # some file systems ignore case
            raise InvalidValue("gif", "to be another file than --out", f"{str(gif)!r} and {out!r}")
    return False


def _conditions(loaded: Pretrained, path: str | None, seed: int, num: int | None, ranges: Pairs | None) -> Tensor | None:
    """Return the conditions of --condition, or None for a model without. Raise unless they go together."""
    from ..data.condition import read_conditions

    reads, shape = loaded.interface.condition, loaded.interface.shape
    if path is None:
        expect(reads.channels == 0, "condition", f"to be given, as the model reads {reads}", "none")
        expect(ranges is None, "condition_range", "to go with --condition", ranges)
        return None
    expect(reads.channels, "condition", "to be left out, as the model reads none", repr(path))
    if shape is None:
        raise InvalidValue("model", "to have a sample_size in its config.json", "null")
    return read_conditions(path, loaded.model.config, shape, seed, first=num, condition_range=ranges)


def _shown(loaded: Pretrained, channels: list[int] | None) -> list[int]:
    """Return the channels that pictures show."""
    from ..files.images import shown_channels

    total = loaded.interface.channels or 0
    if channels is None:
        return shown_channels(total)
    wanted, fits = f"to be one, three or four of 0..{total - 1}", len(channels) in (1, 3, 4)
    expect(fits and 0 <= min(channels) <= max(channels) < total, "show_channels", wanted, channels)
    return channels


def write_each(sampler: Sampler, num: int, out: str, draw: EditOptions, *, share_gpu: bool) -> float:
    """Write images one by one, and return the seconds that it took."""
    from ..distributed import FirstFailed, ProcessLost, ranks

    began = time.perf_counter()
    try:
        written = ddpm_fast.write_samples(out, sampler, num, share_gpu=share_gpu, **draw)
    except FirstFailed:
        sys.exit(Refused.exit_code)  # rank 0 says why
    except ProcessLost as error:
        raise click.ClickException(f"{error}. The same command draws the images that are missing.") from error
    except KeyboardInterrupt as error:
        if ranks(os.environ)[0] > 0:
            sys.exit(Stopped.exit_code)  # rank 0 says what is written
        if not error.args:  # before the first image
            raise
        raise Stopped(f"Stopped by Ctrl-C. {error}") from None
    click.get_current_context().obj.append(written)
    return time.perf_counter() - began


def _write_grid(
    sampler: Sampler, num: int, out: Path, gif: Path | None, shown: list[int], draw: EditOptions
) -> tuple[float, str]:
    """Draw images, write the grid and the animation. Return the seconds of drawing, and what is wrong with images."""
    from ..files.images import ANIMATED, STRIP, grid_shape, image_format, in_bands

    frames = 0 if gif is None else min(_FRAMES, sampler.plan.num_steps + 1)
    (_, height, width), condition = sampler.shape, draw["condition"]
    columns = None if condition is None or num == 1 else min(_COLUMNS, num)
    count = num if columns is None else 2 * columns * -(-num // columns)  # images in the grid
    pixels = max(height, width)
    scale, gif_scale = 1 if num == 1 else max(1, 128 // pixels), max(1, 64 // pixels)  # one image can be edited as it is
    image_format(out, grid_shape((count, len(shown), height, width), scale=scale), "out")
    if gif is not None:
        animated = image_format(gif, (1, 1, len(shown)), "gif") in ANIMATED
        strip = None if animated else min(STRIP, frames)
        pictures = num * (strip or 1), len(shown), height, width
        image_format(gif, grid_shape(pictures, columns=strip, scale=gif_scale), "gif")
    began = time.perf_counter()
    if gif is None:
        images = states = sampler(num, **draw)
    else:
        images, states = sampler.trajectory(num, num_frames=frames, **draw)
    images = images.cpu()  # waits for a GPU
    seconds = time.perf_counter() - began
    images, failure = grey_for_bad(images)
    images = images if columns is None or condition is None else in_bands([condition, images], columns)
    write(out, lambda path: ddpm_fast.save_grid(images, path, columns=columns, scale=scale, channels=shown))
    if gif is not None:
        states = states.nan_to_num(0, 0, 0)
        write(gif, lambda path: ddpm_fast.save_trajectory(states, path, scale=gif_scale, channels=shown))
    return seconds, failure
