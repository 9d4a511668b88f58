"""`ddpm-fast train` and `ddpm-fast export`."""

from __future__ import annotations

import logging
import os
import shlex
import signal
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

import ddpm_fast

from ..data.options import DataOptions
from ..files.writing import remove_leftovers
from ..options import options_of
from ..training.options import CHANGEABLE, STRUCTS, ModelOptions, TrainOptions
from .console import Command, Stopped
from .options import PathOption, flag, gathering

_EXAMPLE = """\b
Example:
  ddpm-fast train runs/mine --data path/to/images --image-size 64
  ddpm-fast train runs/mine --resume"""


NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "small": (
        "64x64 photographs become recognizable in about five minutes. Ten minutes of Fashion-MNIST, with decay and a shorter "
        "average, give its network a Frechet distance of 18, and diffusers' 45. --network base is larger, for a GPU",
        {
            "channels": (16, 32, 64, 128),  # the width at full resolution costs most
            "layers": 1,
            "attention": (),
            "scale_shift": True,
            "weak_shortcuts": True,
            "prediction": "v_prediction",
            "schedule": "cosine",
            "steps": 1500,
            "batch_size": 8,
            "lr": 1e-3,
            "warmup_steps": 100,
            "sample_every": 300,
        },
    ),
    "base": ("its 20,000 steps of 64 images take days on a CPU; --network small takes minutes", {}),
    "cifar10": (
        "the network and training of Ho et al. (2020) for CIFAR-10, without their flips",
        {
            "channels": (128, 256, 256, 256),
            "dropout": 0.1,
            "batch_size": 128,
            "steps": 800_000,
            "warmup_steps": 5000,
        },
    ),
}
"""Values of options that `--network` sets, and what the command says of them."""


class _Grouped(Command):
    """A command whose help shows its options under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options of each group."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                groups.setdefault(getattr(parameter, "group", "Help"), []).append(record)
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records)


def _settings(network: str, prediction: str) -> dict[str, Any]:
    """Return the options that a network sets. The prediction of a flow brings its own schedule."""
    kept = NETWORKS[network][1].items()
    return {name: value for name, value in kept if name != "schedule" or prediction != "flow"}


@click.command("train", cls=_Grouped, epilog=_EXAMPLE)
@click.argument("run_dir", type=PathOption(file_okay=False, path_type=Path))
@click.option(
    "--network",
    type=click.Choice([*NETWORKS]),
    help="Set the network and its training: small for a CPU, base, or cifar10 (Ho et al. 2020). Other options override it. "
    "The defaults below are those of base.  [default: small on a CPU without --init, else base]",
)
@click.pass_context
@gathering("data", DataOptions, [each.name for each in options_of(DataOptions)])
@gathering("model", ModelOptions, [each.name for each in options_of(ModelOptions)])
@gathering("training", TrainOptions, [each.name for each in options_of(TrainOptions)])
def train_command(
    ctx: click.Context,
    /,
    *,
    run_dir: Path,
    network: str | None,
    data: DataOptions,
    model: ModelOptions,
    training: TrainOptions,
) -> None:
    """Train a network on images. RUN_DIR receives checkpoints, logs and samples.

    Stop with Ctrl-C, which saves a checkpoint. Continue exactly with --resume.
    """
    from ..checks import computing_device
    from ..distributed import ranks
    from ..training.run import RunFolder
    from ..training.trainer import train_in

    folder, stored = RunFolder(run_dir), None
    try:
        is_first = ranks(os.environ)[0] == 0
        if training.resume or (training.auto_resume and folder.record.is_file()):
            stored = folder.read_config()
            values = dict(stored["options"])
            if network is not None:  # it must be the run's
                fixed = {name for _, settings in NETWORKS.values() for name in settings} - CHANGEABLE
                defaults = {each.name: each.default for struct in STRUCTS for each in options_of(struct)}
                values |= {name: (defaults | _settings(network, training.prediction))[name] for name in fixed}
        else:
            small = model.init is None and computing_device(training.device).type == "cpu"
            network = network or ("small" if small else "base")
            values = _settings(network, training.prediction)
            if is_first:
                logging.getLogger("ddpm_fast").info("--network %s: %s", network, NETWORKS[network][0])
        default = (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)  # options that are given now stay
        values = {name: value for name, value in values.items() if ctx.get_parameter_source(name) in default}
        data = data.changed(values)
        result = train_in(folder, training.changed(values), data, model.changed(values), stored)
    except KeyboardInterrupt:  # before the first step, or for the second time
        checkpoint = folder.checkpoints.newest()
        raise Stopped(f"Stopped by Ctrl-C. The last checkpoint of {run_dir}: {checkpoint or 'none'}.") from None
    if result.stopped_by in ("SIGINT", "SIGTERM", "SIGHUP"):
        ctx.exit(128 + signal.Signals[result.stopped_by])  # as a shell reports a process that the signal ended
    if result.stopped_by is None and is_first:
        more = " --condition path/to/images" if data.condition else ""
        quoted = shlex.quote(str(run_dir))
        click.echo(f"{run_dir}: trained to step {result.step}. Sample from it with: ddpm-fast sample --model {quoted}{more}")


train_command.params += [flag(declared) for struct in STRUCTS for declared in options_of(struct)]


@click.command("export", cls=Command)
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

    for folder in (out_dir, out_dir / "unet"):
        remove_leftovers(folder)
    try:
        folder = ddpm_fast.export_checkpoint(run_dir, out_dir, getattr(torch, dtype))
    except KeyboardInterrupt:
        raise Stopped(f"Stopped by Ctrl-C. {out_dir} may be incomplete.") from None
    click.get_current_context().obj.append(folder)
    size = sum(file.stat().st_size for file in (folder / "unet").glob("*.safetensors"))
    quoted = shlex.quote(str(folder))
    click.echo(f"{folder}: {size / 1e6:.1f} MB of {dtype} weights. Sample from it with: ddpm-fast sample --model {quoted}")
