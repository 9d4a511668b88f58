"""`UNet`, the network of Ho et al. (2020), with diffusers' `UNet2DModel` configuration and parameter names."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from numbers import Number
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..checks import check_float, check_strided, checked_device, checked_seeds
from ..errors import InvalidType, InvalidValue, public
from ..interface import check_sides, side_multiple
from ..ops.modes import runs_eagerly
from ..options import checked
from ..reference import STREAM_DROPOUT
from .checkpoint import check_finite, check_weights, load_network, save_checkpoint
from .config import UNetConfig
from .conv import Conv3x3
from .layers import (
    Attention,
    Downsample,
    GroupNormSiLU,
    ResnetBlock,
    TimeEmbedding,
    Upsample,
    timestep_embedding,
)


class UNet(nn.Module):
    """U-Net that predicts the noise in x_t (or x_0, or v): eps_theta(x_t, t) of eq. 12 and 13.

    Keywords are the configuration keys of diffusers' `UNet2DModel` with its defaults; `UNetConfig` lists
    them. `CIFAR10_32` and `HO_256` configure the networks of Ho et al.: `UNet(**CIFAR10_32)`.

    Weights are initialized as by Ho et al.: Glorot uniform, and zero for biases, for the last layer of every
    residual branch and for the output convolution. A new network therefore predicts 0.

    Args:
        **config: Configuration keys.

    Attributes:
        config: Every configuration key, as JSON types. `class_names` and the other keys that diffusers does not
            have are left out if they are None.

    Raises:
        TypeError: A value has the wrong type. The message names it.
        ValueError: A key is unknown, or a value is not supported.
    """

    @public()
    def __init__(self, **config: Any) -> None:
        super().__init__()
        self._config = cfg = UNetConfig.from_dict(config)
        self.config: dict[str, Any] = cfg.to_dict()
        channels = list(cfg.block_out_channels)
        emb_dim = cfg.time_embedding_dim or 4 * channels[0]

        self.conv_in = Conv3x3(cfg.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(cfg.sinusoid_dim, emb_dim)
        self.class_embedding = cfg.labels.embedding(emb_dim)

        # Widths of the skip connections in the order they are made; the way up takes them from the end.
        skips = [channels[0]]
        self.down_blocks = nn.ModuleList()
        for i, block_type in enumerate(cfg.down_block_types):
            last = i == len(channels) - 1
            ins = [channels[max(i - 1, 0)]] + [channels[i]] * (cfg.layers_per_block - 1)
            self.down_blocks.append(DownBlock(cfg, block_type, ins, channels[i], emb_dim, not last))
            skips += [channels[i]] * (cfg.layers_per_block + (not last))

        self.mid_block = MidBlock(cfg, channels[-1], emb_dim)

        self.up_blocks = nn.ModuleList()
        width = channels[-1]
        for i, up_type in enumerate(cfg.up_block_types):
            last = i == len(channels) - 1
            out = channels[-1 - i]
            ins = [w + skips.pop() for w in [width] + [out] * cfg.layers_per_block]
            self.up_blocks.append(UpBlock(cfg, up_type, ins, out, emb_dim, not last))
            width = out

        self.conv_norm_out = GroupNormSiLU(cfg.norm_num_groups, channels[0], cfg.norm_eps)
        self.conv_out = Conv3x3(channels[0], cfg.out_channels, 3, padding=1)
        for i, block in enumerate(module for module in self.modules() if isinstance(module, ResnetBlock)):
            block.dropout_stream = STREAM_DROPOUT + i
        self.reset_parameters()

    # Attributes that denoising-diffusion-pytorch's GaussianDiffusion reads.
    @property
    def channels(self) -> int:
        """Channels of an image: `in_channels` of the configuration."""
        return self._config.in_channels

    @property
    def out_dim(self) -> int:
        """Channels of the output: `out_channels` of the configuration."""
        return self._config.out_channels

    @property
    def self_condition(self) -> bool:
        """False: the network does not read its last prediction of x_0."""
        return False

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reset all weights to their initial distribution; see the class."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        zeros = [self.conv_out.weight]
        for module in self.modules():
            if isinstance(module, ResnetBlock):
                zeros.append(module.conv2.weight)
            elif isinstance(module, Attention):
                zeros.extend(module.to_out.parameters())
        for weight in zeros:
            nn.init.zeros_(weight)

    @torch.no_grad()
    def weaken_shortcuts(self) -> None:
        """Divide the weights of shortcuts between widths by sqrt(3).

        The features of coarse levels of a new network are then smaller next to those of the full resolution. Without it, a
        network of 16 channels in 4 groups did not learn photographs.
        """
        for module in self.modules():
            if isinstance(module, ResnetBlock) and module.conv_shortcut is not None:
                module.conv_shortcut.weight /= 3**0.5

    @public("UNet", traced=True)
    def forward(
        self, x: Tensor, t: Tensor | int, class_labels: Tensor | None = None, *, dropout_seeds: Tensor | None = None
    ) -> Tensor:
        """Evaluate the network.

        Args:
            x: x_t, [N, in_channels, H, W], contiguous or channels_last. H and W must be multiples of
                2^(len(block_out_channels) - 1). It is cast to the weights' dtype.
            t: Timestep, 0..T-1: an int, a 0-d tensor, or [N].
            class_labels: int64 [N]. Required if the network has `num_class_embeds`, else forbidden. Labels
                are range-checked on the CPU. On a GPU a check would synchronize with the host, so the
                caller must keep them in range.
            dropout_seeds: int64 [N], see `sample_seeds`. What dropout drops of a sample in training mode then
                depends on its seed alone, whatever batch it is in. Block i draws from stream STREAM_DROPOUT + i.
                None: PyTorch's generator decides.

        Returns:
            [N, out_channels, H, W] in the weights' dtype, or in the autocast dtype.

        Raises:
            ValueError: A shape does not fit, or labels are missing, unexpected or out of range.
            TypeError: x is not a dense floating tensor, t is neither a number nor a tensor of numbers, or
                `dropout_seeds` are not int64.
        """
        cfg = self._config
        t = checked_timesteps(cfg, x, t, class_labels)
        if dropout_seeds is not None:
            dropout_seeds = checked_seeds(dropout_seeds, x.shape[0], x.device, "dropout_seeds")
        dtype = self.conv_in.weight.dtype
        if torch.compiler.is_compiling() and torch.is_grad_enabled():
            # Height and width become constants of the graph: Inductor fails on gradients of channels_last maps of a dynamic
            # size (ValueRangeError in PyTorch 2.13). The batch stays dynamic.
            for size in x.shape[2:]:
                range(size)

        emb = timestep_embedding(t, cfg.sinusoid_dim, flip_sin_to_cos=cfg.flip_sin_to_cos, freq_shift=cfg.freq_shift)
        emb = self.time_embedding(emb.to(dtype))  # [N, emb_dim]
        if self.class_embedding is not None:
            emb = emb + self.class_embedding(class_labels)
        emb = F.silu(emb)  # once, instead of in every block

        x = self.conv_in(centered(self._config, x.to(dtype)))
        skips = [x]
        for down_block in self.down_blocks:
            x = down_block(x, emb, skips, dropout_seeds)
        x = self.mid_block(x, emb, dropout_seeds)
        for up_block in self.up_blocks:
            x = up_block(x, emb, skips, dropout_seeds)
        out: Tensor = self.conv_out(self.conv_norm_out(x))
        return out

    @classmethod
    @checked()
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> UNet:
        """Load a network from a folder in diffusers' layout, or by its name on the Hugging Face hub, in eval mode.

        Args:
            path: Folder with config.json and diffusion_pytorch_model.safetensors, or a pipeline's folder that
                holds them in unet/ or at its root, or a name, see `load_folder`. A .bin file is read without unpickling
                code. Legacy names of attention weights are supported.
            dtype: Dtype of the weights. None: float32, whatever the file holds.
            device: Device of the weights. None: the CPU.

        Raises:
            FileNotFoundError: A file is missing.
            OSError: The hub does not have the model, does not give it, or is out of reach.
            ImportError: huggingface_hub is missing.
            ValueError: A file is damaged, the configuration is not supported, the weights do not fit it, or they
                are not finite in `dtype`.
        """
        device = None if device is None else checked_device(device)
        config, weights, file = load_network(path)
        model = unet_on_weights(file, "its config.json", config.to_dict(), weights, kind=cls)
        model.to(device, torch.float32 if dtype is None else dtype)
        check_finite(file, model.state_dict())
        return model.eval()

    @checked()
    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write config.json and diffusion_pytorch_model.safetensors in diffusers' layout.

        Each file is written atomically. Weights of a network with another configuration are not overwritten.

        Args:
            path: Folder to write, created if needed.

        Raises:
            ValueError: The folder holds another network.
        """
        save_checkpoint(path, self._config, self.state_dict())


def unet_on_weights(
    path: str | os.PathLike[str],
    owner: str,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    *,
    trainable: bool = True,
    kind: type[UNet] = UNet,
) -> UNet:
    """Return a `UNet` of this configuration on weights by name, which are not copied. They are checked by `check_weights`."""
    with torch.device("meta"), WithoutDraws():
        model = kind(**config).requires_grad_(trainable)
    check_weights(path, owner, model.state_dict(), weights)
    model.load_state_dict(weights, assign=True)
    return model


class WithoutDraws(TorchFunctionMode):
    """A context in which new layers do not initialize their weights.

    Initializing weights on the meta device imports PyTorch's compiler, which takes seconds.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return the tensor of a draw unchanged. Call any other function."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("kaiming_uniform_", "uniform_", "normal_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def describe_images(model: UNet, size: Sequence[int] | None, described: Mapping[str, Any]) -> None:
    """Put the size of the images and more into a configuration that lacks them.

    Args:
        model: The network.
        size: (H, W), or None if it is not known.
        described: Other keys of the configuration.

    Raises:
        ValueError: A value is not valid.
    """
    config = model._config
    config = dataclasses.replace(config, **{key: each for key, each in described.items() if getattr(config, key) is None})
    if config.sample_size is None and size is not None:
        height, width = size
        config = dataclasses.replace(config, sample_size=height if height == width else (height, width))
    if config is not model._config:
        model._config, model.config = config, config.to_dict()


def checked_timesteps(config: UNetConfig, x: Tensor, t: Tensor | float, class_labels: Tensor | None) -> Tensor:
    """Return t as [N] on x's device, or raise what `UNet.forward` documents."""
    check_float("x", x)
    if x.dim() != 4 or x.shape[1] != config.in_channels:
        raise InvalidValue("x", f"to be [N, {config.in_channels}, H, W]", tuple(x.shape))
    check_sides("x", x.shape[2:], side_multiple(config.block_out_channels))
    n = x.shape[0]
    # torch.compile and the like cannot ask for a value
    config.labels.check(class_labels, x, values=class_labels is None or runs_eagerly(class_labels))
    if not isinstance(t, Tensor):
        if not isinstance(t, Number) or isinstance(t, (bool, complex)):
            raise InvalidType("t", "to be an int or a tensor", type(t).__name__)
        if not 0 <= t < 1 << 53:  # NaN fails too
            raise InvalidValue("t", "to be at least 0 and finite", t)
        return torch.full((n,), t, device=x.device)
    check_strided("t", t)
    if t.dtype == torch.bool or t.is_complex():
        raise InvalidType("t", "to be numbers", t.dtype)
    if t.dim() > 1 or (t.dim() == 1 and t.shape[0] != n):  # the compiler compares symbolic sizes, not tuples of them
        raise InvalidValue("t", f"to be an int or of shape [] or [{n}]", tuple(t.shape))
    if t.is_meta and not x.is_meta:
        raise InvalidValue("t", "to have values", "a tensor on the meta device")
    return t.to(x.device).expand(n)


def centered(config: UNetConfig, x: Tensor) -> Tensor:
    """Return x, mapped from [0, 1] to [-1, 1] if the configuration has `center_input_sample`."""
    return 2 * x - 1 if config.center_input_sample else x


class DownBlock(nn.Module):
    """One resolution on the way down.

    Residual blocks, each followed by attention if the type is AttnDownBlock2D. With `downsample`, a convolution or
    residual block then halves height and width.
    """

    def __init__(
        self, cfg: UNetConfig, block_type: str, in_channels: list[int], channels: int, emb_dim: int, downsample: bool
    ) -> None:
        super().__init__()
        attention = block_type == "AttnDownBlock2D"
        by_resnet = block_type == "ResnetDownsampleBlock2D" or (attention and cfg.downsample_type == "resnet")
        downsampler: nn.Module
        if by_resnet:
            downsampler = _resnet(cfg, channels, channels, emb_dim, resample="down")
        else:
            downsampler = Downsample(channels, cfg.downsample_padding)
        self.resnets = nn.ModuleList([_resnet(cfg, width, channels, emb_dim) for width in in_channels])
        self.attentions = nn.ModuleList([_attention(cfg, channels) for _ in in_channels if attention])
        self.downsamplers = nn.ModuleList([downsampler] if downsample else [])

    def forward(self, x: Tensor, emb: Tensor, skips: list[Tensor], dropout_seeds: Tensor | None = None) -> Tensor:
        """Return the block's output, and append every layer's output to `skips`.

        Args:
            x: [N, C, H, W].
            emb: [N, emb_dim].
            skips: List of skip connections.
            dropout_seeds: int64 [N] or None, see `UNet.forward`.

        Returns:
            [N, channels, H / 2, W / 2], or [N, channels, H, W] without downsampling.
        """
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, emb, dropout_seeds=dropout_seeds)
            if self.attentions:
                x = self.attentions[i](x)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x, emb, dropout_seeds=dropout_seeds) if isinstance(downsample, ResnetBlock) else downsample(x)
            skips.append(x)
        return x


class MidBlock(nn.Module):
    """Residual block, attention and residual block at the lowest resolution."""

    def __init__(self, cfg: UNetConfig, channels: int, emb_dim: int) -> None:
        super().__init__()
        factor = cfg.mid_block_scale_factor
        self.resnets = nn.ModuleList([_resnet(cfg, channels, channels, emb_dim, factor) for _ in range(2)])
        groups = cfg.attn_norm_num_groups
        if groups is None and cfg.resnet_time_scale_shift == "default":
            groups = cfg.norm_num_groups
        attention = Attention(
            channels,
            head_dim=cfg.head_dim(channels),
            num_groups=groups,
            eps=cfg.norm_eps,
            output_scale_factor=factor,
        )
        self.attentions = nn.ModuleList([attention] if cfg.add_attention else [])

    def forward(self, x: Tensor, emb: Tensor, dropout_seeds: Tensor | None = None) -> Tensor:
        """Return the block's output: [N, channels, H, W] -> [N, channels, H, W]."""
        x = self.resnets[0](x, emb, dropout_seeds=dropout_seeds)
        for attention in self.attentions:
            x = attention(x)
        out: Tensor = self.resnets[1](x, emb, dropout_seeds=dropout_seeds)
        return out


class UpBlock(nn.Module):
    """One resolution on the way up.

    Residual blocks on input and skip connection, each followed by attention if the type is AttnUpBlock2D. With
    `upsample`, a convolution or residual block then doubles height and width.
    """

    def __init__(
        self, cfg: UNetConfig, block_type: str, in_channels: list[int], channels: int, emb_dim: int, upsample: bool
    ) -> None:
        super().__init__()
        attention = block_type == "AttnUpBlock2D"
        by_resnet = block_type == "ResnetUpsampleBlock2D" or (attention and cfg.upsample_type == "resnet")
        upsampler = _resnet(cfg, channels, channels, emb_dim, resample="up") if by_resnet else Upsample(channels)
        self.resnets = nn.ModuleList([_resnet(cfg, width, channels, emb_dim) for width in in_channels])
        self.attentions = nn.ModuleList([_attention(cfg, channels) for _ in in_channels if attention])
        self.upsamplers = nn.ModuleList([upsampler] if upsample else [])

    def forward(self, x: Tensor, emb: Tensor, skips: list[Tensor], dropout_seeds: Tensor | None = None) -> Tensor:
        """Return the block's output, and pop one of `skips` per layer.

        Args:
            x: [N, C, H, W].
            emb: [N, emb_dim].
            skips: List of skip connections, used from its end.
            dropout_seeds: int64 [N] or None, see `UNet.forward`.

        Returns:
            [N, channels, 2 H, 2 W], or [N, channels, H, W] without upsampling.
        """
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, emb, skips.pop(), dropout_seeds=dropout_seeds)
            if self.attentions:
                x = self.attentions[i](x)
        for upsample in self.upsamplers:
            x = upsample(x, emb, dropout_seeds=dropout_seeds) if isinstance(upsample, ResnetBlock) else upsample(x)
        return x


def _resnet(
    cfg: UNetConfig,
    in_channels: int,
    out_channels: int,
    emb_dim: int,
    output_scale_factor: float = 1.0,
    resample: Literal["down", "up"] | None = None,
) -> ResnetBlock:
    return ResnetBlock(
        in_channels,
        out_channels,
        emb_dim,
        num_groups=cfg.norm_num_groups,
        eps=cfg.norm_eps,
        dropout=cfg.dropout,
        time_scale_shift=cfg.resnet_time_scale_shift,
        output_scale_factor=output_scale_factor,
        resample=resample,
    )


def _attention(cfg: UNetConfig, channels: int) -> Attention:
    return Attention(channels, head_dim=cfg.head_dim(channels), num_groups=cfg.norm_num_groups, eps=cfg.norm_eps)
