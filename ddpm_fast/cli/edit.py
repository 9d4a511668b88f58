"""`ddpm-fast edit`: variations, interpolation, inversion and inpainting of images."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import ddpm_fast

from ..errors import InvalidValue, expect
from ..forms import Numbers
from ..samplers import DEFAULT_SAMPLER, PlanOptions
from ..sampling.options import ClassLabels
from .console import Command
from .labels import labels_in_text
from .options import Function, PathOption, Running, class_options, gathering, model_options, plan_options, reading
from .outputs import check_output, close, grey_for_bad, write

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.items import ItemDataset
    from ..pretrained import Pretrained

_SOURCES = click.argument("sources", metavar="IMAGE...", nargs=-1, required=True)
_STRENGTH = click.option(
    "--strength", type=float, default=0.5, show_default=True, help="Keep the images at 0, and almost nothing of them at 1."
)
_SAMPLER = plan_options(sampler=DEFAULT_SAMPLER)  # its 20 steps give 20 strengths


@dataclass(frozen=True)
class _Edit:
    """The options that all editing commands have."""

    out: Path
    class_labels: str | None
    guidance_scale: float | None


def _edit_options(default: str, shows: str) -> Callable[[Function], Function]:
    """Return a decorator that adds the options of all editing commands."""
    out = click.option(
        "--out",
        type=PathOption(dir_okay=False, path_type=Path),
        default=default,
        show_default=True,
        help=f"Write the pictures here: {shows}.",
    )
    gather = gathering("edit", _Edit, _Edit.__annotations__)
    return lambda command: out(class_options("none")(model_options()(gather(command))))


@click.group("edit")
def edit_command() -> None:
    """Edit images with a model.

    An IMAGE is a file, or a test image of a data set by its number, such as fashion-mnist:3. Files are cropped and resized to
    the model's size.
    """


@edit_command.command("vary", cls=Command)
@_SOURCES
@_STRENGTH
@click.option("--num", type=click.IntRange(1), default=7, show_default=True, help="Draw this many variations of each image.")
@_SAMPLER
@_edit_options("variations.png", "a row for each image, with the image first")
def vary_command(
    *, sources: tuple[str, ...], strength: float, num: int, plan: PlanOptions, edit: _Edit, running: Running
) -> None:
    """Draw variations of images (SDEdit)."""
    import torch

    loaded, images, labels = _opened(sources, edit, running, num + 1)
    steps, _ = loaded.build_plan(**plan)
    each = torch.as_tensor(labels).repeat_interleave(num) if isinstance(labels, list) else labels
    copies, seeds = images.repeat_interleave(num, dim=0), ddpm_fast.sample_seeds(running.seed, num).repeat(len(images))
    draw = running.drawing(each, edit.guidance_scale) | {"seed": seeds}
    varied = ddpm_fast.vary(loaded.sampler(steps, dtype=running.torch_dtype), copies, strength, **draw)
    rows = varied.cpu().float().unflatten(0, (len(sources), num))
    _write(torch.cat([images[:, None], rows], dim=1), edit, running)


@edit_command.command("interpolate", cls=Command)
@click.argument("sources", metavar="IMAGE IMAGE", nargs=2)
@_STRENGTH
@click.option(
    "--num", type=click.IntRange(2, 1 << 16), default=8, show_default=True, help="Draw this many images between the two."
)
@_SAMPLER
@_edit_options("interpolation.png", "the first image, those between, the second image")
def interpolate_command(
    *, sources: tuple[str, ...], strength: float, num: int, plan: PlanOptions, edit: _Edit, running: Running
) -> None:
    """Interpolate between two images through noise."""
    import torch

    loaded, images, labels = _opened(sources, edit, running, num + 2, classes=1)
    steps, _ = loaded.build_plan(**plan)
    sampler, (a, b) = loaded.sampler(steps, dtype=running.torch_dtype), images[:, None]
    between = ddpm_fast.interpolate(sampler, a, b, num, strength=strength, **running.drawing(labels, edit.guidance_scale))
    _write(torch.cat([a[None], between.cpu().float(), b[None]], dim=1), edit, running)


@edit_command.command("invert", cls=Command)
@_SOURCES
@click.option(
    *("--steps", "num_steps"), type=click.IntRange(1), default=50, show_default=True, help="Take this many steps each way."
)
@_edit_options("inversion.png", "a row for each image, with its x_T and the image drawn from it")
def invert_command(*, sources: tuple[str, ...], num_steps: int, edit: _Edit, running: Running) -> None:
    """Find the noise from which DDIM draws images, and draw them again.

    Print the PSNR of each image in decibels.
    """
    import torch

    guidance = edit.guidance_scale
    expect(guidance in (None, 1), "guidance_scale", "to be 1, as inversion has none", guidance)
    loaded, images, labels = _opened(sources, edit, running, 3)
    # With a clip the two plans derive epsilon in different ways, and more steps return less exactly.
    objective = loaded.objective
    evaluate_at: Any = "start" if objective.name == "sample" else "arrival"  # an image alone does not determine epsilon
    forth = ddpm_fast.ddim_inversion_plan(objective, num_steps, evaluate_at=evaluate_at, clip=None)
    back = ddpm_fast.ddim_plan(objective, num_steps, clip=None)
    sampler = loaded.sampler(forth, dtype=running.torch_dtype)
    x_T = ddpm_fast.invert(sampler, images, class_labels=labels, **running.batches)
    known: ClassLabels = loaded.interface.labels.none if labels is None else labels
    again = sampler.with_plan(back)(len(sources), x_T=x_T, class_labels=known, **running.batches)
    x_T, again = x_T.cpu().float(), again.cpu().float()
    _write(torch.stack([images, (x_T / 3).clamp(-1, 1), again], dim=1), edit, running)
    if running.quiet:
        return
    for source, image, drawn in zip(sources, images, again, strict=True):
        error = float((drawn - image).double().square().mean())
        click.echo(f"{source}: PSNR {10 * math.log10(4 / error) if error else math.inf:.1f} dB")


@edit_command.command("inpaint", cls=Command)
@_SOURCES
@click.option(
    "--mask", type=PathOption(exists=True, dir_okay=False), help="Paint where this image is white, and keep the rest."
)
@click.option("--box", metavar="X,Y,W,H", callback=reading(Numbers), help="Paint this box, in pixels from the top left corner.")
@click.option(*("--steps", "num_steps"), type=click.IntRange(1), default=50, show_default=True, help="Use this many timesteps.")
@click.option("--jump-length", type=click.IntRange(1), help="Go back this many steps in a jump.  [default: a tenth of --steps]")
@click.option(
    *("--jump-samples", "jump_num_sample"),
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Take each stretch of steps this many times; 1 is quick and fits less.",
)
@_edit_options("inpainted.png", "a row for each image: the image, what is kept of it, the result")
def inpaint_command(
    *,
    sources: tuple[str, ...],
    mask: str | None,
    box: tuple[int, ...] | None,
    num_steps: int,
    jump_length: int | None,
    jump_num_sample: int,
    edit: _Edit,
    running: Running,
) -> None:
    """Paint a region of images and keep the rest (RePaint)."""
    import torch

    if (mask is None) == (box is None):
        raise InvalidValue("", "either --mask or --box to be given", "neither" if mask is None else "both")
    loaded, images, labels = _opened(sources, edit, running, 3, inputs=() if mask is None else (mask,))
    painted = _box(box or (), images) if mask is None else _mask(mask, images)
    jumps = jump_length or max(1, num_steps // 10), jump_num_sample if num_steps > 1 else 1
    plan = ddpm_fast.repaint_plan(loaded.objective, num_steps, *jumps, clip=loaded.clip)
    sampler = loaded.sampler(plan, dtype=running.torch_dtype)
    result = ddpm_fast.inpaint(sampler, images, painted, **running.drawing(labels, edit.guidance_scale)).cpu().float()
    kept = torch.where(painted > 0, torch.zeros_like(images), images)
    _write(torch.stack([images, kept, result], dim=1), edit, running)


def _opened(
    sources: tuple[str, ...],
    edit: _Edit,
    running: Running,
    columns: int,
    *,
    classes: int | None = None,
    inputs: tuple[str, ...] = (),
) -> tuple[Pretrained, Tensor, list[int] | str | None]:
    """Check what needs no model, then load the model and read the images. Nothing is written.

    Args:
        sources: The images to read.
        edit: The options that all editing commands have.
        running: How the model runs.
        columns: Images in each row of the picture.
        classes: The number of labels. None: one for each image.
        inputs: Further files that the command reads. `--out` must be another file.

    Returns:
        The model, the images, float32 [N, C, H, W] in [-1, 1] on the CPU, and their labels, or None for no class.
    """
    import torch

    from ..data.items import to_unit_range
    from ..data.published import DATASETS
    from ..files.images import grid_shape, image_format

    out = edit.out
    check_output("out", out)
    image_format(out, name="out")
    for source in sources:
        name, _, number = source.partition(":")
        if not os.path.isfile(source) and (name not in DATASETS or _whole_number(number) < 0):
            names = ", ".join(f"{name}:NUMBER" for name in DATASETS)
            raise InvalidValue("IMAGE", f"to be a file or one of {names}", repr(source))
    for path in (*sources, *inputs):
        same = out.exists() and os.path.exists(path) and out.samefile(path)
        expect(not same, "out", "to be another file than those that are read", repr(path))
    ddpm_fast.sample_seeds(running.seed, 0)  # checks the seed
    loaded = running.load(running.torch_dtype)
    interface = loaded.interface
    shape = interface.shape
    if shape is None or shape[0] not in (1, 3, 4):
        got = f"sample_size {interface.size} and {interface.channels} channels"
        raise InvalidValue("model", "to be one that draws grey, RGB or RGBA pictures of one size", got)
    interface.condition.expect_none("model", " (ddpm_fast.vary and its like take one)")
    datasets: dict[str, ItemDataset] = {}
    images = to_unit_range(torch.stack([_read(source, shape, datasets) for source in sources]))
    labels = labels_in_text(interface.labels, edit.class_labels, classes or len(images), each=True)
    grid = (len(images) * columns, *shape)
    image_format(out, grid_shape(grid, columns=columns, scale=_scale(images)), "out")
    return loaded, images, labels


def _read(source: str, shape: tuple[int, int, int], datasets: dict[str, ItemDataset]) -> Tensor:
    """Return the image of a file or of a data set, uint8 [C, H, W]."""
    from ..data.load import load_dataset, read_image
    from ..data.options import DataOptions

    if os.path.isfile(source):
        return read_image(source, shape, name="IMAGE")
    name, _, number = source.partition(":")
    if name not in datasets:
        datasets[name] = load_dataset(DataOptions(data=name, image_size=shape[1:]), split="test")
    dataset, index = datasets[name], _whole_number(number)
    expect(index < len(dataset), "IMAGE", f"to be {name}:0 to {name}:{len(dataset) - 1}", repr(source))
    image = dataset[index].image
    channels = f"{shape[0]} channel{'s' * (shape[0] > 1)}"
    expect(image.shape[0] == shape[0], "IMAGE", f"to have {channels}, as the model", repr(source))
    return image


def _mask(path: str, images: Tensor) -> Tensor:
    """Return the mask in a file, float32 [1, 1, H, W]."""
    from ..data.load import read_image

    mask = read_image(path, (1, *images.shape[2:]), name="mask")[None]
    # A mask of zeros and ones has none.
    expect(int(mask.max()) >= 128, "mask", "to have white pixels", f"values up to {int(mask.max())} of 255")
    return mask.float() / 255


def _box(box: tuple[int, ...], images: Tensor) -> Tensor:
    """Return a mask that is 1 in a box (x, y, width, height), float32 [1, 1, H, W]."""
    import torch

    rows, columns = images.shape[2:]
    x, y, width, height = box if len(box) == 4 else (-1, -1, 0, 0)
    fits = min(x, y) >= 0 and min(width, height) >= 1 and x + width <= columns and y + height <= rows
    expect(fits, "box", f"to be X,Y,W,H within {columns}x{rows} pixels", box)
    painted = torch.zeros(1, 1, rows, columns)
    painted[..., y : y + height, x : x + width] = 1
    return painted


def _scale(images: Tensor) -> int:
    """Return the pixels of the picture for each pixel of an image."""
    return max(1, 96 // max(images.shape[-2:]))


def _write(rows: Tensor, edit: _Edit, running: Running) -> None:
    """Write a picture with a row for each image, [rows, columns, C, H, W], and print its name."""
    images, failure = grey_for_bad(rows.flatten(0, 1))
    columns, scale = rows.shape[1], _scale(images)
    write(edit.out, lambda path: ddpm_fast.save_grid(images, path, columns=columns, scale=scale))
    close(failure)
    if not running.quiet:
        click.echo(f"{edit.out}: {len(rows)} row{'s' * (len(rows) > 1)} of {columns} images.")


def _whole_number(text: str) -> int:
    """Return the number that decimal digits say, or -1 for any other text or more than nine digits."""
    text = text.strip()
    return int(text) if text.isdecimal() and len(text) <= 9 else -1
