"""Noise schedules: betas, and every coefficient that the derivation computes from them."""

from .noise_schedule import NoiseSchedule, numbered

__all__ = ["NoiseSchedule", "numbered"]
