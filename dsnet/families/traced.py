"""Any network as a supernet: the layout of a plain module that `torch.fx` traces.

Every network of `dsnet.zoo` is a family, and so is a module of the user that is named by its import
path. Its channel groups are the spaces of `dsnet.network.channels`; its sub-networks scale every
group by one ratio.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

from torch import fx, nn

from dsnet.families import Family, Task, register, register_resolver
from dsnet.families.options import check_number, is_integer
from dsnet.import_path import is_model_path
from dsnet.network.channels import (
    UNKNOWN,
    TracedGraph,
    analyse,
    attribute,
    is_grouped,
    parts_of,
    shape_of,
    trace,
    upstream,
)
from dsnet.network.plain import check_allowed, example_image, make_plain
from dsnet.network.traced import ENTRY, ENTRY_CELLS, TracedSupernet
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
from dsnet.zoo import ZOO

DEFAULTS: Mapping[str, Any] = {"ratios": (0.25, 0.5, 0.75, 1.0), "step": 8}


def traced_layout(model: str, task: Task, options: Mapping[str, Any]) -> SubnetSet:
    """The sub-networks of a network by name.

    Raises:
        ConfigError: the network cannot be traced.
        ValueError: an option is out of its range.
    """
    spec = traced_spec(model, task)
    ratios, step = _checked_options(options)
    members = tuple(uniform(spec, ratio, step, f"{ratio:g}") for ratio in ratios)
    return SubnetSet(spec, members)


def _checked_options(options: Mapping[str, Any]) -> tuple[tuple[float, ...], int]:
    ratios = tuple(options["ratios"])
    if not ratios:
        raise ValueError("ratios is empty")
    for ratio in ratios:
        check_number("ratios", ratio, 0.0, 1.0)
    step = options["step"]
    if not is_integer(step, 1, 1024):
        raise ValueError(f"step is {step!r}, but must be a whole number in 1..1024")
    return tuple(sorted(ratios)), step


def uniform(spec: SupernetSpec, ratio: float, step: int, name: str) -> Subnet:
    """The sub-network that has `ratio` of the channels of every group that can be sliced.

    Widths are multiples of `step`, rounded to the nearest, at least one step, at most the group.
    """
    return Subnet(
        name,
        tuple(
            group.max_width
            if group.pinned
            else min(group.max_width, max(step, round(ratio * group.max_width / step) * step))
            for group in spec.groups
        ),
    )


def traced_spec(model: str, task: Task) -> SupernetSpec:
    """Groups and costed operations of a network by name; a process traces each once.

    Raises:
        ConfigError: the network cannot be traced, or import paths are not allowed.
    """
    check_allowed(model)
    return _spec_of(model, task)


@lru_cache(maxsize=64)
def _spec_of(model: str, task: Task) -> SupernetSpec:
    """See `traced_spec`."""
    plain = make_plain(model, task.num_classes, task.in_channels, 0)
    traced = analyse(trace(plain, example_image(task.in_channels, task.image_size)))
    numbers, groups = _groups(traced)
    reader = _OpReader(traced, numbers)
    ops = tuple(op for node in traced.module.graph.nodes if (op := reader.op(node)) is not None)
    evidence = Window((1, 1), output=(ENTRY_CELLS, ENTRY_CELLS))
    entry = Op(ENTRY, "pool", IMAGE, 0, IMAGE_CHANNELS, parts=((IMAGE_CHANNELS, 1),), window=evidence)
    gate = GateSpec(ENTRY, ENTRY, ENTRY_CELLS**2 * task.in_channels, num_prefix_groups=0)
    return SupernetSpec(
        family=model,
        num_classes=task.num_classes,
        in_channels=task.in_channels,
        image_size=task.image_size,
        groups=groups,
        ops=(entry, *(replace(op, segment=1) for op in ops)),
        gates=(gate,),
        layout={"model": model},
    )


def _groups(traced: TracedGraph) -> tuple[dict[int, int], tuple[ChannelGroup, ...]]:
    """The number of each space, and the channel groups in the order in which they are produced."""
    numbers: dict[int, int] = {}
    groups: list[ChannelGroup] = []
    images = next(node for node in traced.module.graph.nodes if node.op == "placeholder")
    for root in traced.spaces.roots():
        space = traced.spaces[root]
        if space.is_classes:
            numbers[root] = CLASSES
        elif images.name in space.writers and len(space.writers) == 1:
            numbers[root] = IMAGE_CHANNELS
        else:
            numbers[root] = len(groups)
            groups.append(ChannelGroup(space.writers[0], space.width, space.pinned))
    return numbers, tuple(groups)


class _OpReader:
    """Makes the costed operations of a traced network."""

    def __init__(self, traced: TracedGraph, numbers: Mapping[int, int]) -> None:
        self._traced = traced
        self._numbers = numbers
        self._above = upstream(list(traced.module.graph.nodes), traced)
        self._counted: set[str] = set()
        self._size_of: dict[str, str] = {}
        """For each node the name of the op whose output has its height and width."""

    def op(self, node: fx.Node) -> Op | None:
        """The operation of a node; None where it costs nothing."""
        inputs = [value.name for value in node.all_input_nodes if value.name in self._size_of]
        if node.op == "placeholder":
            self._size_of[node.name] = IMAGE
            return None
        if node.op == "get_attr":
            return self._parameter(node)
        if not inputs:
            return None
        largest = max(node.all_input_nodes, key=lambda value: _pixels(value))
        reads = self._size_of.get(largest.name, self._size_of[inputs[0]])
        op = self._of(node, reads)
        keeps_size = op is None or op.kind == "norm" or (op.kind == "fixed" and _pixels(node) == _pixels(largest))
        self._size_of[node.name] = reads if keeps_size else node.name
        return op

    def _parameter(self, node: fx.Node) -> Op | None:
        """A tensor of the module that no layer holds."""
        tensor = attribute(self._traced.module, str(node.target))
        if not isinstance(tensor, nn.Parameter) or not self._is_new(str(node.target)):
            return None
        return Op(node.name, "fixed", IMAGE, IMAGE_CHANNELS, IMAGE_CHANNELS, fixed_params=tensor.numel())

    def _is_new(self, name: str) -> bool:
        """Whether these weights have not been counted yet."""
        is_new = name not in self._counted
        self._counted.add(name)
        return is_new

    def _fixed(self, node: fx.Node, module: nn.Module | None) -> Op | None:
        """An operation that is not understood: its cost is what a run counted, and the parameters
        of its module, if they have not been counted yet; None if it costs nothing and keeps height
        and width."""
        num_madds = node.meta.get("madds", 0)
        num_params = sum(parameter.numel() for parameter in module.parameters()) if module is not None else 0
        if not (num_madds or num_params) and _pixels(node) == max(map(_pixels, node.all_input_nodes)):
            return None
        shape = shape_of(node)
        size = (shape[2], shape[3]) if len(shape) == 4 else (1, 1)
        return Op(
            node.name,
            "fixed",
            IMAGE,
            IMAGE_CHANNELS,
            IMAGE_CHANNELS,
            window=Window((1, 1), output=size),
            fixed_madds=num_madds,
            fixed_params=num_params,
        )

    def _of(self, node: fx.Node, reads: str) -> Op | None:
        module = self._traced.module.get_submodule(str(node.target)) if node.op == "call_module" else None
        is_new = module is None or self._is_new(str(node.target))
        if node.meta.get(UNKNOWN) and not (is_new and is_grouped(module)):
            return self._fixed(node, module if is_new else None)
        match module:
            case nn.Conv2d():
                return self._convolution(node, module, reads)
            case nn.Linear():
                return self._made(node, "linear", reads, out=self._written(node), has_bias=module.bias is not None)
            case nn.BatchNorm2d() | nn.BatchNorm1d():
                return self._norm(node, reads)
        if _is_pooling(node, module):
            return self._pooling(node, module, reads)
        return None

    def _parts(self, node: fx.Node) -> tuple[Pair, ...]:
        return tuple((self._numbers[self._traced.spaces.root(part.space)], part.repeat) for part in parts_of(node))

    def _written(self, node: fx.Node) -> int:
        """The group that a convolution or linear layer writes."""
        return self._parts(node)[0][0]

    def _made(self, node: fx.Node, kind: Any, reads: str, *, out: int, **further: Any) -> Op:
        source = node.all_input_nodes[0]
        return Op(node.name, kind, reads, 0, out, parts=self._parts(source), **further)

    def _convolution(self, node: fx.Node, module: nn.Conv2d, reads: str) -> Op:
        window = Window(_pair(module.kernel_size), _pair(module.stride), _pair(module.padding), _pair(module.dilation))
        further = {"window": window, "has_bias": module.bias is not None}
        if module.groups == 1:
            return self._made(node, "conv", reads, out=self._written(node), **further)
        if is_grouped(module):
            return self._made(node, "grouped", reads, out=self._written(node), divisions=module.groups, **further)
        factor = module.out_channels // module.in_channels
        return self._made(node, "depthwise", reads, out=self._written(node), divisions=factor, **further)

    def _norm(self, node: fx.Node, reads: str) -> Op:
        own = [group for group, _ in self._parts(node) if group >= 0]
        above = sorted({self._numbers[root] for root in self._above[node.name]} - set(own))
        depends = (*(group for group in above if group >= 0), *dict.fromkeys(own))
        return self._made(node, "norm", reads, out=own[0] if own else CLASSES, depends=depends)

    def _pooling(self, node: fx.Node, module: nn.Module | None, reads: str) -> Op:
        size = shape_of(node)[2:] if len(shape_of(node)) == 4 else (1, 1)
        source = shape_of(node.all_input_nodes[0])[2:]
        if isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
            stride = module.kernel_size if module.stride is None else module.stride
            dilation = getattr(module, "dilation", 1)
            window = Window(
                _pair(module.kernel_size), _pair(stride), _pair(module.padding), _pair(dilation), bool(module.ceil_mode)
            )
            kind = "maxpool"
        else:
            kind, window = "pool", Window(_pair(source), output=_pair(size))
        return self._made(node, kind, reads, out=self._parts(node)[0][0], window=window)


def _is_pooling(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node reduces height and width without weights."""
    if isinstance(module, nn.MaxPool2d | nn.AvgPool2d | nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d):
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op != "call_module" and ("pool" in str(name) or name in ("mean", "amax"))


def _pixels(node: fx.Node) -> int:
    shape = shape_of(node)
    return shape[2] * shape[3] if len(shape) == 4 else 1


def _pair(value: Any) -> Pair:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def traced_family(model: str) -> Family:
    """The family of a plain module.

    Args:
        model: a name of `dsnet.zoo`, or the import path `package.module:function` of a function
            (number of classes, channels of the image) -> module.
    """
    return Family(
        name=model,
        defaults=DEFAULTS,
        layout=partial(traced_layout, model),
        build=TracedSupernet,
        for_task=lambda _, task: traced_spec(model, task),
        naming="A number is the share of the channels of every group.",
    )


for _name in ZOO:
    register(traced_family(_name))
register_resolver(lambda name: traced_family(name) if is_model_path(name) else None)
