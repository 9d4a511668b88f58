"""Batches of a data set, read ahead by the workers of a DataLoader."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Generator, Iterable
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import InvalidValue
from .items import Batch, ItemDataset, collate

DECODING_WORKERS: Final = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
"""Number of processes that read items by default if these are decoded as they are used."""


def batches(
    dataset: ItemDataset, indices: Iterable[Tensor], num_workers: int | None = None, *, pin_memory: bool = False
) -> Generator[Batch, None, None]:
    """Yield the batch of each of the int64 indices [B]. Close the iterator to stop the workers.

    Args:
        dataset: The data set.
        indices: The numbers of the items of each batch. Each worker reads two batches ahead.
        num_workers: Number of processes that read. 0: this one. None: 0 if the items are in memory, else `DECODING_WORKERS`.
        pin_memory: Copy batches to memory that a GPU reads directly.

    Raises:
        ValueError: An item of this batch is wrong, or a worker process ended.
    """
    if num_workers is None:
        num_workers = 0 if dataset.in_memory else DECODING_WORKERS
    others, lost = multiprocessing.active_children(), None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # than processors: they may wait for disks
        loader: DataLoader[Any] = DataLoader(
            _Batches(dataset),
            batch_size=None,
            sampler=(each.tolist() for each in indices),
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=_leave_signals_to_parent,
            generator=torch.Generator(),  # else the loader draws from torch's generator
        )
        read = iter(loader)
    workers = [each for each in multiprocessing.active_children() if each not in others]
    # PyTorch's handler would raise in the middle of a training step. `next` notices a lost worker within seconds.
    handler = _watch_children(signal.SIG_DFL) if workers else None
    try:
        for batch in read:
            if isinstance(batch, ValueError):
                raise batch
            yield batch
    except (RuntimeError, OSError, EOFError) as error:  # a worker was killed, or has called sys.exit
        lost = RuntimeError(str(error) or type(error).__name__)  # the error's frames would keep the workers alive
    finally:
        del read  # ends the workers while nobody watches them
        for worker in workers:
            worker.kill()  # one that still waits for its file
        if workers:
            _watch_children(handler)
    if lost is not None:
        raise InvalidValue("dataset", "to be read by its workers", lost) from lost


class _Batches(Dataset[Any]):
    """The batches of a data set for a DataLoader. If an item is wrong, the error takes the batch's place.

    The error is not raised, because PyTorch would replace its text by the worker's traceback and keep the workers alive.
    """

    def __init__(self, dataset: ItemDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, indices: list[int]) -> Batch | ValueError:
        try:
            return collate([self._dataset[index] for index in indices])
        except ValueError as error:
            return error.with_traceback(None)


def _leave_signals_to_parent(worker: int) -> None:
    """Ignore the signals by which a terminal or a launcher ends all processes, so that the parent can finish its step."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _watch_children(handler: Any) -> Any:
    """Set the handler of the signal that a child has ended. Return the one before. Only the main thread has handlers."""
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        return signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    return None
