"""Tables that fit the terminal: cells are never cut; columns without room are printed on further
lines or left out, and those left out are named.

On a pipe a table has no width: every column is printed on one line.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from rich.cells import cell_len
from rich.text import Text

from orchestration.output.console import Console
from orchestration.wrapping import wrapped

GAP = "  "
"""Separator of two columns."""
NO_BREAK = "\u00a0"
"""No-break space: keeps words of a title together."""
INDENT = "    "
"""Indentation of the columns of a row that are stacked on a further line."""
MIN_PROSE = 16
"""Least width of a column of prose, in characters; narrower ones are hard to read."""


@dataclass(frozen=True)
class Column:
    """A column of a table, and how it behaves on a terminal too narrow for all columns."""

    title: str
    """The title; a no-break space in it is printed as a space."""
    is_text: bool = False
    """Whether the cells are text, aligned left; numbers are aligned right."""
    drop: int = 0
    """0: always shown, on a further line of each row where there is no room. Else it may be left
    out: the largest number goes first, and of equal ones the rightmost."""
    wraps: bool = False
    """Whether the cells are prose, which may wrap onto several lines, between words only."""


@dataclass(frozen=True)
class Layout:
    """The arrangement of the columns for one width: which are shown, and on which line."""

    lines: tuple[tuple[int, ...], ...]
    """Positions of the columns on the first line of a row, on its second, and so on."""
    widths: dict[int, int]
    """Width in characters of each shown column, by its position."""
    dropped: tuple[int, ...]
    """Positions of the columns that are left out, ascending."""


def terminal_width() -> int | None:
    """Width of stdout in characters; None if it is not a terminal, so that width has no limit."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def show_table(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], title: str | None = None, *, rest: str = "--json"
) -> frozenset[str]:
    """Print a table that fits the terminal, and below it the names of the columns that were left
    out; returns the titles of the others.

    Args:
        columns: columns in order.
        rows: a text for every column.
        title: a line above.
        rest: option of the command that shows everything; empty if there is none.
    """
    console = Console(highlight=False, soft_wrap=True)
    width = terminal_width()
    layout = lay_out(columns, rows, width)
    if title is not None:
        console.print(Text(title, style="italic"))
    for line in _header(columns, layout):
        console.print(Text(line, style="bold"))
    # Written at once: of thousands of lines without a style, a console would take a second or two.
    sys.stdout.write("".join(f"{line}\n" for row in rows for line in _cells(columns, layout, row)))
    if layout.dropped and width is not None:
        for line in wrapped(left_out(columns, layout, width, rest), width):
            console.print(Text(line, style="dim"))
    return frozenset(column.title for position, column in enumerate(columns) if position not in layout.dropped)


def table_lines(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None) -> list[str]:
    """The lines of a table, its header first, without the sentence about columns that were left
    out."""
    layout = lay_out(columns, rows, width)
    return [*_header(columns, layout), *(line for row in rows for line in _cells(columns, layout, row))]


def left_out(columns: Sequence[Column], layout: Layout, width: int, rest: str = "--json") -> str:
    """The sentence that names the columns which a narrow terminal leaves out."""
    names = ", ".join(columns[position].title.replace(NO_BREAK, " ") for position in layout.dropped)
    ways = f"a wider terminal, `| cat` or {rest} shows" if rest else "a wider terminal or `| cat` shows"
    return f"no room at {width} columns for: {names} ({ways} everything)"


def lay_out(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None) -> Layout:
    """Fit a table into a width: first titles are wrapped, then columns are left out, then stacked.

    Args:
        columns: columns in order.
        rows: a text for every column.
        width: characters in a line; None: without limit.
    """
    shown = list(range(len(columns)))
    if width is None:
        return Layout((tuple(shown),), {position: _widest(columns, rows, position) for position in shown}, ())
    while True:
        widths = _fitted(columns, rows, shown, width)
        if widths is not None:
            return Layout((tuple(shown),), widths, _missing(columns, shown))
        victim = max(shown, key=lambda position: (columns[position].drop, position))
        if columns[victim].drop == 0 or len(shown) == 1:
            return _stacked(columns, rows, shown, width)
        shown.remove(victim)


def _missing(columns: Sequence[Column], shown: Sequence[int]) -> tuple[int, ...]:
    return tuple(position for position in range(len(columns)) if position not in shown)


def _longest_word(text: str) -> int:
    return max((_num_cells(word) for word in text.split(" ")), default=0)


def _widest(columns: Sequence[Column], rows: Sequence[Sequence[str]], position: int) -> int:
    """The width at which neither the title nor a cell is wrapped."""
    return max(_num_cells(text) for text in (columns[position].title, *(row[position] for row in rows)))


def _narrowest(columns: Sequence[Column], rows: Sequence[Sequence[str]], position: int) -> int:
    """The least width at which no word is cut and prose stays readable."""
    column = columns[position]
    cells = [row[position] for row in rows]
    title = _longest_word(column.title)
    if not column.wraps:
        return max([title, *map(_num_cells, cells)])
    prose = min(MIN_PROSE, max(map(_num_cells, cells), default=0))
    return max([title, prose, *map(_longest_word, cells)])


def _fitted(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], shown: Sequence[int], width: int
) -> dict[int, int] | None:
    """Widths with which the columns fit side by side; None if they do not fit.

    Spare room goes first to the titles with the most lines, then in equal shares to columns of
    prose that need it.
    """
    widths = {position: _narrowest(columns, rows, position) for position in shown}
    spare = width - sum(widths.values()) - len(GAP) * (len(shown) - 1)
    if spare < 0:
        return None
    spare = _flatten_titles(columns, widths, spare)
    wanted = {position: _widest(columns, rows, position) - widths[position] for position in shown}
    prose = sorted((position for position in shown if columns[position].wraps), key=wanted.__getitem__)
    for number, position in enumerate(prose):
        more = min(spare // (len(prose) - number), wanted[position])
        widths[position] += more
        spare -= more
    return widths


def _flatten_titles(columns: Sequence[Column], widths: dict[int, int], spare: int) -> int:
    """Widen columns as long as the header then needs fewer lines; returns the spare room that is
    left."""

    def height(position: int, width: int) -> int:
        return len(wrapped(columns[position].title, width))

    while True:
        tallest = max(height(position, widths[position]) for position in widths)
        steps = {}
        for position, width in widths.items():
            if height(position, width) == tallest > 1:
                steps[position] = next(more for more in count(1) if height(position, width + more) < tallest)
        if not steps or sum(steps.values()) > spare:
            return spare
        for position, more in steps.items():
            widths[position] += more
        spare -= sum(steps.values())


def _stacked(columns: Sequence[Column], rows: Sequence[Sequence[str]], shown: Sequence[int], width: int) -> Layout:
    """Columns that may not be left out, over as many lines of each row as they need."""
    lines: list[list[int]] = []
    widths: dict[int, int] = {}
    for position in shown:
        fitted = _fitted(columns, rows, [*lines[-1], position], _room(len(lines) - 1, width)) if lines else None
        if fitted is None:
            lines.append([])
            alone = _narrowest(columns, rows, position)
            fitted = _fitted(columns, rows, [position], max(alone, _room(len(lines) - 1, width))) or {position: alone}
        lines[-1].append(position)
        widths |= fitted
    return Layout(tuple(map(tuple, lines)), widths, _missing(columns, shown))


def _room(line: int, width: int) -> int:
    return width if line == 0 else width - len(INDENT)


def _header(columns: Sequence[Column], layout: Layout) -> list[str]:
    return _cells(columns, layout, [column.title for column in columns], breaks_all=True)


def _cells(columns: Sequence[Column], layout: Layout, row: Sequence[str], *, breaks_all: bool = False) -> list[str]:
    """The lines of one row; `breaks_all`: every cell may go on over several lines, as titles do,
    which stand at the bottom."""
    lines: list[str] = []
    is_flat = not breaks_all and not any(column.wraps for column in columns)
    for number, positions in enumerate(layout.lines):
        if is_flat:
            lines.append(_line(columns, layout, number, [row[position] for position in positions]))
            continue
        parts = [
            wrapped(row[position], layout.widths[position])
            if breaks_all or columns[position].wraps
            else [row[position]]
            for position in positions
        ]
        height = max(map(len, parts))
        filled = [
            [""] * (height - len(part)) + part if breaks_all else part + [""] * (height - len(part)) for part in parts
        ]
        lines += [_line(columns, layout, number, texts) for texts in zip(*filled, strict=True)]
    return lines


def _line(columns: Sequence[Column], layout: Layout, number: int, texts: Sequence[str]) -> str:
    """A line of a row: the texts of the columns that the layout has on its line with this
    number."""
    aligned = (
        _aligned(text, layout.widths[position], columns[position].is_text)
        for text, position in zip(texts, layout.lines[number], strict=True)
    )
    return ((INDENT if number else "") + GAP.join(aligned)).rstrip()


def _num_cells(text: str) -> int:
    """The width of a text in a terminal."""
    return len(text) if text.isascii() else cell_len(text)


def _aligned(text: str, width: int, is_text: bool) -> str:
    space = " " * max(0, width - _num_cells(text))
    text = text.replace(NO_BREAK, " ")
    return text + space if is_text else space + text
