"""`freeze`: the inference form has the model's outputs, and no model is taken that it would change."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from small_unets import SMALL, VARIANTS, make_inputs, randomise, relative_error
from torch import nn

from ddpm_fast import freeze
from ddpm_fast.nn import UNet
from ddpm_fast.nn.freeze import default_dtype


def make(variant: str = "heads", **changes: Any) -> tuple[UNet, dict[str, Any]]:
    config = SMALL | VARIANTS[variant] | changes
    model = UNet(**config).eval()
    randomise(model)
    return model, config


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_are_those_of_the_model(variant: str, device: torch.device) -> None:
    model, config = make(variant, dropout=0.1)
    inputs = [x if x is None else x.to(device) for x in make_inputs(config, 3)]
    model = model.to(device)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(*inputs)
        # A wrong constant or a lost term cannot hide in float64's rounding.
        assert relative_error(freeze(model, torch.float64)(*inputs), exact) <= 1e-13
        for dtype in (torch.float32, torch.bfloat16):
            allowed = relative_error(copy.deepcopy(model).to(dtype)(*inputs), exact)
            out = freeze(model.train(), dtype)(*inputs)  # without dropout all the same
            assert out.dtype == dtype
            assert out.is_contiguous(memory_format=torch.channels_last)
            assert relative_error(out, exact) <= 2 * allowed
            model.eval()


def test_the_model_is_left_as_it_was_and_the_copy_stays_as_it_is() -> None:
    model, config = make(dropout=0.1)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frozen = freeze(model, torch.bfloat16)
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    inputs = make_inputs(config, 2)
    out = frozen(*inputs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(frozen(*inputs), out)


def test_there_are_no_gradients_and_the_input_is_only_read() -> None:
    model, config = make()
    frozen = freeze(model)
    x, t, _ = make_inputs(config, 2)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    before = x.detach().clone()
    assert not frozen(x, t).requires_grad
    assert torch.equal(x, before)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_timesteps_may_be_an_int_a_scalar_or_one_per_sample() -> None:
    model, config = make()
    frozen = freeze(model, num_timesteps=10)
    x, _, _ = make_inputs(config, 2)
    expected = frozen(x, torch.tensor([9, 9]))
    assert torch.equal(frozen(x, 9), expected)
    assert torch.equal(frozen(x, torch.tensor(9)), expected)
    assert not torch.allclose(frozen(x, torch.tensor([9, 8])), expected)


def test_the_number_of_timesteps_is_that_of_the_config() -> None:
    assert freeze(make()[0]).num_timesteps == 1000
    model, _ = make(num_train_timesteps=50)
    assert freeze(model).num_timesteps == 50
    assert freeze(model, num_timesteps=60).num_timesteps == 60


def test_autocast_changes_nothing() -> None:
    model, config = make("class-conditional")
    frozen, inputs = freeze(model), make_inputs(config, 2)
    expected = frozen(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen(*inputs), expected)


# The last has weights of more than a megabyte. Two levels have every kind of layer, and compile in half the time of three.
@pytest.mark.parametrize(
    ("variant", "channels"), [("heads", [16, 32]), ("class-conditional", [16, 32]), ("heads", [16, 192])], ids=str
)
def test_compiles_whole(variant: str, channels: list[int]) -> None:
    blocks = {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
    model, config = make(variant, block_out_channels=channels, **blocks)
    frozen, inputs = freeze(model), make_inputs(config, 2)
    compiled = torch.compile(frozen, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*inputs), frozen(*inputs))


@pytest.mark.parametrize("packed", [True, False])
def test_freezing_draws_no_random_numbers(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not packed:
        monkeypatch.setattr(importlib.import_module("ddpm_fast.nn.freeze"), "why_not_matrix_kernels", lambda *_: "as on a GPU")
    model, _ = make()
    before = torch.get_rng_state()
    freeze(model, torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_empty_batch_gives_an_empty_batch() -> None:
    model, config = make()
    x, t, _ = make_inputs(config, 2)
    assert freeze(model)(x[:0], t[:0]).shape == (0, *model(x, t).shape[1:])


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_the_default_dtype_is_one_that_the_device_is_fast_at(has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16 or including_emulation)
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert default_dtype(torch.float32, gpu) == (torch.bfloat16 if has_bfloat16 else torch.float16)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):  # somebody chose it
        assert default_dtype(dtype, gpu) == dtype
    module = importlib.import_module("ddpm_fast.nn.freeze")  # the package's own name for it is the function's
    for fast in (True, False):
        monkeypatch.setattr(module, "has_fast_bfloat16", lambda fast=fast: fast)
        assert default_dtype(torch.float32, cpu) == (torch.bfloat16 if fast else torch.float32)
        assert default_dtype(torch.float64, cpu) == torch.float64


@pytest.mark.parametrize("variant", ["heads", "class-conditional"])
def test_a_large_batch_goes_in_parts(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = make(variant)
    frozen, inputs = freeze(model, torch.float64), make_inputs(config, 7)
    whole, widths = frozen(*inputs), []
    frozen.conv_in.register_forward_hook(lambda _, arguments, out: widths.append(len(out)))
    monkeypatch.setattr(importlib.import_module("ddpm_fast.nn.freeze"), "_CACHED_BYTES", 3 * whole[0, 0].numel() * 16 * 8)
    out = frozen(*inputs)
    assert widths == [3, 3, 1]
    assert relative_error(out, whole) <= 1e-14
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_packed_weights_stay_where_they_are() -> None:
    model, config = make()
    frozen, inputs = freeze(model, torch.float32), make_inputs(config, 2)
    if frozen.why_not_packed is not None:
        pytest.skip(frozen.why_not_packed)
    out = frozen(*inputs)
    assert torch.equal(copy.deepcopy(frozen).to("cpu", torch.float32)(*inputs), out)
    half = freeze(model, torch.bfloat16)
    if half.why_not_packed is None:
        out_of_half = half(*inputs)
        assert torch.equal(copy.deepcopy(half).to(torch.bfloat16)(*inputs), out_of_half)
        with pytest.raises(TypeError, match=r"expected to stay on cpu in torch\.bfloat16, .* got cpu and torch\.float32"):
            half.float()
        assert torch.equal(half(*inputs), out_of_half)
    for change in (lambda: frozen.half(), lambda: frozen.to("meta"), lambda: frozen.double()):
        with pytest.raises(TypeError, match=r"expected to stay on cpu in torch\.float32, for which its weights are packed"):
            change()
    assert torch.equal(frozen(*inputs), out)


def test_what_is_not_packed_is_cast() -> None:
    model, config = make()
    frozen, inputs = freeze(model, torch.float64), make_inputs(config, 2)
    out = frozen(*inputs)
    cast = frozen.float()
    assert cast(*inputs).dtype == torch.float32
    assert relative_error(cast(*inputs), out) < 1e-5


# ------------------------------------------------------------------------------------------------------------------ errors


class Adapter(nn.Module):
    """Stands where a linear layer stood, as libraries for fine-tuning do it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.weight, self.bias = linear, linear.weight, linear.bias


def _adapted(model: UNet) -> None:
    attention = model.mid_block.attentions[0]
    attention.to_q = Adapter(attention.to_q)


def _overridden(model: UNet) -> None:
    model.conv_out.forward = lambda x: x  # type: ignore[method-assign]


def _circular(model: UNet) -> None:
    model.conv_in.padding_mode = "circular"


def _hooked(model: UNet) -> None:
    model.mid_block.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_adapted, "mid_block.attentions.0.to_q is a Adapter of another make"),
        (_overridden, "conv_out is a Conv3x3 of another make"),
        (_circular, "conv_in pads with circular values"),
        (_hooked, "mid_block has forward hooks"),
    ],
)
def test_what_would_be_lost_is_refused(change: Callable[[UNet], None], reason: str) -> None:
    model, _ = make()
    change(model)
    with pytest.raises(TypeError, match=f"freeze: expected a UNet with its own layers, got one where {reason}"):
        freeze(model)


def test_bad_arguments_are_named() -> None:
    model, config = make()
    with pytest.raises(
        TypeError, match=r"freeze: expected model to be a ddpm_fast\.UNet \(UNet\.from_pretrained\), got a Conv2d"
    ):
        freeze(nn.Conv2d(1, 1, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"freeze: expected dtype to be a floating dtype, got torch\.int8"):
        freeze(model, torch.int8)
    with pytest.raises(TypeError, match=r"freeze: expected dtype to be a torch\.dtype, got 'bfloat16'"):
        freeze(model, "bfloat16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"freeze: expected num_timesteps to be at least 1, got -1"):
        freeze(model, num_timesteps=-1)
    with pytest.raises(TypeError, match=r"freeze: expected num_timesteps to be an int, got bool"):
        freeze(model, num_timesteps=True)
    with pytest.raises(ValueError, match=r"freeze: expected device to be a torch\.device or its name, got 'nowhere'"):
        freeze(model, device="nowhere")
    frozen = freeze(model, num_timesteps=10)
    x, t, _ = make_inputs(config, 2)
    with pytest.raises(ValueError, match=r"expected t in 0\.\.9, got 10"):
        frozen(x, 10)
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        frozen(x, torch.tensor([0, 10]))
    with pytest.raises(TypeError, match=r"expected integer timesteps, got torch\.float32"):
        frozen(x, t.float())
    with pytest.raises(ValueError, match="expected class_labels to be None"):
        frozen(x, 1, t)
    with pytest.raises(ValueError, match="multiples of 4"):
        frozen(x[..., :3], 1)
