"""Expected cost of a training in MAdds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsnet.space.cost import subnet_cost
from dsnet.space.subnet_set import SubnetSet
from dsnet.space.width_space import WidthSpace
from dsnet.training.settings import REGIMES, TrainSettings
from dsnet.training.train_cost import step_madds, training_madds
from tests.dsnet.samples import small_run, small_set

TRAIN = TrainSettings(epochs=3, batch_size=8)
NUM_IMAGES = 21
SHOWN = 3 * 2 * 8
"""Images that three epochs of two whole batches show."""


def cost(subnets: SubnetSet, regime: str, **changes: object) -> float:
    run = small_run(train=TRAIN, regime=replace(REGIMES[regime], num_random=1), **changes)
    return training_madds(run, subnets, NUM_IMAGES, 16)


def test_one_network_costs_three_passes_an_image() -> None:
    subnets = small_set("ds_tiny")
    alone = SubnetSet(subnets.spec, (subnets.largest,))
    madds = subnet_cost(subnets.spec, subnets.largest, 16).madds
    assert cost(alone, "ce") == SHOWN * 3 * madds


def test_all_widths_cost_what_a_step_costs() -> None:
    subnets = small_set("ds_tiny")
    whole = step_madds(subnets.spec, subnets.all, [], 16)
    assert cost(subnets, "s_net") == pytest.approx(SHOWN * whole)


def test_drawn_sub_networks_cost_their_mean_and_teachers_their_forward_pass() -> None:
    subnets = small_set("ds_tiny")
    order = [subnets[number] for number in subnets.by_madds()]
    largest, smallest = subnets.largest, order[0]
    between = [subnet for subnet in order[1:] if subnet.widths != largest.widths]
    bounds = [step_madds(subnets.spec, [largest, each, smallest], [largest], 16) for each in between]
    assert SHOWN * min(bounds) <= cost(subnets, "ib") <= SHOWN * max(bounds)
    ends = [step_madds(subnets.spec, [largest, each, smallest], [], 16) for each in between]
    assert SHOWN * min(ends) <= cost(subnets, "us_net") <= SHOWN * max(ends)
    assert cost(subnets, "us_net") < cost(subnets, "ib")


def test_any_widths_of_a_space_cost_more_than_its_smallest_and_less_than_its_widest() -> None:
    subnets = small_set("ds_tiny")
    space = WidthSpace(0.25, 2)
    widest = step_madds(subnets.spec, [subnets.largest], [], 16)
    found = cost(subnets, "us_net", width_space=space)
    assert SHOWN * widest < found < SHOWN * 3 * widest


def test_a_beginning_with_the_largest_alone_is_cheaper() -> None:
    subnets = small_set("ds_tiny")
    half = replace(small_run().bootstrapping, largest_first=0.5)
    none = replace(half, largest_first=0.0)
    alone = SHOWN * step_madds(subnets.spec, [subnets.largest], [], 16)
    whole = cost(subnets, "ib", bootstrapping=none)
    assert cost(subnets, "ib", bootstrapping=half) == pytest.approx((alone + whole) / 2)
