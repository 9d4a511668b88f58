"""Mutations: changes of one statement, condition or line, drawn by a seed, and their place in a file."""

from __future__ import annotations

import ast
import copy
import itertools
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
QUOTAS = {  # files -> number of mutations of a seed: 70 in Python by statements, and 30 in C++
    **{
        "ddpm_fast/*.py": 7,
        "ddpm_fast/cli/**/*.py": 5,
        "ddpm_fast/data/**/*.py": 6,
        "ddpm_fast/distributed/**/*.py": 1,
        "ddpm_fast/evaluation/**/*.py": 1,
    },
    **{"ddpm_fast/files/**/*.py": 2, "ddpm_fast/inference/**/*.py": 7, "ddpm_fast/integrations/**/*.py": 6},
    **{"ddpm_fast/nn/**/*.py": 4, "ddpm_fast/ops/**/*.py": 8, "ddpm_fast/plan/**/*.py": 4, "ddpm_fast/sampling/**/*.py": 5},
    **{"ddpm_fast/schedule/**/*.py": 2, "ddpm_fast/training/**/*.py": 8, "ddpm_fast/triton_kernels/**/*.py": 4},
    **{"csrc/cpu/*": 25, "csrc/common/*": 5},
}

SWAPS: dict[type, type] = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}
SWAPS |= {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
SWAPS |= {ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And}
# Messages have tests of their texts. A GPU's code and a compiler's do not run.
LEFT_OUT = re.compile(r"cuda|is_compiling|\bmessage\b")
LEFT_OUT_NAMES = re.compile(r"_?(check|warn)|.*(cuda|capture)|(__repr__|__str__|cast|strict|repr)$")


class Mutation(NamedTuple):
    """A change of one statement or condition."""

    file: str
    function: str
    before: str
    after: str
    nth: int


def places(block: ast.AST, function: str = "") -> Iterator[tuple[str, ast.stmt | ast.expr, bool]]:
    """Yield statements and conditions: the function's qualified name, the node, and whether it stands in a branch."""
    for node in ast.iter_child_nodes(block):
        place: Any = getattr(node, "test", node)
        is_error = isinstance(node.body[-1] if isinstance(node, ast.If) else node, ast.Raise | ast.Assert)
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            if not LEFT_OUT_NAMES.match(node.name):
                yield from places(node, f"{function}.{node.name}".lstrip("."))
        elif isinstance(node, ast.stmt | ast.ExceptHandler) and not is_error and not LEFT_OUT.search(ast.unparse(place)):
            if function and (place is not node or not hasattr(node, "body")):
                yield function, place, not isinstance(block, ast.FunctionDef)
            yield from places(node, function)


def mutated(source: str, mutation: Mutation) -> str:
    """Return the source of a file with the mutation."""
    file, function, before, after, nth = mutation
    if file.endswith(".py"):
        nodes = [place for name, place, _ in places(ast.parse(source)) if (name, ast.unparse(place)) == (function, before)]
        found = [(node.lineno, node.col_offset, node.end_lineno or 0, node.end_col_offset or 0) for node in nodes]
    else:
        begins = [(i, line.index(before)) for i, line in enumerate(source.splitlines(), 1) if lines(line) == [before]]
        found = [(i, begin, i, begin + len(before)) for i, begin in begins]
    if len(found) <= nth:
        sys.exit(f"{file}: {function} has no `{before}`, or not {nth + 1} of it. Port the mutation.")
    first, begin, last, end = found[nth]
    parts = source.encode().splitlines(keepends=True)  # columns count bytes
    begin, end = begin + sum(map(len, parts[: first - 1])), end + sum(map(len, parts[: last - 1]))
    return (source.encode()[:begin] + after.encode() + source.encode()[end:]).decode()


# Operators of C++ stand between spaces, and templates' brackets, signs and pointers do not.
CPP_SWAPS = {
    " + ": " - ",
    " - ": " + ",
    " * ": " / ",
    " / ": " * ",
    " += ": " -= ",
    " -= ": " += ",
    " < ": " <= ",
    " <= ": " < ",
}
CPP_SWAPS |= {" > ": " >= ", " >= ": " > ", " == ": " != ", " != ": " == ", " && ": " || ", " || ": " && "}
CPP_LEFT_OUT = re.compile(r"^(#|template|using|namespace|static_assert|enum|struct|class)|throw|prefetch|\"|operator")


def lines(source: str) -> list[str]:
    """Return the lines of a file of C++ without comments and indents."""
    return [re.sub(r"\s*//.*", "", line).strip() for line in source.splitlines()]


def changed_lines(line: str) -> Iterator[tuple[str, str]]:
    """Yield the name of each operator, and the line of C++ with another one."""
    for match in re.finditer("|".join(map(re.escape, CPP_SWAPS)), line):
        yield match[0].strip(), line[: match.start()] + CPP_SWAPS[match[0]] + line[match.end() :]
    for match in re.finditer(r"(?<![\w.'])\d+(?![\w.'])", line):
        yield "integer", line[: match.start()] + str(int(match[0]) + 1) + line[match.end() :]
    if re.fullmatch(r"[\w.:\[\]<>]+(\(.*\)| [-+*|]= .*);", line):
        yield "statement", ";"


def changes(node: ast.AST, is_place: bool) -> Iterator[tuple[str, ast.AST]]:
    """Yield the name of each operator, and the node that it puts in place of `node`."""
    match node:
        case ast.AugAssign() | ast.Expr(ast.Call()):
            yield "statement", ast.Pass()
        case ast.Name() | ast.Attribute() | ast.Call() if is_place:
            yield "condition", ast.UnaryOp(ast.Not(), node)
        case ast.Compare(left, [op], comparators) if type(op) in SWAPS:
            yield "comparison", ast.Compare(left, [SWAPS[type(op)]()], comparators)
        case ast.BinOp(left, op, right) if type(op) in SWAPS and not re.search("(folder|path)$", ast.unparse(left)):
            yield "arithmetic", ast.BinOp(left, SWAPS[type(op)](), right)
        case ast.BoolOp(op, values):
            yield "and/or", ast.BoolOp(SWAPS[type(op)](), values)
        case ast.UnaryOp(ast.Not(), operand):
            yield "not", operand
        case ast.Constant(bool(value)):
            yield "boolean", ast.Constant(not value)
        case ast.Constant(int(value)):
            yield "integer", ast.Constant(value + 1)
        case ast.IfExp(test, body, orelse) if not isinstance(test, ast.Compare | ast.UnaryOp):
            yield "condition", ast.IfExp(ast.UnaryOp(ast.Not(), test), body, orelse)
        case ast.Call(func, args, keywords) if ast.unparse(func) not in ("max", "min", "isinstance", "expect"):
            for i, (first, second) in enumerate(itertools.pairwise(args)):
                if type(first) is type(second):
                    yield "arguments", ast.Call(func, [*args[:i], second, first, *args[i + 2 :]], keywords)


def inside(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a node and what it holds, without texts and calls of checks."""
    call = node.value if isinstance(node, ast.Expr) else node
    name = ast.unparse(call.func).rpartition(".")[2] if isinstance(call, ast.Call) else getattr(node, "arg", None)
    if not isinstance(node, ast.JoinedStr) and not LEFT_OUT_NAMES.match(name or ""):
        yield node
        for child in ast.iter_child_nodes(node):
            yield from inside(child)


def candidates(file: str) -> Iterator[tuple[str, Mutation]]:
    """Yield operator and mutation, for every mutation of a file."""
    seen: Counter[tuple[str, str]] = Counter()
    if not file.endswith(".py"):
        for line in lines((ROOT / file).read_text(encoding="utf-8")):
            for kind, new in [] if CPP_LEFT_OUT.search(line) else changed_lines(line):
                yield kind, Mutation(file, "", line, new, seen["", line])
            seen["", line] += 1
        return
    for function, place, is_in_branch in places(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        before = ast.unparse(place)
        found = [(node, *change) for node in inside(place) for change in changes(node, node is place)]
        if isinstance(place, ast.Return) and place.value and is_in_branch:
            found.append((place, "return", ast.Pass()))
        for node, kind, new in found:
            after = ast.unparse(copy.deepcopy(place, {id(node): new}))  # the copy has `new` for `node`
            if before != after:
                yield kind, Mutation(file, function, before, after, seen[function, before])
        seen[function, before] += 1


def generate(seed: int, kept: Iterable[Mutation], skipped: Iterable[Mutation]) -> list[Mutation]:
    """Return what is kept, and fill the quotas by the seed: one mutation a function (in C++ a file), operators in turn."""
    chosen: list[Mutation] = []
    for pattern, quota in QUOTAS.items():
        files = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob(pattern))]
        mine = [each for each in kept if each.file in files and each not in skipped]
        kinds = defaultdict(list)
        drawn = [pair for file in files if "cuda" not in file for pair in candidates(file)]
        for kind, each in sorted(drawn, key=lambda pair: random.Random(f"{seed} {tuple(pair[1])}").random()):
            kinds[kind].append(each)
        for each in filter(None, itertools.chain(*itertools.zip_longest(*kinds.values()))):
            if len(mine) < quota and each not in skipped and each[:2] not in [other[:2] for other in mine]:
                mine.append(each)
        chosen += mine
    return chosen
