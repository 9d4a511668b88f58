"""`Adapter`: any network in the form in which samplers and the variational bound use it."""

from __future__ import annotations

import pytest
import torch
from drawing import Recording
from small_unets import assert_as_right, make_inputs, make_unet
from torch import nn

from ddpm_fast import freeze
from ddpm_fast.inference import adapted
from ddpm_fast.inference.adapter import weights_digest

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["frozen", "foreign"])
@pytest.mark.parametrize("variant", ["heads", "class-conditional", "no-mid-attention"])
@pytest.mark.parametrize("channels", [0, 2])
@torch.no_grad()
def test_evaluation_reads_the_condition_after_x_t(kind: str, variant: str, channels: int) -> None:
    model, config = make_unet(variant, in_channels=3 + channels)
    x, t, labels = make_inputs(config, 2)
    network = adapted(model if kind == "frozen" else model.forward, CPU, torch.float32, 1000)
    assert network.is_frozen == (kind == "frozen")
    condition = x[:, 3:].double() if channels else None  # its dtype differs from the network's
    assert_as_right(network.evaluate(x[:, :3], t, labels, condition), model, x, t, labels)


def test_a_network_is_copied_to_another_dtype_and_left_as_it_was() -> None:
    model = Recording()
    network = adapted(model, CPU, torch.bfloat16, 1000)
    assert (network.dtype, {p.dtype for p in model.parameters()}) == (torch.bfloat16, {torch.float32})
    assert {each.dtype for each in network.parameters()} == {torch.bfloat16}
    same = adapted(model, CPU, None, 1000)
    assert same.model is model
    assert same.dtype == torch.float32


def test_a_frozen_network_has_the_digest_of_the_weights_that_it_was_made_from() -> None:
    model, _ = make_unet()
    digest = weights_digest(model)
    assert digest is not None
    for dtype in (torch.float32, torch.bfloat16, torch.float64):  # also where the network packs others
        frozen = freeze(model, dtype)
        assert frozen.digest == weights_digest(frozen) == digest
    network = freeze(model)
    network(torch.zeros(1, 2, 16, 16), 3)  # packs its weights
    with torch.no_grad():
        model.conv_in.weight.flatten()[0] += 0.25
    assert network.digest == digest
    assert weights_digest(model) == freeze(model).digest != digest
    assert weights_digest(lambda x_t, t: x_t) is None
    assert weights_digest(nn.Identity()) is None
