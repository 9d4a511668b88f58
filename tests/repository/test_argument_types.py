"""Mistakes that people make with the types of arguments, and what they are told. See "Arguments" in CONTRIBUTING.md.

A type is checked where a wrong one would be computed in silence, where objects are easily confused, or where the error would
come after minutes of work. Other types are Python's and PyTorch's to refuse.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from small_unets import make_unet
from torch import nn

import ddpm_fast as d

X, STEP, SEEDS = torch.zeros(2, 4, 4, 4), torch.tensor([3, 4]), d.sample_seeds(0, 2)
IMAGES, ONES, MASK = torch.zeros(2, 3, 4, 4), torch.ones(4), torch.ones(1, 1, 4, 4)
SCHEDULE = d.NoiseSchedule.linear(10)
OBJECTIVE, PLAN = d.Objective(SCHEDULE), d.ddpm_plan(SCHEDULE)


class Untouched(nn.Module):
    """A network that must not be called."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, *_: Any) -> NoReturn:
        raise AssertionError("the network was called")


NETWORK = Untouched()


@cache
def unet() -> d.UNet:
    return make_unet()[0]


@cache
def sampler() -> d.Sampler:
    return d.Sampler(NETWORK, PLAN, shape=(3, 4, 4))


@cache
def labelled() -> d.Sampler:
    return d.Sampler(make_unet(num_class_embeds=4, out_channels=2)[0], PLAN, shape=(2, 16, 16))


@cache
def builtin() -> d.Pretrained:
    return d.load_builtin()


def trainer(**changed: Any) -> d.Trainer:
    model = make_unet(in_channels=3, out_channels=3)[0]
    options = d.TrainOptions(sample_steps=5)
    given = {"model": model, "schedule": SCHEDULE, "dataset": [torch.zeros(3, 16, 16)], "options": options, "run_dir": "none"}
    return d.Trainer(**given | changed)


# Objects that are confused, the call, and the text of its error.
CONFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "schedule-objective": (
        lambda: d.default_plan(SCHEDULE),
        "default_plan: expected objective to be an Objective, got NoiseSchedule",
    ),
    "schedule-class": (lambda: d.ddpm_plan(d.NoiseSchedule), "ddpm_plan: expected schedule to be a NoiseSchedule .* got type"),
    "schedule-betas": (
        lambda: d.q_sample(X, STEP, SCHEDULE.betas, noise=X),
        "q_sample: expected schedule to be a NoiseSchedule",
    ),
    "schedule-plan": (lambda: d.Sampler(NETWORK, SCHEDULE), "Sampler: expected plan to be a SamplingPlan, got NoiseSchedule"),
    "plan-in-step": (lambda: d.reverse_step(X, X, 3, SCHEDULE, noise=X), "reverse_step: expected plan to be a SamplingPlan"),
    "model-sampler": (
        lambda: d.Sampler(sampler(), PLAN),
        "expected model to be a network, .* pass x.network, or call x itself",
    ),
    "model-pretrained": (
        lambda: d.Sampler(builtin(), PLAN),
        "expected model to be a network, .* pass x.model, or call x.sampler",
    ),
    "model-class": (lambda: d.Sampler(Untouched, PLAN), "expected model to be an nn.Module .* got the class Untouched"),
    "model-path": (lambda: d.Sampler("runs/digits", PLAN), "expected model to be an nn.Module .* got a str"),
    "sampler-model": (lambda: d.vary(unet(), IMAGES), "vary: expected sampler to be a Sampler, got UNet"),
    "images-sampler": (lambda: d.inpaint(IMAGES, sampler(), MASK), "inpaint: expected sampler to be a Sampler, got Tensor"),
    "teacher-sampler": (lambda: d.fit_plan(sampler(), teacher=sampler()), "fit_plan: expected teacher to be a SamplingPlan"),
    "freeze-path": (lambda: d.freeze("runs/digits"), "freeze: expected x to be .* got a str"),
    "fuse-path": (lambda: d.fuse("runs/digits"), "fuse: expected model to be an nn.Module, got str"),
    "trained-path": (lambda: trainer(model="runs/digits"), "Trainer: expected model to be a Module, got str"),
    "trained-plan": (lambda: trainer(schedule=PLAN), "Trainer: expected schedule to be a NoiseSchedule .* got SamplingPlan"),
    "options-dict": (lambda: trainer(options={"steps": 1}), "Trainer: expected options to be a TrainOptions, got dict"),
    "options-data": (
        lambda: d.train("none", d.DataOptions()),
        "train: expected options to be a TrainOptions or None, got DataO",
    ),
    "iterable": (lambda: trainer(dataset=iter([])), "Trainer: expected dataset to be map-style"),
    "out-sampler": (lambda: d.write_samples(sampler(), "out", 2), "write_samples: expected sampler to be a Sampler, got str"),
    "bound-model": (
        lambda: d.VariationalBound.of(NETWORK, IMAGES),
        "VariationalBound.of: expected sampler to be a Sampler, got",
    ),
    "numpy": (lambda: d.q_sample(X.numpy(), STEP, SCHEDULE, noise=X), "q_sample: expected x_0 to be a tensor, got ndarray"),
    "numpy-t": (
        lambda: d.q_sample(X, STEP.numpy(), SCHEDULE, noise=X),
        "expected t to be an int or an int64 tensor, got ndarray",
    ),
    "numpy-images": (lambda: d.vary(sampler(), IMAGES.numpy()), "vary: expected images to be a tensor, got ndarray"),
    "numpy-bound": (lambda: d.VariationalBound.of(sampler(), IMAGES.numpy()), "expected x_0 to be a tensor, got ndarray"),
    "numpy-features": (lambda: d.frechet_distance(np.ones((9, 2)), torch.ones(9, 2)), "expected a to be a tensor, got ndarray"),
    "path-model": (lambda: d.load_folder(NETWORK), "expected str, bytes or os.PathLike object, not Untouched"),
    "config-path": (lambda: d.NoiseSchedule.from_diffusers("scheduler"), "'str' object has no attribute 'get'"),
}

# Values that would be computed in silence.
SILENT: dict[str, tuple[Callable[[], object], str]] = {
    "true-samples": (lambda: sampler()(True), "Sampler: expected num_samples to be an integer in 1..4294967296, got True"),
    "true-steps": (lambda: d.ddim_plan(SCHEDULE, True), "ddim_plan: expected num_steps to be an integer in 1..10, got True"),
    "true-eta": (lambda: d.ddim_plan(SCHEDULE, 5, eta=True), "ddim_plan: expected eta to be a number, got bool"),
    "true-timestep": (lambda: d.q_sample(X, True, SCHEDULE, noise=X), "q_sample: expected t to be an int or an int64 tensor"),
    "true-clip": (lambda: d.ddpm_plan(SCHEDULE, 5, clip=True), "ddpm_plan: expected clip to be a number or None, got bool"),
    "true-guidance": (lambda: labelled()(2, guidance_scale=True), "Sampler: expected guidance_scale to be a number or None"),
    "true-option": (lambda: d.TrainOptions(lr=True), "TrainOptions: expected lr to be a number, got bool"),
    "true-seed": (lambda: d.sample_seeds(True, 2), "sample_seeds: expected seed to be an integer"),
    "text-flag": (lambda: d.TrainOptions(flip="false"), "TrainOptions: expected flip to be a bool, got str"),
    "text-number": (lambda: d.TrainOptions(steps="100"), "TrainOptions: expected steps to be a positive integer"),
    "text-names": (
        lambda: make_unet(num_class_embeds=4, class_names="cat"),
        "UNet: expected class_names to be a list of strings",
    ),
    "text-titles": (lambda: d.save_grid(IMAGES, "none/x.png", titles="ab"), "save_grid: expected titles to be a list of texts"),
    "text-config": (
        lambda: d.NoiseSchedule.from_diffusers({"rescale_betas_zero_snr": "no"}),
        "rescale_betas_zero_snr to be a bool",
    ),
    "numbers": (lambda: d.ModelOptions(channels=64), "ModelOptions: expected channels to be a list of integers, got 64"),
    "fractions": (lambda: d.ModelOptions(attention=[1.5]), "ModelOptions: expected attention to be a list of integers"),
    "range": (lambda: d.DataOptions(data_range=(0,)), "DataOptions: expected data_range to be two numbers, or two a channel"),
    "float-labels": (
        lambda: labelled()(2, class_labels=torch.ones(2)),
        "expected class_labels to be an int or 2 ints, got torch.float32",
    ),
    "float-t": (lambda: d.q_sample(X, STEP.float(), SCHEDULE, noise=X), "q_sample: expected t to be an int or an int64 tensor"),
    "float-step": (lambda: d.reverse_step(X, X, STEP.double(), PLAN, noise=X), "expected step to be an int or an int64 tensor"),
    "float-seeds": (lambda: d.noise((2, 4), SEEDS.float()), "noise: expected seeds to be an int64 tensor"),
    "fraction": (lambda: d.sample_seeds(0, 1.5), "sample_seeds: expected n to be an integer in"),
    "not-a-number": (
        lambda: d.ddim_plan(SCHEDULE, 5, eta=float("nan")),
        "ddim_plan: expected eta to be at least 0, got nan",
    ),
    "empty-path": (lambda: d.DataOptions(data=""), "DataOptions: expected data to be a path, got an empty text"),
}

# Values that would fail far from their cause, or after minutes.
LATE: dict[str, tuple[Callable[[], object], str]] = {
    "text-dtype": (lambda: d.freeze(unet(), "bfloat16"), "freeze: expected dtype to be float32, .* or None, got 'bfloat16'"),
    "numpy-dtype": (lambda: d.Sampler(NETWORK, PLAN, dtype=np.float32), "Sampler: expected dtype to be float32, "),
    "integers": (lambda: d.load_folder("none", dtype=torch.int8), "load_folder: expected dtype to be float32, "),
    "device": (lambda: d.load_folder("none", "gpu"), "expected device to be a torch.device or its name, got 'gpu'"),
    "callback": (lambda: sampler()(2, callback=5), "Sampler: expected callback to be callable or None, got int"),
    "on-checkpoint": (
        lambda: trainer(on_checkpoint="print"),
        "Trainer: expected on_checkpoint to be callable or None, got str",
    ),
    "logger": (lambda: trainer(loggers=[print]), "Trainer: expected loggers to be a Logger, got builtin_function_or_method"),
    "license": (lambda: d.push_to_hub("none", "owner/name", license=5), "push_to_hub: expected license to be a str, got int"),
    "misspelled": (
        lambda: d.ddim_plan(SCHEDULE, 5, spacing="trailling"),
        'expected spacing to be "leading", .* got ',
    ),
    "unknown-option": (
        lambda: sampler()(2, guidance=2.0),
        "Sampler: expected arguments among .*, got 'guidance'; did you mean",
    ),
    "unknown-key": (
        lambda: make_unet(in_chanels=3),
        "UNet: expected keys among .*, got 'in_chanels'; did you mean 'in_channels'",
    ),
}


@pytest.mark.parametrize("mistake", [*CONFUSED.values(), *SILENT.values(), *LATE.values()], ids=[*CONFUSED, *SILENT, *LATE])
def test_a_mistake_is_told_before_any_work(
    mistake: tuple[Callable[[], object], str], calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call, told = mistake
    labelled()  # what is drawn and made before does not count
    calls.clear()
    with pytest.raises((TypeError, ValueError, AttributeError), match=told):
        call()
    assert not calls
    assert not [*tmp_path.iterdir()]
