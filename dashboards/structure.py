"""Figures of the choice of sub-networks: the channels that each sub-network has, and the search."""

from __future__ import annotations

from dataclasses import dataclass

import plotly.graph_objects as go

from dashboards.theme import MUTED, VERMILION, colour_bar, dressed, percent, plain


@dataclass(frozen=True)
class Scored:
    """A candidate that was scored on the hold-out."""

    madds_m: float
    top1: float
    """Accuracy as a fraction."""


@dataclass(frozen=True)
class StructureInfo:
    """The sub-networks of a supernet by rising MAdds, and how they were found."""

    method: str
    subnets: tuple[str, ...]
    madds_m: tuple[float, ...]
    groups: tuple[str, ...]
    """Names of the channel groups."""
    widths: tuple[tuple[int, ...], ...]
    """[sub-networks][groups] channels."""
    max_widths: tuple[int, ...]
    """[groups] all channels."""
    units: tuple[str, ...] = ()
    """[groups] what a width counts, in the plural; empty: channels everywhere."""
    candidates: tuple[Scored, ...] = ()
    chosen: tuple[Scored, ...] = ()
    """The candidates that became a sub-network, with their last scores."""
    chosen_before: tuple[Scored, ...] = ()
    """Their earlier scores, by the network before it was fine-tuned during the search."""
    num_images: int = 0
    """Images of the hold-out."""

    def __post_init__(self) -> None:
        if len(self.subnets) != len(self.madds_m) or len(self.subnets) != len(self.widths):
            raise ValueError("every field needs one entry per sub-network")
        if any(len(row) != len(self.groups) for row in (*self.widths, self.max_widths)):
            raise ValueError("every sub-network needs one width per channel group")
        if self.units and len(self.units) != len(self.groups):
            raise ValueError("every channel group needs one unit")

    def unit(self, group: int) -> str:
        """What the width of a group counts."""
        return self.units[group] if self.units else "channels"


def channels_figure(info: StructureInfo) -> go.Figure:
    """Heat map of the share (%) that each sub-network has of every channel group, be it channels,
    heads, blocks or the size of a kernel."""
    shares = [[100 * width / whole for width, whole in zip(row, info.max_widths, strict=True)] for row in info.widths]
    hover = [
        [
            f"<b>{plain(name)}</b> ({madds:.4g} M MAdds)<br>{plain(group)}: {width} of {whole} {info.unit(number)}"
            for number, (group, width, whole) in enumerate(zip(info.groups, row, info.max_widths, strict=True))
        ]
        for name, madds, row in zip(info.subnets, info.madds_m, info.widths, strict=True)
    ]
    labels = [f"{plain(name)} ({madds:.3g} M)" for name, madds in zip(info.subnets, info.madds_m, strict=True)]
    what = "channels" if {info.unit(number) for number in range(len(info.groups))} == {"channels"} else "widths"
    figure = go.Figure(
        go.Heatmap(
            z=shares,
            x=[f"{number}" for number in range(1, len(info.groups) + 1)],
            y=labels,
            zmin=0,
            zmax=100,
            colorscale="Blues",
            colorbar=colour_bar(f"{what} (%)"),
            text=hover,
            hoverinfo="text",
            xgap=1,
            ygap=2,
        )
    )
    figure.update_xaxes(title_text="channel group, from the image to the classes", type="category")
    figure.update_yaxes(type="category")
    height = 220 + 34 * len(info.subnets)
    return dressed(figure, f"{what.capitalize()} of each sub-network", f"method {info.method}", height_px=height)


def search_figure(info: StructureInfo) -> go.Figure:
    """Accuracy on the hold-out (%) of every candidate against its MAdds (M)."""

    def trace(points: tuple[Scored, ...], name: str, colour: str, size: int, symbol: str = "circle") -> go.Scatter:
        return go.Scatter(
            x=[point.madds_m for point in points],
            y=[100 * point.top1 for point in points],
            name=name,
            mode="markers",
            marker={"color": colour, "size": size, "symbol": symbol, "line": {"width": 1.5, "color": colour}},
            text=[f"{name}<br>{percent(point.top1)}<br>{point.madds_m:.4g} M MAdds" for point in points],
            hoverinfo="text",
        )

    both = bool(info.chosen_before)
    figure = go.Figure(
        [
            trace(info.candidates, "candidate", MUTED, 5),
            *([trace(info.chosen_before, "chosen, before fine-tuning", VERMILION, 9, "circle-open")] if both else []),
            trace(info.chosen, "chosen, after fine-tuning" if both else "chosen", VERMILION, 9),
        ]
    )
    figure.update_xaxes(title_text="MAdds per image (M)", rangemode="tozero")
    figure.update_yaxes(title_text="accuracy on the hold-out (%)")
    subtitle = f"{len(info.candidates):,} candidates on {info.num_images:,} images; statistics of the batch"
    return dressed(figure, "Search for sub-networks", subtitle, height_px=460)
