"""`freeze`: the inference form has the model's outputs, and no model that it would change is taken."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_unet import SMALL, VARIANTS, make_inputs, randomise, relative_error

from ddpm_fast import freeze
from ddpm_fast.nn import UNet


def make(variant: str, **changes: Any) -> tuple[UNet, dict[str, Any]]:
    config = SMALL | VARIANTS[variant] | changes
    model = UNet(**config).eval()
    randomise(model)
    return model, config


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_are_those_of_the_model(variant: str, device: torch.device) -> None:
    model, config = make(variant)
    inputs = [x if x is None else x.to(device) for x in make_inputs(config, 3)]
    model = model.to(device)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(*inputs)
        # A wrong constant or a lost term cannot hide in float64's rounding. The sinusoids and their table are float32's.
        assert relative_error(freeze(model, torch.float64)(*inputs), exact) <= 1e-12
        for dtype in (torch.float32, torch.bfloat16):
            allowed = relative_error(copy.deepcopy(model).to(dtype)(*inputs), exact)
            out = freeze(model, dtype)(*inputs)
            assert out.dtype == dtype
            assert out.is_contiguous(memory_format=torch.channels_last)
            assert relative_error(out, exact) <= 2 * allowed
