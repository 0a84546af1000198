"""scikit-learn's handwritten digits: 1,797 real 8x8 scans, shipped inside the package (no
download)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from dsnet.data.images import ImageSet
from dsnet.errors import ConfigError

IMAGE_SIZE = 8
_LARGEST_VALUE = 16  # the scans hold 0..16


def load_digits(path: str | Path | None = None) -> ImageSet:
    """Load the set: uint8 [1797, 1, 8, 8], ten classes, no official test split.

    Raises:
        ConfigError: A path is given, although the set is embedded in scikit-learn.
    """
    if path is not None:
        raise ConfigError(f"data.path is {str(path)!r}, but the data set 'digits' is embedded: remove data.path")
    from sklearn import datasets  # takes about a second to import, and only this set needs it

    scans = datasets.load_digits()
    pixels = np.rint(scans.images * (255 / _LARGEST_VALUE)).astype(np.uint8)[:, None]
    labels = torch.from_numpy(scans.target.astype(np.int64))
    return ImageSet.create("digits", torch.from_numpy(pixels), labels, [str(digit) for digit in range(10)])
