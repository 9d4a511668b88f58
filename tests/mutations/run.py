"""Mutations of the package and of its CPU kernels, and the tests that catch them.

    python tests/mutations/run.py                       runs mutations.json; fails if a mutation is no longer caught
    python tests/mutations/run.py 3 17 --update         runs two of them, and writes what catches them
    python tests/mutations/run.py --generate --update   fills the quota of each area, and runs what is new

The mutations of the first seed are for choosing which cases `make check` runs, and those of the second for judging the choice.
A mutation names no line. Its place is the `nth` statement or condition of `function` that reads `before`, as ast.unparse
writes it. In C++ it is the `nth` line that reads `before`. `skipped` lists mutations that change no result, and why. The
generator takes the next ones of the seed. Tests run in copies of the tree, in build/mutations/: `caught_by` first, then
the nearest test files, then all of `make check`, then slow tests and full products.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

import mutate
from mutate import ROOT, Mutation

FILE = Path(__file__).with_name("mutations.json")
JOBS = 2  # mutations at a time
LIMIT = 1200  # seconds; tests that take longer hang, so they have caught the mutation
FINDS_PLACES = "tests/mutations/test_generator.py::test_every_mutation_finds_its_place"  # which fails with any mutation
NUM_FILES = 20  # most test files that run before all others


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
    return found | {str(path.relative_to(ROOT)): kernel_tests(path.stem) for path in (ROOT / "csrc").rglob("*.*")}


def kernel_tests(kernel: str) -> list[str]:
    """Return the test files of a file of C++: those that have a word of its name in theirs, and those of all ops and builds."""
    words = set(kernel.split("_"))
    files = [str(path.relative_to(ROOT)) for area in ("ops", "native") for path in (ROOT / "tests" / area).glob("test_*.py")]
    return sorted(files, key=lambda file: (-len(words & set(re.split("[_./]", file))), "parity" not in file, file))


def build(root: Path) -> bool:
    """Compile the CPU kernels. Return whether that succeeds."""
    variables = {**os.environ, "DDPM_FAST_CUDA_ARCHS": "none"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=root, env=variables, capture_output=True).returncode == 0


def failure(root: Path, node: str, options: str, broken: set[str]) -> str | None:
    """Run tests. Return the node id of the first that fails, `node` if they hang, or None if all pass or none exists."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "randomly", "--randomly-seed=1"]
    command += [*options.split(), node, *(f"--deselect={each}" for each in broken)]
    variables = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    log = root / "build" / "pytest.txt"  # no pipe, which processes that tests have started could keep open
    with log.open("w") as output, suppress(subprocess.TimeoutExpired):
        code = subprocess.run(command, cwd=root, env=variables, stdout=output, stderr=output, timeout=LIMIT).returncode
        if code in (0, 5) or (code == 4 and "not found: " in log.read_text()):
            return None
    failed = re.search(r"^(?:FAILED|ERROR) (tests/.+?)(?: - .*)?$", log.read_text(), re.MULTILINE)
    return failed[1] if failed else node  # a crash names no test


def catch(mutation: Mutation, root: Path, steps: list[tuple[str, str]], broken: set[str]) -> dict[str, str | None]:
    """Return the first test of `steps` that fails with a mutation and passes without it, and its pytest options.

    A step is a test, test file or folder with options. Tests that fail without the mutation, too, are added to `broken`.
    """
    path, is_compiled = root / mutation.file, not mutation.file.endswith(".py")
    source = path.read_text(encoding="utf-8")

    def write(text: str) -> bool:
        path.write_text(text, encoding="utf-8")
        return not is_compiled or build(root)

    if not write(mutate.mutated(source, mutation)):
        sys.exit(f"{mutation.file} does not compile with `{mutation.after}`. Move the mutation to `skipped`.")
    caught: dict[str, str | None] = {"caught_by": None, "options": ""}
    for node, options in steps:
        failed = failure(root, node, options, broken)
        while failed and not caught["caught_by"]:
            write(source)
            if failure(root, failed, options, set()) is None:
                caught = {"caught_by": failed, "options": options}
            else:
                broken.add(failed)
                write(mutate.mutated(source, mutation))
                failed = failure(root, node, options, broken)
        if caught["caught_by"]:
            return caught
    write(source)
    return caught


def read(entry: dict[str, object]) -> Mutation:
    return Mutation(*map(entry.get, Mutation._fields))  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, help="run these mutations, counted from 0 (default: all)")
    parser.add_argument("--update", action="store_true", help="write mutations.json")
    parser.add_argument("--generate", action="store_true", help="fill the quotas, and run what is new")
    args = parser.parse_args()
    data = json.loads(FILE.read_text(encoding="utf-8"))
    listed = {read(each): {name: each[name] for name in ("seed", "caught_by", "options")} for each in data["mutations"]}
    known, skipped = set(listed), [read(each) for each in data["skipped"]]
    for seed in data["seeds"] if args.generate else ():
        kept = [each for each, entry in listed.items() if entry["seed"] == seed]
        others = [each for each in listed if each not in kept]
        for each in mutate.generate(seed, kept, [*skipped, *others]):
            listed.setdefault(each, {"seed": seed, "caught_by": None, "options": ""})
    chosen = [[*listed][number] for number in args.numbers or range(len(listed))]
    chosen = [each for each in chosen if not args.generate or each not in known]
    for each in chosen:
        mutate.mutated((ROOT / each.file).read_text(encoding="utf-8"), each)  # fails before any test runs
    tests, broken, free = test_files(), {FINDS_PLACES}, SimpleQueue[Path]()
    for root in (ROOT / "build" / "mutations" / str(job) for job in range(JOBS)):
        subprocess.run([sys.executable, str(ROOT / ".ci" / "copy_tree.py"), str(root)], check=True)
        for module in (ROOT / "ddpm_fast").glob("_native*.so"):
            shutil.copy(module, root / "ddpm_fast")  # with a new time, so that it is no older than the sources
        free.put(root)

    def is_kept(mutation: Mutation) -> bool:
        root, entry = free.get(), listed[mutation]
        steps = [(entry["caught_by"], entry["options"])] if entry["caught_by"] else []
        for options in ("", "--full"):
            steps += [(node, options) for node in (*tests[mutation.file], "tests")]
        found = catch(mutation, root, steps, broken)
        free.put(root)
        kept = found["caught_by"] is not None or entry["caught_by"] is None
        listed[mutation] = entry | found
        print("{}, {}: {} -> {} ({}): ".format(*mutation), found["caught_by"] or "survived", sep="", flush=True)
        return kept

    with ThreadPoolExecutor(JOBS) as pool:
        kept = [*pool.map(is_kept, chosen)]
    for seed in data["seeds"]:
        found = [listed[each] for each in chosen if listed[each]["seed"] == seed]
        quick = sum(each["caught_by"] is not None and not each["options"] for each in found)
        print(f"seed {seed}: {len(found)} ran, {quick} are caught by `make check`,", end=" ")
        print(f"{sum(each['caught_by'] is not None for each in found)} by `make check-all`")
    print("".join(f"{each} fails without a mutation too\n" for each in broken), end="")
    if args.update:
        data["mutations"] = [{**each._asdict(), **entry} for each, entry in listed.items()]
        FILE.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    sys.exit(not all(kept))


if __name__ == "__main__":
    main()
