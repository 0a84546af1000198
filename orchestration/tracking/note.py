"""The description of a sweep on MLflow's page: a picture of the front, its table, and links to the
points and the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from dashboards.front import FrontInfo
from dashboards.front_picture import front_picture
from dashboards.headline import Headline, Row
from dashboards.theme import percent, router_name, significant
from dsnet.files import atomic_write_bytes
from dsnet.wording import plural
from orchestration.runs.folder import RunDir
from orchestration.tracking.protocol import Tracker
from orchestration.tracking.store import EXPERIMENT_ID, RUN_ID
from orchestration.tracking.view import view_path

MAX_ROWS: Final = 16


def attach_front(
    tracker: Tracker,
    run: RunDir,
    uid: str,
    info: FrontInfo,
    headline: Headline,
    *,
    redraw: bool,
    warnings: Sequence[str] = (),
) -> None:
    """Put the front's picture among the files of a sweep's row, and into its description.

    Args:
        tracker: receives picture and description.
        run: run folder of the sweep; holds the picture.
        uid: uid of the sweep's own row.
        info: data of the picture.
        headline: data of the table.
        redraw: draw the picture even if the run has one already.
        warnings: about the training, in sentences.
    """
    if redraw or not run.front_png.is_file():
        atomic_write_bytes(run.front_png, front_picture(info))
    tracker.artifact(run.front_png)
    tracker.describe(front_note(headline, uid, run.front_png.name, run.report_html.name, warnings))


def front_note(headline: Headline, uid: str, picture: str, report: str, warnings: Sequence[str] = ()) -> str:
    """The description in Markdown; its pictures are artifacts, which MLflow serves itself.

    Args:
        headline: the front's table.
        uid: uid of the sweep's own row.
        picture: name of the picture among the row's files.
        report: name of the report among them.
        warnings: about the training, in sentences; they stand above the picture.
    """
    files = f"#/experiments/{EXPERIMENT_ID}/runs/{RUN_ID}/artifacts"
    points = view_path(EXPERIMENT_ID, uid).removeprefix("/")
    lines = [
        _sentence(headline),
        "",
        f"[All points as a chart]({points}) | [Report]({files}/{report}?workflowType=machine_learning)",
        "",
        *(line for warning in (*headline.warnings, *warnings) for line in (f"**Warning:** {warning}", "")),
        f"![accuracy against cost](get-artifact?path={picture}&run_uuid={RUN_ID})",
        "",
        _cells("gate on the front", "router", "top-1 on val", "top-1 on test", "M MAdds on val", "M MAdds on test"),
        "|---|---|---|---|---|---|",
        *(_line(row, headline.knee) for row in headline.rows[:MAX_ROWS]),
    ]
    if len(headline.rows) > MAX_ROWS:
        lines += ["", f"{len(headline.rows) - MAX_ROWS} more gates are in the report."]
    return "\n".join(lines)


def _sentence(headline: Headline) -> str:
    """The first sentence of the description, visible before it is opened."""
    found = f"{plural(len(headline.rows), 'gate')} on the front"
    knee = next((row for row in headline.rows if row.name == headline.knee), None)
    if knee is None:
        return f"{found}."
    on_test = "" if knee.reported is None else f", {percent(knee.reported.top1.value)} on test"
    accuracy = f"{percent(knee.chosen.top1.value)} top-1 on val{on_test}"
    return f"{found}; the knee, {knee.name}, has {accuracy} at {significant(knee.chosen.madds_m)} M MAdds."


def _line(row: Row, knee: str | None) -> str:
    name = f"**{row.name} (knee)**" if row.name == knee else row.name
    test = row.reported
    accuracies = percent(row.chosen.top1.value), "-" if test is None else percent(test.top1.value)
    costs = significant(row.chosen.madds_m), "-" if test is None else significant(test.madds_m)
    return _cells(name, router_name(row.router or ""), *accuracies, *costs)


def _cells(*texts: str) -> str:
    """A row of a Markdown table, with space between cells, which MLflow's page does not add."""
    return "".join(f"| {text} &ensp;" for text in texts) + "|"
