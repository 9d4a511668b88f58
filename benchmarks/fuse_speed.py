"""Time of a forward pass and of a training step of diffusers' networks before and after `ddpm_fast.fuse`.

    python benchmarks/fuse_speed.py
    python benchmarks/fuse_speed.py --network UNet2DModel --batch 16 --dtype float32 --device cuda

The networks are small ones of their kind with random weights. A training step is forward, loss, backward and fused AdamW. Both
sides run the same weights in the same process, in turns, each in the memory format in which it is the faster; no other code of
diffusers changes, so the convolutions, which are most of the time, are the same.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor, nn

from ddpm_fast import fuse

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SIZE = 32
_COMMON: dict[str, Any] = {"sample_size": SIZE, "layers_per_block": 1}
# name -> (configuration, channels of its input).
NETWORKS: dict[str, tuple[dict[str, Any], int]] = {
    "UNet2DModel": (
        {
            "block_out_channels": (64, 128),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        3,
    ),
    "UNet2DConditionModel": (
        {
            "block_out_channels": (64, 128),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 64,
        },
        4,
    ),
    "AutoencoderKL": (
        {
            "block_out_channels": (64, 128),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        },
        3,
    ),
}


def make(name: str, batch: int, dtype: torch.dtype, device: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network and its inputs, reproducible."""
    import diffusers

    torch.manual_seed(0)
    config, channels = NETWORKS[name]
    model = getattr(diffusers, name)(**_COMMON, **config)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    inputs: tuple[Tensor, ...] = (torch.randn(batch, channels, SIZE, SIZE),)
    if name != "AutoencoderKL":
        inputs += (torch.randint(0, 1000, (batch,)),)
    if name == "UNet2DConditionModel":
        inputs += (torch.randn(batch, 16, config["cross_attention_dim"]),)
    inputs = tuple(x.to(device, dtype if x.is_floating_point() else x.dtype) for x in inputs)
    return model.to(device, dtype).eval(), inputs


def forward(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return model(*inputs).sample  # type: ignore[no-any-return]

    return call


def training_step(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        (model(*inputs).sample - inputs[0]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def check(name: str, dtype: torch.dtype, device: str) -> tuple[int, int, float]:
    """As right as before, against float64. Returns norms fused, norms, and the largest relative difference of the outputs."""
    truth_model, truth_inputs = make(name, 2, torch.float64, device)
    truth = forward(truth_model, truth_inputs)()
    model, inputs = make(name, 2, dtype, device)
    before = forward(model, inputs)()
    report = fuse(model)
    after = forward(model, inputs)()
    common.require_parity(f"{name} in {dtype}, fused", after, before, truth)
    largest = float((after.double() - before.double()).abs().max() / before.double().abs().max())
    return len(report.fused), len(report.fused) + len(report.left), largest


def fastest_format(
    what: Callable[[nn.Module, tuple[Tensor, ...]], Callable[[], object]], model: nn.Module, inputs: tuple[Tensor, ...]
) -> tuple[str, Callable[[], object]]:
    """The memory format that suits the contestant, and its call in it, warmed up."""
    candidates = {}
    for key, memory_format in FORMATS.items():
        network = copy.deepcopy(model).to(memory_format=memory_format)  # type: ignore[call-overload]
        placed = tuple(x.contiguous(memory_format=memory_format) if x.dim() == 4 else x for x in inputs)
        candidates[key] = what(network, placed)
        candidates[key]()
    trial = common.compare(candidates, inputs[0].device, warm=True, min_rounds=3, seconds=0.2)
    best = min(trial, key=lambda key: trial[key].ms)
    return best, candidates[best]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, nargs="+", default=list(NETWORKS))
    parser.add_argument("--dtype", choices=common.DTYPES, nargs="+", default=["bf16"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each, in turns")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file; default: benchmarks/results/<device>.json")
    args = parser.parse_args()

    machine = common.machine(args.device)
    common.print_machine(machine)
    for dtype in args.dtype:
        rows: list[dict[str, object]] = []
        for name in args.network:
            fused, norms, largest = check(name, common.DTYPES[dtype], args.device)
            for what, make_call in {"forward": forward, "training step": training_step}.items():
                model, inputs = make(name, args.batch, common.DTYPES[dtype], args.device)
                before_format, before = fastest_format(make_call, model, inputs)
                fuse(model)
                after_format, after = fastest_format(make_call, model, inputs)
                times = common.compare({"before": before, "after": after}, args.device, warm=True, min_rounds=args.rounds)
                rows.append(
                    {
                        "network": name,
                        "dtype": dtype,
                        "batch": args.batch,
                        "norms fused": f"{fused} of {norms}",
                        "largest difference": largest,
                        "what": what,
                        "ms before": times["before"].ms,
                        "ms after": times["after"].ms,
                        "times as fast": times["after"].speedup_over(times["before"]),
                        "formats": f"{before_format}, {after_format}",
                    }
                )
        common.print_table("diffusers' networks before and after fuse: median [quartiles]", rows)
        common.record(args.out or common.default_output(args.device), f"fuse_speed {dtype}", machine, rows)


if __name__ == "__main__":
    main()
