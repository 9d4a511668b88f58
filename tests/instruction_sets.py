"""Tests of kernels on the instruction sets that this CPU has besides its best."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from ddpm_fast.ops import backend


def run_with_isa(isa: str, *tests: Callable[..., None]) -> None:
    """Runs these tests of the caller's module in a process of their own: it has other vectors and other panels."""
    build = backend.native().build_info()
    if isa not in build["isas"] or isa == build["isa"]:
        pytest.skip(f"{isa} is not compiled, or is what the other tests run")
    names = [f"{inspect.getfile(test)}::{test.__name__}" for test in tests]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *names],
        env=os.environ | {"DDPM_FAST_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
