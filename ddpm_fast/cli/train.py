"""`ddpm-fast train` and `ddpm-fast export`."""

from __future__ import annotations

import inspect
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..atomic import remove_leftovers
from ..training import train
from .console import Stopped
from .options import Command, PathOption, model_folder, numbers, refusing


def argument_texts(function: Callable[..., Any]) -> dict[str, str]:
    """Return what the Args section of a function's docstring says of each argument."""
    section = re.search(r"^Args:\n(.*?)\n\n", inspect.getdoc(function) or "", re.DOTALL | re.MULTILINE)
    entries = re.split(r"^    (\w+): ", section[1] if section else "", flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in zip(entries[1::2], entries[2::2], strict=True)}


_TRAIN_TEXTS = argument_texts(train)


def _train_option(declaration: str, **settings: Any) -> Callable[[Command], Command]:
    """Declare an option of `train`, with the text of the function's docstring and the default of its signature."""
    name = declaration.split("/")[0].removeprefix("--").replace("-", "_")
    default = inspect.signature(train).parameters[name].default
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
        settings |= {"callback": numbers, "metavar": "N,N,..."}
    shown = default is not None and default is not False
    return click.option(declaration, help=_TRAIN_TEXTS.get(name), default=default, **({"show_default": shown} | settings))


@click.command("train")
@click.argument("run_dir", type=PathOption(file_okay=False, path_type=Path))
@_train_option("--resume", is_flag=True)
@_train_option("--auto-resume", is_flag=True)
@_train_option("--data")
@_train_option("--data-dir", type=PathOption())
@_train_option("--image-size", type=int)
@_train_option("--data-memory", metavar="SIZE")
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
@_train_option("--init", type=PathOption(), callback=model_folder)
@_train_option("--num-timesteps")
@_train_option("--schedule", type=click.Choice(["linear", "scaled_linear", "cosine", "sigmoid"]))
@_train_option("--prediction", type=click.Choice(["epsilon", "sample", "v_prediction"]))
@_train_option(
    "--loss-weight", type=click.Choice(["min-snr"]), callback=lambda ctx, option, value: value and value.replace("-", "_")
)
@_train_option("--steps")
@_train_option("--batch-size")
@_train_option("--micro-batch-size", type=int)
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
@_train_option("--sample-steps", type=int)
@_train_option("--checkpoint-every")
@_train_option("--checkpoint-minutes")
@_train_option("--keep")
@_train_option("--tensorboard/--no-tensorboard")
@_train_option("--max-minutes", type=float)
@_train_option("--data-check", type=click.Choice(["sample", "exact", "off"]))
@_train_option("--lock/--no-lock")
@_train_option("--progress/--no-progress")
@click.pass_context
def train_command(
    ctx: click.Context, /, run_dir: Path, resume: bool, auto_resume: bool, progress: bool, **options: Any
) -> None:
    """Train a network on images. RUN_DIR receives checkpoints, logs and samples.

    Stop with Ctrl-C, which saves a checkpoint. Continue exactly with --resume.
    """
    from ..distributed import FirstFailed, ProcessLost, ranks
    from ..training.run_folder import RunFolder, check_by_options

    try:
        with refusing():
            run = RunFolder(run_dir)
            if resume or (auto_resume and run.config_file.is_file()):  # the run's own options, except those given now
                given = {name: options[name] for name in options if _is_given(ctx, name)}
                stored = run.read_config()["options"]
                check_by_options(run.path, stored)
                options |= stored | given
            result = train(run_dir, **options, resume=resume, auto_resume=auto_resume, progress=progress)
    except FirstFailed:
        ctx.exit(1)
    except (FloatingPointError, ProcessLost) as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:  # before the first step, or for the second time
        checkpoint = RunFolder(run_dir).latest_checkpoint()
        raise Stopped(f"Stopped by Ctrl-C. The last checkpoint of {run_dir}: {checkpoint or 'none'}.") from None
    if result.stopped_by in ("SIGINT", "SIGTERM", "SIGHUP"):
        ctx.exit(128 + signal.Signals[result.stopped_by])  # as a shell reports a process that the signal ended
    if result.stopped_by is None and ranks("train", os.environ)[0] == 0:
        click.echo(f"{run_dir}: {result.step} steps done. Sample from it with: ddpm-fast sample --model {run_dir}")


def _is_given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) not in (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)


@click.command("export")
@click.argument("run_dir", type=PathOption(exists=True, file_okay=False, path_type=Path))
@click.argument("out_dir", type=PathOption(file_okay=False, path_type=Path))
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

    from ..training.export import export_checkpoint

    for folder in (out_dir, out_dir / "unet"):
        remove_leftovers(folder)
    try:
        with refusing():
            folder = export_checkpoint(run_dir, out_dir, getattr(torch, dtype))
    except KeyboardInterrupt:
        raise Stopped(f"Stopped by Ctrl-C. {out_dir} may be incomplete.") from None
    click.get_current_context().obj.append(folder)
    size = sum(file.stat().st_size for file in (folder / "unet").glob("*.safetensors"))
    click.echo(f"{folder}: {size / 1e6:.1f} MB of {dtype} weights. Sample from it with: ddpm-fast sample --model {folder}")
