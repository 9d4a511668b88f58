"""Recorded kernel calls on a CPU, the counterpart of CUDA graphs.

A network's kernel calls are recorded once and replayed on the same memory.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Final
from weakref import finalize

import torch
from torch import Tensor

MAX_RECORDINGS: Final = 4  # recordings of a network: one per input shape and number of threads

_thread = threading.local()  # .recording: the thread's current Recording, or None


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialized tensor for kernels to write, channels_last if it has four dimensions."""
    recording: Recording | None = getattr(_thread, "recording", None)
    if recording is not None:
        return recording.empty(shape, dtype)
    memory_format = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=dtype, device=device, memory_format=memory_format)


def hold_reference(*tensors: Tensor | None) -> None:
    """Hold references to tensors whose addresses a recorded kernel call uses. Tensors of `empty` need no call."""
    recording: Recording | None = getattr(_thread, "recording", None)
    if recording is not None:
        recording.held += tensors


class Recording:
    """The memory of the kernel calls that a function makes."""

    def __init__(self) -> None:
        self.held: list[Tensor | None] = []  # tensors whose addresses the calls use
        self._free: list[Tensor] = []  # memory that no tensor of `empty` uses at this point of the recording

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor in free memory of suitable size, or in new memory."""
        n, *rest = shape
        strides = torch.empty(tuple(shape), device="meta").stride()
        if len(shape) == 4:
            channels, height, width = rest
            strides = (channels * height * width, 1, channels * width, channels)
        size = n * strides[0] * dtype.itemsize
        fitting = [i for i, memory in enumerate(self._free) if size <= len(memory) <= 2 * size]
        if fitting:
            memory = self._free.pop(min(fitting, key=lambda i: len(self._free[i])))
        else:
            memory = torch.empty(size, dtype=torch.uint8, device="cpu")
            self.held.append(memory)
        tensor = torch.empty(0, dtype=dtype, device="cpu").set_(memory.untyped_storage(), 0, tuple(shape), strides)
        finalize(tensor, self._free.append, memory).atexit = False
        return tensor


class Recordings:
    """Recordings of one function, one per state and input shapes."""

    def __init__(self) -> None:
        self._recordings: OrderedDict[Hashable, Recording] = OrderedDict()  # in the order of last use
        self._lock = threading.Lock()  # a recording serves one thread at a time

    def run(self, function: Callable[..., Tensor], inputs: Sequence[Tensor], state: Hashable) -> Tensor:
        """Return function(*inputs), recorded or replayed.

        Args:
            function: Function to run.
            inputs: Dense tensors.
            state: Everything else that the result depends on.
        """
        return function(*inputs)

    def __reduce__(self) -> tuple[type[Recordings], tuple[()]]:
        return Recordings, ()  # a copy makes its own recordings
