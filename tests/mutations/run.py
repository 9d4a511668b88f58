"""Mutations of the package, and the tests that catch them.

    python tests/mutations/run.py                       runs mutations.json; fails if a mutation is no longer caught
    python tests/mutations/run.py 3 17 --update         runs two of them, and writes what catches them
    python tests/mutations/run.py --generate --update   fills the quota of each area, and runs what is new

A mutation names no line. Its place is the `nth` statement or condition of `function` that reads `before`, as ast.unparse
writes it. `skipped` lists mutations that change no result, and why. The generator takes the next ones of the seed.
Tests run in copies of the tree, in build/mutations/. `caught_by` runs first. If it passes, the nearest test files run.
"""

from __future__ import annotations

import argparse
import ast
import copy
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FILE = Path(__file__).with_name("mutations.json")
JOBS = 2  # mutations at a time
LIMIT = 600  # seconds; a test file that takes longer hangs, so it has caught the mutation
NUM_FILES = 20  # most test files that a mutation runs
QUOTAS = {  # file or folder of the package, with its sub-folders -> number of mutations, 97 in all
    **{"ops": 9, "plan": 7, "nn": 7, "inference": 11, "reference.py": 4, "schedule": 3, "sampling": 5, "files/writing.py": 1},
    "training": 50,
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
    found = [place for name, place, _ in places(ast.parse(source)) if (name, ast.unparse(place)) == (function, before)]
    if len(found) <= nth:
        sys.exit(f"{file}: {function} has no `{before}`, or not {nth + 1} of it. Port the mutation.")
    place, lines = found[nth], source.encode().splitlines(keepends=True)  # columns count bytes
    begin = sum(map(len, lines[: place.lineno - 1])) + place.col_offset
    end = sum(map(len, lines[: (place.end_lineno or 0) - 1])) + (place.end_col_offset or 0)
    return (source.encode()[:begin] + after.encode() + source.encode()[end:]).decode()


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
        case ast.Call(func, args, keywords) if ast.unparse(func) not in ("max", "min", "isinstance"):
            for i, (first, second) in enumerate(itertools.pairwise(args)):
                if type(first) is type(second) and ast.unparse(first) != "caller":
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
    """Return what is kept, and fill the quotas by the seed: one mutation a function, operators in turn."""
    chosen: list[Mutation] = []
    for area, quota in QUOTAS.items():
        path = ROOT / "ddpm_fast" / area
        files = [str(each.relative_to(ROOT)) for each in ([path] if path.is_file() else sorted(path.rglob("*.py")))]
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


def imported(path: Path) -> set[str]:
    """Return the dotted names that a file imports, or reads from the package."""
    source, folder = path.read_text(encoding="utf-8"), path.relative_to(ROOT).parts[:-1]
    names = {f"ddpm_fast.{name}" for name in re.findall(r"\b(?:ddpm_fast|d)\.([\w.]+)", source)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) + 1 - node.level] if node.level else ()
            names |= {".".join(filter(None, (*base, node.module, alias.name))) for alias in node.names}
    return names


def test_files() -> dict[str, list[str]]:
    """Return the test files that import each file, directly or through others: its own and the closest ones first."""
    modules: dict[str, Path] = {}
    exports: dict[str, str] = {}  # names that packages take from their modules
    for path in sorted([*(ROOT / "ddpm_fast").rglob("*.py*"), *(ROOT / "tests").rglob("*.py")]):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if path.stem == "__init__":
            exports |= {f"{name}.{each.rpartition('.')[2]}": each for each in imported(path)}
        if path.suffix == ".py" and path.parent.name not in ("repository", "mutations"):
            modules[name if name.startswith("ddpm_fast") else path.stem] = path
    importers = defaultdict(set)
    for importer, path in modules.items():
        for name in imported(path):
            while name and name not in modules:
                name = exports.get(name) or name.rpartition(".")[0]
            importers[name].add(importer)
    found = {}
    for start, file in modules.items():
        distances, level = {start: 0}, {start}
        for distance in range(1, 5):
            level = {importer for each in level for importer in importers[each]} - distances.keys()
            distances |= dict.fromkeys(level, distance)
        ranks = {}
        for test in (modules[name] for name in distances if name.startswith("test_")):
            is_own = test.stem == f"test_{file.stem}"
            is_near = test.relative_to(ROOT).parts[1] == file.relative_to(ROOT).parts[1]  # the area's folder
            ranks[test] = distances[test.stem] - 2 * is_own - is_near, test.stat().st_size
        nearest = sorted(ranks, key=ranks.__getitem__)[:NUM_FILES]
        found[str(file.relative_to(ROOT))] = [str(test.relative_to(ROOT)) for test in nearest]
    return found


def failure(root: Path, node: str, broken: set[str]) -> str | None:
    """Run tests. Return the node id of the first that fails or hangs, or None if all pass or none exists."""
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "randomly", "--randomly-seed=1"]
    command = [sys.executable, "-m", "pytest", *options, node, *(f"--deselect={each}" for each in broken)]
    variables = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    log = root / "build" / "pytest.txt"  # no pipe, which processes that tests have started could keep open
    with log.open("w") as output, suppress(subprocess.TimeoutExpired):
        code = subprocess.run(command, cwd=root, env=variables, stdout=output, stderr=output, timeout=LIMIT).returncode
        if code in (0, 5) or (code == 4 and "not found: " in log.read_text()):
            return None
    failed = re.search(r"^(?:FAILED|ERROR) (tests/.+?)(?: - .*)?$", log.read_text(), re.MULTILINE)
    return failed[1] if failed else node  # a crash names no test


def catch(mutation: Mutation, root: Path, nodes: list[str], broken: set[str]) -> str | None:
    """Return the first test that fails with a mutation and passes without it. Add others that fail to `broken`."""
    path = root / mutation.file
    source = path.read_text(encoding="utf-8")
    for node in nodes:
        failed: str | None = node
        while failed:
            path.write_text(mutated(source, mutation), encoding="utf-8")
            failed = failure(root, node, broken)
            path.write_text(source, encoding="utf-8")
            if failed and failure(root, failed, set()) is None:
                return failed
            broken |= {failed} if failed else set()
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, help="run these mutations, counted from 0 (default: all)")
    parser.add_argument("--update", action="store_true", help="write mutations.json")
    parser.add_argument("--generate", action="store_true", help="fill the quotas, and run what is new")
    args = parser.parse_args()
    data = json.loads(FILE.read_text(encoding="utf-8"))
    caught = {Mutation(*map(each.get, Mutation._fields)): each["caught_by"] for each in data["mutations"]}
    if args.generate:
        new = generate(data["seed"], caught, {Mutation(*map(each.get, Mutation._fields)) for each in data["skipped"]})
        caught = {each: caught.get(each) for each in new}
    chosen = [[*caught][number] for number in args.numbers or range(len(caught))]
    chosen = [each for each in chosen if not args.generate or caught[each] is None]
    for each in chosen:
        mutated((ROOT / each.file).read_text(encoding="utf-8"), each)  # fails before any test runs
    tests, broken, free = test_files(), set[str](), SimpleQueue[Path]()
    for root in (ROOT / "build" / "mutations" / str(job) for job in range(JOBS)):
        subprocess.run([sys.executable, str(ROOT / ".ci" / "copy_tree.py"), str(root)], check=True)
        for module in (ROOT / "ddpm_fast").glob("_native*.so"):
            shutil.copy(module, root / "ddpm_fast")  # with a new time, so that it is no older than the sources
        free.put(root)

    def is_kept(mutation: Mutation) -> bool:
        root, before = free.get(), caught[mutation]
        caught[mutation] = catch(mutation, root, [*([before] if before else []), *tests[mutation.file]], broken)
        free.put(root)
        print("{}, {}: {} -> {} ({}): ".format(*mutation), caught[mutation] or "survived", sep="", flush=True)
        return caught[mutation] is not None or before is None

    with ThreadPoolExecutor(JOBS) as pool:
        kept = [*pool.map(is_kept, chosen)]
    print(f"{sum(caught[each] is not None for each in chosen)} of {len(chosen)} are caught, {kept.count(False)} no longer")
    print("".join(f"{each} fails without a mutation too\n" for each in broken), end="")
    if args.update:
        data["mutations"] = [{**each._asdict(), "caught_by": test} for each, test in caught.items()]
        FILE.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    sys.exit(not all(kept))


if __name__ == "__main__":
    main()
