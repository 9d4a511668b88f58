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
PARITY_STEPS, PARITY_BATCH = 4, 2


# A library's sampler: its network, what is frozen, a call from either and a number of images to images, and their size.
Original = tuple[nn.Module, Any, Callable[[Any, int], Tensor], int]
# A sampler as it is and frozen: calls from a number of images to images, and the format of the original network.
Pair = tuple[Callable[[int], Tensor], Callable[[int], Tensor], str]


class Library(NamedTuple):
    """A library: how to build its sampler, and what to measure.

    Attributes:
        build: Called with steps, and whether the network is tiny.
        module: Module that must be installed.
        remedy: How to get it.
        network: Sampler and network, in words.
        dtypes: Dtypes of the frozen network and of the original.
        batches: Numbers of images.
        steps: Steps of the sampler.
    """

    build: Callable[[int, bool], Original]
    module: str
    remedy: str
    network: str
    dtypes: Sequence[str]
    batches: Sequence[int]
    steps: int


def diffusers_original(steps: int, tiny: bool) -> Original:
    """Return a DDPMPipeline."""
    library, config = idioms.diffusers(), TINY if tiny else NETWORK
    network = idioms.diffusers_unet(idioms.random_unet(config))
    pipe = library.DDPMPipeline(unet=network, scheduler=library.DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def draw(pipeline: Any, n: int) -> Tensor:
        return pipeline(n, num_inference_steps=steps, output_type="pt").images * 2 - 1  # type: ignore[no-any-return]

    return network, pipe, draw, config["sample_size"]


def guided_diffusion_original(steps: int, tiny: bool) -> Original:
    """Return `p_sample_loop` of the original with a learned variance."""
    from guided_diffusion import script_util  # type: ignore[import-not-found]

    size = 16 if tiny else 32
    flags = {"image_size": size, "num_channels": 32 if tiny else 64, "channel_mult": "1,2" if tiny else "1,2,2"}
    flags |= {"num_res_blocks": 1 if tiny else 2, "attention_resolutions": str(size // 2), "learn_sigma": True}
    torch.manual_seed(0)
    flags = script_util.model_and_diffusion_defaults() | flags | {"timestep_respacing": str(steps)}
    network, diffusion = script_util.create_model_and_diffusion(**flags)
    idioms.fill_zeros(network, std=0.05)

    def draw(model: Any, n: int) -> Tensor:
        device = next(network.parameters()).device
        return diffusion.p_sample_loop(model, (n, 3, size, size), device=device)  # type: ignore[no-any-return]

    return network, network, draw, size


def denoising_diffusion_pytorch_original(steps: int, tiny: bool) -> Original:
    """Return the sampler of the original's `GaussianDiffusion` on a `UNet`."""
    from denoising_diffusion_pytorch import GaussianDiffusion

    network = idioms.random_unet(TINY if tiny else SMALL)
    size = network.config["sample_size"]

    def draw(process: Any, n: int) -> Tensor:
        with patch("denoising_diffusion_pytorch.denoising_diffusion_pytorch.tqdm", lambda steps, **_: steps):
            return process.sample(batch_size=n) * 2 - 1  # type: ignore[no-any-return]

    return network, GaussianDiffusion(network, image_size=size, sampling_timesteps=steps), draw, size


LIBRARIES = {
    "diffusers": Library(
        diffusers_original, "diffusers", "pip install diffusers", "DDPMPipeline, 35.7M", ["float32", "bf16"], [1, 16], 5
    ),
    "guided-diffusion": Library(
        guided_diffusion_original,
        "guided_diffusion",
        "clone github.com/openai/guided-diffusion and set PYTHONPATH to the clone",
        "p_sample_loop, 64-128-128",
        ["float32"],
        [16],
        20,
    ),
    "denoising-diffusion-pytorch": Library(
        denoising_diffusion_pytorch_original,
        "denoising_diffusion_pytorch",
        "pip install denoising-diffusion-pytorch",
        "sample, ddpm_fast.UNet 64-128-128",
        ["float32"],
        [16],
        20,
    ),
}


def make_pair(name: str, dtype: torch.dtype, steps: int, batch: int, device: str, tiny: bool) -> Pair:
    """Freeze a library's sampler, and put its network in the memory format that is faster for a batch.

    Raises:
        AssertionError: In another dtype than float32, the frozen network is less accurate than diffusers', against float64.
    """
    network, sampler, draw, size = LIBRARIES[name].build(steps, tiny)
    network.eval()
    sampler.to(device)
    frozen = ddpm_fast.freeze(sampler, dtype)
    x, t = torch.randn(batch, 3, size, size, device=device), torch.full((batch,), 500, device=device)
    if dtype != torch.float32:
        with torch.no_grad():
            truth = copy.deepcopy(network).double()(x.double(), t).sample
            baseline = copy.deepcopy(network).to(dtype)(x.to(dtype), t).sample
        common.require_parity(f"UNet2DModel in {dtype}, frozen", frozen.unet(x.to(dtype), t).sample, baseline, truth)
    network.to(dtype)
    return partial(draw, sampler), partial(draw, frozen), common.use_faster_format(network, x.to(dtype), t)


def measure(name: str, steps: int, args: argparse.Namespace) -> list[dict[str, object]]:
    """Return the rows of a library: parity first, then times."""
    library = LIBRARIES[name]
    *samplers, _ = make_pair(name, torch.float32, PARITY_STEPS, PARITY_BATCH, args.device, args.quick)
    images = []
    for draw in samplers:
        torch.manual_seed(0)
        images.append(draw(PARITY_BATCH))
    common.require_same_images(f"{name}, {PARITY_STEPS} steps of float32", *images)
    rows = []
    for dtype in library.dtypes:
        for batch in [2] if args.quick else library.batches:
            before, after, memory_format = make_pair(name, common.DTYPES[dtype], steps, batch, args.device, args.quick)
            calls = {"before": partial(before, batch), "frozen": partial(after, batch)}
            for call in calls.values():
                call()
            times = common.compare(calls, args.device, warm=True, min_rounds=2 if args.quick else args.rounds)
            row: dict[str, object] = {"what": "tiny" if args.quick else library.network, "dtype": dtype, "batch": batch}
            for side, taken in times.items():
                row[f"ms a step, {side}"] = common.Spread.of([1e3 * seconds / steps for seconds in taken.rounds])
            row |= {"times as fast": times["frozen"].speedup_over(times["before"]), "format before": memory_format}
            rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    options: dict[str, dict[str, Any]] = {
        "--libraries": {"choices": LIBRARIES, "nargs": "+", "default": list(LIBRARIES), "help": "measure these (all)"},
        "--rounds": {"type": int, "default": 7, "help": "draw this many times with each, in turns (7)"},
        "--quick": {"action": "store_true", "help": "try it: tiny networks, 2 images, 2 steps, 2 rounds"},
    }
    args = common.parse(__doc__, arguments, options)
    run = common.Run(args.device, args.out)
    for name in args.libraries:
        if not installed(LIBRARIES[name].module):
            print(f"left out: {name}: {LIBRARIES[name].module} is not installed: {LIBRARIES[name].remedy}")
            continue
        with run.going_on(name):
            steps = 2 if args.quick else LIBRARIES[name].steps
            rows = measure(name, steps, args)
            run.save(
                f"migrating_speed {name}", rows, f"{name}, as it is and frozen, {steps} steps: median [quartiles]", steps=steps
            )
    run.finish()


if __name__ == "__main__":
    main()
