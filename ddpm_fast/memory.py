"""Memory allocation for CPU training: freed memory stays with the process between steps."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final

# glibc's names and numbers (malloc.h).
M_TRIM_THRESHOLD: Final = -1
M_MMAP_THRESHOLD: Final = -3
M_MMAP_MAX: Final = -4

# No block is a separate mapping, which would return to the system when freed, and the heap never shrinks.
KEEP: Final = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}
# By default glibc starts with FIRST and raises the thresholds, up to these, as large blocks are freed. Setting any option
# ends that. These are where it would have ended: FIRST would be slower than it ever was.
USUAL: Final = {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 64 << 20}
# An environment that sets any option ends it too. The others then have these values.
FIRST: Final = {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 128 << 10, M_TRIM_THRESHOLD: 128 << 10}
_NAMES: Final = {"trim_threshold": M_TRIM_THRESHOLD, "mmap_threshold": M_MMAP_THRESHOLD, "mmap_max": M_MMAP_MAX}

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
    Results do not change. The context can be nested and used as a decorator.

    It changes malloc's options for the whole process and has full effect on the main thread. Some memory
    of other threads still returns to the system. It has no effect without glibc (macOS, Windows, musl) or
    with another allocator. The only other state is a count of the contexts that are open.

    On exit, malloc's options become those of the environment: `MALLOC_TRIM_THRESHOLD_`,
    `MALLOC_MMAP_THRESHOLD_`, `MALLOC_MMAP_MAX_` or their names in `GLIBC_TUNABLES`. Without these, they
    become the values that glibc adapts to: blocks of 32 MiB and more are separate mappings, and 64 MiB
    may stay free at the end of the heap. Options that the program set by `mallopt` are lost.
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
                _set(libc, outside_options(os.environ))
                libc.malloc_trim(0)


def outside_options(environment: Mapping[str, str]) -> dict[int, int]:
    """Return malloc's options outside of `kept_memory`, by their numbers.

    Args:
        environment: The environment that the process was started with.
    """
    tunables = dict(entry.partition("=")[::2] for entry in environment.get("GLIBC_TUNABLES", "").split(":"))
    found = {}
    for name in (*_NAMES, "top_pad"):
        # GLIBC_TUNABLES has priority.
        for text in (environment.get(f"MALLOC_{name.upper()}_", ""), tunables.get(f"glibc.malloc.{name}", "")):
            with suppress(ValueError):
                found[name] = _number(text)
    return {**FIRST, **{_NAMES[name]: found[name] for name in _NAMES if name in found}} if found else USUAL


def _number(text: str) -> int:
    """Return the number in `text` as glibc reads it, -1 if it is too large for `mallopt`. Raise ValueError if it is none."""
    value = int(re.sub(r"^([ \t]*[-+]?)0(?=[0-7]+$)", r"\g<1>0o", text), 0)  # a leading 0 means octal
    return value if 0 <= value < 1 << 31 else -1  # mallopt reads -1 as the largest size


@functools.cache
def _glibc() -> Any:
    """Return this process's C library if it is glibc, else None."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "gnu_get_libc_version") else None


def _set(libc: Any, options: Mapping[int, int]) -> None:
    for option, value in options.items():
        libc.mallopt(option, value)
