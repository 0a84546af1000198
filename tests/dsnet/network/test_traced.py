"""Traced networks: the sliced network against the plain one, channel groups, pins and refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dsnet.deploy.materialize import materialize
from dsnet.errors import ConfigError
from dsnet.families import Task, create, layout
from dsnet.image_size import ImageSize, height_and_width
from dsnet.network.channels import TracedGraph, analyse, pinned_spaces
from dsnet.network.plain import make_plain
from dsnet.network.traced import TracedSupernet
from dsnet.network.tracing import trace
from dsnet.space.cost import op_costs, subnet_cost
from dsnet.space.spec import CLASSES, Subnet
from tests.dsnet import nets
from tests.dsnet.cases import NEXT, TRACED
from tests.dsnet.samples import task

SIZES = (8, 16, (23, 30))
ZOO_MADDS = {  # conv + linear, 224 x 224, 1,000 classes
    "resnet18": 1814.1,
    "resnet50": 4089.2,
    "vgg11_bn": 7609.1,
    "mobilenet_v2": 300.8,
}


def shaken(plain: nn.Module) -> nn.Module:
    """The module in eval mode with statistics that are not the initial ones."""
    generator = torch.Generator().manual_seed(4)
    for name, buffer in plain.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + (0.5 if name.endswith("var") else -0.5))
    return plain.eval()


def supernet_of(model: str, plain: nn.Module, image_size: ImageSize = 16, channels: int = 3) -> TracedSupernet:
    """The supernet with the weights of the plain module."""
    supernet = create(model, Task(10, channels, image_size), seed=1)
    assert isinstance(supernet, TracedSupernet)
    supernet.load_plain(plain)
    return supernet.eval()


def images(size: ImageSize, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, *height_and_width(size), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("model", [*TRACED, NEXT])
@torch.no_grad()
def test_the_widest_is_the_plain_network(model: str, size: ImageSize, channels: int) -> None:
    plain = shaken(make_plain(model, 10, channels, 0))
    supernet = supernet_of(model, plain, size, channels)
    x = images(size, channels)
    assert supernet.subnets.largest.widths == supernet.spec.max_widths
    torch.testing.assert_close(supernet(x, supernet.subnets.largest), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", TRACED)
@torch.no_grad()
def test_a_slice_is_the_whole_network_with_the_other_channels_masked(model: str) -> None:
    """Channels beyond a width are zero after every layer that writes them: the rest of the network
    cannot tell the difference."""
    plain = shaken(make_plain(model, 10, 3, 0))
    supernet = supernet_of(model, plain)
    x = images(16)
    for subnet in supernet.subnets:
        masked = _masked(model, plain, supernet, subnet)
        torch.testing.assert_close(masked, supernet(x, subnet), rtol=1e-5, atol=1e-5)


def _masked(model: str, plain: nn.Module, supernet: TracedSupernet, subnet: Subnet) -> Tensor:
    """The output of the plain network whose weights read no channel beyond the widths."""
    masked = make_plain(model, 10, 3, 0)
    state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    parameters = dict(supernet.named_parameters())
    for name, axes in supernet.axes().items():
        if name not in parameters:  # the statistics of a set of widths
            continue
        tensor = state[name.removeprefix("body.")]
        for dimension, axis in enumerate(axes):
            if axis is None:
                continue
            keep = torch.zeros(axis.max_size, dtype=torch.bool)
            for start, length in axis.runs(subnet.widths):
                keep[start : start + length] = True
            tensor[(slice(None),) * dimension + (~keep,)] = 0
    masked.load_state_dict(state)
    return masked.eval()(images(16))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("model", [*TRACED, NEXT])
@torch.no_grad()
def test_a_cut_network_is_plain_and_equals_the_slice(model: str, size: ImageSize) -> None:
    supernet = supernet_of(model, shaken(make_plain(model, 10, 3, 0)), size)
    x = images(size)
    for subnet in supernet.subnets:
        for fold_bn in (False, True):
            cut = materialize(supernet, subnet, fold_bn=fold_bn)
            torch.testing.assert_close(cut(x), supernet(x, subnet), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("model", [*TRACED, NEXT])
@torch.no_grad()
def test_costs_are_those_of_a_counted_forward(model: str, size: ImageSize) -> None:
    supernet = supernet_of(model, shaken(make_plain(model, 10, 3, 0)), size)
    for subnet in supernet.subnets:
        check_cost(supernet, subnet, size)


def check_cost(supernet: TracedSupernet, subnet: Subnet, size: ImageSize) -> None:
    """The formula's MAdds and parameters are those of a counted forward of the cut network."""
    cut = materialize(supernet, subnet)
    with FlopCounterMode(display=False) as counter:
        cut(images(size, supernet.spec.in_channels)[:1])
    costs = op_costs(supernet.spec, subnet, size)
    own = sum(
        madds for op, (madds, _) in zip(supernet.spec.ops, costs, strict=True) if op.kind not in ("pool", "maxpool")
    )
    assert own == counter.get_total_flops() // 2
    assert subnet_cost(supernet.spec, subnet, size).params == sum(parameter.numel() for parameter in cut.parameters())


def test_additions_and_depthwise_convolutions_tie_channels_and_concatenations_do_not() -> None:
    residual = layout(TRACED[0], Task(10, 3, 16)).spec
    assert [group.name for group in residual.groups] == ["stem", "block_expand_0", "block_attention_reduce", "down"]
    dense = layout(TRACED[1], Task(10, 3, 16)).spec
    assert [group.name for group in dense.groups] == ["first", "left_0", "right_0", "last", "hidden"]
    last = next(op for op in dense.ops if op.name == "last")
    assert last.parts == ((0, 1), (1, 1), (2, 1))
    hidden = next(op for op in dense.ops if op.name == "hidden")
    assert hidden.parts == ((3, 4),), "2 x 2 pixels of each channel follow one another"


def _traced(module: nn.Module) -> TracedGraph:
    return analyse(trace(module, torch.zeros(1, 3, 16, 16)))


def test_the_ratio_1_is_the_whole_network_also_where_no_width_is_a_multiple_of_the_step() -> None:
    subnets = layout(TRACED[0], task(), {"step": 7})
    assert all(width % 7 for width in subnets.spec.max_widths)
    assert subnets.largest.widths == subnets.spec.max_widths
    assert all(width % 7 == 0 for width in subnets[0].widths)


def test_what_is_not_understood_keeps_its_channels_and_is_named() -> None:
    reasons = {space.pinned for _, space in pinned_spaces(_traced(nets.Pinned(10, 3)))}
    assert reasons == {"roll (roll) is not understood", "second_0 (Conv2d) is not understood"}
    spec = layout(TRACED[2], Task(10, 3, 16)).spec
    widths = [group.max_width for group in spec.groups]
    narrow = Subnet("narrow", (widths[0] - 1, *widths[1:]))
    with pytest.raises(ValueError, match=r"keeps all 8 channels, not 7: roll \(roll\) is not understood"):
        spec.check(narrow)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("tests.dsnet.nets:TwoHeads", "must return one tensor of logits"),
        ("tests.dsnet.nets:Tokens", r"no channels of .*Tokens can be sliced, .*attention"),
        ("tests.dsnet.nets:Branches", r"cannot be traced: .*control flow.*nets\.py:\d+"),
        ("tests.dsnet.nets:raises", "raised RuntimeError: no network for 10 classes"),
        ("tests.dsnet.nets:raises", r"it is called as function\(10, 3\)"),
        (
            "tests.dsnet.nets:downloads",
            "raised URLError: .*Connection refused.*; it seems to download weights.*init_from",
        ),
        ("tests.dsnet.nets:wraps_a_download", "raised RuntimeError: no weights; it seems to download weights"),
        ("tests.dsnet.nets:no_module", "returned str, but must return a torch.nn.Module"),
        ("tests.dsnet.nets:nothing", "cannot be imported"),
        ("tests.nowhere:Net", "cannot be imported: No module named 'tests.nowhere'"),
        ("tests.dsnet.nets:TRACED_", "cannot be imported"),
    ],
)
def test_a_network_that_cannot_be_a_supernet_is_refused(model: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layout(model, Task(10, 3, 16))


def test_an_import_path_needs_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSNET_ALLOW_IMPORTS")
    with pytest.raises(ConfigError, match="--allow-imports"):
        layout(TRACED[0], Task(10, 3, 16))


@pytest.mark.slow
def test_an_image_that_is_too_small_is_refused_with_its_size(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        ConfigError, match=r"VGG does not run on an image of 3 x 8 x 64: .*Output size is too small; choose"
    ):
        layout("vgg11_bn", Task(10, 3, (8, 64)))
    assert capfd.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize(("model", "madds_m"), ZOO_MADDS.items())
def test_the_zoo_has_the_published_costs(model: str, madds_m: float) -> None:
    subnets = layout(model, Task(1000, 3, 224))
    groups = subnets.spec.groups
    costs = zip(subnets.spec.ops, op_costs(subnets.spec, subnets.largest, 224), strict=True)
    written = [(madds, op.out_group) for op, (madds, _) in costs if op.kind not in ("pool", "maxpool")]
    assert sum(madds for madds, _ in written) / 1e6 == pytest.approx(madds_m, abs=0.05)
    free = sum(madds for madds, group in written if group == CLASSES or not groups[group].pinned)
    assert free > 0.95 * sum(madds for madds, _ in written)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet18", "mobilenet_v2"])
@torch.no_grad()
def test_a_network_of_the_zoo_is_sliced_cut_and_counted_exactly(model: str) -> None:
    plain = shaken(make_plain(model, 10, 3, 0))
    size = (64, 40)
    supernet = supernet_of(model, plain, size)
    x = images(size)
    torch.testing.assert_close(supernet(x, supernet.subnets.largest), plain(x), rtol=1e-5, atol=1e-4)
    narrow = supernet.subnets[0]
    cut = materialize(supernet, narrow)
    torch.testing.assert_close(cut(x), supernet(x, narrow), rtol=1e-5, atol=1e-4)
    assert subnet_cost(supernet.spec, narrow, size).params == sum(p.numel() for p in cut.parameters())


@pytest.mark.parametrize("is_training", [True, False])
def test_tracing_changes_neither_statistics_nor_mode(is_training: bool) -> None:
    """A supernet would take the statistics of the example for those of trained weights."""
    plain = make_plain(TRACED[0], 10, 3, 0).train(is_training)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    trace(plain, torch.rand(1, 3, 16, 16))
    assert {part.training for part in plain.modules()} == {is_training}
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    fresh = create(TRACED[0], Task(10, 3, 16))
    assert {norm.num_updates(fresh.subnets[0].widths) for norm in fresh.batch_norms()} == {0}


def test_a_network_for_grey_images_is_laid_out_for_them_and_refused_for_others() -> None:
    assert layout("tests.dsnet.nets:one_channel", Task(10, 1, 8)).spec.in_channels == 1
    with pytest.raises(ConfigError, match="does not run on an image of 3 x 8 x 8"):
        layout("tests.dsnet.nets:one_channel", Task(10, 3, 8))


@torch.no_grad()
def test_layers_of_a_kind_that_is_sliced_run_as_they_are_where_their_input_is_not_understood() -> None:
    """A linear layer along the width mixes no channels; after it the features are read along their
    width, and then along their channels again."""
    model = "tests.dsnet.nets:AlongWidth"
    plain = make_plain(model, 10, 3, 0).eval()
    supernet = supernet_of(model, plain, 16)
    x = images(16)
    assert torch.equal(supernet(x, supernet.subnets.largest), plain(x))
    assert {group.name for group in supernet.spec.groups if not group.pinned} == {"last"}
    narrow = supernet.subnets[0]
    torch.testing.assert_close(materialize(supernet, narrow)(x), supernet(x, narrow))
    check_cost(supernet, narrow, 16)


@pytest.mark.parametrize("size", [16, (23, 18)])
@torch.no_grad()
def test_a_norm_over_the_channels_has_those_of_the_sub_network(size: ImageSize) -> None:
    """A slice is the plain network of the smaller widths with the first weights of each layer."""
    torch.manual_seed(0)
    plain = nets.ConvNext(10, 3).eval()
    for parameter in plain.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape))
    supernet = supernet_of(NEXT, plain, size)
    assert not any(group.pinned for group in supernet.spec.groups)
    x = images(size)
    for widths in [*(subnet.widths for subnet in supernet.subnets), (3, 16, 5, 7), (8, 1, 12, 2)]:
        narrow = nets.ConvNext(10, 3, widths).eval()
        for name, parameter in narrow.named_parameters():
            parameter.copy_(plain.get_parameter(name)[tuple(map(slice, parameter.shape))])
        torch.testing.assert_close(supernet(x, Subnet("narrow", widths)), narrow(x), rtol=1e-5, atol=1e-5)


def test_the_tensors_of_a_network_with_tensors_of_its_own_keep_their_names() -> None:
    plain = make_plain(NEXT, 10, 3, 0)
    supernet = supernet_of(NEXT, plain)
    state = {name.removeprefix("body."): value for name, value in supernet.state_dict().items()}
    assert state.keys() == plain.state_dict().keys()
    again = make_plain(NEXT, 10, 3, 1)
    again.load_state_dict(state)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in plain.state_dict().items())


@torch.no_grad()
def test_the_linear_layers_of_a_transformer_are_sliced_and_its_embedding_is_not() -> None:
    model = "tests.dsnet.nets:Transformer"
    plain = make_plain(model, 10, 3, 0).eval()
    supernet = supernet_of(model, plain, 16)
    assert {group.name for group in supernet.spec.groups if not group.pinned} == {"up"}
    x = images(16)
    torch.testing.assert_close(supernet(x, supernet.subnets.largest), plain(x))
    narrow = supernet.subnets[0]
    cut = materialize(supernet, narrow)
    torch.testing.assert_close(cut(x), supernet(x, narrow))
    check_cost(supernet, narrow, 16)
    masked = copy.deepcopy(plain)
    masked.get_parameter("down.weight")[:, narrow.widths[-1] :] = 0
    torch.testing.assert_close(masked(x), supernet(x, narrow), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "is_refused"),
    [("tests.dsnet.nets:Residual", False), ("tests.dsnet.nets:Dense", False), ("tests.dsnet.nets:Fixed", True)],
)
@torch.no_grad()
def test_images_that_are_not_square_are_right_or_refused(model: str, is_refused: bool) -> None:
    """The logits are those of the plain network, whose own error is shown if it takes one size."""
    plain = shaken(make_plain(model, 10, 3, 0)).eval()
    supernet = supernet_of(model, plain, 16)
    wide = torch.randn(2, 3, 16, 20, generator=torch.Generator().manual_seed(0))
    if is_refused:
        with pytest.raises(RuntimeError, match="shape"):
            supernet(wide, supernet.subnets.largest)
        return
    torch.testing.assert_close(supernet(wide, supernet.subnets.largest), plain(wide), rtol=1e-5, atol=1e-5)
    narrow = supernet.subnets[0]
    torch.testing.assert_close(materialize(supernet, narrow)(wide), supernet(wide, narrow), rtol=1e-5, atol=1e-5)
