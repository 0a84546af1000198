"""Depthwise kernels of several sizes in traced networks."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dsnet.deploy.materialize import materialize
from dsnet.errors import ConfigError
from dsnet.families import create, get_family, layout, rebuild
from dsnet.network.plain import make_plain
from dsnet.network.traced import TracedNorm, TracedSupernet
from dsnet.space.cost import subnet_cost
from dsnet.space.spec import Subnet, SupernetSpec
from dsnet.space.subnet_set import SubnetSet
from dsnet.stored.checkpoint import load_supernet, save_supernet
from tests.dsnet.cases import KERNEL_OPTIONS, KERNELS
from tests.dsnet.samples import random_images, shaken, task

SIZES = {"first": 5, "second": 3, "third": 5}
"""The layers whose kernels can be sliced, with their sizes."""


def plain_with_statistics() -> nn.Module:
    """The plain module in eval mode, with statistics that are not the initial ones."""
    plain = make_plain(KERNELS, 10, 3, 0)
    generator = torch.Generator().manual_seed(4)
    for name, buffer in plain.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + (0.5 if name.endswith("var") else -0.5))
    return plain.eval().double()


def supernet_of(plain: nn.Module, subnets: SubnetSet) -> TracedSupernet:
    """The supernet with the weights of the plain module, in eval mode and float64."""
    supernet = rebuild(subnets)
    assert isinstance(supernet, TracedSupernet)
    supernet.double().load_plain(plain)
    return supernet.eval()


def masked(plain: nn.Module, size: int) -> nn.Module:
    """The plain module with zeros around the centre of every kernel that can be sliced."""
    found = copy.deepcopy(plain)
    for name, own in SIZES.items():
        weight = found.get_parameter(f"{name}.weight")
        margin = max(0, own - size) // 2
        ring = torch.ones(own, own, dtype=torch.bool)
        ring[margin : own - margin, margin : own - margin] = False
        weight.data[..., ring] = 0
    return found


def test_every_depthwise_convolution_is_a_group_of_its_own_and_has_the_sizes_up_to_its_own() -> None:
    spec = layout(KERNELS, task(), KERNEL_OPTIONS).spec
    kernels = {group.name: group.choices for group in spec.groups if group.kind == "kernel"}
    assert kernels == {"first.kernel": (1, 3, 5), "second.kernel": (1, 3), "third.kernel": (1, 3, 5)}
    assert [group.name for group in spec.groups if group.kind == "channels"] == ["stem_0", "wide_0"]
    assert SupernetSpec.from_json(spec.to_json()) == spec
    assert layout(KERNELS, task(), {"step": 2}).spec.layout == {"model": KERNELS}, "files without kernels stay valid"


@pytest.mark.parametrize(
    ("options", "widths"),
    [
        (
            {"combine": "all"},
            {
                "0.5-k1": (4, 1, 6, 1, 1),
                "0.5-k3": (4, 3, 6, 3, 3),
                "0.5-k5": (4, 5, 6, 3, 5),
                "1-k1": (8, 1, 12, 1, 1),
                "1-k3": (8, 3, 12, 3, 3),
                "1-k5": (8, 5, 12, 3, 5),
            },
        ),
        ({"combine": "tied"}, {"0.5": (4, 1, 6, 1, 1), "1": (8, 5, 12, 3, 5)}),
        (
            {"combine": "tied", "kernels": [3, 5], "gates": ["first"]},  # what lies before the gate is whole
            {"0.5": (8, 5, 6, 3, 3), "1": (8, 5, 12, 3, 5)},
        ),
        (
            {"kernels": [3, 5], "ratios": [1.0], "gates": ["entry", "wide"], "paths": "all"},
            {
                "1-k3-1-k3": (8, 3, 12, 3, 3),
                "1-k3-1-k5": (8, 3, 12, 3, 5),
                "1-k5-1-k3": (8, 5, 12, 3, 3),
                "1-k5-1-k5": (8, 5, 12, 3, 5),
            },
        ),
    ],
)
def test_members_combine_widths_and_kernels(options: dict[str, Any], widths: dict[str, tuple[int, ...]]) -> None:
    subnets = layout(KERNELS, task(), {**KERNEL_OPTIONS, **options})
    kinds = [group.kind for group in subnets.spec.groups]
    found = {subnet.name: subnet.widths for subnet in subnets}
    if options.get("kernels") == [3, 5]:  # a kernel of 3 pixels has one size, and no group
        widths = {name: (*own[:3], own[4]) for name, own in widths.items()}
        assert kinds == ["channels", "kernel", "channels", "kernel"]
    assert found == widths
    assert subnets.largest.widths == subnets.spec.max_widths


@pytest.mark.parametrize("size", [16, (23, 30)])
@torch.no_grad()
def test_a_slice_is_the_plain_network_with_kernels_masked_around_their_centre(size: Any) -> None:
    plain = plain_with_statistics()
    supernet = supernet_of(plain, layout(KERNELS, task(image_size=size), KERNEL_OPTIONS))
    images = random_images(3, size).double()
    whole = plain(images)
    for kernel in (1, 3, 5):
        subnet = next(each for each in supernet.subnets if each.name == f"1-k{kernel}")
        expected = masked(plain, kernel)(images)
        torch.testing.assert_close(supernet(images, subnet), expected, rtol=0, atol=1e-12)
        assert torch.allclose(expected, whole) == (kernel == 5)


@torch.no_grad()
def test_a_network_of_smaller_kernels_takes_the_centre_of_the_weights_of_the_plain_one() -> None:
    """As in a bundle whose routes do not use the largest size."""
    plain = plain_with_statistics()
    own = layout(KERNELS, task(), KERNEL_OPTIONS)
    narrow = next(each for each in own if each.name == "1-k3")
    groups = tuple(group.narrowed(width) for group, width in zip(own.spec.groups, narrow.widths, strict=True))
    assert [group.choices for group in groups if group.kind == "kernel"] == [(1, 3)] * 3
    small = Subnet("small", (8, 3, 12, 1, 1))
    supernet = supernet_of(plain, SubnetSet(replace(own.spec, groups=groups), (small, narrow)))
    assert supernet.get_parameter("body.first.weight").shape == (8, 1, 3, 3)
    images = random_images(3).double()
    torch.testing.assert_close(supernet(images, narrow), masked(plain, 3)(images), rtol=0, atol=1e-12)
    assert not torch.allclose(supernet(images, small), supernet(images, narrow))


def test_statistics_are_kept_for_each_size_of_the_kernels_before_them() -> None:
    supernet = create(KERNELS, task(), KERNEL_OPTIONS)
    keys = {
        name.removeprefix("body."): len({norm.key_of(subnet.widths) for subnet in supernet.subnets})
        for name, norm in supernet.named_modules()
        if isinstance(norm, TracedNorm)
    }
    assert keys == {"stem.1": 2, "first_norm": 6, "wide.1": 6, "mixed.1": 6, "norm": 6}


@torch.no_grad()
def test_a_checkpoint_and_a_layout_for_other_classes_keep_the_kernels(tmp_path: Path) -> None:
    supernet = shaken(create(KERNELS, task(), KERNEL_OPTIONS)).eval()
    save_supernet(tmp_path / "net", supernet)
    again = load_supernet(tmp_path / "net")[0].eval()
    images = random_images(2)
    for subnet in supernet.subnets:
        assert torch.equal(again(images, subnet), supernet(images, subnet))
    other = get_family(KERNELS).for_task(supernet.spec, task(num_classes=3, image_size=20))
    assert other.groups == supernet.spec.groups
    assert other.num_classes == 3


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (KERNELS, {"kernels": [3, 4]}, "kernels holds 4.*all must be odd; use 3 or 5"),
        (KERNELS, {"kernels": [3, 17]}, "kernels holds 17, which is larger than the image of 16 x 16 pixels"),
        (
            KERNELS,
            {"kernels": [3, 7]},
            r"ends with 7, but the largest depthwise kernel .* has 5 pixels \(first\).*\[3, 5\]",
        ),
        (KERNELS, {"kernels": [1, 3]}, r"ends with 3, but the largest .* has 5 pixels.*use \[1, 3, 5\]$"),
        (KERNELS, {"kernels": [7, 9]}, r"ends with 9.*use \[3, 5\], or make the network with larger kernels"),
        (KERNELS, {"combine": "some"}, "combine is 'some'"),
        (KERNELS, {"kernels": None}, "there are no kernels to combine"),
        (KERNELS, {"combine": "tied", "ratios": [1.0]}, "ratios has one number, 1; use combine: all, or more ratios"),
        (
            "tests.dsnet.nets:Dense",
            {},
            "has no depthwise convolution with a square kernel of odd size; leave kernels out",
        ),
        (
            "tests.dsnet.nets:Unpadded",
            {"kernels": [1, 3, 5]},
            r"kernels holds 1, but .*first lacks 1 pixel of padding; use \[3, 5\], or more padding in the network",
        ),
        ("tests.dsnet.nets:Unpadded", {"kernels": [1, 5]}, r"kernels holds 1, .*; use more padding in the network$"),
    ],
)
def test_bad_kernels_are_refused_with_the_nearest_that_works(model: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layout(model, task(), {**KERNEL_OPTIONS, **options})


def test_a_layer_that_runs_twice_keeps_its_kernel() -> None:
    spec = layout("tests.dsnet.nets:Twice", task(), {"step": 2, "ratios": [0.5, 1.0], "kernels": [3, 5]}).spec
    kernels = {group.name: group.pinned for group in spec.groups if group.kind == "kernel"}
    assert kernels == {"own.kernel": "", "shared.kernel": "shared runs in several places"}


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("tests.dsnet.nets:Stream", {"streams": "ids"}),
        ("tests.dsnet.nets:ConvNext", {}),
        ("tests.dsnet.nets:Residual", {"gates": ["pool"]}),
    ],
)
@torch.no_grad()
def test_kernels_are_sliced_together_with_streams_layer_norms_and_gates(model: str, options: dict[str, Any]) -> None:
    own = {"step": 2, "ratios": [0.5, 1.0], "kernels": [1, 3], "combine": "tied", **options}
    supernet = shaken(create(model, task(), own)).eval()
    assert any(group.kind == "kernel" for group in supernet.spec.groups)
    images = random_images(2)
    for subnet in supernet.subnets:
        cut = materialize(supernet, subnet)
        torch.testing.assert_close(cut(images), supernet(images, subnet))
        assert subnet_cost(supernet.spec, subnet, 16).params == sum(weight.numel() for weight in cut.parameters())
