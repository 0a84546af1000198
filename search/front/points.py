"""The table of points, with one row for every sub-network, gate and control that is drawn or
listed, and the file that holds it.

A row is a dict with the keys of `POINT_COLUMNS`, None where a value does not apply. Further
latencies have their own columns, named like the metrics (`latency_ms_batch64`,
`latency_ms.server`); a gate's row also has one `param.<dotted name>` key for each of the trial's
parameters. Accuracies are fractions, `*_m` are in millions, and latencies in milliseconds:
`latency_ms` for one image, `latency_ms_batchN` for a batch of N.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from dsnet.metrics import added_metrics

PointRow = dict[str, Any]

POINT_COLUMNS: tuple[str, ...] = (
    "kind",
    "name",
    "split",
    "top1",
    "top5",
    "madds_m",
    "p95_madds_m",
    "params_m",
    "latency_ms",
    "slot",
    "is_front",
    "is_feasible",
    "supernet",
)
PARAM_PREFIX = "param."
METRIC_PREFIX = "metric."
"""Prefix of the columns of metrics that plugins add, so that a file with them can be read without
the plugin."""
LATENCY = "latency_ms"
KINDS = ("subnet", "gate", "control")
SPLITS = ("val", "test")

_REQUIRED = ("kind", "name", "split", "top1", "madds_m")
_ACCURACIES = ("top1", "top5")
_AMOUNTS = ("madds_m", "p95_madds_m", "params_m", "latency_ms")


def trial_name(slot: int) -> str:
    """The name of a trial's point, run and bundle."""
    return f"trial-{slot:04d}"


def subnet_points(
    split: str,
    names: Sequence[str],
    top1: Sequence[float],
    madds: Sequence[float],
    *,
    top5: Sequence[float] | None = None,
    params: Sequence[float] | None = None,
    metrics: Mapping[str, Sequence[float]] | None = None,
) -> list[PointRow]:
    """Rows of K static sub-networks.

    Args:
        split: "val" or "test".
        names: K member names.
        top1: fractions.
        madds: absolute MAdds.
        top5: fractions; columns that are not given are None.
        params: absolute numbers of parameters.
        metrics: further metrics by name, each [K]: latencies in milliseconds, and those of
            `dsnet.metrics.added_metrics`; NaN where a value is not known.
    """
    further = metrics or {}
    by_row = [dict(zip(further, values, strict=True)) for values in zip(*further.values(), strict=True)]
    missing: list[None] = [None] * len(names)
    columns = zip(names, top1, madds, top5 or missing, params or missing, by_row or missing, strict=True)
    return [
        _row(
            kind="subnet",
            name=name,
            split=split,
            top1=float(accuracy),
            top5=_float_or_none(accuracy5),
            madds_m=float(cost) / 1e6,
            p95_madds_m=float(cost) / 1e6,  # every image costs the same
            params_m=None if size is None else float(size) / 1e6,
            **_latencies(values or {}),
        )
        | _added(values or {})
        for name, accuracy, cost, accuracy5, size, values in columns
    ]


def gate_points(
    split: str,
    slots: Sequence[int],
    metrics: Sequence[Mapping[str, float]],
    params: Sequence[Mapping[str, float | int | str | bool]],
    is_front: Sequence[bool],
    is_feasible: Sequence[bool] | None = None,
) -> list[PointRow]:
    """Rows of completed trials.

    Args:
        split: "val" or "test".
        slots: slots of P trials, from which their names are made.
        metrics: metrics of each trial, with at least `top1` and `madds_m`; other measured columns
            are filled if they are present and not NaN.
        params: parameters of each trial by dotted name, e.g. "gate.target".
        is_front: whether each trial is on the front of its study.
        is_feasible: whether each trial meets every constraint; None = all do.
    """
    feasible = [True] * len(slots) if is_feasible is None else is_feasible
    measured = [column for column in (*_ACCURACIES, *_AMOUNTS) if column not in _REQUIRED and column != LATENCY]
    return [
        _row(
            kind="gate",
            name=trial_name(slot),
            split=split,
            top1=float(values["top1"]),
            madds_m=float(values["madds_m"]),
            **{column: _float_or_none(values.get(column)) for column in measured},
            slot=int(slot),
            is_front=bool(front),
            is_feasible=bool(holds),
            **_latencies(values),
        )
        | _added(values)
        | {PARAM_PREFIX + key: value for key, value in settings.items()}
        for slot, values, settings, front, holds in zip(slots, metrics, params, is_front, feasible, strict=True)
    ]


def control_points(split: str, name: str, madds: ArrayLike, top1: ArrayLike) -> list[PointRow]:
    """Rows along one control (e.g. "cascade"), from absolute mean MAdds [B] and top-1 [B]; points
    whose top-1 is NaN have no row."""
    costs, accuracies = np.atleast_1d(np.asarray(madds, dtype=float)), np.atleast_1d(np.asarray(top1, dtype=float))
    return [
        _row(kind="control", name=name, split=split, top1=float(accuracy), madds_m=float(cost) / 1e6)
        for cost, accuracy in zip(costs, accuracies, strict=True)
        if math.isfinite(accuracy)
    ]


def _latencies(metrics: Mapping[str, float]) -> dict[str, float]:
    """All latencies among metrics, except for those that are NaN."""
    return {name: float(value) for name, value in metrics.items() if _is_latency(name) and not math.isnan(value)}


def _added(metrics: Mapping[str, float]) -> dict[str, float]:
    """The columns of `dsnet.metrics.added_metrics`, except for those that are missing or NaN."""
    return {
        METRIC_PREFIX + name: float(metrics[name])
        for name in added_metrics()
        if name in metrics and not math.isnan(metrics[name])
    }


def _is_latency(column: str) -> bool:
    """Whether a column is a latency: `latency_ms`, `latency_ms.server`, `latency_ms_batch64`."""
    return column == LATENCY or column.startswith((f"{LATENCY}.", f"{LATENCY}_"))


def _is_number(column: str) -> bool:
    return _is_latency(column) or column.startswith(METRIC_PREFIX)


def _row(**values: Any) -> PointRow:
    return dict.fromkeys(POINT_COLUMNS) | values


def _float_or_none(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def validate_points(rows: Sequence[Mapping[str, Any]]) -> None:
    """Check rows against the schema above.

    Raises:
        ValueError: a row does not follow the schema; the message names the row, the column and the
            value.
    """
    for index, row in enumerate(rows):
        problem = _problem(row)
        if problem:
            raise ValueError(f"Point {index} ({row.get('name')!r}): {problem}.")
    seen = Counter(
        (row["kind"], row["name"], row["split"], row.get("supernet")) for row in rows if row["kind"] != "control"
    )
    repeated = [key for key, count in seen.items() if count > 1]
    if repeated:
        kind, name, split, _ = repeated[0]
        raise ValueError(f"The {kind} {name!r} has {seen[repeated[0]]} points on {split}, but must have one.")


def _problem(row: Mapping[str, Any]) -> str | None:
    for column in _REQUIRED:
        if row.get(column) is None:
            return f"`{column}` is missing"
    if row["kind"] not in KINDS:
        return f"`kind` is {row['kind']!r}, but must be one of {', '.join(KINDS)}"
    if row["split"] not in SPLITS:
        return f"`split` is {row['split']!r}, but must be one of {', '.join(SPLITS)}"
    return _column_problem(row) or _number_problem(row) or _gate_problem(row)


def _column_problem(row: Mapping[str, Any]) -> str | None:
    origin = row.get("supernet")
    if not (origin is None or isinstance(origin, str)):
        return f"`supernet` is {origin!r}, but must be a name or nothing"
    for column, value in row.items():
        if column in POINT_COLUMNS or _is_number(column):
            continue
        if not column.startswith(PARAM_PREFIX):
            return f"the column `{column}` is unknown; known: {', '.join(POINT_COLUMNS)}, {LATENCY}_batchN, {LATENCY}.NAME, {PARAM_PREFIX}*"
        if row["kind"] != "gate":
            return f"a {row['kind']} has no parameters, but has `{column}`"
        if not isinstance(value, bool | int | float | str):
            return f"`{column}` is {value!r}, but must be a number, a string or a boolean"
    return None


def _number_problem(row: Mapping[str, Any]) -> str | None:
    for column in dict.fromkeys((*_ACCURACIES, *_AMOUNTS, *filter(_is_number, row))):
        value = row.get(column)
        if value is None:
            continue
        upper = 1.0 if column in _ACCURACIES else math.inf
        if not (isinstance(value, int | float) and math.isfinite(value) and 0 <= value <= upper):
            return f"`{column}` is {value!r}, but must be a finite number of 0 or more" + (
                " and at most 1" if upper == 1 else ""
            )
    return None


def _gate_problem(row: Mapping[str, Any]) -> str | None:
    slot, flags = row.get("slot"), {column: row.get(column) for column in ("is_front", "is_feasible")}
    if row["kind"] != "gate":
        is_bare = slot is None and set(flags.values()) == {None}
        return None if is_bare else f"a {row['kind']} has neither `slot` nor `is_front` nor `is_feasible`"
    if isinstance(slot, bool) or not isinstance(slot, int) or slot < 0:
        return f"`slot` is {slot!r}, but must be a whole number of 0 or more"
    for column, flag in flags.items():
        if not isinstance(flag, bool):
            return f"`{column}` is {flag!r}, but must be true or false"
    return "an infeasible trial cannot be on the front" if flags["is_front"] and not flags["is_feasible"] else None
