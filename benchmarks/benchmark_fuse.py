"""Time a forward pass and a training step of small networks of diffusers before and after `ddpm_fast.fuse`.

    python benchmarks/benchmark_fuse.py
    python benchmarks/benchmark_fuse.py --networks UNet2DModel --batch 16 --device cuda

Both sides have the same weights and take turns, each in the memory format that is faster for it. The convolutions, which take
most of the time, are the same. A training step is forward, loss, backward and fused AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import common
import idioms
import torch
from torch import Tensor, nn

from ddpm_fast import fuse

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

Inputs = tuple[Tensor, ...]


def make_network(name: str, batch: int, dtype: torch.dtype, device: str) -> tuple[nn.Module, Inputs]:
    """Return a reproducible network and its inputs."""
    torch.manual_seed(0)
    config = {"sample_size": SIZE, "layers_per_block": 1, "block_out_channels": (64, 128)} | NETWORKS[name]
    model = getattr(idioms.diffusers(), name)(**config)
    idioms.fill_zeros(model, std=0.1)
    inputs: Inputs = (torch.randn(batch, model.config.in_channels, SIZE, SIZE),)
    if name != "AutoencoderKL":
        inputs += (torch.randint(0, 1000, (batch,)),)
    if name == "UNet2DConditionModel":
        inputs += (torch.randn(batch, 16, config["cross_attention_dim"]),)
    return model.to(device, dtype).eval(), tuple(x.to(device, dtype if x.is_floating_point() else x.dtype) for x in inputs)


def forward(model: nn.Module, *inputs: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return model(*inputs).sample  # type: ignore[no-any-return]

    return call


def training_step(model: nn.Module, *inputs: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        (model(*inputs).sample - inputs[0]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


KINDS: dict[str, Callable[..., Callable[[], object]]] = {"forward": forward, "training step": training_step}


def check(name: str, dtype: torch.dtype, device: str) -> tuple[str, float]:
    """Return how many norms are fused, and the largest relative difference of outputs.

    Raises:
        AssertionError: The fused network is less accurate than before, against float64.
    """
    wide, wide_inputs = make_network(name, 2, torch.float64, device)
    model, inputs = make_network(name, 2, dtype, device)
    truth, before = forward(wide, *wide_inputs)(), forward(model, *inputs)()
    report = fuse(model)
    after = forward(model, *inputs)()
    common.require_parity(f"{name} in {dtype}, fused", after, before, truth)
    largest = float((after.double() - before.double()).abs().max() / before.double().abs().max())
    return f"{len(report.fused)} of {len(report.fused) + len(report.left)}", largest


def main(arguments: Sequence[str] | None = None) -> None:
    options: dict[str, dict[str, Any]] = {
        "--networks": {"choices": NETWORKS, "nargs": "+", "default": list(NETWORKS), "help": "use these (all)"},
        "--dtypes": {"choices": common.DTYPES, "nargs": "+", "default": ["bf16"], "help": "compute in these (bf16)"},
        "--batch": {"type": int, "default": 8, "help": "use this many images a call (8)"},
        "--rounds": {"type": int, "default": 9, "help": "time this many calls of each, in turns (9)"},
    }
    args = common.parse(__doc__, arguments, options)
    run = common.Run(args.device, args.out)
    for dtype in args.dtypes:
        rows: list[dict[str, object]] = []
        for name in args.networks:
            fused, largest = check(name, common.DTYPES[dtype], args.device)
            for what, make_call in KINDS.items():
                model, inputs = make_network(name, args.batch, common.DTYPES[dtype], args.device)
                before_format, before = common.fastest_format(make_call, model, *inputs)
                fuse(model)
                after_format, after = common.fastest_format(make_call, model, *inputs)
                times = common.compare({"before": before, "after": after}, args.device, warm=True, min_rounds=args.rounds)
                row: dict[str, object] = {"network": name, "dtype": dtype, "batch": args.batch, "norms fused": fused}
                row |= {"largest difference": largest, "what": what}
                row |= {f"ms {side}": taken.ms.median for side, taken in times.items()}
                row |= {"times as fast": times["after"].speedup_over(times["before"])}
                rows.append(row | {"formats": f"{before_format}, {after_format}"})
        run.save(f"fuse_speed {dtype}", rows, "diffusers' networks before and after fuse: median [quartiles]")
    run.finish()


if __name__ == "__main__":
    main()
