"""Looks through a folder of images before anything is trained on it, and reports layout, classes, sizes, colours and broken files."""

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
"""Files that are decoded at most, evenly from the whole folder; of the others only the names are read."""
NUM_NAMED = 3
"""Broken files that a message names."""
GREY_TOLERANCE = 8
"""Channels of a grey photo that was stored in colour differ by no more."""


@dataclass(frozen=True)
class Survey:
    """Facts about an image folder."""

    listing: FolderListing
    sizes: tuple[tuple[int, int], ...]
    """(width, height) of the files that were opened."""
    is_grey: bool
    """Whether every one of these is."""

    @property
    def num_images(self) -> int:
        """In all classes, an official test part included."""
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
    """Look at a folder of images.

    Raises:
        DataError: it is laid out otherwise than FOLDER/CLASS/*.png|jpg (the message says how), or files do not decode.
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
    """Say what was found where the images do not lie one folder below the root, or below its `train` and `test`.

    Raises:
        DataError: no folder, images beside the class folders only, or images deeper down.
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
    if deeper:
        kinds = Counter(file.suffix.lower() for file in _images(deeper[0]))
        found = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        where = deeper[0].relative_to(root)
        beside = (
            "; files of several kinds lie side by side, so some may be masks and no photos" if len(kinds) > 1 else ""
        )
        raise DataError(
            f"{root}: the images lie one folder too deep ({len(deeper)} such folders; {where} holds {found}{beside}); "
            f"{expected}: move or copy the photos one folder up"
        )
    if _images(root):
        raise DataError(
            f"{root}: {len(_images(root))} images lie in the folder itself, so nobody knows their classes; {expected}"
        )
    raise DataError(f"{root}: no .png, .jpg or .jpeg in its {len(folders)} folder(s); {expected}")


def _folders(root: Path) -> Sequence[Path]:
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.suffix.lower() in IMAGE_EXTENSIONS and entry.is_file()]
