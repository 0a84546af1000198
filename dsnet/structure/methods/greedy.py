"""AutoSlim's greedy search (arXiv 1903.11728) on a universally slimmable network.

From the publication: the network is trained so that every width works, briefly; a layer's channels
are divided into groups; from the widest network on, the group of channels whose removal costs the
least accuracy on held-out images is removed, until a target is reached; all targets lie on one way
down. Ours: see docs/methods.md, section 9.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dsnet.space.spec import Subnet
from dsnet.structure.method import (
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
    missed,
)
from dsnet.structure.methods import register
from dsnet.structure.way import check_way, last_places, place_of, step_down, us_net

if TYPE_CHECKING:
    from dsnet.network.supernet import Supernet


@register
class Greedy(StructureMethod):
    """Removes channels step by step where the accuracy on the hold-out suffers least."""

    name = "greedy"
    description = "AutoSlim: from the widest, remove the channels whose loss costs the least hold-out accuracy."

    def check(self, problem: StructureProblem) -> None:
        """See `StructureMethod.check`."""
        check_way(problem, problem.options(problem.settings.levels))

    def member_names(self, problem: StructureProblem) -> tuple[str, ...]:
        """The targets' names."""
        return tuple(target.name for target in problem.targets)

    def bases(self, problem: StructureProblem) -> tuple[Base, ...]:
        """A universally slimmable network over every width that the search may choose."""
        return (us_net(problem, problem.fixed),)

    def find(self, problem: StructureProblem, start: Supernet, trained: Trained) -> Search:
        """Walk down from the widest; the members are the sub-networks of the way that are nearest
        to the targets."""
        options = problem.options(problem.settings.levels)
        way = [problem.widest]
        left = list(reversed(problem.targets))
        taken: list[tuple[Target, int]] = []
        """The largest targets with the places of their members on the way."""
        while True:
            while left and (place := place_of(problem, way, left[0], taken)) is not None:
                taken.append((left.pop(0), place))
            candidates = _removals(problem, options, way[-1], len(way) - 1)
            if not left or not candidates:
                break
            scores = yield candidates
            best = _best(candidates, scores)
            yield Choice(best.round, best.widths, best.madds)
            way.append(best.widths)
        taken += last_places(len(way), left, taken)
        members = [(target, way[place]) for target, place in reversed(taken)]
        for target, widths in members:
            yield Choice(len(way) - 1, widths, problem.madds(widths), target.name)
        notes = [note for target, widths in members for note in missed(problem, target, problem.madds(widths))]
        return problem.found([Subnet(target.name, widths) for target, widths in members], notes)


def _removals(problem: StructureProblem, options: Sequence[Widths], widths: Widths, number: int) -> list[Candidate]:
    """The sub-networks with one step of channels less in one group, in the order of the groups;
    without those that save nothing, because the group belongs to a block that does not run."""
    smaller = [step_down(options, widths, group) for group in range(len(options))]
    found = [candidate(problem, number, each) for each in smaller if each is not None]
    return [each for each in found if each.madds < problem.madds(widths)]


def _best(candidates: Sequence[Candidate], scores: Sequence[Score]) -> Candidate:
    """The candidate with the highest accuracy; of several, that of the lowest group."""
    return max(zip(candidates, scores, strict=True), key=lambda pair: pair[1].num_correct)[0]
