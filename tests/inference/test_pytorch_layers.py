"""Layers by PyTorch's convolutions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_unets import VARIANTS, assert_as_right, make_inputs, make_unet, relative_error
from torch import Tensor

from ddpm_fast import freeze
from ddpm_fast.inference.network import Conv
from ddpm_fast.inference.program import Builder, PythonProgram
from ddpm_fast.inference.pytorch_layers import PyTorchLayers


def images(n: int, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, channels, 7, 6, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)


def run(layers: PyTorchLayers, conv: Conv, x: Tensor, added: Tensor | None = None, **options: object) -> Tensor:
    builder = Builder()
    inputs = [x] if added is None else [x, added]
    buffers = [builder.buffer(each.shape, each.dtype) for each in inputs]
    residual = None if added is None else (buffers[1],)
    output = layers.conv(builder, conv, (buffers[0],), residual=residual, **options)  # type: ignore[arg-type]
    program = PythonProgram(builder.calls, buffers, output)
    before = [each.clone() for each in inputs]
    result = program(inputs)
    assert torch.equal(program(inputs), result)
    assert all(map(torch.equal, inputs, before))
    assert (result.shape, result.dtype) == (output.shape, x.dtype)
    return result


def make(layers: PyTorchLayers, shape: tuple[int, ...], *, bias: bool = True, **options: object) -> Conv:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) / shape[1] ** 0.5
    return Conv(layers.stored(weight), torch.linspace(-1, 1, shape[0]) if bias else None, **options)  # type: ignore[arg-type]


def exactly(conv: Conv, x: Tensor) -> Tensor:
    x = F.pad(x.double(), (0, 1, 0, 1)) if conv.asymmetric else x.double()
    bias = None if conv.bias is None else conv.bias.double()
    return F.conv2d(x, conv.weight.double(), bias, conv.stride, 0 if conv.asymmetric else conv.kernel // 2)


CONVOLUTIONS = {
    "3x3": ((40, 5, 3, 3), {}),
    "strided without a bias": ((8, 16, 3, 3), {"stride": 2, "bias": False}),
    "asymmetric": ((3, 8, 3, 3), {"stride": 2, "asymmetric": True}),
    "1x1": ((24, 12, 1, 1), {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
@torch.no_grad()
def test_a_convolution_an_addition_and_a_shortcut(name: str, dtype: torch.dtype) -> None:
    shape, options = CONVOLUTIONS[name]
    layers = PyTorchLayers(dtype)
    conv, x = make(layers, shape, **options), images(2, shape[1], dtype)  # type: ignore[arg-type]
    exact = exactly(conv, x)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    out = run(layers, conv, x)
    assert relative_error(out, exact) < tolerance
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(run(layers, conv, x, out), exact + out.double()) < 2 * tolerance
    assert relative_error(run(layers, conv, x, out, divisor=2.0), (exact + out.double()) / 2) < 2 * tolerance
    assert run(layers, conv, x[:0]).shape == (0, *exact.shape[1:])
    for bias in (True, False):
        shortcut = make(layers, (shape[0], 10, 1, 1), bias=bias)
        added = torch.randn(2, 10, *exact.shape[2:]).to(dtype).contiguous(memory_format=torch.channels_last)
        got = run(layers, conv, x, added, shortcut=shortcut, divisor=-2.0)
        assert relative_error(got, (exact + exactly(shortcut, added)) / -2) < 2 * tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("no_matrix_kernels")
def test_a_network(variant: str, dtype: torch.dtype) -> None:
    model, config = make_unet(variant)
    inputs, frozen = make_inputs(config, 3), freeze(model, dtype)
    assert frozen.why_not_packed == "as on a GPU"
    assert_as_right(frozen(*inputs), model, *inputs)
