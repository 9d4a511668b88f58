"""What sampling runs, kept from call to call: networks in their inference form; on a GPU, steps captured into CUDA graphs."""

from __future__ import annotations

import logging
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .loop import Loop
from .networks import device_and_dtype, placed
from .nn.freeze import FrozenUNet, freeze, why_not_frozen
from .nn.unet import UNet

DEVICE_TYPES: Final = ("cuda",)  # where steps are captured
MAX_LOOPS: Final = 4  # kept for a model: batch sizes, plans, scales

_logger = logging.getLogger(__name__)
_ONE_CAPTURE = threading.Lock()  # in the process, as torch demands
_CAPTURE_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


class CaptureError(RuntimeError):
    """No CUDA graph can be made; the message says why. CUDA is as usable as before."""


class Session:
    """A network to sample with, and the loops that ran with it.

    Args:
        state: what all this is made from, and for.
        network: to evaluate; None: the model itself, which a session that is kept must not keep alive.
        captures: whether loops are captured.
    """

    def __init__(self, state: Hashable, network: nn.Module | None, captures: bool) -> None:
        self.state, self.network, self._captures = state, network, captures
        self._loops: OrderedDict[Hashable, Loop] = OrderedDict()  # the one used last is last
        self._pool: Any = None  # of memory: graphs take turns, so one serves all of them

    def loop(self, key: Hashable, make: Callable[[], Loop], network: nn.Module) -> Loop:
        """The loop of this key, made and captured at its first use; one that is not captured, which is soon made, each time."""
        if not self._captures:
            return make()
        key = (key, _settings())
        loop = self._loops.pop(key, None)
        if loop is None:
            loop = make()
            self._capture(loop, network)
            if len(self._loops) == MAX_LOOPS:
                self._loops.popitem(last=False)
        self._loops[key] = loop
        return loop

    def _capture(self, loop: Loop, network: nn.Module) -> None:
        def rehearse() -> None:
            loop.rewind()
            loop.advance(network)

        kind = loop.x_t.device.type
        if self._pool is None and kind == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
        try:
            # Weights that autocast has cast once and kept would be gone by the time of a replay.
            with torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False):
                loop.replay = capture(rehearse, lambda: loop.advance(network), loop.x_t.device, self._pool)
        except CaptureError as error:
            self._pool = None  # torch may take it for one that is still recorded to
            _logger.warning("sample: steps are launched one kernel at a time, as there can be no CUDA graph: %s", error)


_KEPT: WeakKeyDictionary[nn.Module, Session] = WeakKeyDictionary()


@contextmanager
def session(
    model: nn.Module, device: torch.device, dtype: torch.dtype | None, num_timesteps: int, cuda_graph: bool | None
) -> Iterator[Session]:
    """What to sample with: the inference form of a `UNet`, or another model, moved and cast by a copy if need be.

    All is kept for the next call with the same unchanged model on the same stream, until that model is gone, where graphs are
    captured or, by default, the network was frozen.
    """
    on_gpu = device.type in DEVICE_TYPES
    reason = why_not_frozen(model) if on_gpu or device.type == "cpu" else f"it is on {device.type}"
    if reason is not None and isinstance(model, UNet):
        _logger.info("sample: the network is not frozen, as %s", reason)
    freezes = reason is None
    if freezes and dtype is None and device.type == "cpu":
        _, dtype = device_and_dtype(model)  # not another one, as `freeze` would choose it
    # Of other models nobody knows whether they compute the same from the same memory each time.
    captures = on_gpu and (freezes or type(model) is FrozenUNet if cuda_graph is None else cuda_graph)
    keeps = captures or (freezes and cuda_graph is None)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        # On another stream nothing would keep what is freed here, or overwritten, from being in use there.
        state = (device, _stream(device), dtype, num_timesteps, freezes, _weights(model)) if keeps else None
        kept = _KEPT.pop(model, None) if keeps else None  # out of reach of other threads while it is in use
        if kept is not None and kept.state != state:
            kept = None  # before another takes memory
        if kept is None:
            if freezes and isinstance(model, UNet):
                network: nn.Module = freeze(model, dtype, device=device, num_timesteps=num_timesteps)
            else:
                network = placed(model, device, dtype)
            kept = Session(state, None if network is model else network, captures)
        yield kept
        if keeps:
            _KEPT[model] = kept


def forget(model: nn.Module) -> None:
    """Lets go of what is kept for this model."""
    _KEPT.pop(model, None)


def _stream(device: torch.device) -> Hashable:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _weights(model: nn.Module) -> Hashable:
    """Differs where the model's weights are elsewhere, or have changed.

    A write through `.data`, as some moving averages do it, leaves no trace but the values: hence the sums of their bits. Such
    a write that only moves values about is not seen.
    """
    tensors = [*model.parameters(), *model.buffers()]
    places = [(tensor.data_ptr(), tensor.dtype, 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    floating = [tensor.detach() for tensor in tensors if tensor.is_floating_point()]
    sums = [tensor.view(words[tensor.element_size()]).sum().to(floating[0].device) for tensor in floating]
    return (*places, *(torch.stack(sums).tolist() if sums else []))


def _settings() -> Hashable:
    """Of torch, which decide what kernels a step launches."""
    cudnn: Any = torch.backends.cudnn
    precisions = (torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision)
    autocast = (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
    choice = (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, torch.are_deterministic_algorithms_enabled())
    return precisions + autocast + choice


def capture(rehearse: Callable[[], None], advance: Callable[[], None], device: torch.device, pool: Any) -> Callable[[], None]:
    """Has the GPU record what `advance` launches, and returns what launches all of it at once.

    Args:
        rehearse: does what `advance` does, without consequences. The first run compiles kernels and fills caches; what it
            raises is the model's own error. The second finds out whether anything waits for the GPU: a capture would fail.
        pool: of the memory for what lives during a step.

    Raises:
        CaptureError: something cannot be recorded.
    """
    graph = torch.cuda.CUDAGraph()
    with _ONE_CAPTURE:
        caller, stream = torch.cuda.current_stream(device), capture_stream(device)
        stream.wait_stream(caller)
        try:
            # torch.cuda.graph would leave its stream the current one where a capture fails. Ordinary tensors, because torch
            # keeps one for the random numbers of all graphs, and those that others capture may be of another mode.
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


def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Always the same: memory of a pool serves one stream."""
    if device not in _CAPTURE_STREAMS:
        _CAPTURE_STREAMS[device] = torch.cuda.Stream(device)
    return _CAPTURE_STREAMS[device]


@contextmanager
def _own_workspaces() -> Iterator[None]:
    """Has cuBLAS take its workspaces from the memory of the graph that is captured.

    Else they are those of the stream, which torch frees although graphs use them: where it makes graphs of compiled code, and
    after version 2.11 where any graph goes that was captured on the stream (pytorch/pytorch#193402).
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()  # not for others, who would use the graph's memory


def _refuse_waiting(run: Callable[[], None]) -> None:
    """Runs it; CaptureError if it waited for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")  # not "error": the mode is the process's, and other threads may wait
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in told:
        if "called a synchronizing CUDA operation" in str(warning.message):
            raise CaptureError(f"a step waits for the GPU ({warning.filename}:{warning.lineno})")


def _clean_up(device: torch.device, stream: torch.cuda.Stream, pool: Any) -> None:
    """Ends a capture for the allocator and the random numbers too, which torch forgets where CUDA has given the capture up."""
    with suppress(Exception):  # it had not: the allocator knows
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
    # Only a capture that succeeds ends the random numbers' own: one of nothing, of which torch would warn.
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
            pass
