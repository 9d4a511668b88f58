"""The generator of mutations: areas with sub-folders, quotas, and what it keeps and leaves out."""

from __future__ import annotations

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

SOURCE = """
def {name}(a, b):
    total = a + b
    return total if total > 0 else b
"""


def _module() -> ModuleType:
    spec = spec_from_file_location("run", Path(__file__).with_name("run.py"))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path: Path) -> ModuleType:
    """The module, with a small package in place of this one."""
    run = _module()
    for file in ("area/one.py", "area/inner/two.py", "area/inner/most/three.py", "area/inner/cuda_four.py", "other/five.py"):
        path = tmp_path / "ddpm_fast" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SOURCE.format(name=path.stem))
    run.ROOT, run.QUOTAS = tmp_path, {"area": 3, "other/five.py": 1}
    return run


def test_every_mutation_finds_its_place() -> None:
    run = _module()
    listed = json.loads(run.FILE.read_text())
    for each in listed["mutations"] + listed["skipped"]:
        mutation = run.Mutation(*map(each.get, run.Mutation._fields))
        run.mutated((run.ROOT / mutation.file).read_text(), mutation)  # or it exits, and says which to port


def test_an_area_has_its_sub_folders(run: ModuleType) -> None:
    files = [each.file for each in run.generate(0, [], [])]
    assert sorted(files[:3]) == [f"ddpm_fast/area/{name}.py" for name in ("inner/most/three", "inner/two", "one")]
    assert files[3:] == ["ddpm_fast/other/five.py"]


def test_the_quota_is_filled_up_by_the_seed(run: ModuleType) -> None:
    kept = run.generate(0, [], [])[1]
    again = run.generate(0, [kept], [])
    assert again[0] == kept
    assert len({each.file for each in again}) == len(again) == 4
    assert run.generate(0, [kept], []) == again
    seeds = [run.generate(seed, [], []) for seed in range(20)]
    assert any(each != seeds[0] for each in seeds)


def test_what_is_skipped_is_left_out(run: ModuleType) -> None:
    (five,) = [each for each in run.generate(0, [], []) if each.function == "five"]
    (other,) = [each for each in run.generate(0, [five], [five]) if each.function == "five"]
    assert other != five


def test_each_mutation_has_its_place(run: ModuleType) -> None:
    for each in run.generate(0, [], []):
        source = (run.ROOT / each.file).read_text()
        assert run.mutated(source, each) == source.replace(each.before, each.after, 1) != source
