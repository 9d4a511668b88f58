"""Convolutions of oneDNN with weights reordered once: they compute PyTorch's, and make a network where it has no kernels."""

from __future__ import annotations

import copy
import importlib
import pickle

import pytest
import torch
from small_unets import SMALL, VARIANTS, make_inputs, randomise, relative_error
from torch import Tensor, nn

from ddpm_fast import freeze
from ddpm_fast.nn import UNet, onednn
from ddpm_fast.nn.freeze import FrozenUNet
from ddpm_fast.nn.onednn import OneDnnConv, has_prepacked

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if has_prepacked(dtype)]
pytestmark = pytest.mark.skipif(not DTYPES, reason="this PyTorch, or this CPU, lends no prepacked convolutions")


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU where oneDNN is the faster."""
    monkeypatch.setattr(
        importlib.import_module("ddpm_fast.nn.freeze"), "why_not_matrix_kernels", lambda *_: "oneDNN is the faster"
    )


def images(n: int, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, channels, 7, 6, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(5, 40, 3, padding=1),
        nn.Conv2d(16, 8, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(8, 3, 3, stride=2),
        nn.Conv2d(12, 24, 1),
    ],
)
@torch.no_grad()
def test_a_convolution_and_an_addition(conv: nn.Conv2d, dtype: torch.dtype) -> None:
    x = images(2, conv.in_channels, dtype)
    exact = copy.deepcopy(conv).to(dtype).double()(x.double())
    ours = OneDnnConv(copy.deepcopy(conv).to(dtype))
    tolerance = 1e-6 if dtype == torch.float32 else 6e-3
    for _ in range(2):  # the second time, with what was reordered the first time
        assert relative_error(ours(x), exact) < tolerance
        assert relative_error(ours(x, ours(x)), 2 * exact) < 2 * tolerance
    assert ours(x).is_contiguous(memory_format=torch.channels_last)
    assert ours(x[:0]).shape == (0, *exact.shape[1:])


@torch.no_grad()
def test_weights_that_are_loaded_cast_or_copied_are_reordered_anew() -> None:
    conv, other = nn.Conv2d(6, 9, 3, padding=1), nn.Conv2d(6, 9, 3, padding=1)
    x = images(2, 6)
    ours = OneDnnConv(conv)
    ours(x)
    ours.load_state_dict(other.state_dict())
    torch.testing.assert_close(ours(x), other(x))
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(twin(x), other(x))
    torch.testing.assert_close(ours.double()(x.double()), other.double()(x.double()))


@torch.no_grad()
def test_few_orders_are_kept() -> None:
    ours = OneDnnConv(nn.Conv2d(6, 9, 3, padding=1))
    for n in range(1, onednn.MAX_ORDERS + 3):
        ours(images(n, 6))
    assert len(ours._reordered) == onednn.MAX_ORDERS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("no_kernels")
@torch.no_grad()
def test_a_network_of_them(variant: str, dtype: torch.dtype) -> None:
    config = SMALL | VARIANTS[variant]
    model = UNet(**config).eval()
    randomise(model)
    inputs = make_inputs(config, 3)
    exact = copy.deepcopy(model).double()(*inputs)
    frozen = freeze(model, dtype)
    assert sum(isinstance(module, OneDnnConv) for module in frozen.modules()) > 10
    assert not any(isinstance(module, nn.Conv2d) for module in frozen.modules())
    allowed = 2 * relative_error(copy.deepcopy(model).to(dtype)(*inputs), exact)
    assert relative_error(frozen(*inputs), exact) <= allowed
    other = copy.deepcopy(frozen)
    for parameter in other.parameters():
        parameter.mul_(1.1)
    frozen.load_state_dict(other.state_dict())
    assert torch.equal(frozen(*inputs), other(*inputs))


@pytest.mark.usefixtures("no_kernels")
@torch.no_grad()
def test_where_pytorch_lends_none_its_own_convolutions_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> Tensor:
        raise AttributeError("no such operator")

    config = SMALL | VARIANTS["heads"]
    model = UNet(**config).eval()
    randomise(model)  # a new network's output is 0
    inputs = make_inputs(config, 2)
    with monkeypatch.context() as patch:
        patch.setattr(OneDnnConv, "forward", missing)
        frozen: FrozenUNet = freeze(model, torch.float32)
    assert not any(isinstance(module, OneDnnConv) for module in frozen.modules())
    exact = copy.deepcopy(model).double()(*inputs)
    assert relative_error(frozen(*inputs), exact) <= 2 * relative_error(model(*inputs), exact)
