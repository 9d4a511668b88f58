"""Inference form of the U-Net: the same outputs with less work at every step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._op import runs_eagerly
from ..ops.backend import has_fast_bfloat16, why_not_matrix_kernels
from ..ops.checks import checked_device
from . import packed
from .conv import Conv3x3
from .layers import (
    Attention,
    Downsample,
    GroupNormSiLU,
    ResnetBlock,
    TimeEmbedding,
    Upsample,
    rescaled_in_place,
    timestep_embedding,
)
from .onednn import OneDnnConv, has_prepacked
from .packed import (
    PackedAttention,
    PackedConv,
    PackedResnetBlock,
    packed_downsample,
    packed_upsample,
)
from .replay import Recordings
from .unet import DownBlock, MidBlock, UNet, UpBlock, centered, checked_timesteps, through_layers

_CACHED_BYTES = 8 << 20  # the largest feature map of a batch: 16 images of the CIFAR-10 network in float32

if TYPE_CHECKING:
    from typing_extensions import Self  # Python 3.11 has it in typing

# Layers of a UNet. The copy would lose a layer that replaces one of them, such as an adapter.
_LAYERS = (
    *(UNet, DownBlock, MidBlock, UpBlock, ResnetBlock, Attention, GroupNormSiLU, Downsample, Upsample, TimeEmbedding),
    *(nn.ModuleList, Conv3x3, nn.Conv2d, nn.Linear, nn.Embedding),
)


def freeze(
    model: UNet,
    dtype: torch.dtype | None = None,
    *,
    device: torch.device | str | None = None,
    num_timesteps: int | None = None,
) -> FrozenUNet:
    """Return the inference form of a U-Net.

    It is called like the model and has no gradients. Outputs are equal up to the rounding of `dtype`.

    On a CPU, in float32 and bfloat16, convolutions and matrix products use this package's kernels:

    - Weights are packed at first use. Packed weights need 2-4x the model's memory.
    - Norms and activations are applied while a convolution reads its input.
    - Skip connections are read in place, and residuals are added while the output is written.
    - In bfloat16 on a CPU with AMX, oneDNN computes the convolutions from weights reordered once.

    On a GPU, and in other dtypes, weights are cast once and stored channels_last.

    In every case:

    - The projections of the time embedding become tables over the timesteps, computed in float64. A
      network with classes has such a table for the embedding, and one product for all projections.
    - Queries, keys and values are one product.
    - Biases and shortcuts are merged into neighbouring layers, and dropout is removed.
    - Norm parameters stay float32.

    Args:
        model: U-Net, not modified. Later changes of its weights do not affect the result.
        dtype: Dtype of weights and activations. None: the model's dtype. A float32 model becomes bfloat16
            on devices with fast bfloat16, and float16 on other GPUs.
        device: None: the model's device.
        num_timesteps: T. Timesteps must be integers in 0..T-1. None: `num_train_timesteps` of the
            config, or 1000.

    Raises:
        TypeError: `model` is not a `UNet` of unmodified layers, or `dtype` is not a torch.dtype.
        ValueError: `dtype` is not floating, `num_timesteps` is not positive, or `device` is unknown.
    """
    if not isinstance(model, UNet):
        raise TypeError(f"freeze: expected model to be a ddpm_fast.UNet (UNet.from_pretrained), got a {type(model).__name__}")
    reason = why_not_frozen(model)
    if reason is not None:
        raise TypeError(f"freeze: expected a UNet with its own layers, got one where {reason}")
    weight = model.conv_in.weight
    device = weight.device if device is None else checked_device("freeze", device)
    dtype = default_dtype(weight.dtype, device) if dtype is None else dtype
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"freeze: expected dtype to be a torch.dtype, got {dtype!r}")
    if not dtype.is_floating_point:
        raise ValueError(f"freeze: expected dtype to be a floating dtype, got {dtype}")
    if num_timesteps is None:
        num_timesteps = model.config["num_train_timesteps"] or 1000
    if not isinstance(num_timesteps, int) or isinstance(num_timesteps, bool):
        raise TypeError(f"freeze: expected num_timesteps to be an int, got {type(num_timesteps).__name__}")
    if num_timesteps < 1:
        raise ValueError(f"freeze: expected num_timesteps to be at least 1, got {num_timesteps}")
    with torch.no_grad(), torch.inference_mode(False):
        return FrozenUNet(model, dtype, device, num_timesteps)


def default_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype that `freeze` chooses for a model of this dtype on this device."""
    if dtype != torch.float32 or device.type not in ("cpu", "cuda"):
        return dtype
    if device.type == "cpu":
        return torch.bfloat16 if has_fast_bfloat16() else torch.float32
    with torch.cuda.device(device):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def why_not_frozen(model: nn.Module) -> str | None:
    """Return why `model` cannot be frozen, or None if it can."""
    if type(model) is not UNet:
        return f"the model is a {type(model).__name__}"
    for name, module in model.named_modules():
        where = name or "the model"
        if type(module) not in _LAYERS or "forward" in vars(module):
            return f"{where} is a {type(module).__name__} of another make"
        if isinstance(module, ResnetBlock) and module.resample is not None:
            return f"{where} is a residual block that resamples, of which there is no inference form"
        if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
            return f"{where} pads with {module.padding_mode} values"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{where} has forward hooks"
    return None


class FrozenUNet(nn.Module):
    """Inference form of a `UNet`; see `freeze`.

    On a CPU, the first call with a new input shape packs weights and records the kernel calls. Later calls
    replay the recording. Replays use new weights only if `load_state_dict` wrote them. Hooks of layers run
    only in the first call of a shape.

    Attributes:
        config: The model's configuration.
        num_timesteps: T.
        dtype: Dtype of weights and activations.
        why_not_packed: The reason why PyTorch or oneDNN computes the convolutions. None if this package's
            CPU kernels do.
    """

    def __init__(self, model: UNet, dtype: torch.dtype, device: torch.device, num_timesteps: int) -> None:
        super().__init__()
        self._config = model._config
        self.config: dict[str, Any] = dict(model.config)
        self.num_timesteps, self.dtype = num_timesteps, dtype
        self.why_not_packed = why_not_matrix_kernels(device, dtype)
        packs = self.why_not_packed is None
        model = copy.deepcopy(model).eval().to(device)
        self.conv_in: nn.Module = model.conv_in
        self.down_blocks, self.mid_block, self.up_blocks = model.down_blocks, model.mid_block, model.up_blocks
        self.conv_norm_out: nn.Module = model.conv_norm_out
        self.conv_out: nn.Module = model.conv_out
        projections: list[tuple[Tensor, Tensor]] = []
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            for i, resnet in enumerate(block.resnets):
                first_term = len(projections)
                projections += _time_projections(resnet)
                block.resnets[i] = (
                    PackedResnetBlock(resnet, first_term, dtype) if packs else FrozenResnetBlock(resnet, first_term)
                )
            block.attentions = nn.ModuleList(
                [PackedAttention(attention, dtype) if packs else FrozenAttention(attention) for attention in block.attentions]
            )
            if packs:
                _pack_samplers(block, dtype)
        if packs:
            self.conv_in = PackedConv(model.conv_in, dtype=dtype)
            self.conv_norm_out = nn.Identity()
            self.conv_out = PackedConv(model.conv_out, model.conv_norm_out, dtype=dtype)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.to(dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
            elif isinstance(module, GroupNormSiLU):
                module.to(_wide(dtype))
        if not packs and device.type == "cpu" and has_prepacked(dtype):
            _use_onednn(self)
        self.modulations = Modulations(model, num_timesteps, projections, dtype)
        self._recordings = Recordings()
        self.requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Apply `to`, `half`, `cuda`, ...

        Packed weights keep their dtype and stay on the CPU.

        Raises:
            TypeError: Packed weights would have to change.
        """
        changed = fn(torch.empty(0, dtype=self.dtype, device="cpu"))
        if self.why_not_packed is not None:
            self.dtype = changed.dtype
        elif (changed.dtype, changed.device.type) != (self.dtype, "cpu"):
            raise TypeError(
                f"FrozenUNet: expected to stay on cpu in {self.dtype}, for which its weights are packed, got "
                f"{changed.device.type} and {changed.dtype}: freeze the model again"
            )
        elif fn(torch.empty(0, dtype=torch.float32, device="cpu")).dtype != torch.float32:
            return self  # weights have that dtype already, and norms and tables stay float32
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._recordings = Recordings()
        return self

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor | int, class_labels: Tensor | None = None) -> Tensor:
        """Evaluate the network as `UNet.forward` does.

        Args:
            x: x_t, [N, in_channels, H, W].
            t: Integer timesteps in 0..T-1: an int, a 0-d tensor, or [N]. A tensor is checked on the CPU. On
                a GPU a check would synchronize with the host, so the caller must keep it in range.
            class_labels: int64 [N], for networks with classes.

        Returns:
            [N, out_channels, H, W] in `dtype`, channels_last.

        Raises:
            ValueError: A shape does not fit, or a timestep or label is out of range.
            TypeError: Timesteps are not integers, or x is batched by torch.vmap.
        """
        if not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(x):
            raise TypeError("FrozenUNet: expected x to be [N, C, H, W] outside torch.vmap, got a tensor batched by it")
        if isinstance(t, int) and not 0 <= t < self.num_timesteps:
            raise ValueError(f"FrozenUNet: expected t in 0..{self.num_timesteps - 1}, got {t}")
        t = checked_timesteps(self._config, x, t, class_labels)
        if t.is_floating_point():
            raise TypeError(f"FrozenUNet: expected integer timesteps, got {t.dtype}")
        x = centered(self._config, x.to(self.dtype)).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, enabled=False):  # every layer has its dtype
            parts = [tensor.split(self._images_at_once(x)) for tensor in (x, t, class_labels) if tensor is not None]
            outs = [self._part(x, t, *labels) for x, t, *labels in zip(*parts, strict=True)]
            return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _part(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        inputs = (x, *self.modulations(t, class_labels))
        if self.why_not_packed is None and runs_eagerly(*inputs):
            return self._recordings.run(self._layers, inputs, packed.loads)
        return self._layers(*inputs)

    def _layers(self, x: Tensor, *stacks: Tensor) -> Tensor:
        return through_layers(self, x, self.modulations.of_blocks(stacks))

    def _images_at_once(self, x: Tensor) -> int:
        """Return the number of images per pass, chosen so that feature maps stay in the CPU's cache."""
        n, _, height, width = x.shape
        bytes_an_image = self._config.block_out_channels[0] * height * width * x.element_size()
        if x.device.type != "cpu" or n * bytes_an_image <= _CACHED_BYTES:
            return max(n, 1)
        parts = math.ceil(n * bytes_an_image / _CACHED_BYTES)
        return math.ceil(n / parts)


def _use_onednn(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d):
            setattr(module, name, OneDnnConv(child))
        else:
            _use_onednn(child)


def _pack_samplers(block: nn.Module, dtype: torch.dtype) -> None:
    for name, pack in (("downsamplers", packed_downsample), ("upsamplers", packed_upsample)):
        layers = getattr(block, name, ())
        if layers:
            setattr(block, name, nn.ModuleList([pack(layer, dtype) for layer in layers]))


class Modulations(nn.Module):
    """Time (and class) terms of all residual blocks: one [N, channels] tensor per projection.

    Projections of the same width are stacked. One lookup computes each stack, or one batched product if
    there are classes. Every term is contiguous, as the norms need it.

    Args:
        model: The U-Net.
        num_timesteps: T.
        projections: Weight [W, E] and bias [W] of each projection, applied after the embedding's SiLU.
        dtype: Dtype of weights and activations.
    """

    def __init__(self, model: UNet, num_timesteps: int, projections: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
        super().__init__()
        cfg, device = model._config, model.conv_in.weight.device
        t = torch.arange(num_timesteps, device=device)
        emb = timestep_embedding(t, cfg.sinusoid_dim, flip_sin_to_cos=cfg.flip_sin_to_cos, freq_shift=cfg.freq_shift)
        emb = model.time_embedding.double()(emb.double())  # [T, E]
        widths = [len(bias) for _, bias in projections]
        distinct = sorted(set(widths))
        # Stack and row of each projection.
        self._rows = [(distinct.index(width), widths[:i].count(width)) for i, width in enumerate(widths)]
        stacks = []
        for width in distinct:
            weights, biases = zip(*(pair for pair in projections if len(pair[1]) == width), strict=True)
            stacks.append((torch.stack(weights).double().transpose(1, 2), torch.stack(biases).double()[:, None]))
        if model.class_embedding is None:
            emb = F.silu(emb)
            self.tables = _constants((torch.matmul(emb, weight) + bias for weight, bias in stacks), _wide(dtype))  # [B, T, W]
        else:
            self.embeddings = _constants((emb, model.class_embedding.weight), _wide(dtype))  # [T, E], [classes, E]
            self.weights = _constants((weight for weight, _ in stacks), dtype)  # [B, E, W]
            self.biases = _constants((bias for _, bias in stacks), dtype)  # [B, 1, W]
        self.has_classes = model.class_embedding is not None

    def forward(self, t: Tensor, class_labels: Tensor | None) -> list[Tensor]:
        """Return the stacks, [B, N, W] each, for timesteps [N] and labels [N] or None."""
        if class_labels is None:
            return [table.index_select(1, t) for table in self.tables]
        time, classes = self.embeddings
        emb = F.silu(time.index_select(0, t) + classes.index_select(0, class_labels)).to(self.weights[0].dtype)
        return [
            torch.baddbmm(bias, emb.expand(len(weight), *emb.shape), weight)
            for weight, bias in zip(self.weights, self.biases, strict=True)
        ]

    def of_blocks(self, stacks: Sequence[Tensor]) -> list[Tensor]:
        """Return the term [N, W] of each projection in order, as views of the stacks."""
        rows = [stack.unbind() for stack in stacks]
        return [rows[stack][row] for stack, row in self._rows]


class FrozenResnetBlock(nn.Module):
    """`ResnetBlock` whose time terms come from `Modulations`. `first_term` is their index in its list."""

    def __init__(self, block: ResnetBlock, first_term: int) -> None:
        super().__init__()
        self.first_term = first_term
        self.scale_shift = block.scale_shift
        self.output_scale_factor = block.output_scale_factor
        self.norm1, self.conv1, self.norm2, self.conv2 = block.norm1, block.conv1, block.norm2, block.conv2
        if not self.scale_shift:
            self.conv1.bias = None  # it is part of the shift: see _time_projections
        self.shortcut: nn.Linear | None = None
        if block.conv_shortcut is not None:
            channels, in_channels = block.conv_shortcut.weight.shape[:2]
            self.shortcut = nn.Linear(in_channels, channels, bias=False, device="meta")  # draws no weights
            self.shortcut.weight = nn.Parameter(block.conv_shortcut.weight.flatten(1))
            self.conv2.bias = nn.Parameter(_sum(block.conv2.bias, block.conv_shortcut.bias))

    def forward(self, x: Tensor, modulations: list[Tensor], skip: Tensor | None = None) -> Tensor:
        """Return the block's output: [N, C, H, W] -> [N, out_channels, H, W]."""
        if skip is not None:
            x = torch.cat((x, skip), dim=1)
        h = self.conv1(self.norm1(x))
        if self.scale_shift:
            h = self.norm2(h, scale_shift=(modulations[self.first_term], modulations[self.first_term + 1]))
        else:
            h = self.norm2(h, shift=modulations[self.first_term])
        if isinstance(self.conv2, OneDnnConv):
            added = x if self.shortcut is None else self.shortcut(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return rescaled_in_place(self.conv2(h, added), self.output_scale_factor)
        h = self.conv2(h)
        if self.shortcut is None:
            h += x
        else:
            # A 1x1 convolution is a matrix product over channels. addmm_ adds it in place.
            n, c, height, width = h.shape
            pixels = h.permute(0, 2, 3, 1).reshape(n * height * width, c)  # views if h and x are channels_last
            pixels.addmm_(x.permute(0, 2, 3, 1).reshape(n * height * width, x.shape[1]), self.shortcut.weight.t())
            h = pixels.view(n, height, width, c).permute(0, 3, 1, 2)
        return rescaled_in_place(h, self.output_scale_factor)


class FrozenAttention(nn.Module):
    """`Attention` with one product for queries, keys and values."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.num_heads, self.output_scale_factor = attention.num_heads, attention.output_scale_factor
        self.group_norm = attention.group_norm
        self.to_qkv = attention.joined_projections()
        self.to_out = attention.to_out[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output: [N, C, H, W] -> [N, C, H, W]."""
        n, c, height, width = x.shape
        h = x if self.group_norm is None else self.group_norm(x)
        h = self.to_qkv(h.flatten(2).transpose(1, 2))  # [N, HW, 3 C]
        # Each [N, heads, HW, C / heads].
        q, k, v = h.view(n, height * width, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v)
        h = self.to_out(h.transpose(1, 2).flatten(2)).transpose(1, 2).view(n, c, height, width)
        h += x
        return rescaled_in_place(h, self.output_scale_factor)


def _time_projections(block: ResnetBlock) -> list[tuple[Tensor, Tensor]]:
    """Return weight and bias of a block's time terms: its shift, or its scale and its shift."""
    weight, bias = block.time_emb_proj.weight, block.time_emb_proj.bias
    if block.scale_shift:
        return list(zip(weight.chunk(2), bias.chunk(2), strict=True))
    # The shift is added to the output of conv1 before the norm, and so is the bias of conv1.
    return [(weight, _sum(bias, block.conv1.bias))]


def _sum(bias: Tensor | None, other: Tensor | None) -> Tensor:
    """Return the sum of two biases in float64. Every layer here has a bias."""
    assert bias is not None
    assert other is not None
    return bias.double() + other.double()


def _constants(tensors: Iterable[Tensor], dtype: torch.dtype) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(tensor.to(dtype), requires_grad=False) for tensor in tensors])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
