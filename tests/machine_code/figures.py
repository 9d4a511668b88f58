"""Figures of one kernel for one architecture, which are compared with a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sass


@dataclass(frozen=True)
class Figures:
    """Figures of a kernel's machine code.

    Attributes:
        registers: a thread's.
        spills: accesses to local memory. Never any.
        atomics: operations whose order, and so the result's last bits, would depend on timing. Never any.
        instructions: an element, on the hot path (see `sass`).
        mufu: of these, those for the special-function unit, which starts a quarter warp a clock and not a whole one.
        wide: per cent of the hot path's global memory traffic in accesses of 16 bytes or more.
        merges: instructions of a thread that the hot path leaves out, as what merges the findings of a block's threads.
    """

    registers: int
    spills: int
    atomics: int
    instructions: float
    mufu: float
    wide: int
    merges: int = 0

    @classmethod
    def of(cls, kernel: sass.Kernel, paths: Sequence[tuple[Sequence[sass.Instruction], float]], merges: int = 0) -> Figures:
        """Take the figures of hot paths, with the elements that a thread handles on each."""
        every = [instruction for path, _ in paths for instruction in path]
        return cls(
            registers=kernel.registers,
            spills=kernel.spills,
            atomics=kernel.atomics,
            instructions=round(sum(len(path) / elements for path, elements in paths), 1),
            mufu=round(sum(sum(i.matches("MUFU") for i in path) / elements for path, elements in paths), 2),
            wide=round(100 * sass.global_bytes(every, wide=True) / max(sass.global_bytes(every, wide=False), 1)),
            merges=merges,
        )
