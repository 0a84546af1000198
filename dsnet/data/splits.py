"""The four splits: `train` trains supernets, `gate` trains gates, `val` selects, `test` is sealed.

The images of a split depend on labels, sizes and seed alone, on every platform and with every
version of numpy: the randomness is the raw 64-bit stream of PCG64, which numpy keeps stable, unlike
its distributions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Int64
from torch import Tensor

from dsnet.data.settings import SplitSize, SplitSizes
from dsnet.errors import ConfigError, DataError

SPLIT_NAMES = ("train", "gate", "val", "test")
DEFAULT_SIZES = SplitSizes()

_SHARES = {"train": 0.55, "gate": 0.15, "val": 0.15, "test": 0.15}
_SHARES_BESIDE_OFFICIAL_TEST = {"train": 0.8, "gate": 0.1, "val": 0.1}  # CIFAR-10: 40,000 / 5,000 / 5,000
_SHARES_BESIDE_OFFICIAL_VAL = {"train": 0.9, "gate": 0.1}
_SHARES_OF_OFFICIAL_VAL = {"val": 0.5, "test": 0.5}
"""Shares of the data's own validation part, where it has no test part: a pretrained network may
have seen the training part, but none of these images."""


@dataclass(frozen=True, eq=False)
class Splits:
    """Four disjoint, sorted int64 arrays of image ids; compare two objects by their `hash`."""

    train: Int64[np.ndarray, " train_images"]
    gate: Int64[np.ndarray, " gate_images"]
    val: Int64[np.ndarray, " val_images"]
    test: Int64[np.ndarray, " test_images"]

    def __post_init__(self) -> None:
        for name in SPLIT_NAMES:
            self[name].setflags(write=False)

    def __getitem__(self, name: str) -> Int64[np.ndarray, " images"]:
        """The image ids of the split called `name`, int64, ascending."""
        if name not in SPLIT_NAMES:
            raise ValueError(f"unknown split {name!r}; known: {', '.join(SPLIT_NAMES)}")
        return getattr(self, name)

    @cached_property
    def hash(self) -> str:
        """sha256 over the four arrays."""
        digest = hashlib.sha256()
        for name in SPLIT_NAMES:
            digest.update(f"{name} {len(self[name])} ".encode())
            digest.update(self[name].astype("<i8").data)
        return digest.hexdigest()

    def to_json(self) -> dict[str, Any]:
        """A mapping for `json.dump`: the hash, the sizes and the ids."""
        return {
            "hash": self.hash,
            "num_images": {name: len(self[name]) for name in SPLIT_NAMES},
            "ids": {name: self[name].tolist() for name in SPLIT_NAMES},
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Splits:
        """Rebuild splits from the result of `to_json`.

        Raises:
            DataError: The record is incomplete or does not match its own hash.
        """
        try:
            splits = cls(**{name: np.array(record["ids"][name], dtype=np.int64) for name in SPLIT_NAMES})
            expected = record["hash"]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"the record of the splits is not complete ({error!r}); remove it and launch again"
            ) from error
        if splits.hash != expected:
            raise DataError(
                f"the record of the splits has the hash {expected!r}, but its ids give {splits.hash!r}: it was changed; "
                "remove it and launch again"
            )
        return splits


def data_fingerprint(images: str, splits: Splits) -> str:
    """SHA-256 over the images' fingerprint and the splits: the part of a stage's key that stands
    for its data."""
    return hashlib.sha256(f"{images}/{splits.hash}".encode()).hexdigest()


class LabelledImages(Protocol):
    """The facts about a data set that determine its splits, as of an `ImageSource`."""

    @property
    def labels(self) -> Int64[Tensor, " images"]:
        """int64 [N]: the labels of all images."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per class, in label order."""

    @property
    def official_val(self) -> Bool[np.ndarray, " images"] | None:
        """bool [N]: the images of the official validation part; None where there is none."""

    @property
    def official_test(self) -> Bool[np.ndarray, " images"] | None:
        """bool [N]: the images of the official test part; None where there is none."""


def splits_of(
    images: LabelledImages, sizes: SplitSizes = DEFAULT_SIZES, seed: int = 0, limit: int | None = None
) -> Splits:
    """The splits of a data set; see `make_splits`."""
    labels = images.labels.numpy()
    return make_splits(
        labels,
        images.official_test,
        sizes,
        seed,
        limit,
        official_val=images.official_val,
        class_names=images.class_names,
    )


def make_splits(
    labels: Int64[np.ndarray, " images"],
    official_test: Bool[np.ndarray, " images"] | None = None,
    sizes: SplitSizes = DEFAULT_SIZES,
    seed: int = 0,
    limit: int | None = None,
    *,
    official_val: Bool[np.ndarray, " images"] | None = None,
    class_names: Sequence[str] | None = None,
) -> Splits:
    """Divide a labelled set into four stratified, disjoint splits.

    Every split has exactly its size and contains each class in proportion, rounded up or down.

    Args:
        labels: int64 [N].
        official_test: bool [N]; None where the data has no official test part.
        sizes: Size of each split.
        seed: >= 0; decides which images a split gets, never how many.
        limit: For smoke runs: at most this many images per split, stratified again. A limited split
            is a subset of the same split without the limit.
        official_val: bool [N]; None where the data has no official validation part. `SplitSizes`
            says what becomes of the parts.
        class_names: Names of the classes for messages; None: their numbers.

    Raises:
        ConfigError: The sizes exceed the number of images, a split would be empty, a class has
            fewer images than there are splits to fill, or the limit is smaller than the number of
            classes.
    """
    labels = np.asarray(labels, dtype=np.int64)
    if seed < 0:
        raise ConfigError(f"seed is {seed}, must be >= 0")
    # One key per image: the order of the keys is the random order, within a class as well as within
    # a split.
    keys = np.random.PCG64(seed).random_raw(len(labels))
    parts: dict[str, np.ndarray] = {}
    for ids, shares, what in _pools(official_val, official_test, len(labels)):
        counts = _counts({name: getattr(sizes, name) or share for name, share in shares.items()}, len(ids), what)
        _check_classes(labels, ids, list(counts), what, class_names)
        parts |= zip(counts, _stratified(ids, labels, keys, list(counts.values())), strict=True)
    if limit is not None:
        _check_limit(limit, len(np.unique(labels)))
        parts = {name: _stratified(ids, labels, keys, [min(limit, len(ids))])[0] for name, ids in parts.items()}
    return Splits(**parts)


def _pools(
    official_val: np.ndarray | None, official_test: np.ndarray | None, num_images: int
) -> list[tuple[np.ndarray, Mapping[str, SplitSize], str]]:
    """The pools of images to divide: (image ids, default sizes of the splits drawn from them, name
    in messages)."""
    if official_val is None and official_test is None:
        return [(np.arange(num_images), _SHARES, "the data set")]
    none = np.zeros(num_images, dtype=bool)
    is_val, is_test = (none if part is None else part for part in (official_val, official_test))
    rest, val, test = (np.flatnonzero(part) for part in (~(is_val | is_test), is_val, is_test))
    name = "the official {} part".format
    if official_val is None:
        return [
            (rest, _SHARES_BESIDE_OFFICIAL_TEST, name("train")),
            (test, {"test": len(test)}, name("test")),
        ]
    own = [(rest, _SHARES_BESIDE_OFFICIAL_VAL, name("train"))]
    if official_test is None:
        return [*own, (val, _SHARES_OF_OFFICIAL_VAL, name("validation"))]
    return [*own, (val, {"val": len(val)}, name("validation")), (test, {"test": len(test)}, name("test"))]


def _counts(sizes: Mapping[str, SplitSize], num_images: int, what: str) -> dict[str, int]:
    """Sizes as numbers of images.

    Fractions are rounded by largest remainder, so that fractions that sum to 1 use all images.
    """
    exact = {name: float(size) * num_images for name, size in sizes.items() if isinstance(size, float)}
    counts = {name: size if isinstance(size, int) else int(exact[name]) for name, size in sizes.items()}
    num_left = round(sum(exact.values())) - sum(counts[name] for name in exact)
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[:num_left]:
        counts[name] += 1
    asked = ", ".join(f"{name} {count}" for name, count in counts.items())
    if sum(counts.values()) > num_images:
        raise ConfigError(
            f"data.splits asks for {sum(counts.values())} images ({asked}), but {what} has {num_images}; "
            "make one of them smaller (a split that is not given keeps its default)"
        )
    for name, count in counts.items():
        if count == 0:
            raise ConfigError(f"data.splits.{name} comes to 0 of the {num_images} images of {what}; make it larger")
    return counts


def _check_classes(
    labels: np.ndarray, ids: np.ndarray, splits: Sequence[str], what: str, class_names: Sequence[str] | None
) -> None:
    classes, counts = np.unique(labels, return_counts=True)
    inside, counts_inside = np.unique(labels[ids], return_counts=True)
    num_members = np.zeros_like(counts)
    num_members[np.searchsorted(classes, inside)] = counts_inside
    smallest = int(np.argmin(num_members))
    if num_members[smallest] < len(splits):
        label = int(classes[smallest])
        name = label if class_names is None else repr(class_names[label])
        raise ConfigError(
            f"class {name} has {int(num_members[smallest])} image(s) in {what}, which fills {len(splits)} split(s) "
            f"({', '.join(splits)}): each class needs at least {len(splits)}; add images or leave the class out"
        )


def _check_limit(limit: int, num_classes: int) -> None:
    if limit < num_classes:
        raise ConfigError(f"data.limit is {limit}, must be at least the number of classes ({num_classes})")


def _stratified(ids: np.ndarray, labels: np.ndarray, keys: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
    """Draw disjoint stratified subsets of `ids`, one of each size in `counts`; each is sorted."""
    order = ids[np.argsort(keys[ids], kind="stable")]
    by_class = order[np.argsort(labels[order], kind="stable")]
    members = np.split(by_class, np.flatnonzero(np.diff(labels[by_class])) + 1)
    quotas = apportion([len(member) for member in members], counts)
    drawn: list[list[np.ndarray]] = [[] for _ in counts]
    for member, quota in zip(members, quotas, strict=True):
        bounds = np.cumsum(quota)
        for subset, first, last in zip(drawn, bounds - quota, bounds, strict=True):
            subset.append(member[first:last])
    return [np.sort(np.concatenate(subset)) for subset in drawn]


def apportion(class_sizes: Sequence[int], split_sizes: Sequence[int]) -> Int64[np.ndarray, "classes splits"]:
    """Number of images of each class in each split: int64 [classes, splits].

    Columns sum to `split_sizes` exactly, rows to at most the class's size, and each entry is the
    exact proportion class_size * split_size / total rounded up or down. Such a table always exists:
    the exact proportions are a feasible flow, and a feasible flow with integer capacities implies
    an integer one.

    Args:
        class_sizes: Number of images of each class.
        split_sizes: Number of images of each split; their sum is at most the number of images.
    """
    total = sum(class_sizes)
    rows = np.array(class_sizes, dtype=np.int64)
    columns = np.array([*split_sizes, total - sum(split_sizes)], dtype=np.int64)  # the last: images that no split takes
    quotas, remainders = np.divmod(np.outer(rows, columns), total)
    quotas += _round_up(remainders > 0, rows - quotas.sum(axis=1), columns - quotas.sum(axis=0))
    return quotas[:, :-1]


def _round_up(is_allowed: np.ndarray, row_sums: np.ndarray, column_sums: np.ndarray) -> np.ndarray:
    """A 0/1 table with the given sums and ones in allowed cells only."""
    table = _Table(is_allowed, column_sums)
    for row in np.repeat(np.arange(len(row_sums)), row_sums).tolist():
        is_placed = table.place(row)
        assert is_placed
    return table.is_up


class _Table:
    """A 0/1 table that is filled by augmenting paths (Kuhn's algorithm).

    The columns of a row are the bits of one number, so that a search among thousands of classes is
    one operation of numpy.
    """

    def __init__(self, is_allowed: np.ndarray, column_sums: np.ndarray) -> None:
        self._bits = np.int64(1) << np.arange(is_allowed.shape[1], dtype=np.int64)
        self._free = (is_allowed * self._bits).sum(axis=1)  # allowed columns without a 1
        self._up = np.zeros_like(self._free)
        self._num_missing = column_sums.copy()

    @property
    def is_up(self) -> np.ndarray:
        """The table as bool [rows, columns]."""
        return (self._up[:, None] & self._bits) != 0

    def place(self, row: int) -> bool:
        """Place one more 1 in the row, if necessary by moving ones of other rows; whether that was
        possible."""
        return self._place(row, [0])

    def _place(self, row: int, visited: list[int]) -> bool:
        """`visited` holds the columns that were tried, as one number."""
        for column in np.flatnonzero(self._bits & self._free[row]).tolist():
            bit = int(self._bits[column])
            if visited[0] & bit:
                continue
            visited[0] |= bit
            if self._num_missing[column] > 0:
                self._num_missing[column] -= 1
            elif not self._make_room(bit, visited):
                continue
            self._flip(row, bit)
            return True
        return False

    def _make_room(self, bit: int, visited: list[int]) -> bool:
        """Move a 1 of another row out of a column; whether that was possible."""
        start = 0
        while True:
            can_move = (self._up[start:] & bit != 0) & (self._free[start:] & ~visited[0] != 0)
            if not can_move.any():
                return False
            other = start + int(can_move.argmax())
            if self._place(other, visited):
                self._flip(other, bit)
                return True
            start = other + 1

    def _flip(self, row: int, bit: int) -> None:
        self._up[row] ^= bit
        self._free[row] ^= bit
