"""Errors about arguments. They carry their parts, so that a function or command can word them by its own names."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from inspect import currentframe
from types import FunctionType
from typing import Any, Final, TypeVar, cast

E = TypeVar("E", bound="ArgumentError")
T = TypeVar("T")
Function = TypeVar("Function", bound=Callable[..., Any])

_PACKAGE: Final = f"{__package__}."


class ArgumentError(Exception):
    """An argument that is not as expected.

    Args:
        name: Name of the argument, or "" for a condition on several.
        expected: What was expected of it, such as "to be a positive integer".
        got: What came instead, then how to mend it if that is not obvious. Or the error that says so.
        file: The file that holds the value, if it was read from one.

    Attributes:
        caller: Name of the public function that the user called, which `public` sets. Until then "".
        got: As text. `name`, `expected` and `file` are as given.
    """

    def __init__(self, name: str, expected: str, got: object, file: str | None = None) -> None:
        # No call of super(): torch.compile cannot trace it, and OSError's takes the parts for an errno and its text.
        self.caller = ""
        self.name = name
        self.expected = expected
        self.got = str(got)
        self.file = file
        self._quotes = isinstance(got, BaseException)
        self.args = (name, expected, self.got, file)  # `got` itself may be large

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), self.args, vars(self)

    def __str__(self) -> str:
        who = f"{self.caller}: " if self.caller else ""
        what = " ".join(filter(None, ("expected", self.name, self.expected)))
        where = "" if self.file is None else f", in {self.file!r}"
        return f"{who}{what}, got{':' if self._quotes else ''} {self.got}{where}"

    def renamed(self: E, **parts: str) -> E:
        """Return the same error with other parts."""
        other = copy.copy(self)
        vars(other).update(parts)
        other.args = (other.name, other.expected, other.got, other.file)
        return other.with_traceback(self.__traceback__)


class InvalidValue(ArgumentError, ValueError):
    """A wrong value of an argument."""


class InvalidType(ArgumentError, TypeError):
    """A wrong type of an argument."""


class UnusablePath(ArgumentError, OSError):
    """A path that cannot be read or written as the call asks for."""


class MissingPath(UnusablePath, FileNotFoundError):
    """A path at which there is nothing of the kind."""


@contextmanager
def renaming(names: Mapping[str, str]) -> Iterator[None]:
    """Raise the body's argument errors with the names that the function around it has for the body's arguments."""
    try:
        yield
    except ArgumentError as error:
        raise error.renamed(name=names.get(error.name, error.name)) from error.__cause__


def public(name: str = "", *, traced: bool = False) -> Callable[[Function], Function]:
    """Return a decorator of a public function, which its argument errors then name.

    They name the function that the user's own code called, not one that the package calls in turn. So an error in a user's
    callback names what the callback called.

    Args:
        name: What errors call the function. By default its name after its class's, and for `__init__` and the like the class's.
        traced: torch.compile traces the function. A tracer sees no callers, so errors name it whoever called it.
    """

    def decorate(function: Function) -> Function:
        called = name or re.sub(r"\.__\w+__$", "", function.__qualname__)

        @wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except ArgumentError as error:
                if not error.caller and (traced or _is_called_by_user()):
                    error.caller = called
                raise

        return cast("Function", wrapped)

    return decorate


def _is_called_by_user() -> bool:
    """Return whether code outside of the package called the function that calls this one."""
    frame = currentframe()
    frame = frame and frame.f_back and frame.f_back.f_back
    while frame is not None and frame.f_globals.get("__name__") in ("functools", "dataclasses", "contextlib"):
        frame = frame.f_back
    return frame is None or not str(frame.f_globals.get("__name__")).startswith(_PACKAGE)


def public_methods(kind: type[T]) -> type[T]:
    """Make the constructor and the public methods of a class `public`, but for those that a decorator has wrapped."""
    for name, member in [*vars(kind).items()]:
        function = member.__func__ if isinstance(member, classmethod) else member
        named = not name.startswith("_") or name in ("__init__", "__call__", "__getitem__")
        if named and isinstance(function, FunctionType) and not hasattr(function, "__wrapped__"):
            wrapped = public()(function)
            setattr(kind, name, classmethod(wrapped) if isinstance(member, classmethod) else wrapped)
    return kind


def suggested(name: str, known: Iterable[str]) -> str:
    """Return an unknown name for an error, with the known one that is like it, if there is one."""
    close = difflib.get_close_matches(name, known, 1)
    return f"{name!r}; did you mean {close[0]!r}?" if close else repr(name)


def expect(holds: object, name: str, expected: str, got: object, file: str | None = None) -> None:
    """Raise an `InvalidValue` with these parts unless `holds` is true."""
    if not holds:
        raise InvalidValue(name, expected, got, file)
