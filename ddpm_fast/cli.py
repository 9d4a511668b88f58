"""The command line: `ddpm-fast COMMAND`, or `python -m ddpm_fast COMMAND`."""

from __future__ import annotations

import inspect
import logging
import math
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from click.core import ParameterSource
from tqdm.contrib.logging import logging_redirect_tqdm

from .builtin import BUILTIN, Pretrained, load_folder
from .data import load_dataset, to_unit_range
from .evaluate import variational_bound
from .images import image_format, save_grid, save_trajectory
from .info import info
from .plan import SamplingPlan, ddim_plan, ddpm_plan
from .run_folder import RunFolder, write_json
from .sampling import sample
from .training import export_checkpoint, train
from .version import __version__

_Command = TypeVar("_Command", bound=Callable[..., Any])


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="ddpm-fast")
def main() -> None:
    """Denoising diffusion probabilistic models: fast, exact and reproducible."""
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)


def _numbers(ctx: click.Context, option: click.Parameter, value: str) -> list[int]:
    """Whole numbers separated by commas; "none" for no number."""
    try:
        return [] if value == "none" else [int(number) for number in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of whole numbers separated by commas") from None


class _Refused(click.ClickException):
    """What cannot be done as asked; one line, as for the arguments that click itself refuses."""

    exit_code = 2


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise _Refused(str(error)) from error


# ------------------------------------------------------------------------------------------------------------------ train


def _train_option(declaration: str, help: str, **settings: Any) -> Callable[[_Command], _Command]:
    """An option of `train`, with the default that the function's signature has."""
    name = declaration.split("/")[0].removeprefix("--").replace("-", "_")
    default = inspect.signature(train).parameters[name].default
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
        settings |= {"callback": _numbers, "metavar": "N,N,..."}
    return click.option(declaration, help=help, default=default, **({"show_default": default is not None} | settings))


@main.command("train")
@click.argument("run_dir", type=click.Path(file_okay=False, path_type=Path))
@click.option("--resume", is_flag=True, help="Continue the run in RUN_DIR, with its own options; few may change.")
@_train_option("--data", "digits, fashion-mnist, cifar10, or a folder of images (sub-folders are classes).")
@_train_option("--data-dir", "Where the data set's files are, or are downloaded to.", type=click.Path())
@_train_option("--image-size", "Height and width in pixels.  [default: the data set's own]", type=int)
@_train_option("--flip/--no-flip", "Mirror half of the images left to right.")
@_train_option("--channels", "Channels of each level; each halves the resolution.")
@_train_option("--layers", "Residual blocks a level.")
@_train_option("--attention", "Resolutions with self-attention, in pixels, or none.")
@_train_option("--head-dim", "Channels of an attention head.  [default: a single head]", type=int)
@_train_option("--scale-shift/--no-scale-shift", "The time embedding scales and shifts the second norm.")
@_train_option("--dropout", "Probability of dropout in the residual blocks.")
@_train_option("--conditional/--unconditional", "Give the network the class.")
@_train_option("--label-dropout", "Probability of training without the class, for guidance.")
@_train_option("--init", "Start from the weights in this folder: a model's, a run's or a checkpoint's.", type=click.Path())
@_train_option("--num-timesteps", "T, the length of the forward process.")
@_train_option("--schedule", "Noise schedule.", type=click.Choice(["linear", "scaled_linear", "cosine", "sigmoid"]))
@_train_option("--prediction", "What is predicted.", type=click.Choice(["epsilon", "sample", "v_prediction"]))
@_train_option(
    "--loss-weight",
    "Weight the loss of each timestep.  [default: equal weights, eq. 12]",
    type=click.Choice(["min-snr"]),
    callback=lambda ctx, option, value: value and value.replace("-", "_"),
)
@_train_option("--steps", "Optimizer steps, counted from the run's beginning.")
@_train_option("--batch-size", "Images a step.")
@_train_option("--lr", "Learning rate after warm-up.")
@_train_option("--warmup-steps", "Steps over which the learning rate rises from 0.")
@_train_option("--lr-decay", "Form of its fall to 0 at the end.", type=click.Choice(["linear", "cosine"]))
@_train_option("--lr-decay-steps", "How many of the last steps the fall takes.")
@_train_option("--weight-decay", "Weight decay of AdamW.")
@_train_option("--clip-grad", "Largest norm of the gradient; 0: not clipped.")
@_train_option("--ema-decay", "Decay of the moving average of the weights.")
@_train_option("--precision", "Autocast for the network.", type=click.Choice(["float32", "bf16"]))
@_train_option("--channels-last/--no-channels-last", "Memory format of images and weights.")
@_train_option("--seed", "Seed of everything random.")
@_train_option("--device", "cpu, cuda, cuda:1, ...  [default: a GPU if there is one]", type=str)
@_train_option("--threads", "CPU threads.  [default: torch's choice]", type=int)
@_train_option("--log-every", "Steps between rows of the log.")
@_train_option("--sample-every", "Steps between grids of samples; 0: none.")
@_train_option("--sample-steps", "DDIM steps of those samples.")
@_train_option("--checkpoint-every", "Steps between checkpoints; 0: by time alone.")
@_train_option("--checkpoint-minutes", "Minutes between checkpoints; 0: by steps alone.")
@_train_option("--keep", "Checkpoints kept.")
@_train_option("--tensorboard/--no-tensorboard", "Write TensorBoard's event files, if it is installed.")
@_train_option("--max-minutes", "Stop, with a checkpoint, after this time.", type=float)
@_train_option("--progress/--no-progress", "Show a progress bar.")
@click.pass_context
def train_command(ctx: click.Context, /, run_dir: Path, resume: bool, progress: bool, **options: Any) -> None:
    """Train a network on images. RUN_DIR receives checkpoints, logs and samples.

    Ctrl-C stops after the current step and saves; the same command with --resume goes on as if nothing had happened.
    """
    try:
        with _refusing(), logging_redirect_tqdm():
            if resume:  # the run's own options, except those given now
                given = {name: options[name] for name in options if _is_given(ctx, name)}
                options |= RunFolder(run_dir).read_config()["options"] | given
            result = train(run_dir, **options, resume=resume, progress=progress)
    except FloatingPointError as error:
        raise click.ClickException(str(error)) from error
    if result.stopped_by in ("SIGINT", "SIGTERM"):
        ctx.exit(128 + signal.Signals[result.stopped_by])  # as a shell reports a process that the signal ended


def _is_given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) not in (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)


@main.command("export")
@click.argument("run_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out_dir", type=click.Path(file_okay=False, path_type=Path))
@click.option("--dtype", type=click.Choice(["float16", "bfloat16", "float32"]), default="float16", show_default=True)
def export_command(run_dir: Path, out_dir: Path, dtype: str) -> None:
    """Write the averaged network of a run to a folder. OUT_DIR is then a model to sample from or to share."""
    with _refusing():
        click.echo(export_checkpoint(run_dir, out_dir, getattr(torch, dtype)))


# ------------------------------------------------------------------------------------------------------- sample, evaluate


def _make_writable(folder: Path) -> None:
    """Make the folder that results will go to, before the work; OSError where it cannot be made or written to."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def _device(ctx: click.Context, param: click.Parameter, value: str) -> torch.device:
    """The device of that name; refused where nothing can be computed on it."""
    try:
        device = torch.device(value)
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise click.BadParameter(f"{value!r}: {str(error).splitlines()[0]}") from error
    return device


_VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")


def _model_options(command: _Command) -> _Command:
    """The options that say which model runs, and how."""
    options = [
        click.option(
            "--model",
            "folder",
            type=click.Path(exists=True, file_okay=False, path_type=Path),
            default=BUILTIN,
            help="A model's folder in diffusers' layout, or a training run's.  [default: the built-in model]",
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Seed of all noise."),
        click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Images at a time."),
        click.option(
            "--dtype",
            type=click.Choice(["float32", "bfloat16", "float16", "float64"]),
            help="Precision of the network.  [default: float32; to sample on a GPU: bfloat16, or float16 where it has none]",
        ),
        click.option(
            "--device",
            callback=_device,
            default=lambda: "cuda" if torch.cuda.is_available() else "cpu",
            help="cpu, cuda, cuda:1, ...  [default: a GPU if there is one]",
        ),
        click.option("--quiet", is_flag=True, help="Print errors only."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@main.command("sample")
@click.option("--num", type=click.IntRange(1), default=16, show_default=True, help="Images to draw.")
@click.option("--steps", type=click.IntRange(1), help="Steps of the sampler.  [default: every timestep; 50 with ddim]")
@click.option("--sampler", type=click.Choice(["ddpm", "ddim"]), default="ddpm", show_default=True, help="Ancestral or DDIM.")
@click.option("--eta", type=click.FloatRange(0), help="DDIM's noise; 0 is deterministic.  [default: 0]")
@click.option("--spacing", type=click.Choice(["leading", "trailing", "linspace"]), default="leading", show_default=True)
@click.option("--variance", type=click.Choice(_VARIANCES), help="Of ancestral steps.  [default: the model's]")
@click.option("--classes", help="Names or numbers separated by commas, taken in turn; none: no label.  [default: all]")
@click.option("--guidance", type=float, help="Scale of classifier-free guidance.  [default: 1, which is none]")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default="samples.png", show_default=True)
@click.option("--gif", type=click.Path(dir_okay=False, path_type=Path), help="Also show the way: .gif, .webp, or a .png strip.")
@_model_options
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
    folder: Path,
    seed: int,
    batch_size: int,
    dtype: str | None,
    device: torch.device,
    quiet: bool,
) -> None:
    """Draw images from a model. By default 16 from the built-in model, by all steps of ancestral sampling."""
    with _refusing(), logging_redirect_tqdm():
        for path in filter(None, (out, gif)):
            image_format(path)
        precision = None if dtype is None else getattr(torch, dtype)
        loaded = load_folder(folder, device, precision)
        plan = _plan(loaded, sampler, steps, eta, spacing, variance)
        labels = _labels(loaded, classes, num)
        for path in filter(None, (out, gif)):
            _make_writable(path.parent)
        began = time.perf_counter()
        drawn = sample(
            loaded.model,
            plan,
            num,
            seed=seed,
            class_labels=labels,
            guidance_scale=guidance,
            batch_size=batch_size,
            return_trajectory=gif is not None,
            progress=not quiet,
            dtype=precision,
        )
        images = (drawn[0] if isinstance(drawn, tuple) else drawn).cpu()  # waits for a GPU
        seconds = time.perf_counter() - began
        pixels = max(images.shape[2:])
        written = [save_grid(images, out, scale=max(1, 128 // pixels))]
        if isinstance(drawn, tuple) and gif is not None:
            written.append(save_trajectory(drawn[1], gif, scale=max(1, 64 // pixels)))
    if not quiet:
        names = ", ".join(map(str, written))
        click.echo(f"{names}: {num} images, {plan.num_steps} steps, {seconds:.1f} s ({num / seconds:.3g} images/s)")


def _plan(loaded: Pretrained, sampler: str, steps: int | None, eta: float | None, spacing: Any, variance: Any) -> SamplingPlan:
    common: dict[str, Any] = {"spacing": spacing, "prediction": loaded.prediction, "clip": loaded.clip}
    if sampler == "ddim":
        if variance is not None:
            raise ValueError("--variance goes with --sampler ddpm; the noise of ddim is --eta")
        return ddim_plan(loaded.schedule, steps or min(50, loaded.schedule.num_timesteps), eta=eta or 0.0, **common)
    if eta is not None:
        raise ValueError("--eta goes with --sampler ddim; the noise of ddpm is --variance")
    return ddpm_plan(loaded.schedule, steps, variance=variance or loaded.variance, **common)


def _labels(loaded: Pretrained, classes: str | None, num: int) -> list[int] | None:
    """A label an image, the classes in turn; None for "no label", or where the model has no classes."""
    embeddings = loaded.model.config["num_class_embeds"]
    if classes == "none" or (classes is None and embeddings is None):
        return None
    if embeddings is None:
        raise ValueError(f"--classes: the model has no classes, got {classes!r}")
    count = embeddings - 1  # the last is "no label"
    names = {name.lower(): label for label, name in enumerate(loaded.classes[:count])}
    chosen = list(range(count))
    if classes is not None:
        chosen = []
        for entry in (part.strip() for part in classes.split(",")):
            label = names.get(entry.lower(), int(entry) if entry.isdecimal() else count)
            if label >= count:
                known = f" or one of {', '.join(loaded.classes)}" if names else ""
                raise ValueError(f"--classes: expected 0..{count - 1}{known}, got {entry!r}")
            chosen.append(label)
    return [chosen[i % len(chosen)] for i in range(num)]


@main.command("evaluate")
@click.option("--num", type=click.IntRange(1), default=256, show_default=True, help="Images, from the first.")
@click.option("--data", default="fashion-mnist", show_default=True, help="Test images: as for `train`.")
@click.option("--data-dir", type=click.Path(), help="Where the data set's files are, or are downloaded to.")
@click.option("--variance", type=click.Choice(_VARIANCES), help="Of the reverse steps.  [default: the model's]")
@click.option("--labels/--no-labels", default=True, show_default=True, help="Give the network the class of each image.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Also write the figures here.")
@_model_options
def evaluate_command(
    num: int,
    data: str,
    data_dir: str | None,
    variance: Any,
    labels: bool,
    json_path: Path | None,
    folder: Path,
    seed: int,
    batch_size: int,
    dtype: str | None,
    device: torch.device,
    quiet: bool,
) -> None:
    """Bound the bits a dimension that test images need. Prints L_T, L_{T-1} + ... + L_1, L_0 and their sum."""
    with _refusing():
        dtype = dtype or "float32"
        loaded = load_folder(folder, device, getattr(torch, dtype))
        variance = variance or loaded.variance
        dataset = load_dataset(data, data_dir, split="test", image_size=loaded.model.config["sample_size"])
        if num > len(dataset):
            raise ValueError(f"--num: {data} has {len(dataset)} test images, got {num}")
        if dataset.shape[0] != loaded.model.config["in_channels"]:
            raise ValueError(f"--data: {data} has {dataset.shape[0]} channels, the model {loaded.model.config['in_channels']}")
        images, classes = dataset[torch.arange(num)]
        labelled = labels and loaded.model.config["num_class_embeds"] is not None
        if json_path is not None:
            _make_writable(json_path.parent)
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
    last = loaded.schedule.num_timesteps
    parts = {
        f"L_{last}": bound.prior,
        f"L_{last - 1} + ... + L_1": bound.transitions,
        "L_0": bound.reconstruction,
        "total": bound.total,
    }
    if not quiet:
        click.echo(f"{num} test images of {data}, {variance}: bits/dim (standard error of the mean), {seconds:.1f} s")
        for name, bits in parts.items():
            error = float(bits.std(correction=0)) / math.sqrt(num)
            click.echo(f"  {name:<18} {float(bits.mean()):9.5f}  ({error:.5f})")
    if json_path is not None:
        settings = {"data": data, "num": num, "variance": variance, "labels": labelled, "seed": seed, "dtype": dtype}
        keys = ("prior", "transitions", "reconstruction", "total")
        figures = dict(zip(keys, parts.values(), strict=True))
        curves = {"terms": bound.terms, "x_0_mse": bound.x_0_mse, "epsilon_mse": bound.epsilon_mse}
        write_json(
            json_path,
            {
                **settings,
                "bits_per_dim": {key: float(bits.mean()) for key, bits in figures.items()},
                "per_image": {key: bits.tolist() for key, bits in figures.items()},
                "per_timestep": {key: values.mean(dim=0).tolist() for key, values in curves.items()},
                "seconds": seconds,
            },
        )


# ------------------------------------------------------------------------------------------------------------------- info


@main.command("info")
def info_command() -> None:
    """Say what is installed, what runs here, and why the rest does not."""
    click.echo(info())
