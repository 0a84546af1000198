"""The entry gate: a gate before the network, which reads the images themselves. Needs no torch.

Nothing runs before it, so that sub-networks that share no computation can be chosen too: a set
whose members differ before the first gate of their family, or the members of a network that has no
gate. `with_entry_gate` gives such a set an entry gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

from dsnet.space.spec import IMAGE, IMAGE_CHANNELS, GateSpec, Op, SupernetSpec, Window
from dsnet.space.subnet_set import SubnetSet

ENTRY = "entry"
"""Name of the gate before the network, and of the operation that makes its evidence."""
ENTRY_CELLS = 4
"""Rows and columns of the thumbnail that the entry gate reads."""
OWN_GATES = "own_gates"
"""Key in a spec's `layout`: the names of all gates of the family's network, in order, where the
spec leaves some of them out."""


def entry_gate(in_channels: int) -> GateSpec:
    """The entry gate of a network for images with these channels."""
    return GateSpec(ENTRY, ENTRY, ENTRY_CELLS**2 * in_channels, num_prefix_groups=0)


def entry_op() -> Op:
    """The operation that makes the entry gate's evidence: a thumbnail of the image."""
    window = Window((1, 1), output=(ENTRY_CELLS, ENTRY_CELLS))
    return Op(ENTRY, "pool", IMAGE, 0, IMAGE_CHANNELS, parts=((IMAGE_CHANNELS, 1),), window=window)


def is_entry(gate: GateSpec) -> bool:
    """Whether a gate is the entry gate."""
    return gate.attention == ENTRY


def own_gates(spec: SupernetSpec) -> tuple[str, ...]:
    """The names of all gates that the family's network has, in order, without an entry gate."""
    return tuple(spec.layout.get(OWN_GATES, [gate.name for gate in spec.gates if not is_entry(gate)]))


def own_segments(spec: SupernetSpec) -> tuple[Sequence[int], ...]:
    """For every segment of a spec the gates of the family's network that it runs up to.

    A segment that ends at a gate of the family has this gate last; the last segment has the gates
    that it passes before it ends at the logits; that of the entry gate is empty. Numbers count the
    gates of the family's network.
    """
    names = own_gates(spec)
    segments: list[Sequence[int]] = []
    start = 0
    for gate in spec.gates:
        stop = start if is_entry(gate) else names.index(gate.name) + 1
        segments.append(range(start, stop))
        start = stop
    return (*segments, range(start, len(names)))


def differs_before_gates(subnets: SubnetSet) -> bool:
    """Whether a set's members differ before the first gate of their supernet."""
    spec = subnets.spec
    return bool(spec.gates) and len({subnet.prefix(spec.num_prefix_groups(0)) for subnet in subnets}) > 1


def with_entry_gate(subnets: SubnetSet) -> SubnetSet:
    """The same sub-networks under a spec with an entry gate before the family's own gates.

    Of these remain the gates at which members that agree on everything before can differ. A set
    that has an entry gate already is returned as it is.
    """
    spec = subnets.spec
    if spec.gates and is_entry(spec.gates[0]):
        return subnets
    kept = [number for number in range(len(spec.gates)) if _parts(subnets, number)]
    ops = (replace(op, segment=1 + sum(number < op.segment for number in kept)) for op in spec.ops)
    own = {} if len(kept) == len(spec.gates) else {OWN_GATES: [gate.name for gate in spec.gates]}
    changed = replace(
        spec,
        gates=(entry_gate(spec.in_channels), *(spec.gates[number] for number in kept)),
        ops=(entry_op(), *ops),
        layout={**spec.layout, **own},
    )
    return replace(subnets, spec=changed)


def _parts(subnets: SubnetSet, gate: int) -> bool:
    """Whether members that agree before a gate differ between it and the next one."""
    start, stop = subnets.spec.num_prefix_groups(gate), subnets.spec.num_prefix_groups(gate + 1)
    return any(
        first.prefix(start) == second.prefix(start) and first.prefix(stop) != second.prefix(stop)
        for first, second in combinations(subnets, 2)
    )
