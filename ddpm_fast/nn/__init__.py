"""The U-Net: layers built on the package's ops, and checkpoints."""

from .config import CIFAR10_32, HO_256, UNetConfig
from .unet import UNet

__all__ = ["CIFAR10_32", "HO_256", "UNet", "UNetConfig"]
