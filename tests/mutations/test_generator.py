"""The generator of mutations: areas with sub-folders, quotas, and what it keeps and leaves out; Python and C++."""

from __future__ import annotations

import json
from pathlib import Path

import mutate
import pytest
import run

SOURCE = """
def {name}(a, b):
    total = a + b
    return total if total > 0 else b
"""


CPP = """
// total < 0
#pragma unroll 4
template <int n = 1>
bool four(int a) {
  int total = a * 2;  // as a + a
  total += a;
  return a < 3 && total > 0;
}
"""


@pytest.fixture
def _small_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a small package in place of this one."""
    for file in ("area/one.py", "area/inner/two.py", "area/inner/most/three.py", "area/inner/cuda_four.py", "other/five.py"):
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SOURCE.format(name=path.stem))
    (tmp_path / "six.cpp").write_text(CPP)
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    monkeypatch.setattr(mutate, "QUOTAS", {"area/**/*.py": 3, "other/five.py": 1})


in_a_small_package = pytest.mark.usefixtures("_small_package")


def test_every_mutation_finds_its_place() -> None:
    listed = json.loads(run.FILE.read_text())
    for each in listed["mutations"] + listed["skipped"]:
        mutation = run.read(each)
        mutate.mutated((mutate.ROOT / mutation.file).read_text(), mutation)  # or it exits, and says which to port


@in_a_small_package
def test_an_area_has_its_sub_folders() -> None:
    files = [each.file for each in mutate.generate(0, [], [])]
    assert sorted(files[:3]) == [f"area/{name}.py" for name in ("inner/most/three", "inner/two", "one")]
    assert files[3:] == ["other/five.py"]


@in_a_small_package
def test_the_quota_is_filled_up_by_the_seed() -> None:
    kept = mutate.generate(0, [], [])[1]
    again = mutate.generate(0, [kept], [])
    assert again[0] == kept
    assert len({each.file for each in again}) == len(again) == 4
    assert mutate.generate(0, [kept], []) == again
    seeds = [mutate.generate(seed, [], []) for seed in range(20)]
    assert any(each != seeds[0] for each in seeds)


@in_a_small_package
def test_what_is_skipped_is_left_out() -> None:
    (five,) = [each for each in mutate.generate(0, [], []) if each.function == "five"]
    (other,) = [each for each in mutate.generate(0, [five], [five]) if each.function == "five"]
    assert other != five


@in_a_small_package
def test_each_mutation_has_its_place() -> None:
    for each in mutate.generate(0, [], []):
        source = (mutate.ROOT / each.file).read_text()
        assert mutate.mutated(source, each) == source.replace(each.before, each.after, 1) != source


@in_a_small_package
def test_lines_of_cpp_change_in_their_operators_and_numbers() -> None:
    changed = [each for _, each in mutate.candidates("six.cpp")]
    assert {each.before for each in changed} == {"int total = a * 2;", "total += a;", "return a < 3 && total > 0;"}
    assert {each.after for each in changed} == {
        *("int total = a / 2;", "int total = a * 3;", "total -= a;", ";"),
        *("return a <= 3 && total > 0;", "return a < 3 || total > 0;", "return a < 3 && total >= 0;"),
        *("return a < 4 && total > 0;", "return a < 3 && total > 1;"),
    }
    for each in changed:
        assert mutate.mutated(CPP, each) == CPP.replace(each.before, each.after)
