"""The options of a training run. Each is declared once, see `ddpm_fast.options`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Final, Literal

from ..data.options import DataOptions
from ..errors import InvalidValue
from ..forms import Numbers
from ..options import Option, Options, PathLike, documented, options_of
from ..predictions import Prediction, Variance

_model = partial(Option, "Network and noise schedule")
_objective = partial(Option, "Objective")
_optimization = partial(Option, "Optimization")
_machine = partial(Option, "Machine")
_records = partial(Option, "Records and checkpoints", changeable=True)
_call = partial(Option, "This call", changeable=True, recorded=False)


@documented
@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """The network and the noise schedule that `train` makes."""

    channels: Annotated[
        tuple[int, ...], _model("Give each level this many channels. Each level halves the resolution.", low=1, form=Numbers)
    ] = (64, 128, 128)
    layers: Annotated[int, _model("Use this many residual blocks per level, and one more on the way up.", low=1, high=64)] = 2
    attention: Annotated[
        tuple[int, ...],
        _model(
            "Use self-attention at these resolutions, in pixels, or none; it is in the middle block, too.", low=1, form=Numbers
        ),
    ] = (16,)
    head_dim: Annotated[
        int | None, _model("Give each attention head this many channels. Default: a single head.", low=1, high=1 << 16)
    ] = None
    groups: Annotated[
        int | None,
        _model(
            "Use this many groups in the norms. Default: up to 32, each of 4 channels or more; a resumed run keeps its own.",
            low=1,
            high=1 << 16,
            changeable=True,  # the network's configuration is compared, and has them
            recorded=False,
        ),
    ] = None
    scale_shift: Annotated[
        bool, _model("Use the time embedding to scale and shift the second norm instead of adding to its input.")
    ] = False
    dropout: Annotated[float, _model("Drop activations in residual blocks with this probability.", low=0, below=1)] = 0.0
    conditional: Annotated[bool, _model("Condition on the class if the data set has more than one.")] = True
    weak_shortcuts: Annotated[
        bool, _model("Divide the first weights of shortcuts by sqrt(3), to let narrow networks of few groups learn photos.")
    ] = False
    init: Annotated[
        PathLike | None,
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
            raise InvalidValue("channels", "to be at least one number", "none")


@documented
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
        _optimization("Warm up the moving average, so that it forgets the first weights. Default: on, unless --init."),
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

    num_workers: Annotated[
        int | None,
        _machine(
            "Read images in this many processes. Default: up to 8 if images are decoded as they are used, else 0.",
            low=0,
            high=1024,
            changeable=True,
            local=True,
        ),
    ] = None

    log_every: Annotated[
        int, _records("Write a row of log.csv after the first step, and then every this many steps.", low=1, high=100_000)
    ] = 50
    sample_every: Annotated[
        int,
        _records("Draw a grid of samples after 1 % of the steps, every this many steps, and at the end; 0 disables.", low=0),
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
        _call("Check that a resumed run has the same images: a sample of them, all (exact), or none (off)."),
    ] = "sample"
    progress: Annotated[bool, _call("Show a progress bar.")] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps * self.batch_size >= 1 << 63:
            raise InvalidValue("steps", "times batch_size to be below 2^63", f"{self.steps} steps of {self.batch_size} images")


STRUCTS: Final = (DataOptions, ModelOptions, TrainOptions)
CHANGEABLE: Final = frozenset(each.name for struct in STRUCTS for each in options_of(struct) if each.option.changeable)
LOCAL: Final = frozenset(each.name for struct in STRUCTS for each in options_of(struct) if each.option.local)
