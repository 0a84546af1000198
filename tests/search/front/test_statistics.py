"""The bootstrap against closed forms, simulated coverage and resampling by hand."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from search.front.controls import StaticLine, random_routing
from search.front.pareto import front_mask
from search.front.statistics import (
    bootstrap_counts,
    bootstrap_interval,
    front_stability,
    gain_over_one,
    gain_over_random,
    gain_over_static,
    resample_points,
    significant_sign,
    tied_groups,
    unpaired_difference,
    wilson_interval,
)

MADDS = np.array([10_000_000, 20_000_000, 40_000_000])


def make_table(seed, num_images=200):
    rng = np.random.default_rng(seed)
    return rng.random((num_images, 1)) + 0.2 * rng.normal(size=(num_images, 3)) < [0.6, 0.7, 0.8]


MAX_MIN = ("maximize", "minimize")


def stability_of(sample, decisions):
    return front_stability([sample.resampled_top1, sample.resampled_madds], MAX_MIN, decisions)


def test_counts_are_draws_of_n_images():
    counts = np.vstack(list(bootstrap_counts(50, 400, seed=0)))
    assert counts.shape == (400, 50)
    assert (counts.sum(axis=1) == 50).all()
    # Multinomial: mean 1, variance 1 - 1/n for each image.
    assert counts.mean(axis=0) == pytest.approx(1.0, abs=0.25)
    assert counts.var() == pytest.approx(1 - 1 / 50, abs=0.05)


def test_resamples_do_not_depend_on_how_they_are_cut_into_chunks(monkeypatch):
    whole = np.vstack(list(bootstrap_counts(30, 20, seed=3)))
    monkeypatch.setattr("search.front.statistics.CHUNK_BYTES", 4 * 30 * 7)
    chunks = list(bootstrap_counts(30, 20, seed=3))
    assert [len(chunk) for chunk in chunks] == [7, 7, 6]
    assert (np.vstack(chunks) == whole).all()


def test_resampling_10000_images_stays_below_64_mb():
    correct = np.random.default_rng(0).random((10_000, 8)) < 0.8
    tracemalloc.start()
    resample_points(correct, MADDS[0], num_resamples=400)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64e6


def test_resampled_points_equal_resampling_by_hand():
    correct = make_table(0, num_images=40)
    spent = np.random.default_rng(1).choice(MADDS, size=(40, 3))
    sample = resample_points(correct, spent, num_resamples=25, seed=5)
    rng = np.random.default_rng(5)
    for resample in range(25):
        drawn = rng.integers(40, size=40)
        assert sample.resampled_top1[resample] == pytest.approx(correct[drawn].mean(axis=0))
        assert sample.resampled_madds[resample] == pytest.approx(spent[drawn].mean(axis=0))
    assert sample.top1 == pytest.approx(correct.mean(axis=0))
    assert sample.madds == pytest.approx(spent.mean(axis=0))


def test_a_static_point_costs_exactly_the_same_in_every_resample():
    sample = resample_points(make_table(2), MADDS + 1, num_resamples=50)
    assert (sample.resampled_madds == MADDS + 1).all()


def test_percentile_interval_is_that_of_numpy_along_the_first_axis():
    samples = np.random.default_rng(0).normal(size=(500, 4))
    low, high = bootstrap_interval(samples, level=0.9)
    assert low == pytest.approx(np.percentile(samples, 5, axis=0))
    assert high == pytest.approx(np.percentile(samples, 95, axis=0))


def test_a_level_outside_0_to_1_is_refused():
    with pytest.raises(ValueError, match="`level` is 95"):
        bootstrap_interval([1.0, 2.0], level=95)


@given(num_images=st.integers(1, 3000), share=st.floats(0, 1))
@settings(deadline=None)
def test_wilson_interval_equals_scipy(num_images, share):
    num_correct = round(share * num_images)
    expected = binomtest(num_correct, num_images).proportion_ci(method="wilson")
    assert wilson_interval(num_correct, num_images) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_wilson_of_an_impossible_count_is_refused():
    with pytest.raises(ValueError, match="5 correct of 4"):
        wilson_interval(5, 4)


def test_the_interval_of_an_accuracy_covers_the_truth_about_as_often_as_it_says():
    rng, truth, num_datasets = np.random.default_rng(11), 0.7, 300
    # Datasets as columns: one call resamples all of them, over the same image numbers.
    sample = resample_points(rng.random((150, num_datasets)) < truth, 0, num_resamples=500)
    low, high = bootstrap_interval(sample.resampled_top1)
    coverage = ((low <= truth) & (truth <= high)).mean()
    assert 0.90 <= coverage <= 0.98


def test_pairing_makes_the_difference_of_similar_points_far_more_certain():
    correct = make_table(3)[:, :1].repeat(2, axis=1)
    correct[:3, 1] ^= True
    sample = resample_points(correct, MADDS[0])
    paired = (sample.resampled_top1[:, 1] - sample.resampled_top1[:, 0]).std()
    assert paired < 0.5 * sample.resampled_top1[:, 0].std()


def test_gain_over_static_recomputes_line_and_budget_in_every_resample():
    correct, rng = make_table(4, num_images=50), np.random.default_rng(9)
    line = StaticLine.fit(MADDS, make_table(5))
    routes = rng.integers(3, size=(50, 2))
    routed, spent = np.take_along_axis(correct, routes, axis=1), MADDS[routes] + 1000
    gain = gain_over_static(routed, spent, line, correct, num_resamples=40, seed=6)
    rng, gains = np.random.default_rng(6), []
    for _ in range(40):
        drawn = rng.integers(50, size=50)
        gains.append(routed[drawn].mean(axis=0) - line.value_at(spent[drawn].mean(axis=0), correct[drawn]))
    assert gain.value == pytest.approx(routed.mean(axis=0) - line.value_at(spent.mean(axis=0), correct))
    assert gain.low == pytest.approx(np.percentile(gains, 2.5, axis=0))
    assert gain.high == pytest.approx(np.percentile(gains, 97.5, axis=0))


def test_a_vertex_of_the_line_gains_exactly_nothing_over_it():
    val, correct = make_table(7), make_table(8)
    line = StaticLine.fit(MADDS, val)
    vertices = list(line.vertices)
    gain = gain_over_static(correct[:, vertices], line.madds, line, correct, num_resamples=30)
    assert (np.abs([gain.value, gain.low, gain.high]) < 1e-12).all()


def test_a_point_below_the_cheapest_sub_network_has_no_gain():
    correct = make_table(9)
    gain = gain_over_static(correct[:, :1], MADDS[0] // 2, StaticLine.fit(MADDS, correct), correct, num_resamples=10)
    assert np.isnan([gain.value, gain.low, gain.high]).all()


def test_gain_over_one_pairs_the_images():
    correct = make_table(12, num_images=50)
    gain = gain_over_one(correct[:, :2], correct[:, 2], num_resamples=40, seed=2)
    rng, gains = np.random.default_rng(2), []
    for _ in range(40):
        drawn = rng.integers(50, size=50)
        gains.append(correct[drawn, :2].mean(0) - correct[drawn, 2].mean())
    assert gain.value == pytest.approx(correct[:, :2].mean(0) - correct[:, 2].mean())
    assert gain.low == pytest.approx(np.percentile(gains, 2.5, axis=0))
    assert gain.high == pytest.approx(np.percentile(gains, 97.5, axis=0))
    same = gain_over_one(correct[:, :1], correct[:, 0], num_resamples=10)
    assert (same.value[0], same.low[0], same.high[0]) == (0, 0, 0)


def test_gain_over_random_recomputes_the_histogram_in_every_resample():
    correct, routes = make_table(10, num_images=50), np.random.default_rng(1).integers(3, size=(50, 1))
    gain = gain_over_random(routes, correct, num_resamples=40, seed=2)
    rng, gains = np.random.default_rng(2), []
    for _ in range(40):
        drawn = rng.integers(50, size=50)
        histogram = np.bincount(routes[drawn, 0], minlength=3)
        gains.append(correct[drawn, routes[drawn, 0]].mean() - random_routing(correct[drawn], histogram))
    assert gain.value[0] == pytest.approx(
        correct[np.arange(50), routes[:, 0]].mean() - random_routing(correct, np.bincount(routes[:, 0], minlength=3))
    )
    assert (gain.low[0], gain.high[0]) == pytest.approx(tuple(np.percentile(gains, [2.5, 97.5])))


def test_front_stability_counts_the_resamples_on_whose_front_a_point_is():
    correct, rng = make_table(11, num_images=60), np.random.default_rng(3)
    decisions = rng.integers(3, size=(60, 6))
    sample = resample_points(np.take_along_axis(correct, decisions, axis=1), MADDS[decisions], num_resamples=80)
    expected = np.zeros(6)
    for top1, madds in zip(sample.resampled_top1, sample.resampled_madds, strict=True):
        expected += front_mask(np.column_stack([top1, madds]), ("maximize", "minimize"))
    assert stability_of(sample, decisions) == pytest.approx(expected / 80)


def test_points_that_decide_alike_share_one_stability():
    correct, rng = make_table(12, num_images=60), np.random.default_rng(4)
    decisions = rng.integers(3, size=(60, 4))[:, [0, 1, 0, 2, 1, 3]]
    sample = resample_points(np.take_along_axis(correct, decisions, axis=1), MADDS[decisions], num_resamples=50)
    shares = stability_of(sample, decisions)
    assert shares[0] == shares[2]
    assert shares[1] == shares[4]
    # Copies that are merged neither dominate nor dilute: the share is that of a set without them.
    alone = [0, 1, 3, 5]
    kept = [sample.resampled_top1[:, alone], sample.resampled_madds[:, alone]]
    assert shares[alone] == pytest.approx(front_stability(kept, MAX_MIN, decisions[:, alone]))


def test_a_point_that_is_better_on_every_image_is_always_on_the_front_and_the_other_never():
    correct = np.column_stack([np.ones(30, bool), np.zeros(30, bool)])
    sample = resample_points(correct, [1.0, 2.0], num_resamples=20)
    assert stability_of(sample, correct.astype(int)).tolist() == [1.0, 0.0]


def test_a_third_objective_that_images_do_not_change_keeps_a_point_on_every_front():
    correct = np.column_stack([np.ones(30, bool), np.zeros(30, bool)])
    sample = resample_points(correct, [1.0, 2.0], num_resamples=20)
    columns = [sample.resampled_top1, sample.resampled_madds, np.array([5.0, 4.0])]
    assert front_stability(columns, (*MAX_MIN, "minimize"), correct.astype(int)).tolist() == [1.0, 1.0]
    assert front_stability(columns, (*MAX_MIN, "maximize"), correct.astype(int)).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("third", "shares"), [([5.0, 4.0], [0.0, 1.0]), ([4.0, 5.0], [1.0, 0.0]), ([4.0, 4.0], [1.0, 1.0])]
)
def test_points_that_decide_alike_and_differ_in_what_images_do_not_change_are_two(third, shares):
    sample = resample_points(np.ones((30, 2), bool), [1.0, 1.0], num_resamples=20)
    columns = [sample.resampled_top1, sample.resampled_madds, np.array(third)]
    decisions = np.zeros((30, 2), int)
    assert front_stability(columns, (*MAX_MIN, "minimize"), decisions).tolist() == shares


def test_groups_are_anchored_at_front_points_and_not_closed():
    rng = np.random.default_rng(5)
    correct = np.repeat(rng.random((400, 1)) < 0.8, 4, axis=1)
    correct[rng.choice(np.flatnonzero(correct[:, 0]), 60, replace=False), 3] = False  # 15 points worse
    # 0 - 1 and 1 - 2 are within 1 % of each other in MAdds, 0 - 2 is not; 3 costs as much as 0.
    sample = resample_points(correct, [1000.0, 1008.0, 1016.0, 1000.0])
    assert tied_groups(sample, [True, True, False, False]) == {0: (1,), 1: (0, 2)}


def test_a_single_front_point_is_tied_with_nothing():
    sample = resample_points(make_table(13), MADDS, num_resamples=20)
    assert tied_groups(sample, [False, True, False]) == {1: ()}


def test_the_difference_of_independent_values_has_the_usual_interval_where_theirs_are_symmetric():
    value, low, high = unpaired_difference((0.9, 0.87, 0.93), (0.8, 0.76, 0.84))
    assert (value, low, high) == pytest.approx((0.1, 0.1 - 0.05, 0.1 + 0.05))
    # The lower end comes from the first value's lower and the second one's upper end.
    assert unpaired_difference((0.5, 0.2, 0.5), (0.5, 0.5, 0.9)) == pytest.approx((0.0, -0.5, 0.0))


def test_the_interval_of_an_unpaired_difference_covers_the_truth_about_as_often_as_it_says():
    rng, num_datasets = np.random.default_rng(12), 300
    ends = []
    for truth, num_images in ((0.9, 120), (0.8, 200)):
        sample = resample_points(rng.random((num_images, num_datasets)) < truth, 0, num_resamples=400)
        ends.append(np.array([sample.top1, *bootstrap_interval(sample.resampled_top1)]).T)
    found = np.array([unpaired_difference(a, b) for a, b in zip(*ends, strict=True)])
    coverage = ((found[:, 1] <= 0.1) & (found[:, 2] >= 0.1)).mean()
    assert 0.90 <= coverage <= 0.98
    # The sum of the widths would be far too wide, the width of one alone too narrow.
    assert (found[:, 2] - found[:, 1]).mean() == pytest.approx(
        np.hypot(*[(own[:, 2] - own[:, 1]).mean() for own in ends]), rel=0.05
    )


@pytest.mark.parametrize(
    ("low", "high", "sign"),
    [
        (0.001, 0.012, 1),  # [+0.1, +1.2]
        (0.0, 0.012, 0),
        (0.0004, 0.012, 0),  # [0.0, +1.2] as shown
        (-0.012, -0.001, -1),
        (-0.012, -0.0004, 0),
        (-0.01, 0.01, 0),
        (0.0, 0.0, 0),
        (np.nan, np.nan, 0),
    ],
)
def test_a_difference_is_significant_if_its_interval_excludes_zero_as_shown(low, high, sign):
    assert significant_sign(low, high) == sign


def test_an_interval_that_is_not_shown_is_judged_unrounded():
    assert significant_sign(0.0004, 0.012, digits=None) == 1
    assert significant_sign(0.0, 0.012, digits=None) == 0


def test_gains_of_the_mean_over_trainings_are_the_means_of_the_gains():
    tables = [make_table(seed) for seed in (0, 1)]
    line = StaticLine.fit(MADDS, tables[0])
    points = [table[:, :2] for table in (make_table(2), make_table(3))]
    each = [
        gain_over_static(own, MADDS[1:], line, table, num_resamples=20)
        for own, table in zip(points, tables, strict=True)
    ]
    both = gain_over_static(np.mean(points, axis=0), MADDS[1:], line, np.mean(tables, axis=0), num_resamples=20)
    assert both.value == pytest.approx(np.mean([gain.value for gain in each], axis=0))
