"""Files that commands write: checked before the work, and kept elsewhere if they cannot be written."""

from __future__ import annotations

import math
import secrets
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import click

from ..errors import UnusablePath, expect
from ..files.writing import remove_leftovers
from ..resources import check_free_memory, check_writable


def check_output(command: str, name: str, path: Path) -> None:
    """Raise if no file can be written there, as far as that can be known without writing."""
    check_writable(command, name, path, path.parent)
    expect(not path.exists() or path.is_file(), command, name, "to be a file", f"{str(path)!r}, which is a folder or a device")


def make_writable(command: str, name: str, folder: Path) -> None:
    """Make the folder that results will go to. Raise OSError if it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UnusablePath(command, name, "to be in a folder for files", f"{str(folder)!r}: {error}") from error


def save_result(save: Callable[[Path], object], path: Path, failures: list[str], endings: tuple[str, ...] = ()) -> None:
    """Save a result, or if that fails save it beside the path or in the temporary folder, and add to `failures`.

    Args:
        save: Writes the file that it is given.
        path: The file to write.
        failures: Receives the reason if another file had to be written, or none could be.
        endings: Endings to try beside the path's own.
    """
    written: list[Path] = click.get_current_context().obj
    try:
        save(path)
        written.append(path)
        return
    except Exception as error:  # formats raise errors of many types
        reason = f"{path} could not be written: {getattr(error, 'strerror', None) or error}"
    folders = [path.parent]
    with suppress(OSError):
        folders.append(Path(tempfile.gettempdir()))
    for folder in folders:
        for ending in dict.fromkeys((path.suffix, *endings)):
            other = folder / f"{path.stem[:100]}-{secrets.token_hex(4)}{ending}"
            with suppress(Exception):
                save(other)
                written.append(other)
                failures.append(f"{reason}. Written instead: {other}")
                return
    failures.append(f"{reason}. No other file could be written either: {', '.join(map(str, folders))}")


def check_pictures(
    shape: tuple[int, int, int, int], frames: int, out: Path, scale: int, gif: Path | None, gif_scale: int
) -> None:
    """Raise unless memory and the formats can hold pictures of images [N, C, H, W], where C counts the shown channels."""
    from ..files.images import ANIMATED, STRIP, grid_shape, image_format

    num, shown, *sides = shape
    image_format(out, grid := grid_shape(shape, scale=scale), "out")
    # Float32 states, and pictures.
    check_free_memory("sample", "num", num, (12 + 4 * frames) * math.prod(shape) + 3 * math.prod(grid))
    if gif is not None and image_format(gif, (1, 1, shown), "gif") in ANIMATED:
        image_format(gif, grid_shape(shape, scale=gif_scale), "gif")
    elif gif is not None:
        strip = min(STRIP, frames)
        image_format(gif, grid_shape((num * strip, shown, *sides), columns=strip, scale=gif_scale), "gif")
