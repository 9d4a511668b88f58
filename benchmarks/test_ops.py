"""Every benchmark case of `ddpm_fast.testing` in every backend, beside eager PyTorch and torch.compile, under pytest-benchmark.

    pytest benchmarks/test_ops.py --benchmark-enable
    pytest benchmarks/test_ops.py --benchmark-enable --benchmark-json=ops.json -k "group_norm_silu and bf16"

Parity comes first: a contestant whose results are wrong fails and is not timed. Without --benchmark-enable parity is all that
is done. The JSON's extra_info has ms, GB/s (of the bytes that a fused kernel has to move) and the share of the speed of a
copy of as many bytes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import common
import contestants
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from ddpm_fast.ops import BACKENDS, why_not
from ddpm_fast.testing import CASES, Case, bytes_moved, make_call

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYOUTS = {  # the other ops see memory as it lies
    "group_norm_silu": ("contiguous", "channels_last"),
    "group_norm_affine": ("channels_last",),
    "conv3x3": ("channels_last",),
}
BACKWARD = ("group_norm_silu", "denoising_loss", "conv3x3", "attention")  # ops with a backward kernel


def _parameters() -> Iterator[Any]:
    for case in (case for case in CASES if case.benchmark):
        for dtype in common.DTYPES:
            for layout in LAYOUTS.get(case.op, ("contiguous",)):
                for direction in ("forward", "backward") if case.op in BACKWARD else ("forward",):
                    backends = [f for f in BACKENDS if why_not(f, case.op, DEVICE, common.DTYPES[dtype]) is None]
                    for by in (*backends, *contestants.PEERS):
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
        function = contestants.contestant(call, case, by)
        contestants.check(function, call, case, by, direction)
        run = contestants.forward if direction == "forward" else contestants.backward
        timed = run(function, call)
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


def _synchronised(function: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        function()
        torch.cuda.synchronize()

    return run
