"""The training loop: Algorithm 1 of Ho et al. (2020) on `q_sample` and `denoising_loss`.

Both ops draw a step's noise from the seeds of its samples, so the noise is never stored. Every draw is a function of
(seed, step), so a checkpoint holds no generator state. A run that was stopped and resumed ends with the same weights, bit
for bit, as one that was not. That holds on one machine with one number of threads.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Final

import torch
from torch import Tensor

from .atomic import replacing
from .data import RESIZED, ImageDataset, load_dataset, to_unit_range
from .draws import TrainingDraws
from .images import save_grid
from .memory import kept_memory
from .nn import UNet, UNetConfig
from .nn.unet import name_classes
from .ops import denoising_loss, q_sample
from .plan import ddim_plan
from .run_folder import LOG_COLUMNS, RunFolder, write_json
from .sampling import sample
from .schedule import NoiseSchedule
from .version import __version__

# Options that a resumed run may change: they decide how long, where and with what records, not what is trained.
# `steps` and the learning rate's decay are among them so that a run can be prolonged, or brought to its end. The data set's
# `preparation` is not compared, as older runs did not record it. Its shape is.
CHANGEABLE: Final = frozenset(
    {
        *("data_dir", "steps", "lr_decay", "lr_decay_steps", "channels_last", "device", "threads", "log_every"),
        *("sample_every", "sample_steps", "checkpoint_every", "checkpoint_minutes", "keep", "tensorboard", "preparation"),
    }
)

# Keys of a network's configuration that its weights do not depend on.
_NOT_IN_WEIGHTS: Final = frozenset({"sample_size", "dropout", "num_train_timesteps", "class_names"})

_log = logging.getLogger("ddpm_fast")


@dataclass(frozen=True)
class TrainResult:
    """How a call of `train` ended.

    Attributes:
        step: Steps since the run began.
        loss: Mean loss since the last row of the log; NaN if no step followed that row.
        seconds: Time spent in steps since the run began, in seconds.
        stopped_by: "SIGINT", "SIGTERM", "max_minutes", or None if all steps are done.
    """

    step: int
    loss: float
    seconds: float
    stopped_by: str | None


def run_training(
    run_dir: str | os.PathLike[str],
    options: Mapping[str, Any],
    *,
    resume: bool,
    max_minutes: float | None,
    progress: bool,
) -> TrainResult:
    """Run `train` with options that are checked and complete."""
    if options["threads"] is not None:
        torch.set_num_threads(options["threads"])
    try:
        dataset = load_dataset(options["data"], options["data_dir"], image_size=options["image_size"])
    except ValueError:
        if not resume or options["image_size"] is not None:
            raise
        # Earlier versions resized a folder's images of several sizes without being asked. Such a run goes on.
        stored = RunFolder(run_dir).read_config()["dataset"]
        if stored.get("preparation", RESIZED) != RESIZED:
            raise
        dataset = load_dataset(options["data"], options["data_dir"], image_size=stored["shape"][-1])
    schedule: NoiseSchedule = getattr(NoiseSchedule, options["schedule"])(options["num_timesteps"])
    weight, device = options["loss_weight"], _device(options["device"])
    task = _Task(
        options=options,
        dataset=dataset,
        labelled=options["conditional"] and len(dataset.classes) > 1,
        schedule=schedule,
        loss_weight=None if weight is None else schedule.loss_weight(weight, options["prediction"]).to(device, torch.float32),
        draws=TrainingDraws(options["seed"], options["batch_size"]),
        device=device,
    )
    with kept_memory() if task.device.type == "cpu" else nullcontext():
        return _run(run_dir, task, resume=resume, max_minutes=max_minutes, progress=progress)


def export_checkpoint(
    run_dir: str | os.PathLike[str], out_dir: str | os.PathLike[str], dtype: torch.dtype = torch.float16
) -> Path:
    """Write the averaged network of a run's newest checkpoint for sampling, with the record of its training.

    Args:
        run_dir: Folder of a run.
        out_dir: Folder to write. It receives unet/ and scheduler/ in diffusers' layout, training.json (the run's
            configuration and its step) and training_log.csv. The names of the classes are in unet/config.json.
        dtype: Dtype of the weights in the file.

    Returns:
        `out_dir`.

    Raises:
        FileNotFoundError: There is no run, or it has no checkpoint.
        ValueError: `out_dir` is the run's folder.
    """
    run, out = RunFolder(run_dir), Path(out_dir)
    if out.resolve() == run.path.resolve():
        raise ValueError(f"export_checkpoint: expected out_dir to be another folder than run_dir, got {out} for both")
    config = run.read_config()
    checkpoint = run.latest_checkpoint()
    if checkpoint is None:
        raise FileNotFoundError(f"export_checkpoint: expected a checkpoint in {run.checkpoints}, got none")
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    model = UNet.from_pretrained(checkpoint / "unet_ema").to(dtype)
    name_classes(model, config["dataset"]["classes"])  # older checkpoints lack them
    model.save_pretrained(out / "unet")
    prediction = config["options"]["prediction"]
    _write_scheduler(out / "scheduler", NoiseSchedule.from_config(config["schedule"]), prediction)
    options = dict(config["options"], data_dir=None)  # a model that is shared names folders, but not where they were
    options |= {name: Path(options[name]).name for name in ("data", "init") if options.get(name) is not None}
    write_json(out / "training.json", {**config, "options": options, "step": state["step"], "seconds": state["seconds"]})
    (out / "training_log.csv").write_text(run.log_until(state["step"]), encoding="utf-8")
    return out


# -------------------------------------------------------------------------------------------------------------------- run


def _run(
    run_dir: str | os.PathLike[str], task: _Task, *, resume: bool, max_minutes: float | None, progress: bool
) -> TrainResult:
    """Run the task's steps from the beginning or from the newest checkpoint."""
    options = task.options
    steps, batch_size = options["steps"], options["batch_size"]
    checkpoint_every, checkpoint_minutes = options["checkpoint_every"], options["checkpoint_minutes"]
    state = _State.initial(task)  # first, as it refuses options that make no network: a folder would be in the next try's way
    run = RunFolder(run_dir)
    checkpoint = run.latest_checkpoint() if resume else None
    if options["init"] is not None and checkpoint is None:
        state.load_weights(options["init"])
    config = task.config()
    if resume:
        _check_same(run, config)
        run.write_config(config)  # with the options that were changed
    else:
        run.create(config)
    if checkpoint is not None:
        state.load(checkpoint)
    run.remove_leftovers()
    run.cut_log(state.step)
    _log.info("%s", _summary(run, task, state))

    writer = _tensorboard(run, state.step) if options["tensorboard"] else None
    from tqdm import tqdm

    bar = tqdm(
        total=steps,
        initial=state.step,
        unit="step",
        disable=not progress,
        mininterval=0.5 if sys.stderr.isatty() else 30,  # a log file needs fewer lines than a terminal
    )
    generators = torch.random.fork_rng([task.device] if task.device.type == "cuda" else [])  # the caller's stay as they are
    stopped_by: str | None = None
    began = last_checkpoint = time.monotonic()
    forecast = _Forecast(steps, task.device)
    logged_step, logged_seconds = state.step, state.seconds
    mark = time.perf_counter()  # end of the last stretch that is counted in state.seconds
    with _StopSignals() as signals, generators, bar:
        while state.step < steps and stopped_by is None:
            grad_norm, rate = _step(task, state)
            bar.update()
            forecast.after_step(state.step)

            if state.step % options["log_every"] == 0 or state.step == steps:
                loss = _finite_loss(state, grad_norm)
                state.losses.clear()
                mark = state.count_time(mark)
                speed = (state.step - logged_step) * batch_size / (state.seconds - logged_seconds)
                logged_step, logged_seconds = state.step, state.seconds
                row = (state.step, state.step * batch_size, loss, float(grad_norm), rate, speed, state.seconds)
                run.append_log(row)
                bar.set_postfix_str(f"loss {loss:.4f}, {speed:.1f} images/s", refresh=False)
                if writer:
                    for name, value in zip(LOG_COLUMNS[2:6], row[2:6], strict=True):
                        writer.add_scalar(f"train/{name}", value, state.step)
            if options["sample_every"] and state.step % options["sample_every"] == 0:
                mark = state.count_time(mark)
                _draw_samples(run, task, state, writer)
                mark = time.perf_counter()

            if signals.received is not None:
                stopped_by = signals.received
            elif max_minutes is not None and time.monotonic() - began > 60 * max_minutes:
                stopped_by = "max_minutes"
            due = bool(checkpoint_every) and state.step % checkpoint_every == 0
            due |= bool(checkpoint_minutes) and time.monotonic() - last_checkpoint > 60 * checkpoint_minutes
            if due or stopped_by is not None or state.step == steps:
                _finite_loss(state, grad_norm)  # a spoilt state must not replace a good one
                mark = state.count_time(mark)
                _save_checkpoint(run, task, state)
                last_checkpoint = time.monotonic()
                mark = time.perf_counter()
    if writer:
        writer.close()
    if stopped_by:
        _log.info("stopped by %s at step %d of %d; checkpoint saved", stopped_by, state.step, steps)
    return TrainResult(state.step, state.mean_loss(), state.seconds, stopped_by)


# ------------------------------------------------------------------------------------------------------------------ state


@dataclass(frozen=True)
class _Task:
    """The parts of a run that do not change from step to step."""

    options: Mapping[str, Any]  # the arguments of `train` without those of `THIS_CALL`
    dataset: ImageDataset
    labelled: bool  # the network is given the class
    schedule: NoiseSchedule
    loss_weight: Tensor | None  # float32 [T], on the device
    draws: TrainingDraws
    device: torch.device

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.options["channels_last"] else torch.contiguous_format

    def config(self) -> dict[str, Any]:
        """Return the content of config.json."""
        dataset = self.dataset
        return {
            "options": self.options,
            "unet": _unet_config(self.options, dataset, self.labelled),
            "schedule": self.schedule.to_config(),
            "dataset": {
                "images": len(dataset),
                "shape": list(dataset.shape),
                "preparation": dataset.preparation,
                "classes": list(dataset.classes),
            },
            "versions": {"ddpm_fast": __version__, "torch": torch.__version__},
        }


@dataclass
class _State:
    """The parts of a run that change from step to step: the content of a checkpoint."""

    model: UNet
    ema: UNet  # moving average of the weights
    optimizer: torch.optim.Optimizer
    step: int = 0  # steps done
    seconds: float = 0.0  # spent in steps
    losses: list[Tensor] = field(default_factory=list)  # since the last row of the log; 0-d, on the device

    @classmethod
    def initial(cls, task: _Task) -> _State:
        """Return the state before the first step, with weights drawn from the seed."""
        with torch.random.fork_rng([]):
            torch.manual_seed(task.draws.weights_seed)
            model = UNet(**_unet_config(task.options, task.dataset, task.labelled))
        model = model.to(device=task.device, memory_format=task.memory_format)  # type: ignore[call-overload]
        lr, weight_decay = task.options["lr"], task.options["weight_decay"]
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
        return cls(model, copy.deepcopy(model).requires_grad_(False).eval(), optimizer)

    def mean_loss(self) -> float:
        return float(torch.stack(self.losses).mean()) if self.losses else math.nan

    def count_time(self, since: float) -> float:
        """Add the time since `since` to `seconds`, and return the present time."""
        now = time.perf_counter()
        self.seconds += now - since
        return now

    def write(self, folder: Path) -> None:
        self.model.save_pretrained(folder / "unet")
        self.ema.save_pretrained(folder / "unet_ema")
        tensors = {
            f"{key}.{name}": value.detach().cpu().contiguous()
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }
        import safetensors.torch

        with replacing(folder / "optimizer.safetensors") as temporary:
            safetensors.torch.save_file(tensors, temporary)

    def load_weights(self, init: str) -> None:
        """Load the weights and their moving average from a folder that another training wrote."""
        network, average = _weight_folders(Path(init))
        wanted = UNetConfig.from_dict(self.model.config).to_dict()
        for model, folder in ((self.model, network), (self.ema, average)):
            source = UNet.from_pretrained(folder)
            found = UNetConfig.from_dict(source.config).to_dict()
            keys = [key for key in {**wanted, **found} if key not in _NOT_IN_WEIGHTS]
            differing = [key for key in keys if wanted.get(key) != found.get(key)]
            if differing:
                raise ValueError(
                    f"train: expected init to hold a network as the options describe it, got {init!r}, in which "
                    + ", ".join(f"{key} is {found.get(key)!r} instead of {wanted.get(key)!r}" for key in differing)
                )
            model.load_state_dict(source.state_dict())

    def load(self, folder: Path) -> None:
        self.model.load_state_dict(UNet.from_pretrained(folder / "unet").state_dict())
        self.ema.load_state_dict(UNet.from_pretrained(folder / "unet_ema").state_dict())
        import safetensors.torch

        tensors = safetensors.torch.load_file(folder / "optimizer.safetensors")
        for name, parameter in self.model.named_parameters():
            moments = {
                # The parameter's memory format: fused optimizers walk through the storage.
                key: torch.empty_like(parameter).copy_(tensors[f"{key}.{name}"])
                for key in ("exp_avg", "exp_avg_sq")
            }
            self.optimizer.state[parameter] = {"step": tensors[f"step.{name}"].to(parameter.device), **moments}
        entries = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        self.step, self.seconds = entries["step"], entries["seconds"]
        device = next(self.model.parameters()).device
        self.losses = [torch.tensor(loss, dtype=torch.float32, device=device) for loss in entries["losses"]]


def _step(task: _Task, state: _State) -> tuple[Tensor, float]:
    """Take one step of Algorithm 1. Return the gradient's norm before clipping, 0-d, and the learning rate."""
    options, draws, step = task.options, task.draws, state.step
    # The batch.
    images, labels = task.dataset[draws.indices(step, len(task.dataset))]
    x_0 = to_unit_range(images.to(task.device))  # [B, C, H, W]
    if options["flip"]:
        x_0 = torch.where(draws.is_flipped(step).to(task.device)[:, None, None, None], x_0.flip(-1), x_0)
    x_0 = x_0.contiguous(memory_format=task.memory_format)
    t = draws.timesteps(step, task.schedule.num_timesteps).to(task.device)
    seeds = draws.noise_seeds(step).to(task.device)
    no_label = len(task.dataset.classes)  # the last embedding
    labels = labels.masked_fill(draws.label_is_dropped(step, options["label_dropout"]), no_label).to(task.device)
    # Its gradient.
    torch.manual_seed(draws.dropout_seed(step))
    x_t = q_sample(x_0, t, task.schedule, seeds=seeds)
    with torch.autocast(task.device.type, torch.bfloat16, enabled=options["precision"] == "bf16"):
        output = state.model(x_t, t, labels if task.labelled else None)
    weight = None if task.loss_weight is None else task.loss_weight[t]
    loss = denoising_loss(output.float(), x_0, t, task.schedule, prediction=options["prediction"], seeds=seeds, weight=weight)
    loss.backward()
    parameters: list[Tensor] = list(state.model.parameters())
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, options["clip_grad"] or math.inf, foreach=True)
    # The update.
    rate = options["lr"] * _lr_factor(
        step, options["steps"], options["warmup_steps"], options["lr_decay"], options["lr_decay_steps"]
    )
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.step()
    state.optimizer.zero_grad()
    decay = options["ema_decay"]
    if options["init"] is None:  # the first weights are random: forget them soon
        decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(state.ema.parameters()), parameters, 1 - decay)
    state.losses.append(loss.detach())
    state.step += 1
    return grad_norm, rate


def _finite_loss(state: _State, grad_norm: Tensor) -> float:
    """Return the mean loss since the last row of the log. Raise FloatingPointError if it or the gradient is not finite."""
    loss = state.mean_loss()
    if math.isinf(loss) or (math.isnan(loss) and state.losses) or not math.isfinite(grad_norm):
        raise FloatingPointError(
            f"train: the loss became {loss} and its gradient's norm {float(grad_norm)} by step {state.step}; "
            "resume with what was saved, or start again with a smaller lr or precision float32"
        )
    return loss


def _save_checkpoint(run: RunFolder, task: _Task, state: _State) -> None:
    def write(folder: Path) -> None:
        state.write(folder)
        _write_scheduler(folder / "scheduler", task.schedule, task.options["prediction"])

    entries = {"seconds": state.seconds, "losses": [float(loss) for loss in state.losses]}
    run.save_checkpoint(state.step, entries, write, task.options["keep"])


class _StopSignals:
    """A context that records the first SIGINT or SIGTERM. The second one acts as usual.

    Only the main thread receives signals.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._restore()


# ---------------------------------------------------------------------------------------------------------------- options


def _weight_folders(init: Path) -> tuple[Path, Path]:
    """Return the folders of the weights and of their moving average; one folder serves as both if it has no average."""
    run = RunFolder(init)
    folder: Path | None = init
    if run.checkpoints.is_dir():
        folder = run.latest_checkpoint()
    if folder is None or not folder.is_dir():
        raise FileNotFoundError(
            "train: expected init to be the folder of a model, of a run with a checkpoint, or of a checkpoint, "
            f"got {str(init)!r}"
        )
    return (folder / "unet", folder / "unet_ema") if (folder / "unet_ema").is_dir() else (folder, folder)


def _device(name: str | None) -> torch.device:
    """Return the device of that name, by default a GPU if there is one. Raise ValueError if nothing runs on it."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"train: expected device to be one of this machine, got {name!r}: {reason}") from error
    return device


def _check_same(run: RunFolder, config: Mapping[str, Any]) -> None:
    """Refuse to resume a run as something else than it was started as."""
    stored = run.read_config()
    for section in ("options", "dataset"):
        for name, value in config[section].items():
            if name not in CHANGEABLE and stored[section].get(name) != value:
                raise ValueError(
                    f"train: expected {name} to be {stored[section].get(name)!r}, as the run in {run.path} was started, "
                    f"got {value!r}"
                )


def _unet_config(options: Mapping[str, Any], dataset: ImageDataset, labelled: bool) -> dict[str, Any]:
    channels, height, width = dataset.shape
    widths = options["channels"]
    factor = 2 ** (len(widths) - 1)
    if height % factor or width % factor:
        raise ValueError(
            f"train: expected images whose sides are multiples of {factor} for {len(widths)} levels of channels, "
            f"got {height}x{width}; choose image_size or fewer channels"
        )
    attended = [height >> level in options["attention"] for level in range(len(widths))]
    return {
        "sample_size": height,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": widths,
        "layers_per_block": options["layers"],
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attended],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attended)],
        "attention_head_dim": options["head_dim"],
        "norm_num_groups": math.gcd(32, *widths),
        "dropout": options["dropout"],
        "resnet_time_scale_shift": "scale_shift" if options["scale_shift"] else "default",
        "num_class_embeds": len(dataset.classes) + 1 if labelled else None,
        # Images beside sub-folders make a class without a name.
        **({"class_names": list(dataset.classes)} if labelled and all(dataset.classes) else {}),
        # As in Ho et al.
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
    }


def _lr_factor(step: int, steps: int, warmup_steps: int, decay: str, decay_steps: int) -> float:
    """Return the learning rate of a step as a share of `lr`. It rises linearly, stays, and falls over the last steps."""
    rise = min(1.0, (step + 1) / (warmup_steps + 1))
    left = min(1.0, (steps - step) / (decay_steps + 1))  # 1 until the fall begins
    return rise * (left if decay == "linear" else 0.5 - 0.5 * math.cos(math.pi * left))


# ---------------------------------------------------------------------------------------------------------------- records


def _summary(run: RunFolder, task: _Task, state: _State) -> str:
    """Describe what is about to be trained, on what, and where the records go."""
    options, dataset = task.options, task.dataset
    channels, height, width = dataset.shape
    classes = f"{len(dataset.classes)} classes" if len(dataset.classes) > 1 else "no classes"
    parameters = sum(parameter.numel() for parameter in state.model.parameters())
    machine = f"{options['precision']} on {task.device}"
    if task.device.type == "cpu":
        threads = torch.get_num_threads()
        machine += f", {threads} thread" + ("s" if threads > 1 else "")
    epochs = options["steps"] * options["batch_size"] / len(dataset)
    records = [f"log.csv every {options['log_every']} steps"]
    if options["sample_every"]:
        records.append(f"samples/ every {options['sample_every']} steps")
    if options["checkpoint_every"]:
        records.append(f"checkpoints/ every {options['checkpoint_every']} steps")
    if options["checkpoint_minutes"]:
        records.append(f"checkpoints/ every {options['checkpoint_minutes']:g} minutes")
    rows = {
        "data": f"{dataset.name}: {len(dataset)} images, {classes}",
        "images": f"{width}x{height} pixels, {channels} channel{'s' if channels > 1 else ''}, {dataset.preparation}",
        "network": f"{parameters / 1e6:.2f} million parameters, "
        + ("class-conditional" if task.labelled else "unconditional")
        + (f", started from {options['init']}" if options["init"] else ""),
        "machine": machine,
        "steps": f"{options['steps']} of {options['batch_size']} images: {epochs:,.0f} epochs"
        if epochs >= 100
        else f"{options['steps']} of {options['batch_size']} images: {epochs:.2g} epochs",
        "records": f"{run.path}/: {', '.join(records)}",
    }
    title = f"Resuming {run.path} at step {state.step}" if state.step else f"Training {run.path}"
    return "\n".join([title, *(f"  {name:<8} {text}" for name, text in rows.items())])


class _Forecast:
    """A line of the log, soon after the start, that says how long the rest of the steps will take."""

    _FIRST, _LAST = 3, 13  # the first steps of a call are slower

    def __init__(self, steps: int, device: torch.device) -> None:
        self._steps, self._device, self._done, self._began = steps, device, 0, 0.0

    def after_step(self, step: int) -> None:
        """Count a step of this call, and write the line once the speed is known."""
        self._done += 1
        if self._done in (self._FIRST, self._LAST) and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if self._done == self._FIRST:
            self._began = time.perf_counter()
        elif self._done == self._LAST:
            seconds = (time.perf_counter() - self._began) / (self._LAST - self._FIRST) * (self._steps - step)
            _log.info("  %-8s about %s", "time", _duration(seconds))


def _duration(seconds: float) -> str:
    """Return a rough duration in the unit that suits it."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def _write_scheduler(folder: Path, schedule: NoiseSchedule, prediction: str) -> None:
    """Write scheduler_config.json as diffusers' DDPMScheduler reads it; the key "ddpm_fast" has our own form."""
    config = schedule.to_config()
    diffusers_names = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
    if schedule.name in diffusers_names:
        betas: dict[str, Any] = {"beta_schedule": diffusers_names[schedule.name]}
        betas |= {key: config[key] for key in ("beta_start", "beta_end") if key in config}
    else:
        betas = {"trained_betas": schedule.betas.tolist()}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "scheduler_config.json",
        {
            "_class_name": "DDPMScheduler",
            "num_train_timesteps": schedule.num_timesteps,
            **betas,
            "prediction_type": prediction,
            "variance_type": "fixed_small",
            "clip_sample": True,
            "clip_sample_range": 1.0,
            "timestep_spacing": "leading",
            "ddpm_fast": config,
        },
    )


def _tensorboard(run: RunFolder, step: int) -> Any:
    """Return a SummaryWriter, or None if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        _log.info("TensorBoard is not installed: no event files (pip install 'ddpm_fast[train]')")
        return None
    return SummaryWriter(run.tensorboard, purge_step=step + 1)


def _draw_samples(run: RunFolder, task: _Task, state: _State, writer: Any) -> None:
    """Draw a grid with the averaged weights, with one column a class or 8 columns."""
    options = task.options
    columns = min(len(task.dataset.classes), 16) if task.labelled else 8
    labels = torch.arange(4 * columns) % columns if task.labelled else None
    plan = ddim_plan(task.schedule, options["sample_steps"], prediction=options["prediction"])
    images = sample(
        *(state.ema, plan, 4 * columns),
        seed=options["seed"],
        class_labels=labels,
        progress=False,
        cuda_graph=False,  # a graph takes memory beside that of the training
    )
    run.samples.mkdir(exist_ok=True)
    save_grid(images, run.samples / f"step-{state.step:08d}.png", columns=columns)
    if writer:
        writer.add_images("samples", images.clamp(-1, 1) / 2 + 0.5, state.step)
