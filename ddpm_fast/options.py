"""How an option is declared: once, with its type, default, range, group and help.

Options of a training run are fields of a struct. Options of a call are keys of a `TypedDict`, so that editors and type checkers
know a function's keyword arguments. The command line, its help, the tables in the docs, signatures and config.json follow.

PyTorch is imported when options are checked, so help texts come at once.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, wraps
from inspect import Parameter, Signature
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from .errors import InvalidType, public, public_methods, suggested
from .forms import Form

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Option:
    """A declaration of an option, without its name, type and default.

    Attributes:
        group: The heading under which help shows it.
        help: Its effect, in one or two sentences that begin with a verb.
        low: The least value.
        high: The largest value.
        above: An excluded lower bound.
        below: An excluded upper bound.
        changeable: A resumed run may change it: it decides how long, where and with what records, not what is trained.
        local: Processes of one run may differ in it.
        recorded: config.json has it. Others concern one call.
        more: What concerns Python alone, for docstrings.
        default: The default of a key of a `TypedDict`. Fields of structs have their own.
        choices: Its values, if a table lists them. A Literal type lists them itself.
        finite: Both infinities are excluded.
        form: How its value is read, if its type does not say it. Bounds and choices are then those of each item.
    """

    group: str
    help: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    changeable: bool = False
    local: bool = False
    recorded: bool = True
    more: str = ""
    default: Any = None
    choices: tuple[str, ...] = ()
    finite: bool = True
    form: type[Form] | None = None


def within(
    low: float | None = None,
    high: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
    finite: bool = False,
) -> Option:
    """Return the range of an argument, which its type declares.

    `checked` reads it from a signature such as `eta: Annotated[float, within(low=0)] = 0.0`.
    """
    return Option("", "", low, high, above, below, finite=finite)


class Declared(NamedTuple):
    """A field of a struct of options, or a key of a `TypedDict`.

    Attributes:
        name: Its name.
        kind: Its type.
        default: Its default.
        option: The `Option` in its annotation.
    """

    name: str
    kind: Any
    default: Any
    option: Option

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The parts of its type: a union's members, or itself."""
        return get_args(self.kind) if isinstance(self.kind, UnionType) or get_origin(self.kind) is Union else (self.kind,)

    @property
    def choices(self) -> list[Any]:
        """Its values, or those of its items, if they are listed, or none."""
        parts = [part for kind in self.kinds for part in (kind, *get_args(kind)) if get_origin(part) is Literal]
        return [choice for part in parts for choice in get_args(part)] or [*self.option.choices]

    @property
    def is_checked(self) -> bool:
        """True if its range, choices or class are declared. Python, or the code that uses them, checks all other options."""
        kinds = [kind for kind in self.kinds if kind is not NoneType]
        listed = bool(self.option.choices) or all(get_origin(kind) is Literal for kind in kinds)
        return listed or (len(kinds) == 1 and (kinds[0] in (int, float) or _is_class(kinds[0])))


@dataclass(frozen=True)
class Options:
    """A struct of options, which are checked when it is made.

    Raises:
        TypeError: An option has another type than is declared.
        ValueError: An option is out of range.
    """

    def __post_init__(self) -> None:
        for declared in options_of(type(self)):
            value = checked_option(declared, getattr(self, declared.name))
            object.__setattr__(self, declared.name, value)

    @classmethod
    def from_values(cls: type[AnyOptions], values: Mapping[str, Any]) -> AnyOptions:
        """Return the struct with those of the values that it has."""
        return cls(**{option.name: values[option.name] for option in options_of(cls) if option.name in values})

    def changed(self: AnyOptions, values: Mapping[str, Any]) -> AnyOptions:
        """Return the struct with those of the values that it has in place of its own."""
        return replace(self, **{option.name: values[option.name] for option in options_of(type(self)) if option.name in values})

    def recorded(self) -> dict[str, Any]:
        """Return the options that config.json has, as JSON gives them back."""
        from .checks import as_json

        return {each.name: as_json(getattr(self, each.name)) for each in options_of(type(self)) if each.option.recorded}


AnyOptions = TypeVar("AnyOptions", bound=Options)
Function = TypeVar("Function", bound=Callable[..., Any])


def _read_options(struct: type) -> tuple[Declared, ...]:
    declared = ((name, *get_args(annotation)) for name, annotation in get_type_hints(struct, include_extras=True).items())
    defaults = {} if is_typeddict(struct) else vars(struct)
    return tuple(Declared(name, kind, defaults.get(name, option.default), option) for name, kind, option in declared)


options_of: Callable[[type], tuple[Declared, ...]] = cache(_read_options)
"""Return the options of a struct or a `TypedDict`. Reading them takes as long as a small network's step."""


def _parameters(struct: type) -> list[Parameter]:
    return [
        Parameter(each.name, Parameter.KEYWORD_ONLY, default=each.default, annotation=each.kind) for each in options_of(struct)
    ]


def document(struct: type) -> None:
    """Add the help of the options to the docstring of their struct."""
    texts = [f"    {each.name}: {each.option.help} {each.option.more}".rstrip() for each in options_of(struct)]
    struct.__doc__ = "\n".join([struct.__doc__ or "", "", "Attributes:", *texts])


def documented(struct: type[AnyOptions]) -> type[AnyOptions]:
    """Add the help of the options to the docstring of their struct, and leave it out of the signature."""
    document(struct)
    struct.__signature__ = Signature(_parameters(struct))  # type: ignore[attr-defined]
    return public_methods(struct)


def taking(struct: type) -> Callable[[Function], Function]:
    """Return a decorator for a function with `**options: Unpack[struct]`, whose signature then shows each option by name."""

    def decorate(function: Function) -> Function:
        own = inspect.signature(function)
        named = [each for each in own.parameters.values() if each.kind != Parameter.VAR_KEYWORD]
        function.__signature__ = own.replace(parameters=[*named, *_parameters(struct)])  # type: ignore[attr-defined]
        return function

    return decorate


def _is_class(kind: Any) -> bool:
    """Return whether a type is a class of this package or of PyTorch, whose objects people mix up. Tensors have own checks."""
    return isinstance(kind, type) and kind.__module__.startswith(("ddpm_fast", "torch")) and kind.__name__ != "Tensor"


def checked(name: str = "") -> Callable[[Function], Function]:
    """Return a decorator of a `public` function that also checks the arguments whose annotations declare a range or choices.

    It also checks those of a class of this package or of PyTorch.

    Args:
        name: See `public`.
    """

    def decorate(function: Function) -> Function:
        signature, declared, kinds = inspect.signature(function), [], {}
        # Without the type of the result, which may be a class that is not made yet.
        arguments = {each: kind for each, kind in function.__annotations__.items() if each != "return"}
        struct = type("", (), {"__annotations__": arguments, "__module__": function.__module__})
        for argument, hint in get_type_hints(struct, include_extras=True).items():
            kind, option = get_args(hint) if get_origin(hint) is Annotated else (hint, within())
            each, kinds[argument] = Declared(argument, kind, None, option), kind
            if kind is not hint or (each.is_checked and not {int, float} & {*each.kinds}):  # a number has a range elsewhere
                declared.append(each)
        parameters = {
            each: parameter.replace(annotation=kinds.get(each, parameter.annotation))
            for each, parameter in signature.parameters.items()
        }

        @wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            try:
                given = signature.bind(*args, **kwargs).arguments
            except TypeError:  # the call itself says it better
                return function(*args, **kwargs)
            for each in declared:
                if each.name in given:
                    checked_option(each, given[each.name])
            return function(*args, **kwargs)

        wrapped.__signature__ = signature.replace(parameters=[*parameters.values()])  # type: ignore[attr-defined]
        return public(name)(cast("Function", wrapped))

    return decorate


def checked_options(struct: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options of a call: those that are given, checked as far as they are declared, and the defaults of the others.

    Raises:
        TypeError: There is no such option, or it has another type.
        ValueError: An option is out of range.
    """
    declared = {each.name: each for each in options_of(struct)}
    for name in given:
        if name not in declared:
            raise InvalidType("", f"arguments among {', '.join(declared)}", suggested(name, declared))
    return {
        name: checked_option(each, given[name]) if name in given and each.is_checked else given.get(name, each.default)
        for name, each in declared.items()
    }


def checked_option(declared: Declared, value: Any) -> Any:
    """Return an option in its plain form: a path as text, numbers as a tuple. Raise unless it is as declared."""
    from torch import dtype

    from .checks import check_choice, check_dtype, check_int, check_number, check_path, check_type

    name, _, _, option = declared
    kinds, choices = declared.kinds, declared.choices
    optional = NoneType in kinds
    if value is None and optional:
        return None
    low, high = cast("tuple[int | None, int | None]", (option.low, option.high))
    if option.form is not None:
        value = option.form.parse(name, value)
        for each in value if isinstance(value, tuple) else (value,):
            if choices:
                check_choice(name, each, choices)
            elif low is not None:
                check_int(name, each, low, high)
    elif choices:
        check_choice(name, value, [None, *choices] if optional else choices)
    elif int in kinds:
        check_int(name, value, low, high, optional=optional)
    elif float in kinds:
        bounds = {"low": low, "high": high, "above": option.above, "below": option.below}
        check_number(name, value, **bounds, finite=option.finite, optional=optional)
    elif os.PathLike[str] in kinds:
        check_path(name, value)
        return os.fspath(value)
    elif dtype in kinds:
        check_dtype(name, value, optional=optional)
    else:
        check_type(name, value, *(kind for kind in kinds if kind is not NoneType), optional=optional)
    return value
