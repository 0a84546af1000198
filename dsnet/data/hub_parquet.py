"""Image data sets of the Hugging Face Hub in parquet files: CIFAR-100, Fashion-MNIST, MNIST, SVHN,
...

The parts follow from the names of the files (`train-00000-of-00002.parquet`) or of their folders
(`train/0000.parquet`), the classes from the metadata that the library `datasets` writes, and the
columns from their types and names. All images are decoded into memory.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dsnet.data.cache import ImageCache, default_cache_folder
from dsnet.data.decoding import centre_crop, decode_rgb, is_stored_grey, planes
from dsnet.data.images import ImageSet
from dsnet.data.layouts import part_of
from dsnet.data.location import data_root
from dsnet.data.parquet_files import check_shards, class_label_names, parquet_key, parquet_schema, read_table
from dsnet.data.settings import CHANNELS, Columns, FileOptions, Part
from dsnet.errors import ConfigError, DataError
from dsnet.image_size import ImageSize, height_and_width, image_size_of, size_in_words
from dsnet.wording import plural, way_out

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_COLUMNS = ("image", "img", "photo", "picture")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "category", "target", "digit")
MAX_FOLDERS = 1000
"""Largest number of folders below the root in which files are looked for."""
_NAME = "parquet"
_FILE = re.compile(r"(?P<split>.*?)(-\d+-of-\d+)?(-[0-9a-f]{16})?\.parquet", re.IGNORECASE)
_UNLABELLED = -1
"""The label of images whose labels are kept secret."""
_PARTS: tuple[Part, ...] = ("train", "val", "test")
_NUM_NAMED = 5


@dataclass(frozen=True)
class _Files:
    """The files of each part, in order."""

    parts: Mapping[Part, Sequence[Path]]
    unused: tuple[str, ...]
    """Names of further splits."""


@dataclass(frozen=True)
class _Chosen:
    """The columns that are read, and the names of the classes where the metadata tells them."""

    image: str
    label: str
    class_names: tuple[str, ...] | None
    other_labels: tuple[str, ...]
    """Other columns that could be the labels."""


def load(path: str | Path | None, image_size: ImageSize | None, options: FileOptions) -> ImageSet:
    """The loader of the registry."""
    return load_parquet(path, image_size, options)


def load_parquet(
    path: str | Path | None = None,
    image_size: ImageSize | None = None,
    options: FileOptions | None = None,
    cache: ImageCache | None = None,
) -> ImageSet:
    """Load a data set from parquet files.

    Args:
        path: The folder with the files, one above it, or one file; None: the folder in the
            environment variable DSNET_DATA.
        image_size: Size of the images, to which others are cropped and resized as by `centre_crop`;
            None: as stored, if all are equally large.
        options: The names of the columns, and `colour`; None for it: grey if all images are stored
            in grey, else rgb.
        cache: Cache of decoded pixels; None: the user's cache folder.

    Raises:
        ConfigError: The images are of several sizes, and none is given.
        DataError: No files, columns or classes are found, or something is damaged; the message
            names the file, and for an image or label the row (from 0).
    """
    options = options or FileOptions()
    files = _find_files(data_root(_NAME, path))
    first = next(iter(files.parts.values()))[0]
    chosen = _chosen(parquet_schema(first), options.columns, first)
    cache = cache or ImageCache(default_cache_folder())
    channels = None if options.colour is None else CHANNELS[options.colour]
    settings = json.dumps([image_size, channels, chosen.image, chosen.label])
    by_name: dict[str, Sequence[Path]] = {part: members for part, members in files.parts.items()}  # noqa: C416 (another type of key)
    key = hashlib.sha256(f"{parquet_key(by_name)}/{settings}".encode()).hexdigest()
    images = cache.load_or_make(_NAME, key, lambda: _decode(files, chosen, image_size, channels))
    return replace(images, notes=tuple(_notes(files, chosen, images)))


def parquet_files_below(root: Path) -> list[Path]:
    """All parquet files in a folder and below it; empty where there are none."""
    found: list[Path] = []
    folders = [root]
    for number, folder in enumerate(folders):
        if number >= MAX_FOLDERS:
            break
        entries = sorted(folder.iterdir())
        found += [entry for entry in entries if entry.suffix.lower() == ".parquet" and entry.is_file()]
        folders += [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    return found


def _find_files(root: Path) -> _Files:
    """The files of the parts.

    Raises:
        DataError: There are none, those of several data sets, or not all shards.
    """
    if root.is_file():
        return _Files({"train": [root]}, ())
    folder, files = _folder_of_data_set(root)
    splits: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        match = _FILE.fullmatch(file.name)
        own = "" if match is None else match["split"]
        splits[own if file.parent == folder else file.parent.name].append(file)
    for split, members in splits.items():
        if members[0].parent == folder:
            check_shards(folder, members, split)
    parts = _by_part(folder, splits)
    if not parts and len(splits) == 1:  # one file, or the shards of one, of any name
        return _Files({"train": files}, ())
    if "train" not in parts:
        found = ", ".join(file.name for file in files[:_NUM_NAMED])
        raise DataError(f"{folder}: no train*.parquet (found {found}); set data.path to the folder of the data set")
    unused = tuple(split for split in splits if part_of(split) is None)
    return _Files({part: parts[part] for part in _PARTS if part in parts}, unused)


def _by_part(folder: Path, splits: Mapping[str, list[Path]]) -> dict[Part, list[Path]]:
    parts: dict[Part, list[Path]] = {}
    for split, members in splits.items():
        part = part_of(split)
        if part in parts:
            raise DataError(
                f"{folder}: the {part} part is there more than once ({', '.join(splits)}); keep one of them"
            )
        if part is not None:
            parts[part] = members
    return parts


def _folder_of_data_set(root: Path) -> tuple[Path, list[Path]]:
    """The only folder that holds parquet files, itself or in folders for the parts, and its files.

    Raises:
        DataError: There is none, or there are several.
    """
    by_folder: dict[Path, list[Path]] = defaultdict(list)
    for file in parquet_files_below(root):
        is_in_part = file.parent != root and part_of(file.parent.name) is not None
        by_folder[file.parent.parent if is_in_part else file.parent].append(file)
    if not by_folder:
        raise DataError(f"{root}: no parquet files in it or below it; set data.path to the folder that holds them")
    if len(by_folder) > 1:
        names = ", ".join(str(folder) for folder in by_folder)
        raise DataError(
            f"{root}: several folders hold parquet files, perhaps of several data sets; set data.path to one of {names}"
        )
    return next(iter(by_folder.items()))


def _chosen(schema: pa.Schema, columns: Columns, file: Path) -> _Chosen:
    """The columns of images and labels.

    Raises:
        DataError: They are not there, or cannot be told.
    """
    image_names = [name for name in schema.names if _holds_images(schema.field(name).type)]
    image = _pick(image_names, columns.image, IMAGE_COLUMNS, "image", file, schema)
    names = class_label_names(schema)
    label_names = [name for name in schema.names if name in names or _holds_labels(schema.field(name).type, name)]
    label = _pick(label_names, columns.label, LABEL_COLUMNS, "label", file, schema)
    others = tuple(name for name in label_names if name != label)
    return _Chosen(image, label, tuple(names[label]) if label in names else None, others)


def _holds_images(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_binary(field.type) for field in kind)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _holds_labels(kind: pa.DataType, name: str) -> bool:
    """Whether a column may hold labels: whole numbers or texts under a usual name."""
    import pyarrow as pa

    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind)
    return bool(pa.types.is_integer(kind) or is_text) and (name in LABEL_COLUMNS or name.endswith("label"))


def _pick(
    found: Sequence[str], given: str | None, usual: Sequence[str], what: str, file: Path, schema: pa.Schema
) -> str:
    if given is not None:
        if given not in schema.names:
            raise DataError(
                f"{file}: data.columns.{what}: no column {given!r}{way_out(given, schema.names, 'columns')}"
            )
        return given
    named = [name for name in usual if name in found]
    if named or len(found) == 1:
        return named[0] if named else found[0]
    kinds = ", ".join(f"{name} ({schema.field(name).type})" for name in schema.names)
    raise DataError(f"{file}: which column is the {what}? Its columns are {kinds}; name it with data.columns.{what}")


def _notes(files: _Files, chosen: _Chosen, images: ImageSet) -> Iterator[str]:
    is_test, is_val = images.official_test, images.official_val
    sizes = {
        "validation": 0 if is_val is None else int(is_val.sum()),
        "test": 0 if is_test is None else int(is_test.sum()),
    }
    parts = [
        f"train {images.num_images - sum(sizes.values()):,}",
        *(f"{part} {size:,}" for part, size in sizes.items() if size),
    ]
    yield f"The files give {', '.join(parts)} images; the columns are {chosen.image} and {chosen.label}."
    if chosen.other_labels:
        yield f"Other labels (data.columns.label): {', '.join(chosen.other_labels)}."
    unlabelled = [
        part for part in files.parts if part != "train" and not sizes["validation" if part == "val" else part]
    ]
    if files.unused or unlabelled:
        yield f"Not used: {', '.join([*files.unused, *(f'{part} (no labels)' for part in unlabelled)])}."


@dataclass(frozen=True)
class _Row:
    """An image, not decoded, and its label."""

    content: bytes
    label: Any
    where: str


def _decode(files: _Files, chosen: _Chosen, image_size: ImageSize | None, channels: int | None) -> ImageSet:
    parts = {part: list(_rows(members, chosen)) for part, members in files.parts.items()}
    parts = {part: rows for part, rows in parts.items() if part == "train" or not _is_unlabelled(rows)}
    rows = [row for part in parts.values() for row in part]
    labels, class_names = _labels(rows, chosen)
    if channels is None:
        channels = 1 if all(is_stored_grey(row.content) for row in rows) else 3
    pixels = _pixels(rows, image_size, channels)
    bounds = np.repeat(np.array(list(parts)), [len(part) for part in parts.values()])
    official = [bounds == part if part in parts else None for part in ("test", "val")]
    return ImageSet.create(_NAME, torch.from_numpy(pixels), torch.from_numpy(labels), class_names, *official)


def _rows(files: Sequence[Path], chosen: _Chosen) -> Iterator[_Row]:
    for file in files:
        table = read_table(file)
        for name in (chosen.image, chosen.label):
            if name not in table.column_names:
                raise DataError(
                    f"{file}: no column {name!r} (columns: {', '.join(table.column_names)}); fetch it again"
                )
        images, labels = table.column(chosen.image), table.column(chosen.label).to_pylist()
        if not _holds_images(images.type):
            raise DataError(
                f"{file}: column {chosen.image!r} is {images.type}, must hold image files: binary, or struct<bytes: binary, ...>"
            )
        row = 0
        for chunk in images.chunks:
            for value in chunk.field("bytes") if hasattr(chunk, "field") else chunk:
                where = f"{file}, row {row}"
                content = value.as_py()
                if content is None or labels[row] is None:
                    missing = "image's bytes are" if content is None else "label is"
                    raise DataError(f"{where}: the {missing} missing (null); correct or remove the row")
                yield _Row(content, labels[row], where)
                row += 1


def _is_unlabelled(rows: Sequence[_Row]) -> bool:
    return all(row.label == _UNLABELLED for row in rows)


def _labels(rows: Sequence[_Row], chosen: _Chosen) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels int64 [N] and the names of the classes."""
    kinds = {type(row.label) for row in rows}
    if kinds - {int, str} or len(kinds) > 1:
        raise DataError(
            f"{rows[0].where}: column {chosen.label!r} must hold whole numbers or texts; name another with data.columns.label"
        )
    if chosen.class_names is not None and kinds == {int}:
        for row in rows:
            if not 0 <= row.label < len(chosen.class_names):
                raise DataError(
                    f"{row.where}: label {row.label} is outside 0..{len(chosen.class_names) - 1}; correct or remove the row"
                )
        return np.array([row.label for row in rows], dtype=np.int64), chosen.class_names
    values = sorted({row.label for row in rows})
    if len(values) < 2:
        raise DataError(
            f"{rows[0].where}: all {plural(len(rows), 'label')} are {values[0]!r}; at least 2 classes are needed"
        )
    number = {value: index for index, value in enumerate(values)}
    return np.array([number[row.label] for row in rows], dtype=np.int64), tuple(map(str, values))


def _pixels(rows: Sequence[_Row], image_size: ImageSize | None, channels: int) -> np.ndarray:
    """uint8 [N, channels, height, width]."""
    size = image_size
    pixels = np.empty(0, dtype=np.uint8)
    for index, row in enumerate(rows):
        image = decode_rgb(row.content, row.where)
        own = image_size_of((image.height, image.width))
        if size is None:
            size = own
        if image_size is None and own != size:
            raise ConfigError(
                f"data.image_size must be set (e.g. 32, or [24, 48] for height and width): {row.where}: the image has "
                f"{size_in_words(own)}, the first one {size_in_words(size)}, and only images of one size can be used as they are"
            )
        if index == 0:
            pixels = np.empty((len(rows), channels, *height_and_width(size)), dtype=np.uint8)
        pixels[index] = planes(centre_crop(image, size), channels)
    return pixels
