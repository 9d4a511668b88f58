"""Zip files of images, as the data set tools of EDM and StyleGAN write them. `dataset.json` has the labels."""

from __future__ import annotations

import json
import weakref
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from .dataset import ImageDataset
from .image_files import IMAGE_SUFFIXES, ImageFiles, is_image_name, load_images

LABELS_FILE: Final = "dataset.json"

_MAX_IMAGE: Final = 256 << 20  # bytes of an image's file, unpacked
_MAX_JSON: Final = 256 << 20  # bytes of dataset.json; that of ImageNet has 50 MB
_MAX_LABEL: Final = 65_535  # ImageNet-21k has 21,841 classes


def read_archive(path: Path, image_size: int | None, skip_broken: bool, first: int | None, memory: int | None) -> ImageDataset:
    """Return the images of a zip file, in any of its folders, sorted by name. `dataset.json` may have a label for each."""
    archive = _opened(path)
    names = sorted({name for name in archive.namelist() if is_image_name(name)})  # EDM has the same order
    if not names:
        raise ValueError(f"load_dataset: expected {path} to hold images ({', '.join(sorted(IMAGE_SUFFIXES))}), got none")
    for name in names:
        _check_entry(path, archive.getinfo(name), _MAX_IMAGE)
    labels = _read_labels(path, archive, names) if LABELS_FILE in archive.NameToInfo else None
    files = ImageFiles(
        root=str(path),
        names=names[:first],
        open=lambda name: archive.open(name),  # type: ignore[arg-type, return-value]
        num_bytes=lambda name: archive.getinfo(name).file_size,
    )
    images, files, preparation = load_images(files, image_size=image_size, skip_broken=skip_broken, memory=memory)
    if labels is None:
        none = torch.zeros(len(files.names), dtype=torch.int64)
        return ImageDataset(str(path), images, none, ("",), files.contents, preparation)
    rows = {name: row for row, name in enumerate(names)}
    classes = tuple(map(str, range(int(labels.max()) + 1)))
    labels = labels[[rows[name] for name in files.names]]
    return ImageDataset(str(path), images, labels, classes, files.contents, preparation)


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
        raise ValueError(f"load_dataset: expected {path} to be a folder or a whole zip file, got: {error}") from error
    weakref.finalize(archive, file.close)
    return archive


def _check_entry(path: Path, entry: zipfile.ZipInfo, largest: int) -> None:
    """Raise a ValueError if a file in the archive is too large or encrypted, before it is unpacked."""
    if entry.file_size > largest:
        raise ValueError(
            f"load_dataset: expected {entry.filename} in {path} to have at most {largest} bytes, got {entry.file_size}"
        )
    if entry.flag_bits & 1:
        raise ValueError(f"load_dataset: expected {path} to hold no encrypted files, got {entry.filename}")


def _read_labels(path: Path, archive: zipfile.ZipFile, names: Sequence[str]) -> Tensor | None:
    """Return the label of each name, int64 [N], or None if `dataset.json` has none."""
    _check_entry(path, archive.getinfo(LABELS_FILE), _MAX_JSON)
    place = f"{LABELS_FILE} in {path}"
    try:
        content = json.loads(archive.read(LABELS_FILE))
    except MemoryError:
        raise
    except Exception as error:  # each kind of compression raises errors of its own
        raise ValueError(f"load_dataset: expected {place} to be JSON, got: {error}") from error
    pairs = content.get("labels") if isinstance(content, dict) else content
    if pairs is None:
        return None
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"load_dataset: expected labels in {place} to be a list of pairs [name, label], or null")
    labels: dict[Any, Any] = {pair[0]: pair[1] for pair in pairs if isinstance(pair[0], str)}
    numbers = []
    for name in names:
        label = labels.get(name.replace("\\", "/"))
        if type(label) is not int or not 0 <= label <= _MAX_LABEL:
            got = "a vector" if isinstance(label, list) else "none" if label is None else repr(label)
            raise ValueError(f"load_dataset: expected the label of {name} in {place} to be in 0..{_MAX_LABEL}, got {got}")
        numbers.append(label)
    return torch.tensor(numbers)
