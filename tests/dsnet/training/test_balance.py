"""Uneven classes: weights and balanced epochs, exact and resumable."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dsnet.data.normalization import Normalization
from dsnet.data.settings import Augmentation
from dsnet.data.training_images import InMemoryImages
from dsnet.families import create
from dsnet.metrics import balanced_top1, find_metric, top1_by_class
from dsnet.routing.table_run import static_run
from dsnet.training.balance import class_weights, epoch_order
from dsnet.training.losses import distillation, soft_cross_entropy
from dsnet.training.settings import TrainSettings
from dsnet.training.supernet import TrainingCallbacks, train_supernet
from dsnet.training.supernet_run import SupernetRun
from tests.dsnet.cases import task
from tests.dsnet.samples import random_table

counts = st.lists(st.integers(0, 30), min_size=2, max_size=6).filter(lambda each: sum(each) > 0)


@settings(deadline=None)
@given(counts=counts, seed=st.integers(0, 99))
def test_a_balanced_epoch_has_equally_many_images_of_each_class(counts: list[int], seed: int) -> None:
    labels = torch.from_numpy(np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts)))
    order = epoch_order(labels, "sampling", torch.Generator().manual_seed(seed))
    assert len(order) == len(labels)
    present = [label for label, count in enumerate(counts) if count]
    drawn = Counter(labels[order].tolist())
    assert sorted(drawn) == present
    assert max(drawn.values()) - min(drawn.values()) <= 1
    times = Counter(order.tolist())
    for label in present:  # an image comes again only after all others of its class
        of_class = [times[row] for row in np.flatnonzero(labels.numpy() == label).tolist()]
        assert max(of_class) - min(of_class) <= 1
    again = epoch_order(labels, "sampling", torch.Generator().manual_seed(seed))
    assert torch.equal(order, again)


def test_without_balance_the_order_is_the_permutation_that_it_always_was() -> None:
    labels = torch.tensor([0, 0, 1, 0, 2])
    for balance in ("none", "weights"):
        order = epoch_order(labels, balance, torch.Generator().manual_seed(3))
        assert torch.equal(order, torch.randperm(5, generator=torch.Generator().manual_seed(3)))


@settings(deadline=None)
@given(counts=counts)
def test_weights_give_each_class_the_same_share_and_the_images_the_mean_one(counts: list[int]) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    weights = class_weights(labels, len(counts))
    assert float(weights[labels].double().mean()) == pytest.approx(1)
    shares = [float(weights[label]) * count for label, count in enumerate(counts) if count]
    assert shares == pytest.approx([sum(counts) / len(shares)] * len(shares))
    assert all(float(weights[label]) == 0 for label, count in enumerate(counts) if not count)


def test_the_weighted_loss_is_that_of_torch() -> None:
    logits, labels = torch.randn(9, 4, dtype=torch.float64), torch.arange(9) % 4
    weights = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    target = F.one_hot(labels, 4).double()
    expected = F.cross_entropy(logits, labels, weight=weights, reduction="sum") / 9  # not divided by the weights
    torch.testing.assert_close(soft_cross_entropy(logits, target, weights[labels]), expected)
    none = torch.zeros(9, dtype=torch.float64)
    torch.testing.assert_close(distillation(logits, target, target, none, 2.0, weights[labels]), expected)
    assert torch.equal(soft_cross_entropy(logits, target, torch.ones(9).double()), soft_cross_entropy(logits, target))


def train(folder: Path, balance: str, stop_after: int | None = None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 40 + [1] * 6 + [2] * 2)
    images = torch.randint(0, 256, (48, 3, 8, 8), generator=generator, dtype=torch.uint8)
    net = create("ds_tiny", task(num_classes=3, image_size=8), {"num_routes": 3}, seed=0)
    run = SupernetRun(
        train=replace(TrainSettings(), epochs=2, batch_size=16, warmup_epochs=0.0),
        augmentation=Augmentation(),
        normalization=Normalization((127.0,) * 3, (64.0,) * 3),
        balance=balance,  # type: ignore[arg-type]
    )
    assert SupernetRun.from_json(run.to_json()) == run
    assert ("balance" in run.to_json()) == (balance != "none")
    steps = iter(range(1000))
    callbacks = TrainingCallbacks(should_stop=lambda: stop_after is not None and next(steps) >= stop_after)
    stem = train_supernet(net, InMemoryImages(images, labels, Augmentation()), run, folder=folder, callbacks=callbacks)
    if stem is None:
        return train(folder, balance)
    return net.state_dict()


@pytest.mark.parametrize("balance", ["weights", "sampling"])
def test_balanced_training_differs_and_resumes_bit_identically(tmp_path: Path, balance: str) -> None:
    whole = train(tmp_path / "whole", balance)
    resumed = train(tmp_path / "resumed", balance, stop_after=4)
    plain = train(tmp_path / "plain", "none")
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    assert any(not torch.equal(tensor, plain[name]) for name, tensor in whole.items())


def test_balanced_top1_is_the_mean_over_the_classes() -> None:
    table = random_table()
    run = static_run(table, 1)
    correct, labels = np.asarray(table.correct1)[:, 1], np.asarray(table.labels)
    expected = {
        label: (int((labels == label).sum()), correct[labels == label].mean()) for label in set(labels.tolist())
    }
    found = top1_by_class(run, table)
    assert found.keys() == expected.keys()
    for label, (count, accuracy) in expected.items():
        assert found[label] == (count, pytest.approx(accuracy))
    metric = find_metric("balanced_top1")
    assert metric is not None
    assert metric.of_run is balanced_top1
    assert balanced_top1(run, table) == pytest.approx(np.mean([accuracy for _, accuracy in expected.values()]))
