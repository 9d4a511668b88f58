"""Inputs for each op, shared by tests and benchmarks."""

from .calls import Call, make_call
from .cases import CASES, SCHEDULE, Case, bytes_moved

__all__ = ["CASES", "SCHEDULE", "Call", "Case", "bytes_moved", "make_call"]
