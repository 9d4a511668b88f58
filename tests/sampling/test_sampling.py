"""Sampling: Algorithm 2 to the letter, and images that depend on (seed, index) alone."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from drawing import PLAN, SCHEDULE, Recording, draw, tiny_unet
from refusals import by, refused
from torch import Tensor, nn

from ddpm_fast import (
    NoiseSchedule,
    Sampler,
    ddim_plan,
    ddpm_plan,
    freeze,
    noise,
    sample,
    sample_seeds,
)
from ddpm_fast.errors import ArgumentError, InvalidType, InvalidValue
from ddpm_fast.plan import COLUMNS
from ddpm_fast.reference import STREAM_X_T

CLASSES = ("zero", "one", "ankle boot")


@torch.no_grad()
def algorithm_2(model: Callable[..., Tensor], schedule: NoiseSchedule, shape: tuple[int, ...], seed: int) -> Tensor:
    """Ho et al. 2020, Algorithm 2, in float64 and with the paper's words; sigma^2 = beta."""
    seeds = sample_seeds(seed, shape[0])
    x = noise(shape, seeds, stream=STREAM_X_T, dtype=torch.float64)
    for step, t in enumerate(reversed(range(schedule.num_timesteps))):
        z = noise(shape, seeds, stream=step, dtype=torch.float64) if t > 0 else torch.zeros(shape, dtype=torch.float64)
        epsilon = model(x, torch.full(shape[:1], t))
        beta, abar = schedule.betas[t], schedule.alpha_bars[t]
        x = (x - beta / (1 - abar).sqrt() * epsilon) / (1 - beta).sqrt() + beta.sqrt() * z
    return x


# ------------------------------------------------------------------------------------------------------------ correctness


@pytest.mark.parametrize("scale", [None, 2.5])
def test_is_algorithm_2_with_and_without_guidance(scale: float | None) -> None:
    model, labels = tiny_unet(classes=3), torch.tensor([0, 2, 1])
    wide = copy.deepcopy(model).double()

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        conditional, unlabelled = wide(x_t, t, labels), wide(x_t, t, torch.full_like(labels, 3))
        return conditional if scale is None else unlabelled + scale * (conditional - unlabelled)  # type: ignore[no-any-return]

    exact = algorithm_2(network, SCHEDULE, (3, 1, 8, 8), 5)
    plan = ddpm_plan(SCHEDULE, variance="fixed_large", clip=None)
    draw_3 = partial(sample, model, plan, 3, seed=5, class_labels=labels, guidance_scale=scale, progress=False)
    # The coefficients of the plan are rounded to float32.
    torch.testing.assert_close(draw_3(dtype=torch.float64), exact, rtol=0, atol=20 * 2**-24 * float(exact.abs().max()))
    # A float32 network gains more rounding at every step; a step that went wrong would show at the size of the image.
    torch.testing.assert_close(draw_3().double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("v", "variance"), [(1.0, "fixed_large"), (-1.0, "fixed_small")])
def test_learned_variance_takes_the_second_half_of_the_channels(v: float, variance: Any) -> None:
    def network(x_t: Tensor, t: Tensor) -> Tensor:
        return torch.cat([torch.tanh(x_t), torch.full_like(x_t, v)], dim=1)

    drawn = draw(network, 3, ddpm_plan(SCHEDULE, variance="learned_range"), shape=(1, 4, 4))
    fixed = draw(lambda x_t, t: torch.tanh(x_t), 3, ddpm_plan(SCHEDULE, variance=variance), shape=(1, 4, 4))
    torch.testing.assert_close(drawn, fixed, rtol=0, atol=1e-5)


def test_multistep_plans_are_given_the_x_0_of_the_steps_before() -> None:
    plan = ddim_plan(SCHEDULE, 5)
    coefficients = plan.coefficients.clone()
    coefficients[1:, COLUMNS.index("k3")] = 0.25
    coefficients[2:, COLUMNS.index("k4")] = -0.125
    plan = dataclasses.replace(plan, coefficients=coefficients)
    drawn = draw(Recording(), 2, plan, shape=(1, 4, 4), dtype=torch.float64)

    x = noise((2, 1, 4, 4), sample_seeds(0, 2), stream=STREAM_X_T, dtype=torch.float64)
    previous = earlier = torch.zeros_like(x)
    for p, q, k0, k1, k2, k3, k4, _, _, _, clip in coefficients.tolist():
        m = torch.tensor(0.9, dtype=torch.float32).double() * torch.tanh(x)
        x_0 = (p * x + q * m).clamp(-clip, clip)
        x = k0 * x_0 + k1 * x + k2 * m + k3 * previous + k4 * earlier
        previous, earlier = x_0, previous
    torch.testing.assert_close(drawn, x, rtol=0, atol=1e-6)  # float32 coefficients


# ------------------------------------------------------------------------------------------------------------ independence


def test_an_image_is_the_same_alone_in_a_batch_and_in_chunks() -> None:
    plan = ddpm_plan(SCHEDULE, 5)
    together = draw(Recording(), 16, plan, seed=7, shape=(3, 6, 5))
    for batch_size in (1, 3, 100):
        assert torch.equal(draw(Recording(), 16, plan, seed=7, batch_size=batch_size, shape=(3, 6, 5)), together)
    assert torch.equal(draw(Recording(), 1, plan, seed=sample_seeds(7, 16)[9:10], shape=(3, 6, 5))[0], together[9])
    for each in (together[8], *draw(Recording(), 2, plan, seed=8, shape=(3, 6, 5))):
        assert not torch.equal(each, together[9])


def test_an_image_of_a_network_differs_by_the_rounding_of_its_convolutions() -> None:
    model, plan, threads = tiny_unet(), ddpm_plan(SCHEDULE, 5), torch.get_num_threads()
    exact = draw(model, 16, plan, dtype=torch.float64)
    sampler = Sampler(model, plan)
    try:
        torch.set_num_threads(2)
        together, on_the_way = sampler.trajectory(16, progress=False)
        alone, alone_on_the_way = sampler.trajectory(1, seed=sample_seeds(0, 16)[11:12], progress=False)
        torch.set_num_threads(1)
        one_thread = draw(model, 16, plan)
    finally:
        torch.set_num_threads(threads)
    rounding = 2 * float((together - exact).abs().max())  # float32 rounding, as the batch of 16 has it
    assert rounding < 1e-3
    torch.testing.assert_close(alone[0], together[11], rtol=0, atol=rounding)
    torch.testing.assert_close(one_thread, together, rtol=0, atol=rounding)
    assert torch.equal(alone_on_the_way[0, 0], on_the_way[0, 11])  # x_T, to the last bit


# ------------------------------------------------------------------------------------------------------- the caller's model


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential()
    model.add_module("body", Recording())
    model.add_module("frozen", nn.Dropout(0.5).eval())
    model.add_module("dropout", nn.Dropout(0.5))
    model.forward = lambda x, t: model.dropout(model.frozen(model.body(x, t)))  # type: ignore[method-assign]
    before = copy.deepcopy(model.state_dict())
    assert torch.equal(draw(model, shape=(1, 4, 4)), draw(Recording(), shape=(1, 4, 4)))  # dropout was off
    with pytest.raises(KeyError):  # and after an error
        draw(model, shape=(1, 4, 4), callback=Mock(side_effect=KeyError))
    assert [each.training for each in (model, model.body, model.frozen, model.dropout)] == [True, True, False, True]
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_state_has_the_memory_format_of_the_weights(layout: torch.memory_format) -> None:
    seen = []
    model = nn.Conv2d(3, 3, 3, padding=1).to(memory_format=layout)
    call = model.forward
    model.forward = lambda x_t, t: (seen.append(x_t.is_contiguous(memory_format=layout)), call(x_t))[1]  # type: ignore
    images = sample(model, ddpm_plan(SCHEDULE, 3), 2, shape=(3, 4, 4), progress=False)
    assert seen == [True] * 3
    assert images.is_contiguous()
    # The noise is that of the logical order, whatever the memory is like.
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    zero = draw(lambda x_t, t: torch.zeros_like(x_t), shape=(3, 4, 4))
    torch.testing.assert_close(draw(model, shape=(3, 4, 4)), zero)


def test_the_state_of_a_frozen_network_is_channels_last() -> None:
    """The network would else convert it at every step."""
    look = Mock()
    draw(freeze(tiny_unet(in_channels=3, out_channels=3), num_timesteps=20), callback=look)
    states = [call.args[2] for call in look.call_args_list]
    assert [each.is_contiguous(memory_format=torch.channels_last) for each in states] == [True] * 3
    assert not any(each.is_contiguous() for each in states)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_network_steps_a_float32_state(dtype: torch.dtype) -> None:
    model, plan = Recording(), ddpm_plan(SCHEDULE)
    exact = draw(model, 4, plan, shape=(1, 8, 8))
    calls = len(model.calls)
    images = draw(model, 4, plan, shape=(1, 8, 8), dtype=dtype)
    assert images.dtype == torch.float32
    assert (model.weight.dtype, len(model.calls)) == (torch.float32, calls)  # a copy was cast, and called
    # Each of 20 steps may move the image by the rounding of a prediction of size up to 1, times q <= 1.
    assert 0 < (images - exact).abs().max() < 20 * torch.finfo(dtype).eps
    cast = copy.deepcopy(model).to(dtype)
    assert torch.equal(draw(cast, 4, plan, shape=(1, 8, 8)), images)
    assert {call[1] for call in cast.calls[calls:]} == {dtype}


def test_images_are_ordinary_tensors() -> None:
    for tensor in Sampler(Recording(), ddpm_plan(SCHEDULE), shape=(3, 4, 4)).trajectory(2, progress=False):
        assert tensor.is_contiguous()
        assert not tensor.requires_grad
        weight = torch.ones((), requires_grad=True)
        (weight * tensor).sum().backward()  # saves the tensor for the backward pass, as no inference tensor can be
        torch.testing.assert_close(weight.grad, tensor.sum())


def test_the_model_may_wrap_its_output_as_diffusers_does() -> None:
    model = Recording()
    wrapped = draw(lambda x_t, t: SimpleNamespace(sample=model(x_t, t)), shape=(1, 4, 4))
    assert torch.equal(wrapped, draw(model, shape=(1, 4, 4)))


# --------------------------------------------------------------------------------------------------- classes and guidance


def test_class_labels_are_one_for_all_or_one_an_image() -> None:
    model, plan = tiny_unet(classes=3), ddpm_plan(SCHEDULE, 5)
    mixed = draw(model, 4, plan, class_labels=[0, 1, 2, 1])
    torch.testing.assert_close(draw(model, 4, plan, class_labels=torch.tensor([0, 1, 2, 1]), batch_size=3), mixed)
    for label in range(3):
        same = draw(model, 4, plan, class_labels=label)
        rows = [i for i in range(4) if [0, 1, 2, 1][i] == label]
        torch.testing.assert_close(same[rows], mixed[rows])
        assert not torch.allclose(same, mixed, atol=1e-3)


TURNS, CONDITION = {"class_labels": [0, 1, 2, 0, 1]}, {"condition": torch.ones(5, 1, 8, 8)}


@pytest.mark.parametrize(
    ("config", "given", "same"),
    [
        ({}, {}, TURNS),
        # Guidance of labels that nobody gave is that of the classes in turn.
        ({}, {"guidance_scale": 2.0}, TURNS | {"guidance_scale": 2.0}),
        ({}, {"class_labels": "None"}, {"class_labels": 3}),
        ({"class_names": ["all", "some", "none"]}, {"class_labels": "none"}, {"class_labels": 2}),
        # With a condition there is no class unless one is given.
        ({"in_channels": 2}, CONDITION, CONDITION | {"class_labels": 3}),
        ({"in_channels": 2}, CONDITION | {"class_labels": "none"}, CONDITION | {"class_labels": 3}),
    ],
)
def test_classes_take_turns_without_labels_and_none_is_no_class(config: Any, given: Any, same: Any) -> None:
    sampler = Sampler(tiny_unet(classes=3, **config), PLAN)
    expected = sampler(5, **same, progress=False)
    for images in (sampler(5, **given, progress=False), sampler.trajectory(5, **given, progress=False)[0]):
        assert torch.equal(images, expected)
    assert not torch.equal(sampler(5, **given | {"class_labels": 1}, progress=False), expected)


def test_no_label_gives_guidance_to_a_model_without_a_configuration() -> None:
    model, arguments = tiny_unet(classes=3), {"class_labels": 1, "guidance_scale": 2.0, "shape": (1, 8, 8)}

    def foreign(x_t: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        return model(x_t, t, class_labels)  # type: ignore[no-any-return]

    torch.testing.assert_close(draw(foreign, no_label=3, **arguments), draw(model, **arguments), rtol=1e-4, atol=1e-4)
    unlabelled = draw(foreign, shape=(1, 8, 8), no_label=3)
    assert torch.equal(unlabelled, draw(foreign, class_labels=3, shape=(1, 8, 8), no_label=3))


@pytest.mark.parametrize("scale", [None, 1, 1.0])
def test_guidance_of_1_costs_no_second_half(scale: float | None) -> None:
    rows: list[int] = []

    def network(x_t: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        rows.append(len(x_t))
        return x_t * (1 + class_labels.reshape(-1, 1, 1, 1))

    for guidance_scale in (scale, 0.0):
        draw(network, 2, class_labels=1, guidance_scale=guidance_scale, shape=(1, 4, 4), no_label=3)
    assert rows == [2, 2, 2, 4, 4, 4]


# -------------------------------------------------------------------------------------------------------------- trajectory


def test_the_trajectory_goes_from_x_T_to_x_0() -> None:
    shape = (5, 2, 3, 3)
    sampler = Sampler(Recording(), ddpm_plan(SCHEDULE), shape=shape[1:])
    images, states = sampler.trajectory(5, batch_size=2, num_frames=21, progress=False)
    assert states.shape == (21, *shape)
    assert torch.equal(states[0], noise(shape, sample_seeds(0, 5), stream=STREAM_X_T))
    assert torch.equal(states[-1], images)
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(states))
    for asked, frames in ((5, range(0, 21, 5)), (1, [20]), (1000, range(21)), (10**9, range(21))):
        again, some = sampler.trajectory(5, num_frames=asked, progress=False)
        assert torch.equal(some, states[list(frames)])
        assert torch.equal(again, images)
    assert torch.equal(sampler(5, progress=False), images)
    assert torch.equal(sampler(5, x_T=states[0], batch_size=2, progress=False), images)
    long = ddpm_plan(NoiseSchedule.linear(120))
    assert len(Sampler(Recording(), long, shape=(1, 2, 2)).trajectory(1, progress=False)[1]) == 51


def test_the_model_sees_the_timesteps_of_the_plan() -> None:
    model, plan = Recording(), ddpm_plan(SCHEDULE, 7, spacing="trailing")
    draw(model, 3, plan, shape=(1, 2, 2))
    torch.testing.assert_close(torch.stack([t for _, _, t, _ in model.calls]), plan.timesteps[:, None].expand(7, 3))


# ------------------------------------------------------------------------------------------------------------------ errors


class Labelled(nn.Module):
    """A network with classes and without a configuration."""

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        return x_t


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"num_samples": 0}, by("sample", InvalidValue("num_samples", "to be an integer in 1..4294967296", "0"))),
        ({"batch_size": 0}, by("sample", InvalidValue("batch_size", "to be a positive integer or None", "0"))),
        (
            {"x_T": torch.zeros(4, 1, 8, 7)},
            by("sample", InvalidValue("x_T", "to be floating [4, 1, 8, 8]", "torch.float32 [4, 1, 8, 7]")),
        ),
        ({"x_T": 0}, by("sample", InvalidType("x_T", "to be a tensor or None", "int"))),
        ({"callback": 1}, by("sample", InvalidType("callback", "to be callable or None", "int"))),
        (
            {"x_T": torch.zeros(4, 1, 8, 8).to_sparse()},
            by("sample", InvalidType("x_T", "to be a dense tensor", "a tensor of layout torch.sparse_coo")),
        ),
        ({"device": "foo"}, by("sample", InvalidValue("device", "to be a torch.device or its name", "'foo'"))),
        ({"device": "meta"}, by("sample", InvalidValue("device", "to be one that computes", "meta"))),
        (
            {"dtype": torch.float8_e4m3fn},
            by("sample", InvalidType("dtype", "to be float32, float64, float16, bfloat16 or None", "torch.float8_e4m3fn")),
        ),
        ({"batch_size": True}, by("sample", InvalidType("batch_size", "to be a positive integer or None", "True"))),
        ({"dtype": "x"}, by("sample", InvalidType("dtype", "to be float32, float64, float16, bfloat16 or None", "'x'"))),
        ({"shape": 5}, by("sample", InvalidType("shape", "to be integers (C, H, W)", "5"))),
        ({"plan": SCHEDULE}, by("sample", InvalidType("plan", "to be a SamplingPlan", "NoiseSchedule"))),
        (
            {"dtype": torch.int64},
            by("sample", InvalidType("dtype", "to be float32, float64, float16, bfloat16 or None", "torch.int64")),
        ),
        (
            {"model": Recording()},
            by(
                "sample",
                InvalidValue("shape", "to be (C, H, W), as the model has no config with in_channels and sample_size", "None"),
            ),
        ),
        ({"shape": (0, 8, 8)}, by("sample", InvalidValue("shape", "to be integers (C, H, W), each at least 1", "[0, 8, 8]"))),
        ({"shape": (1, 8, 7)}, by("sample", InvalidValue("shape", "to have H and W that are multiples of 2", "8x7"))),
        (
            {"plan": ddpm_plan(SCHEDULE, variance="learned")},
            by(
                "sample",
                InvalidValue(
                    "",
                    "a model with 2 output channels, as images have 1 and it predicts their variance",
                    "1",
                ),
            ),
        ),
        (
            {"seed": torch.zeros(2)},
            by("sample", InvalidType("seed", "to be an int64 tensor (see sample_seeds)", "torch.float32")),
        ),
        (
            {"seed": 1 << 65},
            by(
                "sample",
                InvalidValue("seed", "to be an integer in -9223372036854775808..18446744073709551615", "36893488147419103232"),
            ),
        ),
        ({"seed": [1, 2]}, by("sample", InvalidType("seed", "to be an int or int64 [4]", "list"))),
        ({"x_T": torch.full((4, 1, 8, 8), math.nan)}, by("sample", InvalidValue("x_T", "to be finite", "NaN or infinity"))),
        ({"class_labels": 4}, by("sample", InvalidValue("class_labels", "to be in 0..3", "4"))),
        ({"class_labels": [0, 1, 2, -1]}, by("sample", InvalidValue("class_labels", "to be in 0..3", "[0, 1, 2, -1]"))),
        (
            {"class_labels": [0, 1]},
            by("sample", InvalidValue("class_labels", "to be an int or 4 ints", "torch.int64 of shape (2,)")),
        ),
        (
            {"class_labels": "boot"},
            by("sample", InvalidValue("class_labels", "to be integers, as the model has no class names", "'boot'")),
        ),
        ({"class_labels": [[0], [1, 2]]}, by("sample", InvalidType("class_labels", "to be an int or 4 ints", "[[0], [1, 2]]"))),
        (
            {"class_labels": 0.5},
            by("sample", InvalidValue("class_labels", "to be an int or 4 ints", "torch.float32 of shape ()")),
        ),
        (
            {"model": tiny_unet(), "class_labels": 1},
            by("sample", InvalidValue("class_labels", "to be None, as the model has no classes", "1")),
        ),
        (
            {"model": freeze(tiny_unet(), num_timesteps=19)},
            by("sample", InvalidValue("plan", "to have timesteps below 19", "19")),
        ),
        (
            {"class_labels": 1, "guidance_scale": math.nan},
            by("sample", InvalidValue("guidance_scale", "to be at least -10000.0 and at most 10000.0 or None", "nan")),
        ),
        (
            {"class_labels": 1, "guidance_scale": "2"},
            by("sample", InvalidType("guidance_scale", "to be a number or None", "str")),
        ),
        (
            {"class_labels": "none", "guidance_scale": 2.0},
            by("sample", InvalidValue("guidance_scale", "to be None or 1, as there are no class_labels", "2.0")),
        ),
        (
            {"model": Recording(), "shape": (1, 4, 4), "class_labels": 3},
            by("sample", InvalidValue("class_labels", "to be None, as the model takes x_t and t alone", "3")),
        ),
        *(
            (
                {"model": model, "shape": (1, 8, 8), "no_label": no_label},
                by("sample", InvalidValue("no_label", wanted, no_label)),
            )
            for model, no_label, wanted in (
                (tiny_unet(), 3, "to be None, as the model has no classes"),
                (tiny_unet(classes=3), 4, "to be in 0..3"),
                (Recording(), 3, "to be None, as the model takes x_t and t alone"),
            )
        ),
        ({"no_label": "3"}, by("sample", InvalidType("no_label", "to be an integer in 0..9223372036854775807 or None", "'3'"))),
        (
            {"class_labels": 3, "guidance_scale": 2.0, "no_label": 3},
            by("sample", InvalidValue("guidance_scale", "to be None or 1, as there are no class_labels", "2.0")),
        ),
        (
            {"model": Labelled(), "shape": (1, 8, 8), "class_labels": 1, "guidance_scale": 2.0},
            by(
                "sample",
                InvalidValue(
                    "guidance_scale",
                    "to be None or 1, as nothing says which label is no class: pass no_label to the Sampler, or add "
                    '"_ddpm_fast": {"no_label": NUMBER} to the config.json of the model, exported if it is a run',
                    "2.0",
                ),
            ),
        ),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    changes: dict[str, Any], error: ArgumentError, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"model": tiny_unet(classes=3), "plan": ddpm_plan(SCHEDULE), "num_samples": 4} | changes
    monkeypatch.setattr(type(arguments["model"]), "__call__", None)  # not to be called
    with refused(error):
        sample(**arguments, progress=False)
