"""`pytest --few`, as `make check-lowest` runs the tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"


@pytest.fixture(scope="module")
def few() -> Any:
    """The function that chooses the cases."""
    spec = importlib.util.spec_from_file_location("settings_of_tests", CONFTEST)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module._few


@pytest.mark.parametrize(
    ("number", "chosen"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (4, [0, 1, 3]), (5, [0, 2, 4]), (100, [0, 49, 99])]
)
def test_the_ends_and_a_middle_case_are_chosen(few: Any, number: int, chosen: list[int]) -> None:
    items = [SimpleNamespace(nodeid=f"tests/native/test_a.py::test[{i}]") for i in range(number)]
    others = [SimpleNamespace(nodeid="tests/native/test_a.py::test_alone")]
    assert few([*items, *others]) == {others[0].nodeid, *(items[i].nodeid for i in chosen)}


def test_questions_to_a_library_are_all_asked(few: Any) -> None:
    names = {f"tests/integrations/test_a.py::test[{i}]" for i in range(9)}
    assert few([SimpleNamespace(nodeid=name) for name in names]) == names


def test_the_files_that_are_whole_exist(few: Any) -> None:
    for name in few.__globals__["ABOUT_LIBRARIES"]:
        assert list(CONFTEST.parent.glob(f"{name.rstrip('/')}*")), name
