"""Train the CIFAR-10 network of Ho et al. (35.7 million parameters) beside diffusers, eager and compiled.

    python benchmarks/benchmark_training.py speed
    python benchmarks/benchmark_training.py loss --precision bf16

speed: Each peer is a process of its own, in the memory format that is faster for it. They take turns. On a CPU each is measured
twice: as it comes, and with freed memory kept for the next step (`kept_memory`). `ddpm-fast train` keeps it.
loss:  Two runs with the same weights, images and noise. They stay together at first. Then roundings grow from step to step, but
the mean stays. Images are scikit-learn's digits, 32x32.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from typing import Any

import common
import idioms
import torch
from peers import DIFFUSERS, OURS, PLAIN, TRAINING, installed, split
from processes import Job, PeerFailed, Process
from torch import nn

from ddpm_fast import sample_seeds
from ddpm_fast.nn import UNet

TRIAL = 3  # steps in each memory format, to choose by


def check(config: dict[str, Any], device: str) -> None:
    """Raise an AssertionError unless the same noise gives the same loss and gradient, in float32 and channels_last."""
    torch.backends.cudnn.allow_tf32 = False  # two networks may use different algorithms
    ours: Any = idioms.random_unet(config)
    peer = idioms.diffusers_unet(ours) if installed("diffusers") else idioms.plain(idioms.random_unet(config))
    batch = idioms.Batch(2, config["sample_size"], device)
    gradients, losses = [], []
    for model in (peer, ours):
        model.to(device, memory_format=torch.channels_last).train()
        torch.manual_seed(0)
        loss = (idioms.loss_ours if model is ours else idioms.loss_peer_of_seeds)(model, batch, False)
        parameters = dict(sorted(model.named_parameters()))
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(parameters.values()))]))
        losses.append(loss.item())
    error = float((gradients[1] - gradients[0]).norm() / gradients[0].norm())
    loss_error = abs(losses[1] / losses[0] - 1)
    if not (loss_error < 1e-5 and error < 1e-4):
        raise AssertionError(f"loss differs by {loss_error:.2g}, the gradient by {error:.2g}: no speed is reported")
    print(f"parity: loss equal to {loss_error:.1g}, gradient to {error:.1g} (relative, float32)")


def start(
    names: Sequence[str], job: Job, formats: Sequence[str], kept: Sequence[bool], stack: ExitStack, missing: dict[str, str]
) -> dict[tuple[str, bool], Process]:
    """Return warmed-up processes by (name, whether memory is kept), each in the memory format that was faster for it."""
    processes = {}
    for name in names:
        try:
            usual = replace(job, kept=kept[-1] and name == OURS)
            trial = {f: stack.enter_context(closing(Process(name, replace(usual, memory_format=f)))) for f in formats}
            times = common.take_turns({f: partial(p.seconds, 1) for f, p in trial.items()}, TRIAL if len(trial) > 1 else 1)
            best = trial.pop(min(times, key=lambda f: times[f].ms))
            for process in trial.values():
                process.close()
            processes[name, usual.kept] = best
            for other in {*kept} - {usual.kept}:
                processes[name, other] = stack.enter_context(closing(Process(name, replace(best.job, kept=other))))
        except PeerFailed as error:
            missing[name] = str(error)
    return processes


def compare(names: Sequence[str], job: Job, args: argparse.Namespace, missing: dict[str, str]) -> list[dict[str, object]]:
    """Return the rows of one precision."""
    kept = (False, True) if job.device == "cpu" and args.network != "tiny" else (False,)
    with ExitStack() as stack:
        processes = start(names, job, args.formats, kept, stack, missing)
        if not processes:
            return []
        taken = common.take_turns({each: partial(process.seconds, 1) for each, process in processes.items()}, args.rounds)
    return [
        {"training step": name, "memory kept": "yes" if kept else "no", "batch": job.batch}
        | {"precision": "bf16 autocast" if job.dtype == "bf16" else job.dtype}
        | {"memory format": processes[name, kept].job.memory_format, "seconds": mine.spread}
        | {"CPU seconds": common.Spread.of(processes[name, kept].used[-args.rounds :])}
        | {"images/s": mine.per_second(job.batch).median}
        | {"peak memory, MB": common.megabytes(processes[name, kept].peak)}
        | {
            f"times {peer}{', memory kept' if peer_kept else ''}": mine.speedup_over(theirs)
            for (peer, peer_kept), theirs in taken.items()
            if peer != OURS
        }
        for (name, kept), mine in taken.items()
    ]


def speed(args: argparse.Namespace, run: common.Run) -> None:
    config = idioms.NETWORKS[args.network]
    if not args.trusted:
        check(config, args.device)
    names = args.peers or [name for name in TRAINING if not name.startswith(PLAIN) or not installed("diffusers")]
    for precision in args.precision:
        able, missing = split(TRAINING, names, precision)
        with tempfile.TemporaryDirectory() as folder:
            job = Job(folder, args.batch, config["sample_size"], precision, torch.get_num_threads(), args.device)
            job = replace(job, table="peers.TRAINING", network_name=args.network)
            rows = compare(able, job, args, missing)
        name = "" if args.network == "cifar10-32" else f"{args.network} "
        compiled = " compiled" if any("compile" in peer for peer in args.peers or ()) else ""  # a comparison by itself
        run.save(
            f"train_speed {name}{precision}{compiled}", rows, "a training step: median [quartiles]", **{"left out": missing}
        )
        run.failures += [f"{name}: {reason}" for name, reason in missing.items() if name in able]


# --------------------------------------------------------------------------------------------------------------- loss


def batches(steps: int, n: int, size: int) -> list[idioms.Batch]:
    from ddpm_fast.data.items import read_batch, to_unit_range
    from ddpm_fast.data.load import load_dataset
    from ddpm_fast.data.options import DataOptions

    dataset = load_dataset(DataOptions(data="digits", image_size=size))
    generator = torch.Generator().manual_seed(0)
    result = [idioms.Batch(n, size) for _ in range(steps)]
    for step, batch in enumerate(result):
        images = read_batch(dataset, torch.randint(len(dataset), (n,), generator=generator)).images
        batch.x_0 = to_unit_range(images).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        batch.t = torch.randint(idioms.SCHEDULE.num_timesteps, (n,), generator=generator)
        batch.seeds = sample_seeds(step, n)
    return result


def curve(name: str, model: nn.Module, data: list[idioms.Batch], autocast: bool) -> list[float]:
    """Return the loss of each step."""
    model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    step = idioms.train_step(idioms.loss_ours if name == OURS else idioms.loss_peer_of_seeds, model, autocast)
    return [step(batch) for batch in data]


def plot_loss(losses: dict[str, list[float]], precision: str) -> Any:
    figure, (above, below) = common.pyplot().subplots(2, figsize=(6.4, 4.8), sharex=True, layout="constrained")
    theirs, ours = losses.values()
    above.plot(theirs, "-", ours, "--", linewidth=1.5)
    above.legend(list(losses))
    above.set(ylabel="loss", yscale="log", title=f"{precision}: the same weights, images and noise")
    below.plot([abs(a - b) / b for a, b in zip(ours, theirs, strict=True)], color="black", linewidth=1)
    below.set(xlabel="step", ylabel="relative difference", yscale="log")
    return figure


def loss_curve(args: argparse.Namespace, run: common.Run) -> None:
    common.pyplot()
    config = idioms.NETWORKS[args.network]
    data = batches(args.steps, args.batch, config["sample_size"])
    for precision in args.precision:
        torch.manual_seed(0)
        ours = UNet(**config | {"dropout": 0.0})  # two libraries cannot draw the same dropout
        models = {f"{DIFFUSERS} + eager PyTorch": idioms.diffusers_unet(ours), OURS: ours}
        losses = {name: curve(name, model, data, precision == "bf16") for name, model in models.items()}
        differences = [abs(a - b) for a, b in zip(*losses.values(), strict=True)]
        last = slice(-args.steps // 4, None)
        rows: list[dict[str, object]] = [
            {"training": name, "batch": args.batch, "precision": precision, "steps": args.steps}
            | {"mean loss": statistics.fmean(values), "of the last quarter": statistics.fmean(values[last])}
            | {"largest difference": max(differences), "in the first 20 steps": max(differences[:20])}
            for name, values in losses.items()
        ]
        run.save(f"loss_curve {precision}", rows, "loss of training")
        run.picture(plot_loss(losses, precision), f"loss_curve_{precision}")


def main(arguments: Sequence[str] | None = None) -> None:
    options: dict[str, dict[str, Any]] = {
        "what": {"choices": ("speed", "loss"), "help": "measure this"},
        "--precision": {
            "choices": common.DTYPES,
            "nargs": "+",
            "help": "compute in these (speed: both, loss: float32); bf16 is by autocast",
        },
        "--batch": {"type": int, "default": 16, "help": "train on this many images a step (16)"},
        "--network": {"choices": idioms.NETWORKS, "default": "cifar10-32", "help": "train this (cifar10-32)"},
        "--rounds": {"type": int, "default": 15, "help": "speed: time this many steps of each, in turns (15)"},
        "--peers": {
            "nargs": "+",
            "choices": TRAINING,
            "help": "speed: compare these (all that are installed; torch.compile takes minutes to warm up)",
        },
        "--formats": {
            "nargs": "+",
            "choices": common.FORMATS,
            "default": common.FORMATS,
            "help": "speed: try these memory formats (both)",
        },
        "--trusted": {"action": "store_true", "help": "speed: do not compare gradients first: an earlier run has done so"},
        "--steps": {"type": int, "default": 200, "help": "loss: take this many steps (200)"},
    }
    args = common.parse(__doc__, arguments, options)
    args.precision = args.precision or (list(common.DTYPES) if args.what == "speed" else ["float32"])
    run = common.Run(args.device, args.out)
    (speed if args.what == "speed" else loss_curve)(args, run)
    run.finish()


if __name__ == "__main__":
    main()
