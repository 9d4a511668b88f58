"""benchmarks/ops: what is timed, under which names, and that wrong results have no time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import common
import pytest
from op_cases import CASES

# A plugin that makes the native backend wrong by a hundredth.
WRONG = """
from peers import OPS, Peer

native = OPS["native"].build
OPS["native"] = Peer(lambda call, case: lambda **tensors: 1.01 * native(call, case)(**tensors))
"""


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(common.ROOT / "ops")
    import test_ops_speed

    return test_ops_speed


def test_every_case_is_timed_in_both_dtypes_and_layouts(benchmark_module: ModuleType) -> None:
    listed = {parameter.values for parameter in benchmark_module.parameters()}
    forward = {values[:4] for values in listed if values[4:] == ("forward", "reference")}
    assert forward == {
        (case.op, case.name, dtype, layout)
        for case in CASES
        for dtype in ("float32", "bf16")
        for layout in (("contiguous", "channels_last") if len(case.shape) == 4 else ("contiguous",))
    }
    with_backward = {values[0] for values in listed if values[4] == "backward"}
    assert with_backward == {"attention", "conv3x3", "denoising_loss", "group_norm_silu"}
    assert {values[5] for values in listed} >= {"reference", "native", "eager"}


def test_a_wrong_backend_fails_and_only_the_others_have_times(tmp_path: Path) -> None:
    (tmp_path / "wrong_native.py").write_text(WRONG, encoding="utf-8")
    out = tmp_path / "times.json"
    options = ["-p", "wrong_native", "-k", "q_sample-uint8-float32", f"--benchmark-json={out}"]
    options += ["--benchmark-max-time=0.001", "--benchmark-min-rounds=1"]
    path = os.pathsep.join(map(str, (tmp_path, common.ROOT, common.ROOT.parent)))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks/ops", *options],
        cwd=common.ROOT.parent,
        env=environment | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "2 failed, 4 passed" in ended.stdout
    for layout in common.FORMATS:
        name = f"test_speed[q_sample-uint8-float32-{layout}-forward-native]"
        assert f"FAILED benchmarks/ops/test_ops_speed.py::{name}" in ended.stdout
    assert "q_sample-uint8 by native: error" in ended.stdout
    assert "no speed is reported" in ended.stdout
    timed = json.loads(out.read_text(encoding="utf-8"))["benchmarks"]
    assert [(each["name"], each["group"]) for each in timed] == [  # in this order, whatever pytest-randomly does
        (f"test_speed[q_sample-uint8-float32-{layout}-forward-{by}]", f"q_sample uint8 3x3x5x7 float32 {layout} forward")
        for layout in ("channels_last", "contiguous")
        for by in ("eager", "reference")
    ]
    assert timed[0]["params"]["by"] == "eager"
