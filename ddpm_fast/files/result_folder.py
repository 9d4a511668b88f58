"""A folder of results: one process writes it at a time, and the same call continues it after a kill.

A record says which call the folder belongs to. It and the results are written by `writing`, so they are whole or absent.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Final

from filelock import FileLock, Timeout

from ..errors import UnusablePath
from .writing import PREFIX

LOCK: Final = f"{PREFIX}lock"
"""Name of the file that is locked while a process writes. It stays until the results are whole."""

_NO_LOCKS: Final = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)  # from file systems without locks; filelock knows ENOSYS

_log = logging.getLogger("ddpm_fast")


class ResultFolder:
    """A folder that belongs to one call. Subclasses set `argument`, `record_name` and `hint`.

    Args:
        path: The folder. It need not exist.
        result: The path that the user gave, if the folder only serves to make a file there.

    Attributes:
        path: As given. So is `result`.
        record: The JSON file that has the arguments of the call, named `record_name`.
        argument: Name of its argument for the folder.
        hint: How to go on if the folder has other files.
    """

    argument: ClassVar[str]
    record_name: ClassVar[str]
    hint: ClassVar[str]

    def __init__(self, path: Path, result: Path | None = None) -> None:
        self.path, self.result = path, result or path
        self.record = path / self.record_name

    def check_new(self) -> None:
        """Raise an UnusablePath unless the folder is missing, or empty but for a lock and temporary files."""
        if self.path.exists() and not self.path.is_dir():
            raise UnusablePath(self.argument, "to be a folder", f"{str(self.path)!r}, which is a file")
        names = sorted(entry.name for entry in self.path.iterdir()) if self.path.exists() else []
        for name in [each for each in names if not each.startswith(PREFIX)][:1]:
            raise UnusablePath(self.argument, "to be new or empty", f"{str(self.path)!r}, which has {name!r}; {self.hint}")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder, and hold its lock. The operating system releases it when the process ends.

        If the file system has no locks, a warning is logged.

        Raises:
            BlockingIOError: Another process holds the lock.
            UnusablePath: The folder cannot be made or locked.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:  # such as in /proc, where all looks writable
            raise UnusablePath(self.argument, "to be a path whose folders can be made", error) from error
        lock = FileLock(self.path / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            wanted = f"expected no other process to write to {str(self.result)!r}"
            raise BlockingIOError(f"{wanted}, got one that holds {lock.lock_file}") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise UnusablePath(self.argument, f"to be a folder whose {LOCK} can be locked", error) from error
            _log.warning("%s is not locked, so no other process may write to it meanwhile: %s", self.result, error)
        try:
            yield
        finally:
            lock.release()
