"""The run that the options of `train` describe: its data set, network and schedule, for a `Trainer`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch

from ..checks import checked_bytes
from ..distributed import joined
from ..errors import expect
from ..limits import check_free_memory
from ..nn import UNet, UNetConfig
from ..schedule import NoiseSchedule
from .data import DATASETS, RESIZED, ImageDataset, load_dataset
from .loop import TrainResult
from .rng import TrainingRng
from .run_folder import RunFolder, check_by_options
from .starting import COPIES, prepared
from .trainer import OPTIONS, Trainer


def run_training(
    run_dir: str | os.PathLike[str],
    options: Mapping[str, Any],
    *,
    resume: bool,
    auto_resume: bool,
    max_minutes: float | None,
    progress: bool,
    data_check: str,
    lock: bool,
) -> TrainResult:
    """Run `train` with options that are checked and complete."""
    run = RunFolder(run_dir)
    options = {**options, **_absolute_folders(options)}
    with joined("train") as team:
        start = prepared(run, options, team, resume=resume, auto_resume=auto_resume)
        if start.resume:
            team.on_first(lambda: check_by_options(run.path, run.read_config()["options"]))
        if options["data"] in DATASETS:  # rank 0 downloads
            dataset = team.machine_by_machine(lambda: _dataset(options, run, start.resume))
        else:
            dataset = _dataset(options, run, start.resume)
        config = _unet_config(options, dataset)
        if start.device.type == "cpu":
            needed = COPIES * 4 * UNetConfig.from_dict(config).num_parameters
            check_free_memory("train", "channels", options["channels"], needed)
        with torch.random.fork_rng([]):
            torch.manual_seed(TrainingRng(options["seed"], options["batch_size"]).weights_seed)
            model = UNet(**config)
        trainer = Trainer(
            model,
            getattr(NoiseSchedule, options["schedule"])(options["num_timesteps"]),
            dataset,
            run_folder=run_dir,
            ema_warmup=options["init"] is None,
            **{name: options[name] for name in OPTIONS},
        )
        return trainer._run(start, max_minutes=max_minutes, progress=progress, data_check=data_check, lock=lock)


def _dataset(options: Mapping[str, Any], run: RunFolder, resume: bool) -> ImageDataset:
    """Load the images."""
    arguments = (options["data"], options["data_dir"])
    reading = {"skip_broken": options["skip_broken"], "memory": checked_bytes("train", "data_memory", options["data_memory"])}
    try:
        return load_dataset(*arguments, image_size=options["image_size"], **reading)
    except ValueError:
        if not resume or options["image_size"] is not None:
            raise
        # Earlier versions resized a folder's images of several sizes without being asked. Such a run goes on.
        stored = run.read_config()["dataset"]
        if stored.get("preparation", RESIZED) != RESIZED:
            raise
        size = stored["shape"][-1]
        return load_dataset(*arguments, image_size=size, **reading)


def _absolute_folders(options: Mapping[str, Any]) -> dict[str, str]:
    """Return the options that name folders of data as absolute paths, so that a run is resumed from any working directory."""
    folders = {name: options[name] for name in ("data", "data_dir") if options[name] is not None}
    if options["data"] in DATASETS or not os.path.exists(options["data"]):
        del folders["data"]
    return {name: os.path.abspath(folder) for name, folder in folders.items()}


def _unet_config(options: Mapping[str, Any], dataset: ImageDataset) -> dict[str, Any]:
    """Return the configuration of the network that the options describe. Raise ValueError if the images do not fit it."""
    channels, height, width = dataset.shape
    labelled = options["conditional"] and len(dataset.classes) > 1
    widths = options["channels"]
    factor = 2 ** (len(widths) - 1)
    expect(
        height % factor == 0 and width % factor == 0,
        "train",
        "",
        f"images whose sides are multiples of {factor} for {len(widths)} levels of channels",
        f"{height}x{width}; choose image_size or fewer channels",
    )
    attended = [height >> level in options["attention"] for level in range(len(widths))]
    return {
        "sample_size": height,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": widths,
        "layers_per_block": options["layers"],
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attended],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attended)],
        "attention_head_dim": options["head_dim"],
        "norm_num_groups": math.gcd(32, *widths),
        "dropout": options["dropout"],
        "resnet_time_scale_shift": "scale_shift" if options["scale_shift"] else "default",
        "num_class_embeds": len(dataset.classes) + 1 if labelled else None,
        # Images beside sub-folders make a class without a name.
        **({"class_names": list(dataset.classes)} if labelled and all(dataset.classes) else {}),
        # Ho et al.'s choices
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
    }
