"""scikit-learn's digits, 8x8 pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from .download import import_extra


def read_digits(split: str) -> tuple[Tensor, Tensor]:
    """Return the images, uint8 [N, 1, 8, 8], and their labels, int64 [N]."""
    digits = import_extra("sklearn.datasets").load_digits()
    part = slice(None, 1500) if split == "train" else slice(1500, None)
    images = torch.from_numpy(digits.images[part]).unsqueeze(1)  # [N, 1, 8, 8], 0..16
    return (images * (255 / 16)).round().to(torch.uint8), torch.from_numpy(digits.target[part]).long()
