"""One ratio for all channel groups: slimmable networks (S-Net, arXiv 1812.08928), with the ratio
fitted to a number of MAdds, which is ours."""

from __future__ import annotations

from bisect import bisect_left
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING

from dsnet.space.spec import Subnet
from dsnet.structure.method import (
    Search,
    StructureMethod,
    StructureProblem,
    Target,
    Trained,
    Widths,
    check_common,
    check_different,
    check_statistics,
    check_targets,
    missed,
)
from dsnet.structure.methods import register

if TYPE_CHECKING:
    from dsnet.network.supernet import Supernet


@register
class Uniform(StructureMethod):
    """Scales all channel groups by one ratio per target."""

    name = "uniform"
    description = "One ratio for all channel groups, fitted to each target by bisection."

    def check(self, problem: StructureProblem) -> None:
        """See `StructureMethod.check`."""
        check_common(problem)
        check_targets(problem, problem.options(None))
        members = _members(problem)
        check_different(problem, members)
        check_statistics(problem, [problem.set_of(problem.found(members))])

    def member_names(self, problem: StructureProblem) -> tuple[str, ...]:
        """The targets' names."""
        return tuple(target.name for target in problem.targets)

    def find(self, problem: StructureProblem, start: Supernet, trained: Trained) -> Search:
        """The nearest ratio for every target; no score is needed."""
        yield from ()
        members = _members(problem)
        notes = [
            note
            for target, member in zip(problem.targets, members, strict=True)
            for note in missed(problem, target, problem.madds(member.widths))
        ]
        return problem.found(members, notes)


def _members(problem: StructureProblem) -> tuple[Subnet, ...]:
    ladder = Ladder(problem)
    return tuple(Subnet(target.name, ladder.nearest(target)) for target in problem.targets)


class Ladder:
    """All sub-networks that one ratio for all groups can give, from the narrowest to the widest.

    A group of n channels has, for a ratio r, the possible width that is nearest to r n, the wider
    one in the middle between two. Widths rise with the ratio, and so do MAdds.
    """

    def __init__(self, problem: StructureProblem) -> None:
        self._problem = problem
        self._options = problem.options(None)
        self._middles = [
            [Fraction(low + high, 2 * options[-1]) for low, high in pairwise(options)] for options in self._options
        ]
        """For every group the ratios from which on the next width is the nearest."""
        self.ratios = [Fraction(0), *sorted({ratio for middles in self._middles for ratio in middles})]
        """The ratios at which a width changes."""

    def widths(self, ratio: Fraction) -> Widths:
        """The widths at a ratio."""
        return tuple(
            options[sum(middle <= ratio for middle in middles)]
            for options, middles in zip(self._options, self._middles, strict=True)
        )

    def nearest(self, target: Target) -> Widths:
        """Of all ratios the widths whose MAdds are nearest to a target; of two that are equally
        near, the smaller."""
        # The first rung with at least the target's MAdds, or the last.
        low = bisect_left(self.ratios[:-1], target.madds, key=lambda ratio: self._problem.madds(self.widths(ratio)))
        rungs = [self.widths(self.ratios[rung]) for rung in (low - 1, low) if rung >= 0]
        return min(rungs, key=lambda widths: abs(self._problem.madds(widths) - target.madds))
