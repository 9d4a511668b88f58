"""Memory allocation for CPU training: freed memory stays with the process between steps."""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

# glibc's names and numbers (malloc.h).
M_TRIM_THRESHOLD: Final = -1
M_MMAP_MAX: Final = -4
M_MMAP_THRESHOLD: Final = -3

# No block is a separate mapping, which would return to the system when freed, and the heap never shrinks.
KEEP: Final = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}
# glibc starts with thresholds of 128 KiB and raises them, as large blocks are freed, up to these, until a program sets any:
# it does not go back to raising them. So they are set to where it would have ended; the first ones would be slower than ever.
USUAL: Final = {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 64 << 20}

_lock = threading.Lock()
_inside = 0  # how many are inside of kept_memory


@contextmanager
def kept_memory() -> Iterator[None]:
    """Keep freed CPU memory in the process, for training loops on a CPU.

        with ddpm_fast.kept_memory():
            for images in data:
                ...  # forward, backward, optimizer step

    By default glibc returns a step's memory to the system. The next step requests it again, page by page
    and cleared. This took 3 to 18 % of a step's time in our measurements. `train` on a CPU uses this
    context by itself. The process keeps its peak memory until the context exits, also by an exception.
    Results do not change. The context can be nested and used as a decorator.

    It changes malloc's settings for the whole process and has full effect on the main thread. Some memory
    of other threads still returns to the system. It has no effect without glibc (macOS, Windows, musl) or
    with another allocator.

    On exit, malloc's thresholds become those that glibc adapts to, also if the environment has set others.
    Blocks of 32 MiB and more are then separate mappings, and 64 MiB may stay free at the end of the heap.
    """
    libc = _glibc()
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


@functools.cache
def _glibc() -> Any:
    """Return this process's C library if it is glibc, else None."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "gnu_get_libc_version") else None


def _set(libc: Any, options: dict[int, int]) -> None:
    for option, value in options.items():
        libc.mallopt(option, value)
