"""Time every case of tests/helpers/op_cases.py in every backend, beside eager PyTorch.

    python -m pytest benchmarks/ops
    python -m pytest benchmarks/ops -k "group_norm_silu and cifar and bf16" --benchmark-save=before

Results are checked first. Wrong results are a failure and have no time.
The device is the GPU, or the CPU if there is none or CUDA_VISIBLE_DEVICES is empty.

On a CPU, a time is that of one call. Caches are as warm as the tensors are small.
On a GPU, a time lasts until the device is idle, so it includes the launch. benchmark_ops.py times the kernels alone.
"backward" is the backward pass alone, after one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import common
import pytest
from benchmark_ops import DIRECTIONS, check, why_missing
from op_calls import make_call
from op_cases import CASES
from peers import OPS, has_idiom
from works import product

from ddpm_fast.ops import BACKENDS

DEVICE = common.visible_device()
WORKS = {(work.case.op, work.case.name, work.dtype, work.layout, work.direction): work for work in product(CASES)}


def parameters() -> list[Any]:
    """Return each comparison with each backend, without Triton's interpreter and eager code that is the reference's."""
    listed = []
    for fields, work in WORKS.items():
        is_short = not work.case.benchmark and (work.dtype, work.layout) == ("float32", "contiguous")
        for by in (*BACKENDS, "eager"):
            if (by == "triton" and DEVICE == "cpu") or (by == "eager" and not has_idiom(work.case)):
                continue
            listed.append(pytest.param(*fields, by, marks=[] if is_short else [pytest.mark.long_benchmark]))
    return listed


def until_idle(run: Callable[[], object]) -> Callable[[], None]:
    def run_and_wait() -> None:
        run()
        common.synchronize(DEVICE)

    return run_and_wait


@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used at all")  # the failed check before it says why
@pytest.mark.parametrize(("op", "case", "dtype", "layout", "direction", "by"), parameters())
def test_speed(op: str, case: str, dtype: str, layout: str, direction: str, by: str, benchmark: Any) -> None:
    work = WORKS[op, case, dtype, layout, direction]
    missing = why_missing(work, by, DEVICE)
    if missing is not None:
        pytest.skip(missing)
    call = make_call(work.case, common.DTYPES[dtype], DEVICE, channels_last=layout == "channels_last")
    function = OPS[by].build(call, work.case)
    check(by, function, work, call)
    benchmark.group = str(work)
    run = DIRECTIONS[direction](function, call)
    benchmark(run if DEVICE == "cpu" else until_idle(run))
