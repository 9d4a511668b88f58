"""Time sampling in other libraries before and after `ddpm_fast.freeze`.

    python benchmarks/benchmark_migrating.py
    PYTHONPATH=path/to/guided-diffusion python benchmarks/benchmark_migrating.py --libraries guided-diffusion

Both sides have the same weights and take turns. The original network has the memory format that is faster for it. The loop is
the library's own in both. Weights are random. Images are compared first, from the same random numbers in float32.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import common
import idioms
import torch
from peers import installed
from torch import Tensor, nn

import ddpm_fast

NETWORK = idioms.CIFAR10_32
SMALL = idioms.NETWORKS["small"] | {"block_out_channels": [64, 128, 128], "sample_size": 32}
TINY = idioms.NETWORKS["tiny"]
TOLERANCE = 1e-3  # largest difference of images in [-1, 1]
PARITY_STEPS, PARITY_BATCH = 4, 2


class Pair(NamedTuple):
    """A sampler as it is and frozen: calls from a number of images to images, and the format of the original network."""

    before: Callable[[int], Tensor]
    after: Callable[[int], Tensor]
    memory_format: str


class Library(NamedTuple):
    """A library: how to build its pair, and what to measure.

    Attributes:
        pair: Called with dtype, steps, batch for the memory format, device, and whether the network is tiny.
        module: Module that must be installed.
        remedy: How to get it.
        network: Sampler and network, in words.
        dtypes: Dtypes of the frozen network and of the original.
        batches: Numbers of images.
        steps: Steps of the sampler.
    """

    pair: Callable[[torch.dtype, int, int, str, bool], Pair]
    module: str
    remedy: str
    network: str
    dtypes: Sequence[str]
    batches: Sequence[int]
    steps: int


def in_faster_format(network: nn.Module, shape: Sequence[int], dtype: torch.dtype, device: str) -> str:
    """Put a network in the memory format in which one evaluation is faster, and return the format's name."""
    x, t = torch.randn(*shape, device=device, dtype=dtype), torch.full(shape[:1], 500, device=device)

    def make(memory_format: torch.memory_format) -> Callable[[], object]:
        candidate = copy.deepcopy(network).to(memory_format=memory_format)  # type: ignore[call-overload]
        return partial(candidate, x.contiguous(memory_format=memory_format), t)

    with torch.no_grad():
        name, _ = common.fastest_format(make, device)
    network.to(memory_format=common.FORMATS[name])  # type: ignore[call-overload]
    return name


def diffusers_pair(dtype: torch.dtype, steps: int, batch: int, device: str, tiny: bool) -> Pair:
    """Return a DDPMPipeline. In bfloat16 the frozen one still draws and steps in float32.

    Raises:
        AssertionError: In another dtype than float32, the frozen network is less accurate than diffusers', against float64.
    """
    library, size = idioms.diffusers(), (TINY if tiny else NETWORK)["sample_size"]
    network = idioms.diffusers_unet(idioms.random_unet(TINY if tiny else NETWORK)).to(device).eval()
    pipe = library.DDPMPipeline(unet=network, scheduler=library.DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    frozen = ddpm_fast.freeze(pipe, dtype)
    if dtype != torch.float32:
        x, t = torch.randn(PARITY_BATCH, 3, size, size, device=device), torch.tensor([3, 700], device=device)
        with torch.no_grad():
            truth = copy.deepcopy(network).double()(x.double(), t).sample
            baseline = copy.deepcopy(network).to(dtype)(x.to(dtype), t).sample
        common.require_parity(f"UNet2DModel in {dtype}, frozen", frozen.unet(x.to(dtype), t).sample, baseline, truth)
    network.to(dtype)
    memory_format = in_faster_format(network, (batch, 3, size, size), dtype, device)

    def draw(pipeline: Any, n: int) -> Tensor:
        return pipeline(n, num_inference_steps=steps, output_type="pt").images * 2 - 1  # type: ignore[no-any-return]

    return Pair(partial(draw, pipe), partial(draw, frozen), memory_format)


def guided_diffusion_pair(dtype: torch.dtype, steps: int, batch: int, device: str, tiny: bool) -> Pair:
    """Return `p_sample_loop` of the original with a learned variance."""
    from guided_diffusion import script_util  # type: ignore[import-not-found]

    size = 16 if tiny else 32
    flags = {"image_size": size, "num_channels": 32 if tiny else 64, "channel_mult": "1,2" if tiny else "1,2,2"}
    flags |= {"num_res_blocks": 1 if tiny else 2, "attention_resolutions": str(size // 2), "learn_sigma": True}
    torch.manual_seed(0)
    flags = script_util.model_and_diffusion_defaults() | flags | {"timestep_respacing": str(steps)}
    network, diffusion = script_util.create_model_and_diffusion(**flags)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    network.to(device).eval()
    frozen = ddpm_fast.freeze(network, dtype)
    memory_format = in_faster_format(network, (batch, 3, size, size), dtype, device)

    def draw(model: Any, n: int) -> Tensor:
        return diffusion.p_sample_loop(model, (n, 3, size, size), device=device)  # type: ignore[no-any-return]

    return Pair(partial(draw, network), partial(draw, frozen), memory_format)


def denoising_diffusion_pytorch_pair(dtype: torch.dtype, steps: int, batch: int, device: str, tiny: bool) -> Pair:
    """Return the sampler of the original's `GaussianDiffusion` on a `UNet`."""
    from denoising_diffusion_pytorch import GaussianDiffusion

    network = idioms.random_unet(TINY if tiny else SMALL)
    size = network.config["sample_size"]
    process = GaussianDiffusion(network, image_size=size, sampling_timesteps=steps).to(device).eval()
    frozen = ddpm_fast.freeze(process, dtype)
    memory_format = in_faster_format(network, (batch, 3, size, size), dtype, device)

    def draw(process: Any, n: int) -> Tensor:
        with patch("denoising_diffusion_pytorch.denoising_diffusion_pytorch.tqdm", lambda steps, **_: steps):
            return process.sample(batch_size=n) * 2 - 1  # type: ignore[no-any-return]

    return Pair(partial(draw, process), partial(draw, frozen), memory_format)


LIBRARIES = {
    "diffusers": Library(
        diffusers_pair, "diffusers", "pip install diffusers", "DDPMPipeline, 35.7M", ["float32", "bf16"], [1, 16], 5
    ),
    "guided-diffusion": Library(
        guided_diffusion_pair,
        "guided_diffusion",
        "clone github.com/openai/guided-diffusion and set PYTHONPATH to the clone",
        "p_sample_loop, 64-128-128",
        ["float32"],
        [16],
        20,
    ),
    "denoising-diffusion-pytorch": Library(
        denoising_diffusion_pytorch_pair,
        "denoising_diffusion_pytorch",
        "pip install denoising-diffusion-pytorch",
        "sample, ddpm_fast.UNet 64-128-128",
        ["float32"],
        [16],
        20,
    ),
}


def require_same_images(what: str, pair: Pair) -> float:
    """Return the largest difference of images in [-1, 1] from the same random numbers.

    Raises:
        AssertionError: It is above TOLERANCE.
    """
    images = []
    for draw in pair[:2]:
        torch.manual_seed(0)
        images.append(draw(PARITY_BATCH))
    difference = float((images[1] - images[0]).abs().max())
    if not difference <= TOLERANCE:
        raise AssertionError(f"{what}: images differ by {difference:.3g}, at most {TOLERANCE:g} expected: no speed is reported")
    return difference


def per_step(times: common.Times, steps: int) -> common.Spread:
    """Return milliseconds per step."""
    return common.Spread.of([1e3 * seconds / steps for seconds in times.rounds])


def measure(name: str, steps: int, args: argparse.Namespace) -> list[dict[str, object]]:
    """Return the rows of a library: parity first, then times."""
    library = LIBRARIES[name]
    parity = library.pair(torch.float32, PARITY_STEPS, PARITY_BATCH, args.device, args.quick)
    difference = require_same_images(name, parity)
    print(f"{name}: the same images in {PARITY_STEPS} steps of float32, to {difference:.2g}", flush=True)
    rows = []
    for dtype in library.dtypes:
        for batch in [2] if args.quick else library.batches:
            pair = library.pair(common.DTYPES[dtype], steps, batch, args.device, args.quick)
            calls = {"before": partial(pair.before, batch), "frozen": partial(pair.after, batch)}
            for call in calls.values():
                call()
            times = common.compare(calls, args.device, warm=True, min_rounds=2 if args.quick else args.rounds)
            row: dict[str, object] = {"what": "tiny" if args.quick else library.network, "dtype": dtype, "batch": batch}
            row |= {f"ms a step, {side}": per_step(taken, steps) for side, taken in times.items()}
            row |= {"times as fast": times["frozen"].speedup_over(times["before"]), "format before": pair.memory_format}
            rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--libraries", choices=LIBRARIES, nargs="+", default=list(LIBRARIES), help="measure these (all)")
    parser.add_argument("--steps", type=int, help="take this many steps, at least 2 (5 for diffusers, else 20)")
    parser.add_argument("--rounds", type=int, default=7, help="draw this many times with each, in turns (7)")
    parser.add_argument("--quick", action="store_true", help="try it: tiny networks, 2 images, 2 steps, 2 rounds")
    args = parser.parse_args(arguments)
    if args.steps is not None and args.steps < 2:
        parser.error("--steps: guided-diffusion has no process of one step")
    run = common.Run(args.device, args.out)
    for name in args.libraries:
        if not installed(LIBRARIES[name].module):
            print(f"left out: {name}: {LIBRARIES[name].module} is not installed: {LIBRARIES[name].remedy}")
            continue
        with run.going_on(name):
            steps = 2 if args.quick else args.steps or LIBRARIES[name].steps
            rows = measure(name, steps, args)
            run.save(
                f"migrating_speed {name}", rows, f"{name}, as it is and frozen, {steps} steps: median [quartiles]", steps=steps
            )
    run.finish()


if __name__ == "__main__":
    main()
