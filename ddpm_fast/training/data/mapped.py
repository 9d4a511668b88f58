"""Any map-style data set of PyTorch as a data set to train on."""

from __future__ import annotations

import operator
import signal
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from ...errors import InvalidType, InvalidValue, expect
from .dataset import ImageDataset, digests
from .image_files import GREY, as_rgb

_SAMPLED: Final = 64  # items in a sample
_OUTSIDE: Final = 1e-3  # the range's ends are rounded


class MappedDataset:
    """The items of a map-style data set, checked, with the methods of `ImageDataset` that training uses.

    An item must be a function of its index. Then a resumed run trains on the images of an uninterrupted one, and the
    fingerprint is the data set's.

    Args:
        source: An object with `__len__` and `__getitem__(int)`. See `Trainer` for its items.
        channels: Channels of an image. PIL images are converted to them. None: those of the first item.
        reads: Channels that the network reads: those of an image and its condition. None: any number.
        classes: Names of the classes. None: the images carry no labels, and those of the items are ignored.
        num_workers: Number of processes that read items. 0: this process.

    Raises:
        TypeError: The data set is not map-style.
        ValueError: The data set is empty, or its first item is not an image. The message names the item.
    """

    preparation: Final = "as they are"
    condition: Final = None  # none that is computed from the images

    def __init__(
        self,
        source: Any,
        channels: int | None,
        classes: tuple[str, ...] | None,
        num_workers: int = 0,
        reads: int | None = None,
    ) -> None:
        if isinstance(source, IterableDataset) or not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
            raise InvalidType("", "dataset", "to be map-style (__len__ and __getitem__)", type(source).__name__)
        expect(len(source), "", "dataset", "to have at least one item", "none")
        self.name = type(source).__name__
        self.classes = ("",) if classes is None else classes
        self._source, self._labelled, self._num_workers = source, classes is not None, num_workers
        self._channels = channels
        image, _, given = self._item("dataset[0]", 0)
        first = self._image("dataset[0]", image, channels)
        free = None if reads is None else reads - first.shape[0]
        wanted = "to have no condition, as the network reads its channels alone"
        if free:
            wanted = f"to have a condition of {free} channels, as the network reads {reads} and the image has {first.shape[0]}"
        expect(free is None or (free > 0) == (given is not None), "", "dataset[0]", wanted, "none" if free else "one")
        condition = None if given is None else self._condition("dataset[0]", given, free, first.shape[1:])
        self.shape = tuple(first.shape)
        self.condition_channels = 0 if condition is None else condition.shape[0]
        self._kinds = [_kind(each) for each in (first, condition)]
        self[0]  # checks its label, too

    @property
    def described(self) -> dict[str, Any]:
        """Entries of a network's configuration: the kind of condition, and the ranges of the data set that this is part of."""
        source = self._source
        while isinstance(source, Subset):
            source = source.dataset
        kept = source.described if isinstance(source, ImageDataset) else {}
        return kept | {"condition": "images" if self.condition_channels else None}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """Return an image, uint8 or float32 [C, ...], its label, and its condition [K, ...] if it has one.

        Raises:
            ValueError: The item cannot be read, or is not such an image and label.
        """
        place = f"dataset[{index}]"
        image, label, given = self._item(place, index)
        pixels = self._image(place, image, self.shape[0])
        condition = None if given is None else self._condition(place, given, self.condition_channels, pixels.shape[1:])
        for wanted, each in zip(self._kinds, (pixels, condition), strict=True):
            expect(_kind(each) == wanted, "", place, f"to be {wanted}, as dataset[0]", _kind(each))
        try:
            number = operator.index(label)
        except (TypeError, ValueError, RuntimeError):  # a tensor raises all of them
            number = -1
        if not 0 <= number < len(self.classes):
            labels = f"a label in 0..{len(self.classes) - 1}" if len(self.classes) > 1 else "the label 0"
            raise InvalidValue("", place, f"to have {labels}", "no label" if label is None else repr(label))
        return (pixels, number) if condition is None else (pixels, number, condition)

    def batches(self, indices: Iterable[Tensor]) -> Generator[tuple[Tensor, ...], None, None]:
        """Yield images [B, C, ...], labels, int64 [B], and conditions [B, K, ...] if there are any, at int64 indices [B].

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
        batches, lost = iter(loader), None
        with _lost_workers_left_to_next() if self._num_workers else nullcontext():
            try:
                for batch in batches:
                    if isinstance(batch, ValueError):
                        raise batch
                    yield tuple(batch)
            except (RuntimeError, OSError, EOFError) as error:  # a worker was killed, or has called sys.exit
                lost = RuntimeError(str(error) or type(error).__name__)  # the error's frames would keep the workers alive
            finally:
                del batches  # ends the workers while nobody watches them
        if lost is not None:
            raise InvalidValue("", "dataset", "to be read by its workers", lost) from lost

    def fingerprint(self, *, exact: bool = False) -> dict[str, str]:
        """Return SHA-256 digests: "sample" of items at even distances, and "exact" of all items."""

        def contents(exact: bool) -> Iterator[bytes]:
            for index in range(0, len(self), 1 if exact else -(-len(self) // _SAMPLED)):
                image, label, *condition = self[index]
                yield str(label).encode()
                yield from (each.numpy().tobytes() for each in (image, *condition))

        return digests(f"{self.shape} {self.classes}", contents, exact)

    def _item(self, place: str, index: int) -> tuple[Any, Any, Any]:
        """Return the image, label and condition of an item, unchecked, None for what it lacks. An ignored label is 0."""
        try:
            item = self._source[index]
        except Exception as error:  # whatever the data set raises
            raise InvalidValue("", place, "to be an item", f"{type(error).__name__}: {error}") from error
        if isinstance(item, Mapping):
            unknown = item.keys() - {"image", "label", "condition"}
            expect(
                "image" in item and not unknown, "", place, "to have image, label and condition", f"{', '.join(map(str, item))}"
            )
            item = (item["image"], item.get("label"), item.get("condition"))
        parts = tuple(item) if isinstance(item, (tuple, list)) else (item,)
        expect(
            1 <= len(parts) <= 3,
            "",
            place,
            "to be an image, (image, label) or (image, label, condition)",
            f"{len(parts)} values",
        )
        image, label, condition = (*parts, None, None)[:3]
        return image, label if self._labelled else 0, condition

    def _image(self, place: str, image: Any, channels: int | None) -> Tensor:
        """Return an image as uint8 or float32 [C, ...] on the CPU. Raise a ValueError if it is none."""
        count = "C" if channels is None else channels
        shapes = f"[{count}, H, W]" if channels is not None else "[C, H, W] (or [C, L], [C, D, H, W])"
        pixels = _tensor(place, image, channels, f"to be uint8 {shapes}, floats {shapes} in [-1, 1] or a PIL image")
        if pixels.is_floating_point():
            low, high = map(float, torch.aminmax(pixels))
            inside = low >= -1 - _OUTSIDE and high <= 1 + _OUTSIDE  # NaN is not
            expect(inside, "", place, "to be in [-1, 1]", f"values from {low:g} to {high:g}")
        return pixels

    def _condition(self, place: str, condition: Any, channels: int | None, sides: Sequence[int]) -> Tensor:
        """Return a condition as uint8 or float32 [K, ...] on the CPU. Raise a ValueError if it is none."""
        size = ", ".join(map(str, ["K" if channels is None else channels, *sides]))
        wanted = f"to have a condition of uint8 or finite floats [{size}], or a PIL image"
        values = _tensor(place, condition, channels, wanted)
        fits = values.shape[1:] == tuple(sides) and (not values.is_floating_point() or bool(values.isfinite().all()))
        expect(
            fits,
            "",
            place,
            wanted,
            f"{values.dtype} {list(values.shape)}" if values.shape[1:] != tuple(sides) else "NaN or infinity",
        )
        return values


def _tensor(place: str, image: Any, channels: int | None, wanted: str) -> Tensor:
    """Return a tensor or a PIL image as uint8 or float32 [C, ...] on the CPU."""
    from PIL.Image import Image

    if isinstance(image, Image):
        image = _pixels(place, image, channels)
    if not isinstance(image, Tensor):
        raise InvalidValue("", place, wanted, type(image).__name__)
    dense = image.layout is torch.strided and not image.is_nested and not image.is_meta
    shaped = dense and image.dim() >= 2 and image.numel() > 0 and channels in (None, image.shape[0])
    shape = list(image.shape) if dense else "without values in a dense layout"
    expect(shaped and (image.is_floating_point() or image.dtype == torch.uint8), "", place, wanted, f"{image.dtype} {shape}")
    values: Tensor = image.detach().cpu().contiguous()
    return values.float() if values.is_floating_point() else values


def _pixels(place: str, image: Any, channels: int | None) -> Tensor:
    """Return a PIL image as uint8 [channels, H, W]."""
    channels = channels or (1 if image.mode in GREY else 4 if image.mode == "RGBA" else 3)
    expect(channels in (1, 3, 4), "", place, f"to be a tensor, as there are {channels} channels", "a PIL image")
    try:
        converted = as_rgb(image, image.format, alpha=channels == 4)
    except Exception as error:  # Pillow's formats raise errors of many types
        raise InvalidValue("", place, "to be an image", error) from error
    pixels = np.array(converted.convert("L"))[..., None] if channels == 1 else np.array(converted)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _kind(values: Tensor | None) -> str:
    return "without a condition" if values is None else f"{values.dtype} {list(values.shape)}"


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

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, ...] | ValueError:
        try:
            images, labels, *conditions = zip(*(self._dataset[index] for index in indices), strict=True)
        except ValueError as error:
            return error.with_traceback(None)
        return torch.stack(images), torch.tensor(labels), *map(torch.stack, conditions)
