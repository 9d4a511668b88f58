"""The benchmark of layers: what it counts, and that it finds every call of a network."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import benchmark_layers
import idioms
import pytest
import torch
from torch import Tensor, nn

from ddpm_fast.inference import packed_layers
from ddpm_fast.inference.program import Buffer, Call
from ddpm_fast.ops import backend
from ddpm_fast.ops.packed_conv import conv_ops

pytestmark = [
    pytest.mark.skipif(backend.native_error() is not None, reason="there is no compiled module"),
    pytest.mark.usefixtures("matrix_kernels"),
]


@pytest.mark.parametrize(
    ("method", "size", "kernel", "stride", "upsample", "expected"),
    [
        ("direct", (16, 16), 3, 1, False, 256 * 9),
        ("direct", (8, 8), 3, 1, False, 22**2),  # 3 taps of 8 pixels, but 2 at the edges
        ("direct", (4, 4), 3, 2, False, 11**2),
        ("direct", (8, 8), 1, 1, False, 64),
        ("direct", (16, 16), 3, 1, True, 256 * 4),
        ("tiles", (4, 4), 3, 1, False, 16 * 9),  # tiles take every tap
        ("tiles", (16, 16), 3, 1, True, 256 * 4),
        ("winograd", (8, 8), 3, 1, False, 16 * 16),
        ("winograd", (7, 7), 3, 1, False, 16 * 16),
        ("winograd", (16, 16), 3, 1, True, 16 * 36),
        ("winograd_large", (8, 8), 3, 1, False, 4 * 36),
    ],
)
def test_the_multiplications_of_a_method(
    method: str, size: tuple[int, int], kernel: int, stride: int, upsample: bool, expected: int
) -> None:
    size_x = tuple(each // 2 if upsample else each * stride for each in size)
    x, skip = (Buffer(i, (2, channels, *size_x), torch.float32) for i, channels in enumerate((5, 3)))
    out = Buffer(2, (2, 7, *size), torch.float32)
    arguments = (x, skip, None, False, None, None, None, 1.0, upsample, 7, *size, kernel, stride, kernel // 2)
    name, words, operations = benchmark_layers.words_of(Call(conv_ops[method], arguments, out))
    assert name == f"conv_{method}"
    assert words.startswith(f"{kernel}x{kernel} 8 -> 7, {size[0]}x{size[1]}")
    assert operations == 2 * 2 * 8 * 7 * expected


@pytest.mark.parametrize("changes", [{}, {"num_class_embeds": 11}])
def test_the_products_of_a_network(changes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """By direct sums they are those that hooks count in PyTorch's convolutions."""
    monkeypatch.setattr(benchmark_layers, "PEAK_SIDE", 64)
    monkeypatch.setattr(benchmark_layers, "SMALL", 0)
    monkeypatch.setattr(packed_layers, "method_of", lambda *_, **__: "direct")
    model = idioms.random_unet(idioms.NETWORKS["tiny"] | changes)
    counted: list[float] = []

    def count(share: float, layer: Any, inputs: tuple[Tensor], y: Tensor) -> None:
        counted.append(share * 2 * y.numel() * layer.weight[0].numel())

    hooked = copy.deepcopy(model)
    for name, layer in hooked.named_modules():
        if isinstance(layer, nn.Conv2d) or (isinstance(layer, nn.Linear) and "attentions" in name):
            share = 4 / 9 if "upsamplers" in name else 1  # four phases of 2x2 taps in place of 3x3
            layer.register_forward_hook(partial(count, share))
    labels = torch.zeros(2, dtype=torch.int64) if changes else None
    hooked(torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64), labels)
    rows = benchmark_layers.compare(model, torch.float32, 2, rounds=3)
    *layers, whole = rows
    attention = sum(row["GFLOP"] for row in layers if row["layer"].startswith("attention"))
    assert whole["GFLOP"] - attention == pytest.approx(sum(counted) / 1e9)
    assert attention > 0
    assert all(row["ms"] > 0 for row in rows)


def test_tiles_are_compared_with_a_product_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes: list[torch.dtype] = []
    monkeypatch.setattr(benchmark_layers, "peak", lambda dtype, rounds: dtypes.append(dtype) or 1e12)
    monkeypatch.setattr(benchmark_layers, "BFLOAT16", backend.Bfloat16.MATRIX_UNITS)
    benchmark_layers.compare(idioms.random_unet(idioms.NETWORKS["tiny"]), torch.bfloat16, 1, rounds=1)
    assert dtypes == [torch.bfloat16]
