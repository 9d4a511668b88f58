"""The compiled module on other systems: what it needs of the C and C++ libraries, and another processor."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"

# manylinux_2_34, which is the tag of the wheels of .ci/wheel.py: glibc 2.34 and the libraries of GCC 11.
PROMISED = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13)}


@pytest.mark.again
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("objdump") is None, reason="needs Linux and objdump")
def test_the_module_needs_no_newer_libraries_than_its_wheel_promises() -> None:
    native = pytest.importorskip("ddpm_fast._native")
    symbols = subprocess.run(["objdump", "-T", str(native.__file__)], check=True, capture_output=True, text=True).stdout
    newest = {
        library: max(tuple(map(int, version.split("."))) for version in re.findall(rf"\b{library}_([\d.]+)", symbols))
        for library in PROMISED
    }
    assert not {library: version for library, version in newest.items() if version > PROMISED[library]}, newest


@pytest.mark.slow
@pytest.mark.sources
@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="needs g++-aarch64-linux-gnu")
def test_the_baseline_compiles_for_another_processor(tmp_path: Path) -> None:
    """With -O1, g++ takes vectors that a loop fills for uninitialized."""
    sources = [*map(str, CSRC.glob("cpu/*.cpp"))]
    flags = ["-std=c++20", "-O1", "-fopenmp", "-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized"]
    command = ["aarch64-linux-gnu-g++", *flags, "-DDDPM_FAST_ISA=baseline", f"-I{CSRC}", "-c", *sources]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert sources
