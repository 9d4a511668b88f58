"""The options of a training run. Each is declared once: its type, default, range, group and help.

The command line, its help, the table in the docs and config.json are made from these declarations. PyTorch is imported when
options are made, so help texts come at once.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import Parameter, Signature
from types import UnionType
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import InvalidValue, expect
from ..predictions import Prediction, Variance


@dataclass(frozen=True)
class Option:
    """A declaration of an option, without its name, type and default.

    Attributes:
        group: The heading under which help shows it.
        help: Its effect, in one or two sentences that begin with a verb.
        low: The least value.
        high: The largest value.
        above: An excluded lower bound.
        below: An excluded upper bound.
        changeable: A resumed run may change it: it decides how long, where and with what records, not what is trained.
        local: Processes of one run may differ in it.
        recorded: config.json has it. Others concern one call.
    """

    group: str
    help: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    changeable: bool = False
    local: bool = False
    recorded: bool = True


_data = partial(Option, "Data")
_model = partial(Option, "Network and noise schedule")
_objective = partial(Option, "Objective")
_optimization = partial(Option, "Optimization")
_machine = partial(Option, "Machine")
_records = partial(Option, "Records and checkpoints", changeable=True)
_call = partial(Option, "This call", changeable=True, recorded=False)

_Path = str | os.PathLike[str]
Ranges = tuple[tuple[float, float], ...]  # as `checks.Ranges`, whose module imports PyTorch


class Declared(NamedTuple):
    """An option of a struct.

    Attributes:
        name: Its name.
        kind: Its type.
        default: Its default.
        option: Its declaration.
    """

    name: str
    kind: Any
    default: Any
    option: Option

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The parts of its type: a union's members, or itself."""
        return get_args(self.kind) if isinstance(self.kind, UnionType) or get_origin(self.kind) is Union else (self.kind,)

    @property
    def is_size(self) -> bool:
        """True if it is a width and height, or one number for both."""
        return tuple[int, int] in self.kinds

    @property
    def choices(self) -> list[str]:
        """Its values if they are listed, or none."""
        return [choice for kind in self.kinds if get_origin(kind) is Literal for choice in get_args(kind)]


@dataclass(frozen=True)
class Options:
    """A struct of options, which are checked when it is made.

    Raises:
        TypeError: An option has another type than is declared.
        ValueError: An option is out of range.
    """

    def __post_init__(self) -> None:
        for declared in options_of(type(self)):
            value = _checked(type(self).__name__, declared, getattr(self, declared.name))
            object.__setattr__(self, declared.name, value)

    @classmethod
    def from_values(cls: type[AnyOptions], values: Mapping[str, Any]) -> AnyOptions:
        """Return the struct with those of the values that it has."""
        return cls(**{option.name: values[option.name] for option in options_of(cls) if option.name in values})

    def recorded(self) -> dict[str, Any]:
        """Return the options that config.json has, as JSON gives them back."""
        from ..checks import as_json

        return {each.name: as_json(getattr(self, each.name)) for each in options_of(type(self)) if each.option.recorded}


AnyOptions = TypeVar("AnyOptions", bound=Options)


def options_of(struct: type[Options]) -> Iterator[Declared]:
    """Yield the options of a struct."""
    kinds = get_type_hints(struct, include_extras=True)
    for field in dataclasses.fields(struct):
        kind, option = get_args(kinds[field.name])
        yield Declared(field.name, kind, field.default, option)


def _described(struct: type[AnyOptions]) -> type[AnyOptions]:
    """Add the help of the options to the docstring of their struct, and leave it out of the signature."""
    texts = [f"    {each.name}: {each.option.help}" for each in options_of(struct)]
    struct.__doc__ = "\n".join([struct.__doc__ or "", "", "Attributes:", *texts])
    parameters = [
        Parameter(each.name, Parameter.KEYWORD_ONLY, default=each.default, annotation=each.kind) for each in options_of(struct)
    ]
    struct.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return struct


@_described
@dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """The images that `train` reads."""

    data: Annotated[
        _Path,
        _data(
            "Train on digits, fashion-mnist, cifar10, a folder (its sub-folders are classes), a .zip, .npy or .npz.",
            changeable=True,  # the images themselves are compared
            local=True,
        ),
    ] = "digits"
    data_dir: Annotated[
        _Path | None,
        _data(
            "Read the data set from this folder, or download it there. Default: a folder in the user's cache.",
            changeable=True,
            local=True,
        ),
    ] = None
    image_size: Annotated[
        int | tuple[int, int] | None,
        _data(
            "Crop and resize images to this width x height, such as 64 or 48x32. Required unless all have one size.",
            low=1,
            high=1 << 16,
        ),
    ] = None
    colors: Annotated[
        Literal["grey", "rgb", "rgba"] | None,
        _data("Train on images in these colours. Default: grey if all files are, else rgb."),
    ] = None
    data_range: Annotated[
        Ranges | None,
        _data(
            "Map these values of .npy and .npz files to -1 and 1: one pair, or one a channel. Default: each channel's range."
        ),
    ] = None
    condition: Annotated[
        _Path | None,
        _data(
            "Give the network low-resolution:4, grey or mask images to restore, or those of a folder with the same file names.",
            changeable=True,  # the images themselves are compared, and the network's configuration names a degradation
            local=True,
        ),
    ] = None
    condition_range: Annotated[
        Ranges | None,
        _data("Map these values of .npy and .npz conditions to -1 and 1, as --data-range does."),
    ] = None
    data_memory: Annotated[
        int | str,
        _data("Decode images batch by batch if all take more than this many bytes, such as 200MiB or 2GiB.", changeable=True),
    ] = "2GiB"
    skip_broken: Annotated[
        bool, _data("Leave out images of a folder that cannot be read, and say how many and which.", changeable=True)
    ] = False


@_described
@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """The network and the noise schedule that `train` makes."""

    channels: Annotated[
        tuple[int, ...], _model("Give each level this many channels. Each level halves the resolution.", low=1)
    ] = (64, 128, 128)
    layers: Annotated[int, _model("Use this many residual blocks per level, and one more on the way up.", low=1, high=64)] = 2
    attention: Annotated[
        tuple[int, ...],
        _model("Use self-attention at these resolutions, in pixels, or none; it is in the middle block, too.", low=1),
    ] = (16,)
    head_dim: Annotated[
        int | None, _model("Give each attention head this many channels. Default: a single head.", low=1, high=1 << 16)
    ] = None
    scale_shift: Annotated[
        bool, _model("Use the time embedding to scale and shift the second norm instead of adding to its input.")
    ] = False
    dropout: Annotated[float, _model("Drop activations in residual blocks with this probability.", low=0, below=1)] = 0.0
    conditional: Annotated[bool, _model("Condition on the class if the data set has more than one.")] = True
    init: Annotated[
        _Path | None,
        _model("Start from the weights of a model folder, a run or a checkpoint. Default: random weights.", local=True),
    ] = None
    num_timesteps: Annotated[int, _model("Set T, the number of steps of the forward process.", low=1, high=100_000)] = 1000
    schedule: Annotated[
        Literal["linear", "scaled_linear", "cosine", "sigmoid", "flow"] | None,
        _model("Choose the noise schedule. Default: linear, or flow if the network predicts flow."),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.channels:
            raise InvalidValue("ModelOptions", "channels", "to be at least one number", "none")


@_described
@dataclass(frozen=True, kw_only=True)
class TrainOptions(Options):
    """The training of `train` and `Trainer`: objective, optimization, machine, records, and what concerns one call."""

    prediction: Annotated[Prediction, _objective("Choose what the network predicts.")] = "epsilon"
    variance: Annotated[
        Variance, _objective("Choose the variance of reverse steps. A network learns one by the variational bound, too.")
    ] = "fixed_small"
    loss_weight: Annotated[
        Literal["min_snr"] | None,
        _objective("Weight the loss per timestep. min_snr bounds it where there is little noise. Default: 1 for all (eq. 12)."),
    ] = None
    label_dropout: Annotated[float, _objective("Drop the class with this probability, to allow guidance.", low=0, high=1)] = 0.1
    flip: Annotated[bool, _objective("Mirror half of the images left to right.")] = False

    steps: Annotated[
        int, _optimization("Stop after this many optimizer steps, counted from the run's beginning.", low=1, changeable=True)
    ] = 20_000
    batch_size: Annotated[int, _optimization("Use this many images per step, all processes together.", low=1, high=1 << 20)] = (
        64
    )
    micro_batch_size: Annotated[
        int | None,
        _optimization(
            "Compute the gradients of this many images at a time, to save memory. Default: batch / processes.",
            low=1,
            changeable=True,
        ),
    ] = None
    lr: Annotated[float, _optimization("Set the learning rate after warm-up.", above=0)] = 2e-4
    warmup_steps: Annotated[int, _optimization("Raise the learning rate from 0 over this many steps.", low=0)] = 500
    lr_decay: Annotated[
        Literal["linear", "cosine"], _optimization("Choose the shape of the final learning rate decay.", changeable=True)
    ] = "linear"
    lr_decay_steps: Annotated[
        int,
        _optimization("Decay the learning rate to 0 over this many last steps; 0 keeps it constant.", low=0, changeable=True),
    ] = 0
    weight_decay: Annotated[float, _optimization("Set AdamW's weight decay.", low=0)] = 0.0
    clip_grad: Annotated[float, _optimization("Clip the gradient norm to this value; 0 disables.", low=0)] = 1.0
    ema_decay: Annotated[
        float,
        _optimization("Set the decay of the weights' moving average, which new weights reach after a warm-up.", low=0, below=1),
    ] = 0.9999
    ema_warmup: Annotated[
        bool | None,
        _optimization("Let the moving average forget the first weights soon. Default: unless they are trained weights (init)."),
    ] = None

    precision: Annotated[Literal["float32", "bf16"], _machine("Run the network in float32, or in bfloat16 by autocast.")] = (
        "float32"
    )
    channels_last: Annotated[bool, _machine("Store images and weights in channels_last memory format.", changeable=True)] = True
    seed: Annotated[int, _machine("Seed everything random.", low=-(1 << 63), high=(1 << 64) - 1)] = 0
    device: Annotated[
        str | None, _machine("Train on cpu, cuda, cuda:1, ... Default: a GPU if there is one.", changeable=True, local=True)
    ] = None
    threads: Annotated[
        int | None,
        _machine(
            "Use this many CPU threads. Default: PyTorch's choice.",
            low=1,
            changeable=True,
            local=True,
        ),
    ] = None

    log_every: Annotated[
        int, _records("Write a row of log.csv after the first step, and then every this many steps.", low=1, high=100_000)
    ] = 50
    sample_every: Annotated[
        int, _records("Draw a grid of samples every this many steps, and at the end; 0 disables.", low=0)
    ] = 1000
    sample_steps: Annotated[
        int | None,
        _records(
            "Draw the grids in this many steps of dpm++2m-sde. Default: 20.",
            low=1,
        ),
    ] = None
    checkpoint_every: Annotated[int, _records("Save a checkpoint every this many steps; 0 disables.", low=0)] = 0
    checkpoint_minutes: Annotated[float, _records("Save a checkpoint every this many minutes; 0 disables.", low=0)] = 5.0
    keep: Annotated[int, _records("Keep this many checkpoints.", low=1)] = 2
    tensorboard: Annotated[bool, _records("Write TensorBoard's event files if TensorBoard is installed.")] = True

    resume: Annotated[bool, _call("Continue the run from its newest checkpoint.")] = False
    auto_resume: Annotated[bool, _call("Continue the run if there is one, or else begin it.")] = False
    max_minutes: Annotated[float | None, _call("Stop with a checkpoint after this many minutes. Default: no limit.", low=0)] = (
        None
    )
    data_check: Annotated[
        Literal["sample", "exact", "off"],
        _call("Compare the images of a resumed run with the earlier ones: a sample, exactly, or not (to change them)."),
    ] = "sample"
    progress: Annotated[bool, _call("Show a progress bar.")] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps * self.batch_size >= 1 << 63:
            got = f"{self.steps} steps of {self.batch_size} images"
            raise InvalidValue("TrainOptions", "steps", "times batch_size to be below 2^63", got)


STRUCTS: Final = (DataOptions, ModelOptions, TrainOptions)
CHANGEABLE: Final = frozenset(each.name for struct in STRUCTS for each in options_of(struct) if each.option.changeable)
LOCAL: Final = frozenset(each.name for struct in STRUCTS for each in options_of(struct) if each.option.local)


def _checked(caller: str, declared: Declared, value: Any) -> Any:
    """Return an option in its plain form: a path as text, numbers as a tuple. Raise unless it is as declared."""
    from ..checks import (
        check_choice,
        check_int,
        check_ints,
        check_number,
        check_path,
        check_type,
        checked_bytes,
        checked_ranges,
    )

    name, kind, _, option = declared
    kinds, choices = declared.kinds, declared.choices
    optional = type(None) in kinds
    if value is None and optional:
        return None
    if choices:
        check_choice(caller, name, value, [None, *choices] if optional else choices)
    elif bool in kinds:
        check_type(caller, name, value, bool, optional=optional)
    elif get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)) or value:
            check_ints(caller, name, value, 1, "a list of integers")
        return tuple(value)
    elif Ranges in kinds:
        return checked_ranges(caller, name, value)
    elif declared.is_size and isinstance(value, (list, tuple)):
        expect(len(value) == 2, caller, name, "to be a pair of numbers", repr(value))
        for each in value:
            check_int(caller, name, each, option.low, option.high)  # type: ignore[arg-type]
        return tuple(value)
    elif {int, str} <= {*kinds}:
        checked_bytes(caller, name, value)
    elif int in kinds:
        check_int(caller, name, value, option.low, option.high, optional=optional)  # type: ignore[arg-type]
    elif float in kinds:
        bounds = {"low": option.low, "high": option.high, "above": option.above, "below": option.below}
        check_number(caller, name, value, **bounds, finite=True, optional=optional)
    elif os.PathLike[str] in kinds:
        check_path(caller, name, value)
        return os.fsdecode(value)
    else:
        check_type(caller, name, value, str, optional=optional)
    return value
