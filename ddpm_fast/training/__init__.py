"""Training: Algorithm 1 of Ho et al. 2020 as resumable runs. Importing it does not import PyTorch."""

from .options import train

__all__ = ["train"]
