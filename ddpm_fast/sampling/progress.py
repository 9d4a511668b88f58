"""The progress bar of long calls."""

from __future__ import annotations

import sys
from typing import Any


class _HiddenBar:
    """A bar that shows nothing. It does not need tqdm."""

    n = 0

    def update(self, n: int = 1) -> None:
        """Do nothing."""

    def set_postfix_str(self, text: str, *, refresh: bool) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def __enter__(self) -> _HiddenBar:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def progress_bar(total: int, description: str, unit: str, *, shown: bool, done: int = 0) -> Any:
    """Return a context with a tqdm bar, for a terminal or a notebook.

    Args:
        total: Number of units.
        description: The text before the bar.
        unit: Name of a unit.
        shown: Show the bar.
        done: Number of units that were done before.
    """
    if not shown:
        return _HiddenBar()
    from tqdm.auto import tqdm  # late, as names of the package need torch and numpy alone

    interval = 0.1 if sys.stderr.isatty() else 10  # seconds; a log file needs fewer lines than a terminal
    return tqdm(total=total, initial=done, desc=description, unit=unit, mininterval=interval)
