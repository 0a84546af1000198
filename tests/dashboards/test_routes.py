"""Route histograms, against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest

from dashboards.routes import class_routes_figure, routes_figure, routes_info
from tests.dashboards.samples import NUM_IMAGES, ROUTES, front_trials, make_routes, make_split


def test_counts_equal_a_count_by_hand() -> None:
    info, val = make_routes(), make_split("val", 1)
    assert info.class_counts is not None
    for row, gate in enumerate(info.gates):
        route = val.routes[int(gate.removeprefix("trial-"))]
        for k in range(len(ROUTES)):
            assert info.counts[row, k] == sum(1 for r in route if r == k)
            for c in range(10):
                by_hand = sum(1 for r, y in zip(route, val.labels, strict=True) if r == k and y == c)
                assert info.class_counts[row, c, k] == by_hand


def test_gates_lie_from_cheap_to_costly() -> None:
    assert list(make_routes().gates) == [f"trial-{t:04d}" for t in front_trials(make_split("val", 1))]


def test_bars_are_one_trace_per_route_and_sum_to_100_percent() -> None:
    info = make_routes()
    figure = routes_figure(info)
    assert [t.name.split(" ")[0] for t in figure.data] == list(ROUTES)
    assert np.sum([t.x for t in figure.data], axis=0) == pytest.approx([100.0] * len(info.gates))


def test_routes_are_drawn_by_cost_and_not_by_index() -> None:
    info = routes_info({"g": np.array([0, 1, 1])}, ["wide", "cheap"], [9.0, 1.0], "val")
    figure = routes_figure(info)
    assert [t.name for t in figure.data] == ["cheap (1 M)", "wide (9 M)"]
    assert figure.data[0].x[0] == pytest.approx(200 / 3)


def test_heat_map_rows_are_shares_within_a_class() -> None:
    info = make_routes()
    assert info.class_counts is not None
    heat = class_routes_figure(info, info.gates[1]).data[0]
    assert np.sum(heat.z, axis=1) == pytest.approx([100.0] * 10)
    assert np.sum(heat.customdata) == NUM_IMAGES


def test_a_class_without_images_is_a_row_of_zeros_and_not_a_nan() -> None:
    info = routes_info({"g": np.array([0, 1])}, ["a", "b"], [1.0, 2.0], "val", np.array([0, 0]), ["seen", "unseen"])
    assert class_routes_figure(info, "g").data[0].z == ([50.0, 50.0], [0.0, 0.0])


def test_an_unknown_gate_and_missing_labels_are_named() -> None:
    with pytest.raises(ValueError, match="unknown gate 'nobody'"):
        class_routes_figure(make_routes(), "nobody")
    bare = routes_info({"g": np.array([0])}, ["a"], [1.0], "val")
    with pytest.raises(ValueError, match="without labels"):
        class_routes_figure(bare, "g")


def test_a_route_out_of_range_and_uneven_gates_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.\.1"):
        routes_info({"g": np.array([0, -1])}, ["a", "b"], [1.0, 2.0], "val")
    with pytest.raises(ValueError, match="same images"):
        routes_info({"g": np.array([0]), "h": np.array([0, 0])}, ["a"], [1.0], "val")


def test_no_gate_gives_a_figure_that_says_so() -> None:
    figure = routes_figure(routes_info({}, ["a", "b"], [1.0, 2.0], "val"))
    assert figure.layout.annotations[0].text == "no router on the front yet"
