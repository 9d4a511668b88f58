"""Turns of threads that use the same network or Sampler."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final
from weakref import WeakSet

_turns: Final[WeakSet[Turns]] = WeakSet()


class Turns:
    """A lock under which threads take turns. It is free in a forked child, which lacks the thread that held it.

    Args:
        name: What is locked, for the error message.

    Raises:
        RuntimeError: A thread enters that is inside.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._free()
        _turns.add(self)

    def _free(self) -> None:
        self._lock, self._owner = threading.Lock(), 0  # 0 is no thread's

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Wait for the lock and hold it."""
        if self._owner == threading.get_ident():
            raise RuntimeError(
                f"{self._name}: expected a call after the one in progress, got one from its callback: "
                "a callback must not call its own Sampler"
            )
        with self._lock:
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = 0


def _after_fork() -> None:
    """Free the locks in a forked child, such as a worker of a DataLoader, which lacks the threads that held them."""
    for turns in _turns:
        if turns._owner != threading.get_ident():
            turns._free()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
