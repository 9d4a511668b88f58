"""Captured sampling. Without a GPU a stand-in records the steps and replays them: all but the capture itself is exercised."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_sample import SCHEDULE, tiny_unet
from torch import nn

from ddpm_fast import SamplingPlan, ddim_plan, ddpm_plan, graph, sample


class Captures:
    """Counts captures and replays of steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
        self.made = self.replayed = 0
        if device.type == "cpu":
            monkeypatch.setattr(graph, "DEVICE_TYPES", ("cpu",))
        real = graph.capture if device.type == "cuda" else self._stand_in

        def capture(*arguments: Any) -> Callable[[], None]:
            replay = real(*arguments)
            self.made += 1

            def counted() -> None:
                self.replayed += 1
                replay()

            return counted

        monkeypatch.setattr(graph, "capture", capture)

    @staticmethod
    def _stand_in(rehearse: Callable[[], None], advance: Callable[[], None], *_: Any) -> Callable[[], None]:
        rehearse()
        rehearse()
        return advance


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Captures:
    return Captures(monkeypatch, device)


def multistep_plan() -> SamplingPlan:
    plan = ddim_plan(SCHEDULE, 4)
    coefficients = plan.coefficients.clone()
    coefficients[1:, 5] = 0.25  # k3
    return dataclasses.replace(plan, coefficients=coefficients)


CASES: dict[str, tuple[dict[str, Any], SamplingPlan, dict[str, Any]]] = {
    "ddpm": ({}, ddpm_plan(SCHEDULE, 6), {}),
    "classes": ({"classes": 3}, ddpm_plan(SCHEDULE, 6), {"class_labels": [0, 1, 2, 0, 1]}),
    "guidance": ({"classes": 3}, ddim_plan(SCHEDULE, 4), {"class_labels": 1, "guidance_scale": 2.0}),
    "learned variance": ({"learned_variance": True}, ddpm_plan(SCHEDULE, 5, variance="learned_range"), {}),
    "multistep": ({}, multistep_plan(), {}),
    "one step": ({}, ddpm_plan(SCHEDULE, 1), {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_steps_give_the_bits_of_eager_ones(
    case: str, dtype: torch.dtype, captures: Captures, device: torch.device
) -> None:
    network, plan, arguments = CASES[case]
    model = tiny_unet(**network).to(device)
    arguments = arguments | {"batch_size": 2, "return_trajectory": 3, "progress": False, "dtype": dtype}
    eager = sample(model, plan, 5, cuda_graph=False, **arguments)
    assert (captures.made, captures.replayed) == (0, 0)
    for _ in range(2):
        images, states = sample(model, plan, 5, **arguments)
        assert torch.equal(images, eager[0])
        assert torch.equal(states, eager[1])
        assert images.device == device_of(model)
        assert (states.device.type, states.is_inference()) == ("cpu", False)
    assert captures.made == 2  # for batches of 2 and of the 1 that is left
    assert captures.replayed == 2 * 3 * plan.num_steps


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
