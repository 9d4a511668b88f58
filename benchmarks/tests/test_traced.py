"""Traced steps: the calls that there are, counted in another way, and the time that they should take."""

from __future__ import annotations

from collections import Counter
from typing import Any

import idioms
import pytest
import torch
import traced
from cards import ATTAINABLE, LAUNCH, Card
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from traced import DENSE_SHARE, SHORTEST, Call

from ddpm_fast.nn.layers import GroupNormSiLU

CARD = Card("a card", bandwidth=1e12, multiprocessors=100, clock=1e9, architecture="sm_90a", cluster=16)
TINY = idioms.NETWORKS["tiny"]


# The attention layer has 32 channels and 2x2 pixels: q, k and v, and the product behind it.
OF_ATTENTION = 2 * 4 * 32 * (96 + 32)


def counted() -> tuple[int, int, int, int]:
    """Convolutions of 3x3, those of 1x1, norms, and the operations of the convolutions for an image."""
    model = idioms.random_unet(TINY).eval()
    kernels = [module.kernel_size[0] for module in model.modules() if isinstance(module, nn.Conv2d)]
    norms = sum(isinstance(module, GroupNormSiLU) for module in model.modules())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, TINY["sample_size"], TINY["sample_size"]), 0)
    return kernels.count(3), kernels.count(1), norms, counter.get_flop_counts()["Global"][torch.ops.aten.convolution]


def flops_of(calls: list[Call], *kinds: str) -> float:
    return sum(call.flops for call in calls if call.kind in kinds)


def test_a_step_of_sampling_has_the_network_s_calls() -> None:
    calls = traced.sampling_step(TINY)
    convolutions, shortcuts, norms, flops = counted()
    kinds = Counter(call.kind for call in calls)
    assert (kinds["convolutions"], kinds["products"], kinds["norms"]) == (convolutions, shortcuts + 2, norms)
    assert flops_of(calls, "convolutions", "products") == flops + OF_ATTENTION
    assert sum(call.geometry is not None for call in calls) == convolutions
    (first,) = (call for call in calls if call.geometry is not None and call.geometry.shape[0] == 3)
    image, weight = 2 * 3 * 8 * 8, 2 * 32 * (3 * 9 + 1)
    assert (first.moved, first.fixed) == (image + 2 * 32 * 8 * 8, weight)


@pytest.mark.parametrize(
    ("call", "seconds"),
    [
        (Call("adds", moved=1e6, fixed=2e6), 1e7 / (ATTAINABLE * 1e12)),
        (Call("products", moved=1, flops=1, results=1), SHORTEST),
        (Call("products", moved=1e9, flops=1, results=1), 8e9 / (ATTAINABLE * 1e12)),
        (Call("convolutions", moved=1, flops=1e12, results=4096 * 100), 8e12 / (DENSE_SHARE * CARD.dense)),
        (Call("convolutions", moved=1, flops=1e12, results=512), 8e12 / (DENSE_SHARE * CARD.dense / 100)),  # one tile
    ],
)
def test_the_time_of_a_call(call: Call, seconds: float) -> None:
    assert call.seconds(CARD, 8, {}) == (pytest.approx(seconds), 1)
    found = traced.predicted([call, call], CARD, 8, {})
    assert found[call.kind] == pytest.approx(2 * seconds)
    assert found["launches"] == 2 * LAUNCH
    assert found["sum"] == pytest.approx(2 * (seconds + LAUNCH))


def test_torch_compile_pays_for_no_bias() -> None:
    calls: Any = [Call("bias", moved=1e6), Call("adds", moved=1e6)]
    assert traced.predicted_compiled(calls, CARD, 8, {}) == pytest.approx(traced.predicted(calls[1:], CARD, 8, {})["sum"])
