"""The input and output of a network: its images, labels and condition."""

from .condition import Condition
from .interface import OWN, Interface
from .labels import Labels

__all__ = ["OWN", "Condition", "Interface", "Labels"]
