"""Denoising diffusion probabilistic models (Ho et al. 2020), fast, exact and reproducible."""

__version__ = "0.1.0"
