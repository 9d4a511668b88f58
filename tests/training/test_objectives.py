"""Training of a learned variance, of flow matching, and of columns of one's own."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from drawing import tiny_unet
from other_blocks import UNetModel
from refusals import refused
from runs import QUIET, SHARED, resume_and_compare, run_command, train
from torch import Tensor, nn

from ddpm_fast import (
    NoiseSchedule,
    Objective,
    Trainer,
    TrainOptions,
    export_checkpoint,
    load_folder,
)
from ddpm_fast.errors import InvalidValue
from ddpm_fast.integrations.guided_diffusion import load_guided_diffusion
from ddpm_fast.training.data import load_dataset

LEARNED = QUIET | {"variance": "learned_range", "num_timesteps": 20, "flip": True}
FLOW = QUIET | {"prediction": "flow", "num_timesteps": 20}


def run_trainer(folder: Path, model: nn.Module, objective: Any, dataset: Any = None, **options: Any) -> None:
    """Train a network of four steps on digits, unless the options say otherwise."""
    dataset = load_dataset("digits") if dataset is None else dataset
    Trainer(model, objective, dataset, TrainOptions(**SHARED | {"steps": 4} | options), folder).run()


def draw(model: Path, out: Path, *more: object) -> None:
    run_command("sample", "--model", model, "--num", 1, "--steps", 3, "--out", out, *more)


# -------------------------------------------------------------------------------------------------------- learned variance


def test_a_learned_variance_is_resumed_sampled_evaluated_and_exported(tmp_path: Path) -> None:
    train(tmp_path / "cut", **LEARNED, steps=2)
    resume_and_compare(train, tmp_path / "cut", **LEARNED, steps=5)
    export_checkpoint(tmp_path / "cut", tmp_path / "model", torch.float32)
    loaded = load_folder(tmp_path / "model")
    expected = Objective(NoiseSchedule.linear(20), variance="learned_range")
    assert loaded.objective == load_folder(tmp_path / "cut").objective == expected
    assert (loaded.interface.shape, loaded.interface.condition_channels) == ((1, 8, 8), 0)
    assert (loaded.model.config["out_channels"], loaded.model.config["variance"]) == (2, "learned_range")
    for sampler in ("ddpm", "dpm++2m-sde"):
        draw(tmp_path / "model", tmp_path / "a.png", "--sampler", sampler)
    assert "learned_range: bits/dim" in run_command("evaluate", "--model", tmp_path / "cut", "--data", "digits", "--num", 2)


@pytest.mark.parametrize(("variance", "is_pipeline"), [("learned", False), ("learned_range", True)])
def test_a_learned_variance_is_a_pipeline_of_diffusers(variance: str, is_pipeline: bool, tmp_path: Path) -> None:
    """Diffusers takes the channels of "learned" for variances, not for their logarithms."""
    train(tmp_path / "run", **LEARNED | {"variance": variance, "conditional": False}, steps=1)
    out = export_checkpoint(tmp_path / "run", tmp_path / "model", torch.float32)
    assert load_folder(out).objective.variance == variance
    assert (out / "model_index.json").exists() == is_pipeline
    if is_pipeline:
        pipeline = pytest.importorskip("diffusers").DDPMPipeline.from_pretrained(out)
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline.scheduler.config.variance_type == variance
        assert pipeline(batch_size=1, num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)


def test_weights_of_guided_diffusion_go_on_training(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = {"image_size": 16, "in_channels": 3, "model_channels": 32, "out_channels": 6, "num_res_blocks": 1}
    theirs = UNetModel(**config, attention_resolutions=(2,), channel_mult=(1, 2), num_heads=4, use_scale_shift_norm=True)
    network = load_guided_diffusion(theirs.state_dict(), num_heads=4, image_size=16)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images = [torch.full((3, 16, 16), 20 * i, dtype=torch.uint8) for i in range(12)]
    run_trainer(tmp_path / "run", network, NoiseSchedule.linear(100), images, variance="learned_range")
    assert all(not torch.equal(value, before[name]) for name, value in network.state_dict().items() if "weight" in name)
    loaded = load_folder(tmp_path / "run")
    assert loaded.objective.variance == "learned_range"
    assert loaded.interface.shape == (3, 16, 16)


BLACK = torch.zeros(8, 1, 8, 8, dtype=torch.uint8)
learning_unet = partial(tiny_unet, learned_variance=True)


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
    images = [digits[i].image for i in range(9)]

    def begin(folder: Path, **options: Any) -> None:
        torch.manual_seed(0)
        run_trainer(folder, Network(2), NoiseSchedule.cosine(10), images, variance="learned", **options)

    begin(tmp_path / "cut", steps=2)
    resume_and_compare(begin, tmp_path / "cut")


# ----------------------------------------------------------------------------------------------------------- flow matching


def test_flow_matching_trains_on_its_schedule_and_is_drawn_by_every_sampler(tmp_path: Path) -> None:
    train(tmp_path / "cut", **FLOW, steps=2)
    resume_and_compare(train, tmp_path / "cut", **FLOW, steps=4)
    out = export_checkpoint(tmp_path / "cut", tmp_path / "model", torch.float32)
    assert not (out / "model_index.json").exists()
    config = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert "_class_name" not in config
    assert config["prediction_type"] == "flow"
    for folder in (out, tmp_path / "cut"):
        assert load_folder(folder).objective == Objective(NoiseSchedule.flow(20), "flow")
    for sampler in ("dpm++2m", "dpm++2m-sde", "ddpm", "ddim", "heun"):
        draw(out, tmp_path / "a.png", "--sampler", sampler)
    draw(out, tmp_path / "a.png", "--sampler", "ddim", "--spacing", "trailing")
    assert "total" in run_command("evaluate", "--model", out, "--data", "digits", "--num", 2)


@pytest.mark.parametrize(("schedule", "prediction"), [("cosine", "flow"), ("flow", "epsilon")])
def test_the_flow_schedule_can_be_replaced_and_used_by_others(schedule: str, prediction: Any, tmp_path: Path) -> None:
    train(tmp_path, **FLOW | {"schedule": schedule, "prediction": prediction}, steps=1)
    assert load_folder(tmp_path).objective == Objective(getattr(NoiseSchedule, schedule)(20), prediction)


def test_the_command_gives_flow_its_schedule_with_the_small_network(tmp_path: Path) -> None:
    arguments = ("--steps", 1, "--sample-every", 0, "--no-progress", "--no-tensorboard", "--threads", 1, "--channels", "16,32")
    run_command("train", tmp_path / "flow", "--prediction", "flow", *arguments)
    run_command("train", tmp_path / "flow", "--resume", "--steps", 2)
    again = ("--auto-resume", "--prediction", "flow", "--network", "small")
    run_command("train", tmp_path / "flow", *arguments, *again, "--steps", 3)
    run_command("train", tmp_path / "flow", "--resume", "--steps", 4, "--schedule", "flow")
    assert load_folder(tmp_path / "flow").objective == Objective(NoiseSchedule.flow(), "flow")
    run_command("train", tmp_path / "v", *arguments)
    assert load_folder(tmp_path / "v").objective == Objective(NoiseSchedule.cosine(), "v_prediction")


# ------------------------------------------------------------------------------------------------- an objective of one's own


def test_a_trainer_takes_an_objective(tmp_path: Path) -> None:
    schedule = NoiseSchedule.cosine(20)
    half = (Objective(schedule, "v_prediction").target + Objective(schedule, "flow").target) / 2
    objective = Objective(schedule, half, loss_weight="min_snr", gamma=3.0)

    def begin(folder: Path, **options: Any) -> None:
        torch.manual_seed(0)
        run_trainer(folder, tiny_unet(), objective, **options)

    begin(tmp_path / "cut", steps=2)
    resume_and_compare(begin, tmp_path / "cut")
    loaded = load_folder(export_checkpoint(tmp_path / "cut", tmp_path / "model"))
    assert loaded.objective == Objective(schedule, half)  # weights of the loss do not concern a drawing
    draw(tmp_path / "cut", tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"train: expected prediction to be 'custom', as in .*, got 'v_prediction'"):
        run_trainer(tmp_path / "cut", tiny_unet(), Objective(schedule, "v_prediction"), resume=True)


SCHEDULE = NoiseSchedule.cosine(20)
RANGE = Objective(SCHEDULE, variance="learned_range")
UINT8 = "to have uint8 images, as the bound that trains a learned variance is one of 256 grey levels"


@pytest.mark.parametrize(
    ("model", "objective", "images", "options", "wanted"),
    [
        (tiny_unet, RANGE, None, {}, ("model", "to have out_channels = 2, as the images of dataset and their variance", "1")),
        (tiny_unet, RANGE, BLACK, {}, ("model", "to have an even number of out_channels, to predict the variance too", "1")),
        (learning_unet, SCHEDULE, None, {}, ("model", "to have out_channels = 1, as the images of dataset", "2")),
        (learning_unet, RANGE, torch.zeros(8, 1, 8, 8), {}, ("dataset", UINT8, "torch.float32")),
        (
            learning_unet,
            Objective(NoiseSchedule.flow(20), variance="learned_range"),
            None,
            {},
            ("prediction", "to determine x_0 at every timestep", "epsilon, for which D = 0 at timestep 19"),
        ),
        (
            tiny_unet,
            Objective(SCHEDULE),
            None,
            {"loss_weight": "min_snr"},
            ("options.loss_weight", "to be left out, as schedule is an Objective", "min_snr"),
        ),
        (
            partial(Network, 1),
            RANGE,
            BLACK,
            {},
            ("model", "to take [2, 1, 8, 8], t [2] and return [2, 2, 8, 8]", "[2, 1, 8, 8]"),
        ),
    ],
)
def test_objectives_that_do_not_fit_are_refused_before_a_folder_is_made(
    model: Any, objective: Any, images: Any, options: dict[str, str], wanted: tuple[str, str, str], tmp_path: Path
) -> None:
    with refused(InvalidValue("Trainer", *wanted)):
        run_trainer(tmp_path / "run", model(), objective, images, **options)
    assert not (tmp_path / "run").exists()
