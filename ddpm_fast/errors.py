"""Errors about arguments. They carry their parts, so that another caller can word them by its own names."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
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
        self.caller, self.name, self.expected, self.got, self.file = caller, name, expected, str(got), file
        self._quotes = isinstance(got, BaseException)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.caller, self.name, self.expected, self.got, self.file), vars(self)

    def __str__(self) -> str:
        who = f"{self.caller}: " if self.caller else ""
        what = " ".join(filter(None, ("expected", self.name, self.expected)))
        where = "" if self.file is None else f", in {self.file!r}"
        return f"{who}{what}, got{':' if self._quotes else ''} {self.got}{where}"

    def renamed(self: E, **parts: str) -> E:
        """Return the same error with other parts."""
        other = copy.copy(self)
        vars(other).update(parts)
        return other


class InvalidValue(ArgumentError, ValueError):
    """A wrong value of an argument."""


class InvalidType(ArgumentError, TypeError):
    """A wrong type of an argument."""


class UnusablePath(ArgumentError, OSError):
    """A path that cannot be read or written as the call asks for."""


@contextmanager
def renaming(caller: str, names: Mapping[str, str] | None = None) -> Iterator[None]:
    """Raise the body's errors of arguments as `caller`'s, with its `names` of arguments by those that the body has."""
    try:
        yield
    except ArgumentError as error:
        name = error.name if names is None else names.get(error.name, error.name)
        raise error.renamed(caller=caller, name=name) from error.__cause__


def expect(holds: object, caller: str, name: str, expected: str, got: object) -> None:
    """Raise an `InvalidValue` with these parts unless `holds` is true."""
    if not holds:
        raise InvalidValue(caller, name, expected, got)
