"""DS-ResNet: its options and its residual streams."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from dsnet.errors import ConfigError
from dsnet.families import Task, create, layout, rebuild
from dsnet.families.traced import traced_spec
from dsnet.network.blocks import SlicedConvNorm, add_streams
from dsnet.network.plain import make_plain
from dsnet.space.cost import pooling_madds, subnet_cost
from dsnet.space.spec import Subnet
from dsnet.space.subnet_set import SubnetSet
from dsnet.zoo.resnet import BasicBlock
from tests.dsnet.samples import random_images, shaken, task

IMAGENET = Task(1000, 3, 224)
SMALL = {"depth": 14, "width": 0.5, "ratios": [0.5, 1.0]}


def published_params(subnets: SubnetSet, extra_projection: int) -> int:
    """Parameters of the full network without what this family adds: attentions and a projection in
    the first stage of basic blocks."""
    spec = subnets.spec
    attentions = 0
    for op in spec.ops:
        if op.kind == "attention":
            width = spec.groups[op.in_group].max_width
            attentions += 2 * op.hidden * width + op.hidden + width
    return subnet_cost(spec, subnets.largest, spec.image_size).params - attentions - extra_projection


@pytest.mark.parametrize(
    ("depth", "num_params", "extra_projection"),
    [(18, 11_689_512, 64 * 64 + 128), (34, 21_797_672, 64 * 64 + 128), (50, 25_557_032, 0)],
)
def test_full_networks_have_the_parameters_of_the_well_known_ones(
    depth: int, num_params: int, extra_projection: int
) -> None:
    subnets = layout("ds_resnet", IMAGENET, {"depth": depth, "stem": "large"})
    assert published_params(subnets, extra_projection) == num_params


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_without_attention_and_needless_projections_the_full_network_is_the_well_known_one(depth: int) -> None:
    small = replace(IMAGENET, image_size=64)
    plain = {"depth": depth, "stem": "large", "projection": "needed", "attention": False}
    subnets = layout("ds_resnet", small, plain)
    well_known = traced_spec(f"resnet{depth}", small)
    cost = subnet_cost(subnets.spec, subnets.largest, 64)
    expected = subnet_cost(well_known, Subnet("full", well_known.max_widths), 64)
    gates = range(len(subnets.spec.gates))
    evidence = sum(pooling_madds(subnets.spec, subnets.largest, gate, 64) for gate in gates)
    assert cost.params == expected.params == {18: 11_689_512, 34: 21_797_672, 50: 25_557_032}[depth]
    assert cost.madds - evidence == expected.madds - pooling_madds(well_known, Subnet("", well_known.max_widths), 0, 64)
    attended = layout("ds_resnet", small, {"depth": depth, "stem": "large"})
    added = subnet_cost(attended.spec, attended.largest, 64).params - cost.params
    assert added == {18: 45_696 + 64 * 64 + 128, 34: 45_696 + 64 * 64 + 128, 50: 692_496}[depth]


@torch.no_grad()
def test_it_computes_what_the_well_known_network_computes() -> None:
    plain = make_plain("resnet18", 10, 3, 0).eval()
    for norm in plain.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.uniform_(-0.2, 0.2)
            norm.running_var.uniform_(0.5, 1.5)
    options = {"depth": 18, "stem": "large", "projection": "needed", "attention": False}
    supernet = create("ds_resnet", task(), options).eval()
    layers = [plain.get_submodule("conv1"), plain.get_submodule("bn1")]
    for block in plain.modules():
        if isinstance(block, BasicBlock):
            layers += [block.conv1, block.bn1, block.conv2, block.bn2, *(block.downsample or ())]
    own = [part for part in supernet.modules() if isinstance(part, SlicedConvNorm)]
    assert len(layers) == 2 * len(own)
    for part, conv, norm in zip(own, layers[::2], layers[1::2], strict=True):
        part.conv.weight.copy_(conv.weight)
        part.norm.weight.copy_(norm.weight)
        part.norm.bias.copy_(norm.bias)
        mean, var, _ = part.norm.statistics(part.norm.key_of(supernet.spec.max_widths))
        mean.copy_(norm.running_mean)
        var.copy_(norm.running_var)
    supernet.classifier.load_state_dict(plain.get_submodule("fc").state_dict())
    images = random_images(2, 40)
    widest = supernet.subnets.at(supernet.spec.max_widths)
    torch.testing.assert_close(supernet(images, widest), plain(images), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_stage_without_projection_keeps_the_channels_of_the_stem() -> None:
    supernet = shaken(create("ds_resnet", task(), {**SMALL, "projection": "needed"})).eval()
    narrow = supernet.subnets[0]
    assert narrow.widths[:2] == (8, 4)
    first = supernet.trunk(random_images(2), narrow).features
    block = supernet.get_submodule("stages.0.blocks.0")
    branch = first
    for index, conv in enumerate(block.convs):
        branch = conv(torch.relu(branch) if index else branch, narrow)
    after = block(first, narrow)
    assert after.shape[1] == 8
    assert torch.equal(after[:, :4], torch.relu(first[:, :4] + branch))
    assert torch.equal(after[:, 4:], torch.relu(first[:, 4:]))
    assert [hasattr(stage.blocks[0], "projection") and stage.blocks[0].projection is not None for stage in supernet.stages] == [
        False, True, True,
    ]  # fmt: skip


@torch.no_grad()
def test_without_attention_a_gate_reads_the_means_of_the_channels() -> None:
    supernet = shaken(create("ds_resnet", task(), {**SMALL, "attention": False})).eval()
    features, narrow = random_images(2), supernet.subnets[0]
    assert [gate.hidden for gate in supernet.spec.gates] == [8, 8, 16]
    for gate, width in enumerate((8, 4, 8)):
        output = supernet.upto_gate(gate, features, narrow)
        features = output.features
        assert torch.equal(output.features, output.gate_input)
        torch.testing.assert_close(output.hidden[:, :width], features.mean((2, 3)))
        assert not output.hidden[:, width:].any()
    assert not any("attention" in name for name in supernet.state_dict())


def test_the_defaults_of_the_later_options_change_no_layout() -> None:
    for options in ({}, {"depth": 50, "streams": "padded"}):
        spec = layout("ds_resnet", task(), options).spec
        again = layout("ds_resnet", task(), {**options, "projection": "always", "attention": True}).spec
        assert spec.fingerprint == again.fingerprint
        assert all("attention" not in stage for stage in spec.layout["stages"])


def test_resnet_50_costs_about_what_the_field_says() -> None:
    subnets = layout("ds_resnet", IMAGENET, {"depth": 50, "stem": "large"})
    cost = subnet_cost(subnets.spec, subnets.largest, 224).madds
    assert cost == pytest.approx(4.1e9, rel=0.01)  # docs/methods.md, section 7: 4.1 G


def test_resnet_20_of_small_images_has_its_size() -> None:
    subnets = layout("ds_resnet", task(10, 32))
    assert [group.max_width for group in subnets.spec.groups] == [16, 16, 32, 64]
    assert [subnet.widths for subnet in subnets] == [
        (16, 4, 8, 16),
        (16, 8, 16, 32),
        (16, 12, 24, 48),
        (16, 16, 32, 64),
    ]
    assert round(published_params(subnets, 16 * 16 + 32) / 1e6, 2) == 0.27


def test_all_paths_are_every_combination_and_take_group_norm() -> None:
    subnets = layout("ds_resnet", task(), {"depth": 18, "paths": "all"})
    assert len(subnets) == 4**4
    assert len({subnet.widths for subnet in subnets}) == 4**4
    assert subnets.spec.norm == "group_norm"
    assert subnets.teacher is None
    named = {subnet.name: subnet for subnet in subnets}
    assert named["path-0312"].widths == (64, 16, 128, 128, 384)


def test_a_list_of_paths_takes_a_bank_unless_told_otherwise_and_a_teacher_where_none_is_full() -> None:
    options = {"paths": [[3, 1, 2], [0, 0, 0]]}
    subnets = layout("ds_resnet", task(), options)
    assert [subnet.name for subnet in subnets] == ["path-312", "path-000"]
    assert [subnet.widths for subnet in subnets] == [(16, 16, 16, 48), (16, 4, 8, 16)]
    assert subnets.spec.norm == "private_stats"
    assert subnets.teacher == Subnet("largest", (16, 16, 32, 64))
    assert layout("ds_resnet", task(), options, norm="group_norm").spec.norm == "group_norm"
    with_full = layout("ds_resnet", task(), {"paths": [[3, 3, 3], [0, 0, 0]]})
    assert with_full.teacher is None
    assert with_full.largest == with_full[0]


def test_the_full_width_stays_where_no_ratio_is_one() -> None:
    subnets = layout("ds_resnet", task(), {"ratios": [0.25, 0.5]})
    assert [group.max_width for group in subnets.spec.groups] == [16, 16, 32, 64]
    assert subnets.teacher is not None


@pytest.mark.parametrize(("depth", "num_gates"), [(20, 3), (18, 4), (50, 4)])
@pytest.mark.parametrize("streams", ["tied", "padded"])
def test_there_is_a_gate_before_each_stage(depth: int, num_gates: int, streams: str) -> None:
    spec = layout("ds_resnet", task(), {"depth": depth, "streams": streams}).spec
    assert len(spec.gates) == num_gates
    for number, gate in enumerate(spec.gates):
        assert all(not group.name.startswith(f"stage{number}") for group in spec.groups[: gate.num_prefix_groups])
        assert spec.groups[gate.num_prefix_groups].name.startswith(f"stage{number}")
        assert gate.hidden >= 8
    assert spec.gates[0].num_prefix_groups == 1


@torch.no_grad()
def test_the_attention_is_the_identity_at_first() -> None:
    supernet = create("ds_resnet", task(), SMALL).eval()
    trunk = supernet.trunk(random_images(2), supernet.subnets[0])
    assert torch.equal(trunk.features, trunk.gate_input)
    assert trunk.hidden.any()


@torch.no_grad()
def test_padded_streams_with_tied_widths_are_tied_streams() -> None:
    tied = shaken(create("ds_resnet", task(), SMALL, norm="group_norm")).eval()
    padded = create("ds_resnet", task(), {**SMALL, "streams": "padded"}, norm="group_norm").eval()
    padded.load_state_dict(tied.state_dict())
    for first, second in zip(tied.subnets, padded.subnets, strict=True):
        assert torch.equal(tied(random_images(2), first), padded(random_images(2), second))


@torch.no_grad()
def test_a_padded_stream_holds_the_channels_of_its_widest_writer() -> None:
    own = layout("ds_resnet", task(), {**SMALL, "streams": "padded"}, norm="group_norm")
    # Two blocks per stage: inner, stream, inner, stream.
    widths = (8, 4, 3, 4, 7, 8, 16, 8, 5, 16, 9, 16, 30)
    supernet = rebuild(SubnetSet(own.spec, (Subnet("odd", widths),))).eval()
    odd = supernet.subnets[0]
    features = random_images(2)
    channels = []
    for gate in range(3):
        output = supernet.upto_gate(gate, features, odd)
        features = output.features
        channels.append(features.shape[1])
    assert channels == [8, 7, 16]
    stage = supernet.get_submodule("stages.0")
    first, second = stage.get_submodule("blocks.0"), stage.get_submodule("blocks.1")
    x = supernet.trunk(random_images(2), odd).features
    middle = first(x, odd)
    branch = second.convs[1](torch.relu(second.convs[0](middle, odd)), odd)  # type: ignore[index, operator]
    after = second(middle, odd)
    assert middle.shape[1] == 3
    torch.testing.assert_close(after[:, :3], torch.relu(middle + branch[:, :3]))
    torch.testing.assert_close(after[:, 3:], torch.relu(branch[:, 3:]))


def test_streams_add_where_both_are_and_else_stay() -> None:
    narrow, wide = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)), torch.ones(2, 5, 4, 4)
    for total in (add_streams(narrow, wide), add_streams(wide, narrow)):
        assert torch.equal(total[:, :3], narrow + 1.0)
        assert torch.equal(total[:, 3:], wide[:, 3:])
    assert torch.equal(add_streams(wide, wide), 2 * wide)


def test_statistics_that_must_not_be_shared_are_refused() -> None:
    own = layout("ds_resnet", task(), {"depth": 50, "width": 0.125, "ratios": [0.5, 1.0]})
    base = own[0]
    other = Subnet("other", (*base.widths[:2], base.widths[2] + 1, *base.widths[3:]))  # the first stage's stream alone
    mixed = SubnetSet(own.spec, (base, other))
    with pytest.raises(
        ValueError, match=r"equal widths up to channel group 'stage0\.inner', but not up to 'stage0\.stream'"
    ):
        rebuild(mixed)
    free = replace(own.spec, norm="group_norm")
    assert rebuild(SubnetSet(free, mixed.members)).batch_norms() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 19}, "depth is 19, but must be one of 18, 34, 50 or 6 n"),
        ({"depth": 20.0}, "depth is 20.0"),
        ({"depth": 206}, "depth is 206"),
        ({"width": 0}, "width is 0"),
        ({"width": 0.5}, "width 0.5 makes neighbouring widths equal"),
        ({"ratios": [1.0]}, "ratios is"),
        ({"ratios": [0.5, 0.25]}, "ratios is"),
        ({"ratios": [0.5, 1.5]}, "ratios is"),
        ({"ratios": ["a", "b"]}, "ratios is"),
        ({"ratios": 0.5}, "ratios is 0.5"),
        ({"paths": "some"}, "paths is 'some'"),
        ({"paths": [[0, 0, 0]]}, "a list of 2 to 1024 paths"),
        ({"paths": [[0, 0], [1, 1]]}, "a list of 3 indices of ratios in 0..3"),
        ({"paths": [[0, 0, 4], [1, 1, 1]]}, "indices of ratios in 0..3"),
        ({"paths": [[0, 0, True], [1, 1, 1]]}, "indices of ratios in 0..3"),
        ({"paths": [[0, 0, 0], [0, 0, 0]]}, "names a path twice"),
        ({"depth": 18, "paths": "all", "ratios": [0.1, 0.3, 0.4, 0.5, 0.7, 1.0]}, "makes 1296 sub-networks"),
        ({"stem": "tall"}, "stem is 'tall', but must be 'small' or 'large'"),
        ({"streams": "loose"}, "streams is 'loose'"),
        ({"projection": "never"}, "projection is 'never', but must be 'always' or 'needed'"),
        ({"attention": 0}, "attention is 0, but must be true or false"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layout("ds_resnet", task(), options)
