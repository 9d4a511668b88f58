"""Pictures of a source, as Pillow decodes them.

Only functions import this module, because the package must be importable without Pillow.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from io import BytesIO
from typing import Final

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from ..checks import check_choice, first_few
from ..errors import InvalidValue, expect
from .items import DatasetInfo, ItemDataset, central_box
from .sources import Decoded, Source

GREY: Final = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")  # modes without colours

_NAMES: Final = {1: "grey", 3: "RGB", 4: "RGBA"}  # by the number of channels
_ORIENTATION: Final = 0x0112  # a tag of EXIF; from 5 on, the sides are exchanged
_MEND: Final = "remove them; in training, skip_broken=True (--skip-broken) leaves out those of data if others remain"
_AT_ONCE: Final = 4096  # images whose reading is planned ahead

_log = logging.getLogger("ddpm_fast")


def pictures(
    name: str, source: Source, sides: tuple[int, int] | None, channels: int | None
) -> tuple[ItemDataset, dict[int, str]]:
    """Return a data set of pictures, and by number why the headers of some cannot be read.

    Args:
        name: Name of the data set.
        source: The source. The headers of all its pictures are read.
        sides: Height and width, to which the largest centred part of their proportions is resized. None: the pictures must be
            of one size.
        channels: 1 for grey, 3 for RGB or 4 for RGBA. None: 1 if all are grey, else 3.

    Raises:
        ValueError: No size is given, and the headers of some cannot be read or their sizes differ.
    """
    check_choice("channels", channels, (None, *_NAMES))
    headers: list[tuple[int, int, bool]] = []
    broken = attempted(source, lambda index: headers.append(_read_header(source[index])))  # type: ignore[arg-type]
    if sides is None and broken:
        check_whole(source, _damaged(source))  # also those whose pixels alone are damaged
    found = channels or (1 if all(is_grey for *_, is_grey in headers) else 3)
    preparation = "not resized" if sides is None else "cropped and resized"
    preparation += f", in {_NAMES[found]}" + (" as all files are" if found == 1 and channels is None else "")
    shape = (found, *(sides or _common_size(source.root, headers)))
    info = DatasetInfo(name, shape, classes=source.classes, preparation=preparation)
    return Decoded(source, info, partial(_read_picture, source, shape)), broken


def attempted(source: Source, read: Callable[[int], object]) -> dict[int, str]:
    """Call a function for each picture of a source. Return by number why it raised an error for some.

    Pillow releases the interpreter's lock while it decodes, so threads read.
    """

    def attempt(index: int) -> str | None:
        try:
            read(index)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's formats raise errors of many types
            return _reason(error.__cause__ or error)  # the error itself would keep the pixels alive
        return None

    with ThreadPoolExecutor() as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        parts = (range(len(source))[first : first + _AT_ONCE] for first in range(0, len(source), _AT_ONCE))
        reasons = [reason for part in parts for reason in pool.map(attempt, part)]
    return {index: reason for index, reason in enumerate(reasons) if reason is not None}


def _damaged(source: Source) -> dict[int, str]:
    """Return by number why pictures cannot be decoded."""
    return attempted(source, lambda index: _opened(source[index], 3))  # type: ignore[arg-type]


def check_whole(source: Source, broken: Mapping[int, str], *, skip_broken: bool = False) -> None:
    """Raise a ValueError that names the corrupt pictures, unless they may be left out and others remain.

    In that case a warning names them.
    """
    named = first_few([f"{source.label(index)} ({reason})" for index, reason in broken.items()])
    got = f"{len(broken)} of {len(source)} that it cannot: {named}; {_MEND}"
    expect(not broken or (skip_broken and len(broken) < len(source)), "", f"images that Pillow can read in {source.root}", got)
    if broken:
        _log.warning("%d of %d images in %s left out: %s", len(broken), len(source), source.root, named)


def without_broken(source: Source) -> tuple[Source, list[int]]:
    """Return the pictures that can be decoded, and their numbers. Classes that are sub-folders of others alone are left out."""
    broken = _damaged(source)
    check_whole(source, broken, skip_broken=True)
    whole = [index for index in range(len(source)) if index not in broken]
    lost = set(source.labels.tolist()) - set(source.labels[whole].tolist()) if source.by_folder else set()
    kept = [label for label in range(len(source.classes)) if label not in lost]
    labels = torch.searchsorted(torch.tensor(kept), source.labels)
    return replace(source, labels=labels, classes=tuple(source.classes[label] for label in kept)).chosen(whole), whole


def _reason(error: BaseException) -> str:
    name = type(error).__name__
    return name if name == "UnidentifiedImageError" else f"{name}: {error}"  # its text has an address in memory


def _read_header(file: str | BytesIO) -> tuple[int, int, bool]:
    """Return height and width of a picture as it is seen, and whether it has no colours."""
    with Image.open(file) as opened:
        has_exif = opened.format != "PNG" or "exif" in opened.info  # Pillow decodes a PNG to look for it
        turned = has_exif and opened.getexif().get(_ORIENTATION, 1) >= 5
        # Pillow 11 and later turn the size of a TIFF, and no other. Its tags have the stored one.
        width, height = (opened.tag_v2[256], opened.tag_v2[257]) if isinstance(opened, TiffImageFile) else opened.size
        return (width, height, opened.mode in GREY) if turned else (height, width, opened.mode in GREY)


def _common_size(root: str, headers: Sequence[tuple[int, int, bool]]) -> tuple[int, int]:
    """Return the height and width of all images. Raise a ValueError with the sizes if they differ."""
    sizes = Counter((height, width) for height, width, _ in headers)
    found = first_few([f"{width}x{height} ({count})" for (height, width), count in sizes.items()])
    got = f"None with sizes {found}; image_size=64 (--image-size 64) crops each to its central square and resizes it to 64x64"
    expect(len(sizes) == 1, "image_size", f"to be given, as the images in {root} are not of one size", got)
    return next(iter(sizes))


def _read_picture(source: Source, shape: Sequence[int], index: int) -> Tensor:
    """Return a picture of a source, uint8 [C, H, W]. Raise a ValueError that names it if it cannot be read."""
    try:
        return decoded(source[index], shape)  # type: ignore[arg-type]
    except MemoryError:
        raise
    except Exception as error:  # Pillow's formats raise errors of many types
        got = f"{source.label(index)} ({_reason(error)}); {_MEND}"
        raise InvalidValue("", f"images that Pillow can read in {source.root}", got) from error


def decoded(file: str | os.PathLike[str] | BytesIO | Image.Image, shape: Sequence[int]) -> Tensor:
    """Return the largest centred part of an image file with the proportions of the shape, resized to uint8 [C, H, W]."""
    channels, height, width = shape
    image = _opened(file, channels)
    # Crop first, as `resize(box=...)` mixes in pixels from outside the box.
    part = image.crop(central_box(image.height, image.width, height, width))
    return pixels(part.resize((width, height), Image.Resampling.LANCZOS))


def _opened(file: str | os.PathLike[str] | BytesIO | Image.Image, channels: int) -> Image.Image:
    with nullcontext(file) if isinstance(file, Image.Image) else Image.open(file) as opened:
        # Pillow turns a TIFF when it decodes it. Version 10 keeps the tag, and would turn it a second time.
        seen = opened if isinstance(opened, TiffImageFile) else ImageOps.exif_transpose(opened)
        return converted(seen, opened.format, channels)


def pixels(image: Image.Image) -> Tensor:
    """Return the pixels of a grey, RGB or RGBA picture, uint8 [C, H, W]."""
    return torch.from_numpy(np.array(image).reshape(image.height, image.width, -1).transpose(2, 0, 1).copy())


def converted(image: Image.Image, kind: str | None, channels: int) -> Image.Image:
    """Return a picture of 1 channel (grey), 3 (RGB), where what is transparent lies on white, or 4 (RGBA).

    16 bits per channel become 8.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):  # Pillow itself cuts off at 255
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    expect(image.mode not in ("I", "F"), "", "8 or 16 bits per channel", f"pixels of mode {image.mode}, whose range is unknown")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = image if channels == 4 else Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGBA" if channels == 4 else "RGB")
    return image.convert("L") if channels == 1 else image
