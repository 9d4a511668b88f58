"""CIFAR-10, 32x32 pixels."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .download import downloaded


def read_cifar10(root: Path | None, split: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Return the images, uint8 [N, 3, 32, 32], their labels, int64 [N], and the names of the classes."""
    source = downloaded("CIFAR10", root, split, "cifar-10-python.tar.gz")
    images = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()  # [N, 3, 32, 32]
    return images, torch.tensor(source.targets), tuple(source.classes)
