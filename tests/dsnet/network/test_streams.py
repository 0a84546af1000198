"""Streams whose writers have their own channels (streams `ids`): every sum is the union."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dsnet.deploy.dynamic import DynamicNet
from dsnet.deploy.materialize import materialize
from dsnet.errors import CheckpointError, ConfigError
from dsnet.families import layout, rebuild
from dsnet.families.traced import traced_spec
from dsnet.gates.mixing import Chooser, GatedSupernet
from dsnet.network.plain import make_plain
from dsnet.network.supernet import Supernet, restrict
from dsnet.network.traced import TracedSum, TracedSupernet
from dsnet.space.cost import op_costs, shared_params, subnet_cost
from dsnet.space.spec import Subnet, SupernetSpec
from dsnet.space.subnet_set import SubnetSet
from dsnet.stored.checkpoint import save_supernet
from dsnet.structure.filters import order_groups
from dsnet.structure.order import Orders, no_order, reorder
from dsnet.training.start import lay_out, load_start, relayout
from tests.dsnet.samples import random_images, random_supernet_router, shake_statistics, task, without_dropout

NET = "tests.dsnet.nets:Stream"
GATES = {"gates": ["entry", "add_1", "sub"], "paths": "all", "ratios": [0.5, 1.0], "step": 2}


def random_orders(net: Supernet, seed: int = 5) -> Orders:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        order if group.pinned else tuple(torch.randperm(len(order), generator=generator).tolist())
        for order, group in zip(no_order(net), net.spec.groups, strict=True)
    )


def random_members(spec: SupernetSpec, count: int = 3, seed: int = 3) -> SubnetSet:
    """Sub-networks with independent random widths, and the widest."""
    generator = torch.Generator().manual_seed(seed)
    members = []
    for number in range(count):
        drawn = (int(torch.randint(1, group.max_width + 1, (), generator=generator)) for group in spec.groups)
        widths = (group.max_width if group.pinned else width for group, width in zip(spec.groups, drawn, strict=True))
        members.append(Subnet(f"random-{number}", tuple(widths)))
    return SubnetSet(spec, (*members, Subnet("all", spec.max_widths)))


def sorted_net(model: str = NET, options: dict[str, Any] | None = None, size: int = 16) -> Supernet:
    """A network in double precision whose groups were each sorted in their own way, with random
    members, or those of the options; weights and statistics are random."""
    own = layout(model, task(image_size=size), {"streams": "ids", **(options or {})})
    subnets = own if options else random_members(own.spec)
    net = rebuild(subnets).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    net = reorder(net, random_orders(net))
    for norm in net.batch_norms():
        shake_statistics(norm, generator)
    return net.eval()


def images(size: int = 16, count: int = 4) -> Tensor:
    return random_images(count, size).double()


def masked(net: Supernet, subnet: Subnet) -> Supernet:
    """A copy of the network in which the channels that the sub-network lacks are zero in every
    tensor, so that the widest computes what the sub-network should."""
    other = rebuild(net.subnets).double().train(net.training)
    other.load_state_dict(net.state_dict())
    axes = net.axes()
    parameters = dict(net.named_parameters())
    for name, value in other.state_dict().items():
        for dimension, axis in enumerate(axes.get(name, ()) if name in parameters else ()):
            if axis is not None:
                gone = torch.ones(value.shape[dimension], dtype=torch.bool)
                gone[axis.places(subnet.widths)] = False
                value[(slice(None),) * dimension + (gone,)] = 0
    return other


@torch.no_grad()
def test_the_groups_of_a_stream_are_its_writers() -> None:
    spec = layout(NET, task(), {"streams": "ids"}).spec
    tied = layout(NET, task()).spec
    names = [group.name for group in spec.groups]
    assert names == [
        "stem", "block_expand_0", "block_attention_reduce", "block_project", "branch_0", "minus", "down", "skip", "last",
    ]  # fmt: skip
    assert [group.name for group in tied.groups] == ["stem", "block_expand_0", "block_attention_reduce", "down"]
    ops = {op.name: op for op in spec.ops}
    number = {name: place for place, name in enumerate(names)}
    stream = tuple(number[name] for name in ("stem", "block_project", "branch_0", "minus"))
    assert (ops["before"].parts, ops["before"].unions) == (((number["stem"], 1),), ((number["block_project"],),))
    assert ops["down"].parts == ((number["stem"], 1),)
    assert ops["down"].unions == (stream[1:],)
    assert ops["block_expand_0"].unions == ()
    assert ops["fc"].parts == ((number["stem"], 4), (number["down"], 4))
    assert ops["norm"].depends == (
        *(number[name] for name in names if name not in ("down", "skip", "last")),
        number["down"],
    )
    net = rebuild(layout(NET, task(), {"streams": "ids"}))
    assert all(stream == (group,) for group, stream in enumerate(order_groups(net)))
    assert sum(isinstance(part, TracedSum) for part in net.modules()) == 5


def test_the_default_has_the_layout_that_it_had() -> None:
    for model in (NET, "tests.dsnet.nets:Residual", "tests.dsnet.nets:Dense"):
        spec = layout(model, task()).spec
        assert spec.layout == {"model": model}
        assert layout(model, task(), {"streams": "tied"}).spec.fingerprint == spec.fingerprint
        assert not any(isinstance(part, TracedSum) for part in rebuild(layout(model, task())).modules())
        assert "unions" not in str(spec.to_json())
    with pytest.raises(ConfigError, match="streams is 'loose', but must be 'tied' or 'ids'"):
        layout(NET, task(), {"streams": "loose"})


@torch.no_grad()
def test_in_the_order_of_the_layout_equal_widths_are_the_tied_network() -> None:
    tied = rebuild(layout(NET, task(), {"step": 2})).double().eval()
    ids = rebuild(layout(NET, task(), {"step": 2, "streams": "ids"})).double().eval()
    plain = make_plain(NET, 10, 3, 0).double()
    for net in (tied, ids):
        assert isinstance(net, TracedSupernet)
        net.load_plain(plain)
    for first, second in zip(tied.subnets, ids.subnets, strict=True):
        assert torch.equal(tied(images(), first), ids(images(), second))
        costs = [subnet_cost(net.spec, own, 16) for net, own in ((tied, first), (ids, second))]
        assert costs[0] == costs[1]
    torch.testing.assert_close(ids(images(), ids.subnets.largest), plain.eval()(images()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model", [NET, "tests.dsnet.nets:Residual", pytest.param("resnet18", marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_slice_is_the_whole_network_without_the_channels_that_a_writer_lacks(model: str) -> None:
    net = sorted_net(model, size=16 if "nets" in model else 64).train()
    assert any(group.ids for group in net.spec.groups)
    x = images(net.spec.image_size)
    widest = net.subnets[len(net.subnets) - 1]
    for subnet in net.subnets:
        expected = without_dropout(masked(net, subnet))(x, widest)
        torch.testing.assert_close(without_dropout(net)(x, subnet), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_the_widest_computes_the_same_in_any_order() -> None:
    net = rebuild(random_members(layout(NET, task(), {"streams": "ids"}).spec)).double().eval()
    other = reorder(net, random_orders(net))
    assert all(len(set(group.ids)) == group.max_width for group in other.spec.groups if group.name in ("down", "skip"))
    widest = net.subnets.at(net.spec.max_widths)
    torch.testing.assert_close(other(images(), widest), net(images(), widest), rtol=1e-9, atol=1e-9)
    back = reorder(
        other, tuple(tuple(sorted(range(len(order)), key=order.__getitem__)) for order in random_orders(net))
    )
    assert back.spec == net.spec
    tensors = net.state_dict()
    assert all(torch.equal(value, tensors[name]) for name, value in back.state_dict().items() if "updates" not in name)


@pytest.mark.parametrize("size", [16, pytest.param(23, marks=pytest.mark.slow)])
@torch.no_grad()
def test_cut_networks_are_equal_and_cost_what_a_forward_counts(size: int) -> None:
    net = sorted_net(size=size).float()
    x = images(size).float()
    for subnet in net.subnets:
        expected = net(x, subnet)
        scale = float(expected.abs().max())
        for fold_bn in (False, True):
            plain = materialize(net, subnet, fold_bn=fold_bn)
            torch.testing.assert_close(plain(x), expected, rtol=0, atol=2e-5 * scale)
        plain = materialize(net, subnet)
        with FlopCounterMode(display=False) as counter:
            plain(x[:1])
        costs = zip(net.spec.ops, op_costs(net.spec, subnet, size), strict=True)
        assert sum(madds for op, (madds, _) in costs if op.kind != "pool") == counter.get_total_flops() // 2
        assert subnet_cost(net.spec, subnet, size).params == sum(parameter.numel() for parameter in plain.parameters())


@torch.no_grad()
def test_restrict_keeps_every_sub_network_and_nothing_else() -> None:
    net = sorted_net()
    for members in ((2, 1), (0, 3)):
        small = restrict(net, members)
        for own, member in zip(small.subnets, members, strict=True):
            assert torch.equal(small(images(), own), net(images(), net.subnets[member]))
        again = restrict(small, [len(members) - 1])
        assert torch.equal(again(images(), again.subnets[0]), net(images(), net.subnets[members[-1]]))
        assert sum(value.numel() for value in small.parameters()) == shared_params(small.spec, small.subnets)
    stored = SupernetSpec.from_json(small.spec.to_json())
    assert stored == small.spec
    twin = rebuild(SubnetSet(stored, small.subnets.members)).double().eval()
    twin.load_state_dict(small.state_dict())
    assert torch.equal(twin(images(), twin.subnets[0]), small(images(), small.subnets[0]))


@torch.no_grad()
def test_sub_networks_that_differ_in_one_writer_share_no_statistics_after_it() -> None:
    own = layout(NET, task(), {"streams": "ids"}).spec
    number = next(place for place, group in enumerate(own.groups) if group.name == "block_project")
    narrow = tuple(group.max_width // 2 for group in own.groups)
    other = (*narrow[:number], narrow[number] - 1, *narrow[number + 1 :])
    net = rebuild(SubnetSet(own, (Subnet("one", narrow), Subnet("other", other)))).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net(random_images(4), net.subnets[0])
    after = {name: value for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    for norm in ("before", "branch.1", "norm"):
        assert sum(name.startswith(f"body.{norm}.mean_") for name in after) == 1
        assert sum(name.startswith(f"body.{norm}.mean_") for name in before) == 2
    assert sum(name.startswith("body.bn.mean_") for name in before) == 1


@torch.no_grad()
def test_gates_on_a_stream_read_and_pass_the_union() -> None:
    net = sorted_net(options=GATES).float()
    assert [gate.name for gate in net.spec.gates] == ["entry", "add_1", "sub"]
    x = random_images(12)
    for kind in ("gates", "evidence_gates"):
        router = random_supernet_router(kind, net)
        answer = DynamicNet(net, router)(x)
        assert len(set(answer.routes.tolist())) > 2
        for image, route, logits in zip(x, answer.routes.tolist(), answer.logits, strict=True):
            torch.testing.assert_close(logits, net(image[None], net.subnets[route])[0], rtol=1e-3, atol=1e-3)


def test_mixing_puts_every_channel_at_its_place() -> None:
    net = sorted_net(options=GATES).requires_grad_(False)
    gated = GatedSupernet(net, range(len(net.subnets)), decides_once=False)
    draw = torch.Generator().manual_seed(3)
    choosers = [
        Chooser(
            torch.randn(rows, hidden, generator=draw, dtype=torch.float64).requires_grad_(),
            50 * torch.randn(12, rows, generator=draw, dtype=torch.float64),
            1.0,
        )
        for rows, hidden in gated.head_shapes
    ]
    x = images(count=12)
    mixed = gated.mix_segments(net.upto_gate(0, x, net.subnets[0]), choosers)
    routes = mixed.positions.tolist()
    assert len(set(routes)) > 3
    for image, route, logits in zip(x, routes, mixed.logits, strict=True):
        torch.testing.assert_close(logits, net(image[None], net.subnets[route])[0], rtol=1e-9, atol=1e-9)
    mixed.logits.square().sum().backward()
    assert all(chooser.weight.grad is not None and chooser.weight.grad.any() for chooser in choosers)
    narrow, wide = net.subnets[0], net.subnets[len(net.subnets) - 1]
    places = net.channel_places(1, narrow)
    assert places is not None
    assert net.channel_places(1, wide) is None
    assert places.size == 8
    assert len(places.places) < 8


def test_ids_stay_where_the_network_is_laid_out_for_other_images() -> None:
    net = sorted_net()
    other = relayout(net.subnets, task(7, 24)).spec
    assert (other.num_classes, other.image_size) == (7, 24)
    assert [group.ids for group in other.groups] == [group.ids for group in net.spec.groups]
    assert other.layout == net.spec.layout
    assert isinstance(net, TracedSupernet)
    with pytest.raises(ValueError, match="have another order than those of the plain module"):
        net.load_plain(make_plain(NET, 10, 3, 0))


def test_weights_of_another_order_are_refused_as_a_start(tmp_path: Path) -> None:
    net = sorted_net().float()
    save_supernet(tmp_path / "final", net, {})
    start = load_start(tmp_path)
    again = rebuild(lay_out("checkpoint", task(), {}, start=start)).eval()
    assert start.apply(again) == []
    x = random_images(2)
    assert torch.equal(again(x, again.subnets[0]), net(x, net.subnets[0]))
    fresh = rebuild(random_members(layout(NET, task(), {"streams": "ids"}).spec))
    with pytest.raises(CheckpointError, match=r"another order than in this network \(stem, .*model: checkpoint"):
        start.apply(fresh)


def test_training_reaches_every_channel_of_a_sub_network() -> None:
    net = sorted_net().train()
    narrow = net.subnets[1]
    net(images(), narrow).square().mean().backward()
    for name, axes in net.axes().items():
        parameter = dict(net.named_parameters()).get(name)
        if parameter is None or name.endswith("bias") or axes[0] is None:
            continue
        assert parameter.grad is not None
        rows = parameter.grad.flatten(1).abs().sum(1) > 0 if parameter.ndim > 1 else parameter.grad != 0
        outside = torch.ones(len(rows), dtype=torch.bool)
        outside[axes[0].places(narrow.widths)] = False
        assert not rows[outside].any(), name


def test_the_layout_of_a_well_known_network_counts_the_same_at_full_width() -> None:
    tied, ids = traced_spec("resnet18", task(image_size=32)), traced_spec("resnet18", task(image_size=32), (), "ids")
    assert len(ids.groups) == len(tied.groups) + 8, (
        "each of the eight blocks and each of the three projections but a stage's first"
    )
    costs = [subnet_cost(spec, Subnet("all", spec.max_widths), 32) for spec in (tied, ids)]
    assert costs[0] == costs[1]
