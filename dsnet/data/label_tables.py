"""Tables of image paths and labels, in CSV or parquet files (`data.labels`)."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dsnet.data.decoding import check_regular, read_regular_file
from dsnet.data.image_files import Tree, scan, suffix_counts
from dsnet.data.layouts import Layout, part_of
from dsnet.data.settings import Columns, Part
from dsnet.errors import DataError
from dsnet.wording import way_out

PATH_COLUMNS = (
    "path",
    "file",
    "filename",
    "file_name",
    "filepath",
    "file_path",
    "image",
    "image_path",
    "img",
    "image_id",
    "id",
)
LABEL_COLUMNS = ("label", "class", "class_name", "category", "target", "labels", "y", "species", "breed")
SPLIT_COLUMNS = ("split", "set", "subset", "partition", "part")
_NUM_NAMED = 3


@dataclass(frozen=True)
class _Row:
    """One row of a table."""

    number: int
    """The line or row in the file, for messages."""
    path: str
    label: str
    split: str | None


def layout_of_table(root: Path, labels: str, columns: Columns, include: str | None = None) -> Layout:
    """The classes and parts that a table gives to the images below a folder.

    Args:
        root: The folder; paths in the table are relative to it, or absolute. A path may leave out
            folders and the suffix where the name is that of one image only.
        labels: Path of the table, relative to the folder or absolute: CSV, TSV or parquet.
        columns: The names of its columns; None: those that are usual.
        include: As for `scan`.

    Raises:
        DataError: The table cannot be read, lacks a column or a label, names a file that is not
            there, or names one twice.
    """
    table = Path(labels).expanduser()
    table = table if table.is_absolute() else root / table
    rows = list(_rows(table, columns))
    if not rows:
        raise DataError(f"{table}: no rows; each row must give an image and its label")
    tree = scan(root, include)
    files = _Files(root, tree)
    split_of = _parts_of_values(rows, columns, table)
    found: dict[Part, dict[str, list[Path]]] = {}
    seen: set[Path] = set()
    missing = []
    names = sorted({row.label for row in rows}, key=_in_order)
    for row in rows:
        file = files.find(row.path)
        if file is None:
            missing.append(row)
            continue
        if file in seen:
            raise DataError(f"{table}, row {row.number}: {row.path!r} is in the table twice; keep one row")
        seen.add(file)
        part = split_of.get(row.split, "train")
        found.setdefault(part, {name: [] for name in names})[row.label].append(file)
    if missing:
        raise DataError(_about_missing(table, missing, len(rows), root))
    _check_parts(found, table)
    parts = {part: {name: sorted(each) for name, each in found[part].items()} for part in _in_use(found)}
    return Layout(parts, tuple(_notes(tree, seen, table)))


def _in_use(found: Mapping[Part, object]) -> list[Part]:
    order: tuple[Part, ...] = ("train", "val", "test")
    return [part for part in order if part in found]


def _check_parts(found: Mapping[Part, Mapping[str, Sequence[Path]]], table: Path) -> None:
    if "train" not in found:
        raise DataError(
            f"{table}: no row belongs to the part train (found {', '.join(found)}); correct the column of splits"
        )
    for part, classes in found.items():
        empty = [name for name, files in classes.items() if not files]
        if empty:
            raise DataError(
                f"{table}: class {empty[0]!r} has no image in the part {part}; every part needs all classes"
            )
    if len(found["train"]) < 2:
        raise DataError(
            f"{table}: all rows have the label {next(iter(found['train']))!r}; at least 2 classes are needed"
        )


def _notes(tree: Tree, used: set[Path], table: Path) -> Iterator[str]:
    yield f"Labels are those in {table.name}."
    unused = [file for file in tree.all_images() if file not in used]
    if unused:
        yield f"Not used, because they have no row in {table.name}: {suffix_counts(unused)}."


def _parts_of_values(rows: Sequence[_Row], columns: Columns, table: Path) -> Mapping[str | None, Part]:
    """The part that each value in the column of splits stands for; empty without such a column, or
    if a column that was found by its name holds something else."""
    found: dict[str | None, Part] = {}
    for row in rows:
        part = part_of(row.split or "")
        if part is None and columns.split is None:
            return {}
        if part is None:
            raise DataError(
                f"{table}, row {row.number}: {row.split!r} is no part of the data; write train, val or test"
            )
        found[row.split] = part
    return found


def _about_missing(table: Path, missing: Sequence[_Row], num_rows: int, root: Path) -> str:
    named = ", ".join(f"{row.path!r} (row {row.number})" for row in missing[:_NUM_NAMED])
    more = ", ..." if len(missing) > _NUM_NAMED else ""
    return (
        f"{table}: {len(missing):,} of {num_rows:,} rows name no image below {root}, or a name that several images have: "
        f"{named}{more}; paths must be relative to {root}"
    )


def _in_order(label: str) -> tuple[int, str]:
    """Whole numbers in their order, then texts in theirs."""
    return (int(label), "") if label.isascii() and label.isdigit() and len(label) < 10 else (sys.maxsize, label)


class _Files:
    """The images below a folder, to be found by what a table calls them."""

    def __init__(self, root: Path, tree: Tree) -> None:
        self._root = root
        self._by_path: dict[str, Path] = {}
        self._by_name: dict[str, Path | None] = {}
        for file in tree.all_images():
            path = file.relative_to(root)
            self._by_path[path.as_posix()] = file
            for name in {path.as_posix().removesuffix(path.suffix), path.name, path.stem}:
                self._by_name[name] = None if name in self._by_name else file

    def find(self, given: str) -> Path | None:
        """The image; None where there is none, or several."""
        path = PurePosixPath(given.replace("\\", "/"))
        if path.is_absolute():
            root = PurePosixPath(self._root.absolute().as_posix())
            if not path.is_relative_to(root):
                return None
            path = path.relative_to(root)
        name = str(path)  # without ./ and doubled slashes
        return self._by_path.get(name) or self._by_name.get(name)


def _rows(table: Path, columns: Columns) -> Iterator[_Row]:
    if table.suffix.lower() in (".parquet", ".pq"):
        names, lines = _parquet(table)
        first = 0
    else:
        names, lines = _csv(table)
        first = 2  # the line below the header
    chosen = _chosen(names, columns, table)
    for number, line in enumerate(lines, first):
        if not any(line):
            continue
        path, label, split = (None if each is None else (line[each] if each < len(line) else "") for each in chosen)
        if not path or not label:
            raise DataError(f"{table}, row {number}: the image or its label is empty; complete or remove the row")
        yield _Row(number, path, label, split)


def _csv(table: Path) -> tuple[list[str], Iterator[list[str]]]:
    try:
        text = read_regular_file(table).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{table}: data.labels cannot be read as text in UTF-8 ({error}); give a CSV or parquet file"
        ) from error
    lines = text.splitlines()
    header = lines[0] if lines else ""
    delimiter = max(",;\t", key=header.count)
    try:
        rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter, strict=True)]
    except csv.Error as error:
        raise DataError(f"{table}: no CSV file ({error}); correct it") from error
    return (rows[0] if rows else []), iter(rows[1:])


def _parquet(table: Path) -> tuple[list[str], Iterator[list[str]]]:
    from dsnet.data.parquet_files import read_table

    try:
        check_regular(table, table.stat())
    except OSError as error:
        raise DataError(
            f"{table}: data.labels cannot be read ({error.strerror}); give a CSV or parquet file"
        ) from error
    content = read_table(table)
    texts = [["" if value is None else str(value) for value in column.to_pylist()] for column in content.columns]
    return content.column_names, (list(row) for row in zip(*texts, strict=True))


def _chosen(names: Sequence[str], columns: Columns, table: Path) -> tuple[int, int, int | None]:
    """The positions of the columns of paths, labels and, if there is one, splits."""
    path = _column(names, columns.image, PATH_COLUMNS, "image", table)
    label = _column(names, columns.label, LABEL_COLUMNS, "label", table)
    if len(names) == 2 and (path is None or label is None):  # only two columns: a path and its label
        path = path if path is not None else (0 if label is None else 1 - label)
        label = 1 - path
    split = _column(names, columns.split, SPLIT_COLUMNS, "split", table)
    for found, what in ((path, "image"), (label, "label")):
        if found is None:
            raise DataError(
                f"{table}: which column is the {what}? Its columns are {', '.join(names) or 'none'}; name it with data.columns.{what}"
            )
    assert path is not None
    assert label is not None
    return path, label, split


def _column(names: Sequence[str], given: str | None, usual: Sequence[str], what: str, table: Path) -> int | None:
    """The position of a column: that which is named, or the first with a usual name."""
    if given is not None:
        if given not in names:
            raise DataError(f"{table}: data.columns.{what}: no column {given!r}{way_out(given, names, 'columns')}")
        return names.index(given)
    lower = [name.lower() for name in names]
    return next((lower.index(name) for name in usual if name in lower), None)
