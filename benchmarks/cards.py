"""The time that an op's kernels should take on four GPUs, predicted from their instructions. Nothing is measured.

A kernel takes as long as the slowest of three: its bytes at the card's bandwidth, its instructions at the issue rate, and its
special-function instructions (reciprocals, roots, exponentials) at an eighth of the full rate. A launch is added.
The issue efficiency is the share of the issue slots that a kernel fills. It is assumed, and no card has confirmed it.
All figures assume that load, compute and store overlap.
Instructions are those of tests/machine_code/budgets.json. tests/machine_code/native.py says which path of a kernel they count.
"""

from __future__ import annotations

import functools
import math
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import common
from works import Work

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent / "csrc"
BUDGETS = HERE.parent / "tests/machine_code/budgets.json"


@dataclass(frozen=True)
class Card:
    """Figures of a data sheet, in bytes, Hz and bytes/s. The clock is that of its dense bf16 rate.

    Attributes:
        architecture: Architecture of the machine code that it runs.
        cluster: Blocks that can share their shared memory, as in csrc/cuda/launch.h.
        device: Name by which the driver knows it. Other products of that name have other figures.
    """

    name: str
    bandwidth: float
    multiprocessors: int
    clock: float
    architecture: str
    cluster: int
    device: str = ""
    flops: int = 4096  # dense bf16 operations of a multiprocessor in a clock

    @property
    def dense(self) -> float:
        """Dense bf16 operations a second."""
        return self.multiprocessors * self.clock * self.flops


CARDS = (
    # A100 80GB SXM data sheet: 2039 GB/s, 312 Tflop/s dense bf16 = 108 x 2048 x 1.41 GHz; GA100 whitepaper: 108 SMs.
    Card("A100", 2.039e12, 108, 1.41e9, "sm_80", 1, "NVIDIA A100-SXM4-80GB", 2048),
    # H100 SXM data sheet: 3.35 TB/s, 989 Tflop/s dense bf16 = 132 x 4096 x 1.83 GHz; GH100 whitepaper: 132 SMs.
    Card("H100", 3.35e12, 132, 1.83e9, "sm_90a", 16, "NVIDIA H100 80GB HBM3"),
    # H200 SXM data sheet: 4.8 TB/s, the H100's multiprocessors and clocks.
    Card("H200", 4.8e12, 132, 1.83e9, "sm_90a", 16, "NVIDIA H200"),
    # B200 (HGX data sheet): 8 TB/s, 2.25 Pflop/s dense bf16 = 148 x 8192 x 1.86 GHz; 148 SMs as the driver says.
    Card("B200", 8.0e12, 148, 1.86e9, "sm_100", 16, "NVIDIA B200", 8192),
)
# The share of the bandwidth that the best kernels reach: 3.0 of 3.35 TB/s on an H100 (softmax, RMSNorm of Dao-AILab/quack).
ATTAINABLE = 0.90
# Assumed, not measured: instructions wait for their operands, and a scheduler does not always have another warp that is ready.
ISSUE_EFFICIENCY = 0.85  # share of the issue slots
ISSUED_PER_CLOCK = 128  # lanes: four schedulers of a multiprocessor, a warp of 32 each
MUFU_PER_CLOCK = 16  # CUDA C++ programming guide, arithmetic instructions: the same for compute capability 8.0, 9.0, 10.0
VECTOR_BYTES = 16
LAUNCH = 1.3e-6  # a tiny kernel in a CUDA graph: 1.23 us published for one (sglang #6394)


class Pass(NamedTuple):
    """A launch: the kernel's name in the budgets, the bytes that it moves, the elements that it and its threads handle."""

    kernel: str
    moved: int
    elements: int
    of_thread: int = 1


# ------------------------------------------------------------------------------------------------------- which kernels

TYPES = {"float32": "float", "bf16": "BFloat16"}


def launches(work: Work, card: Card) -> list[Pass]:
    """Return the launches of an op. Kernels that handle a few numbers per sample count as a launch alone."""
    return list(_norm(work, card) if work.case.op == "group_norm_silu" else _elementwise(work))


def _elementwise(work: Work) -> Iterator[Pass]:
    case, kind = work.case, TYPES[work.dtype]
    kernel = f"{case.op}_backward" if work.direction == "backward" else case.op
    types = {
        "q_sample": [kind, "unsigned char" if case.options.get("uint8") else kind],
        "reverse_step": [kind, kind],
    }.get(case.op, [kind])
    staged = work.layout == "channels_last"  # noise is drawn in C, H, W order
    ways = [not staged, staged] if case.op == "reverse_step" else [staged]  # it has a kernel for calls without options
    arguments = [*types, *(str(way).lower() for way in ways)]
    yield Pass(f"{case.op} {kernel}_kernel<{', '.join(arguments)}>", work.moved, math.prod(case.shape))
    if kernel == "denoising_loss":  # sums of the tiles, and the mean over samples
        yield from [Pass("", 0, 0)] * 2


def _norm(work: Work, card: Card) -> Iterator[Pass]:
    source = "group_norm_silu_backward" if work.direction == "backward" else "group_norm_silu"
    elements = math.prod(work.case.shape)
    item = common.DTYPES[work.dtype].itemsize
    text = (SOURCES / f"cuda/{source}.cu").read_text(encoding="utf-8")
    # Vectors that a thread holds, few or many, and threads of a channels_last block.
    limits = [int(number) for number in re.findall(r"kLimits = \{(\d+), (\d+), (\d+)\}", text)[0]]
    n, c, *size = work.case.shape
    is_last, groups = int(work.layout == "channels_last"), int(work.case.options.get("groups", 32))  # as make_call
    items = vectors_of_a_thread(item, n, c, math.prod(size), is_last, groups, *limits, card.cluster)

    def kernel(vectors: int, which: int) -> str:
        return f"{source} {work.layout}_kernel<{TYPES[work.dtype]}, {vectors}, {which}>"

    of_thread = (items or limits[1]) * VECTOR_BYTES // item
    if items:
        yield Pass(kernel(items, 0), work.moved, elements, of_thread)
    else:  # all inputs are read once more
        yield Pass(kernel(limits[1], 1), work.moved - elements * item, elements, of_thread)
        yield Pass(kernel(limits[1], 2), work.moved, elements, of_thread)
    if work.direction == "backward":  # gradients of the parameters from sums over pixels
        yield Pass("", 0, 0)


# Asks the kernels' own rules, which are host C++ and need no CUDA with the emulator's headers.
TILING = """
#include <cstdlib>
#include <iostream>

#include "cuda/group_norm.h"

int main(int, char** words) {
  const auto next = [&] { return std::atoll(*++words); };
  using namespace ddpm_fast;
  const DType dtype = next() == 4 ? DType::kFloat32 : DType::kBFloat16;
  const Shape shape = {next(), next(), next(), next() != 0};
  const std::int64_t groups = next();
  const cuda::Limits limits = {static_cast<int>(next()), static_cast<int>(next()), static_cast<int>(next())};
  const auto tiling = cuda::TilingRules(dtype, shape, groups, limits, static_cast<int>(next())).tiling();
  if (!tiling) return 1;
  std::cout << (tiling->resident ? tiling->items : 0);
}
"""


@functools.cache
def vectors_of_a_thread(*arguments: int) -> int:
    """Return the vectors that a thread holds in a kernel that reads its input once, or 0 if a slice does not fit on chip.

    Args:
        arguments: Bytes of an element, n, c, hw, channels_last, groups, three limits, blocks of a cluster.
    """
    command = [_tiling_program(), *map(str, arguments)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@functools.cache
def _tiling_program() -> Path:
    program = HERE.parent / "build" / "predict_tiling"
    program.parent.mkdir(exist_ok=True)
    includes = [f"-I{HERE.parent / 'tests/emulator/include'}", f"-I{SOURCES}"]
    command = ["g++", "-std=c++20", *includes, "-x", "c++", "-", "-o", program]
    subprocess.run(command, check=True, input=TILING, text=True)
    return program


# ----------------------------------------------------------------------------------------------------------- prediction

Budgets = Mapping[str, Mapping[str, Mapping[str, float]]]


def _parts(launch: Pass, card: Card, budgets: Budgets, issue_efficiency: float) -> dict[str, float]:
    """Return the seconds that each part of the card needs for a launch. The slowest one binds.

    A thread runs the instructions of merges once, for all of its elements.
    """
    counted = budgets[launch.kernel][card.architecture] if launch.kernel else {"instructions": 0, "mufu": 0}
    instructions = counted["instructions"] + counted.get("merges", 0) / launch.of_thread
    lanes = card.multiprocessors * card.clock
    return {
        "memory": launch.moved / (ATTAINABLE * card.bandwidth),
        "issue": launch.elements * instructions / (ISSUED_PER_CLOCK * issue_efficiency * lanes),
        "MUFU": launch.elements * counted["mufu"] / (MUFU_PER_CLOCK * lanes),
    }


def predict(work: Work, card: Card, budgets: Budgets) -> tuple[float, str]:
    """Return the microseconds, and what binds most of them: memory, issue, MUFU or launch."""
    seconds = {"memory": 0.0, "issue": 0.0, "MUFU": 0.0, "launch": 0.0}
    for each in launches(work, card):
        parts = _parts(each, card, budgets, ISSUE_EFFICIENCY)
        slowest = max(parts, key=lambda name: parts[name])
        seconds[slowest] += parts[slowest]
        seconds["launch"] += LAUNCH
    return 1e6 * sum(seconds.values()), max(seconds, key=lambda name: seconds[name])


def allowed_share(work: Work, card: Card, budgets: Budgets) -> float:
    """Return the largest share of the copy bandwidth that the kernels' instructions and passes allow, launches left out.

    A copy of the bytes that must move takes the time of the memory. Every issue slot is used.
    """
    return work.moved / (ATTAINABLE * card.bandwidth) / busy_seconds(work, card, budgets, 1)


def busy_seconds(work: Work, card: Card, budgets: Budgets, issue_efficiency: float) -> float:
    """Return the time of an op's kernels, launches left out."""
    return sum(max(_parts(each, card, budgets, issue_efficiency).values()) for each in launches(work, card))
