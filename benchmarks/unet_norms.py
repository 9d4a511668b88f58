"""group_norm_silu over the group norms of the CIFAR-10 network of Ho et al., beside eager PyTorch and torch.compile.

    python benchmarks/unet_norms.py
    python benchmarks/unet_norms.py --dtype bf16 --batch 16 --direction backward

The shapes are those that the network's own norms see, each once; what they fuse (the time embedding, SiLU) is part of every
contestant. `floor` is a copy of the bytes that have to move: the input read and the output written once (backward: the input
and the gradient read, the gradient written).
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import common
import peers
import torch
import torch._functorch.config
from torch import Tensor, nn

from ddpm_fast import group_norm_silu
from ddpm_fast.nn import CIFAR10_32, UNet
from ddpm_fast.nn.layers import GroupNormSiLU

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
GROUPS, EPS = 32, 1e-6


class Site(NamedTuple):
    """A group norm of a network: its input [N, channels, height, width], and what is fused with it."""

    channels: int
    height: int
    width: int
    shift: bool
    activation: str | None

    def __str__(self) -> str:
        fused = (" + time" if self.shift else "") + (", SiLU" if self.activation else "")
        return f"{self.channels}x{self.height}x{self.width}{fused}"


def sites(model: nn.Module, size: int, device: str = "cpu") -> Counter[Site]:
    """The network's group norms, counted, in the order of evaluation."""
    seen: Counter[Site] = Counter()

    def see(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(module, GroupNormSiLU)
        assert (module.num_groups, module.eps) == (GROUPS, EPS)
        _, channels, height, width = args[0].shape
        seen[Site(channels, height, width, kwargs.get("shift") is not None, module.activation)] += 1

    for module in model.modules():
        if isinstance(module, GroupNormSiLU):
            module.register_forward_pre_hook(see, with_kwargs=True)
    with torch.no_grad():
        model(torch.zeros(1, 3, size, size, device=device), 0)
    return seen


class Call:
    """The inputs of one site, and its output and gradients by each contestant."""

    def __init__(self, site: Site, batch: int, layout: str, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

        self.site = site
        self.x = normal(batch, *site[:3]).contiguous(memory_format=LAYOUTS[layout])
        self.weight, self.bias = normal(site.channels) + 1, normal(site.channels)
        self.shift = normal(batch, site.channels) if site.shift else None
        self.grad_y = normal(*self.x.shape).contiguous(memory_format=LAYOUTS[layout])

    def tensors(self) -> list[Tensor]:
        return [self.x, self.weight, self.bias] + ([self.shift] if self.shift is not None else [])

    def ours(self, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None = None) -> Tensor:
        activation = "silu" if self.site.activation else None
        return group_norm_silu(x, GROUPS, weight, bias, EPS, shift=shift, activation=activation)  # type: ignore[arg-type]

    def eager(self, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None = None) -> Tensor:
        return peers.group_norm_silu(x, GROUPS, weight, bias, EPS, shift, self.site.activation)

    def forward(self, function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        tensors = self.tensors()

        def call() -> Tensor:
            with torch.no_grad():
                return function(*tensors)

        return call

    def backward(self, function: Callable[..., Tensor], dtype: torch.dtype | None = None) -> Callable[[], tuple[Tensor, ...]]:
        """Gradients of the input, weight, bias and shift; the forward pass is done once, here."""
        leaves = [tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in self.tensors()]
        y = function(*leaves)
        grad_y = self.grad_y.to(y.dtype)
        return lambda: torch.autograd.grad(y, leaves, grad_y, retain_graph=True)

    def check(self, contestants: dict[str, Callable[..., Tensor]], direction: str) -> None:
        wide = [tensor.double() for tensor in self.tensors()]
        names = ["x", "weight", "bias", "shift"][: len(wide)]
        for name, function in contestants.items():
            if direction == "forward":
                got, baseline, truth = self.forward(function)(), self.forward(self.eager)(), self.eager(*wide)
                common.require_parity(f"{name}, {self.site}", got, baseline, truth)
            else:
                grads = self.backward(function)(), self.backward(self.eager)(), self.backward(self.eager, torch.float64)()
                for what, got, baseline, truth in zip(names, *grads, strict=True):
                    common.require_parity(f"{name}, {self.site}, gradient of {what}", got, baseline, truth)


def measure(call: Call, direction: str, device: str, compiled: bool, seconds: float) -> dict[str, common.Times]:
    functions: dict[str, Callable[..., Tensor]] = {"ddpm_fast": call.ours, "eager": call.eager}
    if compiled:
        torch._dynamo.reset()
        functions["compile"] = torch.compile(call.eager, dynamic=False)
    call.check(functions, direction)
    contestants: dict[str, Callable[[], object]] = {
        name: call.forward(function) if direction == "forward" else call.backward(function)
        for name, function in functions.items()
    }
    contestants["floor"] = common.copy_of((2 if direction == "forward" else 3) * call.x.nbytes, device)
    return common.compare(contestants, device, seconds=seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--dtype", choices=common.DTYPES, nargs="+", default=list(common.DTYPES))
    parser.add_argument("--layout", choices=LAYOUTS, nargs="+", default=list(LAYOUTS))
    parser.add_argument("--direction", choices=["forward", "backward"], nargs="+", default=["forward", "backward"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=0.25, help="to spend on each comparison")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it takes seconds a shape)")
    parser.add_argument("--out", type=Path, help="JSON file; default: benchmarks/results/<device>.json")
    args = parser.parse_args()

    torch._functorch.config.donated_buffer = False  # the backward pass is repeated
    machine = common.machine(args.device)
    common.print_machine(machine)
    places = sites(UNet(**CIFAR10_32), CIFAR10_32["sample_size"])
    out = args.out or common.default_output(args.device)
    for direction in args.direction:
        for dtype in args.dtype:
            table: list[dict[str, object]] = []
            ratios: dict[tuple[object, str], dict[str, list[float]]] = {}
            for batch in args.batch:
                for layout in args.layout:
                    settings = {"direction": direction, "dtype": dtype, "batch": batch, "layout": layout}
                    for site, count in places.items():
                        call = Call(site, batch, layout, common.DTYPES[dtype], args.device)
                        times = measure(call, direction, args.device, not args.no_compile, args.seconds)
                        ours = times.pop("ddpm_fast")
                        row: dict[str, object] = {**settings, "norm": str(site), "sites": count, "ms": ours.ms}
                        row |= {f"{name} ms": taken.ms for name, taken in times.items()}
                        row |= {f"vs {name}": ours.speedup_over(taken) for name, taken in times.items() if name != "floor"}
                        row["share of copy speed"] = ours.speedup_over(times["floor"]).median
                        table.append(row)
                        for name, taken in times.items():
                            for key in ((batch, layout), ("all", "all")):
                                ratios.setdefault(key, {}).setdefault(name, []).append(ours.speedup_over(taken).median)
            means = [
                {"direction": direction, "dtype": dtype, "batch": batch, "layout": layout, "shapes": len(of["eager"])}
                | {f"vs {name}": common.geometric_mean(values) for name, values in of.items() if name != "floor"}
                | {"lowest vs eager": min(of["eager"]), "share of copy speed": common.geometric_mean(of["floor"])}
                for (batch, layout), of in sorted(ratios.items(), key=lambda item: item[0] == ("all", "all"))
            ]
            common.print_table("every norm: medians [quartiles]; vs: how many times faster ddpm_fast is", table)
            common.print_table("geometric means", means)
            common.record(out, f"unet_norms {direction} {dtype}", machine, means + table)


if __name__ == "__main__":
    main()
