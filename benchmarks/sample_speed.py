"""Images per second of ancestral sampling (Algorithm 2 of Ho et al. 2020): plain PyTorch, diffusers' DDPMPipeline, ddpm_fast.

    python benchmarks/sample_speed.py
    python benchmarks/sample_speed.py --model cifar10-32 --batch 16 --steps 1000 --dtype bf16 --device cuda

All three run the same weights and the same timesteps in the same process, in turns, each in the memory format that is the
faster for it; ddpm_fast in its inference form, and on a GPU with one CUDA graph a step. What is reported is what was run:
images per second for --steps steps. `gpu_sampling.py` compares with torch.compile.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import common
import peers
import torch
from torch import Tensor, nn

import ddpm_fast
from ddpm_fast import NoiseSchedule, SamplingPlan, ddpm_plan, noise, sample_seeds
from ddpm_fast.nn import UNet
from ddpm_fast.pretrained import BUILTIN, load_folder
from ddpm_fast.reference import STREAM_X_T

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
PLAIN, DIFFUSERS, OURS = "plain PyTorch", "diffusers DDPMPipeline", "ddpm_fast"
PARITY_STEPS, PARITY_BATCH = 4, 2


def load_model(name: str) -> tuple[UNet, NoiseSchedule]:
    if name == "builtin":
        loaded = load_folder(BUILTIN)
    elif name == "cifar10-32":
        return peers.cifar10_unet(), NoiseSchedule.linear()
    else:
        loaded = load_folder(name)
    if loaded.prediction != "epsilon" or loaded.variance not in ("fixed_small", "fixed_small_log") or loaded.clip != 1:
        raise SystemExit(f"{name}: only models that predict epsilon, with fixed small variance and clipping to 1, are compared")
    return loaded.model, loaded.schedule


class Contestants:
    """The three ways to sample: same weights, schedule and timesteps.

    Args:
        dtype: of the networks.
        steps: of the plan, evenly spaced ("leading") in the schedule.
    """

    def __init__(self, model: UNet, schedule: NoiseSchedule, steps: int, dtype: torch.dtype, device: str) -> None:
        size = model.config["sample_size"]
        self.plan: SamplingPlan = ddpm_plan(schedule, steps)
        self.shape = (model.config["in_channels"], size, size)
        self.device = device
        self.classes: int | None = model.config["num_class_embeds"]
        self.ours = ddpm_fast.Sampler(model, self.plan, dtype=dtype, device=device)
        self.networks: dict[str, nn.Module] = {PLAIN: peers.plain(copy.deepcopy(model))}
        self.pipeline: Any = None
        if peers.have_diffusers():
            network = peers.diffusers_unet(model)
            if self.classes is not None:  # DDPMPipeline knows no classes
                network.register_forward_pre_hook(self._with_labels, with_kwargs=True)
            self.networks[DIFFUSERS] = network
            self.pipeline = peers.diffusers_pipeline(network, schedule)
        for network in self.networks.values():
            network.to(device, dtype).eval()

    def no_label(self, n: int) -> Tensor | None:
        return None if self.classes is None else torch.full((n,), self.classes - 1, device=self.device)

    def _with_labels(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "class_labels": self.no_label(len(args[0]))}

    def samplers(self) -> dict[str, Callable[[int], Tensor]]:
        """Name -> images in [-1, 1] for a batch size."""

        def with_diffusers(n: int) -> Tensor:
            images = self.pipeline(batch_size=n, num_inference_steps=self.plan.num_steps, output_type="pt").images
            return images * 2 - 1  # type: ignore[no-any-return]

        samplers: dict[str, Callable[[int], Tensor]] = {
            PLAIN: lambda n: peers.sample(self.networks[PLAIN], self.plan, (n, *self.shape), self.no_label(n)),
            DIFFUSERS: with_diffusers,
            OURS: lambda n: self.ours(n, progress=False),
        }
        return {name: samplers[name] for name in (*self.networks, OURS)}

    def choose_formats(self, batch: int) -> dict[str, str]:
        """Puts every network in the memory format in which it is the faster, by timing one evaluation each."""
        x = torch.randn(batch, *self.shape, device=self.device)
        t = torch.full((batch,), 500, device=self.device)
        chosen = {OURS: "channels_last"}  # always
        for name, network in self.networks.items():
            parameter = next(network.parameters())
            labels = () if self.classes is None or name == DIFFUSERS else (self.no_label(batch),)
            evaluations: dict[str, Callable[[], object]] = {}
            for key, memory_format in FORMATS.items():
                candidate = copy.deepcopy(network).to(memory_format=memory_format)  # type: ignore[call-overload]
                x_in = x.to(parameter.dtype).contiguous(memory_format=memory_format)
                evaluations[key] = partial(candidate, x_in, t, *labels)
            with torch.inference_mode():
                for evaluate in evaluations.values():
                    evaluate()
                times = common.compare(evaluations, self.device, warm=True, min_rounds=3)
            chosen[name] = min(times, key=lambda key: times[key].ms)
            network.to(memory_format=FORMATS[chosen[name]])  # type: ignore[call-overload]
        return chosen


@contextmanager
def diffusers_noise(draw: Callable[[int | None, Tensor], Tensor]) -> Iterator[None]:
    """Has diffusers draw its noise from `draw`: x_T first, then that of each step."""
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
    """The same noise gives the same images, to the rounding of the networks: float64 plain PyTorch is the truth.

    diffusers keeps its state in the network's dtype, so it is compared in float32.
    """

    def draw(step: int | None, like: Tensor) -> Tensor:
        seeds = sample_seeds(0, PARITY_BATCH).to(like.device)
        stream = STREAM_X_T if step is None else step
        return noise(like.shape, seeds, stream=stream, dtype=torch.float32, device=like.device).to(like.dtype)

    def plain(contestants: Contestants) -> Tensor:
        network, n = contestants.networks[PLAIN], PARITY_BATCH
        return peers.sample(network, contestants.plan, (n, *contestants.shape), contestants.no_label(n), draw=draw)

    truth = plain(Contestants(model, schedule, PARITY_STEPS, torch.float64, device))
    for each in {torch.float32, dtype}:
        contestants = Contestants(model, schedule, PARITY_STEPS, each, device)
        samplers = contestants.samplers()
        baseline = plain(contestants)
        common.require_parity(f"ddpm_fast.sample in {each}", samplers[OURS](PARITY_BATCH), baseline, truth)
        if each == torch.float32 and DIFFUSERS in samplers:
            with diffusers_noise(draw):
                images = samplers[DIFFUSERS](PARITY_BATCH)
            # Its coefficients come from a float32 product over the schedule.
            common.require_parity("DDPMPipeline in float32", images, baseline, truth, factor=10)
    print(f"parity: the same images for the same noise ({PARITY_STEPS} steps, against float64)")


def plot(path: Path, rows: list[dict[str, object]], title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 0.6 * len(rows) + 1.4), layout="constrained")
    for place, row in enumerate(reversed(rows)):
        speed = row["images/s"]
        assert isinstance(speed, common.Spread)
        error = [[speed.median - speed.low], [speed.high - speed.median]]
        color = "tab:orange" if row["sampler"] == OURS else "tab:gray"
        axes.barh(place, speed.median, xerr=error, color=color, ecolor="black", capsize=3)
        axes.text(speed.high, place, f"  {speed.median:.3g}", va="center")
    axes.set_yticks(range(len(rows)), [str(row["sampler"]) for row in reversed(rows)])
    axes.set_xlabel("images per second (median and quartiles; longer is better)")
    axes.set_title(title, fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.15)
    common.save_picture(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin", help="builtin, cifar10-32 (random weights), or a model's folder")
    parser.add_argument("--batch", type=int, default=16, help="images sampled at once")
    parser.add_argument("--steps", type=int, default=20, help="steps of the sampler, of the schedule's 1000")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each sampler")
    parser.add_argument("--dtype", choices=common.DTYPES, default="float32", help="of the network")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file; default: benchmarks/results/<device>.json")
    parser.add_argument("--plot", type=Path, help="bar chart; default: benchmarks/results/<device>_sample_speed.png")
    args = parser.parse_args()

    dtype = common.DTYPES[args.dtype]
    machine = common.machine(args.device)
    common.print_machine(machine)
    model, schedule = load_model(args.model)
    check(model, schedule, dtype, args.device)
    contestants = Contestants(model, schedule, args.steps, dtype, args.device)
    formats = contestants.choose_formats(args.batch)
    calls = {name: partial(sampler, args.batch) for name, sampler in contestants.samplers().items()}
    times = common.compare(calls, args.device, warm=True, min_rounds=args.rounds)
    settings = {"model": args.model, "batch": args.batch, "steps": args.steps, "dtype": args.dtype}
    rows: list[dict[str, object]] = [
        {
            "sampler": name,
            **settings,
            "memory format": formats[name],
            "images/s": taken.per_second(args.batch),
            "ms a step": 1e3 * taken.spread.median / args.steps,
            f"times {PLAIN}": taken.speedup_over(times[PLAIN]),
        }
        for name, taken in times.items()
    ]
    common.print_table("ancestral sampling: median [quartiles]", rows)
    common.warn_if_unsteady(times)
    out = args.out or common.default_output(args.device)
    common.record(out, f"sample_speed {args.model} {args.dtype} batch {args.batch}", machine, rows)
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture: matplotlib is missing (pip install -e '.[bench]')")
        return
    title = f"{args.model}, {args.steps} steps, batch {args.batch}, {args.dtype}, {machine['device']}"
    plot(args.plot or out.with_name(f"{out.stem}_sample_speed.png"), rows, title)


if __name__ == "__main__":
    main()
