"""The input and output of a network: its images, its labels and its condition, known in this room alone."""

from .condition import Condition
from .interface import OWN, Interface
from .labels import Labels

__all__ = ["OWN", "Condition", "Interface", "Labels"]
