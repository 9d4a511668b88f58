"""Zip files of images, as the data set tools of EDM and StyleGAN write them. `dataset.json` has the labels."""

from __future__ import annotations

import weakref
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from torch import Tensor

from ...errors import InvalidValue, expect
from .dataset import ImageDataset
from .image_files import IMAGE_SUFFIXES, ImageFiles, is_image_name, load_images
from .labels import LABELS_FILE, MAX_BYTES, chosen_labels, listed_labels, parsed_json

_MAX_IMAGE: Final = 256 << 20  # bytes of an image's file, unpacked


def read_archive(path: Path, image_size: int | None, skip_broken: bool, first: int | None, memory: int | None) -> ImageDataset:
    """Return the images of a zip file, in any of its folders, sorted by name. `dataset.json` may have a label for each."""
    archive = _opened(path)
    names = sorted({name for name in archive.namelist() if is_image_name(name)})  # EDM has the same order
    if not names:
        raise InvalidValue("load_dataset", str(path), f"to hold images ({', '.join(sorted(IMAGE_SUFFIXES))})", "none")
    for name in names:
        _check_entry(path, archive.getinfo(name), _MAX_IMAGE)
    labels = _read_labels(path, archive, names)
    files = ImageFiles(
        root=str(path),
        names=names[:first],
        open=lambda name: archive.open(name),  # type: ignore[arg-type, return-value]
        num_bytes=lambda name: archive.getinfo(name).file_size,
    )
    images, files, preparation = load_images(files, image_size=image_size, skip_broken=skip_broken, memory=memory)
    return ImageDataset(str(path), images, *chosen_labels(labels, names, files.names), files.contents, preparation)


def _opened(path: Path) -> zipfile.ZipFile:
    """Return the open archive.

    All threads share it, as its directory takes half a kilobyte for each image. It locks each read of the file. The count
    of users, by which it would close a file that it had opened itself, is not locked. So the file is opened here.
    """
    file = path.open("rb")
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        file.close()
        raise InvalidValue("load_dataset", str(path), "to be a folder or a whole zip file", error) from error
    weakref.finalize(archive, file.close)
    return archive


def _check_entry(path: Path, entry: zipfile.ZipInfo, largest: int) -> None:
    """Raise a ValueError if a file in the archive is too large or encrypted, before it is unpacked."""
    expect(
        entry.file_size <= largest,
        "load_dataset",
        entry.filename,
        f"to have at most {largest} bytes",
        entry.file_size,
        str(path),
    )
    if entry.flag_bits & 1:
        raise InvalidValue("load_dataset", str(path), "to hold no encrypted files", entry.filename)


def _read_labels(path: Path, archive: zipfile.ZipFile, names: Sequence[str]) -> Tensor | None:
    """Return the label of each name, int64 [N], or None if the archive has none."""
    if LABELS_FILE not in archive.NameToInfo:
        return None
    _check_entry(path, archive.getinfo(LABELS_FILE), MAX_BYTES)
    place = f"{LABELS_FILE} in {path}"
    try:
        content = archive.read(LABELS_FILE)
    except MemoryError:
        raise
    except Exception as error:  # each kind of compression raises errors of its own
        raise InvalidValue("load_dataset", place, "to be whole", error) from error
    return listed_labels(place, parsed_json(place, content), names)
