"""Data sets to train on: uint8 images and integer labels, read by index."""

from .dataset import ImageDataset, to_unit_range
from .decoding import read_image
from .fashion_mnist import FASHION_MNIST_CLASSES, FASHION_MNIST_DEBIAN
from .image_files import RESIZED
from .loading import DATASETS, load_dataset
from .mapped import MappedDataset

__all__ = [
    "DATASETS",
    "FASHION_MNIST_CLASSES",
    "FASHION_MNIST_DEBIAN",
    "RESIZED",
    "ImageDataset",
    "MappedDataset",
    "load_dataset",
    "read_image",
    "to_unit_range",
]
