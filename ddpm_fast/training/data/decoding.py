"""Images of a source: pictures that Pillow decodes, and arrays of numbers."""

from __future__ import annotations

import logging
import operator
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...checks import Ranges, check_choice, check_path, checked_ranges, listed
from ...errors import InvalidValue, expect
from .items import DatasetInfo, Item, ItemDataset, central_box
from .rows import loaded_arrays, only_images
from .sources import Source

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

GREY: Final = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")  # modes without colours

_NAMES: Final = {1: "grey", 3: "RGB", 4: "RGBA"}  # by the number of channels
_ORIENTATION: Final = 0x0112  # a tag of EXIF; from 5 on, the sides are exchanged
_MEND: Final = "remove them; in training, skip_broken=True (--skip-broken) leaves out those of data if others remain"
_AT_ONCE: Final = 4096  # images whose reading is planned ahead

T = TypeVar("T")
_log = logging.getLogger("ddpm_fast")


class Decoded(ItemDataset):
    """The images of a source with its labels.

    Args:
        source: The source.
        info: Their description.
        image: A function that returns the image of a number. It can be pickled.
    """

    def __init__(self, source: Source, info: DatasetInfo, image: Callable[[int], Tensor]) -> None:
        self._source, self.info, self._image, self.in_memory = source, info, image, source.in_memory

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self._source)

    def __getitem__(self, index: int) -> Item:
        """Return an image, decoded."""
        return Item(self._image(operator.index(index)), int(self._source.labels[index]))

    def contents(self, exact: bool) -> Iterator[bytes]:
        """Yield labels, names and bytes of the source."""
        return self._source.contents(exact)


def attempted(read: Callable[[int], T], count: int) -> tuple[list[T], dict[int, str]]:
    """Return what `read` returns for those of 0..count-1 for which it raises no error, and the errors of others by number.

    Pillow releases the interpreter's lock while it decodes, so threads read.
    """
    from PIL import Image

    broken: dict[int, str] = {}

    def attempt(index: int) -> T | None:
        try:
            return read(index)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's formats raise errors of many types
            broken[index] = _reason(error.__cause__ or error)  # the error itself would keep the pixels alive
            return None

    with ThreadPoolExecutor() as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        parts = (range(first, min(count, first + _AT_ONCE)) for first in range(0, count, _AT_ONCE))
        results = [result for part in parts for result in pool.map(attempt, part)]
    return [result for index, result in enumerate(results) if index not in broken], broken  # type: ignore[misc]


def _reason(error: BaseException) -> str:
    from PIL import UnidentifiedImageError

    name = type(error).__name__
    return name if isinstance(error, UnidentifiedImageError) else f"{name}: {error}"  # its text has an address in memory


def check_whole(source: Source, broken: Mapping[int, str], *, skip_broken: bool = False) -> None:
    """Raise a ValueError if there are broken images and they must not be left out, or if there are no others."""
    if not broken:
        return
    named = listed([f"{source.label(index)} ({why})" for index, why in broken.items()])
    if not skip_broken or len(broken) == len(source):
        got = f"{len(broken)} of {len(source)} that it cannot: {named}; {_MEND}"
        raise InvalidValue("load_dataset", "", f"images that Pillow can read in {source.root}", got)
    _log.warning("%d of %d images in %s left out: %s", len(broken), len(source), source.root, named)


# ----------------------------------------------------------------------------------------------------------------- pictures


class Header(NamedTuple):
    """The size of a picture as it is seen, and whether it has no colours."""

    height: int
    width: int
    is_grey: bool


def read_headers(source: Source, *, decode: bool = False) -> tuple[list[Header], dict[int, str]]:
    """Return the headers of the pictures that can be read, and by number why the others cannot.

    Args:
        source: The source.
        decode: Decode the pictures, too.
    """
    from PIL import Image

    def read(index: int) -> Header:
        with Image.open(source[index]) as opened:  # type: ignore[arg-type]
            sides = (opened.height, opened.width)
            has_exif = opened.format != "PNG" or "exif" in opened.info  # Pillow decodes a PNG to look for it
            height, width = sides[::-1] if has_exif and opened.getexif().get(_ORIENTATION, 1) >= 5 else sides
            if decode:
                converted(opened, opened.format, 3)
            return Header(height, width, opened.mode in GREY)

    return attempted(read, len(source))


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
    """
    check_choice("load_dataset", "channels", channels, (None, *_NAMES))
    headers, broken = read_headers(source)
    if sides is None:
        check_whole(source, broken)
    found = channels or (1 if all(each.is_grey for each in headers) else 3)
    preparation = "as they are" if sides is None else "cropped and resized"
    preparation += f", in {_NAMES[found]}" + (" as all files are" if found == 1 and channels is None else "")
    shape = (found, *(sides or _common_size(source.root, headers)))
    info = DatasetInfo(name, shape, classes=source.classes, preparation=preparation)
    return Decoded(source, info, partial(_read_picture, source, shape)), broken


def _common_size(root: str, headers: Sequence[Header]) -> tuple[int, int]:
    """Return the height and width of all images. Raise a ValueError with the sizes if they differ."""
    sizes = Counter((each.height, each.width) for each in headers)
    found = listed([f"{width}x{height} ({count})" for (height, width), count in sizes.items()])
    wanted = f"to be given, as the images in {root} are not of one size"
    got = f"None with sizes {found}; image_size=64 (--image-size 64) crops each to its central square and resizes it to 64x64"
    expect(len(sizes) == 1, "load_dataset", "image_size", wanted, got)
    return next(iter(sizes))


def _read_picture(source: Source, shape: Sequence[int], index: int) -> Tensor:
    from PIL import Image

    try:
        with Image.open(source[index]) as opened:  # type: ignore[arg-type]
            return torch.from_numpy(resized(opened, shape).copy())
    except Exception as error:  # Pillow's formats raise errors of many types
        got = f"{source.label(index)} ({_reason(error)}); {_MEND}"
        raise InvalidValue("load_dataset", "", f"images that Pillow can read in {source.root}", got) from error


def resized(opened: Picture, shape: Sequence[int]) -> NDArray[np.uint8]:
    """Return the largest centred part of an open image with the proportions of the shape, resized to [C, H, W]."""
    from PIL import Image, ImageOps

    channels, height, width = shape
    image = converted(ImageOps.exif_transpose(opened), opened.format, channels)
    # Crop first, as `resize(box=...)` mixes in pixels from outside the box.
    part = image.crop(central_box(image.height, image.width, height, width))
    return channels_first(part.resize((width, height), Image.Resampling.LANCZOS))


def channels_first(image: Picture) -> NDArray[np.uint8]:
    """Return the pixels of a grey, RGB or RGBA picture, [C, H, W]."""
    pixels: NDArray[np.uint8] = np.array(image).reshape(image.height, image.width, -1).transpose(2, 0, 1)
    return pixels


def converted(image: Picture, kind: str | None, channels: int) -> Picture:
    """Return a picture of 1 channel (grey), 3 (RGB), where what is transparent lies on white, or 4 (RGBA).

    16 bits a channel become 8.
    """
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):  # Pillow itself cuts off at 255
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    known = image.mode not in ("I", "F")
    expect(known, "", "", "8 or 16 bits a channel", f"pixels of mode {image.mode}, whose range is unknown")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = image if channels == 4 else Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGBA" if channels == 4 else "RGB")
    return image.convert("L") if channels == 1 else image


def read_image(path: str | os.PathLike[str], shape: Sequence[int], *, caller: str = "read_image", name: str = "path") -> Tensor:
    """Read the largest centred part of an image with the proportions of the shape, resized.

    Args:
        path: A file that Pillow can read.
        shape: (C, H, W) in pixels, with C = 1 for grey, 3 for RGB or 4 for RGBA.
        caller: The function or command that error messages name.
        name: The argument that error messages name.

    Returns:
        uint8 [C, H, W].

    Raises:
        ValueError: The file is damaged, or holds no image.
        OSError: The file cannot be opened.
    """
    from PIL import Image, UnidentifiedImageError

    check_path(caller, name, path)
    try:
        with Image.open(path) as opened:
            return torch.from_numpy(resized(opened, shape).copy())
    except (UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None and not isinstance(error, UnidentifiedImageError):
            raise
        raise InvalidValue(caller, name, "to be an image", f"{str(path)!r}: {error}") from error


# ------------------------------------------------------------------------------------------------------------------- arrays


def arrays(name: str, source: Source, value_range: Ranges | Literal["measured"] | None) -> ItemDataset:
    """Return a data set of arrays: uint8 as pictures, other numbers mapped to [-1, 1]. All numbers are looked at.

    Args:
        name: Name of the data set.
        source: The source. Its arrays have one shape, [H, W] or [H, W, C], and one dtype.
        value_range: (low, high) of the values, which become -1 and 1: of all, or of each channel. "measured": the least and
            the largest of each channel, or pictures if they are uint8. None: pictures.

    Raises:
        ValueError: An array is none, has another shape or dtype than the first, or has values that are not finite or outside
            of the range. The message names it.
    """
    first = _array(source, None, 0)
    info = DatasetInfo(name, first.shape, classes=source.classes, preparation=source.preparation)
    wanted = f"to be given for numbers, as {source.place(0)} has {first.dtype} and no range is kept for them"
    expect(first.dtype == np.uint8 or value_range is not None, "load_dataset", "data_range", wanted, None)
    ranges = None
    if first.dtype != np.uint8 or value_range not in (None, "measured"):
        ranges = _measured(source, first, None if value_range == "measured" else value_range)
        mapped = "the range of each channel" if len(ranges) > 1 else "{:g} to {:g}".format(*ranges[0])
        preparation = f"{source.preparation}, {mapped} as -1 to 1"
        info = replace(info, dtype=torch.float32, preparation=preparation, data_range=ranges)
    return Decoded(source, info, partial(_read_array, source, first, ranges))


def _read_array(source: Source, first: NDArray[Any], ranges: Ranges | None, index: int) -> Tensor:
    array = _array(source, first, index)
    if ranges is None:
        return torch.from_numpy(np.array(array))  # a copy, as a file that is mapped is read-only
    low, high = np.array(ranges).T[:, :, None, None]  # [C, 1, 1]
    return torch.from_numpy((array.astype(np.float64) - low) * (2 / (high - low)) - 1).float()


def _array(source: Source, first: NDArray[Any] | None, index: int) -> NDArray[Any]:
    """Return an array as [C, H, W]. Raise a ValueError if it is none, or unlike the first."""
    place, item = source.place(index), source[index]
    if not isinstance(item, np.ndarray):  # a file
        found = loaded_arrays(str(item))
        alone = "to hold an image alone, as sub-folders are the classes"
        expect("arr_1" not in found, "load_dataset", place, alone, "arr_1")
        item = only_images(place, found)
    expect(item.ndim in (2, 3) and item.size, "load_dataset", place, "to be 2-d or 3-d", list(item.shape))
    expect(item.dtype.kind in "uif", "load_dataset", place, "to hold numbers", item.dtype)
    array = item[None] if item.ndim == 2 else item.transpose(2, 0, 1)
    wanted, got = (f"{each.dtype} {list(each.shape)}" for each in (array if first is None else first, array))
    expect(got == wanted, "load_dataset", place, f"to be {wanted}, as the first", got)
    return array


def _measured(source: Source, first: NDArray[Any], stated: Ranges | None) -> Ranges:
    """Return the range of each channel, or the stated ones after a look at all values."""
    low, high = np.full(len(first), np.inf), np.full(len(first), -np.inf)
    bounds = np.array(stated or [(-np.inf, np.inf)])  # [C or 1, 2]
    if first.dtype.kind == "f" and stated is not None:  # values at the ends are rounded to their dtype
        bounds = bounds.clip(np.finfo(first.dtype).min, np.finfo(first.dtype).max).astype(first.dtype).astype(np.float64)
    wanted = f"to be one range, or one for each of {len(first)} channels"
    expect(len(bounds) in (1, len(first)), "load_dataset", "data_range", wanted, len(bounds))
    for index in range(len(source)):
        array, place = _array(source, first, index), source.place(index)
        with np.errstate(invalid="ignore"):  # a signalling NaN would be a warning
            least, most = (each(array, axis=(1, 2)).astype(np.float64) for each in (np.min, np.max))  # NaN if one is
        expect(np.isfinite([least, most]).all(), "load_dataset", place, "to be finite", "NaN or infinity")
        outside = (least < bounds[:, 0]) | (most > bounds[:, 1])
        channel = int(outside.argmax())
        inside = "to be in {:g}..{:g}, the data_range".format(*bounds[channel % len(bounds)])
        got = f"values from {least[channel]:g} to {most[channel]:g} in channel {channel}; clip them, or train with more"
        expect(not outside.any(), "load_dataset", place, inside, got)
        low, high = np.minimum(low, least), np.maximum(high, most)
    if stated is not None:
        return stated
    for channel in np.flatnonzero(low == high).tolist():
        got = f"{low[channel]:g} alone in channel {channel}; state a data_range"
        raise InvalidValue("load_dataset", source.root, "to have different values", got)
    return checked_ranges("load_dataset", source.root, np.stack([low, high], axis=1).tolist())
