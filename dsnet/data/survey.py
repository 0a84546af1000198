"""Survey of an image folder before training: layout, classes, sizes, colours, broken files."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsnet.data.decoding import read_rgb
from dsnet.data.image_folder import FolderListing, list_image_folder
from dsnet.errors import DataError

MAX_OPENED = 400
"""Maximum number of files that are decoded, evenly spaced over the folder; of the others only the
names are read."""
NUM_NAMED = 3
"""Maximum number of broken files that a message names."""
SAME_SHAPE = 1.02
"""Largest ratio between the width / height of two pictures that have one shape."""
OBLONG = 1.1
"""Ratio of the longer to the shorter side from which on a picture is oblong."""
GREY_TOLERANCE = 8
"""Largest difference between the channels (0..255) of a grey photo that was stored in colour."""


@dataclass(frozen=True)
class Survey:
    """Facts about an image folder."""

    listing: FolderListing
    sizes: tuple[tuple[int, int], ...]
    """(width, height) of the files that were opened."""
    is_grey: bool
    """Whether all files that were opened are grey."""

    @property
    def num_images(self) -> int:
        """Number of images in all classes, including an official test part."""
        return len(self.listing.files)

    @property
    def class_sizes(self) -> dict[str, int]:
        """Class name -> number of images."""
        counts = Counter(self.listing.labels)
        return {name: counts[label] for label, name in enumerate(self.listing.class_names)}

    @property
    def short_side(self) -> int:
        """Median of the images' shorter sides, in pixels."""
        return int(np.median([min(each) for each in self.sizes]))

    @property
    def oblong_shape(self) -> tuple[int, int] | None:
        """Height and width of the smallest of the images, if all of them have one oblong shape;
        else None."""
        aspects = [width / height for width, height in self.sizes]
        if max(aspects) > SAME_SHAPE * min(aspects) or 1 / OBLONG < aspects[0] < OBLONG:
            return None
        width, height = min(self.sizes)
        return height, width


def survey_folder(root: Path) -> Survey:
    """Survey a folder of images.

    Raises:
        DataError: its layout is not understood (the message says what was found), or files do not
            decode.
    """
    listing = list_image_folder(root)
    step = -(-len(listing.files) // MAX_OPENED)  # rounded up
    sizes: list[tuple[int, int]] = []
    broken: list[str] = []
    is_grey = True
    for file in listing.files[::step]:
        try:
            image = read_rgb(file)
        except DataError as error:
            broken.append(str(error))
            continue
        sizes.append(image.size)
        is_grey = is_grey and _is_grey(np.asarray(image))
    if broken:
        named = [*broken[:NUM_NAMED], *([f"and {len(broken) - NUM_NAMED} more"] if len(broken) > NUM_NAMED else [])]
        opened = len(sizes) + len(broken)
        raise DataError("\n  ".join([f"{len(broken)} of {opened} opened images cannot be used:", *named]))
    return Survey(listing, tuple(sizes), is_grey)


def _is_grey(pixels: np.ndarray) -> bool:
    few = pixels[::4, ::4].astype(np.int16)
    return int((few.max(axis=2) - few.min(axis=2)).max()) <= GREY_TOLERANCE
