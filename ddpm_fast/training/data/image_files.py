"""Image files, decoded with Pillow: all into memory at the start, or batch by batch as they are read."""

from __future__ import annotations

import io
import logging
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, BinaryIO, Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...checks import check_choice, check_path, listed
from ...errors import InvalidValue, expect
from ...resources import size_text
from .dataset import SAMPLED, ImageDataset, LazyImages, central_box, fits

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

_NAMES: Final = {1: "grey", 3: "RGB", 4: "RGBA"}  # by the number of channels
_ORIENTATION: Final = 0x0112  # a tag of EXIF; from 5 on, the sides are exchanged
GREY: Final = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")  # modes without colours

_MEND: Final = "remove them; in training, skip_broken=True (--skip-broken) leaves out those of data if others remain"
_AT_ONCE: Final = 4096  # images whose reading is planned ahead

_Read = TypeVar("_Read")
_log = logging.getLogger("ddpm_fast")


@dataclass(frozen=True)
class ImageFiles:
    """Encoded images by name: files of a folder or an archive, or rows of a table. Several threads may open them.

    Attributes:
        root: Path of the folder, archive or table.
        names: The N names in the order of the data set.
        open: A function that opens the file of a name.
        num_bytes: A function that returns the size of the file of a name.
        labels: int64 [N], 0..len(classes)-1.
        classes: Names of the classes; a single one if the images carry no labels.
        keeps_classes: Keep classes of which no image can be read.
        numbered: True for rows of a table, which have numbers and no names of their own.
    """

    root: str
    names: Sequence[str]
    open: Callable[[str], BinaryIO]
    num_bytes: Callable[[str], int]
    labels: Tensor
    classes: tuple[str, ...]
    keeps_classes: bool = True
    numbered: bool = False

    def chosen(self, numbers: Sequence[int]) -> ImageFiles:
        """Return the files of these numbers, in their order, without labels."""
        names = [self.names[number] for number in numbers]
        return replace(self, names=names, labels=torch.zeros(len(names), dtype=torch.int64), classes=("",))

    def header(self, name: str) -> tuple[int, int, bool]:
        """Return the height and width in an image's header, and whether the image is grey."""
        from PIL import Image

        with self.open(name) as file, Image.open(file) as opened:  # reads the header alone
            sides = (opened.height, opened.width)
            has_exif = opened.format != "PNG" or "exif" in opened.info  # Pillow decodes a PNG to look for it
            height, width = sides[::-1] if has_exif and opened.getexif().get(_ORIENTATION, 1) >= 5 else sides
            return height, width, opened.mode in GREY

    def decode(self, name: str, shape: Sequence[int]) -> NDArray[np.uint8]:
        """Return the largest centred part of an image of the shape's sides, resized to [C, H, W]."""
        from PIL import Image

        with self.open(name) as file:
            if not isinstance(file, io.BufferedReader):
                file = io.BytesIO(file.read())  # an archive compares a file's checksum only when it is read whole
            with Image.open(file) as opened:
                return resized(opened, shape)

    def read(self, shape: Sequence[int], indices: Tensor) -> Tensor:
        """Return the images at the int64 indices [B], decoded to uint8 [B, C, H, W].

        Raises:
            ValueError: An image cannot be decoded. The message names its file.
        """
        names = [self.names[number] for number in indices.tolist()]
        broken: dict[str, str] = {}
        images = [_attempt(lambda name: self.decode(name, shape), name, broken) for name in names]
        expect(
            not broken,
            "load_dataset",
            "",
            f"images that Pillow can read in {self.root}",
            f"{_reasons(broken)}; {_MEND}",
        )
        return torch.from_numpy(np.array(images, np.uint8).reshape(len(names), *shape))

    def contents(self, exact: bool) -> Iterator[bytes]:
        """Yield the names and sizes, and bytes of the files: all, or some of a sample."""
        for name in self.names:
            yield os.fsencode(f"{name} {self.num_bytes(name)}\n")
        for name in self.names if exact else self.names[:: max(1, len(self.names) // SAMPLED)]:
            with self.open(name) as file:
                while block := file.read(1 << 20):
                    yield block
                    if not exact:
                        break


def load_images(
    name: str,
    files: ImageFiles,
    image_size: tuple[int, int] | None,
    channels: int | None,
    skip_broken: bool,
    first: int | None,
    memory: int | None,
) -> ImageDataset:
    """Return a data set of images: decoded if that takes at most `memory` bytes, else with their headers checked.

    Args:
        name: Name of the data set.
        files: The images.
        image_size: Height and width that images are resized to. By default they must be of one size.
        channels: 1 for grey, 3 for RGB or 4 for RGBA. By default 1 if all images are grey, else 3.
        skip_broken: Leave out images that cannot be decoded.
        first: Number of images to read. By default all are read.
        memory: Bytes that decoded images may take. By default all are decoded.
    """
    names, root = files.names[:first], files.root
    check_choice("load_dataset", "channels", channels, (None, *_NAMES))
    if len(names) > _AT_ONCE:
        _log.info("reading %d images in %s", len(names), root)
    broken: dict[str, str] = {}
    headers: list[tuple[int, int, bool]] = []
    decoded = image_size is not None and fits((len(names), channels or 3, *image_size), memory)
    for part in (names[i : i + _AT_ONCE] for i in range(0, len(names), _AT_ONCE)):
        if decoded and (channels or not all(grey for *_, grey in headers)):
            break  # headers say no more
        headers += filter(None, try_each(files.header, part, broken))
    if not decoded:
        _check_broken(root, names, broken, skip_broken)
    found = channels or (1 if all(grey for *_, grey in headers) else 3)
    if image_size is None:
        image_size, preparation = _common_size(root, [(height, width) for height, width, _ in headers]), "as they are"
    else:
        preparation = "cropped and resized"
    preparation += f", in {_NAMES[found]}" + (" as all files are" if found == 1 and channels is None else "")
    size = (found, *image_size)
    shape = (len(names), *size)

    whole = fits(shape, memory)
    images = torch.empty(shape if whole else 0, dtype=torch.uint8)
    pixels, rows = images.numpy(), {name: row for row, name in enumerate(names)}
    # Rows of repeated names would stay unfilled.
    expect(len(rows) == len(names), "load_dataset", "", f"each name in {root} once", f"{len(names) - len(rows)} again")
    if memory is not None and not whole:
        message = "decoding images in %s batch by batch, as all take %s and data_memory is %s"
        message += "; now all are decoded once, to find broken ones" if skip_broken else ""
        _log.info(message, root, size_text(math.prod(shape)), size_text(memory))

    def fill(name: str) -> None:
        decoded = files.decode(name, size)
        if whole:
            pixels[rows[name]] = decoded

    if whole or skip_broken:
        try_each(fill, [name for name in names if name not in broken], broken)
        _check_broken(root, names, broken, skip_broken)

    readable = [row for row, name in enumerate(files.names) if name not in broken]  # also beyond the first ones
    labels, classes = files.labels[readable], files.classes
    if not files.keeps_classes:
        numbers, labels = labels.unique(return_inverse=True)
        classes = tuple(classes[number] for number in numbers.tolist())
    kept = readable[: len(names) - len(broken)]
    if broken:
        _log.warning("%d of %d images in %s left out: %s", len(broken), len(names), root, _reasons(broken))
        if whole:
            for row, old in enumerate(kept):  # in place, as there may be no memory for a second copy
                images[row] = images[old]
    files = replace(files, names=[files.names[row] for row in kept])
    used: Tensor | LazyImages = images[: len(kept)]
    if not whole:
        used = LazyImages((len(kept), *shape[1:]), partial(files.read, size), memory)
    return ImageDataset(name, used, labels[: len(kept)], classes, files.contents, preparation, files.names)


def _check_broken(root: str, names: Sequence[str], broken: Mapping[str, str], skip_broken: bool) -> None:
    """Raise a ValueError if there are broken images and they must not be left out, or if there are no others."""
    if broken and (not skip_broken or len(broken) == len(names)):
        raise InvalidValue(
            "load_dataset",
            "",
            f"images that Pillow can read in {root}",
            f"{len(broken)} of {len(names)} that it cannot: {_reasons(broken)}; {_MEND}",
        )


def _reasons(broken: Mapping[str, str]) -> str:
    """Return the names of the first broken images, with reasons."""
    return listed([f"{name} ({why})" for name, why in broken.items()])


def _common_size(root: str, all_sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the height and width of all images. Raise ValueError, with the sizes, if they differ."""
    sizes = Counter(all_sizes)
    size, _ = sizes.most_common(1)[0]
    if len(sizes) == 1:
        return size
    found = listed([f"{width}x{height} ({count})" for (height, width), count in sizes.most_common()])
    raise InvalidValue(
        "load_dataset",
        "image_size",
        f"to be given, as the images in {root} are not of one size",
        f"None with sizes {found}; image_size=64 (--image-size 64) crops each to its central square and resizes it to 64x64",
    )


# --------------------------------------------------------------------------------------------------------------------- decoding


def resized(opened: Picture, shape: Sequence[int]) -> NDArray[np.uint8]:
    """Return the largest centred part of an open image with the proportions of the shape, resized to [C, H, W]."""
    from PIL import Image, ImageOps

    channels, height, width = shape
    image = ImageOps.exif_transpose(opened)
    image = as_rgb(image, opened.format, alpha=channels == 4)
    image = image.convert("L") if channels == 1 else image
    # Crop first, as `resize(box=...)` mixes in pixels from outside the box.
    part = image.crop(central_box(image.height, image.width, height, width))
    pixels: NDArray[np.uint8] = np.array(part.resize((width, height), Image.Resampling.LANCZOS))
    pixels = pixels.reshape(height, width, channels).transpose(2, 0, 1)
    return pixels


def as_rgb(image: Picture, kind: str | None, *, alpha: bool = False) -> Picture:
    """Return a picture as RGB, where what is transparent lies on white, or as RGBA. 16 bits a channel become 8."""
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):  # Pillow itself cuts off at 255
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8)).convert("RGBA" if alpha else "RGB")
    expect(
        image.mode not in ("I", "F"), "", "", "8 or 16 bits a channel", f"pixels of mode {image.mode}, whose range is unknown"
    )
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = image if alpha else Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGBA" if alpha else "RGB")


def try_each(read: Callable[[str], _Read], names: Sequence[str], broken: dict[str, str]) -> list[_Read | None]:
    """Return what `_attempt` returns for each name.

    Pillow releases the interpreter's lock while it decodes, so threads read.
    """
    from PIL import Image

    with ThreadPoolExecutor(thread_name_prefix="ddpm_fast-decode") as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        parts = (names[i : i + _AT_ONCE] for i in range(0, len(names), _AT_ONCE))
        return [result for part in parts for result in pool.map(lambda name: _attempt(read, name, broken), part)]


def _attempt(read: Callable[[str], _Read], name: str, broken: dict[str, str]) -> _Read | None:
    """Return what `read` returns for a name, or None and the type and text of the error in `broken` if it raises."""
    from PIL import UnidentifiedImageError

    try:
        return read(name)
    except MemoryError:
        raise
    except UnidentifiedImageError:  # its text has an address in memory
        broken[name] = "UnidentifiedImageError"
    except Exception as error:  # Pillow's formats raise errors of many types
        broken[name] = f"{type(error).__name__}: {error}"  # the error itself would keep the pixels alive
    return None


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
