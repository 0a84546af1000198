"""Figure of the supernet's loss curves, one per width."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import plotly.graph_objects as go

from dashboards.theme import DASHES, SERIES, dressed, finite, note, plain

LOSS_PREFIX: Final = "loss/"
MAX_POINTS: Final = 400
"""Maximum number of points per curve; longer curves are averaged over equal chunks, to keep the
report small."""


@dataclass(frozen=True)
class LossCurve:
    """Loss of one width; non-finite values are left out and counted."""

    width: str
    epochs: tuple[float, ...]
    losses: tuple[float, ...]
    num_not_finite: int = 0


@dataclass(frozen=True)
class TrainingInfo:
    """The supernet's loss curves, in order of first appearance."""

    curves: tuple[LossCurve, ...]
    num_steps: int


def training_info(rows: Iterable[Mapping[str, Any]]) -> TrainingInfo:
    """Build the info from the rows of curves.jsonl.

    Args:
        rows: {"step": int, "epoch": float, "metrics": {"loss/<width>": float, ...}}; other metrics
            are ignored. If a step occurs twice, because a worker was restarted, the last row
            counts.
    """
    by_step = {int(row["step"]): row for row in rows}
    ordered = [by_step[step] for step in sorted(by_step)]
    names = dict.fromkeys(k for row in ordered for k in row["metrics"] if k.startswith(LOSS_PREFIX))
    return TrainingInfo(curves=tuple(_curve(name, ordered) for name in names), num_steps=max(by_step, default=0))


def _curve(name: str, rows: Sequence[Mapping[str, Any]]) -> LossCurve:
    present = [(float(row["epoch"]), finite(row["metrics"][name])) for row in rows if name in row["metrics"]]
    points = np.array([(epoch, loss) for epoch, loss in present if loss is not None], dtype=float).reshape(-1, 2)
    if len(points) > MAX_POINTS:
        points = np.array([chunk.mean(axis=0) for chunk in np.array_split(points, MAX_POINTS)])
    return LossCurve(
        width=name.removeprefix(LOSS_PREFIX),
        epochs=tuple(points[:, 0].tolist()),
        losses=tuple(points[:, 1].tolist()),
        num_not_finite=sum(loss is None for _, loss in present),
    )


def training_figure(info: TrainingInfo) -> go.Figure:
    """Figure of loss against epoch, one line per width."""
    figure = go.Figure()
    for index, curve in enumerate(info.curves):
        figure.add_trace(
            go.Scatter(
                x=list(curve.epochs),
                y=list(curve.losses),
                name=plain(curve.width),
                mode="lines",
                line={"color": SERIES[index % len(SERIES)], "dash": DASHES[index % len(DASHES)], "width": 1.8},
                hovertemplate="epoch %{x:.2f}: %{y:.4g}",
            )
        )
    if not info.curves:
        note(figure, "no training curve has been recorded")
    figure.update_xaxes(title_text="epoch")
    figure.update_yaxes(title_text="training loss", rangemode="tozero")
    return dressed(figure, "Supernet training", _subtitle(info))


def _subtitle(info: TrainingInfo) -> str:
    broken = sum(curve.num_not_finite for curve in info.curves)
    text = (
        f"{info.num_steps:,} steps\nsub-networks with a teacher have other targets, so compare the shapes of the "
        "curves, not their levels"
    )
    return f"{text}; {broken} losses were not finite" if broken else text
