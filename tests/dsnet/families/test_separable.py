"""DS-MBNet and DS-Tiny: the widths that a user lists, and layouts that stay as they were."""

from __future__ import annotations

from typing import Any

import pytest

from dsnet.errors import ConfigError
from dsnet.families import Task, layout
from dsnet.space.cost import subnet_cost
from tests.dsnet.samples import task


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
