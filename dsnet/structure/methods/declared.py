"""The sub-networks that the family declares."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsnet.structure.method import Found, Search, StructureMethod, StructureProblem, Trained
from dsnet.structure.methods import register
from dsnet.structure.settings import DECLARED

if TYPE_CHECKING:
    from dsnet.network.supernet import Supernet


@register
class Declared(StructureMethod):
    """Keeps the sub-networks of the family."""

    name = DECLARED
    description = "The sub-networks that the network's family declares."

    def check(self, problem: StructureProblem) -> None:
        """Nothing can be wrong with them."""

    def member_names(self, problem: StructureProblem) -> tuple[str, ...]:
        """The names that the family gives."""
        return tuple(subnet.name for subnet in problem.subnets)

    def find(self, problem: StructureProblem, start: Supernet, trained: Trained) -> Search:
        """The family's own set; no score is needed."""
        yield from ()
        return Found(problem.subnets.members, problem.subnets.teacher)
