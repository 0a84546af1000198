"""The description of a sweep's row: its links, its picture, and the table of the front."""

from dataclasses import replace

from dashboards.headline import Estimate, Headline, Row, Scores
from orchestration.tracking.note import MAX_ROWS, front_note
from orchestration.tracking.store import EXPERIMENT_ID, MAX_TAG_LENGTH, RUN_ID


def row(name: str, top1: float, test: float | None) -> Row:
    reported = None if test is None else Scores(Estimate(test, test, test), 12.5)
    return Row(name, Scores(Estimate(top1, top1, top1), 12.0), reported, router="cascade")


def note(rows: tuple[Row, ...], knee: str | None = None) -> list[str]:
    return front_note(Headline(rows=rows, knee=knee), "digits/1234", "front.png", "report.html").splitlines()


def test_the_picture_is_one_that_mlflow_serves_of_this_very_run() -> None:
    lines = note((row("trial-0001", 0.9, 0.8),))
    assert f"![accuracy against cost](get-artifact?path=front.png&run_uuid={RUN_ID})" in lines
    assert f"/experiments/{EXPERIMENT_ID}/runs/{RUN_ID}/artifacts/report.html" in lines[2]
    assert f"#/experiments/{EXPERIMENT_ID}/runs?" in lines[2]


def test_the_table_holds_both_splits_and_marks_the_knee() -> None:
    lines = note((row("trial-0001", 0.9, 0.8), row("trial-0002", 0.95, None)), knee="trial-0001")
    cells = [[cell.removesuffix("&ensp;").strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert ["**trial-0001 (knee)**", "cascade", "90.0 %", "80.0 %", "12.0", "12.5"] in cells
    assert (
        lines[0]
        == "2 gates on the front; the knee, trial-0001, has 90.0 % top-1 on val, 80.0 % on test at 12.0 M MAdds."
    )
    assert ["trial-0002", "cascade", "95.0 %", "-", "12.0", "-"] in cells


def test_a_long_front_is_cut_and_says_so() -> None:
    rows = tuple(replace(row("x", 0.9, 0.8), name=f"s0-3fa29c01/trial-{index:04d}") for index in range(MAX_ROWS + 3))
    lines = note(rows)
    assert lines[0] == f"{MAX_ROWS + 3} gates on the front."
    assert lines[-1] == "3 more gates are in the report."
    assert len("\n".join(lines)) < MAX_TAG_LENGTH


def test_what_is_to_be_said_against_the_training_stands_above_the_picture() -> None:
    lines = front_note(
        Headline(), "digits/1234", "front.png", "report.html", ["Too few steps.", "A spike."]
    ).splitlines()
    picture = next(index for index, line in enumerate(lines) if line.startswith("!["))
    assert [line for line in lines[:picture] if "Warning" in line] == [
        "**Warning:** Too few steps.",
        "**Warning:** A spike.",
    ]
