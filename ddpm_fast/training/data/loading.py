"""Load a data set by its name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from torch.nn import functional

from ...checks import check_choice, check_int
from ...errors import InvalidValue
from .archive import read_archive
from .cifar10 import read_cifar10
from .dataset import ImageDataset, in_memory
from .digits import read_digits
from .fashion_mnist import FASHION_MNIST_CLASSES, read_fashion_mnist
from .folder import read_folder
from .hub import is_hub_folder, read_hub_folder

DATASETS: Final = ("digits", "fashion-mnist", "cifar10")


def load_dataset(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    split: str = "train",
    image_size: int | None = None,
    skip_broken: bool = False,
    first: int | None = None,
    memory: int | None = None,
) -> ImageDataset:
    """Load a data set by name.

    Images are decoded at once, so broken ones are found before any work. Images that take more than `memory` bytes are
    decoded batch by batch. Then only their headers are read at once, unless `skip_broken` is true.

    Args:
        name: "digits" (scikit-learn's 8x8 digits, no download), "fashion-mnist" (28x28, padded with black to 32x32),
            "cifar10" (32x32), or a path. A folder's sub-folders are its classes. If a folder or zip file has a
            `dataset.json`, as EDM and `write_samples` write it, the labels are those in it. A folder that Hugging Face's
            `datasets` has saved needs the `hub` extra.
        data_dir: Folder that holds the files of fashion-mnist or cifar10, or receives torchvision's download. CIFAR-10 may
            be the binary or the Python version, unpacked or not. By default the files of Debian's package
            dataset-fashion-mnist if installed, else a folder in the user's cache.
        split: "train" or "test". A folder or zip file of images has no split: all of it is read.
        image_size: Height and width in pixels. Images of another size are resized. Those of a folder are first cropped to
            their central square. By default nothing is resized, and a folder's images must be squares of one size.
        skip_broken: Leave out images of a folder or zip file that cannot be read, and log a warning that names the first of
            them.
        first: Read only this many images of a folder or zip file, from the first. By default all are read.
        memory: Bytes that decoded images may take. More are decoded, or resized, as they are read. By default all are
            held in memory.

    Raises:
        ValueError: The name, split or size is unknown, the images' sizes differ, no image was found, a file is damaged, or
            the images do not fit into memory.
        OSError: A download failed.
        ImportError: A package of the `train` or `hub` extra is missing.
    """
    check_choice("load_dataset", "split", split, ("train", "test"))
    check_int("load_dataset", "image_size", image_size, 1, optional=True)
    check_int("load_dataset", "first", first, 1, optional=True)
    check_int("load_dataset", "memory", memory, 0, optional=True)
    root = None if data_dir is None else Path(data_dir)
    if name == "digits":
        return in_memory(name, *read_digits(split), tuple("0123456789"), image_size, memory)
    if name == "fashion-mnist":
        images, labels = read_fashion_mnist(root, split)
        padding = 2 if image_size != 28 else 0  # 32 = 2^5: a U-Net halves the size several times
        padded = functional.pad(images, [padding] * 4)
        preparation = "padded with black from 28x28" if padding else "as they are"
        return in_memory(name, padded, labels, FASHION_MNIST_CLASSES, image_size, memory, preparation)
    if name == "cifar10":
        return in_memory(name, *read_cifar10(root, split), image_size, memory)
    if is_hub_folder(Path(name)):
        return read_hub_folder(Path(name), split, image_size, skip_broken, first, memory)
    if Path(name).is_dir():
        return read_folder(Path(name), image_size, skip_broken, first, memory)
    if Path(name).is_file():
        return read_archive(Path(name), image_size, skip_broken, first, memory)
    missing = "" if os.path.exists(name) else ", which does not exist"
    raise InvalidValue(
        "load_dataset", "name", f"to be one of {', '.join(DATASETS)}, a zip file or a folder", f"{name!r}{missing}"
    )
