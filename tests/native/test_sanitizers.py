"""The CPU kernels and their threads under the compiler's sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_fast.ops import backend

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
TREE = ROOT / "build" / "sanitized"  # a copy of the sources with its own build, which the next run continues
CASES = (
    "tests/ops/test_parity.py",
    "tests/ops/test_independence.py",
    "tests/native/test_elementwise.py",
    "tests/native/test_group_norm.py",
    "tests/native/test_tiles.py",
    "tests/inference/test_packed_layers.py::test_tiles_serve_every_convolution",
)
OVERRUN = """
import torch
from ddpm_fast.ops import backend
backend.native().cpu.noise(0, torch.empty(4), torch.zeros(1, dtype=torch.int64), 0, 1, 1, 5, False, 1)
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="the sanitizers need Linux and g++"),
]


def library(name: str) -> str:
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def replace(file: str, old: str, new: str) -> None:
    """Edit a file of the copy."""
    text = (TREE / file).read_text(encoding="utf-8")
    assert old in text
    (TREE / file).write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Environment of processes that run the kernels with AddressSanitizer and UndefinedBehaviorSanitizer, in TREE."""
    TREE.mkdir(parents=True, exist_ok=True)
    for name in ("csrc", "ddpm_fast", "tests"):
        ignored = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
        shutil.copytree(ROOT / name, TREE / name, dirs_exist_ok=True, ignore=ignored)
    for name in ("CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy2(ROOT / name, TREE / name)
    # The tests run the best instruction set, so the baseline is left out. -O0 compiles in a third of the time of -O1.
    if backend.BUILD["isa"] != "baseline":
        replace("csrc/cpu/dispatch.cpp", "\nKERNELS(baseline)", "\nNO_KERNELS(baseline)")
        replace("CMakeLists.txt", 'set(OBJECTS "")', 'set(OBJECTS "")\nlist(REMOVE_ITEM ISAS baseline)')
    with (TREE / "CMakeLists.txt").open("a") as file:  # pybind11's templates access no tensors
        file.write("\nset_source_files_properties(csrc/bindings.cpp PROPERTIES COMPILE_OPTIONS -fno-sanitize=all)\n")
    flags = {
        "CMAKE_BUILD_TYPE": "None",  # the flags below are all
        "CXXFLAGS": "-O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined",
        "DDPM_FAST_CUDA_ARCHS": "none",
        "DDPM_FAST_COMPILED_ISAS": "native",
    }
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(build, cwd=TREE, env={**os.environ, **flags}, check=True, capture_output=True)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return inherited | {
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",  # Python and torch keep memory until they end
        "PYTHONPATH": str(TREE),
    }


def test_kernels_access_their_tensors_only(environment: dict[str, str]) -> None:
    """AddressSanitizer and UndefinedBehaviorSanitizer find the overrun that is planted, and nothing in the op's cases."""
    planted = subprocess.run([sys.executable, "-c", OVERRUN], cwd=TREE, env=environment, capture_output=True, text=True)
    assert planted.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in planted.stderr
    cases = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CASES]
    process = subprocess.run(cases, cwd=TREE, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-4000:]


def test_teams_have_no_data_races(tmp_path: Path) -> None:
    """ThreadSanitizer finds the race that is planted, and no other."""
    flags = ["-std=c++20", "-O1", "-g1", "-fsanitize=thread", "-Wno-tsan", "-DDDPM_FAST_ISA=test", f"-I{ROOT / 'csrc'}"]
    team, program = tmp_path / "team.o", tmp_path / "team_races"
    subprocess.run(["g++", *flags, "-fopenmp", "-c", str(ROOT / "csrc/cpu/team.cpp"), "-o", str(team)], check=True)
    subprocess.run(["g++", *flags, str(TESTS / "native/team_races.cpp"), str(team), "-o", str(program)], check=True)
    clean = subprocess.run([program], capture_output=True, text=True)
    assert (clean.returncode, clean.stdout, clean.stderr) == (0, "same\n", "")
    first = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    planted = subprocess.run([program, "race"], env=first, capture_output=True, text=True)
    assert planted.returncode != 0
    assert "ThreadSanitizer: data race" in planted.stderr
