"""What holds for every registered family."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from dsnet.families import create, family_names, rebuild
from dsnet.materialize import materialize, materialize_tail, materialize_trunk
from dsnet.space import Subnet
from dsnet.supernet import EVIDENCE_PARTS, restrict, state_for_saving
from tests.dsnet.samples import random_images, small_supernet, task

pytestmark = pytest.mark.parametrize("family", family_names())


@torch.no_grad()
def test_sliced_equals_materialised(family: str) -> None:
    supernet = small_supernet(family)
    images = random_images(3, 13)
    for subnet in supernet.subnets.all:
        sliced = supernet(images, subnet)
        torch.testing.assert_close(materialize(supernet, subnet)(images), sliced, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(materialize(supernet, subnet, fold_bn=True)(images), sliced, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_materialised_trunk_and_tail_equal_the_sliced_halves(family: str) -> None:
    supernet = small_supernet(family)
    images = random_images(2)
    subnet = supernet.subnets[-1]
    expected = supernet.trunk(images, subnet)
    met = materialize_trunk(supernet, subnet)(images)
    torch.testing.assert_close(met.features, expected.features, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(met.gate_input, expected.gate_input, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(met.hidden, expected.hidden, rtol=1e-6, atol=1e-6)
    tail = materialize_tail(supernet, subnet)
    torch.testing.assert_close(tail(expected.features), supernet.tail(expected.features, subnet), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_materialised_module_is_plain_contiguous_and_shares_nothing(family: str) -> None:
    supernet = small_supernet(family)
    images = random_images(2)
    plain = materialize(supernet, supernet.subnets[0])
    before = plain(images)
    for parameter in supernet.parameters():
        parameter.add_(1.0)
    assert torch.equal(plain(images), before)
    assert not plain.training
    assert all(p.is_contiguous() and not p.requires_grad for p in plain.parameters())
    folded = materialize(supernet, supernet.subnets[0], fold_bn=True)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


@torch.no_grad()
def test_two_calls_do_not_influence_each_other(family: str) -> None:
    supernet = small_supernet(family)
    images = random_images(2)
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    alone = {subnet.name: supernet(images, subnet) for subnet in supernet.subnets.all}
    for subnet in reversed(supernet.subnets.all):
        for other in supernet.subnets.all:
            supernet(images, other)
            assert torch.equal(supernet(images, subnet), alone[subnet.name])
    assert all(torch.equal(value, before[name]) for name, value in supernet.state_dict().items())


@torch.no_grad()
def test_trunk_and_tail_equal_forward_and_members_share_the_trunk(family: str) -> None:
    supernet = small_supernet(family)
    images = random_images(2)
    shared = supernet.trunk(images, supernet.subnets[0])
    for subnet in supernet.subnets:
        assert torch.equal(supernet.trunk(images, subnet).features, shared.features)
        assert torch.equal(supernet.tail(shared.features, subnet), supernet(images, subnet))


@torch.no_grad()
def test_sub_networks_differ_from_each_other(family: str) -> None:
    supernet = small_supernet(family)
    images = random_images(2)
    logits = [supernet(images, subnet) for subnet in supernet.subnets.all]
    assert all(not torch.allclose(first, second) for first, second in pairwise(logits))


@torch.no_grad()
def test_each_image_is_classified_on_its_own(family: str) -> None:
    supernet = small_supernet(family)
    images = random_images(4)
    together = supernet(images, supernet.subnets[0])
    for index in range(4):
        torch.testing.assert_close(
            supernet(images[index : index + 1], supernet.subnets[0])[0], together[index], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("members", [(0,), (0, 2), (1, 2), (0, 1, 2)])
@torch.no_grad()
def test_restrict_preserves_logits(family: str, members: tuple[int, ...]) -> None:
    supernet = small_supernet(family)
    images = random_images(2)
    small = restrict(supernet, members)
    assert not small.training
    assert [subnet.widths for subnet in small.subnets] == [supernet.subnets[k].widths for k in members]
    for index, member in enumerate(members):
        assert torch.equal(small(images, small.subnets[index]), supernet(images, supernet.subnets[member]))


def test_restrict_holds_no_wider_weight_than_it_needs(family: str) -> None:
    supernet = small_supernet(family)
    small = restrict(supernet, [0])
    widths = small.subnets[0].widths
    assert tuple(group.max_width for group in small.spec.groups) == widths
    num_parameters = sum(p.numel() for p in small.parameters())
    assert num_parameters == sum(p.numel() for p in materialize(supernet, supernet.subnets[0]).parameters())
    assert num_parameters < sum(p.numel() for p in supernet.parameters())


@torch.no_grad()
def test_restrict_copies(family: str) -> None:
    supernet = small_supernet(family)
    small = restrict(supernet, [0])
    before = small(random_images(1), small.subnets[0])
    for parameter in supernet.parameters():
        parameter.zero_()
    assert torch.equal(small(random_images(1), small.subnets[0]), before)


def test_rebuilding_from_the_set_gives_a_net_that_takes_the_state(family: str) -> None:
    supernet = small_supernet(family)
    again = rebuild(supernet.subnets).eval()
    again.load_state_dict(state_for_saving(supernet))
    images = random_images(2)
    for subnet in supernet.subnets.all:
        assert torch.equal(again(images, subnet), supernet(images, subnet))


def test_training_one_sub_network_leaves_the_others_private_statistics_alone(family: str) -> None:
    supernet = small_supernet(family)
    trained = supernet.subnets[1]
    before = {name: buffer.clone() for name, buffer in supernet.named_buffers()}
    supernet.train()
    supernet(random_images(8), trained)
    own = {"_".join(map(str, trained.prefix(length))) for length in range(1, len(trained.widths) + 1)}
    changed = {name for name, buffer in supernet.named_buffers() if not torch.equal(buffer, before[name])}
    expected = {name for name in before if name.rpartition(".")[2].partition("_")[2] in own}
    assert changed == expected
    assert expected < set(before)


def test_statistics_are_keyed_by_the_prefix_of_widths_not_by_the_layers_width(family: str) -> None:
    subnets = create(family, task()).subnets
    first, second = subnets[0], subnets[1]
    # Same last width, another width before it: the statistics of the last layer must not be shared.
    crossed = Subnet("crossed", (*second.widths[:-1], first.widths[-1]))
    supernet = rebuild(replace(subnets, members=(first, crossed), teacher=None))
    last = supernet.batch_norms()[-1]
    assert last.statistics(first.widths)[0] is not last.statistics(crossed.widths)[0]


def test_a_foreign_sub_network_is_refused(family: str) -> None:
    supernet = small_supernet(family)
    widths = supernet.subnets[0].widths
    foreign = Subnet("foreign", (*widths[:-1], widths[-1] - 1))
    with pytest.raises(KeyError, match="no BatchNorm statistics for the widths"):
        supernet(random_images(1), foreign)


@torch.no_grad()
def test_evidence_is_what_the_gate_sees(family: str) -> None:
    supernet = small_supernet(family)
    trunk = supernet.trunk(random_images(3), supernet.subnets[0])
    positions = trunk.gate_input.flatten(2).double().numpy()
    for part, expected in (("mean", positions.mean(2)), ("deviation", positions.std(2)), ("maximum", positions.max(2))):
        torch.testing.assert_close(trunk.evidence(part).double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
    assert trunk.evidence("hidden") is trunk.hidden
    assert trunk.hidden.shape == (3, supernet.spec.gates[0].hidden)
    assert len(EVIDENCE_PARTS) == 4
    with pytest.raises(KeyError, match="unknown evidence 'colour'"):
        trunk.evidence("colour")


def test_by_trunk_groups_what_shares_a_trunk(family: str) -> None:
    supernet = small_supernet(family)
    groups = supernet.by_trunk(supernet.subnets.all)
    assert [subnet for group in groups for subnet in group] == list(supernet.subnets.all)
    assert groups[0] == list(supernet.subnets.members)
    assert len(groups) == 2


@torch.no_grad()
def test_dropout_touches_the_largest_in_training_only(family: str) -> None:
    options = {"dropout": 0.5}
    supernet = create(family, task(), options)
    images = random_images(8)
    for subnet in supernet.subnets.all:
        supernet.train()
        is_random = not torch.equal(supernet(images, subnet), supernet(images, subnet))
        assert is_random == (subnet == supernet.subnets.largest)
        supernet.eval()
        assert torch.equal(supernet(images, subnet), supernet(images, subnet))


def test_a_set_of_another_spec_is_refused(family: str) -> None:
    supernet = create(family, task())
    with pytest.raises(ValueError, match="another supernet"):
        type(supernet)(replace(supernet.spec, num_classes=3), supernet.subnets)
