"""The way down from the widest sub-network, on which the members of a search lie: what the greedy
and the progressive search share. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace

from dsnet.errors import ConfigError
from dsnet.space.spec import Norm, Subnet
from dsnet.space.subnet_set import SubnetSet
from dsnet.space.width_space import WidthSpace
from dsnet.structure.method import (
    LARGEST,
    Base,
    StructureProblem,
    Target,
    Widths,
    check_common,
    check_statistics,
    check_targets,
    shortened,
)
from dsnet.training.settings import REGIMES

US_NET = "us_net"
"""The name of the network that is trained before the search."""


def norm_of_search(problem: StructureProblem) -> Norm:
    """The norm of a network in which sub-networks of any widths are scored: statistics are kept for
    the declared ones alone, and all other widths are normalised by the batch."""
    return "group_norm" if problem.spec.norm == "group_norm" else "recalibrate"


def us_net(problem: StructureProblem, fixed: Set[int]) -> Base:
    """A universally slimmable network over every width that a search may choose.

    Args:
        problem: the problem.
        fixed: the channel groups of which every sub-network has all channels.
    """
    settings, run, spec = problem.settings, problem.run, problem.spec
    norm = norm_of_search(problem)
    groups = tuple(
        replace(group, pinned="supernet.structure.pin") if number in fixed and not group.is_fixed else group
        for number, group in enumerate(spec.groups)
    )
    own = replace(spec, norm=norm, groups=groups)
    trained = replace(
        run,
        train=shortened(problem),
        regime=replace(REGIMES["us_net"], norm=norm),
        width_space=WidthSpace(settings.min_share, settings.step, settings.levels),
    )
    return Base(US_NET, SubnetSet(own, (Subnet(LARGEST, problem.widest),)), trained)


def check_way(problem: StructureProblem, options: Sequence[Widths]) -> None:
    """Check that a way down can have a member for every target.

    Args:
        problem: the problem.
        options: the possible widths of every channel group.

    Raises:
        ConfigError: it cannot, or as `check_common`, `check_targets` and `check_statistics`.
    """
    check_common(problem)
    check_targets(problem, options)
    check_statistics(problem, None)
    possible = 1 + num_steps(options)
    if len(problem.targets) > possible:
        raise ConfigError(
            f"supernet.structure has {len(problem.targets)} targets, but its step and levels leave only {possible} sub-networks "
            "on the way from the widest to the smallest: use fewer targets, a smaller step or more levels"
        )


def num_steps(options: Sequence[Widths]) -> int:
    """The number of steps from the widest sub-network to the smallest."""
    return sum(len(widths) - 1 for widths in options)


def step_down(options: Sequence[Widths], widths: Widths, group: int) -> Widths | None:
    """The sub-network with one step of channels less in one group; None if it has the smallest
    width."""
    level = options[group].index(widths[group])
    return None if level == 0 else (*widths[:group], options[group][level - 1], *widths[group + 1 :])


def place_of(
    problem: StructureProblem, way: Sequence[Widths], target: Target, taken: Sequence[tuple[Target, int]]
) -> int | None:
    """The place of a target's member on the way; None if the way has not passed it yet.

    It is the first sub-network at or below the target or the one before it, whichever is nearer
    (the smaller if both are equally near), and none that a larger target has taken.
    """
    first = taken[-1][1] + 1 if taken else 0
    passed = next((place for place, widths in enumerate(way) if problem.madds(widths) <= target.madds), None)
    if passed is None or first >= len(way):
        return None
    places = [place for place in (passed, passed - 1) if place >= first]
    return min(places, key=lambda place: abs(problem.madds(way[place]) - target.madds)) if places else first


def last_places(length: int, left: Sequence[Target], taken: Sequence[tuple[Target, int]]) -> list[tuple[Target, int]]:
    """Places for targets a little below the smallest sub-network: the last ones of the way.

    Raises:
        ConfigError: the way has no such place left.
    """
    first = taken[-1][1] + 1 if taken else 0
    places = range(length - len(left), length)
    if left and places[0] < first:
        raise ConfigError(
            f"supernet.structure.targets: the search found no sub-network of its own for {', '.join(each.name for each in left)}: "
            "remove a target, or use a smaller step"
        )
    return list(zip(left, places, strict=True))
