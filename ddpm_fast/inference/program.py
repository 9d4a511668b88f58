"""Programs: a list of calls, which computes a network or a whole sampling step for one input shape."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from ..ops.region import in_one_region, is_op

_ALIGNMENT: Final = 64  # bytes, a cache line


@dataclass(frozen=True)
class Buffer:
    """A value of a program: an input, or the result of a call.

    Attributes:
        index: Number of its memory. Views of the same memory share it.
        shape: [N, C, H, W] of a channels_last map, or the shape of a contiguous tensor.
        dtype: Its dtype.
        row: For a view of one row of a tensor [rows, *shape]: its number. None otherwise.
    """

    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    row: int | None = None

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * math.prod(self.shape)

    def rows(self) -> list[Buffer]:
        """Return a view of each row of the first dimension."""
        return [Buffer(self.index, self.shape[1:], self.dtype, row) for row in range(self.shape[0])]

    def as_pixels(self) -> Buffer:
        """Return a map [N, C, H, W] as [N, H W, C], on the same memory."""
        n, channels, height, width = self.shape
        return Buffer(self.index, (n, height * width, channels), self.dtype)

    def as_map(self, height: int, width: int) -> Buffer:
        """Return [N, H W, C] as a map [N, C, H, W], on the same memory."""
        n, _, channels = self.shape
        return Buffer(self.index, (n, channels, height, width), self.dtype)


Value: TypeAlias = Buffer | Tensor


@dataclass(frozen=True)
class Call:
    """A call of a function, which is an op or takes `out`, as functions of PyTorch do.

    Attributes:
        function: The function.
        arguments: Buffers, tensors, numbers and None. The memory of tensors is read at every run.
        out: Buffer of the result, or the tensors that an op writes in place.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    out: Buffer | tuple[Tensor, ...]


class Builder:
    """List of calls, as it grows."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._count = 0

    def buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Buffer:
        """Return a new buffer."""
        self._count += 1
        return Buffer(self._count - 1, tuple(shape), dtype)

    def call(self, function: Callable[..., Any], *arguments: Any, shape: Sequence[int], dtype: torch.dtype) -> Buffer:
        """Append a call and return its result."""
        out = self.buffer(shape, dtype)
        self.calls.append(Call(function, arguments, out))
        return out

    def update(self, op: Callable[..., Any], *arguments: Any, out: tuple[Tensor, ...]) -> None:
        """Append a call of an op that writes its results to tensors."""
        self.calls.append(Call(op, arguments, out))


class PythonProgram:
    """Executor that makes the calls one by one in Python.

    PyTorch allocates the results. Each is released after its last use.

    Args:
        calls: Calls in order.
        inputs: Buffers of the inputs.
        output: Buffer of the result. None: the calls write to tensors alone.
        backend: Backend of the ops. None: the first that can run.
    """

    def __init__(
        self, calls: Sequence[Call], inputs: Sequence[Buffer] = (), output: Buffer | None = None, backend: str | None = None
    ) -> None:
        self._inputs, self._output, self._backend = [buffer.index for buffer in inputs], output, backend
        last = _last_uses(calls, output)
        self._calls = []
        for i, call in enumerate(calls):
            buffers = {value.index for value in (*call.arguments, call.out) if isinstance(value, Buffer)}
            self._calls.append((call, [index for index in buffers if last.get(index, i) == i]))

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return the result for these inputs. They are only read."""
        assert self._output is not None
        return _viewed(self.run(inputs)[self._output.index], self._output)

    def run(self, inputs: Sequence[Tensor] = ()) -> dict[int, Tensor]:
        """Make the calls. Return the buffers that no call reads, by index."""
        values: dict[int, Tensor] = dict(zip(self._inputs, inputs, strict=True))
        for call, finished in self._calls:
            arguments = [_viewed(values[v.index], v) if isinstance(v, Buffer) else v for v in call.arguments]
            if not isinstance(call.out, Buffer):
                call.function(*arguments, backend=self._backend, out=call.out)
            elif is_op(call.function):
                values[call.out.index] = call.function(*arguments, backend=self._backend)
            else:
                values[call.out.index] = call.function(*arguments)
            for index in finished:
                del values[index]
        return values


class NativeProgram:
    """Executor on a CPU: the compiled module makes all calls of ops that follow each other in one parallel region.

    All buffers lie in one block of memory. Buffers whose lifetimes do not overlap share bytes of it. Only one
    thread at a time may call a program.

    Args:
        calls: Calls in order.
        inputs: Buffers of the inputs.
        output: Buffer of the result. None: the calls write to tensors alone.
        threads: Number of threads.
    """

    def __init__(
        self, calls: Sequence[Call], inputs: Sequence[Buffer] = (), output: Buffer | None = None, *, threads: int
    ) -> None:
        buffers = [*inputs, *(call.out for call in calls)]
        offsets, size = plan_memory(buffers, len(inputs), _last_uses(calls, output))
        memory = torch.empty(size, dtype=torch.uint8, device="cpu")

        def tensor(value: Any) -> Any:
            if not isinstance(value, Buffer):
                return value
            start = offsets[value.index] + (value.row or 0) * value.nbytes
            flat = memory[start : start + value.nbytes].view(value.dtype)
            if len(value.shape) != 4:
                return flat.view(value.shape)
            n, channels, height, width = value.shape
            return flat.view(n, height, width, channels).permute(0, 3, 1, 2)

        self._inputs, self._output = [tensor(buffer) for buffer in inputs], tensor(output)
        self._stages: list[Callable[[], Any]] = []
        for by_kernels, group in itertools.groupby(calls, lambda call: is_op(call.function)):
            bound = [(call.function, tuple(map(tensor, call.arguments)), tensor(call.out)) for call in group]
            if by_kernels:
                ops: Any = [(op, arguments, out if isinstance(out, tuple) else (out,)) for op, arguments, out in bound]
                self._stages.append(in_one_region(ops, threads))
            else:
                self._stages += [partial(function, *arguments, out=out) for function, arguments, out in bound]

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return the result for these inputs, as a new tensor. They are only read."""
        for own, x in zip(self._inputs, inputs, strict=True):
            own.copy_(x)
        self.run()
        result: Tensor = self._output.clone()
        return result

    def run(self) -> None:
        """Make the calls."""
        for stage in self._stages:
            stage()


def plan_memory(
    results: Sequence[Buffer | tuple[Tensor, ...]], num_inputs: int, last: dict[int, int]
) -> tuple[dict[int, int], int]:
    """Place buffers in one block of memory.

    The largest buffer is placed first, each at the lowest offset where it overlaps no placed buffer that is
    alive at the same time (greedy by size, Pisarchyk and Lee 2020).

    Args:
        results: The inputs, then the result of each call in order. Tensors among them have memory already.
        num_inputs: Number of inputs. They are alive from the start.
        last: Index of a buffer -> number of the last call that reads it.

    Returns:
        Offset of each buffer by index, and the size of the block, in bytes.
    """
    lifetimes = {}
    buffers = [(i, result) for i, result in enumerate(results) if isinstance(result, Buffer)]
    for i, buffer in buffers:
        first = max(i - num_inputs, -1)
        lifetimes[buffer.index] = (first, max(last.get(buffer.index, first), first))
    offsets: dict[int, int] = {}
    alive: defaultdict[int, set[tuple[int, int]]] = defaultdict(set)  # number of a call -> offsets and ends in use
    total = 0
    for _, buffer in sorted(buffers, key=lambda pair: -pair[1].nbytes):
        first, end = lifetimes[buffer.index]
        offset = 0
        for start, stop in sorted(set().union(*(alive[i] for i in range(first, end + 1)))):
            if offset + buffer.nbytes > start:
                offset = max(offset, stop)
        stop = offset + -(-buffer.nbytes // _ALIGNMENT) * _ALIGNMENT
        offsets[buffer.index] = offset
        for i in range(first, end + 1):
            alive[i].add((offset, stop))
        total = max(total, stop)
    return offsets, total


def _last_uses(calls: Sequence[Call], output: Buffer | None) -> dict[int, int]:
    """Return the number of the last call that reads each buffer. The output is read after all calls."""
    last = {value.index: i for i, call in enumerate(calls) for value in call.arguments if isinstance(value, Buffer)}
    if output is not None:
        last[output.index] = len(calls)
    return last


def _viewed(tensor: Tensor, buffer: Buffer) -> Tensor:
    """Return the tensor as the view that `buffer` is."""
    if buffer.row is not None:
        return tensor[buffer.row]
    if tensor.dim() == len(buffer.shape):
        return tensor
    if tensor.dim() == 4:
        return tensor.permute(0, 2, 3, 1).flatten(1, 2)
    pixels: Tensor = tensor.unflatten(1, buffer.shape[2:])
    return pixels.permute(0, 3, 1, 2)
