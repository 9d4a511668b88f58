"""Attention with a native training step on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..ops._library import dtype_code, is_plain
from ..ops.backend import native
from .conv import is_untouched, step_of, trained_dtype

# Pixels of a map from which a layer's step is faster than with PyTorch's attention. Of 256 channels in one head, batch 16, two
# cores with AVX-512 BF16: in bfloat16 0.75 of its time at 16x16, 0.8 at 8x8 and 4x4; in float32 0.9 at 16x16, 1.1 at 8x8.
FEWEST_PIXELS: Final = {torch.bfloat16: 0, torch.float32: 256}


def is_trained_here(h: Tensor, projections: Sequence[nn.Module], num_heads: int) -> bool:
    """Return whether `attention` supports the training step of these layers.

    Args:
        h: Input of the projections, [N, HW, C].
        projections: The layers of queries, keys and values.
        num_heads: Number of heads.
    """
    channels = h.shape[-1]
    if not all(_is_plain_linear(layer, channels) for layer in projections):
        return False
    dtype = trained_dtype(h, *(parameter for layer in projections for parameter in layer.parameters()))
    return dtype is not None and channels // num_heads % step_of(dtype) == 0 and h.shape[1] >= FEWEST_PIXELS[dtype]


def _is_plain_linear(layer: nn.Module, channels: int) -> bool:
    """Return whether `layer` is an unmodified square nn.Linear with a bias."""
    return is_untouched(layer, nn.Linear) and layer.weight.shape == (channels, channels) and layer.bias is not None


def attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Return softmax(q k^T / sqrt(C / heads)) v over all pixels.

    First derivatives use this package's kernels, second derivatives PyTorch's.

    Args:
        qkv: [N, HW, 3 C]: q, k and v in this order, the heads of each one after another.
        num_heads: Number of heads, a divisor of C.

    Returns:
        [N, HW, C] in the dtype of qkv.
    """
    out: Tensor = _Attention.apply(qkv.contiguous(), num_heads)  # type: ignore[no-untyped-call]
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int) -> Tensor:
        n, pixels, channels = _sizes(qkv)
        y = qkv.new_empty(n, pixels, channels)
        softmax = qkv.new_empty(n, num_heads, 2, pixels, dtype=torch.float32)
        native().cpu.attention(
            *(dtype_code(qkv), y.data_ptr(), softmax.data_ptr(), qkv.data_ptr()), *_arguments(qkv, num_heads)
        )
        ctx.save_for_backward(qkv, y, softmax)
        ctx.num_heads = num_heads
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        qkv, y, softmax = ctx.saved_tensors
        if torch.is_grad_enabled() or not is_plain(grad, qkv):  # has a derivative
            return _gradient(qkv, grad, ctx.num_heads), None
        grad, grad_qkv = grad.contiguous(), torch.empty_like(qkv)
        native().cpu.attention_backward(
            *(dtype_code(qkv), grad_qkv.data_ptr(), grad.data_ptr(), y.data_ptr(), softmax.data_ptr(), qkv.data_ptr()),
            *_arguments(qkv, ctx.num_heads),
        )
        return grad_qkv, None


def _sizes(qkv: Tensor) -> tuple[int, int, int]:
    n, pixels, all_channels = qkv.shape
    return n, pixels, all_channels // 3


def _scale(qkv: Tensor, num_heads: int) -> float:
    return float((_sizes(qkv)[2] // num_heads) ** -0.5)


def _arguments(qkv: Tensor, num_heads: int) -> tuple[int, int, int, int, float, int]:
    n, pixels, channels = _sizes(qkv)
    return n, num_heads, pixels, channels // num_heads, _scale(qkv, num_heads), torch.get_num_threads()


def _gradient(qkv: Tensor, grad: Tensor, num_heads: int) -> Tensor:
    """Return the gradient of qkv, computed by differentiable PyTorch operations."""
    n, pixels, channels = _sizes(qkv)
    scale, shape = _scale(qkv, num_heads), (n, pixels, 3, num_heads, channels // num_heads)
    q, k, v = qkv.view(shape).permute(2, 0, 3, 1, 4).unbind(0)  # each [N, heads, HW, C / heads]
    grad = grad.reshape(n, pixels, num_heads, -1).transpose(1, 2)
    weights = (q @ k.transpose(2, 3) * scale).softmax(3)
    grad_weights = grad @ v.transpose(2, 3)
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(3, keepdim=True)) * scale
    gradients = (grad_scores @ k, grad_scores.transpose(2, 3) @ q, weights.transpose(2, 3) @ grad)
    return torch.stack(gradients, 2).permute(0, 3, 2, 1, 4).reshape(qkv.shape)
