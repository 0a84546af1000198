"""Sub-networks as written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dsnet.errors import ConfigError
from dsnet.space.spec import Subnet
from dsnet.structure.method import (
    LARGEST,
    Search,
    StructureMethod,
    StructureProblem,
    Trained,
    check_different,
    check_statistics,
)
from dsnet.structure.methods import register
from dsnet.structure.settings import LIST

if TYPE_CHECKING:
    from dsnet.network.supernet import Supernet

MOST_DIGITS = 9
"""Significant digits of a name that is a share of MAdds, at most."""


@register
class Listed(StructureMethod):
    """Takes the widths of `supernet.structure.widths`."""

    name = LIST
    description = "The widths as written, one per channel group."

    def check(self, problem: StructureProblem) -> None:
        """See `StructureMethod.check`."""
        members = written_members(problem)
        spec = problem.spec
        if spec.gates:
            self._check_agreement(problem, members)
        check_statistics(problem, [problem.set_of(problem.found(members))])

    @staticmethod
    def _check_agreement(problem: StructureProblem, members: Sequence[Subnet]) -> None:
        shared = problem.spec.num_prefix_groups(0)
        for number in range(shared):
            for member in members[1:]:
                if member.widths[number] != members[0].widths[number]:
                    raise ConfigError(
                        f"supernet.structure.widths: sub-networks {members[0].name} and {member.name} have {members[0].widths[number]} and "
                        f"{member.widths[number]} channels of group {problem.spec.groups[number].name!r} (number {number}), but all "
                        f"sub-networks must agree on the {shared} channel groups before gate {problem.spec.gates[0].name!r}: "
                        "write the same width"
                    )

    def member_names(self, problem: StructureProblem) -> tuple[str, ...]:
        """The written names, or the shares of MAdds."""
        return tuple(member.name for member in written_members(problem))

    def find(self, problem: StructureProblem, start: Supernet, trained: Trained) -> Search:
        """The written sub-networks; no score is needed."""
        yield from ()
        return problem.found(written_members(problem))


def written_members(problem: StructureProblem) -> tuple[Subnet, ...]:
    """The written sub-networks.

    Raises:
        ConfigError: widths do not fit the network.
    """
    written = problem.settings.widths or ()
    if isinstance(written, Mapping):
        if LARGEST in written and tuple(written[LARGEST]) != problem.widest:
            raise ConfigError(
                f"supernet.structure.widths: {LARGEST!r} is the name of the sub-network with all channels "
                f"({list(problem.widest)}): choose another name"
            )
        members = tuple(Subnet(str(name), tuple(widths)) for name, widths in written.items())
    else:
        members = tuple(Subnet(f"number {number}", tuple(widths)) for number, widths in enumerate(written))
    for member in members:
        _check_fit(problem, member)
    check_different(problem, members)
    return members if isinstance(written, Mapping) else _named(problem, members)


def _check_fit(problem: StructureProblem, member: Subnet) -> None:
    try:
        problem.spec.check(member)
    except ValueError as error:
        groups = ", ".join(f"{group.name} {group.max_width}" for group in problem.spec.groups)
        raise ConfigError(
            f"supernet.structure.widths: {error}; the channel groups with their widths are {groups}"
        ) from error


def _named(problem: StructureProblem, members: Sequence[Subnet]) -> tuple[Subnet, ...]:
    """The members with their shares of the widest's MAdds as names, with as many digits as tell
    them apart."""
    shares = [problem.share(problem.madds(member.widths)) for member in members]
    for digits in range(2, MOST_DIGITS):
        names = [f"{share:.{digits}g}" for share in shares]
        if len(set(names)) == len(names):
            return tuple(Subnet(name, member.widths) for name, member in zip(names, members, strict=True))
    raise ConfigError(
        "supernet.structure.widths: two sub-networks have equal MAdds, so that their shares do not name them: "
        "write a mapping with a name for each"
    )
