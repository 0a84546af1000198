"""Sub-networks that the supernet's set does not declare: trained by the statistics of the batch,
refused in evaluation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsnet.deploy.materialize import materialize
from dsnet.families import layout, rebuild
from dsnet.network.layers import BatchNormBank, UndeclaredWidthsError
from dsnet.network.supernet import Supernet
from dsnet.space.spec import Subnet
from dsnet.space.subnet_set import SubnetSet, subnet_at
from dsnet.space.width_space import WidthSpace
from tests.dsnet.cases import BANKED_CASES, Case
from tests.dsnet.samples import random_images, task, without_dropout

SHARED_AFFINE = [case for case in BANKED_CASES if case.subnets().spec.norm != "private_affine"]
PRIVATE_AFFINE = [case for case in BANKED_CASES if case.subnets().spec.norm == "private_affine"]


def foreign(supernet: Supernet) -> Subnet:
    """A sub-network that agrees with no declared one on the first group that can be sliced."""
    spec = supernet.spec
    first = next(number for number, group in enumerate(spec.groups) if not group.pinned)
    taken = {subnet.widths[first] for subnet in supernet.subnets.all}
    widths = [
        group.max_width if group.is_fixed or group.is_size else max(1, group.max_width - 1) for group in spec.groups
    ]
    widths[first] = next(width for width in range(1, spec.groups[first].max_width) if width not in taken)
    return subnet_at(spec, widths)


def declaring(supernet: Supernet, subnet: Subnet) -> Supernet:
    """A supernet of the same weights whose only member is `subnet`."""
    other = rebuild(SubnetSet(supernet.spec, (subnet,)))
    weights = dict(supernet.named_parameters())
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(weights[name])
    return other


def buffers(supernet: Supernet) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in supernet.named_buffers()}


def shared_buffers(supernet: Supernet, subnet: Subnet) -> set[str]:
    """The buffers of layers up to which a sub-network has the widths of a declared one."""
    return {
        f"{name}.{part}_{'_'.join(map(str, norm.key_of(subnet.widths)))}"
        for name, norm in supernet.named_modules()
        if isinstance(norm, BatchNormBank) and norm.key_of(subnet.widths) in set(norm.keys())
        for part in ("mean", "var", "updates")
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", SHARED_AFFINE, ids=str)
def test_in_training_it_is_normalised_by_the_batch_and_leaves_no_trace(case: Case) -> None:
    """As if it were declared, but for the statistics."""
    supernet = without_dropout(case.supernet()).train()
    subnet, images = foreign(supernet), random_images(4)
    declared = without_dropout(declaring(supernet, subnet)).train()
    before = buffers(supernet)
    met, expected = supernet(images, subnet), declared(images, subnet)
    assert torch.equal(met, expected)
    for logits, net in ((met, supernet), (expected, declared)):
        logits.square().sum().backward()
        assert any(parameter.grad is not None for parameter in net.parameters())
    gradients = {name: parameter.grad for name, parameter in declared.named_parameters()}
    for name, parameter in supernet.named_parameters():
        wanted = gradients[name]
        assert (parameter.grad is None) == (wanted is None), name
        assert parameter.grad is None or wanted is None or torch.equal(parameter.grad, wanted), name
    allowed = shared_buffers(supernet, subnet)
    changed = {name for name, value in buffers(supernet).items() if not torch.equal(value, before[name])}
    assert changed <= allowed
    assert allowed == set() or "Pinned" in case.family  # the first layers of a pinned group are declared


@pytest.mark.slow
@pytest.mark.parametrize("case", BANKED_CASES, ids=str)
@pytest.mark.parametrize("with_gradient", [True, False])
def test_in_evaluation_it_is_refused_with_its_widths_and_a_way_out(case: Case, with_gradient: bool) -> None:
    supernet = case.supernet()
    subnet = foreign(supernet)
    with torch.set_grad_enabled(with_gradient), pytest.raises(UndeclaredWidthsError) as refused:
        supernet(random_images(1), subnet)
    message = str(refused.value)
    assert message.startswith("no BatchNorm statistics for the widths (")
    assert message.endswith(
        "): declare the sub-network, that is, build the supernet with a set that holds it, and recalibrate"
    )
    assert str(subnet.widths[0]) in message
    with pytest.raises(UndeclaredWidthsError, match="declare the sub-network"):
        materialize(supernet, subnet)


@pytest.mark.slow
@pytest.mark.parametrize("case", PRIVATE_AFFINE, ids=str)
def test_private_affine_pairs_exist_for_declared_widths_only(case: Case) -> None:
    supernet = case.supernet().train()
    with pytest.raises(UndeclaredWidthsError, match=r"no BatchNorm scale and shift for the widths \(.*declare"):
        supernet(random_images(4), foreign(supernet))


def test_a_declared_prefix_keeps_its_statistics_and_only_that() -> None:
    """Up to the group where it leaves a declared sub-network, its layers are those of that one."""
    supernet = rebuild(layout("ds_tiny", task(), {"num_routes": 3})).train()
    member = supernet.subnets[1]
    other = subnet_at(supernet.spec, (*member.widths[:-1], member.widths[-1] - 1))
    supernet(random_images(4), other)
    for norm in supernet.batch_norms():
        for key in set(norm.keys()):
            is_shared = norm.key_of(other.widths) == key
            assert int(norm.statistics(key)[2]) == int(is_shared), key
    assert any(norm.key_of(other.widths) not in set(norm.keys()) for norm in supernet.batch_norms())


def test_statistics_of_a_layer_that_reads_a_later_group_are_not_shared_with_another_input() -> None:
    """In a tied bottleneck stage the inner layers of later blocks read the stream, whose group
    comes after theirs: equal widths up to their own group do not make them the same layer."""
    options = {"depth": 50, "width": 0.125, "ratios": [0.5, 1.0]}
    supernet = rebuild(layout("ds_resnet", task(), options, "private_stats")).train()
    member, names = supernet.subnets[0], [group.name for group in supernet.spec.groups]
    stream = names.index("stage0.stream")
    widths = list(member.widths)
    widths[stream] -= 1
    other = subnet_at(supernet.spec, widths)
    supernet(random_images(4), other)
    counts = {
        name: max(int(norm.statistics(key)[2]) for key in set(norm.keys()))
        for name, norm in supernet.named_modules()
        if isinstance(norm, BatchNormBank)
    }
    touched = {name for name, count in counts.items() if count}
    assert touched == {"stem.norm", "stages.0.blocks.0.convs.0.norm", "stages.0.blocks.0.convs.1.norm"}
    with pytest.raises(UndeclaredWidthsError, match="no BatchNorm statistics for the widths"):
        materialize(supernet, other)


@pytest.mark.parametrize("family", ["ds_tiny", "ds_resnet", "resnet18"])
def test_any_widths_of_a_space_can_be_trained(family: str) -> None:
    supernet = rebuild(layout(family, task(image_size=64))).train()
    space, generator = WidthSpace(0.1, 8), torch.Generator().manual_seed(0)
    for _ in range(3):
        widths = space.draw(lambda count: int(torch.randint(count, (), generator=generator)), supernet.spec)
        logits = supernet(random_images(2, 64), supernet.subnets.at(widths))
        logits.sum().backward()
        assert torch.isfinite(logits).all()
