"""The budgets of every kernel's machine code, and the table of what is there.

    python tests/machine_code/budgets.py            prints the figures as a Markdown table
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
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import native
import triton_cases
from sass import Figures

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


def complaints(found: Found, budgets: Budgets, *, same_compiler: bool = True) -> Iterator[str]:
    """Yield what is wrong, a sentence each.

    Args:
        found: Figures of what was compiled. Architectures may be missing.
        budgets: What is allowed. A budget without a kernel is wrong too.
        same_compiler: The budgets were written with this compiler.
    """
    every = {(kernel, architecture): figures for kernel, of in found.items() for architecture, figures in of.items()}
    for (kernel, architecture), figures in every.items():
        where, budget = f"{kernel} on {architecture}", budgets.get(kernel, {}).get(architecture)
        if figures.spills:
            yield f"{where}: {figures.spills} accesses to local memory"
        if figures.atomics:
            yield f"{where}: {figures.atomics} atomic operations"
        if budget is None:
            yield f"{where} has no budget"
        for name in SLACK if budget is not None else ():
            yield from _compare(f"{where}: {name}", getattr(figures, name), budget.get(name, 0), name, same_compiler)
    architectures = {architecture for _, architecture in every}
    for kernel, architecture in ((kernel, each) for kernel, of in budgets.items() for each in of):
        if architecture in architectures and (kernel, architecture) not in every:
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


def update(backends: Mapping[str, tuple[str, Found]]) -> None:
    """Write the figures as the budgets, one line a kernel and architecture.

    A backend that is not given keeps its own, and a kernel those of architectures that were not compiled, if the compiler is
    the same.
    """
    data: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
    for backend, (compiler, found) in backends.items():
        before = data.get(backend, {})
        others = before["kernels"] if before.get("compiler") == compiler else {}
        kernels = {
            kernel: others.get(kernel, {}) | {each: _budget(of[each]) for each in of} for kernel, of in sorted(found.items())
        }
        data[backend] = {"compiler": compiler, "kernels": kernels}
    text = json.dumps(data, indent=2)
    text = re.sub(r"\{\s+(\"registers\"[^{}]*?)\s+\}", lambda found: "{" + re.sub(r"\s+", " ", found.group(1)) + "}", text)
    FILE.write_text(text + "\n", encoding="utf-8")
    print(f"written: {FILE}", file=sys.stderr)


def _budget(figures: Figures) -> dict[str, float]:
    return {name: value for name in SLACK if (value := getattr(figures, name)) or name != "merges"}


def table(found: Found) -> str:
    """Return a row a kernel and architecture."""
    rows = [
        (kernel, architecture, *asdict(of[architecture]).values())
        for kernel, of in sorted(found.items())
        for architecture in of
    ]
    names = [field.name for field in fields(Figures)]
    lines = [("kernel", "architecture", *names), ("---",) * (2 + len(names)), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def everything() -> dict[str, tuple[str, Found]]:
    """Backend -> its compiler and figures, of what this machine can read."""
    import triton

    module = native.module()
    backends = {"triton": (f"triton {triton.__version__}", triton_cases.compiled(triton_cases.cases()))}
    if isinstance(module, str):
        print(f"native: {module}", file=sys.stderr)
        return backends
    return {"native": (native.compiler(module), native.figures(module)), **backends}


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
        print(f"### {backend}: {len(found)} kernels, {compiler}\n\n{table(found)}\n\nCounted:\n\n{counted}\n")
    if args.update:
        update(backends)


if __name__ == "__main__":
    main()
