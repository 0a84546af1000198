"""Accuracy over speed: the figure shows exactly the trials that no other of their kind beats, and
the right mixtures of static sub-networks."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from dashboards.speedups import SpeedupsInfo, speed_panel, speedups_figure
from dashboards.theme import router_name
from tests.dashboards.samples import KINDS

METRIC = "latency_ms_batch64"
STATIC = {"narrow": (1.0, 2.0, 0.70), "middle": (2.0, 5.0, 0.71), "wide": (9.0, 10.0, 0.90)}
"""Sub-network -> MAdds M, ms, top-1."""


def rows(seed: int = 0, count: int = 60) -> list[dict[str, Any]]:
    """Rows of points.parquet: three static sub-networks, and random trials of every kind."""
    rng = np.random.default_rng(seed)
    own: list[dict[str, Any]] = [
        {"kind": "subnet", "name": name, "split": "val", "madds_m": madds, METRIC: ms, "top1": top1}
        for name, (madds, ms, top1) in STATIC.items()
    ]
    for number in range(count):
        own.append(
            {
                "kind": "gate",
                "name": f"trial-{number:04d}",
                "split": "val" if number % 7 else "test",
                "madds_m": 3.0,
                METRIC: float(rng.choice([2.5, 4.0, 5.0, 8.0]) if number % 11 else np.nan),
                "top1": float(rng.choice([0.7, 0.8, 0.85, 0.9])),
                "is_feasible": number % 5 > 0,
                "param.gate.router": KINDS[number % len(KINDS)] if number % 3 else np.nan,
            }
        )
    return own


def drawn(figure: go.Figure, name: str) -> Any:
    (found,) = [trace for trace in figure.data if trace.name == name]
    return found


def test_each_kind_shows_the_trials_than_which_no_other_is_more_accurate_and_faster() -> None:
    given = rows()
    panel = speed_panel(given, "val", 64, METRIC, "cascade")
    assert panel is not None
    figure = speedups_figure(SpeedupsInfo("val", 100, "a machine", (panel,)))
    shown = 0
    for kind in KINDS:
        own = [
            (row[METRIC], row["top1"])
            for row in given
            if row["kind"] == "gate" and row["split"] == "val" and row["is_feasible"] and not np.isnan(row[METRIC])
            if (row["param.gate.router"] if isinstance(row["param.gate.router"], str) else "cascade") == kind
        ]
        best = {
            (ms, top1) for ms, top1 in own if not any(m <= ms and t >= top1 and (m, t) != (ms, top1) for m, t in own)
        }
        trace = drawn(figure, router_name(kind))
        expected = sorted((10.0 / ms, 100 * (top1 - 0.90)) for ms, top1 in best)
        assert np.column_stack([trace.x, trace.y]) == pytest.approx(np.array(expected))
        shown += len(expected)
    assert shown > len(KINDS)


def test_the_static_line_is_the_best_mix_of_two_sub_networks_at_a_mean_latency() -> None:
    panel = speed_panel(rows(count=0), "val", 64, METRIC)
    assert panel is not None
    points = panel.static_line
    assert [(points[k].latency_ms, points[k].top1) for k in (0, -1)] == [(2.0, 0.70), (10.0, 0.90)]
    for point in points:  # the middle one is below the mix of the other two
        assert point.top1 == pytest.approx(0.70 + 0.20 * (point.latency_ms - 2.0) / 8.0)
    figure = speedups_figure(SpeedupsInfo("val", 100, "a machine", (panel,)))
    assert drawn(figure, "static sub-networks").x == pytest.approx([5.0, 2.0, 1.0])
    assert drawn(figure, "static line").x == pytest.approx([10.0 / point.latency_ms for point in points])


def test_without_latencies_there_is_no_panel_and_the_figure_says_so() -> None:
    assert speed_panel(rows(), "val", 1, "latency_ms") is None
    figure = speedups_figure(SpeedupsInfo("val", 100, "", ()))
    assert figure.layout.annotations[0].text == "no latency has been measured yet"
