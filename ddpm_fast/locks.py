"""Locks of files and folders. The operating system releases them when the process ends, however that happens."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_held: Final[set[int]] = set()  # descriptors


@contextmanager
def locked(descriptor: int) -> Iterator[None]:
    """Hold the lock of an open file or folder.

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


def _close_held() -> None:
    """Close the locks in a child that was forked, such as a worker of a DataLoader. It may outlive this process."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_held)
