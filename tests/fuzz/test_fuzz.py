"""Mutated files: readers return, or raise an error that names the file."""

from __future__ import annotations

from pathlib import Path

import pytest
from targets import TARGETS, fuzz


@pytest.mark.parametrize("count", [200, pytest.param(1_500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TARGETS)
def test_a_mutated_file_is_read_or_refused_by_name(name: str, count: int, tmp_path: Path) -> None:
    assert count / 4 < fuzz(name, count, tmp_path) < count  # some are refused, some still valid
