"""Orders of channels: permutations are exact, and scores are what they say."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsnet.errors import ConfigError
from dsnet.families import layout, rebuild
from dsnet.network.axes import Axis
from dsnet.network.layers import SlicedGroupNorm
from dsnet.network.supernet import Supernet, restrict
from dsnet.space.spec import Subnet
from dsnet.space.subnet_set import SubnetSet
from dsnet.structure import noise
from dsnet.structure.filters import order_groups, why_kept
from dsnet.structure.order import (
    Orders,
    channel_orders,
    channel_scores,
    compose,
    no_order,
    reorder,
    transfer,
)
from dsnet.structure.search import sorted_start
from dsnet.structure.settings import BY_IMAGES
from tests.dsnet.cases import BANKED_CASES, CASES, NEXT, TRANSFORMER, Case
from tests.dsnet.samples import SMALL_OPTIONS, random_images, random_labels, shaken, task, without_dropout
from tests.dsnet.structure.problems import NET, masked_network, network, problem_of

QUICK = [
    pytest.param(case, id=str(case), marks=pytest.mark.slow if "bottleneck" in str(case) else ())
    for case in (*BANKED_CASES, *(case for case in CASES if case.family == TRANSFORMER))
]
PADDED = next(case for case in CASES if str(case) == "ds_resnet-padded")


def any_orders(supernet: Supernet, seed: int = 0, keep: bool = False) -> Orders:
    """Permutations of all channels that may move; with `keep`, every sub-network keeps its own."""
    generator = torch.Generator().manual_seed(seed)
    groups = supernet.spec.groups
    orders = list(no_order(supernet))
    for stream in order_groups(supernet):
        if any(why_kept(groups[group]) for group in stream):
            continue
        ends = {groups[group].max_width for group in stream}
        if keep:
            ends |= {subnet.widths[group] for subnet in supernet.subnets.all for group in stream}
        parts = [low + torch.randperm(high - low, generator=generator) for low, high in pairwise(sorted({0, *ends}))]
        order = torch.cat(parts).tolist()
        for group in stream:
            orders[group] = tuple(order[: groups[group].max_width])
    return tuple(orders)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.norm in (None, "group_norm", "private_affine")], ids=str
)
def test_the_axes_say_the_shape_of_every_tensor_and_leave_out_none_with_channels(case: Case) -> None:
    supernet = case.supernet()
    axes = supernet.axes()
    small = restrict(supernet, [0]).state_dict()
    for name, value in supernet.state_dict().items():
        own = axes.get(name, ())
        assert all(axis is None or axis.max_size == size for axis, size in zip(own, value.shape, strict=False)), name
        other = small.get(name)
        if other is not None and other.shape != value.shape:
            assert any(axis is not None for axis in own), name


@pytest.mark.slow
@pytest.mark.parametrize("case", QUICK)
@torch.no_grad()
def test_the_widest_computes_the_same_in_any_order(case: Case) -> None:
    supernet = case.supernet().double()
    images = random_images(2).double()
    orders = any_orders(supernet)
    other = reorder(supernet, orders)
    widest = supernet.subnets.at(supernet.spec.max_widths)
    if widest not in supernet.subnets.all:
        pytest.skip("no sub-network of this set is the widest")
    torch.testing.assert_close(other(images, widest), supernet(images, widest), rtol=1e-9, atol=1e-9)
    moved = [group for group, order in enumerate(orders) if list(order) != sorted(order)]
    assert moved or "Pinned" in case.family
    before = supernet.state_dict()
    changed = [name for name, value in other.state_dict().items() if not torch.equal(value, before[name])]
    assert len(changed) > 3


@pytest.mark.slow
@pytest.mark.parametrize("case", QUICK)
@torch.no_grad()
def test_every_sub_network_that_keeps_its_channels_computes_the_same_also_alone(case: Case) -> None:
    supernet = case.supernet().double()
    images = random_images(2).double()
    other = reorder(supernet, any_orders(supernet, keep=True))
    for subnet in supernet.subnets.all:
        torch.testing.assert_close(other(images, subnet), supernet(images, subnet), rtol=1e-9, atol=1e-9)
    before = supernet.state_dict()
    for name, value in other.state_dict().items():
        if ".updates_" in name:
            assert torch.equal(value, before[name])
    small, images = restrict(other.float(), [0]), images.float()
    assert torch.equal(small(images, small.subnets[0]), other(images, other.subnets[0]))


@pytest.mark.parametrize("name", ["ds_tiny", "padded", NET])
@torch.no_grad()
def test_a_slice_of_the_new_order_is_the_network_without_the_other_channels(name: str) -> None:
    """A narrow sub-network in the new order, normalised by the batch, is the widest network in the
    old order whose other channels are cut out, by zero weights."""
    family, options = ("ds_resnet", PADDED.options) if name == "padded" else (name, SMALL_OPTIONS[name])
    own = layout(family, task(), options, "recalibrate")
    widest = Subnet("all", own.spec.max_widths)
    supernet = shaken(rebuild(SubnetSet(own.spec, (widest,)))).double().train()
    orders = any_orders(supernet, seed=2)
    narrow = tuple(max(1, group.max_width * 2 // 3) for group in own.spec.groups)
    kept = {group: list(order[:width]) for group, (order, width) in enumerate(zip(orders, narrow, strict=True))}
    images = random_images(4).double()
    sliced = without_dropout(reorder(supernet, orders))(images, supernet.subnets.at(narrow))
    masked = without_dropout(masked_network(supernet, kept))(images, widest)
    torch.testing.assert_close(sliced, masked, rtol=1e-9, atol=1e-9)


def test_writers_of_a_stream_share_one_order() -> None:
    padded = PADDED.supernet()
    streams = [stream for stream in order_groups(padded) if len(stream) > 1]
    assert len(streams) == 3  # a stage each; the stem's stream is its own
    names = [[padded.spec.groups[group].name for group in stream] for stream in streams]
    assert names[0] == ["stage0.block0.stream", "stage0.block1.stream"]
    alone = network(problem_of())
    assert order_groups(alone) == tuple((group,) for group in range(len(alone.spec.groups)))
    assert sorted(group for stream in order_groups(padded) for group in stream) == list(range(len(padded.spec.groups)))


def test_a_stream_with_writers_of_unequal_width_sorts_what_the_same_writers_have() -> None:
    supernet = PADDED.supernet()
    second = next(number for number, group in enumerate(supernet.spec.groups) if group.name == "stage0.block1.stream")
    widths = list(supernet.spec.max_widths)
    widths[second] = 3
    subnets = SubnetSet(supernet.spec, (Subnet("odd", tuple(widths)),))
    odd = restrict(transfer(supernet, subnets), [0])
    problem = replace(problem_of("ds_resnet", order="random"), subnets=odd.subnets)
    orders = channel_orders(problem, odd)
    first = next(number for number, group in enumerate(odd.spec.groups) if group.name == "stage0.block0.stream")
    assert orders[second] == orders[first][:3]
    assert sorted(orders[second]) == [0, 1, 2]
    assert sorted(orders[first]) == list(range(len(orders[first])))
    images = random_images(2).double()
    odd = odd.double()
    again = reorder(odd, orders)
    torch.testing.assert_close(again(images, odd.subnets[0]), odd(images, odd.subnets[0]), rtol=1e-9, atol=1e-9)


def test_pinned_channels_and_classes_keep_their_order() -> None:
    problem = problem_of("tests.dsnet.nets:Pinned", order="random")
    supernet = network(problem, "tests.dsnet.nets:Pinned")
    orders = channel_orders(problem, supernet)
    for group, order in zip(problem.spec.groups, orders, strict=True):
        assert (list(order) == sorted(order)) == bool(group.pinned)
    bias = supernet.state_dict()["body.fc.bias"]
    assert torch.equal(reorder(supernet, orders).state_dict()["body.fc.bias"], bias)


@pytest.mark.parametrize("order", ["random", "weight_l1", "bn_gamma", "taylor", "noise"])
@pytest.mark.parametrize("family", ["ds_tiny", "ds_resnet", NET])
def test_every_order_is_exact_and_a_function_of_its_arguments(
    family: str, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noise, "STEPS", 3)
    problem = problem_of(family, "private_stats", order=order)
    supernet = shaken(network(problem, family)).double().eval()
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    batches = [(random_images(4, seed=1).double(), random_labels(4))]
    start = sorted_start(problem, supernet, batches)
    assert start.orders == channel_orders(problem, supernet, batches)
    assert start.orders != no_order(supernet)
    for name, value in supernet.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in supernet.parameters())
    images, widest = random_images(3).double(), supernet.subnets.at(supernet.spec.max_widths)
    with torch.no_grad():
        torch.testing.assert_close(start.supernet(images, widest), supernet(images, widest), rtol=1e-9, atol=1e-9)
    if order == "random":
        other = replace(problem, run=replace(problem.run, seed=8))
        assert channel_orders(other, supernet) != start.orders
        return
    drawn = order == "noise"  # for the places of weights: other numbers for the sorted network
    scores = channel_scores(supernet if drawn else start.supernet, order, problem.seed, batches)
    for stream in order_groups(supernet):
        total = torch.stack([scores[group] for group in stream]).sum(0)  # writers of these have one width
        total = total[list(start.orders[stream[0]])] if drawn else total
        assert (total.diff() <= 1e-9).all()


def test_scores_of_a_traced_network_by_hand() -> None:
    problem = problem_of()
    supernet = shaken(network(problem)).eval()
    state = {name: value.double() for name, value in supernet.state_dict().items()}
    numbers = {group.name: number for number, group in enumerate(supernet.spec.groups)}

    def filters(name: str) -> Tensor:
        return state[f"body.{name}.weight"].abs().flatten(1).sum(1)

    scores = channel_scores(supernet, "weight_l1")
    torch.testing.assert_close(scores[numbers["stem"]], filters("stem") + filters("block.project"))
    inner = filters("block.expand.0") + filters("block.depthwise") + filters("block.attention.expand")
    torch.testing.assert_close(scores[numbers["block_expand_0"]], inner)
    torch.testing.assert_close(scores[numbers["down"]], filters("down") + filters("skip"))
    scales = channel_scores(supernet, "bn_gamma")
    torch.testing.assert_close(
        scales[numbers["stem"]], state["body.bn.weight"].abs() + state["body.block.project_norm.weight"].abs()
    )
    assert not scales[numbers["block_attention_reduce"]].any()  # no norm: it keeps its order


@pytest.mark.parametrize("streams", ["tied", "ids"])
@torch.no_grad()
def test_norms_over_the_channels_and_scales_of_the_module_move_and_are_no_filters(streams: str) -> None:
    problem = problem_of(NEXT, options={"step": 2, "streams": streams})
    supernet = shaken(rebuild(problem.subnets)).double().eval()
    images, widest = random_images(2).double(), problem.subnets.largest
    other = reorder(supernet, any_orders(supernet))
    torch.testing.assert_close(other(images, widest), supernet(images, widest), rtol=1e-9, atol=1e-9)
    names = [name for name in supernet.axes() if name.endswith("layer_scale")]
    assert len(names) == 2
    state = supernet.state_dict()
    assert not any(torch.equal(other.state_dict()[name], state[name]) for name in names)
    before = channel_scores(supernet, "weight_l1")
    for name in names:
        state[name].mul_(100)
    assert all(torch.equal(score, before[group]) for group, score in channel_scores(supernet, "weight_l1").items())


def test_taylor_is_the_absolute_product_of_gradient_and_weight() -> None:
    problem = problem_of()
    supernet = shaken(network(problem)).double().eval()
    images, labels = random_images(6).double(), random_labels(6)
    scores = channel_scores(supernet, "taylor", batches=[(images, labels), (images[:3], labels[:3])])
    weight = dict(supernet.named_parameters())["body.down.weight"]
    skip = dict(supernet.named_parameters())["body.skip.weight"]
    expected = torch.zeros(16, dtype=torch.float64)
    for count in (6, 3):
        net = without_dropout(transfer(supernet, supernet.subnets)).train()
        own = dict(net.named_parameters())
        F.cross_entropy(net(images[:count], net.subnets.at(net.spec.max_widths)), labels[:count]).backward()
        for name, value in (("body.down.weight", weight), ("body.skip.weight", skip)):
            gradient = own[name].grad
            assert gradient is not None
            expected += (gradient * value).detach().abs().flatten(1).sum(1)
    number = [group.name for group in supernet.spec.groups].index("down")
    torch.testing.assert_close(scores[number], expected)


def test_flattened_channels_move_as_blocks() -> None:
    family = "tests.dsnet.nets:Dense"
    problem = problem_of(family, order="weight_l1")
    supernet = shaken(network(problem, family)).eval()
    orders = channel_orders(problem, supernet)
    last = [group.name for group in supernet.spec.groups].index("last")
    weight = supernet.state_dict()["body.hidden.weight"]
    moved = reorder(supernet, orders).state_dict()["body.hidden.weight"]
    hidden = [group.name for group in supernet.spec.groups].index("hidden")
    for place, channel in enumerate(orders[last]):
        expected = weight[list(orders[hidden]), 4 * channel : 4 * channel + 4]
        assert torch.equal(moved[:, 4 * place : 4 * place + 4], expected)


@pytest.mark.parametrize(("given", "wanted"), [("recalibrate", "private_affine"), ("private_affine", "private_stats")])
@torch.no_grad()
def test_weights_go_to_another_set_and_another_norm(given: str, wanted: str) -> None:
    """Shared tensors are copied; a width that the source lacks gets its channels of the widest, and
    counts no update."""
    own = layout("ds_tiny", task(), SMALL_OPTIONS["ds_tiny"], given)
    source = shaken(rebuild(SubnetSet(own.spec, (Subnet("all", own.spec.max_widths),)))).eval()
    for norm in source.batch_norms():
        norm.statistics(norm.keys()[0])[2].fill_(7)
    target = layout("ds_tiny", task(), SMALL_OPTIONS["ds_tiny"], wanted)
    net = transfer(source, target)
    images, widest = random_images(2), target.at(own.spec.max_widths)
    torch.testing.assert_close(net(images, widest), source(images, source.subnets[0]))
    for norm, old in zip(net.batch_norms(), source.batch_norms(), strict=True):
        mean, var, updates = norm.statistics(norm.key_of(target[0].widths))
        whole = old.statistics(old.keys()[0])
        assert torch.equal(mean, whole[0][: len(mean)])
        assert torch.equal(var, whole[1][: len(var)])
        assert int(updates) == 0
        assert norm.num_updates(own.spec.max_widths) == 7
        scale, shift = norm.affine(norm.key_of(target[0].widths))
        assert torch.equal(scale, old.affine(old.keys()[0])[0][: len(scale)])
        assert torch.equal(shift, old.affine(old.keys()[0])[1][: len(shift)])


@torch.no_grad()
def test_a_narrow_sub_network_of_other_channels_gets_their_statistics_from_the_widest() -> None:
    supernet = next(case for case in CASES if str(case) == "ds_tiny-private_stats").supernet()
    for norm in supernet.batch_norms():
        keys = norm.keys()
        for key in keys:
            norm.statistics(key)[2].fill_(9)
    orders = any_orders(supernet)
    other = reorder(supernet, orders)
    narrow, widest = supernet.subnets[0], supernet.subnets.largest
    for group, (old, new) in enumerate(
        zip((supernet.get_submodule("stem_norm"), supernet.get_submodule("blocks.0.pointwise_norm")),
            (other.get_submodule("stem_norm"), other.get_submodule("blocks.0.pointwise_norm")), strict=True)
    ):  # fmt: skip
        width = narrow.widths[group]
        whole = old.statistics(old.key_of(widest.widths))[0]  # type: ignore[operator]
        mean, _, updates = new.statistics(new.key_of(narrow.widths))  # type: ignore[operator]
        assert torch.equal(mean, whole[list(orders[group][:width])])
        assert int(updates) == 0
        assert new.num_updates(widest.widths) == 9  # type: ignore[operator]


def test_two_orders_one_after_the_other_are_their_composition() -> None:
    supernet = network(problem_of())
    first, second = any_orders(supernet, 1), any_orders(supernet, 2)
    twice = reorder(reorder(supernet, first), second).state_dict()
    once = reorder(supernet, compose(first, second)).state_dict()
    assert all(torch.equal(value, once[name]) for name, value in twice.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda orders: orders[:-1], "orders of channels, but"),
        (lambda orders: ((0,) * len(orders[0]), *orders[1:]), "is no permutation of"),
        (lambda orders: (*orders[:2], orders[2][::-1], *orders[3:]), "are one stream and must share one order"),
    ],
)
def test_orders_that_do_not_fit_are_refused(change: Any, message: str) -> None:
    supernet = PADDED.supernet()
    with pytest.raises(ValueError, match=message):
        reorder(supernet, change(no_order(supernet)))


def test_group_norm_and_pinned_channels_cannot_move() -> None:
    grouped = network(problem_of(norm="group_norm"))
    assert any(isinstance(part, SlicedGroupNorm) for part in grouped.modules())
    with pytest.raises(ValueError, match="GroupNorm normalises neighbouring channels"):
        reorder(grouped, any_orders(grouped))
    pinned = network(problem_of("tests.dsnet.nets:Pinned"), "tests.dsnet.nets:Pinned")
    with pytest.raises(ValueError, match="keeps its order: "):
        reorder(pinned, tuple(order[::-1] for order in no_order(pinned)))


def test_a_family_that_declares_no_axes_has_no_other_order(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of("ds_tiny", order="weight_l1")
    supernet = network(problem, "ds_tiny")
    monkeypatch.setattr(type(supernet), "axes", Supernet.axes)
    with pytest.raises(ConfigError, match=r"family ds_tiny does not say .* \(Supernet.axes\): use order none"):
        channel_orders(problem, supernet)
    images, cut = random_images(2), restrict(supernet, [0])  # to corners
    with torch.no_grad():
        assert torch.equal(cut(images, cut.subnets[0]), supernet(images, supernet.subnets[0]))
    assert channel_orders(replace(problem, settings=replace(problem.settings, order="none")), supernet) == no_order(
        supernet
    )


@pytest.mark.parametrize("order", BY_IMAGES)
def test_orders_by_images_need_images(order: str) -> None:
    problem = problem_of(order=order)
    with pytest.raises(ConfigError, match=f"{order} needs at least one batch"):
        channel_orders(problem, network(problem))


def test_an_axis_of_a_stream_is_as_wide_as_its_widest_writer() -> None:
    axis = Axis(((0, 1, 8),), union=(2,))
    assert axis.size((3, 99, 5)) == 5
    assert axis.size((7, 1, 2)) == 7
    assert axis.narrowed((3, 99, 5)) == Axis(((0, 1, 5),), union=(2,))
    assert axis.narrowed((3, 99, 5)).size((8, 99, 8)) == 5
