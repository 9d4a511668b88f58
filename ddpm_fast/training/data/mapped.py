"""Any map-style data set of PyTorch as a data set to train on."""

from __future__ import annotations

import operator
import signal
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ...errors import InvalidType, InvalidValue, expect
from .dataset import digests
from .image_files import as_rgb

_SAMPLED: Final = 64  # items in a sample
_OUTSIDE: Final = 1e-3  # the range's ends are rounded


class MappedDataset:
    """The items of a map-style data set, checked, with the methods of `ImageDataset` that training uses.

    An item must be a function of its index. Then a resumed run trains on the images of an uninterrupted one, and the
    fingerprint is the data set's.

    Args:
        source: An object with `__len__` and `__getitem__(int)`. See `Trainer` for its items.
        channels: Channels of an image. PIL images are converted to them.
        classes: Names of the classes. None: the images carry no labels, and those of the items are ignored.
        num_workers: Number of processes that read items. 0: this process.

    Raises:
        TypeError: The data set is not map-style.
        ValueError: The data set is empty, or its first item is not an image. The message names the item.
    """

    preparation: Final = "as they are"

    def __init__(self, source: Any, channels: int, classes: tuple[str, ...] | None, num_workers: int = 0) -> None:
        if isinstance(source, IterableDataset) or not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
            raise InvalidType("", "dataset", "to be map-style (__len__ and __getitem__)", type(source).__name__)
        expect(len(source), "", "dataset", "to have at least one item", "none")
        self.name = type(source).__name__
        self.classes = ("",) if classes is None else classes
        self._source, self._channels, self._labelled, self._num_workers = source, channels, classes is not None, num_workers
        first = self._image("dataset[0]", self._item("dataset[0]", 0)[0])
        self.shape: tuple[int, int, int] = (first.shape[0], first.shape[1], first.shape[2])
        self._dtype = first.dtype
        self[0]  # checks its label, too

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image, uint8 or float32 [C, H, W], and its label.

        Raises:
            ValueError: The item cannot be read, or is not such an image and label.
        """
        place = f"dataset[{index}]"
        image, label = self._item(place, index)
        pixels = self._image(place, image)
        wanted, got = (f"{dtype} {list(shape)}" for dtype, shape in ((self._dtype, self.shape), (pixels.dtype, pixels.shape)))
        expect(got == wanted, "", place, f"to be {wanted}, as dataset[0]", got)
        try:
            number = operator.index(label)
        except (TypeError, ValueError, RuntimeError):  # a tensor raises all of them
            number = -1
        if not 0 <= number < len(self.classes):
            labels = f"a label in 0..{len(self.classes) - 1}" if len(self.classes) > 1 else "the label 0"
            raise InvalidValue("", place, f"to have {labels}", "no label" if label is None else repr(label))
        return pixels, number

    def batches(self, indices: Iterable[Tensor]) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield images, uint8 or float32 [B, C, H, W], and labels, int64 [B], at each of the int64 indices [B].

        Workers read ahead. Close the iterator to stop them.

        Raises:
            ValueError: An item of this batch is wrong, or a worker process ended.
        """
        loader: DataLoader[Any] = DataLoader(
            _Batches(self),
            batch_size=None,
            sampler=(each.tolist() for each in indices),
            num_workers=self._num_workers,
            generator=torch.Generator(),  # else the loader draws from torch's generator
        )
        try:
            batches = iter(loader)
            with _lost_workers_left_to_next() if self._num_workers else nullcontext():
                for batch in batches:
                    if isinstance(batch, ValueError):
                        raise batch
                    yield batch[0], batch[1]
        except RuntimeError as error:  # a worker was killed, or has called sys.exit
            raise InvalidValue("", "dataset", "to be read by its workers", error) from error

    def fingerprint(self, *, exact: bool = False) -> dict[str, str]:
        """Return SHA-256 digests: "sample" of items at even distances, and "exact" of all items."""

        def contents(exact: bool) -> Iterator[bytes]:
            for index in range(0, len(self), 1 if exact else -(-len(self) // _SAMPLED)):
                image, label = self[index]
                yield str(label).encode()
                yield image.numpy().tobytes()

        return digests(f"{self.shape} {self.classes}", contents, exact)

    def _item(self, place: str, index: int) -> tuple[Any, Any]:
        """Return the image and the label of an item, unchecked. The label is None if it has none, and 0 if it is ignored."""
        try:
            item = self._source[index]
        except Exception as error:  # whatever the data set raises
            raise InvalidValue("", place, "to be an item", f"{type(error).__name__}: {error}") from error
        pair = item if isinstance(item, (tuple, list)) else (item, None)
        expect(len(pair) == 2, "", place, "to be an image or (image, label)", f"{len(pair)} values")
        return pair[0], pair[1] if self._labelled else 0

    def _image(self, place: str, image: Any) -> Tensor:
        """Return an image as uint8 or float32 [C, H, W] on the CPU. Raise a ValueError if it is none."""
        from PIL.Image import Image

        if isinstance(image, Image):
            image = self._pixels(place, image)
        wanted = f"to be uint8 [{self._channels}, H, W], floats [{self._channels}, H, W] in [-1, 1] or a PIL image"
        if not isinstance(image, Tensor):
            raise InvalidValue("", place, wanted, type(image).__name__)
        dense = image.layout is torch.strided and not image.is_nested and not image.is_meta
        shaped = dense and image.dim() == 3 and image.shape[0] == self._channels and image.numel() > 0
        shape = list(image.shape) if dense else "without values in a dense layout"
        expect(
            shaped and (image.is_floating_point() or image.dtype == torch.uint8), "", place, wanted, f"{image.dtype} {shape}"
        )
        pixels: Tensor = image.detach().cpu().contiguous()
        if pixels.is_floating_point():
            pixels = pixels.float()
            low, high = map(float, torch.aminmax(pixels))
            inside = low >= -1 - _OUTSIDE and high <= 1 + _OUTSIDE  # NaN is not
            expect(inside, "", place, "to be in [-1, 1]", f"values from {low:g} to {high:g}")
        return pixels

    def _pixels(self, place: str, image: Any) -> Tensor:
        """Return a PIL image as uint8 [channels, H, W]."""
        expect(
            self._channels in (1, 3, 4),
            "",
            place,
            f"to be a tensor, as the network has {self._channels} channels",
            "a PIL image",
        )
        try:
            converted = image.convert("RGBA") if self._channels == 4 else as_rgb(image, image.format)
        except Exception as error:  # Pillow's formats raise errors of many types
            raise InvalidValue("", place, "to be an image", error) from error
        pixels = np.array(converted.convert("L"))[..., None] if self._channels == 1 else np.array(converted)
        return torch.from_numpy(pixels).permute(2, 0, 1)


@contextmanager
def _lost_workers_left_to_next() -> Iterator[None]:
    """Do without PyTorch's handler of SIGCHLD, which would raise in the middle of a training step.

    `next` of a DataLoader's iterator notices a lost worker within seconds.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield  # there is no handler, or it raises in another thread
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


class _Batches(Dataset[Any]):
    """The batches of a data set for a DataLoader. The error of a wrong item stands for its batch.

    An error that a worker raises would come with the worker's traceback as its text. It would also keep the workers alive.
    """

    def __init__(self, dataset: MappedDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor] | ValueError:
        try:
            images, labels = zip(*(self._dataset[index] for index in indices), strict=True)
        except ValueError as error:
            return error.with_traceback(None)
        return torch.stack(images), torch.tensor(labels)
