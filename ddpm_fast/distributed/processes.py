"""Processes that work together, started by torchrun, `accelerate launch` or Slurm. torch.distributed connects them.

A program that one process runs is rank 0 of 1, without torch.distributed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import check_same
from ..errors import expect

T = TypeVar("T")


class ProcessLost(RuntimeError):
    """The end or failure of another process, without which this one cannot go on."""


class FirstFailed(ProcessLost):
    """An error of rank 0, as the other processes see it. Rank 0 reports the reason."""


@dataclass(frozen=True)
class Processes:
    """The processes of one call, as this one sees them.

    Attributes:
        rank: Number of this process, 0..size-1.
        size: Number of processes.
        local_rank: Number of this process among those of its machine.
        store: Counters that all processes share. None: one process.
        control: The group for what is on the CPU. None: one process.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    store: Any = None
    control: Any = None

    @property
    def is_first(self) -> bool:
        """True for rank 0, which writes files and shows progress."""
        return self.rank == 0

    def on_first(self, function: Callable[[], T]) -> T | None:
        """Run a function in rank 0, while the others wait. Return its result in rank 0, and None in the others.

        Raises:
            FirstFailed: It failed in rank 0, whose error says why.
        """
        if not self.is_first:
            if not self.from_first(False):
                raise FirstFailed(f"rank {self.rank}: expected rank 0 to go on, got an error there, which it reports")
            return None
        try:
            result = function()
        except Exception:
            self.from_first(False)
            raise
        self.from_first(True)
        return result

    def machine_by_machine(self, function: Callable[[], T]) -> T:
        """Run a function in rank 0, then in one process of each other machine, then in the rest. Return its result.

        The later ones find the files that the earlier ones have written.
        """
        turn = 0 if self.is_first else 1 if self.local_rank == 0 else 2
        for present in range(3):
            if present == turn:
                result = function()
            self.largest(0)()  # all wait
        return result

    def check_same(self, values: Mapping[str, object]) -> None:
        """Raise a ValueError in all processes unless all pass the same values."""
        first, *others = self.from_all(dict(values))
        for rank, other in enumerate(others, 1):
            check_same(other, first, "rank 0", f" in rank {rank}")

    def own_gpu(self) -> torch.device:
        """Return the GPU of this process, whose number is the local rank. Raise a ValueError if there are too few."""
        count = torch.cuda.device_count()
        expect(
            self.local_rank < count,
            "",
            f"at most {count} processes on a machine with as many GPUs",
            f"LOCAL_RANK {self.local_rank}",
        )
        return torch.device("cuda", self.local_rank)

    def check_gpu_backend(self) -> None:
        """Raise a ValueError unless the default group can exchange CUDA tensors. gloo cannot in every call."""
        backends = dict(each.split(":") for each in dist.get_backend_config().split(","))
        expect(
            backends.get("cuda", "gloo") != "gloo",
            "the default group of torch.distributed",
            'to have a backend for CUDA tensors ("cpu:gloo,cuda:nccl")',
            f'"{dist.get_backend()}"',
        )

    def count(self, key: str, number: int) -> int:
        """Add to a counter that all processes share, and return its value."""
        with together():
            return int(self.store.add(key, number))

    def from_first(self, value: T) -> T:
        """Return rank 0's value. It is pickled."""
        return self.from_all(value)[0]

    def from_all(self, value: T) -> list[T]:
        """Return the values of all processes, in the order of their ranks. They are pickled."""
        values = [value] * self.size
        if self.size > 1:
            with together():
                dist.all_gather_object(values, value, group=self.control)
        return values

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Replace the tensors' values by rank 0's."""
        if self.size > 1:
            for tensor in tensors:
                values = tensor.detach().contiguous()
                with together():
                    dist.broadcast(values, 0, group=self._group(values))
                tensor.detach().copy_(values)

    def largest(self, number: int) -> Callable[[], int]:
        """Begin to find the largest number among all processes. Return a function that waits for it."""
        if self.size == 1:
            return lambda: number
        value = torch.tensor(number, device="cpu")
        with together():
            work = dist.all_reduce(value, dist.ReduceOp.MAX, group=self.control, async_op=True)

        def wait() -> int:
            with together():
                work.wait()
            return int(value)

        return wait

    def arrive(self) -> Future[int]:
        """Arrive at a barrier. Return a future that ends when all have arrived, or by ProcessLost if one has ended."""
        arrival = Future[int]()
        Thread(target=self._end, args=(arrival, self.largest(0)), daemon=True).start()
        return arrival

    def _end(self, arrival: Future[int], all_arrived: Callable[[], int]) -> None:
        """End a future when all have arrived.

        The thread keeps `self.control` until then, also if this process leaves: gloo aborts no call, and the group's
        destructor would wait for it.
        """
        try:
            arrival.set_result(all_arrived())
        except Exception as error:  # whatever it is, this process would wait for the future forever
            arrival.set_exception(error)

    def tree_sum(self, flat: Tensor) -> Tensor:
        """Return the sum of all processes' vectors, added in pairs: ((0 + 1) + (2 + 3)) + ... The size is a power of two.

        Each process receives its slice of every vector, adds the slices, and hands the sum to the others. The bytes that
        it sends are those of an all-reduce in a ring.
        """
        if self.size == 1:
            return flat
        length = -(-flat.numel() // self.size)  # elements a slice
        mine = torch.nn.functional.pad(flat, (0, self.size * length - flat.numel()))
        slices = torch.empty_like(mine)
        with together():
            dist.all_to_all_single(slices, mine, group=self._group(flat))
            parts = list(slices.view(self.size, length))
            while len(parts) > 1:
                parts = [left.add_(right) for left, right in zip(parts[::2], parts[1::2], strict=True)]
            dist.all_gather(list(mine.view(self.size, length)), parts[0], group=self._group(flat))
        return mine[: flat.numel()]

    def sum_(self, flat: Tensor) -> Tensor:
        """Replace a tensor by the sum of all processes' tensors, in the order that torch.distributed chooses."""
        if self.size > 1:
            with together():
                dist.all_reduce(flat, group=self._group(flat))
        return flat

    def _group(self, tensor: Tensor) -> Any:
        return self.control if tensor.device.type == "cpu" else None


@contextmanager
def together() -> Iterator[None]:
    """Raise ProcessLost if a call that all processes take part in fails."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ProcessLost(f"expected an answer of all processes, got: {reason}") from error
