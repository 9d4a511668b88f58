"""Ancestral sampling on a GPU in bf16 with both networks of Ho et al.: ddpm_fast beside diffusers, eager and compiled.

    python benchmarks/gpu_sampling.py
    python benchmarks/gpu_sampling.py --network cifar10-32 --batch 16 64 --seconds 300

All have the same weights (random ones: the time is the same), bf16, and as many steps, few enough that a run of the slowest
takes about a second. "1000 steps, s" scales that by 1000 / steps; where ddpm_fast's is marked as measured, all 1000 were run.
Where diffusers is not installed, the network and the sampler are eager PyTorch written as people write it.
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import common
import peers
import torch
from torch import Tensor, nn

import ddpm_fast
from ddpm_fast import NoiseSchedule, ddpm_plan
from ddpm_fast.nn import CIFAR10_32, HO_256

NETWORKS = {"cifar10-32": CIFAR10_32, "256x256": HO_256}
# In the order of what they tell.
CONFIGURATIONS = (
    ("cifar10-32", 16),
    ("cifar10-32", 64),
    ("256x256", 8),
    ("cifar10-32", 1),
    ("cifar10-32", 256),
    ("256x256", 1),
)
OURS = "ddpm_fast"
MODES = {"torch.compile": None, "torch.compile reduce-overhead": "reduce-overhead"}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SCHEDULE = NoiseSchedule.linear()
RUN_SECONDS = 1.0  # of the slowest contestant
FULL = 1000

Sampler = Callable[[int], object]  # of a number of steps


class Network:
    """One network's contestants, in bf16."""

    def __init__(self, name: str, device: str) -> None:
        self.device = device
        model = peers.random_unet(NETWORKS[name])
        self.shape = (model.config["in_channels"], model.config["sample_size"], model.config["sample_size"])
        self.ours = ddpm_fast.freeze(model.to(device), torch.bfloat16)
        self.has_diffusers = peers.have_diffusers()
        peer = peers.diffusers_unet(model) if self.has_diffusers else peers.plain(copy.deepcopy(model))
        self.peer: nn.Module = peer.to(device, torch.bfloat16).eval()
        self.peer_name = "diffusers" if self.has_diffusers else "plain PyTorch"
        self.compiled: dict[str, Callable[..., Any]] = {}

    def choose_format(self, batch: int) -> str:
        """The memory format in which one evaluation of the eager peer is the faster; the compiled ones get it too."""
        x = torch.randn(batch, *self.shape, device=self.device, dtype=torch.bfloat16)
        t = torch.full((batch,), 500, device=self.device)
        times = {}
        with torch.inference_mode():
            for name in FORMATS:
                self.set_format(name)
                self.peer(x, t)
                times[name] = common.compare({name: lambda: self.peer(x, t)}, self.device, warm=True, min_rounds=3)[name].ms
        chosen = min(times, key=lambda name: times[name])
        self.set_format(chosen)
        return chosen

    def set_format(self, name: str) -> None:
        self.peer.to(memory_format=FORMATS[name])  # type: ignore[call-overload]

    def sample_ours(self, batch: int) -> Sampler:
        samplers: dict[int, ddpm_fast.Sampler] = {}

        def draw(steps: int) -> Tensor:
            if steps not in samplers:
                samplers[steps] = ddpm_fast.Sampler(self.ours, ddpm_plan(SCHEDULE, steps))
            return samplers[steps](batch, progress=False)

        return draw

    def sample_peer(self, batch: int, mode: str | None = "eager") -> Sampler:
        """Timesteps are on the GPU before the loop, so nothing in it waits."""
        network: Callable[..., Any] = self.peer
        if mode != "eager":
            key = str(mode)
            if key not in self.compiled:
                torch._dynamo.reset()
                self.compiled = {key: torch.compile(self.peer, mode=mode, dynamic=False)}
            network = self.compiled[key]

        @torch.inference_mode()
        def sample(steps: int) -> Tensor:
            x = torch.randn(batch, *self.shape, device=self.device, dtype=torch.bfloat16)
            plan = ddpm_plan(SCHEDULE, steps)
            timesteps = plan.timesteps.to(self.device)[:, None].expand(-1, batch).contiguous()
            if self.has_diffusers:
                scheduler = peers.diffusers_scheduler(SCHEDULE, steps)
                for i, t in enumerate(scheduler.timesteps):
                    torch.compiler.cudagraph_mark_step_begin()
                    x = scheduler.step(network(x, timesteps[i]).sample, t, x).prev_sample
                return x
            for i, row in enumerate(plan.coefficients.tolist()):
                torch.compiler.cudagraph_mark_step_begin()
                x = peers.reverse_step(x, network(x, timesteps[i]), row)
            return x

        return sample


def seconds_of(sampler: Sampler, steps: int, device: str) -> float:
    """Of one run, until the images are there."""
    began = time.perf_counter()
    sampler(steps)
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def choose_steps(sampler: Sampler, device: str) -> int:
    """So many that a run takes about RUN_SECONDS."""
    sampler(2)
    a_step = seconds_of(sampler, 5, device) / 5
    return max(10, min(FULL, int(RUN_SECONDS / a_step)))


def compare(samplers: dict[str, Sampler], steps: int, device: str, rounds: int = 3) -> dict[str, common.Times]:
    """Turns of whole runs, after one of each that is not timed (it captures, tunes and compiles)."""
    for sampler in samplers.values():
        sampler(steps)
    return common.take_turns({name: partial(seconds_of, sampler, steps, device) for name, sampler in samplers.items()}, rounds)


def rows_of(
    times: dict[str, common.Times], network: str, batch: int, steps: int, memory_format: str
) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for name, taken in times.items():
        seconds = FULL / steps * taken.spread.median
        rows.append(
            {
                "network": network,
                "batch": batch,
                "sampler": name,
                "memory format": "channels_last" if name == OURS else memory_format,
                "steps": steps,
                "ms a step": common.Spread(*(1e3 * value / steps for value in taken.spread)),
                "1000 steps, s": seconds,
                "which is": "measured" if steps == FULL else f"scaled from {steps} steps",
                "images/s": batch / seconds,
                "ddpm_fast is faster by": times[OURS].speedup_over(taken),
            }
        )
    return rows


def _network(known: dict[str, Network], name: str, device: str) -> Network:
    if name not in known:
        known[name] = Network(name, device)
    return known[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, help="default: both")
    parser.add_argument("--batch", type=int, nargs="+", help="default: 1, 16, 64, 256; 1, 8")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=600, help="after which no other comparison is begun")
    parser.add_argument("--compile-only", action="store_true", help="fill torch.compile's cache, and time nothing")
    parser.add_argument("--out", type=Path, help="JSON file; default: benchmarks/results/<device>.json")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    warnings.simplefilter("ignore")  # the compiler's own

    chosen = [
        (name, batch)
        for name, batch in CONFIGURATIONS
        if args.network in (None, name) and (args.batch is None or batch in args.batch)
    ]
    networks: dict[str, Network] = {}
    if args.compile_only:
        for name, batch in chosen:
            _network(networks, name, args.device).choose_format(batch)
            for mode in MODES.values():
                networks[name].sample_peer(batch, mode)(2)
        return

    machine = common.machine(args.device)
    out = args.out or common.default_output(args.device)
    rows: list[dict[str, object]] = []
    settings: dict[tuple[str, int], tuple[int, str]] = {}

    failures: list[str] = []

    @contextmanager
    def failing(what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is, the other comparisons go on
            failures.append(f"{what}: {type(error).__name__}: {error}")

    def keep(times: dict[str, common.Times], *setting: Any) -> None:
        rows.extend(rows_of(times, *setting))
        common.record(out, "gpu_sampling", machine, rows, quiet=True)

    for name, batch in chosen:  # eager first: it needs no compiler
        if time.monotonic() > deadline:
            break
        with failing(f"{name}, batch {batch}, eager"):
            network = _network(networks, name, args.device)
            memory_format = network.choose_format(batch)
            eager = network.sample_peer(batch)
            steps = choose_steps(eager, args.device)
            ours = network.sample_ours(batch)
            times = compare({OURS: ours, f"{network.peer_name}, eager": eager}, steps, args.device)
            keep(times, name, batch, steps, memory_format)
            settings[name, batch] = steps, memory_format
            if steps < FULL and times[OURS].spread.median * FULL / steps < 5:
                keep(compare({OURS: ours}, FULL, args.device, rounds=1), name, batch, FULL, memory_format)
        gc.collect()
        torch.cuda.empty_cache()
    for (name, batch), (steps, memory_format) in settings.items():
        for label, mode in MODES.items():
            if time.monotonic() > deadline:
                break
            with failing(f"{name}, batch {batch}, {label}"):
                network = networks[name]
                network.set_format(memory_format)
                contestants = {
                    OURS: network.sample_ours(batch),
                    f"{network.peer_name}, {label}": network.sample_peer(batch, mode),
                }
                keep(compare(contestants, steps, args.device), name, batch, steps, memory_format)
    if rows:
        common.print_table("ancestral sampling, bf16: median [quartiles]", rows)
    compared = sum(row["sampler"] != OURS for row in rows)
    common.finish(f"{compared} of {len(chosen) * (1 + len(MODES))} comparisons made; written: {out}", failures)


if __name__ == "__main__":
    main()
