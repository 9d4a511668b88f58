"""Processes that work together, started by torchrun, `accelerate launch` or Slurm. torch.distributed connects them.

A program that one process runs is rank 0 of 1, without torch.distributed.
"""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from ..errors import InvalidValue, expect

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
        control: The group for tensors on the CPU. None: torch.distributed's default group.
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
        result: T | None = None
        error: Exception | None = None
        if self.is_first:
            try:
                result = function()
            except Exception as raised:
                error = raised
        failed = self.from_first([float(error is not None)])[0]
        if error is not None:
            raise error
        if failed:
            raise FirstFailed(f"rank {self.rank}: expected rank 0 to go on, got an error there, which it reports")
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

    def check_same(self, caller: str, values: Mapping[str, object]) -> None:
        """Raise in all processes unless all pass the same values.

        Raises:
            ValueError: A value differs from rank 0's. The message names it.
            ProcessLost: Another process has such a value, and reports it.
        """
        digests = [float(int(hashlib.sha256(repr(value).encode()).hexdigest()[:12], 16)) for value in values.values()]
        wanted = self.from_first(digests)
        differing = [name for name, mine, first in zip(values, digests, wanted, strict=True) if mine != first]
        anywhere = self.largest(len(differing))()
        if differing:
            name = differing[0]
            raise InvalidValue(
                caller,
                name,
                "to be the same in all processes",
                f"another than rank 0 in rank {self.rank}: {reprlib.repr(values[name])}",
            )
        if anywhere:
            raise ProcessLost(
                f"{caller}: expected all processes to be given the same, got another value in one, which it names"
            )

    def own_gpu(self, caller: str) -> torch.device:
        """Return the GPU of this process, whose number is the local rank. Raise a ValueError if there are too few."""
        if self.local_rank >= (count := torch.cuda.device_count()):
            raise InvalidValue(
                caller, "", f"at most {count} processes on a machine with as many GPUs", f"LOCAL_RANK {self.local_rank}"
            )
        return torch.device("cuda", self.local_rank)

    def check_gpu_backend(self, caller: str) -> None:
        """Raise a ValueError unless the default group can exchange CUDA tensors. gloo cannot in every call."""
        backends = dict(each.split(":") for each in dist.get_backend_config().split(","))
        expect(
            backends.get("cuda", "gloo") != "gloo",
            caller,
            "the default group of torch.distributed",
            'to have a backend for CUDA tensors ("cpu:gloo,cuda:nccl")',
            f'"{dist.get_backend()}"',
        )

    def count(self, key: str, number: int) -> int:
        """Add to a counter that all processes share, and return its value."""
        with together(self):
            total: int = self.store.add(key, number)
        return total

    def from_first(self, numbers: Sequence[float]) -> list[float]:
        """Return rank 0's numbers. All processes pass equally many."""
        if self.size == 1:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        with together(self):
            dist.broadcast(values, 0, group=self.control)
        return values.tolist()

    def from_all(self, number: float) -> list[float]:
        """Return the numbers of all processes, in the order of their ranks."""
        values = torch.zeros(self.size, dtype=torch.float64, device="cpu")
        values[self.rank] = number
        if self.size > 1:
            with together(self):
                dist.all_reduce(values, group=self.control)
        return values.tolist()

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Replace the tensors' values by rank 0's."""
        if self.size > 1:
            for tensor in tensors:
                values = tensor.detach().contiguous()
                with together(self):
                    dist.broadcast(values, 0, group=self._group(values))
                tensor.detach().copy_(values)

    def largest(self, number: int) -> Callable[[], int]:
        """Begin to find the largest number among all processes. Return a function that waits for it."""
        if self.size == 1:
            return lambda: number
        value = torch.tensor(number, device="cpu")
        with together(self):
            work = dist.all_reduce(value, dist.ReduceOp.MAX, group=self.control, async_op=True)

        def wait() -> int:
            with together(self):
                work.wait()
            return int(value)

        return wait

    @contextmanager
    def barrier(self, timeout: timedelta) -> Iterator[Callable[[], Callable[[], bool]]]:
        """Prepare barriers for processes that arrive up to `timeout` apart. All processes call this at the same time.

        Yields:
            A function to call on arrival. It returns a function that returns whether all processes have arrived, and raises
            ProcessLost if one has ended.
        """
        if self.size == 1:
            yield lambda: lambda: True
            return
        group = dist.new_group(backend="gloo", timeout=timeout)
        works: list[Any] = []

        def arrive() -> Callable[[], bool]:
            with together(self):
                work = dist.barrier(group, async_op=True)
            works.append(work)

            def all_arrived() -> bool:
                if not work.is_completed():
                    return False
                with together(self):
                    work.wait()  # raises the error of a barrier that failed
                return True

            return all_arrived

        with leaving(group, works):
            yield arrive

    def tree_sum(self, flat: Tensor) -> Tensor:
        """Return the sum of all processes' vectors, added in pairs: ((0 + 1) + (2 + 3)) + ... The size is a power of two.

        Each process receives its slice of every vector, adds the slices, and hands the sum to the others. The bytes that
        it sends are those of an all-reduce in a ring.
        """
        if self.size == 1:
            return flat
        length = -(-flat.numel() // self.size)  # elements a slice
        mine = functional.pad(flat, (0, self.size * length - flat.numel()))
        slices = torch.empty_like(mine)
        with together(self):
            dist.all_to_all_single(slices, mine, group=self._group(flat))
        parts = list(slices.view(self.size, length))
        while len(parts) > 1:
            parts = [left.add_(right) for left, right in zip(parts[::2], parts[1::2], strict=True)]
        with together(self):
            dist.all_gather(list(mine.view(self.size, length)), parts[0], group=self._group(flat))
        return mine[: flat.numel()]

    def sum_(self, flat: Tensor) -> Tensor:
        """Replace a tensor by the sum of all processes' tensors, in the order that torch.distributed chooses."""
        if self.size > 1:
            with together(self):
                dist.all_reduce(flat, group=self._group(flat))
        return flat

    def _group(self, tensor: Tensor) -> Any:
        return self.control if tensor.device.type == "cpu" else None


@contextmanager
def together(processes: Processes) -> Iterator[None]:
    """Raise ProcessLost if a call that all processes take part in fails."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ProcessLost(f"expected an answer of all {processes.size} processes, got: {reason}") from error


@contextmanager
def leaving(group: Any = None, works: Sequence[Any] = ()) -> Iterator[None]:
    """Destroy a process group at the end. Abort it after an error: its calls may wait for a process that hangs.

    Args:
        group: The group. None: the default group.
        works: Calls of gloo that may be under way.
    """
    try:
        yield
    except BaseException:
        for work in works:
            Thread(target=_keep, args=(group, work), daemon=True).start()
        # No public function aborts a group. The destructor of this one's communicator would wait for the other processes.
        with suppress(AssertionError, ValueError):  # the caller may have destroyed it
            dist.distributed_c10d._abort_process_group(group)
        raise
    dist.destroy_process_group(group)


def _keep(group: Any, work: Any) -> None:
    """Keep a reference to a group until a call has ended. gloo aborts no call, and its destructor waits for all."""
    with suppress(RuntimeError):
        work.wait()
