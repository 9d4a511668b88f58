"""Errors of arguments, compared part by part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest

from ddpm_fast.errors import ArgumentError

E = TypeVar("E", bound=ArgumentError)


def by(caller: str, error: E) -> E:
    """Return an error as a public function raises it."""
    error.caller = caller
    return error


@contextmanager
def refused(wanted: ArgumentError) -> Iterator[None]:
    """Expect an error of the same kind and with the same parts."""
    with pytest.raises(ArgumentError) as caught:
        yield
    assert type(caught.value) is type(wanted)
    assert vars(caught.value) == vars(wanted)
