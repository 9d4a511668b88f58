"""Evaluation: the variational bound, and the Frechet distance."""

from .bound import VariationalBound
from .frechet import Moments, frechet_distance

__all__ = ["Moments", "VariationalBound", "frechet_distance"]
