"""The noise that channels tolerate: gradients, what it leaves as it was, and what it finds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsnet.data.images import ImageSet
from dsnet.data.sources import InMemorySource
from dsnet.data.splits import Splits
from dsnet.network.batchnorm import batch_statistics
from dsnet.network.supernet import Supernet
from dsnet.space.cost import subnet_cost
from dsnet.structure import noise
from dsnet.structure.data import ORDER_BATCH, ORDER_BATCHES, order_batches, order_madds
from dsnet.structure.noise import NoisyNetwork, noise_loss, noise_tolerances
from dsnet.structure.order import channel_orders
from tests.dsnet.cases import CASES
from tests.dsnet.samples import random_images, random_labels, random_pixels, shaken
from tests.dsnet.structure.problems import NET, network, problem_of

PADDED = next(case for case in CASES if str(case) == "ds_resnet-padded")
IDS = next(case for case in CASES if str(case).startswith("tests.dsnet.nets:Stream-ids"))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(supernet: Supernet) -> dict[str, int]:
    """The numbers of the channel groups by name."""
    return {group.name: number for number, group in enumerate(supernet.spec.groups)}


def alpha_by_name(noisy: NoisyNetwork, log_alpha: Tensor) -> dict[str, Tensor]:
    """The alpha of every channel of a channel group that has noise, by the name of the group."""
    groups, found = noisy.supernet.spec.groups, noisy.by_group(log_alpha.double())
    return {groups[number].name: found[number].exp().float() for number in noisy.first}


@pytest.mark.parametrize("name", [NET, "padded"])
def test_the_gradient_of_the_loss_is_that_of_finite_differences(name: str) -> None:
    supernet = (shaken(network(problem_of())) if name == NET else PADDED.supernet()).double().eval()
    noisy = NoisyNetwork.of(supernet)
    log_alpha = noisy.log_alpha(0.3)
    log_alpha.data += 0.3 * torch.randn(noisy.num_amounts, generator=seeded(1), dtype=torch.float64)
    drawn, images, labels = noisy.drawn(seeded(2)), random_images(4).double(), random_labels(4)

    def loss(at: Tensor) -> Tensor:
        return noise_loss(noisy, at, drawn, images, labels)

    with batch_statistics(supernet):
        (gradient,) = torch.autograd.grad(loss(log_alpha), log_alpha)
        assert gradient.abs().min() > 0
        ways = [
            *torch.eye(noisy.num_amounts, dtype=torch.float64)[:: noisy.num_amounts // 6],
            gradient / gradient.norm(),
        ]
        for way in ways:
            with torch.no_grad():
                difference = (loss(log_alpha + 1e-6 * way) - loss(log_alpha - 1e-6 * way)) / 2e-6
            torch.testing.assert_close(gradient @ way, difference, rtol=1e-5, atol=1e-8)


@torch.no_grad()
def test_without_noise_it_is_the_plain_network() -> None:
    supernet = IDS.supernet()
    noisy, images = NoisyNetwork.of(supernet), random_images(3)
    widest = supernet.subnets.at(supernet.spec.max_widths)
    none = torch.full((noisy.num_amounts,), -math.inf)
    with batch_statistics(supernet):
        plain = supernet(images, widest)
        assert torch.equal(noisy.logits(none, noisy.drawn(seeded()), images), plain)
        assert not torch.allclose(noisy.logits(none.fill_(-3), noisy.drawn(seeded()), images), plain, atol=1e-3)


def test_weights_with_noise_by_hand() -> None:
    """Filters of channels that are added share an alpha; one that channels of several writers
    share gets the sum of theirs; the classes have no noise."""
    supernet = network(problem_of())
    noisy, places = NoisyNetwork.of(supernet), numbers(supernet)
    log_alpha = torch.randn(noisy.num_amounts, generator=seeded(1))
    alpha = alpha_by_name(noisy, log_alpha)
    drawn = noisy.drawn(seeded())
    weights = noisy.weights(log_alpha, drawn)
    assert "body.fc.weight" not in weights
    for name, group in (
        ("stem", "stem"),
        ("block.project", "stem"),
        ("block.depthwise", "block_expand_0"),
        ("block.attention.expand", "block_expand_0"),
        ("block.attention.reduce", "block_attention_reduce"),
        ("down", "down"),
        ("skip", "down"),
    ):
        whole = f"body.{name}.weight"
        plain = supernet.get_parameter(whole).detach()
        for row, weight in enumerate(plain):
            std = (weight**2).sum().div(weight.numel()).sqrt()
            wanted = weight + alpha[group][row] * std * drawn[whole][row]
            torch.testing.assert_close(weights[whole][row], wanted, msg=f"{whole}, {row}, {places[group]}")
    assert noisy.num_amounts == sum(len(value) for value in alpha.values())

    stream = IDS.supernet()
    noisy = NoisyNetwork.of(stream)
    log_alpha = torch.randn(noisy.num_amounts, generator=seeded(1))
    alpha = alpha_by_name(noisy, log_alpha)
    drawn = noisy.drawn(seeded())
    name, total = "body.depthwise.weight", torch.zeros(8)
    writers = ("stem", "block_project", "branch_0", "minus")
    for group in writers:
        own = stream.spec.groups[numbers(stream)[group]]
        total[list(own.channels(own.max_width))] += alpha[group]
    plain = stream.get_parameter(name).detach()
    std = plain.square().mean((1, 2, 3), keepdim=True).sqrt()
    torch.testing.assert_close(
        noisy.weights(log_alpha, drawn)[name], plain + total[:, None, None, None] * std * drawn[name]
    )


@torch.no_grad()
def disconnect(supernet: Supernet, group: int, channels: list[int]) -> None:
    """Zero weights for everything that reads channels of a group."""
    for name, axes in supernet.axes().items():
        start = 0
        for part, repeat, present in axes[1].parts if len(axes) > 1 and axes[1] is not None else ():
            if part == group:
                columns = torch.tensor(
                    [start + channel * repeat + each for channel in channels for each in range(repeat)]
                )
                supernet.get_parameter(name)[:, columns] = 0
            start += repeat * present


@torch.no_grad()
def taught(supernet: Supernet, classifier: str) -> tuple[Tensor, Tensor]:
    """Images with the labels that the network gives them with certainty, of about equal numbers, so
    that noise on every channel that is read does harm; changes the classifier."""
    images, widest = random_images(32), supernet.subnets.at(supernet.spec.max_widths)
    weight, bias = (supernet.get_parameter(f"{classifier}.{name}") for name in ("weight", "bias"))
    with batch_statistics(supernet):
        logits = supernet(images, widest)
        scale = 10 / logits.std(0).mean()
        bias.add_(-logits.mean(0)).mul_(scale)
        weight.mul_(scale)
        return images, supernet(images, widest).argmax(1)


@pytest.mark.parametrize(
    ("family", "group", "classifier"),
    [(NET, "block_expand_0", "body.fc"), (NET, "down", "body.fc"), ("ds_tiny", "stage1", "classifier")],
)
def test_channels_that_nothing_reads_stand_last(
    family: str, group: str, classifier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noise, "STEPS", 10)
    problem = problem_of(family, order="noise", pin="gate" if family == "ds_tiny" else "none")
    supernet = shaken(network(problem, family))
    number = numbers(supernet)[group]
    width = supernet.spec.groups[number].max_width
    planted = sorted(torch.randperm(width, generator=seeded(4))[: width // 2].tolist())
    disconnect(supernet, number, planted)
    order = channel_orders(problem, supernet, [taught(supernet, classifier)])[number]
    assert sorted(order[width - len(planted) :]) == planted


def test_the_seed_draws_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "STEPS", 2)
    supernet, batches = network(problem_of()), [(random_images(4), random_labels(4))]
    first, again, other = (noise_tolerances(supernet, batches, seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[group], again[group]) for group in first)
    assert any(not torch.equal(first[group], other[group]) for group in first)


@pytest.mark.parametrize("num_images", [300, ORDER_BATCHES * ORDER_BATCH + 1])
def test_the_cost_counts_every_pass(num_images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images stand in the order of their classes, and every batch has some of each class."""
    shown = []

    def counted(noisy: Any, log_alpha: Tensor, noise: Any, images: Tensor, labels: Tensor) -> Tensor:
        shown.append(len(labels))
        return log_alpha.sum()

    monkeypatch.setattr(noise, "noise_loss", counted)
    problem = problem_of(order="noise")
    labels = torch.arange(num_images) * 5 // num_images
    source = InMemorySource(ImageSet.create("cifar10", random_pixels(num_images, 8), labels, list("abcde")))
    splits = Splits(*(np.arange(count) for count in (num_images, 0, 0, 0)))
    batches = list(order_batches(source, splits, problem.run))
    assert sum(len(own) for _, own in batches) == min(num_images, ORDER_BATCHES * ORDER_BATCH)
    assert all(own.bincount().min() > 8 and len(own) <= ORDER_BATCH for _, own in batches)
    noise_tolerances(network(problem), batches)
    madds = subnet_cost(problem.spec, problem.subnets.at(problem.widest), problem.image_size).madds
    assert order_madds(problem, num_images) == 3 * sum(shown) * madds
    assert order_madds(problem_of(order="taylor"), num_images) == 3 * sum(len(own) for _, own in batches) * madds
    assert order_madds(problem_of(order="random"), num_images) == 0
