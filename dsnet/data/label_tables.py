"""Tables of image paths and labels, in CSV or parquet files (`data.labels`)."""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dsnet.data.decoding import check_regular, read_regular_file
from dsnet.data.image_files import Tree, left_out_by, notes_on_others, scan, suffix_counts
from dsnet.data.layouts import PART_NAMES, Layout, part_of
from dsnet.data.settings import Columns, Part
from dsnet.errors import DataError
from dsnet.wording import plural, way_out

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
_NUM_COLUMNS = 8
"""Maximum number of unused columns that a note names."""


@dataclass(frozen=True)
class _Row:
    """One row of a table."""

    number: int
    """The line or row in the file, for messages."""
    path: str
    label: str
    part: Part
    """The part of the data; `train` where no column gives it."""


@dataclass(frozen=True)
class _Table:
    """A table as texts."""

    file: Path
    names: Sequence[str]
    """The names of its columns."""
    lines: Sequence[Sequence[str]]
    """Its rows without those that are empty; a row may lack cells at its end."""
    numbers: Sequence[int]
    """The line or row in the file of each of them, for messages."""

    def cells(self, column: int) -> list[str]:
        """The values of a column; empty where a row lacks it."""
        return [line[column] if column < len(line) else "" for line in self.lines]


@dataclass(frozen=True)
class _Chosen:
    """The positions of the columns that are used."""

    path: int
    label: int
    split: int | None
    """The column that gives the part; None where there is none."""


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
    content = _read(table)
    chosen = _chosen(content, columns)
    rows = _rows(content, chosen)
    if not rows:
        raise DataError(f"{table}: no rows; each row must give an image and its label")
    tree = scan(root, include)
    files = _Files(root, tree)
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
        found.setdefault(row.part, {name: [] for name in names})[row.label].append(file)
    if missing:
        raise DataError(_about_missing(table, missing, len(rows), root))
    _check_parts(found, table)
    parts = {part: {name: sorted(each) for name, each in found[part].items()} for part in _in_use(found)}
    return Layout(parts, (_about_columns(content, chosen), *_about_unused(tree, seen, table, include)))


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


def _about_columns(table: _Table, chosen: _Chosen) -> str:
    """Sentences about the columns: which are used for what, and which are not used."""

    def named(column: int) -> str:
        return f'"{table.names[column]}"' if table.names[column] else f"number {column + 1} (without a name)"

    split = "none for parts" if chosen.split is None else f"{named(chosen.split)} for parts"
    text = f"Labels are those in {table.file.name}: column {named(chosen.path)} for paths, {named(chosen.label)} for labels, {split}"
    unused = [each for each in range(len(table.names)) if each not in (chosen.path, chosen.label, chosen.split)]
    if not unused:
        return f"{text}."
    more = [f"{len(unused) - _NUM_COLUMNS} more"] if len(unused) > _NUM_COLUMNS else []
    listed = ", ".join([*map(named, unused[:_NUM_COLUMNS]), *more])
    text = f"{text}; {listed} {'is' if len(unused) == 1 else 'are'} not used."
    if chosen.split is not None:
        return text
    like_parts = next((each for each in unused if _are_parts(table.cells(each))), None)
    if like_parts is None:
        return text
    values = ", ".join(sorted(set(table.cells(like_parts)))[:_NUM_NAMED])
    return f"{text} Column {named(like_parts)} holds names of parts ({values}): data.columns.split uses it."


def _are_parts(values: Sequence[str]) -> bool:
    return all(part_of(value) is not None for value in set(values))


def _about_unused(tree: Tree, used: set[Path], table: Path, include: str | None) -> Iterator[str]:
    yield from notes_on_others(left_out_by(tree.all_others(), include), include)
    unused = [file for file in tree.all_images() if file not in used]
    if unused:
        yield f"Not used, because they have no row in {table.name}: {suffix_counts(unused)}."


def _parts(table: _Table, column: int) -> list[Part]:
    """The part that each row gives.

    Raises:
        DataError: A value stands for no part.
    """
    values = table.cells(column)
    unknown = Counter(value for value in values if part_of(value) is None).most_common()
    if unknown:
        named = ", ".join(f"{value!r} ({plural(count, 'row')})" for value, count in unknown[:_NUM_NAMED])
        more = f", and {plural(len(unknown) - _NUM_NAMED, 'more value')}" if len(unknown) > _NUM_NAMED else ""
        known = "; ".join(f"{part}: {', '.join(names)}" for part, names in PART_NAMES.items())
        number = next(number for number, value in zip(table.numbers, values, strict=True) if value == unknown[0][0])
        raise DataError(
            f"{table.file}, row {number}: column {table.names[column]!r} gives the part of each image, but it holds unknown values: "
            f"{named}{more}. Known are {known}. Write one of these words in each row, name another column with data.columns.split, or "
            "rename the column if it does not give parts"
        )
    return [part for value in values if (part := part_of(value)) is not None]


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


def _read(file: Path) -> _Table:
    if file.suffix.lower() in (".parquet", ".pq"):
        names, lines = _parquet(file)
        first = 0
    else:
        names, lines = _csv(file)
        first = 2  # the line below the header
    filled = [(number, line) for number, line in enumerate(lines, first) if any(line)]
    return _Table(file, names, [line for _, line in filled], [number for number, _ in filled])


def _rows(table: _Table, chosen: _Chosen) -> list[_Row]:
    paths, labels = table.cells(chosen.path), table.cells(chosen.label)
    for number, path, label in zip(table.numbers, paths, labels, strict=True):
        if not path or not label:
            raise DataError(f"{table.file}, row {number}: the image or its label is empty; complete or remove the row")
    everything: list[Part] = ["train"] * len(paths)
    parts = everything if chosen.split is None else _parts(table, chosen.split)
    return [_Row(*each) for each in zip(table.numbers, paths, labels, parts, strict=True)]


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


def _chosen(table: _Table, columns: Columns) -> _Chosen:
    """The columns of paths, labels and, if there is one, parts."""
    names, file = table.names, table.file
    path = _column(names, columns.image, PATH_COLUMNS, "image", file)
    label = _column(names, columns.label, LABEL_COLUMNS, "label", file)
    if len(names) == 2 and (path is None or label is None):  # only two columns: a path and its label
        path = path if path is not None else (0 if label is None else 1 - label)
        label = 1 - path
    split = _column(names, columns.split, SPLIT_COLUMNS, "split", file)
    if columns.split is None and split is not None:
        if split in (_given(names, columns.image), _given(names, columns.label)) or _is_about_else(table, split):
            split = None
        elif label == split:  # one of two columns, but it gives the parts
            label = None
    for found, what in ((path, "image"), (label, "label")):
        if found is None:
            raise DataError(
                f"{file}: which column is the {what}? Its columns are {', '.join(names) or 'none'}; name it with data.columns.{what}"
            )
    assert path is not None
    assert label is not None
    return _Chosen(path, label, split)


def _given(names: Sequence[str], name: str | None) -> int | None:
    """The position of a column that the settings name."""
    return None if name is None else names.index(name)


def _is_about_else(table: _Table, column: int) -> bool:
    """Whether a column that was found by a usual name other than `split`, such as `set` or `part`,
    holds something else: none of its values stands for a part of the data."""
    return table.names[column].lower() != "split" and all(part_of(value) is None for value in set(table.cells(column)))


def _column(names: Sequence[str], given: str | None, usual: Sequence[str], what: str, table: Path) -> int | None:
    """The position of a column: that which is named, or the first with a usual name."""
    if given is not None:
        if given not in names:
            raise DataError(f"{table}: data.columns.{what}: no column {given!r}{way_out(given, names, 'columns')}")
        return names.index(given)
    lower = [name.lower() for name in names]
    return next((lower.index(name) for name in usual if name in lower), None)
