"""The rules of axes: prefix, centre, and the union of the writers' own channels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dsnet.families import Family, register_resolver
from dsnet.network.axes import Axis, take
from dsnet.network.supernet import Supernet, restrict
from dsnet.space.cost import subnet_cost
from dsnet.space.spec import ChannelGroup, Subnet, SupernetSpec
from dsnet.space.width_space import WidthSpace
from dsnet.structure.filters import order_groups
from dsnet.structure.order import channel_orders, no_order, reorder
from tests.dsnet.kernels import KERNEL, Kernels, kernel_set, kernels
from tests.dsnet.samples import random_images, shaken
from tests.dsnet.structure.problems import problem_of

register_resolver(
    lambda name: Family(name, {}, lambda task, options: kernel_set(), Kernels) if name == "kernels" else None
)
IMAGES = random_images(3).double()


def shaken_kernels() -> Supernet:
    return shaken(kernels())


def spec_of(*groups: ChannelGroup) -> SupernetSpec:
    return SupernetSpec("any", 10, 3, 16, groups, (), ())


def test_a_smaller_kernel_is_the_centre_of_the_larger_one() -> None:
    axis = Axis.kernel(0, spec_of(ChannelGroup("kernel", 7, kind="kernel")))
    assert [axis.runs((size,)) for size in (1, 3, 5, 7)] == [[(3, 1)], [(2, 3)], [(1, 5)], [(0, 7)]]
    assert axis.narrowed((5,)).runs((3,)) == [(1, 3)]
    assert torch.equal(take(torch.arange(7.0), (axis,), (3,)), torch.tensor([2.0, 3.0, 4.0]))
    with pytest.raises(ValueError, match="a kernel of 4 pixels has no place in the centre of one of 7"):
        axis.runs((4,))


def test_a_slice_of_a_stream_has_a_width_of_its_own() -> None:
    spec = spec_of(ChannelGroup("stream", 8), ChannelGroup("part", 6, kind="slice"))
    axis = Axis.slice_of(0, 1, spec)
    assert axis.max_size == 6
    assert axis.runs((8, 3)) == [(0, 3)]
    assert axis.narrowed((8, 4)).max_size == 4
    assert axis.narrowed((8, 4)).within == (0,)
    assert axis.writers(0) == (1,), "the stream has other channels too"


def test_a_stream_has_the_union_of_its_writers_channels() -> None:
    spec = spec_of(
        ChannelGroup("a", 4, ids=(5, 0, 3, 1)), ChannelGroup("other", 9), ChannelGroup("b", 3, ids=(3, 7, 0))
    )
    axis = Axis.of(((0, 2),), spec, ((2,),))
    assert axis.max_size == 10, "channels 0, 1, 3, 5, 7, each twice"
    assert axis.runs((1, 9, 1)) == [(4, 4)], "channels 3 and 5"
    assert axis.runs((2, 9, 2)) == [(0, 2), (4, 6)], "channels 0, 3, 5, 7"
    assert axis.places((1, 9, 3)).tolist() == [0, 1, 4, 5, 6, 7, 8, 9]
    assert axis.narrowed((2, 9, 1)).runs((1, 9, 1)) == [(2, 4)]
    assert spec.stream_width((0, 2), (2, 9, 2)) == 4
    same = spec_of(ChannelGroup("a", 4), ChannelGroup("b", 6))
    assert Axis.of(((0, 1),), same, ((1,),)).runs((3, 2)) == [(0, 3)]


@torch.no_grad()
def test_restrict_cuts_the_centre() -> None:
    net = shaken_kernels()
    for members in ((0,), (1, 2), (2, 1), (3, 0)):
        small = restrict(net, members)
        for own, member in zip(small.subnets, members, strict=True):
            assert torch.equal(small(IMAGES, own), net(IMAGES, net.subnets[member]))
    assert restrict(net, [1]).state_dict()["conv"].shape == (3, 6, 5, 5)
    again = restrict(restrict(net, [1, 2]), [1])
    assert torch.equal(again(IMAGES, again.subnets[0]), net(IMAGES, net.subnets[2]))


@torch.no_grad()
def test_a_smaller_kernel_computes_what_the_largest_with_zeros_around_computes() -> None:
    net = shaken_kernels().train()
    widest = net.subnets[3]
    small = Subnet("small", (*widest.widths[:2], 3))
    expected = net(IMAGES, small)
    masked = restrict(net, [3]).train()
    masked.state_dict()["conv"][:, :, [0, 1, 5, 6]] = 0
    masked.state_dict()["conv"][..., [0, 1, 5, 6]] = 0
    torch.testing.assert_close(masked(IMAGES, masked.subnets[0]), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_reorder_leaves_the_kernel_alone() -> None:
    net = shaken_kernels()
    orders = channel_orders(problem_of(order="random"), net)
    assert orders[KERNEL] == tuple(range(7))
    assert orders[0] != tuple(range(8))
    other = reorder(net, orders)
    torch.testing.assert_close(other(IMAGES, net.subnets[3]), net(IMAGES, net.subnets[3]), rtol=1e-9, atol=1e-9)
    assert (KERNEL,) in order_groups(net)
    turned = [list(order) for order in no_order(net)]
    turned[KERNEL].reverse()
    with pytest.raises(ValueError, match="channel group 'kernel' keeps its order: it is the size of a kernel"):
        reorder(net, tuple(map(tuple, turned)))


def test_sub_networks_that_differ_in_the_kernel_alone_share_no_statistics() -> None:
    net = shaken_kernels().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net(IMAGES, net.subnets[1])
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name in changed if name.startswith("norm.mean")} == {"norm.mean_6_5_3"}
    assert "norm.mean_6_3_3" in before


@torch.no_grad()
def test_costs_of_kernels_are_those_of_a_counted_forward() -> None:
    net = shaken_kernels()
    for subnet in net.subnets:
        plain = net.cut_head(subnet)
        expected = net(IMAGES, subnet)
        torch.testing.assert_close(plain.double().eval()(IMAGES), expected, rtol=1e-5, atol=1e-5)
        with FlopCounterMode(display=False) as counter:
            plain(IMAGES[:1])
        cost = subnet_cost(net.spec, subnet, 16)
        assert cost.madds - subnet.widths[1] * 16 * 16 == counter.get_total_flops() // 2
        assert cost.params == sum(parameter.numel() for parameter in plain.parameters())


def test_kernels_and_ids_are_stored_and_checked() -> None:
    spec = kernel_set().spec
    assert SupernetSpec.from_json(spec.to_json()) == spec
    assert "ids" not in str(spec.to_json())
    with_ids = replace(spec, groups=(replace(spec.groups[0], ids=tuple(range(7, -1, -1))), *spec.groups[1:]))
    assert SupernetSpec.from_json(with_ids.to_json()) == with_ids
    assert with_ids.fingerprint != spec.fingerprint
    with pytest.raises(ValueError, match="both must be odd or both even"):
        spec.check(Subnet("even", (8, 6, 4)))
    with pytest.raises(ValueError, match="has 8 channels, but its ids are 3 numbers, of which 2 are different"):
        replace(spec, groups=(replace(spec.groups[0], ids=(1, 1, 2)), *spec.groups[1:]))
    assert WidthSpace(0.3, 8).options(spec)[KERNEL] == (3, 5, 7)
