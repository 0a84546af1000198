"""The file with the points of a run: Parquet, one row for each point (`search.front.points`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from dsnet.errors import DataError
from dsnet.files import replacing
from search.front.points import POINT_COLUMNS, PointRow, validate_points

if TYPE_CHECKING:
    import pandas as pd

_TYPES: Mapping[str, pa.DataType] = {
    **dict.fromkeys(POINT_COLUMNS, pa.float64()),
    **dict.fromkeys(("kind", "name", "split", "supernet"), pa.string()),
    **dict.fromkeys(("is_front", "is_feasible"), pa.bool_()),
    "slot": pa.int64(),
}
_SCHEMA_KEY, _SCHEMA_VERSION = b"dsnet.points", b"2"


def points_frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as a DataFrame: `POINT_COLUMNS`, then further latencies and parameters sorted by name.

    `slot`, the flags and whole-number parameters keep their type beside missing values (pandas'
    nullable types).
    """
    import pandas as pd

    nullable = {pa.int64(): pd.Int64Dtype(), pa.bool_(): pd.BooleanDtype()}
    return _arrow_table(rows).to_pandas(types_mapper=nullable.get)


def save_points(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as Parquet; the file is replaced as a whole or not at all.

    Raises:
        ValueError: a row does not follow the schema; nothing is written.
        StorageError: it cannot be written; an older file stays unchanged.
    """
    validate_points(rows)
    table = _arrow_table(rows).replace_schema_metadata({_SCHEMA_KEY: _SCHEMA_VERSION})
    with replacing(Path(path)) as temporary:
        pq.write_table(table, temporary)


def load_points(path: str | Path) -> list[PointRow]:
    """Read rows back, exactly as they were saved.

    Raises:
        DataError: the file is missing, damaged, of another version or breaks the schema.
    """
    try:
        with pq.ParquetFile(path) as file:  # unlike read_table it takes no columns from a folder called "a=b"
            table = file.read()
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such points file; run the search stage first") from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable points file ({error}); delete it and launch again") from error
    version = (table.schema.metadata or {}).get(_SCHEMA_KEY)
    if version != _SCHEMA_VERSION:
        found = "none" if version is None else version.decode(errors="replace")
        raise DataError(
            f"{path}: points schema version {found}, but this release reads {_SCHEMA_VERSION.decode()}; "
            "`dsnet-orch report RUN` writes the file again"
        )
    rows = [
        {column: value for column, value in row.items() if column in POINT_COLUMNS or value is not None}
        for row in table.to_pylist()
    ]
    try:
        validate_points(rows)
    except ValueError as error:
        raise DataError(f"{path}: {error} Delete the file and launch again") from error
    return rows


def _arrow_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    arrays = {column: pa.array([row.get(column) for row in rows], type=type_) for column, type_ in _TYPES.items()}
    for column in sorted({column for row in rows for column in row if column not in _TYPES}):
        arrays[column] = _param_array([row.get(column) for row in rows])
    return pa.table(arrays)


def _param_array(values: list[Any]) -> pa.Array:
    """Column of a parameter in the one type that fits all its values; text if a choice mixes
    types."""
    types = {type(value) for value in values if value is not None}
    if types == {int, float}:
        return pa.array([None if value is None else float(value) for value in values], type=pa.float64())
    if len(types) > 1:
        return pa.array([None if value is None else str(value) for value in values], type=pa.string())
    return pa.array(values)
