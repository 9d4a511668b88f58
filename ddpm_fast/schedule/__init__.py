"""Noise schedules: betas, and every coefficient that the derivation computes from them. Objectives: what a network predicts."""

from .noise_schedule import NoiseSchedule, numbered
from .objective import Objective, objective_of

__all__ = ["NoiseSchedule", "Objective", "numbered", "objective_of"]
