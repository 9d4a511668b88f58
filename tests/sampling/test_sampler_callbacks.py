"""Callbacks of a `Sampler`: they see every step, and may change x_t in place. A network may not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from drawing import PLAN, Recording, draw, tiny_unet
from refusals import by, refused
from torch import Tensor, nn

from ddpm_fast import Sampler
from ddpm_fast.errors import InvalidValue
from ddpm_fast.plan import COLUMNS


def test_the_callback_sees_every_step_of_every_batch() -> None:
    seen = []
    images, states = Sampler(Recording(), PLAN, shape=(1, 4, 4)).trajectory(
        3,
        num_frames=4,
        batch_size=2,
        progress=False,
        callback=lambda step, timestep, x_t: seen.append((step, timestep, x_t.clone())),
    )
    assert [step for step, _, _ in seen] == [0, 1, 2, 0, 1, 2]
    assert [timestep for _, timestep, _ in seen] == 2 * PLAN.timesteps.tolist()
    drawn = [torch.cat([seen[step][2], seen[3 + step][2]]) for step in range(3)]
    assert torch.equal(torch.stack(drawn), states[1:])
    assert torch.equal(states[-1], images)


def test_a_callback_cannot_call_its_sampler() -> None:
    sampler = Sampler(tiny_unet(), PLAN)
    with pytest.raises(RuntimeError, match="expected a call after the one in progress, got one from its callback"):
        sampler(1, progress=False, callback=lambda *_: sampler(1, progress=False))
    assert sampler(1, progress=False).shape == (1, 1, 8, 8)


@pytest.mark.parametrize("model", [tiny_unet(), Recording()], ids=["frozen", "any other"])
def test_a_callback_may_change_x_t_in_place(model: nn.Module) -> None:
    coefficients = PLAN.coefficients.clone()
    coefficients[:, COLUMNS.index("sigma")] = 0  # noise counts the steps of a plan from 0
    plan = dataclasses.replace(PLAN, coefficients=coefficients)
    x_1 = torch.full((2, 1, 8, 8), 0.25)

    def replace(step: int, timestep: int, x_t: Tensor) -> None:
        if step == 0:
            x_t.copy_(x_1)

    drawn = draw(model, plan=plan, callback=replace, shape=(1, 8, 8))
    assert torch.equal(drawn, draw(model, plan=plan[1:], x_T=x_1, shape=(1, 8, 8)))


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
        ValueError, match=r"^Sampler: expected callback to change x_t in place, or a clone of it, and leave it torch.float32"
    ):
        sampler(2, progress=False, callback=spoil)
    assert torch.equal(sampler(2, progress=False), images)
    kept[0].resize_(10_000)  # later
    assert torch.equal(sampler(2, progress=False), images)


@pytest.mark.parametrize("change", ["unsqueeze", "shape", "strides", "values"])
def test_a_network_that_changes_its_input_leaves_the_sampler_usable(change: str) -> None:
    changes = CHANGES | {"unsqueeze": lambda x_t: x_t.unsqueeze_(0), "values": lambda x_t: x_t.mul_(0.5)}

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        out = torch.tanh(x_t)
        if wrong:
            changes[change](x_t)
        return out

    wrong = True
    sampler = Sampler(network, PLAN, shape=(1, 8, 8))
    with refused(by("Sampler", InvalidValue("model", "to leave its input unchanged", "one that changes x_t in place"))):
        sampler(2, progress=False)
    wrong = False
    assert torch.equal(sampler(2, progress=False), draw(network, shape=(1, 8, 8)))


def test_a_callback_has_the_callers_autocast() -> None:
    seen: list[bool] = []
    sampler = Sampler(tiny_unet(classes=3), PLAN)
    plain = sampler(2, progress=False)
    with torch.autocast("cpu", torch.bfloat16):
        images = sampler(2, progress=False, callback=lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    assert torch.equal(images, plain)
    assert seen == 3 * [True]
