"""Fused modules: GroupNorm, modulation and SiLU in one pass, in the forwards of other libraries' blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, reduce
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.group_norm_silu import group_norm_silu


class Swapped:
    """First base of a class made by `swap`. The object's own class is the second base and gives the name.

    A patched method (`block.forward = ...`) is copied to places where it does not belong. Replicas would
    call the original's method, and pickle cannot store it. A class has neither problem and leaves nothing
    in the object. Names stay the same, because libraries depend on them for adapters, offloading and
    configurations.
    """

    swapped_from: type

    def __reduce_ex__(self: Any, protocol: Any) -> tuple[Any, ...]:
        """Pickle and copy the object by its own class, because the swapped class is in no module."""
        return _remake, (type(self).__mro__[1], self.swapped_from), self.__getstate__()


def swap(thing: Any, mixin: type[Swapped]) -> Any:
    """Give `mixin`'s methods priority over those of the object's class. Return the object."""
    thing.__class__ = _swapped_class(mixin, type(thing))  # type: ignore[arg-type]  # mypy: a class is not hashable
    return thing


def own_class(thing: Any) -> type:
    """Return the object's class before `fuse`."""
    kind = type(thing)
    return getattr(kind, "swapped_from", kind)


@cache  # one class of a kind, so that compiled code finds the class it was compiled for
def _swapped_class(mixin: type[Swapped], own: type) -> type:
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__, "swapped_from": own}
    return type(own.__name__, (mixin, own), names)


def _remake(mixin: type[Swapped], own: type) -> Any:
    """Return an object without state."""
    kind: Any = _swapped_class(mixin, own)  # type: ignore[arg-type]  # as above
    return kind.__new__(kind)


# ------------------------------------------------------------------------------------------------------- the fused forwards


class ResnetBlock2D(Swapped):
    """Block of diffusers, diffusers/models/resnet.py."""

    def forward(self: Any, input_tensor: Tensor, temb: Any = None) -> Tensor:
        """Return the block's output as diffusers' forward does."""
        time = self.time_emb_proj and self.time_emb_proj(temb if self.skip_time_act else F.silu(temb))
        # PyTorch's nearest interpolation of large channels_last batches was wrong, so diffusers makes them contiguous. It also
        # does so before the shortcut in training: DistributedDataParallel warns of gradients in another memory format.
        is_large = self.upsample is not None and len(input_tensor) >= 64
        resample = self.downsample if self.upsample is None else self.upsample
        out = _residual(
            *(input_tensor, self.norm1, self.conv1, self.norm2, time),
            tail=lambda h: self.conv2(self.dropout(h)),
            skip=self.conv_shortcut and (lambda x: self.conv_shortcut(x.contiguous() if self.training else x)),
            resample=resample and [lambda each: resample(each.contiguous() if is_large else each)] * 2,
            modulates=self.time_embedding_norm == "scale_shift",
        )
        return out / self.output_scale_factor  # type: ignore[no-any-return]


class ResBlock(Swapped):
    """Block of openai/guided-diffusion, guided_diffusion/unet.py. improved-diffusion's has no resampling."""

    def _forward(self: Any, x: Tensor, emb: Tensor) -> Tensor:
        (first, _, conv), (second, _, *tail) = self.in_layers, self.out_layers
        return _residual(
            *(x, first, conv, second, self.emb_layers(emb)),
            tail=lambda h: reduce(lambda h, layer: layer(h), tail, h),
            skip=self.skip_connection,
            resample=(self.x_upd, self.h_upd) if getattr(self, "updown", False) else None,
            modulates=self.use_scale_shift_norm,
        )


class UNetBlock(Swapped):
    """Block of NVlabs/edm, training/networks.py."""

    def forward(self: Any, x: Tensor, emb: Tensor) -> Tensor:
        """Return the block's output as EDM's forward does."""
        x = self.skip_scale * _residual(
            *(x, self.norm0, self.conv0, self.norm1, self.affine(emb)),
            tail=lambda h: self.conv1(F.dropout(h, self.dropout, self.training)),
            skip=self.skip,
            modulates=self.adaptive_scale,
        )
        return self._attend(x) if self.num_heads else x

    def _attend(self: Any, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        qkv = self.qkv(self.norm2(x)).reshape(n * self.num_heads, c // self.num_heads, 3, height * width).transpose(1, 3)
        h = F.scaled_dot_product_attention(*qkv.unbind(2))  # q, k and v are each [N heads, HW, C / heads]
        return (self.proj(h.transpose(1, 2).reshape(n, c, height, width)) + x) * self.skip_scale  # type: ignore[no-any-return]


def _residual(
    x: Tensor,
    first: Any,
    conv: Any,
    second: Any,
    time: Tensor | None,
    *,
    tail: Callable[[Tensor], Tensor],
    skip: Any,
    modulates: bool,
    resample: Sequence[Any] | None = None,
) -> Tensor:
    """Return the output of a residual block with two norms. `resample` has the layers that resize x and h, if there are any."""
    h = _norm_silu(first, x)
    if resample:
        x, h = resample[0](x), resample[1](h)
    h = tail(_norm_silu(second, conv(h), time, modulates=modulates))
    return h + (x if skip is None else skip(x))


class FusedSequential(Swapped):
    """A `Sequential` that computes a norm and the SiLU after it at once. Its slices do the same."""

    def forward(self: Any, input: Any) -> Any:
        """Return the output of the last layer."""
        layers = list(self)
        fused = [is_group_norm(norm) and is_silu(silu) for norm, silu in pairwise([*layers, None])]
        for layer, with_next, with_previous in zip(layers, fused, [False, *fused[:-1]], strict=True):
            if not with_previous:
                input = _norm_silu(layer, input) if with_next else layer(input)
        return input


class HeadPart(Swapped):
    """One of two layers of a diffusers head. The norm also computes SiLU, so the activation after it returns its input."""

    def forward(self, input: Tensor) -> Any:
        """Return SiLU(norm(input)) for the norm, and the input for the activation."""
        return input if is_silu(self) else _norm_silu(self, input)


def _norm_silu(norm: Any, x: Tensor, time: Tensor | None = None, *, modulates: bool = False) -> Tensor:
    """Return SiLU(norm(x)) with the time embedding.

    `time` is [N, C] or [1, C], added before the norm. With `modulates` it is a scale and a shift after the
    norm, [N, 2 C] or [1, 2 C].
    """
    time = None if time is None else _fitting(time, x).expand(len(x), -1)
    return group_norm_silu(
        x,
        norm.num_groups,
        _fitting(norm.weight, x),
        _fitting(norm.bias, x),
        norm.eps,
        shift=None if modulates else time,
        scale_shift=time.chunk(2, dim=1) if modulates and time is not None else None,
    )


def _fitting(value: Any, x: Tensor) -> Any:
    """Return `value` in a dtype that the op accepts together with x."""
    return value if value is None or value.dtype in (x.dtype, torch.float32) else value.to(x.dtype)


def is_group_norm(module: Any) -> bool:
    """Return whether a module is nn.GroupNorm, guided-diffusion's GroupNorm32 or EDM's GroupNorm."""
    return type(module).__name__ in ("GroupNorm", "GroupNorm32") and all(
        hasattr(module, name) for name in ("num_groups", "eps", "weight", "bias")
    )


def is_silu(module: Any) -> bool:
    """Return whether a module is nn.SiLU or improved-diffusion's."""
    return type(module).__name__ == "SiLU"
