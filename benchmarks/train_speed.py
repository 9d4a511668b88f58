"""Training steps per second of the CIFAR-10 network of Ho et al. (35.7 M parameters), beside diffusers, eager and compiled.

    python benchmarks/train_speed.py

Each contestant is a process of its own (training.py), in the memory format that is the faster for it; they take
turns. On a CPU each is there twice: as it comes, and with the memory that a step frees kept for the next one
(`kept_memory`). `ddpm-fast train` keeps it; for the peers it is what their users could gain by the same means.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import common
import peers
import torch
from runtimes import DTYPES, Process
from torch import nn
from training import (
    COMPILED,
    DIFFUSERS,
    FORMATS,
    OURS,
    Batch,
    Contestant,
    TrainingJob,
    loss_diffusers,
    loss_ours,
)

from ddpm_fast.nn import CIFAR10_32

TRIAL = 3  # steps in each memory format, to choose by


def check(device: str) -> None:
    """The same noise gives the same loss and gradient, in float32 and the memory format that has convolutions of our own."""
    ours: nn.Module = peers.cifar10_unet()
    batch = Batch(2, device)
    gradients, losses = {}, {}
    for name, model in ((DIFFUSERS, peers.diffusers_unet(ours)), (OURS, ours)):
        model.to(device, memory_format=torch.channels_last).train()
        loss = loss_ours(model, batch, False) if name == OURS else loss_diffusers(model, batch, False, batch.epsilon())
        parameters = dict(sorted(model.named_parameters()))
        gradients[name] = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(parameters.values()))])
        losses[name] = loss.item()
    error = float((gradients[OURS] - gradients[DIFFUSERS]).norm() / gradients[DIFFUSERS].norm())
    loss_error = abs(losses[OURS] / losses[DIFFUSERS] - 1)
    if not (loss_error < 1e-5 and error < 1e-4):
        raise AssertionError(f"loss differs by {loss_error:.2g}, the gradient by {error:.2g}: no speed is reported")
    print(f"parity: loss equal to {loss_error:.1g}, gradient to {error:.1g} (relative, float32)")


def start(libraries: Sequence[str], job: TrainingJob, stack: ExitStack) -> dict[Contestant, Process]:
    """The contestants, warmed up; each library in the memory format that was faster for it as its users have it."""

    def started(contestant: Contestant) -> Process:
        process = Process(contestant.name, job)
        stack.callback(process.close)
        return process

    processes = {}
    on_cpu = job.device == "cpu"
    for library in libraries:
        usual = on_cpu and library == OURS
        trial = {contestant: started(contestant) for contestant in (Contestant(library, usual, each) for each in FORMATS)}
        times = common.take_turns({each: partial(process.seconds, 1) for each, process in trial.items()}, TRIAL)
        best = min(times, key=lambda each: times[each].ms)
        for contestant, process in trial.items():
            if contestant != best:
                process.close()
        processes[best] = trial[best]
        if on_cpu:
            other = best._replace(kept=not usual)
            processes[other] = started(other)
    return dict(sorted(processes.items(), key=lambda item: (libraries.index(item[0].library), item[0].kept)))


def compare(libraries: Sequence[str], job: TrainingJob, rounds: int) -> list[dict[str, object]]:
    """The table's rows of one precision."""
    with ExitStack() as stack:
        processes = start(libraries, job, stack)
        times = common.take_turns({each: partial(process.seconds, 1) for each, process in processes.items()}, rounds)
        peaks = {each: process.peak() for each, process in processes.items()}
    return [
        {
            "training step": each.library,
            "memory kept": "yes" if each.kept else "no",
            "batch": job.batch,
            "precision": "bf16 autocast" if job.dtype == "bf16" else job.dtype,
            "memory format": each.memory_format,
            "seconds": taken.spread,
            "images/s": taken.per_second(job.batch).median,
            "peak memory, MB": "" if (peak := peaks[each]) is None else round(peak / 1e6),
            **{
                f"times {peer.library}{', memory kept' if peer.kept else ''}": taken.speedup_over(times[peer])
                for peer in times
                if peer.library != OURS
            },
        }
        for each, taken in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--precision", choices=DTYPES, nargs="+", default=list(DTYPES), help="bf16: by autocast")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each, in turns")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes minutes to warm up")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file; default: benchmarks/results/<device>.json")
    args = parser.parse_args()

    machine = common.machine(args.device)
    common.print_machine(machine)
    check(args.device)
    libraries = [DIFFUSERS, *([] if args.no_compile else [COMPILED]), OURS]
    output = args.out or common.default_output(args.device)
    for precision in args.precision:
        with tempfile.TemporaryDirectory() as folder:
            threads = torch.get_num_threads()
            job = TrainingJob(folder, args.batch, CIFAR10_32["sample_size"], precision, threads, device=args.device)
            rows = compare(libraries, job, args.rounds)
        common.print_table("cifar10-32, 35.7 M parameters: median [quartiles]", rows)
        common.record(output, f"train_speed {precision}", machine, rows)


if __name__ == "__main__":
    main()
