"""Sets of sub-networks: the members that a gate may choose from, and the teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dsnet.errors import CheckpointError
from dsnet.image_size import ImageSize
from dsnet.space.spec import Subnet, SupernetSpec


@dataclass(frozen=True)
class SubnetSet:
    """An immutable, ordered set of sub-networks of one supernet; `subnets[k]` is the member with id
    k.

    `len` and iteration exclude `teacher`, a sub-network that is trained but never chosen (for
    DS-MBNet `largest`, with 819.9 M MAdds).
    """

    spec: SupernetSpec
    members: tuple[Subnet, ...]
    teacher: Subnet | None = None

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("a SubnetSet needs at least one sub-network")
        names = [subnet.name for subnet in self.all]
        if len(set(names)) != len(names):
            raise ValueError(f"sub-network names must be unique, but are {names}")
        for subnet in self.all:
            self.spec.check(subnet)

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[Subnet]:
        return iter(self.members)

    def __getitem__(self, index: int) -> Subnet:
        return self.members[index]

    @property
    def all(self) -> tuple[Subnet, ...]:
        """The members, followed by the teacher if there is one."""
        return self.members if self.teacher is None else (*self.members, self.teacher)

    @property
    def largest(self) -> Subnet:
        """The sub-network that learns from labels: the teacher, or the most expensive member if
        there is none."""
        return self.teacher if self.teacher is not None else self.members[self.by_madds()[-1]]

    @property
    def names(self) -> frozenset[str]:
        """The names of the members and of the teacher."""
        return frozenset(subnet.name for subnet in self.all)

    def at(self, widths: Sequence[int]) -> Subnet:
        """The member or teacher with these widths; where there is none, `subnet_at`."""
        wanted = tuple(widths)
        declared = (subnet for subnet in self.all if subnet.widths == wanted)
        return next(declared, None) or subnet_at(self.spec, wanted)

    def by_madds(self, image_size: ImageSize | None = None) -> tuple[int, ...]:
        """Member ids from the cheapest to the most expensive; members of equal cost keep their
        order."""
        from dsnet.space.cost import subnet_cost  # only this method needs costs

        size = self.spec.image_size if image_size is None else image_size
        return tuple(sorted(range(len(self)), key=lambda k: subnet_cost(self.spec, self.members[k], size).madds))

    def prefixes(self, group: int) -> list[tuple[int, ...]]:
        """The widths of every member and the teacher up to and including channel group `group`."""
        return [subnet.prefix(group + 1) for subnet in self.all]

    def prefix_upto(self, gate: int) -> tuple[int, ...]:
        """The widths that all members share before gate number `gate`.

        Raises:
            ValueError: two members differ before the gate, so that no gate there could choose
                between them.
        """
        num_groups = self.spec.num_prefix_groups(gate)
        prefixes = {subnet.prefix(num_groups) for subnet in self.members}
        if len(prefixes) > 1:
            raise ValueError(
                f"all sub-networks must agree on the {num_groups} channel groups before gate {self.spec.gates[gate].name!r}, "
                f"but their widths there are {sorted(prefixes)}; dsnet.space.entry_gate.with_entry_gate gives such a set a gate "
                "before the network"
            )
        return prefixes.pop()

    def subset(self, ids: Sequence[int]) -> SubnetSet:
        """The members `ids`, in that order, without the teacher."""
        return SubnetSet(self.spec, tuple(self.members[k] for k in ids))

    def to_json(self) -> dict[str, Any]:
        """A JSON-able mapping, including the fingerprint of the supernet's spec."""
        return {
            "supernet": self.spec.fingerprint,
            "members": [asdict(subnet) for subnet in self.members],
            "teacher": None if self.teacher is None else asdict(self.teacher),
        }

    @classmethod
    def from_json(cls, spec: SupernetSpec, data: Mapping[str, Any]) -> SubnetSet:
        """Rebuild a set for `spec` from the result of `to_json`.

        Raises:
            CheckpointError: the set was made for another supernet, or its parts are missing or
                invalid.
        """
        try:
            if data["supernet"] != spec.fingerprint:
                raise CheckpointError(
                    f"the set of sub-networks belongs to supernet {data['supernet'][:12]}, not to {spec.fingerprint[:12]}; "
                    "use the set that was saved beside this checkpoint"
                )
            members, teacher = data["members"], data["teacher"]
            return cls(spec, tuple(map(_subnet, members)), None if teacher is None else _subnet(teacher))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the stored set of sub-networks cannot be read: {error!r}") from error


def subnet_at(spec: SupernetSpec, widths: Sequence[int]) -> Subnet:
    """A sub-network that no set declares, with a name made of its widths: `8-16-24`.

    BatchNorm has no running statistics for it, so it can be trained, but not evaluated.

    Raises:
        ValueError: the widths do not fit the supernet.
    """
    subnet = Subnet("-".join(map(str, widths)), tuple(widths))
    spec.check(subnet)
    return subnet


def _subnet(item: Mapping[str, Any]) -> Subnet:
    return Subnet(item["name"], tuple(item["widths"]))
