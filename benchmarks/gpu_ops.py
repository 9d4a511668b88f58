"""The ops on a GPU in every backend, beside eager PyTorch, torch.compile and, where installed, apex and Liger.

    python benchmarks/gpu_ops.py elementwise
    python benchmarks/gpu_ops.py norms --seconds 120

`elementwise`: noise, q_sample, reverse_step and denoising_loss, on tensors beyond the L2 cache and on a batch of CIFAR-10.
`norms`: group_norm_silu over the group norms of both networks of Ho et al. The most telling comparisons come first, and what
--seconds leaves no time for is left out and counted.

A call is recorded as a CUDA graph and timed by events with a cold L2, so it is the GPU's time that counts, not the host's.
For tensors that fit into L2 there is also the time of a call among 20 in one graph, which finds its inputs in L2. "host us" is
what the host spends on an eager call.
"""

from __future__ import annotations

import argparse
import gc
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import common
import contestants
import torch
from torch import Tensor
from unet_norms import EPS, GROUPS, sites

from ddpm_fast import ddpm_plan
from ddpm_fast.inference import cuda_graph
from ddpm_fast.nn import CIFAR10_32, HO_256, UNet
from ddpm_fast.ops import why_not
from ddpm_fast.testing import SCHEDULE, Call, Case, bytes_moved, make_call

BACKENDS = ("native", "triton")
CALLS_IN_GRAPH = 20


class Work(NamedTuple):
    """One comparison."""

    case: Case
    dtype: str
    channels_last: bool = False
    direction: str = "forward"

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        shape = "x".join(map(str, self.case.shape))
        return f"{self.case} {shape} {self.dtype} {layout} {self.direction}"

    @property
    def moved(self) -> int:
        """Bytes that a fused kernel reads and writes."""
        return bytes_moved(self.case, common.DTYPES[self.dtype], backward=self.direction == "backward")


def beyond_l2(num_bytes: int, device: str) -> bool:
    """Whether what a call moves is more than the card's cache could keep. A CPU's caches are taken for small."""
    if torch.device(device).type != "cuda":
        return num_bytes > 2 << 27
    return num_bytes > 2 * int(torch.cuda.get_device_properties(device).L2_cache_size)


def elementwise() -> Iterator[Work]:
    plan = ddpm_plan(SCHEDULE)
    for name, shape in (("beyond-l2", (256, 3, 256, 256)), ("cifar", (128, 3, 32, 32))):
        for dtype in common.DTYPES:
            yield Work(Case("reverse_step", name, shape, {"plan": plan}), dtype)
            yield Work(Case("q_sample", name, shape), dtype)
            yield Work(Case("noise", name, shape), dtype)
            for direction in ("forward", "backward"):
                yield Work(Case("denoising_loss", name, shape), dtype, direction=direction)
            yield Work(Case("q_sample", f"{name}-uint8", shape, {"uint8": True}), dtype)
            yield Work(Case("reverse_step", name, shape, {"plan": plan}), dtype, channels_last=True)


NETWORKS = {"cifar10-32": (CIFAR10_32, 64), "256x256": (HO_256, 8)}  # and the batch size


def norms() -> Iterator[Work]:
    """Both networks' group norms, each once: the layout and dtype of sampling and training first."""
    cases = []
    for name, (config, batch) in NETWORKS.items():
        with torch.device("meta"):
            model = UNet(**config)
        for site in sites(model, config["sample_size"], device="meta"):
            options = {"shift": site.shift, "activation": site.activation, "groups": GROUPS, "eps": EPS}
            fused = (" + time" if site.shift else "") + ("" if site.activation else ", no SiLU")
            cases.append(Case("group_norm_silu", name + fused, (batch, site.channels, site.height, site.width), options))
    for dtype in ("bf16", "float32"):
        for channels_last in (True, False):
            for direction in ("forward", "backward"):
                yield from (Work(case, dtype, channels_last, direction) for case in cases)


BATCHED = ("x", "x_0", "x_t", "model_output", "shift", "t", "seeds")
FEW = 2  # samples for parity; and what more samples are copies of, for random numbers take long to make


def inputs(work: Work, device: str, samples: int) -> tuple[Case, Call]:
    """The comparison's case and inputs, for a batch of `samples`."""
    few = replace(work.case, shape=(min(FEW, samples), *work.case.shape[1:]))
    call = make_call(few, common.DTYPES[work.dtype], device, channels_last=work.channels_last)
    memory_format = torch.channels_last if work.channels_last else torch.contiguous_format

    def repeated(tensor: Tensor) -> Tensor:
        many = tensor.repeat(-(-samples // len(tensor)), *[1] * (tensor.dim() - 1))[:samples]
        return many.contiguous(memory_format=memory_format) if tensor.dim() == 4 else many.contiguous()

    arguments = {name: repeated(value) if name in BATCHED else value for name, value in call.arguments.items()}
    case = replace(work.case, shape=(samples, *work.case.shape[1:]))
    return case, replace(call, arguments=arguments | ({"shape": case.shape} if "shape" in arguments else {}))


def measure(work: Work, device: str, seconds: float = 0.15) -> tuple[list[dict[str, object]], list[str]]:
    """A row for every contestant, parity comes first; and what went wrong with those that are left out."""
    on_gpu = torch.device(device).type == "cuda"
    beyond = beyond_l2(work.moved, device)
    run = contestants.forward if work.direction == "forward" else contestants.backward
    failures: list[str] = []
    calls: dict[str, Callable[[], object]] = {}
    host: dict[str, float] = {}
    timed: dict[str, str] = {}
    warm: dict[str, Callable[[], object]] = {}
    # A backward pass runs on the stream of its forward pass: that has to be the one that graphs are captured on.
    stream = torch.cuda.Stream(device) if on_gpu else None
    with torch.cuda.stream(stream), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        small, small_call = inputs(work, device, FEW)
        case, call = inputs(work, device, work.case.shape[0])
        names = [f for f in BACKENDS if why_not(f, case.op, torch.device(device), common.DTYPES[work.dtype]) is None]
        for name in (*names, *contestants.PEERS, *contestants.others(case, work.channels_last)):
            try:
                if name != "compile":  # it compiles what was checked as "eager"
                    contestants.check(contestants.contestant(small_call, small, name), small_call, small, name, work.direction)
                function = run(contestants.contestant(call, case, name), call)
                function()
                calls[name] = function
            except Exception as error:  # whatever it is, the others go on
                failures.append(f"{work} by {name}: {type(error).__name__}: {error}")
        calls["copy"] = common.copy_of(work.moved, device)
        for name, function in calls.items():
            timed[name] = "calls"
            if stream is None:
                continue
            host[name] = 1e6 * common.host_seconds(function, 20)
            try:
                calls[name] = common.graphed(function, stream)
                timed[name] = "graph"
                if not beyond:
                    warm[name] = common.graphed(function, stream, CALLS_IN_GRAPH)
            except cuda_graph.CaptureError as error:
                print(f"{work} by {name}: no graph, timed call by call: {error}")
    times = common.compare(calls, device, seconds=seconds)
    many = common.compare(warm, device, seconds=seconds) if warm else {}
    rows: list[dict[str, object]] = [
        {
            "op": case.op,
            "case": case.name,
            "shape": "x".join(map(str, case.shape)),
            "dtype": work.dtype,
            "layout": "channels_last" if work.channels_last else "contiguous",
            "direction": work.direction,
            "by": name,
            "beyond L2": beyond,
            "ms": common.Spread(*(1e3 * value for value in taken.spread)),
            "GB/s": work.moved / taken.spread.median / 1e9,
            "share of copy": taken.speedup_over(times["copy"]).median,
            "native is faster by": times["native"].speedup_over(taken) if "native" in times else None,
            "ms among 20": many[name].ms / CALLS_IN_GRAPH if name in many else None,
            "host us": host.get(name),
            "timed by": timed[name],
        }
        for name, taken in times.items()
    ]
    return rows, failures


LISTS: dict[str, Callable[[], Iterator[Work]]] = {"elementwise": elementwise, "norms": norms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=LISTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=600, help="after which no other comparison is begun")
    parser.add_argument(
        "--compile-only",
        type=int,
        nargs=2,
        metavar=("I", "N"),
        help="fill torch.compile's cache with every N-th from I, no more",
    )
    parser.add_argument("--out", type=Path, help="JSON file; default: benchmarks/results/<device>.json")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds

    works = list(LISTS[args.what]())
    if args.compile_only:
        first, step = args.compile_only
        for work in works[first::step]:
            case, call = inputs(work, args.device, work.case.shape[0])
            run = contestants.forward if work.direction == "forward" else contestants.backward
            run(contestants.contestant(call, case, "compile"), call)()
        return
    machine = common.machine(args.device)
    out = args.out or common.default_output(args.device)
    rows: list[dict[str, object]] = []
    failures: list[str] = []
    done = 0
    for work in works:
        if time.monotonic() > deadline:
            break
        try:
            measured, failed = measure(work, args.device)
        except Exception as error:
            measured, failed = [], [f"{work}: {type(error).__name__}: {error}"]
        rows += measured
        failures += failed
        common.record(out, f"gpu_ops {args.what}", machine, rows, quiet=True)
        done += 1
        gc.collect()
        torch.cuda.empty_cache()
    if rows:
        common.print_table("median [quartiles], cold L2", rows)
    common.finish(f"{done} of {len(works)} comparisons made; written: {out}", failures)


if __name__ == "__main__":
    main()
