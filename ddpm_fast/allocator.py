"""The allocator of CPU memory during training: freed memory stays with the process between steps."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

# glibc's names and numbers (malloc.h).
M_TRIM_THRESHOLD: Final = -1
M_MMAP_THRESHOLD: Final = -3
M_MMAP_MAX: Final = -4

# No block is a separate mapping, which would return to the system when freed, and the heap never shrinks.
KEEP: Final = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}
# By default glibc raises the thresholds, up to these, as large blocks are freed. Setting any option ends that.
USUAL: Final = {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 64 << 20}

# malloc's options belong to the process, so their users are counted for the process.
_lock = threading.Lock()
_inside = 0  # number of contexts entered and not left


@contextmanager
def kept_memory() -> Iterator[None]:
    """Keep freed CPU memory in the process, for training loops on a CPU.

        with ddpm_fast.kept_memory():
            for images in data:
                ...  # forward, backward, optimizer step

    By default glibc returns a step's memory to the system. The next step requests it again, page by page
    and cleared. This took 3 to 18 % of a step's time in our measurements. `train` on a CPU uses this
    context by itself. The process keeps its peak memory until the context exits, also by an exception.
    Fragmentation raised this peak by up to half in a trial. Results do not change. The
    context can be nested and used as a decorator.

    It changes malloc's options for the whole process and has full effect on the main thread. Some memory
    of other threads still returns to the system. It has no effect without glibc (macOS, Windows, musl),
    with another allocator, or if the environment sets malloc's thresholds, mmap_max or top_pad. The only
    other state is a count of the contexts that are open.

    On exit, malloc's options become the values that glibc adapts to: blocks of 32 MiB and more are separate
    mappings, and 64 MiB may stay free at the end of the heap. Options that the program set by `mallopt` are lost.
    """
    libc = None if sets_options(os.environ) else _glibc()
    if libc is None:
        yield
        return
    global _inside
    with _lock:
        _inside += 1
        if _inside == 1:
            _set(libc, KEEP)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _set(libc, USUAL)
                libc.malloc_trim(0)


def sets_options(environment: Mapping[str, str]) -> bool:
    """Return whether an environment sets an option that ends glibc's adaptation, which would not come back afterwards."""
    tunables = environment.get("GLIBC_TUNABLES", "")
    names = ("trim_threshold", "mmap_threshold", "mmap_max", "top_pad")
    return any(f"MALLOC_{name.upper()}_" in environment or f"glibc.malloc.{name}=" in tunables for name in names)


@functools.cache
def _glibc() -> Any:
    """Return this process's C library if it is glibc, else None."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "gnu_get_libc_version") else None


def _set(libc: Any, options: Mapping[int, int]) -> None:
    for option, value in options.items():
        libc.mallopt(option, value)
