"""Figure of accuracy over speed: the best routers of each kind beside the static sub-networks, with
a panel for each batch size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dashboards.front import PARAM_PREFIX, ROUTER_PARAM
from dashboards.routers import COLOURS
from dashboards.theme import INK, MUTED, dressed, finite, note, percent, plain, router_name, router_symbol, significant
from dsnet.wording import plural, signed
from search.front.controls import StaticLine
from search.front.pareto import front_mask

_STEPS = 60
"""Number of points of the static line, which is curved over the speed-up."""


@dataclass(frozen=True)
class SpeedPoint:
    """A sub-network or router at a batch size."""

    name: str
    latency_ms: float
    """Milliseconds of a call on the whole batch."""
    top1: float
    """A fraction."""


@dataclass(frozen=True)
class SpeedPanel:
    """The sub-networks and routers at one batch size."""

    batch_size: int
    static: tuple[SpeedPoint, ...]
    """The static sub-networks by rising MAdds; the last one is the widest."""
    routers: Mapping[str, tuple[SpeedPoint, ...]]
    """Kind of router -> those of its trials that are more accurate than all faster ones, by falling
    latency."""

    @property
    def widest(self) -> SpeedPoint:
        """The sub-network with which all others are compared."""
        return self.static[-1]

    def speedup(self, point: SpeedPoint) -> float:
        """Latency of the widest over that of a point."""
        return self.widest.latency_ms / point.latency_ms

    @property
    def static_line(self) -> tuple[SpeedPoint, ...]:
        """Random mixtures of two static sub-networks: the best top-1 at a mean latency, the fastest
        first."""
        line = StaticLine.through([point.latency_ms for point in self.static], [point.top1 for point in self.static])
        vertices = [self.static[index] for index in line.vertices]
        ms = [point.latency_ms for point in vertices]
        steps = np.unique([*np.linspace(ms[0], ms[-1], _STEPS), *ms])
        top1 = np.interp(steps, ms, [point.top1 for point in vertices])
        return tuple(SpeedPoint("static line", float(x), float(y)) for x, y in zip(steps, top1, strict=True))

    def gain(self, point: SpeedPoint) -> float:
        """Top-1 of a point minus that of the widest, in points of percent."""
        return 100 * (point.top1 - self.widest.top1)


@dataclass(frozen=True)
class SpeedupsInfo:
    """Accuracy and speed of all trials on one split."""

    split: str
    num_images: int
    place: str
    """Device, engine and threads of the latencies."""
    panels: tuple[SpeedPanel, ...]
    """By rising batch size."""


def speed_panel(
    rows: Iterable[Mapping[str, Any]], split: str, batch_size: int, metric: str, router: str = "gate"
) -> SpeedPanel | None:
    """A panel from rows of points.parquet; None if no static sub-network has a latency.

    Args:
        rows: as for `dashboards.front.dynamic_points`, with a column `metric`.
        split: rows of other splits are left out.
        batch_size: number of images of a call.
        metric: name of the latency at this batch size.
        router: kind of router of the trials that have no parameter for it.
    """
    timed = [row for row in rows if row["split"] == split and finite(row.get(metric)) is not None]
    static = sorted((row for row in timed if row["kind"] == "subnet"), key=lambda row: float(row["madds_m"]))
    if not static:
        return None
    by_kind: dict[str, list[SpeedPoint]] = {}
    for row in timed:
        if row["kind"] != "subnet" and row["is_feasible"] == 1:
            kind = row.get(PARAM_PREFIX + ROUTER_PARAM)
            by_kind.setdefault(kind if isinstance(kind, str) else router, []).append(_point(row, metric))
    return SpeedPanel(
        batch_size,
        tuple(_point(row, metric) for row in static),
        {kind: _best(points) for kind, points in sorted(by_kind.items())},
    )


def _point(row: Mapping[str, Any], metric: str) -> SpeedPoint:
    return SpeedPoint(str(row["name"]), float(row[metric]), float(row["top1"]))


def _best(points: Sequence[SpeedPoint]) -> tuple[SpeedPoint, ...]:
    """See `SpeedPanel.routers`."""
    values = [(point.latency_ms, point.top1) for point in points]
    mask = front_mask(values, ("minimize", "maximize"), keep_duplicates=False)
    best = (point for point, is_best in zip(points, mask, strict=True) if is_best)
    return tuple(sorted(best, key=lambda point: -point.latency_ms))


def speedups_figure(info: SpeedupsInfo) -> go.Figure:
    """Figure of top-1 minus that of the widest static sub-network (points) over the speed-up over
    it."""
    titles = [f"{plural(panel.batch_size, 'image')} a call" for panel in info.panels]
    figure = make_subplots(rows=1, cols=max(len(titles), 1), shared_yaxes=True, subplot_titles=titles)
    figure.update_annotations(font={"size": 14, "color": INK})
    kinds = sorted({kind for panel in info.panels for kind in panel.routers})
    for column, panel in enumerate(info.panels, start=1):
        figure.add_hline(y=0, line={"color": MUTED, "width": 1}, row=1, col=column)
        line = _trace(panel, "static line", panel.static_line, INK, "circle", column)
        figure.add_trace(line.update(mode="lines", hoverinfo="skip"), row=1, col=column)
        static = _trace(panel, "static sub-networks", panel.static, INK, "circle", column)
        figure.add_trace(static.update(mode="markers"), row=1, col=column)
        for number, kind in enumerate(kinds):
            points = panel.routers.get(kind, ())
            colour = COLOURS[number % len(COLOURS)]
            trace = _trace(panel, router_name(kind), points, colour, router_symbol(kind), column)
            figure.add_trace(trace, row=1, col=column)
    if not info.panels:
        note(figure, "no latency has been measured yet")
    figure.update_xaxes(title_text="speed-up over the widest", ticksuffix="x", rangemode="tozero")
    figure.update_yaxes(title_text="top-1 minus the widest (points)", col=1)
    subtitle = f"{info.split} (n = {info.num_images:,}), on which the routers were chosen\n{info.place}"
    return dressed(figure, "Accuracy over speed", subtitle)


def _trace(
    panel: SpeedPanel, name: str, points: Sequence[SpeedPoint], colour: str, symbol: str, column: int
) -> go.Scatter:
    return go.Scatter(
        x=[panel.speedup(point) for point in points],
        y=[panel.gain(point) for point in points],
        name=plain(name),
        legendgroup=name,
        showlegend=column == 1,
        mode="lines+markers",
        line={"color": colour, "width": 1.2},
        marker={"color": colour, "symbol": symbol, "size": 7},
        text=[
            f"<b>{plain(point.name)}</b><br>{significant(panel.speedup(point))}x: {significant(point.latency_ms)} ms a call"
            f"<br>top-1 {percent(point.top1)}, {signed(panel.gain(point))} points"
            for point in points
        ],
        hoverinfo="text",
    )
