"""Fixtures of all tests, for the conftest of each folder of tests to import."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from types import ModuleType

import fresh_machine
import kernel_calls
import pytest
import torch
from emulator import build

from ddpm_fast.ops import backend

EMULATED: pytest.StashKey[Counter[str]] = pytest.StashKey()  # what has run on the emulator


@pytest.fixture(autouse=True)
def _fresh_machine(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test reaches the network or a data set, unless it is marked `data_sets`."""
    with fresh_machine.lifted() if request.node.get_closest_marker("data_sets") else nullcontext():
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Torch's random numbers do not depend on the tests before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nan_filled_buffers() -> Iterator[None]:
    """An output that a kernel leaves unwritten is NaN, not luck."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["cpu"])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def matrix_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the kernels of convolution and attention by vectors available on any instruction set, even if others are faster."""
    if backend.native_error() is None:
        kernel_calls.pretend(monkeypatch, **kernel_calls.for_any_cpu())


@pytest.fixture
def no_matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train in bfloat16 by the kernels on CPUs with AMX, too, where it is PyTorch's."""
    if backend.native_error() is None:
        kernel_calls.pretend(monkeypatch, tiles=False)


def leave_matrices_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the ops of a frozen network that exist on CPUs alone unavailable, as on a GPU."""
    from ddpm_fast.ops.packed_conv import conv_ops
    from ddpm_fast.ops.step_parts import count_step_op, network_input_op, time_terms_op

    for op in (*conv_ops.values(), time_terms_op, network_input_op, count_step_op):
        monkeypatch.setitem(op.spec.limits, "native", lambda *_: "as on a GPU")


@pytest.fixture
def no_matrix_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Freeze networks without this package's kernels of convolution and attention."""
    leave_matrices_to_pytorch(monkeypatch)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the names of the CPU kernels that ops call, in order."""
    if "cpu" not in backend.KERNELS:
        return []
    recorder = kernel_calls.Recorder(backend.KERNELS["cpu"])
    monkeypatch.setitem(backend.KERNELS, "cpu", recorder)
    return recorder.calls


@pytest.fixture(scope="session")
def emulated_module(pytestconfig: pytest.Config) -> Iterator[ModuleType]:
    """The CUDA kernels on a CPU, with the names and arguments of ddpm_fast._native.cuda. See tests/emulator/README.md."""
    reason = build.why_not()
    if reason is not None:
        pytest.skip(reason)
    module = build.load(build.build(os.environ.get("DDPM_FAST_EMULATOR", "thread")))
    yield module
    counts = module.counters()
    pytestconfig.stash[EMULATED] = Counter(counts)
    if hasattr(pytestconfig, "workeroutput"):  # a process of pytest-xdist, which tells the one that prints
        pytestconfig.workeroutput["emulated"] = counts


@pytest.fixture
def emulated(emulated_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The native kernels of CPU tensors, for a test, are the emulated ones."""
    emulated_module.set_device(0)
    emulated_module.set_order()
    monkeypatch.setitem(backend.KERNELS, "cpu", emulated_module)
    return emulated_module
