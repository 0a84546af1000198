"""Channels of a traced network: which are sliced together, and which cannot be sliced.

`analyse` walks the graph of a plain module (`torch.fx`) and gives every value the layout of its
channels: a sequence of parts, each a prefix of one *space* of channels. Operations that add or
multiply two values tie their spaces; a concatenation keeps its parts apart; what is not understood
keeps all channels of its inputs. The spaces that remain are the channel groups of the supernet.

The channels of a value lie in one of its dimensions: in dimension 1 of images and features, in the
last one of tokens and wherever the module permutes them to. A value of which nothing is sliced has
all of its channels along every dimension, so that any operation can read it.

The size of a depthwise kernel can be a space of its own, of which a sub-network uses the pixels in
the centre (`kernel_sizes_of`).

With streams `ids` an addition ties nothing. Its result is the union of the channels that its two
values have, and a part of it has several spaces, its writers.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase

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


class Channels(NamedTuple):
    """The channels of a value."""

    parts: Layout
    dim: int = 1
    """The dimension in which they lie."""


THE_IMAGE = "the channels of the image"
"""Why the channels of the image are never sliced."""
UNKNOWN = "unknown"
"""Key in the `meta` of a node that is not understood: it keeps all channels of its inputs."""
READS = "reads"
"""Key in the `meta` of a node: the `Channels` of its input, as it reads them."""
OWN = "own"
"""Key in the `meta` of a tensor of the module that no layer holds: its `Channels`, where they are
those of a value that it scales or shifts."""
KERNEL = "kernel"
"""Key in the `meta` of a depthwise convolution: the space of the size of its kernel, where it has
several."""
KERNEL_END = ".kernel"
"""End of the name of the space of the size of a kernel, after the name of its node."""
INPUT = ".input"
"""End of the name of a space that a node reads, which no node writes; no node has a dot in its
name."""


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
    sizes: tuple[int, ...] = ()
    """The possible sizes of a kernel in pixels, rising, where the space is one; empty for
    channels."""


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

    def new_kernel(self, sizes: tuple[int, ...], node: str) -> int:
        """A new space for the size of a node's kernel."""
        space = self.new(sizes[-1], f"{node}{KERNEL_END}").space
        self[space].sizes = sizes
        return space

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


def channels_of(node: fx.Node) -> Channels:
    """The channels of a node's value."""
    channels: Channels = node.meta["channels"]
    return channels


def parts_of(node: fx.Node) -> Layout:
    """The layout of the channels of a node's value."""
    return channels_of(node).parts


def channel_dim(node: fx.Node) -> int:
    """The dimension in which the channels of a node's value lie; 1 where it has no layout."""
    return channels_of(node).dim if has_channels(node) else 1


def other_sizes(node: fx.Node, dim: int | None = None) -> Pair:
    """Height and width of a value, or its number of tokens and 1; (1, 1) for a value with further
    or fewer dimensions. `dim` is the dimension of its channels, where it is not its own."""
    shape, dim = shape_of(node), channel_dim(node) if dim is None else dim
    others = [size for number, size in enumerate(shape) if number not in (0, dim)]
    if not 3 <= len(shape) <= 4:
        return 1, 1
    return others[0], math.prod(others[1:])


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

    def groups_of(self, layout: Layout) -> tuple[tuple[Pair, ...], tuple[tuple[int, ...], ...]]:
        """The channels of a layout: (group, repeat) pairs, and for each of them the further groups
        that write it, empty where none has any."""
        parts, unions = [], []
        for part in layout:
            first, *others = (self.numbers[root] for root in self.spaces.writers(part))
            parts.append((first, part.repeat))
            unions.append(tuple(others))
        return tuple(parts), tuple(unions) if any(unions) else ()

    def kernel_group(self, node: fx.Node) -> int | None:
        """The channel group that is the size of a node's kernel; None where it has one size."""
        return self.numbers[node.meta[KERNEL]] if KERNEL in node.meta else None


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
OPERATIONS: Mapping[Callable[..., Any], str] = {
    torch.flatten: "flatten", torch.mean: "mean", torch.amax: "amax", torch.permute: "permute", torch.transpose: "transpose",
    F.layer_norm: "layer_norm",
}  # fmt: skip
"""Functions that need rules of their own, under the names of the methods that do the same."""


def analyse(graph: fx.GraphModule, streams: str = "tied", kernels: tuple[int, ...] = ()) -> TracedGraph:
    """Give every value of a traced network the layout of its channels.

    Args:
        graph: the network.
        streams: one of `STREAMS`.
        kernels: sizes in pixels, rising, to which depthwise kernels can be sliced; empty: to none.

    Raises:
        ConfigError: the network has several inputs or outputs, or its output is not [B, classes].
    """
    analysis = _Analysis(graph, kernels, has_ids=streams == "ids")
    for node in graph.graph.nodes:
        analysis.visit(node)
    analysis.finish()
    return TracedGraph(graph, analysis.spaces, analysis.output_value())


def is_grouped(module: nn.Module | None) -> bool:
    """Whether a layer is a convolution in groups, which keeps all channels but has a known cost."""
    return (
        isinstance(module, nn.Conv2d)
        and 1 < module.groups < module.in_channels
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def is_sliceable_kernel(module: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    """Whether a layer is a depthwise convolution with a square kernel of odd size."""
    if not isinstance(module, nn.Conv2d) or module.groups == 1 or module.groups != module.in_channels:
        return False
    height, width = module.kernel_size
    return height == width and height % 2 == 1


def shrunk_padding(module: nn.Conv2d, size: int) -> Pair:
    """The padding with which the centre of a kernel, `size` pixels high and wide, sees the same
    places as in the whole; below 0 where the whole kernel is padded by less than it would need."""
    assert isinstance(module.padding, tuple)
    height, width = (
        own - dilation * (kernel - size) // 2
        for own, dilation, kernel in zip(module.padding, module.dilation, module.kernel_size, strict=True)
    )
    return height, width


def kernel_sizes_of(module: nn.Conv2d, kernels: Sequence[int]) -> tuple[int, ...]:
    """The sizes that a depthwise kernel can have, rising: those of `kernels` that are smaller than
    its own, as far as its padding is wide enough for them, and its own."""
    own = module.kernel_size[0]
    smaller = (size for size in kernels if size < own and min(shrunk_padding(module, size)) >= 0)
    return (*sorted(smaller), own)


def attribute(module: nn.Module, name: str) -> Any:
    """The submodule, parameter or buffer of a module at a dotted name."""
    return operator.attrgetter(name)(module)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's value, for the example image."""
    meta = node.meta.get("tensor_meta")
    return tuple(getattr(meta, "shape", ()))


class _Analysis:
    """The walk of `analyse`."""

    def __init__(self, graph: fx.GraphModule, kernels: tuple[int, ...], *, has_ids: bool) -> None:
        self.graph = graph
        self.kernels = kernels
        """The sizes to which depthwise kernels can be sliced."""
        self.has_ids = has_ids
        """Whether the values of a sum may have different channels."""
        self.spaces = ChannelSpaces()
        self._position = {node: number for number, node in enumerate(graph.graph.nodes)}
        self._output: fx.Node | None = None
        self._num_images = 0
        self._users: dict[str, fx.Node] = {}
        """The first node that runs each layer with weights."""
        self._own: dict[str, Channels] = {}
        """The channels of the module's own tensors, by name."""
        self._along: set[tuple[str, fx.Node]] = set()
        """The module's own tensors with the nodes that use them along their channels."""

    def output_value(self) -> fx.Node:
        """The node whose value is the logits."""
        if self._output is None:
            raise ConfigError("the network has no output")
        return self._output

    def visit(self, node: fx.Node) -> None:
        """Set the channels of one node."""
        channels = self._channels(node)
        if channels is not None:
            node.meta["channels"] = channels

    def finish(self) -> None:
        """Set the channels of the module's own tensors, and keep all of those that are also used in
        another way."""
        for tensor in self.graph.graph.nodes:
            if tensor.op != "get_attr" or str(tensor.target) not in self._own:
                continue
            tensor.meta[OWN] = self._own[str(tensor.target)]
            for user in tensor.users:
                if (str(tensor.target), user) not in self._along and not _is_about_shape(user):
                    reason = f"{user.name} ({_what(self.graph, user)}) needs all of {tensor.target}"
                    self.spaces.pin(tensor.meta[OWN].parts, reason)

    def _channels(self, node: fx.Node) -> Channels | None:
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
        if node.op == "call_module" and is_grouped(self.graph.get_submodule(str(node.target))):
            self._read(node, node.all_input_nodes[0], 1)
        dim = _likely_dim(node)
        reason = f"{node.name} ({_what(self.graph, node)}) is not understood"
        return Channels((self.spaces.new(shape[dim], node.name, reason),), dim)

    def _is_used_again(self, node: fx.Node) -> bool:
        """Whether a layer with weights runs a second time; then it keeps all channels in both
        places."""
        if node.op != "call_module" or not any(True for _ in self.graph.get_submodule(str(node.target)).parameters()):
            return False
        first = self._users.setdefault(str(node.target), node)
        if first is node:
            return False
        reason = f"{node.target} runs in several places"
        for value in (first, *first.all_input_nodes):
            if has_channels(value):
                self.spaces.pin(parts_of(value), reason)
        if KERNEL in first.meta:
            self.spaces[first.meta[KERNEL]].pinned = reason
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

    def _image(self, node: fx.Node) -> Channels:
        self._num_images += 1
        if self._num_images > 1:
            raise ConfigError(
                f"the network has several inputs, such as {node.target}; it must take one batch of images"
            )
        return Channels((self.spaces.new(shape_of(node)[1], node.name, THE_IMAGE),))

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

    def _read(self, node: fx.Node, source: object, dim: int) -> Channels | None:
        """The channels of a value along a dimension, in which a node reads them; None where they
        lie in another one and can be sliced.

        A value of which nothing is sliced has all of its channels along every dimension.
        """
        if not isinstance(source, fx.Node) or not has_channels(source):
            return None
        parts, own = channels_of(source)
        dim %= len(shape_of(source))
        if own != dim:
            reasons = [self.spaces[space].pinned for part in parts for space in part.writers]
            if not all(reasons):
                return None
            parts = (self.spaces.new(shape_of(source)[dim], f"{node.name}{INPUT}", reasons[0]),)
        node.meta[READS] = Channels(parts, dim)
        return Channels(parts, dim)

    def _known(self, node: fx.Node) -> Channels | None:
        """The channels of a node that is understood; None otherwise."""
        if node.op == "call_module":
            return self._of_module(node, self.graph.get_submodule(str(node.target)))
        if node.target in PAIRS or (node.op == "call_method" and node.target in PAIR_METHODS):
            return self._of_pair(node)
        if node.target is torch.cat:
            return self._concatenated(node)
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or not has_channels(source):
            return None
        if _is_elementwise(node):
            return channels_of(source)
        if node.target in POOLING_FUNCTIONS:
            return self._read(node, source, 1)
        name = str(node.target) if node.op == "call_method" else OPERATIONS.get(node.target, "")  # type: ignore[arg-type]
        return self._of_operation(node, name, source)

    def _of_module(self, node: fx.Node, module: nn.Module) -> Channels | None:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or not has_channels(source):
            return None
        match module:
            case nn.Conv2d():
                return self._of_convolution(node, module, source)
            case nn.Linear():
                read = self._read(node, source, -1)
                return read and Channels((self.spaces.new(module.out_features, node.name),), read.dim)
            case nn.BatchNorm2d() | nn.BatchNorm1d():
                is_usual = module.affine and module.track_running_stats and len(shape_of(node)) in (2, 4)
                return self._read(node, source, 1) if is_usual else None
            case nn.LayerNorm():
                return self._read(node, source, -1) if len(module.normalized_shape) == 1 else None
            case nn.Flatten():
                return _flattened(source, module.start_dim, module.end_dim)
        if isinstance(module, POOLING_MODULES):
            return self._read(node, source, 1)
        is_elementwise = isinstance(module, ELEMENTWISE_MODULES) or type(module).__name__ == "StochasticDepth"
        return channels_of(source) if is_elementwise else None

    def _of_convolution(self, node: fx.Node, module: nn.Conv2d, source: fx.Node) -> Channels | None:
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            return None
        if module.groups not in (1, module.in_channels):
            return None
        read = self._read(node, source, 1)
        if read is None:
            return None
        if module.groups == 1:
            return Channels((self.spaces.new(module.out_channels, node.name),))
        if is_sliceable_kernel(module) and len(sizes := kernel_sizes_of(module, self.kernels)) > 1:
            node.meta[KERNEL] = self.spaces.new_kernel(sizes, node.name)
        factor = module.out_channels // module.in_channels  # depthwise, with a multiplier of its channels
        return Channels(tuple(replace(part, repeat=part.repeat * factor) for part in read.parts))

    def _of_operation(self, node: fx.Node, name: str, source: fx.Node) -> Channels | None:
        """The channels of a function or method of one value, by the method's name."""
        match name:
            case "flatten":
                return _flattened(source, *_bounds(node))
            case "view" | "reshape":
                return _flattened(source, 1, -1) if _flattens(node) else None
            case "mean" | "amax":
                return self._reduced(node, source)
            case "permute" | "transpose":
                return _permuted(node, source)
            case "layer_norm":
                return self._normalized(node, source)
        return None

    def _of_pair(self, node: fx.Node) -> Channels | None:
        """Element-by-element functions of two values, or of a value and a number or a tensor of the
        module."""
        operands = node.args[:2]
        if len(operands) < 2 or set(node.kwargs) - {"alpha"}:
            return None
        values = [value for value in operands if isinstance(value, fx.Node) and has_channels(value)]
        tensors = [value for value in operands if isinstance(value, fx.Node) and not has_channels(value)]
        if len(values) == 1:
            return self._with_own(node, values[0], *tensors)
        if len(values) != 2 or len(shape_of(values[0])) != len(shape_of(values[1])):
            return None
        dims = [dim for dim in map(channel_dim, values) if all(self._can_read(value, dim) for value in values)]
        return self._of_values(node, dims[0], *values) if dims else None

    def _can_read(self, value: fx.Node, dim: int) -> bool:
        """Whether the channels of a value lie in a dimension, or nothing of it is sliced."""
        return channel_dim(value) == dim or all(
            self.spaces[space].pinned for part in parts_of(value) for space in part.writers
        )

    def _of_values(self, node: fx.Node, dim: int, first: fx.Node, second: fx.Node) -> Channels | None:
        """An element-by-element function of two values whose channels lie in a dimension."""
        left, right = self._read(node, first, dim), self._read(node, second, dim)
        assert left is not None
        assert right is not None
        sizes = shape_of(first)[dim], shape_of(second)[dim]
        if sizes[0] != sizes[1]:
            wide, narrow = (left, sizes[1]) if sizes[0] > sizes[1] else (right, sizes[0])
            return wide if narrow == 1 else None
        if self._may_differ(node, first, second):
            return Channels(self.spaces.unite(left.parts, right.parts, node.name), dim)
        self.spaces.tie(left.parts, right.parts, node.name)
        return left

    def _with_own(self, node: fx.Node, value: fx.Node, *tensors: fx.Node) -> Channels | None:
        """An element-by-element function of a value and a number, or a tensor that the module
        itself holds and that is repeated along other dimensions."""
        channels = channels_of(value)
        for tensor in tensors:
            if tensor.op != "get_attr" or shape_of(node) != shape_of(value):
                return None
            shape = shape_of(tensor)
            dim = channels.dim - (len(shape_of(value)) - len(shape))
            if dim >= 0 and shape[dim] > 1:
                self._tie_own(node, tensor, Channels(channels.parts, dim))
        return channels

    def _tie_own(self, node: fx.Node, tensor: fx.Node, channels: Channels) -> None:
        """Slice a tensor of the module together with the channels of a value."""
        name = str(tensor.target)
        known = self._own.setdefault(name, channels)
        if known.dim != channels.dim:
            self.spaces.pin(channels.parts, f"{node.name} ({_what(self.graph, node)}) needs all of {name}")
            return
        if known.parts != channels.parts:
            self.spaces.tie(known.parts, channels.parts, node.name)
        self._along.add((name, node))

    def _normalized(self, node: fx.Node, source: fx.Node) -> Channels | None:
        """`F.layer_norm` over the channels, with scale and shift that the module itself holds."""
        sizes, weight, bias, _ = norm_arguments(node)
        given = [tensor for tensor in (weight, bias) if tensor is not None]
        if not isinstance(sizes, list | tuple) or len(sizes) != 1:
            return None
        if not all(isinstance(tensor, fx.Node) and tensor.op == "get_attr" for tensor in given):
            return None
        read = self._read(node, source, -1)
        if read is not None:
            for tensor in given:
                self._tie_own(node, tensor, Channels(read.parts, 0))
        return read

    def _may_differ(self, node: fx.Node, *values: fx.Node) -> bool:
        """Whether the two values of a node may have different channels.

        Those of a product have the same, and so have those of a sum in place whose first value is
        read again, the image, and values whose channels lie in different dimensions.
        """
        if not self.has_ids or (node.target not in SUMS and node.target not in SUM_METHODS):
            return False
        if node.target in CHANGING and any(self._position[user] > self._position[node] for user in values[0].users):
            return False
        spaces = {space for value in values for part in parts_of(value) for space in part.writers}
        has_image = any(self.spaces[space].pinned == THE_IMAGE for space in spaces)
        return not has_image and len(set(map(channel_dim, values))) == 1

    def _concatenated(self, node: fx.Node) -> Channels | None:
        values = node.args[0]
        axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if not isinstance(values, list | tuple) or not all(map(has_channels, values)) or not isinstance(axis, int):
            return None
        axis %= len(shape_of(node))
        if axis not in map(channel_dim, values) or not all(self._can_read(value, axis) for value in values):  # type: ignore[arg-type]
            return None
        read = [self._read(node, value, axis) for value in values]
        return Channels(tuple(part for each in read if each is not None for part in each.parts), axis)

    def _reduced(self, node: fx.Node, source: fx.Node) -> Channels | None:
        """A mean or maximum over all dimensions but those of the batch and of the channels."""
        axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        rank = len(shape_of(source))
        given = [axes] if isinstance(axes, int) else axes
        if not isinstance(given, list | tuple) or not 3 <= rank <= 4:
            return None
        kept = set(range(1, rank)) - {int(axis) % rank for axis in given}
        if len(kept) != 1 or len(given) != rank - 2:
            return None
        read = self._read(node, source, kept.pop())
        return read and Channels(read.parts, read.dim if len(shape_of(node)) == rank else 1)


def _is_elementwise(node: fx.Node) -> bool:
    """Whether a function or method treats every element by itself, or every channel alike."""
    if node.op == "call_method":
        return str(node.target) in ELEMENTWISE_METHODS
    name = getattr(node.target, "__name__", "")
    return node.target in ELEMENTWISE_FUNCTIONS or name in NAMED_ELEMENTWISE


def _likely_dim(node: fx.Node) -> int:
    """The dimension that is taken for that of the channels of a value that is not understood: that
    of an input as far as its size is the same, otherwise the last one of tokens, or 1."""
    shape = shape_of(node)
    for value in filter(has_channels, node.all_input_nodes):
        dim = channel_dim(value)
        if dim < len(shape) and shape[dim] == shape_of(value)[dim]:
            return dim
    return 2 if len(shape) == 3 else 1


def _flattened(source: fx.Node, start: int, end: int) -> Channels | None:
    """Dimensions joined into one, in which the channels are the outermost, or not at all."""
    parts, dim = channels_of(source)
    shape = shape_of(source)
    start, end = start % len(shape), end % len(shape)
    if not 1 <= start <= end or start < dim <= end:
        return None
    if start == dim:
        pixels = math.prod(shape[dim + 1 : end + 1])
        return Channels(tuple(replace(part, repeat=part.repeat * pixels) for part in parts), dim)
    return Channels(parts, dim if dim < start else dim - (end - start))


def _flattens(node: fx.Node) -> bool:
    """Whether a view is `x.view(x.size(0), -1)` or its like."""
    sizes = node.args[1:] if len(node.args) != 2 or not isinstance(node.args[1], list | tuple) else node.args[1]
    is_flat = isinstance(sizes, list | tuple) and len(sizes) == 2 and sizes[1] == -1
    return bool(is_flat and isinstance(sizes[0], fx.Node))


def _permuted(node: fx.Node, source: fx.Node) -> Channels | None:
    """Dimensions of tokens or features in another order, in which that of the batch stays the
    first; pieces of features, with more dimensions, are views of which nothing is sliced."""
    given = node.args[1:] or tuple(node.kwargs.values())
    dims: Sequence[Any] = given[0] if len(given) == 1 and isinstance(given[0], list | tuple) else given
    rank = len(shape_of(source))
    if not 3 <= rank <= 4 or not all(isinstance(dim, int) for dim in dims):
        return None
    order = [dim % rank for dim in dims]
    if getattr(node.target, "__name__", node.target) == "transpose":
        first, second = order
        order = [{first: second, second: first}.get(dim, dim) for dim in range(rank)]
    parts, dim = channels_of(source)
    return Channels(parts, order.index(dim)) if order[0] == 0 else None


def norm_arguments(node: fx.Node) -> tuple[Any, Any, Any, Any]:
    """The normalised shape, scale, shift and epsilon of a call of `F.layer_norm`."""
    given = {"weight": None, "bias": None, "eps": 1e-5, **node.kwargs}
    given |= dict(zip(("normalized_shape", "weight", "bias", "eps"), node.args[1:], strict=False))
    return given["normalized_shape"], given["weight"], given["bias"], given["eps"]


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
    """For each node the representatives of all spaces on whose widths its value depends, sizes of
    kernels included."""
    found: dict[str, frozenset[int]] = {}
    for node in nodes:
        above = frozenset[int]().union(*(found[value.name] for value in node.all_input_nodes if value.name in found))
        parts = parts_of(node) if has_channels(node) else ()
        own = {root for part in parts for root in traced.spaces.writers(part)}
        own |= {traced.spaces.root(node.meta[KERNEL])} if KERNEL in node.meta else set()
        found[node.name] = above | own
    return found
