"""Memory that training keeps: pages come from the system once, and go back in the end."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import QUIET, train

from ddpm_fast import allocator
from ddpm_fast.allocator import KEEP, USUAL, kept_memory, sets_options

needs_glibc = pytest.mark.skipif(allocator._glibc() is None, reason="no glibc")

# The setting is the process's, and others' settings of it would be in the way: where pages are counted, the process is new.
# Huge pages would be fewer faults. The blocks are malloc's: PyTorch puts small ones between, and one that stays inside a
# freed block makes that too small for the next of its size. In one process of ten the heap then grew for some rounds.
COUNT = """
import ctypes, resource
from ddpm_fast.allocator import kept_memory

libc = ctypes.CDLL(None)
libc.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def pages(megabytes):
    '''Page faults of blocks in use at once, as activations are, then freed.'''
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = []
    for size in megabytes:
        blocks.append(libc.malloc(size << 20))
        ctypes.memset(blocks[-1], 1, size << 20)
    for block in blocks:
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open('/proc/self/statm') as file:
        return int(file.read().split()[1]) * resource.getpagesize() >> 20
"""


@pytest.fixture(autouse=True)
def _without_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment sets none of malloc's options."""
    for name in ("GLIBC_TUNABLES", *(name for name in os.environ if name.startswith("MALLOC_"))):
        monkeypatch.delenv(name, raising=False)


def run(source: str, preamble: str = COUNT, **environment: str) -> list[int]:
    """The numbers that a program prints."""
    command = [sys.executable, "-W", "ignore", "-c", preamble + source]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | environment)
    return [int(word) for word in done.stdout.split()]


class FakeLibc:
    """Notes what it is told."""

    gnu_get_libc_version = None

    def __init__(self) -> None:
        self.told: list[tuple[Any, int]] = []

    def mallopt(self, option: int, value: int) -> None:
        self.told.append((option, value))

    def malloc_trim(self, pad: int) -> None:
        self.told.append(("trim", pad))

    @property
    def keeps(self) -> bool:
        return self.told == [*KEEP.items()]

    @property
    def is_usual(self) -> bool:
        return self.told[-len(USUAL) - 1 :] == [*USUAL.items(), ("trim", 0)]


@pytest.fixture
def libc(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeLibc]:
    fake = FakeLibc()
    monkeypatch.setattr(allocator, "_glibc", lambda: fake)
    yield fake
    assert allocator._inside == 0


# ------------------------------------------------------------------------------------------------------------- the effect


@needs_glibc
def test_pages_come_once_and_go_back() -> None:
    """Blocks below and above the size that glibc maps singly at most, 32 MiB."""
    outside, first, inside, kept, left = run(
        """
sizes = [1, 4, 40, 8, 64]
total = sum(sizes)
pages(sizes)
print(pages(sizes))
before = resident()
with kept_memory():
    print(pages(sizes))
    print(max(pages(sizes) for _ in range(5)))
    print(100 * (resident() - before) // total)
print(100 * (resident() - before) // total)
"""
    )
    assert outside > 1000  # from 117 MiB, 4 KiB each or, by the system's choice, larger
    assert inside < outside / 100
    assert first > inside
    assert 70 < kept < 120  # percent of the blocks; some were free in the heap before
    assert left < 10


@pytest.mark.slow
@needs_glibc
def test_blocks_of_changing_sizes_do_not_pile_up() -> None:
    """Fragments are found again: what the process holds does not grow from step to step."""
    held, later = run(
        """
import random
random.seed(0)
def step():
    pages([random.choice([1, 2, 3, 5, 8, 13, 21, 34]) for _ in range(8)])
with kept_memory():
    for _ in range(100):
        step()
    held = resident()
    for _ in range(100):
        step()
    print(held, resident())
"""
    )
    assert later < 1.15 * held


# PyTorch allocates too, and is not needed here.
MAPPED = """
import ctypes
from ddpm_fast.allocator import kept_memory

class Mallinfo(ctypes.Structure):  # mallinfo2(3)
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Mallinfo
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
MIB = 1 << 20

# Blocks in use at once: how many are mappings, their MiB, and the MiB that the heap keeps when all are freed.
def blocks(sizes):
    libc.malloc_trim(0)
    before = libc.mallinfo2()
    pointers = [libc.malloc(size * MIB) for size in sizes]
    inside = libc.mallinfo2()
    for pointer in reversed(pointers):
        libc.free(pointer)
    after = libc.mallinfo2()
    return [inside.hblks - before.hblks, (inside.hblkhd - before.hblkhd) // MIB, (after.keepcost - before.keepcost) // MIB]

def behaviour():
    return [n for sizes in ([1], [8], [20], [40], [100], [30, 30, 30], [8, 40, 8]) for n in blocks(sizes)]

libc.free(libc.malloc(32 * MIB - 65536))  # glibc adapts, unless the environment sets an option
before = behaviour()
"""
LEAVINGS = {
    "once": """
with kept_memory():
    inside = behaviour()
""",
    "nested": """
with kept_memory():
    with kept_memory():
        pass
    inside = behaviour()
""",
    "by an exception": """
try:
    with kept_memory(), kept_memory():
        inside = behaviour()
        raise KeyError
except KeyError:
    pass
""",
}


@needs_glibc
@pytest.mark.parametrize("leaving", LEAVINGS)
def test_large_blocks_are_mapped_and_unmapped_as_before(leaving: str) -> None:
    numbers = run(f"{LEAVINGS[leaving]}print(*before, *inside, *behaviour())", MAPPED)
    before, inside, after = torch.tensor(numbers).view(3, -1, 3).tolist()
    assert after == before
    assert [mapped for mapped, _, _ in inside] == [0] * len(inside)
    assert [kept for _, _, kept in inside] == pytest.approx([1, 8, 20, 40, 100, 90, 56], abs=2)
    assert before != inside


# ----------------------------------------------------------------------------------------------------------- the settings


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=3", "MALLOC_ARENA_MAX": "1"}, False),
        ({"MALLOC_TRIM_THRESHOLD_": "100"}, True),
        ({"MALLOC_MMAP_MAX_": "7", "MALLOC_MMAP_THRESHOLD_": "9"}, True),
        ({"MALLOC_TOP_PAD_": "1"}, True),
        ({"GLIBC_TUNABLES": "glibc.malloc.mmap_max=7"}, True),
    ],
)
def test_options_of_the_environment(environment: dict[str, str], expected: bool) -> None:
    assert sets_options(environment) == expected


def test_the_environment_s_options_stay(libc: FakeLibc, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "12345678")
    with kept_memory():
        pass
    assert not libc.told


def test_the_outermost_decides(libc: FakeLibc) -> None:
    with kept_memory():
        with kept_memory():
            pass
        assert libc.keeps  # told once
    assert libc.is_usual


def test_the_last_of_overlapping_threads_decides(libc: FakeLibc) -> None:
    entered, leave = threading.Event(), threading.Event()

    @kept_memory()
    def other() -> None:
        entered.set()
        leave.wait(10)

    thread = threading.Thread(target=other)
    with kept_memory():
        thread.start()
        assert entered.wait(10)
    assert libc.keeps
    leave.set()
    thread.join(10)
    assert libc.is_usual


@pytest.mark.parametrize("elsewhere", ["darwin", "win32", "musl"])
def test_elsewhere_nothing_happens(elsewhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if elsewhere == "musl":
        monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: SimpleNamespace())  # a library without glibc's functions
    else:
        monkeypatch.setattr(sys, "platform", elsewhere)
    monkeypatch.setattr(allocator, "_glibc", allocator._glibc.__wrapped__)  # which keeps nothing
    assert allocator._glibc() is None
    with kept_memory():
        assert allocator._inside == 0


# --------------------------------------------------------------------------------------------------------------- training


def test_training_keeps_memory_until_it_ends(libc: FakeLibc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("ddpm_fast.training.loop")
    step, kept = module.take_step, []

    def watched(*arguments: Any) -> Any:
        kept.append(libc.keeps)
        return step(*arguments)

    monkeypatch.setattr(module, "take_step", watched)
    train(tmp_path / "run", **QUIET, device="cpu", steps=3)
    assert kept == [True] * 3
    assert libc.is_usual
