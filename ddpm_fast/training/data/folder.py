"""Folders of images. The sub-folders are the classes, unless a `dataset.json` has labels."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ...errors import InvalidValue
from .dataset import ImageDataset
from .image_files import IMAGE_SUFFIXES, ImageFiles, is_image_name, load_images
from .labels import LABELS_FILE, MAX_BYTES, chosen_labels, listed_labels, parsed_json


def read_folder(root: Path, image_size: int | None, skip_broken: bool, first: int | None, memory: int | None) -> ImageDataset:
    """Return the images of a folder and its sub-folders."""
    names = _image_names(root)
    if not names:
        raise InvalidValue("load_dataset", str(root), f"to hold images ({', '.join(sorted(IMAGE_SUFFIXES))})", "none")
    place = str(root / LABELS_FILE)
    values = _labels_file(root)
    labels = listed_labels(place, values, names) if values is not None else None
    files = ImageFiles(
        root=str(root),
        names=names[:first],
        open=lambda name: (root / name).open("rb"),
        num_bytes=lambda name: (root / name).stat().st_size,
    )
    images, files, preparation = load_images(files, image_size=image_size, skip_broken=skip_broken, memory=memory)
    if values is not None:
        return ImageDataset(str(root), images, *chosen_labels(labels, names, files.names), files.contents, preparation)
    others = names[first:] if first else []
    classes = tuple(sorted({_class_name(name) for part in (files.names, others) for name in part}))
    numbers = {name: number for number, name in enumerate(classes)}
    by_folder = torch.tensor([numbers[_class_name(name)] for name in files.names])
    return ImageDataset(str(root), images, by_folder, classes, files.contents, preparation)


def _labels_file(root: Path) -> dict[str, Any] | None:
    """Return the content of the folder's `dataset.json`, or None if there is none, or one of another kind."""
    file = root / LABELS_FILE
    if not file.exists():
        return None
    if not file.is_file() or file.stat().st_size > MAX_BYTES:
        got = f"{file.stat().st_size} bytes" if file.is_file() else "none"
        raise InvalidValue("load_dataset", str(file), f"to be a file of at most {MAX_BYTES} bytes", got)
    values = parsed_json(str(file), file.read_bytes())
    return values if isinstance(values, dict) and "labels" in values else None


def _image_names(root: Path) -> list[str]:
    """Return the paths of files with the endings of images, relative to `root` and sorted by their parts.

    Folders, pipes and devices with such names are no images. Paths are texts, which take less memory than `Path`s.
    """
    names = [os.path.relpath(path, root) for path in _image_paths(root)]
    return sorted(names, key=lambda name: name.replace(os.sep, "\0"))  # a folder's files come before those of "folder-2"


def _image_paths(root: Path) -> Iterable[str]:
    def fail(error: OSError) -> None:
        raise error  # or a folder that must not be read would be left out in silence

    for folder, folders, names in os.walk(root, onerror=fail):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        if links:  # one may lead to a folder above it
            raise InvalidValue("load_dataset", "", f"folders without links in {root}", repr(os.path.join(folder, links[0])))
        for name in filter(is_image_name, names):
            path = os.path.join(folder, name)
            if os.path.isfile(path) or not os.path.exists(path):  # a link to nothing is a missing image
                yield path


def _class_name(name: str) -> str:
    """Return the first folder on the way to an image. Images in the root itself share one class without a name."""
    return name.partition(os.sep)[0] if os.sep in name else ""
