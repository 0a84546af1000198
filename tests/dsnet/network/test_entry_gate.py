"""Sets whose members differ before the first gate of their family: table, cascade, bundle, dynamic
inference and weights under an entry gate; and bundles of a network with a gate inside."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsnet import families
from dsnet.deploy.bundle import BundleContents, load_bundle, save_bundle
from dsnet.deploy.dynamic import DynamicNet
from dsnet.families import create, layout, rebuild
from dsnet.gates.fit import fit_gate
from dsnet.gates.settings import GateSettings
from dsnet.measure.evaluate import build_routing_table
from dsnet.network.batchnorm import recalibrate
from dsnet.network.supernet import Supernet
from dsnet.routers.cascade import CascadeRouter
from dsnet.routing.table_routing import run_on_table
from dsnet.space.cost import subnet_cost
from dsnet.space.entry_gate import ENTRY, OWN_GATES, differs_before_gates, own_segments, with_entry_gate
from dsnet.space.route_tree import RouteTree
from dsnet.space.spec import SupernetSpec
from dsnet.space.subnet_set import SubnetSet
from tests.dsnet.cases import NEXT, TRACED, early
from tests.dsnet.samples import NORMALIZATION, random_router, shaken, small_set, task, tensor_data


def early_set(family: str) -> SubnetSet:
    return with_entry_gate(early(small_set(family)))


def lively(supernet: Supernet) -> Supernet:
    """With random weights and the statistics of the test images, so that answers differ."""
    recalibrate(shaken(supernet), [NORMALIZATION.apply(tensor_data(40, supernet.spec.image_size).images("val"))])
    return supernet.eval()


SUPERNETS: dict[str, Callable[[], Supernet]] = {
    "one gate": lambda: rebuild(early_set("ds_tiny")),
    "three gates": lambda: rebuild(early_set("ds_resnet")),
    "inside a plain network": lambda: create(TRACED[0], task(), {"gates": ["pool"], "step": 2}),
    "norms over the channels": lambda: create(NEXT, task(), {"gates": ["features.1"], "ratios": [0.5, 1], "step": 2}),
    "tokens": lambda: rebuild(small_set("ds_vit")),
    "entry and inside": lambda: create(
        TRACED[0],
        task(image_size=(12, 20)),
        {"gates": ["entry", "pool"], "ratios": [0.5, 1], "paths": "all", "step": 2},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SUPERNETS)
@torch.no_grad()
def test_table_cascade_bundle_and_dynamic_inference_equal_the_network_image_by_image(tmp_path: Path, name: str) -> None:
    supernet = lively(SUPERNETS[name]())
    data = tensor_data(40, supernet.spec.image_size)
    pixels = data.images("val")
    images = NORMALIZATION.apply(pixels)
    table = build_routing_table(supernet, data, "val", NORMALIZATION)
    alone = [
        torch.cat([supernet(images[row : row + 1], subnet) for row in range(len(images))])
        for subnet in supernet.subnets
    ]
    for route, logits in enumerate(alone):
        torch.testing.assert_close(torch.from_numpy(table.logits[:, route]).float(), logits, rtol=2e-3, atol=2e-3)
    fit = fit_gate(table, table, GateSettings(router="cascade", target=0.5))
    assert isinstance(fit.router, CascadeRouter)
    for router in (fit.router, random_router("gates", table), random_router("evidence_gate", table)):
        expected = run_on_table(router, table)
        folder = tmp_path / router.kind
        contents = BundleContents(
            supernet=supernet,
            router=router,
            normalization=NORMALIZATION,
            class_names=tuple(map(str, range(10))),
            examples=pixels[:8],
        )
        save_bundle(folder, contents, claims={}, gate_yaml="")
        bundle = load_bundle(folder)
        answer = bundle(pixels)
        output = DynamicNet(supernet, router)(images)
        decided = ~expected.is_tie
        assert decided.any()
        for row in range(len(images)):
            route = int(output.routes[row])
            torch.testing.assert_close(output.logits[row], alone[route][row], rtol=1e-4, atol=1e-4)
            assert bundle.route_names[int(answer.routes[row])] == supernet.subnets[route].name
            torch.testing.assert_close(answer.probabilities[row], alone[route][row].softmax(0), rtol=1e-4, atol=1e-4)
            if decided[row]:
                assert (route, int(output.madds[row])) == (expected.routes[row], expected.madds[row])
    if supernet.spec.gates[0].name == ENTRY:
        costs = [subnet_cost(supernet.spec, subnet, 16) for subnet in supernet.subnets]
        assert {cost.trunk_madds for cost in costs} == {3 * 16 * 16}, "nothing but the thumbnail is shared"


@pytest.mark.parametrize(
    ("family", "names", "segments"),
    [
        ("ds_tiny", [ENTRY, "gate0"], [[], [0], []]),
        ("ds_resnet", [ENTRY, "gate0", "gate1"], [[], [0], [1], [2]]),
    ],
)
def test_the_familys_gates_remain_where_members_part(family: str, names: list[str], segments: list[list[int]]) -> None:
    own = early(small_set(family))
    assert differs_before_gates(own)
    assert not differs_before_gates(small_set(family))
    subnets = with_entry_gate(own)
    assert [gate.name for gate in subnets.spec.gates] == names
    assert [list(each) for each in own_segments(subnets.spec)] == segments
    assert with_entry_gate(subnets) is subnets
    assert subnets.members == own.members
    again = SubnetSet.from_json(
        SupernetSpec.from_json(json.loads(json.dumps(subnets.spec.to_json()))),
        json.loads(json.dumps(subnets.to_json())),
    )
    assert again == subnets
    RouteTree.of(subnets)
    for subnet in own:
        plain, gated = subnet_cost(own.spec, subnet, 16), subnet_cost(subnets.spec, subnet, 16)
        assert gated.madds == plain.madds + 3 * 16 * 16
        assert gated.params == plain.params
        assert sum(gated.segments) == gated.madds


def test_a_gate_at_which_nobody_parts_is_left_out() -> None:
    own = early(small_set("ds_tiny"))
    two = with_entry_gate(SubnetSet(own.spec, (own[0], own[2])))
    assert [gate.name for gate in two.spec.gates] == [ENTRY]
    assert two.spec.layout[OWN_GATES] == ["gate0"]
    without = with_entry_gate(SubnetSet(replace(own.spec, gates=()), own.members))
    assert [gate.name for gate in without.spec.gates] == [ENTRY]
    assert OWN_GATES not in without.spec.layout


@pytest.mark.parametrize("family", ["ds_tiny", "ds_resnet", TRACED[0]])
@torch.no_grad()
def test_a_member_under_an_entry_gate_computes_what_it_computes_alone(family: str) -> None:
    own = early(layout(TRACED[0], task(), {"gates": ["pool"], "step": 2}) if family == TRACED[0] else small_set(family))
    several = with_entry_gate(SubnetSet(own.spec, (own[0], own[-1])))
    assert [gate.name for gate in several.spec.gates] == [ENTRY]
    supernet = shaken(rebuild(several)).eval()
    images, tensors = NORMALIZATION.apply(tensor_data(3).images("val")), supernet.state_dict()
    for subnet in several:
        single = rebuild(SubnetSet(own.spec, (subnet,))).eval()
        single.load_state_dict({name: tensors[name] for name in single.state_dict()})
        assert torch.equal(single(images, subnet), supernet(images, subnet))
        plain = supernet.cut_head(subnet).eval()
        torch.testing.assert_close(plain(images), single(images, subnet), rtol=1e-4, atol=1e-4)


def test_a_family_whose_members_differ_early_gets_an_entry_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = families.get_family("ds_tiny")
    monkeypatch.setitem(
        families._FAMILIES, "ds_tiny", replace(tiny, layout=lambda task, options: early(tiny.layout(task, options)))
    )
    supernet = create("ds_tiny", task(), {"num_routes": 3}, norm="group_norm")
    assert [gate.name for gate in supernet.spec.gates] == [ENTRY, "gate0"]
    assert supernet.spec.norm == "group_norm"
