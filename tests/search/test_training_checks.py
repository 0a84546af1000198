"""Warnings about a training, on made-up curves and accuracies: each fires where it should, and not
on a training that went well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from search.training_checks import (
    MIN_STEPS,
    Score,
    TrainingFacts,
    few_steps,
    not_ordered,
    overfit,
    spike,
    stood_still,
    teacher_above,
    training_warnings,
)

STEPS = 1000


def curve(
    *losses: float, num_steps: int = STEPS, noise: float = 0.01, seed: int = 0
) -> tuple[list[float], list[float]]:
    """100 points of a noisy curve through losses at equal distances, the first at step 0."""
    steps = np.linspace(num_steps / 100, num_steps, 100)
    smooth = np.interp(steps, np.linspace(0, num_steps, len(losses)), losses)
    return steps.tolist(), (smooth + noise * np.random.default_rng(seed).standard_normal(100)).tolist()


GOOD = curve(2.3, 1.2, 0.9, 0.75, 0.65, 0.6, 0.58, 0.57, 0.57, 0.57)


def facts(**changes: Any) -> TrainingFacts:
    """A training that went well."""
    routes = [Score("narrow", 0.90, 1000), Score("middle", 0.92, 1000), Score("wide", 0.93, 1000)]
    good = TrainingFacts(
        num_steps=STEPS,
        epochs=30,
        batch_size=64,
        teacher="ema",
        curves={"largest": GOOD, "narrow": curve(2.3, 1.7, 1.2, 0.9, 0.8, 0.75, 0.7, 0.68, 0.67)},
        routes=routes,
        pairs=[(0, 1), (0, 2), (1, 2)],
        outside=Score("largest", 0.935, 1000),
        train=Score("wide", 0.97, 1000),
    )
    return replace(good, **changes)


def test_a_training_that_went_well_is_warned_about_nothing_and_so_is_one_of_which_nothing_is_known() -> None:
    assert training_warnings(facts()) == ()
    assert training_warnings(TrainingFacts()) == ()


def test_few_steps_are_told_by_their_number_with_the_settings_that_give_more() -> None:
    found = few_steps(facts(num_steps=240, batch_size=128, curves={}))
    assert found is not None
    assert "240 steps" in found.text
    assert "supernet.train.epochs 125 (now 30) gives about 1,000" in found.way_out
    assert "such as 32 (now 128)" in found.way_out
    assert few_steps(facts(num_steps=MIN_STEPS, curves={})) is None
    assert few_steps(facts(num_steps=240, is_from_scratch=False)) is None, "weights that were trained before need fewer"


def test_a_loss_that_still_falls_where_a_short_training_ends_is_too_few_steps_too() -> None:
    falling = {"largest": curve(2.3, 2.1, 1.9, 1.7, 1.5, 1.3)}
    found = few_steps(facts(curves=falling))
    assert found is not None
    assert "still falling" in found.text
    assert found.numbers["falling_share"] == pytest.approx(0.2, abs=0.05)
    long = {"largest": curve(2.3, 2.1, 1.9, 1.7, 1.5, 1.3, num_steps=20_000)}
    assert few_steps(facts(num_steps=20_000, curves=long)) is None, "a learning rate that goes to 0 does that"


@pytest.mark.parametrize(
    ("losses", "share"),
    [
        ((2.3, 2.3, 2.3, 1.5, 1.0, 0.8, 0.7, 0.65, 0.65), 0.25),  # at the start
        ((2.3, 1.6, 1.6, 1.6, 1.0, 0.8, 0.7, 0.65, 0.65), 0.25),  # in between
        ((2.3, 2.3), 1.0),  # it never fell
    ],
)
def test_a_loss_that_stood_still_is_told_with_its_share(losses: Sequence[float], share: float) -> None:
    still = curve(*losses, noise=0.003)
    found = stood_still(facts(curves={"largest": GOOD, "0.5": still}))
    assert found is not None
    assert found.text.startswith("the loss of sub-network 0.5 did not decrease")
    both = stood_still(facts(curves={"largest": GOOD, "0.5": still, "0.25": still}))
    assert both is not None
    assert " and of 1 more sub-network did not decrease" in both.text
    assert found.numbers["worst"] == "0.5"
    assert found.numbers["share"] == pytest.approx(share, abs=0.08)


def test_a_loss_that_stands_still_at_its_end_has_converged() -> None:
    assert stood_still(facts(curves={"largest": curve(2.3, 1.0, 0.6, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5)})) is None


def test_a_loss_on_a_level_that_the_learning_rate_sets_does_not_stand_still() -> None:
    """As with a large weight decay: most is learnt, and the rest comes as the rate falls."""
    levelled = curve(2.3, 1.2, 0.72, 0.7, 0.7, 0.69, 0.62, 0.56, 0.53, noise=0.003)
    assert stood_still(facts(curves={"largest": levelled})) is None


@pytest.mark.parametrize("num_rows", [12, 20, 33])
def test_a_short_curve_that_falls_from_its_first_row_on_did_not_stand_still(num_rows: int) -> None:
    steps = np.arange(1, num_rows + 1) * STEPS / num_rows
    assert stood_still(facts(curves={"largest": (steps.tolist(), (2.3 * np.exp(-3 * steps / STEPS)).tolist())})) is None


def test_a_sub_network_that_joins_late_did_not_stand_still_before_that() -> None:
    steps, losses = curve(2.3, 1.2, 0.9, 0.75, 0.65, 0.6)
    late = ([STEPS / 4 + 3 / 4 * step for step in steps], losses)
    assert stood_still(facts(curves={"largest": GOOD, "narrow": late})) is None


def test_the_way_out_of_standing_still_depends_on_who_teaches() -> None:
    curves = {"narrow": curve(2.3, 2.3, 2.3, 1.0, 0.7)}
    ways = []
    for teacher, trust in (("ema", "full"), ("ema", "label_probability"), ("none", "full")):
        found = stood_still(facts(curves=curves, teacher=teacher, trust=trust))
        assert found is not None
        ways.append(found.way_out)
    assert ["trust: label_probability" in way for way in ways] == [True, False, False]
    assert ["lower supernet.train.lr" in way for way in ways] == [True, True, False]
    assert "raise supernet.train.lr" in ways[2]


def test_a_spike_is_told_with_its_step_and_the_noise_of_batches_is_none() -> None:
    steps, losses = GOOD
    jumped = [*losses]
    jumped[60] = 1.9
    found = spike(facts(curves={"largest": (steps, jumped)}))
    assert found is not None
    assert found.numbers["step"] == 610
    assert "to 1.9" in found.text
    assert spike(facts(curves={"largest": curve(2.3, 1.2, 0.8, 0.6, 0.6, noise=0.15)})) is None
    early = [*losses]
    early[1] = 3.5
    assert spike(facts(curves={"largest": (steps, early)})) is None, "nothing was learnt yet"


def answers(*shares: float, num_images: int = 1000, seed: int = 0) -> np.ndarray:
    """[N, K]: sub-networks that err on the same images as far as they can."""
    luck = np.random.default_rng(seed).random(num_images)
    return np.stack([luck < share for share in shares], axis=1)


def test_a_wider_one_that_is_worse_beyond_noise_is_told_and_one_within_noise_is_not() -> None:
    correct = answers(0.90, 0.86, 0.93)
    routes = [Score(name, float(own.mean()), 1000) for name, own in zip("abc", correct.T, strict=True)]
    found = not_ordered(facts(routes=routes, correct=correct))
    assert found is not None
    assert (found.numbers["narrow"], found.numbers["wide"]) == ("a", "b")
    assert not_ordered(facts(routes=routes, correct=correct, pairs=[(0, 2), (1, 2)])) is None, "a is no part of b"
    near = answers(0.90, 0.897, 0.93)
    assert not_ordered(facts(correct=near)) is None


def test_many_pairs_of_equally_good_ones_raise_no_false_alarm() -> None:
    rng = np.random.default_rng(0)
    pairs = [(narrow, wide) for wide in range(12) for narrow in range(wide)]
    routes = [Score(str(k), 0.8, 500) for k in range(12)]
    alarms = sum(
        not_ordered(facts(routes=routes, pairs=pairs, correct=rng.random((500, 12)) < 0.8)) is not None
        for _ in range(60)
    )
    assert alarms <= 6, "5 % of all sweeps, however many sub-networks they have"


def test_without_the_images_only_a_large_difference_counts() -> None:
    routes = [Score("a", 0.90, 300), Score("b", 0.87, 300)]
    assert not_ordered(facts(routes=routes, pairs=[(0, 1)])) is None
    routes = [Score("a", 0.90, 300), Score("b", 0.80, 300)]
    assert not_ordered(facts(routes=routes, pairs=[(0, 1)])) is not None


def test_a_teacher_far_above_the_widest_route_is_told() -> None:
    routes = [Score("narrow", 0.67, 309), Score("wide", 0.683, 309)]
    found = teacher_above(facts(routes=routes, outside=Score("largest", 0.79, 309)))
    assert found is not None
    assert "10.7 points" in found.text
    assert teacher_above(facts(routes=routes, outside=Score("largest", 0.70, 309))) is None, "within noise"
    assert teacher_above(facts(routes=routes, outside=None)) is None, "the teacher is a route itself"


def test_train_and_val_apart_are_told_by_the_same_sub_network() -> None:
    routes = [Score("narrow", 0.70, 1000), Score("wide", 0.80, 1000)]
    found = overfit(facts(routes=routes, train=Score("wide", 0.99, 1000)))
    assert found is not None
    assert found.numbers["gap"] == pytest.approx(0.19)
    assert overfit(facts(routes=routes, train=Score("wide", 0.86, 1000))) is None
    assert overfit(facts(routes=routes, train=Score("other", 0.99, 1000))) is None
    assert overfit(facts(routes=[Score("wide", 0.8, 10)], train=Score("wide", 0.91, 10))) is None, "ten images"


@pytest.mark.slow
def test_a_warning_can_be_stored_and_reads_as_one_line() -> None:
    found = few_steps(facts(num_steps=100))
    assert found is not None
    assert set(found.to_json()) == {"code", "text", "way_out", "numbers"}
    assert "\n" not in str(found)
