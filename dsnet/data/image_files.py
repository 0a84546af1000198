"""The files below a folder of images: which are images, and which are masks, thumbnails or other
files, that are counted instead."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

import numpy as np

from dsnet.data.decoding import image_suffixes, read_rgb
from dsnet.errors import DataError
from dsnet.wording import plural

SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
"""Folders that archivers, network drives and operating systems leave behind."""
SYSTEM_FILES = ("thumbs.db", "desktop.ini")
MAX_ENTRIES = 20_000_000
"""Largest number of files and folders below the root."""
MAX_DEPTH = 12
"""Largest depth of folders below the root."""
NUM_COMPARED = 12
"""Maximum number of pairs of files of one name that are opened to see whether one is a mask."""
_ASIDE_ENDINGS = ("mask", "masks", "seg", "segmentation", "groundtruth", "gt", "thumb", "thumbnail")
"""Endings of the names of files that belong to an image: `1_mask.png` to `1.jpg`."""
_ASIDE_FOLDERS = frozenset(
    {"mask", "masks", "seg", "segmentation", "segmentations", "groundtruth", "ground_truth", "gt", "label", "labels"}
    | {"annotation", "annotations", "thumb", "thumbs", "thumbnail", "thumbnails"}
)
"""Folders inside a class whose files belong to images of the same names."""
_MASK_VALUES, _MASK_SHARE, _NEAR = 32, 0.9, 16
"""A mask has at most so many values, or so large a share of its pixels is nearly black or white."""
_NUM_SUFFIXES = 6
"""Maximum number of suffixes that a sentence counts."""


@dataclass(frozen=True)
class Tree:
    """A folder with what lies in it and below, sorted by name; hidden entries and those of
    operating systems are left out."""

    path: Path
    images: tuple[Path, ...]
    """The images in the folder itself."""
    others: tuple[Path, ...]
    """The other files in the folder itself."""
    folders: tuple[Tree, ...]

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def num_images(self) -> int:
        """Number of images in the folder and below."""
        return len(self.images) + sum(each.num_images for each in self.folders)

    def walk(self) -> Iterator[Tree]:
        """The folder and all folders below it, each before those below it."""
        yield self
        for folder in self.folders:
            yield from folder.walk()

    def all_images(self) -> list[Path]:
        """The images in the folder and then those of each folder below it."""
        return [file for tree in self.walk() for file in tree.images]

    def all_others(self) -> list[Path]:
        """The other files in the folder and below."""
        return [file for tree in self.walk() for file in tree.others]


def scan(root: Path, include: str | None = None) -> Tree:
    """Read the names of all files below a folder; none is opened.

    Links are followed, but not into a folder that they lie in.

    Args:
        root: The folder.
        include: Pattern of the images: of their names (`*.jpg`), or of their paths below the root
            if it has a `/`; capital and small letters are the same. None: the suffix decides.

    Raises:
        DataError: A folder cannot be read, or there are too many files or too deep folders.
    """
    num_entries = 0
    pattern = None if include is None else include.lower()

    def is_image(entry: Path) -> bool:
        if pattern is None:
            return has_image_suffix(entry)
        name = entry.relative_to(root).as_posix() if "/" in pattern else entry.name
        return fnmatchcase(name.lower(), pattern)

    def read(folder: Path, above: tuple[tuple[int, int], ...]) -> Tree:
        nonlocal num_entries
        entries, status = _entries(folder)
        here = (status.st_dev, status.st_ino)
        if here in above:
            return Tree(folder, (), (), ())
        num_entries += len(entries)
        if num_entries > MAX_ENTRIES or len(above) > MAX_DEPTH:
            what = f"more than {MAX_ENTRIES:,} files" if num_entries > MAX_ENTRIES else f"more than {MAX_DEPTH} levels"
            raise DataError(
                f"{folder}: {what} of folders below {root}; set data.path to the folder that holds the classes"
            )
        images: list[Path] = []
        others: list[Path] = []
        folders: list[Tree] = []
        for name, is_folder in entries:
            entry = folder / name
            if is_folder:
                folders.append(read(entry, (*above, here)))
            else:
                (images if is_image(entry) else others).append(entry)
        return Tree(folder, tuple(images), tuple(others), tuple(folders))

    return read(root, ())


def _entries(folder: Path) -> tuple[list[tuple[str, bool]], os.stat_result]:
    """The sorted names in a folder, each with whether it is a folder."""
    try:
        with os.scandir(folder) as found:
            entries = sorted((entry.name, entry.is_dir()) for entry in found if not _is_of_the_system(entry.name))
        return entries, folder.stat()
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from error


def _is_of_the_system(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM_FOLDERS or name.lower() in SYSTEM_FILES


def suffix_counts(files: Sequence[Path]) -> str:
    """The number of files with each suffix, as text, the most frequent first: `12 .txt, 3 .xml`."""
    counts = Counter(file.suffix.lower() or "without suffix" for file in files).most_common()
    named = [f"{count:,} {suffix}" for suffix, count in counts[:_NUM_SUFFIXES]]
    rest = sum(count for _, count in counts[_NUM_SUFFIXES:])
    return ", ".join([*named, *([f"{rest:,} others"] if rest else [])])


def notes_on_others(files: Sequence[Path], include: str | None) -> Iterator[str]:
    """Sentences about files that do not count as images: because of their suffixes, or because of
    `data.include`.

    Args:
        files: The files.
        include: As for `scan`.
    """
    left_out = left_out_by(files, include)
    if left_out:
        yield f'Not used, because data.include "{include}" leaves them out: {suffix_counts(left_out)}.'
    no_images = [file for file in files if not has_image_suffix(file)] if left_out else files
    if no_images:
        yield f"Not used, because they are no images: {suffix_counts(no_images)}."


def left_out_by(files: Sequence[Path], include: str | None) -> list[Path]:
    """The files with the suffix of an image among those that `data.include` does not match; empty
    without it."""
    return [] if include is None else [file for file in files if has_image_suffix(file)]


def has_image_suffix(file: Path) -> bool:
    """Whether the suffix of a file is that of an image format that is read."""
    return file.suffix.lower() in image_suffixes()


@dataclass(frozen=True)
class SetAside:
    """Files with the suffix of an image that are not taken for images."""

    files: frozenset[Path]
    notes: tuple[str, ...]
    """Sentences about them."""


def masks_and_thumbnails(classes: Sequence[Tree]) -> SetAside:
    """The masks and thumbnails among the images of some class folders.

    A file belongs to another one of its class if its name is that of the other with an ending such
    as `_mask`, if it lies in a folder such as `masks` and has the other's name, or if it lies
    beside the other, differs from it in its suffix only, and looks like a mask or a thumbnail. Of
    the last kind, a few pairs are opened, and what most of them show holds for all pairs with these
    two suffixes.
    """
    by_name: set[Path] = set()
    pairs: dict[tuple[str, str], list[tuple[Path, Path]]] = defaultdict(list)
    for tree in classes:
        by_name |= _named_after_others(tree)
        for folder in tree.walk():
            for pair in _pairs_of_one_name(folder.images):
                pairs[pair[0].suffix.lower(), pair[1].suffix.lower()].append(pair)
    notes = []
    if by_name:
        example = min(by_name)
        notes.append(
            f"{plural(len(by_name), 'file')} named after another image, such as {example.name}, are masks or thumbnails and not used."
        )
    aside = set(by_name)
    for (one, other), found in sorted(pairs.items()):
        number = len(found)
        step = -(-number // NUM_COMPARED)
        kinds = Counter(_kind_of_pair(*pair) for pair in found[::step])
        (kind, count), *_ = kinds.most_common()
        if kind is not None and count >= 0.75 * kinds.total():
            index, what = kind
            aside |= {pair[index] for pair in found}
            suffix = (one, other)[index]
            notes.append(
                f"{number:,} {suffix} files beside {(one, other)[1 - index]} files of the same names look like {what}s and are not used; "
                f'data.include: "*{suffix}" takes them instead.'
            )
        else:
            notes.append(
                f"Images with the names of other images ({one} and {other}): {number:,}; if they are copies or masks, leave them "
                f'out with data.include: "*{one}".'
            )
    return SetAside(frozenset(aside), tuple(notes))


def _named_after_others(tree: Tree) -> set[Path]:
    """Files of a class whose name or folder says that they belong to another image of the class."""
    stems = {file.stem.lower() for folder in tree.walk() if not _is_aside(folder, tree) for file in folder.images}
    found = set()
    for folder in tree.walk():
        for file in folder.images:
            stem = file.stem.lower()
            base = next(
                (stem[: -len(end) - 1] for end in _ASIDE_ENDINGS if stem.endswith((f"_{end}", f"-{end}"))), None
            )
            if base in stems or (_is_aside(folder, tree) and (stem in stems or base in stems)):
                found.add(file)
    return found


def _is_aside(folder: Tree, tree: Tree) -> bool:
    return folder is not tree and folder.name.lower() in _ASIDE_FOLDERS


def _pairs_of_one_name(files: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
    """Pairs of files of a folder that differ in their suffixes only, sorted by suffix."""
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        by_stem[file.stem].append(file)
    for same in by_stem.values():
        if len(same) > 1:
            first, *others = sorted(same, key=lambda file: file.suffix.lower())
            yield from ((first, other) for other in others)


def _kind_of_pair(*pair: Path) -> tuple[int, str] | None:
    """Which of two files is a mask or thumbnail of the other, and which of the two; None if
    neither is."""
    try:
        images = [read_rgb(file) for file in pair]
    except DataError:
        return None
    pixels = [np.asarray(image) for image in images]
    if images[0].size == images[1].size:
        masks = [index for index in (0, 1) if _looks_like_mask(pixels[index])]
        return (masks[0], "mask") if len(masks) == 1 else None
    small, large = sorted((0, 1), key=lambda index: images[index].width)
    width, height = images[small].size
    scale = images[large].width / width
    is_same_shape = abs(images[large].height / scale - height) <= 1 + 0.02 * height
    return (small, "thumbnail") if scale >= 2 and is_same_shape else None


def _looks_like_mask(pixels: np.ndarray) -> bool:
    values = pixels.reshape(-1, 3)
    nearly = (values <= _NEAR).all(1) | (values >= 255 - _NEAR).all(1)
    if nearly.mean() >= _MASK_SHARE:
        return True
    packed = values.astype(np.uint32) @ np.array([65536, 256, 1], dtype=np.uint32)
    return len(np.unique(packed)) <= _MASK_VALUES
