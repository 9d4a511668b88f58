"""Memory that is freed stays with the process, so that the next step of training gets it back without asking the system."""

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

# Nothing is a mapping of its own, which goes back to the system when it is freed, and the heap's end never shrinks.
KEEP: Final = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}
# glibc starts with thresholds of 128 KiB and raises them, as large blocks are freed, up to these, until a program sets any:
# it does not go back to raising them. So they are set to where it would have ended; the first ones would be slower than ever.
USUAL: Final = {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 64 << 20}

_lock = threading.Lock()
_inside = 0  # how many are inside of kept_memory


@contextmanager
def kept_memory() -> Iterator[None]:
    """Inside of it, memory that is freed on the CPU stays with the process: for a loop of training on a CPU.

        with ddpm_fast.kept_memory():
            for images in data:
                ...  # the network, its gradient, the optimizer's step

    glibc gives what a step of training frees back to the system, and gets it anew in the next step, page by page, cleared:
    3 to 18 % of the step's time, where it was measured. `train` on a CPU does this by itself. The price is that the process
    keeps the most memory that it ever had inside. On the way out, also by an exception, what is free goes back to the system.
    It can be nested, and used as a decorator; results are the same.

    It is a setting of the whole process. It acts in full on what the main thread allocates; of other threads' memory some still
    goes back. Afterwards malloc's thresholds are those that glibc's own adjustment tends to (blocks of 32 MiB and more are
    mappings of their own, 64 MiB may stay free at the heap's end), whatever the environment set before. Nothing happens where
    the C library is not glibc, as on macOS, Windows and musl, or where another allocator took malloc's place.
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
    """The C library of this process, if that is glibc."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "gnu_get_libc_version") else None


def _set(libc: Any, options: dict[int, int]) -> None:
    for option, value in options.items():
        libc.mallopt(option, value)
