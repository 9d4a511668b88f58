"""Sessions of `sample`: frozen networks and captured CUDA graphs, kept between calls."""

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
    """Error for a CUDA graph that cannot be captured. The message has the reason. CUDA stays usable."""


class Session:
    """A network to sample with, and its loops.

    Args:
        state: Everything that the session depends on. A different state invalidates it.
        network: Network to evaluate. None: the model itself, which a kept session must not reference.
        captures: Whether loops are captured as CUDA graphs.
    """

    def __init__(self, state: Hashable, network: nn.Module | None, captures: bool) -> None:
        self.state, self.network, self._captures = state, network, captures
        self._loops: OrderedDict[Hashable, Loop] = OrderedDict()  # the one used last is last
        self._pool: Any = None  # of memory: graphs take turns, so one serves all of them

    def loop(self, key: Hashable, make: Callable[[], Loop], network: nn.Module) -> Loop:
        """Return the loop of `key`, creating and capturing it at first use.

        Without capture a new loop is created at every call, which is cheap.

        Args:
            key: Everything that the loop depends on.
            make: Creates the loop.
            network: Network to evaluate.
        """
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
    """Yield a session to sample with.

    A `UNet` is frozen. Any other model is used as it is, or copied to another device or dtype. The session
    is kept if graphs are captured, or if the network was frozen by default. The next call uses it if the
    model is unchanged and the stream the same. It is released with the model.

    Args:
        model: Model to sample with.
        device: Device to run on.
        dtype: Dtype of the network. None: chosen by `freeze`, or the model's.
        num_timesteps: T.
        cuda_graph: Capture graphs. None: on a GPU, for a `UNet` or its inference form.
    """
    on_gpu = device.type in DEVICE_TYPES
    reason = why_not_frozen(model) if on_gpu or device.type == "cpu" else f"it is on {device.type}"
    if reason is not None and isinstance(model, UNet):
        _logger.info("sample: the network is not frozen, as %s", reason)
    freezes = reason is None
    if freezes and dtype is None and device.type == "cpu":
        _, dtype = device_and_dtype(model)  # not another one, as `freeze` would choose it
    # Other models may not compute the same from the same memory each time.
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
    """Release what is kept for this model."""
    _KEPT.pop(model, None)


def _stream(device: torch.device) -> Hashable:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _weights(model: nn.Module) -> Hashable:
    """Return a value that changes if the model's weights move or change.

    A write through `.data`, as in some moving averages, changes only the values. Sums of the values' bits
    detect it, unless it only permutes values.
    """
    tensors = [*model.parameters(), *model.buffers()]
    places = [(tensor.data_ptr(), tensor.dtype, 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    floating = [tensor.detach() for tensor in tensors if tensor.is_floating_point()]
    sums = [tensor.view(words[tensor.element_size()]).sum().to(floating[0].device) for tensor in floating]
    return (*places, *(torch.stack(sums).tolist() if sums else []))


def _settings() -> Hashable:
    """Return the torch settings that decide which kernels a step launches."""
    cudnn: Any = torch.backends.cudnn
    precisions = (torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision)
    autocast = (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
    choice = (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, torch.are_deterministic_algorithms_enabled())
    return precisions + autocast + choice


def capture(rehearse: Callable[[], None], advance: Callable[[], None], device: torch.device, pool: Any) -> Callable[[], None]:
    """Capture the launches of `advance` as a CUDA graph and return its replay function.

    Args:
        rehearse: Does the same as `advance`, without lasting effects. Its first run compiles kernels and
            fills caches; an error there is the model's own. Its second run detects whether a step
            waits for the GPU, which a capture does not allow.
        advance: Launches one step.
        device: GPU to capture on.
        pool: Memory pool for tensors that exist during a step.

    Raises:
        CaptureError: A step cannot be captured.
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
    """Return the capture stream of a device, always the same. Memory of a pool serves one stream."""
    if device not in _CAPTURE_STREAMS:
        _CAPTURE_STREAMS[device] = torch.cuda.Stream(device)
    return _CAPTURE_STREAMS[device]


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
        torch._C._cuda_clearCublasWorkspaces()  # not for others, who would use the graph's memory


def _refuse_waiting(run: Callable[[], None]) -> None:
    """Call `run`, and raise a CaptureError if it waited for the GPU."""
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
    """End a failed capture for the allocator and the random number generator.

    If CUDA has aborted the capture, torch does not do this.
    """
    with suppress(Exception):  # it had not: the allocator knows
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
    # Only a capture that succeeds ends the random numbers' own: one of nothing, of which torch would warn.
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
            pass
