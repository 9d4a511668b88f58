"""The CPU's kernels on the instruction sets that this processor has besides its best: other vectors, other panels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_fast.ops import backend

pytestmark = [
    pytest.mark.skipif(backend.native_error() is not None, reason="there is no compiled module"),
    pytest.mark.again,
    pytest.mark.sources,
]

TESTS = (
    "ops/test_conv3x3.py::test_output_and_gradients_are_as_right_as_pytorchs",
    "ops/test_attention.py::test_output_and_gradients_are_as_right_as_pytorchs",
    "ops/test_attention.py::test_scores_far_apart",
    "inference/test_packed_layers.py::test_norm_activation_convolution_and_addition",
    "inference/test_packed_layers.py::test_each_method_serves_a_3x3_convolution",
    "inference/test_packed_layers.py::test_tiles_serve_every_convolution",
    "inference/test_packed_layers.py::test_attention",
    "native/test_tiles.py",
)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_lesser_instruction_sets(isa: str, pytestconfig: pytest.Config) -> None:
    """Each set takes two processes, because starting them takes most of the time."""
    build = backend.native().build_info()
    if isa not in build["isas"]:
        pytest.skip(f"{isa} is not compiled: DDPM_FAST_COMPILED_ISAS=all compiles every instruction set")
    if isa == build["isa"]:
        pytest.skip(f"{isa} is what the other tests run")
    full = ["--full"] if pytestconfig.option.full else []
    for options in ([*full, *TESTS], ["-k", "native", "ops/test_parity.py::test_parity"]):  # each op in each dtype
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options],
            cwd=Path(__file__).parents[1],
            env=os.environ | {"DDPM_FAST_ISA": isa},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stdout[-3000:]
