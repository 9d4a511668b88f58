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
from typing import Annotated, Any, Final, Literal

from torch import Tensor

from ..checks import check_path, first_few
from ..errors import InvalidValue, expect, renaming
from ..forms import Pairs, Ranges
from ..interface import Interface
from ..options import checked, within
from ..resources import size_text
from .arrays import arrays, read_array_file
from .degradation import Degradation
from .items import Cached, Conditioned, ItemDataset, Resized, Wrapper
from .options import DataOptions
from .published import DATASETS, read_table
from .sources import ARRAYS, PICTURES, Source, read_archive, read_folder

_CHANNELS: Final = {"grey": 1, "rgb": 3, "rgba": 4}

_log = logging.getLogger("ddpm_fast")


@checked()
def load_dataset(
    data: DataOptions,
    *,
    split: Literal["train", "test"] = "train",
    first: Annotated[int | None, within(low=1)] = None,
    known: Mapping[str, Any] | None = None,
) -> ItemDataset:
    """Load images.

    They are decoded at once, so corrupt ones are found before any work. If they take more than `data_memory`, they are
    decoded as they are used, and only their headers are read at once, unless `skip_broken` is true.

    `data.data` is "digits" (scikit-learn's 8x8 digits, no download), "fashion-mnist" (28x28, padded with black to 32x32),
    "cifar10" (32x32), or a path. A folder's sub-folders are its classes. If a folder or zip file has a `dataset.json`, as EDM
    and `write_samples` write it, the labels are those in it. A folder that Hugging Face's `datasets` has saved needs the
    `datasets` extra. An .npy, an .npz, or a folder of them has arrays [H, W] or [H, W, C]: uint8 pictures, or other numbers,
    which are mapped to [-1, 1].

    Args:
        data: The images, their size, colours and ranges, and what a network reads next to x_t. Images of another size than
            `image_size`, (height, width), are cropped to the largest centred part of these proportions, and resized. A
            condition of files belongs to images by their paths without endings, or to rows by their numbers.
        split: "train" or "test". A folder or zip file of images has no split: all of it is read.
        first: Read only this many items, from the first. By default all are read.
        known: The configuration of a network that reads them, which has the size, the channels and the ranges that `data`
            leaves open. Without a range, it reads pictures alone. None: ranges are measured, for each channel.

    Raises:
        ValueError: The name, split or size is unknown, the images' sizes differ, no image was found, a file is damaged, or
            `data` states another range than the network keeps.
        OSError: A download failed.
        ImportError: A package of the `train` or `datasets` extra is missing.
    """
    name, condition = os.fspath(data.data), None if data.condition is None else os.fspath(data.condition)
    size, channels = _sides(data.image_size), None if data.colors is None else _CHANNELS[data.colors]
    if known is not None:
        channels = Interface.from_config(known).channels if channels is None else channels
        size = _sides(known.get("sample_size")) if size is None else size
    folder, memory = None if data.data_dir is None else Path(data.data_dir), int(data.data_memory)
    source = DATASETS[name](folder, split, size) if name in DATASETS else read_source(name, split)
    degradation = paired = None
    if condition is not None:
        degradation = Degradation.named(condition)
        if degradation is None:
            wanted = "to be low-resolution:2 to low-resolution:64, grey, mask, or a folder, an archive or a file of arrays"
            expect(os.path.exists(condition), "condition", wanted, f"{condition!r}, which does not exist")
            paired = partners(source, read_source(condition, split))
    unused, wanted = paired is None and data.condition_range, "to go with a condition that is read from files"
    expect(not unused, "condition_range", wanted, data.condition_range)
    ranges = kept_range("data_range", known, data.data_range)
    if first is not None:
        numbers: Sequence[int] = range(len(source))[:first]
        source, paired = source.chosen(numbers), paired and paired.chosen(numbers)
    if data.skip_broken and not source.has_arrays:
        from .pictures import without_broken

        source, numbers = without_broken(source)
        paired = paired and paired.chosen(numbers)
    dataset = load_source(name, source, size, channels, ranges, memory=memory, measure=known is None)
    shape = dataset.info.shape
    expect(channels in (None, shape[0]), "colors", f"to be those of {name}, {shape[0]} channels", channels)
    if degradation is not None:
        degradation.check(shape, len(dataset.info.data_range or [0]))
        channels = degradation.channels(shape[0])
        return Wrapper(dataset, replace(dataset.info, condition=degradation, condition_channels=channels))
    if paired is None:
        return dataset
    ranges = kept_range("condition_range", known, data.condition_range)
    with renaming({"data_range": "condition_range"}):
        sides = (shape[1], shape[2])
        conditions = load_source(str(condition), paired, sides, None, ranges, memory=memory, measure=known is None)
    return Conditioned(dataset, conditions)


def kept_range(name: str, known: Mapping[str, Any] | None, stated: Pairs | None) -> Pairs | None:
    """Return the range that a network's configuration keeps under a name, or else the stated one."""
    kept = (known or {}).get(name)
    kept = None if kept is None else Ranges.parse(name, kept)
    expect(kept is None or stated in (None, kept), name, f"to be left out, as the model keeps {kept}", stated)
    return kept or stated


def load_source(
    name: str,
    source: Source,
    size: tuple[int, int] | None,
    channels: int | None,
    value_range: Pairs | None,
    *,
    memory: int | None = None,
    measure: bool = False,
) -> ItemDataset:
    """Return the images of a source as a data set. See `load_dataset`. The channels of arrays are not checked.

    Without a range, numbers are an error, unless it is to be measured.
    """
    from .pictures import attempted, check_whole, pictures

    broken: Mapping[int, str] = {}
    if source.has_arrays:
        dataset = arrays(name, source, value_range, measure=measure)
        if size not in (None, dataset.info.shape[1:]):
            dataset = Resized(dataset, size)
    else:
        expect(value_range is None, "data_range", "to be None for image files, as arrays alone have ranges", value_range)
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
    expect(path.is_file(), "data", wanted, f"{name!r}, which does not exist{_hint(path)}")
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
    expect(source.has_rows == paired.has_rows, "condition", f"to be {wanted}, as {source.root} is", got)
    if source.has_rows:
        got = f"{len(paired)} in {paired.root}"
        expect(len(source) == len(paired), "condition", f"to have {len(source)} rows, as {source.root}", got)
        return paired
    names, others = ([os.path.splitext(file)[0] for file in each.names] for each in (source, paired))
    for stems, root in ((names, source.root), (others, paired.root)):
        twice = [name for name, times in Counter(stems).items() if times > 1]
        got = f"several in {root} that differ in their endings alone: {first_few(twice)}"
        expect(not twice, "condition", f"to have one file of each name, as must {source.root}", got)
    for missing, root in ((set(names) - set(others), paired.root), (set(others) - set(names), source.root)):
        wanted = f"to have files of the same names as {source.root}"
        expect(not missing, "condition", wanted, f"none named {first_few(missing)} in {root}")
    numbers = {name: number for number, name in enumerate(others)}
    return paired.chosen([numbers[name] for name in names])


def read_image(path: Any, shape: Sequence[int], *, name: str = "path") -> Tensor:
    """Read an image, crop it to the proportions of the shape around its centre, and resize it.

    Args:
        path: A file that Pillow can read, or a `PIL.Image.Image`.
        shape: (C, H, W) in pixels, with C = 1 for grey, 3 for RGB or 4 for RGBA.
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
        check_path(name, path)
    try:
        return decoded(path, shape)
    except Exception as error:  # Pillow's formats raise errors of many types
        if isinstance(error, MemoryError) or getattr(error, "filename", None) is not None:
            raise
        raise InvalidValue(name, "to be an image", f"{str(path)!r}: {error}") from error


def _sides(size: Any) -> tuple[int, int] | None:
    """Return an image size, a number or (height, width), as (height, width), or None."""
    return size if size is None else (size, size) if isinstance(size, int) else (size[0], size[1])


def _hint(path: Path) -> str:
    """Return a hint, for an error, at what may have been meant by a path that does not exist."""
    names = {name: name for name in DATASETS}
    with suppress(OSError):  # there is no such folder, or it may not be read
        names |= {each.name: str(each) for each in path.parent.iterdir() if each.is_dir() or each.suffix in (".zip", *ARRAYS)}
    for close in difflib.get_close_matches(path.name, names, 1):
        return f"; did you mean {names[close]!r}?"
    return "" if path.parent.is_dir() else f": there is no folder {str(path.parent)!r}"
