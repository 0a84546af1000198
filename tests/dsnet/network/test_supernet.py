"""Properties of every registered family, for all options, normalisations and sets of
sub-networks."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dsnet.deploy.materialize import materialize, materialize_tail, materialize_trunk
from dsnet.families import create, get_family, rebuild
from dsnet.network.supernet import EVIDENCE_PARTS, Supernet, restrict, state_for_saving
from dsnet.space.spec import Subnet, SupernetSpec
from tests.dsnet.cases import BANKED_CASES, CASES, FAMILIES, OBLONG, ONE_NORM_CASES, Case, NormKeys
from tests.dsnet.samples import SMALL_OPTIONS, random_images, random_labels, task

each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_network = pytest.mark.parametrize("case", ONE_NORM_CASES, ids=str)
"""For what does not depend on the norm."""


@pytest.mark.slow
@each_case
@torch.no_grad()
def test_sliced_equals_materialised(case: Case) -> None:
    supernet = case.supernet()
    images = random_images(3, case.runs_at(OBLONG))
    for subnet in supernet.subnets.all:
        sliced = supernet(images, subnet)
        scale = float(sliced.abs().max())
        torch.testing.assert_close(materialize(supernet, subnet)(images), sliced, rtol=0, atol=1e-6 * scale)
        folded = materialize(supernet, subnet, fold_bn=True)
        torch.testing.assert_close(folded(images), sliced, rtol=0, atol=2e-5 * scale)


@each_case
@torch.no_grad()
def test_materialised_trunk_and_tail_equal_the_sliced_halves(case: Case) -> None:
    supernet = case.supernet()
    images = random_images(2)
    subnet = supernet.subnets[-1]
    expected = supernet.trunk(images, subnet)
    met = materialize_trunk(supernet, subnet)(images)
    torch.testing.assert_close(met.features, expected.features, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(met.gate_input, expected.gate_input, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(met.hidden, expected.hidden, rtol=1e-6, atol=1e-6)
    tail = materialize_tail(supernet, subnet)
    torch.testing.assert_close(tail(expected.features), supernet.tail(expected.features, subnet), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@each_case
@torch.no_grad()
def test_a_materialised_module_is_plain_contiguous_and_shares_nothing(case: Case) -> None:
    supernet = case.supernet()
    images = random_images(2)
    plain = materialize(supernet, supernet.subnets[0])
    before = plain(images)
    for parameter in supernet.parameters():
        parameter.add_(1.0)
    assert torch.equal(plain(images), before)
    assert not plain.training
    assert all(p.is_contiguous() and not p.requires_grad for p in plain.parameters())
    folded = materialize(supernet, supernet.subnets[0], fold_bn=True)
    left = sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    is_left = case.family.endswith((":Dense", ":Stream")) and supernet.spec.norm != "group_norm"
    assert left == is_left, "it follows a concatenation or a sum"


@pytest.mark.parametrize("shared", ["module", "parameter"])
def test_what_a_cut_shares_with_its_supernet_is_copied(shared: str, monkeypatch: pytest.MonkeyPatch) -> None:
    supernet = Case("", "ds_tiny", SMALL_OPTIONS["ds_tiny"], None).supernet().train()
    own = nn.Linear(2, 3)
    supernet.add_module("own", own)

    def cut_head(subnet: Subnet) -> nn.Module:
        if shared == "module":
            return own
        plain = nn.Linear(2, 3)
        plain.weight = own.weight
        return plain

    monkeypatch.setattr(supernet, "cut_head", cut_head)
    head = materialize_tail(supernet, supernet.subnets[0])
    assert torch.equal(head.weight, own.weight)  # type: ignore[arg-type]
    assert head.weight.data_ptr() != own.weight.data_ptr()  # type: ignore[operator, union-attr]
    assert own.training
    assert own.weight.requires_grad


@pytest.mark.slow
@each_network
@torch.no_grad()
def test_two_calls_do_not_influence_each_other(case: Case) -> None:
    supernet = case.supernet()
    images = random_images(2)
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    alone = {subnet.name: supernet(images, subnet) for subnet in supernet.subnets.all}
    for subnet in reversed(supernet.subnets.all):
        assert torch.equal(supernet(images, subnet), alone[subnet.name])
    for subnet in supernet.subnets.all[::2]:
        assert torch.equal(supernet(images, subnet), alone[subnet.name])
    assert all(torch.equal(value, before[name]) for name, value in supernet.state_dict().items())


@each_case
@torch.no_grad()
def test_trunk_and_tail_equal_forward_and_members_share_the_trunk(case: Case) -> None:
    supernet = case.supernet()
    images = random_images(2)
    shared = supernet.trunk(images, supernet.subnets[0])
    for subnet in supernet.subnets:
        assert torch.equal(supernet.trunk(images, subnet).features, shared.features)
        assert torch.equal(supernet.tail(shared.features, subnet), supernet(images, subnet))


@each_case
@torch.no_grad()
def test_segments_compose_sliced_and_plain(case: Case) -> None:
    supernet = case.supernet()
    subnet = supernet.subnets[-1]
    features = random_images(2, case.runs_at(OBLONG))
    expected = supernet(features, subnet)
    for number, gate in enumerate(supernet.spec.gates):
        sliced = supernet.upto_gate(number, features, subnet)
        plain = supernet.cut_upto_gate(number, subnet).eval()(features)
        for part in ("features", "gate_input", "hidden"):
            torch.testing.assert_close(getattr(plain, part), getattr(sliced, part), rtol=1e-5, atol=1e-5)
        assert sliced.hidden.shape == (2, gate.hidden)
        assert sliced.features.shape == sliced.gate_input.shape
        features = sliced.features
    assert torch.equal(supernet.head(features, subnet), expected)
    torch.testing.assert_close(supernet.cut_head(subnet).eval()(features), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@each_network
@torch.no_grad()
def test_any_image_size_and_class_count_fits(case: Case) -> None:
    for wanted, num_classes in ((8, 1), ((19, 30), 100)):
        size = case.takes(wanted)
        supernet = case.supernet(num_classes=num_classes, image_size=size)
        for subnet in supernet.subnets.all:
            logits = supernet(random_images(2, size), subnet)
            assert logits.shape == (2, num_classes)
            assert logits.isfinite().all()


@each_network
@torch.no_grad()
def test_sub_networks_differ_from_each_other(case: Case) -> None:
    supernet = case.supernet()
    images = random_images(2)
    distinct = {subnet.widths: subnet for subnet in supernet.subnets.all}
    logits = [supernet(images, subnet) for subnet in distinct.values()]
    assert all(not torch.allclose(first, second) for first, second in pairwise(logits))


@each_case
@torch.no_grad()
def test_each_image_is_classified_on_its_own(case: Case) -> None:
    supernet = case.supernet()
    images = random_images(4)
    together = supernet(images, supernet.subnets[0])
    for index in range(4):
        torch.testing.assert_close(
            supernet(images[index : index + 1], supernet.subnets[0])[0], together[index], rtol=1e-4, atol=1e-4
        )


@pytest.mark.slow
@each_case
@torch.no_grad()
def test_restrict_preserves_logits(case: Case) -> None:
    supernet = case.supernet()
    images = random_images(2)
    last = len(supernet.subnets) - 1
    for members in ((0,), (last, 0), (1, last), tuple(range(len(supernet.subnets)))):
        if len(set(members)) < len(members):
            continue
        small = restrict(supernet, members)
        assert not small.training
        assert [subnet.widths for subnet in small.subnets] == [supernet.subnets[k].widths for k in members]
        for index, member in enumerate(members):
            assert torch.equal(small(images, small.subnets[index]), supernet(images, supernet.subnets[member]))


@pytest.mark.slow
@each_case
def test_restrict_holds_no_wider_weight_than_it_needs(case: Case) -> None:
    supernet = case.supernet()
    small = restrict(supernet, [0])
    widths = small.subnets[0].widths
    assert tuple(group.max_width for group in small.spec.groups) == widths
    num_parameters = sum(p.numel() for p in small.parameters())
    assert num_parameters == sum(p.numel() for p in materialize(supernet, supernet.subnets[0]).parameters())
    assert num_parameters < sum(p.numel() for p in supernet.parameters())


@each_case
@torch.no_grad()
def test_restrict_copies(case: Case) -> None:
    supernet = case.supernet()
    small = restrict(supernet, [0])
    before = small(random_images(1), small.subnets[0])
    for parameter in supernet.parameters():
        parameter.zero_()
    assert torch.equal(small(random_images(1), small.subnets[0]), before)


@pytest.mark.slow
@each_case
def test_rebuilding_from_the_set_gives_a_net_that_takes_the_state(case: Case) -> None:
    supernet = case.supernet()
    again = rebuild(supernet.subnets).eval()
    again.load_state_dict(state_for_saving(supernet))
    images = random_images(2)
    for subnet in supernet.subnets.all:
        assert torch.equal(again(images, subnet), supernet(images, subnet))


@each_case
def test_training_one_sub_network_leaves_the_others_private_statistics_alone(case: Case) -> None:
    supernet = case.supernet()
    before = {name: buffer.clone() for name, buffer in supernet.named_buffers()}
    supernet.train()
    with NormKeys(supernet) as keys:
        supernet(random_images(8), supernet.subnets[1])
    changed = {name for name, buffer in supernet.named_buffers() if not torch.equal(buffer, before[name])}
    assert changed == (keys.buffers() if case.norm != "recalibrate" else set())
    assert keys.buffers() < set(before) or not before


@pytest.mark.parametrize("case", BANKED_CASES, ids=str)
@torch.no_grad()
def test_sub_networks_share_the_statistics_of_a_segment_where_they_agree_before_its_gate(case: Case) -> None:
    supernet = case.supernet()
    read = {subnet: _keys_by_segment(supernet, subnet) for subnet in supernet.subnets.all}
    for first, second in combinations(supernet.subnets.all, 2):
        for gate, spec in enumerate(supernet.spec.gates):
            if first.prefix(spec.num_prefix_groups) == second.prefix(spec.num_prefix_groups):
                assert read[first][gate] == read[second][gate]
            else:
                assert read[first][: gate + 1] != read[second][: gate + 1]
                pairs = zip(read[first][gate + 1 :], read[second][gate + 1 :], strict=True)
                assert all(own.isdisjoint(other) for own, other in pairs)
        changed = {g for g, (one, other) in enumerate(zip(first.widths, second.widths, strict=True)) if one != other}
        if changed & _groups_before_norms(supernet.spec):
            assert read[first] != read[second]


def _groups_before_norms(spec: SupernetSpec) -> set[int]:
    """The channel groups on whose widths any statistics depend."""
    traced = [op for op in spec.ops if op.kind == "norm"]
    return {group for op in traced for group in op.depends} if traced else set(range(len(spec.groups)))


def _keys_by_segment(supernet: Supernet, subnet: Subnet) -> list[set[str]]:
    segments = []
    features = random_images(1)
    for gate in range(len(supernet.spec.gates)):
        with NormKeys(supernet) as keys:
            features = supernet.upto_gate(gate, features, subnet).features
        segments.append(keys.buffers())
    with NormKeys(supernet) as keys:
        supernet.head(features, subnet)
    return [*segments, keys.buffers()]


@pytest.mark.slow
@pytest.mark.parametrize("case", BANKED_CASES, ids=str)
def test_a_foreign_sub_network_is_refused(case: Case) -> None:
    supernet = case.supernet()
    widths = supernet.subnets[0].widths
    last = max(group for group in _groups_before_norms(supernet.spec) if not supernet.spec.groups[group].is_size)
    foreign = Subnet("foreign", (*widths[:last], widths[last] - 1, *widths[last + 1 :]))
    with pytest.raises(KeyError, match="no BatchNorm statistics for the widths"):
        supernet(random_images(1), foreign)


@pytest.mark.slow
@each_case
def test_every_parameter_gets_a_gradient_from_some_sub_network(case: Case) -> None:
    supernet = case.supernet().train()
    for subnet in supernet.subnets.all:
        F.cross_entropy(supernet(random_images(8), subnet), random_labels(8)).backward()
    silent = [name for name, value in supernet.named_parameters() if value.grad is None or not value.grad.any()]
    assert not silent


@each_network
@torch.no_grad()
def test_evidence_is_what_the_gate_sees(case: Case) -> None:
    supernet = case.supernet()
    trunk = supernet.trunk(random_images(3), supernet.subnets[0])
    seen = trunk.gate_input
    positions = (seen.transpose(1, 2) if seen.ndim == 3 else seen.flatten(2)).double().numpy()
    for part, expected in (("mean", positions.mean(2)), ("deviation", positions.std(2)), ("maximum", positions.max(2))):
        torch.testing.assert_close(trunk.evidence(part).double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
    assert trunk.evidence("hidden") is trunk.hidden
    assert trunk.hidden.shape == (3, supernet.spec.gates[0].hidden)
    assert len(EVIDENCE_PARTS) == 4
    with pytest.raises(KeyError, match="unknown evidence 'colour'"):
        trunk.evidence("colour")


@pytest.mark.parametrize("family", [name for name in FAMILIES if "dropout" in get_family(name).defaults])
@torch.no_grad()
def test_dropout_touches_the_largest_in_training_only(family: str) -> None:
    supernet = create(family, task(), {**SMALL_OPTIONS.get(family, {}), "dropout": 0.5})
    images = random_images(8)
    for subnet in supernet.subnets.all:
        supernet.train()
        is_random = not torch.equal(supernet(images, subnet), supernet(images, subnet))
        assert is_random == (subnet == supernet.subnets.largest)
        supernet.eval()
        assert torch.equal(supernet(images, subnet), supernet(images, subnet))


@each_network
def test_a_set_of_another_spec_is_refused(case: Case) -> None:
    supernet = case.supernet()
    with pytest.raises(ValueError, match="another supernet"):
        type(supernet)(replace(supernet.spec, num_classes=3), supernet.subnets)
