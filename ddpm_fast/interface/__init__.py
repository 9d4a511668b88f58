"""The input and output of a network: its images, labels and condition."""

from .condition import Condition
from .interface import OWN, Interface, check_sides, side_multiple
from .labels import Labels

__all__ = ["OWN", "Condition", "Interface", "Labels", "check_sides", "side_multiple"]
