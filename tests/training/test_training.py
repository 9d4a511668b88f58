"""Training: exact resuming, whole checkpoints whatever happens, and the records of a run."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import safetensors.torch
import torch
from drawing import tiny_unet
from items import read_data
from launching import output, start_python
from PIL import Image
from refusals import by, refused
from runs import (
    QUIET,
    SHARED,
    TINY,
    TRAIN,
    assert_same_runs,
    assert_same_weights,
    log_rows,
    newest_checkpoint,
    pictures,
    resume_and_compare,
    train,
    weights,
)

from ddpm_fast import (
    ModelOptions,
    NoiseSchedule,
    Objective,
    Trainer,
    TrainOptions,
    UNet,
    export_checkpoint,
    load_folder,
    noise,
    variational_loss,
)
from ddpm_fast.checks import MAX_TIMESTEPS
from ddpm_fast.data.items import read_batch, to_unit_range
from ddpm_fast.errors import InvalidValue, UnusablePath
from ddpm_fast.nn.config import MAX_LAYERS
from ddpm_fast.options import options_of
from ddpm_fast.reference import STREAM_Q_SAMPLE
from ddpm_fast.training import preparation, report
from ddpm_fast.training.checkpoint import Checkpoints, read_state
from ddpm_fast.training.export import write_scheduler
from ddpm_fast.training.log import CsvLog
from ddpm_fast.training.options import STRUCTS
from ddpm_fast.training.preparation import _unet_config
from ddpm_fast.training.rng import TrainingRng
from ddpm_fast.training.run import RunFolder
from ddpm_fast.training.step import lr_factor

# --------------------------------------------------------------------------------------------------------------- learning


HYBRID = {"variance": "learned_range", "loss_weight": "min_snr", "schedule": "cosine"}


@pytest.mark.parametrize("options", [{}, HYBRID], ids=["simple", "hybrid"])
def test_steps_follow_algorithm_1(options: dict[str, Any], tmp_path: Path) -> None:
    """The losses and the weights of three steps, by a loop that stores its noise in a tensor and uses torch's own Adam.

    The hybrid loss is L_simple + 0.001 T L_t. min-SNR weights are for the first part alone.
    """
    train(tmp_path / "run", **QUIET | {"steps": 3, "log_every": 1, "channels_last": False, "ema_decay": 0.2} | options)
    draws = TrainingRng(0, 6)
    dataset, schedule = read_data("digits"), NoiseSchedule.cosine() if options else NoiseSchedule.linear()
    torch.manual_seed(draws.weights_seed)
    model = UNet(**json.loads((tmp_path / "run" / "config.json").read_text())["unet"])
    average = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters())
    for step, row in enumerate(log_rows(tmp_path / "run")):
        images, labels, _ = read_batch(dataset, draws.indices(step, len(dataset)))
        x_0, t, seeds = to_unit_range(images), draws.timesteps(step, 1000), draws.sample_seeds(step)
        labels[draws.label_is_dropped(step, 0.1)] = 10
        eps = noise(x_0.shape, seeds, stream=STREAM_Q_SAMPLE)
        abar = schedule.alpha_bars[t][:, None, None, None].float()
        x_t = abar.sqrt() * x_0 + (1 - abar).sqrt() * eps  # eq. 3
        output = model(x_t, t, labels)
        losses = (output[:, :1] - eps).square().mean(dim=(1, 2, 3))  # eq. 12
        loss = losses.mean()
        if options:
            term = variational_loss(output, x_0, t, Objective(schedule, "epsilon", "learned_range"), noise=eps)
            loss = (losses * (5 / schedule.snr[t]).clamp(max=1).float()).mean() + 0.001 * 1000 * term
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-3 * (step + 1) / 4
        optimizer.step()
        decay = min(0.2, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            average[name] = decay * average[name] + (1 - decay) * value
        # The log has six digits. Roundings of the two losses differ, and Adam makes the most of it: see below.
        assert float(row["loss"]) == pytest.approx(float(loss.detach()), rel=1e-4)
        assert float(row["grad_norm"]) == pytest.approx(float(norm), rel=1e-3)
        assert float(row["lr"]) == pytest.approx(1e-3 * (step + 1) / 4)
    checkpoint = newest_checkpoint(tmp_path / "run")
    # Adam divides by the gradient's size, so a rounding in it may move a weight by a share of the step, lr <= 1e-3.
    for folder, expected in (("unet", model.state_dict()), ("unet_ema", average)):
        for name, value in UNet.from_pretrained(checkpoint / folder).state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("prediction", [pytest.param("sample", marks=pytest.mark.slow), "v_prediction"])
def test_loss_falls(prediction: str, tmp_path: Path) -> None:
    options = QUIET | {"steps": 60, "batch_size": 32, "log_every": 20, "lr": 3e-3, "prediction": prediction}
    result = train(tmp_path / "run", **options, schedule="cosine", precision="bf16", dropout=0.1, flip=True)
    losses = [float(row["loss"]) for row in log_rows(tmp_path / "run")]
    assert result.loss == pytest.approx(losses[-1], rel=1e-5)  # the log has six digits
    assert losses[-1] < 0.8 * losses[0]


def test_learning_rate_rises_stays_and_falls() -> None:
    options = TrainOptions(steps=100, warmup_steps=4, lr_decay_steps=9)
    expected = [min((step + 1) / 5, 1.0, (100 - step) / 10) for step in range(100)]
    assert [lr_factor(step, options) for step in range(100)] == pytest.approx(expected)
    options = TrainOptions(steps=100, warmup_steps=0, lr_decay="cosine", lr_decay_steps=99)
    cosine = [lr_factor(step, options) for step in range(100)]
    assert cosine == pytest.approx([0.5 + 0.5 * math.cos(math.pi * step / 100) for step in range(100)])


def test_non_finite_loss_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"train: the loss became \S+ and its gradient's norm (nan|inf) by step \d+;"):
        train(tmp_path / "run", **QUIET | {"steps": 50, "lr": 1e38, "warmup_steps": 0, "log_every": 2, "checkpoint_every": 2})
    assert Checkpoints(tmp_path / "run").newest() is None  # a spoilt state is not saved


# --------------------------------------------------------------------------------------------------------------- resuming


def test_interrupted_run_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    """Bit for bit: weights, averages, optimizer state and log; dropout, bf16, channels_last and every draw included."""
    options = QUIET | {"steps": 11, "dropout": 0.3, "precision": "bf16", "flip": True, "lr_decay_steps": 5}
    stopped = train(tmp_path / "cut", **options | {"max_minutes": 0.0})
    assert (stopped.step, stopped.stopped_by) == (1, "max_minutes")
    torch.manual_seed(123)  # nothing depends on the state of torch's generator
    train(tmp_path / "cut", **options | {"max_minutes": 0.0}, auto_resume=True)
    train(tmp_path / "cut", **options | {"steps": 6, "lr_decay_steps": 0}, resume=True)  # before the learning rate falls
    resume_and_compare(train, tmp_path / "cut", **options)
    assert log_rows(tmp_path / "cut")[0] == log_rows(tmp_path / "whole")[0]  # the mean over steps of three calls


def test_log_of_a_resumed_run_has_each_row_once(tmp_path: Path) -> None:
    options = QUIET | {"steps": 5, "checkpoint_every": 3, "log_every": 2}
    train(tmp_path / "cut", **options)
    # A run was killed at step 5: rows up to 4 are there, one of them cut short, and the newest checkpoint is of step 3.
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000005")
    with (tmp_path / "cut" / "log.csv").open("a") as file:
        file.write("6,14")
    resume_and_compare(train, tmp_path / "cut", **options)
    assert log_rows(tmp_path / "cut") == log_rows(tmp_path / "whole")


def test_resuming_as_something_else_names_the_option(tmp_path: Path) -> None:
    train(tmp_path / "run", **QUIET | {"steps": 1})
    for name, value in {"lr": 2e-3, "channels": [16, 16], "seed": 1, "precision": "bf16"}.items():
        with pytest.raises(ValueError, match=rf"train: expected {name} to be .* as in '.*', got"):
            train(tmp_path / "run", **QUIET | {"steps": 1, name: value}, resume=True)
    changes = {"steps": 2, "log_every": 1, "checkpoint_every": 1, "keep": 5, "channels_last": False, "num_workers": 1}
    assert train(tmp_path / "run", **QUIET | changes, resume=True).step == 2
    stored = RunFolder(tmp_path / "run").read_config()["options"]
    assert {name: stored[name] for name in changes} == changes


@pytest.mark.parametrize(
    ("channels", "groups"),
    [
        ((64, 128, 128), 16),
        ((16, 32, 64, 128), 4),
        ((128, 256, 256, 256), 32),
        ((8,), 2),
        ((24, 40), 4),
        ((6, 9), 1),
        ((2,), 1),
    ],
)
def test_norms_have_four_channels_or_more_in_a_group(channels: tuple[int, ...], groups: int) -> None:
    info, objective = read_data("digits").info, Objective(NoiseSchedule.cosine(10))
    info = dataclasses.replace(info, shape=(1, 16, 16))
    config = {"options": ModelOptions(channels=channels), "info": info, "objective": objective}
    assert _unet_config(**config, stored={})["norm_num_groups"] == groups
    assert _unet_config(**config, stored={"norm_num_groups": 2})["norm_num_groups"] == 2
    config["options"] = ModelOptions(channels=channels, groups=1)
    assert _unet_config(**config, stored={"norm_num_groups": 2})["norm_num_groups"] == 1


def test_scale_and_shift_keep_the_norm_of_the_middle_attention(tmp_path: Path) -> None:
    for scale_shift in (True, False):
        train(tmp_path / str(scale_shift), **QUIET | {"steps": 1, "scale_shift": scale_shift})
        attention = load_folder(tmp_path / str(scale_shift)).model.mid_block.attentions[0]
        assert attention.group_norm.num_groups == 4


def test_shortcuts_begin_weaker_and_no_other_weight(tmp_path: Path) -> None:
    plain, weak = (tmp_path / str(weak) for weak in (False, True))
    for folder in (plain, weak):
        train(folder, **QUIET | {"steps": 1, "lr": 1e-12, "weak_shortcuts": folder is weak})
    expected = load_folder(plain).model
    expected.weaken_shortcuts()
    for (name, found), other in zip(load_folder(weak).model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, other, msg=name)
    shortcuts = [network.up_blocks[0].resnets[0].conv_shortcut for network in (load_folder(plain).model, expected)]
    plain_std, weak_std = (float(each.weight.detach().std()) for each in shortcuts)
    assert weak_std / plain_std == pytest.approx(3**-0.5)


def test_a_resumed_run_keeps_the_groups_of_its_network(tmp_path: Path) -> None:
    options = QUIET | {"steps": 4, "log_every": 2}
    train(tmp_path / "cut", **options | {"steps": 2, "groups": 16})
    with pytest.raises(ValueError, match=r"model\.norm_num_groups to be 16"):
        train(tmp_path / "cut", **options | {"groups": 4}, resume=True)
    train(tmp_path / "cut", **options, resume=True)
    train(tmp_path / "whole", **options | {"groups": 16})
    assert_same_runs(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize(
    ("groups", "scale_shift", "warned"), [(16, False, True), (8, False, True), (4, False, False), (16, True, False)]
)
def test_groups_of_too_few_channels_warn(
    groups: int, scale_shift: bool, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path / "run", **QUIET | {"steps": 1, "groups": groups, "scale_shift": scale_shift})
    expected = [
        f"the network's level of 16 channels has {groups} groups, so its norms take away much of the timestep and the class: "
        "choose norm_num_groups (--groups) of at most 4"
    ]
    assert [each.getMessage() for each in caplog.records if "norms" in each.getMessage()] == expected * warned


def test_folders_without_a_run_are_refused(tmp_path: Path) -> None:
    wanted = r"expected a run to resume in .*, got none, as it has no config\.json$"
    with pytest.raises(FileNotFoundError, match=f"^train: {wanted}"):
        train(tmp_path, **QUIET, resume=True)
    with pytest.raises(FileNotFoundError, match=f"^export_checkpoint: {wanted}"):
        export_checkpoint(tmp_path, tmp_path / "out")


WRONG_VALUES: list[tuple[str, object, str]] = [
    ("schedule", "exponential", "schedule to be one of linear, scaled_linear"),
    ("loss_weight", "p2", "loss_weight to be min_snr or None"),
    ("precision", "fp8", "precision to be one of float32, bf16"),
    ("steps", 0, "steps to be a positive integer"),
    ("lr_decay_steps", -1, "lr_decay_steps to be an integer of at least 0"),
    ("dropout", 1.0, "dropout to be at least 0 and below 1"),
    ("label_dropout", 1.5, "label_dropout to be at least 0 and at most 1"),
    ("lr", 0.0, "lr to be positive"),
    ("channels", [], "channels to be at least one number"),
    ("groups", 5, r"groups to divide all of channels \[16, 32\], got 5"),
    ("threads", 0, "threads to be a positive integer or None"),
    ("threads", 100_000, r"threads to be an integer in 1\.\.\d+ or None, got 100000"),
    ("num_workers", -1, r"num_workers to be an integer in 0\.\.1024 or None, got -1"),
    ("num_workers", 1025, r"num_workers to be an integer in 0\.\.1024 or None, got 1025"),
    ("lr", math.inf, "lr to be positive and finite, got inf"),
    ("layers", 10**9, r"layers to be an integer in 1\.\.64, got 1000000000"),
    ("num_timesteps", 99999999999, r"num_timesteps to be an integer in 1\.\.100000, got 99999999999"),
    ("batch_size", 99999999999, r"batch_size to be an integer in 1\.\.1048576, got 99999999999"),
    ("channels", [10**12, 10**12], r"channels to be an integer in 1\.\.16777216, got 1000000000000"),
    ("channels", [10**40], r"channels to be an integer in 1\.\.16777216, got 10{40}"),
    ("image_size", 10**6, r"image_size to be an integer in 1\.\.65536, got 1000000"),
    ("device", "meta", "device to be one that computes, got meta"),
    ("device", "nowhere", "device to be a torch.device or its name, got 'nowhere'"),
    ("device", "cuda:99", "device to be available, got cuda:99: PyTorch sees"),
    ("head_dim", 7, r"head_dim to be None or a divisor of every attention width \[32\], got 7"),
    (
        "channels",
        [16] * 5,
        "images whose sides are multiples of 16 for 5 levels of channels, got 8x8; choose another image_size, such as 16, or ",
    ),
]
WRONG_TYPES: list[tuple[str, object, str]] = [
    ("channels", 8, "channels to be a list of integers, got 8"),
    ("lr", "x", "lr to be a number, got str"),
    ("batch_size", 2.5, r"batch_size to be an integer in 1\.\.1048576, got 2\.5"),
    ("flip", 1, "flip to be a bool, got int"),
    ("skip_broken", "no", "skip_broken to be a bool, got str"),
    ("data", None, "data to be a path .*, got NoneType"),
    ("init", 5, "init to be a path .*, got int"),
    ("steps", torch.tensor(3), r"steps to be a positive integer, got tensor\(3\)"),
]


@pytest.mark.parametrize(
    ("kind", "option", "value", "wanted"),
    [*((ValueError, *case) for case in WRONG_VALUES), *((TypeError, *case) for case in WRONG_TYPES)],
)
def test_bad_options_are_refused_before_anything_is_written(
    kind: type[Exception], option: str, value: object, wanted: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=rf"(train|load_dataset|\w+Options): expected {wanted}"):
        train(tmp_path / "run", **QUIET | {option: value})
    assert not (tmp_path / "run").exists()


def test_samples_cannot_take_more_steps_than_there_are(tmp_path: Path) -> None:
    options = QUIET | {"num_timesteps": 20, "steps": 1}
    with refused(by("train", InvalidValue("sample_steps", "to be an integer in 1..20 or None", "50"))):
        train(tmp_path / "run", **options | {"sample_every": 10, "sample_steps": 50})
    train(tmp_path / "run", **options)  # no samples are drawn


@pytest.mark.parametrize("sample_steps", [None, 5])
@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule.linear(),
        NoiseSchedule.linear(12),
        NoiseSchedule.cosine(),
        NoiseSchedule.linear().rescale_zero_terminal_snr(),
    ],
)
def test_grids_are_drawn_with_noise_on_every_schedule(
    schedule: NoiseSchedule, sample_steps: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise corrects a network that is not finished. Levels where abar is 0, or nearly, are left out."""
    drawn = Mock(return_value=torch.zeros(40, 1, 8, 8))
    monkeypatch.setattr(report, "sample", drawn)
    options = SHARED | {"steps": 1, "prediction": "v_prediction", "sample_every": 1, "sample_steps": sample_steps}
    Trainer(tiny_unet(10), schedule, read_data("digits"), TrainOptions(**options), tmp_path).run()
    plan = drawn.call_args.args[1]
    assert plan.is_random
    assert plan.num_steps == min(sample_steps or 20, schedule.num_timesteps)
    assert plan.prediction == "v_prediction"
    assert float(plan.alpha_bars[0]) > 1 / (1 + math.exp(10.2 + 1e-6))
    assert plan.coefficients[:, :3].isfinite().all()
    with Image.open(tmp_path / "samples" / "step-00000001.png") as grid:
        assert grid.size == (10 * (8 * 16 + 2) + 2, 4 * (8 * 16 + 2) + 2 + 14)  # large, below the names of the classes


def test_folders_that_cannot_be_written_are_refused_before_the_images_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "load_dataset", lambda *_, **__: pytest.fail("the images were read"))
    (tmp_path / "file").touch()
    with pytest.raises(UnusablePath, match=r"run_dir to be in a folder, got .*, and '.*file' is a file"):
        train(tmp_path / "file" / "run", **QUIET)
    with pytest.raises(OSError, match="File name too long"):
        train(tmp_path / ("x" * 300), **QUIET)
    with pytest.raises(UnusablePath, match=r"to be new or empty, got .*; continue the run in it with resume=True"):
        train(tmp_path, **QUIET)


@pytest.mark.parametrize("source", ["run", "checkpoint", "model"])
def test_init_starts_from_the_weights_of_a_run_a_checkpoint_or_a_model(source: str, tmp_path: Path) -> None:
    train(tmp_path / "run", **QUIET, steps=4)
    export_checkpoint(tmp_path / "run", tmp_path / "model", torch.float32)
    init = newest_checkpoint(tmp_path / "run") if source == "checkpoint" else tmp_path / source
    train(tmp_path / "new", **QUIET | {"lr": 1e-12}, init=str(init), steps=1)
    new, old = weights(tmp_path / "new"), weights(tmp_path / "run")
    for network in ("unet", "unet_ema"):
        expected = "unet_ema" if source == "model" else network  # a model's folder has the average alone
        for key in (key.removeprefix("unet.") for key in old if key.startswith("unet.")):
            torch.testing.assert_close(new[f"{network}.{key}"], old[f"{expected}.{key}"], rtol=1e-4, atol=1e-6)
    assert all(value == 1 for key, value in new.items() if ".step." in key)  # the optimizer starts afresh


def test_init_that_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    train(tmp_path / "first", **QUIET, steps=1)
    with pytest.raises(
        ValueError, match=r"expected init to hold a network as the options .* layers_per_block is 1 instead of 2"
    ):
        train(tmp_path / "next", **QUIET | {"layers": 2}, init=str(tmp_path / "first"))
    with pytest.raises(UnusablePath, match=r"expected init to be a folder that holds a model, got '.*nowhere'"):
        train(tmp_path / "next", **QUIET, init=str(tmp_path / "nowhere"))
    assert not (tmp_path / "next").exists()


# ------------------------------------------------------------------------------------------------------------ checkpoints

FULL = OSError("no space left on device")


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    options, folder = QUIET | {"checkpoint_every": 1, "keep": 2}, tmp_path / "run" / "checkpoints"
    train(tmp_path / "run", **options, steps=5)
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000004", "step-00000005"]
    assert (folder / "latest").resolve() == (folder / "step-00000005").resolve()
    (folder / ".step-00000006.tmp" / "unet").mkdir(parents=True)  # a writer was killed
    (folder / "step-00000007").mkdir()
    shutil.copy(folder / "step-00000005" / "state.json", folder / "step-00000007")  # a copy was interrupted
    train(tmp_path / "run", **options, steps=7, resume=True)
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000006", "step-00000007"]


def test_damaged_checkpoint_takes_no_whole_ones_place(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")

    def write(folder: Path) -> None:
        (folder / "weights").write_text("weights")

    for step in (10, 30):
        run.checkpoints.add(step, {}, write, keep=2)
    (run.checkpoints.path / "step-00000030" / "weights").write_text("")
    newest = run.checkpoints.add(20, {}, write, keep=1)
    assert [folder.name for folder in run.checkpoints.path.glob("step-*")] == ["step-00000020"]
    assert run.checkpoints.newest() == newest


def test_checkpoint_that_fails_to_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "run", **QUIET | {"steps": 1})
    monkeypatch.setattr(safetensors.torch, "save_file", Mock(side_effect=OSError(*FULL.args)))
    wanted = r"^no space .*\nthe run in .*run ended at step 2; the last good checkpoint is .*step-00000001"
    with pytest.raises(OSError, match=wanted):
        train(tmp_path / "run", **QUIET | {"steps": 2}, resume=True)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["latest", "step-00000001"]


@pytest.mark.parametrize("removed", [False, True])
def test_a_log_that_cannot_be_written_costs_no_step(removed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full, or somebody has removed the folder."""

    def fail(log: CsvLog, values: Any, step: int) -> None:
        if removed:
            shutil.rmtree(log.path.parent)
        raise OSError(*FULL.args)

    with monkeypatch.context() as patch:
        patch.setattr(CsvLog, "row", fail)
        with pytest.raises(OSError, match=r"^no space .*\n.* ended at step 1; the last good checkpoint is .*step-00000001"):
            train(tmp_path / "run", **QUIET | {"steps": 6})
    resume_and_compare(train, tmp_path / "run", **QUIET | {"steps": 6})
    assert log_rows(tmp_path / "run")[-1]["step"] == "6"


def test_a_picture_that_cannot_be_written_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(report, "save_grid", Mock(side_effect=FULL))
    assert train(tmp_path / "run", **QUIET | {"steps": 2, "sample_every": 1, "sample_steps": 1}).step == 2
    assert re.search(r"step-00000001\.png could not be drawn: no space left on device", caplog.text)


def test_export_is_a_model_folder(tmp_path: Path) -> None:
    train(tmp_path / "run", **QUIET | {"steps": 4, "schedule": "cosine", "prediction": "v_prediction", "num_timesteps": 20})
    with (tmp_path / "run" / "log.csv").open("a") as file:
        file.write("8,48,1,1,1,1,1\n")  # the run went on after its checkpoint
    out = export_checkpoint(tmp_path / "run", tmp_path / "out")
    run, exported = load_folder(tmp_path / "run"), load_folder(out)
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "training.json",
        "training_log.csv",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    assert exported.objective == Objective(NoiseSchedule.cosine(20), "v_prediction")
    assert run.model.config == exported.model.config
    assert exported.model.config["class_names"] == list("0123456789")
    for (name, half), full in zip(exported.model.state_dict().items(), run.model.state_dict().values(), strict=True):
        torch.testing.assert_close(half.float(), full.half().float(), rtol=0, atol=0, msg=name)
    record = json.loads((out / "training.json").read_text())
    assert (record["step"], record["options"]["data"], record["options"]["init"]) == (4, "digits", None)
    assert [line.split(",")[0] for line in (out / "training_log.csv").read_text().splitlines()] == ["step", "1", "4"]


def test_an_exported_model_names_folders_but_not_where_they_were(tmp_path: Path) -> None:
    images = str(pictures(tmp_path / "images"))
    folders = {"data": images, "condition": images}
    train(tmp_path / "run", **QUIET | folders | {"steps": 1})
    train(tmp_path / "again", **QUIET | folders | {"steps": 1, "init": str(tmp_path / "run")})
    record = (export_checkpoint(tmp_path / "again", tmp_path / "out") / "training.json").read_text()
    options = json.loads(record)["options"]
    assert [options[name] for name in ("data", "condition", "init")] == ["images", "images", "run"]
    assert str(tmp_path) not in record


@pytest.mark.parametrize(("folders", "classes"), [([""], None), (["", "a", "b"], 4)])
def test_images_without_names_of_classes_train_without_them(folders: list[str], classes: int | None, tmp_path: Path) -> None:
    """Without sub-folders there are no classes. Images next to sub-folders are a class without a name."""
    for seed, folder in enumerate(folders):
        pictures(tmp_path / "images" / folder, seed=seed)
    train(tmp_path / "run", **QUIET | {"data": str(tmp_path / "images"), "steps": 1, "sample_every": 1, "sample_steps": 2})
    config = load_folder(export_checkpoint(tmp_path / "run", tmp_path / "out")).model.config
    assert (config["num_class_embeds"], config.get("class_names"), config["in_channels"]) == (classes, None, 3)
    assert (tmp_path / "run" / "samples" / "step-00000001.png").is_file()


def test_diffusers_reads_the_exported_scheduler(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    for name in ("linear", "scaled_linear", "cosine", "sigmoid"):
        schedule = getattr(NoiseSchedule, name)(50)
        write_scheduler(tmp_path / name, Objective(schedule))
        theirs = diffusers.DDPMScheduler.from_pretrained(tmp_path / name).alphas_cumprod
        # diffusers multiplies 50 float32 factors 1 - beta, the smallest of them 1 - 0.999.
        torch.testing.assert_close(theirs.double(), schedule.alpha_bars, rtol=50 * 2**-24 + 2**-24 / 0.001, atol=0)


@pytest.mark.parametrize("conditional", [False, True])
def test_diffusers_draws_from_an_exported_folder(conditional: bool, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    train(tmp_path / "run", **QUIET | {"steps": 1, "conditional": conditional, "num_timesteps": 50})
    out = export_checkpoint(tmp_path / "run", tmp_path / "out", torch.float32)
    pipe = diffusers.DiffusionPipeline.from_pretrained(out)
    assert type(pipe) is (diffusers.ConsistencyModelPipeline if conditional else diffusers.DDPMPipeline)
    loaded = load_folder(out)
    torch.testing.assert_close(pipe.unet.state_dict(), loaded.model.state_dict(), rtol=0, atol=0)

    labels = {"class_labels": torch.tensor([3, 10])} if conditional else {}
    pipe.set_progress_bar_config(disable=True)
    draw = {"batch_size": 2, "num_inference_steps": 5, "output_type": "pt"}
    drawn = pipe(**draw, **labels, generator=torch.Generator().manual_seed(0)).images
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, 1, 8, 8, generator=generator)
    for t in pipe.scheduler.timesteps:
        m = loaded.model(x_t, t, *labels.values())
        x_t = pipe.scheduler.step(m, t, x_t, generator=generator).prev_sample
    torch.testing.assert_close(drawn, (x_t.detach() / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------- records


def test_samples_and_tensorboard_are_written_and_change_nothing(tmp_path: Path) -> None:
    options = QUIET | {"steps": 4, "dropout": 0.2, "log_every": 2}
    train(tmp_path / "plain", **options)
    train(tmp_path / "run", **options | {"sample_every": 2, "sample_steps": 2, "tensorboard": True})
    assert_same_weights(tmp_path / "plain", tmp_path / "run")
    assert len(list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))) == 1


@pytest.mark.parametrize(
    ("broken", "error", "said"),
    [
        ("__init__", ImportError(), "TensorBoard is not installed: no event files (pip install 'ddpm_fast[train]')"),
        *((name, FULL, f"TensorBoard fails, so the run goes on without it: {FULL}") for name in ("__init__", "add_scalar")),
        *((name, FULL, f"TensorBoard fails, so the run goes on without it: {FULL}") for name in ("add_images", "close")),
    ],
    ids=["missing", "__init__", "add_scalar", "add_images", "close"],
)
def test_event_files_that_cannot_be_written_are_said_once_and_do_not_end_a_run(
    broken: str,
    error: Exception,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "ddpm_fast")
    monkeypatch.setattr(pytest.importorskip("torch.utils.tensorboard").SummaryWriter, broken, Mock(side_effect=error))
    options = QUIET | {"steps": 3, "log_every": 1, "sample_every": 1, "sample_steps": 1, "tensorboard": True}
    assert train(tmp_path / "run", **options).step == 3
    assert [record.getMessage() for record in caplog.records if "TensorBoard" in record.getMessage()] == [said]


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [("OMP_DYNAMIC", "true", "false"), ("OMP_DYNAMIC", "TRUE", "false"), ("OMP_THREAD_LIMIT", "1", "at least 2")],
)
def test_threads_that_openmp_may_not_start_are_refused(
    name: str, value: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    message = rf"train: expected the environment's {name} to be {wanted}, .* got '{value}'; unset it, or .*--threads 1"
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", **QUIET | {"threads": 2, "steps": 1})
    assert not (tmp_path / "run").exists()
    assert train(tmp_path / "run", **QUIET | {"threads": 1, "steps": 1}).step == 1


def test_every_option_is_documented() -> None:
    """The command line shows the same texts, so each begins with a verb and is one or two sentences."""
    texts = [each.option.help for struct in STRUCTS for each in options_of(struct)]
    assert all(text[0].isupper() and text.endswith((".", "...")) and len(text) < 130 for text in texts)
    assert all(each.option.help in (struct.__doc__ or "") for struct in STRUCTS for each in options_of(struct))


def test_ranges_are_those_of_what_is_made() -> None:
    """The declarations cannot import these numbers without PyTorch."""
    highest = {each.name: each.option.high for each in options_of(ModelOptions)}
    assert (highest["num_timesteps"], highest["layers"]) == (MAX_TIMESTEPS, MAX_LAYERS)


def test_a_run_opens_with_a_summary(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The remaining time is said once, after the third step."""
    caplog.set_level(logging.INFO, "ddpm_fast")
    train(tmp_path / "run", **QUIET, steps=2)
    for part in (
        f"Training {tmp_path / 'run'}",
        "data     digits: 1500 images, 10 classes",
        "images   8x8 pixels, 1 channel, not resized",
        "million parameters, class-conditional",
        "float32 on cpu, 1 thread",
        "2 of 6 images: 0.008 epochs",
    ):
        assert part in caplog.text
    assert "  time" not in caplog.text
    train(tmp_path / "run", **QUIET, steps=7, resume=True)
    assert f"Resuming {tmp_path / 'run'} at step 2" in caplog.text
    assert caplog.text.count("  time     about 0:00:0") == 1


def test_a_bar_in_a_log_file_takes_few_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A terminal's is drawn anew ten times a second and has a line of its own."""
    train(tmp_path, **TINY | {"steps": 12, "log_every": 1})
    shown = capsys.readouterr().err.split("\r")
    assert len(shown) < 12  # the first, the last, and one every ten seconds
    assert re.search(r"12/12 .*loss \d\.\d{4}, \d+\.\d images/s", shown[-1])


def test_a_run_without_end_goes_on_after_the_estimate(tmp_path: Path) -> None:
    assert train(tmp_path, **QUIET, steps=10**17, max_minutes=0.01).stopped_by == "max_minutes"


def test_images_of_other_sizes_stop_a_run_instead_of_being_resized(tmp_path: Path) -> None:
    options = QUIET | {"data": pictures(tmp_path / "images"), "batch_size": 2}
    train(tmp_path / "run", **options, steps=1)
    pictures(tmp_path / "images", size=(60, 40))
    with pytest.raises(ValueError, match=r"expected shape to be \[3, 8, 8\], as in .*, got \[3, 40, 60\]"):
        train(tmp_path / "run", **options, steps=2, resume=True)


def test_a_resumed_run_leaves_broken_images_out(tmp_path: Path) -> None:
    images = pictures(tmp_path / "images")
    (images / "1.png").write_bytes((images / "1.png").read_bytes()[:-30])
    options = QUIET | {"data": images, "batch_size": 2, "steps": 1}
    train(tmp_path / "run", **options, skip_broken=True)
    config = RunFolder(tmp_path / "run").read_config()
    assert (config["options"]["skip_broken"], config["dataset"]["images"]) == (True, 2)
    (images / "1.png").unlink()
    assert train(tmp_path / "run", **options | {"steps": 2}, resume=True).step == 2


# ---------------------------------------------------------------------------------------------------------------- stopping


@pytest.mark.parametrize(("name", "ignored"), [("SIGTERM", False), ("SIGHUP", False), ("SIGHUP", True)])
def test_a_signal_saves_and_ends_the_run(name: str, ignored: bool, tmp_path: Path) -> None:
    """A hangup that is ignored stays so, as under nohup."""
    number, handler = signal.Signals[name], signal.SIG_IGN if ignored else Mock()
    before = signal.signal(number, handler)
    options, digits = TrainOptions(**SHARED | {"steps": 3}), read_data("digits")
    try:
        result = Trainer(
            *(tiny_unet(10), NoiseSchedule.linear(), digits, options, tmp_path),
            on_step=lambda step, loss: signal.raise_signal(number),
        ).run()
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert (result.stopped_by, result.step) == ((None, 3) if ignored else (name, 1))
    assert newest_checkpoint(tmp_path).name == f"step-{result.step:08d}"
    assert ignored or not handler.called


@pytest.mark.parametrize(("kills", "within_writes"), [(1, 0), pytest.param(20, 5, marks=pytest.mark.slow)])
def test_killed_during_checkpoint_writes(kills: int, within_writes: int, tmp_path: Path) -> None:
    """Train with a checkpoint every step, SIGKILL the process at random moments of checkpoint writes, and resume.

    It is killed at least `kills` times, and until `within_writes` of them were within a write: a busy machine may be late.
    """
    chance, run = random.Random(kills), RunFolder(tmp_path / "run")
    options = QUIET | {"checkpoint_every": 1}
    step = killed = interrupted = 0
    while killed < kills or interrupted < within_writes:
        arguments = json.dumps(options | {"steps": 1_000_000, "auto_resume": True})
        process = start_python(["-c", TRAIN, str(run.path), arguments], tmp_path)
        # Wait for this process's second checkpoint, then for the next write to be under way, then for a random moment of it.
        while process.is_alive() and not (run.checkpoints.path / f"step-{step + 2:08d}").exists():
            time.sleep(0.001)
        writing = chance.random() < 0.8  # the rest are killed at any moment
        while process.is_alive() and writing and not any(run.checkpoints.path.glob(".step-*.tmp")):
            time.sleep(0.0002)  # not longer: a write takes milliseconds
        time.sleep(chance.random() * 0.01)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, output(tmp_path, 0, "err").read_text()
        killed += 1
        interrupted += any(run.checkpoints.path.glob(".step-*.tmp"))
        latest, before = newest_checkpoint(run.path), step
        step = read_state(latest).step
        assert latest.name == f"step-{step:08d}"
        assert step >= before + 2
    resume_and_compare(train, run.path, **options | {"steps": step + 2})
    assert not list(run.checkpoints.path.glob(".*"))
