"""The network as it samples: frozen U-Nets, their programs, and CUDA graphs."""

from .calls import StepTensors
from .frozen import FrozenUNet, frozen_unet, inference_network
from .network import why_not_frozen

__all__ = ["FrozenUNet", "StepTensors", "frozen_unet", "inference_network", "why_not_frozen"]
