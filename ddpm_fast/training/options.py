"""The public function `train` and its options. PyTorch is imported when a run begins, so help texts come at once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

from ..errors import InvalidType, expect

if TYPE_CHECKING:
    from .loop import TrainResult

# Arguments that concern one call and are not part of the run's configuration.
THIS_CALL: Final = frozenset({"run_dir", "max_minutes", "resume", "auto_resume", "progress", "lock", "data_check"})


def train(
    run_dir: str | os.PathLike[str],
    *,
    # data
    data: str | os.PathLike[str] = "digits",
    data_dir: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    data_memory: int | str = "2GiB",
    skip_broken: bool = False,
    flip: bool = False,
    # network
    channels: Sequence[int] = (64, 128, 128),
    layers: int = 2,
    attention: Sequence[int] = (16,),
    head_dim: int | None = None,
    scale_shift: bool = False,
    dropout: float = 0.0,
    conditional: bool = True,
    label_dropout: float = 0.1,
    init: str | os.PathLike[str] | None = None,
    # diffusion
    num_timesteps: int = 1000,
    schedule: Literal["linear", "scaled_linear", "cosine", "sigmoid"] = "linear",
    prediction: Literal["epsilon", "sample", "v_prediction"] = "epsilon",
    loss_weight: Literal["min_snr"] | None = None,
    # optimisation
    steps: int = 20_000,
    batch_size: int = 64,
    micro_batch_size: int | None = None,
    lr: float = 2e-4,
    warmup_steps: int = 500,
    lr_decay: Literal["linear", "cosine"] = "linear",
    lr_decay_steps: int = 0,
    weight_decay: float = 0.0,
    clip_grad: float = 1.0,
    ema_decay: float = 0.9999,
    precision: Literal["float32", "bf16"] = "float32",
    channels_last: bool = True,
    seed: int = 0,
    # machine
    device: str | None = None,
    threads: int | None = None,
    # records
    log_every: int = 50,
    sample_every: int = 1000,
    sample_steps: int | None = None,
    checkpoint_every: int = 0,
    checkpoint_minutes: float = 5.0,
    keep: int = 2,
    tensorboard: bool = True,
    # this call
    max_minutes: float | None = None,
    resume: bool = False,
    auto_resume: bool = False,
    data_check: Literal["sample", "exact", "off"] = "sample",
    lock: bool = True,
    progress: bool = True,
) -> TrainResult:
    """Train a network on images (Algorithm 1 of Ho et al. 2020).

    The run's folder receives the configuration, the log, grids of samples and checkpoints. Its layout is in
    `ddpm_fast.training.run_folder`. Ctrl-C, SIGTERM and SIGHUP end the run after the current step and save a
    checkpoint. A process that is killed loses only the steps since the last checkpoint. On a CPU the run keeps freed
    memory for its next step (`kept_memory`).

    Under torchrun, `accelerate launch` or Slurm, all processes make this call and share each batch. They end with the same
    weights. These are bit-identical for any number of processes that is a power of two, with the same `micro_batch_size` and
    `threads`. Rank 0 alone writes to the run's folder, which all processes see.

    Args:
        run_dir: Write to this folder. It must be new or empty unless `resume` is true.
        data: Train on digits, fashion-mnist, cifar10, a folder of images whose sub-folders are classes, or a zip file.
        data_dir: Read the data set from this folder, or download it there. Default: a folder in the user's cache.
        image_size: Crop images to squares and resize them to this many pixels. Required unless all are squares of one size.
        data_memory: Decode images batch by batch if all take more than this many bytes, such as 200MiB or 2GiB.
        skip_broken: Leave out images of a folder that cannot be read, and say how many and which.
        flip: Mirror half of the images left to right.
        channels: Give each level this many channels. Each level halves the resolution.
        layers: Use this many residual blocks per level, and one more on the way up.
        attention: Use self-attention at these resolutions, in pixels, and in the middle block.
        head_dim: Give each attention head this many channels. Default: a single head.
        scale_shift: Use the time embedding to scale and shift the second norm instead of adding to its input.
        dropout: Drop activations in residual blocks with this probability.
        conditional: Condition on the class if the data set has more than one.
        label_dropout: Drop the class with this probability, to allow guidance.
        init: Start from the weights of a model folder, a run or a checkpoint. Default: random weights.
        num_timesteps: Set T, the number of steps of the forward process.
        schedule: Choose the noise schedule.
        prediction: Choose what the network predicts.
        loss_weight: Weight the loss per timestep. min-SNR bounds it where there is little noise. Default: 1 for all (eq. 12).
        steps: Stop after this many optimizer steps, counted from the run's beginning.
        batch_size: Use this many images per step, all processes together.
        micro_batch_size: Compute the gradients of this many images at a time, to save memory. Default: batch / processes.
        lr: Set the learning rate after warm-up.
        warmup_steps: Raise the learning rate from 0 over this many steps.
        lr_decay: Choose the shape of the final learning rate decay.
        lr_decay_steps: Decay the learning rate to 0 over this many last steps; 0 keeps it constant.
        weight_decay: Set AdamW's weight decay.
        clip_grad: Clip the gradient norm to this value; 0 disables.
        ema_decay: Set the decay of the weights' moving average, which new weights reach after a warm-up.
        precision: Run the network in float32, or in bfloat16 by autocast.
        channels_last: Store images and weights in channels_last memory format.
        seed: Seed everything random.
        device: Train on cpu, cuda, cuda:1, ... Default: a GPU if there is one.
        threads: Use this many CPU threads. Default: PyTorch's choice.
        log_every: Write a row of log.csv every this many steps.
        sample_every: Draw a grid of samples every this many steps; 0 disables.
        sample_steps: Draw the grids in this many steps. Default: 8 with the linear schedule of 1000 timesteps, else up to 50 of
            DDIM.
        checkpoint_every: Save a checkpoint every this many steps; 0 disables.
        checkpoint_minutes: Save a checkpoint every this many minutes; 0 disables.
        keep: Keep this many checkpoints.
        tensorboard: Write TensorBoard's event files if TensorBoard is installed.
        max_minutes: Stop with a checkpoint after this many minutes. Default: no limit.
        resume: Continue the run from its newest checkpoint.
        auto_resume: Continue the run if there is one, or else begin it.
        data_check: Compare the images of a resumed run with the earlier ones: a sample, exactly, or not (to change them).
        lock: Lock the folder, so that no other process trains in it.
        progress: Show a progress bar.

    Returns:
        How the call ended.

    Raises:
        TypeError: An option has another type than its default.
        ValueError: An option is out of range, or differs from the one that the resumed run was started with. Or memory
            is too small for what the options ask for.
        OSError: A file cannot be written, or there is too little space for checkpoints. The message names the last good
            checkpoint.
        FileExistsError: `run_dir` is not empty and `resume` is false.
        UnusablePath: `run_dir` cannot be written to, or `init` holds no model. It is an OSError.
        FileNotFoundError: There is no run to resume.
        FloatingPointError: The loss or the weights are no longer finite.
        BlockingIOError: Another process trains in `run_dir`.
        ProcessLost: Another of the processes has failed or ended. It is a RuntimeError.
    """
    options = {name: value for name, value in locals().items() if name not in THIS_CALL}
    options |= {name: _path(name, options[name]) for name in ("data", "data_dir", "init")}
    options = plain_options("train", options)
    check_options("train", options, num_timesteps=num_timesteps)
    from .from_options import run_training

    _path("run_dir", run_dir)
    check_call("train", resume, auto_resume, max_minutes, progress, data_check, lock)
    return run_training(
        *(run_dir, options),
        resume=resume,
        auto_resume=auto_resume,
        max_minutes=max_minutes,
        progress=progress,
        data_check=data_check,
        lock=lock,
    )


def _path(name: str, value: Any) -> str | None:
    """Return a path as text. Raise a TypeError unless it is one, or None if the default is."""
    from ..checks import check_path

    if value is None and name in ("data_dir", "init"):
        return None
    check_path("train", name, value)
    return os.fsdecode(value)


def plain_options(caller: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as config.json gives them back: tuples as lists."""
    result: dict[str, Any] = {}
    for name, value in options.items():
        try:
            result[name] = json.loads(json.dumps(value))
        except TypeError:
            raise InvalidType(caller, name, "to be of a plain type", type(value).__name__) from None
    return result


def check_call(caller: str, resume: Any, auto_resume: Any, max_minutes: Any, progress: Any, data_check: Any, lock: Any) -> None:
    """Raise unless the arguments that concern one call have their types and ranges."""
    from ..checks import check_choice, check_number, check_type

    for name, value in (("resume", resume), ("auto_resume", auto_resume), ("progress", progress), ("lock", lock)):
        check_type(caller, name, value, bool)
    check_choice(caller, "data_check", data_check, ("sample", "exact", "off"))
    check_number(caller, "max_minutes", max_minutes, 0, optional=True)


def check_options(caller: str, options: Mapping[str, Any], num_timesteps: int) -> None:
    """Raise unless the options have their types and ranges.

    Args:
        caller: Name of the calling function for error messages.
        options: The options of `train`, or those that a `Trainer` takes.
        num_timesteps: T of the schedule.
    """
    from ..checks import MAX_TIMESTEPS, check_choice, check_int, check_number, check_type, checked_bytes
    from ..nn.config import MAX_LAYERS

    def each(check: Callable[..., object], names: str, *bounds: Any, **more: Any) -> None:
        for name in names.split():
            if name in options:
                check(caller, name, options[name], *bounds, **more)

    each(check_choice, "schedule", ("linear", "scaled_linear", "cosine", "sigmoid"))
    each(check_choice, "prediction", ("epsilon", "sample", "v_prediction"))
    each(check_choice, "precision", ("float32", "bf16"))
    each(check_choice, "lr_decay", ("linear", "cosine"))
    each(check_choice, "loss_weight", (None, "min_snr"))
    each(check_type, "skip_broken flip scale_shift conditional channels_last tensorboard ema_warmup", bool)
    each(check_type, "channels attention", list)
    each(check_int, "num_timesteps", 1, MAX_TIMESTEPS)
    each(check_int, "steps batch_size keep", 1)
    each(check_int, "sample_steps", 1, optional=True)
    each(check_int, "log_every", 1, 100_000)  # the losses since the last row stand in state.json
    each(check_int, "layers", 1, MAX_LAYERS)
    each(check_int, "warmup_steps lr_decay_steps sample_every checkpoint_every", 0)
    each(check_int, "image_size head_dim", 1, 1 << 16, optional=True)
    each(check_int, "micro_batch_size", 1, options["batch_size"], optional=True)
    each(check_int, "threads", 1, max(1024, os.cpu_count() or 1), optional=True)  # far more cannot be started
    each(check_int, "seed")
    each(check_number, "weight_decay clip_grad checkpoint_minutes", 0, finite=True)
    each(check_number, "lr", above=0, finite=True)
    each(check_number, "dropout ema_decay", 0, below=1)
    each(check_number, "label_dropout", 0, 1)
    each(check_type, "device", str, optional=True)
    each(checked_bytes, "data_memory")
    if options["sample_every"]:
        each(check_int, "sample_steps", 1, num_timesteps, optional=True)
    for name in ("channels", "attention"):
        for value in options.get(name, ()):
            check_int(caller, name, value, 1)
    expect(options.get("channels", True), caller, "channels", "to be at least one number", "none")
