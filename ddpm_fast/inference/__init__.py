"""The network as it samples: frozen U-Nets, their programs, and CUDA graphs."""

from .adapter import Adapter
from .frozen import FrozenUNet, frozen_unet, unpacked_output
from .frozen_step import adapted, interface_of
from .network import why_not_frozen
from .step import StepState

__all__ = [
    "Adapter",
    "FrozenUNet",
    "StepState",
    "adapted",
    "frozen_unet",
    "interface_of",
    "unpacked_output",
    "why_not_frozen",
]
