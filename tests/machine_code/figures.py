"""What is held against a budget: the figures of one kernel for one architecture."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import sass


@dataclass(frozen=True)
class Figures:
    """Of a kernel's machine code.

    Attributes:
        registers: a thread's.
        spills: accesses to local memory. Never any.
        atomics: operations whose order, and so the result's last bits, would depend on timing. Never any.
        instructions: an element, on the hot path (see `sass`).
        mufu: of these, those for the special-function unit, which starts a quarter warp a clock and not a whole one.
        wide: per cent of the hot path's global memory traffic in accesses of 16 bytes or more.
    """

    registers: int
    spills: int
    atomics: int
    instructions: float
    mufu: float
    wide: int

    @classmethod
    def of(cls, kernel: sass.Kernel, elements: float) -> Figures:
        """`elements`: that a thread handles on the hot path."""
        return cls(
            registers=kernel.registers,
            spills=kernel.spills,
            atomics=kernel.atomics,
            instructions=round(len(kernel.hot_path) / elements, 1),
            mufu=round(kernel.hot("MUFU") / elements, 2),
            wide=round(100 * kernel.wide_share),
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
