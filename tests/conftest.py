"""Test-wide settings."""

import os
from collections.abc import Iterator

import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms ask of cuBLAS
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: its kernels then run on CPU tensors

from types import ModuleType

import pytest
from emulator import build

from ddpm_fast.ops import backend


@pytest.fixture(autouse=True)
def _nan_filled_buffers():
    """An output that a kernel leaves unwritten is NaN, not luck."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["cpu"])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


_EMULATED = pytest.StashKey[dict[str, int]]()  # what has run on the emulator


@pytest.fixture(scope="session")
def emulated_module(pytestconfig: pytest.Config) -> Iterator[ModuleType]:
    """The CUDA kernels on a CPU, with the names and arguments of ddpm_fast._native.cuda. See tests/emulator/README.md."""
    reason = build.why_not()
    if reason is not None:
        pytest.skip(reason)
    module = build.load(build.build(os.environ.get("DDPM_FAST_EMULATOR", "thread")))
    yield module
    pytestconfig.stash[_EMULATED] = module.counters()


@pytest.fixture
def emulated(emulated_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The native kernels of CPU tensors, for a test, are the emulated ones."""
    emulated_module.set_device(0)
    emulated_module.set_order()
    monkeypatch.setitem(backend.KERNELS, "cpu", emulated_module)
    return emulated_module


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    import gpu_check

    why_old = gpu_check.why_old()
    if why_old is not None:
        terminalreporter.write_line(
            f"The native module was not built from these sources: {why_old}. Run `make build`.", red=True
        )
    if _EMULATED in config.stash:
        ran = ", ".join(f"{count} {what}" for what, count in config.stash[_EMULATED].items())
        terminalreporter.write_line(f"On the emulator: {ran}")
