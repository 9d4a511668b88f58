"""`ddpm-fast push`."""

from __future__ import annotations

from pathlib import Path

import click

import ddpm_fast

from ..errors import renaming
from .console import Command
from .options import PathOption


@click.command("push", cls=Command)
@click.argument("model", type=PathOption(exists=True, file_okay=False, path_type=Path))
@click.argument("name")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--license", help="Name this license in the card, such as mit.  [default: none]")
@click.option(
    "--evaluation",
    type=PathOption(exists=True, dir_okay=False, path_type=Path),
    help="Show the figures of this JSON file of `evaluate` in the card.  [default: none]",
)
@click.option("--device", help="Draw the card's picture on cpu, cuda, cuda:1, ...  [default: a GPU if there is one]")
def push_command(
    *, model: Path, name: str, private: bool, license: str | None, evaluation: Path | None, device: str | None
) -> None:
    """Upload a model to the Hugging Face hub.

    MODEL is a training run or a model's folder, and NAME is owner/name. The repository gets a card with a picture, the options
    of the training, and three lines to draw.
    """
    from ..checks import computing_device

    with renaming({"path": "model"}):
        address = ddpm_fast.push_to_hub(
            model, name, device=computing_device(device), private=private, license=license, evaluation=evaluation
        )
    click.echo(f"{address}: draw from it with ddpm-fast sample --model {name}")
