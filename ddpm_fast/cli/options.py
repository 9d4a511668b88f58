"""Options that commands share, and errors that name them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from ..errors import ArgumentError
from ..predictions import Variance
from ..resources import no_folder
from .console import Refused

Command = TypeVar("Command", bound=Callable[..., Any])

SAMPLING_DTYPE_HELP = "Run the network in this dtype.  [default: float32 on a CPU; bfloat16 or float16 on a GPU]"
VARIANCES = get_args(Variance)
# Settings of an option for ranges: a pair of numbers, repeated for each channel.
RANGE: dict[str, Any] = {
    "nargs": 2,
    "type": float,
    "multiple": True,
    "metavar": "LOW HIGH",
    "callback": lambda ctx, option, value: value or None,
}
# Options by the names that the package's functions have for them.
_ALIASES = {
    "num_samples": "num",
    "num_steps": "steps",
    "jump_num_sample": "jump_samples",
    "class_labels": "classes",
    "name": "data",
}


@contextmanager
def refusing() -> Iterator[None]:
    """Turn errors into refusals that name the command's options, and write log lines above progress bars."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    parameters = click.get_current_context().command.params
    names = {
        each.name: each.opts[0] if isinstance(each, click.Option) else each.name.upper() for each in parameters if each.name
    }
    names = {alias: names[name] for alias, name in _ALIASES.items() if name in names} | names
    try:
        with logging_redirect_tqdm():
            yield
    except ArgumentError as error:
        name = error.name if error.file else names.get(error.name, error.name)  # a file has its own names
        raise Refused(str(error.renamed(name=name))) from error
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise Refused(str(error)) from error
    except Exception as error:
        import torch  # the command has loaded it

        if not isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        hint = f"; a smaller {names['batch_size']} needs less" if "batch_size" in names else ""
        raise Refused(f"out of memory{hint}: {str(error) or 'no reason given'}") from error


def size(ctx: click.Context, option: click.Parameter, value: str | None) -> int | tuple[int, int] | None:
    """Parse a width and height such as 48x32, or one number for both. Return (height, width), or the number."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", value.lower(), re.ASCII)
    if match is None:
        raise click.BadParameter(f"{value!r} is not a width and height such as 64 or 48x32")
    width, height = match.groups()
    return int(width) if height is None else (int(height), int(width))


def model_folder(ctx: click.Context, option: click.Parameter, value: Any) -> Any:
    """Refuse a model's folder that does not exist."""
    if value is None or os.path.isdir(value):
        return value
    raise click.BadParameter(f"expected a folder, got {no_folder(value)}")


def numbers(ctx: click.Context, option: click.Parameter, value: str | None) -> list[int] | None:
    """Parse whole numbers separated by commas, or "none"."""
    if value is None:
        return None
    try:
        return [] if value == "none" else [int(number) for number in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of whole numbers separated by commas") from None


class PathOption(click.Path):
    """A type of option: a path. An empty one, such as that of an unset variable, would be the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path, or fail."""
        if value == "":
            self.fail("expected a path, got an empty text.", param, ctx)
        return super().convert(value, param, ctx)


class Finite(click.FloatRange):
    """A type of option: a number in a range that is neither NaN nor infinite."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number, or fail."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


def adding(options: list[Callable[[Command], Command]]) -> Callable[[Command], Command]:
    """Return a decorator that adds options to a command, the first one first."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def model_options(dtype_help: str) -> Callable[[Command], Command]:
    """Return a decorator that adds the options that say which model runs, and how."""
    options = [
        click.option(
            "--model",
            type=PathOption(path_type=Path),
            callback=model_folder,
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
    return adding(options)
