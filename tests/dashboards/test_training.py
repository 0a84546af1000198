"""Loss curves from the rows of curves.jsonl."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from dashboards.training import MAX_POINTS, training_figure, training_info


def row(step: int, **metrics: float) -> dict[str, Any]:
    return {"step": step, "epoch": step / 10, "time_ms": 0, "metrics": {f"loss/{k}": v for k, v in metrics.items()}}


def test_one_line_per_width_with_the_rows_values() -> None:
    info = training_info([row(0, largest=2.0, smallest=3.0), row(1, largest=1.0, smallest=2.5)])
    figure = training_figure(info)
    assert [(t.name, list(t.x), list(t.y)) for t in figure.data] == [
        ("largest", [0.0, 0.1], [2.0, 1.0]),
        ("smallest", [0.0, 0.1], [3.0, 2.5]),
    ]


def test_metrics_that_are_no_loss_are_not_drawn() -> None:
    info = training_info([{"step": 0, "epoch": 0.0, "metrics": {"lr": 0.1, "loss/largest": 1.0}}])
    assert [c.width for c in info.curves] == ["largest"]


def test_a_step_repeated_after_a_restart_counts_as_it_came_last() -> None:
    info = training_info([row(0, a=2.0), row(1, a=9.0), row(1, a=1.0)])
    assert info.curves[0].losses == (2.0, 1.0)
    assert info.num_steps == 1


def test_losses_that_are_not_finite_are_gaps_and_are_counted() -> None:
    info = training_info([row(0, a=2.0), row(1, a=math.nan), row(2, a=math.inf), row(3, a=1.0)])
    assert info.curves[0].losses == (2.0, 1.0)
    assert info.curves[0].num_not_finite == 2
    assert "2 losses were not finite" in training_figure(info).layout.title.subtitle.text


def test_a_long_curve_is_averaged_and_keeps_its_mean() -> None:
    losses = np.random.default_rng(0).uniform(0, 3, 10 * MAX_POINTS)
    info = training_info([row(step, a=float(v)) for step, v in enumerate(losses)])
    assert len(info.curves[0].losses) == MAX_POINTS
    assert np.mean(info.curves[0].losses) == pytest.approx(losses.mean())


def test_no_rows_give_a_figure_that_says_so() -> None:
    figure = training_figure(training_info([]))
    assert figure.layout.annotations[0].text == "no training curve has been recorded"
