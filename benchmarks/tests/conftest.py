"""Tests of the benchmarks, with the settings, fixtures and small networks of tests/."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import environment  # noqa: F401
from fixtures import _fresh_machine, _nan_filled_buffers, _seeded, emulated_module, matrix_kernels  # noqa: F401
