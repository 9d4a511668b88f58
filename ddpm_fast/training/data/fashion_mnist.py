"""Fashion-MNIST and its IDX files."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from ...errors import InvalidValue, expect
from .download import downloaded
from .labels import check_labels

FASHION_MNIST_CLASSES: Final = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
FASHION_MNIST_DEBIAN: Final = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist

_MAX_IDX: Final = 2 << 30  # bytes of an IDX file, unpacked; EMNIST has 0.5 GiB


def read_fashion_mnist(root: Path | None, split: str) -> tuple[Tensor, Tensor]:
    """Return the images, uint8 [N, 1, 28, 28], and their labels, int64 [N]."""
    stem = "train" if split == "train" else "t10k"
    files = [f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"]
    folder = root or FASHION_MNIST_DEBIAN
    found = [_first_file(folder / file, folder / f"{file}.gz") for file in files]
    if found[0] and found[1]:
        images, labels = read_idx(found[0]), read_idx(found[1])
        expect(
            images.dim() == 3 and labels.shape == images.shape[:1] and len(labels),
            "load_dataset",
            "",
            f"images [N, H, W] and labels [N] in {folder}",
            f"{list(images.shape)} and {list(labels.shape)}",
        )
        check_labels(found[1], labels, len(FASHION_MNIST_CLASSES))
    else:
        others = ", or install Debian's package dataset-fashion-mnist"
        source = downloaded("FashionMNIST", root, split, f"{files[0]} and {files[1]} (.gz)", others)
        images, labels = source.data, source.targets
    return images.unsqueeze(1), labels.long()


def read_idx(path: Path) -> Tensor:
    """Read an IDX file of unsigned bytes, gzipped or not: uint8 of the shape in its header."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4)
            if header[:3] != b"\0\0\x08" or len(header) < 4:  # two zeros, then the type code of unsigned bytes
                raise InvalidValue("load_dataset", str(path), "to be an IDX file of unsigned bytes", f"header {header!r}")
            sizes = file.read(4 * header[3])  # byte 3: the number of dimensions
            shape = [int.from_bytes(sizes[i : i + 4], "big") for i in range(0, len(sizes), 4)]
            count = math.prod(shape)
            if len(sizes) < 4 * header[3] or not 1 <= count <= _MAX_IDX:  # before anything of that size is read
                raise InvalidValue("load_dataset", str(path), f"to hold 1 to {_MAX_IDX} bytes", f"a header of shape {shape}")
            content = file.read(count + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InvalidValue("load_dataset", str(path), "to be a whole gzip file", error) from error
    if len(content) != count:
        got = f"{count + 1} or more" if len(content) > count else len(content)
        raise InvalidValue("load_dataset", str(path), f"to hold {shape} bytes", got)
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8).reshape(shape).copy())


def _first_file(*paths: Path) -> Path | None:
    return next((path for path in paths if path.is_file()), None)
