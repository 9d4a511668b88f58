"""Folders of images. The sub-folders are the classes."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import torch

from ...checks import listed
from ...limits import check_free_memory, free_memory
from .dataset import SAMPLED, ImageDataset
from .decoding import AT_ONCE, BYTES_A_PIXEL, SharedPixels, decode, size_of, try_each

RESIZED: Final = "cropped to squares and resized"  # the preparation of a folder's images with image_size

_IMAGE_SUFFIXES: Final = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})

_log = logging.getLogger("ddpm_fast")


def read_folder(root: Path, image_size: int | None, skip_broken: bool, first: int | None) -> ImageDataset:
    """Return the images of a folder and its sub-folders, decoded."""
    files = _image_files(root)
    if not files:
        raise ValueError(f"load_dataset: expected {root} to hold images ({', '.join(sorted(_IMAGE_SUFFIXES))}), got none")
    all_files, files = files, files[:first]
    if len(files) > AT_ONCE:
        _log.info("reading %d images in %s", len(files), root)
    broken: dict[Path, str] = {}
    preparation = RESIZED
    if image_size is None:
        sizes = try_each(size_of, files, broken)
        _check_broken(root, files, broken, skip_broken)
        image_size, preparation = _common_size(root, [size for size in sizes if size is not None]), "as they are"
    needed = len(files) * 3 * image_size**2
    check_free_memory("load_dataset", "image_size", f"{image_size} for {len(files)} images", needed)
    images = torch.empty(len(files), 3, image_size, image_size, dtype=torch.uint8)
    rows = {file: row for row, file in enumerate(files)}

    shared = SharedPixels((free_memory() or 4 << 30) // (4 * BYTES_A_PIXEL))  # a quarter of the memory

    def fill(file: Path) -> None:
        images[rows[file]] = decode(file, image_size, shared)

    try_each(fill, [file for file in files if file not in broken], broken)
    _check_broken(root, files, broken, skip_broken)
    if broken:
        _log.warning("%d of %d images in %s left out: %s", len(broken), len(files), root, _reasons(root, broken))
        whole = [file for file in files if file not in broken]
        for row, file in enumerate(whole):  # in place, as there may be no memory for a second copy
            images[row] = images[rows[file]]
        files, images = whole, images[: len(whole)]
    classes = _class_names(root, [file for file in all_files if file not in broken])
    numbers = {name: number for number, name in enumerate(classes)}
    labels = torch.tensor([numbers[_class_name(root, file)] for file in files])

    def contents(exact: bool) -> Iterator[bytes]:
        for file in files:
            yield os.fsencode(f"{file.relative_to(root)} {file.stat().st_size}\n")
        for file in files if exact else files[:: max(1, len(files) // SAMPLED)]:
            with file.open("rb") as opened:
                while block := opened.read(1 << 20):
                    yield block
                    if not exact:
                        break

    return ImageDataset(str(root), images, labels, classes, contents, preparation)


def _image_files(root: Path) -> list[Path]:
    """Return the files with the endings of images, sorted. Folders, pipes and devices with such names are no images."""

    def fail(error: OSError) -> None:
        raise error  # or a folder that must not be read would be left out in silence

    paths = []
    for folder, folders, names in os.walk(root, onerror=fail):
        links = [name for name in folders if Path(folder, name).is_symlink()]
        if links:  # one may lead to a folder above it
            raise ValueError(f"load_dataset: expected folders without links in {root}, got {str(Path(folder, links[0]))!r}")
        paths += [Path(folder, name) for name in names]
    # A link to nothing is a missing image.
    return sorted(
        path for path in paths if path.suffix.lower() in _IMAGE_SUFFIXES and (path.is_file() or not os.path.exists(path))
    )


def _class_name(root: Path, file: Path) -> str:
    """Return the first folder on the way to an image. Images in `root` itself share one class without a name."""
    return file.relative_to(root).parts[0] if file.parent != root else ""


def _class_names(root: Path, files: Sequence[Path]) -> tuple[str, ...]:
    return tuple(sorted({_class_name(root, file) for file in files}))


def _common_size(root: Path, all_sizes: Sequence[tuple[int, int]]) -> int:
    """Return the side of the squares that all images are. Raise ValueError, with the sizes, if they are not."""
    sizes = Counter(all_sizes)
    (width, height), _ = sizes.most_common(1)[0]
    if len(sizes) == 1 and width == height:
        return width
    listed = ", ".join(f"{width}x{height} ({count})" for (width, height), count in sizes.most_common(5))
    more = f" and {len(sizes) - 5} other sizes" if len(sizes) > 5 else ""
    raise ValueError(
        f"load_dataset: expected image_size, as the images in {root} are not squares of one size, got None with sizes "
        f"{listed}{more}; image_size=64 (--image-size 64) crops each to its central square and resizes it to 64x64"
    )


def _check_broken(root: Path, files: Sequence[Path], broken: Mapping[Path, str], skip_broken: bool) -> None:
    """Raise a ValueError if there are broken images and they must not be left out, or if there are no others."""
    if broken and (not skip_broken or len(broken) == len(files)):
        raise ValueError(
            f"load_dataset: expected images that Pillow can read in {root}, got {len(broken)} of {len(files)} that it cannot: "
            f"{_reasons(root, broken)}; skip_broken=True (--skip-broken) leaves them out if others remain"
        )


def _reasons(root: Path, broken: Mapping[Path, str]) -> str:
    """Return the names of the first broken images, with reasons."""
    return listed([f"{file.relative_to(root)} ({reason})" for file, reason in broken.items()])
