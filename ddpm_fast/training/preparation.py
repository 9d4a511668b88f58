"""The network and the images of a run: made from options, and checked that they fit each other."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..checks import check_int
from ..data.items import DatasetInfo, ItemDataset, size_of
from ..data.load import load_dataset
from ..data.options import DataOptions
from ..data.published import DATASETS
from ..data.user_dataset import UserDataset
from ..errors import InvalidValue, expect, renaming
from ..inference import interface_of
from ..inference.model import device_and_dtype, evaluation_mode, predict
from ..interface import Interface, Labels, check_sides, side_multiple
from ..nn import UNet
from ..nn.unet import describe_images
from ..schedule import NoiseSchedule, Objective
from .options import ModelOptions, TrainOptions
from .run import Run

_LEAST_IN_GROUP: Final = 4
"""Channels that a norm's group needs. A norm subtracts its group's mean, and with it what is common to the group's channels:
of what the time embedding adds to them, all is lost with one channel, and half with two."""

_log = logging.getLogger("ddpm_fast")


def run_objective(schedule: NoiseSchedule | Objective, options: TrainOptions) -> Objective:
    """Return the objective of a run, which the schedule or the options have."""
    if isinstance(schedule, Objective):
        objective = schedule
        for name in ("prediction", "variance", "loss_weight"):
            given = getattr(options, name)
            left_out = given == getattr(TrainOptions, name)
            expect(left_out, f"options.{name}", "to be left out, as schedule is an Objective", given)
    else:
        objective = Objective(schedule, options.prediction, options.variance, options.loss_weight)
    if options.sample_every:
        check_int("sample_steps", options.sample_steps, 1, objective.schedule.num_timesteps, optional=True)
    return objective


def built_from(run: Run, data: DataOptions, model: ModelOptions) -> tuple[UNet, ItemDataset]:
    """Return the network and the images that options describe."""
    stored = {} if run.stored is None else run.stored["unet"]
    # The size of a run that goes on is not known here: images of another size are an error, and are not resized.
    kept = {name: stored.get(name) for name in ("data_range", "condition_range")} if stored else None
    load = partial(load_dataset, data, known=kept)
    dataset = run.processes.machine_by_machine(load) if data.data in DATASETS else load()  # rank 0 downloads
    config = _unet_config(model, dataset.info, run.objective, stored)
    with torch.random.fork_rng([]), renaming({"block_out_channels": "channels", "attention_head_dim": "head_dim"}):
        torch.manual_seed(run.rng.weights_seed)
        network = UNet(**config)
        if model.weak_shortcuts:
            network.weaken_shortcuts()
        return network, dataset


def prepared(
    model: nn.Module,
    objective: Objective,
    dataset: Dataset[Any],
    num_classes: int | None = None,
) -> tuple[ItemDataset, Labels]:
    """Return a data set as training uses it, and the labels that the network is given.

    A `UNet` gets the description of the images into its configuration.

    Raises:
        ValueError: The network cannot be trained, or does not fit the images.
    """
    _check_trainable(model)
    if isinstance(model, UNet):
        expect(num_classes is None, "num_classes", "to be None, as model has num_class_embeds", num_classes)
    reads = interface_of(model).labels if isinstance(model, UNet) else Labels.of_number(num_classes)
    adapted = _as_items(dataset, model, objective, reads)
    info = adapted.info
    labels = info.labels if reads.reads else Labels()
    _ = objective.loss_weights  # a ValueError if they are not determined
    if objective.predicts_variance:
        _ = objective.bound_columns  # a ValueError if x_0^ is not determined
        kind = info.dtype
        wanted = "to have uint8 images, as the bound that trains a learned variance is one of 256 grey levels"
        expect(kind == torch.uint8, "dataset", wanted, kind)
    if isinstance(model, UNet):
        _warn_of_small_groups(model)
        _check_fit(model, info, objective)
        stored = labels.stored
        describe_images(model, info.shape[1:], info.described | {key: stored[key] for key in labels.KEYS})
    else:
        number = len(info.classes)
        expect(num_classes in (None, number), "num_classes", f"to be {number}, the classes of dataset", num_classes)
        _check_call(model, info, objective, labels)
    return adapted, labels


def _check_trainable(model: nn.Module) -> None:
    """Raise a ValueError unless the network can be trained, and checkpoints can hold it and its optimizer's state."""
    if isinstance(model, UNet):
        wanted = "to have num_class_embeds = None or the number of classes plus one"
        expect(model.config["num_class_embeds"] != 1, "model", wanted, "1")
    for name, parameter in model.named_parameters():
        got = f'{parameter.dtype} in {name}; use precision="bf16" for speed'
        expect(parameter.dtype == torch.float32, "model", "to be float32", got)
        expect(not parameter.is_meta, "model", "to have weights", f"{name} on the meta device")
        trained = parameter.requires_grad or not isinstance(model, UNet)
        expect(trained, "model", "to have parameters that require gradients", f"{name} without")
    for name, value in model.state_dict().items():
        expect(isinstance(value, Tensor), "model", "to have a state_dict of tensors", f"a {type(value).__name__} in {name}")
    trained = any(parameter.requires_grad for parameter in model.parameters())
    expect(trained, "model", "to have parameters that require gradients", "none")


def _as_items(dataset: Any, model: nn.Module, objective: Objective, reads: Labels) -> ItemDataset:
    """Return a data set as training uses it. The network says which images and labels are wanted."""
    if isinstance(dataset, ItemDataset):
        return dataset
    config = model.config if isinstance(model, UNet) else {}
    # The names are the network's, those that torchvision's data sets have, or numbers.
    labels = reads.of_data(config.get("class_names"), getattr(dataset, "classes", None))
    interface = Interface.from_config(config, predicts_variance=objective.predicts_variance)
    odd = objective.predicts_variance and (interface.predicted_channels or 0) % 2
    wanted = "to have an even number of out_channels, to predict the variance too"
    expect(not odd, "model", wanted, interface.predicted_channels)
    return UserDataset(dataset, interface.channels, labels, interface.read_channels)


def _warn_of_small_groups(model: UNet) -> None:
    """Say so if norms take away what the time embedding, which has the class, adds before them."""
    width, groups = min(model.config["block_out_channels"]), model.config["norm_num_groups"]
    if model.config["resnet_time_scale_shift"] == "default" and width < _LEAST_IN_GROUP * groups:
        _log.warning(
            "the network's level of %d channels has %d groups, so its norms take away much of the timestep and the class: "
            "choose norm_num_groups (--groups) of at most %d",
            *(width, groups, max(1, width // _LEAST_IN_GROUP)),
        )


def _check_fit(model: UNet, info: DatasetInfo, objective: Objective) -> None:
    """Raise a ValueError unless the network takes the images and labels, and returns the channels that the objective needs."""
    for name, value in info.described.items():
        known = model.config.get(name)
        expect(known in (None, value), "dataset", f"to have the {name} of model, {known}", value)
    expect(len(info.shape) == 3, "dataset", "to have images [C, H, W] for a UNet", list(info.shape))
    channels, height, width = info.shape
    reads, of = channels + info.condition_channels, "the images of dataset"
    predicted = f"{of} and their variance" if objective.predicts_variance else of
    interface = interface_of(model, predicts_variance=objective.predicts_variance)
    for name, found, number, whose in (
        ("out_channels", interface.predicted_channels, objective.out_channels(channels), predicted),
        ("in_channels", interface.read_channels, reads, f"{of} and their conditions" if reads > channels else of),
    ):
        expect(found == number, "model", f"to have {name} = {number}, as {whose}", found)
    check_sides("dataset", (height, width), interface.multiple)
    info.labels.check_trained(interface.labels)


def _check_call(model: nn.Module, info: DatasetInfo, objective: Objective, labels: Labels) -> None:
    """Raise a ValueError unless a network takes two items of the data set's shape and predicts the objective's channels."""
    device, _ = device_and_dtype(model)
    channels, *sides = info.shape
    x = torch.zeros(2, channels + info.condition_channels, *sides, device=device)
    t = torch.zeros(2, dtype=torch.int64, device=device)
    ends = labels.ends()
    returned = [2, objective.out_channels(channels), *sides]
    wanted = f"to take {list(x.shape)}, t [2]{'' if ends is None else ' and labels [2]'} and return {returned}"
    try:
        with torch.random.fork_rng([]), evaluation_mode(model), torch.no_grad():
            out = predict(model, x, t, None if ends is None else ends.to(device))
    except Exception as error:  # whatever the network raises
        raise InvalidValue("model", wanted, error) from error
    got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
    expect(got == returned, "model", wanted, got)


def _unet_config(options: ModelOptions, info: DatasetInfo, objective: Objective, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of the network that the options describe. A run that is resumed keeps its number of groups.

    Raises:
        ValueError: The images do not fit the network.
    """
    channels, height, width = info.shape
    labels = info.labels if options.conditional and len(info.classes) > 1 else Labels()
    widths = options.channels
    factor = side_multiple(widths)
    wanted = f"images whose sides are multiples of {factor} for {len(widths)} levels of channels"
    fitting = [-(-side // factor) * factor for side in (height, width)]
    got = f"{width}x{height}; choose another image_size, such as {size_of(fitting)}, or fewer numbers in channels"
    expect(height % factor == 0 and width % factor == 0, "", wanted, got)
    attended = [min(height, width) >> level in options.attention for level in range(len(widths))]
    groups = options.groups or stored.get("norm_num_groups") or _groups(widths)
    divides = options.groups is None or all(width % groups == 0 for width in widths)
    expect(divides, "groups", f"to divide all of channels {list(widths)}", groups)
    return {
        "sample_size": height if height == width else [height, width],
        "in_channels": channels + info.condition_channels,
        "out_channels": objective.out_channels(channels),
        "block_out_channels": list(widths),
        "layers_per_block": options.layers,
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attended],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attended)],
        "attention_head_dim": options.head_dim,
        "norm_num_groups": groups,
        "dropout": options.dropout,
        "resnet_time_scale_shift": "scale_shift" if options.scale_shift else "default",
        **labels.stored,
        # Otherwise the middle attention would have no norm.
        **({"attn_norm_num_groups": groups} if options.scale_shift else {}),
        **({"variance": objective.variance} if objective.predicts_variance else {}),
        # Ho et al.'s choices
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
    }


def _groups(widths: Sequence[int]) -> int:
    """Return the largest number of groups up to 32 that divides all widths and leaves enough channels in each group."""
    common, most = math.gcd(*widths), max(1, min(32, min(widths) // _LEAST_IN_GROUP))
    return max(groups for groups in range(1, most + 1) if common % groups == 0)
