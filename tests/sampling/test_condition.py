"""Sampling with a condition: a network that reads more than x_t."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refusals import by, refused
from small_unets import randomise
from torch import Tensor, nn

from ddpm_fast import (
    NoiseSchedule,
    Sampler,
    SamplingPlan,
    UNet,
    VariationalBound,
    ddim_inversion_plan,
    ddpm_plan,
    freeze,
    inpaint,
    interpolate,
    invert,
    repaint_plan,
    sample,
    sample_seeds,
    to_uint8,
    vary,
    write_samples,
)
from ddpm_fast.errors import ArgumentError, InvalidType, InvalidValue
from ddpm_fast.files.images import in_bands

SCHEDULE = NoiseSchedule.linear(20)
PLAN = ddpm_plan(SCHEDULE, 4)
N, C, K, SIDES = 5, 3, 2, (8, 16)


def network(**changes: Any) -> UNet:
    config = {
        **{"sample_size": SIDES, "in_channels": C + K, "out_channels": C, "block_out_channels": [16, 32], "norm_num_groups": 8},
        **{"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]},
        **{"attention_head_dim": None, "layers_per_block": 1, "num_train_timesteps": 20},
    }
    model = UNet(**config | changes).eval()
    randomise(model)
    with torch.no_grad():
        model.conv_out.weight.mul_(0.1)
    return model


def condition(n: int = N, channels: int = K, sides: tuple[int, ...] = SIDES) -> Tensor:
    return torch.randn(n, channels, *sides, generator=torch.Generator().manual_seed(3))


class Joined(nn.Module):
    """A network of x_t alone that joins the condition by itself, for all images at once."""

    def __init__(self, model: nn.Module, condition: Tensor) -> None:
        super().__init__()
        self.model, self.condition = model, condition
        self.config = {**dict(model.config), "in_channels": C}  # type: ignore[arg-type]

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Any:
        condition = self.condition.repeat(len(x_t) // len(self.condition), 1, 1, 1).to(x_t)
        x = torch.cat([x_t, condition], dim=1)
        return self.model(x, t) if class_labels is None else self.model(x, t, class_labels)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "centred": ({"center_input_sample": True}, {}),
    "classes": ({"num_class_embeds": 4}, {"class_labels": [0, 1, 2, 0, 1]}),
    "guidance": ({"num_class_embeds": 4, "no_label": 3}, {"class_labels": [0, 1, 2, 0, 1], "guidance_scale": 2.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_condition_is_a_concatenation_at_each_step(case: str) -> None:
    changes, arguments = CASES[case]
    model = network(**changes).double()
    expected = sample(Joined(model, condition()), PLAN, N, progress=False, **arguments)
    for kind in (model, Foreign(model)):
        images = sample(kind, PLAN, N, condition=condition(), shape=(C, *SIDES), progress=False, **arguments)
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-12)


class Foreign(nn.Module):
    """A network of another library, which has no configuration but classes."""

    def __init__(self, model: UNet) -> None:
        super().__init__()
        self.model = model
        self.config = {name: model.config.get(name) for name in ("num_class_embeds", "no_label")}

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Any:
        return self.model(x_t, t, class_labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_two_maps_give_what_one_gives(case: str, dtype: torch.dtype) -> None:
    """CPU kernels read x_t and the condition in place, whatever their numbers of channels."""
    changes, arguments = CASES[case]
    for channels in (1, K, 13, 29):
        model = network(**changes, in_channels=C + channels)
        given = condition(channels=channels)
        expected = sample(Joined(model, given), PLAN, N, progress=False, **arguments)
        images = sample(model, PLAN, N, condition=given, dtype=dtype, progress=False, **arguments)
        error = (images - expected).abs().max()
        assert error < (3e-6 if dtype == torch.float32 else 2e-2), float(error)


@pytest.mark.parametrize("kind", [freeze, Foreign])
def test_each_batch_reads_its_part(kind: Any) -> None:
    sampler, given, seeds = Sampler(kind(network()), PLAN, shape=(C, *SIDES)), condition(), sample_seeds(7, N)
    images, states = sampler.trajectory(N, seed=7, condition=given, batch_size=2, progress=False)
    assert torch.equal(states[-1], images)
    for part in (slice(0, 2), slice(2, 4), slice(4, 5)):
        alone = sampler(len(seeds[part]), seed=seeds[part], condition=given[part], progress=False)
        assert torch.equal(images[part], alone)


def test_a_network_may_not_change_its_input() -> None:
    with refused(by("sample", InvalidValue("model", "to leave its input unchanged", "one that changes x_t in place"))):
        sample(lambda x_t, t: x_t.mul_(2)[:, :C], PLAN, N, condition=condition(), shape=(C, *SIDES), progress=False)


def test_predicted_variances_leave_the_rest_to_the_condition() -> None:
    """Networks for super-resolution of guided-diffusion read six channels and predict six."""
    model = network(in_channels=6, out_channels=6)
    plan = ddpm_plan(SCHEDULE, 4, variance="learned_range")
    images = sample(model, plan, N, condition=condition(channels=3), progress=False)
    assert images.shape == (N, C, *SIDES)


MASK = torch.zeros(1, 1, *SIDES)
MASK[..., :4] = 1
EDITS: dict[str, tuple[SamplingPlan, Callable[..., Tensor]]] = {
    "vary": (PLAN, vary),
    "invert": (ddim_inversion_plan(SCHEDULE, 4, clip=None), invert),
    "inpaint": (repaint_plan(SCHEDULE, 4, 1, 2), lambda sampler, images, **given: inpaint(sampler, images, MASK, **given)),
    "interpolate": (
        PLAN,
        lambda sampler, images, **given: interpolate(sampler, images, images.flip(0), 3, **given),
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_editing_reads_the_condition(edit: str) -> None:
    plan, function = EDITS[edit]
    model, given, images = network().double(), condition().double(), condition(channels=C).double().tanh()
    joined = Joined(model, given.repeat_interleave(3, 0) if edit == "interpolate" else given)
    wanted = function(Sampler(joined, plan), images, progress=False)
    for batch_size in (None, 2):
        edited = function(Sampler(model, plan), images, condition=given, batch_size=batch_size, progress=False)
        torch.testing.assert_close(edited, wanted, rtol=0, atol=1e-11)


def test_the_bound_reads_the_condition() -> None:
    model, given, x_0 = network().double(), condition(), torch.zeros(N, C, *SIDES)
    plan = ddpm_plan(SCHEDULE)
    bound = VariationalBound.of(Sampler(model, plan, shape=(C, *SIDES)), x_0, condition=given, batch_size=2, progress=False)
    expected = VariationalBound.of(Sampler(Joined(model, given), plan, shape=(C, *SIDES)), x_0, progress=False)
    torch.testing.assert_close(bound.total, expected.total, rtol=1e-9, atol=0)


def test_files_are_of_one_condition(tmp_path: Path) -> None:
    given, arguments = condition(), {"batch_size": 2, "progress": False}
    sampler = Sampler(network(), PLAN)
    write_samples(tmp_path / "a.npz", sampler, N, condition=given, **arguments)
    with np.load(tmp_path / "a.npz") as archive:
        images = to_uint8(sampler(N, condition=given, **arguments)).permute(0, 2, 3, 1)
        assert np.array_equal(archive["arr_0"], images)
    with pytest.raises(ValueError, match="expected condition to be"):
        write_samples(tmp_path / "a.npz", sampler, N, condition=-given, **arguments)


def refusal(got: str) -> InvalidValue:
    return by("sample", InvalidValue("condition", "to be floating [5, 2, 8, 16]", got))


SHAPE = "to be (C, H, W) with C at most 2, which the model reads"
WRONG: dict[str, tuple[dict[str, Any], ArgumentError]] = {
    "none": (
        {"condition": None},
        by("sample", InvalidValue("condition", "to be [5, 2, 8, 16], as the model reads 2 channels after x_t", "None")),
    ),
    "channels": ({"condition": condition(channels=1)}, refusal("torch.float32 [5, 1, 8, 16]")),
    "size": ({"condition": condition(sides=(8, 8))}, refusal("torch.float32 [5, 2, 8, 8]")),
    "count": ({"condition": condition(4)}, refusal("torch.float32 [4, 2, 8, 16]")),
    "dtype": ({"condition": condition().to(torch.uint8)}, refusal("torch.uint8 [5, 2, 8, 16]")),
    "type": ({"condition": [1.0]}, by("sample", InvalidType("condition", "to be a tensor or None", "list"))),
    "nan": ({"condition": condition() * torch.nan}, by("sample", InvalidValue("condition", "to be finite", "NaN or infinity"))),
    "plain": (
        {"model": network(in_channels=C)},
        by("sample", InvalidValue("condition", "to be None, as the model reads x_t alone", "a condition")),
    ),
    "shape": (
        {"model": network(in_channels=2), "condition": None, "shape": (3, 8, 16)},
        by("sample", InvalidValue("shape", SHAPE, (3, 8, 16))),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_conditions_that_do_not_fit_are_refused(case: str) -> None:
    changes, error = WRONG[case]
    arguments = {"model": network(), "plan": PLAN, "num_samples": N, "condition": condition()} | changes
    with refused(error):
        sample(**arguments, progress=False)


def test_bands_show_conditions_above_images() -> None:
    images, grey = torch.rand(5, 3, 2, 2), torch.rand(5, 1, 2, 2)
    bands = in_bands([grey, images], 4)
    assert torch.equal(bands[:4], grey[:4].expand(-1, 3, -1, -1))
    assert torch.equal(bands[4:8], images[:4])
    assert torch.equal(bands[8], grey[4].expand(3, -1, -1))
    assert torch.equal(bands[12], images[4])
    assert bands[[9, 10, 11, 13, 14, 15]].abs().max() == 0
    assert torch.equal(in_bands([torch.rand(5, 2, 2, 2), images], 5), images)  # two channels are no picture
    assert torch.equal(in_bands([torch.cat([images, grey], dim=1), images], 5)[:5], images)  # those of a mask
