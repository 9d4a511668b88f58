"""Files that commands write, checked before the work."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import ArgumentError, UnusablePath, expect
from ..files.writing import remove_leftovers
from ..resources import check_writable, existing_folder

if TYPE_CHECKING:
    from torch import Tensor


def check_output(name: str, path: Path) -> None:
    """Raise if no file can be written there. Nothing is left there."""
    check_writable(name, path, path.parent)
    expect(not path.exists() or path.is_file(), name, "to be a file", f"{str(path)!r}, which is a folder or a device")
    folder = existing_folder(path.parent)
    try:
        remove_leftovers(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UnusablePath(name, "to be in a folder for files", f"{str(folder)!r}: {error}") from error


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Make the folder of a result, and save it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path)
    except (OSError, ValueError, ArgumentError):
        raise
    except Exception as error:  # formats raise errors of many types
        raise OSError(f"{path} could not be written: {error}") from error
    click.get_current_context().obj.append(path)


def grey_for_bad(images: Tensor) -> tuple[Tensor, str]:
    """Replace images [N, C, H, W] that are not finite by grey ones. Return the images, and a sentence about them."""
    bad = (~images.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
    first = f"the first is number {min(bad, default=0)} of 0..{len(images) - 1}"
    said = f"{len(bad)} of {len(images)} images contain NaN or infinity and are grey; {first}"
    return images.nan_to_num(0, 0, 0), said * bool(bad)


def close(failure: str) -> None:
    """End the command with an error, if there is one."""
    if failure:
        raise click.ClickException(failure)
