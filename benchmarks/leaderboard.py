"""Compare what the same minutes of training buy: networks, objectives and optimization, ours and those of peers.

    make leaderboard ROW=small-fast                                 (trains ten minutes a seed, then judges)
    python benchmarks/leaderboard.py small-fast diffusers --minutes 5 --seeds 1
    python benchmarks/leaderboard.py --table                        (from the results, without training)

A row trains for as many steps as one idle core takes in the minutes. Its images per second are measured once and kept in its
file, so a busy machine changes how long a row takes, but not what it finds. Rows of one network, batch and precision share
them. Machines change their speed within minutes, so each is measured three times, just after small-fast, and their
ratio counts. A busy machine is refused. `--rates` measures those of the rows named that have none, and trains nothing.

Figures, of the averaged weights:

- error: x_0^ of test images against x_0, at eight fixed noise levels from fixed noise. The root mean square at each level, then
  the geometric mean over the levels. Unlike a loss, it compares networks that predict different things.
- For Fashion-MNIST, the Frechet distance and the accuracy by the class judge, and the Frechet distance by the grain judge
  (judges.py). They are of images drawn by the default sampler, `dpm++2m-sde` in 20 steps.

Emoji in colour (examples/emoji.py) have no classes and few test images, so they have the error and a sheet to look at.
A run that is stopped goes on from its checkpoint, a peer's from its beginning. The results are in results/leaderboard, a file
for each row. The runs and the sheets of images are in build/leaderboard.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, NamedTuple

import common
import judges
import torch
from torch import Tensor, nn

from ddpm_fast import NoiseSchedule, Objective, Sampler, Trainer, TrainOptions, UNet, load_folder
from ddpm_fast.data.items import ItemDataset, read_batch, to_unit_range
from ddpm_fast.data.load import load_dataset
from ddpm_fast.data.options import DataOptions
from ddpm_fast.files.images import save_grid, to_uint8
from ddpm_fast.files.writing import write_json
from ddpm_fast.inference.model import predict
from ddpm_fast.plan import named_plan
from ddpm_fast.plan.levels import fractional_timesteps, level_range
from ddpm_fast.samplers import DEFAULT_SAMPLER

BUILD: Final = common.ROOT.parent / "build" / "leaderboard"
RESULTS: Final = common.ROOT / "results" / "leaderboard"
LEVELS: Final = torch.logspace(math.log10(0.05), math.log10(20), 8, dtype=torch.float64)
"""sigma / alpha of x_t = alpha x_0 + sigma epsilon. All schedules have these, except laplace."""
HELD_OUT: Final = 500  # test images of the error
SETS: Final = ("fashion-mnist", "emoji")

# ---------------------------------------------------------------------------------------------------------------- rows

BUILTIN: Final[dict[str, Any]] = {
    "block_out_channels": [32, 64, 128],
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
SMALL: Final = BUILTIN | {"block_out_channels": [16, 32, 64, 128], "layers_per_block": 1, "norm_num_groups": 4}
FAST: Final[dict[str, Any]] = {"batch_size": 16, "lr": 1e-3, "warmup": 0.02, "decay": 0.3, "average": 0.07}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A way to train.

    Attributes:
        about: What it changes.
        network: The configuration of the UNet, without what the images say.
        schedule: A constructor of NoiseSchedule.
        options: Options of `Trainer`. `warmup`, `decay` and `average` are shares of the run: of its first steps and last
            steps, and the mean age of the weights in the average.
        attention: Resolutions with self-attention.
        labelled: Whether the network is given classes, if there are any.
        library: Whose training loop it is.
        weak_shortcuts: Whether our network starts with them, see `UNet.weaken_shortcuts`.
    """

    about: str
    network: Mapping[str, Any]
    schedule: str
    options: Mapping[str, Any]
    attention: Sequence[int] = ()
    labelled: bool = True
    library: str = "ddpm_fast"
    weak_shortcuts: bool = False


_OLD_SMALL: Final[dict[str, Any]] = {"batch_size": 8, "lr": 1e-3, "warmup_steps": 100, "prediction": "v_prediction"}
_SCALE_SHIFT: Final = {"attn_norm_num_groups": 4, "resnet_time_scale_shift": "scale_shift"}
_FAST_SMALL: Final = FAST | {"batch_size": 8, "prediction": "v_prediction"}


def _small(about: str, *, network: Mapping[str, Any] = {}, options: Mapping[str, Any] = {}, **more: Any) -> Row:
    """Return the row `small-fast` with another configuration, other options, or other fields."""
    fields = {"schedule": "cosine"} | more
    return Row(about=about, network=SMALL | network, options=_FAST_SMALL | options, **fields)


ROWS: Final[dict[str, Row]] = {
    # The options of `small` until norms had four channels or more in a group.
    "small-16-groups": Row(
        about="`small` as it was: 16 groups",
        network=SMALL | {"norm_num_groups": 16},
        options=_OLD_SMALL,
        schedule="cosine",
    ),
    # The built-in model's network, trained faster.
    "builtin-v-bf16": Row(
        about="the built-in network, 8 groups, 16 images a step, v prediction, cosine schedule, bfloat16",
        network=BUILTIN,
        options=FAST | {"prediction": "v_prediction", "precision": "bf16"},
        schedule="cosine",
    ),
    "builtin-v-scale-shift-bf16": Row(
        about="the built-in network, 8 groups, 16 images a step, v prediction, cosine schedule, scale and shift, bfloat16",
        network=BUILTIN | {"attn_norm_num_groups": 8, "resnet_time_scale_shift": "scale_shift"},
        options=FAST | {"prediction": "v_prediction", "precision": "bf16"},
        schedule="cosine",
    ),
    # `small`, trained faster.
    "small-fast": _small("small-fast: 4 groups, decay over the last 30 %, average over 7 %"),
    "small-fast-16-groups": _small("small-fast, 16 groups", network={"norm_num_groups": 16}),
    "small-fast-16-groups-scale-shift": _small(
        "small-fast, 16 groups, scale and shift",
        network={"norm_num_groups": 16, "attn_norm_num_groups": 16, "resnet_time_scale_shift": "scale_shift"},
    ),
    "small-fast-batch-16": _small("small-fast, 16 images a step", options={"batch_size": 16}),
    "small-fast-batch-32": _small("small-fast, 32 images a step", options={"batch_size": 32}),
    "small-fast-no-decay": _small("small-fast, without decay", options={"decay": 0.0}),
    "small-fast-decay-60": _small("small-fast, decay over the last 60 %", options={"decay": 0.6}),
    "small-fast-two-layers": _small("small-fast, two layers a level", network={"layers_per_block": 2}),
    "small-fast-attention-8": _small("small-fast, self-attention at 8x8", attention=(8,)),
    "small-fast-wide-time": _small(
        "small-fast, a time embedding of 256 channels instead of 64", network={"time_embedding_dim": 256}
    ),
    "small-fast-scale-shift": _small("small-fast, scale and shift", network=_SCALE_SHIFT),
    "small-fast-scale-shift-weak-shortcuts": _small(
        "small-fast, scale and shift, weak shortcuts", network=_SCALE_SHIFT, weak_shortcuts=True
    ),
    "small-fast-scale-shift-batch-16": _small(
        "small-fast, scale and shift, 16 images a step", network=_SCALE_SHIFT, options={"batch_size": 16}
    ),
    "small-fast-scale-shift-batch-16-bf16": _small(
        "small-fast, scale and shift, 16 images a step, bfloat16",
        network=_SCALE_SHIFT,
        options={"batch_size": 16, "precision": "bf16"},
    ),
    "small-fast-min-snr": _small("small-fast, min-SNR weights", options={"loss_weight": "min_snr"}),
    "small-fast-laplace": _small("small-fast, laplace schedule", schedule="laplace"),
    "small-fast-epsilon": _small(
        "small-fast, epsilon prediction, linear schedule", options={"prediction": "epsilon"}, schedule="linear"
    ),
    "small-fast-all-labels": _small("small-fast, labels are never dropped", options={"label_dropout": 0.0}),
    "small-fast-bf16": _small("small-fast, bfloat16", options={"precision": "bf16"}),
    "small-fast-no-classes": _small("small-fast, without classes", labelled=False),
    # Peers, at the size, batch and rate of small-fast.
    "diffusers": _small(
        "diffusers: its own loop and average, epsilon, linear schedule", library="diffusers", schedule="linear"
    ),
    "diffusers-no-classes": _small("diffusers, without classes", library="diffusers", schedule="linear", labelled=False),
    "denoising-diffusion-pytorch": _small(
        "denoising-diffusion-pytorch: Unet(dim=16, dim_mults=(1, 2, 4, 8)), its own loop, our average, without classes",
        options={"batch_size": 16},  # its Trainer refuses fewer
        library="denoising-diffusion-pytorch",
        labelled=False,
    ),
}
ANCHOR: Final = "small-fast"
"""The row to whose speed those of others are related."""


# -------------------------------------------------------------------------------------------------------------- images


@cache
def images_of(name: str, *, split: str) -> ItemDataset:
    """Return the images of a set. Emoji are rendered once."""
    if name != "emoji":
        return load_dataset(DataOptions(data=name), split=split)
    folder = BUILD / "emoji-pictures"
    if not folder.is_dir():
        BUILD.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=BUILD) as parent:  # it appears whole or not at all
            subprocess.run([sys.executable, common.ROOT.parent / "examples" / "emoji.py", Path(parent) / "new"], check=True)
            (Path(parent) / "new").rename(folder)
    return load_dataset(DataOptions(data=str(folder / split)))


# ------------------------------------------------------------------------------------------------------------ training


class Trained(NamedTuple):
    """A network with averaged weights, and what it predicts."""

    model: nn.Module
    objective: Objective
    labelled: bool


OnStep = Callable[[int, Tensor], object]


def train_row(row: Row, data: str, steps: int, seed: int, folder: Path, on_step: OnStep | None = None) -> Trained:
    """Train a row by its library."""
    dataset = images_of(data, split="train")
    labelled = row.labelled and len(dataset.info.classes) > 1
    torch.manual_seed(seed)
    if row.library == "ddpm_fast":
        return _train_ours(row, dataset, labelled, steps, seed, folder, on_step)
    return PEERS[row.library](row, dataset, labelled, steps, seed, on_step)


def network_of(row: Row, dataset: ItemDataset, num_embeds: int | None) -> dict[str, Any]:
    """Return the configuration of a row's UNet, for ours and for diffusers."""
    channels, height, _ = dataset.info.shape
    levels = len(row.network["block_out_channels"])
    attended = ["Attn" if height >> level in row.attention else "" for level in range(levels)]
    return {
        "sample_size": height,
        "in_channels": channels,
        "out_channels": channels,
        "attention_head_dim": None,
        "down_block_types": [f"{each}DownBlock2D" for each in attended],
        "up_block_types": [f"{each}UpBlock2D" for each in reversed(attended)],
        "num_class_embeds": num_embeds,
        **row.network,
    }


def options_of(row: Row, steps: int) -> dict[str, Any]:
    """Return the options of `TrainOptions`. Shares of the run become steps."""
    options = dict(row.options)
    warmup, decay, average = (options.pop(name, None) for name in ("warmup", "decay", "average"))
    if warmup is not None:
        options["warmup_steps"] = round(warmup * steps)
    if decay is not None:
        options["lr_decay_steps"] = round(decay * steps)
    if average is not None:
        options["ema_decay"] = max(0.0, 1 - 1 / (average * steps))
    return options


def _train_ours(
    row: Row, dataset: ItemDataset, labelled: bool, steps: int, seed: int, folder: Path, on_step: OnStep | None
) -> Trained:
    config = network_of(row, dataset, len(dataset.info.classes) + 1 if labelled else None)
    records = {"sample_every": 0, "tensorboard": False, "keep": 1, "log_every": 100, "checkpoint_minutes": 2.0}
    machine = {"device": "cpu", "threads": torch.get_num_threads()}
    options = TrainOptions(steps=steps, seed=seed, auto_resume=True, **options_of(row, steps), **machine, **records)
    schedule = getattr(NoiseSchedule, row.schedule)()
    network = UNet(**config)
    if row.weak_shortcuts:
        network.weaken_shortcuts()
    stopped_by = Trainer(network, schedule, dataset, options, folder, on_step=on_step).run().stopped_by
    if stopped_by is not None:  # the Trainer keeps a checkpoint when a signal stops it
        raise SystemExit(f"leaderboard: stopped by {stopped_by}; the same command goes on")
    loaded = load_folder(folder)
    return Trained(loaded.model, loaded.objective, labelled)


def _batches(dataset: ItemDataset, row: Row, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of a peer's loop: images [N, C, H, W] in [-1, 1] and labels int64 [N], in a new order each epoch."""
    images, labels, _ = read_batch(dataset, range(len(dataset)))
    size, generator = row.options["batch_size"], torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(len(images), generator=generator)
        now, order = order[:size], order[size:]
        yield to_unit_range(images[now]), labels[now]


def _train_diffusers(row: Row, dataset: ItemDataset, labelled: bool, steps: int, seed: int, on_step: OnStep | None) -> Trained:
    """Train as diffusers' example of unconditional training does, at our rate, and with labels if there are any."""
    import diffusers
    from diffusers.training_utils import EMAModel

    model = diffusers.UNet2DModel(**network_of(row, dataset, len(dataset.info.classes) if labelled else None)).train()
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule=row.schedule)
    optimizer = torch.optim.AdamW(model.parameters(), row.options["lr"], betas=(0.95, 0.999), weight_decay=1e-6)
    warmup = round(row.options["warmup"] * steps)
    decay = diffusers.optimization.get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    average = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    for step, (x_0, labels) in enumerate(_batches(dataset, row, steps, seed), 1):
        epsilon = torch.randn_like(x_0)
        t = torch.randint(0, 1000, (len(x_0),))
        predicted = model(scheduler.add_noise(x_0, epsilon, t), t, labels if labelled else None).sample
        loss = nn.functional.mse_loss(predicted, epsilon)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
        average.step(model.parameters())
        if on_step is not None:
            on_step(step, loss.detach())
    average.copy_to(model.parameters())
    return Trained(model.eval(), Objective(NoiseSchedule.from_diffusers(scheduler.config)), labelled)


def _train_denoising_diffusion_pytorch(
    row: Row, dataset: ItemDataset, labelled: bool, steps: int, seed: int, on_step: OnStep | None
) -> Trained:
    """Train as the Trainer of denoising-diffusion-pytorch does, with at least its smallest batch, at our rate.

    Its own average forgets the first weights after 1000 steps at the earliest, and a short run has fewer. So it has ours.
    """
    from denoising_diffusion_pytorch import GaussianDiffusion
    from denoising_diffusion_pytorch import Unet as PeerUnet
    from ema_pytorch import EMA

    channels, side, _ = dataset.info.shape
    widths = row.network["block_out_channels"]
    network = PeerUnet(dim=widths[0], dim_mults=tuple(width // widths[0] for width in widths), channels=channels)
    process = GaussianDiffusion(network, image_size=side, timesteps=1000, auto_normalize=False)
    optimizer = torch.optim.Adam(process.parameters(), row.options["lr"], betas=(0.9, 0.99))
    average = EMA(process, beta=options_of(row, steps)["ema_decay"], update_every=1)
    for step, (x_0, _) in enumerate(_batches(dataset, row, steps, seed), 1):
        loss = process(x_0)
        loss.backward()
        nn.utils.clip_grad_norm_(process.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update()
        if on_step is not None:
            on_step(step, loss.detach())
    assert process.objective == "pred_v", process.objective
    schedule = NoiseSchedule.from_betas(process.betas.double())
    return Trained(average.ema_model.model.eval(), Objective(schedule, "v_prediction"), labelled)


PEERS: Final = {"diffusers": _train_diffusers, "denoising-diffusion-pytorch": _train_denoising_diffusion_pytorch}


def rate_of(row: Row, data: str, seconds: float = 10) -> float:
    """Return the images a second that an idle core trains, from the lower quartile of the times of four steps."""
    times: list[float] = []

    class Enough(Exception):
        pass

    def watch(step: int, loss: Tensor) -> None:
        times.append(time.perf_counter())
        if len(times) > 24 and times[-1] - times[0] > seconds:
            raise Enough

    with TemporaryDirectory() as folder, suppress(Enough):
        train_row(row, data, 1_000_000, 0, Path(folder) / "run", watch)
    taken = [after - before for before, after in pairwise(times[3::4])]
    return 4 * row.options["batch_size"] / statistics.quantiles(taken, n=4)[0]


def speed_of(row: Row) -> str:
    """Return what decides how many images a second a row trains, as text. Rows that share it are measured once."""
    network = {name: value for name, value in row.network.items() if name != "norm_num_groups"}
    decides = [row.library, network, row.attention, row.options["batch_size"], row.options.get("precision")]
    return json.dumps(decides, sort_keys=True)


def _rate(images_per_second: float, machine: Mapping[str, Any]) -> dict[str, Any]:
    return {"images_per_second": float(f"{images_per_second:.4g}"), "machine": machine}


def write_rates(names: Sequence[str], args: argparse.Namespace, rounds: int = 3) -> None:
    """Write the images a second of rows into their files: those of a row with the same speed, or else new ones.

    A new rate is `ANCHOR`'s times the median of how many times as fast the row was, just after it, in some rounds. The
    anchor's own rate is the fastest of its first rounds.
    """
    speeds = {name: speed_of(row) for name, row in ROWS.items()}
    rates = {name: common.read_results(file_of(name, args)).get("rate") for name in ROWS}
    known = {speeds[name]: rate for name, rate in rates.items() if rate is not None}
    unknown = {speeds[name]: ROWS[name] for name in names if speeds[name] not in known}
    if unknown:
        machine, (load, _, _) = common.machine(), os.getloadavg()
        if load > 1:
            raise SystemExit(f"leaderboard: expected an idle machine, to measure images per second, got a load of {load:.1f}")
        if speeds[ANCHOR] not in known:
            names, unknown = [ANCHOR, *names], {speed: row for speed, row in unknown.items() if speed != speeds[ANCHOR]}
            known[speeds[ANCHOR]] = _rate(max(rate_of(ROWS[ANCHOR], args.data) for _ in range(rounds)), machine)
        anchor = rates[ANCHOR] or known[speeds[ANCHOR]]
        if anchor["machine"]["device"] != machine["device"]:
            raise SystemExit(f"leaderboard: expected {anchor['machine']['device']}, as for {ANCHOR}: pass --results FOLDER")
        ratios: dict[str, list[float]] = {speed: [] for speed in unknown}
        for _, (speed, row) in product(range(rounds), unknown.items()):
            before = rate_of(ROWS[ANCHOR], args.data)
            ratios[speed].append(rate_of(row, args.data) / before)
        for speed, found in ratios.items():
            known[speed] = _rate(anchor["images_per_second"] * statistics.median(found), machine)
    for name in names:
        file = file_of(name, args)
        results = common.read_results(file)
        if "rate" not in results:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, results | {"rate": known[speeds[name]]})


# ------------------------------------------------------------------------------------------------------------- figures


@torch.inference_mode()
def x_0_errors(trained: Trained, images: Tensor, labels: Tensor, batch: int = 50) -> list[float]:
    """Return the root mean square of x_0^ - x_0 at each of `LEVELS`, for images [N, C, H, W] in [-1, 1].

    The list is empty if the schedule does not have all levels. x_0^ is clipped to [-1, 1], as samplers do. The noise of
    image n at level i is the same for every network.
    """
    lowest, highest = level_range(trained.objective.schedule)
    if not lowest < LEVELS[0] < LEVELS[-1] < highest:
        return []
    timesteps = fractional_timesteps(trained.objective.schedule, LEVELS).round().long()
    alpha = 1 / (1 + LEVELS.square()).sqrt()
    sigma = LEVELS * alpha
    p, q = trained.objective.x_0_weights_at(alpha, sigma, timesteps)
    found = []
    for level in range(len(LEVELS)):
        generator = torch.Generator().manual_seed(level)
        total = 0.0
        for x_0, y in zip(images.split(batch), labels.split(batch), strict=True):
            x_t = float(alpha[level]) * x_0 + float(sigma[level]) * torch.randn(x_0.shape, generator=generator)
            t = timesteps[level].expand(len(x_0)).contiguous()
            output = predict(trained.model, x_t, t, y if trained.labelled else None)
            x_0_hat = (float(p[level]) * x_t + float(q[level]) * output).clamp(-1, 1)
            total += float((x_0_hat - x_0).double().square().sum())
        found.append(math.sqrt(total / images.numel()))
    return found


def draw(trained: Trained, num: int, seed: int, shape: Sequence[int]) -> Tensor:
    """Draw images by the default sampler, of all classes in turn."""
    sampler = Sampler(trained.model, named_plan(trained.objective, clip=1.0), shape=shape)
    labels = torch.arange(num) % judges.CLASSES if trained.labelled else None
    return sampler(num, seed=1000 + seed, batch_size=50, class_labels=labels, progress=False)


class Judging:
    """The test images of a set, and its judges if it has some."""

    def __init__(self, data: str) -> None:
        test = images_of(data, split="test")
        images, labels, _ = read_batch(test, range(len(test)))
        self.shape = test.info.shape
        self.jury = judges.Jury(images, labels) if data == "fashion-mnist" else None
        held_out = torch.arange(len(test)) if self.jury is None else judges.split_real(labels)[0]
        self.images, self.labels = to_unit_range(images[held_out[:HELD_OUT]]), labels[held_out[:HELD_OUT]]

    def figures(self, trained: Trained, num: int, seed: int, sheet: Path) -> dict[str, Any]:
        """Return the figures of a network. Write a sheet of 40 of its images."""
        errors = x_0_errors(trained, self.images, self.labels)
        found: dict[str, Any] = {"error": statistics.geometric_mean(errors), "errors": errors} if errors else {}
        drawn = draw(trained, 40 if self.jury is None else num, seed, self.shape)
        save_grid(drawn[:40], sheet, scale=2)
        labels = torch.arange(len(drawn)) % judges.CLASSES if trained.labelled else None
        return found | ({} if self.jury is None else self.jury.figures(to_uint8(drawn), labels))

    def real(self, num: int) -> dict[str, float]:
        """Return the judges' figures of up to `num` real images."""
        if self.jury is None:
            return {}
        images = self.jury.real[:num]
        return self.jury.figures(images, torch.arange(len(images)) % judges.CLASSES)


# --------------------------------------------------------------------------------------------------------------- table


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the results of rows by name as a Markdown table, the best error first."""

    def cell(seeds: Sequence[Mapping[str, Any]], key: str, digits: str) -> str:
        values = [seed[key] for seed in seeds if key in seed]
        spread = f" ± {statistics.stdev(values):.1g}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):{digits}}{spread}" if values else ""

    used = {json.dumps(each["made"]["judges"], sort_keys=True) for each in found.values()}
    if len(used) > 1:
        raise SystemExit("--table: expected rows of the same judges, got rows of several: pass --results FOLDER and train")
    has_judges = any("class" in seed for each in found.values() for seed in each["seeds"].values())
    heads = ["row", "million parameters", "images/s", "steps", "error"]
    heads += ["Frechet distance", "accuracy", "grain"] if has_judges else []
    lines = [f"| {' | '.join([*heads, 'seeds'])} |", "|---" * (len(heads) + 1) + "|"]

    def mean_error(name: str) -> float:
        return statistics.fmean(seed.get("error", math.inf) for seed in found[name]["seeds"].values())

    for name in sorted(found, key=mean_error):
        each = found[name]
        seeds, made = list(each["seeds"].values()), each["made"]
        cells = [
            ROWS[name].about,
            f"{each['parameters'] / 1e6:.2f}",
            f"{made['images_per_second']:.3g}",
            str(made["steps"]),
        ]
        cells.append(cell(seeds, "error", ".4f"))
        if has_judges:
            cells += [cell(seeds, "class", ".3g"), cell(seeds, "accuracy", ".3f"), cell(seeds, "grain", ".2g")]
        lines.append(f"| {' | '.join([*cells, str(len(seeds))])} |")
    if has_judges:
        real = [next(iter(found.values()))["real"]]
        cells = [cell(real, "class", ".3g"), cell(real, "accuracy", ".3f"), cell(real, "grain", ".2g")]
        lines.append(f"| {' | '.join(['other test images', '', '', '', '', *cells, ''])} |")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------- run


def file_of(name: str, args: argparse.Namespace) -> Path:
    """Return the file with the results of a row."""
    return args.results / args.data / f"{name}.json"


def train_and_judge(name: str, args: argparse.Namespace, judging: Judging) -> None:
    """Train the seeds of a row that its file lacks, and write their figures."""
    row, file = ROWS[name], file_of(name, args)
    rate = common.read_results(file)["rate"]
    made = {
        "row": {key: value for key, value in json.loads(json.dumps(asdict(row))).items() if key != "about"},
        "steps": math.ceil(args.minutes * 60 * rate["images_per_second"] / row.options["batch_size"]),
        "images_per_second": rate["images_per_second"],
        "device": rate["machine"]["device"],
        "judges": {} if judging.jury is None else {name: about["sha256"] for name, about in judging.jury.about.items()},
        "levels": LEVELS.tolist(),
        "sampler": DEFAULT_SAMPLER,
    }
    kind = f"{args.minutes:g} minutes, {args.num} images"
    kept = common.read_results(file).get(kind, {"made": made})["made"]
    if kept != made:
        changed = ", ".join(key for key in made if kept.get(key) != made[key])
        raise SystemExit(f"leaderboard: expected {name} to be as in {str(file)!r}, got another {changed}: pass --results")
    digest = hashlib.sha256(json.dumps(made).encode()).hexdigest()[:8]
    for seed in range(args.seeds):
        if str(seed) in common.read_results(file).get(kind, {"seeds": {}})["seeds"]:
            continue
        run = BUILD / args.data / name / f"{digest}-seed-{seed}"
        trained = train_row(row, args.data, made["steps"], seed, run)
        found = judging.figures(trained, args.num, seed, run / "sheet.png")
        results = common.read_results(file)
        section = results.setdefault(kind, {"made": made, "seeds": {}})
        section["parameters"] = sum(each.numel() for each in trained.model.parameters())
        section["real"] = judging.real(args.num)
        section["seeds"][str(seed)] = found | {"commit": common.commit()}
        write_json(file, results)
        print(f"{name} seed {seed}: {found}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    rows = "; ".join(f"{name}: {row.about}" for name, row in ROWS.items())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"train these. {rows}".replace("%", "%%"))
    parser.add_argument("--data", choices=SETS, default=SETS[0], help="train on this set (fashion-mnist)")
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="train the steps that an idle core takes in this many minutes (10)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="repeat each row with this many seeds (3)")
    parser.add_argument("--num", type=int, default=1000, help="draw this many images for the judges (1000)")
    parser.add_argument(
        "--rates", action="store_true", help="measure the images per second of rows that have none, and train nothing"
    )
    parser.add_argument("--table", action="store_true", help="print the results as a Markdown table, and train nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="keep a file for each row here")
    args = parser.parse_args(arguments)
    unknown = [name for name in args.rows if name not in ROWS]
    if unknown or not (args.rows or args.table):
        raise SystemExit(f"leaderboard: expected rows of {', '.join(ROWS)}, got {', '.join(unknown) or 'none'}")
    features = judges.CLASS_RECIPE["features"]
    if args.num <= features:
        raise SystemExit(f"--num: expected more images than the {features} features, got {args.num}")
    if args.table:
        kind = f"{args.minutes:g} minutes, {args.num} images"
        found = {name: common.read_results(file_of(name, args)).get(kind) for name in args.rows or ROWS}
        if not any(found.values()):
            raise SystemExit(f"--table: expected results of {kind} in {str(args.results)!r}, got none: train first")
        print(table({name: each for name, each in found.items() if each}))
        return
    torch.set_num_threads(1)
    write_rates(args.rows, args)
    judging = None if args.rates else Judging(args.data)
    for name in args.rows:
        print(f"{name}: {common.read_results(file_of(name, args))['rate']['images_per_second']} images/s", flush=True)
        if judging is not None:
            train_and_judge(name, args, judging)


if __name__ == "__main__":
    main()
