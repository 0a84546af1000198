"""Gains of the kinds of router: figure and table show exactly the info's numbers."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import plotly.graph_objects as go
import pytest

from dashboards.routers import RouterResult, RoutersInfo, routers_figure, routers_table
from dashboards.theme import router_name, router_symbol
from tests.dashboards.samples import KINDS, make_routers
from tests.dsnet.samples import ROUTER_KINDS

RESULT = RouterResult("gate", 0.25, "trial-0007", 2.5, 0.93, 0.92, 0.95, 0.99, (0.01, 0.004, 0.016), 1 / 3, 1 / 7)


def drawn(figure: go.Figure, name: str) -> Any:
    (found,) = [trace for trace in figure.data if trace.name == name]
    return found


def test_every_kind_of_router_has_a_name_and_a_symbol_of_its_own() -> None:
    assert len({router_name(kind) for kind in ROUTER_KINDS}) == len(ROUTER_KINDS)
    assert len({router_symbol(kind) for kind in ROUTER_KINDS}) == len(ROUTER_KINDS)


def test_gains_and_their_intervals_are_drawn_in_points() -> None:
    info = make_routers()
    figure = routers_figure(info)
    for kind in KINDS:
        own = [result for result in info.results if result.router == kind]
        trace = drawn(figure, router_name(kind))
        gains = [result.gain for result in own if result.gain is not None]
        assert list(trace.y) == pytest.approx([100 * value for value, _, _ in gains])
        assert [y + up for y, up in zip(trace.y, trace.error_y.array, strict=True)] == pytest.approx(
            [100 * high for _, _, high in gains]
        )


def test_what_was_to_be_gained_is_drawn_beside_each_router() -> None:
    figure = routers_figure(RoutersInfo("test", 100, (RESULT,)))
    assert drawn(figure, "reachable at the same cost").y == pytest.approx([3.0])
    assert drawn(figure, "oracle at the same cost").y == pytest.approx([7.0])


def test_the_table_has_a_row_for_each_budget_and_kind_with_its_numbers() -> None:
    text = routers_table(make_routers())
    assert text.count("<tr>") == 1 + len(KINDS) * 3
    row = routers_table(RoutersInfo("test", 100, (RESULT,)))
    for wanted in ("25 %", "trial-0007", "2.50", "93.0", "+1.0", "+0.4 to +1.6", "33 %", "14 %", "92.0 / 95.0 / 99.0"):
        assert wanted in row
    assert 'class="good"' in row


def test_a_router_below_the_static_line_has_a_negative_share_and_is_marked() -> None:
    result = replace(RESULT, gain=(-0.01, -0.02, -0.001), reachable_share=-0.4, oracle_share=None, is_collapsed=True)
    row = routers_table(RoutersInfo("test", 100, (result,)))
    assert 'class="bad"' in row
    assert "-40 %" in row
    assert "collapsed" in row


def test_a_share_is_left_out_where_its_gap_is_within_noise_or_unknown() -> None:
    result = replace(RESULT, oracle_share=None, reachable_share=None, reachable_top1=None)
    row = routers_table(RoutersInfo("test", 100, (result,)))
    assert row.count('<td class="number">within noise</td>') == 1  # of the oracle's gap
    assert '<td class="number">\N{EN DASH}</td>' in row


def test_an_interval_that_reads_as_touching_zero_is_not_marked() -> None:
    row = routers_table(RoutersInfo("test", 100, (replace(RESULT, gain=(0.01, 0.0004, 0.02)),)))
    assert "0.0 to +2.0" in row
    assert 'class="good"' not in row


def test_without_a_static_line_nothing_is_claimed() -> None:
    result = replace(
        RESULT,
        gain=None,
        static_top1=None,
        reachable_top1=None,
        oracle_top1=None,
        reachable_share=None,
        oracle_share=None,
    )
    info = RoutersInfo("test", 100, (result,))
    assert drawn(routers_figure(info), "gate").y == ()
    assert re.search(r"[+-]\d+\.\d", routers_table(info)) is None


def test_names_from_outside_are_escaped() -> None:
    info = RoutersInfo("<s>", 100, (replace(RESULT, name="<b>x</b>", router="<i>"),))
    assert "<b>x" not in routers_table(info)
    assert "<i>" not in routers_table(info) + str(routers_figure(info).to_json())


def test_no_result_gives_a_figure_that_says_so() -> None:
    figure = routers_figure(RoutersInfo("test", 0, ()))
    assert "no router has a trial within a budget yet" in [note.text for note in figure.layout.annotations]
