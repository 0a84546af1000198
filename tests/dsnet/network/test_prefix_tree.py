"""Sub-networks run together, each shared segment once, against each alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from dsnet.network.prefix_tree import by_prefix, each_logits
from dsnet.network.supernet import Supernet, TrunkOutput
from dsnet.space.spec import Subnet
from tests.dsnet.cases import CASES, Case
from tests.dsnet.samples import random_images, small_supernet

each_case = pytest.mark.parametrize("case", CASES, ids=str)


def counting_segments(supernet: Supernet, monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Counts the calls of `upto_gate`, by gate."""
    counts: Counter[int] = Counter()
    inner: Any = type(supernet).upto_gate

    def counted(self: Supernet, gate: int, x: Tensor, subnet: Subnet) -> TrunkOutput:
        counts[gate] += 1
        return inner(self, gate, x, subnet)

    monkeypatch.setattr(type(supernet), "upto_gate", counted)
    return counts


@pytest.mark.slow
@each_case
@torch.no_grad()
def test_together_equals_one_by_one(case: Case) -> None:
    supernet = case.supernet()
    images = random_images(2)
    subnets = supernet.subnets.all[::-1]
    answers = list(each_logits(supernet, images, subnets))
    assert sorted(subnet.name for subnet, _ in answers) == sorted(subnet.name for subnet in subnets)
    for subnet, logits in answers:
        assert torch.equal(logits, supernet(images, subnet))


@each_case
@torch.no_grad()
def test_each_shared_segment_runs_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    supernet = case.supernet()
    counts = counting_segments(supernet, monkeypatch)
    for _ in each_logits(supernet, random_images(1), supernet.subnets.all):
        pass
    for gate, spec in enumerate(supernet.spec.gates):
        assert counts[gate] == len({subnet.widths[: spec.num_prefix_groups] for subnet in supernet.subnets.all})


@pytest.mark.slow
@each_case
@torch.no_grad()
def test_every_node_is_heard_of_once_with_what_its_gate_sees(case: Case) -> None:
    supernet = case.supernet()
    images = random_images(2)
    heard: list[tuple[int, tuple[int, ...]]] = []

    def on_node(gate: int, subnet: Subnet, output: TrunkOutput) -> None:
        heard.append((gate, subnet.prefix(supernet.spec.num_prefix_groups(gate))))
        x = images
        for before in range(gate):
            x = supernet.upto_gate(before, x, subnet).features
        alone = supernet.upto_gate(gate, x, subnet)
        assert torch.equal(output.gate_input, alone.gate_input)
        assert torch.equal(output.hidden, alone.hidden)

    for _ in each_logits(supernet, images, supernet.subnets.members, on_node=on_node):
        pass
    nodes = {
        (gate, subnet.prefix(spec.num_prefix_groups))
        for gate, spec in enumerate(supernet.spec.gates)
        for subnet in supernet.subnets
    }
    assert set(heard) == nodes
    assert len(heard) == len(nodes)


@each_case
def test_groups_share_a_prefix_and_keep_the_order(case: Case) -> None:
    supernet = case.supernet()
    for gate, spec in enumerate(supernet.spec.gates):
        groups = by_prefix(supernet, supernet.subnets.all, gate)
        prefixes = [{subnet.widths[: spec.num_prefix_groups] for subnet in group} for group in groups]
        assert all(len(prefix) == 1 for prefix in prefixes)
        assert len(set().union(*prefixes)) == len(groups)
        firsts = [supernet.subnets.all.index(group[0]) for group in groups]
        assert firsts == sorted(firsts)
        assert sum(len(group) for group in groups) == len(supernet.subnets.all)


def test_it_begins_at_any_gate() -> None:
    supernet = small_supernet("ds_resnet")
    images = random_images(2)
    first, second = supernet.subnets[0], supernet.subnets[1]
    features = supernet.upto_gate(0, images, first).features
    with torch.no_grad():
        answers = dict(each_logits(supernet, features, [first, second], gate=1))
        features = supernet.upto_gate(1, features, first).features
        assert torch.equal(answers[first], supernet(images, first))
        assert torch.equal(next(each_logits(supernet, features, [first], gate=2))[1], answers[first])


def test_a_teacher_of_other_widths_is_a_group_of_its_own() -> None:
    supernet = small_supernet("ds_tiny")
    groups = by_prefix(supernet, supernet.subnets.all, 0)
    assert groups == [list(supernet.subnets.members), [supernet.subnets.teacher]]
