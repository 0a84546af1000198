"""DS-MBNet and DS-Tiny: the widths that a user lists, and layouts that stay as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsnet.errors import ConfigError
from dsnet.families import Task, create, layout
from dsnet.space.cost import subnet_cost
from tests.dsnet.samples import random_images, shaken, task


@pytest.mark.parametrize(
    ("family", "of", "fingerprint"),
    [
        ("ds_mbnet", Task(1000, 3, 224), "c3a95a910255c97a"),
        ("ds_mbnet", Task(10, 3, 32), "268aebe2eac9151b"),
        ("ds_tiny", Task(10, 3, 32), "569b8a58b9d7110b"),
    ],
)
def test_default_layouts_keep_the_fingerprint_that_stored_checkpoints_carry(
    family: str, of: Task, fingerprint: str
) -> None:
    assert layout(family, of).spec.fingerprint.startswith(fingerprint)


def test_listed_widths_are_taken_as_they_stand() -> None:
    subnets = layout("ds_mbnet", task(), {"gated_widths": [[224, 353, 640], [735, 928, 1152]], "num_routes": 7})
    assert [subnet.widths for subnet in subnets] == [
        (16, 32, 48, 96, 224, 735),
        (16, 32, 48, 96, 353, 928),
        (16, 32, 48, 96, 640, 1152),
    ]
    assert subnets.largest.widths == (24, 88, 168, 264, 640, 1152)


def test_listing_the_default_widths_is_the_default() -> None:
    widths = [[224 + 32 * k for k in range(14)], [736 + 32 * k for k in range(14)]]
    assert layout("ds_mbnet", task(), {"gated_widths": widths}) == layout("ds_mbnet", task())


def test_the_width_factor_scales_what_lies_before_the_gate_only() -> None:
    listed = layout("ds_tiny", task(), {"gated_widths": [[5, 6], [7, 8]], "width": 0.5})
    scaled = layout("ds_tiny", task(), {"width": 0.5})
    assert listed.prefix_upto(0) == scaled.prefix_upto(0)
    assert [subnet.widths[2:] for subnet in listed] == [(5, 7), (6, 8)]
    costs = [subnet_cost(listed.spec, subnet, 16).madds for subnet in listed]
    assert costs == sorted(costs)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ([[4, 8]], "must hold 2 lists of widths"),
        ("4, 8", "must hold 2 lists of widths"),
        ([[4, 8], [4, 8, 12]], "all must have one length"),
        ([[4], [8]], "2 or more routes"),
        ([[4, 8], [8, 8]], "each list must rise"),
        ([[4, 8], [4, 8.0]], "integers in 1.."),
        ([[0, 8], [4, 8]], "integers in 1.."),
        ([[4, 8], 12], "integers in 1.."),
        ([[4, True], [4, 8]], "integers in 1.."),
    ],
)
def test_lists_that_do_not_fit_are_refused(widths: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"gated_widths.*{message}"):
        layout("ds_tiny", task(), {"gated_widths": widths})


KERNELS = {"width": 0.5, "num_routes": 3, "kernels": [3, 5, 7]}


def test_kernels_rise_with_the_widths_or_are_combined_with_all_of_them() -> None:
    tied = layout("ds_tiny", task(), KERNELS)
    kernel = [group.kind for group in tied.spec.groups].index("kernel")
    assert [subnet.widths[kernel] for subnet in tied.all] == [3, 5, 7, 7]
    plain = layout("ds_tiny", task(), {**KERNELS, "kernels": None})
    without = [subnet.widths[:kernel] + subnet.widths[kernel + 1 :] for subnet in tied.all]
    assert without == [subnet.widths for subnet in plain.all]
    combined = layout("ds_tiny", task(), {**KERNELS, "combine": "all"})
    assert [subnet.name for subnet in combined] == [f"subnet-{k:02d}-k{size}" for k in range(3) for size in (3, 5, 7)]
    assert {subnet.widths[kernel] for subnet in combined} == {3, 5, 7}


def test_a_smaller_kernel_is_the_larger_one_with_zeros_around_its_centre() -> None:
    """Members of equal widths: the larger kernel, masked, gives the logits of the smaller one."""
    supernet = shaken(create("ds_tiny", task(), {**KERNELS, "combine": "all"}, norm="group_norm")).double().eval()
    images = random_images(3).double()
    small, large = supernet.subnets[3], supernet.subnets[5]
    assert (small.name, large.name) == ("subnet-01-k3", "subnet-01-k7")
    wanted = supernet(images, small)
    assert not torch.allclose(supernet(images, large), wanted)
    masked = 0
    with torch.no_grad():
        for name, weight in supernet.named_parameters():
            if name.endswith("depthwise.weight") and weight.shape[-1] == 7:
                centre = weight[..., 2:5, 2:5].clone()
                weight.zero_()
                weight[..., 2:5, 2:5] = centre
                masked += 1
    assert masked == 2
    torch.testing.assert_close(supernet(images, large), wanted, rtol=0, atol=1e-12)


def test_statistics_are_kept_for_each_size_of_the_kernels() -> None:
    supernet = create("ds_tiny", task(), {**KERNELS, "combine": "all"})
    last = supernet.batch_norms()[-1]
    keys = {last.key_of(subnet.widths) for subnet in supernet.subnets}
    assert len(keys) == len(supernet.subnets) == 9
    assert keys <= set(last.keys())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernels": [3, 4]}, "kernels holds 4.*all must be odd; use 3 or 5"),
        ({"kernels": [3, 17]}, "kernels holds 17, which is larger than the image of 16 x 16 pixels; use at most 15"),
        ({"kernels": [3]}, "must be a list of two or more sizes"),
        ({"kernels": [3, 3]}, "each size must be there once"),
        ({"kernels": 5}, "must be a list of two or more sizes"),
        ({"kernels": [3, 5], "combine": "some"}, "combine is 'some', but must be 'tied' or 'all'"),
        ({"combine": "all"}, "there are no kernels to combine; set kernels"),
    ],
)
def test_bad_kernels_are_refused_with_the_nearest_that_works(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layout("ds_tiny", task(), options)
