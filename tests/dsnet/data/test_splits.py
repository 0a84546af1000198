"""The four splits: sizes, stratification, seeds, and what is refused."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsnet.data.settings import SplitSizes
from dsnet.data.splits import SPLIT_NAMES, Splits, apportion, make_splits
from dsnet.errors import ConfigError, DataError

class_sizes = st.lists(st.integers(8, 60), min_size=2, max_size=12)
seeds = st.integers(0, 2**32)


def shuffled_labels(sizes: list[int]) -> np.ndarray:
    return np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))


def assert_stratified(labels: np.ndarray, pool: np.ndarray, ids: np.ndarray) -> None:
    for label in np.unique(labels):
        exact = np.count_nonzero(labels[pool] == label) * len(ids) / len(pool)
        assert abs(np.count_nonzero(labels[ids] == label) - exact) < 1


@settings(deadline=None)
@given(sizes=class_sizes, seed=seeds)
def test_default_splits_are_disjoint_cover_everything_and_are_stratified(sizes: list[int], seed: int) -> None:
    labels = shuffled_labels(sizes)
    splits = make_splits(labels, seed=seed)
    everything = np.concatenate([splits[name] for name in SPLIT_NAMES])
    assert sorted(everything) == list(range(len(labels)))
    for name, share in zip(SPLIT_NAMES, (0.55, 0.15, 0.15, 0.15), strict=True):
        assert abs(len(splits[name]) - share * len(labels)) < 1
        assert np.all(np.diff(splits[name]) > 0)
        assert splits[name].dtype == np.int64
        assert_stratified(labels, np.arange(len(labels)), splits[name])


@settings(deadline=None)
@given(sizes=class_sizes, seed=seeds, counts=st.lists(st.integers(1, 4), min_size=4, max_size=4))
def test_counts_are_met_exactly(sizes: list[int], seed: int, counts: list[int]) -> None:
    labels = shuffled_labels(sizes)
    splits = make_splits(labels, sizes=SplitSizes(*counts), seed=seed)
    assert [len(splits[name]) for name in SPLIT_NAMES] == counts
    everything = np.concatenate([splits[name] for name in SPLIT_NAMES])
    assert len(set(everything.tolist())) == sum(counts)


@settings(deadline=None)
@given(sizes=class_sizes, seed=seeds, test_share=st.floats(0.1, 0.5))
def test_an_official_test_part_is_the_test_split_and_nothing_else(
    sizes: list[int], seed: int, test_share: float
) -> None:
    labels = shuffled_labels([size + 8 for size in sizes])
    official_test = np.zeros(len(labels), dtype=bool)
    for label in range(len(sizes)):
        members = np.flatnonzero(labels == label)
        official_test[members[: math.ceil(len(members) * test_share)]] = True
    splits = make_splits(labels, official_test, seed=seed)
    rest = np.flatnonzero(~official_test)
    assert np.array_equal(splits.test, np.flatnonzero(official_test))
    assert sorted(np.concatenate([splits.train, splits.gate, splits.val])) == rest.tolist()
    for name in ("train", "gate", "val"):
        assert_stratified(labels, rest, splits[name])


def test_cifar10_is_divided_40k_5k_5k_10k_with_equal_classes() -> None:
    labels = np.tile(np.arange(10), 6000)
    splits = make_splits(labels, np.arange(60000) >= 50000)
    sizes = {"train": 40000, "gate": 5000, "val": 5000, "test": 10000}
    for name, size in sizes.items():
        assert np.bincount(labels[splits[name]]).tolist() == [size // 10] * 10


def test_fractions_beside_an_official_test_part_are_of_the_part_they_are_drawn_from() -> None:
    labels = np.tile(np.arange(2), 100)
    sizes = SplitSizes(train=0.5, gate=0.25, val=10, test=0.5)
    splits = make_splits(labels, np.arange(200) >= 100, sizes)
    assert [len(splits[name]) for name in SPLIT_NAMES] == [50, 25, 10, 50]
    assert splits.test.min() >= 100


@settings(deadline=None)
@given(sizes=class_sizes, seed=seeds)
def test_the_same_seed_gives_the_same_splits(sizes: list[int], seed: int) -> None:
    labels = shuffled_labels(sizes)
    assert make_splits(labels, seed=seed).hash == make_splits(labels, seed=seed).hash


@settings(deadline=None)
@given(first=seeds, second=seeds)
def test_another_seed_gives_other_images_of_the_same_number(first: int, second: int) -> None:
    labels = shuffled_labels([50, 50])
    one, other = make_splits(labels, seed=first), make_splits(labels, seed=second)
    assert (one.hash == other.hash) == (first == second)
    for name in SPLIT_NAMES:
        assert np.array_equal(np.bincount(labels[one[name]]), np.bincount(labels[other[name]]))


def test_splits_are_the_same_on_every_platform() -> None:
    # Recorded once: PCG64's raw stream is guaranteed by numpy, so this list may never change.
    splits = make_splits(np.tile(np.arange(3), 20), seed=7)
    assert splits.gate.tolist() == [2, 7, 28, 30, 34, 42, 44, 48, 59]


@settings(deadline=None)
@given(sizes=class_sizes, seed=seeds, limit=st.integers(12, 80))
def test_a_limit_caps_each_split_to_a_stratified_subset(sizes: list[int], seed: int, limit: int) -> None:
    labels = shuffled_labels(sizes)
    whole, limited = make_splits(labels, seed=seed), make_splits(labels, seed=seed, limit=limit)
    for name in SPLIT_NAMES:
        assert len(limited[name]) == min(limit, len(whole[name]))
        assert set(limited[name]) <= set(whole[name])
        assert_stratified(labels, whole[name], limited[name])


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(st.integers(1, 40), min_size=1, max_size=9),
    shares=st.lists(st.integers(0, 100), min_size=1, max_size=5).filter(any),
    used=st.floats(0, 1),
)
def test_apportioning_meets_the_sums_and_rounds_every_entry_up_or_down(
    rows: list[int], shares: list[int], used: float
) -> None:
    total = sum(rows)
    columns = [int(total * used * share / sum(shares)) for share in shares]
    table = apportion(rows, columns)
    assert table.sum(axis=0).tolist() == columns
    assert np.all(table.sum(axis=1) <= rows)
    for row, size in enumerate(rows):
        for column, count in enumerate(columns):
            assert size * count // total <= table[row, column] <= -(-size * count // total)


def test_splits_survive_json() -> None:
    splits = make_splits(np.tile(np.arange(4), 10), seed=3)
    again = Splits.from_json(json.loads(json.dumps(splits.to_json())))
    assert again.hash == splits.hash
    assert all(np.array_equal(again[name], splits[name]) for name in SPLIT_NAMES)


def test_a_changed_record_of_splits_is_refused() -> None:
    record = make_splits(np.tile(np.arange(4), 10)).to_json()
    record["ids"]["val"][0], record["ids"]["test"][0] = record["ids"]["test"][0], record["ids"]["val"][0]
    with pytest.raises(DataError, match="it was changed"):
        Splits.from_json(record)


@pytest.mark.parametrize("missing", ["hash", "ids"])
def test_an_incomplete_record_of_splits_is_refused(missing: str) -> None:
    record = make_splits(np.tile(np.arange(4), 10)).to_json()
    del record[missing]
    with pytest.raises(DataError, match="not complete"):
        Splits.from_json(record)


def test_moving_one_image_between_splits_changes_the_hash() -> None:
    splits = make_splits(np.tile(np.arange(4), 10))
    moved = Splits(splits.train[:-1], np.sort(np.append(splits.gate, splits.train[-1])), splits.val, splits.test)
    assert moved.hash != splits.hash


def test_the_ids_of_a_split_cannot_be_written_to() -> None:
    splits = make_splits(np.tile(np.arange(4), 10))
    with pytest.raises(ValueError, match="read-only"):
        splits.train[0] = 5


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (SplitSizes(train=0.9), r"asks for .* images \(train 72.*the data set has 80"),
        (SplitSizes(train=70, gate=20, val=1, test=1), "asks for 92 images"),
        (SplitSizes(gate=0.001), "data.splits.gate comes to 0"),
    ],
)
def test_sizes_that_cannot_be_met_are_refused(sizes: SplitSizes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_splits(np.tile(np.arange(4), 20), sizes=sizes)


def test_more_test_images_than_the_official_part_holds_are_refused() -> None:
    with pytest.raises(ConfigError, match="the official test part has 20"):
        make_splits(np.tile(np.arange(4), 20), np.arange(80) >= 60, SplitSizes(test=21))


@pytest.mark.parametrize("size", [0, -1, 0.0, 1.0, 1.5, -0.1, float("nan"), True, "10"])
def test_a_size_that_is_neither_count_nor_fraction_is_refused(size: object) -> None:
    with pytest.raises(ConfigError, match=r"data\.splits\.gate is"):
        SplitSizes(gate=size)  # type: ignore[arg-type]


def test_a_class_with_fewer_images_than_splits_is_refused() -> None:
    labels = np.array([0] * 50 + [1] * 3)
    with pytest.raises(ConfigError, match=r"class 1 has 3 image\(s\) in the data set"):
        make_splits(labels)


def test_a_class_that_occurs_only_in_the_official_test_part_is_refused() -> None:
    labels = np.array([0] * 50 + [1] * 20)
    with pytest.raises(ConfigError, match=r"class 1 has 0 image\(s\) in the official train part"):
        make_splits(labels, np.arange(70) >= 45)


def test_a_limit_below_the_number_of_classes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.limit is 3"):
        make_splits(np.tile(np.arange(4), 20), limit=3)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ConfigError, match="seed is -1"):
        make_splits(np.tile(np.arange(4), 20), seed=-1)


def test_an_unknown_split_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="train, gate, val, test"):
        make_splits(np.tile(np.arange(4), 20))["valid"]


def test_ten_thousand_classes_are_divided_in_seconds_as_always() -> None:
    sizes = np.random.default_rng(0).integers(4, 9, 10_000)
    start = time.process_time()
    splits = make_splits(np.repeat(np.arange(len(sizes)), sizes))
    assert time.process_time() - start < 15, "it was a minute"
    # Recorded before the search for free places was one operation of numpy.
    assert splits.hash == "d8fd4d8667399d717793faab7654656eafaafb1046ffcc8a6fc80db9aba253c6"


def test_a_class_is_named_by_its_folder() -> None:
    labels = np.repeat(np.arange(3), [20, 2, 20])
    with pytest.raises(ConfigError, match=r"class 'rare' has 2 image\(s\) in the data set, which fills 4 split\(s\)"):
        make_splits(labels, class_names=("a", "rare", "b"))


@settings(deadline=None)
@given(sizes=class_sizes, seed=seeds, with_test=st.booleans())
def test_an_official_validation_part_gives_val_and_where_there_is_no_test_part_test_too(
    sizes: list[int], seed: int, with_test: bool
) -> None:
    labels = shuffled_labels([size + 8 for size in sizes])
    keys = np.random.default_rng(1).permutation(len(labels))
    part = np.zeros(len(labels), dtype=int)
    for label in range(len(sizes)):
        members = sorted(np.flatnonzero(labels == label), key=lambda row: keys[row])
        part[members[:4]], part[members[4:6]] = 1, 2
    is_val, is_test = (part == 1, part == 2) if with_test else (part >= 1, None)
    splits = make_splits(labels, is_test, seed=seed, official_val=is_val)
    rest = np.flatnonzero(part == 0)
    assert sorted([*splits.train, *splits.gate]) == rest.tolist()
    assert abs(len(splits.train) - 0.9 * len(rest)) < 1
    assert_stratified(labels, rest, splits.gate)
    if is_test is not None:
        assert np.array_equal(splits.val, np.flatnonzero(is_val))
        assert np.array_equal(splits.test, np.flatnonzero(is_test))
    else:
        assert sorted([*splits.val, *splits.test]) == np.flatnonzero(is_val).tolist()
        assert np.bincount(labels[splits.val]).tolist() == [3] * len(sizes)
