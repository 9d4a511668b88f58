"""Convolutions on packed weights, which `conv3x3` and the frozen network call on CPUs.

The kernels are direct sums, by vectors or by the tiles of AMX, or Winograd's F(2x2, 3x3) and F(4x4, 3x3) (Lavin and Gray
2016).
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import native, why_not_matrix_kernels
from .fused_op import FusedOp
from .op_spec import OpSpec

# Fewest tiles of a batch for which F(2x2, 3x3) is faster than the direct sum, and F(4x4, 3x3) faster than F(2x2, 3x3), if
# weights are packed once. With fewer tiles, reading the weights takes most of the time. F(2x2, 3x3) reads 16/9 of the direct
# sum's weights, or 36/16 after an upsampling, and F(4x4, 3x3) reads 36/9.
WINOGRAD_TILES: Final = 8
# Fewest input channels for F(4x4, 3x3). PyTorch's error falls with the number of terms of a sum, and that of the transforms
# does not. A random network of 64 channels throughout would have 1.04 times the error of diffusers in channels_last, and one
# of 80 channels has 0.86 times.
LARGE_CHANNELS: Final = 80

# Input channels of a product of AMX's tiles (csrc/cpu/tiles.h). Weights for tiles have whole 32 output channels, too.
TILE_DEPTH: Final = 32

_CHANNELS_LAST: Final = torch.channels_last
# The input row, of two, that each of three taps reads after upsampling by 2: for even and for odd output rows.
# Lists: torch.compile would take a tensor's sizes for symbols, and one of 2 for the size of a batch of 2.
_UPSAMPLED: Final = [[[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]], [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]]


def suits_winograd(n: int, height: int, width: int) -> bool:
    """Return whether n maps of this size are so large that Winograd's method is faster than the direct sum."""
    return _tiles(n, height, width, 2) >= WINOGRAD_TILES


def _tiles(n: int, height: int, width: int, side: int) -> int:
    return n * math.ceil(height / side) * math.ceil(width / side)


def method_of(
    n: int,
    channels: int,
    height: int,
    width: int,
    products: torch.dtype,
    *,
    upsample: bool,
    fewest_large: int = WINOGRAD_TILES,
) -> str:
    """Return the method that computes a 3x3 convolution of stride 1 fastest.

    `height` and `width` are those of the map before an upsampling.

    - "direct": n maps have fewer than 8 tiles of 2x2 pixels.
    - "winograd_large", F(4x4, 3x3): there are at least 80 input channels. n maps have at least `fewest_large` tiles of 4x4
      pixels, and at least three times as many of 2x2 pixels. Maps of 5x5, 6x6 and 9x9 pixels, for example, fill large tiles
      badly. Products are in float32, because the transforms would cost accuracy in bfloat16. There is no upsampling.
    - "winograd" in all other cases: F(2x2, 3x3), or F(2x2, 2x2) of each phase after an upsampling. The latter needs no
      more multiplications than F(4x4, 3x3).
    """
    if not suits_winograd(n, height, width):
        return "direct"
    small, large = (_tiles(n, height, width, side) for side in (2, 4))
    fills_large = large >= fewest_large and 3 * large <= small
    is_exact = products == torch.float32 and channels >= LARGE_CHANNELS
    return "winograd_large" if fills_large and is_exact and not upsample else "winograd"


def step_of(dtype: torch.dtype) -> int:
    """Return the number of input channels per multiply-add: 2 in bfloat16, 1 in float32."""
    return 2 if dtype == torch.bfloat16 else 1


def pack_weights(weight: Tensor, method: str, dtype: torch.dtype, *, upsample: bool = False, flipped: bool = False) -> Tensor:
    """Return weights in the order in which a kernel reads them: [panels, taps, in / step, panel, step].

    A panel is as many output channels as there are sums in registers. A step is the number of input
    channels per multiply-add, 2 in bfloat16. Incomplete panels and steps are filled with 0. For tiles the
    order is [phases, out / 32, in / 32, taps of a phase, 2, 16, 16, 2], where "out" and "in" are rounded up to 32.

    Args:
        weight: [out, in, k, k].
        method: "direct": taps are the k k pixels of the kernel. With `upsample`, they are the 4 pixels of the
            small map behind each pixel of a 2x2 output square. "winograd": G g G^T for k = 3, in 16 taps.
            With `upsample`, 36: four phases of 9. "winograd_large": G g G^T in 36 taps. "tiles": the taps of "direct",
            which are four phases of 4 with `upsample`.
        dtype: Dtype of the result, float32 or bfloat16.
        upsample: Pack for a convolution after an upsampling by 2.
        flipped: Pack for the gradient of the input, by one of Winograd's methods: "in" and "out" change places.
    """
    if method in ("winograd", "winograd_large"):
        large = method == "winograd_large"
        packed: Tensor = pack_winograd_op(weight.detach().float(), dtype, flipped, upsample, large)
        return packed
    assert not flipped
    if upsample:
        wide, rows = weight.detach().double(), weight.new_tensor(_UPSAMPLED, dtype=torch.float64)
        taps = torch.einsum("pak,qbl,oikl->pqabio", rows, rows, wide).flatten(0, 3)
    else:
        taps = weight.detach().permute(2, 3, 1, 0).flatten(0, 1)
    if method == "tiles":
        taps = F.pad(taps, (0, -taps.shape[2] % TILE_DEPTH, 0, -taps.shape[1] % TILE_DEPTH)).to(dtype)  # [taps, in, out]
        phases, channels, out_channels = 4 if upsample else 1, *taps.shape[1:]
        tiles = taps.view(phases, len(taps) // phases, channels // TILE_DEPTH, 16, 2, out_channels // 32, 2, 16)
        return tiles.permute(0, 5, 2, 1, 6, 3, 7, 4).contiguous()
    panel, step = native().cpu.panel, step_of(dtype)
    taps = F.pad(taps, (0, -taps.shape[2] % panel, 0, -taps.shape[1] % step)).to(dtype)  # [taps, in, out]
    panels = taps.view(len(taps), taps.shape[1] // step, step, -1, panel)
    return panels.permute(3, 0, 1, 4, 2).contiguous()


def float_bias(bias: Tensor) -> Tensor:
    """Return the bias as contiguous float32 [out], detached. May share memory with `bias`."""
    return bias.detach().float().contiguous()


def _packed(arguments: Any) -> Tensor:
    weight: Tensor = arguments.weight
    out_channels, channels = weight.shape[1::-1] if arguments.flipped else weight.shape[:2]
    panel, step = native().cpu.panel, step_of(arguments.dtype)
    taps = 36 if arguments.upsample or arguments.large else 16
    shape = (-(-out_channels // panel), taps, -(-channels // step), panel, step)
    return weight.new_empty(shape, dtype=arguments.dtype)


def _why_not_packed(device: torch.device, dtype: torch.dtype, arguments: Any = None) -> str | None:
    if arguments is not None and arguments.large and (arguments.upsample or arguments.dtype != torch.float32):
        return "F(4x4, 3x3) has weights in float32, and follows no upsampling"
    return why_not_matrix_kernels(device, dtype)


# Flipped weights are those of the input's gradient: in and out exchanged, taps in reverse order.
pack_winograd_op = FusedOp(
    OpSpec(
        "pack_winograd",
        schema="Tensor weight, ScalarType dtype, bool flipped, bool upsample, bool large",
        outputs={"packed": _packed},
        fields={
            "out_channels": lambda a: a.weight.shape[0],
            "channels": lambda a: a.weight.shape[1],
            "out_stride": lambda a: a.weight.stride(0),
            "stride": lambda a: a.weight.stride(1),
            "row_stride": lambda a: a.weight.stride(2),
            "column_stride": lambda a: a.weight.stride(3),
        },
        limits={"native": _why_not_packed},
    )
)

# ---------------------------------------------------------------------------------------------------------------- kernels


def why_not_tiles(device: torch.device, dtype: torch.dtype, arguments: Any = None) -> str | None:
    """Return why kernels on tiles cannot run for this device and dtype, or None if they can. Most processors emulate tiles."""
    if dtype != torch.bfloat16:
        return f"it computes in bfloat16, not in {dtype}"
    return why_not_matrix_kernels(device, dtype)


def _empty_map(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    return torch.empty((x.shape[0], channels, height, width), dtype=x.dtype, device=x.device, memory_format=_CHANNELS_LAST)


def _kernel(method: str) -> FusedOp:
    """Return the kernel of a method as an op on channels_last maps and packed weights."""
    return FusedOp(
        OpSpec(
            f"conv_{method}",
            schema="Image x, Image? skip, Tensor? affine, bool silu, Tensor packed, Tensor? bias, "
            "Image? residual, float divisor, bool upsample, int out_channels, SymInt out_height, SymInt out_width, "
            "int kernel, int stride, int padding",
            outputs={"y": lambda a: _empty_map(a.x, a.out_channels, a.out_height, a.out_width)},
            fields={
                "height": lambda a: a.x.shape[2],
                "width": lambda a: a.x.shape[3],
                "channels": lambda a: a.x.shape[1],
                "skip_channels": lambda a: 0 if a.skip is None else a.skip.shape[1],
            },
            limits={"native": why_not_tiles if method == "tiles" else why_not_matrix_kernels},
        )
    )


# "direct" and "tiles" take kernels of 1x1 and 3x3 and strides 1 and 2, and "tiles" maps in bfloat16. "winograd" takes 3x3 and
# stride 1. "winograd_large" takes 3x3, stride 1, no upsampling, and weights that are packed in float32. The last one maps the
# gradient of an upsampled convolution's output to that of its small input. Its weights are packed flipped, with `upsample`.
METHODS: Final = ("direct", "tiles", "winograd", "winograd_large", "winograd_upsampled_gradient")
conv_ops: Final = {method: _kernel(method) for method in METHODS}

weight_gradient_op = FusedOp(
    OpSpec(
        "conv_winograd_weight_gradient",
        schema="Image x, Image grad_y, bool has_bias, bool upsample",
        outputs={
            "grad_weight": lambda a: torch.empty(
                (a.grad_y.shape[1], a.x.shape[1], 3, 3), dtype=torch.float32, device=a.x.device, memory_format=_CHANNELS_LAST
            ),
            "grad_bias": lambda a: a.x.new_empty(a.grad_y.shape[1], dtype=torch.float32) if a.has_bias else None,
        },
        fields={
            "has_bias": None,
            "height": lambda a: a.x.shape[2],
            "width": lambda a: a.x.shape[3],
            "channels": lambda a: a.x.shape[1],
            "out_channels": lambda a: a.grad_y.shape[1],
        },
        limits={"native": why_not_matrix_kernels},
    )
)
