"""Training of a learned variance, of flow matching, and of columns of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from other_blocks import UNetModel
from refusals import refused
from runs import NAMES, QUIET, assert_same_weights, train
from torch import Tensor, nn

from ddpm_fast import (
    NoiseSchedule,
    Objective,
    Trainer,
    TrainOptions,
    UNet,
    ddim_plan,
    export_checkpoint,
    load_folder,
    sample,
)
from ddpm_fast.cli import main
from ddpm_fast.errors import InvalidValue
from ddpm_fast.integrations.guided_diffusion import load_guided_diffusion
from ddpm_fast.training.data import load_dataset

SHARED = {name: value for name, value in QUIET.items() if name in NAMES[TrainOptions]}
LEARNED = QUIET | {"variance": "learned_range", "num_timesteps": 20, "flip": True}
FLOW = QUIET | {"prediction": "flow", "num_timesteps": 20}


def run(*arguments: Any) -> str:
    result = CliRunner().invoke(main, [str(each) for each in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def plain(channels: int, **changes: Any) -> UNet:
    config = {"in_channels": 1, "out_channels": channels, "block_out_channels": [8, 16], "layers_per_block": 1}
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, "norm_num_groups": 4}
    return UNet(**config | blocks | changes)


# -------------------------------------------------------------------------------------------------------- learned variance


def test_a_learned_variance_is_resumed_sampled_evaluated_and_exported(tmp_path: Path) -> None:
    train(tmp_path / "whole", **LEARNED, steps=5)
    train(tmp_path / "cut", **LEARNED, steps=2)
    train(tmp_path / "cut", **LEARNED, steps=5, resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")
    export_checkpoint(tmp_path / "cut", tmp_path / "model", torch.float32)
    loaded = load_folder(tmp_path / "model")
    assert (
        loaded.objective
        == load_folder(tmp_path / "cut").objective
        == Objective(NoiseSchedule.linear(20), variance="learned_range")
    )
    assert loaded.interface.shape == (1, 8, 8)
    assert (loaded.model.config["out_channels"], loaded.interface.condition_channels) == (2, 0)
    assert loaded.model.config["variance"] == "learned_range"
    for sampler in ("ddpm", "dpm++2m-sde"):
        run(
            "sample", "--model", tmp_path / "model", "--num", 2, "--sampler", sampler, "--steps", 4, "--out", tmp_path / "a.png"
        )
    out = run("evaluate", "--model", tmp_path / "cut", "--data", "digits", "--num", 2)
    assert "learned_range: bits/dim" in out


def test_a_log_variance_is_no_pipeline_of_diffusers(tmp_path: Path) -> None:
    """Diffusers takes the channels of "learned" for variances."""
    train(tmp_path / "run", **LEARNED | {"variance": "learned"}, steps=1)
    out = export_checkpoint(tmp_path / "run", tmp_path / "model", torch.float32)
    assert not (out / "model_index.json").exists()
    assert load_folder(out).objective.variance == "learned"


def test_a_learned_variance_is_a_pipeline_of_diffusers(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    train(tmp_path / "run", **LEARNED | {"conditional": False}, steps=1)
    export_checkpoint(tmp_path / "run", tmp_path / "model", torch.float32)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.variance_type == "learned_range"
    assert pipeline(batch_size=1, num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)


def test_weights_of_guided_diffusion_go_on_training(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = {"image_size": 16, "in_channels": 3, "model_channels": 32, "out_channels": 6, "num_res_blocks": 1}
    theirs = UNetModel(**config, attention_resolutions=(2,), channel_mult=(1, 2), num_heads=4, use_scale_shift_norm=True)
    network = load_guided_diffusion(theirs.state_dict(), num_heads=4, image_size=16)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images = [torch.full((3, 16, 16), 20 * i, dtype=torch.uint8) for i in range(12)]
    options = TrainOptions(**SHARED | {"steps": 2, "variance": "learned_range"})
    Trainer(network, NoiseSchedule.linear(100), images, options, tmp_path / "run").run()  # type: ignore[arg-type]
    assert all(not torch.equal(value, before[name]) for name, value in network.state_dict().items() if "weight" in name)
    loaded = load_folder(tmp_path / "run")
    assert loaded.objective.variance == "learned_range"
    assert loaded.interface.shape == (3, 16, 16)


class Network(nn.Module):
    """A network of any kind, with a given number of channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, channels, 1)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        y: Tensor = self.layer(x_t)
        return y


def test_any_network_learns_its_variance(tmp_path: Path) -> None:
    digits = load_dataset("digits")
    for cut in (False, True):
        torch.manual_seed(0)
        folder = tmp_path / str(cut)
        for steps, resume in ((2, False), (4, True)) if cut else ((4, False),):
            options = TrainOptions(**SHARED | {"steps": steps, "variance": "learned", "resume": resume})
            Trainer(Network(2), NoiseSchedule.cosine(10), [digits[i].image for i in range(9)], options, folder).run()  # type: ignore[arg-type]
    assert_same_weights(tmp_path / "False", tmp_path / "True")


# ----------------------------------------------------------------------------------------------------------- flow matching


def test_flow_matching_trains_on_its_schedule_and_is_drawn_by_every_sampler(tmp_path: Path) -> None:
    train(tmp_path / "whole", **FLOW, steps=4)
    train(tmp_path / "cut", **FLOW, steps=2)
    train(tmp_path / "cut", **FLOW, steps=4, resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")
    out = export_checkpoint(tmp_path / "cut", tmp_path / "model", torch.float32)
    assert not (out / "model_index.json").exists()
    config = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert "_class_name" not in config
    assert config["prediction_type"] == "flow"
    for folder in (out, tmp_path / "cut"):
        assert load_folder(folder).objective == Objective(NoiseSchedule.flow(20), "flow")
    for sampler in ("dpm++2m", "dpm++2m-sde", "ddpm", "ddim", "heun"):
        run("sample", "--model", out, "--num", 1, "--sampler", sampler, "--steps", 3, "--out", tmp_path / "a.png")
    run(
        "sample",
        "--model",
        out,
        "--num",
        1,
        "--sampler",
        "ddim",
        "--spacing",
        "trailing",
        "--steps",
        3,
        "--out",
        tmp_path / "a.png",
    )
    assert "total" in run("evaluate", "--model", out, "--data", "digits", "--num", 2)


def test_the_flow_schedule_can_be_replaced_and_used_by_others(tmp_path: Path) -> None:
    train(tmp_path / "a", **FLOW | {"schedule": "cosine"}, steps=1)
    assert load_folder(tmp_path / "a").objective == Objective(NoiseSchedule.cosine(20), "flow")
    train(tmp_path / "b", **FLOW | {"schedule": "flow", "prediction": "epsilon"}, steps=1)
    assert load_folder(tmp_path / "b").objective == Objective(NoiseSchedule.flow(20), "epsilon")


def test_the_command_gives_flow_its_schedule_with_the_small_network(tmp_path: Path) -> None:
    arguments = ("--steps", 1, "--sample-every", 0, "--no-progress", "--no-tensorboard", "--threads", 1, "--channels", "16,32")
    run("train", tmp_path / "flow", "--prediction", "flow", *arguments)
    run("train", tmp_path / "flow", "--resume", "--steps", 2)
    again = [*arguments, "--network", "small"]
    again[1] = 3
    run("train", tmp_path / "flow", "--auto-resume", "--prediction", "flow", *again)
    run("train", tmp_path / "flow", "--resume", "--steps", 4, "--schedule", "flow")
    assert load_folder(tmp_path / "flow").objective == Objective(NoiseSchedule.flow(), "flow")
    run("train", tmp_path / "v", *arguments)
    assert load_folder(tmp_path / "v").objective == Objective(NoiseSchedule.cosine(), "v_prediction")


# ------------------------------------------------------------------------------------------------- an objective of one's own


def test_a_trainer_takes_an_objective(tmp_path: Path) -> None:
    schedule, digits = NoiseSchedule.cosine(20), load_dataset("digits")
    half = (Objective(schedule, "v_prediction").target + Objective(schedule, "flow").target) / 2
    objective = Objective(schedule, half, loss_weight="min_snr", gamma=3.0)
    for folder, parts in (("whole", ((4, False),)), ("cut", ((2, False), (4, True)))):
        for steps, resume in parts:
            torch.manual_seed(0)
            options = TrainOptions(**SHARED | {"steps": steps, "resume": resume})
            Trainer(plain(1), objective, digits, options, tmp_path / folder).run()
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")
    loaded = load_folder(tmp_path / "whole")
    assert loaded.objective == Objective(schedule, half)  # weights of the loss do not concern a drawing
    run("sample", "--model", tmp_path / "whole", "--num", 1, "--steps", 3, "--out", tmp_path / "a.png")
    options = TrainOptions(**SHARED | {"steps": 4, "resume": True})
    with pytest.raises(ValueError, match=r"train: expected prediction to be 'custom', as in .*, got 'v_prediction'"):
        Trainer(plain(1), Objective(schedule, "v_prediction"), digits, options, tmp_path / "whole").run()


def test_objectives_that_do_not_fit_are_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    schedule, digits, floats = NoiseSchedule.cosine(20), load_dataset("digits"), [torch.zeros(1, 8, 8)] * 8
    uint8 = "to have uint8 images, as the bound that trains a learned variance is one of 256 grey levels"
    lost = "epsilon, for which D = 0 at timestep 19"
    channels = "to have out_channels = 2, as the images of dataset and their variance"
    even = "to have an even number of out_channels, to predict the variance too"
    learned = Objective(schedule, variance="learned_range")
    for model, objective, dataset, options, wanted in (
        (plain(1), learned, digits, {}, InvalidValue("Trainer", "model", channels, "1")),
        (plain(1), learned, [digits[i].image for i in range(8)], {}, InvalidValue("Trainer", "model", even, "1")),
        (
            plain(2),
            schedule,
            digits,
            {},
            InvalidValue("Trainer", "model", "to have out_channels = 1, as the images of dataset", "2"),
        ),
        (plain(2), learned, floats, {}, InvalidValue("Trainer", "dataset", uint8, "torch.float32")),
        (
            plain(2),
            Objective(NoiseSchedule.flow(20), variance="learned_range"),
            digits,
            {},
            InvalidValue("Trainer", "prediction", "to determine x_0 at every timestep", lost),
        ),
        (
            plain(1),
            Objective(schedule),
            digits,
            {"loss_weight": "min_snr"},
            InvalidValue("Trainer", "options.loss_weight", "to be left out, as schedule is an Objective", "min_snr"),
        ),
        (
            Network(1),
            learned,
            [digits[i].image for i in range(8)],
            {},
            InvalidValue("Trainer", "model", "to take [2, 1, 8, 8], t [2] and return [2, 2, 8, 8]", "[2, 1, 8, 8]"),
        ),
    ):
        with refused(wanted):
            Trainer(model, objective, dataset, TrainOptions(**SHARED | {"steps": 1} | options), tmp_path / "run")  # type: ignore[arg-type]
    numbers = tmp_path / "numbers.npz"
    np.savez(numbers, np.random.default_rng(0).random((8, 8, 8)))
    with pytest.raises(ValueError, match="to have uint8 images, as the bound"):
        train(tmp_path / "run", **LEARNED | {"data": str(numbers), "conditional": False}, steps=1)
    assert not (tmp_path / "run").exists()


def test_a_plan_of_an_objective_draws() -> None:
    """A sampler knows nothing of predictions: columns of one's own draw the images of the name."""
    schedule = NoiseSchedule.cosine(20)
    model = plain(1, sample_size=8).eval()
    named = sample(model, ddim_plan(Objective(schedule, "flow"), 4), 2, progress=False)
    given = sample(model, ddim_plan(Objective(schedule, Objective(schedule, "flow").target), 4), 2, progress=False)
    assert torch.equal(named, given)
