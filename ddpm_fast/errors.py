"""Errors about arguments. They carry their parts, so that another caller can word them by its own names."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

E = TypeVar("E", bound="ArgumentError")


class ArgumentError(Exception):
    """An argument that is not as expected.

    Args:
        caller: Name of the function that was called, or "".
        name: Name of the argument, or "" for a condition on several.
        expected: What was expected of it, such as "to be a positive integer".
        got: What came instead, then how to mend it if that is not obvious. Or the error that says so.
        file: The file that holds the value, if it was read from one.

    Attributes:
        caller: As given. So are `name`, `expected` and `file`.
        got: As text.
    """

    def __init__(self, caller: str, name: str, expected: str, got: object, file: str | None = None) -> None:
        # No call of super(): torch.compile cannot trace it, and OSError's takes the parts for an errno and its text.
        self.caller = caller
        self.name = name
        self.expected = expected
        self.got = str(got)
        self.file = file
        self._quotes = isinstance(got, BaseException)
        self.args = (caller, name, expected, self.got, file)  # `got` itself may be large

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
        other.args = (other.caller, other.name, other.expected, other.got, other.file)
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
def renaming(caller: str, names: Mapping[str, str] | None = None) -> Iterator[None]:
    """Raise the body's argument errors as those of `caller`. `names` maps the body's argument names to the caller's."""
    try:
        yield
    except ArgumentError as error:
        name = error.name if names is None else names.get(error.name, error.name)
        raise error.renamed(caller=caller, name=name) from error.__cause__


def suggested(name: str, known: Iterable[str]) -> str:
    """Return an unknown name for an error, with the known one that is like it, if there is one."""
    close = difflib.get_close_matches(name, known, 1)
    return f"{name!r}; did you mean {close[0]!r}?" if close else repr(name)


def expect(holds: object, caller: str, name: str, expected: str, got: object, file: str | None = None) -> None:
    """Raise an `InvalidValue` with these parts unless `holds` is true."""
    if not holds:
        raise InvalidValue(caller, name, expected, got, file)
