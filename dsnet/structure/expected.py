"""Sub-networks that a choice is expected to give, for checks and estimates before it is made."""

from __future__ import annotations

from dsnet.space.spec import Subnet
from dsnet.space.subnet_set import SubnetSet
from dsnet.structure.method import StructureProblem, Target
from dsnet.structure.methods import structure_method
from dsnet.structure.methods.declared import Declared
from dsnet.structure.methods.listed import Listed, written_members
from dsnet.structure.methods.uniform import Ladder


def expected_subnets(problem: StructureProblem) -> SubnetSet:
    """Sub-networks with the names and about the MAdds of those that will be found.

    Where sub-networks are declared or written, they are these. Of others one ratio for all channel
    groups is assumed, for each target, or for equal steps of MAdds where there are no targets.
    """
    method = structure_method(problem.settings.method)
    if isinstance(method, Declared):
        return problem.subnets
    if isinstance(method, Listed):
        return problem.set_of(problem.found(written_members(problem)))
    names, ladder = method.member_names(problem), Ladder(problem)
    targets = problem.targets
    if len(targets) != len(names):
        whole = problem.madds(problem.widest)
        targets = tuple(Target(name, (place + 1) / len(names) * whole) for place, name in enumerate(names))
    members = [Subnet(name, ladder.nearest(target)) for name, target in zip(names, targets, strict=True)]
    return problem.set_of(problem.found(members))
