"""Conditions for drawing: of a data set's items, or read from files for a trained network."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import Ranges, checked_ranges
from ..errors import expect, renaming
from ..ops import sample_seeds
from .degradation import Degradation, masked, resized_bicubically
from .items import ItemDataset, read_batch, to_unit_range
from .load import load_dataset, load_source, read_source


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


def evaluated_images(
    name: str,
    data_dir: str | os.PathLike[str] | None,
    condition: str | None,
    config: Mapping[str, Any],
    channels: int,
    num: int,
    data_range: Ranges | None = None,
    condition_range: Ranges | None = None,
) -> ItemDataset:
    """Return the first test images of a data set as a trained network takes them, with conditions if it reads any.

    Args:
        name: See `load_dataset`.
        data_dir: See `load_dataset`.
        condition: The folder of the conditions, for a network that was trained with such a folder.
        config: Configuration of the network.
        channels: C of the images that it draws.
        num: Number of images.
        data_range: See `load_dataset`, for a network that keeps no range of its images.
        condition_range: The same for its conditions.

    Raises:
        ValueError: The images or the conditions do not fit the network.
    """
    dataset = load_dataset(
        name,
        data_dir,
        split="test",
        image_size=config["sample_size"],
        channels=channels,
        data_range=_kept_range("evaluate", "data_range", config.get("data_range"), data_range),
        condition=condition,
        # Without a condition, its absence is the error, and not the range that the network keeps for it.
        condition_range=condition_range
        if condition is None
        else _kept_range("evaluate", "condition_range", config.get("condition_range"), condition_range),
        first=num,
    )
    reads = config["in_channels"] - channels
    wanted = f"to be given, with {reads} channels, as the model reads" if reads else "to be left out, as the model reads none"
    found = dataset.info.condition_channels
    expect(found == reads, "evaluate", "condition", wanted, f"{found} channels" if found else "none")
    return dataset


def _kept_range(caller: str, name: str, kept: Any, stated: Ranges | None) -> Ranges | None:
    """Return the range that a network keeps, or else the stated one. None: it reads pictures alone."""
    known, given = (None if each is None else checked_ranges(caller, name, each) for each in (kept, stated))
    expect(known is None or given in (None, known), caller, name, f"to be left out, as the model keeps {known}", given)
    return known or given


def read_conditions(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    shape: Sequence[int],
    seed: int = 0,
    *,
    first: int | None = None,
    condition_range: Ranges | None = None,
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
    reads, kept = config["in_channels"] - channels, config.get("condition_range")
    if kind is not None:
        kept = config.get("data_range")
        reads = 1 if kind.name == "grey" else channels
        if kind.name == "mask" and channels in (1, 3) and not source.has_arrays:
            reads = 4  # what is transparent is a hole
    ranges = _kept_range("sample", "condition_range", kept, condition_range)
    with renaming("sample", {"data_range": "condition_range"}):
        dataset = load_source(str(path), source, (height // factor, width // factor), reads, ranges)
    found = dataset.info.shape[0]
    expect(found == reads, "sample", "condition", f"to have {reads} channels", f"{found} in {path}")
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
