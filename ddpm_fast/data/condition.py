"""Conditions for drawing: of a data set's items, or read from files for a trained network."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import expect, renaming
from ..forms import Pairs
from ..interface import Interface
from ..ops import sample_seeds
from .degradation import Degradation, masked, resized_bicubically
from .items import ItemDataset, read_batch, to_unit_range
from .load import kept_range, load_dataset, load_source, read_source
from .options import DataOptions


class Examples(NamedTuple):
    """Images [N, C, H, W] in [-1, 1], their labels, int64 [N], and what a network reads to draw them, [N, K, H, W]."""

    images: Tensor
    labels: Tensor
    condition: Tensor


def examples(dataset: ItemDataset, indices: Sequence[int], seed: int) -> Examples:
    """Return items of a data set with conditions.

    Args:
        dataset: The data set.
        indices: Their numbers.
        seed: Seed of the boxes of "mask".
    """
    batch = read_batch(dataset, indices)
    images, degradation = to_unit_range(batch.images), dataset.info.condition
    if isinstance(degradation, Degradation):
        return Examples(images, batch.labels, degradation(images, sample_seeds(seed, len(images))))
    assert batch.conditions is not None
    return Examples(images, batch.labels, to_unit_range(batch.conditions))


def evaluated_images(data: DataOptions, config: Mapping[str, Any], num: int) -> ItemDataset:
    """Return the first test images of a data set as a trained network takes them, with conditions if it reads any.

    Args:
        data: The images, and the conditions of a network that was trained with files of conditions.
        config: Configuration of the network.
        num: Number of images.

    Raises:
        ValueError: The images or the conditions do not fit the network.
    """
    dataset = load_dataset(data, split="test", first=num, known=config)
    reads, found = Interface.from_config(config).condition.channels or 0, dataset.info.condition_channels
    wanted = f"to be given, with {reads} channels, as the model reads" if reads else "to be left out, as the model reads none"
    expect(found == reads, "condition", wanted, f"{found} channels" if found else "none")
    return dataset


def read_conditions(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    shape: Sequence[int],
    seed: int = 0,
    *,
    first: int | None = None,
    condition_range: Pairs | None = None,
) -> Tensor:
    """Read the conditions that a trained network reads from a folder or file.

    The network's configuration says what they are. For "low-resolution" they are images, which are resized to the small
    size if they have another, and then enlarged. For "mask" the transparent pixels of images are the holes. An image
    without any gets a random box.

    Args:
        path: Image files or arrays, as `load_dataset` reads them.
        config: Configuration of the network.
        shape: (C, H, W) of an image that it draws.
        seed: Seed of the boxes of "mask".
        first: Read only this many, from the first. None: all.
        condition_range: The two numbers that become -1 and 1, or two for each channel, if the network keeps none.

    Returns:
        float32 [N, K, H, W].

    Raises:
        ValueError: The files do not fit the network, or one cannot be read.
    """
    source = read_source(os.fspath(path), "test")
    source = source.chosen(range(len(source))[:first]) if first else source
    channels, height, width = shape
    kind = Degradation.named(config.get("condition") or "")
    factor = 1 if kind is None else kind.factor
    reads, kept = config["in_channels"] - channels, "condition_range" if kind is None else "data_range"
    if kind is not None:
        reads = 1 if kind.name == "grey" else channels
        if kind.name == "mask" and channels in (1, 3) and not source.has_arrays:
            reads = 4  # what is transparent is a hole
    ranges = kept_range("condition_range", {"condition_range": config.get(kept)}, condition_range)
    with renaming({"data_range": "condition_range"}):
        dataset = load_source(str(path), source, (height // factor, width // factor), reads, ranges)
    found = dataset.info.shape[0]
    expect(found == reads, "condition", f"to have {reads} channels", f"{found} in {path}")
    images = to_unit_range(read_batch(dataset, range(len(dataset))).images)
    if kind is None or kind.name == "grey":
        return images
    if kind.name == "low-resolution":
        return resized_bicubically(images, (height, width))
    seeds = sample_seeds(seed, len(images))
    if reads == channels:
        return kind(images, seeds)
    opacity = (images[:, 3:] + 1) / 2
    flat = images[:, :3] * opacity + 1 - opacity  # on white, as in training
    flat = flat if channels == 3 else Degradation("grey")(flat, seeds)
    holes, boxes = opacity < 0.5, kind(flat, seeds)[:, -1:] > 0
    return masked(flat, torch.where(holes.flatten(1).any(dim=1)[:, None, None, None], holes, boxes))
