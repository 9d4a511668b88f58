"""The U-Net: layers on top of the package's ops, and its checkpoints."""

from ddpm_fast.nn.config import CIFAR10_32, HO_256, UNetConfig
from ddpm_fast.nn.unet import UNet

__all__ = ["CIFAR10_32", "HO_256", "UNet", "UNetConfig"]
