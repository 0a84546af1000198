"""The front in top-1 and latency is that of a search through all pairs of candidates."""

from __future__ import annotations

import numpy as np
import pytest

from dsnet.measure.latency import DECIDE, TRUNK, LatencySamples
from search.front.latency_front import Candidate, TimedPoint, latency_fronts

ROUTES = ("slim", "wide")


def times(median: float, spread: float = 0.0) -> tuple[float, ...]:
    return tuple(median + spread * step for step in (-1, 0, 1, 0.5, -0.5))


def samples(spread: float = 0.0, decide: float | None = 1.0) -> LatencySamples:
    """Trunk 2 ms an image, tails 3 and 9, static networks 5 and 11, all in proportion to the
    images."""
    parts = {
        size: {
            TRUNK: times(2.0 * size, spread),
            "slim": times(3.0 * size, spread),
            "wide": times(9.0 * size, spread),
            **({} if decide is None else {f"{DECIDE}gate": times(decide), f"{DECIDE}cascade": times(2 * decide)}),
        }
        for size in (1, 2)
    }
    whole = {size: {"slim": times(5.0 * size, spread), "wide": times(11.0 * size, spread)} for size in (1, 2)}
    return LatencySamples("a clock", 1, whole, parts)


def candidate(name: str, top1: float, runs: tuple[float, ...] | None = None, router: str = "gate") -> Candidate:
    return Candidate(name, top1, 1.0, runs, router)


def dominates(a: TimedPoint, b: TimedPoint) -> bool:
    return a.top1 >= b.top1 and a.latency_ms <= b.latency_ms and (a.top1 > b.top1 or a.latency_ms < b.latency_ms)


def test_the_latency_is_that_of_the_parts_and_of_whole_networks() -> None:
    candidates = [
        candidate("even", 0.8, (0.5, 0.5)),
        candidate("cascade", 0.85, (1.0, 0.25), "cascade"),
        candidate("slim", 0.7),
        candidate("wide", 0.9),
    ]
    fronts = latency_fronts(samples(), candidates, ROUTES, 10)
    assert [point.latency_ms for point in fronts[1]] == pytest.approx([2 + 1 + 6, 2 + 2 + 3 + 9 / 4, 5, 11])
    # Two images: the expected tail of a route is 2 * share * tail, because times are in proportion.
    assert [point.latency_ms for point in fronts[2]] == pytest.approx([4 + 1 + 12, 4 + 2 + 6 + 4.5, 10, 22])
    assert all(point.low_ms == pytest.approx(point.latency_ms) == point.high_ms for point in fronts[1])
    even, cascade, slim, wide = fronts[1]
    assert (even.static, even.static_ms, even.is_static) == ("wide", 11, False)
    assert (slim.static, wide.static, wide.is_static) == ("slim", "wide", True)
    assert (even.dominated_by, cascade.dominated_by) == (None, None)


def test_decisions_that_were_not_timed_take_nothing() -> None:
    (point,) = latency_fronts(samples(decide=None), [candidate("even", 0.8, (0.5, 0.5))], ROUTES, 10)[1]
    assert point.latency_ms == pytest.approx(8.0)
    assert (point.static, point.static_ms, point.is_on_front) == (None, None, True)


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_that_of_all_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gates = [
        candidate(f"trial-{k}", round(float(rng.uniform(0.7, 0.9)), 2), (share, 1 - share))
        for k, share in enumerate(rng.uniform(size=12).round(1).tolist())
    ]
    candidates = [*gates, candidate("slim", 0.75), candidate("wide", 0.85)]
    for points in latency_fronts(samples(spread=0.2), candidates, ROUTES, 50).values():
        for point in points:
            better = {other.name for other in points if dominates(other, point)}
            assert point.is_on_front == (not better)
            assert (point.dominated_by in better) if better else point.dominated_by is None
            equal = [other for other in points if other.is_static and other.top1 >= point.top1]
            assert point.static_ms == min((other.latency_ms for other in equal), default=None)
            assert point.low_ms <= point.latency_ms <= point.high_ms


def test_a_judgement_that_the_spread_leaves_open_is_not_sure() -> None:
    # A gate of 8 ms beside a static network of 11 ms that is more accurate: certain with equal
    # times, open where the times spread by more than the difference.
    candidates = [candidate("even", 0.9, (0.5, 0.5)), candidate("wide", 0.9)]
    even, wide = latency_fronts(samples(decide=0.0), candidates, ROUTES, 100)[1]
    assert (even.is_on_front, even.front_share, even.is_sure) == (True, 1.0, True)
    assert (wide.is_on_front, wide.front_share, wide.is_sure) == (False, 0.0, True)
    even, wide = latency_fronts(samples(spread=4.0, decide=0.0), candidates, ROUTES, 100)[1]
    assert even.is_on_front
    assert 0.05 < even.front_share < 0.95
    assert not even.is_sure
    assert not wide.is_sure
