"""What gpu_check.py's measurements amount to: the goals, met or not, and the roofline picture.

python benchmarks/gpu_report.py benchmarks/results/nvidia-h100-80gb-hbm3.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import common

Results = Mapping[str, Any]  # as `common.record` writes them
Row = Mapping[str, Any]


def rows_of(results: Results, benchmark: str) -> list[Row]:
    rows: list[Row] = results.get(benchmark, {}).get("rows", [])
    return rows


def _median(value: Any) -> float:
    return float(value["median"] if isinstance(value, Mapping) else value)


def _goal(what: str, wanted: float, values: Iterable[float], *, mean: bool = False) -> dict[str, object]:
    """Met by the lowest of the values or, with `mean`, by their geometric mean."""
    values = list(values)
    measured = (common.geometric_mean(values) if mean else min(values)) if values else None
    verdict = "not measured" if measured is None else "pass" if measured >= wanted else "FAIL"
    kind = "geometric mean" if mean else "lowest"
    return {
        "goal": what,
        "at least": wanted,
        "measured": measured,
        "which is": f"the {kind} of {len(values)}",
        "verdict": verdict,
    }


def goals(results: Results) -> list[dict[str, object]]:
    """The project's goals for an H100 or H200; on another card they say how it compares."""
    elementwise, norms = rows_of(results, "gpu_ops elementwise"), rows_of(results, "gpu_ops norms")
    native = [row for row in elementwise if row["by"] == "native" and row["beyond L2"] and row["dtype"] == "float32"]
    found = [
        _goal("elementwise ops in float32 beyond L2: share of copy bandwidth", 0.88, (row["share of copy"] for row in native))
    ]
    for direction, wanted in (("forward", 0.80), ("backward", 0.70)):
        of = [row for row in norms if row["by"] == "native" and row["beyond L2"] and row["direction"] == direction]
        found.append(
            _goal(
                f"group_norm_silu {direction} beyond L2: share of the one-pass floor", wanted, (r["share of copy"] for r in of)
            )
        )
    for direction in ("forward", "backward"):
        of = [r for r in norms if r["by"] == "compile" and r["direction"] == direction and r["native is faster by"] is not None]
        ratios = [_median(row["native is faster by"]) for row in of]
        found.append(_goal(f"group_norm_silu {direction}: times faster than torch.compile", 1.5, ratios, mean=True))
    eager: dict[tuple[str, int], float] = {}
    compiled: dict[tuple[str, int], float] = {}
    peer = "diffusers"
    for row in rows_of(results, "gpu_sampling"):
        key, ratio = (row["network"], row["batch"]), _median(row["ddpm_fast is faster by"])
        name, _, how = row["sampler"].partition(", ")
        peer = name if how else peer
        if how == "eager":
            eager[key] = ratio
        elif how:
            compiled[key] = min(ratio, compiled.get(key, ratio))
    found.append(_goal(f"sampling in bf16: times faster than {peer}, eager", 2.0, eager.values()))
    found.append(_goal(f"sampling in bf16: times faster than the best torch.compile of {peer}", 1.15, compiled.values()))
    return found


def roofline(results: Results, path: Path) -> None:
    """Every op's GB/s over the bytes that it moves; the roof is a copy of as many bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [*rows_of(results, "gpu_ops elementwise"), *rows_of(results, "gpu_ops norms")]
    points: dict[str, list[tuple[float, float]]] = {}
    roof: dict[float, float] = {}  # of each size, the fastest copy
    for row in rows:
        moved = float(f"{row['GB/s'] * _median(row['ms']) / 1e3:.3g}")  # GB, from rounded numbers
        if row["by"] == "copy":
            roof[moved] = max(row["GB/s"], roof.get(moved, 0))
        elif row["by"] in ("native", "eager", "compile"):
            kind = row["op"] if row["by"] == "native" else {"eager": "eager PyTorch", "compile": "torch.compile"}[row["by"]]
            points.setdefault(kind, []).append((moved, row["GB/s"]))
    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    if roof:
        axes.plot(*zip(*sorted(roof.items()), strict=True), color="black", label="copy of as many bytes: the roof")
    for kind, values in points.items():
        x, y = zip(*values, strict=True)
        if kind in ("eager PyTorch", "torch.compile"):
            axes.scatter(x, y, s=10, color="tab:gray" if kind == "torch.compile" else "lightgray", label=kind)
        else:
            axes.scatter(x, y, s=24, label=f"{kind}, native")
    axes.set(xscale="log", yscale="log", xlabel="GB that have to move", ylabel="GB/s, cold L2")
    name = next(iter(results.values()))["machine"]["device"] if results else ""
    axes.set_title(f"The ops under the roof of a copy: {name}", fontsize="medium")
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def report(path: Path) -> list[dict[str, object]]:
    """Prints the goals, records them in the file, and draws the picture beside it."""
    results = json.loads(path.read_text(encoding="utf-8"))
    found = goals(results)
    common.print_table("goals", found)
    machine: dict[str, Any] = next((section["machine"] for section in results.values() if "machine" in section), {})
    common.record(path, "goals", machine, found, quiet=True)
    picture = path.with_name(f"{path.stem}_roofline.png")
    if not (rows_of(results, "gpu_ops elementwise") or rows_of(results, "gpu_ops norms")):
        print("no picture: no op was measured")
    elif importlib.util.find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed")
    else:
        roofline(results, picture)
        print(f"written: {picture}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    report(parser.parse_args().results)
