"""Predicted time of every op of the native backend on four cards, from bytes and instructions: predicted, not measured.

    python benchmarks/predict.py            prints the tables and writes predicted.md and predicted.json

A kernel takes as long as the slowest of three things, and a launch comes on top of it: its bytes at the card's bandwidth, its
instructions at the rate at which the multiprocessors issue them, and those among them that are for the special-function unit
(reciprocals, roots, exponentials) at a fourth or an eighth of that. Instructions are those of tests/machine_code/budgets.json:
what the compiler made of the kernels, counted on their hot paths. Where benchmarks/results/ has a card's measurements, they
stand beside the prediction.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gpu_ops
from gpu_ops import Work

from ddpm_fast.atomic import write_json

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent / "csrc"
BUDGETS = HERE.parent / "tests/machine_code/budgets.json"


@dataclass(frozen=True)
class Card:
    """Figures of a data sheet; the clock is that of its dense bf16 rate.

    Attributes:
        bandwidth: of device memory, bytes/s.
        clock: Hz.
        l2: bytes.
        architecture: whose machine code it runs.
        cluster: blocks that can share their shared memory, as csrc/cuda/launch.h has it.
    """

    name: str
    bandwidth: float
    multiprocessors: int
    clock: float
    l2: int
    architecture: str
    cluster: int


CARDS = (
    # A100 80GB SXM data sheet: 2039 GB/s, 312 Tflop/s dense bf16 = 108 x 2048 x 1.41 GHz; GA100 whitepaper: 108 SMs, 40 MB L2.
    Card("A100", 2.039e12, 108, 1.41e9, 40 * 2**20, "sm_80", 1),
    # H100 SXM data sheet: 3.35 TB/s, 989 Tflop/s dense bf16 = 132 x 4096 x 1.83 GHz; GH100 whitepaper: 132 SMs, 50 MB L2.
    Card("H100", 3.35e12, 132, 1.83e9, 50 * 2**20, "sm_90a", 16),
    # H200 SXM data sheet: 4.8 TB/s, the H100's multiprocessors, clocks and L2.
    Card("H200", 4.8e12, 132, 1.83e9, 50 * 2**20, "sm_90a", 16),
    # B200 (HGX data sheet): 8 TB/s, 2.25 Pflop/s dense bf16 = 148 x 8192 x 1.86 GHz; 148 SMs and 126 MB L2 as the driver says.
    Card("B200", 8.0e12, 148, 1.86e9, 126 * 2**20, "sm_100", 16),
)
# Of the bandwidth, what the best kernels reach: 3.0 of 3.35 TB/s on an H100 (softmax and RMSNorm of Dao-AILab/quack).
ATTAINABLE = 0.90
ISSUED_PER_CLOCK = 128  # lanes: four schedulers of a multiprocessor, a warp of 32 each
MUFU_PER_CLOCK = 16  # CUDA C++ programming guide, arithmetic instructions: the same for compute capability 8.0, 9.0, 10.0
LAUNCH = 1.3e-6  # of a tiny kernel in a CUDA graph: 1.23 us published for one (sglang #6394)


class Pass(NamedTuple):
    """A launch: the kernel's name in the budgets, the bytes that it moves, the elements that it handles."""

    kernel: str
    moved: int
    elements: int


class Prediction(NamedTuple):
    microseconds: float
    bound: str  # memory, issue, MUFU or launch: what most of it is for
    passes: int  # over the input


# ------------------------------------------------------------------------------------------------------- which kernels

TYPES = {"float32": "float", "bf16": "BFloat16"}


def launches(work: Work, card: Card) -> list[Pass]:
    """What the op launches. Kernels that handle a few numbers a sample count as a launch alone."""
    return list(_norm(work, card) if work.case.op == "group_norm_silu" else _elementwise(work))


def _elementwise(work: Work) -> Iterator[Pass]:
    case, kind = work.case, TYPES[work.dtype]
    kernel = f"{case.op}_backward" if work.direction == "backward" else case.op
    types = {
        "q_sample": [kind, "unsigned char" if case.options.get("uint8") else kind],
        "reverse_step": [kind, kind],
    }.get(case.op, [kind])
    staged = work.channels_last  # noise is drawn in C, H, W order
    ways = [not staged, staged] if case.op == "reverse_step" else [staged]  # it has a kernel for calls without options
    arguments = [*types, *(str(way).lower() for way in ways)]
    yield Pass(f"{case.op} {kernel}_kernel<{', '.join(arguments)}>", work.moved, _product(case.shape))
    if kernel == "denoising_loss":  # sums of the tiles, and the mean over samples
        yield from [Pass("", 0, 0)] * 2


def _norm(work: Work, card: Card) -> Iterator[Pass]:
    source = "group_norm_silu_backward" if work.direction == "backward" else "group_norm_silu"
    layout = "channels_last" if work.channels_last else "contiguous"
    elements = _product(work.case.shape)
    item = 4 if work.dtype == "float32" else 2
    limits = _limits(source)
    n, c, *size = work.case.shape
    groups = int(work.case.options["groups"])
    items = vectors_of_a_thread(item, n, c, _product(size), int(work.channels_last), groups, *limits, card.cluster)

    def kernel(vectors: int, which: int) -> str:
        return f"{source} {layout}_kernel<{TYPES[work.dtype]}, {vectors}, {which}>"

    if items:
        yield Pass(kernel(items, 0), work.moved, elements)
    else:  # all inputs are read once more
        many = limits[1]
        yield Pass(kernel(many, 1), work.moved - elements * item, elements)
        yield Pass(kernel(many, 2), work.moved, elements)
    if work.direction == "backward":  # gradients of the parameters from sums over pixels
        yield Pass("", 0, 0)


def _limits(source: str) -> list[int]:
    """Of csrc/cuda/<source>.cu: vectors that a thread holds, few or many; threads of a channels_last block."""
    found = re.search(r"kLimits = \{(\d+), (\d+), (\d+)\}", (SOURCES / f"cuda/{source}.cu").read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"csrc/cuda/{source}.cu has no kLimits")
    return [int(number) for number in found.groups()]


# Asks the kernels' own rules, which are C++ of the host: with the headers of the emulator they need no CUDA.
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
    """Of a kernel that reads its input once; 0 where a slice of it does not fit on chip.

    Args:
        arguments: bytes of an element, n, c, hw, channels_last, groups, the three of `_limits`, blocks of a cluster.
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


def _product(sizes: Sequence[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


# ----------------------------------------------------------------------------------------------------------- prediction

Budgets = Mapping[str, Mapping[str, Mapping[str, float]]]


def predict(work: Work, card: Card, budgets: Budgets) -> Prediction:
    seconds = {"memory": 0.0, "issue": 0.0, "MUFU": 0.0, "launch": 0.0}
    total = 0.0
    passes = launches(work, card)
    for kernel, moved, elements in passes:
        of = budgets[kernel][card.architecture] if kernel else {"instructions": 0, "mufu": 0}
        lanes = card.multiprocessors * card.clock
        parts = {
            "memory": moved / (ATTAINABLE * card.bandwidth),
            "issue": elements * of["instructions"] / (ISSUED_PER_CLOCK * lanes),
            "MUFU": elements * of["mufu"] / (MUFU_PER_CLOCK * lanes),
        }
        slowest = max(parts, key=lambda name: parts[name])
        seconds[slowest] += parts[slowest]
        seconds["launch"] += LAUNCH
        total += parts[slowest] + LAUNCH
    bound = max(seconds, key=lambda name: seconds[name])
    return Prediction(1e6 * total, bound, sum(1 for each in passes if each.kernel))


def works() -> list[Work]:
    """What gpu_ops.py measures."""
    return [*gpu_ops.elementwise(), *gpu_ops.norms()]


def measured(folder: Path) -> dict[tuple[str, str], float]:
    """(card, comparison) -> microseconds of the native backend, from what gpu_ops.py left in the results."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        for benchmark in ("gpu_ops elementwise", "gpu_ops norms"):
            section: dict[str, Any] = results.get(benchmark, {"machine": {"device": ""}, "rows": []})
            device = section["machine"]["device"]
            cards = [card.name for card in CARDS if re.search(rf"\b{card.name}\b", device)]  # a GH200 is another card
            for row in section["rows"]:
                if cards and row["by"] == "native":
                    found[cards[0], _key(row)] = 1e3 * row["ms"]["median"]
    return found


def _key(row: Mapping[str, Any]) -> str:
    return " ".join(row[name] for name in ("op", "case", "shape", "dtype", "layout", "direction"))


def rows(budgets: Budgets, found: Mapping[tuple[str, str], float]) -> list[dict[str, Any]]:
    table = []
    for work in works():
        row: dict[str, Any] = {
            "op": work.case.op,
            "case": work.case.name,
            "shape": "x".join(map(str, work.case.shape)),
            "dtype": work.dtype,
            "layout": "channels_last" if work.channels_last else "contiguous",
            "direction": work.direction,
            "MB": round(work.moved / 1e6, 2),
        }
        key = _key(row)
        for card in CARDS:
            of = predict(work, card, budgets)
            row[card.name] = {
                "predicted us": float(f"{of.microseconds:.3g}"),
                "bound": of.bound,
                "passes": of.passes,
                "fits in L2": work.moved <= card.l2,
            }
            if (card.name, key) in found:
                row[card.name]["measured us"] = float(f"{found[card.name, key]:.3g}")
        table.append(row)
    return table


def _cell(of: Mapping[str, Any]) -> str:
    marks = (" two passes" if of["passes"] > 1 else "") + (" (L2)" if of["fits in L2"] else "")
    seen = f"**{of['measured us']:g} measured**, " if "measured us" in of else ""
    return f"{seen}{of['predicted us']:g} {of['bound']}{marks}"


def markdown(table: Sequence[Mapping[str, Any]], compiler: str) -> str:
    names = [card.name for card in CARDS]
    lines = [
        "# Predicted, not measured",
        "",
        "Microseconds of the native backend's ops, by `python benchmarks/predict.py`, which says how: predicted from bytes and",
        f"from the instructions that {compiler} made of the kernels. A figure that was measured says so. After it: what binds",
        "(memory, the issue of instructions, MUFU: the special-function unit, or the launch); where the kernel has to read its",
        "input twice; and (L2) where everything fits into that cache: the figure is for a cold one, and warm it is less.",
        "",
        f"Assumed: {ATTAINABLE:.0%} of the card's bandwidth, {1e6 * LAUNCH:g} us a launch (in a CUDA graph), and",
        "",
        "| card | TB/s | multiprocessors | GHz | L2, MB | code |",
        "|---|---|---|---|---|---|",
        *(
            f"| {c.name} | {c.bandwidth / 1e12:g} | {c.multiprocessors} | {c.clock / 1e9:g} | {c.l2 >> 20} | {c.architecture} |"
            for c in CARDS
        ),
    ]
    titles = {
        "Elementwise ops": lambda row: row["op"] != "group_norm_silu",
        "group_norm_silu over the norms of both networks, in bf16 and channels_last": lambda row: (
            row["op"] == "group_norm_silu" and row["dtype"] == "bf16" and row["layout"] == "channels_last"
        ),
    }
    for title, chosen in titles.items():
        lines += ["", f"## {title}", "", f"| op | MB | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
        for row in filter(chosen, table):
            words = [row["op"] if row["op"] != "group_norm_silu" else row["case"], row["shape"], row["dtype"]]
            words += ["of uint8"] if "uint8" in row["case"] else []
            words += [row["layout"]] if row["layout"] == "channels_last" else []
            words += ["backward"] if row["direction"] == "backward" else []
            cells = [_cell(row[name]) for name in names]
            lines.append(f"| {' '.join(words)} | {row['MB']:g} | {' | '.join(cells)} |")
    lines += ["", "The other layouts and dtypes are in predicted.json.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder for predicted.md and predicted.json")
    args = parser.parse_args()
    data = json.loads(BUDGETS.read_text(encoding="utf-8"))["native"]
    table = rows(data["kernels"], measured(HERE / "results"))
    text = markdown(table, data["compiler"])
    print(text)
    write_json(
        args.out / "predicted.json",
        {
            "what": "predicted, not measured; see predict.py",
            "compiler": data["compiler"],
            "cards": [asdict(card) for card in CARDS],
            "rows": table,
        },
    )
    (args.out / "predicted.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
