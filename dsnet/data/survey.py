"""Survey of an image folder before training: layout, classes, sizes, colours, broken files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsnet.data.decoding import read_rgb
from dsnet.data.image_folder import IMAGE_EXTENSIONS, FolderListing, list_image_folder
from dsnet.errors import DataError

MAX_OPENED = 400
"""Maximum number of files that are decoded, evenly spaced over the folder; of the others only the
names are read."""
NUM_NAMED = 3
"""Maximum number of broken files that a message names."""
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


def survey_folder(root: Path) -> Survey:
    """Survey a folder of images.

    Raises:
        DataError: its layout is not FOLDER/CLASS/*.png|jpg (the message says what was found), or
            files do not decode.
    """
    refuse_other_layouts(root)
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


def refuse_other_layouts(root: Path) -> None:
    """Check that the images lie in class folders below the root, or below its `train` and `test`.

    Raises:
        DataError: the root is not a folder, or its images lie in it directly or too deep.
    """
    expected = f"expected {root}/CLASS/x.jpg, a folder for each class (or {root}/train/CLASS and {root}/test/CLASS)"
    if not root.is_dir():
        raise DataError(f"{root}: not a folder; {expected}")
    folders = _folders(root)
    if (root / "train").is_dir() and (root / "test").is_dir():
        folders = [*_folders(root / "train"), *_folders(root / "test")]
    flat = [folder for folder in folders if _images(folder)]
    if flat:
        return
    deeper = [below for folder in folders for below in _folders(folder) if _images(below)]
    if deeper and len(parents := {below.parent for below in deeper}) == 1 and len(deeper) > 1:
        (parent,) = parents
        names = ", ".join(below.name for below in deeper[:3]) + (", ..." if len(deeper) > 3 else "")
        raise DataError(f"{root}: the class folders ({names}) lie in {parent}; pass --data {parent} (data.path)")
    if deeper:
        kinds = Counter(file.suffix.lower() for file in _images(deeper[0]))
        found = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        where = deeper[0].relative_to(root)
        beside = (
            "; files of several kinds lie side by side, so some may be masks instead of photos"
            if len(kinds) > 1
            else ""
        )
        raise DataError(
            f"{root}: the images lie one folder too deep ({len(deeper)} such folders; {where} holds {found}{beside}); "
            f"{expected}: move or copy the photos one folder up"
        )
    if _images(root):
        raise DataError(
            f"{root}: {len(_images(root))} images lie in the folder itself, so that their classes are unknown; {expected}"
        )
    raise DataError(f"{root}: no .png, .jpg or .jpeg in its {len(folders)} folder(s); {expected}")


def _folders(root: Path) -> Sequence[Path]:
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.suffix.lower() in IMAGE_EXTENSIONS and entry.is_file()]
