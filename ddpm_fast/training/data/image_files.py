"""Encoded images: all decoded into memory at the start, or batch by batch as they are read."""

from __future__ import annotations

import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from typing import BinaryIO, Final, NamedTuple

import torch
from torch import Tensor

from ...checks import listed
from ...errors import InvalidValue
from ...limits import check_free_memory, free_memory, size_text
from .decoding import AT_ONCE, BYTES_A_PIXEL, SharedPixels, decode, reason, size_of, try_each

RESIZED: Final = "cropped to squares and resized"  # the preparation of images with image_size

IMAGE_SUFFIXES: Final = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})

SAMPLED: Final = 256  # images in a sample, at least

_AHEAD: Final = 4  # batches that are decoded before they are asked for, at most
_A_TASK: Final = 4  # images that a thread decodes before it takes the next task

_log = logging.getLogger("ddpm_fast")


@dataclass(frozen=True)
class ImageFiles:
    """Encoded images by name: files of a folder or an archive, or rows of a table. Several threads may open them.

    Attributes:
        root: Path of the folder, archive or table.
        names: Names in the order of the data set.
        open: A function that opens the file of a name.
        num_bytes: A function that returns the size of the file of a name.
    """

    root: str
    names: Sequence[str]
    open: Callable[[str], BinaryIO]
    num_bytes: Callable[[str], int]

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


@dataclass(frozen=True)
class EncodedImages:
    """Images that are decoded each time they are read. They are indexed like a tensor uint8 [N, 3, size, size].

    Attributes:
        files: The images.
        size: Height and width in pixels.
        memory: Bytes of decoded images that may wait to be used. Two batches may always.
        workers: Number of threads that decode.
    """

    files: ImageFiles
    size: int
    memory: int
    workers: int

    @property
    def shape(self) -> torch.Size:
        """[N, 3, size, size]."""
        return torch.Size((len(self.files.names), 3, self.size, self.size))

    def __getitem__(self, indices: Tensor) -> Tensor:
        with closing(self.batches([indices])) as batches:
            return next(batches)[1]

    def batches(self, indices: Iterable[Tensor]) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield each of the indices, int64 [B], with its images, uint8 [B, 3, size, size].

        Threads decode the next batches in the meantime. Closing the iterator stops them.

        Raises:
            ValueError: An image of this batch cannot be decoded.
        """
        free = free_memory() or 4 << 30
        shared = SharedPixels(min(free // 4, self.memory) // BYTES_A_PIXEL)
        waiting: deque[tuple[Tensor, Tensor, list[Future[None]]]] = deque()
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="ddpm_fast-decode")
        try:
            for batch in indices:
                images = torch.empty(len(batch), *self.shape[1:], dtype=torch.uint8)
                tasks = [
                    pool.submit(self._fill, part, numbers.tolist(), shared)
                    for part, numbers in zip(images.split(_A_TASK), batch.split(_A_TASK), strict=True)
                ]
                waiting.append((batch, images, tasks))
                ahead = min(_AHEAD, max(1, self.memory // max(1, images.nbytes) - 1))  # one more is in use
                del images, tasks
                while len(waiting) > ahead:
                    yield _done(*waiting.popleft())
            while waiting:
                yield _done(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _fill(self, images: Tensor, numbers: Sequence[int], shared: SharedPixels) -> None:
        pixels = images.numpy()  # PyTorch's copies would start threads of their own
        for row, number in enumerate(numbers):
            name = self.files.names[number]
            try:
                with self.files.open(name) as file:
                    pixels[row] = decode(file, self.size, shared)
            except MemoryError:
                raise
            except Exception as error:  # Pillow's formats raise errors of many types
                raise InvalidValue(
                    "load_dataset",
                    "",
                    f"images that Pillow can read in {self.files.root}",
                    f"{name} ({reason(error)}); skip_broken=True (--skip-broken) leaves such images out",
                ) from error


def _done(batch: Tensor, images: Tensor, tasks: Sequence[Future[None]]) -> tuple[Tensor, Tensor]:
    """Return the batch once its tasks are done. Raise the first of their errors."""
    for task in tasks:
        task.result()
    return batch, images


class Loaded(NamedTuple):
    """Images of one size that can be read.

    Attributes:
        images: uint8 [N, 3, H, W], decoded or not.
        files: The files of these images, without the broken ones.
        preparation: What was done to the images' size, in words.
    """

    images: Tensor | EncodedImages
    files: ImageFiles
    preparation: str


def load_images(files: ImageFiles, *, image_size: int | None, skip_broken: bool, memory: int | None) -> Loaded:
    """Load images: decoded if that takes at most `memory` bytes, else with their headers checked.

    Args:
        files: The images.
        image_size: Height and width that images are resized to. By default they must be squares of one size.
        skip_broken: Leave out images that cannot be decoded.
        memory: Bytes that decoded images may take. By default all are decoded.
    """
    names, root = files.names, files.root
    if len(names) > AT_ONCE:
        _log.info("reading %d images in %s", len(names), root)
    broken: dict[str, str] = {}

    def fits(size: int) -> bool:
        return memory is None or len(names) * 3 * size**2 <= memory

    def size_in_header(name: str) -> tuple[int, int]:
        with files.open(name) as file:
            return size_of(file)

    preparation = RESIZED
    if image_size is None or not fits(image_size):
        sizes = try_each(size_in_header, names, broken)
        check_broken(root, names, broken, skip_broken)
        if image_size is None:
            image_size, preparation = _common_size(root, [size for size in sizes if size is not None]), "as they are"
    readable = [name for name in names if name not in broken] if broken else names

    shared = SharedPixels((free_memory() or 4 << 30) // (4 * BYTES_A_PIXEL))  # a quarter of the memory
    needed = len(names) * 3 * image_size**2
    images: Tensor | EncodedImages
    if memory is None or fits(image_size):
        check_free_memory("load_dataset", "image_size", f"{image_size} for {len(names)} images", needed)
        images = torch.empty(len(names), 3, image_size, image_size, dtype=torch.uint8)
        pixels, rows = images.numpy(), {name: row for row, name in enumerate(names)}

        def fill(name: str) -> None:
            with files.open(name) as file:
                pixels[rows[name]] = decode(file, image_size, shared)

        try_each(fill, readable, broken)
    else:
        texts = size_text(needed), size_text(memory)
        _log.info("decoding images in %s batch by batch, as all take %s and data_memory is %s", root, *texts)
        images = EncodedImages(files, image_size, memory, min(32, os.cpu_count() or 1))
        if skip_broken:

            def attempt(name: str) -> None:
                with files.open(name) as file:
                    decode(file, image_size, shared)

            _log.info("decoding all images in %s once, to find broken ones", root)
            try_each(attempt, readable, broken)
    check_broken(root, names, broken, skip_broken)
    if broken:
        _log.warning("%d of %d images in %s left out: %s", len(broken), len(names), root, _reasons(broken))
        whole = [name for name in names if name not in broken]
        files = replace(files, names=whole)
        if isinstance(images, Tensor):
            for row, name in enumerate(whole):  # in place, as there may be no memory for a second copy
                images[row] = images[rows[name]]
            images = images[: len(whole)]
        else:
            images = replace(images, files=files)
    return Loaded(images, files, preparation)


def is_image_name(name: str) -> bool:
    """Return whether a file's name has the ending of an image."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def check_broken(root: str, names: Sequence[str], broken: Mapping[str, str], skip_broken: bool) -> None:
    """Raise a ValueError if there are broken images and they must not be left out, or if there are no others."""
    if broken and (not skip_broken or len(broken) == len(names)):
        raise InvalidValue(
            "load_dataset",
            "",
            f"images that Pillow can read in {root}",
            f"{len(broken)} of {len(names)} that it cannot: {_reasons(broken)}; skip_broken=True (--skip-broken) leaves them "
            "out if others remain",
        )


def _reasons(broken: Mapping[str, str]) -> str:
    """Return the names of the first broken images, with reasons."""
    return listed([f"{name} ({why})" for name, why in broken.items()])


def _common_size(root: str, all_sizes: Sequence[tuple[int, int]]) -> int:
    """Return the side of the squares that all images are. Raise ValueError, with the sizes, if they are not."""
    sizes = Counter(all_sizes)
    (width, height), _ = sizes.most_common(1)[0]
    if len(sizes) == 1 and width == height:
        return width
    listed = ", ".join(f"{width}x{height} ({count})" for (width, height), count in sizes.most_common(5))
    more = f" and {len(sizes) - 5} other sizes" if len(sizes) > 5 else ""
    raise InvalidValue(
        "load_dataset",
        "image_size",
        f"to be given, as the images in {root} are not squares of one size",
        f"None with sizes {listed}{more}; image_size=64 (--image-size 64) crops each to its central square and resizes it to "
        "64x64",
    )
