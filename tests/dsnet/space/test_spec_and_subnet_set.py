"""Specs, sub-networks and sets of them."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from dsnet.errors import CheckpointError, ConfigError
from dsnet.families import Family, create, get_family, layout, rebuild, register
from dsnet.space.cost import subnet_cost
from dsnet.space.spec import CLASSES, IMAGE, IMAGE_CHANNELS, Op, Subnet, SupernetSpec
from dsnet.space.subnet_set import SubnetSet
from tests.dsnet.cases import CASES, FAMILIES, Case
from tests.dsnet.kernels import kernel_set
from tests.dsnet.samples import SMALL_OPTIONS, small_set, task


@pytest.mark.parametrize("case", CASES, ids=str)
def test_spec_and_set_survive_json(case: Case) -> None:
    subnets = case.subnets()
    spec = SupernetSpec.from_json(json.loads(json.dumps(subnets.spec.to_json())))
    again = SubnetSet.from_json(spec, json.loads(json.dumps(subnets.to_json())))
    assert spec == subnets.spec
    assert spec.fingerprint == subnets.spec.fingerprint
    assert again == subnets


def test_a_square_is_stored_as_a_number_and_another_shape_as_two() -> None:
    spec = small_set("ds_tiny").spec
    assert replace(spec, image_size=(16, 16)).to_json() == spec.to_json()
    assert spec.to_json()["image_size"] == 16
    oblong = replace(spec, image_size=[12, 20])  # type: ignore[arg-type]
    assert json.loads(json.dumps(oblong.to_json()))["image_size"] == [12, 20]
    assert SupernetSpec.from_json(json.loads(json.dumps(oblong.to_json()))) == oblong
    assert len({each.fingerprint for each in (spec, oblong, replace(spec, image_size=(20, 12)))}) == 3
    with pytest.raises(CheckpointError, match="image_size is"):
        SupernetSpec.from_json({**spec.to_json(), "image_size": [1, 2, 3]})


def test_fingerprint_tells_specs_apart() -> None:
    spec = small_set("ds_tiny").spec
    assert replace(spec, num_classes=11).fingerprint != spec.fingerprint


def test_set_of_another_supernet_is_refused() -> None:
    subnets = small_set("ds_tiny")
    other = replace(subnets.spec, num_classes=11)
    with pytest.raises(CheckpointError, match="belongs to supernet"):
        SubnetSet.from_json(other, subnets.to_json())


@pytest.mark.parametrize("missing", ["supernet", "members", "teacher"])
def test_set_with_a_missing_part_is_a_checkpoint_error(missing: str) -> None:
    subnets = small_set("ds_tiny")
    data = subnets.to_json()
    del data[missing]
    with pytest.raises(CheckpointError, match=missing):
        SubnetSet.from_json(subnets.spec, data)


def test_stored_members_that_do_not_fit_are_a_checkpoint_error() -> None:
    subnets = small_set("ds_tiny")
    data = subnets.to_json()
    data["members"][0]["widths"] = [1, 2]
    with pytest.raises(CheckpointError, match="2 widths"):
        SubnetSet.from_json(subnets.spec, data)


def test_a_spec_from_before_the_kinds_is_read_and_unset_fields_are_left_out() -> None:
    """Then there were channels and kernels."""
    data = kernel_set().spec.to_json()
    assert [set(group) for group in data["groups"]] == [{"name", "max_width"}] * 2 + [{"name", "max_width", "kind"}]
    old = json.loads(json.dumps(data))
    del old["groups"][2]["kind"]
    old["groups"][2]["is_kernel"] = True
    old["groups"][0]["is_kernel"] = False
    assert SupernetSpec.from_json(old) == kernel_set().spec
    assert not {"when", "out_repeat"} & set().union(*(set(op) for op in data["ops"]))


def test_spec_with_an_unknown_field_is_a_checkpoint_error() -> None:
    data = small_set("ds_tiny").spec.to_json()
    with pytest.raises(CheckpointError, match="another version"):
        SupernetSpec.from_json({**data, "colour": 1})
    del data["ops"]
    with pytest.raises(CheckpointError, match="ops"):
        SupernetSpec.from_json(data)


def test_len_index_and_iteration_exclude_the_teacher() -> None:
    subnets = small_set("ds_tiny")
    assert subnets.teacher is not None
    assert len(subnets) == len(list(subnets)) == len(subnets.members) == 3
    assert subnets.all == (*subnets.members, subnets.teacher)
    assert subnets.largest == subnets.teacher
    assert [subnets[k].name for k in range(3)] == ["subnet-00", "subnet-01", "subnet-02"]


def test_largest_without_a_teacher_is_the_costliest_member() -> None:
    subnets = small_set("ds_tiny")
    reversed_set = SubnetSet(subnets.spec, subnets.members[::-1])
    assert reversed_set.largest == subnets.members[-1]


def test_by_madds_sorts_by_cost_and_keeps_ids() -> None:
    subnets = small_set("ds_tiny")
    mixed = subnets.subset([2, 0, 1])
    assert mixed.by_madds() == (1, 2, 0)
    assert mixed.teacher is None
    costs = [subnet_cost(mixed.spec, mixed[k], 16).madds for k in mixed.by_madds()]
    assert costs == sorted(costs)


def test_empty_set_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        SubnetSet(small_set("ds_tiny").spec, ())


def test_two_members_of_one_name_are_refused() -> None:
    subnets = small_set("ds_tiny")
    with pytest.raises(ValueError, match="unique"):
        SubnetSet(subnets.spec, (subnets[0], Subnet(subnets[0].name, subnets[1].widths)))


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ((4, 8), "2 widths"),
        ((4, 8, 8, 10_000), "must lie in 1.."),
        ((4, 8, 0, 16), "width 0 of channel group 'stage1'"),
    ],
)
def test_member_that_does_not_fit_is_refused(widths: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SubnetSet(small_set("ds_tiny").spec, (Subnet("odd", widths),))


def test_members_that_differ_before_the_gate_are_refused_where_a_gate_is_attached() -> None:
    subnets = small_set("ds_tiny")
    first = subnets[0]
    other = Subnet("other", (first.widths[0] + 1, *first.widths[1:]))
    mixed = SubnetSet(subnets.spec, (first, other))
    with pytest.raises(ValueError, match=r"must agree on the 2 channel groups before gate 'gate0'"):
        mixed.prefix_upto(0)
    with pytest.raises(ValueError, match="must agree"):
        rebuild(mixed)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_is_what_all_members_share(family: str) -> None:
    subnets = small_set(family)
    prefix = subnets.prefix_upto(0)
    assert all(subnet.widths[: len(prefix)] == prefix for subnet in subnets)
    assert len(prefix) == subnets.spec.gates[0].num_prefix_groups


def test_unknown_model_suggests_the_near_one() -> None:
    with pytest.raises(ConfigError, match="unknown model 'ds_mbnt'; did you mean 'ds_mbnet'"):
        layout("ds_mbnt", task())
    with pytest.raises(ConfigError, match="known: ds_mbnet, ds_resnet, ds_tiny"):
        layout("zzz", task())


def test_unknown_option_suggests_the_near_one() -> None:
    with pytest.raises(ConfigError, match=r"supernet.options.widht: unknown option .* did you mean 'width'"):
        layout("ds_tiny", task(), {"widht": 1.0})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("width", 0.0),
        ("width", "wide"),
        ("width", True),
        ("stem_stride", 3),
        ("num_routes", 1),
        ("num_routes", 13),
        ("num_routes", 2.0),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("width", 0.1),
    ],
)
def test_option_out_of_range_is_refused_by_name(option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=option):
        layout("ds_tiny", task(), {option: value})


@pytest.mark.parametrize("num_routes", range(2, 13))
def test_any_number_of_routes_gives_rising_costs(num_routes: int) -> None:
    for family in ("ds_mbnet", "ds_tiny"):
        subnets = layout(family, task(), {"num_routes": num_routes})
        costs = [subnet_cost(subnets.spec, subnet, 32).madds for subnet in subnets]
        assert len(subnets) == num_routes
        assert all(low < high for low, high in pairwise(costs))


def test_a_family_cannot_be_registered_twice() -> None:
    known = get_family("ds_tiny")
    with pytest.raises(ValueError, match="registered twice"):
        register(Family("ds_tiny", known.defaults, known.layout, known.build))


def test_equal_seeds_give_equal_weights_and_leave_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first, second, other = (create("ds_tiny", task(), seed=seed).state_dict() for seed in (5, 5, 6))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["stem.weight"], other["stem.weight"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("in_channels", [1, 3])
def test_an_op_that_reads_the_image_has_the_channels_of_the_image(family: str, in_channels: int) -> None:
    own = layout(family, replace(task(), in_channels=in_channels), SMALL_OPTIONS.get(family, {}))
    readers = [op for op in own.spec.ops if op.reads == IMAGE]
    assert readers
    for subnet in own.all:
        assert {op.input_width(own.spec, subnet.widths) for op in readers} == {in_channels}


def test_the_input_of_an_op_may_be_several_groups_the_image_and_the_classes() -> None:
    spec = small_set("ds_tiny").spec
    op = Op("join", "conv", "stem", 0, 1, parts=((IMAGE_CHANNELS, 2), (1, 4), (CLASSES, 1)))
    assert op.input_width(spec, (5, 7, 9, 11)) == 2 * 3 + 4 * 7 + 10
    union = Op("stream", "conv", "stem", 0, 1, in_union=(1, 3))
    assert union.input_width(spec, (5, 7, 9, 11)) == 11


@pytest.mark.parametrize("group", [-3, 4])
def test_a_group_that_does_not_exist_is_no_width(group: int) -> None:
    spec = small_set("ds_tiny").spec
    with pytest.raises(ValueError, match=f"ds_tiny has no channel group {group}: it has 4"):
        spec.width_of(group, spec.max_widths)
