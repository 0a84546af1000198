"""`dsnet-orch predict`: classify photos with a bundle and print a table, JSON or CSV."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from dsnet.deploy.bundle import load_bundle
from dsnet.deploy.engines import AUTO
from dsnet.deploy.layout import FLOAT32
from dsnet.deploy.prediction import PhotoPrediction
from dsnet.errors import DataError, NotFoundError
from dsnet.wording import plural
from orchestration.commands.messages import complain
from orchestration.commands.tables import Column, show_table
from orchestration.commands.terminal import percent, print_json

COLUMNS = (
    Column("photo", is_text=True),
    Column("class", is_text=True),
    Column("probability\u00a0%"),
    Column("route", is_text=True, drop=1),
    Column("MAdds M", drop=1),
    Column("ms", drop=2),
)
JSON_NAMES = ("file", "class", "probability", "route", "madds", "milliseconds")
"""Names of the values of a photo in JSON and CSV."""
JSON, CSV = "json", "csv"
"""Forms of the output beside the table."""


def predict_files(
    path: Path,
    photos: Sequence[Path],
    *,
    form: str | None = None,
    madds_m: float | None = None,
    latency_ms: float | None = None,
    precision: str = FLOAT32,
    engine: str = AUTO,
) -> int:
    """Classify photos and print the answers; files that cannot be read are named.

    Args:
        path: folder of the bundle.
        photos: files and folders.
        form: `JSON` or `CSV` instead of a table.
        madds_m: budget by which an operating point is chosen, as by `Bundle.at`; without a budget
            it is the bundle's own.
        latency_ms: the same, as a latency.
        precision: as of `load_bundle`.
        engine: as of `load_bundle`.

    Returns:
        0; the exit code of `DataError` where a photo could not be read.

    Raises:
        NotFoundError: no bundle there, or no operating point within the budget.
        ConfigError: more than one budget, or one out of range; or the bundle does not have the
            precision, or the engine is unknown or cannot run the bundle here.
        DataError: no photo could be read, or a folder holds none.
    """
    if not path.exists():
        raise NotFoundError(f"{path}: no such bundle; make one with: dsnet-orch export RUN --pick knee")
    unreadable: list[tuple[Path, DataError]] = []
    bundle = load_bundle(path, precision=precision, engine=engine)
    if madds_m is not None or latency_ms is not None:
        bundle = bundle.at(madds_m=madds_m, latency_ms=latency_ms)
    answers = bundle.predict(photos, on_error=lambda file, error: unreadable.append((file, error)))
    if form == JSON:
        print_json(
            {
                "predictions": list(map(_json_row, answers)),
                "unreadable": [{"file": str(file), "error": str(error)} for file, error in unreadable],
            }
        )
    elif form == CSV:
        rows = csv.DictWriter(sys.stdout, list(JSON_NAMES), lineterminator="\n")
        rows.writeheader()
        rows.writerows(map(_json_row, answers))
    elif answers:
        show_table(COLUMNS, list(map(_row, answers)))
    for _, error in unreadable:
        complain(f"error: {error}")
    if not unreadable:
        return 0
    click.echo(f"{plural(len(unreadable), 'photo')} could not be read; {len(answers)} classified", err=True)
    return DataError.exit_code


def _row(answer: PhotoPrediction) -> tuple[str, ...]:
    return (
        str(answer.file),
        answer.class_name,
        percent(answer.probability),
        answer.route,
        f"{answer.madds / 1e6:.4g}",
        f"{answer.milliseconds:.3g}",
    )


def _json_row(answer: PhotoPrediction) -> dict[str, Any]:
    values = (
        str(answer.file),
        answer.class_name,
        answer.probability,
        answer.route,
        answer.madds,
        answer.milliseconds,
    )
    return dict(zip(JSON_NAMES, values, strict=True))
