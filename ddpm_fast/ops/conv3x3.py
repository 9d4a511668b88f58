"""conv3x3: a 3x3 convolution with the operations before and after it, in one pass.

On CPUs the kernels are those of `packed_conv`, with weights that are packed at each call.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import torch
from torch import Tensor

from .. import reference
from ..checks import check_choice, check_map, check_number, check_type
from ..dtypes import opmath
from ..errors import InvalidValue, public
from .arguments import check_like
from .autocast import autocast
from .backend import BFLOAT16, BUILD, MATRIX_DTYPES, Bfloat16, product_dtype, why_not_matrix_kernels
from .derivative import named_gradients
from .fused_op import FusedOp
from .modes import is_transformed, runs_eagerly
from .op_spec import Gradient, OpSpec
from .packed_conv import conv_ops, float_bias, method_of, pack_weights, suits_winograd, weight_gradient_op

_CHANNELS_LAST: Final = torch.channels_last
# Fewest tiles of a batch for F(4x4, 3x3). It packs 36/16 times as many weights as F(2x2, 3x3). On two cores of Zen 5, for 256
# channels and both directions, that takes 1.0 ms more. The products save 0.9 ms for 64 tiles, and 1.9 for 128.
_LARGE_TILES: Final = 128


@public(traced=True)
def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    skip: Tensor | None = None,
    affine: Tensor | None = None,
    activation: Literal["silu"] | None = None,
    residual: Tensor | None = None,
    divisor: float = 1.0,
    upsample: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Convolve x with 3x3 weights, stride 1 and one pixel of zero padding.

        h = act((cat(x, skip) - center) slope + intercept)       act and the affine map only if they are given
        y = (conv(up(h)) + bias + residual) / divisor            up only with `upsample`

    Under autocast x, skip and residual are cast. The reference is PyTorch's convolution: oneDNN on CPUs,
    cuDNN on NVIDIA GPUs.

    Args:
        x: [N, C, H, W], floating. Kernels compute in channels_last and convert contiguous maps.
        weight: [out, C + S, 3, 3], in x's dtype or float32.
        bias: [out], in x's dtype or float32, or None.
        skip: Further input channels [N, S, H, W], in x's dtype, or None.
        affine: float32 [N, 3, C + S], or float64 for a float64 x: center, slope and intercept of each channel, as
            `group_norm_affine` returns them for a preceding group norm. None: no affine map.
        activation: "silu" or None, applied before the convolution.
        residual: Added to the output, shaped like it, in x's dtype, or None.
        divisor: Divides the sum. Not 0.
        upsample: Upsample h by 2 (nearest neighbour) before the convolution.
        backend: "native" or "reference". None: "native" for a training step on a CPU whose maps or weights
            are channels_last, else "reference". Native kernels take float32 and bfloat16.

    Returns:
        [N, out, H, W], or [N, out, 2 H, 2 W] with `upsample`, in x's dtype: channels_last if x or weight
        is, else contiguous. Differentiable any number of times in every tensor.

    Raises:
        ValueError: An argument has an unsupported value, shape or device.
        TypeError: An argument has an unsupported type or dtype.
        BackendUnavailable: The named backend cannot run.
    """
    check_map("x", x)
    for name, value in (("skip", skip), ("residual", residual)):
        if value is not None:
            check_map(name, value)
    x, skip, residual = autocast(x, skip, residual)
    n, channels, height, width = x.shape
    if skip is not None:
        check_like("skip", skip, "x", x, (n, skip.shape[1], height, width))
        channels += skip.shape[1]
    check_like("weight", weight, "x", x, ("out", channels, 3, 3), also=(torch.float32,))
    out_channels = weight.shape[0]
    check_like("bias", bias, "x", x, (out_channels,), also=(torch.float32,), optional=True)
    if affine is not None:
        check_like("affine", affine, "the statistics", x.new_empty(0, dtype=opmath(x.dtype)), (n, 3, channels))
    check_choice("activation", activation, ("silu", None))
    check_number("divisor", divisor, finite=True)
    if divisor == 0:
        raise InvalidValue("divisor", "to be another number than 0", divisor)
    check_type("upsample", upsample, bool)
    if residual is not None:
        scale = 2 if upsample else 1
        check_like("residual", residual, "x", x, (n, out_channels, scale * height, scale * width))
    silu = activation == "silu"
    y: Tensor = conv3x3_op(x, weight, bias, skip, affine, silu, residual, float(divisor), upsample, backend=backend)
    return y


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=_CHANNELS_LAST) and not x.is_contiguous()


def _output(arguments: Any) -> Tensor:
    x, weight = arguments.x, arguments.weight
    scale = 2 if arguments.upsample else 1
    layout = _CHANNELS_LAST if _is_channels_last(x) or _is_channels_last(weight) else torch.contiguous_format
    shape = (x.shape[0], weight.shape[0], scale * x.shape[2], scale * x.shape[3])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _native(results: Any, a: Any) -> None:
    x, affine = a.x, a.affine
    if a.silu and affine is None:  # kernels apply SiLU after an affine map
        channels = a.weight.shape[1]
        affine = torch.tensor([0.0, 1.0, 0.0], device=x.device)[None, :, None].expand(len(x), 3, channels).contiguous()
    method = _method(a, a.weight.shape[1])
    packed = pack_weights(a.weight, method, product_dtype(x.dtype), upsample=a.upsample)
    bias = None if a.bias is None else float_bias(a.bias)
    out = (results.y,) if results.y.is_contiguous(memory_format=_CHANNELS_LAST) else ()
    y = conv_ops[method].run(
        "native",
        (x, a.skip, affine, a.silu, packed, bias, a.residual, a.divisor, a.upsample, *results.y.shape[1:], 3, 1, 1),
        out=out,
    )[0]
    if not out:
        results.y.copy_(y)


def _method(a: Any, channels: int) -> str:
    """Return the method for sums over this many channels, with weights that are packed at each call."""
    n, _, height, width = a.x.shape
    products = product_dtype(a.x.dtype)
    return method_of(n, channels, height, width, products, upsample=a.upsample, fewest_large=_LARGE_TILES)


def _backward(a: Any, results: Any, grads: Any, needs: Any) -> dict[str, Tensor | None]:
    """Return gradients by Winograd's kernels.

    PyTorch computes them in three cases: if the op has a norm or SiLU before its convolution, if the gradients are
    differentiated again, and inside torch.func transforms.
    """
    (grad,) = grads
    divided = grad if a.divisor == 1 else grad / a.divisor
    gradients: dict[str, Tensor | None] = {"residual": divided if needs.residual else None}
    if torch.is_grad_enabled() or is_transformed() or a.skip is not None or a.affine is not None or a.silu:
        return gradients | named_gradients(reference.conv3x3, a, ("x", "weight", "bias", "skip", "affine"), grad, needs)
    grad = divided
    if needs.x:
        method = _method(a, a.weight.shape[0])
        method = "winograd" if method == "direct" else method  # "direct" has no flipped weights
        packed = pack_weights(a.weight, method, product_dtype(a.x.dtype), upsample=a.upsample, flipped=True)
        kernel = conv_ops["winograd_upsampled_gradient" if a.upsample else method]
        gradients["x"] = kernel(grad, None, None, False, packed, None, None, 1.0, False, *a.x.shape[1:], 3, 1, 1)
    if needs.weight or needs.bias:
        gradients["weight"], gradients["bias"] = weight_gradient_op(a.x, grad, a.bias is not None, a.upsample)
    return gradients


def is_trained_natively(dtype: torch.dtype, *tensors: Tensor | None) -> bool:
    """Return whether native kernels are the default for a training step in this dtype of a layer with these tensors.

    PyTorch is the default in these cases:

    - without gradients, because weights would be packed at every call (`freeze` packs them once)
    - in bfloat16 on CPUs without instructions for it, and on CPUs with AMX. There oneDNN's convolutions and gradients of
      inputs are about as fast as those of conv_tiles.cpp
    - under torch.compile
    """
    given = [tensor for tensor in tensors if tensor is not None]
    return (
        runs_eagerly(*given)
        and torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in given)
        and all(tensor.is_cpu and tensor.dtype in MATRIX_DTYPES for tensor in given)
        and why_not_matrix_kernels(given[0].device, dtype) is None
        and (dtype == torch.float32 or (BFLOAT16 is not Bfloat16.FLOAT32 and not BUILD["tiles"]))
    )


def _is_default(a: Any) -> bool:
    return (
        torch.is_grad_enabled()
        and a.skip is None
        and a.affine is None
        and not a.silu  # PyTorch computes their gradients, and faster the whole
        and is_trained_natively(a.x.dtype, a.x, a.weight, a.bias, a.residual)
        and (_is_channels_last(a.x) or _is_channels_last(a.weight))
        and suits_winograd(a.x.shape[0], *a.x.shape[2:])
    )


conv3x3_op = FusedOp(
    OpSpec(
        "conv3x3",
        reference.conv3x3,
        outputs={"y": _output},
        native=_native,
        gradient=Gradient(_backward, reads=("x", "weight", "bias", "skip", "affine")),
        limits={"native": why_not_matrix_kernels},
        is_default=_is_default,
    )
)
