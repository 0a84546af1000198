"""Data: digits (embedded), CIFAR-10, image folders; the four splits; augmentation and
normalisation.

Typical use: `load_images` -> `make_splits` -> `TensorData.from_images`.
"""

from dsnet.data.augment import Augmentation, augment
from dsnet.data.images import ImageSet
from dsnet.data.normalization import Normalization
from dsnet.data.registry import data_set_names, load_images, register_data_set
from dsnet.data.splits import SPLIT_NAMES, Splits, SplitSizes, make_splits
from dsnet.data.tensors import Batch, TensorData

__all__ = [
    "SPLIT_NAMES",
    "Augmentation",
    "Batch",
    "ImageSet",
    "Normalization",
    "SplitSizes",
    "Splits",
    "TensorData",
    "augment",
    "data_set_names",
    "load_images",
    "make_splits",
    "register_data_set",
]
