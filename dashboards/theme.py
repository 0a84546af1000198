"""The common style of all figures: a colour-blind safe palette, one font stack, one Plotly
template, and escaping of text.

No meaning depends on colour alone: every role also has its own marker symbol or dash.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from typing import Any, Final

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from dsnet.metrics import is_share
from dsnet.routers.kinds import router_kinds

# Okabe and Ito's palette, readable with every common form of colour blindness.
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

# Only fonts that a system already has: the report may load nothing.
FONT_FAMILY: Final = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
MIN_HEIGHT_PX: Final = 460
LEGEND_PX: Final = 112
NO_LEGEND_PX: Final = 64
TOP_LEFT: Final = {"xref": "container", "x": 0, "xanchor": "left", "yref": "container", "y": 1, "yanchor": "top"}
LINE_PX: Final = 18
SIGN_KINDS: Final = {1: "good", 0: "", -1: "bad"}
"""Sign of a significant difference -> style class of its number."""


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
    """Give `figure` the shared template, a title and the lines of `subtitle` below it; both are
    escaped here.

    In a figure without a legend (one trace, or no trace with a legend entry) the plot also takes
    the space of the legend.
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
    """Text from outside for use in a figure: Plotly reads a subset of HTML, links included, so it
    is escaped."""
    return html.escape(text, quote=False)


def router_name(kind: str) -> str:
    """A kind of router in words; an unknown kind keeps its own name, not escaped."""
    known = router_kinds().get(kind)
    return kind if known is None else known.label


def router_symbol(kind: str) -> str:
    """Its marker."""
    known = router_kinds().get(kind)
    return "hexagon" if known is None else known.symbol


def colour_bar(title: str) -> dict[str, Any]:
    """The colour bar of a heat map; above it its title would touch the uppermost label."""
    return {
        "title": {"text": title, "font": {"size": 12}, "side": "right"},
        "thickness": 12,
        "outlinewidth": 0,
    }


def percent(fraction: float, digits: int = 1) -> str:
    """A fraction as displayed: 0.9634 -> '96.3 %'; never '-0 %'."""
    text = f"{100 * fraction:.{digits}f}"
    return f"{text if float(text) else text.removeprefix('-')} %"


def metric_value(name: str, value: float, number: Callable[[float], str] = "{:.4g}".format) -> str:
    """A metric's value as displayed: a share in percent, otherwise by `number`."""
    return percent(value) if is_share(name) else number(value)


def significant(value: float) -> str:
    """Three significant digits, no exponent at ordinary sizes: 0.6 -> '0.600', 565.4 -> '565', 1234
    -> '1,234'."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def finite(value: float | None) -> float | None:
    """`value` as a float, or None where it is missing, NaN or infinite: a gap in a figure, never a
    number."""
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
