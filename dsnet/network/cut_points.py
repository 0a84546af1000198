"""Places in the graph of a traced network at which it can be cut, and its parts between the cuts.

A network can be cut at a node through which all data flows: every path from the image to the logits
passes it (an articulation point of the graph). `part_of` makes the graph between two cuts.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

from dsnet.network.channels import ELEMENTWISE_FUNCTIONS, NAMED_ELEMENTWISE, channel_dim, has_channels, shape_of
from dsnet.wording import did_you_mean, plural

MAX_LISTED = 12
"""Largest number of places that a list for people has."""
_NUM_BESIDE = 3
"""Largest number of values beside a node that a message names."""
_IN_PLACE = frozenset({operator.iadd, operator.isub, operator.imul, operator.itruediv})
_ALIAS_MODULES = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.Flatten)
"""Modules whose output can have the memory of their input."""
_ALIAS_FUNCTIONS = frozenset({F.dropout, F.dropout2d, torch.flatten, torch.permute, torch.transpose})
_ALIAS_METHODS = frozenset({"contiguous", "float", "view", "reshape", "flatten", "permute", "transpose"})


@dataclass(frozen=True)
class Place:
    """A place at which a network can be cut."""

    node: fx.Node
    """The node whose value passes."""
    label: str
    """The dotted path of the outermost submodule whose output the node is; otherwise its own
    name."""

    @property
    def depth(self) -> int:
        """Number of names in the path; a node of `forward` itself counts as deep."""
        return len(self.label.split(".")) if self.label != self.node.name or self.node.op == "call_module" else 99


def values_beside(graph: fx.Graph) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """For every node that depends on the image: the other such nodes up to it whose values a later
    node needs.

    All data flows through the nodes that have none.
    """
    nodes = list(graph.nodes)
    position = {node: number for number, node in enumerate(nodes)}
    last_use = {node: max((position[user] for user in node.users), default=-1) for node in nodes}
    found: dict[fx.Node, tuple[fx.Node, ...]] = {}
    open_: list[fx.Node] = []
    for node in nodes:
        if node.op == "output" or not (node.op == "placeholder" or any(each in found for each in node.all_input_nodes)):
            continue
        open_ = [other for other in open_ if last_use[other] > position[node]]
        found[node] = tuple(open_)
        open_.append(node)
    return found


def articulation_points(graph: fx.Graph) -> list[fx.Node]:
    """The nodes through which all data flows, from the image to the logits."""
    return [node for node, beside in values_beside(graph).items() if not beside and node.users]


def submodule_ends(graph: fx.Graph) -> dict[str, fx.Node]:
    """For every submodule that runs its last node, by dotted path."""
    ends: dict[str, fx.Node] = {}
    for node in graph.nodes:
        for path, _ in node.meta.get("nn_module_stack", {}).values():
            if path:
                ends[path] = node
        if node.op == "call_module":
            ends[str(node.target)] = node
    return ends


def possible_places(traced: fx.GraphModule) -> list[Place]:
    """All places at which a traced network can be cut, in the order of the graph."""
    ends = submodule_ends(traced.graph)
    labels: dict[fx.Node, str] = {}
    nodes = {node.name: node for node in traced.graph.nodes}
    for path, node in ends.items():
        if nodes.get(path, node) is not node:
            continue  # it is the name of another node, such as the first run of the same layer
        if node not in labels or path.count(".") < labels[node].count("."):
            labels[node] = path
    beside = values_beside(traced.graph)
    return [
        Place(node, labels.get(node, node.name))
        for node in beside
        if node.users and _refusal(traced, node, beside[node]) is None
    ]


def place_of(traced: fx.GraphModule, name: str, places: Sequence[Place]) -> fx.Node:
    """The node of a place by name.

    Args:
        traced: the network.
        name: the name of a node, or the dotted path of a submodule, which stands for its last node.
        places: those that messages name as possible.

    Raises:
        ValueError: there is no such node or submodule, or the network cannot be cut there.
    """
    nodes = {node.name: node for node in traced.graph.nodes}
    ends = submodule_ends(traced.graph)
    node = nodes.get(name, ends.get(name))
    listed = f"possible places: {', '.join(place.label for place in main_places(places)) or 'none'}"
    if node is None:
        hint = did_you_mean(name, [*(place.label for place in places), *ends, *nodes]) or ";"
        raise ValueError(f"the network has no submodule or node {name!r}{hint} {listed}")
    reason = _refusal(traced, node, values_beside(traced.graph).get(node, ()))
    if reason is not None:
        at = "" if node.name == name else f", which ends at {node.name},"
        raise ValueError(f"{name}{at} is no place for a gate: {reason}; {listed}")
    return node


def main_places(places: Sequence[Place]) -> list[Place]:
    """At most `MAX_LISTED` places for people to read: of a long list the ends of outer submodules,
    and of a long list of these the places before the size of the features changes."""
    if len(places) <= MAX_LISTED:
        return list(places)
    outer = [place for place in places if place.depth <= 2] or list(places)
    if len(outer) > MAX_LISTED:
        sizes = [shape_of(place.node)[2:] for place in outer]
        following = [*sizes[1:], None]
        ends = zip(outer, sizes, following, strict=True)
        outer = [place for place, own, after in ends if place.depth == 1 or own != after]
    step = -(-len(outer) // MAX_LISTED)
    return outer[step - 1 :: step]


def _refusal(traced: fx.GraphModule, node: fx.Node, beside: Sequence[fx.Node]) -> str | None:
    """Why a network cannot be cut at a node; None where it can."""
    if node.op in ("placeholder", "output"):
        return "it is the image; that gate is called entry" if node.op == "placeholder" else "it is the end"
    if beside:
        names = ", ".join(other.name for other in beside[:_NUM_BESIDE])
        more = f" and {plural(len(beside) - _NUM_BESIDE, 'other value')}" if len(beside) > _NUM_BESIDE else ""
        return f"beside it {names}{more} {'is' if len(beside) == 1 else 'are'} needed after it"
    shape = shape_of(node)
    if not has_channels(node) or len(shape) != 4 or channel_dim(node) != 1:
        last = ", with the channels in the last dimension" if channel_dim(node) == 3 else ""
        return f"its value is not [batch, channels, height, width]{f', but {list(shape)}{last}' if shape else ''}"
    if not node.users:
        return "nothing uses its value"
    changing = next(_changing(traced, node), None)
    return None if changing is None else f"{changing.name} changes its value in place; name that one"


def _changing(traced: fx.GraphModule, node: fx.Node) -> Iterator[fx.Node]:
    """The nodes that write into the memory of a node's value."""
    for user in node.users:
        module = traced.get_submodule(str(user.target)) if user.op == "call_module" else None
        if _is_in_place(user, node, module):
            yield user
        elif _is_alias(user, module):
            yield from _changing(traced, user)


def _is_in_place(user: fx.Node, value: fx.Node, module: nn.Module | None) -> bool:
    if module is not None:
        return bool(getattr(module, "inplace", False))
    if user.kwargs.get("inplace") or (user.target in ELEMENTWISE_FUNCTIONS and True in user.args[1:]):
        return True
    name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
    writes = user.target in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    return writes and bool(user.args) and user.args[0] is value


def _is_alias(user: fx.Node, module: nn.Module | None) -> bool:
    if module is not None:
        return isinstance(module, _ALIAS_MODULES) or type(module).__name__ == "StochasticDepth"
    if user.op == "call_method":
        return user.target in _ALIAS_METHODS
    return user.target in _ALIAS_FUNCTIONS or getattr(user.target, "__name__", "") in NAMED_ELEMENTWISE


def part_of(graph: fx.Graph, start: str | None, stop: str | None) -> fx.Graph:
    """The part of a graph after one cut and up to the next.

    Args:
        graph: takes the image and perhaps further values, which each part takes too.
        start: name of the node whose value the part reads in place of the image; None for the
            image.
        stop: name of the node whose value the part returns; None for the output.
    """
    part = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    nodes = list(graph.nodes)
    number = {node.name: position for position, node in enumerate(nodes)}
    end = next(node for node in nodes if node.op == "output")
    last = end.all_input_nodes[0] if stop is None else nodes[number[stop]]
    first = -1 if start is None else number[start]
    inputs = [node for node in nodes if node.op == "placeholder"]
    if start is None:
        copied[inputs[0]] = part.node_copy(inputs[0])
    else:
        copied[nodes[first]] = part.placeholder("features")
    for node in inputs[1:]:
        copied[node] = part.node_copy(node)
    for node in _run_between(nodes, first, number[last.name]):
        copied[node] = part.node_copy(node, lambda each: copied[each])
    part.output(copied[last])
    return part


def _run_between(nodes: Sequence[fx.Node], first: int, last: int) -> list[fx.Node]:
    """The nodes after number `first` and up to number `last`, and the nodes that do not depend on
    the image, such as tensors of the module, whose values they read."""
    depends: set[fx.Node] = set()
    for node in nodes:
        if node.op == "placeholder" or any(each in depends for each in node.all_input_nodes):
            depends.add(node)
    wanted = {node for node in nodes[first + 1 : last + 1] if node in depends and node.op != "placeholder"}
    missing = [each for node in wanted for each in node.all_input_nodes if each not in depends]
    while missing:
        node = missing.pop()
        if node not in wanted:
            wanted.add(node)
            missing += node.all_input_nodes
    return [node for node in nodes if node in wanted]
