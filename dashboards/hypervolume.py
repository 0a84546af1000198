"""Figure of the hypervolume after each trial of a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go

from dashboards.theme import BLUE, INK, MUTED, SKY, VERMILION, dressed, note, plain
from dashboards.thinning import MAX_POINTS, thinned
from dsnet.wording import plural


@dataclass(frozen=True)
class HypervolumeInfo:
    """Hypervolume after each finished trial, in slot order."""

    slots: tuple[int, ...]
    hypervolume: tuple[float, ...]
    """Entry k: hypervolume that the static sub-networks and the feasible trials among the first k +
    1 dominate together, in the product of the objectives' units."""
    failures: tuple[tuple[int, str], ...]
    """(slot, reason) of each failed trial."""
    split: str
    num_images: int
    reference: tuple[float, ...]
    """Reference point, in the objectives' own units (accuracies as fractions, `*_m` in
    millions)."""
    static_hypervolume: float | None = None
    """Hypervolume of the feasible static sub-networks alone, for the same reference point: the
    start of the curve."""
    objectives: tuple[str, ...] = ("top1", "madds_m")
    """2 or 3 metric names, in the order of `reference`."""
    pruned: tuple[tuple[int, str], ...] = ()
    """(slot, reason) of each trial that was ended early."""
    num_infeasible: int = 0
    """Completed trials that violate a constraint and therefore add nothing."""
    plateau: int | None = None
    """Number of last trials over which the stop rule found no growth; None if it did not stop the
    sweep."""

    def __post_init__(self) -> None:
        if len(self.slots) != len(self.hypervolume):
            raise ValueError(f"hypervolume has {len(self.hypervolume)} trials, slots {len(self.slots)}")
        if len(self.objectives) != len(self.reference):
            raise ValueError(
                f"the reference point has {len(self.reference)} values, but there are {len(self.objectives)} objectives"
            )
        if any(after < before - 1e-9 * abs(before) for before, after in pairwise(self.hypervolume)):
            raise ValueError("the hypervolume must never decrease: each entry is that of all trials so far")


def hypervolume_figure(info: HypervolumeInfo) -> go.Figure:
    """Step line of the hypervolume, with failed and pruned trials and the static level marked."""
    figure = go.Figure()
    if info.slots:
        figure.add_trace(_line(info))
    else:
        note(figure, "no trial has finished yet")
    if info.static_hypervolume is not None and info.slots:
        figure.add_trace(_static(info, info.static_hypervolume))
    if info.pruned:
        figure.add_trace(_marks(info, info.pruned, "pruned", {"color": MUTED, "symbol": "triangle-down", "size": 7}))
    if info.failures:
        figure.add_trace(_marks(info, info.failures, "failed", {"color": VERMILION, "symbol": "x", "size": 10}))
    if info.plateau and info.slots:
        _mark_plateau(figure, info, info.plateau)
    figure.update_xaxes(title_text="trial")
    figure.update_yaxes(title_text=f"hypervolume<br>({' × '.join(map(plain, info.objectives))})")
    return dressed(figure, "Hypervolume over trials", _subtitle(info))


def _subtitle(info: HypervolumeInfo) -> str:
    reference = ", ".join(f"{name} {value:.4g}" for name, value in zip(info.objectives, info.reference, strict=True))
    trials = f"{plural(len(info.slots), 'trial')}, {len(info.failures):,} failed"
    if info.pruned:
        trials += f", {len(info.pruned):,} pruned"
    if info.num_infeasible:
        trials += f", {info.num_infeasible:,} violate a constraint and do not count"
    return f"{info.split} (n = {info.num_images:,}); {trials}; reference {reference}"


def _mark_plateau(figure: go.Figure, info: HypervolumeInfo, num_trials: int) -> None:
    start = info.slots[max(0, len(info.slots) - num_trials)]
    figure.add_vrect(
        x0=start,
        x1=info.slots[-1],
        fillcolor=SKY,
        opacity=0.15,
        line_width=0,
        annotation_text="plateau: the sweep stopped here",
        annotation_position="bottom left",
        annotation_font={"size": 12, "color": MUTED},
    )


def _line(info: HypervolumeInfo) -> go.Scatter:
    values = info.hypervolume
    last = len(values) - 1
    # Of very many trials, those that begin a step; the others lie on the line.
    is_long = len(values) > MAX_POINTS
    steps = [k for k, value in enumerate(values) if not is_long or k in (0, last) or value != values[k - 1]]
    return go.Scatter(
        x=[info.slots[k] for k in steps],
        y=[values[k] for k in steps],
        name="static sub-networks and routers",
        mode="lines",
        line={"color": BLUE, "width": 2.5, "shape": "hv"},
        hovertemplate="after trial %{x}: %{y:.5g}<extra></extra>",
    )


def _static(info: HypervolumeInfo, value: float) -> go.Scatter:
    return go.Scatter(
        x=[info.slots[0], info.slots[-1]],
        y=[value, value],
        name="static sub-networks",
        mode="lines",
        line={"color": INK, "width": 1.5, "dash": "dash"},
        hovertemplate="static sub-networks: %{y:.5g}<extra></extra>",
    )


def _marks(
    info: HypervolumeInfo, trials: Sequence[tuple[int, str]], what: str, marker: Mapping[str, Any]
) -> go.Scatter:
    height = dict(zip(info.slots, info.hypervolume, strict=True))
    drawn = [trials[position] for position in thinned([(slot, height[slot]) for slot, _ in trials])]
    return go.Scatter(
        x=[slot for slot, _ in drawn],
        y=[height[slot] for slot, _ in drawn],
        name=f"{what} trial" + ("" if len(drawn) == len(trials) else f" ({len(drawn):,} of {len(trials):,})"),
        mode="markers",
        marker=marker,
        text=[f"<b>trial {slot} {what}</b><br>{plain(reason[:160])}" for slot, reason in drawn],
        hoverinfo="text",
    )
