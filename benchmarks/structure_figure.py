"""Figure of the runs of `structure`: accuracy over MAdds, and differences to `uniform_ib`."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from benchmarks.regime_report import LEVEL, Interval
from benchmarks.structure_report import MEAN, Results, difference_text, subject
from benchmarks.structure_runs import ARMS, BASELINE
from dashboards.theme import DASHES, INK, MUTED, SERIES, SYMBOLS, dressed, plain, significant
from dsnet.wording import plural

PANEL_PX = 340
SPREAD = 0.6
"""Share of the distance between two targets over which the ways are placed side by side."""


def structure_figure(results: Results) -> go.Figure:
    """Figure with top-1 on `test` over MAdds and, below, differences to `uniform_ib` per target."""
    titles = [f"top-1 on test (n = {results.num_test_images:,})", f"minus {BASELINE}, paired by seed"]
    figure = make_subplots(rows=2, cols=1, vertical_spacing=0.16, subplot_titles=[plain(title) for title in titles])
    figure.update_annotations(font={"size": 14, "color": INK})
    for number, arm in enumerate(results.arms):
        figure.add_trace(_accuracy(results, number, arm), row=1, col=1)
        if arm != BASELINE and (parts := results.difference(arm)):
            figure.add_trace(_differences(results, number, arm, parts), row=2, col=1)
    figure.add_hline(y=0, line={"color": MUTED, "width": 1}, row=2, col=1)
    madds_m = [madds / 1e6 for madds in results.target_madds]
    labels = [significant(value) for value in madds_m]
    figure.update_xaxes(type="log", tickvals=madds_m, ticktext=labels, title_text="MAdds per image, M", row=1, col=1)
    figure.update_yaxes(title_text="top-1 (%)", row=1, col=1)
    labels = [plain(name) for name in (*results.targets, MEAN)]
    figure.update_xaxes(
        tickvals=list(range(len(labels))),
        ticktext=labels,
        title_text="target, share of the widest's MAdds",
        row=2,
        col=1,
    )
    figure.update_yaxes(title_text="points", row=2, col=1)
    most = max(len(results.of_arm(arm)) for arm in results.arms)
    bars = (
        f"bars: {100 * LEVEL:g} % t-intervals over up to {plural(most, 'seed')}"
        if most > 1
        else "one seed: no intervals"
    )
    title = "Ways of getting sub-networks at equal cost of training"
    return dressed(figure, title, f"{subject(results)}\n{bars}", height_px=180 + 2 * PANEL_PX)


def _accuracy(results: Results, number: int, arm: str) -> go.Scatter:
    parts = results.accuracy(arm)[:-1]
    records = results.of_arm(arm)
    madds = [fmean(record["subnets"][k]["madds"] for record in records) / 1e6 for k in range(len(parts))]
    return go.Scatter(
        x=madds,
        y=[100 * part.mean for part in parts],
        name=plain(arm),
        legendgroup=arm,
        mode="lines+markers",
        line={"color": SERIES[number % len(SERIES)], "dash": DASHES[number % len(DASHES)], "width": 1.5},
        marker=_marker(number),
        error_y=_bars(parts),
        text=[
            f"<b>{plain(arm)}</b><br>{plain(ARMS[arm].label)}<br>{x:.3g} M MAdds<br>{100 * part.mean:.1f} %"
            for x, part in zip(madds, parts, strict=True)
        ],
        hoverinfo="text",
    )


def _differences(results: Results, number: int, arm: str, parts: Sequence[Interval]) -> go.Scatter:
    shift = SPREAD * ((number + 0.5) / len(results.arms) - 0.5)
    return go.Scatter(
        x=[place + shift for place in range(len(parts))],
        y=[100 * part.mean for part in parts],
        name=plain(arm),
        legendgroup=arm,
        showlegend=False,
        mode="markers",
        marker=_marker(number),
        error_y=_bars(parts),
        text=[f"<b>{plain(arm)}</b><br>{difference_text(part)}" for part in parts],
        hoverinfo="text",
    )


def _marker(number: int) -> dict[str, object]:
    """Colour and symbol; after as many ways as there are symbols, the symbols are open."""
    symbol = SYMBOLS[number % len(SYMBOLS)] + ("-open" if number >= len(SYMBOLS) else "")
    return {"color": SERIES[number % len(SERIES)], "symbol": symbol, "size": 8}


def _bars(parts: Sequence[Interval]) -> dict[str, object] | None:
    halves = [part.half for part in parts if part.half is not None]
    return {"type": "data", "array": [100 * half for half in halves], "thickness": 1.2, "width": 3} if halves else None
