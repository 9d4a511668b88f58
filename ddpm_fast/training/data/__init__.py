"""Data sets to train on: uint8 images and integer labels, read by index."""

from .dataset import ImageDataset, to_unit_range
from .degradation import Degradation
from .image_files import read_image
from .loading import DATASETS, FASHION_MNIST_CLASSES, FASHION_MNIST_DEBIAN, load_dataset
from .mapped import MappedDataset

__all__ = [
    "DATASETS",
    "FASHION_MNIST_CLASSES",
    "FASHION_MNIST_DEBIAN",
    "Degradation",
    "ImageDataset",
    "MappedDataset",
    "load_dataset",
    "read_image",
    "to_unit_range",
]
