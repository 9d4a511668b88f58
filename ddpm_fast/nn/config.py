"""Configuration of the U-Net: the keys and defaults of diffusers' `UNet2DModel`, and the supported values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..checks import Ranges, as_json, check_choice, check_int, check_number, check_type, checked_ranges
from ..errors import InvalidValue

CIFAR10_32: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": [128, 256, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "attention_head_dim": None,
    "norm_eps": 1e-6,
}
"""Arguments of the CIFAR-10 network of Ho et al. (2020), appendix B: 35,746,307 parameters, attention at 16x16."""
HO_256: dict[str, Any] = CIFAR10_32 | {
    "sample_size": 256,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
}
"""Arguments of the network of the same paper for 256x256 images: 113,673,219 parameters, attention at 16x16."""

# Keys that diffusers does not have. They stand in a config.json only where they are not None.
OWN_KEYS: tuple[str, ...] = (
    "num_attention_heads",
    "time_input_dim",
    "class_names",
    "condition",
    "condition_range",
    "data_range",
    "variance",
)

# Keys of which only these values are supported. The rest of what diffusers offers here is not part of a DDPM's U-Net.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None,),
}
# Bounds beyond any network of the literature. Within them the sizes of all tensors are below 2^63.
_MAX_LEVELS = 16
_MAX_NUMBER = 1 << 24  # channels, groups, heads, classes, timesteps
MAX_LAYERS = 64
_MAX_SIDE = 65536
_DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
_UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """A validated U-Net configuration.

    Names, meanings and defaults are those of diffusers' `UNet2DModel`. Only OWN_KEYS are this package's.
    """

    sample_size: int | Sequence[int] | None = None  # height and width the network was made for; not enforced
    in_channels: int = 3
    out_channels: int = 3  # 2 * in_channels where the variance is learned
    center_input_sample: bool = False  # the input is in [0, 1]: map it to [-1, 1] first
    time_embedding_type: str = "positional"
    time_input_dim: int | None = None  # width of the sinusoidal embedding; None: block_out_channels[0]
    time_embedding_dim: int | None = None  # None: 4 * block_out_channels[0]
    freq_shift: int = 0  # Ho et al.: 1
    flip_sin_to_cos: bool = True  # the embedding is (cos, sin); Ho et al.: False
    down_block_types: Sequence[str] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    mid_block_type: str = "UNetMidBlock2D"
    up_block_types: Sequence[str] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: Sequence[int] = (224, 448, 672, 896)  # highest resolution first
    layers_per_block: int = 2  # on the way down; one more on the way up
    mid_block_scale_factor: float = 1.0  # divides the output of every layer of the middle block
    downsample_padding: int = 1  # 0: pad the right and the bottom only, as Ho et al.
    downsample_type: str = "conv"  # for AttnDownBlock2D; "resnet": a residual block, as ResnetDownsampleBlock2D always has
    upsample_type: str = "conv"
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | None = 8  # channels of one head; None: a single head, as Ho et al.
    num_attention_heads: int | None = None  # for every attention, whatever its width; None: as attention_head_dim has it
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None  # middle block's attention; None: norm_num_groups, or no norm in scale_shift
    norm_eps: float = 1e-5  # Ho et al.: 1e-6
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True  # in the middle block
    class_embed_type: str | None = None
    num_class_embeds: int | None = None  # number of classes + 1: the last is "no label"
    class_names: Sequence[str] | None = None  # in the order of the labels, without "no label"
    num_train_timesteps: int | None = None  # recorded only
    condition: str | None = None  # channels after x_t: "low-resolution:4", "grey", "mask", or "images" of other files
    condition_range: Ranges | None = None  # (low, high) of a condition's channels, or of all, which are mapped to -1 and 1
    data_range: Ranges | None = None  # the same for the images; None: pictures of 0..255
    variance: str | None = None  # "learned" or "learned_range", if half of the output channels predict it

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UNetConfig:
        """Return the configuration that the keys of a config.json describe.

        Args:
            values: Keys and values. Keys that begin with "_" are diffusers' bookkeeping and are ignored.

        Raises:
            TypeError: A value has the wrong type.
            ValueError: A key is unknown, or a value is not supported.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        values = {key: value for key, value in values.items() if not key.startswith("_")}
        for key in values:
            if key not in known:
                raise InvalidValue("UNet", "", f"keys among {', '.join(known)}", repr(key))
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return every key with its value as JSON types. A key of OWN_KEYS is left out if it is None."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if key not in OWN_KEYS or value is not None}
        return {key: as_json(value) for key, value in values.items()}

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if isinstance(value := getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(value))
        for key, supported in _SUPPORTED.items():
            value = getattr(self, key)
            alike = any(type(value) is type(each) and value == each for each in supported)  # True is not 1
            _expect(self, key, alike, " or ".join(map(repr, supported)))
        for key in ("center_input_sample", "flip_sin_to_cos", "add_attention"):
            check_type("UNet", key, getattr(self, key), bool)
        for key in ("in_channels", "out_channels", "norm_num_groups"):
            check_int("UNet", key, getattr(self, key), 1, _MAX_NUMBER)
        check_int("UNet", "layers_per_block", self.layers_per_block, 1, MAX_LAYERS)
        check_int("UNet", "freq_shift", self.freq_shift, 0)
        if isinstance(sizes := self.sample_size, tuple):
            _expect(self, "sample_size", len(sizes) == 2, "an integer or (height, width)")
        for value in sizes if isinstance(sizes, tuple) else (sizes,):
            check_int("UNet", "sample_size", value, 1, _MAX_SIDE, optional=sizes is None)
        for key in (
            *("num_attention_heads", "time_input_dim", "time_embedding_dim", "attention_head_dim", "attn_norm_num_groups"),
            *("num_class_embeds", "num_train_timesteps"),
        ):
            check_int("UNet", key, getattr(self, key), 1, _MAX_NUMBER, optional=True)
        check_number("UNet", "dropout", self.dropout, 0, below=1)
        check_number("UNet", "mid_block_scale_factor", self.mid_block_scale_factor, above=0, finite=True)
        check_number("UNet", "norm_eps", self.norm_eps, above=0, finite=True)
        if (names := self.class_names) is not None:
            strings = isinstance(names, tuple) and all(isinstance(name, str) and name for name in names)
            _expect(self, "class_names", strings and len(names) > 0, "None or a list of non-empty strings")
            _expect(self, "class_names", len(set(names)) == len(names), "without repetitions")
            limit = self.num_class_embeds or 0
            _expect(self, "class_names", len(names) < limit, f"None or fewer names than num_class_embeds = {limit or None}")
        check_type("UNet", "condition", self.condition, str, optional=True)
        check_choice("UNet", "variance", self.variance, (None, "learned", "learned_range"))
        drawn = (self.out_channels, self.out_channels // 2)  # half, if the network predicts variances too
        for key, counts in (("data_range", drawn), ("condition_range", [self.in_channels - each for each in drawn])):
            if (value := getattr(self, key)) is not None:
                object.__setattr__(self, key, checked_ranges("UNet", key, value))
                _expect(self, key, len(getattr(self, key)) in (1, *counts), "a pair, or one for each channel")

        channels = self.block_out_channels
        _expect(self, "block_out_channels", isinstance(channels, tuple) and len(channels) > 0, "a list of positive integers")
        for value in channels:
            check_int("UNet", "block_out_channels", value, 1, _MAX_NUMBER)
        _expect(self, "block_out_channels", len(channels) <= _MAX_LEVELS, f"at most {_MAX_LEVELS} integers")
        sinusoids = "block_out_channels" if self.time_input_dim is None else "time_input_dim"
        _expect(self, sinusoids, self.sinusoid_dim % 2 == 0, "even first (sine and cosine halves)")
        _expect(self, "freq_shift", self.freq_shift < self.sinusoid_dim // 2, f"below {self.sinusoid_dim // 2}")
        divisible = all(c % self.norm_num_groups == 0 for c in channels)
        _expect(self, "block_out_channels", divisible, f"multiples of norm_num_groups = {self.norm_num_groups}")
        if (groups := self.attn_norm_num_groups) is not None:
            _expect(self, "attn_norm_num_groups", channels[-1] % groups == 0, f"a divisor of {channels[-1]}")
        for key, supported in (("down_block_types", _DOWN_BLOCKS), ("up_block_types", _UP_BLOCKS)):
            types = getattr(self, key)
            known = isinstance(types, tuple) and all(t in supported for t in types)
            _expect(self, key, known, f"a list made of {' and '.join(supported)}")
            _expect(self, key, len(types) == len(channels), f"{len(channels)} types, one per block_out_channels")
        heads = "attention_head_dim" if self.num_attention_heads is None else "num_attention_heads"
        if (divisor := getattr(self, heads)) is not None:
            attended = {c for c, t in zip(channels, self.down_block_types, strict=True) if t == "AttnDownBlock2D"}
            attended |= {c for c, t in zip(channels[::-1], self.up_block_types, strict=True) if t == "AttnUpBlock2D"}
            attended |= {channels[-1]} if self.add_attention else set()
            divides = all(c % divisor == 0 for c in attended)
            _expect(self, heads, divides, f"None or a divisor of every attention width {sorted(attended)}")

    @property
    def sinusoid_dim(self) -> int:
        """Width of the sinusoidal embedding of the timestep."""
        return self.time_input_dim or self.block_out_channels[0]

    def check_image_shape(self, caller: str, name: str, shape: Sequence[int]) -> None:
        """Raise a ValueError unless `shape` is a valid shape of the network's input.

        Args:
            caller: Name of the calling function for error messages.
            name: Name of the checked argument for error messages.
            shape: Shape to check. Valid is [N, in_channels, H, W] with H and W multiples of
                2^(number of levels - 1).
        """
        multiple = 2 ** (len(self.block_out_channels) - 1)
        if len(shape) != 4 or shape[1] != self.in_channels:
            raise InvalidValue(caller, name, f"to be [N, {self.in_channels}, H, W]", tuple(shape))
        if shape[2] % multiple or shape[3] % multiple:
            raise InvalidValue(caller, name, f"to have H and W that are multiples of {multiple}", f"{shape[2]}x{shape[3]}")

    def head_dim(self, channels: int) -> int | None:
        """Return the channels per head of an attention layer of this width, or None for a single head."""
        return channels // self.num_attention_heads if self.num_attention_heads else self.attention_head_dim


def _expect(config: UNetConfig, key: str, holds: bool, wanted: str) -> None:
    if not holds:
        raise InvalidValue("UNet", key, f"to be {wanted}", repr(getattr(config, key)))
