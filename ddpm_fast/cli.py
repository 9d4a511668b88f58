"""The command line: `ddpm-fast COMMAND` or `python -m ddpm_fast COMMAND`."""

from __future__ import annotations

import inspect
import io
import logging
import math
import os
import re
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar, cast

import click
from click.core import ParameterSource

from .atomic import remove_leftovers
from .limits import check_free_memory, check_free_space, check_writable
from .training import train
from .version import __version__

if TYPE_CHECKING:
    import torch

    from .plan import SamplingPlan
    from .pretrained import Pretrained

# Commands import what they need when they run: help texts need not wait for PyTorch.

_Command = TypeVar("_Command", bound=Callable[..., Any])


# The OpenMP runtimes' variables that say how idle threads wait.
_WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


class _Refused(click.ClickException):
    """A refusal of a command, shown on one line as click shows a bad argument."""

    exit_code = 2


class _Stopped(click.ClickException):
    """The end of a command by Ctrl-C, with what has become of its work."""

    exit_code = 128 + signal.SIGINT

    def show(self, file: Any = None) -> None:
        click.echo(self.format_message(), err=True)


class _Forgiving:
    """A text stream that drops what it cannot write. Work must not be lost for a progress bar on a closed terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Commands(click.Group):
    """The group of commands. Its streams may be closed or full, and Ctrl-C may come at any time.

    The context's object is the list of the files that the command has written.
    """

    def main(self, *args: Any, **kwargs: Any) -> Any:
        written = kwargs.setdefault("obj", [])
        for number in range(3):
            try:
                os.fstat(number)
            except OSError:  # a closed stream: the next file that is opened would receive what is meant for it
                os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
        with ExitStack() as stack:
            null = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            if sys.stdout is None:
                stack.enter_context(redirect_stdout(null))
            stack.enter_context(redirect_stderr(cast("TextIO", _Forgiving(sys.stderr or null))))
            if isinstance(sys.stdout, io.TextIOWrapper):
                sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
            try:
                return super().main(*args, **kwargs)
            except OSError as error:
                if not kwargs.get("standalone_mode", True):
                    raise
                # Files are written within `_refusing`, so this is standard output.
                click.echo(f"Error: standard output: {error}. {_files(written)}", err=True)
                with suppress(OSError, ValueError):
                    os.dup2(null.fileno(), sys.stdout.fileno())  # or Python would try to write the rest when it ends
                sys.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _Stopped(f"Stopped by Ctrl-C. {_files(ctx.obj)}") from None


def _files(written: list[Path]) -> str:
    return f"Written: {', '.join(map(str, written))}." if written else "Nothing was written."


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="ddpm-fast")
def main() -> None:
    """Train, sample and evaluate denoising diffusion probabilistic models."""
    # Idle threads sleep instead of spinning, or programs beside this one slow it down several times. The OpenMP runtime reads
    # the variable when PyTorch is loaded. If torch is loaded already, another program uses this as a library, so leave its
    # environment alone.
    if "torch" not in sys.modules and not any(name in os.environ for name in _WAIT_VARIABLES):
        os.environ["OMP_WAIT_POLICY"] = "passive"
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)


def _numbers(ctx: click.Context, option: click.Parameter, value: str) -> list[int]:
    """Parse whole numbers separated by commas, or "none"."""
    try:
        return [] if value == "none" else [int(number) for number in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of whole numbers separated by commas") from None


class _Finite(click.FloatRange):
    """A type of option: a number in a range that is neither NaN nor infinite."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


# Options by the names that the package's functions have for them.
_ALIASES = {"num_samples": "num", "num_steps": "steps", "class_labels": "classes", "name": "data"}


def _option_names() -> dict[str, str]:
    """Return how the user writes each parameter of the present command, by the name that errors have for it."""
    parameters = click.get_current_context().command.params
    names = {
        each.name: each.opts[0] if isinstance(each, click.Option) else each.name.upper() for each in parameters if each.name
    }
    return {alias: names[name] for alias, name in _ALIASES.items() if name in names} | names


@contextmanager
def _refusing() -> Iterator[None]:
    """Turn errors into refusals that name the command's options, and write log lines above progress bars."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    try:
        with logging_redirect_tqdm():
            yield
    except Exception as error:
        options = _option_names()
        text = _refusal(error, options)
        if text is None:
            raise
        if not re.search(r", in '[^']*'$", text):  # an error in a file is about the file's own names
            names = "|".join(options)
            text = re.sub(rf"\bexpected ({names})(?= to |, )", lambda match: f"expected {options[match[1]]}", text)
        raise _Refused(text) from error


def _refusal(error: Exception, options: Mapping[str, str]) -> str | None:
    """Return what to tell the user of an error, or None for a defect of the program."""
    import torch

    text = str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        hint = f"; a smaller {options['batch_size']} needs less" if "batch_size" in options else ""
        return f"out of memory{hint}: {text.splitlines()[0] if text else 'no reason given'}"
    return text if isinstance(error, ValueError | TypeError | ImportError | OSError) else None


def _model_folder(ctx: click.Context, option: click.Parameter, value: Any) -> Any:
    """Refuse a model's folder that does not exist, with a hint if it looks like a hub's id."""
    if value is None or os.path.isdir(value):
        return value
    hint = ""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(value)):
        name = Path(value).name
        hint = f"; models of the Hugging Face hub are downloaded first: hf download {value} --local-dir {name}"
    raise click.BadParameter(f"expected a folder, got {str(value)!r}, which is none{hint}")


# ------------------------------------------------------------------------------------------------------------------ train


def _argument_texts(function: Callable[..., Any]) -> dict[str, str]:
    """Return what the Args section of a function's docstring says of each argument."""
    section = re.search(r"^Args:\n(.*?)\n\n", inspect.getdoc(function) or "", re.DOTALL | re.MULTILINE)
    entries = re.split(r"^    (\w+): ", section[1] if section else "", flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in zip(entries[1::2], entries[2::2], strict=True)}


_TRAIN_TEXTS = _argument_texts(train)


def _train_option(declaration: str, **settings: Any) -> Callable[[_Command], _Command]:
    """Declare an option of `train`, with the text of the function's docstring and the default of its signature."""
    name = declaration.split("/")[0].removeprefix("--").replace("-", "_")
    default = inspect.signature(train).parameters[name].default
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
        settings |= {"callback": _numbers, "metavar": "N,N,..."}
    shown = default is not None and default is not False
    return click.option(declaration, help=_TRAIN_TEXTS.get(name), default=default, **({"show_default": shown} | settings))


@main.command("train")
@click.argument("run_dir", type=click.Path(file_okay=False, path_type=Path))
@_train_option("--resume", is_flag=True)
@_train_option("--data")
@_train_option("--data-dir", type=click.Path())
@_train_option("--image-size", type=int)
@_train_option("--skip-broken/--no-skip-broken")
@_train_option("--flip/--no-flip")
@_train_option("--channels")
@_train_option("--layers")
@_train_option("--attention")
@_train_option("--head-dim", type=int)
@_train_option("--scale-shift/--no-scale-shift")
@_train_option("--dropout")
@_train_option("--conditional/--unconditional")
@_train_option("--label-dropout")
@_train_option("--init", type=click.Path(), callback=_model_folder)
@_train_option("--num-timesteps")
@_train_option("--schedule", type=click.Choice(["linear", "scaled_linear", "cosine", "sigmoid"]))
@_train_option("--prediction", type=click.Choice(["epsilon", "sample", "v_prediction"]))
@_train_option(
    "--loss-weight", type=click.Choice(["min-snr"]), callback=lambda ctx, option, value: value and value.replace("-", "_")
)
@_train_option("--steps")
@_train_option("--batch-size")
@_train_option("--lr")
@_train_option("--warmup-steps")
@_train_option("--lr-decay", type=click.Choice(["linear", "cosine"]))
@_train_option("--lr-decay-steps")
@_train_option("--weight-decay")
@_train_option("--clip-grad")
@_train_option("--ema-decay")
@_train_option("--precision", type=click.Choice(["float32", "bf16"]))
@_train_option("--channels-last/--no-channels-last")
@_train_option("--seed")
@_train_option("--device", type=str)
@_train_option("--threads", type=int)
@_train_option("--log-every")
@_train_option("--sample-every")
@_train_option("--sample-steps")
@_train_option("--checkpoint-every")
@_train_option("--checkpoint-minutes")
@_train_option("--keep")
@_train_option("--tensorboard/--no-tensorboard")
@_train_option("--max-minutes", type=float)
@_train_option("--data-check", type=click.Choice(["sample", "exact", "off"]))
@_train_option("--lock/--no-lock")
@_train_option("--progress/--no-progress")
@click.pass_context
def train_command(ctx: click.Context, /, run_dir: Path, resume: bool, progress: bool, **options: Any) -> None:
    """Train a network on images. RUN_DIR receives checkpoints, logs and samples.

    Stop with Ctrl-C, which saves a checkpoint. Continue exactly with --resume.
    """
    from .training.run_folder import RunFolder

    try:
        with _refusing():
            if resume:  # the run's own options, except those given now
                given = {name: options[name] for name in options if _is_given(ctx, name)}
                options |= RunFolder(run_dir).read_config()["options"] | given
            result = train(run_dir, **options, resume=resume, progress=progress)
    except FloatingPointError as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:  # before the first step, or for the second time
        checkpoint = RunFolder(run_dir).latest_checkpoint()
        raise _Stopped(f"Stopped by Ctrl-C. The last checkpoint of {run_dir}: {checkpoint or 'none'}.") from None
    if result.stopped_by in ("SIGINT", "SIGTERM", "SIGHUP"):
        ctx.exit(128 + signal.Signals[result.stopped_by])  # as a shell reports a process that the signal ended
    if result.stopped_by is None:
        click.echo(f"{run_dir}: {result.step} steps done. Sample from it with: ddpm-fast sample --model {run_dir}")


def _is_given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) not in (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)


@main.command("export")
@click.argument("run_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out_dir", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    default="float16",
    show_default=True,
    help="Store the weights in this precision.",
)
def export_command(run_dir: Path, out_dir: Path, dtype: str) -> None:
    """Write a run's averaged network to OUT_DIR, in diffusers' layout."""
    import torch

    from .training.export import export_checkpoint

    for folder in (out_dir, out_dir / "unet"):
        remove_leftovers(folder)
    try:
        with _refusing():
            folder = export_checkpoint(run_dir, out_dir, getattr(torch, dtype))
    except KeyboardInterrupt:
        raise _Stopped(f"Stopped by Ctrl-C. {out_dir} may be incomplete.") from None
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    click.echo(f"{folder}: {size / 1e6:.1f} MB of {dtype} weights. Sample from it with: ddpm-fast sample --model {folder}")


# ------------------------------------------------------------------------------------------------------- sample, evaluate


def _check_output(command: str, name: str, path: Path) -> None:
    """Raise if no file can be written there, as far as that can be known without writing."""
    check_writable(command, name, path, path.parent)
    if path.exists() and not path.is_file():
        raise ValueError(f"{command}: expected {name} to be a file, got {str(path)!r}, which is a folder or a device")


def _make_writable(command: str, name: str, folder: Path) -> None:
    """Make the folder that results will go to. Raise OSError if it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{command}: expected {name} to be in a folder for files, got {str(folder)!r}: {error}") from error


def _save(save: Callable[[Path], object], path: Path, failures: list[str], endings: tuple[str, ...] = ()) -> None:
    """Save a result, or if that fails save it beside the path or in the temporary folder, and add to `failures`.

    Args:
        save: Writes the file that it is given.
        path: The file to write.
        failures: Receives the reason if another file had to be written, or none could be.
        endings: Endings to try beside the path's own.
    """
    written: list[Path] = click.get_current_context().obj
    try:
        save(path)
        written.append(path)
        return
    except Exception as error:  # formats raise errors of many types
        reason = f"{path} could not be written: {error}"
    folders = [path.parent]
    with suppress(OSError):
        folders.append(Path(tempfile.gettempdir()))
    for folder in folders:
        for ending in dict.fromkeys((path.suffix, *endings)):
            other = folder / f"{path.stem[:100]}-{secrets.token_hex(4)}{ending}"
            with suppress(Exception):
                save(other)
                written.append(other)
                failures.append(f"{reason}. Written instead: {other}")
                return
    failures.append(f"{reason}. No other file could be written either: {', '.join(map(str, folders))}")


_MAX_GUIDANCE = 1e4  # beyond it, differences of predictions leave the range of float32 within a few steps
_FRAMES = 51  # at most, in an animation
_VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")


def _model_options(dtype_help: str) -> Callable[[_Command], _Command]:
    """Return a decorator that adds the options that say which model runs, and how."""
    options = [
        click.option(
            "--model",
            type=click.Path(path_type=Path),
            callback=_model_folder,
            help="Load a model's folder in diffusers' layout, or a training run's.  [default: the built-in model]",
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Seed all noise."),
        click.option(
            "--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Run this many images at a time."
        ),
        click.option(
            "--dtype",
            type=click.Choice(["float32", "bfloat16", "float16", "float64"]),
            help=dtype_help,
        ),
        click.option("--device", help="Run on cpu, cuda, cuda:1, ...  [default: a GPU if there is one]"),
        click.option("--quiet", is_flag=True, help="Print errors only."),
    ]

    def add(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@main.command("sample")
@click.option("--num", type=click.IntRange(1), default=16, show_default=True, help="Draw this many images.")
@click.option("--steps", type=click.IntRange(1), help="Take this many steps per image.  [default: 100 with ddpm, 50 with ddim]")
@click.option(
    "--sampler",
    type=click.Choice(["ddpm", "ddim"]),
    default="ddpm",
    show_default=True,
    help="Sample by ancestral steps (eq. 13) or by DDIM.",
)
@click.option("--eta", type=_Finite(0), help="Scale DDIM's noise; 0 is deterministic.  [default: 0]")
@click.option(
    "--spacing",
    type=click.Choice(["leading", "trailing", "linspace"]),
    default="leading",
    show_default=True,
    help="Choose the spacing of the timesteps.",
)
@click.option("--variance", type=click.Choice(_VARIANCES), help="Choose the variance of ddpm's steps.  [default: the model's]")
@click.option(
    "--classes", help="Draw these classes in turn: names or numbers with commas, or none for no label.  [default: all]"
)
@click.option(
    "--guidance",
    type=_Finite(-_MAX_GUIDANCE, _MAX_GUIDANCE),
    help="Set the scale of classifier-free guidance; above 1 doubles the cost.  [default: 1]",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default="samples.png",
    show_default=True,
    help="Write the grid of images here.",
)
@click.option(
    "--gif",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the denoising here: an animation (.gif, .webp) or a strip (.png).  [default: none]",
)
@_model_options("Run the network in this dtype.  [default: float32 on a CPU; bfloat16 or float16 on a GPU]")
def sample_command(
    num: int,
    steps: int | None,
    sampler: str,
    eta: float | None,
    spacing: Any,
    variance: Any,
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

    from .checks import computing_device
    from .images import image_format, save_grid, save_trajectory
    from .pretrained import BUILTIN, load_folder
    from .sampling import Sampler

    failures: list[str] = []
    with _refusing():
        _check_output("sample", "out", out)
        image_format(out, name="out")
        if gif is not None:
            _check_output("sample", "gif", gif)
            image_format(gif, name="gif")
            same = out.exists() and gif.exists() and out.samefile(gif)
            if same or str(out.resolve()).casefold() == str(gif.resolve()).casefold():  # some file systems ignore case
                raise ValueError(f"sample: expected gif to be another file than --out, got {str(gif)!r} and {str(out)!r}")
        precision = None if dtype is None else getattr(torch, dtype)
        loaded = load_folder(model or BUILTIN, computing_device("sample", device), precision)
        plan = _plan(loaded, sampler, steps, eta, spacing, variance)
        frames = 0 if gif is None else min(_FRAMES, plan.num_steps + 1)
        config = loaded.model.config
        size = config["sample_size"]
        height, width = size if isinstance(size, list | tuple) else (size, size)
        if height is None:
            raise ValueError("sample: expected model to have a sample_size in its config.json, got null")
        pixels, shape = max(height, width), (num, config["in_channels"], height, width)
        scale, gif_scale = max(1, 128 // pixels), max(1, 64 // pixels)
        _check_pictures(shape, frames, out, scale, gif, gif_scale)
        labels = _labels(loaded, classes, num)
        if guidance not in (None, 1) and labels is None:
            raise ValueError(f"sample: expected guidance to be 1 or to go with classes, got {guidance} and no labels")
        _make_writable("sample", "out", out.parent)
        if gif is not None:
            _make_writable("sample", "gif", gif.parent)
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
        _save(lambda path: save_grid(images, path, scale=scale), out, failures, (".png",))
        if states is not None and gif is not None:
            trajectory = states
            _save(lambda path: save_trajectory(trajectory, path, scale=gif_scale), gif, failures, (".png",))
    if not quiet:
        names = ", ".join(map(str, click.get_current_context().obj))
        images_drawn = "1 image" if num == 1 else f"{num} images"
        steps_taken = "1 step" if plan.num_steps == 1 else f"{plan.num_steps} steps"
        all_steps = loaded.schedule.num_timesteps
        finer = f" For finer images, try --steps {all_steps}." if sampler == "ddpm" and plan.num_steps < all_steps else ""
        click.echo(
            f"{names}: {images_drawn} of {steps_taken} ({sampler}) in {seconds:.1f} s, {num / seconds:.3g} images/s.{finer}"
        )
    if failures:
        raise click.ClickException("; ".join(failures))


def _check_pictures(
    shape: tuple[int, int, int, int], frames: int, out: Path, scale: int, gif: Path | None, gif_scale: int
) -> None:
    """Raise unless memory, disk and formats can hold the images [N, C, H, W] that will be drawn, and their pictures."""
    from .images import ANIMATED, STRIP, grid_shape, image_format

    num, channels, *_ = shape
    numel = math.prod(shape)
    grid = grid_shape(shape, scale=scale)
    size, gif_size = math.prod(grid), 0
    needed = 12 * numel + 64 * num + 3 * size  # float32 states, labels and seeds, pictures
    pictures = [("out", out, grid)]
    if gif is not None:
        if image_format(gif, (1, 1, channels), "gif") in ANIMATED:
            picture, count = grid_shape(shape, scale=gif_scale), frames
        else:
            shown = min(STRIP, frames)
            picture, count = grid_shape((num * shown, *shape[1:]), columns=shown, scale=gif_scale), 1
        pictures.append(("gif", gif, picture))
        gif_size = count * math.prod(picture)
        needed += 4 * frames * numel + 3 * gif_size
    check_free_memory("sample", "num", num, needed)
    for name, path, picture in pictures:
        image_format(path, picture, name)
        check_free_space("sample", name, path, size + gif_size)  # they may share a disk


def _plan(loaded: Pretrained, sampler: str, steps: int | None, eta: float | None, spacing: Any, variance: Any) -> SamplingPlan:
    """Build the plan that the options ask for."""
    from .plan import ddim_plan, ddpm_plan

    common: dict[str, Any] = {"spacing": spacing, "prediction": loaded.prediction, "clip": loaded.clip}
    total = loaded.schedule.num_timesteps
    if steps is not None and steps > total:
        raise ValueError(f"sample: expected steps to be in 1..{total}, the timesteps of the model, got {steps}")
    config = loaded.model.config
    learned = config["out_channels"] == 2 * config["in_channels"]
    if variance is not None and variance.startswith("learned") != learned:
        wanted = (
            "learned or learned_range, as the model predicts it" if learned else "fixed_small or fixed_large for this model"
        )
        raise ValueError(f"sample: expected variance to be {wanted}, got {variance}")
    if sampler == "ddim":
        if variance is not None:
            raise ValueError(f"sample: expected variance to go with --sampler ddpm, got {variance}; the noise of ddim is --eta")
        return ddim_plan(loaded.schedule, steps or min(50, total), eta=eta or 0.0, **common)
    if eta is not None:
        raise ValueError(f"sample: expected eta to go with --sampler ddim, got {eta}; the noise of ddpm is --variance")
    return ddpm_plan(loaded.schedule, steps or min(100, total), variance=variance or loaded.variance, **common)


def _labels(loaded: Pretrained, classes: str | None, num: int) -> list[int] | None:
    """Return a label for each image, the classes in turn. Return None for "no label" or a model without classes."""
    from .requests import labels_of

    config = loaded.model.config
    embeddings = config["num_class_embeds"]
    names = [name.lower() for name in config.get("class_names", ())]
    unlabelled = classes == "none" and "none" not in names  # a class may be called none
    if unlabelled or (classes is None and embeddings is None):
        return None
    if embeddings is None:
        raise ValueError(f"sample: expected classes to be none, as the model has no classes, got {classes!r}")
    count = embeddings - 1  # the last is "no label"
    chosen = list(range(count))
    if classes is not None:
        entries = [part.strip() for part in classes.split(",")]
        numbered = [int(entry) if entry.isdecimal() and entry not in names else entry for entry in entries]
        chosen = cast("list[int]", labels_of("sample", config, numbered))
        if max(chosen) >= count:
            raise ValueError(f"sample: expected classes to be in 0..{count - 1}, got {max(chosen)}")
    return [chosen[i % len(chosen)] for i in range(num)]


@main.command("evaluate")
@click.option(
    "--num", type=click.IntRange(1), default=256, show_default=True, help="Evaluate this many images, from the first."
)
@click.option(
    "--data",
    default="fashion-mnist",
    show_default=True,
    help="Evaluate the test images of digits, fashion-mnist or cifar10, or all of a folder.",
)
@click.option("--data-dir", type=click.Path(), help="Read the data set from this folder, or download it there.")
@click.option("--variance", type=click.Choice(_VARIANCES), help="Choose the reverse steps' variance.  [default: the model's]")
@click.option("--labels/--no-labels", default=True, show_default=True, help="Give the network the class of each image.")
@click.option(
    "--json",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the figures to this JSON file.  [default: none]",
)
@_model_options("Run the network in this dtype.  [default: float32]")
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

    from .atomic import write_json
    from .checks import computing_device
    from .evaluation import variational_bound
    from .pretrained import BUILTIN, load_folder
    from .training.data import load_dataset, to_unit_range

    failures: list[str] = []
    with _refusing():
        if json is not None:
            _check_output("evaluate", "json", json)
            if json.exists() and json.stat().st_size and "bits_per_dim" not in json.read_text(errors="replace"):
                raise ValueError(f"evaluate: expected json to be new or of an earlier evaluation, got {str(json)!r}")
        dtype = dtype or "float32"
        loaded = load_folder(model or BUILTIN, computing_device("evaluate", device), getattr(torch, dtype))
        variance = variance or loaded.variance
        dataset = load_dataset(data, data_dir, split="test", image_size=loaded.model.config["sample_size"], first=num)
        if num > len(dataset):
            raise ValueError(f"evaluate: expected num to be at most {len(dataset)}, the test images of {data}, got {num}")
        if dataset.shape[0] != loaded.model.config["in_channels"]:
            channels = loaded.model.config["in_channels"]
            raise ValueError(
                f"evaluate: expected data to have {channels} channels, as the model has, got {data!r} with {dataset.shape[0]}"
            )
        images, classes = dataset[torch.arange(num)]
        embeddings = loaded.model.config["num_class_embeds"]
        labelled = labels and embeddings is not None
        if labelled and classes.max() >= embeddings - 1:
            raise ValueError(
                f"evaluate: expected labels to be in 0..{embeddings - 2}, as the model has, got {int(classes.max())}; "
                "--no-labels evaluates without"
            )
        if json is not None:
            _make_writable("evaluate", "json", json.parent)
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
        _save(lambda path: write_json(path, result), json, failures)
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


# ------------------------------------------------------------------------------------------------------------------- info


@main.command("info")
def info_command() -> None:
    """Show what is installed and what runs here.

    List the backends of each op and device, with reasons for those that cannot run.
    """
    from .info import info

    click.echo(info())
