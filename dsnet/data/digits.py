"""scikit-learn's handwritten digits: 1,797 real 8x8 scans, shipped inside the package (no
download)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dsnet.data.images import ImageSet
from dsnet.data.settings import FileOptions
from dsnet.errors import ConfigError
from dsnet.image_size import ImageSize

IMAGE_SIZE = 8
_LARGEST_VALUE = 16  # the scans hold 0..16
_FILE = ("datasets", "data", "digits.csv.gz")
"""Path of the file with the scans, below the folder of scikit-learn; a row has 64 pixels and the
digit."""


def load(path: str | Path | None, _image_size: ImageSize | None, _options: FileOptions) -> ImageSet:
    """The loader of the registry."""
    return load_digits(path)


def load_digits(path: str | Path | None = None) -> ImageSet:
    """Load the set: uint8 [1797, 1, 8, 8], ten classes, no official test split.

    Raises:
        ConfigError: A path is given, although the set is embedded in scikit-learn.
    """
    if path is not None:
        raise ConfigError(f"data.path is {str(path)!r}, but the data set 'digits' is embedded: remove data.path")
    scans, digits = _scans_and_digits()
    pixels = np.rint(scans.reshape(-1, 1, IMAGE_SIZE, IMAGE_SIZE) * (255 / _LARGEST_VALUE)).astype(np.uint8)
    labels = torch.from_numpy(digits)
    return ImageSet.create("digits", torch.from_numpy(pixels), labels, [str(digit) for digit in range(10)])


def _scans_and_digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The scans [1797, 64], 0 to 16, and which digit each shows [1797].

    They are read from the file that scikit-learn reads, because importing scikit-learn itself takes
    longer than a second; if a release of it keeps them elsewhere, scikit-learn is asked.
    """
    package = find_spec("sklearn")
    places = (package and package.submodule_search_locations) or ()
    for file in (Path(place, *_FILE) for place in places):
        if file.is_file():
            table = np.loadtxt(file, delimiter=",")
            return table[:, :-1], table[:, -1].astype(np.int64)
    from sklearn import datasets

    scans = datasets.load_digits()
    return scans.data, scans.target
