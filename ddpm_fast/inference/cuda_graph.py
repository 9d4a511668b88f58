"""Capture of sampling steps as CUDA graphs."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import torch

DEVICE_TYPES: Final = ("cuda",)  # where steps are captured

_ONE_CAPTURE = threading.Lock()  # torch allows one capture at a time in a process


class CaptureError(RuntimeError):
    """Error for a CUDA graph that cannot be captured. The message has the reason. CUDA stays usable."""


def settings() -> Hashable:
    """Return the torch settings that decide which kernels a step launches."""
    cudnn: Any = torch.backends.cudnn
    precisions = (torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision)
    autocast = (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
    choice = (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, torch.are_deterministic_algorithms_enabled())
    return precisions + autocast + choice


def capture(
    rehearse: Callable[[], None], advance: Callable[[], object], stream: torch.cuda.Stream, pool: Any
) -> Callable[[], None]:
    """Capture the launches of `advance` as a CUDA graph and return its replay function.

    Args:
        rehearse: Does the same as `advance`, without lasting effects. Its first run compiles kernels and
            fills caches; an error there is the model's own. Its second run detects whether a step
            waits for the GPU, which a capture does not allow.
        advance: Launches one step.
        stream: Stream to capture on. It decides on the GPU.
        pool: Memory pool for tensors that exist during a step. It serves one stream.

    Raises:
        CaptureError: A step cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    with _ONE_CAPTURE:
        device = stream.device
        caller = torch.cuda.current_stream(device)
        stream.wait_stream(caller)
        try:
            # If a capture fails, torch.cuda.graph leaves its stream the current one. The context here restores it.
            # All graphs share one tensor for random numbers. It must not be a tensor of inference mode.
            with torch.cuda.stream(stream), torch.inference_mode(False), torch.no_grad():
                rehearse()
                try:
                    _refuse_waiting(rehearse)
                    record = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
                    with _own_workspaces(), record:
                        advance()
                except CaptureError:
                    raise
                except Exception as error:
                    _clean_up(device, stream, pool)
                    first_line = str(error).partition("\n")[0]
                    raise CaptureError(f"{type(error).__name__}: {first_line}") from error
        finally:
            caller.wait_stream(stream)
    return graph.replay


@contextmanager
def _own_workspaces() -> Iterator[None]:
    """Make cuBLAS allocate its workspaces in the memory of the captured graph.

    Otherwise graphs use the stream's workspaces, which torch frees too early. It frees them when it
    captures compiled code. After version 2.11 it also frees them when any graph of the stream is deleted
    (pytorch/pytorch#193402).
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()  # later calls must not use the graph's memory


def _refuse_waiting(run: Callable[[], None]) -> None:
    """Call `run`, and raise a CaptureError if it waited for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")  # not "error": the mode is the process's, and other threads may wait
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if "called a synchronizing CUDA operation" in str(warning.message):
            raise CaptureError(f"a step waits for the GPU ({warning.filename}:{warning.lineno})")


def _clean_up(device: torch.device, stream: torch.cuda.Stream, pool: Any) -> None:
    """End a failed capture for the allocator and the random number generator.

    If CUDA has aborted the capture, torch does not do this.
    """
    with suppress(Exception):  # CUDA had not aborted it, so the allocator knows
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
    # Only a successful capture ends that of the random numbers. This one is empty, so torch would warn.
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
            pass
