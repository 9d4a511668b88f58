"""Mutated files: readers return, or raise an error that names the file."""

from __future__ import annotations

from pathlib import Path

import pytest
from targets import TARGETS, fuzz


@pytest.mark.parametrize("numbers", [range(200), pytest.param(range(200, 700), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", TARGETS)
def test_a_mutated_file_is_read_or_refused_by_name(name: str, numbers: range, tmp_path: Path) -> None:
    assert len(numbers) / 4 < fuzz(name, numbers, tmp_path) < len(numbers)  # some are refused, some still valid
