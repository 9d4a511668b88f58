"""Configuration of the U-Net: the keys and defaults of diffusers' `UNet2DModel`, and the supported values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Final, Literal

from ..checks import as_json
from ..errors import InvalidValue, suggested
from ..forms import Form, Numbers, Pairs, Ranges, Size, Texts
from ..interface import Condition, Labels
from ..options import Option, checked_option, document, options_of

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

# Keys that diffusers does not have. They stand in a config.json only where they are not None. Those that describe data stand
# under one key there, which diffusers ignores. The others it must not ignore, as they change the network.
DESCRIBING: Final = (*Labels.KEYS, *Condition.KEYS, "data_range", "variance")
OWN_KEYS: Final = ("num_attention_heads", "time_input_dim", *DESCRIBING)

# Bounds beyond any network of the literature. Within them the sizes of all tensors are below 2^63.
_MAX_LEVELS = 16
_MAX_NUMBER = 1 << 24  # channels, groups, heads, classes, timesteps
MAX_LAYERS = 64
_MAX_SIDE = 65536


def _key(
    help: str,
    low: float | None = None,
    high: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
    form: type[Form] | None = None,
) -> Option:
    return Option("network", help, low, high, above, below, form=form)


def _number(help: str) -> Option:
    return _key(help, 1, _MAX_NUMBER)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """A validated U-Net configuration.

    Names, meanings and defaults are those of diffusers' `UNet2DModel`. Only OWN_KEYS are this package's. Values that no DDPM's
    U-Net needs are not supported.
    """

    sample_size: Annotated[
        int | tuple[int, int] | None,
        _key("Height and width that the network was made for. Others work too.", 1, _MAX_SIDE, form=Size),
    ] = None
    in_channels: Annotated[int, _number("Channels of the input: those of an image and its condition.")] = 3
    out_channels: Annotated[int, _number("Channels of the output: twice those of an image where the variance is learned.")] = 3
    center_input_sample: Annotated[bool, _key("The input is in [0, 1] and is mapped to [-1, 1] first.")] = False
    time_embedding_type: Annotated[Literal["positional"], _key("The embedding of the timestep is sinusoidal.")] = "positional"
    time_input_dim: Annotated[
        int | None, _number("Width of the sinusoidal embedding. None: the first of block_out_channels.")
    ] = None
    time_embedding_dim: Annotated[
        int | None, _number("Width of the timestep's embedding in the blocks. None: 4 times the first of block_out_channels.")
    ] = None
    freq_shift: Annotated[int, _key("Shift of the embedding's frequencies. 1 in Ho et al.", 0)] = 0
    flip_sin_to_cos: Annotated[bool, _key("The embedding is (cos, sin). False in Ho et al.")] = True
    down_block_types: Annotated[
        tuple[Literal["DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"], ...],
        _key("Types of the blocks on the way down, one for each of block_out_channels.", form=Texts),
    ] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    mid_block_type: Annotated[Literal["UNetMidBlock2D"], _key("Type of the middle block.")] = "UNetMidBlock2D"
    up_block_types: Annotated[
        tuple[Literal["UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"], ...],
        _key("Types of the blocks on the way up, one for each of block_out_channels.", form=Texts),
    ] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: Annotated[
        tuple[int, ...], _key("Channels of each level, the finest first.", 1, _MAX_NUMBER, form=Numbers)
    ] = (224, 448, 672, 896)
    layers_per_block: Annotated[
        int, _key("Residual blocks of a level on the way down. The way up has one more.", 1, MAX_LAYERS)
    ] = 2
    mid_block_scale_factor: Annotated[float, _key("Divisor of the outputs of the middle block's layers.", above=0)] = 1.0
    downsample_padding: Annotated[Literal[0, 1], _key("0: pad the right and the bottom only, as Ho et al. do.")] = 1
    downsample_type: Annotated[
        Literal["conv", "resnet"],
        _key("How AttnDownBlock2D resamples. ResnetDownsampleBlock2D has a residual block."),
    ] = "conv"
    upsample_type: Annotated[Literal["conv", "resnet"], _key("How AttnUpBlock2D resamples.")] = "conv"
    dropout: Annotated[float, _key("Probability of dropout in the residual blocks.", 0, below=1)] = 0.0
    act_fn: Annotated[Literal["silu", "swish"], _key("The activation. Both names are of one function.")] = "silu"
    attention_head_dim: Annotated[int | None, _number("Channels of a head. None: a single head, as in Ho et al.")] = 8
    num_attention_heads: Annotated[
        int | None, _number("Heads of every attention, whatever its width. None: as attention_head_dim has it.")
    ] = None
    norm_num_groups: Annotated[int, _number("Groups of the group norms.")] = 32
    attn_norm_num_groups: Annotated[
        int | None,
        _number("Groups of the norm in the middle block's attention. None: norm_num_groups, or no norm with scale_shift."),
    ] = None
    norm_eps: Annotated[float, _key("Added to variances in the norms. 1e-6 in Ho et al.", above=0)] = 1e-5
    resnet_time_scale_shift: Annotated[
        Literal["default", "scale_shift"], _key("The timestep's embedding is added, or scales and shifts the second norm.")
    ] = "default"
    add_attention: Annotated[bool, _key("The middle block has an attention.")] = True
    class_embed_type: Annotated[Literal[None], _key("Classes are embedded by a table.")] = None
    num_class_embeds: Annotated[int | None, _number('Number of labels: that of the classes, plus one for "no label".')] = None
    class_names: Annotated[
        tuple[str, ...] | None, _key("Names of the labels from 0 on. A no_label that is the last has none.", form=Texts)
    ] = None
    no_label: Annotated[
        int | None, _key("Label that stands for no class. None: the last, if each other one has a name in class_names.", 0)
    ] = None
    num_train_timesteps: Annotated[int | None, _number("Timesteps of the schedule. It is recorded only.")] = None
    condition: Annotated[
        str | None, _key('What the channels after x_t are: "low-resolution:4", "grey", "mask", or "images" of other files.')
    ] = None
    condition_range: Annotated[
        Pairs | None, _key("(low, high) of a condition's channels, or of all, which are mapped to -1 and 1.", form=Ranges)
    ] = None
    data_range: Annotated[Pairs | None, _key("The same for the images. None: pictures of 0..255.", form=Ranges)] = None
    variance: Annotated[
        Literal["learned", "learned_range"] | None, _key("What half of the output channels predict. None: no variance.")
    ] = None

    @cached_property
    def labels(self) -> Labels:
        """The labels that the network reads."""
        return Labels.stated(self.num_class_embeds, self.no_label, self.class_names)

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
                raise InvalidValue("", f"keys among {', '.join(known)}", suggested(key, known))
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return every key with its value as JSON types. A key of OWN_KEYS is left out if it is None."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if key not in OWN_KEYS or value is not None}
        return {key: as_json(value) for key, value in values.items()}

    def __post_init__(self) -> None:
        for declared in options_of(UNetConfig):
            object.__setattr__(self, declared.name, checked_option(declared, getattr(self, declared.name)))
        _expect(self, "class_names", self.class_names != (), "None or a list of non-empty strings")
        _ = self.labels  # a ValueError if names do not fit
        drawn = (self.out_channels, self.out_channels // 2)  # half, if the network predicts variances too
        for key, counts in (("data_range", drawn), ("condition_range", [self.in_channels - each for each in drawn])):
            if (value := getattr(self, key)) is not None:
                _expect(self, key, len(value) in (1, *counts), "a pair, or one for each channel")

        channels = self.block_out_channels
        _expect(self, "block_out_channels", 0 < len(channels) <= _MAX_LEVELS, f"1 to {_MAX_LEVELS} integers")
        sinusoids = "block_out_channels" if self.time_input_dim is None else "time_input_dim"
        _expect(self, sinusoids, self.sinusoid_dim % 2 == 0, "even first (sine and cosine halves)")
        _expect(self, "freq_shift", self.freq_shift < self.sinusoid_dim // 2, f"below {self.sinusoid_dim // 2}")
        divisible = all(c % self.norm_num_groups == 0 for c in channels)
        _expect(self, "block_out_channels", divisible, f"multiples of norm_num_groups = {self.norm_num_groups}")
        if (groups := self.attn_norm_num_groups) is not None:
            _expect(self, "attn_norm_num_groups", channels[-1] % groups == 0, f"a divisor of {channels[-1]}")
        for key in ("down_block_types", "up_block_types"):
            _expect(self, key, len(getattr(self, key)) == len(channels), f"{len(channels)} types, one per block_out_channels")
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

    def head_dim(self, channels: int) -> int | None:
        """Return the channels per head of an attention layer of this width, or None for a single head."""
        return channels // self.num_attention_heads if self.num_attention_heads else self.attention_head_dim


document(UNetConfig)


def _expect(config: UNetConfig, key: str, holds: object, wanted: str) -> None:
    if not holds:
        raise InvalidValue(key, f"to be {wanted}", repr(getattr(config, key)))
