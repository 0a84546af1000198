"""A structure method of a user, named by its import path: one member with half of every group."""

from __future__ import annotations

from dsnet.network.supernet import Supernet
from dsnet.space.spec import Subnet
from dsnet.structure.method import Choice, Search, StructureMethod, StructureProblem, Trained, candidate, check_common


class Halves(StructureMethod):
    """Of all sub-networks that halve one group the one with the best score, beside the widest."""

    name = "halves"
    description = "Halves the channel group whose other half matters least."

    def check(self, problem: StructureProblem) -> None:
        """The usual checks."""
        check_common(problem)

    def member_names(self, problem: StructureProblem) -> tuple[str, ...]:
        """One name."""
        return ("half",)

    def find(self, problem: StructureProblem, start: Supernet, trained: Trained) -> Search:
        """Ask for the score of every removal."""
        halved = [
            tuple(
                options[len(options) // 2] if number == group else problem.widest[number]
                for number in range(len(problem.widest))
            )
            for group, options in enumerate(problem.options(None))
            if len(options) > 1
        ]
        candidates = [candidate(problem, 0, widths) for widths in halved]
        scores = yield candidates
        best = max(zip(candidates, scores, strict=True), key=lambda pair: pair[1].accuracy)[0]
        yield Choice(0, best.widths, best.madds, "half")
        return problem.found([Subnet("half", best.widths)])


class Abstract(StructureMethod):
    """Lacks everything."""

    name = "abstract"
    description = ""
