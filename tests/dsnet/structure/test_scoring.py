"""Scores on the hold-out, and the division of the training images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsnet.errors import ConfigError
from dsnet.structure.scoring import HoldOutScorer, holdout_warning, split_holdout
from tests.dsnet.cases import CASES, Case
from tests.dsnet.samples import NORMALIZATION, random_labels, random_pixels, without_dropout

LABELS = np.repeat(np.arange(3), (50, 30, 20))
NETS = [
    case
    for case in CASES
    if case.family in ("ds_tiny", "ds_resnet", "tests.dsnet.nets:Residual") and case.name == case.norm
]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.33, 0.9])
def test_the_holdout_is_stratified_and_disjoint(share: float) -> None:
    rows = np.arange(100) * 2 + 5
    kept, held = split_holdout(rows, LABELS, share, seed=3)
    assert sorted([*kept, *held]) == rows.tolist()
    assert list(kept) == sorted(kept)
    assert list(held) == sorted(held)
    assert len(held) == round(100 * share)
    counts = np.bincount(LABELS[(held - 5) // 2], minlength=3)
    assert (np.abs(counts - share * np.array([50, 30, 20])) < 1).all()
    again = split_holdout(rows, LABELS, share, seed=3)
    assert np.array_equal(again[1], held)
    other = split_holdout(rows, LABELS, share, seed=4)[1]
    assert len(other) == len(held)
    assert not np.array_equal(other, held)


def test_an_empty_part_is_refused() -> None:
    for share, count in ((0.001, 0), (0.999, 100)):
        with pytest.raises(ConfigError, match=rf"holdout is {share}, which comes to {count} of the 100 images"):
            split_holdout(np.arange(100), LABELS, share, seed=0)


def test_a_holdout_that_cannot_see_a_percent_is_warned_of() -> None:
    assert holdout_warning(101) is None
    assert "has 100 images, so that one image is 1 % of accuracy" in (holdout_warning(100) or "")
    assert "one image is 2 %" in (holdout_warning(50) or "")


def scorer_of(case: Case, count: int = 30, batch_size: int = 10) -> HoldOutScorer:
    return HoldOutScorer(
        case.supernet(), random_pixels(count), random_labels(count), NORMALIZATION, batch_size=batch_size
    )


@pytest.mark.parametrize("case", NETS, ids=str)
def test_a_score_changes_nothing_and_normalises_by_the_batch(case: Case) -> None:
    scorer = scorer_of(case)
    net = scorer.supernet
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [part.training for part in net.modules()]
    momenta = [norm.momentum for norm in net.batch_norms()]
    declared = net.subnets.all[0].widths
    undeclared = tuple(max(1, width - 1) if width > 2 else width for width in declared)
    vectors = [declared, net.spec.max_widths, *([] if case.norm == "private_affine" else [undeclared])]
    first = [scorer.score(widths) for widths in vectors]
    again = [scorer.score(widths) for widths in vectors]
    assert [score.num_correct for score in first] == [score.num_correct for score in again]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert modes == [part.training for part in net.modules()]
    assert momenta == [norm.momentum for norm in net.batch_norms()]
    assert all(score.num_images == 30 and score.seconds > 0 for score in first)
    # Computed again: training mode without dropout, on the images of each batch.
    without_dropout(net)
    images, labels = NORMALIZATION.apply(random_pixels(30)), random_labels(30)
    for widths, score in zip(vectors, first, strict=True):
        subnet = net.subnets.at(widths)
        with torch.no_grad():
            right = [(net(images[part::3], subnet).argmax(1) == labels[part::3]).sum() for part in range(3)]
        assert score.num_correct == int(sum(right))


@torch.no_grad()
def test_weights_that_are_not_finite_leave_the_statistics_as_they_are() -> None:
    case = next(case for case in CASES if str(case) == "ds_tiny-private_stats")
    scorer = scorer_of(case)
    scorer.supernet.get_parameter("stem.weight")[0] = torch.inf
    scorer.score(scorer.supernet.subnets.largest.widths)
    assert all(buffer.isfinite().all() for buffer in scorer.supernet.buffers())


def test_batches_are_about_equally_large_and_mix_the_classes() -> None:
    case = next(case for case in CASES if str(case) == "ds_tiny-private_stats")
    scorer = HoldOutScorer(case.supernet(), random_pixels(21), torch.arange(21) // 7, NORMALIZATION, batch_size=10)
    sizes = [len(labels) for _, labels in scorer._batches]
    assert sizes == [7, 7, 7]
    assert all(torch.bincount(labels).tolist() in ([3, 2, 2], [2, 3, 2], [2, 2, 3]) for _, labels in scorer._batches)
