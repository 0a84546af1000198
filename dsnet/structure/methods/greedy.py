"""AutoSlim's greedy search (arXiv 1903.11728) on a universally slimmable network.

From the publication: the network is trained so that every width works, briefly; a layer's channels
are divided into groups; from the widest network on, the group of channels whose removal costs the
least accuracy on held-out images is removed, until a target is reached; all targets lie on one way
down. Ours: see docs/methods.md, section 9.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dsnet.errors import ConfigError
from dsnet.space.spec import Norm, Subnet
from dsnet.space.subnet_set import SubnetSet
from dsnet.space.width_space import WidthSpace
from dsnet.structure.method import (
    LARGEST,
    Base,
    Candidate,
    Choice,
    Score,
    Search,
    StructureMethod,
    StructureProblem,
    Target,
    Trained,
    Widths,
    candidate,
    check_common,
    check_statistics,
    check_targets,
    missed,
    shortened,
)
from dsnet.structure.methods import register
from dsnet.training.settings import REGIMES

if TYPE_CHECKING:
    from dsnet.network.supernet import Supernet

US_NET = "us_net"
"""The name of the network that is trained beforehand."""


@register
class Greedy(StructureMethod):
    """Removes channels step by step where the accuracy on the hold-out suffers least."""

    name = "greedy"
    description = "AutoSlim: from the widest, remove the channels whose loss costs the least hold-out accuracy."

    def check(self, problem: StructureProblem) -> None:
        """See `StructureMethod.check`."""
        check_common(problem)
        check_targets(problem, problem.settings.levels)
        check_statistics(problem, None)
        possible = 1 + sum(len(options) - 1 for options in problem.options(problem.settings.levels))
        if len(problem.targets) > possible:
            raise ConfigError(
                f"supernet.structure has {len(problem.targets)} targets, but its step and levels leave only {possible} sub-networks "
                "on the way from the widest to the smallest: use fewer targets, a smaller step or more levels"
            )

    def member_names(self, problem: StructureProblem) -> tuple[str, ...]:
        """The targets' names."""
        return tuple(target.name for target in problem.targets)

    def bases(self, problem: StructureProblem) -> tuple[Base, ...]:
        """A universally slimmable network over every width that the search may choose."""
        settings, run, spec = problem.settings, problem.run, problem.spec
        # Statistics of the widest alone: all other widths are normalised by the batch.
        norm: Norm = "group_norm" if spec.norm == "group_norm" else "recalibrate"
        groups = tuple(
            replace(group, pinned=group.pinned or "supernet.structure.pin") if number in problem.fixed else group
            for number, group in enumerate(spec.groups)
        )
        own = replace(spec, norm=norm, groups=groups)
        trained = replace(
            run,
            train=shortened(problem),
            regime=replace(REGIMES["us_net"], norm=norm),
            width_space=WidthSpace(settings.min_share, settings.step, settings.levels),
        )
        return (Base(US_NET, SubnetSet(own, (Subnet(LARGEST, problem.widest),)), trained),)

    def find(self, problem: StructureProblem, start: Supernet, trained: Trained) -> Search:
        """Walk down from the widest; the members are the sub-networks of the way that are nearest
        to the targets."""
        options = problem.options(problem.settings.levels)
        way = [problem.widest]
        left = list(reversed(problem.targets))
        taken: list[tuple[Target, int]] = []
        """The largest targets with the places of their members on the way."""
        while True:
            while left and (place := _place(problem, way, left[0], taken)) is not None:
                taken.append((left.pop(0), place))
            candidates = _removals(problem, options, way[-1], len(way) - 1)
            if not left or not candidates:
                break
            scores = yield candidates
            best = _best(candidates, scores)
            yield Choice(best.round, best.widths, best.madds)
            way.append(best.widths)
        taken += _last(len(way), left, taken)
        members = [(target, way[place]) for target, place in reversed(taken)]
        for target, widths in members:
            yield Choice(len(way) - 1, widths, problem.madds(widths), target.name)
        notes = [note for target, widths in members for note in missed(problem, target, problem.madds(widths))]
        return problem.found([Subnet(target.name, widths) for target, widths in members], notes)


def _removals(problem: StructureProblem, options: Sequence[Widths], widths: Widths, number: int) -> list[Candidate]:
    """The sub-networks with one step of channels less in one group, in the order of the groups."""
    found = []
    for group, possible in enumerate(options):
        level = possible.index(widths[group])
        if level > 0:
            found.append(candidate(problem, number, (*widths[:group], possible[level - 1], *widths[group + 1 :])))
    return found


def _best(candidates: Sequence[Candidate], scores: Sequence[Score]) -> Candidate:
    """The candidate with the highest accuracy; of several, that of the lowest group."""
    return max(zip(candidates, scores, strict=True), key=lambda pair: pair[1].num_correct)[0]


def _place(
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


def _last(length: int, left: Sequence[Target], taken: Sequence[tuple[Target, int]]) -> list[tuple[Target, int]]:
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
