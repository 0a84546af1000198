"""Any network as a supernet: the layout of a plain module that `torch.fx` traces.

Every network of `dsnet.zoo` is a family, and so is a module of the user that is named by its import
path. Its channel groups are the spaces of `dsnet.network.channels`; its sub-networks scale every
group by one ratio. With the option `kernels` the sizes of depthwise kernels are groups too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain, product
from typing import Any

from torch import fx, nn

from dsnet.errors import ConfigError
from dsnet.families import Family, GatePlace, Task, register, register_resolver
from dsnet.families.options import COMBINE, check_choice, check_number, is_integer, kernel_sizes, with_kernels
from dsnet.import_path import is_model_path
from dsnet.network.channels import (
    INPUT,
    KERNEL_END,
    OWN,
    READS,
    STREAMS,
    UNKNOWN,
    Layout,
    TracedGraph,
    attribute,
    is_grouped,
    is_sliceable_kernel,
    kernel_sizes_of,
    other_sizes,
    parts_of,
    shape_of,
    shrunk_padding,
    upstream,
)
from dsnet.network.cut_points import Place, main_places, place_of, possible_places
from dsnet.network.plain import SETTING, OwnOptions, own_options
from dsnet.network.traced import TracedSupernet, evidence_name, traced_graph
from dsnet.space.cost import op_costs
from dsnet.space.entry_gate import ENTRY, entry_gate, entry_op, is_entry
from dsnet.space.spec import (
    CLASSES,
    IMAGE,
    IMAGE_CHANNELS,
    ChannelGroup,
    GateSpec,
    Op,
    Pair,
    Subnet,
    SupernetSpec,
    Window,
)
from dsnet.space.subnet_set import SubnetSet
from dsnet.user_code import check_allowed
from dsnet.wording import plural
from dsnet.zoo import OPTIONS, ZOO

DEFAULTS: Mapping[str, Any] = {
    "ratios": (0.25, 0.5, 0.75, 1.0),
    "step": 8,
    "gates": (),
    "paths": "uniform",
    "streams": "tied",
    "kernels": None,
    "combine": COMBINE[0],
}
PATHS = ("uniform", "all")
MAX_PATHS = 1024
"""Largest number of sub-networks: each of them is evaluated, tabled and timed."""


def traced_layout(model: str, task: Task, options: Mapping[str, Any]) -> SubnetSet:
    """The sub-networks of a network by name.

    Raises:
        ConfigError: the network cannot be traced.
        ValueError: an option is out of its range, or a gate has no place.
    """
    ratios, step = _checked_options(options)
    check_choice("streams", options["streams"], STREAMS)
    own = _own_options(model, options)
    kernels = kernel_sizes(task.image_size, options)
    if len(kernels) > 1 and options["combine"] == "tied" and len(ratios) == 1:
        raise ValueError(
            f"combine is 'tied', which gives each of the ratios a size of the kernels, but ratios has one number, {ratios[0]:g}; "
            "use combine: all, or more ratios"
        )
    spec = traced_spec(model, task, _checked_gates(options["gates"]), options["streams"], own, kernels)
    if all(group.pinned for group in spec.groups):
        reasons = list(dict.fromkeys(group.pinned for group in spec.groups))
        more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        raise ConfigError(
            f"supernet.model: no channels of {model} can be sliced, so that it has one sub-network only: {'; '.join(reasons[:3])}{more}"
        )
    shares = [
        Share(ratios[k], kernel, kernel is not None and options["combine"] == "all")
        for k, kernel in with_kernels(len(ratios), kernels, options["combine"])
    ]
    return SubnetSet(spec, tuple(_members(spec, shares, step, options["paths"])))


def _checked_options(options: Mapping[str, Any]) -> tuple[tuple[float, ...], int]:
    ratios = tuple(options["ratios"])
    if not ratios:
        raise ValueError("ratios is empty")
    for ratio in ratios:
        check_number("ratios", ratio, 0.0, 1.0)
    step = options["step"]
    if not is_integer(step, 1, 1024):
        raise ValueError(f"step is {step!r}, but must be a whole number in 1..1024")
    check_choice("paths", options["paths"], PATHS)
    return tuple(sorted(ratios)), step


def _own_options(model: str, options: Mapping[str, Any]) -> OwnOptions:
    """The options of the network itself that differ from their defaults."""
    known = OPTIONS.get(model, {})
    for name, option in known.items():
        check_number(name, options[name], option.low, option.high)
    return tuple(
        (name, float(options[name])) for name, option in sorted(known.items()) if options[name] != option.default
    )


def _checked_gates(gates: Any) -> tuple[str, ...]:
    """The names of the gates: a list of names, or one name alone."""
    names = (gates,) if isinstance(gates, str) else gates
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"gates is {gates!r}, but must be a list of names, such as [layer3] or [entry, layer2]")
    return tuple(names)


@dataclass(frozen=True)
class Share:
    """Share of the channels, and size of the kernels, of a sub-network after one gate."""

    ratio: float
    """Share of the channels of every group."""
    kernel: int | None = None
    """Largest size in pixels of the depthwise kernels; None: their own."""
    names_kernel: bool = False
    """Whether the name has the size of the kernels."""

    def __str__(self) -> str:
        return f"{self.ratio:g}-k{self.kernel}" if self.names_kernel else f"{self.ratio:g}"

    def width(self, group: ChannelGroup, step: int) -> int:
        """The width of a group: of channels a multiple of `step`, rounded to the nearest, at least
        one step, at most the group; of a kernel the smallest of its sizes that is at least
        `kernel`. With ratio 1 the channels are the group's."""
        if group.kind == "kernel":
            return next(
                (size for size in group.choices if self.kernel is not None and size >= self.kernel), group.max_width
            )
        if self.ratio == 1.0:
            return group.max_width
        return min(group.max_width, max(step, round(self.ratio * group.max_width / step) * step))


def _members(spec: SupernetSpec, shares: Sequence[Share], step: int, paths: str) -> list[Subnet]:
    """The sub-networks of one share each, or of one share after each gate."""
    if paths == "uniform" or len(spec.gates) == 1:
        return [Subnet(str(share), _scaled(spec, (share,) * len(spec.gates), step)) for share in shares]
    number = len(shares) ** len(spec.gates)
    if number > MAX_PATHS:
        what = "widths and kernels" if shares[0].names_kernel else "ratios"
        raise ValueError(
            f"paths is 'all', which with {len(shares)} {what} and {len(spec.gates)} gates makes {number} sub-networks; "
            f"at most {MAX_PATHS} are possible: use fewer {what} or gates"
        )
    each = product(shares, repeat=len(spec.gates))
    return [Subnet("-".join(map(str, path)), _scaled(spec, path, step)) for path in each]


def _scaled(spec: SupernetSpec, path: Sequence[Share], step: int) -> tuple[int, ...]:
    """Widths with one share for the groups after each gate; those before the first gate, which all
    sub-networks share, and pinned ones are whole."""
    widths = []
    for number, group in enumerate(spec.groups):
        passed = sum(gate.num_prefix_groups <= number for gate in spec.gates)
        is_whole = passed == 0 or bool(group.pinned)
        widths.append(group.max_width if is_whole else path[passed - 1].width(group, step))
    return tuple(widths)


def traced_spec(
    model: str,
    task: Task,
    gates: Sequence[str] = (),
    streams: str = "tied",
    options: OwnOptions = (),
    kernels: tuple[int, ...] = (),
) -> SupernetSpec:
    """Groups, costed operations and gates of a network by name.

    Args:
        model: name of the network.
        task: its classes and images.
        gates: names of nodes, of submodules, or `entry`, in any order; empty for the entry gate.
        streams: `tied`: values that are added have the same channels, `ids`: each has its own.
        options: the network's own options that differ from their defaults.
        kernels: sizes in pixels, rising, to which depthwise kernels can be sliced; the last is that
            of the largest of them. Empty: they keep their sizes.

    A process traces each network once.

    Raises:
        ConfigError: the network cannot be traced, or import paths are not allowed.
        ValueError: a gate has no place there, or nothing to choose, or no kernel can have these
            sizes.
    """
    if is_model_path(model):
        check_allowed(SETTING, model)
    return _spec_of(model, task, tuple(gates), streams, options, kernels)


@lru_cache(maxsize=64)
def _spec_of(
    model: str, task: Task, gates: tuple[str, ...], streams: str, options: OwnOptions, kernels: tuple[int, ...]
) -> SupernetSpec:
    """See `traced_spec`."""
    traced = _traced(model, task, streams, options, kernels)
    if kernels:
        _check_kernels(model, traced, kernels)
    groups = _groups(traced)
    has_entry = not gates or ENTRY in gates
    cuts = _cuts(traced, groups, gates)
    _check_choices(traced, groups, cuts, has_entry)
    reader = _OpReader(traced)
    ops = [entry_op()] if has_entry else []
    segment = int(has_entry)
    names = {cut.node: cut for cut in cuts}
    for node in traced.module.graph.nodes:
        ops += [replace(op, segment=segment) for op in reader.ops(node)]
        if node in names:
            ops.append(replace(reader.evidence(node), segment=segment))
            segment += 1
    return SupernetSpec(
        family=model,
        num_classes=task.num_classes,
        in_channels=task.in_channels,
        image_size=task.image_size,
        groups=groups,
        ops=tuple(ops),
        gates=(
            *([entry_gate(task.in_channels)] if has_entry else []),
            *(
                GateSpec(cut.node.name, evidence_name(cut.node.name), shape_of(cut.node)[1], cut.num_groups)
                for cut in cuts
            ),
        ),
        layout={
            "model": model,
            **({} if streams == "tied" else {"streams": streams}),
            **({"options": dict(options)} if options else {}),
            **({"kernels": list(kernels)} if kernels else {}),
        },
    )


def _traced(model: str, task: Task, streams: str, options: OwnOptions, kernels: tuple[int, ...]) -> TracedGraph:
    """The graph of a network by name."""
    return traced_graph(model, task.num_classes, task.in_channels, task.image_size, streams, options, kernels)


def _check_kernels(model: str, traced: TracedGraph, kernels: Sequence[int]) -> None:
    """Check that the sizes of kernels fit a network.

    Raises:
        ValueError: the largest is not that of the network's largest depthwise kernel, or no kernel
            can be sliced to a smaller one.
    """
    modules = {
        node.name: traced.module.get_submodule(str(node.target))
        for node in traced.module.graph.nodes
        if node.op == "call_module" and not node.meta.get(UNKNOWN)
    }
    layers = {name: module for name, module in modules.items() if is_sliceable_kernel(module)}
    if not layers:
        raise ValueError(
            f"kernels is {list(kernels)}, but {model} has no depthwise convolution with a square kernel of odd size; "
            "leave kernels out, or make the network with such convolutions"
        )
    largest = max(layers, key=lambda name: layers[name].kernel_size[0])
    own = layers[largest].kernel_size[0]
    if kernels[-1] != own:
        smaller = [size for size in kernels if size < own] or [own - 2]
        way = (
            f"use {[*smaller, own]}" + (", or make the network with larger kernels" if kernels[-1] > own else "")
            if own > 1
            else "make the network with larger kernels"
        )
        raise ValueError(
            f"kernels ends with {kernels[-1]}, but the largest depthwise kernel of {model} has {own} pixels ({largest}), and a "
            f"smaller kernel is its centre: {way}"
        )
    possible = {size for module in layers.values() for size in kernel_sizes_of(module, kernels)}
    for size in kernels:
        if size not in possible:
            lacking = -min(shrunk_padding(layers[largest], size))
            left = [each for each in kernels if each in possible]
            way = f"use {left}, or" if len(left) > 1 else "use"
            raise ValueError(
                f"kernels holds {size}, but no kernel of {model} can be sliced to it, because its centre would see other places: "
                f"{largest} lacks {plural(lacking, 'pixel')} of padding; {way} more padding in the network"
            )


@dataclass(frozen=True)
class _Cut:
    """A gate inside the network."""

    name: str
    """As the user wrote it."""
    node: fx.Node
    num_groups: int
    """Number of channel groups that are written before it, by some layer at least."""


def _cuts(traced: TracedGraph, groups: Sequence[ChannelGroup], gates: Sequence[str]) -> list[_Cut]:
    """The places of the gates inside the network, in the order of the graph.

    Raises:
        ValueError: a name is unknown or no place, or two name the same place.
    """
    inner = [name for name in gates if name != ENTRY]
    if not inner:
        return []
    places = _useful(possible_places(traced.module), traced, groups)
    position = _positions(traced)
    found: dict[fx.Node, str] = {}
    for name in inner:
        node = place_of(traced.module, name, places)
        if node in found:
            raise ValueError(f"gates names the same place twice: {found[node]} and {name}")
        found[node] = name
    return [
        _Cut(found[node], node, _num_before(node, traced, groups)) for node in sorted(found, key=position.__getitem__)
    ]


def _positions(traced: TracedGraph) -> dict[fx.Node, int]:
    return {node: number for number, node in enumerate(traced.module.graph.nodes)}


def _num_before(node: fx.Node, traced: TracedGraph, groups: Sequence[ChannelGroup]) -> int:
    """Number of channel groups of which some layer up to a node writes or reads channels; a group
    has the name of the first of them."""
    position = _positions(traced)
    before = {other.name for other, number in position.items() if number <= position[node]}
    return sum(group.name.removesuffix(INPUT).removesuffix(KERNEL_END) in before for group in groups)


def _useful(places: Sequence[Place], traced: TracedGraph, groups: Sequence[ChannelGroup]) -> list[Place]:
    """The places after which channels can be sliced."""
    return [
        place
        for place in places
        if any(not group.pinned for group in groups[_num_before(place.node, traced, groups) :])
    ]


def _check_choices(traced: TracedGraph, groups: Sequence[ChannelGroup], cuts: Sequence[_Cut], has_entry: bool) -> None:
    """Raise ValueError if a gate inside the network leaves a gate nothing to choose."""
    starts = [(ENTRY, 0)] if has_entry else []
    starts += [(cut.name, cut.num_groups) for cut in cuts]
    stops = [*starts[1:], ("the end", len(groups))]
    for (name, start), (following, stop) in zip(starts, stops, strict=True):
        if not cuts or any(not group.pinned for group in groups[start:stop]):
            continue
        useful = main_places(_useful(possible_places(traced.module), traced, groups))
        listed = ", ".join(place.label for place in useful) or "none"
        raise ValueError(
            f"the gate {name} has nothing to choose: no channels that can be sliced are first written between it and "
            f"{following}, and channels that are tied to earlier ones keep their number; possible places: {listed}"
        )


def gate_places(spec: SupernetSpec) -> tuple[GatePlace, ...]:
    """The places at which the network of a spec can have a gate that has something to choose."""
    task = Task(spec.num_classes, spec.in_channels, spec.image_size)
    traced = _traced(spec.layout["model"], task, _streams(spec), own_options(spec), _kernels(spec))
    position = {node.name: number for node, number in _positions(traced).items()}
    costs = op_costs(spec, Subnet("widest", spec.max_widths), spec.image_size)
    evidence = {gate.attention for gate in spec.gates}
    own = [
        (position[op.name], madds)
        for op, (madds, _) in zip(spec.ops, costs, strict=True)
        if op.name in position and op.name not in evidence
    ]
    useful = _useful(possible_places(traced.module), traced, spec.groups)
    main = main_places(useful)
    found = []
    for place in useful:
        before = sum(madds for number, madds in own if number <= position[place.node.name])
        _, channels, height, width = shape_of(place.node)
        after = sum(madds for _, madds in own) - before
        found.append(
            GatePlace(place.label, place.node.name, channels, (height, width), before, after, is_main=place in main)
        )
    return tuple(found)


def _groups(traced: TracedGraph) -> tuple[ChannelGroup, ...]:
    """The channel groups in the order in which they are produced."""
    spaces = (traced.spaces[root] for root, number in traced.numbers.items() if number >= 0)
    return tuple(
        ChannelGroup(
            space.writers[0],
            space.width,
            space.pinned,
            kind="kernel" if space.sizes else "channels",
            choices=space.sizes,
        )
        for space in spaces
    )


class _OpReader:
    """Makes the costed operations of a traced network."""

    def __init__(self, traced: TracedGraph) -> None:
        self._traced = traced
        self._above = upstream(list(traced.module.graph.nodes), traced)
        self._counted: set[str] = set()
        self._size_of: dict[str, str] = {}
        """For each node the name of the op whose output has its height and width."""
        self._sizes: dict[str, Pair] = {}
        """Height and width of the output of each op, for the example image."""

    def ops(self, node: fx.Node) -> list[Op]:
        """The operations of a node; none where it costs nothing."""
        inputs = [value for value in node.all_input_nodes if value.name in self._size_of]
        if node.op == "placeholder":
            self._size_of[node.name] = IMAGE
            self._sizes[IMAGE] = other_sizes(node)
        if node.op == "get_attr":
            return self._parameter(node)
        if not inputs:
            return self._constant(node)
        reads = self._size_of[max(inputs, key=_pixels).name]
        op = self._of(node, reads)
        if op is None or op.kind in ("norm", "scale") or (op.kind == "fixed" and self._keeps_size(node, reads)):
            self._size_of[node.name] = reads
            return [] if op is None else [op]
        self._size_of[node.name] = node.name
        self._sizes[node.name] = other_sizes(node)
        return self._with_size(op, node)

    def _with_size(self, op: Op, node: fx.Node) -> list[Op]:
        """An operation, and before it one that only says height and width of its input, where no
        earlier one has them: it reads a value that is not understood along another dimension."""
        if op.kind in ("fixed", "linear"):
            return [op]
        size = self._size_read(node)
        if _is_of_size(node.all_input_nodes[0], size, self._sizes[op.reads]):
            return [op]
        given = _free(f"{node.name}{INPUT}", size)
        return [given, replace(op, reads=given.name)]

    def evidence(self, node: fx.Node) -> Op:
        """The operation that makes the evidence of a gate at a node: the mean of each channel."""
        size = shape_of(node)
        return Op(
            evidence_name(node.name),
            "pool",
            self._size_of[node.name],
            0,
            self._written(node),
            **self._channels(parts_of(node)),
            window=Window((size[2], size[3]), output=(1, 1)),
        )

    def _parameter(self, node: fx.Node) -> list[Op]:
        """A tensor of the module that no layer holds."""
        tensor = attribute(self._traced.module, str(node.target))
        is_counted = isinstance(tensor, nn.Parameter) and self._is_new(str(node.target))
        if OWN in node.meta:
            parts, dim = node.meta[OWN]
            return [self._scale(node.name, IMAGE, parts, tensor.numel() // tensor.shape[dim] if is_counted else 0)]
        if not is_counted:
            return []
        return [Op(node.name, "fixed", IMAGE, IMAGE_CHANNELS, IMAGE_CHANNELS, fixed_params=tensor.numel())]

    def _is_new(self, name: str) -> bool:
        """Whether these weights have not been counted yet."""
        is_new = name not in self._counted
        self._counted.add(name)
        return is_new

    def _keeps_size(self, node: fx.Node, reads: str) -> bool:
        """Whether an operation that is not understood keeps height and width, or has none."""
        if 3 <= len(shape_of(node)) <= 4:
            return _is_of_size(node, other_sizes(node), self._sizes[reads])
        return _pixels(node) == max(map(_pixels, node.all_input_nodes))

    def _constant(self, node: fx.Node) -> list[Op]:
        """The operation of a node that does not depend on the image, such as a layer that reads a
        table of positions; none where it costs nothing."""
        op = self._fixed(node, self._new_layer(node))
        return [op] if op.fixed_madds or op.fixed_params else []

    def _new_layer(self, node: fx.Node) -> nn.Module | None:
        """The layer that a node runs, where its parameters have not been counted yet."""
        if node.op != "call_module" or not self._is_new(str(node.target)):
            return None
        return self._traced.module.get_submodule(str(node.target))

    def _fixed(self, node: fx.Node, module: nn.Module | None) -> Op:
        """An operation that is not understood: its cost is what a run counted, and the parameters
        of a module that have not been counted yet."""
        num_madds = node.meta.get("madds", 0)
        num_params = sum(parameter.numel() for parameter in module.parameters()) if module is not None else 0
        return replace(_free(node.name, other_sizes(node)), fixed_madds=num_madds, fixed_params=num_params)

    def _of(self, node: fx.Node, reads: str) -> Op | None:
        """The operation of a node; None where it costs nothing and keeps height and width."""
        module = self._new_layer(node)
        if node.meta.get(UNKNOWN) and not is_grouped(module):
            op = self._fixed(node, module)
            is_free = not (op.fixed_madds or op.fixed_params) and self._keeps_size(node, reads)
            return None if is_free else op
        if module is None and node.op == "call_module":  # a layer without weights runs again
            module = self._traced.module.get_submodule(str(node.target))
        match module:
            case nn.Conv2d():
                return self._convolution(node, module, reads)
            case nn.Linear():
                return self._linear(node, module, reads)
            case nn.LayerNorm():
                return self._scale(node.name, reads, parts_of(node), sum(1 for _ in module.parameters()))
            case nn.BatchNorm2d() | nn.BatchNorm1d():
                return self._norm(node, reads)
        if _is_pooling(node, module):
            return self._pooling(node, module, reads)
        return None

    def _channels(self, layout: Layout) -> dict[str, Any]:
        """The `parts` and `unions` of an op that reads channels."""
        parts, unions = self._traced.groups_of(layout)
        return {"parts": parts, "unions": unions}

    def _written(self, node: fx.Node) -> int:
        """The group that a convolution or linear layer writes."""
        return self._traced.groups_of(parts_of(node))[0][0][0]

    def _made(self, node: fx.Node, kind: Any, reads: str, *, out: int, **further: Any) -> Op:
        return Op(node.name, kind, reads, 0, out, **self._channels(node.meta[READS].parts), **further)

    def _linear(self, node: fx.Node, module: nn.Linear, reads: str) -> Op:
        """A linear layer; on features or tokens it is a convolution with a window of one pixel."""
        further = {"out": self._written(node), "has_bias": module.bias is not None}
        if len(shape_of(node)) == 2:
            return self._made(node, "linear", reads, **further)
        return self._made(node, "conv", reads, window=Window((1, 1)), **further)

    def _scale(self, name: str, reads: str, layout: Layout, num_each: int) -> Op:
        """A LayerNorm or tensor with `num_each` parameters per channel."""
        own = self._groups(layout)
        return Op(name, "scale", reads, 0, own[0] if own else CLASSES, **self._channels(layout), divisions=num_each)

    def _groups(self, layout: Layout) -> list[int]:
        """The groups that write channels, without the image and the classes."""
        parts, unions = self._traced.groups_of(layout)
        return [group for group in (*(group for group, _ in parts), *chain.from_iterable(unions)) if group >= 0]

    def _convolution(self, node: fx.Node, module: nn.Conv2d, reads: str) -> Op:
        window = Window(_pair(module.kernel_size), _pair(module.stride), _pair(module.padding), _pair(module.dilation))
        further = {"window": window, "has_bias": module.bias is not None}
        if module.groups == 1:
            return self._made(node, "conv", reads, out=self._written(node), **further)
        if is_grouped(module):
            return self._made(node, "grouped", reads, out=self._written(node), divisions=module.groups, **further)
        factor = module.out_channels // module.in_channels
        further["kernel_group"] = self._traced.kernel_group(node)
        return self._made(node, "depthwise", reads, out=self._written(node), divisions=factor, **further)

    def _norm(self, node: fx.Node, reads: str) -> Op:
        own = self._groups(parts_of(node))
        above = sorted({self._traced.numbers[root] for root in self._above[node.name]} - set(own))
        depends = (*(group for group in above if group >= 0), *dict.fromkeys(own))
        return self._made(node, "norm", reads, out=own[0] if own else CLASSES, depends=depends)

    def _size_read(self, node: fx.Node) -> Pair:
        """Height and width of the input of a node, as it reads it."""
        return other_sizes(node.all_input_nodes[0], node.meta[READS].dim)

    def _pooling(self, node: fx.Node, module: nn.Module | None, reads: str) -> Op:
        if isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
            stride = module.kernel_size if module.stride is None else module.stride
            dilation = getattr(module, "dilation", 1)
            window = Window(
                _pair(module.kernel_size), _pair(stride), _pair(module.padding), _pair(dilation), bool(module.ceil_mode)
            )
            kind = "maxpool"
        else:
            kind, window = "pool", Window(self._size_read(node), output=other_sizes(node))
        return self._made(node, kind, reads, out=self._written(node), window=window)


def _is_pooling(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node reduces height and width without weights."""
    if isinstance(module, nn.MaxPool2d | nn.AvgPool2d | nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d):
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op != "call_module" and ("pool" in str(name) or name in ("mean", "amax"))


def _pixels(node: fx.Node) -> int:
    return math.prod(other_sizes(node))


def _is_of_size(node: fx.Node, size: Pair, known: Pair) -> bool:
    """Whether height and width of a value are those of an op's output; of tokens only their number
    matters."""
    return math.prod(size) == math.prod(known) if len(shape_of(node)) == 3 else size == known


def _free(name: str, size: Pair) -> Op:
    """An operation that costs nothing and whose output has a height and width."""
    return Op(name, "fixed", IMAGE, IMAGE_CHANNELS, IMAGE_CHANNELS, window=Window((1, 1), output=size))


def _pair(value: Any) -> Pair:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _streams(spec: SupernetSpec) -> str:
    streams: str = spec.layout.get("streams", "tied")
    return streams


def _kernels(spec: SupernetSpec) -> tuple[int, ...]:
    return tuple(spec.layout.get("kernels", ()))


def _for_task(model: str, spec: SupernetSpec, task: Task) -> SupernetSpec:
    """The layout for the task, with the ids of the groups where their order was changed."""
    gates = [ENTRY if is_entry(gate) else gate.name for gate in spec.gates]
    fresh = traced_spec(model, task, gates, _streams(spec), own_options(spec), _kernels(spec))
    ids = {group.name: group.ids for group in spec.groups if len(group.ids) == group.max_width}
    groups = (replace(group, ids=ids.get(group.name, ())) for group in fresh.groups)
    return replace(fresh, groups=tuple(groups)) if ids else fresh


def traced_family(model: str) -> Family:
    """The family of a plain module.

    Args:
        model: a name of `dsnet.zoo`, or the import path `package.module:function` of a function
            (number of classes, channels of the image) -> module.
    """
    return Family(
        name=model,
        defaults={**DEFAULTS, **{name: option.default for name, option in OPTIONS.get(model, {}).items()}},
        layout=partial(traced_layout, model),
        build=TracedSupernet,
        for_task=partial(_for_task, model),
        naming="A number is the share of the channels of every group; of several numbers each is that after one gate, and after k it is "
        "the size of the depthwise kernels in pixels.",
        gate_places=gate_places,
    )


for _name in ZOO:
    register(traced_family(_name))
register_resolver(lambda name: traced_family(name) if is_model_path(name) else None)
