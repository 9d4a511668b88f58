"""Data sets: items of an image, a label and a condition, read by index."""

from .checked import Checked
from .degradation import Degradation
from .items import Batch, DatasetInfo, Item, ItemDataset, collate, read_batch, to_unit_range
from .load import load_dataset, read_image
from .loader import DECODING_WORKERS, batches
from .published import DATASETS, FASHION_MNIST_CLASSES, FASHION_MNIST_DEBIAN

__all__ = [
    "DATASETS",
    "DECODING_WORKERS",
    "FASHION_MNIST_CLASSES",
    "FASHION_MNIST_DEBIAN",
    "Batch",
    "Checked",
    "DatasetInfo",
    "Degradation",
    "Item",
    "ItemDataset",
    "batches",
    "collate",
    "load_dataset",
    "read_batch",
    "read_image",
    "to_unit_range",
]
