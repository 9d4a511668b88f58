"""The network as it samples: frozen U-Nets, their programs, and CUDA graphs."""

from .frozen import FrozenUNet, frozen_step, frozen_unet, inference_network
from .network import why_not_frozen
from .step import StepState, step_by_any_network

__all__ = [
    "FrozenUNet",
    "StepState",
    "frozen_step",
    "frozen_unet",
    "inference_network",
    "step_by_any_network",
    "why_not_frozen",
]
