"""`ddpm-fast edit`: variations, interpolation, inversion and inpainting of images."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import InvalidValue, expect
from ..resources import check_free_memory
from .options import SAMPLING_DTYPE_HELP, Command, Finite, PathOption, model_options, refusing
from .outputs import check_output, make_writable, save_result
from .samplers import class_options, labels_of_option, plan_of_options, sampler_options

if TYPE_CHECKING:
    from torch import Tensor

    from ..pretrained import Pretrained
    from ..training.data import ImageDataset

_SAMPLER = "dpm++2m-sde"  # its 20 steps give 20 strengths
_SOURCES = click.argument("sources", metavar="IMAGE...", nargs=-1, required=True)
_STRENGTH = click.option(
    "--strength", type=Finite(0, 1), default=0.5, show_default=True, help="Keep the images at 0, and little of them at 1."
)


def _out(default: str, shows: str) -> Callable[[Command], Command]:
    return click.option(
        "--out",
        type=PathOption(dir_okay=False, path_type=Path),
        default=default,
        show_default=True,
        help=f"Write the pictures here: {shows}.",
    )


def _edit_options(command: Command) -> Command:
    """Add the options of all editing commands."""
    return class_options("none")(model_options(SAMPLING_DTYPE_HELP)(command))


@click.group("edit")
def edit_command() -> None:
    """Edit images with a model.

    An IMAGE is a file, or a test image of a data set by its number, such as fashion-mnist:3. Files are cropped and resized to
    the model's size.
    """


@edit_command.command("vary")
@_SOURCES
@_STRENGTH
@click.option("--num", type=click.IntRange(1), default=7, show_default=True, help="Draw this many variations of each image.")
@sampler_options(_SAMPLER)
@_out("variations.png", "a row for each image, with the image first")
@_edit_options
def vary_command(sources: tuple[str, ...], strength: float, num: int, **options: Any) -> None:
    """Draw variations of images (SDEdit)."""
    import torch

    from ..ops import sample_seeds
    from ..sampling.editing import vary

    with refusing():
        edit = _Edit("vary", sources, options)
        plan, labels = edit.plan(options), edit.labels()
        edit.make_ready(num + 1, num)
        seeds = sample_seeds(options["seed"], num).repeat(len(sources))
        copies = edit.images.repeat_interleave(num, dim=0)
        each = None if labels is None else torch.as_tensor(labels).repeat_interleave(num)
        varied = vary(edit.loaded.model, plan, copies, strength, seed=seeds, class_labels=each, **edit.arguments())
        rows = torch.cat([edit.images[:, None], varied.cpu().float().unflatten(0, (len(sources), num))], dim=1)
    edit.show(rows)  # outside `refusing`: the streams' errors are not the options'


@edit_command.command("interpolate")
@click.argument("sources", metavar="IMAGE IMAGE", nargs=2)
@_STRENGTH
@click.option(
    "--num", type=click.IntRange(2, 1 << 16), default=8, show_default=True, help="Draw this many images between the two."
)
@sampler_options(_SAMPLER)
@_out("interpolation.png", "the first image, those between, the second image")
@_edit_options
def interpolate_command(sources: tuple[str, ...], strength: float, num: int, **options: Any) -> None:
    """Interpolate between two images through noise."""
    import torch

    from ..sampling.editing import interpolate

    with refusing():
        edit = _Edit("interpolate", sources, options)
        plan, labels = edit.plan(options), edit.labels(pairs=True)
        edit.make_ready(num + 2, num)
        a, b = edit.images[:1], edit.images[1:]
        arguments = edit.arguments() | {"seed": options["seed"], "class_labels": labels}
        between = interpolate(edit.loaded.model, plan, a, b, num, strength=strength, **arguments)
        rows = torch.cat([a[None], between.cpu().float(), b[None]], dim=1)
    edit.show(rows)


@edit_command.command("invert")
@_SOURCES
@click.option("--steps", type=click.IntRange(1), default=50, show_default=True, help="Take this many steps each way.")
@_out("inversion.png", "a row for each image, with its x_T and the image drawn from it")
@_edit_options
def invert_command(sources: tuple[str, ...], steps: int, **options: Any) -> None:
    """Find the noise from which DDIM draws images, and draw them again.

    Print the PSNR of each image in decibels.
    """
    import torch

    from ..plan import ddim_inversion_plan, ddim_plan
    from ..sampling.editing import invert
    from ..sampling.sampler import sample

    with refusing():
        expect(options["guidance"] in (None, 1), "invert", "guidance", "to be 1, as inversion has none", options["guidance"])
        edit = _Edit("invert", sources, options)
        loaded, labels = edit.loaded, edit.labels()
        # With a clip the two plans derive epsilon in different ways, and more steps return less exactly.
        objective = loaded.objective
        evaluate_at: Any = "start" if objective.name == "sample" else "arrival"  # an image alone does not determine epsilon
        forth = ddim_inversion_plan(objective, steps, evaluate_at=evaluate_at, clip=None)
        back = ddim_plan(objective, steps, clip=None)
        edit.make_ready(3)
        arguments = edit.arguments(guidance=False) | {"class_labels": labels}
        x_T = invert(loaded.model, forth, edit.images, **arguments)
        again = sample(loaded.model, back, len(sources), x_T=x_T, **arguments)
        x_T, again = x_T.cpu().float(), again.cpu().float()
        rows = torch.stack([edit.images, (x_T / 3).clamp(-1, 1), again], dim=1)
    edit.show(rows)
    if options["quiet"]:
        return
    for source, image, drawn in zip(sources, edit.images, again, strict=True):
        error = float((drawn - image).double().square().mean())
        click.echo(f"{source}: PSNR {10 * math.log10(4 / error) if error else math.inf:.1f} dB")


@edit_command.command("inpaint")
@_SOURCES
@click.option(
    "--mask", type=PathOption(exists=True, dir_okay=False), help="Paint where this image is white, and keep the rest."
)
@click.option("--box", metavar="X,Y,W,H", help="Paint this box, in pixels from the top left corner.")
@click.option("--steps", type=click.IntRange(1), default=50, show_default=True, help="Use this many timesteps.")
@click.option("--jump-length", type=click.IntRange(1), help="Go back this many steps in a jump.  [default: a tenth of --steps]")
@click.option(
    "--jump-samples",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Take each stretch of steps this many times; 1 is quick and fits less.",
)
@_out("inpainted.png", "a row for each image: the image, what is kept of it, the result")
@_edit_options
def inpaint_command(
    sources: tuple[str, ...],
    mask: str | None,
    box: str | None,
    steps: int,
    jump_length: int | None,
    jump_samples: int,
    **options: Any,
) -> None:
    """Paint a region of images and keep the rest (RePaint)."""
    import torch

    from ..plan import repaint_plan
    from ..sampling.editing import inpaint

    with refusing():
        if (mask is None) == (box is None):
            given = "neither" if mask is None else "both"
            raise InvalidValue("inpaint", "", "either --mask or --box to be given", given)
        edit = _Edit("inpaint", sources, options, inputs=() if mask is None else (mask,))
        loaded, labels = edit.loaded, edit.labels()
        painted = edit.box(box or "") if mask is None else edit.mask(mask)
        plan = repaint_plan(
            *(loaded.objective, steps, jump_length or max(1, steps // 10), jump_samples if steps > 1 else 1),
            clip=loaded.clip,
        )
        edit.make_ready(3)
        arguments = edit.arguments() | {"seed": options["seed"], "class_labels": labels}
        result = inpaint(loaded.model, plan, edit.images, painted, **arguments).cpu().float()
        grey = torch.zeros_like(edit.images)
        rows = torch.stack([edit.images, torch.where(painted > 0, grey, edit.images), result], dim=1)
    edit.show(rows)


class _Edit:
    """The checked options of an editing command, its model and its images. Nothing is written before `make_ready`.

    Attributes:
        loaded: The model.
        images: Float32 [N, C, H, W] in [-1, 1] on the CPU.
    """

    def __init__(
        self, command: str, sources: tuple[str, ...], options: dict[str, Any], *, inputs: tuple[str, ...] = ()
    ) -> None:
        """Check what needs no model, then load the model and read the images.

        Args:
            command: The command's name, for errors.
            sources: The images to read.
            options: The options that all editing commands have.
            inputs: Further files that the command reads. `--out` may be none of them.
        """
        import torch

        from ..checks import computing_device
        from ..files.images import image_format
        from ..ops import sample_seeds
        from ..pretrained import BUILTIN, load_folder
        from ..training.data import to_unit_range

        self._command, self._options, self._out = command, options, options["out"]
        check_output(command, "out", self._out)
        image_format(self._out, name="out")
        self._check_sources(sources)
        for path in (*sources, *inputs):
            if self._out.exists() and os.path.exists(path) and self._out.samefile(path):
                raise InvalidValue(command, "out", "to be another file than those that are read", repr(path))
        sample_seeds(options["seed"], 0)  # checks the seed
        self._dtype = None if options["dtype"] is None else getattr(torch, options["dtype"])
        device = computing_device(command, options["device"])
        self.loaded: Pretrained = load_folder(options["model"] or BUILTIN, device, self._dtype)
        channels, height, width = self.loaded.shape
        if height is None or width is None or channels not in (1, 3, 4):
            got = f"sample_size {self.loaded.model.config['sample_size']} and {channels} channels"
            raise InvalidValue(command, "model", "to be one that draws grey, RGB or RGBA pictures of one size", got)
        wanted = "to be one without a condition (ddpm_fast.vary and its like take one)"
        expect(not self.loaded.condition_channels, command, "model", wanted, self.loaded.model.config.get("condition"))
        self._shape = (channels, height, width)
        self._datasets: dict[str, ImageDataset] = {}
        self.images = to_unit_range(torch.stack([self._read(source) for source in sources]))

    def _check_sources(self, sources: tuple[str, ...]) -> None:
        """Raise unless each source is a file or names a data set."""
        from ..training.data import DATASETS

        for source in sources:
            name, _, number = source.partition(":")
            if not os.path.isfile(source) and (name not in DATASETS or _whole_number(number) < 0):
                names = ", ".join(f"{name}:NUMBER" for name in DATASETS)
                raise InvalidValue(self._command, "IMAGE", f"to be a file or one of {names}", repr(source))

    def _read(self, source: str) -> Tensor:
        """Return the image of a file or of a data set, uint8 [C, H, W]."""
        from ..training.data import load_dataset, read_image

        if os.path.isfile(source):
            return read_image(source, self._shape, caller=self._command, name="IMAGE")
        name, _, number = source.partition(":")
        if name not in self._datasets:
            self._datasets[name] = load_dataset(name, split="test", image_size=self._shape[1:])
        dataset = self._datasets[name]
        index = _whole_number(number)
        expect(index < len(dataset), self._command, "IMAGE", f"to be {name}:0 to {name}:{len(dataset) - 1}", repr(source))
        image: Tensor = dataset[index][0]
        if image.shape[0] != self._shape[0]:
            channels = f"{self._shape[0]} channel{'s' * (self._shape[0] > 1)}"
            raise InvalidValue(self._command, "IMAGE", f"to have {channels}, as the model", repr(source))
        return image

    def mask(self, path: str) -> Tensor:
        """Return the mask in a file, float32 [1, 1, H, W]."""
        from ..training.data import read_image

        mask = read_image(path, (1, *self._shape[1:]), caller=self._command, name="mask")[None]
        if int(mask.max()) < 128:  # such as a mask of zeros and ones
            raise InvalidValue(self._command, "mask", "to have white pixels", f"values up to {int(mask.max())} of 255")
        return mask.float() / 255

    def box(self, box: str) -> Tensor:
        """Return a mask that is 1 in a box "X,Y,W,H", float32 [1, 1, H, W]."""
        import torch

        _, rows, columns = self._shape
        numbers = [_whole_number(part) for part in box.split(",")]
        x, y, width, height = numbers if len(numbers) == 4 else (-1, -1, 0, 0)
        expect(
            min(x, y) >= 0 and min(width, height) >= 1 and x + width <= columns and y + height <= rows,
            self._command,
            "box",
            f"to be X,Y,W,H within {columns}x{rows} pixels",
            repr(box),
        )
        painted = torch.zeros(1, 1, rows, columns)
        painted[..., y : y + height, x : x + width] = 1
        return painted

    def plan(self, options: dict[str, Any]) -> Any:
        """Return the plan of the sampler's options."""
        chosen = (options[name] for name in ("sampler", "steps", "eta", "spacing", "sigma_min", "sigma_max", "variance"))
        return plan_of_options(self._command, self.loaded, *chosen)[0]

    def labels(self, *, pairs: bool = False) -> list[int] | None:
        """Return a label for each image, or for each pair, or None for "no label", which is the default."""
        classes, guidance = self._options["classes"], self._options["guidance"]
        count = 1 if pairs else len(self.images)
        labels = None if classes is None else labels_of_option(self._command, self.loaded, classes, count, each=True)
        expect(
            guidance in (None, 1) or labels is not None,
            self._command,
            "guidance",
            "to be 1 or to go with --classes",
            f"{guidance} and no labels",
        )
        return labels

    def make_ready(self, columns: int, num: int | None = None) -> None:
        """Raise unless memory and the format can hold the picture. Then make its folder. This is the last check."""
        from ..files.images import grid_shape, image_format

        rows = len(self.images)
        picture = grid_shape((rows * columns, *self.images.shape[1:]), columns=columns, scale=self._scale)
        what = ("IMAGE", f"{rows} images") if num is None else ("num", str(num))
        # Copies, x_T and results in float32, and pictures.
        check_free_memory(self._command, *what, 12 * columns * self.images.numel() + 3 * math.prod(picture))
        image_format(self._out, picture, "out")
        make_writable(self._command, "out", self._out.parent)

    @property
    def _scale(self) -> int:
        """The pixels of the picture for each pixel of an image."""
        return max(1, 96 // max(self._shape[1:]))

    def arguments(self, *, guidance: bool = True) -> dict[str, Any]:
        """Return the arguments that all editing functions take."""
        options = self._options
        arguments = {"batch_size": options["batch_size"], "progress": not options["quiet"], "dtype": self._dtype}
        if guidance:
            arguments["guidance_scale"] = options["guidance"]
        return arguments

    def show(self, rows: Tensor) -> None:
        """Write a picture with a row for each image, [rows, columns, C, H, W], and say so."""
        from ..files.images import save_grid

        failures: list[str] = []
        images, columns = rows.flatten(0, 1), rows.shape[1]
        bad = int((~images.flatten(1).isfinite().all(dim=1)).sum())
        if bad:
            failures.append(f"{bad} of {len(images)} images are not finite and drawn grey")
            images = images.nan_to_num(0, 0, 0)
        save_result(lambda path: save_grid(images, path, columns=columns, scale=self._scale), self._out, failures, (".png",))
        if failures:
            raise click.ClickException("; ".join(failures))
        if not self._options["quiet"]:
            click.echo(f"{self._out}: {len(rows)} row{'s' * (len(rows) > 1)} of {columns} images.")


def _whole_number(text: str) -> int:
    """Return the number that decimal digits say, or -1 for any other text or more than nine digits."""
    text = text.strip()
    return int(text) if text.isdecimal() and len(text) <= 9 else -1
