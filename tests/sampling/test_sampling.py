"""Sampling: Algorithm 2 to the letter, exact statistics, and images that depend on (seed, index) alone."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from drawing import SCHEDULE, Gaussian, Recording, tiny_unet
from refusals import refused
from small_unets import randomise
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
from ddpm_fast.nn import UNet
from ddpm_fast.plan import COLUMNS
from ddpm_fast.reference import STREAM_X_T

CLASSES = ("zero", "one", "ankle boot")


@torch.no_grad()
def algorithm_2(model: nn.Module, schedule: NoiseSchedule, shape: tuple[int, ...], seed: int, *labels: Tensor) -> Tensor:
    """Ho et al. 2020, Algorithm 2, in float64 and with the paper's words; sigma^2 = beta."""
    seeds = sample_seeds(seed, shape[0])
    x = noise(shape, seeds, stream=STREAM_X_T, dtype=torch.float64)
    for step, t in enumerate(reversed(range(schedule.num_timesteps))):
        z = noise(shape, seeds, stream=step, dtype=torch.float64) if t > 0 else torch.zeros(shape, dtype=torch.float64)
        epsilon = model(x, torch.full(shape[:1], t), *labels)
        beta, abar = schedule.betas[t], schedule.alpha_bars[t]
        x = (x - beta / (1 - abar).sqrt() * epsilon) / (1 - beta).sqrt() + beta.sqrt() * z
    return x


# ------------------------------------------------------------------------------------------------------------ correctness


def test_is_algorithm_2() -> None:
    model = tiny_unet()
    exact = algorithm_2(copy.deepcopy(model).double(), SCHEDULE, (3, 1, 8, 8), 5)
    plan = ddpm_plan(SCHEDULE, variance="fixed_large", clip=None)
    drawn = sample(model, plan, 3, seed=5, progress=False, dtype=torch.float64)
    # The coefficients of the plan are rounded to float32.
    torch.testing.assert_close(drawn, exact, rtol=0, atol=20 * 2**-24 * float(exact.abs().max()))
    # A float32 network gains more rounding at every step; a step that went wrong would show at the size of the image.
    torch.testing.assert_close(sample(model, plan, 3, seed=5, progress=False).double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ancestral_sampling_reproduces_a_gaussian(variance: Any) -> None:
    """With the optimal network every x_t is Gaussian, and eq. 13 tells how its mean and variance go from step to step."""
    mean, std = 0.4, 0.25
    schedule = NoiseSchedule.linear(300, scale_to_num_timesteps=True)
    images = sample(
        Gaussian(schedule, mean, std),
        ddpm_plan(schedule, variance=variance, clip=None),
        4,
        shape=(1, 64, 64),
        progress=False,
    )
    m, v = 0.0, 1.0
    for t in reversed(range(300)):
        beta, abar = float(schedule.betas[t]), float(schedule.alpha_bars[t])
        shrink = 1 / (abar * std**2 + 1 - abar)
        gain = (1 - beta * shrink) / math.sqrt(1 - beta)
        m = gain * m + beta * shrink * math.sqrt(abar) * mean / math.sqrt(1 - beta)
        sigma_2 = float(schedule.posterior_variance[t]) if variance == "fixed_small" else beta
        v = gain**2 * v + (sigma_2 if t > 0 else 0)
    assert m == pytest.approx(mean, abs=0.01)  # the chain itself leads to the data, up to its finite number of steps
    assert v == pytest.approx(std**2, rel=0.1)
    n = images.numel()
    assert float(images.mean()) == pytest.approx(m, abs=4 * math.sqrt(v / n))  # 4 standard errors
    assert float(images.var()) == pytest.approx(v, rel=4 * math.sqrt(2 / n))


def test_ddim_carries_noise_to_data_along_the_flow() -> None:
    """The probability flow of a Gaussian is affine: x_0 = mean + std x_T, image by image, up to the number of steps."""
    mean, std = 0.4, 0.25
    schedule = NoiseSchedule.linear(1000)
    images = sample(
        Gaussian(schedule, mean, std), ddim_plan(schedule, 500, clip=None), 4, seed=3, shape=(1, 8, 8), progress=False
    )
    x_T = noise((4, 1, 8, 8), sample_seeds(3, 4), stream=STREAM_X_T)
    torch.testing.assert_close(images, mean + std * x_T, rtol=0, atol=0.01)


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_what_the_network_predicts_makes_no_difference(prediction: Any) -> None:
    def draw(prediction: Any) -> Tensor:
        model = Gaussian(SCHEDULE, 0.4, 0.25, prediction)
        plan = ddpm_plan(SCHEDULE, 7, prediction=prediction)
        return sample(model, plan, 4, shape=(2, 5, 3), progress=False, dtype=torch.float64)

    torch.testing.assert_close(draw(prediction), draw("epsilon"), rtol=0, atol=1e-6)  # float32 coefficients


def test_learned_variance_takes_the_second_half_of_the_channels() -> None:
    class Split(nn.Module):
        def __init__(self, v: float) -> None:
            super().__init__()
            self.v = v

        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            return torch.cat([torch.tanh(x_t), torch.full_like(x_t, self.v)], dim=1)

    def draw(v: float) -> Tensor:
        return sample(Split(v), ddpm_plan(SCHEDULE, variance="learned_range"), 3, shape=(1, 4, 4), progress=False)

    def fixed(variance: Any) -> Tensor:
        model = Recording()
        nn.init.ones_(model.weight)
        return sample(model, ddpm_plan(SCHEDULE, variance=variance), 3, shape=(1, 4, 4), progress=False)

    torch.testing.assert_close(draw(1.0), fixed("fixed_large"), rtol=0, atol=1e-5)
    torch.testing.assert_close(draw(-1.0), fixed("fixed_small"), rtol=0, atol=1e-5)
    assert not torch.allclose(draw(0.0), draw(1.0), atol=1e-2)


def test_multistep_plans_are_given_the_x_0_of_the_steps_before() -> None:
    plan = ddim_plan(SCHEDULE, 5)
    coefficients = plan.coefficients.clone()
    coefficients[1:, COLUMNS.index("k3")] = 0.25
    coefficients[2:, COLUMNS.index("k4")] = -0.125
    plan = dataclasses.replace(plan, coefficients=coefficients)
    drawn = sample(Recording(), plan, 2, shape=(1, 4, 4), progress=False, dtype=torch.float64)

    x = noise((2, 1, 4, 4), sample_seeds(0, 2), stream=STREAM_X_T, dtype=torch.float64)
    previous = earlier = torch.zeros_like(x)
    for p, q, k0, k1, k2, k3, k4, _, _, _, clip in coefficients.tolist():
        m = torch.tensor(0.9, dtype=torch.float32).double() * torch.tanh(x)
        x_0 = (p * x + q * m).clamp(-clip, clip)
        x = k0 * x_0 + k1 * x + k2 * m + k3 * previous + k4 * earlier
        previous, earlier = x_0, previous
    torch.testing.assert_close(drawn, x, rtol=0, atol=1e-6)  # float32 coefficients


# ------------------------------------------------------------------------------------------------------------ independence


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_an_image_is_the_same_alone_in_a_batch_and_in_chunks() -> None:
    plan = ddpm_plan(SCHEDULE, 5)
    together = sample(Recording(), plan, 16, seed=7, shape=(3, 6, 5), progress=False)
    assert len({tuple(image.flatten().tolist()) for image in together}) == 16
    for batch_size in (1, 3, 16, 100):
        chunked = sample(Recording(), plan, 16, seed=7, batch_size=batch_size, shape=(3, 6, 5), progress=False)
        assert torch.equal(chunked, together)
    assert torch.equal(sample(Recording(), plan, 5, seed=7, shape=(3, 6, 5), progress=False), together[:5])
    alone = sample(Recording(), plan, 1, seed=sample_seeds(7, 16)[9:10], shape=(3, 6, 5), progress=False)
    assert torch.equal(alone[0], together[9])
    assert not torch.equal(sample(Recording(), plan, 16, seed=8, shape=(3, 6, 5), progress=False), together)


def test_an_image_of_a_network_differs_by_the_rounding_of_its_convolutions(two_threads: None) -> None:
    model, plan = tiny_unet(), ddpm_plan(SCHEDULE, 5)
    exact = sample(model, plan, 16, progress=False, dtype=torch.float64)
    sampler = Sampler(model, plan)
    together, on_the_way = sampler.trajectory(16, progress=False)
    alone, alone_on_the_way = sampler.trajectory(1, seed=sample_seeds(0, 16)[11:12], progress=False)
    torch.set_num_threads(1)
    one_thread = sample(model, plan, 16, progress=False)
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
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = sample(model, ddpm_plan(SCHEDULE), 2, shape=(1, 4, 4), progress=False)
    assert all(not training for *_, training in model.body.calls)  # dropout was off
    assert torch.equal(images, sample(Recording(), ddpm_plan(SCHEDULE), 2, shape=(1, 4, 4), progress=False))
    assert (model.training, model.body.training, model.frozen.training, model.dropout.training) == (True, True, False, True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_mode_is_restored_after_an_error() -> None:
    class Failing(Recording):
        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            raise RuntimeError("out of order")

    model = Failing()
    with pytest.raises(RuntimeError, match="out of order"):
        sample(model, ddpm_plan(SCHEDULE), 1, shape=(1, 2, 2), progress=False)
    assert model.training


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

    class Zero(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            return torch.zeros_like(x_t)

    plan = ddpm_plan(SCHEDULE, 3)
    torch.testing.assert_close(
        sample(model, plan, 2, shape=(3, 4, 4), progress=False), sample(Zero(), plan, 2, shape=(3, 4, 4), progress=False)
    )


def test_the_state_of_a_frozen_network_is_channels_last() -> None:
    """The network would else convert it at every step."""
    seen: list[Tensor] = []
    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "add_attention": False}
    frozen = freeze(UNet(sample_size=4, layers_per_block=1, block_out_channels=[8], norm_num_groups=2, **blocks))
    sample(frozen, ddpm_plan(SCHEDULE, 3), 2, progress=False, callback=lambda step, timestep, x_t: seen.append(x_t))
    assert len(seen) == 3
    for x_t in seen:
        assert x_t.is_contiguous(memory_format=torch.channels_last)
        assert not x_t.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_network_steps_a_float32_state(dtype: torch.dtype) -> None:
    model, plan = Recording(), ddpm_plan(SCHEDULE)
    exact = sample(model, plan, 4, shape=(1, 8, 8), progress=False)
    calls = len(model.calls)
    images = sample(model, plan, 4, shape=(1, 8, 8), progress=False, dtype=dtype)
    assert images.dtype == torch.float32
    assert (model.weight.dtype, len(model.calls)) == (torch.float32, calls)  # a copy was cast, and called
    # Each of 20 steps may move the image by the rounding of a prediction of size up to 1, times q <= 1.
    error = (images - exact).abs().max()
    assert 0 < error < 20 * torch.finfo(dtype).eps

    cast = copy.deepcopy(model).to(dtype)
    assert torch.equal(sample(cast, plan, 4, shape=(1, 8, 8), progress=False), images)
    assert {call[1] for call in cast.calls[calls:]} == {dtype}


def test_images_are_ordinary_tensors() -> None:
    images, states = Sampler(Recording(), ddpm_plan(SCHEDULE), shape=(3, 4, 4)).trajectory(2, progress=False)
    for tensor in (images, states):
        assert tensor.is_contiguous()
        assert not tensor.is_inference()
        assert not tensor.requires_grad
    weight = torch.ones((), requires_grad=True)
    (weight * images).sum().backward()  # saves images for the backward pass
    torch.testing.assert_close(weight.grad, images.sum())


def test_the_model_may_wrap_its_output_as_diffusers_does() -> None:
    @dataclasses.dataclass
    class Output:
        sample: Tensor

    class Wrapping(Recording):
        def forward(self, x_t: Tensor, t: Tensor) -> Any:
            return Output(super().forward(x_t, t))

    plan = ddpm_plan(SCHEDULE)
    wrapped = sample(Wrapping(), plan, 2, shape=(1, 4, 4), progress=False)
    assert torch.equal(wrapped, sample(Recording(), plan, 2, shape=(1, 4, 4), progress=False))


# --------------------------------------------------------------------------------------------------- classes and guidance


def test_class_labels_are_one_for_all_or_one_an_image() -> None:
    model, plan = tiny_unet(classes=3), ddpm_plan(SCHEDULE, 5)
    mixed = sample(model, plan, 4, class_labels=[0, 1, 2, 1], progress=False)
    assert torch.equal(sample(model, plan, 4, class_labels=torch.tensor([0, 1, 2, 1]), progress=False), mixed)
    for label in range(3):
        same = sample(model, plan, 4, class_labels=label, progress=False)
        rows = [i for i in range(4) if [0, 1, 2, 1][i] == label]
        torch.testing.assert_close(same[rows], mixed[rows])
        assert not torch.allclose(same, mixed, atol=1e-3)
    unlabelled = sample(model, plan, 4, class_labels="none", progress=False)
    assert torch.equal(unlabelled, sample(model, plan, 4, class_labels=3, progress=False))


def test_classes_take_turns_without_labels() -> None:
    model, plan = tiny_unet(classes=3), ddpm_plan(SCHEDULE, 3)
    in_turn = sample(model, plan, 5, class_labels=[0, 1, 2, 0, 1], progress=False)
    sampler = Sampler(model, plan)
    for images in (
        sample(model, plan, 5, progress=False),
        sampler(5, progress=False),
        sampler.trajectory(5, progress=False)[0],
    ):
        assert torch.equal(images, in_turn)
    # Guidance of labels that nobody gave is that of the classes in turn.
    guided = sample(model, plan, 3, guidance_scale=2.0, progress=False)
    assert torch.equal(guided, sample(model, plan, 3, class_labels=[0, 1, 2], guidance_scale=2.0, progress=False))
    assert torch.equal(sampler(5, class_labels="None", progress=False), sampler(5, class_labels=3, progress=False))


def test_a_class_may_be_called_none() -> None:
    model = UNet(**{**tiny_unet(classes=3).config, "class_names": ["all", "some", "none"]})
    randomise(model)
    sampler = Sampler(model, ddpm_plan(SCHEDULE, 2))
    assert torch.equal(sampler(2, class_labels="none", progress=False), sampler(2, class_labels=2, progress=False))
    assert not torch.equal(sampler(2, class_labels="none", progress=False), sampler(2, class_labels=3, progress=False))


def test_with_a_condition_there_is_no_class_unless_one_is_given() -> None:
    model = UNet(**{**tiny_unet(classes=3).config, "in_channels": 2})
    randomise(model)
    sampler = Sampler(model, ddpm_plan(SCHEDULE, 2))
    given: dict[str, Any] = {"condition": torch.ones(3, 1, 8, 8), "progress": False}
    images = sampler(3, **given)
    assert torch.equal(images, sampler(3, class_labels="none", **given))
    assert torch.equal(images, sampler(3, class_labels=3, **given))
    assert not torch.equal(images, sampler(3, class_labels=[0, 1, 2], **given))


def test_no_label_gives_guidance_to_a_model_without_a_configuration() -> None:
    model, plan = tiny_unet(classes=3), ddpm_plan(SCHEDULE, 3)

    def foreign(x_t: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        return model(x_t, t, class_labels)  # type: ignore[no-any-return]

    drawn = [
        sample(each, plan, 2, class_labels=1, guidance_scale=2.0, shape=(1, 8, 8), no_label=no_label, progress=False)
        for each, no_label in ((foreign, 3), (model, None))
    ]
    torch.testing.assert_close(*drawn, rtol=1e-4, atol=1e-4)
    unlabelled = sample(foreign, plan, 2, shape=(1, 8, 8), no_label=3, progress=False)
    assert torch.equal(unlabelled, sample(foreign, plan, 2, class_labels=3, shape=(1, 8, 8), progress=False))
    wanted = "to be None or 1, as nothing says which label is no class: pass no_label"
    with refused(InvalidValue("sample", "guidance_scale", wanted, "2.0")):
        sample(foreign, plan, 2, class_labels=1, guidance_scale=2.0, shape=(1, 8, 8), progress=False)
    with refused(InvalidValue("sample", "guidance_scale", "to be None or 1, as there are no class_labels", "2.0")):
        sample(foreign, plan, 2, class_labels=3, guidance_scale=2.0, shape=(1, 8, 8), no_label=3, progress=False)
    with refused(InvalidType("sample", "no_label", "to be an integer in 0..9223372036854775807 or None", "'3'")):
        sample(foreign, plan, 2, class_labels=1, shape=(1, 8, 8), no_label="3", progress=False)  # type: ignore[arg-type]


def test_guidance_combines_the_conditional_and_the_unlabelled_prediction() -> None:
    model, labels = tiny_unet(classes=3), torch.tensor([0, 2, 1])
    scale = 2.5

    class Guided(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            conditional, unlabelled = wide(x_t, t, labels), wide(x_t, t, torch.full_like(labels, 3))
            return unlabelled + scale * (conditional - unlabelled)

    wide = copy.deepcopy(model).double()
    exact = algorithm_2(Guided(), SCHEDULE, (3, 1, 8, 8), 0)
    plan = ddpm_plan(SCHEDULE, variance="fixed_large", clip=None)
    drawn = sample(model, plan, 3, class_labels=labels, guidance_scale=scale, progress=False, dtype=torch.float64)
    torch.testing.assert_close(drawn, exact, rtol=0, atol=20 * 2**-24 * float(exact.abs().max()))
    chunked = sample(
        model, plan, 3, class_labels=labels, guidance_scale=scale, batch_size=2, progress=False, dtype=torch.float64
    )
    torch.testing.assert_close(chunked, drawn)


@pytest.mark.parametrize("scale", [None, 1, 1.0])
def test_guidance_of_1_costs_no_second_half(scale: float | None) -> None:
    class Counting(Recording):
        config = {"in_channels": 1, "sample_size": 4, "num_class_embeds": 3}  # noqa: RUF012

        def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x_t, t) * (1 + class_labels.reshape(-1, 1, 1, 1))

    model = Counting()
    sample(model, ddpm_plan(SCHEDULE, 2), 2, class_labels=1, guidance_scale=scale, progress=False)
    sample(model, ddpm_plan(SCHEDULE, 2), 2, class_labels=1, guidance_scale=0.0, progress=False)
    assert [call[0][0] for call in model.calls] == [2, 2, 4, 4]


# ---------------------------------------------------------------------------------------------------- trajectory, progress


def test_the_trajectory_goes_from_x_T_to_x_0() -> None:
    plan = ddpm_plan(SCHEDULE)
    shape = (5, 2, 3, 3)
    sampler = Sampler(Recording(), plan, shape=shape[1:])
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
    long = ddpm_plan(NoiseSchedule.linear(120))
    assert len(Sampler(Recording(), long, shape=(1, 2, 2)).trajectory(1, progress=False)[1]) == 51
    with refused(InvalidValue("Sampler.trajectory", "num_frames", "to be a positive integer", "0")):
        sampler.trajectory(5, num_frames=0)


def test_x_T_takes_the_place_of_noise() -> None:
    plan, shape = ddpm_plan(SCHEDULE), (5, 2, 3, 3)
    x_T = noise(shape, sample_seeds(0, 5), stream=STREAM_X_T)
    images = sample(Recording(), plan, 5, shape=shape[1:], progress=False)
    for batch_size in (None, 2):
        again = sample(Recording(), plan, 5, shape=shape[1:], x_T=x_T, batch_size=batch_size, progress=False)
        assert torch.equal(again, images)
    assert not torch.equal(sample(Recording(), plan, 5, shape=shape[1:], x_T=-x_T, progress=False), images)


def test_the_model_sees_the_timesteps_of_the_plan() -> None:
    model, plan = Recording(), ddpm_plan(SCHEDULE, 7, spacing="trailing")
    sample(model, plan, 3, shape=(1, 2, 2), progress=False)
    seen = torch.stack([t for _, _, t, _ in model.calls])
    assert seen.dtype == torch.int64
    assert torch.equal(seen, plan.timesteps[:, None].expand(7, 3))


def test_progress_counts_steps(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ddpm_plan(SCHEDULE, 5)
    sample(Recording(), plan, 4, shape=(1, 2, 2), batch_size=2)
    assert "10/10" in capsys.readouterr().err
    sample(Recording(), plan, 4, shape=(1, 2, 2), progress=False)
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"num_samples": 0}, InvalidValue("sample", "num_samples", "to be an integer in 1..4294967296", "0")),
        ({"batch_size": 0}, InvalidValue("sample", "batch_size", "to be a positive integer or None", "0")),
        (
            {"x_T": torch.zeros(4, 1, 8, 7)},
            InvalidValue("sample", "x_T", "to be floating [4, 1, 8, 8]", "torch.float32 [4, 1, 8, 7]"),
        ),
        ({"x_T": 0}, InvalidType("sample", "x_T", "to be a tensor or None", "int")),
        ({"callback": 1}, InvalidType("sample", "callback", "to be callable or None", "int")),
        (
            {"x_T": torch.zeros(4, 1, 8, 8).to_sparse()},
            InvalidType("sample", "x_T", "to be a dense tensor", "a tensor of layout torch.sparse_coo"),
        ),
        ({"cuda_graph": "no"}, InvalidType("sample", "cuda_graph", "to be a bool or None", "str")),
        ({"device": "foo"}, InvalidValue("sample", "device", "to be a torch.device or its name", "'foo'")),
        ({"device": "meta"}, InvalidValue("sample", "device", "to be one that computes", "meta")),
        (
            {"dtype": torch.float8_e4m3fn},
            InvalidType("sample", "dtype", "to be float32, float64, float16, bfloat16 or None", "torch.float8_e4m3fn"),
        ),
        ({"batch_size": True}, InvalidType("sample", "batch_size", "to be a positive integer or None", "True")),
        ({"dtype": "x"}, InvalidType("sample", "dtype", "to be float32, float64, float16, bfloat16 or None", "'x'")),
        ({"shape": 5}, InvalidType("sample", "shape", "to be integers (C, H, W)", "5")),
        ({"plan": SCHEDULE}, InvalidType("sample", "plan", "to be a SamplingPlan", "NoiseSchedule")),
        (
            {"dtype": torch.int64},
            InvalidType("sample", "dtype", "to be float32, float64, float16, bfloat16 or None", "torch.int64"),
        ),
        (
            {"model": Recording()},
            InvalidValue(
                "sample", "shape", "to be (C, H, W), as the model has no config with in_channels and sample_size", "None"
            ),
        ),
        ({"shape": (0, 8, 8)}, InvalidValue("sample", "shape", "to be integers (C, H, W), each at least 1", "[0, 8, 8]")),
        ({"shape": (1, 8, 7)}, InvalidValue("sample", "shape", "to have H and W that are multiples of 2", "8x7")),
        (
            {"plan": ddpm_plan(SCHEDULE, variance="learned")},
            InvalidValue(
                "sample",
                "",
                "a model with 2 output channels, as images have 1 and it predicts their variance",
                "1",
            ),
        ),
        ({"seed": torch.zeros(2)}, InvalidType("sample", "seed", "to be an int64 tensor (see sample_seeds)", "torch.float32")),
        (
            {"seed": 1 << 65},
            InvalidValue(
                "sample", "seed", "to be an integer in -9223372036854775808..18446744073709551615", "36893488147419103232"
            ),
        ),
        ({"seed": [1, 2]}, InvalidType("sample", "seed", "to be an int or int64 [4]", "list")),
        ({"x_T": torch.full((4, 1, 8, 8), math.nan)}, InvalidValue("sample", "x_T", "to be finite", "NaN or infinity")),
        ({"class_labels": 4}, InvalidValue("sample", "class_labels", "to be in 0..3", "4")),
        ({"class_labels": [0, 1, 2, -1]}, InvalidValue("sample", "class_labels", "to be in 0..3", "[0, 1, 2, -1]")),
        ({"class_labels": [0, 1]}, InvalidValue("sample", "class_labels", "to be an int or 4 ints", "torch.int64 [2]")),
        (
            {"class_labels": "boot"},
            InvalidValue("sample", "class_labels", "to be integers, as the model has no class names", "'boot'"),
        ),
        ({"class_labels": [[0], [1, 2]]}, InvalidType("sample", "class_labels", "to be an int or 4 ints", "[[0], [1, 2]]")),
        ({"class_labels": 0.5}, InvalidValue("sample", "class_labels", "to be an int or 4 ints", "torch.float32 []")),
        (
            {"model": tiny_unet(), "class_labels": 1},
            InvalidValue("sample", "class_labels", "to be None, as the model has no classes", "1"),
        ),
        ({"model": freeze(tiny_unet(), num_timesteps=19)}, InvalidValue("sample", "plan", "to have timesteps below 19", "19")),
        (
            {"class_labels": 1, "guidance_scale": math.nan},
            InvalidValue("sample", "guidance_scale", "to be at least -10000.0 and at most 10000.0 or None", "nan"),
        ),
        ({"class_labels": 1, "guidance_scale": "2"}, InvalidType("sample", "guidance_scale", "to be a number or None", "str")),
        (
            {"class_labels": "none", "guidance_scale": 2.0},
            InvalidValue("sample", "guidance_scale", "to be None or 1, as there are no class_labels", "2.0"),
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


def test_labels_for_a_model_that_takes_none_are_refused_before_any_work() -> None:
    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("the model was called")

    message = r"^sample: expected class_labels to be None, as the model takes x_t and t alone, got 3$"
    with pytest.raises(ValueError, match=message):
        sample(predict, ddpm_plan(SCHEDULE), 2, shape=(1, 4, 4), class_labels=3, progress=False)


@pytest.mark.parametrize(
    ("model", "no_label", "wanted"),
    [
        (tiny_unet(), 3, "to be None, as the model has no classes"),
        (tiny_unet(classes=3), 4, "to be in 0..3"),
        (lambda x_t, t: x_t, 3, "to be None, as the model takes x_t and t alone"),
    ],
)
def test_a_label_for_no_class_has_to_fit_the_model(model: Any, no_label: int, wanted: str) -> None:
    with refused(InvalidValue("sample", "no_label", wanted, str(no_label))):
        sample(model, ddim_plan(SCHEDULE, 2), 1, shape=(1, 8, 8), no_label=no_label)
