"""The replay of halving on a complete table: hand-made tables whose right answer is known, and the
training that fills real ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

from benchmarks.gate_fronts import Material
from benchmarks.pruning import (
    WAYS,
    CompleteTable,
    FullTrial,
    Loss,
    judge,
    ratio_of_means,
    replay,
    rules_for,
    train_in_full,
)
from dsnet.gates.end_to_end import GateImages, train_end_to_end
from dsnet.gates.fit import calibrate_heads
from dsnet.gates.settings import EndToEndSettings, GateSettings
from dsnet.measure.evaluate import build_routing_table
from search.study.halving import ParetoHalving
from tests.dsnet.samples import NORMALIZATION, small_supernet, tensor_data

NUM_IMAGES = 100
Points = Sequence[tuple[float, float]]
"""(right answers of 100 images, MAdds) of one trial after each noted epoch."""


@pytest.fixture
def _own_threads() -> Iterator[None]:
    """Restore this process's number of threads, because training here sets it to one."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def trial(*points: tuple[float, float]) -> FullTrial:
    """A trial that is right on its first images."""
    values = np.array([(right / NUM_IMAGES, madds / 1e6) for right, madds in points])
    right, madds = points[-1]
    correct = np.arange(NUM_IMAGES) < right
    return FullTrial(values, correct, np.full(NUM_IMAGES, int(madds), dtype=np.int64))


def table_of(*trials: FullTrial, epochs: tuple[int, ...] = (1, 2, 4)) -> CompleteTable:
    return CompleteTable(epochs, trials)


def steady(right: float, madds: float = 1000) -> FullTrial:
    """The same at every epoch."""
    return trial(*[(right, madds)] * 3)


def kept(table: CompleteTable, halving: ParetoHalving, **options: int) -> list[int]:
    return np.flatnonzero(replay(table, halving, range(table.num_trials), **options).is_kept).tolist()


def test_a_replay_keeps_the_best_of_each_rung_and_counts_the_epochs_that_ran() -> None:
    table = table_of(*[steady(50 + number) for number in range(8)])
    result = replay(table, ParetoHalving(2, (1, 2)), range(8))
    assert np.flatnonzero(result.is_kept).tolist() == [6, 7]
    assert result.num_epochs == 8 * 1 + 4 * (2 - 1) + 2 * (4 - 2)


def test_later_cohorts_are_compared_with_those_before_them() -> None:
    table = table_of(*[steady(90 - number) for number in range(8)])
    assert kept(table, ParetoHalving(2, (1,)), cohort=4) == [0, 1, 4]  # of the worse cohort one goes on, as a rule does
    assert kept(table, ParetoHalving(2, (1,)), cohort=8) == [0, 1, 2, 3]


def test_slots_are_places_in_the_order() -> None:
    table = table_of(*[steady(50)] * 4)
    result = replay(table, ParetoHalving(4, (1,)), [2, 3, 0, 1])
    assert np.flatnonzero(result.is_kept).tolist() == [2]


def test_a_rung_that_knows_the_end_loses_nothing_where_the_front_has_room() -> None:
    front = [steady(60 + 10 * number, 1000 + 1000 * number) for number in range(3)]
    table = table_of(*front, *[steady(40 - number, 5000 + number) for number in range(9)])
    result = replay(table, ParetoHalving(3, (1,)), [5, 0, 7, 9, 1, 11, 3, 2, 4, 6, 8, 10], cohort=12)
    assert Loss.of(table, result.is_kept) == Loss(0.0, 0.0, 0.0, 1.0)


def test_a_rung_that_says_the_opposite_loses_the_front() -> None:
    table = table_of(*[trial((50 - number, 1000), (50, 1000), (60 + number, 1000)) for number in range(6)])
    result = replay(table, ParetoHalving(3, (1,)), range(6))
    assert np.flatnonzero(result.is_kept).tolist() == [0, 1]
    loss = Loss.of(table, result.is_kept)
    assert table.tied == (frozenset({2, 3, 4, 5}),)  # three images more or less are noise, four are not
    assert (loss.front, loss.front_and_tied, loss.unmatched) == (1.0, 1.0, 1.0)
    assert 0.0 < loss.hypervolume < 1.0


def test_losses_are_those_counted_by_hand() -> None:
    # 90 right at 2000; 89 at 2010: within 1 % and one image; 60 at 1000 alone; 30 at 9000: nowhere
    # near.
    table = table_of(steady(90, 2000), steady(89, 2010), steady(60, 1000), steady(30, 9000))
    assert table.front == (frozenset({2}), frozenset({0}))
    assert table.tied == (frozenset({2}), frozenset({0, 1}))
    low, high = table.reference
    assert low == pytest.approx(0.3 - 0.05 * 0.6)
    assert high == pytest.approx((9000 + 0.05 * 8000) / 1e6)

    def volume(*points: tuple[float, float]) -> float:
        """Of a staircase: points from the cheapest to the dearest."""
        ends = [*[madds for _, madds in points[1:]], high * 1e6]
        return sum((right / 100 - low) * (end - madds) / 1e6 for (right, madds), end in zip(points, ends, strict=True))

    loss = Loss.of(table, np.array([False, True, False, True]))
    assert loss.front == 1.0
    assert loss.front_and_tied == pytest.approx(2 / 3)
    assert loss.unmatched == 0.5
    assert loss.hypervolume == pytest.approx(volume((89, 2010)) / volume((60, 1000), (90, 2000)))


def test_trials_at_the_same_point_are_one_point_of_the_front() -> None:
    table = table_of(steady(80), steady(80), steady(50))
    assert table.front == (frozenset({0, 1}),)
    assert Loss.of(table, np.array([False, True, False])).front == 0.0


def test_the_ways_are_compared_at_equal_numbers() -> None:
    rng = np.random.default_rng(0)
    points = [trial(*[(rng.integers(30, 90), rng.integers(1000, 9000)) for _ in range(3)]) for _ in range(24)]
    table = table_of(*points)
    result = judge(table, ParetoHalving(2, (1, 2)), seed=3, num_orders=30)
    again = judge(table, ParetoHalving(2, (1, 2)), seed=3, num_orders=30)
    assert set(result.losses) == set(WAYS)
    for way in WAYS:
        assert result.losses[way] == again.losses[way]
        assert len(result.losses[way]) == 30
    # Random pruning loses, in the mean, the share of the front that it does not keep.
    lost = result.samples("random", "front").mean()
    assert lost == pytest.approx(1 - result.kept.mean(), abs=0.1)
    assert result.samples("unpruned", "front").mean() == pytest.approx(1 - result.epochs.mean(), abs=0.1)
    assert (result.epochs > result.kept).all()


def test_a_ratio_is_of_means_over_the_same_orders() -> None:
    estimate = ratio_of_means(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))
    assert (estimate.value, estimate.low, estimate.high) == (0.5, 0.5, 0.5)


def test_rules_have_their_rungs_below_the_full_length() -> None:
    expected = {(2, (1, 2, 4, 8)), (3, (1, 3)), (4, (1, 4)), (2, (3, 6)), (3, (3,)), (4, (3,))}
    for keeps_front in (False, True):
        rules = [rule for rule in rules_for(9) if rule.keeps_front == keeps_front]
        assert {(rule.factor, rule.rungs) for rule in rules} == expected
    assert all(rule.rungs[0] == 1 for rule in rules_for(2))


@pytest.mark.usefixtures("_own_threads")
def test_the_noted_epochs_are_those_of_a_trial_trained_at_once() -> None:
    supernet, data = small_supernet("ds_tiny"), tensor_data(24, split="gate")
    gate, val = (
        build_routing_table(supernet, own, split, NORMALIZATION)
        for own, split in ((data, "gate"), (tensor_data(30), "val"))
    )
    images = GateImages(data.images("gate"), data.labels("gate"), NORMALIZATION)
    good = GateSettings(batch_size=8, target=0.4)
    diverging = GateSettings(batch_size=8, optimizer="sgd", lr=1e6, lambda_cls=1e38)
    rules = EndToEndSettings(epochs=3)
    one, none = train_in_full(Material(supernet, gate, val, images), [good, diverging], rules, (1, 3))
    assert none is None
    assert one is not None
    fit = calibrate_heads(val, good, train_end_to_end(supernet, images, good, rules))
    assert one.values.shape == (2, 2)
    assert one.values[-1].tolist() == [fit.metrics["top1"], fit.metrics["madds_m"]]
    assert (one.correct.mean(), one.madds.mean() / 1e6) == pytest.approx(one.values[-1].tolist())
