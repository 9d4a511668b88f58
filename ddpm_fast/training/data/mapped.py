"""Any map-style data set of PyTorch as a data set to train on."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Generator, Iterable
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ...errors import InvalidType, InvalidValue
from .decoding import as_rgb

SAMPLED: Final = 64  # items in a sample
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
        methods = (hasattr(source, name) for name in ("__len__", "__getitem__"))
        if isinstance(source, IterableDataset) or not all(methods):
            raise InvalidType("", "dataset", "to be map-style (__len__ and __getitem__)", type(source).__name__)
        if not len(source):
            raise InvalidValue("", "dataset", "to have at least one item", "none")
        self.name = type(source).__name__
        self.classes = ("",) if classes is None else classes
        self._source, self._channels, self._labelled, self._num_workers = source, channels, classes is not None, num_workers
        first = self._image(0, self._item(0)[0])
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
        image, label = self._item(index)
        pixels = self._image(index, image)
        if pixels.dtype != self._dtype or tuple(pixels.shape) != self.shape:
            raise InvalidValue(
                "",
                f"dataset[{index}]",
                f"to be {self._dtype} {list(self.shape)}, as dataset[0]",
                f"{pixels.dtype} {list(pixels.shape)}",
            )
        if not self._labelled:
            return pixels, 0
        try:
            number = operator.index(label)
        except (TypeError, ValueError, RuntimeError):  # a tensor raises all of them
            number = -1
        if not 0 <= number < len(self.classes):
            wanted = f"a label in 0..{len(self.classes) - 1}" if len(self.classes) > 1 else "the label 0"
            raise InvalidValue("", f"dataset[{index}]", f"to have {wanted}", "no label" if label is None else repr(label))
        return pixels, number

    def batches(self, indices: Iterable[Tensor]) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield images, uint8 or float32 [B, C, H, W], and labels, int64 [B], at each of the int64 indices [B].

        Workers read ahead. Close the iterator to stop them.

        Raises:
            ValueError: An item of this batch is wrong.
        """
        loader: DataLoader[Any] = DataLoader(
            _Items(self),
            batch_sampler=(each.tolist() for each in indices),
            num_workers=self._num_workers,
            collate_fn=_stacked,
            generator=torch.Generator(),  # else the loader draws from torch's generator
        )
        try:
            for batch in loader:
                if isinstance(batch, ValueError):
                    raise batch
                yield batch
        except RuntimeError as error:  # a worker was killed
            raise InvalidValue("", "dataset", "to be read by its workers", error) from error

    def fingerprint(self, *, exact: bool = False) -> dict[str, str]:
        """Return SHA-256 digests: "sample" of items at even distances, and "exact" of all items."""
        digests = {}
        for kind in ("sample", "exact") if exact else ("sample",):
            digest = hashlib.sha256(f"{self.shape} {self.classes}".encode())
            for index in range(0, len(self), 1 if kind == "exact" else -(-len(self) // SAMPLED)):
                image, label = self[index]
                digest.update(f"{label}".encode())
                digest.update(image.numpy().tobytes())
            digests[kind] = digest.hexdigest()
        return digests

    def _item(self, index: int) -> tuple[Any, Any]:
        """Return the image and the label of an item, unchecked. The label is None if it has none."""
        try:
            item = self._source[index]
        except Exception as error:  # whatever the data set raises
            raise InvalidValue("", f"dataset[{index}]", "to be an item", f"{type(error).__name__}: {error}") from error
        if not isinstance(item, (tuple, list)):
            return item, None
        if len(item) != 2:
            raise InvalidValue("", f"dataset[{index}]", "to be an image or (image, label)", f"{len(item)} values")
        image, label = item
        return image, label

    def _image(self, index: int, image: Any) -> Tensor:
        """Return an image as uint8 or float32 [C, H, W] on the CPU. Raise a ValueError if it is none."""
        from PIL.Image import Image

        if isinstance(image, Image):
            image = self._pixels(index, image)
        wanted = f"uint8 [{self._channels}, H, W], floats [{self._channels}, H, W] in [-1, 1] or a PIL image"
        if not isinstance(image, Tensor):
            raise InvalidValue("", f"dataset[{index}]", f"to be {wanted}", type(image).__name__)
        floating = image.is_floating_point()
        dense = image.layout is torch.strided and not image.is_nested and not image.is_meta
        shaped = dense and image.dim() == 3 and image.shape[0] == self._channels and image.numel() > 0
        if not shaped or not (floating or image.dtype == torch.uint8):
            shape = list(image.shape) if dense else "without values in a dense layout"
            raise InvalidValue("", f"dataset[{index}]", f"to be {wanted}", f"{image.dtype} {shape}")
        pixels: Tensor = image.detach().cpu().contiguous()
        if not floating:
            return pixels
        pixels = pixels.float()
        low, high = torch.aminmax(pixels)
        if not (low >= -1 - _OUTSIDE and high <= 1 + _OUTSIDE):  # NaN fails too
            raise InvalidValue("", f"dataset[{index}]", "to be in [-1, 1]", f"values from {float(low):g} to {float(high):g}")
        return pixels

    def _pixels(self, index: int, image: Any) -> Tensor:
        """Return a PIL image as uint8 [channels, H, W]."""
        if self._channels not in (1, 3, 4):
            raise InvalidValue(
                "", f"dataset[{index}]", f"to be a tensor, as the network has {self._channels} channels", "a PIL image"
            )
        try:
            converted = image.convert("RGBA") if self._channels == 4 else as_rgb(image, image.format)
        except Exception as error:  # Pillow's formats raise errors of many types
            raise InvalidValue("", f"dataset[{index}]", "to be an image", error) from error
        pixels = np.array(converted.convert("L"))[..., None] if self._channels == 1 else np.array(converted)
        return torch.from_numpy(pixels).permute(2, 0, 1)


class _Items(Dataset[Any]):
    """The items of a data set for a DataLoader. The error of a wrong item stands for it.

    An error that a worker raises would come with the worker's traceback as its text. It would also keep the workers alive.
    """

    def __init__(self, dataset: MappedDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, index: int) -> tuple[Tensor, int] | ValueError:
        try:
            return self._dataset[index]
        except ValueError as error:
            return error.with_traceback(None)


def _stacked(items: list[tuple[Tensor, int] | ValueError]) -> tuple[Tensor, Tensor] | ValueError:
    """Return the items of a batch as two tensors, or the error of the first wrong one."""
    pairs = []
    for item in items:
        if isinstance(item, ValueError):
            return item
        pairs.append(item)
    return torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])
