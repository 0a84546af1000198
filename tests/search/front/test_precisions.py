"""One router in two precisions: differences by hand, and controls of its own precision."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dsnet.routing.routing_table import RoutingTable
from dsnet.routing.table_run import TableRun, static_run
from search.front.precisions import RunOnTable, StaticTables, line_routes, precision_claims, static_claims
from tests.dsnet.samples import random_table

NUM_IMAGES = 200


def table(rights: list[float], madds: list[int], names: str) -> RoutingTable:
    """A table of routes that are right for the first so many shares of the images."""
    own = random_table(NUM_IMAGES, len(rights))
    correct = np.arange(NUM_IMAGES)[:, None] < NUM_IMAGES * np.array(rights)
    return replace(own, correct1=correct, madds=np.array(madds), routes=tuple(names), trunk_madds=0)


def split_run(own: RoutingTable, first: int, second: int) -> TableRun:
    """Even images take one route, odd ones another."""
    routes = np.where(np.arange(NUM_IMAGES) % 2 == 0, first, second)
    ran = np.zeros((NUM_IMAGES, own.num_routes), dtype=bool)
    ran[np.arange(NUM_IMAGES), routes] = True
    return replace(static_run(own, first), routes=routes, ran=ran, madds=own.madds[routes])


def test_the_line_of_its_own_precision_has_the_further_sub_networks() -> None:
    float32 = table([0.5, 0.7, 0.8], [100, 200, 300], "abc")
    own, further = table([0.4, 0.6], [100, 300], "ac"), table([0.58], [200], "b")
    run, before = RunOnTable(own, split_run(own, 0, 1)), RunOnTable(float32, split_run(float32, 0, 2))
    bundle, everything = StaticTables((own,)), StaticTables((own, further))
    alone, beside = (precision_claims(run, before, static, static) for static in (bundle, everything))
    assert alone["top1"] == beside["top1"] == pytest.approx(0.5)
    assert alone["float32_top1"] == pytest.approx(0.65)
    assert alone["difference"] == pytest.approx(-0.15)
    low, high = alone["difference_interval"]
    assert low < -0.15 < high < 0
    assert alone["same_route_share"] == 1, "by name: the numbers of the routes differ"
    assert alone["gain_over_static"] == pytest.approx(0.0)
    assert beside["gain_over_static"] == pytest.approx(0.5 - 0.58), "at 200 MAdds there is b alone"
    assert alone["random_routing_top1"] == pytest.approx(0.5)
    told = {row["name"]: (row["top1"], row["float32_top1"]) for row in static_claims(everything, float32)}
    assert told == {"a": (0.4, 0.5), "c": (0.6, 0.8), "b": (0.58, 0.7)}
    assert line_routes(float32, ["a", "c"]) == (1,)
    assert line_routes(float32, ["a", "b", "c"]) == ()


def test_below_the_cheapest_sub_network_there_is_no_line() -> None:
    own = table([0.5, 0.7], [100, 200], "ab")
    cheap = RunOnTable(own, replace(static_run(own, 0), madds=np.full(NUM_IMAGES, 50)))
    claims = precision_claims(cheap, cheap, StaticTables((own,)), StaticTables((own,)))
    assert claims["gain_over_static"] is claims["gain_over_static_interval"] is None
    assert claims["difference"] == 0


def test_tables_of_other_images_are_refused() -> None:
    own = table([0.5, 0.7], [100, 200], "ab")
    other = replace(own, image_ids=own.image_ids + 1)
    with pytest.raises(ValueError, match="different images"):
        precision_claims(
            RunOnTable(own, static_run(own, 0)),
            RunOnTable(other, static_run(other, 0)),
            StaticTables((own,)),
            StaticTables((own,)),
        )
