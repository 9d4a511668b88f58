"""Load a data set by its name: a published one, image files, or arrays."""

from __future__ import annotations

import difflib
import logging
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from torch import Tensor

from ..checks import Ranges, check_ints, check_path, checked_ranges, listed
from ..errors import InvalidValue, expect, renaming
from ..options import checked, within
from ..resources import size_text
from .arrays import arrays, read_array_file
from .degradation import Degradation
from .items import Cached, Conditioned, ItemDataset, Resized, Wrapper
from .published import DATASETS, read_table
from .sources import ARRAYS, PICTURES, Source, read_archive, read_folder

_Range = Sequence[float] | Sequence[Sequence[float]] | Literal["measured"] | None

_log = logging.getLogger("ddpm_fast")


@checked()
def load_dataset(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    split: Literal["train", "test"] = "train",
    image_size: int | Sequence[int] | None = None,
    channels: Annotated[int | None, within(low=1)] = None,
    data_range: _Range = "measured",
    condition: str | os.PathLike[str] | None = None,
    condition_range: _Range = "measured",
    skip_broken: bool = False,
    first: Annotated[int | None, within(low=1)] = None,
    memory: Annotated[int | None, within(low=0)] = None,
) -> ItemDataset:
    """Load a data set by name.

    Images are decoded at once, so corrupt ones are found before any work. If they take more than `memory` bytes,
    they are decoded as they are used, and only their headers are read at once, unless `skip_broken` is true.

    Args:
        name: "digits" (scikit-learn's 8x8 digits, no download), "fashion-mnist" (28x28, padded with black to 32x32),
            "cifar10" (32x32), or a path. A folder's sub-folders are its classes. If a folder or zip file has a
            `dataset.json`, as EDM and `write_samples` write it, the labels are those in it. A folder that Hugging Face's
            `datasets` has saved needs the `datasets` extra. An .npy, an .npz, or a folder of them has arrays [H, W] or
            [H, W, C]: uint8 pictures, or other numbers, which are mapped to [-1, 1].
        data_dir: Folder that holds the files of fashion-mnist or cifar10, or receives the download. By default the files of
            Debian's package dataset-fashion-mnist if installed, else a folder in the user's cache.
        split: "train" or "test". A folder or zip file of images has no split: all of it is read.
        image_size: Height and width in pixels, or (height, width). Images of another size are cropped to the largest centred
            part of these proportions, and resized. By default nothing is resized, and all images must have one size.
        channels: Channels of an image: image files are read in grey (1), RGB (3) or RGBA (4). By default in grey if all files
            are grey, else in RGB.
        data_range: The two values of arrays that become -1 and 1, or two for each channel. Values outside are an error. By
            default the least and the largest of each channel, but 0 and 255 for uint8. None: pictures alone are read.
        condition: What a network reads next to x_t: "low-resolution:4", "grey" or "mask", computed from the images, or a
            second folder, archive or file. Files belong together by their paths without endings, rows by their numbers.
        condition_range: The `data_range` of the second folder.
        skip_broken: Leave out image files that cannot be read, and log a warning that names the first of them.
        first: Read only this many items, from the first. By default all are read.
        memory: Bytes that decoded images may take. More are decoded, or resized, as they are used. By default all are
            held in memory.

    Raises:
        ValueError: The name, split or size is unknown, the images' sizes differ, no image was found, or a file is damaged.
        OSError: A download failed.
        ImportError: A package of the `train` or `datasets` extra is missing.
    """
    size = _sides(image_size)
    images_range, paired_range = _range("data_range", data_range), _range("condition_range", condition_range)
    folder = None if data_dir is None else Path(data_dir)
    source = DATASETS[name](folder, split, size) if name in DATASETS else read_source(name, split)
    degradation = paired = None
    if condition is not None:
        condition = os.fspath(condition)
        degradation = Degradation.named(condition)
        if degradation is None:
            wanted = "to be low-resolution:2 to low-resolution:64, grey, mask, or a folder, an archive or a file of arrays"
            expect(os.path.exists(condition), "load_dataset", "condition", wanted, f"{condition!r}, which does not exist")
            paired = partners(source, read_source(condition, split))
    unused = paired is None and paired_range not in (None, "measured")
    expect(not unused, "load_dataset", "condition_range", "to go with a condition that is read from files", condition_range)
    if first is not None:
        numbers: Sequence[int] = range(len(source))[:first]
        source, paired = source.chosen(numbers), paired and paired.chosen(numbers)
    if skip_broken and not source.has_arrays:
        from .pictures import without_broken

        source, numbers = without_broken(source)
        paired = paired and paired.chosen(numbers)
    dataset = load_source(name, source, size, channels, images_range, memory)
    shape = dataset.info.shape
    expect(channels in (None, shape[0]), "load_dataset", "channels", f"to be those of {name}, {shape[0]}", channels)
    if degradation is not None:
        degradation.check("load_dataset", shape, len(dataset.info.data_range or [0]))
        channels = degradation.channels(shape[0])
        return Wrapper(dataset, replace(dataset.info, condition=degradation, condition_channels=channels))
    if paired is None:
        return dataset
    with renaming("load_dataset", {"data_range": "condition_range"}):
        conditions = load_source(str(condition), paired, (shape[1], shape[2]), None, paired_range, memory)
    return Conditioned(dataset, conditions)


def load_source(
    name: str,
    source: Source,
    size: tuple[int, int] | None,
    channels: int | None,
    value_range: Ranges | Literal["measured"] | None,
    memory: int | None = None,
) -> ItemDataset:
    """Return the images of a source as a data set. See `load_dataset`. The channels of arrays are not checked."""
    from .pictures import attempted, check_whole, pictures

    broken: Mapping[int, str] = {}
    if source.has_arrays:
        dataset = arrays(name, source, value_range)
        if size not in (None, dataset.info.shape[1:]):
            dataset = Resized(dataset, size)
    else:
        wanted = "to be None for image files, as arrays alone have ranges"
        expect(value_range in (None, "measured"), "load_dataset", "data_range", wanted, value_range)
        dataset, broken = pictures(name, source, size, channels)
    needed = len(source) * math.prod(dataset.info.shape) * dataset.info.dtype.itemsize
    if memory is not None and needed > memory and not dataset.in_memory:
        check_whole(source, broken)
        if memory:  # 0 asks for no image in memory
            message = "decoding images in %s as they are used, because all take %s, more than %s"
            _log.info(message, source.root, size_text(needed), size_text(memory))
        return dataset
    cached = Cached(dataset)
    if source.has_arrays:
        for index in range(len(source)):
            cached.fill(index)
    else:
        check_whole(source, attempted(source, cached.fill))  # with those whose headers are broken
    return cached


def read_source(name: str, split: str) -> Source:
    """Return the files of a folder or an archive, or the rows of a file or a table."""
    path = Path(name)
    if any((path / file).is_file() for file in ("dataset_dict.json", "dataset_info.json")):
        return read_table(path, split)
    if path.is_dir():
        return read_folder(path)
    wanted = f"to be one of {', '.join(DATASETS)}, a folder, or a .zip, .npy or .npz"
    expect(path.is_file(), "load_dataset", "name", wanted, f"{name!r}, which does not exist{_hint(path)}")
    if path.suffix.lower() in ARRAYS:
        return read_array_file(path)
    return read_folder(path.parent, [path.name]) if path.suffix.lower() in PICTURES else read_archive(path)


def partners(source: Source, paired: Source) -> Source:
    """Return `paired` with the item that belongs to each item of `source`.

    | items of the data set | items of the condition | belong together by |
    |---|---|---|
    | files of a folder or an archive | files of a folder or an archive | their paths without endings |
    | rows of an array or a table | rows of an array or a table | their numbers |
    | files | rows | nothing: this is an error, as files are ordered as text, 0, 1, 10, 11, 2 |

    Raises:
        ValueError: The items cannot be matched, one has no partner, or two have one name. The message names both sources.
    """
    wanted = "one array file or one table" if source.has_rows else "a folder or an archive with files of the same names"
    got = f"{paired.root}, whose items are {'rows' if paired.has_rows else 'files'}"
    expect(source.has_rows == paired.has_rows, "load_dataset", "condition", f"to be {wanted}, as {source.root} is", got)
    if source.has_rows:
        got = f"{len(paired)} in {paired.root}"
        expect(len(source) == len(paired), "load_dataset", "condition", f"to have {len(source)} rows, as {source.root}", got)
        return paired
    names, others = ([os.path.splitext(file)[0] for file in each.names] for each in (source, paired))
    for stems, root in ((names, source.root), (others, paired.root)):
        twice = [name for name, times in Counter(stems).items() if times > 1]
        got = f"several in {root} that differ in their endings alone: {listed(twice)}"
        expect(not twice, "load_dataset", "condition", f"to have one file of each name, as must {source.root}", got)
    for missing, root in ((set(names) - set(others), paired.root), (set(others) - set(names), source.root)):
        wanted = f"to have files of the same names as {source.root}"
        expect(not missing, "load_dataset", "condition", wanted, f"none named {listed(missing)} in {root}")
    numbers = {name: number for number, name in enumerate(others)}
    return paired.chosen([numbers[name] for name in names])


def read_image(path: Any, shape: Sequence[int], *, caller: str = "read_image", name: str = "path") -> Tensor:
    """Read an image, crop it to the proportions of the shape around its centre, and resize it.

    Args:
        path: A file that Pillow can read, or a `PIL.Image.Image`.
        shape: (C, H, W) in pixels, with C = 1 for grey, 3 for RGB or 4 for RGBA.
        caller: The function or command that error messages name.
        name: The argument that error messages name.

    Returns:
        uint8 [C, H, W].

    Raises:
        ValueError: The file is damaged, or holds no image.
        OSError: The file cannot be opened.
    """
    from PIL.Image import Image

    from .pictures import decoded

    if not isinstance(path, Image):
        check_path(caller, name, path)
    try:
        return decoded(path, shape)
    except Exception as error:  # Pillow's formats raise errors of many types
        if isinstance(error, MemoryError) or getattr(error, "filename", None) is not None:
            raise
        raise InvalidValue(caller, name, "to be an image", f"{str(path)!r}: {error}") from error


def _range(name: str, value: Any) -> Ranges | Literal["measured"] | None:
    """Return the ranges after a check, or "measured"."""
    if value is None or (isinstance(value, str) and value == "measured"):
        return value  # type: ignore[return-value]
    return checked_ranges("load_dataset", name, value)


def _sides(image_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """Return `image_size` as (height, width), or None."""
    if image_size is None:
        return None
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    check_ints("load_dataset", "image_size", sides, 1, "a positive integer, (height, width) or None")
    expect(len(sides) == 2, "load_dataset", "image_size", "to be a positive integer, (height, width) or None", sides)
    return sides[0], sides[1]


def _hint(path: Path) -> str:
    """Return a hint, for an error, at what may have been meant by a path that does not exist."""
    names = {name: name for name in DATASETS}
    with suppress(OSError):  # there is no such folder, or it may not be read
        names |= {each.name: str(each) for each in path.parent.iterdir() if each.is_dir() or each.suffix in (".zip", *ARRAYS)}
    for close in difflib.get_close_matches(path.name, names, 1):
        return f"; did you mean {names[close]!r}?"
    return "" if path.parent.is_dir() else f": there is no folder {str(path.parent)!r}"
