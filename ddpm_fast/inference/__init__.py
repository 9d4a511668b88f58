"""The network as it samples: frozen U-Nets, their programs, and CUDA graphs."""

from .frozen import FrozenUNet, freeze, inference_network
from .network import why_not_frozen

__all__ = ["FrozenUNet", "freeze", "inference_network", "why_not_frozen"]
