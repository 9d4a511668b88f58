"""The log of a run: loggers receive its rows and grids of samples. log.csv and TensorBoard's files are two of them."""

from __future__ import annotations

import csv
import logging
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from ..errors import UnusablePath
from ..files.writing import write_text

COLUMNS: Final = ("samples", "loss", "grad_norm", "lr", "images_per_second", "seconds")
"""Names of the values of a row."""
LOGGER_FAILS: Final = "%s fails, so the run goes on without it: %s"

_log = logging.getLogger("ddpm_fast")


class Logger:
    """A receiver of what a run records. Derive from it, and override the methods that you need.

    Rank 0 calls it. After an OSError of a logger, a warning says so, and the run goes on without it. Another error ends the
    run, after a checkpoint is saved.
    """

    def row(self, values: Mapping[str, float], step: int) -> None:
        """Receive a row of the log. A run that was killed sends the rows after its last checkpoint again.

        Args:
            values: By name: `samples`, the number of images so far; `loss`, the mean since the row before; `grad_norm`, before
                clipping; `lr`; `images_per_second`; `seconds`, the time spent in steps.
            step: Number of steps done.
        """

    def images(self, images: Tensor, step: int) -> None:
        """Receive the images of a grid of samples.

        Args:
            images: Floating [N, C, H, W] in about [-1, 1], with 1, 3 or 4 channels.
            step: Number of steps done.
        """

    def close(self) -> None:
        """Close what is open, at the end of the call."""


class CsvLog(Logger):
    """The file log.csv: a link in its place is not followed, and a resumed run cuts it to the step of its checkpoint.

    Args:
        path: The file. It need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def row(self, values: Mapping[str, float], step: int) -> None:
        """Append a row."""
        new = not self._exists() or not self.path.stat().st_size  # a run was killed before the names were written
        with open(self.path, "a", newline="", encoding="utf-8", opener=_open_itself) as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(["step", *values])
            writer.writerow([step, *(format(each, ".6g") if isinstance(each, float) else each for each in values.values())])

    def until(self, step: int) -> str:
        """Return the text up to the row of `step`, without a truncated last row."""
        if not self._exists():
            return ""
        text = self.path.read_text(encoding="utf-8", errors="replace")
        lines = text[: text.rfind("\n") + 1].splitlines(keepends=True)
        rows = [line for line in lines[1:] if re.match(r"[0-9]{1,18},", line)]
        return "".join(lines[:1] + [line for line in rows if int(line.split(",", 1)[0]) <= step])

    def last_step(self) -> int:
        """Return the step of the last row, or 0 if there is none."""
        rows = self.until(sys.maxsize).splitlines()[1:]
        return int(rows[-1].split(",", 1)[0]) if rows else 0

    def cut(self, step: int) -> None:
        """Remove the rows after `step`, which a resumed run writes again."""
        if self._exists():
            write_text(self.path, self.until(step))

    def _exists(self) -> bool:
        """Return whether there is a file. Raise an OSError if it is a pipe, a link or a folder: opening a pipe could wait."""
        if not os.path.lexists(self.path):
            return False
        if self.path.is_symlink() or not self.path.is_file():
            got = "a link" if self.path.is_symlink() else "a folder, a pipe or a device"
            raise UnusablePath(repr(str(self.path)), "to be a file", got)
        return True


def _open_itself(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


class TensorBoard(Logger):
    """TensorBoard's event files.

    Args:
        folder: Their folder.
        step: Number of steps done. TensorBoard drops events after it, which are written again.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(folder, purge_step=step + 1)

    def row(self, values: Mapping[str, float], step: int) -> None:
        """Write a scalar for each value."""
        for name, value in values.items():
            self._writer.add_scalar(f"train/{name}", value, step)

    def images(self, images: Tensor, step: int) -> None:
        """Write the images."""
        self._writer.add_images("samples", images.clamp(-1, 1) / 2 + 0.5, step)

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


def tensorboard(folder: Path, step: int) -> list[Logger]:
    """Return a list with a `TensorBoard`. If there cannot be one, log the reason and return an empty list."""
    try:
        return [TensorBoard(folder, step)]
    except ImportError:
        _log.info("TensorBoard is not installed: no event files (pip install 'ddpm_fast[train]')")
    except OSError as error:
        _log.warning(LOGGER_FAILS, "TensorBoard", error)
    return []
