"""The figures and the report of a sweep of supernets show every point under its supernet's name,
and nothing that is not there."""

from __future__ import annotations

import re
from dataclasses import replace

from dashboards.front import DynamicPoint, StaticPoint
from dashboards.supernets import (
    SupernetInfo,
    SupernetsInfo,
    SupernetsReport,
    build_supernets_report,
    reports_figure,
    supernets_figure,
    supernets_table,
)

STATIC = (StaticPoint("narrow", 0.1, 0.7), StaticPoint("wide", 0.4, 0.9))
GATES = (
    DynamicPoint("trial-0000", 0.15, 0.8, is_front=True, interval=(0.75, 0.85)),
    DynamicPoint("trial-0001", 0.3, 0.79, is_front=False),
)
TRAINED = SupernetInfo(
    "s0-aaaaaaaa",
    (("supernet.train.lr", 0.1),),
    "trained",
    reports=((2, 0.3), (4, 0.5)),
    epochs=4,
    static_hypervolume=0.512,
    num_trials=2,
    static=STATIC,
    chosen=GATES,
    reported=GATES[:1],
    link="supernets/s0-aaaaaaaa/report.html",
)
STOPPED = SupernetInfo(
    "s1-bbbbbbbb", (("supernet.train.lr", 0.2),), "stopped", reason="behind <it> is", reports=((2, 0.1),), epochs=4
)


def test_each_supernet_has_a_colour_and_a_symbol_and_only_points_of_the_front_are_filled() -> None:
    other = SupernetInfo("s2-cccccccc", (), "trained", static=STATIC, chosen=GATES)
    figure = supernets_figure(SupernetsInfo((TRAINED, STOPPED, other), 100))
    by_name = {trace.name: trace for trace in figure.data}
    assert set(by_name) == {
        f"{name}: {what}" for name in ("s0 (lr 0.1)", "s2") for what in ("static", "other trials", "on the front")
    }
    assert [
        (x, y)
        for x, y in zip(by_name["s0 (lr 0.1): on the front"].x, by_name["s0 (lr 0.1): on the front"].y, strict=True)
    ] == [(0.15, 80.0)]
    assert list(by_name["s0 (lr 0.1): other trials"].x) == [0.3]
    looks = {
        (by_name[f"{name}: on the front"].marker.color, by_name[f"{name}: on the front"].marker.symbol)
        for name in ("s0 (lr 0.1)", "s2")
    }
    assert len(looks) == 2
    assert all("s0-aaaaaaaa" in text for text in by_name["s0 (lr 0.1): static"].text)


def test_a_legend_names_the_settings_of_a_supernet_where_they_are_short() -> None:
    settings = (("supernet.structure.method", "greedy"), ("supernet.train.lr", 0.05))
    assert replace(TRAINED, settings=settings).label == "s0 (greedy, lr 0.05)"
    many = (*settings, ("supernet.train.epochs", 20), ("supernet.train.batch_size", 64))
    assert replace(TRAINED, settings=many).label == replace(TRAINED, settings=()).label == "s0"


def test_the_sealed_split_has_a_panel_of_its_own_once_something_ran_on_it() -> None:
    assert len(supernets_figure(SupernetsInfo((TRAINED,), 100)).layout.annotations) == 1
    paired = supernets_figure(SupernetsInfo((TRAINED,), 100, 90))
    assert [note.text for note in paired.layout.annotations] == [
        "val (n = 100): the front was chosen here",
        "test (n = 90): as reported",
    ]
    assert [trace.name for trace in paired.data if trace.xaxis == "x2"] == ["s0 (lr 0.1): on the front"]


def test_reports_end_with_a_cross_where_training_was_ended() -> None:
    figure = reports_figure(SupernetsInfo((TRAINED, STOPPED), 100))
    trained, stopped = figure.data
    assert (list(trained.x), list(trained.y)) == ([2, 4], [0.3, 0.5])
    assert "x" not in trained.marker.symbol
    assert stopped.marker.symbol[-1] == "x"
    assert "stopped early" in stopped.name


def test_the_table_says_what_became_of_each_and_whose_the_front_is() -> None:
    table = supernets_table(SupernetsInfo((TRAINED, STOPPED), 100))
    assert '<a href="supernets/s0-aaaaaaaa/report.html">s0-aaaaaaaa</a>' in table
    assert "0.512" in table
    assert "1 (100 %)" in table
    assert "2 of 4" in table
    assert "behind &lt;it&gt; is" in table


def test_the_choice_of_sub_networks_and_the_training_have_a_column_each() -> None:
    spent = replace(TRAINED, choice_madds=2.5e9, training_madds=39.5e9)
    table = supernets_table(SupernetsInfo((spent, replace(spent, choice_madds=0.0), STOPPED), 100))
    head, *rows = (re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("<tr>")[1:])
    places = head.index("Sub-networks (MAdds)"), head.index("Training (MAdds)")
    assert [tuple(row[place] for place in places) for row in rows] == [("2.5 G", "39.5 G"), ("0", "39.5 G"), ("–", "–")]


def test_a_scheduler_is_told_only_where_the_sweep_has_one() -> None:
    report = SupernetsReport("nets", "complete", "now", "digits", "ds_tiny", SupernetsInfo((TRAINED,), 100))
    assert "stops the worse ones" not in build_supernets_report(report)
    assert "the scheduler asha compares" in build_supernets_report(replace(report, scheduler="asha"))


def test_a_report_of_a_sweep_that_has_nothing_yet_is_a_whole_page() -> None:
    waiting = SupernetInfo("s0-aaaaaaaa", (), "waiting")
    text = build_supernets_report(
        SupernetsReport("nets", "running", "now", "digits", "ds_tiny", SupernetsInfo((waiting,), 0))
    )
    assert text.rstrip().endswith("</html>")
    assert "not trained yet" in text
    assert "no supernet has been measured yet" in text


def test_the_contents_lead_to_every_heading_and_numbers_have_the_plain_minus() -> None:
    text = build_supernets_report(
        SupernetsReport(
            "nets",
            "complete",
            "now",
            "digits",
            "ds_tiny",
            SupernetsInfo((TRAINED, STOPPED), 100, 50),
            commands=(("Continue this sweep", "dsnet-orch launch sweep.yaml"),),
            facts=(("seed", "0"),),
        )
    )
    links = re.findall(r'<li><a href="#([^"]+)">', text)
    addresses = re.findall(r'<h2 id="([^"]+)">', text)
    assert links == addresses == ["the-front", "training", "next-steps", "reproducibility"]
    assert "\N{MINUS SIGN}" not in text
    assert "\\u2212" not in text
