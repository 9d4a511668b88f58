"""`cuda_graph.capture`: the order of its calls, and its errors. A stand-in takes the place of torch.cuda."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from ddpm_fast.inference import cuda_graph


@dataclasses.dataclass
class PretendStream:
    name: str
    log: list[str]
    device: torch.device = torch.device("cuda", 0)  # noqa: RUF009

    def wait_stream(self, other: PretendStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


class PretendCuda:
    """A stand-in for torch.cuda. It notes each call in `log`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.modes: list[tuple[bool, bool]] = []  # inference mode, gradients: of every rehearsal and capture
        self.mode: int | str = 0
        self.fails = self.waits = self.refuses = False
        caller, self.side = PretendStream("caller", self.log), PretendStream("side", self.log)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: self.log.append("replay")))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: caller)
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.mode)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(self, "mode", mode))
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *_: self.log.append("allocator ends"), raising=False)
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: self.log.append("no workspaces"), raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *_: self.log.append("pool released"), raising=False)

    @contextmanager
    def stream(self, stream: PretendStream) -> Iterator[None]:
        self.log.append(f"on {stream.name}")
        try:
            yield
        finally:
            self.log.append("on caller")

    @contextmanager
    def graph(self, *_: object, **__: object) -> Iterator[None]:
        self.log.append("begin")
        yield
        self.log.append("end")

    def rehearse(self) -> None:
        self.modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        self.log.append(f"rehearse in mode {self.mode}")
        if self.fails:
            raise IndexError("as without a graph")
        if self.waits and self.mode == "warn":
            warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)

    def advance(self) -> None:
        self.modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        self.log.append("advance")
        if self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing\nand a long story")

    def capture(self) -> Callable[[], None]:
        return cuda_graph.capture(self.rehearse, self.advance, self.side, pool="pool")  # type: ignore[arg-type]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> PretendCuda:
    return PretendCuda(monkeypatch)


BEFORE = ["side waits for caller", "on side", "rehearse in mode 0", "rehearse in mode warn"]
AFTER = ["on caller", "caller waits for side"]


def test_a_capture_is_rehearsed_twice_on_its_own_stream(cuda: PretendCuda) -> None:
    """Torch keeps a tensor for the random numbers of all graphs, which a capture outside of inference mode writes to."""
    with torch.inference_mode():
        replay = cuda.capture()
    # cuBLAS takes its workspaces during the capture, and leaves them to the graph.
    assert cuda.log == [*BEFORE, "no workspaces", "begin", "advance", "end", "no workspaces", *AFTER]
    assert cuda.modes == 3 * [(False, False)]
    replay()
    assert (cuda.log[-1], cuda.mode) == ("replay", 0)


ENDED = ["no workspaces", "begin", "advance", "no workspaces", "allocator ends", "pool released"]


@pytest.mark.parametrize(
    ("fault", "error", "message", "log"),
    [
        ("fails", IndexError, "^as without a graph$", [*BEFORE[:3], *AFTER]),  # the model's own
        ("waits", cuda_graph.CaptureError, r"^a step waits for the GPU \(.*test_cuda_graph\.py:\d+\)", [*BEFORE, *AFTER]),
        (
            "refuses",
            cuda_graph.CaptureError,
            "^RuntimeError: operation not permitted when stream is capturing$",
            # It is ended for the allocator and for random numbers too.
            [*BEFORE, *ENDED, "begin", "end", *AFTER],
        ),
    ],
)
def test_a_failure_is_an_error_that_leaves_cuda_as_it_was(
    fault: str, error: type[Exception], message: str, log: list[str], cuda: PretendCuda
) -> None:
    setattr(cuda, fault, True)
    with pytest.raises(error, match=message):
        cuda.capture()
    assert (cuda.log, cuda.mode) == (log, 0)
