"""The budgets of every kernel's machine code, and the table of what is there.

    python tests/machine_code/budgets.py            prints the kernels as a Markdown table
    python tests/machine_code/budgets.py --update   writes budgets.json from what is there: look at its diff

A budget is what the kernel had when somebody last looked: `complaints` finds what got worse, and what got better without the
budget following. Budgets hold for the compilers that they were made with; another compiler's code may exceed them somewhat.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import native
import triton_cases
from figures import Figures

FILE = Path(__file__).with_name("budgets.json")
UPDATE = "python tests/machine_code/budgets.py --update"
# Whole numbers are absolute, fractions relative.
SLACK = {"registers": 2, "instructions": 0.03, "mufu": 0.03, "wide": 2, "merges": 0.03}
COUNTED = {"native": native.COUNTED, "triton": triton_cases.COUNTED}  # the path that instructions, mufu and wide are of
ANOTHER_COMPILER = 0.25  # that a figure may be worse by

Found = Mapping[str, Mapping[str, Figures]]  # kernel -> architecture -> figures
Budgets = Mapping[str, Mapping[str, Mapping[str, float]]]


def load(backend: str) -> tuple[str, Budgets]:
    """The compiler that a backend's budgets hold for, and the budgets."""
    data = json.loads(FILE.read_text(encoding="utf-8"))[backend]
    return data["compiler"], data["kernels"]


def complaints(found: Found, budgets: Budgets, *, same_compiler: bool = True, whole: bool = True) -> Iterator[str]:
    """Yield what is wrong, a sentence each.

    Args:
        found: Figures of what was compiled.
        budgets: What is allowed.
        same_compiler: The budgets were written with this compiler.
        whole: `found` has every kernel, so a budget without one is wrong too. Architectures may be missing.
    """
    for kernel, of in found.items():
        for architecture, figures in of.items():
            where = f"{kernel} on {architecture}"
            if figures.spills:
                yield f"{where}: {figures.spills} accesses to local memory"
            if figures.atomics:
                yield f"{where}: {figures.atomics} atomic operations"
            budget = budgets.get(kernel, {}).get(architecture)
            if budget is None:
                yield f"{where} has no budget"
                continue
            for name in SLACK:
                yield from _compare(f"{where}: {name}", getattr(figures, name), budget.get(name, 0), name, same_compiler)
    architectures = {architecture for of in found.values() for architecture in of}
    for kernel, of_kernel in budgets.items() if whole else ():
        for architecture in architectures & of_kernel.keys() - found.get(kernel, {}).keys():
            yield f"{kernel} on {architecture}: a budget without a kernel"


def _compare(what: str, figure: float, budget: float, name: str, same_compiler: bool) -> Iterator[str]:
    slack = SLACK[name] if SLACK[name] >= 1 else SLACK[name] * budget
    worse, better = (budget, figure) if name == "wide" else (figure, budget)
    allowance = 0 if same_compiler else ANOTHER_COMPILER * budget
    if worse > better + allowance:
        yield f"{what}: {figure}, worse than the budget of {budget} (where that is meant: {UPDATE})"
    elif same_compiler and better - worse > slack:
        yield f"{what}: {figure}, better than the budget of {budget}: tighten it ({UPDATE})"


# ---------------------------------------------------------------------------------------------------------------- command


def _natural(architecture: str) -> int:
    return int("".join(filter(str.isdigit, architecture)))


def update(backends: Mapping[str, tuple[str, Found]]) -> None:
    """Write the figures as the budgets, one line a kernel and architecture.

    A backend that is not given keeps its own, and a kernel those of architectures that were not compiled, if the compiler is
    the same.
    """
    data: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
    for backend, (compiler, found) in backends.items():
        before = data.get(backend, {})
        others = before["kernels"] if before.get("compiler") == compiler else {}
        kernels: dict[str, dict[str, Mapping[str, float]]] = {}
        for kernel in sorted(found):
            both = dict(others.get(kernel, {}))
            for architecture, figures in found[kernel].items():
                of = {name: getattr(figures, name) for name in SLACK}
                both[architecture] = {name: value for name, value in of.items() if value or name != "merges"}
            kernels[kernel] = {architecture: both[architecture] for architecture in sorted(both, key=_natural)}
        kept = {architecture for of in kernels.values() for architecture in of} - {a for of in found.values() for a in of}
        if kept:
            print(f"{backend}: kept as they were: {' '.join(sorted(kept, key=_natural))}", file=sys.stderr)
        data[backend] = {"compiler": compiler, "kernels": kernels}
    text = json.dumps(data, indent=2)
    text = re.sub(r"\{\s+(\"registers\"[^{}]*?)\s+\}", lambda found: "{" + re.sub(r"\s+", " ", found.group(1)) + "}", text)
    FILE.write_text(text + "\n", encoding="utf-8")
    print(f"written: {FILE}", file=sys.stderr)


def markdown(found: Found) -> str:
    """A row a kernel, and in each cell the architectures in turn."""
    architectures = sorted({architecture for of in found.values() for architecture in of}, key=_natural)
    columns = ("registers", "spills", "instructions", "mufu", "wide", "merges")
    heads = ("registers", "spills", "instructions an element", "of them MUFU", "% in 128-bit accesses", "merges a thread")
    lines = [f"Each cell: {' / '.join(architectures)}.", "", f"| kernel | {' | '.join(heads)} |", "|---" * 7 + "|"]
    for kernel in sorted(found):
        rows: list[dict[str, Any]] = [found[kernel][a].as_dict() if a in found[kernel] else {} for a in architectures]
        cells = [" / ".join(str(row.get(column, "-")) for row in rows) for column in columns]
        lines.append(f"| `{kernel}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def everything() -> dict[str, tuple[str, Found]]:
    """Backend -> its compiler and figures, of what this machine can read."""
    import triton

    module = native.module()
    backends: dict[str, tuple[str, Found]] = {}
    if isinstance(module, str):
        print(f"native: {module}", file=sys.stderr)
    else:
        backends["native"] = native.compiler(module), native.figures(module)
    backends["triton"] = f"triton {triton.__version__}", triton_cases.compiled(triton_cases.cases())
    return backends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write budgets.json")
    args = parser.parse_args()
    sys.path.insert(0, str(FILE.parents[1] / "helpers"))
    import build_age

    why_old = build_age.why_old()
    if why_old is not None:
        sys.exit(f"{why_old}: make build")
    backends = everything()
    for backend, (compiler, found) in backends.items():
        counted = "\n".join(f"- {kind}: {' '.join(words.split())}" for kind, words in COUNTED[backend].items())
        print(f"### {backend}: {len(found)} kernels, {compiler}\n\n{markdown(found)}\n\nCounted:\n\n{counted}\n")
    if args.update:
        update(backends)


if __name__ == "__main__":
    main()
