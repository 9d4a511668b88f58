"""Join the processes that torchrun, `accelerate launch` or Slurm has started."""

from __future__ import annotations

import itertools
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from functools import cache, partial
from typing import Any, Final

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous

from ..errors import expect
from .processes import Processes, together

# A process that ends closes its connections, which the others notice at once. One that hangs is waited for.
TIMEOUT: Final = timedelta(minutes=30)

_TORCHRUN: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # accelerate sets the same
_SLURM: Final = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")

_joins = itertools.count()  # all processes join the same number of times, so their counts agree


@contextmanager
def joined(timeout: timedelta = TIMEOUT) -> Iterator[Processes]:
    """Join the processes that were started together, and leave them at the end.

    torchrun and `accelerate launch` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Slurm's `srun` sets
    SLURM_PROCID, SLURM_NTASKS and SLURM_LOCALID: they count if MASTER_ADDR and MASTER_PORT are set as well. Without
    these variables there is one process. A default group of torch.distributed that exists is used, and stays. After an error
    the processes do not wait for each other.

    Args:
        timeout: The longest time that a process waits for another one after all have joined.

    Raises:
        ValueError: A variable is missing, or is no number in its range.
        ProcessLost: Another process has failed or ended.
    """
    exists = dist.is_initialized()
    rank, size, local_rank = (0, 0, int(os.environ.get("LOCAL_RANK", "0"))) if exists else ranks(os.environ)
    if size == 1:
        yield Processes()
        return
    with ExitStack() as stack:
        with together():
            shared = c10d._get_default_store() if exists else _shared_store(rank, size)
            store = c10d.PrefixStore(f"ddpm_fast/{next(_joins)}", shared)
            if not exists:
                backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
                dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
                stack.push(partial(_leave, dist.group.WORLD))
            control = dist.new_group(backend="gloo", timeout=timeout)  # the default group may be NCCL's alone
            stack.push(partial(_leave, control))
        yield Processes(dist.get_rank(), dist.get_world_size(), local_rank, store, control)


@cache
def _shared_store(rank: int, size: int) -> Any:
    """Return a store for the keys of these processes. It stays until this process ends, so that they can join again.

    torchrun keeps the keys of processes that it has replaced, and machines count restarts differently. So rank 0 makes a
    prefix, and tells it each other process under a token that is new.
    """
    store, _, _ = next(rendezvous("env://", rank, size, timeout=TIMEOUT))
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    prefix = token = secrets.token_hex(8)
    if rank > 0:
        store.set(f"ddpm_fast/asks/{rank}", token)
        prefix = store.get(f"ddpm_fast/answer/{token}").decode()  # waits for it
        store.set(f"{prefix}/{rank}", "told")
    for other in range(1, size) if rank == 0 else ():
        while not store.check([f"{prefix}/{other}"]):
            if time.monotonic() > deadline:
                raise RuntimeError(f"no rank {other} within {TIMEOUT}")
            asked = store.get(f"ddpm_fast/asks/{other}").decode()  # it may be the token of a process that was replaced
            store.set(f"ddpm_fast/answer/{asked}", prefix)
            time.sleep(0.005)
    return c10d.PrefixStore(prefix, store)


def _leave(group: Any, kind: type[BaseException] | None, *error: object) -> None:
    """Destroy a process group. Abort it after an error, as its calls may wait for a process that hangs."""
    # No public function aborts a group. The destructor of NCCL's communicator would wait for the other processes.
    leave = dist.destroy_process_group if kind is None else c10d._abort_process_group
    with suppress(AssertionError, ValueError):  # the caller may have destroyed it
        leave(group)


def ranks(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """Return this process's number, the number of processes, and its number on this machine.

    Args:
        environment: Variables of the environment.

    Raises:
        ValueError: A variable is missing, or is no number in its range.
    """
    names = _TORCHRUN if {"RANK", "WORLD_SIZE"} & environment.keys() else _SLURM
    # A batch script has Slurm's variables, too, though it is one process. It has no master.
    if names is _SLURM and not {"SLURM_PROCID", "MASTER_ADDR"} <= environment.keys():
        return 0, 1, 0
    texts = [environment.get(name, default) for name, default in zip(names, ("none", "none", "0"), strict=True)]
    for name, text in zip(names, texts, strict=True):
        expect(text.isdecimal(), f"the environment's {name}", "to be a number", f"{text!r}; start with torchrun")
    rank, size, local_rank = map(int, texts)
    expect(rank < size, f"the environment's {names[0]}", f"to be below {names[1]}", f"{rank} of {size}")
    return rank, size, local_rank


def own_device(device: torch.device) -> torch.device:
    """Return the device, or for a GPU without a number that of the local rank, if torchrun or the like has set one.

    Processes that each see one GPU have one each. More processes than GPUs share them.
    """
    slurm = "" if "MASTER_ADDR" not in os.environ else os.environ.get("SLURM_LOCALID", "")
    local = os.environ.get("LOCAL_RANK", slurm)
    if device != torch.device("cuda") or not local.isdecimal():
        return device
    return torch.device("cuda", int(local) % max(torch.cuda.device_count(), 1))
