"""The command line: `ddpm-fast COMMAND` or `python -m ddpm_fast COMMAND`."""

from __future__ import annotations

import json
import logging
import os
import sys

import click

from ..version import __version__
from .console import Commands
from .edit import edit_command
from .evaluate import evaluate_command
from .fit import fit_command
from .push import push_command
from .sample import sample_command
from .train import export_command, train_command

# Commands import what they need when they run: help texts need not wait for PyTorch.

# The OpenMP runtimes' variables that say how idle threads wait.
_WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="ddpm-fast")
def main() -> None:
    """Train, sample, edit and evaluate denoising diffusion probabilistic models."""
    # Idle threads sleep instead of spinning, or other programs slow this one down several times. The OpenMP runtime reads
    # the variable when PyTorch is loaded. If torch is loaded already, another program uses this as a library, so leave its
    # environment alone.
    if "torch" not in sys.modules and not any(name in os.environ for name in _WAIT_VARIABLES):
        os.environ["OMP_WAIT_POLICY"] = "passive"
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    for name in ("httpx", "httpx2"):  # huggingface_hub's, which log each request
        logging.getLogger(name).setLevel(logging.WARNING)


@main.command("info")
@click.option("--json", "as_json", is_flag=True, help="Print what programs can use of it as JSON.")
def info_command(as_json: bool) -> None:
    """Show what is installed and what runs here.

    List the backends of each op and device, with reasons for those that cannot run.
    """
    from ..info import facts, info

    click.echo(json.dumps(facts(), indent=2) if as_json else info())


for _command in (train_command, export_command, sample_command, edit_command, evaluate_command, fit_command, push_command):
    main.add_command(_command)
