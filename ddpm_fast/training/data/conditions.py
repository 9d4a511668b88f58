"""Conditions for drawing: of a data set's items, or read from files for a trained network."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from ...errors import expect
from ...ops import sample_seeds
from .dataset import ImageDataset, to_unit_range
from .degradation import Degradation, enlarged, masked
from .loading import DATASETS, is_arrays, load_dataset, load_source, open_source
from .mapped import MappedDataset

_COLORS: Final = {1: "grey", 3: "rgb", 4: "rgba"}


class Conditioned(NamedTuple):
    """Images [N, C, H, W] in [-1, 1], their labels, int64 [N], and what a network reads to draw them, [N, K, H, W]."""

    images: Tensor
    labels: Tensor
    condition: Tensor


def conditioned_items(dataset: ImageDataset | MappedDataset, num: int, seed: int) -> Conditioned:
    """Return items of a data set with conditions, evenly spaced.

    Args:
        dataset: The data set.
        num: Number of items.
        seed: Seed of the boxes of "mask".
    """
    items = [dataset[index * len(dataset) // num] for index in range(num)]
    images, *given = (to_unit_range(torch.stack(tensors)) for tensors in zip(*(item[::2] for item in items), strict=True))
    labels = torch.tensor([item[1] for item in items])
    if isinstance(dataset.condition, Degradation):
        given = [dataset.condition(images, sample_seeds(seed, num))]
    return Conditioned(images, labels, *given)


def evaluated_images(
    name: str,
    data_dir: str | os.PathLike[str] | None,
    condition: str | None,
    config: Mapping[str, Any],
    channels: int,
    num: int,
) -> ImageDataset:
    """Return the first test images of a data set as a trained network takes them, with conditions if it reads any.

    Args:
        name: See `load_dataset`.
        data_dir: See `load_dataset`.
        condition: The folder of the conditions, for a network that was trained with such a folder.
        config: Configuration of the network.
        channels: C of the images that it draws.
        num: Number of images.

    Raises:
        ValueError: The images or the conditions do not fit the network.
    """
    colors = None
    if name not in DATASETS and os.path.exists(name) and not is_arrays(open_source(Path(name), "test")):
        colors = _COLORS.get(channels)
    dataset = load_dataset(
        name,
        data_dir,
        split="test",
        image_size=config["sample_size"],
        colors=colors,
        data_range=config.get("data_range"),
        condition=condition,
        condition_range=config.get("condition_range"),
        first=num,
    )
    got = f"{name!r} with {dataset.shape[0]}"
    expect(dataset.shape[0] == channels, "evaluate", "data", f"to have {channels} channels, as the model has", got)
    reads = config["in_channels"] - channels
    found = dataset.condition_channels
    expect(found == reads, "evaluate", "condition", f"to have {reads} channels, as the model reads", found)
    return dataset


def read_conditions(path: str | os.PathLike[str], config: Mapping[str, Any], shape: Sequence[int], seed: int = 0) -> Tensor:
    """Read the conditions that a trained network reads from a folder or file.

    The network's configuration says what they are. For "low-resolution" they are images of the small size, which are
    enlarged. Others are resized to it first. For "mask" the transparent pixels of images are the holes. An image without
    any gets a random box.

    Args:
        path: Image files or arrays, as `load_dataset` reads them.
        config: Configuration of the network.
        shape: (C, H, W) of an image that it draws.
        seed: Seed of the boxes of "mask".

    Returns:
        float32 [N, K, H, W].

    Raises:
        ValueError: The files do not fit the network, or one cannot be read.
    """
    source = open_source(Path(path), "test")
    channels, sides = shape[0], (shape[1], shape[2])
    degradation, kind = Degradation.named(config.get("condition") or ""), "images"
    reads, value_range = config["in_channels"] - channels, config.get("condition_range")
    if degradation is not None:
        kind, reads, value_range = degradation.name, channels, config.get("data_range")
        reads = {"grey": 1, "mask": 4}.get(kind, reads) if not is_arrays(source) else reads

    def read(size: tuple[int, int]) -> Tensor:
        colors = None
        if not is_arrays(source):
            expect(
                reads in _COLORS, "sample", "condition", f"to be .npy or .npz files of {reads} channels", f"images in {path}"
            )
            colors = _COLORS[reads]
        dataset = load_source(str(path), source, size, colors, value_range)
        expect(dataset.shape[0] == reads, "sample", "condition", f"to have {reads} channels", f"{dataset.shape[0]} in {path}")
        return to_unit_range(dataset.batch(torch.arange(len(dataset)))[0])

    if degradation is None or (kind == "grey" and not is_arrays(source)):
        return read(sides)
    if kind == "low-resolution":
        return enlarged(read((sides[0] // degradation.factor, sides[1] // degradation.factor)), sides)
    images = read(sides)
    seeds = sample_seeds(seed, len(images))
    if kind == "mask" and not is_arrays(source):
        holes = images[:, 3:] < 0
        images = images[:, :3] if channels == 3 else Degradation("grey")(images[:, :3], seeds)
        boxes = Degradation("mask")(images, seeds)[:, -1:] > 0
        return masked(images, torch.where(holes.flatten(1).any(dim=1)[:, None, None, None], holes, boxes))
    return degradation(images, seeds)
