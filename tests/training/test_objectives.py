"""Training of a learned variance, of flow matching, and of columns of one's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run as run_command
from drawing import tiny_unet
from items import read_data
from other_blocks import UNetModel
from refusals import by, refused
from runs import QUIET, SHARED, resume_and_compare, train
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

LEARNED = QUIET | {"variance": "learned_range", "num_timesteps": 20, "flip": True}
FLOW = QUIET | {"prediction": "flow", "num_timesteps": 20}


def run_trainer(folder: Path, model: Callable[[], nn.Module], objective: Any, dataset: Any = None, **options: Any) -> None:
    """Train a new network for four steps on digits, unless the options say otherwise."""
    dataset = read_data("digits") if dataset is None else dataset
    torch.manual_seed(0)
    Trainer(model(), objective, dataset, TrainOptions(**SHARED | {"steps": 4} | options), folder).run()


def draw(model: Path, out: Path, *more: object) -> None:
    run_command("sample", "--model", model, "--num", 1, "--steps", 3, "--out", out, *more)


RANGE_20 = Objective(NoiseSchedule.linear(20), variance="learned_range")
SOLVERS = ("dpm++2m", "dpm++2m-sde", "ddpm", "ddim", "heun", "ddim --spacing trailing")


@pytest.mark.parametrize(
    ("options", "expected", "config", "samplers", "evaluated"),
    [
        (LEARNED, RANGE_20, {"out_channels": 2, "variance": "learned_range"}, SOLVERS[1:3], "learned_range: bits/dim"),
        (FLOW, Objective(NoiseSchedule.flow(20), "flow"), {"out_channels": 1}, SOLVERS, "total"),
    ],
    ids=["learned variance", "flow matching"],
)
def test_an_objective_is_resumed_exported_sampled_and_evaluated(
    options: dict[str, Any], expected: Objective, config: dict[str, Any], samplers: Any, evaluated: str, tmp_path: Path
) -> None:
    train(tmp_path / "cut", **options, steps=2)
    resume_and_compare(train, tmp_path / "cut", **options, steps=4)
    out = export_checkpoint(tmp_path / "cut", tmp_path / "model", torch.float32)
    for folder in (out, tmp_path / "cut"):
        loaded = load_folder(folder)
        assert loaded.objective == expected
        assert config.items() <= dict(loaded.model.config).items()
    for sampler in samplers:
        draw(out, tmp_path / "a.png", "--sampler", *sampler.split())
    assert evaluated in run_command("evaluate", "bound", "--model", out, "--data", "digits", "--num", 2)


@pytest.mark.parametrize(
    ("options", "is_pipeline"),
    [(LEARNED | {"variance": "learned"}, False), (LEARNED, True), (FLOW, False)],
    ids=["learned", "learned_range", "flow"],
)
def test_an_exported_folder_is_a_pipeline_if_diffusers_has_its_objective(
    options: dict[str, Any], is_pipeline: bool, tmp_path: Path
) -> None:
    """Diffusers takes the channels of "learned" for variances, not for their logarithms."""
    train(tmp_path / "run", **options | {"conditional": False}, steps=1)
    out = export_checkpoint(tmp_path / "run", tmp_path / "model", torch.float32)
    assert load_folder(out).objective == load_folder(tmp_path / "run").objective
    config = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == options.get("prediction", "epsilon")
    assert ((out / "model_index.json").exists(), "_class_name" in config) == (is_pipeline, is_pipeline)
    if is_pipeline:
        pipeline = pytest.importorskip("diffusers").DDPMPipeline.from_pretrained(out)
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
    run_trainer(tmp_path / "run", lambda: network, NoiseSchedule.linear(100), images, variance="learned_range")
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
    begin = partial(run_trainer, model=partial(Network, 2), objective=NoiseSchedule.cosine(10), variance="learned")
    images = [each.image for each in read_data("digits", first=9)]
    begin(tmp_path / "cut", dataset=images, steps=2)
    resume_and_compare(begin, tmp_path / "cut", dataset=images)


# ----------------------------------------------------------------------------------------------------------- flow matching


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
    begin = partial(run_trainer, model=tiny_unet, objective=Objective(schedule, half, loss_weight="min_snr", gamma=3.0))
    begin(tmp_path / "cut", steps=2)
    resume_and_compare(begin, tmp_path / "cut")
    loaded = load_folder(export_checkpoint(tmp_path / "cut", tmp_path / "model"))
    assert loaded.objective == Objective(schedule, half)  # weights of the loss do not concern a drawing
    draw(tmp_path / "cut", tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"^Trainer\.run: expected prediction to be 'custom', as in .*, got 'v_prediction'"):
        run_trainer(tmp_path / "cut", tiny_unet, Objective(schedule, "v_prediction"), resume=True)


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
    with refused(by("Trainer", InvalidValue(*wanted))):
        run_trainer(tmp_path / "run", model, objective, images, **options)
    assert not (tmp_path / "run").exists()
