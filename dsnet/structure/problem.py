"""The problem of a structure method for a network, its settings, and a training."""

from __future__ import annotations

from dataclasses import replace

from dsnet.image_size import ImageSize
from dsnet.space.entry_gate import differs_before_gates, is_entry, with_entry_gate
from dsnet.space.spec import Subnet, SupernetSpec
from dsnet.space.subnet_set import SubnetSet
from dsnet.structure.method import LARGEST, StructureProblem
from dsnet.structure.methods import structure_method
from dsnet.structure.methods.declared import Declared
from dsnet.structure.methods.listed import Listed, written_members
from dsnet.structure.settings import StructureSettings
from dsnet.training.supernet_run import SupernetRun


def structure_problem(
    declared: SubnetSet, settings: StructureSettings, run: SupernetRun, image_size: ImageSize
) -> StructureProblem:
    """The problem of a structure method.

    Where the sub-networks may differ before the network's first gate, the network has an entry gate
    instead of its own gates, so that routers can choose among any of them.

    Args:
        declared: the sub-networks that the family declares.
        settings: the settings of the choice.
        run: the joint training.
        image_size: size of the images for which MAdds count.

    Raises:
        ConfigError: the method is unknown, or written widths do not fit the network.
    """
    problem = StructureProblem(declared, settings, run, image_size)
    if not _may_differ_before_gates(problem):
        return problem
    alone = SubnetSet(declared.spec, (Subnet(LARGEST, declared.spec.max_widths),))
    return replace(problem, subnets=replace(declared, spec=with_entry_gate(alone).spec))


def _may_differ_before_gates(problem: StructureProblem) -> bool:
    """Whether two members may have other widths before the network's own first gate."""
    spec: SupernetSpec = problem.spec
    if not spec.gates or is_entry(spec.gates[0]) or problem.settings.pin == "gate":
        return False
    method = structure_method(problem.settings.method)
    if isinstance(method, Declared):
        return False
    if isinstance(method, Listed):
        return differs_before_gates(SubnetSet(spec, written_members(problem)))
    return any(not group.is_fixed for group in spec.groups[: spec.num_prefix_groups(0)])
