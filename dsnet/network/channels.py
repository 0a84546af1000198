"""Channels of a traced network: which are sliced together, and which cannot be sliced.

`analyse` walks the graph of a plain module (`torch.fx`) and gives every value the layout of its
channels: a sequence of parts, each a prefix of one *space* of channels. Operations that add or
multiply two values tie their spaces; a concatenation keeps its parts apart; what is not understood
keeps all channels of its inputs. The spaces that remain are the channel groups of the supernet.

With streams `ids` an addition ties nothing. Its result is the union of the channels that its two
values have, and a part of it has several spaces, its writers.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from dsnet.errors import ConfigError
from dsnet.space.spec import CLASSES, IMAGE_CHANNELS, Pair


@dataclass(frozen=True)
class Part:
    """Consecutive channels of a value that come from one space."""

    space: int
    count: int
    """Channels of the space."""
    repeat: int = 1
    """Consecutive channels of the value per channel of the space: H * W after a flatten."""
    others: tuple[int, ...] = ()
    """Further spaces that write these channels, each its own of them."""

    @property
    def writers(self) -> tuple[int, ...]:
        """All spaces that write these channels."""
        return (self.space, *self.others)


Layout = tuple[Part, ...]
THE_IMAGE = "the channels of the image"
"""Why the channels of the image are never sliced."""
UNKNOWN = "unknown"
"""Key in the `meta` of a node that is not understood: it keeps all channels of its inputs."""


@dataclass
class Space:
    """Channels that are sliced together."""

    width: int
    pinned: str = ""
    """Why the channels are never sliced; empty where they can be."""
    is_classes: bool = False
    writers: list[str] = field(default_factory=list)
    """Names of the nodes that produce the channels."""
    ties: list[str] = field(default_factory=list)
    """Names of the nodes that tied further channels to these."""


class ChannelSpaces:
    """Spaces of channels, joined by union-find."""

    def __init__(self) -> None:
        self._spaces: list[Space] = []
        self._parent: list[int] = []

    def new(self, width: int, writer: str, pinned: str = "") -> Part:
        """A part that covers a new space."""
        self._spaces.append(Space(width, pinned, writers=[writer]))
        self._parent.append(len(self._parent))
        return Part(len(self._parent) - 1, width)

    def root(self, space: int) -> int:
        """The representative of the spaces that are tied to this one; the earliest of them."""
        while self._parent[space] != space:
            self._parent[space] = self._parent[self._parent[space]]
            space = self._parent[space]
        return space

    def __getitem__(self, space: int) -> Space:
        return self._spaces[self.root(space)]

    def roots(self) -> list[int]:
        """The representatives in the order in which their channels are first produced."""
        return [space for space in range(len(self._parent)) if self.root(space) == space]

    def writers(self, part: Part) -> tuple[int, ...]:
        """The representatives of the spaces that write a part, the earliest first."""
        return tuple(sorted({self.root(space) for space in part.writers}))

    def pin(self, layout: Layout, reason: str) -> None:
        """Never slice the channels of a value; the first reason is kept."""
        for part in layout:
            for space in part.writers:
                self[space].pinned = self[space].pinned or reason

    def tie(self, first: Layout, second: Layout, node: str) -> None:
        """Slice the channels of two values of equal shape together; channels that are divided
        differently are pinned instead."""
        if self._is_divided_alike(first, second, node):
            for left, right in zip(first, second, strict=True):
                self._join_all((*left.writers, *right.writers), node)

    def unite(self, first: Layout, second: Layout, node: str) -> Layout:
        """The layout of the sum of two values, each with its own channels; channels that are
        divided differently are pinned."""
        if not self._is_divided_alike(first, second, node):
            return first
        united = []
        for left, right in zip(first, second, strict=True):
            space, *others = dict.fromkeys((*left.writers, *right.writers))
            united.append(replace(left, space=space, others=tuple(others)))
        return tuple(united)

    def tie_writers(self, layout: Layout, node: str) -> None:
        """Slice all channels of each part together."""
        for part in layout:
            self._join_all(part.writers, node)

    def _is_divided_alike(self, first: Layout, second: Layout, node: str) -> bool:
        """Whether two values have parts of the same sizes; otherwise both are pinned."""
        if [(part.count, part.repeat) for part in first] == [(part.count, part.repeat) for part in second]:
            return True
        reason = f"{node} joins channels that are divided differently"
        self.pin(first, reason)
        self.pin(second, reason)
        return False

    def _join_all(self, spaces: Sequence[int], node: str) -> None:
        for space in spaces[1:]:
            self._join(self.root(spaces[0]), self.root(space), node)

    def _join(self, left: int, right: int, node: str) -> None:
        if left == right:
            return
        kept, gone = sorted((left, right))
        space, other = self._spaces[kept], self._spaces[gone]
        self._parent[gone] = kept
        space.pinned = space.pinned or other.pinned
        space.is_classes |= other.is_classes
        space.writers += other.writers
        space.ties += [node, *other.ties]


def parts_of(node: fx.Node) -> Layout:
    """The layout of the channels of a node's value."""
    layout: Layout = node.meta["channels"]
    return layout


def has_channels(node: object) -> bool:
    """Whether a node's value is a tensor with a layout."""
    return isinstance(node, fx.Node) and "channels" in node.meta


@dataclass(frozen=True)
class TracedGraph:
    """A traced module with the channels of every value."""

    module: fx.GraphModule
    spaces: ChannelSpaces
    output: fx.Node
    """The node whose value is the logits."""

    @cached_property
    def numbers(self) -> Mapping[int, int]:
        """The channel group of the representative of every space: numbered in the order in which
        their channels are first produced; `CLASSES`, or `IMAGE_CHANNELS`."""
        images = next(node for node in self.module.graph.nodes if node.op == "placeholder")
        numbers: dict[int, int] = {}
        num_groups = 0
        for root in self.spaces.roots():
            space = self.spaces[root]
            if space.is_classes:
                numbers[root] = CLASSES
            elif space.writers == [images.name]:
                numbers[root] = IMAGE_CHANNELS
            else:
                numbers[root] = num_groups
                num_groups += 1
        return numbers

    def group_parts(self, node: fx.Node) -> tuple[tuple[Pair, ...], tuple[tuple[int, ...], ...]]:
        """The channels of a node's value: (group, repeat) pairs, and for each of them the further
        groups that write it, empty where none has any."""
        parts, unions = [], []
        for part in parts_of(node):
            first, *others = (self.numbers[root] for root in self.spaces.writers(part))
            parts.append((first, part.repeat))
            unions.append(tuple(others))
        return tuple(parts), tuple(unions) if any(unions) else ()


ELEMENTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh,
    nn.Mish, nn.Softplus, nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout,
)  # fmt: skip
"""Modules that treat every element by itself, or every channel alike."""
POOLING_MODULES = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
ELEMENTWISE_FUNCTIONS = frozenset(
    {
        F.relu, F.relu6, F.silu, F.gelu, F.elu, F.leaky_relu, F.hardswish, F.hardsigmoid, F.hardtanh, F.mish, F.softplus, F.dropout,
        F.dropout2d, torch.relu, torch.sigmoid, torch.tanh, F.sigmoid, F.tanh, operator.neg,
    }
)  # fmt: skip
POOLING_FUNCTIONS = frozenset(
    {F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, torch.max_pool2d}
)
ELEMENTWISE_METHODS = frozenset({"relu", "relu_", "sigmoid", "tanh", "contiguous", "clone", "float", "neg"})
PAIRS = frozenset(
    {operator.add, operator.iadd, operator.sub, operator.mul, operator.imul, torch.add, torch.mul, torch.sub}
)
"""Functions of two values that are computed element by element."""
PAIR_METHODS = frozenset({"add", "add_", "mul", "mul_", "sub", "sub_"})
SUMS = frozenset({operator.add, operator.iadd, operator.sub, torch.add, torch.sub})
"""The functions of `PAIRS` for which a missing channel counts as zero: sums and differences."""
SUM_METHODS = frozenset({"add", "add_", "sub", "sub_"})
CHANGING = frozenset({operator.iadd, "add_", "sub_"})
"""Sums that change their first value."""
STREAMS = ("tied", "ids")
"""Channels of the values of an addition: `tied`, the same for both; `ids`, each its own."""
NAMED_ELEMENTWISE = frozenset({"stochastic_depth"})
"""Functions of other packages, by name, that treat every channel alike."""


def trace(
    module: nn.Module,
    image: Float[Tensor, "batch channels height width"],
    concrete_args: Mapping[str, Any] | None = None,
) -> fx.GraphModule:
    """Trace a module into a graph with the shapes of all values, in eval mode.

    Args:
        module: the plain network; not changed.
        image: [B, C, H, W], an example.
        concrete_args: arguments of `forward` that are fixed.

    Raises:
        ConfigError: the module cannot be traced, or does not run on the image; the message has the
            line of the module.
    """
    was_training = module.training
    module.eval()  # also while it runs: norms would note statistics of the example
    try:
        return _with_shapes(module, image, concrete_args)
    finally:
        module.train(was_training)


def _with_shapes(module: nn.Module, image: Tensor, concrete_args: Mapping[str, Any] | None) -> fx.GraphModule:
    """See `trace`; the module is in eval mode."""
    try:
        graph = fx.symbolic_trace(module, concrete_args=dict(concrete_args) if concrete_args else None)
    except Exception as error:
        raise ConfigError(
            f"{type(module).__name__} cannot be traced: {_first_line(error)}{_line_of(error, module)}; "
            "write it without control flow that depends on the values of tensors"
        ) from error
    for node in graph.graph.nodes:
        if node.op == "call_method" and node.target == "view":
            node.target = "reshape"  # which gives the same, and takes images of any memory format
    graph.recompile()
    try:
        with torch.no_grad():
            _CountingShapes(graph).propagate(image)
    except Exception as error:
        raise ConfigError(
            f"{type(module).__name__} does not run on an image of {' x '.join(map(str, image.shape[1:]))}: {_first_line(error)}"
        ) from error
    return graph


class _CountingShapes(ShapeProp):
    """Notes of every value its shape, and how many MAdds the node that makes it needs."""

    def propagate(self, *args: Any) -> Any:
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # the counter does not know the fused operation
        try:
            with FlopCounterMode(display=False, custom_mapping=_FUSED) as self._counter:
                return super().propagate(*args)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)

    def run_node(self, node: fx.Node) -> Any:
        before = self._counter.get_total_flops()
        result = super().run_node(node)
        node.meta["madds"] = (self._counter.get_total_flops() - before) // 2
        return result


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


_FUSED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
"""Operations that torch's counter takes for free."""


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _line_of(error: BaseException, module: nn.Module) -> str:
    """The line of the user's code in which tracing ended, for a message."""
    found = ""
    trace_ = error.__traceback__
    while trace_ is not None:
        name = trace_.tb_frame.f_code.co_filename
        if f"{torch.__name__}/" not in name.replace("\\", "/") and "/dsnet/network/" not in name.replace("\\", "/"):
            found = f" ({name}:{trace_.tb_lineno})"
        trace_ = trace_.tb_next
    return found


def analyse(graph: fx.GraphModule, streams: str = "tied") -> TracedGraph:
    """Give every value of a traced network the layout of its channels.

    Args:
        graph: the network.
        streams: one of `STREAMS`.

    Raises:
        ConfigError: the network has several inputs or outputs, or its output is not [B, classes].
    """
    analysis = _Analysis(graph, has_ids=streams == "ids")
    for node in graph.graph.nodes:
        analysis.visit(node)
    return TracedGraph(graph, analysis.spaces, analysis.output_value())


def is_grouped(module: nn.Module | None) -> bool:
    """Whether a layer is a convolution in groups, which keeps all channels but has a known cost."""
    return (
        isinstance(module, nn.Conv2d)
        and 1 < module.groups < module.in_channels
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def attribute(module: nn.Module, name: str) -> Any:
    """The submodule, parameter or buffer of a module at a dotted name."""
    return operator.attrgetter(name)(module)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's value, for the example image."""
    meta = node.meta.get("tensor_meta")
    return tuple(getattr(meta, "shape", ()))


class _Analysis:
    """The walk of `analyse`."""

    def __init__(self, graph: fx.GraphModule, *, has_ids: bool) -> None:
        self.graph = graph
        self.has_ids = has_ids
        """Whether the values of a sum may have different channels."""
        self.spaces = ChannelSpaces()
        self._position = {node: number for number, node in enumerate(graph.graph.nodes)}
        self._output: fx.Node | None = None
        self._num_images = 0
        self._users: dict[str, fx.Node] = {}
        """The first node that runs each layer with weights."""

    def output_value(self) -> fx.Node:
        """The node whose value is the logits."""
        if self._output is None:
            raise ConfigError("the network has no output")
        return self._output

    def visit(self, node: fx.Node) -> None:
        """Set the layout of one node."""
        layout = self._layout(node)
        if layout is not None:
            node.meta["channels"] = layout

    def _layout(self, node: fx.Node) -> Layout | None:
        match node.op:
            case "placeholder":
                return self._image(node)
            case "output":
                self._end(node)
                return None
            case "get_attr":
                return None
        shape = shape_of(node)
        if len(shape) < 2:
            node.meta[UNKNOWN] = not _is_about_shape(node)
            self._pin_inputs(node)
            return None
        found = None if self._is_used_again(node) else self._known(node)
        if found is not None:
            return found
        self._check_statistics(node)
        node.meta[UNKNOWN] = True
        self._pin_inputs(node)
        return (self.spaces.new(shape[1], node.name, f"{node.name} ({_what(self.graph, node)}) is not understood"),)

    def _is_used_again(self, node: fx.Node) -> bool:
        """Whether a layer with weights runs a second time; then it keeps all channels in both
        places."""
        if node.op != "call_module" or not any(True for _ in self.graph.get_submodule(str(node.target)).parameters()):
            return False
        first = self._users.setdefault(str(node.target), node)
        if first is node:
            return False
        for value in (first, *first.all_input_nodes):
            if has_channels(value):
                self.spaces.pin(parts_of(value), f"{node.target} runs in several places")
        return True

    def _check_statistics(self, node: fx.Node) -> None:
        """Refuse a norm with running statistics that is not understood: sub-networks of different
        widths would share them."""
        if node.op != "call_module":
            return
        for part in self.graph.get_submodule(str(node.target)).modules():
            if isinstance(part, _NormBase) and part.track_running_stats:
                raise ConfigError(
                    f"{node.target} ({type(part).__name__}) keeps running statistics, but it is not a BatchNorm2d or BatchNorm1d of "
                    "[batch, channels, ...] with scale and shift that runs in one place, so that sub-networks of different widths "
                    "would share its statistics; use such a BatchNorm, or a norm without running statistics"
                )

    def _image(self, node: fx.Node) -> Layout:
        self._num_images += 1
        if self._num_images > 1:
            raise ConfigError(
                f"the network has several inputs, such as {node.target}; it must take one batch of images"
            )
        return (self.spaces.new(shape_of(node)[1], node.name, THE_IMAGE),)

    def _end(self, node: fx.Node) -> None:
        (value,) = node.args
        shape = shape_of(value) if isinstance(value, fx.Node) else ()
        if not isinstance(value, fx.Node) or len(shape) != 2:
            raise ConfigError(
                "the network must return one tensor of logits [batch, classes]"
                + (f", but returns {list(shape)}" if shape else "; of several heads return the main one")
            )
        self.spaces.tie_writers(parts_of(value), value.name)
        for part in parts_of(value):
            space = self.spaces[part.space]
            space.is_classes, space.pinned = True, space.pinned or "the classes"
        self._output = value

    def _pin_inputs(self, node: fx.Node) -> None:
        """Keep all channels of the inputs of a node that is not understood."""
        if _is_about_shape(node):
            return
        for value in node.all_input_nodes:
            if has_channels(value):
                self.spaces.pin(parts_of(value), f"{node.name} ({_what(self.graph, node)}) is not understood")

    def _known(self, node: fx.Node) -> Layout | None:
        """The layout of a node that is understood; None otherwise."""
        if node.op == "call_module":
            return self._of_module(node, self.graph.get_submodule(str(node.target)))
        if node.op == "call_function":
            return self._of_function(node)
        return self._of_method(node)

    def _of_module(self, node: fx.Node, module: nn.Module) -> Layout | None:
        source = node.args[0] if node.args else None
        if not has_channels(source):
            return None
        layout = parts_of(source)  # type: ignore[arg-type]
        match module:
            case nn.Conv2d():
                return self._of_convolution(node, module, layout)
            case nn.Linear():
                if len(shape_of(node)) != 2:
                    return None
                return (self.spaces.new(module.out_features, node.name),)
            case nn.BatchNorm2d() | nn.BatchNorm1d():
                is_usual = module.affine and module.track_running_stats and len(shape_of(node)) in (2, 4)
                return layout if is_usual else None
            case nn.Flatten():
                return self._flattened(source, module.start_dim, module.end_dim)  # type: ignore[arg-type]
        if isinstance(module, (*ELEMENTWISE_MODULES, *POOLING_MODULES)) or type(module).__name__ == "StochasticDepth":
            return layout
        return None

    def _of_convolution(self, node: fx.Node, module: nn.Conv2d, layout: Layout) -> Layout | None:
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            return None
        if module.groups == 1:
            return (self.spaces.new(module.out_channels, node.name),)
        if module.groups == module.in_channels:  # depthwise, with a multiplier of its channels
            factor = module.out_channels // module.in_channels
            return tuple(replace(part, repeat=part.repeat * factor) for part in layout)
        return None

    def _of_function(self, node: fx.Node) -> Layout | None:
        target, args = node.target, node.args
        if target in PAIRS:
            return self._of_pair(node)
        if target is torch.cat:
            return self._concatenated(node)
        source = args[0] if args else None
        if not has_channels(source):
            return None
        if target in ELEMENTWISE_FUNCTIONS or target in POOLING_FUNCTIONS:
            return parts_of(source)  # type: ignore[arg-type]
        if getattr(target, "__name__", "") in NAMED_ELEMENTWISE:
            return parts_of(source)  # type: ignore[arg-type]
        if target is torch.flatten:
            return self._flattened(source, *_bounds(node))  # type: ignore[arg-type]
        if target in (torch.mean, torch.amax):
            return self._reduced(node, source)  # type: ignore[arg-type]
        return None

    def _of_method(self, node: fx.Node) -> Layout | None:
        source, name = node.args[0], str(node.target)
        if name in PAIR_METHODS:
            return self._of_pair(node)
        if not has_channels(source):
            return None
        if name in ELEMENTWISE_METHODS:
            return parts_of(source)  # type: ignore[arg-type]
        if name == "flatten":
            return self._flattened(source, *_bounds(node))  # type: ignore[arg-type]
        if name in ("view", "reshape"):
            return self._viewed(node, source)  # type: ignore[arg-type]
        if name in ("mean", "amax"):
            return self._reduced(node, source)  # type: ignore[arg-type]
        return None

    def _of_pair(self, node: fx.Node) -> Layout | None:
        """Element-by-element functions of two values, or of a value and a number."""
        operands = node.args[:2]
        if len(operands) < 2 or set(node.kwargs) - {"alpha"}:
            return None
        values = [value for value in operands if has_channels(value)]
        if any(isinstance(value, fx.Node) and not has_channels(value) for value in operands):
            return None  # a parameter that the module itself owns
        if len(values) == 1:
            return parts_of(values[0])  # type: ignore[arg-type]
        first, second = values
        shapes = shape_of(first), shape_of(second)  # type: ignore[arg-type]
        if len(shapes[0]) != len(shapes[1]):
            return None
        if shapes[0][1] == shapes[1][1]:
            if self._may_differ(node, first, second):
                return self.spaces.unite(parts_of(first), parts_of(second), node.name)  # type: ignore[arg-type]
            self.spaces.tie(parts_of(first), parts_of(second), node.name)  # type: ignore[arg-type]
            return parts_of(first)  # type: ignore[arg-type]
        wide, narrow = (first, second) if shapes[0][1] > shapes[1][1] else (second, first)
        return parts_of(wide) if shape_of(narrow)[1] == 1 else None  # type: ignore[arg-type]

    def _may_differ(self, node: fx.Node, *values: Any) -> bool:
        """Whether the two values of a node may have different channels.

        Those of a product have the same, and so have those of a sum in place whose first value is
        read again, and the image.
        """
        if not self.has_ids or (node.target not in SUMS and node.target not in SUM_METHODS):
            return False
        if node.target in CHANGING and any(self._position[user] > self._position[node] for user in values[0].users):
            return False
        spaces = {space for value in values for part in parts_of(value) for space in part.writers}
        return not any(self.spaces[space].pinned == THE_IMAGE for space in spaces)

    def _concatenated(self, node: fx.Node) -> Layout | None:
        values = node.args[0]
        axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if not isinstance(values, list | tuple) or not all(map(has_channels, values)):
            return None
        if axis not in (1, 1 - len(shape_of(node))):
            return None
        return tuple(part for value in values for part in parts_of(value))  # type: ignore[arg-type]

    def _flattened(self, source: fx.Node, start: int, end: int) -> Layout | None:
        shape = shape_of(source)
        if start not in (1, 1 - len(shape)) or end not in (-1, len(shape) - 1):
            return None
        pixels = math.prod(shape[2:])
        return tuple(replace(part, repeat=part.repeat * pixels) for part in parts_of(source))

    def _viewed(self, node: fx.Node, source: fx.Node) -> Layout | None:
        """`x.view(x.size(0), -1)` and its like, which flatten."""
        sizes = node.args[1:] if len(node.args) != 2 or not isinstance(node.args[1], list | tuple) else node.args[1]
        if (
            not isinstance(sizes, list | tuple)
            or len(sizes) != 2
            or sizes[1] != -1
            or not isinstance(sizes[0], fx.Node)
        ):
            return None
        return self._flattened(source, 1, -1)

    def _reduced(self, node: fx.Node, source: fx.Node) -> Layout | None:
        """A mean or maximum over height and width."""
        axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        if not isinstance(axes, list | tuple) or len(shape_of(source)) != 4:
            return None
        return parts_of(source) if sorted(int(axis) % 4 for axis in axes) == [2, 3] else None


def _bounds(node: fx.Node) -> tuple[int, int]:
    start = node.args[1] if len(node.args) > 1 else node.kwargs.get("start_dim", 0)
    end = node.args[2] if len(node.args) > 2 else node.kwargs.get("end_dim", -1)
    return int(start), int(end)  # type: ignore[arg-type]


def _is_about_shape(node: fx.Node) -> bool:
    """Whether a node only reads the shape of a value."""
    return (node.op == "call_method" and node.target in ("size", "dim")) or node.target is getattr


def _what(graph: fx.GraphModule, node: fx.Node) -> str:
    """The operation of a node, for messages."""
    if node.op == "call_module":
        return type(graph.get_submodule(str(node.target))).__name__
    target: Callable[..., Any] | str = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def pinned_spaces(traced: TracedGraph) -> Iterator[tuple[int, Space]]:
    """The spaces that are never sliced, other than those of the image and of the classes."""
    for root in traced.spaces.roots():
        space = traced.spaces[root]
        if space.pinned and not space.is_classes and space.pinned != THE_IMAGE:
            yield root, space


def upstream(nodes: Sequence[fx.Node], traced: TracedGraph) -> dict[str, frozenset[int]]:
    """For each node the representatives of all spaces on whose widths its value depends."""
    found: dict[str, frozenset[int]] = {}
    for node in nodes:
        above = frozenset[int]().union(*(found[value.name] for value in node.all_input_nodes if value.name in found))
        own = {root for part in node.meta.get("channels", ()) for root in traced.spaces.writers(part)}
        found[node.name] = above | own
    return found
