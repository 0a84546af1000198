"""Parquet files of data sets: the shards of a split, their content, and a key for the cache."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import PIL

from dsnet.errors import DataError
from dsnet.wording import first_line

if TYPE_CHECKING:
    from pyarrow import Schema, Table

_SHARD = re.compile(r"-(\d+)-of-(\d+)")
_KEY_VERSION = "1"  # raise it when the decoding of images changes what it returns


def find_parquet_files(folder: Path, split: str) -> list[Path]:
    """The parquet files of one split in order: `split.parquet`, or all shards
    `split-00000-of-0000N.parquet`.

    The list is empty where the folder holds none.

    Raises:
        DataError: A shard is missing, or the split is present twice.
    """
    files = sorted(folder.glob(f"{split}*.parquet"))
    check_shards(folder, files, split)
    return files


def check_shards(folder: Path, files: Sequence[Path], split: str) -> None:
    """Check that files are one file, or all shards of one split.

    Raises:
        DataError: A shard is missing, or the split is present twice.
    """
    shards = [match for file in files if (match := _SHARD.search(file.name))]
    if not shards:
        if len(files) > 1:
            raise DataError(f"{folder}: more than one {split} file ({_names(files)}); keep one of them")
        return
    totals = {int(shard[2]) for shard in shards}
    numbers = [int(shard[1]) for shard in shards]
    if len(shards) < len(files) or len(totals) > 1 or len(set(numbers)) < len(numbers):
        raise DataError(
            f"{folder}: the {split} split is there more than once ({_names(files)}); keep one set of shards"
        )
    missing = sorted(set(range(totals.pop())) - set(numbers))
    if missing:
        raise DataError(
            f"{folder}: shard {missing[0]:05d} of the {split} split is missing (found {_names(files)}); fetch it again"
        )


def parquet_key(splits: Mapping[str, Sequence[Path]]) -> str:
    """Cache key: SHA-256 over the content of each split's files and the versions of the decoder."""
    digest = hashlib.sha256(f"{_KEY_VERSION} pillow {PIL.__version__}".encode())
    for split, files in splits.items():
        digest.update(split.encode())
        for file in files:
            digest.update(hashlib.sha256(_read_bytes(file)).digest())
    return digest.hexdigest()


def read_table(file: Path) -> Table:
    """Read a whole parquet file, checked for damage.

    Raises:
        DataError: It cannot be read, is damaged or holds no rows; the message names it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file).read()
        table.validate(full=True)  # detects damage inside a page: invalid UTF-8, offsets out of bounds
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        reason = first_line(error)
        raise DataError(f"{file}: not a whole parquet file ({reason}); fetch it again") from error
    if table.num_rows == 0:
        raise DataError(f"{file}: holds no rows; fetch it again")
    return table


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read ({error.strerror}); check its permissions or fetch it again"
        ) from error


def _names(files: Sequence[Path]) -> str:
    return ", ".join(file.name for file in files)


def parquet_schema(file: Path) -> Schema:
    """The schema of a parquet file, of which only the end is read.

    Raises:
        DataError: It cannot be read or is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(file)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = first_line(error)
        raise DataError(f"{file}: not a whole parquet file ({reason}); fetch it again") from error


def class_label_names(schema: Schema) -> dict[str, list[str]]:
    """Column -> names of the classes, in label order, from the metadata that the library `datasets`
    writes; without columns of which it says nothing."""
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = info["info"]["features"]
        found = {column: feature["names"] for column, feature in features.items() if "names" in feature}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return {
        column: names
        for column, names in found.items()
        if isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    }
