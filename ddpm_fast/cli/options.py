"""Options that commands share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, TypeVar, cast, get_args

import click

from ..errors import ArgumentError, renaming
from ..forms import Form, Numbers, Ranges, Size
from ..options import Declared, Option, options_of
from ..predictions import Variance
from ..samplers import PlanOptions
from ..sampling.options import ClassLabels, DrawOptions, EditOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor

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
            return None if value is None else form.parse("", value)
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
    elif bool in kinds and not names:
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


def adding(options: Sequence[click.Option]) -> Callable[[Function], Function]:
    """Return a decorator that adds options to a command, after the options of the decorators below."""

    def add(command: Function) -> Function:
        known: list[click.Parameter] = command.__dict__.setdefault("__click_params__", [])
        known.extend(reversed(options))
        return command

    return add


_DRAWING = {each.name: each for each in options_of(DrawOptions)}
_run = partial(Option, "Running")


class Batches(TypedDict):
    """The options of a command that say how a network runs on many images."""

    batch_size: int
    progress: bool


@dataclass(frozen=True, kw_only=True)
class Running:
    """How a command runs a model."""

    model: Annotated[
        Path | None,
        _run("Load a model: its folder, a training run, or a name on the Hugging Face hub.  [default: built-in]"),
    ] = None
    seed: Annotated[int, _run(_DRAWING["seed"].option.help)] = 0
    batch_size: Annotated[int, _run(_DRAWING["batch_size"].option.help)] = 64
    dtype: Annotated[Literal["float32", "bfloat16", "float16", "float64"] | None, _run("Run the network in this dtype.")] = None
    device: Annotated[str | None, _run("Run on cpu, cuda, cuda:1, ...  [default: a GPU if there is one]")] = None
    quiet: Annotated[bool, _run("Print errors only.")] = False

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype that --dtype names."""
        import torch

        found: torch.dtype | None = None if self.dtype is None else getattr(torch, self.dtype)
        return found

    @property
    def batches(self) -> Batches:
        """The arguments of a function that runs the network on many images."""
        return {"batch_size": self.batch_size, "progress": not self.quiet}

    def drawing(
        self, class_labels: ClassLabels = None, guidance_scale: float | None = None, condition: Tensor | None = None
    ) -> EditOptions:
        """Return the arguments of a function that draws images or edits them."""
        return {
            **self.batches,
            "seed": self.seed,
            "class_labels": class_labels,
            "guidance_scale": guidance_scale,
            "condition": condition,
        }

    def record(self, loaded: Pretrained) -> dict[str, Any]:
        """Return the entries of a file of figures that say of which model they are, as `load` returned it, and how it ran."""
        return {
            "model": str(self.model or "built-in"),
            "weights": loaded.digest(),
            "device": str(next(loaded.model.parameters()).device),
            "dtype": self.dtype,
            "seed": self.seed,
            "batch_size": self.batch_size,
        }

    def load(self, dtype: torch.dtype | None = None) -> Pretrained:
        """Load the model in a dtype, float32 by default, on the GPU of this process or the device that --device names."""
        from ..checks import computing_device
        from ..distributed import own_device
        from ..pretrained import BUILTIN, load_folder

        device = own_device(computing_device(self.device))
        with renaming({"path": "model"}):
            return load_folder(self.model or BUILTIN, device, dtype)


def gathering(name: str, struct: Callable[..., Any], fields: Iterable[str]) -> Callable[[Function], Function]:
    """Return a decorator of a command that gets the options named `fields` as one argument, a struct of them."""

    def decorate(command: Function) -> Function:
        @wraps(command)
        def called(*args: Any, **values: Any) -> Any:
            given = {field: values.pop(field) for field in fields if field in values}
            return command(*args, **{name: struct(**given)}, **values)

        return cast("Function", called)

    return decorate


def plan_options(**defaults: Any) -> Callable[[Function], Function]:
    """Return a decorator that adds the options that choose a plan, which the command gets as `plan`.

    The default is the plan in the model's folder.
    """
    options: list[click.Option] = [flag(each) for each in options_of(PlanOptions)]
    for each in options:
        if each.name in defaults:
            each.default, each.show_default = defaults[each.name], True
            each.help = (each.help or "").partition(" Default:")[0]
    add, gather = adding(options), gathering("plan", PlanOptions, PlanOptions.__annotations__)
    return lambda command: add(gather(command))


def class_options(default: str) -> Callable[[Function], Function]:
    """Return a decorator that adds the options that choose the classes and the guidance. Help names the default."""
    classes = f"Draw these classes in turn: names or numbers with commas, or none for no label.  [default: {default}]"
    return adding([click.Option(["--classes", "class_labels"], help=classes), flag(_DRAWING["guidance_scale"], "--guidance")])


def model_options(*, dtype: str | None = None, named: bool = True) -> Callable[[Function], Function]:
    """Return a decorator that adds the options of `Running`, which the command gets as `running`.

    Args:
        dtype: The default of --dtype.
        named: Add --model. Otherwise the command has an argument or an option `model` already.
    """
    fields = {each.name: each for each in options_of(Running)}
    usual = "" if dtype else "  [default: float32 on a CPU; bfloat16 or float16 on a GPU]"
    options = [
        flag(fields["model"], type=PathOption(path_type=Path)),
        flag(fields["seed"]),
        flag(fields["batch_size"], type=click.IntRange(1)),
        flag(fields["dtype"], default=dtype, show_default=True, help=f"{fields['dtype'].option.help}{usual}"),
        flag(fields["device"]),
        flag(fields["quiet"], "--quiet", is_flag=True),
    ][not named :]
    add, gather = adding(options), gathering("running", Running, fields)
    return lambda command: add(gather(command))


def json_option(command: Function) -> Function:
    """Add the option of a file for figures."""
    file = PathOption(dir_okay=False, path_type=Path)
    return adding([click.Option(["--json"], type=file, help="Write the figures to this JSON file.  [default: none]")])(command)
