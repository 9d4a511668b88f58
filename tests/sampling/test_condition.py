"""Sampling with a condition: a network that reads more than x_t."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refusals import refused
from small_unets import randomise
from torch import Tensor, nn

from ddpm_fast import (
    NoiseSchedule,
    Sampler,
    UNet,
    ddim_inversion_plan,
    ddpm_plan,
    freeze,
    inpaint,
    interpolate,
    invert,
    repaint_plan,
    sample,
    sample_seeds,
    save_grid,
    variational_bound,
    vary,
    write_samples,
)
from ddpm_fast.errors import InvalidType, InvalidValue
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
    "guidance": ({"num_class_embeds": 4}, {"class_labels": [0, 1, 2, 0, 1], "guidance_scale": 2.0}),
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
        self.model, self.shapes = model, set[tuple[int, ...]]()
        classes = model.config["num_class_embeds"]
        self.config = {} if classes is None else {"num_class_embeds": classes}

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Any:
        self.shapes.add(tuple(x_t.shape))
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


def test_each_batch_reads_its_part() -> None:
    model, given, seeds = network(), condition(), sample_seeds(7, N)
    for each in (model, Foreign(model)):
        images = sample(each, PLAN, N, seed=7, condition=given, batch_size=2, shape=(C, *SIDES), progress=False)
        for part in (slice(0, 2), slice(2, 4), slice(4, 5)):
            arguments: dict[str, Any] = {"condition": given[part], "shape": (C, *SIDES), "progress": False}
            assert torch.equal(images[part], sample(each, PLAN, len(given[part]), seed=seeds[part], **arguments))


def test_a_sampler_takes_another_condition_at_each_call() -> None:
    model = network()
    for each in (freeze(model), Foreign(model)):
        draw = Sampler(each, PLAN, shape=(C, *SIDES))
        first, second = (draw(N, condition=condition() * scale, progress=False) for scale in (1, -1))
        assert not torch.equal(first, second)
        assert torch.equal(first, draw(N, condition=condition(), progress=False))
        images, states = draw.trajectory(N, condition=condition(), progress=False)
        assert torch.equal(images, first)
        assert torch.equal(states[-1], first)
    draw = Sampler(Foreign(network(in_channels=C + 1)), PLAN, shape=(C, *SIDES))
    assert torch.isfinite(draw(N, condition=condition(channels=1), progress=False)).all()


def test_a_network_may_not_change_its_input() -> None:
    class Changing(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            return x_t.mul_(2)[:, :C]

    with refused(InvalidValue("sample", "model", "to leave its input as it is", "one that changes x_t in place")):
        sample(Changing(), PLAN, N, condition=condition(), shape=(C, *SIDES), progress=False)


def test_predicted_variances_leave_the_rest_to_the_condition() -> None:
    """Networks for super-resolution of guided-diffusion read six channels and predict six."""
    model = network(in_channels=6, out_channels=6)
    plan = ddpm_plan(SCHEDULE, 4, variance="learned_range")
    images = sample(model, plan, N, condition=condition(channels=3), progress=False)
    assert images.shape == (N, C, *SIDES)


def test_editing_reads_the_condition() -> None:
    model, given = network().double(), condition().double()
    images = condition(channels=C).double().tanh()
    joined = Joined(model, given)
    arguments: dict[str, Any] = {"progress": False}
    inversion = ddim_inversion_plan(SCHEDULE, 4, clip=None)
    mask = torch.zeros(1, 1, *SIDES)
    mask[..., :4] = 1
    reading, alone = Sampler(model, PLAN), Sampler(joined, PLAN)
    whole = Sampler(Joined(model, given.repeat_interleave(3, 0)), PLAN)
    inverting = [sampler.with_plan(inversion) for sampler in (reading, alone)]
    repainting = [sampler.with_plan(repaint_plan(SCHEDULE, 4, 1, 2)) for sampler in (reading, alone)]
    pairs = [
        (vary(reading, images, condition=given, **arguments), vary(alone, images, **arguments)),
        (invert(inverting[0], images, condition=given, **arguments), invert(inverting[1], images, **arguments)),
        (
            inpaint(repainting[0], images, mask, condition=given, **arguments),
            inpaint(repainting[1], images, mask, **arguments),
        ),
        (
            interpolate(reading, images, images.flip(0), 3, condition=given, **arguments),
            interpolate(whole, images, images.flip(0), 3, **arguments),
        ),
    ]
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)
    parts = inpaint(reading, images, mask, condition=given, batch_size=2, **arguments)
    torch.testing.assert_close(parts, inpaint(reading, images, mask, condition=given, **arguments), rtol=0, atol=1e-11)


def test_the_bound_reads_the_condition() -> None:
    model, given, x_0 = network().double(), condition(), torch.zeros(N, C, *SIDES)
    bound = variational_bound(model, x_0, SCHEDULE, condition=given, batch_size=2, progress=False)
    expected = variational_bound(Joined(model, given), x_0, SCHEDULE, progress=False)
    torch.testing.assert_close(bound.total, expected.total, rtol=1e-9, atol=0)


def test_files_are_of_one_condition(tmp_path: Path) -> None:
    model, given = network(), condition()
    sampler = Sampler(model, PLAN)
    write_samples(tmp_path / "a.npz", sampler, N, batch_size=2, condition=given, progress=False)
    images = sample(model, PLAN, N, batch_size=2, condition=given, progress=False)
    with np.load(tmp_path / "a.npz") as archive:
        expected = ((images.permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).numpy()
        assert np.array_equal(archive["arr_0"], expected.astype(np.uint8))
    with pytest.raises(ValueError, match="condition"):
        write_samples(tmp_path / "a.npz", sampler, N, batch_size=2, condition=-given, progress=False)


WRONG: dict[str, tuple[Any, Exception]] = {
    "none": (
        None,
        InvalidValue("sample", "condition", "to be [5, 2, 8, 16], as the model reads 2 channels after x_t", "None"),
    ),
    "channels": (
        condition(channels=1),
        InvalidValue("sample", "condition", "to be floating [5, 2, 8, 16]", "torch.float32 [5, 1, 8, 16]"),
    ),
    "size": (
        condition(sides=(8, 8)),
        InvalidValue("sample", "condition", "to be floating [5, 2, 8, 16]", "torch.float32 [5, 2, 8, 8]"),
    ),
    "count": (condition(4), InvalidValue("sample", "condition", "to be floating [5, 2, 8, 16]", "torch.float32 [4, 2, 8, 16]")),
    "dtype": (
        condition().to(torch.uint8),
        InvalidValue("sample", "condition", "to be floating [5, 2, 8, 16]", "torch.uint8 [5, 2, 8, 16]"),
    ),
    "type": ([1.0], InvalidType("sample", "condition", "to be a tensor or None", "list")),
    "nan": (condition() * torch.nan, InvalidValue("sample", "condition", "to be finite", "NaN or infinity")),
}


@pytest.mark.parametrize("case", WRONG)
def test_conditions_that_do_not_fit_are_refused(case: str) -> None:
    given, error = WRONG[case]
    with refused(error):  # type: ignore[arg-type]
        sample(network(), PLAN, N, condition=given, progress=False)


def test_models_and_conditions_that_do_not_go_together_are_refused() -> None:
    plain = network(in_channels=C)
    with refused(InvalidValue("sample", "condition", "to be None, as the model reads x_t alone", "a condition")):
        sample(plain, PLAN, N, condition=condition(), progress=False)
    wanted = "to be (C, H, W) with C at most 2, which the model reads"
    with refused(InvalidValue("sample", "shape", wanted, (3, 8, 16))):
        sample(network(in_channels=2), PLAN, N, shape=(3, 8, 16), progress=False)


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


def test_pictures_show_chosen_channels(tmp_path: Path) -> None:
    from PIL import Image

    images = torch.linspace(-1, 1, 5 * 4).view(1, 5, 2, 2)
    save_grid(images, tmp_path / "a.png", channels=[3], scale=1)
    shown = ((images[0, 3] + 1) * 127.5).round().to(torch.uint8).numpy()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), shown)
    with refused(InvalidValue("save_grid", "channels", "to be those of images, [1, 5, 2, 2]", [5])):
        save_grid(images, tmp_path / "a.png", channels=[5])
    with pytest.raises(ValueError, match="or choose channels"):
        save_grid(images, tmp_path / "a.png")
