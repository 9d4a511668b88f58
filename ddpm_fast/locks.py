"""Locks of files and folders, and of threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final
from weakref import WeakSet

_held: Final[set[int]] = set()  # descriptors
_turns: Final[WeakSet[Turns]] = WeakSet()


@contextmanager
def locked(descriptor: int) -> Iterator[None]:
    """Hold the lock of an open file or folder. The operating system releases it when the process ends.

    Args:
        descriptor: The file or folder. The caller closes it.

    Raises:
        BlockingIOError: Another process holds the lock.
        OSError: The file system or the operating system has no locks.
    """
    try:
        import fcntl
    except ImportError as error:
        raise OSError("the operating system has no flock") from error
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    _held.add(descriptor)
    try:
        yield
    finally:
        _held.discard(descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # also if a child that was just forked has not closed it yet


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
            raise RuntimeError(f"{self._name}: expected a call after the one in progress, got one from its callback")
        with self._lock:
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = 0


def _after_fork() -> None:
    """Release the locks in a child that was forked, such as a worker of a DataLoader.

    Files' locks are closed, as the child may outlive this process. Locks of threads that the child lacks become free.
    """
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()
    for turns in _turns:
        if turns._owner != threading.get_ident():
            turns._free()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
