"""Figure of accuracy against cost: the front of the routers beside its controls.

Accuracies are fractions in the info and percent in the figure; costs are millions of MAdds per
image. An objective beside top-1 and MAdds is shown as the colour of the front; a latency also gets
its own row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dashboards.theme import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    VERMILION,
    colour_bar,
    dressed,
    finite,
    metric_value,
    note,
    percent,
    plain,
    router_name,
    router_symbol,
)
from dashboards.thinning import thinned
from dsnet.metrics import is_share, metric_noun
from dsnet.wording import signed
from search.front.points import METRIC_PREFIX

ParamValue = float | int | str | bool

CONTROL_STRETCH: Final = 0.35
"""Largest extension of the vertical axis for the controls, relative to the range of static
sub-networks and front."""
MIN_TOP1_SPAN: Final = 0.02
"""Smallest range of the vertical axis, as a fraction."""
MAX_TIES: Final = 4
"""Maximum number of ties that a hover text names."""
PARAM_PREFIX: Final = "param."
ROUTER_PARAM: Final = "gate.router"


@dataclass(frozen=True)
class StaticPoint:
    """Scores of one static sub-network."""

    name: str
    madds_m: float
    top1: float
    latency_ms: float | None = None
    further: float | None = None
    """The objective beside top-1 and MAdds, as `Further.metric` says."""
    supernet: str | None = None
    """Its supernet, in a sweep of several supernets."""


@dataclass(frozen=True)
class DynamicPoint:
    """Scores of one trial's router, with the routes that it takes."""

    name: str
    madds_m: float
    """Mean MAdds over the split's images, in millions."""
    top1: float
    is_front: bool
    interval: tuple[float, float] | None = None
    """95 % interval of `top1`, fractions (low, high)."""
    latency_ms: float | None = None
    params: tuple[tuple[str, ParamValue], ...] = ()
    """The trial's parameters, for the hover text."""
    router: str = "gate"
    """Kind of router."""
    broken: tuple[str, ...] = ()
    """The constraints that it violates."""
    is_feasible: bool = True
    """Whether all constraints hold; only feasible points may be on the front."""
    further: float | None = None
    """The objective beside top-1 and MAdds, as `Further.metric` says."""
    supernet: str | None = None
    """Its supernet, in a sweep of several supernets."""
    ties: tuple[str, ...] = ()
    """Names of the points from which the images cannot distinguish it."""
    stability: float | None = None
    """Share of resamples in which it is non-dominated, 0..1."""


@dataclass(frozen=True)
class Curve:
    """Points of a control curve in drawing order; empty if it is not available."""

    madds_m: tuple[float, ...] = ()
    top1: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.madds_m) != len(self.top1):
            raise ValueError(f"a curve needs as many costs as accuracies, got {len(self.madds_m)} and {len(self.top1)}")
        if self.top1 and not 0 <= min(self.top1) <= max(self.top1) <= 1:
            raise ValueError(f"top-1 must be a fraction in 0..1, got {min(self.top1)}..{max(self.top1)}")


@dataclass(frozen=True)
class FrontPanel:
    """Content of the panel of one split."""

    split: str
    num_images: int
    static: tuple[StaticPoint, ...]
    static_line: Curve
    """Upper concave envelope of the static sub-networks, with vertices chosen on val and scored on
    this split."""
    dynamic: tuple[DynamicPoint, ...]
    random: Curve = Curve()
    """Random routing with the route histogram of each front point; one point per front point."""
    cascade: Curve = Curve()
    """Confidence cascade without training."""
    oracle: Curve = Curve()
    """Best accuracy at a mean cost if routes are chosen with knowledge of the labels."""
    reachable: Curve = Curve()
    """The best router found that sees every route's output; its own cost is not counted."""

    @property
    def front(self) -> tuple[DynamicPoint, ...]:
        return tuple(sorted((p for p in self.dynamic if p.is_front), key=lambda p: p.madds_m))

    @cached_property
    def drawn_infeasible(self) -> tuple[DynamicPoint, ...]:
        """The infeasible trials that the figure draws."""
        return _thinned([p for p in self.dynamic if not p.is_front and not p.is_feasible])

    @cached_property
    def drawn_others(self) -> tuple[DynamicPoint, ...]:
        """The feasible trials that are not on the front, as far as the figure draws them."""
        return _thinned([p for p in self.dynamic if not p.is_front and p.is_feasible])

    @property
    def num_left_out(self) -> int:
        """Number of trials that the figure leaves out, because others lie beside them."""
        return len(self.dynamic) - len(self.front) - len(self.drawn_infeasible) - len(self.drawn_others)


def _thinned(points: Sequence[DynamicPoint]) -> tuple[DynamicPoint, ...]:
    return tuple(points[position] for position in thinned([(p.madds_m, p.top1) for p in points]))


@dataclass(frozen=True)
class Further:
    """An objective of the sweep beside top-1 and MAdds."""

    metric: str
    """Name of the metric; accuracies are fractions, `*_m` millions, `latency_ms*` milliseconds."""
    goal: Literal["maximize", "minimize"] = "minimize"

    @property
    def is_latency(self) -> bool:
        """Whether the objective is a latency, which gets its own row."""
        return self.metric.startswith("latency_ms")

    @property
    def title(self) -> str:
        """Title of its axis or colour bar, with the unit."""
        unit = " (ms)" if self.is_latency else " (%)" if is_share(self.metric) else ""
        return f"{plain(metric_noun(self.metric))}{unit}"

    def plotted(self, value: float | None) -> float | None:
        """A value in the unit of `title`."""
        return None if value is None else 100 * value if is_share(self.metric) else value

    def text(self, value: float | None) -> str:
        """The metric and its value for a hover text."""
        known = "not known" if value is None else metric_value(self.metric, value)
        return f"{plain(metric_noun(self.metric))} {known}"


@dataclass(frozen=True)
class FrontInfo:
    """The front on the split on which it was chosen and, once verified, on the reported split."""

    chosen: FrontPanel
    reported: FrontPanel | None = None
    further: Further | None = None
    """The third objective; None if there are only top-1 and MAdds."""
    objectives: tuple[str, ...] = ("top1", "madds_m")
    """The objectives by which the front was chosen."""

    @property
    def panels(self) -> tuple[FrontPanel, ...]:
        return (self.chosen,) if self.reported is None else (self.chosen, self.reported)


@dataclass(frozen=True)
class Frame:
    """Axis ranges shared by the panels (top-1 in percent), so that they can be compared."""

    madds_m: tuple[float, float]
    top1_percent: tuple[float, float]


def static_points(rows: Iterable[Mapping[str, Any]], split: str, further: str | None = None) -> tuple[StaticPoint, ...]:
    """The static sub-networks among rows of points.parquet, by rising cost.

    Args:
        rows: mappings with `kind`, `name`, `split`, `top1` (fraction), `madds_m` and optionally
            `latency_ms`.
        split: rows of other splits are left out.
        further: name of the objective beside top-1 and MAdds.
    """
    points = (
        StaticPoint(
            name=str(r["name"]),
            madds_m=float(r["madds_m"]),
            top1=float(r["top1"]),
            latency_ms=finite(r.get("latency_ms")),
            further=None if further is None else finite(r.get(further, r.get(METRIC_PREFIX + further))),
            supernet=r.get("supernet"),
        )
        for r in rows
        if r["kind"] == "subnet" and r["split"] == split
    )
    return tuple(sorted(points, key=lambda p: p.madds_m))


def dynamic_points(
    rows: Iterable[Mapping[str, Any]],
    split: str,
    intervals: Mapping[str, tuple[float, float]],
    router: str = "gate",
    further: str | None = None,
) -> tuple[DynamicPoint, ...]:
    """The routers among rows of points.parquet, by rising cost.

    Args:
        rows: as for `static_points`, with `is_front`, `is_feasible` and a `param.*` column per gate
            parameter (None or NaN: not set).
        split: rows of other splits are left out.
        intervals: 95 % interval of top-1 (fractions) by point name; names without one are drawn
            without a bar.
        router: kind of router of the trials that have no parameter for it.
        further: name of the objective beside top-1 and MAdds.
    """
    points = (
        DynamicPoint(
            name=str(r["name"]),
            madds_m=float(r["madds_m"]),
            top1=float(r["top1"]),
            is_front=bool(r["is_front"] == 1),  # a missing value (NaN) is not on the front
            interval=intervals.get(str(r["name"])),
            latency_ms=finite(r.get("latency_ms")),
            params=_params(r),
            router=_router(r, router),
            is_feasible=bool(r.get("is_feasible", True) == 1),
            further=None if further is None else finite(r.get(further, r.get(METRIC_PREFIX + further))),
            supernet=r.get("supernet"),
        )
        for r in rows
        if r["kind"] == "gate" and r["split"] == split and finite(r["top1"]) is not None
    )
    return tuple(sorted(points, key=lambda p: p.madds_m))


def _router(row: Mapping[str, Any], default: str) -> str:
    return dict(_params(row)).get(ROUTER_PARAM, default)  # type: ignore[return-value]


def _params(row: Mapping[str, Any]) -> tuple[tuple[str, ParamValue], ...]:
    """The parameters of a trial; NaN or None means that only other trials have the parameter."""
    named = ((k.removeprefix(PARAM_PREFIX), v) for k, v in row.items() if k.startswith(PARAM_PREFIX))
    return tuple((name, value) for name, value in named if value is not None and value == value)


def front_frame(info: FrontInfo) -> Frame:
    """Axis ranges that fit static sub-networks and fronts, slightly extended for the controls."""
    panels = info.panels
    costs = [p.madds_m for panel in panels for p in _framing_points(panel)]
    accuracies = [a for panel in panels for a in _framing_accuracies(panel)]
    if not costs:
        costs = [p.madds_m for panel in panels for p in panel.dynamic] or [0.0, 1.0]
        accuracies = [p.top1 for panel in panels for p in panel.dynamic] or [0.0, 1.0]
    low, high = min(accuracies), max(accuracies)
    if high - low < MIN_TOP1_SPAN:
        middle = (low + high) / 2
        low, high = middle - MIN_TOP1_SPAN / 2, middle + MIN_TOP1_SPAN / 2
    span = high - low
    controls = [a for panel in panels for c in _controls(panel) for a in c.top1]
    low = max(min([low, *controls]), low - CONTROL_STRETCH * span)
    high = min(max([high, *controls]), high + CONTROL_STRETCH * span)
    pad = 0.06 * (high - low)
    cost_pad = 0.05 * (max(costs) - min(costs)) or 0.1 * max(costs)
    return Frame(
        madds_m=(max(0.0, min(costs) - cost_pad), max(costs) + cost_pad),
        top1_percent=(max(0.0, 100 * (low - pad)), min(100.6, 100 * (high + pad))),
    )


def _controls(panel: FrontPanel) -> tuple[Curve, ...]:
    return (panel.random, panel.cascade, panel.reachable, panel.oracle)


def _framing_points(panel: FrontPanel) -> list[StaticPoint | DynamicPoint]:
    return [*panel.static, *panel.front]


def _framing_accuracies(panel: FrontPanel) -> list[float]:
    ends = [end for p in panel.front if p.interval for end in p.interval]
    return [p.top1 for p in _framing_points(panel)] + ends


def front_figure(info: FrontInfo) -> go.Figure:
    """Figure of top-1 (%) against mean MAdds (M): on the left the split on which the front was
    chosen, on the right the reported split.

    If a latency is among the sweep's objectives, a second row shows the same trials against it.
    """
    panels = info.panels
    has_latency = info.further is not None and info.further.is_latency
    rows = 2 if has_latency else 1
    figure = make_subplots(
        rows=rows,
        cols=len(panels),
        shared_yaxes=True,
        horizontal_spacing=0.04,
        vertical_spacing=0.14,
        subplot_titles=[plain(_panel_title(panel, column)) for column, panel in enumerate(panels)],
    )
    figure.update_annotations(font={"size": 14, "color": INK})
    frame = front_frame(info)
    for column, panel in enumerate(panels, start=1):
        chosen = info.chosen if column == 2 else None
        _draw(figure, _madds_traces(panel, chosen, info.further), 1, column)
        _draw_outside(figure, panel, column, frame)
        if has_latency:
            assert info.further is not None
            _draw(figure, _latency_traces(panel, info.further), 2, column)
    figure.update_xaxes(range=list(frame.madds_m), title_text="mean MAdds per image (M)", row=1)
    if has_latency:
        assert info.further is not None
        figure.update_xaxes(range=_latency_range(panels), title_text=info.further.title, row=2)
    figure.update_yaxes(range=list(frame.top1_percent))
    figure.update_yaxes(title_text="top-1 accuracy (%)", col=1)
    if info.further is not None:
        figure.update_layout(coloraxis=_colour_axis(info))
    if not any(panel.static or panel.dynamic for panel in panels):
        note(figure, "no results yet")
    return dressed(figure, "Accuracy against cost", _subtitle(info), height_px=1040 if has_latency else 620)


def _colour_axis(info: FrontInfo) -> dict[str, Any]:
    """The common colour scale of all panels, dark where the objective is better."""
    assert info.further is not None
    drawn = (info.further.plotted(p.further) for panel in info.panels for p in panel.front)
    values = [value for value in drawn if value is not None]
    return {
        "colorscale": "Cividis",
        "reversescale": info.further.goal == "maximize",
        "cmin": min(values, default=0.0),
        "cmax": max(values, default=1.0),
        "colorbar": colour_bar(info.further.title),
    }


def _latency_range(panels: Sequence[FrontPanel]) -> list[float]:
    """Range of the latency axis: static sub-networks and front; other trials may lie outside."""
    values = [p.further for panel in panels for p in _framing_points(panel) if p.further is not None]
    if not values:
        return [0.0, 1.0]
    pad = 0.05 * (max(values) - min(values)) or 0.1 * max(values)
    return [max(0.0, min(values) - pad), max(values) + pad]


def _panel_title(panel: FrontPanel, column: int) -> str:
    role = "the front was chosen here" if column == 0 else "as reported"
    return f"{panel.split} (n = {panel.num_images:,}): {role}"


def _subtitle(info: FrontInfo) -> str:
    chosen = f"chosen on {info.chosen.split} (n = {info.chosen.num_images:,})"
    bars = "bars are 95 % intervals over images"
    if info.further is not None:
        bars = f"the front has the objectives {', '.join(info.objectives)}: a point that seems dominated is better in another; {bars}"
    if info.chosen.num_left_out:
        bars += (
            f"\n{info.chosen.num_left_out:,} of {len(info.chosen.dynamic):,} trials are not drawn, because others lie beside them "
            "(points.parquet has all)"
        )
    if info.reported is None:
        return f"{chosen}, not verified yet\n{bars}"
    reported = f"reported on {info.reported.split} (n = {info.reported.num_images:,})"
    return f"{chosen}, {reported}\n{bars}"


def _draw(figure: go.Figure, traces: Sequence[go.Scatter], row: int, column: int) -> None:
    """Add the traces that are not empty; each name has one legend entry for all panels."""
    seen = {trace.name for trace in figure.data if trace.showlegend is not False}
    for trace in traces:
        if trace.x:
            is_new = trace.name not in seen and trace.showlegend is not False
            trace.update(legendgroup=trace.name, showlegend=is_new)
            figure.add_trace(trace, row=row, col=column)


def _madds_traces(panel: FrontPanel, chosen: FrontPanel | None, further: Further | None) -> list[go.Scatter]:
    return [
        _curve("oracle (knows the labels)", panel.oracle, {"color": PURPLE, "dash": "dot", "width": 2}),
        _curve(
            "reachable (sees every route's output)",
            panel.reachable,
            {"color": VERMILION, "dash": "dashdot", "width": 2},
        ),
        _curve("confidence cascade", panel.cascade, {"color": GREEN, "dash": "dash", "width": 2}),
        _curve("static line (mix of two)", panel.static_line, {"color": INK, "width": 1.5}),
        *_background_traces(panel, _madds_m, further),
        _random(panel),
        *([] if chosen is None else _shift_traces(chosen, panel, further)),
        *_fronts(panel, _madds_m, further),
    ]


def _latency_traces(panel: FrontPanel, further: Further) -> list[go.Scatter]:
    """Traces of the same points against the latency; controls have no latency."""
    return [*_background_traces(panel, _further, further), *_fronts(panel, _further, further)]


Point = StaticPoint | DynamicPoint
Cost = Callable[[Point], float | None]
"""Function that gives a point's horizontal coordinate; None if it is unknown."""


def _madds_m(point: Point) -> float | None:
    return point.madds_m


def _further(point: Point) -> float | None:
    return point.further


def _marks(
    name: str, points: Sequence[Point], panel: FrontPanel, cost: Cost, further: Further | None, **style: Any
) -> go.Scatter:
    return go.Scatter(
        x=[cost(p) for p in points],
        y=[100 * p.top1 for p in points],
        name=name,
        mode="markers",
        text=[_hover(p, panel, further) for p in points],
        hoverinfo="text",
        **style,
    )


def _background_traces(panel: FrontPanel, cost: Cost, further: Further | None) -> list[go.Scatter]:
    """Traces of the points that are not on the front: infeasible trials, other trials, static
    sub-networks."""
    infeasible, others = (
        [p for p in drawn if cost(p) is not None] for drawn in (panel.drawn_infeasible, panel.drawn_others)
    )
    static = [p for p in panel.static if cost(p) is not None]
    muted = {"color": MUTED, "opacity": 0.4, "size": 6, "symbol": "x-thin", "line": {"width": 1.2, "color": MUTED}}
    faint = {"color": BLUE, "opacity": 0.22, "size": 6, "symbol": [router_symbol(p.router) for p in others]}
    square = {"color": INK, "symbol": "square", "size": 8}
    return [
        _marks("trials that violate a constraint", infeasible, panel, cost, further, marker=muted),
        _marks("other trials", others, panel, cost, further, marker=faint),
        _marks("static sub-networks", static, panel, cost, further, marker=square),
    ]


def _curve(name: str, curve: Curve, line: dict[str, Any]) -> go.Scatter:
    return go.Scatter(
        x=list(curve.madds_m),
        y=[100 * a for a in curve.top1],
        name=name,
        mode="lines",
        line=line,
        hovertemplate="%{y:.1f} % at %{x:.3g} M MAdds",
    )


def _random(panel: FrontPanel) -> go.Scatter:
    return go.Scatter(
        x=list(panel.random.madds_m),
        y=[100 * a for a in panel.random.top1],
        name="random routing, same histogram",
        mode="markers",
        marker={"color": ORANGE, "symbol": "x-thin", "size": 9, "line": {"width": 2.5, "color": ORANGE}},
        hovertemplate="%{y:.1f} % at %{x:.3g} M MAdds",
    )


def _fronts(panel: FrontPanel, cost: Cost, further: Further | None) -> list[go.Scatter]:
    """Traces of the front, one per kind of router."""
    return [_front(panel, kind, cost, further) for kind in sorted({point.router for point in panel.front})]


def _front(panel: FrontPanel, kind: str, cost: Cost, further: Further | None) -> go.Scatter:
    points = [point for point in panel.front if point.router == kind and cost(point) is not None]
    ends = [p.interval or (p.top1, p.top1) for p in points]
    marker: dict[str, Any] = {"symbol": router_symbol(kind), "size": 10, "line": {"color": "white", "width": 1}}
    if further is None:
        marker["color"] = BLUE
    else:
        marker |= {"color": [further.plotted(p.further) for p in points], "coloraxis": "coloraxis", "size": 11}
    return _marks(
        f"front: {plain(router_name(kind))}",
        points,
        panel,
        cost,
        further,
        marker=marker,
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [100 * (high - p.top1) for p, (_, high) in zip(points, ends, strict=True)],
            "arrayminus": [100 * (p.top1 - low) for p, (low, _) in zip(points, ends, strict=True)],
            "color": "rgba(0, 114, 178, 0.45)" if further is None else "rgba(95, 107, 122, 0.45)",
            "thickness": 1.2,
            "width": 3,
        },
    )


def _shift_traces(chosen: FrontPanel, reported: FrontPanel, further: Further | None) -> tuple[go.Scatter, go.Scatter]:
    """Traces from the front points as they looked when chosen to their reported positions.

    The distance shows the winner's curse.
    """
    now = {p.name: p for p in reported.front}
    pairs = [(p, now[p.name]) for p in chosen.front if p.name in now]
    joins = go.Scatter(
        x=[x for then, after in pairs for x in (then.madds_m, after.madds_m, None)],
        y=[y for then, after in pairs for y in (100 * then.top1, 100 * after.top1, None)],
        name="change between splits",
        mode="lines",
        line={"color": BLUE, "width": 1, "dash": "dot"},
        hoverinfo="skip",
        showlegend=False,
    )
    marks = go.Scatter(
        x=[then.madds_m for then, _ in pairs],
        y=[100 * then.top1 for then, _ in pairs],
        name=f"the front on {plain(chosen.split)}",
        mode="markers",
        marker={"color": BLUE, "symbol": [f"{router_symbol(then.router)}-open" for then, _ in pairs], "size": 9},
        text=[
            f"{_hover(then, chosen, further)}<br>{plain(reported.split)} minus {plain(chosen.split)}: "
            f"{signed(100 * (after.top1 - then.top1))} points"
            for then, after in pairs
        ],
        hoverinfo="text",
    )
    return joins, marks


def _hover(point: Point, panel: FrontPanel, further: Further | None) -> str:
    interval = point.interval if isinstance(point, DynamicPoint) else None
    lines = [f"<b>{plain(point.name)}</b> on {plain(panel.split)}"]
    if point.supernet is not None:
        lines.append(f"supernet {plain(point.supernet)}")
    if isinstance(point, DynamicPoint):
        lines.append(plain(router_name(point.router)))
    bounds = "" if interval is None else f" (95 %: {percent(interval[0])} to {percent(interval[1])})"
    lines.append(f"top-1 {percent(point.top1)}{bounds}")
    lines.append(f"{point.madds_m:.4g} M MAdds")
    lines.append("latency not measured" if point.latency_ms is None else f"{point.latency_ms:.3g} ms")
    if further is not None and further.metric != "latency_ms":
        lines.append(further.text(point.further))
    if isinstance(point, DynamicPoint):
        lines += _findings(point)
        lines += [f"{plain(name)} = {_shown(value)}" for name, value in point.params if name != ROUTER_PARAM]
    return "<br>".join(lines)


def _findings(point: DynamicPoint) -> list[str]:
    lines = [f"violates {plain(constraint)}" for constraint in point.broken]
    if point.stability is not None:
        lines.append(f"on the front in {percent(point.stability, 0)} of the resamples")
    if point.ties:
        shown = [plain(name) for name in point.ties[:MAX_TIES]]
        more = len(point.ties) - len(shown)
        lines.append(f"tied with {', '.join(shown)}" + (f" and {more} more" if more else ""))
    return lines


def _shown(value: ParamValue) -> str:
    return f"{value:.4g}" if isinstance(value, float) else plain(str(value))


def _draw_outside(figure: go.Figure, panel: FrontPanel, column: int, frame: Frame) -> None:
    """Note in the corner what lies outside the frame, so that it is not overlooked."""
    lines = _outside(panel, frame)
    if lines:
        figure.add_annotation(
            text="<br>".join(lines),
            x=0.985,
            y=0.02,
            xref="x domain",
            yref="y domain",
            xanchor="right",
            yanchor="bottom",
            align="right",
            showarrow=False,
            font={"size": 11, "color": MUTED},
            bgcolor="rgba(255,255,255,0.8)",
            row=1,
            col=column,
        )


def _outside(panel: FrontPanel, frame: Frame) -> list[str]:
    high = frame.top1_percent[1] / 100
    curves: Sequence[tuple[str, Curve]] = (
        ("oracle", panel.oracle),
        ("reachable", panel.reachable),
        ("cascade", panel.cascade),
    )
    lines = [f"{name} goes up to {percent(max(c.top1))}" for name, c in curves if c.top1 and max(c.top1) > high]
    hidden = sum(not _is_inside(p, frame) for p in panel.dynamic)
    if hidden:
        lines.append(f"{hidden} of {len(panel.dynamic)} trials outside the frame")
    return lines


def _is_inside(point: DynamicPoint, frame: Frame) -> bool:
    (left, right), (low, high) = frame.madds_m, frame.top1_percent
    return left <= point.madds_m <= right and low <= 100 * point.top1 <= high
