"""Gates inside traced networks: where a graph can be cut, and the parts against the whole."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import fx, nn

from dsnet.errors import ConfigError
from dsnet.families import Task, create, get_family, layout
from dsnet.network.cut_points import MAX_LISTED, articulation_points
from dsnet.network.supernet import Supernet
from dsnet.network.traced import TracedSupernet
from dsnet.space.cost import subnet_cost
from dsnet.space.spec import SupernetSpec
from dsnet.zoo import ZOO
from tests.dsnet import nets
from tests.dsnet.cases import TRACED
from tests.dsnet.samples import random_images, shaken, task

SCALED = "tests.dsnet.nets:Scaled"
PLAIN = {**ZOO, **{name: getattr(nets, name) for name in ("Residual", "Dense", "Pinned", "Scaled")}}


def flows_past(graph: fx.Graph, removed: fx.Node) -> bool:
    """Whether the output still depends on the image without a node."""
    reached: set[fx.Node] = set()
    for node in graph.nodes:
        if node is not removed and (node.op == "placeholder" or any(each in reached for each in node.all_input_nodes)):
            reached.add(node)
    return any(node.op == "output" for node in reached)


@pytest.mark.parametrize("name", PLAIN)
def test_all_data_flows_through_the_articulation_points_and_through_no_other_node(name: str) -> None:
    with torch.device("meta"):
        graph = fx.symbolic_trace(PLAIN[name](10, 3)).graph
    expected = [node for node in graph.nodes if node.op != "output" and not flows_past(graph, node)]
    assert articulation_points(graph) == expected
    assert len(expected) > 3


@pytest.mark.parametrize(
    ("model", "gates"),
    [
        (TRACED[0], ["pool"]),
        (TRACED[0], ["pool", "entry"]),
        (TRACED[1], ["relu"]),
        (TRACED[2], ["second"]),
        (SCALED, ["add_1"]),
        pytest.param("resnet18", ["layer3", "layer1.0"], marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_a_network_with_gates_takes_the_tensors_of_one_without_and_gives_its_logits(
    model: str, gates: list[str]
) -> None:
    without = shaken(create(model, task(image_size=32))).eval()
    options = {"gates": gates, "ratios": [0.5, 1.0]}
    subnets = layout(model, task(image_size=32), options)
    supernet = create(model, task(image_size=32), options).eval()
    widest = supernet.subnets[-1]
    state = {name: value for name, value in without.state_dict().items() if name in supernet.state_dict()}
    missing = supernet.load_state_dict(state, strict=False).missing_keys
    assert set(missing) <= _statistics_of_others(supernet)
    assert [name for name, _ in supernet.named_parameters()] == [name for name, _ in without.named_parameters()]
    images = random_images(2, 32)
    assert torch.equal(supernet(images, widest), without(images, without.subnets[-1]))
    first = [subnet.prefix(subnets.spec.gates[0].num_prefix_groups) for subnet in subnets]
    assert first == [first[-1]] * len(subnets), "they share all channels before the gate"
    assert len({subnet.widths for subnet in subnets}) == 2
    for subnet in subnets:
        assert sum(subnet_cost(subnets.spec, subnet, 32).segments) == subnet_cost(subnets.spec, subnet, 32).madds


def _statistics_of_others(supernet: Supernet) -> set[str]:
    """The names of the statistics that only the narrower sub-network has."""
    narrow, widest = supernet.subnets
    banks = {name: part for name, part in supernet.named_modules() if part in supernet.batch_norms()}
    return {
        f"{name}.{part}_{'_'.join(map(str, bank.key_of(narrow.widths)))}"
        for name, bank in banks.items()
        if bank.key_of(narrow.widths) != bank.key_of(widest.widths)
        for part in ("mean", "var", "updates")
    }


@torch.no_grad()
def test_the_parts_of_a_copy_read_the_copys_tensors() -> None:
    """An EMA teacher is a copy; parameters and buffers that no layer holds are read in both
    parts."""
    supernet = create(SCALED, task(), {"gates": ["add_1"], "step": 2}).eval()
    assert isinstance(supernet, TracedSupernet)
    images, subnet = random_images(2), supernet.subnets[0]
    before = supernet(images, subnet)
    other = copy.deepcopy(supernet).double()
    for value in other.state_dict().values():
        value.mul_(2)
    expected = other.body(images.double(), subnet.widths)
    assert torch.equal(other(images.double(), subnet), expected)
    assert torch.equal(supernet(images, subnet), before)
    assert not torch.allclose(expected.float(), before)
    trunk, tail = other.cut_trunk(subnet).double().eval(), other.cut_tail(subnet).double().eval()
    torch.testing.assert_close(tail(trunk(images.double()).features), expected)


@torch.no_grad()
def test_the_evidence_is_the_mean_of_each_channel_and_zeros_for_those_of_wider_sub_networks() -> None:
    supernet = create(TRACED[1], task(), {"gates": ["last", "relu"], "paths": "all", "ratios": [0.5, 1.0], "step": 2})
    assert [gate.name for gate in supernet.spec.gates] == ["relu", "last"]
    narrow = supernet.subnets[0]
    assert len(supernet.subnets) == 4
    first = supernet.eval().upto_gate(0, random_images(3), narrow)
    output = supernet.upto_gate(1, first.features, narrow)
    width = output.features.shape[1]
    assert 0 < width < supernet.spec.gates[1].hidden == output.hidden.shape[1] == 8
    torch.testing.assert_close(output.hidden[:, :width], output.gate_input.mean((2, 3)))
    assert not output.hidden[:, width:].any()
    wide = nn.functional.pad(first.features, (0, 0, 0, 0, 0, 3), value=9.0)  # mixed with a wider one
    assert torch.equal(supernet.upto_gate(1, wide, narrow).features, output.features)


MESSAGES = {
    "layer5": "has no submodule or node 'layer5'; did you mean 'layer[1-4]'",
    "colour": "has no submodule or node 'colour'; possible places: ",
    "layer3_0_conv1": r"layer3_0_conv1 is no place for a gate: beside it layer2_1_relu_1 is needed after it; possible places: ",
    "layer3.0.bn1": "layer3.0.bn1, which ends at layer3_0_bn1, is no place for a gate: beside it",
    "bn1": "bn1 is no place for a gate: relu changes its value in place; name that one",
    "images": "it is the image; that gate is called entry",
    "output": "it is the end",
    "flatten": r"its value is not \[batch, channels, height, width\], but \[1, 512\]",
    "layer4": "the gate layer4 has nothing to choose: no channels that can be sliced are first written between it and the end",
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "message"), MESSAGES.items())
def test_a_name_that_is_no_place_is_refused_with_the_reason(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layout("resnet18", Task(10, 3, 32), {"gates": [name]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gates": 3}, "gates is 3, but must be a list of names"),
        ({"gates": [""]}, "must be a list of names"),
        ({"gates": ["pool", "block", "pool"]}, "gates names the same place twice: pool and pool"),
        ({"gates": ["entry", "block", "pool"]}, "the gate block has nothing to choose: .* between it and pool"),
        ({"paths": "some"}, "paths is 'some', but must be 'uniform' or 'all'"),
        (
            {"gates": ["entry", "pool"], "paths": "all", "ratios": [k / 40 for k in range(1, 41)]},
            "with 40 ratios and 2 gates makes 1600 sub-networks",
        ),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layout(TRACED[0], task(), options)


def test_the_order_and_the_kind_of_the_names_do_not_matter() -> None:
    first = layout(TRACED[0], task(), {"gates": ["block", "entry", "relu"]})
    again = layout(TRACED[0], task(), {"gates": ["relu", "add", "entry"]})
    assert first == again
    assert [gate.name for gate in first.spec.gates] == ["entry", "relu", "add"]
    assert first.spec == SupernetSpec.from_json(first.spec.to_json())
    default = layout(TRACED[0], task())
    for written in ([], "entry", ["entry"]):
        assert layout(TRACED[0], task(), {"gates": written}) == default
    other = get_family(TRACED[0]).for_task(first.spec, task(7, 24))
    assert other == layout(TRACED[0], task(7, 24), {"gates": ["entry", "relu", "block"]}).spec


def test_a_residual_stream_that_is_written_on_both_sides_counts_as_before_the_gate() -> None:
    spec = layout("resnet18", Task(10, 3, 32), {"gates": ["layer1.0"]}).spec
    names = [group.name for group in spec.groups]
    assert spec.gates[0].num_prefix_groups == names.index("layer1_1_conv1")
    assert "layer1_1_conv2" not in names, "it is tied to the stem"


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet18", "mobilenet_v1", TRACED[0]])
def test_places_are_where_gates_can_be_with_the_costs_before_and_after(model: str) -> None:
    base = layout(model, Task(10, 3, 32))
    places = get_family(model).gate_places(base.spec)
    assert 0 < sum(place.is_main for place in places) <= MAX_LISTED
    assert [place.madds_before for place in places] == sorted(place.madds_before for place in places)
    for place in (places[0], places[-1]):
        gated = layout(model, Task(10, 3, 32), {"gates": [place.name]})
        (gate,) = gated.spec.gates
        assert (gate.name, gate.hidden) == (place.node, place.channels)
        before, after = subnet_cost(gated.spec, gated.largest, 32).segments
        pooling = place.channels * place.size[0] * place.size[1]
        assert (before - pooling, after) == (place.madds_before, place.madds_after)


def test_a_family_of_its_own_has_its_gates_in_one_place() -> None:
    spec = layout("ds_tiny", task()).spec
    assert get_family("ds_tiny").gate_places(spec) == ()


def test_features_at_a_gate_have_the_size_that_its_place_says() -> None:
    supernet = create(TRACED[0], task(), {"gates": ["pool"]}).eval()
    (place,) = [place for place in get_family(TRACED[0]).gate_places(supernet.spec) if place.name == "pool"]
    features = supernet.trunk(random_images(2), supernet.subnets[0]).features
    assert features.shape == (2, place.channels, *place.size)
