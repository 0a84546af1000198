"""Tables that fit the terminal: words are never cut, and columns that are left out are named."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from orchestration.commands.tables import Column, lay_out, left_out, show_table, table_lines
from orchestration.commands.terminal import FurtherColumns
from orchestration.wrapping import wrapped

TRIALS = (
    Column("trial", is_text=True),
    Column("state", is_text=True),
    Column("top-1 val\u00a0%"),
    Column("optimizer.lr", drop=1),
    Column("sgs.t_easy", drop=2),
)
ROWS = [("trial-0042*", "complete", "98.1", "0.05", "0.123"), ("trial-0007", "infeasible", "7.2", "-", "-")]

WORDS = st.text("ab-.0", min_size=1, max_size=9)
CELLS = st.lists(WORDS, min_size=1, max_size=4).map(" ".join)
COLUMNS = st.builds(Column, CELLS, st.booleans(), st.integers(0, 2), st.booleans())


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[Column], list[tuple[str, ...]]]:
    columns = draw(st.lists(COLUMNS, min_size=1, max_size=6))
    rows = draw(st.lists(st.tuples(*(CELLS for _ in columns)), max_size=4))
    return columns, rows


def words(text: str) -> list[str]:
    return text.split()


def test_a_table_with_room_has_one_line_a_row() -> None:
    assert table_lines(TRIALS, ROWS, 80) == [
        "trial        state       top-1 val %  optimizer.lr  sgs.t_easy",
        "trial-0042*  complete           98.1          0.05       0.123",
        "trial-0007   infeasible          7.2             -           -",
    ]


def test_titles_go_over_two_lines_before_a_column_is_left_out() -> None:
    lines = table_lines(TRIALS, ROWS, 60)
    assert lines[:2] == [
        "                         top-1",
        "trial        state       val %  optimizer.lr  sgs.t_easy",
    ]
    assert len(lines) == 4


def test_the_column_with_the_largest_number_is_left_out_first_and_named() -> None:
    layout = lay_out(TRIALS, ROWS, 50)
    assert [TRIALS[position].title for position in layout.dropped] == ["sgs.t_easy"]
    assert left_out(TRIALS, layout, 50) == (
        "no room at 50 columns for: sgs.t_easy (a wider terminal, `| cat` or --json shows everything)"
    )


def test_columns_that_must_stay_are_stacked_on_a_further_line_of_each_row() -> None:
    columns = (Column("setting", is_text=True), Column("value", is_text=True))
    lines = table_lines(columns, [("supernet.train.warmup_epochs", "a-long-value-that-stays-whole")], 40)
    assert lines == ["setting", "    value", "supernet.train.warmup_epochs", "    a-long-value-that-stays-whole"]


def test_prose_goes_on_over_several_lines_between_its_words() -> None:
    columns = (Column("stage", is_text=True), Column("because", is_text=True, wraps=True))
    lines = table_lines(columns, [("supernet", "train.lr: 0.1 -> 0.05; the data changed")], 30)
    assert lines == ["stage     because", "supernet  train.lr: 0.1 ->", "          0.05; the data", "          changed"]


def test_a_word_longer_than_the_line_stays_whole() -> None:
    assert wrapped("see trials/a-very-long-identifier now", 10) == ["see", "trials/a-very-long-identifier", "now"]


@settings(max_examples=60, deadline=None)
@given(tables(), st.integers(10, 120))
def test_no_word_is_cut_or_lost_whatever_the_width(
    table: tuple[list[Column], list[tuple[str, ...]]], width: int
) -> None:
    columns, rows = table
    layout = lay_out(columns, rows, width)
    shown = [position for line in layout.lines for position in line]
    assert sorted([*shown, *layout.dropped]) == list(range(len(columns)))
    assert all(columns[position].drop for position in layout.dropped)
    printed = words(" ".join(table_lines(columns, rows, width)))
    expected = [
        word for text, position in product([None, *rows], shown) for word in words(_text(columns, text, position))
    ]
    assert sorted(printed) == sorted(expected)


@settings(max_examples=60, deadline=None)
@given(tables(), st.integers(20, 120))
def test_a_line_is_wider_than_the_terminal_only_where_one_cell_alone_is(
    table: tuple[list[Column], list[tuple[str, ...]]], width: int
) -> None:
    columns, rows = table
    layout = lay_out(columns, rows, width)
    too_wide = [line for line in layout.lines if sum(layout.widths[position] + 2 for position in line) - 2 > width]
    assert all(len(line) == 1 for line in too_wide)
    for line in too_wide:
        assert layout.widths[line[0]] > width - 4


def test_on_a_pipe_every_column_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    show_table(TRIALS, ROWS, "a title that is longer than twenty characters")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "a title that is longer than twenty characters"
    assert printed[1].split() == ["trial", "state", "top-1", "val", "%", "optimizer.lr", "sgs.t_easy"]
    assert max(map(cell_len, printed)) > 60


def _text(columns: list[Column], row: tuple[str, ...] | None, position: int) -> str:
    return columns[position].title if row is None else row[position]


def test_room_to_spare_makes_the_tallest_title_shorter() -> None:
    columns = (Column("name", is_text=True), Column("one two three"), Column("four five"))
    rows = [("a-name", "1", "2")]
    assert table_lines(columns, rows, 19) == [
        "          one",
        "          two  four",
        "name    three  five",
        "a-name      1     2",
    ]
    assert table_lines(columns, rows, 21)[0] == "        one two  four"


def test_a_further_objective_has_a_column_for_test_where_a_gate_has_a_value_there() -> None:
    objectives = [SimpleNamespace(name=name) for name in ("top1", "balanced_top1", "madds_m", "params_m")]
    val, test = {"balanced_top1": 0.8125, "params_m": 0.25}, {"top1": 0.5, "balanced_top1": 0.75}
    verified = FurtherColumns.of(objectives, [{}, test])
    titles = [title.replace("\N{NO-BREAK SPACE}", " ") for title in verified.titles]
    assert titles == ["balanced top-1 % val", "balanced top-1 % test", "params_m val"]
    assert verified.cells(val, test) == ("81.2", "75.0", "0.25")
    assert verified.cells(val, {}) == ("81.2", "-", "0.25")
    assert len(FurtherColumns.of(objectives).titles) == 2
