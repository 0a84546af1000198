"""The space of widths: options of every group, draws, and sub-networks that no set declares."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsnet.space.spec import ChannelGroup, Subnet, SupernetSpec
from dsnet.space.subnet_set import SubnetSet, subnet_at
from dsnet.space.width_space import WidthSpace
from tests.dsnet.samples import small_set


def spec_of(*widths: int, pinned: int | None = None) -> SupernetSpec:
    groups = tuple(
        ChannelGroup(f"g{number}", width, "attention" if number == pinned else "")
        for number, width in enumerate(widths)
    )
    return SupernetSpec("toy", 10, 3, 8, groups, (), ())


@pytest.mark.parametrize(
    ("min_share", "step", "width", "options"),
    [
        (0.1, 8, 64, (8, 16, 24, 32, 40, 48, 56, 64)),
        (0.5, 8, 64, (32, 40, 48, 56, 64)),
        (0.3, 8, 64, (24, 32, 40, 48, 56, 64)),  # 19.2 channels: the next multiple
        (0.1, 8, 80, (8, 16, 24, 32, 40, 48, 56, 64, 72, 80)),
        (0.25, 8, 20, (8, 16, 20)),  # the whole group is no multiple
        (0.25, 8, 5, (5,)),
        (1.0, 8, 64, (64,)),
        (0.7, 1, 10, (7, 8, 9, 10)),  # 0.7 * 10 is 7.000000000000001 in some orders
        (0.001, 1, 3, (1, 2, 3)),
    ],
)
def test_widths_are_multiples_from_the_smallest_share_and_the_whole_group(
    min_share: float, step: int, width: int, options: tuple[int, ...]
) -> None:
    assert WidthSpace(min_share, step).options(spec_of(width)) == (options,)


@pytest.mark.parametrize(
    ("levels", "options"),
    [
        (None, ((24,), (1, 2, 3), (2, 3, 4, 5, 6), (12, 16, 20, 24))),
        (3, ((24,), (1, 2, 3), (2, 4, 6), (16, 24))),
        (1, ((24,), (3,), (6,), (24,))),
    ],
)
def test_heads_and_blocks_are_counted_one_by_one_and_choices_are_kept(
    levels: int | None, options: tuple[tuple[int, ...], ...]
) -> None:
    groups = (
        ChannelGroup("stream", 24, choices=(24,)),
        ChannelGroup("heads", 3, kind="heads"),
        ChannelGroup("depth", 6, kind="depth"),
        ChannelGroup("mlp", 24, choices=(4, 12, 16, 20, 24)),
        ChannelGroup("kernel", 7, kind="kernel"),
    )
    spec = SupernetSpec("toy", 10, 3, 8, groups, (), ())
    assert WidthSpace(0.3, 8, levels).options(spec) == (*options, (3, 5, 7))


def test_a_pinned_group_keeps_its_width() -> None:
    space, spec = WidthSpace(0.25, 4), spec_of(16, 24, 8, pinned=1)
    assert space.options(spec) == ((4, 8, 12, 16), (24,), (4, 8))
    assert space.smallest(spec) == (4, 24, 4)
    rng = random.Random(0)
    assert {space.draw(rng.randrange, spec)[1] for _ in range(20)} == {24}


def test_every_option_of_every_group_is_equally_likely_and_groups_are_independent() -> None:
    space, spec, rng = WidthSpace(0.25, 4), spec_of(16, 8), random.Random(1)
    drawn = Counter(space.draw(rng.randrange, spec) for _ in range(8000))
    assert set(drawn) == {(first, second) for first in (4, 8, 12, 16) for second in (4, 8)}
    assert min(drawn.values()) > 850  # each of eight is drawn about 1000 times; the deviation is 30
    assert max(drawn.values()) < 1150


@given(
    widths=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    min_share=st.floats(0.01, 1.0),
    step=st.integers(1, 20),
    seed=st.integers(0, 100),
)
def test_whatever_is_drawn_fits_the_supernet_and_the_bounds(
    widths: list[int], min_share: float, step: int, seed: int
) -> None:
    space, spec = WidthSpace(min_share, step), spec_of(*widths)
    drawn = space.draw(random.Random(seed).randrange, spec)
    spec.check(subnet_at(spec, drawn))
    for width, options, whole in zip(drawn, space.options(spec), widths, strict=True):
        assert width in options
        assert list(options) == sorted(set(options))
        assert options[-1] == whole
        assert all(option == whole or option % step == 0 for option in options)
        assert options[0] >= min_share * whole - 1e-6 * step


@pytest.mark.parametrize(
    ("levels", "width", "options"),
    [
        (None, 64, (8, 16, 24, 32, 40, 48, 56, 64)),
        (8, 64, (8, 16, 24, 32, 40, 48, 56, 64)),
        (7, 64, (8, 24, 40, 56, 64)),
        (4, 64, (8, 32, 56, 64)),
        (3, 64, (8, 40, 64)),
        (2, 64, (8, 64)),
        (10, 512, (56, 112, 168, 224, 280, 336, 392, 448, 504, 512)),
        (1, 64, (64,)),
        (10, 20, (8, 16, 20)),
    ],
)
def test_a_wide_group_has_the_smallest_step_that_gives_no_more_levels(
    levels: int | None, width: int, options: tuple[int, ...]
) -> None:
    space = WidthSpace(0.1, 8, levels)
    assert space.options(spec_of(width)) == (options,)
    if levels != 1:
        assert space.smallest(spec_of(width)) == WidthSpace(0.1, 8).smallest(spec_of(width))


def test_a_space_without_levels_has_the_record_that_it_had_before() -> None:
    assert WidthSpace(0.25, 8).to_json() == {"min_share": 0.25, "step": 8}
    for space in (WidthSpace(0.25, 8), WidthSpace(0.25, 8, 10)):
        assert WidthSpace(**space.to_json()) == space


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 8), "min_share"),
        ((1.5, 8), "min_share"),
        ((0.5, 0), "step"),
        ((0.5, 2.5), "step"),
        ((0.5, True), "step"),
        ((0.5, 8, 0), "levels"),
        ((0.5, 8, 2.5), "levels"),
        ((0.5, 8, True), "levels"),
    ],
)
def test_impossible_spaces_are_refused(arguments: tuple[Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WidthSpace(*arguments)


def test_an_undeclared_sub_network_is_named_by_its_widths_and_must_fit() -> None:
    own = small_set("ds_tiny")
    assert subnet_at(own.spec, (4, 8, 4, 5)) == Subnet("4-8-4-5", (4, 8, 4, 5))
    with pytest.raises(ValueError, match="width 999"):
        subnet_at(own.spec, (4, 8, 4, 999))
    with pytest.raises(ValueError, match="3 widths"):
        subnet_at(own.spec, (4, 8, 4))


def test_declared_widths_give_the_declared_sub_network() -> None:
    own = small_set("ds_tiny")
    assert own.teacher is not None
    for subnet in own.all:
        assert own.at(subnet.widths) is subnet
    other = (*own[0].widths[:-1], own[0].widths[-1] + 1)
    assert own.at(list(other)) == subnet_at(own.spec, other)
    assert own.names == {"subnet-00", "subnet-01", "subnet-02", "largest"}
    assert SubnetSet(own.spec, own.members).names == own.names - {"largest"}


def test_pins_of_the_spec_hold_for_undeclared_sub_networks_too() -> None:
    spec = spec_of(16, 24, pinned=1)
    with pytest.raises(ValueError, match="keeps all 24 channels, not 8: attention"):
        subnet_at(spec, (16, 8))
    assert subnet_at(replace(spec, groups=spec_of(16, 24).groups), (16, 8)).widths == (16, 8)
