"""Options that commands share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click

from ..errors import ArgumentError, renaming
from ..forms import Form, Numbers, Ranges, Size
from ..options import Declared, options_of
from ..predictions import Variance
from ..samplers import PlanOptions
from ..sampling.options import DrawOptions

if TYPE_CHECKING:
    import torch

    from ..pretrained import Pretrained

Function = TypeVar("Function", bound=Callable[..., Any])

VARIANCES = get_args(Variance)
METAVARS: dict[type[Form], str] = {Size: "WxH", Numbers: "N,N,..."}
# Settings of an option for ranges: a pair of numbers, repeated for each channel.
RANGE: dict[str, Any] = {
    "nargs": 2,
    "type": float,
    "multiple": True,
    "metavar": "LOW HIGH",
    "callback": lambda ctx, option, value: value or None,
}


def reading(form: type[Form]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """Return a callback of an option whose text a `Form` reads."""

    def read(ctx: click.Context, option: click.Parameter, value: Any) -> Any:
        try:
            return None if value is None else form.parse("", "", value)
        except ArgumentError as error:
            raise click.BadParameter(f"expected {error.expected.removeprefix('to be ')}, got {error.got}.") from None

    return read


class PathOption(click.Path):
    """A type of option: a path. An empty one, such as that of an unset variable, would be the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path, or fail."""
        if value == "":
            self.fail("expected a path, got an empty text.", param, ctx)
        try:
            return super().convert(value, param, ctx)
        except ValueError as error:  # characters that no path has
            self.fail(f"{value!r} is no path: {error}", param, ctx)


class DeclaredOption(click.Option):
    """An option of a command that is made from its declaration.

    Attributes:
        group: The heading under which help shows it.
    """

    group: str


def flag(declared: Declared, *names: str, **settings: Any) -> DeclaredOption:
    """Return a declared option as one of a command. Only types are checked here, ranges where the options are used.

    Args:
        declared: The declaration.
        *names: Its flags. None: that of its name.
        **settings: Settings of the option that replace the declaration's, or that it lacks.
    """
    name, _, default, option = declared
    kinds, declarations = declared.kinds, [*(names or ("--" + name.replace("_", "-"),)), name]
    made: dict[str, Any] = {}
    if declared.choices:
        made["type"] = click.Choice(declared.choices)
    elif bool in kinds:
        declarations[0] += f"/--no{declarations[0][1:]}"
    elif option.form is Ranges:
        made |= RANGE
    elif option.form is not None:
        default = ",".join(map(str, default)) if isinstance(default, tuple) else default
        made |= {"callback": reading(option.form), "metavar": METAVARS.get(option.form, "TEXT")}
    elif os.PathLike[str] in kinds:
        made["type"] = PathOption()
    else:
        made["type"] = str if str in kinds else next((each for each in (int, float) if each in kinds), None)
    shown = default is not None and default is not False
    made = {"default": default, "show_default": shown, "help": option.help} | made | settings
    result = DeclaredOption(declarations, **made)
    result.group = option.group
    return result


def adding(options: list[click.Option]) -> Callable[[Function], Function]:
    """Return a decorator that adds options to a command, after the options of the decorators below."""

    def add(command: Function) -> Function:
        known: list[click.Parameter] = command.__dict__.setdefault("__click_params__", [])
        known.extend(reversed(options))
        return command

    return add


_DRAWING = {each.name: each for each in options_of(DrawOptions)}


def plan_options(**defaults: Any) -> Callable[[Function], Function]:
    """Return a decorator that adds the options that choose a plan. The default is the plan in the model's folder."""
    options: list[click.Option] = [flag(each) for each in options_of(PlanOptions)]
    for each in options:
        if each.name in defaults:
            each.default, each.show_default = defaults[each.name], True
            each.help = (each.help or "").partition(" Default:")[0]
    return adding(options)


def class_options(default: str) -> Callable[[Function], Function]:
    """Return a decorator that adds the options that choose the classes and the guidance. Help names the default."""
    classes = f"Draw these classes in turn: names or numbers with commas, or none for no label.  [default: {default}]"
    return adding([click.Option(["--classes"], help=classes), flag(_DRAWING["guidance_scale"], "--guidance")])


def model_options(*, dtype: str | None = None, named: bool = True) -> Callable[[Function], Function]:
    """Return a decorator that adds the options that say how a model runs, in which dtype by default and, if `named`, which."""
    usual = "" if dtype else "  [default: float32 on a CPU; bfloat16 or float16 on a GPU]"
    dtypes = click.Choice(["float32", "bfloat16", "float16", "float64"])
    return adding(
        [
            click.Option(
                ["--model"],
                type=PathOption(path_type=Path),
                help="Load a model: its folder, a training run, or a name on the Hugging Face hub.  [default: built-in]",
            ),
            flag(_DRAWING["seed"], type=int),
            flag(_DRAWING["batch_size"], type=click.IntRange(1), default=64, show_default=True),
            click.Option(
                ["--dtype"], type=dtypes, default=dtype, show_default=True, help=f"Run the network in this dtype.{usual}"
            ),
            click.Option(["--device"], help="Run on cpu, cuda, cuda:1, ...  [default: a GPU if there is one]"),
            click.Option(["--quiet"], is_flag=True, help="Print errors only."),
        ][not named :]
    )


def json_option(command: Function) -> Function:
    """Add the option of a file for figures."""
    file = PathOption(dir_okay=False, path_type=Path)
    return adding([click.Option(["--json"], type=file, help="Write the figures to this JSON file.  [default: none]")])(command)


def load_model(command: str, options: dict[str, Any]) -> Pretrained:
    """Load the model that the options of `model_options` name, on the GPU of this process or the device that they name."""
    from ..checks import computing_device
    from ..distributed import own_device
    from ..pretrained import BUILTIN, load_folder

    device = own_device(computing_device(command, options["device"]))
    with renaming(command, {"path": "model"}):
        return load_folder(options["model"] or BUILTIN, device, dtype_of(options))


def dtype_of(options: dict[str, Any]) -> torch.dtype | None:
    """Return the dtype that --dtype names."""
    import torch

    found: torch.dtype | None = None if options["dtype"] is None else getattr(torch, options["dtype"])
    return found


def chosen_plan(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a command that choose a plan."""
    return {name: options[name] for name in PlanOptions.__annotations__ if name in options}


def drawing(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a command that a drawing function takes as arguments."""
    return {"batch_size": options["batch_size"], "seed": options["seed"], "progress": not options["quiet"]} | (
        {"guidance_scale": options["guidance_scale"]} if "guidance_scale" in options else {}
    )
