"""Every benchmark case of `ddpm_fast.testing` in every family, beside eager PyTorch and torch.compile, under pytest-benchmark.

    pytest benchmarks/test_ops.py --benchmark-enable
    pytest benchmarks/test_ops.py --benchmark-enable --benchmark-json=ops.json -k "group_norm_silu and bf16"

Parity comes first: a contestant whose results are wrong fails and is not timed. Without --benchmark-enable parity is all that
is done. The JSON's extra_info has ms, GB/s (of the bytes that a fused kernel has to move) and the share of the speed of a
copy of as many bytes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import common
import peers
import pytest
import torch
import torch._functorch.config
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from ddpm_fast import SamplingPlan
from ddpm_fast.ops.backend import FAMILIES, why_not
from ddpm_fast.reference import STREAM_Q_SAMPLE
from ddpm_fast.reference import noise as reference_noise
from ddpm_fast.testing import CASES, SCHEDULE, Call, Case, bytes_moved, make_call

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYOUTS = {"group_norm_silu": ("contiguous", "channels_last")}  # the other ops see memory as it lies
BACKWARD = ("group_norm_silu", "denoising_loss")  # ops with a backward kernel
PEERS = ("eager", "compile")

torch._functorch.config.donated_buffer = False  # a compiled backward pass is repeated


def _parameters() -> Iterator[Any]:
    for case in (case for case in CASES if case.benchmark):
        for dtype in common.DTYPES:
            for layout in LAYOUTS.get(case.op, ("contiguous",)):
                for direction in ("forward", "backward") if case.op in BACKWARD else ("forward",):
                    families = [f for f in FAMILIES if why_not(f, case.op, DEVICE, common.DTYPES[dtype]) is None]
                    for by in (*families, *PEERS):
                        words = (str(case), dtype, *((layout,) if case.op in LAYOUTS else ()), direction, by)
                        yield pytest.param(case, dtype, layout, direction, by, id="-".join(words))


@pytest.mark.parametrize(("case", "dtype", "layout", "direction", "by"), list(_parameters()))
def test_op(
    case: Case,
    dtype: str,
    layout: str,
    direction: str,
    by: str,
    benchmark: BenchmarkFixture,
    measured: list[dict[str, object]],
) -> None:
    call = make_call(case, common.DTYPES[dtype], DEVICE, channels_last=layout == "channels_last")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        function = _contestant(call, case, by)
        _check(function, call, case, by, direction)
        timed = _backward(function, call) if direction == "backward" else _forward(function, call)
    benchmark.group = f"{case} {dtype} {layout} {direction}"
    benchmark(timed if DEVICE.type == "cpu" else _synchronised(timed))
    if benchmark.stats is None:  # only parity was asked for
        return
    seconds = benchmark.stats.stats.median
    moved = bytes_moved(case, common.DTYPES[dtype], backward=direction == "backward")
    figures = {
        "ms": 1e3 * seconds,
        "GB/s": moved / seconds / 1e9,
        "copy": moved / seconds / common.copy_bandwidth(moved, DEVICE),
    }
    benchmark.extra_info.update(figures, commit=common.commit(), device=common.device_name(DEVICE))
    measured.append({"case": str(case), "dtype": dtype, "layout": layout, "direction": direction, "by": by, **figures})


Contestant = Callable[..., Tensor]


def _contestant(call: Call, case: Case, by: str) -> Contestant:
    """A function of the case's floating tensors, by name: an op in one family, or a peer's idiom for it."""
    if by in FAMILIES:

        def op(**tensors: Tensor) -> Tensor:
            return replace(call, arguments={**call.arguments, **tensors})(by)[0]

        return op
    idiom = _idiom(call, case)
    if by == "compile":
        torch._dynamo.reset()
        return torch.compile(idiom, dynamic=False)
    return idiom


def _idiom(call: Call, case: Case, epsilon: Tensor | None = None) -> Contestant:
    """What people write; it draws its own noise unless `epsilon` is given."""
    arguments = call.arguments
    if case.op == "noise":
        like = torch.empty(arguments["shape"], dtype=arguments["dtype"], device=DEVICE)
        return lambda: torch.randn_like(like) if epsilon is None else epsilon.to(like.dtype)
    if case.op == "q_sample":
        alpha_bars = SCHEDULE.alpha_bars.to(DEVICE, torch.float64 if _is_wide(call) else torch.float32)
        return lambda x_0: peers.q_sample(x_0, arguments["t"], alpha_bars, _like(epsilon, x_0))
    if case.op == "reverse_step":
        plan: SamplingPlan = arguments["plan"]
        row = plan.coefficients[int(arguments["step"])].tolist()
        return lambda x_t, model_output: peers.reverse_step(x_t, model_output, row, _like(epsilon, x_t))
    if case.op == "denoising_loss":  # its noise was drawn before, for x_t
        given = torch.randn_like(arguments["x_0"]) if epsilon is None else epsilon
        return lambda model_output, x_0: peers.denoising_loss(model_output, given.to(model_output.dtype))
    fixed = {name: arguments[name] for name in ("num_groups", "eps", "activation")}
    return lambda **tensors: peers.group_norm_silu(**fixed, **tensors)


def _like(epsilon: Tensor | None, x: Tensor) -> Tensor | None:
    return None if epsilon is None else epsilon.to(x.dtype)


def _is_wide(call: Call) -> bool:
    return any(tensor.dtype == torch.float64 for tensor in call.tensors.values())


def _forward(function: Contestant, call: Call) -> Callable[[], object]:
    tensors = call.tensors

    def run() -> Tensor:
        with torch.no_grad():
            return function(**tensors)

    return run


def _backward(function: Contestant, call: Call) -> Callable[[], tuple[Tensor, ...]]:
    """The gradients of a result that was computed before."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in call.tensors.items() if name != "x_0"}
    result = function(**{**call.tensors, **leaves})
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(result.shape, generator=generator, dtype=torch.float64).to(DEVICE, result.dtype)
    cotangent = torch.empty_like(result).copy_(cotangent)  # in the memory format of the result
    return lambda: torch.autograd.grad(result, list(leaves.values()), cotangent, retain_graph=True)


def _check(function: Contestant, call: Call, case: Case, by: str, direction: str) -> None:
    """Families, and the idiom given their noise, are compared with float64; a compiled idiom draws noise like no other."""
    wide = call.map(lambda x: x.double())
    epsilon = None
    if case.op != "group_norm_silu":
        stream = STREAM_Q_SAMPLE
        if case.op in ("noise", "reverse_step"):
            stream = int(call.arguments["stream" if case.op == "noise" else "step"])
        epsilon = reference_noise(case.shape, call.arguments["seeds"].cpu(), stream, torch.float64).to(DEVICE)
    baseline, truth = _idiom(call, case, epsilon), _idiom(wide, case, epsilon)
    if by in PEERS and case.op != "group_norm_silu":
        function = torch.compile(baseline, dynamic=False) if by == "compile" else baseline
    run = _forward if direction == "forward" else _backward
    results = [run(f, c)() for f, c in ((function, call), (baseline, call), (truth, wide))]
    for got, allowed, true in zip(*((r,) if isinstance(r, Tensor) else r for r in results), strict=True):
        common.require_parity(f"{case} by {by}", got, allowed, true)


def _synchronised(function: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        function()
        torch.cuda.synchronize()

    return run
