"""Evaluation: the variational bound, and the Frechet distance."""

from .bound import VariationalBound, variational_bound
from .frechet import frechet_distance

__all__ = ["VariationalBound", "frechet_distance", "variational_bound"]
