"""Time diffusers before and after this package's drop-ins, with the same weights in the same process, in turns.

    python benchmarks/benchmark_pipeline.py accelerate --steps 1000 --batch 1 --dtypes float32 bf16 --rounds 1
    python benchmarks/benchmark_pipeline.py fuse --networks UNet2DModel --batch 16 --device cuda

accelerate: A pipeline around the CIFAR-10 network of Ho et al. with random weights. Both sides get the same generator, so in
float32 the images must agree. bf16 before is `pipe.to(torch.bfloat16)`, bf16 after is `accelerate(pipe, dtype=torch.bfloat16)`.
fuse: The forward pass and a training step of small networks. Convolutions, most of the time, are the same on both sides.
Each side is in the memory format that is faster for it.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import common
import idioms
import torch
from torch import Tensor, nn

from ddpm_fast import accelerate, fuse
from ddpm_fast.nn import CIFAR10_32

PARITY = {"float32": 1e-3}  # of pixels in 0..1: a 255th is 4e-3
SIZE = 32
# Arguments besides sample_size and layers_per_block.
NETWORKS: dict[str, dict[str, Any]] = {
    "UNet2DModel": {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    "UNet2DConditionModel": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 64,
    },
    "AutoencoderKL": {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
}

# --------------------------------------------------------------------------------------------------------- accelerate


def pipeline(kind: str, device: str) -> Any:
    """Return diffusers' pipeline around the CIFAR-10 network, without its progress bar."""
    library = idioms.diffusers()
    network = idioms.diffusers_unet(idioms.random_unet(CIFAR10_32))
    pipe = getattr(library, f"{kind}Pipeline")(unet=network, scheduler=getattr(library, f"{kind}Scheduler")())
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def choose_format(pipe: Any, batch: int) -> str:
    """Put the network in the memory format in which one evaluation is faster."""
    x = torch.randn(batch, 3, SIZE, SIZE).to(pipe.device, pipe.unet.dtype)

    def make(memory_format: torch.memory_format) -> Callable[[], object]:
        return partial(copy.deepcopy(pipe.unet).to(memory_format=memory_format), x, 500)

    with torch.inference_mode():
        best, _ = common.fastest_format(make, pipe.device)
    pipe.unet.to(memory_format=common.FORMATS[best])
    return best


def measure_accelerate(args: argparse.Namespace) -> None:
    run = common.Run(args.device, args.out)
    for name in args.dtypes:
        dtype = common.DTYPES[name]
        pipes = {side: pipeline(args.pipeline, args.device) for side in ("before", "after")}
        pipes["before"].to(dtype=dtype)
        accelerate(pipes["after"], dtype=dtype)
        formats = {"before": choose_format(pipes["before"], args.batch), "after": "channels_last"}
        images: dict[str, Tensor] = {}

        def call(side: str, steps: int, pipes: dict[str, Any] = pipes, images: dict[str, Tensor] = images) -> None:
            generator = torch.Generator().manual_seed(0)
            result = pipes[side](args.batch, generator, num_inference_steps=steps, output_type="pt")
            images[side] = result.images

        for side in pipes:
            call(side, 2)  # warms up
        times = common.compare(
            {side: partial(call, side, args.steps) for side in pipes}, args.device, warm=True, min_rounds=args.rounds
        )
        difference = (images["after"].float() - images["before"].float()).abs()
        if not difference.max() <= PARITY.get(name, 1):
            raise AssertionError(f"images differ by {float(difference.max()):.3g}: no speed is reported")
        rows: list[dict[str, object]] = [
            {
                "pipeline": f"{args.pipeline}Pipeline {side}",
                "dtype": name,
                "batch": args.batch,
                "steps": args.steps,
                "memory format": formats[side],
                "images/s": taken.per_second(args.batch),
                "ms a step": 1e3 * taken.spread.median / args.steps,
                "times as fast": taken.speedup_over(times["before"]),
                "largest difference of a pixel": float(difference.max()),
                "mean difference": float(difference.mean()),
            }
            for side, taken in times.items()
        ]
        section = f"pipeline_speed {args.pipeline} {name} batch {args.batch}, {args.steps} steps"
        run.save(section, rows, "diffusers' pipeline before and after accelerate: median [quartiles]")
    run.finish()


# --------------------------------------------------------------------------------------------------------------- fuse

Inputs = tuple[Tensor, ...]


def make_network(name: str, batch: int, dtype: torch.dtype, device: str) -> tuple[nn.Module, Inputs]:
    """Return a reproducible network and its inputs."""
    torch.manual_seed(0)
    config = {"sample_size": SIZE, "layers_per_block": 1, "block_out_channels": (64, 128)} | NETWORKS[name]
    model = getattr(idioms.diffusers(), name)(**config)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    inputs: Inputs = (torch.randn(batch, model.config.in_channels, SIZE, SIZE),)
    if name != "AutoencoderKL":
        inputs += (torch.randint(0, 1000, (batch,)),)
    if name == "UNet2DConditionModel":
        inputs += (torch.randn(batch, 16, config["cross_attention_dim"]),)
    return model.to(device, dtype).eval(), tuple(x.to(device, dtype if x.is_floating_point() else x.dtype) for x in inputs)


def forward(model: nn.Module, inputs: Inputs) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return model(*inputs).sample  # type: ignore[no-any-return]

    return call


def training_step(model: nn.Module, inputs: Inputs) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        (model(*inputs).sample - inputs[0]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def check(name: str, dtype: torch.dtype, device: str) -> tuple[str, float]:
    """Return how many norms are fused, and the largest relative difference of outputs.

    Raises:
        AssertionError: The fused network is less accurate than before, against float64.
    """
    truth = forward(*make_network(name, 2, torch.float64, device))()
    model, inputs = make_network(name, 2, dtype, device)
    before = forward(model, inputs)()
    report = fuse(model)
    after = forward(model, inputs)()
    common.require_parity(f"{name} in {dtype}, fused", after, before, truth)
    largest = float((after.double() - before.double()).abs().max() / before.double().abs().max())
    return f"{len(report.fused)} of {len(report.fused) + len(report.left)}", largest


def measure_fuse(args: argparse.Namespace) -> None:
    run = common.Run(args.device, args.out)
    for dtype in args.dtypes:
        rows: list[dict[str, object]] = []
        for name in args.networks:
            fused, largest = check(name, common.DTYPES[dtype], args.device)
            kinds: dict[str, Callable[[nn.Module, Inputs], Callable[[], object]]] = {
                "forward": forward,
                "training step": training_step,
            }
            for what, make_call in kinds.items():
                model, inputs = make_network(name, args.batch, common.DTYPES[dtype], args.device)

                def make(
                    memory_format: torch.memory_format,
                    model: nn.Module = model,
                    inputs: Inputs = inputs,
                    make_call: Callable[[nn.Module, Inputs], Callable[[], object]] = make_call,
                ) -> Callable[[], object]:
                    placed = tuple(x.contiguous(memory_format=memory_format) if x.dim() == 4 else x for x in inputs)
                    return make_call(copy.deepcopy(model).to(memory_format=memory_format), placed)  # type: ignore[call-overload]

                before_format, before = common.fastest_format(make, args.device)
                fuse(model)
                after_format, after = common.fastest_format(make, args.device)
                times = common.compare({"before": before, "after": after}, args.device, warm=True, min_rounds=args.rounds)
                rows.append(
                    {
                        **{"network": name, "dtype": dtype, "batch": args.batch},
                        **{"norms fused": fused, "largest difference": largest, "what": what},
                        "ms before": times["before"].ms.median,
                        "ms after": times["after"].ms.median,
                        "times as fast": times["after"].speedup_over(times["before"]),
                        "formats": f"{before_format}, {after_format}",
                    }
                )
        run.save(f"fuse_speed {dtype}", rows, "diffusers' networks before and after fuse: median [quartiles]")
    run.finish()


def main(arguments: Sequence[str] | None = None) -> None:
    commands = common.Commands(__doc__)
    pipe = commands.add("accelerate", measure_accelerate, "time a pipeline before and after accelerate")
    pipe.add_argument("--pipeline", choices=["DDPM", "DDIM"], default="DDPM", help="use this pipeline (DDPM)")
    pipe.add_argument("--steps", type=int, default=20, help="take this many steps (20)")
    fused = commands.add("fuse", measure_fuse, "time networks before and after fuse")
    fused.add_argument("--networks", choices=NETWORKS, nargs="+", default=list(NETWORKS), help="use these (all)")
    for parser, dtypes, batch, rounds in ((pipe, ["float32"], 16, 3), (fused, ["bf16"], 8, 9)):
        text = f"compute in these ({dtypes[0]})"
        parser.add_argument("--dtypes", choices=common.DTYPES, nargs="+", default=dtypes, help=text)
        parser.add_argument("--batch", type=int, default=batch, help=f"use this many images a call ({batch})")
        parser.add_argument("--rounds", type=int, default=rounds, help=f"time this many calls of each, in turns ({rounds})")
    commands.run(arguments)


if __name__ == "__main__":
    main()
