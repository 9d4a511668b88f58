"""The command line: `ddpm-fast COMMAND`, or `python -m ddpm_fast COMMAND`."""

from __future__ import annotations

import inspect
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from click.core import ParameterSource
from tqdm.contrib.logging import logging_redirect_tqdm

import ddpm_fast
from ddpm_fast.run_folder import RunFolder
from ddpm_fast.train import export_checkpoint, train

_Command = TypeVar("_Command", bound=Callable[..., Any])


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(ddpm_fast.__version__, prog_name="ddpm-fast")
def main() -> None:
    """Denoising diffusion probabilistic models: fast, exact and reproducible."""
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)


class _Numbers(click.ParamType):
    """Whole numbers separated by commas; "none" for no number."""

    name = "n,n,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if not isinstance(value, str):
            return list(value)
        if value == "none":
            return []
        try:
            return [int(number) for number in value.split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers separated by commas", param, ctx)


# ------------------------------------------------------------------------------------------------------------------ train


def _train_option(declaration: str, help: str, **settings: Any) -> Callable[[_Command], _Command]:
    """An option of `train`, with the default that the function's signature has."""
    name = declaration.split("/")[0].removeprefix("--").replace("-", "_")
    default = inspect.signature(train).parameters[name].default
    if isinstance(default, tuple):
        settings["show_default"] = ",".join(map(str, default))
    return click.option(declaration, help=help, default=default, **({"show_default": default is not None} | settings))


@main.command("train")
@click.argument("run_dir", type=click.Path(file_okay=False, path_type=Path))
@click.option("--resume", is_flag=True, help="Continue the run in RUN_DIR, with its own options; few may change.")
@_train_option("--data", "digits, fashion-mnist, cifar10, or a folder of images (sub-folders are classes).")
@_train_option("--data-dir", "Where the data set's files are, or are downloaded to.", type=click.Path())
@_train_option("--image-size", "Height and width in pixels.  [default: the data set's own]", type=int)
@_train_option("--flip/--no-flip", "Mirror half of the images left to right.")
@_train_option("--channels", "Channels of each level; each halves the resolution.", type=_Numbers())
@_train_option("--layers", "Residual blocks a level.")
@_train_option("--attention", "Resolutions with self-attention, in pixels, or none.", type=_Numbers())
@_train_option("--head-dim", "Channels of an attention head.  [default: a single head]", type=int)
@_train_option("--scale-shift/--no-scale-shift", "The time embedding scales and shifts the second norm.")
@_train_option("--dropout", "Probability of dropout in the residual blocks.")
@_train_option("--conditional/--unconditional", "Give the network the class.")
@_train_option("--label-dropout", "Probability of training without the class, for guidance.")
@_train_option("--num-timesteps", "T, the length of the forward process.")
@_train_option("--schedule", "Noise schedule.", type=click.Choice(["linear", "scaled_linear", "cosine", "sigmoid"]))
@_train_option("--prediction", "What is predicted.", type=click.Choice(["epsilon", "sample", "v_prediction"]))
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
def train_command(ctx: click.Context, run_dir: Path, resume: bool, progress: bool, **options: Any) -> None:
    """Train a network on images; RUN_DIR receives checkpoints, logs and samples.

    Ctrl-C stops after the current step and saves; the same command with --resume goes on as if nothing had happened.
    """
    try:
        if resume:  # the run's own options, except those given now
            given = {name: options[name] for name in options if _is_given(ctx, name)}
            options = RunFolder(run_dir).read_config()["options"] | given
        with logging_redirect_tqdm():
            result = train(run_dir, **options, resume=resume, progress=progress)
    except (ValueError, ImportError, FileExistsError, FileNotFoundError, FloatingPointError) as error:
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
    """Write the averaged network of the run in RUN_DIR to OUT_DIR, to sample from or to share."""
    try:
        click.echo(export_checkpoint(run_dir, out_dir, getattr(torch, dtype)))
    except (ValueError, FileNotFoundError) as error:
        raise click.ClickException(str(error)) from error
