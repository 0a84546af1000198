"""The front figure shows exactly the info's data, and its axis ranges fit the compared points."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashboards.front import (
    Curve,
    DynamicPoint,
    FrontInfo,
    FrontPanel,
    Further,
    StaticPoint,
    dynamic_points,
    front_figure,
    front_frame,
    static_points,
)
from dashboards.theme import router_name
from tests.dashboards.samples import FAILED, MADDS_M, NUM_TRIALS, make_front


def trace(figure: go.Figure, name: str, xaxis: str = "x") -> Any:
    found = [t for t in figure.data if t.name == name and (t.xaxis or "x") == xaxis]
    assert len(found) == 1, f"{len(found)} traces named {name!r} on {xaxis}"
    return found[0]


def fronts(figure: go.Figure, xaxis: str = "x") -> list[Any]:
    return [t for t in figure.data if t.name.startswith("front: ") and (t.xaxis or "x") == xaxis]


def test_every_curve_and_point_of_the_info_is_drawn_in_percent_and_millions() -> None:
    info = make_front()
    figure = front_figure(info)
    for panel, axis in zip(info.panels, ("x", "x2"), strict=True):
        static = trace(figure, "static sub-networks", axis)
        assert list(static.x) == pytest.approx(MADDS_M.tolist())
        assert list(static.y) == pytest.approx([100 * p.top1 for p in panel.static])
        for name, curve in (
            ("static line (mix of two)", panel.static_line),
            ("random routing, same histogram", panel.random),
            ("confidence cascade", panel.cascade),
            ("oracle (knows the labels)", panel.oracle),
            ("reachable (sees every route's output)", panel.reachable),
        ):
            drawn = trace(figure, name, axis)
            assert list(drawn.x) == list(curve.madds_m)
            assert list(drawn.y) == pytest.approx([100 * a for a in curve.top1])


def test_front_and_other_trials_partition_the_completed_trials() -> None:
    info = make_front()
    figure = front_figure(info)
    front, others = fronts(figure), trace(figure, "other trials")
    num_front = sum(len(own.x) for own in front)
    assert num_front == len(info.chosen.front)
    assert num_front + len(others.x) == NUM_TRIALS - len(FAILED)


def test_every_kind_of_router_on_the_front_has_its_own_symbol_and_legend_entry() -> None:
    info = make_front()
    found = fronts(front_figure(info))
    kinds = {point.router for point in info.chosen.front}
    assert len(kinds) > 1
    assert len(found) == len({own.marker.symbol for own in found}) == len(kinds)
    assert {own.name for own in found} == {f"front: {router_name(kind)}" for kind in kinds}


def test_error_bars_end_at_the_interval() -> None:
    info = make_front()
    ends = {}
    for own in fronts(front_figure(info)):
        for k, cost in enumerate(own.x):
            ends[cost] = (own.y[k] - own.error_y.arrayminus[k], own.y[k] + own.error_y.array[k])
    for point in info.chosen.front:
        assert point.interval is not None
        assert ends[point.madds_m] == pytest.approx([100 * end for end in point.interval])


def test_reported_panel_shows_where_each_gate_stood_when_it_was_chosen() -> None:
    info = make_front()
    ghosts = trace(front_figure(info), "the front on val", "x2")
    assert list(ghosts.y) == pytest.approx([100 * p.top1 for p in info.chosen.front])
    assert all("test minus val" in text for text in ghosts.text)


def test_titles_name_both_splits_and_their_sizes() -> None:
    figure = front_figure(make_front())
    texts = [figure.layout.title.subtitle.text, *(a.text for a in figure.layout.annotations)]
    assert sum("n = 270" in t for t in texts) == 3
    assert "val" in texts[0]
    assert "test" in texts[0]


def test_an_unverified_front_is_one_panel_that_says_so() -> None:
    figure = front_figure(make_front(is_verified=False))
    assert {t.xaxis or "x" for t in figure.data} == {"x"}
    assert "not verified yet" in figure.layout.title.subtitle.text


def test_hover_text_has_name_cost_latency_and_parameters() -> None:
    front = fronts(front_figure(make_front()))[0]
    for wanted in (
        "trial-",
        front.name.removeprefix("front: "),
        "M MAdds",
        " ms",
        "gate.target = ",
        "gate.sgs.strategy = try_best",
        "95 %:",
    ):
        assert wanted in front.text[0]


def test_names_from_outside_cannot_bring_markup_into_the_figure() -> None:
    info = make_front(is_verified=False)
    point = DynamicPoint("<a href='x'>t</a>", 0.5, 0.9, True, params=(("<b>", "<i>"),))
    panel = replace(info.chosen, split="<s>", dynamic=(point,))
    text = fronts(front_figure(FrontInfo(panel)))[0].text[0]
    assert "<a " not in text
    assert "<i>" not in text
    assert "&lt;s&gt;" in text


def with_further(metric: str = "latency_ms.server") -> FrontInfo:
    """The sample's front with a third objective: 1 ms and 3 ms more for each M MAdds; every fourth
    other trial breaks a constraint."""
    info = make_front()

    def panel(own: FrontPanel) -> FrontPanel:
        dynamic = [
            replace(
                p,
                further=1 + 3 * p.madds_m,
                is_feasible=p.is_front or k % 4 > 0,
                broken=() if p.is_front or k % 4 else ("top1 >= 0.9 & <more>",),
            )
            for k, p in enumerate(own.dynamic)
        ]
        static = [replace(p, further=1 + 3 * p.madds_m) for p in own.static]
        return replace(own, dynamic=tuple(dynamic), static=tuple(static))

    reported = None if info.reported is None else panel(info.reported)
    return FrontInfo(panel(info.chosen), reported, Further(metric), ("top1", "madds_m", metric))


def test_infeasible_trials_are_drawn_apart_with_what_they_break() -> None:
    info = with_further()
    figure = front_figure(info)
    apart = trace(figure, "trials that violate a constraint")
    infeasible = [p for p in info.chosen.dynamic if not p.is_feasible]
    assert list(apart.x) == [p.madds_m for p in infeasible]
    assert "violates top1 &gt;= 0.9 &amp; &lt;more&gt;" in apart.text[0]
    num_front = sum(len(own.x) for own in fronts(figure))
    assert num_front + len(apart.x) + len(trace(figure, "other trials").x) == NUM_TRIALS - len(FAILED)


def test_a_third_objective_colours_the_front_and_a_latency_has_a_row_of_its_own() -> None:
    info = with_further()
    figure = front_figure(info)
    assert figure.layout.coloraxis.colorbar.title.text == "latency_ms.server (ms)"
    for own in fronts(figure, "x"):
        assert list(own.marker.color) == pytest.approx([1 + 3 * cost for cost in own.x])
    below = {own.name: own for own in fronts(figure, "x3")}
    for own in fronts(figure, "x"):
        assert list(below[own.name].x) == list(own.marker.color)
        assert list(below[own.name].y) == list(own.y)
        assert not below[own.name].showlegend
    assert list(trace(figure, "static sub-networks", "x4").x) == pytest.approx([1 + 3 * m for m in MADDS_M])
    assert figure.layout.xaxis3.title.text == "latency_ms.server (ms)"
    assert "the objectives top1, madds_m, latency_ms.server" in figure.layout.title.subtitle.text
    assert "latency_ms.server 1.769" in fronts(figure)[0].text[0]


def test_a_third_objective_that_is_no_latency_has_a_colour_but_no_row() -> None:
    figure = front_figure(with_further("params_m"))
    assert {t.xaxis for t in figure.data} == {"x", "x2"}
    assert figure.layout.coloraxis.colorbar.title.text == "params_m"


def test_a_further_accuracy_is_shown_in_percent_under_the_name_that_tables_use() -> None:
    further = Further("balanced_top1", "maximize")
    info = FrontInfo(*(replaced(panel) for panel in make_front().panels), further, ("balanced_top1", "madds_m"))
    figure = front_figure(info)
    assert figure.layout.coloraxis.colorbar.title.text == "balanced top-1 (%)"
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == pytest.approx((62.5, 62.5))
    texts = [text for t in figure.data for text in (t.text or ())]
    assert any("balanced top-1 62.5 %" in text.replace("\N{NO-BREAK SPACE}", " ") for text in texts)
    assert not any("balanced_top1" in text for text in texts)


def replaced(panel: FrontPanel) -> FrontPanel:
    """The panel with 0.625 as the further objective of every point."""
    return replace(
        panel,
        static=tuple(replace(p, further=0.625) for p in panel.static),
        dynamic=tuple(replace(p, further=0.625) for p in panel.dynamic),
    )


def test_hover_text_tells_stability_ties_and_supernet() -> None:
    info = make_front(is_verified=False)
    ties = tuple(f"trial-{k:04d}" for k in range(6))
    dynamic = tuple(
        replace(p, stability=0.62, ties=ties, supernet="s0-1f") if p.is_front else p for p in info.chosen.dynamic
    )
    text = fronts(front_figure(FrontInfo(replace(info.chosen, dynamic=dynamic))))[0].text[0]
    assert "on the front in 62 % of the resamples" in text
    assert "tied with trial-0000, trial-0001, trial-0002, trial-0003 and 2 more" in text
    assert "supernet s0-1f" in text


def test_a_trial_far_below_and_a_perfect_oracle_do_not_set_the_frame() -> None:
    info = make_front(is_verified=False)
    low = DynamicPoint("collapsed", 0.3, 0.1, False)
    panel = replace(info.chosen, dynamic=(*info.chosen.dynamic, low), cascade=Curve((0.2, 0.3), (0.05, 0.9)))
    frame = front_frame(FrontInfo(panel))
    assert frame.top1_percent[0] > 80
    notes = " ".join(a.text for a in front_figure(FrontInfo(panel)).layout.annotations)
    assert f"1 of {len(panel.dynamic)} trials outside the frame" in notes


fractions = st.floats(0.0, 1.0)
costs = st.floats(0.01, 1000.0)


@pytest.mark.slow
@given(
    st.lists(st.tuples(costs, fractions), min_size=1, max_size=6),
    st.lists(st.tuples(costs, fractions), max_size=4),
    st.lists(st.tuples(costs, fractions), max_size=4),
)
def test_frame_holds_all_that_is_compared_and_controls_stretch_it_by_less_than_its_own_size(
    static: list[tuple[float, float]], front: list[tuple[float, float]], oracle: list[tuple[float, float]]
) -> None:
    panel = FrontPanel(
        split="val",
        num_images=10,
        static=tuple(StaticPoint(f"s{k}", m, a) for k, (m, a) in enumerate(static)),
        static_line=Curve(),
        dynamic=tuple(DynamicPoint(f"t{k}", m, a, True) for k, (m, a) in enumerate(front)),
    )
    bare = front_frame(FrontInfo(panel))
    for madds_m, top1 in static + front:
        assert bare.madds_m[0] <= madds_m <= bare.madds_m[1]
        assert bare.top1_percent[0] <= 100 * top1 <= bare.top1_percent[1]
    curve = Curve(tuple(m for m, _ in oracle), tuple(a for _, a in oracle))
    stretched = front_frame(FrontInfo(replace(panel, oracle=curve)))
    height = bare.top1_percent[1] - bare.top1_percent[0]
    assert stretched.top1_percent[1] - stretched.top1_percent[0] <= 2 * height + 1e-9
    assert stretched.madds_m == bare.madds_m


def test_a_single_subnet_still_has_a_frame_of_positive_size() -> None:
    panel = FrontPanel("val", 10, (StaticPoint("only", 0.5, 0.9),), Curve((0.5,), (0.9,)), ())
    frame = front_frame(FrontInfo(panel))
    assert frame.madds_m[0] < 0.5 < frame.madds_m[1]
    assert frame.top1_percent[0] < 90 < frame.top1_percent[1]
    assert len(front_figure(FrontInfo(panel)).data) == 2


def test_an_empty_panel_says_that_there_is_nothing() -> None:
    figure = front_figure(FrontInfo(FrontPanel("val", 0, (), Curve(), ())))
    assert "no results yet" in [a.text for a in figure.layout.annotations]


def test_curves_refuse_percent_and_uneven_lengths() -> None:
    with pytest.raises(ValueError, match="must be a fraction"):
        Curve((1.0,), (97.0,))
    with pytest.raises(ValueError, match="as many costs as accuracies"):
        Curve((1.0, 2.0), (0.5,))


def test_rows_become_points_of_their_own_kind_and_split() -> None:
    nan = math.nan
    rows: list[dict[str, Any]] = [
        {"kind": "subnet", "name": "subnet-01", "split": "val", "top1": 0.9, "madds_m": 2.0, "latency_ms": 1.5},
        {"kind": "subnet", "name": "subnet-00", "split": "val", "top1": 0.8, "madds_m": 1.0, "latency_ms": nan},
        {"kind": "subnet", "name": "subnet-00", "split": "test", "top1": 0.7, "madds_m": 1.0, "latency_ms": nan},
        {
            "kind": "gate",
            "name": "trial-0001",
            "split": "val",
            "top1": 0.85,
            "madds_m": 1.2,
            "is_front": True,
            "param.gate.target": 0.3,
            "param.gate.routing.first": nan,
        },
        {
            "kind": "gate",
            "name": "trial-0004",
            "split": "val",
            "top1": 0.86,
            "madds_m": 1.4,
            "is_front": False,
            "is_feasible": False,
            "supernet": "s1",
            "latency_ms.server": 0.7,
        },
        {"kind": "gate", "name": "trial-0002", "split": "val", "top1": nan, "madds_m": nan, "is_front": nan},
        {"kind": "gate", "name": "trial-0003", "split": "val", "top1": 0.5, "madds_m": 1.1, "is_front": nan},
    ]
    static = static_points(rows, "val")
    assert [p.name for p in static] == ["subnet-00", "subnet-01"]
    assert [p.latency_ms for p in static] == [None, 1.5]
    dynamic = dynamic_points(rows, "val", {"trial-0001": (0.8, 0.9)}, further="latency_ms.server")
    assert [(p.name, p.is_front, p.interval) for p in dynamic] == [
        ("trial-0003", False, None),
        ("trial-0001", True, (0.8, 0.9)),
        ("trial-0004", False, None),
    ]
    assert [p.is_feasible for p in dynamic] == [True, True, False]
    assert [p.further for p in dynamic] == [None, None, 0.7]
    assert [p.supernet for p in dynamic] == [None, None, "s1"]
    assert dynamic[1].params == (("gate.target", 0.3),)
    assert dynamic[1].router == "gate"


def test_a_trial_that_was_not_given_a_kind_of_router_has_that_of_the_configuration() -> None:
    row = {"kind": "gate", "split": "val", "top1": 0.8, "madds_m": 1.0, "is_front": True}
    rows = [
        {**row, "name": "own", "param.gate.router": "cascade"},
        {**row, "name": "none", "param.gate.router": math.nan},
    ]
    found = {point.name: point.router for point in dynamic_points(rows, "val", {}, router="gates")}
    assert found == {"own": "cascade", "none": "gates"}
