"""Training regimes side by side."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dashboards.regimes import RegimeDifferences, RegimeSeries, RegimesInfo, regimes_figure


def make_regimes() -> RegimesInfo:
    ce = RegimeSeries("ce", 3, (0.50, 0.60, 0.65), (0.02, 0.01, 0.03))
    ib = RegimeSeries("ib", 3, (0.52, 0.61, 0.64), (0.01, 0.02, 0.02))
    gn = RegimeSeries("<gn>", 1, (0.4, 0.5, 0.6), None)
    against_ce = RegimeDifferences("ce", (replace(ib, means=(0.02, 0.01, -0.01), halves=(0.005, 0.02, 0.004)),))
    widths = ("subnet-00", "subnet-01", "largest")
    return RegimesInfo("test", 10_000, "made up", 0.95, widths, (1.0, 2.0, 4.0), (ce, ib, gn), (against_ce,))


def test_means_and_bars_are_percent_and_points_of_the_info() -> None:
    info = make_regimes()
    top, below = [[t for t in regimes_figure(info).data if t.yaxis == axis] for axis in ("y", "y2")]
    assert [t.name for t in top] == ["ce", "ib", "&lt;gn&gt;"]
    assert list(top[1].y) == pytest.approx([52.0, 61.0, 64.0])
    assert list(top[1].error_y.array) == pytest.approx([1.0, 2.0, 2.0])
    assert [t.name for t in below] == ["ib"]
    assert list(below[0].y) == pytest.approx([2.0, 1.0, -1.0])
    assert [(shape.y0, shape.y1, shape.yref) for shape in regimes_figure(info).layout.shapes] == [(0, 0, "y2")]
    assert "-1.0 points ± 0.4, 3 seeds" in below[0].text[2]


def test_a_regime_looks_the_same_and_stands_at_the_same_place_in_every_panel() -> None:
    traces = [t for t in regimes_figure(make_regimes()).data if t.name == "ib"]
    assert len(traces) == 2
    assert traces[0].marker.to_plotly_json() == traces[1].marker.to_plotly_json()
    assert list(traces[0].x) == list(traces[1].x)
    assert [t.showlegend for t in traces] == [True, False]


def test_regimes_of_one_width_stand_side_by_side_and_nearer_to_it_than_to_the_next() -> None:
    top = [t for t in regimes_figure(make_regimes()).data if t.yaxis == "y"]
    for width in range(3):
        places = [t.x[width] for t in top]
        assert places == sorted(set(places))
        assert all(abs(place - width) < 0.5 for place in places)


def test_more_regimes_than_colours_still_differ() -> None:
    info = make_regimes()
    many = tuple(replace(info.accuracy[0], regime=f"regime {k}") for k in range(12))
    looks = {
        (t.marker.color, t.marker.symbol) for t in regimes_figure(replace(info, accuracy=many, differences=())).data
    }
    assert len(looks) == 12


def test_the_subtitle_says_what_the_bars_are() -> None:
    info = make_regimes()
    text = regimes_figure(info).layout.title.subtitle.text
    assert text == "made up<br>bars: 95 % t-intervals over 1 to 3 seeds, on the same test images"
    one = replace(info, accuracy=info.accuracy[2:], differences=())
    assert "one seed: no intervals" in regimes_figure(one).layout.title.subtitle.text


def test_one_seed_has_no_bars() -> None:
    alone = next(t for t in regimes_figure(make_regimes()).data if t.name == "&lt;gn&gt;")
    assert alone.error_y.array is None
    assert alone.text[0].endswith("40.0 % (one seed)")


def test_no_run_gives_a_figure_that_says_so() -> None:
    figure = regimes_figure(RegimesInfo("test", 0, "made up", 0.95, (), (), ()))
    assert "no run finished yet" in [a.text for a in figure.layout.annotations]


def test_uneven_unsorted_or_doubled_entries_are_refused() -> None:
    info = make_regimes()
    with pytest.raises(ValueError, match="one entry per width"):
        replace(info, subnets=("a", "b"))
    with pytest.raises(ValueError, match="rising MAdds"):
        replace(info, madds_m=info.madds_m[::-1])
    with pytest.raises(ValueError, match="one entry in accuracy"):
        replace(info, accuracy=info.accuracy[:1])
    with pytest.raises(ValueError, match="one entry in accuracy"):
        replace(info, accuracy=(*info.accuracy, info.accuracy[0]))
