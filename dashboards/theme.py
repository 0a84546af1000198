"""Common style of all figures: a colour-blind safe palette, fonts, a Plotly template, and
formatting of text and numbers.

Colour is never the only distinction: every role also has its own marker symbol or dash.
"""

from __future__ import annotations

import html
import math
from typing import Final

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

# Okabe and Ito's palette, distinguishable with every common form of colour blindness.
INK: Final = "#1f2933"
MUTED: Final = "#5f6b7a"
GRID: Final = "#e6e9ee"
BLUE: Final = "#0072b2"
ORANGE: Final = "#e69f00"
GREEN: Final = "#009e73"
VERMILION: Final = "#d55e00"
PURPLE: Final = "#cc79a7"
SKY: Final = "#56b4e9"
SERIES: Final = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, INK, MUTED)
SYMBOLS: Final = ("circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon", "x")
DASHES: Final = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")

ROUTERS: Final = {
    "gate": ("gate", "circle"),
    "evidence_gate": ("gate with richer evidence", "diamond"),
    "gates": ("gate at every stage", "square"),
    "evidence_gates": ("gate at every stage, richer evidence", "pentagon"),
    "cascade": ("cascade", "triangle-up"),
    "learned_cascade": ("learned cascade", "star"),
}
"""Kind of router -> its name and its marker symbol, in every figure and table."""

# System fonts only, since the report must not load anything.
FONT_FAMILY: Final = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
MIN_HEIGHT_PX: Final = 460
LEGEND_PX: Final = 112
NO_LEGEND_PX: Final = 64
TOP_LEFT: Final = {"xref": "container", "x": 0, "xanchor": "left", "yref": "container", "y": 1, "yanchor": "top"}
LINE_PX: Final = 18


def template() -> go.layout.Template:
    """The Plotly template that every figure of this package uses."""
    axis = {
        "gridcolor": GRID,
        "linecolor": "#b8c0cc",
        "showline": True,
        "ticks": "outside",
        "tickcolor": "#b8c0cc",
        "ticklen": 4,
        "zeroline": False,
        "automargin": True,
        "title": {"font": {"size": 13, "color": INK}, "standoff": 10},
    }
    layout = go.Layout(
        font={"family": FONT_FAMILY, "size": 13, "color": INK},
        colorway=list(SERIES),
        paper_bgcolor="white",
        plot_bgcolor="white",
        xaxis=axis,
        yaxis=axis,
        title={"font": {"size": 17}, **TOP_LEFT, "pad": {"t": 12}},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "yref": "container", "y": 0.01, "yanchor": "bottom"},
        hoverlabel={"bgcolor": "white", "bordercolor": "#b8c0cc", "font": {"color": INK}, "align": "left"},
        margin={"l": 64, "r": 20},
    )
    return go.layout.Template(layout=layout)


def dressed(figure: go.Figure, title: str, subtitle: str, height_px: int = MIN_HEIGHT_PX) -> go.Figure:
    """Apply the common template, a title and a subtitle (which may have several lines) to a figure;
    both are escaped.

    Without a legend (fewer than two traces that would be in it) the plot uses the legend's space.
    """
    has_legend = sum(trace.showlegend is not False for trace in figure.data) > 1
    lines = plain(subtitle).split("\n")
    panel_titles_px = 20 if figure.layout.annotations else 0
    figure.update_layout(
        template=template(),
        title={"text": plain(title), "subtitle": {"text": "<br>".join(lines), "font": {"size": 13, "color": MUTED}}},
        height=height_px,
        margin={"b": LEGEND_PX if has_legend else NO_LEGEND_PX, "t": 66 + LINE_PX * len(lines) + panel_titles_px},
    )
    return figure


def plain(text: str) -> str:
    """Escape text for a figure: Plotly interprets a subset of HTML, including links."""
    return html.escape(text, quote=False)


def router_name(kind: str) -> str:
    """Display name of a kind of router, not escaped; an unknown kind keeps its own name."""
    return ROUTERS[kind][0] if kind in ROUTERS else kind


def router_symbol(kind: str) -> str:
    """Marker symbol of a kind of router."""
    return ROUTERS[kind][1] if kind in ROUTERS else "hexagon"


def percent(fraction: float, digits: int = 1) -> str:
    """A fraction in percent: 0.9634 -> '96.3 %'; never '-0 %'."""
    text = f"{100 * fraction:.{digits}f}"
    return f"{text if float(text) else text.removeprefix('-')} %"


def signed(points: float, digits: int = 1) -> str:
    """A difference with sign and typographic minus: -0.74 -> '−0.7'; a rounded zero is '±0.0'."""
    text = f"{points:+.{digits}f}"
    return text.replace("-", "−") if float(text) else f"±{0:.{digits}f}"


def significant(value: float) -> str:
    """A number with three significant digits: 0.6 -> '0.600', 565.4 -> '565'; from 1,000 on all
    digits: '1,234'."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def finite(value: float | None) -> float | None:
    """`value` as a float, or None if it is missing, NaN or infinite (a gap in a figure)."""
    if value is None:
        return None
    return float(value) if math.isfinite(value) else None


def cost_colours(num_colours: int) -> list[str]:
    """`num_colours` colours from light (cheap) to dark (wide), evenly spaced on Cividis."""
    if num_colours < 1:
        return []
    positions = [1.0] if num_colours == 1 else [1 - k / (num_colours - 1) for k in range(num_colours)]
    return list(sample_colorscale("Cividis", positions))


def note(figure: go.Figure, text: str) -> None:
    """Write into an empty figure why it is empty."""
    figure.add_annotation(
        text=plain(text), x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False, font={"size": 15, "color": MUTED}
    )
