"""Items of data sets: written, read together and compared."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ddpm_fast.data.items import Batch, Item, ItemDataset, read_batch
from ddpm_fast.data.load import load_dataset
from ddpm_fast.data.options import DataOptions


def read_data(
    data: Any, data_dir: Any = None, *, split: Any = "train", first: int | None = None, **options: Any
) -> ItemDataset:
    """Load images with these `DataOptions`, of which None stands for a default."""
    given = {"data": data, "data_dir": data_dir} | {name: value for name, value in options.items() if value is not None}
    return load_dataset(DataOptions(**given), split=split, first=first)


def whole(dataset: ItemDataset) -> Batch:
    """Return all items of a data set as a batch."""
    return read_batch(dataset, range(len(dataset)))


def encoded(pixels: np.ndarray) -> bytes:
    """Return a picture [H, W] or [H, W, C] as the bytes of a PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def write(path: Path, content: Any, method: int = zipfile.ZIP_STORED) -> Path:
    """Write bytes, an array (.npy), arrays by name (.npz), or files by name (.zip, or else a folder). Return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".npy":
        np.save(path, content, allow_pickle=True)
    elif path.suffix == ".npz":
        np.savez(path, **content)
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, each in content.items():
                archive.writestr(name, each)
    else:
        for name, each in content.items():
            write(path / name, each)
    return path


def flip_bits(file: Path, place: int, bits: int = 1) -> None:
    """Change bits of the byte at a place of a file."""
    content = bytearray(file.read_bytes())
    content[place] ^= bits
    file.write_bytes(content)


def drawn(dataset: ItemDataset) -> list[torch.Tensor]:
    """Return random numbers of items for some batches of different sizes."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, len(dataset), (size,), generator=generator) for size in (16, 1, 7, 30, 3, 64)]


def assert_equal(found: Batch | Item, wanted: Batch | Item) -> None:
    """Compare two batches or two items, bit for bit."""
    for a, b in zip(found, wanted, strict=True):
        assert type(a) is type(b)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        else:
            assert a == b
