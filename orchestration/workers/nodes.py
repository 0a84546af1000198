"""The nodes of the connected Ray cluster: what each of them has, and what fits on them.

A process runs on one node, so that the sum over a cluster does not say whether it has a place: two
nodes of one CPU cannot run a process of two threads. Ray waits for ever for a place that there
cannot be; `refuse_without_room` refuses it, and `place_kept` waits a limited time for a place that
others use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dsnet.errors import PreflightError
from dsnet.wording import plural

PLACE_TIMEOUT_S = 60.0
"""Seconds that a process waits for a place on a cluster whose nodes have room for it."""
_WORDS = {"CPU": "CPU", "GPU": "GPU", "memory": "byte of memory"}
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Node:
    """A node that is alive."""

    address: str
    """Its IP address."""
    resources: Mapping[str, float]
    """What it has in all, whether in use or not, under Ray's names; >= 0."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """Processes that run at the same time, and what each of them takes on its node."""

    what: str
    """The settings from which it follows, as the beginning of a sentence."""
    number: int
    """Number of processes, >= 1."""
    each: Mapping[str, float]
    """Resources of one process under Ray's names, >= 0."""
    remedy: str
    """What to change if they have no place, as the end of a sentence."""


def cluster_nodes() -> tuple[Node, ...]:
    """The nodes of the connected cluster that are alive now."""
    import ray

    return tuple(Node(node["NodeManagerAddress"], dict(node["Resources"])) for node in ray.nodes() if node["Alive"])


def room(nodes: Sequence[Node], each: Mapping[str, float]) -> int:
    """Number of processes of this size that all nodes together have a place for, >= 0.

    Args:
        nodes: what they have.
        each: resources of one process, at least one above 0.
    """
    needed = {name: amount for name, amount in each.items() if amount > 0}
    return sum(
        min(int(node.resources.get(name, 0.0) / amount + _ROUNDING) for name, amount in needed.items())
        for node in nodes
    )


def most_threads(nodes: Sequence[Node], processes: int, others: Mapping[str, float]) -> int:
    """The largest number of CPUs, at least 1, that each of some processes can have if all of them
    run at the same time.

    Args:
        nodes: what they have.
        processes: number of processes, >= 1.
        others: further resources of each process, such as one GPU.
    """
    widest = int(max((node.resources.get("CPU", 0.0) for node in nodes), default=1.0))
    fitting = (threads for threads in range(widest, 1, -1) if room(nodes, {**others, "CPU": threads}) >= processes)
    return next(fitting, 1)


def refuse_without_room(need: Need, nodes: Sequence[Node]) -> None:
    """Raise if the nodes can never run the processes at the same time.

    Raises:
        PreflightError: the message says what the nodes have, and which setting to change.
    """
    places = room(nodes, need.each)
    if places < need.number:
        raise PreflightError(
            f"{need.what}: {_processes(need)}, but the Ray cluster has {_places(places)} ({nodes_in_words(nodes, need.each)}); "
            f"{need.remedy}"
        )


def _processes(need: Need) -> str:
    each = _amounts(need.each)
    return f"one process needs {each}" if need.number == 1 else f"{need.number:,} processes need {each} each"


def _places(places: int) -> str:
    return "room for none" if places == 0 else f"room for {places:,}"


def nodes_in_words(nodes: Sequence[Node], names: Mapping[str, float]) -> str:
    """What the nodes have of some resources: `2 nodes with 1 CPU each`."""
    if not nodes:
        return "no node"
    kinds = Counter(_amounts({name: node.resources.get(name, 0.0) for name in names}) for node in nodes)
    return "; ".join(
        f"{plural(number, 'node')} with {amounts}{' each' if number > 1 else ''}" for amounts, number in kinds.items()
    )


def _amounts(resources: Mapping[str, float]) -> str:
    told = [_amount(name, amount) for name, amount in resources.items()]
    return " and ".join(told)


def _amount(name: str, amount: float) -> str:
    if name not in _WORDS:
        return f"{amount:g} of {name}"
    if name == "memory":
        return f"{amount / 2**20:,.0f} MiB of memory"
    number = "no" if amount == 0 else f"{amount:g}"
    return f"{number} {_WORDS[name]}{'s' if amount > 1 else ''}"


@contextmanager
def place_kept(each: Mapping[str, float], what: str, timeout_s: float = PLACE_TIMEOUT_S) -> Iterator[Any]:
    """Keep a place for one process for the length of the block: yields the scheduling strategy of
    its task.

    Args:
        each: resources of the process.
        what: the process, as the beginning of a sentence.
        timeout_s: seconds to wait for a place that others use.

    Raises:
        PreflightError: no node had room in this time; the message says what the nodes have.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    kept = placement_group([{name: float(amount) for name, amount in each.items() if amount > 0}])
    try:
        if not kept.wait(timeout_s):
            raise PreflightError(no_place(each, what, timeout_s))
        yield PlacementGroupSchedulingStrategy(kept)
    finally:
        if ray.is_initialized():
            remove_placement_group(kept)


def no_place(each: Mapping[str, float], what: str, timeout_s: float) -> str:
    """The message for a process that found no place in time."""
    return (
        f"{what} found no node with {_amounts(each)} free within {timeout_s:g} s; the Ray cluster has now "
        f"{nodes_in_words(cluster_nodes(), each)}. Other programs use them, or a node has left; make room, or add a node, "
        "and launch again"
    )
