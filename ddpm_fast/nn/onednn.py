"""oneDNN convolutions with prepacked weights, for CPUs on which they beat this package's kernels."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._op import runs_eagerly
from ..ops.backend import MATRIX_DTYPES

MAX_ORDERS: Final = 4  # input shapes of a layer for which reordered weights are stored


def has_prepacked(dtype: torch.dtype) -> bool:
    """Return whether this PyTorch build has oneDNN convolutions with reordered weights for this CPU.

    torch.compile calls them. They are not a public API.
    """
    if not torch.backends.mkldnn.is_available() or dtype not in MATRIX_DTYPES:
        return False
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        # skip_init: initial values would be drawn from the caller's generator.
        conv = OneDnnConv(nn.utils.skip_init(nn.Conv2d, 1, 1, 1, device="cpu", dtype=dtype))
        x = torch.zeros(1, 1, 1, 1, dtype=dtype, device="cpu")
        conv(x, conv(x))
    except (AttributeError, RuntimeError):  # another version of PyTorch
        return False
    return True


class OneDnnConv(nn.Module):
    """An nn.Conv2d for inference, followed by an addition.

    In eager mode PyTorch reorders the weights at every call. Here they are reordered at the first call
    with an input shape, and again after weights are loaded or cast. Other writes to the weights have no
    effect.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        assert isinstance(conv.padding, tuple)
        self.weight, self.bias = conv.weight, conv.bias
        self.geometry = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        self._reordered: OrderedDict[torch.Size, Tensor] = OrderedDict()

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Return conv(x) + added: [N, C, H, W] -> [N, out, H', W']."""
        padding, stride, dilation, groups = self.geometry
        if x.device.type != "cpu" or x.dtype not in MATRIX_DTYPES or 0 in x.shape or not runs_eagerly(x, added):
            out: Tensor = F.conv2d(x, self.weight, self.bias, stride, padding, dilation, groups)
            return out if added is None else out + added
        ops = torch.ops.mkldnn
        arguments = (self._weight_for(x.shape), self.bias, padding, stride, dilation, groups)
        if added is None:
            out = ops._convolution_pointwise(x, *arguments, "none", [], "")
        else:
            out = ops._convolution_pointwise.binary(x, added, *arguments, "add", None, None, [], None)
        return out

    def _weight_for(self, shape: torch.Size) -> Tensor:
        weight = self._reordered.get(shape)
        if weight is None:
            reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # torch's stub lacks some of its arguments
            weight = reorder(self.weight.detach().to_mkldnn(), *self.geometry, list(shape))
            if len(self._reordered) == MAX_ORDERS:
                self._reordered.popitem(last=False)
            self._reordered[shape] = weight
        return weight

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._reordered.clear()
        super()._load_from_state_dict(*arguments)

    def _apply(self, *arguments: Any, **options: Any) -> OneDnnConv:
        self._reordered.clear()
        applied: OneDnnConv = super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]
        return applied

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the weights that were reordered for this CPU."""
        return self.__dict__ | {"_reordered": OrderedDict()}
