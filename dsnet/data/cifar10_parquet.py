"""Reader of CIFAR-10 in the hub's parquet layout, `train*.parquet` and `test*.parquet`.

Columns: `img` (or `image`) = struct {bytes: a JPEG or PNG file, path: "class/file.jpg" or any
name}, `label` = integer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int64, UInt8

from dsnet.data.decoding import decode_rgb
from dsnet.data.labels import check_labels
from dsnet.data.parquet_files import class_label_names, parquet_schema, read_table
from dsnet.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

_IMAGE_COLUMNS = ("img", "image")
_LABEL_COLUMN = "label"


def is_cifar10(file: Path, class_names: Sequence[str]) -> bool:
    """Whether a parquet file says that it is CIFAR-10: by the class names in its metadata, or by
    the folder in the path of its first image."""
    import pyarrow.parquet as pq

    schema = parquet_schema(file)
    names = class_label_names(schema).get(_LABEL_COLUMN)
    if names is not None:
        return list(names) == list(class_names)
    column = next((name for name in _IMAGE_COLUMNS if name in schema.names), None)
    if column is None or schema.field(column).type.num_fields == 0:
        return False
    rows = next(pq.ParquetFile(file).iter_batches(batch_size=1, columns=[column]), None)
    path = "" if rows is None else (rows.column(0).to_pylist()[0] or {}).get("path")
    return PurePosixPath(path or "").parent.name in class_names


def read_parquet_split(
    files: Sequence[Path], class_names: Sequence[str], image_size: int
) -> tuple[UInt8[np.ndarray, "images 3 size size"], Int64[np.ndarray, " images"]]:
    """Read and decode one split.

    Args:
        files: Its parquet files, in order.
        class_names: Class names in label order. Where the folder in an image's path is a class
            name, it must agree with the label.
        image_size: Height and width that every image must have.

    Returns:
        Pixels uint8 [N, 3, image_size, image_size] and labels int64 [N].

    Raises:
        DataError: A file is truncated, lacks a column or has one of another type, an image does not
            decode or has another size, or a label is not a class or contradicts the image's path.
            The message names the file and, for an image or a label, the row (from 0).
    """
    parts = [_read_file(file, class_names, image_size) for file in files]
    return np.concatenate([pixels for pixels, _ in parts]), np.concatenate([labels for _, labels in parts])


def _read_file(file: Path, class_names: Sequence[str], image_size: int) -> tuple[np.ndarray, np.ndarray]:
    table = read_table(file)
    _check_names(file, table.schema, class_names)
    image_column = _image_column(file, table)
    labels = _read_labels(file, table)
    check_labels(labels, class_names, str(file))
    pixels = np.empty((len(labels), 3, image_size, image_size), dtype=np.uint8)
    row = 0
    for chunk in table.column(image_column).chunks:
        contents, paths = chunk.field("bytes"), chunk.field("path")
        for data, path in zip(contents, paths, strict=True):
            where = f"{file}, row {row}"
            _check_path(path.as_py(), class_names, int(labels[row]), where)
            pixels[row] = _decode(data.as_py(), image_size, where)
            row += 1
    return pixels, labels


def _check_names(file: Path, schema: pa.Schema, class_names: Sequence[str]) -> None:
    names = class_label_names(schema).get(_LABEL_COLUMN)
    if names is not None and list(names) != list(class_names):
        shown = ", ".join(names[:3])
        raise DataError(
            f"{file}: not CIFAR-10: its {len(names)} classes are {shown}, ...; set data.name to parquet, which reads any data set "
            "of the hub"
        )


def _image_column(file: Path, table: pa.Table) -> str:
    """The name of the column that holds the images, checked to be struct {bytes: binary, path:
    string}."""
    import pyarrow as pa

    found = [name for name in _IMAGE_COLUMNS if name in table.column_names]
    if not found:
        columns = ", ".join(table.column_names)
        raise DataError(f"{file}: no column 'img' or 'image' (columns: {columns}); expected the hub's CIFAR-10 layout")
    kind = table.schema.field(found[0]).type
    fields = {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {}
    is_expected = fields.get("bytes") in (pa.binary(), pa.large_binary()) and fields.get("path") in (
        pa.string(),
        pa.large_string(),
        pa.null(),  # where no row has a path
    )
    if not is_expected:
        raise DataError(
            f"{file}: column {found[0]!r} is {kind}, must be struct<bytes: binary, path: string>; "
            "expected the hub's CIFAR-10 layout"
        )
    return found[0]


def _read_labels(file: Path, table: pa.Table) -> np.ndarray:
    import pyarrow as pa

    if _LABEL_COLUMN not in table.column_names:
        columns = ", ".join(table.column_names)
        raise DataError(f"{file}: no column 'label' (columns: {columns}); expected the hub's CIFAR-10 layout")
    column = table.column(_LABEL_COLUMN)
    if not pa.types.is_integer(column.type):
        raise DataError(f"{file}: column 'label' is {column.type}, must be an integer type; expected 0..9")
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise DataError(f"{file}, row {row}: the label is missing (null); correct or remove the row")
    return column.to_numpy().astype(np.int64)


def _check_path(path: str | None, class_names: Sequence[str], label: int, where: str) -> None:
    """Check the label against the folder in the image's path, if that is a class name.

    Raises:
        DataError: They contradict each other.
    """
    folder = PurePosixPath(path or "").parent.name
    if folder in class_names and folder != class_names[label]:
        raise DataError(
            f"{where}: mislabelled: the path {path!r} says {folder!r}, the label {label} says {class_names[label]!r}; "
            "correct the row or fetch the file again"
        )


def _decode(data: bytes | None, image_size: int, where: str) -> np.ndarray:
    if data is None:
        raise DataError(f"{where}: the image's bytes are missing (null); correct or remove the row")
    image = decode_rgb(data, where)
    if image.size != (image_size, image_size):
        width, height = image.size
        raise DataError(f"{where}: the image is {width}x{height}, must be {image_size}x{image_size} pixels")
    return np.asarray(image).transpose(2, 0, 1)
