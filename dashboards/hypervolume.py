"""The hypervolume that the search has gained after each trial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import plotly.graph_objects as go

from dashboards.theme import BLUE, INK, VERMILION, count, dressed, finite, note, plain


@dataclass(frozen=True)
class HypervolumeInfo:
    """One entry per trial, in slot order."""

    slots: tuple[int, ...]
    hypervolume: tuple[float, ...]
    """Of all completed trials up to and including this one; top-1 fraction x M MAdds."""
    failures: tuple[tuple[int, str], ...]
    """(slot, reason) of each failed trial."""
    split: str
    num_images: int
    reference: tuple[float, float]
    """Reference point, in the objectives' own units (accuracies as fractions, `*_m` in millions)."""
    static_hypervolume: float | None = None
    """That of the static sub-networks alone, same reference: what the search has to beat."""
    objectives: tuple[str, str] = ("top1", "madds_m")
    """Metric names, in the order of `reference`."""


def hypervolume_info(
    hypervolume: Sequence[float],
    reasons: Sequence[str | None],
    split: str,
    num_images: int,
    reference: tuple[float, float],
    static_hypervolume: float | None = None,
    objectives: tuple[str, str] = ("top1", "madds_m"),
) -> HypervolumeInfo:
    """Info from one row per trial.

    Args:
        hypervolume: running hypervolume after each trial, in slot order; a failed trial repeats its predecessor's.
        reasons: None for a completed trial, else why it failed; as long as `hypervolume`.
        split: the split that the trials were scored on.
        num_images: images of that split.
        reference: in the objectives' own units.
        static_hypervolume: of the static sub-networks alone.
        objectives: metric names, in the order of `reference`.

    Raises:
        ValueError: the two sequences differ in length, or the running hypervolume falls.
    """
    if len(hypervolume) != len(reasons):
        raise ValueError(f"hypervolume has {len(hypervolume)} trials, reasons {len(reasons)}")
    if any(after < before - 1e-9 * abs(before) for before, after in pairwise(hypervolume)):
        raise ValueError("the running hypervolume falls somewhere: it must be that of all trials so far")
    return HypervolumeInfo(
        slots=tuple(range(len(hypervolume))),
        hypervolume=tuple(float(v) for v in hypervolume),
        failures=tuple((slot, reason) for slot, reason in enumerate(reasons) if reason is not None),
        split=split,
        num_images=num_images,
        reference=reference,
        static_hypervolume=finite(static_hypervolume),
        objectives=objectives,
    )


def hypervolume_figure(info: HypervolumeInfo) -> go.Figure:
    """A rising step line, with failed trials marked and the static sub-networks' hypervolume as a rule."""
    figure = go.Figure()
    if info.slots:
        figure.add_trace(_line(info))
    else:
        note(figure, "no trial has finished yet")
    if info.static_hypervolume is not None and info.slots:
        figure.add_trace(_static(info, info.static_hypervolume))
    if info.failures:
        figure.add_trace(_failures(info))
    figure.update_xaxes(title_text="trial")
    figure.update_yaxes(title_text=f"hypervolume ({' × '.join(map(plain, info.objectives))})")
    return dressed(figure, "Hypervolume over trials", _subtitle(info))


def _subtitle(info: HypervolumeInfo) -> str:
    reference = ", ".join(
        f"{plain(name)} {value:.4g}" for name, value in zip(info.objectives, info.reference, strict=True)
    )
    trials = count(len(info.slots), "trial")
    return f"{info.split} (n = {info.num_images:,}); {trials}, {len(info.failures)} failed; reference {reference}"


def _line(info: HypervolumeInfo) -> go.Scatter:
    return go.Scatter(
        x=list(info.slots),
        y=list(info.hypervolume),
        name="dynamic, best so far",
        mode="lines",
        line={"color": BLUE, "width": 2.5, "shape": "hv"},
        hovertemplate="after trial %{x}: %{y:.5g}<extra></extra>",
    )


def _static(info: HypervolumeInfo, value: float) -> go.Scatter:
    return go.Scatter(
        x=[info.slots[0], info.slots[-1]],
        y=[value, value],
        name="static sub-networks alone",
        mode="lines",
        line={"color": INK, "width": 1.5, "dash": "dash"},
        hovertemplate="static sub-networks: %{y:.5g}<extra></extra>",
    )


def _failures(info: HypervolumeInfo) -> go.Scatter:
    height = dict(zip(info.slots, info.hypervolume, strict=True))
    return go.Scatter(
        x=[slot for slot, _ in info.failures],
        y=[height[slot] for slot, _ in info.failures],
        name="failed trial",
        mode="markers",
        marker={"color": VERMILION, "symbol": "x", "size": 10},
        text=[f"<b>trial {slot} failed</b><br>{plain(reason[:160])}" for slot, reason in info.failures],
        hoverinfo="text",
    )
