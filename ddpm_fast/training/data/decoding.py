"""Decode image files with Pillow."""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO, Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...checks import check_path
from ...errors import InvalidValue, expect

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
    from PIL.ImageFile import ImageFile

AT_ONCE: Final = 4096  # images whose reading is planned ahead
BYTES_A_PIXEL: Final = 16  # while an image is decoded, converted and laid on white

_Read = TypeVar("_Read")


def read_image(
    path: str | os.PathLike[str], size: int, channels: int, *, caller: str = "read_image", name: str = "path"
) -> Tensor:
    """Read the largest centred square of an image, resized.

    Args:
        path: A file that Pillow can read.
        size: Height and width in pixels.
        channels: 1 for grey or 3 for RGB.
        caller: The function or command that error messages name.
        name: The argument that error messages name.

    Returns:
        uint8 [channels, size, size].

    Raises:
        ValueError: The file is damaged, or holds no image.
        OSError: The file cannot be opened.
    """
    from PIL import Image, UnidentifiedImageError

    check_path(caller, name, path)
    try:
        with Image.open(path) as opened:
            picture = torch.from_numpy(resized_square(opened, size))
    except (UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None and not isinstance(error, UnidentifiedImageError):
            raise
        raise InvalidValue(caller, name, "to be an image", f"{str(path)!r}: {error}") from error
    if channels == 3:
        return picture
    return torch.from_numpy(np.array(Image.fromarray(picture.permute(1, 2, 0).numpy()).convert("L")))[None]


def decode(file: BinaryIO, size: int, shared: SharedPixels) -> NDArray[np.uint8]:
    """Return the largest centred square of an image file, resized to [3, size, size]."""
    from PIL import Image

    if not isinstance(file, io.BufferedReader):
        file = io.BytesIO(file.read())  # an archive compares a file's checksum only when it is read whole
    with Image.open(file) as opened, shared.held(opened.width * opened.height):
        return resized_square(opened, size)


def size_of(file: BinaryIO) -> tuple[int, int]:
    """Return the width and height in an image's header."""
    from PIL import Image

    with Image.open(file) as image:  # reads the header alone
        return image.width, image.height


def resized_square(opened: ImageFile, size: int) -> NDArray[np.uint8]:
    """Return the largest centred square of an open image, resized to [3, size, size]."""
    from PIL import Image, ImageOps

    image = as_rgb(ImageOps.exif_transpose(opened), opened.format)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # Crop first, as `resize(box=...)` mixes in pixels from outside the box.
    square = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    pixels: NDArray[np.uint8] = np.array(square).transpose(2, 0, 1)
    return pixels


def as_rgb(image: Picture, kind: str | None) -> Picture:
    """Return a picture as RGB. 16 bits a channel become 8, and what is transparent lies on white."""
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):  # Pillow itself cuts off at 255
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8)).convert("RGB")
    expect(
        image.mode not in ("I", "F"), "", "", "8 or 16 bits a channel", f"pixels of mode {image.mode}, whose range is unknown"
    )
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class SharedPixels:
    """A number of pixels that threads may hold in memory together. An image that has more is held alone."""

    def __init__(self, total: int) -> None:
        self._total, self._held, self._changed = total, 0, threading.Condition()

    @contextmanager
    def held(self, pixels: int) -> Iterator[None]:
        """Hold these pixels, after waiting for others to release theirs if they are too many."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + pixels <= self._total)
            self._held += pixels
        try:
            yield
        finally:
            with self._changed:
                self._held -= pixels
                self._changed.notify_all()


def try_each(read: Callable[[str], _Read], names: Sequence[str], broken: dict[str, str]) -> list[_Read | None]:
    """Return what `read` returns for each name, or None and the reason in `broken` if it raises.

    Pillow releases the interpreter's lock while it decodes, so threads read.
    """
    from PIL import Image

    def attempt(name: str) -> _Read | None:
        try:
            return read(name)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's formats raise errors of many types
            broken[name] = reason(error)  # the error itself would keep the pixels alive
            return None

    with ThreadPoolExecutor(thread_name_prefix="ddpm_fast-decode") as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        parts = (names[i : i + AT_ONCE] for i in range(0, len(names), AT_ONCE))
        return [result for part in parts for result in pool.map(attempt, part)]


def reason(error: Exception) -> str:
    """Return type and text of an error. That of an UnidentifiedImageError is left out, as it has an address in memory."""
    from PIL import UnidentifiedImageError

    name = type(error).__name__
    return name if isinstance(error, UnidentifiedImageError) else f"{name}: {error}"
