"""Processes that work together: who is first, agreements, and sums in one tree."""

from .joining import joined, own_device, ranks
from .processes import FirstFailed, Processes, ProcessLost

__all__ = ["FirstFailed", "ProcessLost", "Processes", "joined", "own_device", "ranks"]
