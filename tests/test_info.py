"""`ddpm-fast info`."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from commands import run
from kernel_calls import MATRIX_OPS, pretend

from ddpm_fast import info
from ddpm_fast.ops import BACKENDS, OPS, backend
from ddpm_fast.ops.backend import why_not_matrix_kernels
from ddpm_fast.ops.fused_op import FusedOp

pytestmark = pytest.mark.again  # it describes the build


def _rows(text: str) -> dict[str, list[str]]:
    """Return the cells of the CPU's table by op: yes, or the reason for a no."""
    table = text.partition("Ops on cpu\n")[2].partition("\n\n")[0]
    reasons = dict(re.findall(r"^ *(\(\d+\)) (.*)$", table, re.MULTILINE))
    return {
        op: [reasons[number] if number else "yes" for number in re.findall(r"\byes\b|\bno (\(\d+\))", cells)]
        for op, cells in re.findall(r"^ *(\w+) (.*)$", table, re.MULTILINE)
        if op in OPS
    }


def test_the_table_says_what_runs() -> None:
    text = info.info()
    assert re.search(r"compiler: (g\+\+|.*[Cc]lang) \d+\.", text)
    matrix_kernels = why_not_matrix_kernels(torch.device("cpu"), torch.float32) or "yes"
    # Native is built. The tests run Triton's interpreter if there is no GPU.
    triton = "CPU tensors need Triton's interpreter" if torch.cuda.is_available() else "yes"
    for op, (native_cell, triton_cell, reference_cell) in _rows(text).items():
        assert native_cell == (matrix_kernels if op in MATRIX_OPS else "yes")
        assert triton_cell.startswith("there is no Triton kernel" if op in MATRIX_OPS else triton)
        assert reference_cell == "yes"


def test_the_table_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "it is a test"
    monkeypatch.setattr(FusedOp, "why_not", lambda op, backend, device: reason if backend == "native" else None)
    text = info.info()
    assert _rows(text) == {op: [reason, "yes", "yes"] for op in OPS}
    assert text.count(f"(1) {reason}") == 1 + torch.cuda.device_count()


@pytest.mark.parametrize(
    ("isa", "processor", "words"),
    [
        ("avx512_bf16", "AuthenticAMD 25", "products in bfloat16, at twice the rate of float32 on Zen 4"),
        ("avx512_bf16", "GenuineIntel 6", "maps in bfloat16 and products in float32, because this processor's"),
        ("avx2", "AuthenticAMD 25", "maps in bfloat16 and products in float32, because there are no"),
        ("amx", "GenuineIntel 6", "products in bfloat16, on the tiles of AMX: it pays"),
        ("baseline", "", "PyTorch's, because"),
    ],
)
def test_how_bfloat16_is_multiplied(isa: str, processor: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, isa=isa, processor=processor)
    monkeypatch.setattr(info, "native", lambda: SimpleNamespace(build_info=lambda: backend.BUILD))
    assert f"bfloat16 convolutions of a frozen network: {words}" in info.info()


def test_tiles_that_the_system_refuses_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "native", lambda: SimpleNamespace(build_info=lambda: backend.BUILD))
    for reason in ("the system refused them", ""):
        pretend(monkeypatch, tiles_refused=reason)
        assert (f"AMX's tiles are not in use: {reason}" in info.info()) == bool(reason)


@pytest.mark.parametrize(
    ("function", "reason", "text"),
    [
        ("native_error", "no such file", "Native\n  not loaded: no such file"),
        ("why_not_best_isa", "they were compiled for another", "\n  slower than it could be: they were compiled for another\n"),
    ],
)
def test_modules_that_are_absent_or_slow_are_explained(
    function: str, reason: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(info, function, lambda: reason)
    assert text in info.info()


def test_gpus_without_compiled_kernels_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs of two generations, of which the build serves one, as MIG instances."""
    capabilities = {0: (9, 0), 1: (12, 0)}
    mig = SimpleNamespace(name="NVIDIA H100 80GB HBM3 MIG 1g.10gb", major=9, minor=0, total_memory=10 * 2**30)
    reasons = {torch.device("cuda", 0): None, torch.device("cuda", 1): "no kernel image is available"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: mig)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    monkeypatch.setattr(backend, "_CUDA_REASONS", reasons)
    monkeypatch.setitem(backend.KERNELS, "cuda", SimpleNamespace(versions=lambda: [13000, 13000]))
    text = info.info()
    assert text.count("MIG 1g.10gb, compute capability 9.0, 10 GiB; a process uses one MIG instance: ") == 2
    first, second = text.partition("Ops on cuda:0\n")[2].split("Ops on cuda:1\n")
    assert "pip install" not in first
    assert ") no kernel image is available\n" in second
    assert "Compiled kernels on this GPU: To compile them for all visible GPUs, with nvcc 12 or later on PATH: pip" in second


def test_command() -> None:
    assert run("info") == info.info() + "\n"


def test_the_same_for_programs() -> None:
    facts = json.loads(run("info", "--json"))
    assert torch.__version__.startswith(facts["versions"]["torch"])  # without +cpu, in some builds
    assert (facts["native"].get("not loaded") is None) == (backend.native_error() is None)
    assert set(facts["ops"]["cpu"]) == set(OPS)
    assert facts["ops"]["cpu"]["q_sample"] == {each: OPS["q_sample"].why_not(each, torch.device("cpu")) for each in BACKENDS}
