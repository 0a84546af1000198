"""Figure of the static sub-networks: accuracy and latency against cost, speed-up ceiling."""

from __future__ import annotations

import math
from dataclasses import dataclass

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dashboards.theme import BLUE, DASHES, INK, ORANGE, SERIES, SYMBOLS, dressed, note, percent, plain


@dataclass(frozen=True)
class LatencySeries:
    """Latency of one batch of `batch_size` images, one entry per sub-network."""

    batch_size: int
    median_ms: tuple[float, ...]
    low_ms: tuple[float, ...]
    """25 % quantile."""
    high_ms: tuple[float, ...]
    """75 % quantile."""

    @property
    def ceiling(self) -> float:
        """Ceiling of the speed-up by routing: latency of the widest / cheapest sub-network."""
        return self.median_ms[-1] / self.median_ms[0]


@dataclass(frozen=True)
class WidthsInfo:
    """Accuracy, cost and latency of the static sub-networks, by rising MAdds."""

    split: str
    num_images: int
    device: str
    """Device and threads of the latency measurement, e.g. 'cpu, 1 thread'."""
    subnets: tuple[str, ...]
    madds_m: tuple[float, ...]
    params_m: tuple[float, ...]
    top1: tuple[float, ...]
    """Top-1 accuracy as fractions."""
    top5: tuple[float, ...]
    """Top-5 accuracy as fractions."""
    latency: tuple[LatencySeries, ...] = ()
    has_top5: bool = True
    """Whether top-5 is shown; with few classes it is near 100 % for every sub-network."""

    def __post_init__(self) -> None:
        lengths = {len(self.subnets), len(self.madds_m), len(self.params_m), len(self.top1), len(self.top5)}
        lengths |= {len(v) for s in self.latency for v in (s.median_ms, s.low_ms, s.high_ms)}
        if len(lengths) > 1:
            raise ValueError(f"every field needs one entry per sub-network, got lengths {sorted(lengths)}")
        if list(self.madds_m) != sorted(self.madds_m):
            raise ValueError(f"sub-networks must be ordered by rising MAdds, got {self.madds_m}")


def widths_figure(info: WidthsInfo) -> go.Figure:
    """Figure against MAdds (M): left top-1 and, with many classes, top-5 (%), right latency of a
    batch (ms, median and IQR).

    The latency axis is logarithmic, so that equal heights are equal ratios and ceilings can be
    compared across batch sizes.
    """
    titles = (f"accuracy on {info.split} (n = {info.num_images:,})", "measured latency, median and IQR")
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.12, subplot_titles=[plain(t) for t in titles])
    figure.update_annotations(font={"size": 14, "color": INK})
    for trace in _accuracy_traces(info):
        figure.add_trace(trace, row=1, col=1)
    for index, series in enumerate(info.latency):
        figure.add_trace(_latency_trace(info, series, index), row=1, col=2)
    if not info.latency:
        figure.add_annotation(
            text="not measured yet", x=0.5, y=0.5, xref="x2 domain", yref="y2 domain", showarrow=False
        )
    if not info.subnets:
        note(figure, "no sub-network has been measured yet")
    figure.update_xaxes(title_text="MAdds per image (M)", rangemode="tozero")
    figure.update_yaxes(title_text="accuracy (%)", row=1, col=1)
    figure.update_yaxes(title_text="latency of a batch (ms)", type="log", tickvals=_log_ticks(info), row=1, col=2)
    subtitle = f"latency on {info.device}, by the measure stage\n{ceiling_text(info)}"
    return dressed(figure, "Static sub-networks", subtitle, height_px=520)


def _log_ticks(info: WidthsInfo) -> list[float]:
    """Ticks 1, 2, 5, 10, 20, 50, ... over the measured range; Plotly's own labels omit the decade.

    Values at or below 0, possible as the lower end of a bar on a disturbed machine, are left out.
    """
    values = [v for s in info.latency for v in (*s.low_ms, *s.median_ms, *s.high_ms) if v > 0]
    if not values:
        return []
    decades = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
    return [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]


def ceiling_text(info: WidthsInfo) -> str:
    """The speed-up ceiling of routing in one line; a range for more than two batch sizes."""
    if not info.latency or not info.subnets:
        return "latency not measured yet"
    if len(info.latency) > 2:
        ceilings = [series.ceiling for series in info.latency]
        sizes = [series.batch_size for series in info.latency]
        extent = f"{min(ceilings):.2f}x to {max(ceilings):.2f}x for batches of {min(sizes)} to {max(sizes)}"
        return f"maximum speed-up (widest / cheapest): {extent}"
    ceilings_text = ", ".join(f"{s.ceiling:.2f}x at batch {s.batch_size}" for s in info.latency)
    return f"maximum speed-up (widest / cheapest): {ceilings_text}"


def _accuracy_traces(info: WidthsInfo) -> tuple[go.Scatter, ...]:
    def trace(name: str, values: tuple[float, ...], colour: str, symbol: str) -> go.Scatter:
        return go.Scatter(
            x=list(info.madds_m),
            y=[100 * v for v in values],
            name=name,
            mode="lines+markers",
            line={"color": colour, "width": 1.5},
            marker={"color": colour, "symbol": symbol, "size": 8},
            text=[
                f"<b>{plain(n)}</b><br>{name} {percent(v)}<br>{m:.4g} M MAdds<br>{p:.3g} M parameters"
                for n, v, m, p in zip(info.subnets, values, info.madds_m, info.params_m, strict=True)
            ],
            hoverinfo="text",
        )

    top1 = trace("top-1", info.top1, BLUE, "circle")
    return (top1, trace("top-5", info.top5, ORANGE, "square")) if info.has_top5 else (top1,)


def _latency_trace(info: WidthsInfo, series: LatencySeries, index: int) -> go.Scatter:
    colour = SERIES[(index + 1) % len(SERIES)]
    return go.Scatter(
        x=list(info.madds_m),
        y=list(series.median_ms),
        name=f"batch {series.batch_size} (at most {series.ceiling:.2f}x)" if info.subnets else "",
        mode="lines+markers",
        line={"color": colour, "dash": DASHES[index % len(DASHES)], "width": 1.5},
        marker={"color": colour, "symbol": SYMBOLS[(index + 2) % len(SYMBOLS)], "size": 8},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [high - m for high, m in zip(series.high_ms, series.median_ms, strict=True)],
            "arrayminus": [m - low for low, m in zip(series.low_ms, series.median_ms, strict=True)],
            "thickness": 1.2,
            "width": 3,
        },
        text=[
            f"<b>{plain(name)}</b>, batch {series.batch_size}<br>median {m:.3g} ms (IQR {low:.3g} to {high:.3g})"
            for name, m, low, high in zip(info.subnets, series.median_ms, series.low_ms, series.high_ms, strict=True)
        ],
        hoverinfo="text",
    )
