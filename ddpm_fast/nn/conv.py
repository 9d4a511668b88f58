"""The 3x3 convolution as a layer, upsampling before it, and the sum with a residual after it."""

from __future__ import annotations

from typing import TypeGuard, TypeVar

import torch
import torch.nn.functional as F
import torch.nn.modules.module as torch_module
from torch import Tensor, nn

from ..errors import InvalidValue
from ..ops.autocast import autocast_dtype
from ..ops.conv3x3 import conv3x3, is_trained_natively
from .comparison import why_watched

Layer = TypeVar("Layer", bound=nn.Module)


class Conv3x3(nn.Conv2d):
    """nn.Conv2d for 3x3 convolutions with stride 1 and padding 1, computed by `ddpm_fast.conv3x3`.

    PyTorch computes any other geometry. For infinite inputs the kernels may return NaN where PyTorch returns
    infinities.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of input: [N, in_channels, H, W] -> [N, out_channels, H, W]."""
        # Kernels compute training steps. Asking PyTorch directly costs a small layer less.
        by_pytorch = torch.compiler.is_compiling() or not torch.is_grad_enabled()
        if by_pytorch or not _has_fused_geometry(self) or input.dim() != 4:
            return super().forward(input)
        return conv3x3(input, self.weight, self.bias)


def upsampled(conv: nn.Module, x: Tensor) -> Tensor:
    """Return `conv` of x upsampled by 2 (nearest): [N, in, H, W] -> [N, out, 2 H, 2 W].

    An unmodified `Conv3x3` reads the small map. Any other module, or one with hooks, is called with the
    upsampled map.

    Args:
        conv: A convolution.
        x: [N, in, H, W].
    """
    if _may_fuse(conv, x):
        return conv3x3(x, conv.weight, conv.bias, upsample=True)
    out: Tensor = conv(doubled(x))
    return out


def added(conv: nn.Module, x: Tensor, residual: Tensor, divisor: float) -> Tensor:
    """Return (residual + conv(x)) / divisor: [N, in, H, W], [N, out, H, W] -> [N, out, H, W].

    Where kernels compute a training step, an unmodified `Conv3x3` adds and divides where it writes its output.
    """
    dtype = autocast_dtype(x)
    if (
        _may_fuse(conv, x)
        and is_trained_natively(dtype, x, residual, conv.weight, conv.bias)
        and residual.dtype == dtype
        and residual.shape == (len(x), conv.out_channels, *x.shape[2:])
    ):
        return conv3x3(x, conv.weight, conv.bias, residual=residual, divisor=divisor)
    return rescaled(residual + conv(x), divisor)


def rescaled(x: Tensor, divisor: float) -> Tensor:
    """Return x / divisor."""
    return x if divisor == 1 else x / divisor


def is_untouched(layer: nn.Module, kind: type[Layer]) -> TypeGuard[Layer]:
    """Return whether a call of `layer` does what an unmodified `kind` does, and nobody watches it."""
    if layer._compiled_call_impl is not None or torch_module._has_any_global_hook():
        return False
    return type(layer) is kind and why_watched(layer) is None


def doubled(x: Tensor) -> Tensor:
    """Upsample by 2 (nearest): [N, C, H, W] -> [N, C, 2 H, 2 W]."""
    if x.dim() != 4:  # PyTorch would double only the width of [C, H, W]
        raise InvalidValue("x", "to be [N, C, H, W]", f"shape {tuple(x.shape)}")
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _may_fuse(conv: nn.Module, x: Tensor) -> TypeGuard[Conv3x3]:
    """Return whether kernels may compute `conv` of x, with what comes before and after it."""
    return is_untouched(conv, Conv3x3) and _has_fused_geometry(conv) and x.dim() == 4


def _has_fused_geometry(conv: nn.Conv2d) -> bool:
    """Return whether `conv` is 3x3 with stride 1, padding 1 and zero padding."""
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return geometry == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
