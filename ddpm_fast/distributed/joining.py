"""Join the processes that torchrun, `accelerate launch` or Slurm has started."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ..errors import InvalidValue, expect
from .processes import Processes, leaving, together

# A process that ends closes its connections, which the others notice at once. One that hangs is waited for.
TIMEOUT: Final = timedelta(minutes=30)

_TORCHRUN: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # accelerate sets the same
_SLURM: Final = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
_MASTER: Final = ("MASTER_ADDR", "MASTER_PORT")


@contextmanager
def joined(caller: str) -> Iterator[Processes]:
    """Join the processes that were started together, and leave them at the end.

    torchrun and `accelerate launch` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Slurm's `srun` sets
    SLURM_PROCID, SLURM_NTASKS and SLURM_LOCALID: they count if MASTER_ADDR and MASTER_PORT are set as well. Without
    these variables there is one process. A default group of torch.distributed that exists is used, and stays. After an error
    the processes do not wait for each other.

    Args:
        caller: Name of the calling function for error messages.

    Raises:
        ValueError: A variable is missing, or is no number in its range.
    """
    if dist.is_available() and dist.is_initialized():
        local = os.environ.get("LOCAL_RANK", "0")
        control = dist.new_group(backend="gloo", timeout=TIMEOUT)  # the default group may be NCCL's alone
        with leaving(control):
            store = dist.distributed_c10d._get_default_store()
            yield Processes(dist.get_rank(), dist.get_world_size(), int(local), store, control)
        return
    rank, size, local_rank = ranks(caller, os.environ)
    if size == 1:
        yield Processes()
        return
    expect(dist.is_available(), caller, "", "one process, as this PyTorch has no torch.distributed", size)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with together(Processes(rank, size)):
        shared = _shared_store(rank, size)
        store = dist.distributed_c10d.PrefixStore(f"ddpm_fast/{_token(shared, rank, size)}", shared)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    with leaving():
        yield Processes(rank, size, local_rank, store)


@cache
def _shared_store(rank: int, size: int) -> Any:
    """Return the store of all processes. It stays until this process ends, so that they can join again."""
    store, _, _ = next(rendezvous("env://", rank, size, timeout=TIMEOUT))
    return store


def _token(store: Any, rank: int, size: int) -> str:
    """Return a token of this join, the same in all processes.

    The store may hold keys of an earlier join, or of processes that a launcher has replaced. So rank 0 answers only the token
    that each process has just made, and waits until each has read its answer.
    """
    own = secrets.token_hex(8)
    if rank > 0:
        store.set(f"ddpm_fast/asks/{rank}", own)
        answer = f"ddpm_fast/answer/{own}"
        store.wait([answer], TIMEOUT)
        token: str = store.get(answer).decode()
        store.set(f"ddpm_fast/{token}/{rank}", "joined")
        return token
    deadline, missing = time.monotonic() + TIMEOUT.total_seconds(), [*range(1, size)]
    while missing:
        if time.monotonic() > deadline:
            raise RuntimeError(f"no rank {missing[0]} within {TIMEOUT}")
        for other in missing:
            if store.check([f"ddpm_fast/asks/{other}"]):
                store.set(f"ddpm_fast/answer/{store.get(f'ddpm_fast/asks/{other}').decode()}", own)
        missing = [other for other in missing if not store.check([f"ddpm_fast/{own}/{other}"])]
        time.sleep(0.005)
    return own


def ranks(caller: str, environment: Mapping[str, str]) -> tuple[int, int, int]:
    """Return this process's number, the number of processes, and its number on this machine.

    Args:
        caller: Name of the calling function for error messages.
        environment: Variables of the environment.

    Raises:
        ValueError: A variable is missing, or is no number in its range.
    """
    names = _TORCHRUN
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        # A batch script has Slurm's variables, too, though it is one process. It has no master.
        if "SLURM_PROCID" not in environment or "MASTER_ADDR" not in environment:
            return 0, 1, 0
        names = _SLURM
    numbers = []
    for name in names[:2]:
        value = environment.get(name)
        if value is None or not value.isdecimal():
            raise InvalidValue(caller, f"the environment's {name}", "to be a number", f"{value!r}; start with torchrun")
        numbers.append(int(value))
    rank, size = numbers
    local = environment.get(names[2], "0")
    expect(
        rank < size and local.isdecimal(),
        caller,
        f"the environment's {names[0]}",
        f"to be below {names[1]} and {names[2]} to be a number",
        f"{rank}, {size} and {local!r}",
    )
    missing = [name for name in _MASTER if name not in environment] if size > 1 else []
    if missing:
        raise InvalidValue(
            caller,
            f"the environment's {missing[0]}",
            f"to say where rank 0 of {size} processes is",
            "none; start with torchrun, or unset the variables of ranks",
        )
    return rank, size, int(local)


def own_device(device: torch.device) -> torch.device:
    """Return the device, or for a GPU without a number that of the local rank, if torchrun or the like has set one.

    Processes that each see one GPU have one each. More processes than GPUs share them.
    """
    slurm = "" if "MASTER_ADDR" not in os.environ else os.environ.get("SLURM_LOCALID", "")
    local = os.environ.get("LOCAL_RANK", slurm)
    if device != torch.device("cuda") or not local.isdecimal():
        return device
    return torch.device("cuda", int(local) % max(torch.cuda.device_count(), 1))
