"""attention: softmax(q k^T scale) v over all pixels of a feature map."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from .. import reference
from ..checks import check_float, check_int, check_number
from ..errors import InvalidValue, public
from .autocast import autocast, autocast_dtype, in_autocast
from .backend import why_not_matrix_kernels
from .conv3x3 import is_trained_natively
from .derivative import gradients_of
from .fused_op import FusedOp
from .modes import is_transformed
from .op_spec import Gradient, OpSpec
from .packed_conv import step_of, why_not_tiles

# Fewest pixels for which a layer's training step is faster than with PyTorch's attention. Its time relative to PyTorch's
# (256 channels in one head, two cores with AVX-512 BF16; float32 on Zen 5):
#   bfloat16, batch 16: 0.75 at 16x16, 0.8 at 8x8 and 4x4
#   float32, batch 16: 0.60 at 16x16, 0.69 at 8x8, 0.93 at 4x4
#   float32, batch 4: 0.64 at 16x16, 0.90 at 8x8, 1.42 at 4x4
FEWEST_PIXELS: Final = {torch.bfloat16: 0, torch.float32: 64}


@public(traced=True)
def attention(qkv: Tensor, num_heads: int, *, scale: float | None = None, backend: str | None = None) -> Tensor:
    """Return the self-attention of all pixels, softmax(q k^T scale) v (Vaswani et al. 2017).

    The scores are never stored for the backward pass, which computes them again. The reference is PyTorch's
    scaled_dot_product_attention. Under autocast qkv is cast.

    Args:
        qkv: [N, L, 3 C], floating: q, k and v of L pixels in this order, the heads of each one after another.
        num_heads: Number of heads, a divisor of C.
        scale: Factor of the scores. None: 1 / sqrt(C / num_heads).
        backend: "native" or "reference". None: "native" for a training step on a CPU in bfloat16, or in
            float32 with 64 pixels or more, else "reference". Native kernels take float32 and bfloat16, the
            latter with an even number of channels in a head.

    Returns:
        [N, L, C] in the dtype of qkv, contiguous. Differentiable any number of times with native kernels.
        PyTorch's fused attention has no second derivative. `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`
        selects one that has.

    Raises:
        ValueError: An argument has an unsupported value or shape.
        TypeError: An argument has an unsupported type or dtype.
        BackendUnavailable: The named backend cannot run.
    """
    check_float("qkv", qkv)
    check_int("num_heads", num_heads, 1, (1 << 31) - 1)
    if qkv.dim() != 3 or qkv.shape[2] % (3 * num_heads):
        raise InvalidValue("qkv", f"to be [N, L, 3 C] with C a multiple of {num_heads} heads", list(qkv.shape))
    if scale is None:
        scale = float(max(qkv.shape[2] // (3 * num_heads), 1) ** -0.5)
    check_number("scale", scale, finite=True)
    (qkv,) = autocast(qkv)
    y: Tensor = attention_op(qkv, num_heads, scale, backend=backend)
    return y


def is_attention_native(h: Tensor, num_heads: int, *parameters: Tensor | None) -> bool:
    """Return whether native kernels are the default for the training step of an attention layer.

    Args:
        h: Input of the projections, [N, L, C].
        num_heads: Number of heads.
        parameters: Weights and biases of the projections.
    """
    dtype = autocast_dtype(h)
    same = in_autocast(h) or all(parameter is None or parameter.dtype == dtype for parameter in parameters)
    return same and is_trained_natively(dtype, h, *parameters) and _suits(dtype, h.shape[1], h.shape[2] // num_heads)


def _suits(dtype: torch.dtype, pixels: int, head_channels: int) -> bool:
    return pixels >= FEWEST_PIXELS[dtype] and head_channels % step_of(dtype) == 0


def _head_channels(arguments: Any) -> Any:
    return arguments.qkv.shape[2] // (3 * arguments.num_heads)


def _why_not_native(device: torch.device, dtype: torch.dtype, arguments: Any) -> str | None:
    reason = why_not_matrix_kernels(device, dtype)
    if reason is None and arguments is not None and _head_channels(arguments) % step_of(dtype):
        return f"in bfloat16 it takes an even number of channels in a head, got {_head_channels(arguments)}"
    return reason


def _output(arguments: Any) -> Tensor:
    n, pixels, channels = arguments.qkv.shape
    y: Tensor = arguments.qkv.new_empty(n, pixels, channels // 3)
    return y


def _softmax(arguments: Any) -> Tensor:
    """Allocate the largest score of each query, and one over the sum of exp((score - largest) scale)."""
    n, pixels, _ = arguments.qkv.shape
    statistics: Tensor = arguments.qkv.new_empty(n, arguments.num_heads, 2, pixels, dtype=torch.float32)
    return statistics


def _reference(qkv: Tensor, num_heads: int, scale: float) -> Tensor:
    # PyTorch's fused attention has neither forward mode nor vmap. Inductor fuses the written-out form by itself.
    fused = not torch.compiler.is_compiling() and not is_transformed()
    return reference.attention(qkv, num_heads, scale, fused=fused)


def _gradient_by_reference(grad_y: Tensor, y: Tensor, softmax: Tensor, qkv: Tensor, num_heads: int, scale: float) -> Any:
    # PyTorch's fused attention has no second derivative.
    return gradients_of(lambda qkv: reference.attention(qkv, num_heads, scale, fused=False), (qkv,), grad_y)[0]


_SIZES: Final = {"pixels": lambda a: a.qkv.shape[1], "head_dim": _head_channels}
attention_backward_op = FusedOp(
    OpSpec(
        "attention_backward",
        _gradient_by_reference,
        outputs={"grad_qkv": lambda a: torch.empty_like(a.qkv)},
        fields=_SIZES,
        limits={"native": why_not_matrix_kernels},
    )
)


def _backward(a: Any, results: Any, grads: Any, needs: Any) -> dict[str, Tensor | None]:
    return {"qkv": attention_backward_op(grads[0], results.y, results.softmax, a.qkv, a.num_heads, a.scale, backend=a.backend)}


# Attention in bfloat16 by AMX's tiles, for frozen networks.
attention_tiles_op = FusedOp(
    OpSpec(
        "attention_tiles",
        schema="Tensor qkv, int num_heads, float scale",
        outputs={"y": _output},
        fields=_SIZES | {"softmax": lambda a: None},
        limits={"native": lambda device, dtype, a: why_not_tiles(device, dtype) or _why_not_native(device, dtype, a)},
    )
)
attention_op = FusedOp(
    OpSpec(
        "attention",
        _reference,
        outputs={"y": _output},
        saved={"softmax": _softmax},
        gradient=Gradient(_backward, reads=("qkv", "y")),
        fields=_SIZES,
        limits={"native": _why_not_native},
        is_default=lambda a: is_trained_natively(a.qkv.dtype, a.qkv) and _suits(a.qkv.dtype, a.qkv.shape[1], _head_channels(a)),
    )
)
