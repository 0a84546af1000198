"""Accuracy and latency of the static sub-networks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dashboards.widths import LatencySeries, WidthsInfo, ceiling_text, widths_figure
from tests.dashboards.samples import make_widths


def test_accuracies_are_percent_and_latencies_milliseconds_of_the_info() -> None:
    info = make_widths()
    by_name = {t.name: t for t in widths_figure(info).data}
    assert list(by_name["top-1"].y) == pytest.approx([100 * a for a in info.top1])
    assert list(by_name["top-5"].y) == pytest.approx([100 * a for a in info.top5])
    batch = by_name["batch 64 (at most 3.20x)"]
    assert list(batch.y) == list(info.latency[1].median_ms)
    assert batch.y[2] + batch.error_y.array[2] == pytest.approx(info.latency[1].high_ms[2])
    assert batch.y[2] - batch.error_y.arrayminus[2] == pytest.approx(info.latency[1].low_ms[2])


def test_top5_is_left_out_where_it_says_nothing() -> None:
    figure = widths_figure(replace(make_widths(), has_top5=False))
    names = {trace.name for trace in figure.data}
    assert "top-1" in names
    assert "top-5" not in names


def test_the_ceiling_is_widest_over_cheapest_for_every_batch_size() -> None:
    info = make_widths()
    for series in info.latency:
        assert series.ceiling == pytest.approx(series.median_ms[-1] / series.median_ms[0])
    assert ceiling_text(info) == "maximum speed-up (widest / cheapest): 1.47x at batch 1, 3.20x at batch 64"
    assert widths_figure(info).layout.title.subtitle.text.endswith(ceiling_text(info))


def test_many_batch_sizes_are_summed_up_in_the_title_and_listed_in_the_legend() -> None:
    info = make_widths()
    many = replace(info, latency=(*info.latency, replace(info.latency[1], batch_size=256)))
    assert ceiling_text(many).endswith("1.47x to 3.20x for batches of 1 to 256")
    assert "batch 256 (at most 3.20x)" in [t.name for t in widths_figure(many).data]


def test_the_latency_axis_is_logarithmic_and_its_ticks_are_whole_numbers_of_milliseconds() -> None:
    axis = widths_figure(make_widths()).layout.yaxis2
    assert axis.type == "log"
    assert {1.0, 2.0, 5.0, 10.0, 20.0} <= set(axis.tickvals)


def test_missing_latency_is_said() -> None:
    figure = widths_figure(replace(make_widths(), latency=()))
    assert "not measured yet" in [a.text for a in figure.layout.annotations]
    assert figure.layout.title.subtitle.text.endswith("latency not measured yet")


def test_one_subnet_has_a_ceiling_of_one() -> None:
    info = WidthsInfo(
        "val", 5, "cpu", ("only",), (1.0,), (0.1,), (0.9,), (1.0,), (LatencySeries(1, (2.0,), (1.9,), (2.1,)),)
    )
    assert info.latency[0].ceiling == 1.0
    assert len(widths_figure(info).data) == 3


def test_no_subnet_gives_a_figure_that_says_so() -> None:
    figure = widths_figure(WidthsInfo("val", 0, "cpu", (), (), (), (), ()))
    assert "no sub-network has been measured yet" in [a.text for a in figure.layout.annotations]


def test_uneven_or_unsorted_fields_are_refused() -> None:
    with pytest.raises(ValueError, match="one entry per sub-network"):
        replace(make_widths(), top5=(0.5,))
    with pytest.raises(ValueError, match="rising MAdds"):
        replace(make_widths(), madds_m=make_widths().madds_m[::-1])
