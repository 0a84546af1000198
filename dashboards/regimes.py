"""Figure that compares training regimes: accuracy of every width and paired differences, with
intervals over seeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dashboards.theme import INK, MUTED, SERIES, SYMBOLS, dressed, note, percent, plain
from dsnet.wording import plural, signed

PANEL_PX = 300
SPREAD = 0.7
"""Share of the distance between two widths over which the regimes are placed side by side."""


@dataclass(frozen=True)
class RegimeSeries:
    """Results of one regime, one entry per width."""

    regime: str
    num_seeds: int
    means: tuple[float, ...]
    """Means over seeds, as fractions."""
    halves: tuple[float, ...] | None
    """Half the width of the interval around each mean; None for a single seed."""


@dataclass(frozen=True)
class RegimeDifferences:
    """Accuracy of other regimes minus that of a baseline, paired by seed."""

    baseline: str
    series: tuple[RegimeSeries, ...]


@dataclass(frozen=True)
class RegimesInfo:
    """Results of regimes that were trained for the same number of steps; widths by rising MAdds."""

    split: str
    num_images: int
    subject: str
    """Description of what was trained, for the subtitle."""
    level: float
    """Coverage of the intervals, in (0, 1)."""
    subnets: tuple[str, ...]
    madds_m: tuple[float, ...]
    accuracy: tuple[RegimeSeries, ...]
    """Top-1 of each regime."""
    differences: tuple[RegimeDifferences, ...] = ()

    def __post_init__(self) -> None:
        every = [*self.accuracy, *(series for group in self.differences for series in group.series)]
        lengths = {len(self.subnets), len(self.madds_m)}
        lengths |= {len(part) for series in every for part in (series.means, series.halves) if part is not None}
        if len(lengths) > 1:
            raise ValueError(f"every field needs one entry per width, got lengths {sorted(lengths)}")
        if list(self.madds_m) != sorted(self.madds_m):
            raise ValueError(f"widths must be ordered by rising MAdds, got {self.madds_m}")
        names = [series.regime for series in self.accuracy]
        unknown = {series.regime for series in every} - set(names)
        if unknown or len(set(names)) < len(names):
            raise ValueError(f"each regime needs one entry in accuracy, got {names}; also drawn: {sorted(unknown)}")


def regimes_figure(info: RegimesInfo) -> go.Figure:
    """Figure with top-1 (%) of each width and, below, differences to each baseline in points.

    Differences are paired by seed. Widths are evenly spaced, with the regimes of a width side by
    side, so that intervals do not overlap.
    """
    titles = [f"top-1 on {info.split} (n = {info.num_images:,})"]
    titles += [f"minus {group.baseline}, paired by seed" for group in info.differences]
    rows = len(titles)
    figure = make_subplots(
        rows=rows, cols=1, shared_xaxes=True, vertical_spacing=0.2 / rows, subplot_titles=[plain(t) for t in titles]
    )
    figure.update_annotations(font={"size": 14, "color": INK})
    for trace in _traces(info, info.accuracy, percent, is_first=True):
        figure.add_trace(trace, row=1, col=1)
    for row, group in enumerate(info.differences, start=2):
        for trace in _traces(info, group.series, lambda value: f"{signed(100 * value)} points", is_first=False):
            figure.add_trace(trace, row=row, col=1)
        figure.add_hline(y=0, line={"color": MUTED, "width": 1}, row=row, col=1)
        figure.update_yaxes(title_text="points", row=row, col=1)
    if not info.accuracy:
        note(figure, "no run finished yet")
    labels = [f"{plain(name)}<br>{madds:.3g} M" for name, madds in zip(info.subnets, info.madds_m, strict=True)]
    figure.update_xaxes(tickvals=list(range(len(labels))), ticktext=labels, showgrid=False)
    figure.update_xaxes(title_text="sub-network, MAdds per image", row=rows, col=1)
    figure.update_yaxes(title_text="top-1 (%)", row=1, col=1)
    return dressed(figure, "Training regimes at equal steps", _subtitle(info), height_px=160 + PANEL_PX * rows)


def _subtitle(info: RegimesInfo) -> str:
    seeds = sorted({series.num_seeds for series in info.accuracy})
    if not seeds:
        return info.subject
    extent = plural(seeds[0], "seed") if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
    interval = f"bars: {100 * info.level:g} % t-intervals over {extent}" if seeds[-1] > 1 else "one seed: no intervals"
    return f"{info.subject}\n{interval}, on the same test images"


def _traces(
    info: RegimesInfo, series: tuple[RegimeSeries, ...], worded: Callable[[float], str], *, is_first: bool
) -> list[go.Scatter]:
    """One trace per regime; position, colour and symbol follow from its index in `info.accuracy`,
    in every panel."""
    names = [entry.regime for entry in info.accuracy]
    traces = []
    for entry in series:
        index = names.index(entry.regime)
        shift = SPREAD * ((index + 0.5) / len(names) - 0.5)
        style = SYMBOLS[index % len(SYMBOLS)] + "-open" * (index // len(SYMBOLS) % 2)
        traces.append(
            go.Scatter(
                x=[place + shift for place in range(len(entry.means))],
                y=[100 * mean for mean in entry.means],
                name=plain(entry.regime),
                legendgroup=entry.regime,
                showlegend=is_first,
                mode="markers",
                marker={"color": SERIES[index % len(SERIES)], "symbol": style, "size": 8},
                error_y=None if entry.halves is None else _bars(entry.halves),
                text=_texts(info, entry, worded),
                hoverinfo="text",
            )
        )
    return traces


def _bars(halves: tuple[float, ...]) -> dict[str, object]:
    return {"type": "data", "array": [100 * half for half in halves], "thickness": 1.2, "width": 3}


def _texts(info: RegimesInfo, entry: RegimeSeries, worded: Callable[[float], str]) -> list[str]:
    halves = entry.halves if entry.halves is not None else (None,) * len(entry.means)
    return [
        f"<b>{plain(entry.regime)}</b>, {plain(name)}, {madds:.3g} M MAdds<br>{worded(mean)}"
        + (" (one seed)" if half is None else f" ± {100 * half:.1f}, {plural(entry.num_seeds, 'seed')}")
        for name, madds, mean, half in zip(info.subnets, info.madds_m, entry.means, halves, strict=True)
    ]
