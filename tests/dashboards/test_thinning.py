"""Thinning of clouds: bounded, repeatable, and nothing by itself is lost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dashboards.front import DynamicPoint, front_figure
from dashboards.hypervolume import HypervolumeInfo, hypervolume_figure
from dashboards.thinning import CELLS, MAX_POINTS, thinned
from tests.dashboards.samples import make_front


def cloud(number: int, seed: int = 0) -> list[tuple[float, float]]:
    rng = np.random.default_rng(seed)
    return [(float(x), float(y)) for x, y in rng.normal(scale=0.1, size=(number, 2))]


def test_a_small_cloud_is_whole() -> None:
    assert thinned(cloud(MAX_POINTS)) == list(range(MAX_POINTS))
    assert thinned([]) == []


@pytest.mark.parametrize("number", [MAX_POINTS + 1, 20_000])
def test_a_large_cloud_is_cut_to_the_limit_in_order_and_each_time_alike(number: int) -> None:
    places = cloud(number)
    kept = thinned(places)
    assert len(kept) == MAX_POINTS
    assert kept == sorted(set(kept))
    assert thinned(list(places)) == kept


def test_points_by_themselves_are_kept_however_many_lie_elsewhere() -> None:
    alone = [(0.4, 0.4), (-0.4, 0.4), (0.4, -0.4)]
    places = [*cloud(10_000), *alone]
    kept = {places[position] for position in thinned(places)}
    assert set(alone) <= kept


def test_every_occupied_part_of_the_plane_has_a_point() -> None:
    side = np.linspace(0.0, 1.0, CELLS)
    grid = [(float(x), float(y)) for x in side for y in side]
    places = [*grid, *[(0.5, 0.5)] * 10_000]
    kept = [places[position] for position in thinned(places)]
    missing = [place for place in grid if min(abs(place[0] - x) + abs(place[1] - y) for x, y in kept) > 4 / CELLS]
    assert missing == []


@pytest.mark.parametrize("places", [[(1.0, 0.0)] * 2000, [(float(x), 0.5) for x in range(2000)]])
def test_clouds_without_width_or_height_are_cut_too(places: list[tuple[float, float]]) -> None:
    assert len(thinned(places)) == MAX_POINTS


def test_the_figure_of_ten_thousand_trials_is_small_and_says_what_it_leaves_out() -> None:
    front = DynamicPoint("trial-0000", 1.0, 0.9, is_front=True)
    others = tuple(
        DynamicPoint(f"trial-{slot:04d}", 2.0 + x, 0.6 + y / 2, is_front=False, is_feasible=slot % 3 > 0)
        for slot, (x, y) in enumerate(cloud(10_000), start=1)
    )
    small = make_front(is_verified=False)
    info = replace(small, chosen=replace(small.chosen, dynamic=(front, *others)))
    drawn = {trace.name: len(trace.x) for trace in front_figure(info).data}
    assert drawn["other trials"] == MAX_POINTS
    assert drawn["trials that violate a constraint"] == MAX_POINTS
    left_out = 10_000 - 2 * MAX_POINTS
    assert f"{left_out:,} of 10,001 trials are not drawn" in str(front_figure(info).layout.title.subtitle.text)
    assert len(front_figure(info).to_json()) < 2_500_000


def test_a_long_line_of_the_hypervolume_has_its_steps_only() -> None:
    values = np.maximum.accumulate(np.random.default_rng(0).integers(0, 50, size=10_000)).astype(float)
    info = HypervolumeInfo(tuple(range(10_000)), tuple(values), (), "val", 100, (0.0, 1.0))
    line = hypervolume_figure(info).data[0]
    assert len(line.x) <= 52
    for slot in (0, 1, 17, 4_000, 9_999):  # the value at a trial is that of the last step before it
        assert line.y[np.searchsorted(line.x, slot, side="right") - 1] == values[slot]
