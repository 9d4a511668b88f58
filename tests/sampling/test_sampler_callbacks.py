"""Callbacks of a `Sampler`: they see every step, and may change x_t in place. A network may not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from drawing import PLAN, SCHEDULE, Recording, draw, tiny_unet
from refusals import refused
from torch import Tensor, nn

from ddpm_fast import Sampler, SamplingPlan, sample_seeds
from ddpm_fast.errors import InvalidValue
from ddpm_fast.plan import COLUMNS


def test_the_callback_sees_every_step_of_every_batch() -> None:
    seen = []
    sampler = Sampler(Recording(), PLAN, shape=(1, 4, 4))
    images, states = sampler.trajectory(
        3,
        num_frames=4,
        batch_size=2,
        progress=False,
        callback=lambda step, timestep, x_t: seen.append((step, timestep, x_t.clone())),
    )
    assert [step for step, _, _ in seen] == [0, 1, 2, 0, 1, 2]
    assert [timestep for _, timestep, _ in seen] == 2 * PLAN.timesteps.tolist()
    for step in range(3):
        assert torch.equal(torch.cat([seen[step][2], seen[3 + step][2]]), states[step + 1])
    assert torch.equal(states[-1], images)


def test_a_callback_cannot_call_its_sampler() -> None:
    sampler = Sampler(tiny_unet(), PLAN)
    with pytest.raises(RuntimeError, match="expected a call after the one in progress, got one from its callback"):
        sampler(1, progress=False, callback=lambda *_: sampler(1, progress=False))
    assert sampler(1, progress=False).shape == (1, 1, 8, 8)


@pytest.mark.parametrize("network", ["frozen", "any other"])
def test_a_callback_may_change_x_t_in_place(network: str) -> None:
    arguments = {"shape": (1, 8, 8)}
    model: Any = Recording() if network == "any other" else tiny_unet()
    half = SamplingPlan(SCHEDULE, PLAN.timesteps[1:], PLAN.coefficients[1:], PLAN.prediction, PLAN.variance)
    seeds, x_1 = sample_seeds(0, 2), torch.full((2, 1, 8, 8), 0.25)

    def replace(step: int, timestep: int, x_t: Tensor) -> None:
        if step == 0:
            x_t.copy_(x_1)

    drawn = draw(model, seed=seeds, callback=replace, plan=dataclasses.replace(PLAN, coefficients=_still(PLAN)), **arguments)
    resumed = draw(model, plan=dataclasses.replace(half, coefficients=_still(half)), x_T=x_1, seed=seeds, **arguments)
    assert torch.equal(drawn, resumed)


def _still(plan: SamplingPlan) -> Tensor:
    """Return the coefficients of a plan without noise, which counts the steps of a plan from 0."""
    coefficients = plan.coefficients.clone()
    coefficients[:, COLUMNS.index("sigma")] = 0
    return coefficients


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "shape": lambda x_t: x_t.resize_(1, 1, 8, 8),
    "more": lambda x_t: x_t.resize_(5, 1, 8, 8),
    "strides": lambda x_t: x_t.transpose_(2, 3),
    "dtype": lambda x_t: setattr(x_t, "data", x_t.double()),
    "memory": lambda x_t: setattr(x_t, "data", x_t.clone()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("model", [tiny_unet(), Recording()], ids=["frozen", "any other"])
def test_what_a_callback_must_not_do_is_named(model: nn.Module, change: str) -> None:
    sampler = Sampler(model, PLAN, shape=(1, 8, 8))
    images = sampler(2, progress=False)
    kept: list[Tensor] = []

    def spoil(step: int, timestep: int, x_t: Tensor) -> None:
        kept.append(x_t)
        CHANGES[change](x_t)

    with pytest.raises(
        ValueError, match=r"sample: expected callback to change x_t in place, or a clone of it, and leave it torch.float32"
    ):
        sampler(2, progress=False, callback=spoil)
    assert torch.equal(sampler(2, progress=False), images)
    kept[0].resize_(10_000)  # later
    assert torch.equal(sampler(2, progress=False), images)


@pytest.mark.parametrize("change", [Tensor.unsqueeze_, Tensor.resize_, Tensor.transpose_, Tensor.mul_])
def test_a_network_that_changes_its_input_leaves_the_sampler_usable(change: Callable[..., Tensor]) -> None:
    arguments: Any = {Tensor.unsqueeze_: (0,), Tensor.resize_: (1, 1, 4, 4), Tensor.transpose_: (2, 3), Tensor.mul_: (0.5,)}

    class Changing(Recording):
        is_fixed = False

        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            out = super().forward(x_t, t)
            if not self.is_fixed:
                change(x_t, *arguments[change])
            return out

    model = Changing()
    sampler = Sampler(model, PLAN, shape=(1, 4, 4))
    with refused(InvalidValue("sample", "model", "to leave its input as it is", "one that changes x_t in place")):
        sampler(2, progress=False)
    model.is_fixed = True
    assert torch.equal(sampler(2, progress=False), draw(Recording(), shape=(1, 4, 4)))


def test_a_callback_has_the_callers_autocast() -> None:
    seen: list[bool] = []
    sampler = Sampler(tiny_unet(classes=3), PLAN)
    plain = sampler(2, progress=False)
    with torch.autocast("cpu", torch.bfloat16):
        images = sampler(2, progress=False, callback=lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    assert torch.equal(images, plain)
    assert seen == 3 * [True]
