"""Time ancestral sampling (Algorithm 2 of Ho et al. 2020): ddpm_fast, plain PyTorch, diffusers and torch.compile.

    python benchmarks/sample_speed.py
    python benchmarks/sample_speed.py --model cifar10-32 --batch 16 --steps 1000 --dtype bf16
    python benchmarks/sample_speed.py --model cifar10-32 256x256 --device cuda --dtype bf16 --compile reduce-overhead

All run the same weights and timesteps in the same process, in turns, each in the memory format that is faster for it.
The speed is that of --steps steps and is not extrapolated. To compile takes minutes, so --compile is a comparison by itself.
The results are printed. --out writes them to a file too.

If another program runs, close it or set OMP_WAIT_POLICY=passive, which holds for all samplers because they share a process.
Otherwise threads of PyTorch spin while they wait for each other, and take several times as long.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import ceil
from typing import Any
from unittest.mock import patch

import common
import idioms
import torch
from peers import DIFFUSERS, OURS, PLAIN, compiled, installed
from torch import Tensor, nn

import ddpm_fast
from ddpm_fast import NoiseSchedule, ddpm_plan, noise, sample_seeds
from ddpm_fast.nn import UNet
from ddpm_fast.reference import STREAM_X_T

PIPELINE = f"{DIFFUSERS} DDPMPipeline"
PARITY_STEPS = 4
# Fewest values of the images that are compared. In 4 steps only the few pixels that the first prediction leaves within [-1, 1]
# carry most of the rounding: 2 images of 8x8 have 20 such, by which equal arithmetic differs by a factor of 2.
PARITY_VALUES = 2**14
BUSY_LOAD = 0.5  # a load average of other programs that changes the ratios
WIDE = 0.15  # a distance of the quartiles, as a share of the median, that a quiet machine does not have


def load_model(name: str) -> tuple[UNet, NoiseSchedule]:
    if name in idioms.NETWORKS:
        return idioms.random_unet(idioms.NETWORKS[name]), idioms.SCHEDULE
    loaded = ddpm_fast.load_builtin()
    return loaded.model, loaded.objective.schedule


class Samplers:
    """The ways to sample, with the same weights, schedule and timesteps.

    Args:
        model: The network.
        schedule: Its schedule.
        steps: Steps of the plan, evenly spaced ("leading") in the schedule.
        dtype: Dtype of the networks.
        device: Device of the networks.
    """

    def __init__(self, model: UNet, schedule: NoiseSchedule, steps: int, dtype: torch.dtype, device: str) -> None:
        self.plan = ddpm_plan(schedule, steps)
        self.dtype, self.device = dtype, device
        size = model.config["sample_size"]
        self.shape = (model.config["in_channels"], size, size)
        self.classes: int | None = model.config["num_class_embeds"]
        self.ours = ddpm_fast.Sampler(model, self.plan, dtype=dtype, device=device)
        self.networks: dict[str, nn.Module] = {PLAIN: idioms.plain(copy.deepcopy(model))}
        self.pipeline: Any = None
        if installed("diffusers"):
            network = self.networks[PIPELINE] = idioms.diffusers_unet(model)
            betas = {"num_train_timesteps": schedule.num_timesteps, "trained_betas": schedule.betas.tolist()}
            scheduler = idioms.diffusers().DDPMScheduler(**betas)
            self.pipeline = idioms.diffusers().DDPMPipeline(unet=network, scheduler=scheduler)
            self.pipeline.set_progress_bar_config(disable=True)
            if self.classes is not None:  # DDPMPipeline knows no classes
                # A copy of the network shares a function, but would copy the Samplers of a method.
                network.register_forward_pre_hook(
                    lambda _, args, kwargs: (args, {**kwargs, "class_labels": self.no_label(len(args[0]))}), with_kwargs=True
                )
        for network in self.networks.values():
            network.to(device, dtype).eval()
        self.formats = {OURS: "channels_last"}

    def no_label(self, n: int) -> Tensor | None:
        return None if self.classes is None else torch.full((n,), self.classes - 1, device=self.device)

    def by_name(
        self, draw: Callable[[int | None, Tensor], Tensor] | None = None, mode: str = ""
    ) -> dict[str, Callable[[int], Tensor]]:
        """Return calls from a batch size to images in [-1, 1].

        Args:
            draw: Noise of plain PyTorch.
            mode: Mode of torch.compile to compare with, in place of eager PyTorch.
        """

        def with_pipeline(n: int) -> Tensor:
            images = self.pipeline(n, num_inference_steps=self.plan.num_steps, output_type="pt").images
            return images * 2 - 1  # type: ignore[no-any-return]

        def with_loop(network: Callable[..., Any], n: int) -> Tensor:
            like = torch.empty(n, *self.shape, dtype=self.dtype, device=self.device)
            return idioms.sample(network, self.plan, like, self.no_label(n), draw=draw)

        samplers: dict[str, Callable[[int], Tensor]] = {}
        if mode:  # the same loop, in which no step waits for the host
            name = PIPELINE if self.pipeline is not None and self.classes is None else PLAIN
            network = compiled(self.networks[name], mode)

            def step(*inputs: Any) -> Any:
                torch.compiler.cudagraph_mark_step_begin()  # the graph may overwrite the output of the last step
                return network(*inputs)

            key = f"{name.split()[0]} + torch.compile {mode}"
            samplers[key] = partial(with_loop, step)
            self.formats[key] = self.formats[name]
        else:
            samplers[PLAIN] = partial(with_loop, self.networks[PLAIN])
            samplers |= {PIPELINE: with_pipeline} if self.pipeline is not None else {}
        return samplers | {OURS: lambda n: self.ours(n, class_labels="none", progress=False)}

    def choose_formats(self, batch: int) -> None:
        """Put each network in the memory format in which one evaluation is faster."""
        x = torch.randn(batch, *self.shape, device=self.device, dtype=self.dtype)
        t = torch.full((batch,), 500, device=self.device)
        for name, network in self.networks.items():
            labels = () if self.classes is None or name == PIPELINE else (self.no_label(batch),)
            self.formats[name] = common.use_faster_format(network, x, t, *labels)


@contextmanager
def diffusers_noise(draw: Callable[[int | None, Tensor], Tensor]) -> Iterator[None]:
    """Make diffusers draw its noise from `draw`: x_T first, then that of each step."""
    calls = 0

    def randn(shape: tuple[int, ...], *args: Any, dtype: torch.dtype, device: Any = None, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return draw(None if calls == 1 else calls - 2, torch.empty(shape, dtype=dtype, device=device))

    with (
        patch("diffusers.pipelines.ddpm.pipeline_ddpm.randn_tensor", randn),
        patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", randn),
    ):
        yield


def check(model: UNet, schedule: NoiseSchedule, dtype: torch.dtype, device: str) -> None:
    """Raise an AssertionError unless the same noise gives the same images, up to the rounding of the networks.

    The truth is plain PyTorch in float64. diffusers keeps its state in the network's dtype, so it is compared in float32.
    """
    size = model.config["sample_size"]
    n = max(2, ceil(PARITY_VALUES / (model.config["in_channels"] * size * size)))

    def draw(step: int | None, like: Tensor) -> Tensor:
        seeds = sample_seeds(0, n).to(like.device)
        stream = STREAM_X_T if step is None else step
        return noise(like.shape, seeds, stream=stream, dtype=torch.float32, device=like.device).to(like.dtype)

    def samplers(dtype: torch.dtype) -> dict[str, Callable[[int], Tensor]]:
        return Samplers(model, schedule, PARITY_STEPS, dtype, device).by_name(draw)

    truth = samplers(torch.float64)[PLAIN](n)
    for each in {torch.float32, dtype}:
        calls = samplers(each)
        baseline = calls[PLAIN](n)
        common.require_parity(f"ddpm_fast.sample in {each}", calls[OURS](n), baseline, truth)
        if each == torch.float32 and PIPELINE in calls:
            with diffusers_noise(draw):
                images = calls[PIPELINE](n)
            # Its coefficients come from a float32 product over the schedule.
            common.require_parity("DDPMPipeline in float32", images, baseline, truth, factor=10)
    print(f"parity: the same images for the same noise ({PARITY_STEPS} steps, against float64)")


def why_doubtful(load: float | None, times: Mapping[str, common.Times], policy: str) -> str | None:
    """Return one line that says why the ratios may be wrong and what to do, or None.

    Args:
        load: Load average of the machine before the run, or None if it is unknown.
        times: Times of the samplers.
        policy: Value of OMP_WAIT_POLICY.
    """
    reasons = [f"other programs were running (load average {load})"] if load is not None and load > BUSY_LOAD else []
    wide = {name: (taken.spread.high - taken.spread.low) / taken.spread.median for name, taken in times.items()}
    widest = max(wide, key=wide.__getitem__)
    if wide[widest] > WIDE:
        reasons.append(f"the quartiles of {widest} are {wide[widest]:.0%} of its median apart")
    advice = "close other programs" + ("" if policy.lower() == "passive" else ", or set OMP_WAIT_POLICY=passive")
    return f"warning: the ratios may be too high, because {' and '.join(reasons)}: {advice}" if reasons else None


def seconds_of(sampler: Callable[[int], Tensor], batch: int, device: str) -> float:
    """Return the seconds of one run, until the images exist."""
    began = time.perf_counter()
    sampler(batch)
    common.synchronize(device)
    return time.perf_counter() - began


def measure(name: str, samplers: Samplers, batch: int, mode: str, args: argparse.Namespace, run: common.Run) -> None:
    """Time the samplers of a model and batch size. On a GPU each has captured, tuned and compiled before."""
    section = " ".join(filter(None, ["sample_speed", name, args.dtype, f"batch {batch}", mode]))
    if args.go_on and run.has(section, rounds=args.rounds, steps=args.steps):
        return
    timers: dict[str, Callable[[], float]] = {}
    for peer, sampler in samplers.by_name(mode=mode).items():
        with run.going_on(f"{name}, batch {batch}, {peer}"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own
            if mode or args.device != "cpu":
                sampler(batch)
            timers[peer] = partial(seconds_of, sampler, batch, args.device)
    for done, times in enumerate(common.turns(timers, args.rounds), 1):
        rows: list[dict[str, object]] = [
            {"sampler": peer, "model": name, "batch": batch, "steps": args.steps, "dtype": args.dtype}
            | {"memory format": samplers.formats[peer], "images/s": taken.per_second(batch)}
            | {"ms a step": 1e3 * taken.spread.median / args.steps}
            | {f"times {other}": taken.speedup_over(times[other]) for other in times if other != OURS}
            for peer, taken in times.items()
        ]
        title = "ancestral sampling: median [quartiles]" if done == args.rounds else ""
        run.save(section, rows, title, rounds=done, steps=args.steps)
    doubt = None if args.device != "cpu" else why_doubtful(run.machine["load_average"], times, run.machine["wait_policy"])
    if doubt is not None:
        print(doubt)
    if args.plot:
        title = f"{name}, {args.steps} steps, batch {batch}, {args.dtype}, {run.machine['device']}"
        run.picture(plot(rows, title), "sample_speed")


def plot(rows: list[dict[str, Any]], title: str) -> Any:
    figure, axes = common.pyplot().subplots(figsize=(7, 0.6 * len(rows) + 1.4), layout="constrained")
    for row in reversed(rows):
        speed = row["images/s"]
        color = "tab:orange" if row["sampler"] == OURS else "tab:gray"
        bar = axes.barh(row["sampler"], speed.median, xerr=common.errors([speed]), color=color, capsize=3)
        axes.bar_label(bar, fmt="{:.3g}", padding=4)
    axes.set(xlabel="images per second (median and quartiles; longer is better)", title=title)
    axes.margins(x=0.15)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    options: dict[str, dict[str, Any]] = {
        "--model": {
            "nargs": "+",
            "choices": ["builtin", *idioms.NETWORKS],
            "default": ["builtin"],
            "help": "sample from the built-in model (default), or with random weights of another network",
        },
        "--batch": {"type": int, "nargs": "+", "default": [16], "help": "sample this many images at once (16)"},
        "--steps": {"type": int, "default": 20, "help": "take this many steps of the schedule's 1000 (20)"},
        "--rounds": {"type": int, "default": 3, "help": "run each sampler this many times (3)"},
        "--dtype": {"choices": common.DTYPES, "default": "float32", "help": "run the networks in this (float32)"},
        "--compile": {
            "nargs": "*",
            "default": [],
            "metavar": "MODE",
            "help": "compare with these modes of torch.compile alone",
        },
        "--seconds": {"type": float, "default": 3600, "help": "begin no comparison after this many seconds (3600)"},
        "--trusted": {"action": "store_true", "help": "do not compare images first: an earlier run has done so"},
        "--go-on": {"action": "store_true", "help": "skip what the results of this commit have already"},
        "--plot": {"action": "store_true", "help": "draw the picture that docs/benchmarks.md shows"},
    }
    args = common.parse(__doc__, arguments, options)

    deadline = time.monotonic() + args.seconds
    run = common.Run(args.device, args.out)
    dtype = common.DTYPES[args.dtype]
    for name in args.model:
        with run.going_on(name):
            model, schedule = load_model(name)
            if not args.trusted:
                check(model, schedule, dtype, args.device)
            samplers = Samplers(model, schedule, args.steps, dtype, args.device)
            for batch in args.batch:
                if time.monotonic() > deadline:
                    print(f"left out: {name}, batch {batch}: no time was left")
                    continue
                samplers.choose_formats(batch)
                for mode in args.compile or [""]:
                    measure(name, samplers, batch, mode, args, run)
    run.finish()


if __name__ == "__main__":
    main()
