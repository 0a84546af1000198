"""Supernet of a traced plain module: `torch.fx` code in which sliced layers take the widths.

The graph of the module stays as it is. Convolutions, linear layers and norms are replaced by layers
that slice their weights along *axes*: sequences of channel groups, each used as a prefix. Tensors
that the module itself holds are sliced where they are used. All parameters keep their names, so
that a state dict of the module loads into the supernet.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, fx, nn

from dsnet.image_size import ImageSize
from dsnet.network.axes import Axes, Axis, Widths, take
from dsnet.network.channels import (
    OWN,
    SUM_METHODS,
    SUMS,
    UNKNOWN,
    TracedGraph,
    analyse,
    attribute,
    channel_dim,
    has_channels,
    norm_arguments,
    parts_of,
    shape_of,
    shrunk_padding,
)
from dsnet.network.cut_points import part_of
from dsnet.network.layers import BatchNormBank, SlicedGroupNorm, norm_axes
from dsnet.network.plain import OwnOptions, example_image, make_plain, own_options
from dsnet.network.slicing import corner
from dsnet.network.supernet import ChannelPlaces, PlainPooled, Supernet, TrunkOutput
from dsnet.network.tracing import trace
from dsnet.space.entry_gate import own_gates
from dsnet.space.spec import CLASSES, ChannelGroup, Op, Subnet, SupernetSpec
from dsnet.space.subnet_set import SubnetSet


class _WeightedLayer(nn.Module):
    """A layer of a traced module with a weight, and perhaps a bias, sliced along its channels."""

    def __init__(self, plain: nn.Conv2d | nn.Linear, num_in: Axis, num_out: Axis) -> None:
        super().__init__()
        self.num_in, self.num_out = num_in, num_out
        self.is_depthwise = isinstance(plain, nn.Conv2d) and plain.groups > 1
        columns = 1 if self.is_depthwise else num_in.max_size
        self.weight = nn.Parameter(plain.weight.detach()[: num_out.max_size, :columns].clone())
        self.bias = None if plain.bias is None else nn.Parameter(plain.bias.detach()[: num_out.max_size].clone())

    def axes(self) -> Mapping[str, Axes]:
        """The axes of the parameters."""
        weight = (self.num_out, None if self.is_depthwise else self.num_in)
        return {"weight": weight} if self.bias is None else {"weight": weight, "bias": (self.num_out,)}

    def load_plain(self, plain: nn.Module) -> None:
        """Copy the weights of the layer that this one was made of."""
        _copy_corners(self, plain)

    def _slices(self, widths: Widths) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias that a sub-network uses."""
        axes = self.axes()
        bias = None if self.bias is None else take(self.bias, axes["bias"], widths)
        return take(self.weight, axes["weight"], widths), bias

    def _set_slices(self, plain: nn.Conv2d | nn.Linear, widths: Widths) -> None:
        """Give a plain layer copies of the weight and the bias that a sub-network uses."""
        weight, bias = self._slices(widths)
        plain.weight = nn.Parameter(weight.detach().clone())
        if bias is not None:
            plain.bias = nn.Parameter(bias.detach().clone())


class TracedConv2d(_WeightedLayer):
    """A convolution of a traced module, dense or depthwise, sliced along its channels, and with a
    kernel of several sizes along its height and width."""

    def __init__(self, plain: nn.Conv2d, num_in: Axis, num_out: Axis, kernel: Axis | None = None) -> None:
        """Copy the weights of a plain layer.

        Args:
            plain: the layer.
            num_in: its input channels.
            num_out: its output channels.
            kernel: the height and width of its kernel, where that has several sizes.
        """
        super().__init__(plain, num_in, num_out)
        self.kernel = kernel
        self._steps: dict[str, Any] = {"stride": plain.stride, "dilation": plain.dilation}
        own = plain.kernel_size[0]
        self._padding: dict[int, Any] = {own: plain.padding}
        """The padding for each height that the kernel can have."""
        if kernel is not None:
            self._padding |= {size: shrunk_padding(plain, size) for size in range(1, own, 2)}
            self.weight = nn.Parameter(_centre(self.weight.detach(), kernel.max_size).clone())

    def axes(self) -> Mapping[str, Axes]:
        """The axes of the parameters."""
        axes = dict(super().axes())
        if self.kernel is not None:
            axes["weight"] = (*axes["weight"], self.kernel, self.kernel)
        return axes

    def load_plain(self, plain: nn.Module) -> None:
        """Copy the weights of the layer that this one was made of."""
        tensors = plain.state_dict()
        if self.kernel is not None:
            tensors["weight"] = _centre(tensors["weight"], self.kernel.max_size)
        _copy_corners_of(self, tensors)

    def _geometry(self, weight: Tensor) -> dict[str, Any]:
        """Stride, dilation and padding for a slice of the weight."""
        return {**self._steps, "padding": self._padding[weight.shape[2]]}

    def forward(
        self, x: Float[Tensor, "batch channels height width"], widths: Widths
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        """[B, c, H, W] -> [B, c', H', W']."""
        groups = x.shape[1] if self.is_depthwise else 1
        weight, bias = self._slices(widths)
        return F.conv2d(x, weight, bias, **self._geometry(weight), groups=groups)

    def cut(self, widths: Widths) -> nn.Conv2d:
        """The slice as a plain convolution."""
        num_in = self.num_in.size(widths)
        weight, _ = self._slices(widths)
        plain = nn.Conv2d(
            num_in,
            self.num_out.size(widths),
            (weight.shape[2], weight.shape[3]),
            groups=num_in if self.is_depthwise else 1,
            bias=self.bias is not None,
            **self._geometry(weight),
        )
        self._set_slices(plain, widths)
        return plain


class TracedLinear(_WeightedLayer):
    """A linear layer of a traced module, sliced along both dimensions."""

    def forward(self, x: Float[Tensor, "batch ..."], widths: Widths) -> Float[Tensor, "batch ..."]:
        """[B, ..., c] -> [B, ..., c']."""
        return F.linear(x, *self._slices(widths))

    def cut(self, widths: Widths) -> nn.Linear:
        """The slice as a plain linear layer."""
        plain = nn.Linear(self.num_in.size(widths), self.num_out.size(widths), bias=self.bias is not None)
        self._set_slices(plain, widths)
        return plain


class TracedNorm(BatchNormBank):
    """A BatchNorm of a traced module, with statistics per widths of all groups upstream of it."""

    def __init__(
        self, plain: nn.BatchNorm1d | nn.BatchNorm2d, channels: Axis, depends: tuple[int, ...], subnets: SubnetSet
    ) -> None:
        self.channels = channels
        self.depends = depends
        norm = subnets.spec.norm
        super().__init__(
            channels.max_size,
            {self.key_of(subnet.widths) for subnet in subnets.all},
            private_affine=norm == "private_affine",
            tracks=norm != "recalibrate",
            eps=plain.eps,
            size_of=lambda key: channels.size(self.widths_of(key)),
        )

    def axes(self) -> Mapping[str, Axes]:
        """The axes of the affine pairs and of all statistics."""
        return norm_axes(self, self.channels)

    @torch.no_grad()
    def load_plain(self, plain: nn.Module) -> None:
        """Copy the affine pair, and for every key the statistics of the channels that it keeps.

        Only the statistics of the widest are exact: those of a narrower input differ, and are
        estimated anew by training or recalibration.
        """
        self.load_affine(plain)
        tensors = plain.state_dict()
        for key in self.keys():
            mean, var, updates = self.statistics(key)
            self._copy_slice(mean, tensors["running_mean"], key)
            self._copy_slice(var, tensors["running_var"], key)
            updates.fill_(1)

    @torch.no_grad()
    def load_affine(self, plain: nn.Module) -> None:
        """Copy scale and shift of the layer that this one was made of."""
        if not self.private_affine:
            _copy_corners(self, plain)
            return
        tensors = plain.state_dict()
        for key in self.keys():
            weight, bias = self.affine(key)
            self._copy_slice(weight, tensors["weight"], key)
            self._copy_slice(bias, tensors["bias"], key)

    def _copy_slice(self, target: Tensor, whole: Tensor, key: tuple[int, ...]) -> None:
        target.copy_(take(whole, (self.channels,), self.widths_of(key)))

    def widths_of(self, key: tuple[int, ...]) -> Mapping[int, int]:
        """The widths of the groups upstream, by their numbers."""
        return dict(zip(self.depends, key, strict=True))

    def key_of(self, widths: Widths) -> tuple[int, ...]:
        """The widths of the groups upstream."""
        return tuple(widths[group] for group in self.depends)

    def affine(self, prefix: tuple[int, ...]) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]:
        """Scale and shift of one key."""
        if self.private_affine:
            return super().affine(prefix)
        widths = self.widths_of(prefix)
        return take(self.weight, (self.channels,), widths), take(self.bias, (self.channels,), widths)

    def forward(self, x: Float[Tensor, "batch ..."], widths: Widths) -> Float[Tensor, "batch ..."]:
        """Normalise [B, c, H, W] or [B, c] at a sub-network's widths."""
        return super().forward(x, self.key_of(widths))


class TracedGroupNorm(SlicedGroupNorm):
    """GroupNorm in place of a BatchNorm of a traced module."""

    def __init__(self, channels: Axis) -> None:
        super().__init__(channels.max_size)
        self.channels = channels

    def axes(self) -> Mapping[str, Axes]:
        """The axes of the affine pair."""
        return {"weight": (self.channels,), "bias": (self.channels,)}

    def load_plain(self, plain: nn.Module) -> None:
        """Copy the affine pair; a GroupNorm keeps no statistics."""
        _copy_corners(self, plain)

    def affine(self, prefix: tuple[int, ...]) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]:
        """Scale and shift of the channels that a sub-network of these widths uses."""
        return take(self.weight, (self.channels,), prefix), take(self.bias, (self.channels,), prefix)


class TracedLayerNorm(nn.Module):
    """A LayerNorm of a traced module over its channels: over those that a sub-network has."""

    weight: Float[nn.Parameter, " channels"] | None
    bias: Float[nn.Parameter, " channels"] | None

    def __init__(self, plain: nn.LayerNorm, channels: Axis) -> None:
        super().__init__()
        self.channels = channels
        self.eps = plain.eps
        for name, tensor in (("weight", plain.weight), ("bias", plain.bias)):
            own = None if tensor is None else nn.Parameter(tensor.detach()[: channels.max_size].clone())
            self.register_parameter(name, own)

    def axes(self) -> Mapping[str, Axes]:
        """The axes of scale and shift, where it has them."""
        return {name: (self.channels,) for name, _ in self.named_parameters()}

    def load_plain(self, plain: nn.Module) -> None:
        """Copy scale and shift of the layer that this one was made of."""
        _copy_corners(self, plain)

    def forward(self, x: Float[Tensor, "batch ..."], widths: Widths) -> Float[Tensor, "batch ..."]:
        """Normalise [B, ..., c] over its last dimension."""
        weight, bias = self._slices(widths)
        return layer_norm(x, weight, bias, self.eps)

    def cut(self, widths: Widths) -> nn.LayerNorm:
        """The slice as a plain LayerNorm."""
        weight, bias = self._slices(widths)
        plain = nn.LayerNorm(self.channels.size(widths), self.eps, weight is not None, bias is not None)
        for name, value in (("weight", weight), ("bias", bias)):
            if value is not None:
                plain.register_parameter(name, nn.Parameter(value.detach().clone()))
        return plain

    def _slices(self, widths: Widths) -> tuple[Tensor | None, Tensor | None]:
        """The scale and the shift that a sub-network uses."""
        weight = None if self.weight is None else take(self.weight, (self.channels,), widths)
        return weight, None if self.bias is None else take(self.bias, (self.channels,), widths)


def layer_norm(
    x: Float[Tensor, "batch ..."],
    weight: Float[Tensor, " channels"] | None,
    bias: Float[Tensor, " channels"] | None,
    eps: float,
) -> Float[Tensor, "batch ..."]:
    """Normalise [B, ..., c] over its last dimension, whatever its size, then times `weight` plus
    `bias` where given."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _copied(value: Tensor, source: Tensor) -> Tensor:
    """A copy of a slice of `source`, which is a parameter where `source` is one."""
    value = value.detach().clone()
    return nn.Parameter(value, source.requires_grad) if isinstance(source, nn.Parameter) else value


def _centre(weight: Float[Tensor, "out in_ height width"], size: int) -> Float[Tensor, "out in_ size size"]:
    """The pixels in the centre of a square kernel."""
    start = (weight.shape[2] - size) // 2
    return weight[:, :, start : start + size, start : start + size]


def _copy_corners(layer: nn.Module, plain: nn.Module) -> None:
    """Copy the parameters of a plain layer, as far as the sliced layer has them."""
    _copy_corners_of(layer, plain.state_dict())


def _copy_corners_of(layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors by their names, as far as the sliced layer has them."""
    for name, parameter in layer.named_parameters():
        parameter.copy_(corner(tensors[name], *parameter.shape[: min(2, parameter.ndim)]))


Sliced = TracedConv2d | TracedLinear | TracedNorm | TracedGroupNorm | TracedLayerNorm


class TracedSum(nn.Module):
    """The sum of two values that each have their own channels of a stream.

    The result has every channel that one of them has, and a missing channel is zero: the
    zero-padding match (docs/methods.md, section 8).
    """

    def __init__(
        self,
        values: tuple[Axis, Axis],
        whole: Axis,
        groups: tuple[ChannelGroup, ...],
        factor: float,
        behind: int,
    ) -> None:
        """Prepare the sum.

        Args:
            values: the channels of the two values.
            whole: the channels of the result.
            groups: all channel groups.
            factor: factor of the second value.
            behind: number of dimensions behind the channels.
        """
        super().__init__()
        self.values = values
        self.whole = whole
        self.groups = groups
        self.factor = factor
        self.behind = behind
        self._plain: dict[tuple[int, ...], PlainSum] = {}

    def forward(
        self, x: Float[Tensor, "batch ..."], y: Float[Tensor, "batch ..."], widths: Widths
    ) -> Float[Tensor, "batch ..."]:
        """Add two values [B, c, ...] and [B, c', ...] of a sub-network."""
        key = tuple(widths[group] for part in range(len(self.whole.parts)) for group in self.whole.writers(part))
        plain = self._plain.get(key)
        if plain is None or plain.device not in (None, x.device):
            plain = self._plain[key] = self.cut(widths).to(x.device)
        return plain(x, y)

    def cut(self, widths: Widths) -> PlainSum:
        """The sum of one sub-network as a plain module."""
        place = {channel: number for number, channel in enumerate(self._channels(self.whole, widths))}
        places = ([place[channel] for channel in self._channels(value, widths)] for value in self.values)
        return PlainSum([*map(torch.tensor, places)], len(place), self.factor, self.behind)

    def _channels(self, axis: Axis, widths: Widths) -> list[tuple[int, int, int]]:
        """Each channel of a value, in the order of the value: its part, its number in the stream,
        and which of its repeats it is."""
        found = []
        for number, (group, repeat, whole) in enumerate(axis.parts):
            stream = axis.stream_of(number)
            if stream is not None:
                channels: Sequence[int] = stream.channels(widths)
            else:
                channels = range(whole) if group < 0 else self.groups[group].channels(widths[group])
            found += [(number, channel, each) for channel in channels for each in range(repeat)]
        return found


class PlainSum(nn.Module):
    """The sum of two values whose channels lie at given places of the result."""

    first: Int64[Tensor, " channels"] | None
    second: Int64[Tensor, " channels"] | None
    """For each channel of the result its place in a value; None where the value has the first
    ones."""

    def __init__(self, places: Sequence[Int64[Tensor, " _channels"]], size: int, factor: float, behind: int) -> None:
        super().__init__()
        self.factor = factor
        self.behind = behind
        self.pads: list[tuple[int, ...] | None] = []
        """For each value: how zeros are added at its end, None where it has all channels."""
        for name, own in zip(("first", "second"), places, strict=True):
            is_prefix = torch.equal(own, torch.arange(len(own)))
            source = torch.full((size,), len(own))  # a channel that it lacks is the zero at its end
            source[own] = torch.arange(len(own))
            self.register_buffer(name, None if is_prefix else source, persistent=False)
            missing = size - len(own) if is_prefix else int(len(own) < size)
            self.pads.append((*(0, 0) * behind, 0, missing) if missing else None)

    @property
    def device(self) -> torch.device | None:
        """The device of its buffers; None where it has none."""
        return next((buffer.device for buffer in self.buffers()), None)

    def forward(self, x: Float[Tensor, "batch ..."], y: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """Add two values [B, c, ...] and [B, c', ...]."""
        x, y = self._placed(x, 0), self._placed(y, 1)
        return x + y if self.factor == 1 else x + self.factor * y

    def _placed(self, value: Tensor, number: int) -> Tensor:
        pad, source = self.pads[number], self.second if number else self.first
        if pad is not None:
            value = F.pad(value, pad)
        return value if source is None else value.index_select(-1 - self.behind, source)


class _Cut(NamedTuple):
    """A gate inside the network."""

    channels: Axis
    """The channels of the features there."""
    hidden: int
    """Length of the hidden vector."""

    @classmethod
    def of(cls, name: str, spec: SupernetSpec) -> _Cut:
        evidence = next(op for op in spec.ops if op.name == evidence_name(name))
        channels = Axis.read_by(evidence, spec)
        lengths = (gate.hidden for gate in spec.gates if gate.name == name)
        return cls(channels, next(lengths, channels.max_size))


def evidence_name(cut: str) -> str:
    """The name of the operation that makes the evidence of a gate; no node has a dot in its
    name."""
    return f"{cut}.gate"


class _Part(NamedTuple):
    """A part of the sliced graph between two cuts."""

    module: fx.GraphModule
    """(images or features, widths, tensors) -> features or logits; its layers are those of the
    body."""
    tensors: Sequence[str]
    """Names of the body's tensors that it takes, those that no layer holds."""


UNION = "union_"
"""Beginning of the names of the modules that add values with different channels."""
BODY = "body."
"""Beginning of the names of a traced supernet's tensors; the rest is the plain module's name."""


class TracedSupernet(Supernet):
    """A plain module whose convolutions, linear layers and norms are sliced.

    `spec.layout` names the module: `model` is a name for `dsnet.network.plain.make_plain`, and
    `options` are the network's own options where they differ from their defaults. The family's own
    gates have the names of the nodes at which the graph is cut.
    """

    def __init__(self, spec: SupernetSpec, subnets: SubnetSet, generator: torch.Generator | None = None) -> None:
        super().__init__(spec, subnets)
        seed = 0 if generator is None else generator.initial_seed()
        model, streams = spec.layout["model"], spec.layout.get("streams", "tied")
        options = own_options(spec)
        plain = make_plain(model, spec.num_classes, spec.in_channels, seed, options)
        kernels = tuple(spec.layout.get("kernels", ()))
        traced = traced_graph(model, spec.num_classes, spec.in_channels, spec.image_size, streams, options, kernels)
        self._own = own_axes(traced, spec)
        self.body = sliced_graph(traced, plain, spec, subnets)
        self._cuts = tuple(_Cut.of(name, spec) for name in own_gates(spec))
        self._parts = _parts_of(self.body, own_gates(spec))  # not registered: the body holds all tensors
        for name, norm in self.body.named_modules():
            if isinstance(norm, TracedNorm):
                given = plain.get_submodule(name)
                is_trained = bool(given.get_buffer("num_batches_tracked"))  # the user's function loads weights
                norm.load_plain(given) if is_trained else norm.load_affine(given)

    @torch.no_grad()
    def load_plain(self, plain: nn.Module) -> None:
        """Copy the weights of the plain module, which has the shape of the one that was traced.

        Raises:
            ValueError: channels were sorted since the network was laid out.
        """
        if any(group.ids for group in self.spec.groups):
            raise ValueError("the channels of this network have another order than those of the plain module")
        tensors = plain.state_dict()
        for name, layer in self.body.named_modules():
            if isinstance(layer, Sliced):
                layer.load_plain(plain.get_submodule(name))
        sliced = {name for name, layer in self.body.named_modules() if isinstance(layer, Sliced)}
        for name, tensor in self.body.state_dict().items():
            if name.rpartition(".")[0] not in sliced and name in tensors:
                tensor.copy_(corner(tensors[name], *tensor.shape))

    def class_tensors(self) -> tuple[str, ...]:
        """The names of the tensors of the state dict that have a row for each class."""
        return tuple(
            name
            for name, axes in self.axes().items()
            if axes[0] is not None and any(group == CLASSES for group, _, _ in axes[0].parts)
        )

    def own_upto_gate(self, gate: int, x: Float[Tensor, "batch channels height width"], subnet: Subnet) -> TrunkOutput:
        """Run the graph up to a cut."""
        return TrunkOutput.pooled(self._run(gate, x, subnet), self._cuts[gate].hidden)

    def own_head(
        self, features: Float[Tensor, "batch channels height width"], subnet: Subnet
    ) -> Float[Tensor, "batch classes"]:
        """Run the graph after the last cut."""
        return self._run(len(self._cuts), features, subnet)

    def _run(self, number: int, x: Tensor, subnet: Subnet) -> Tensor:
        """Run a part of the graph; of features with the channels of the widest sub-network only the
        sub-network's own are read."""
        if number > 0 and x.shape[1] > (own := self._cuts[number - 1].channels.size(subnet.widths)):
            places = self.own_channel_places(number - 1, subnet)
            x = x[:, :own] if places is None else x.index_select(1, places.places)
        part = self._parts[number]
        return part.module(x, subnet.widths, *(self._slice(name, subnet.widths) for name in part.tensors))

    def _slice(self, name: str, widths: Widths) -> Tensor:
        """What a sub-network uses of a tensor that no layer holds."""
        value = take(attribute(self.body, name), self._own.get(name, ()), widths)
        # Without gradients a slice of a parameter still says that it needs one, although it has no
        # history: torch's counter of FLOPs fails on such an argument.
        return value if torch.is_grad_enabled() else value.detach()

    def own_channel_places(self, gate: int, subnet: Subnet) -> ChannelPlaces | None:
        """The places of the channels at a cut; None where they are the first ones."""
        channels = self._cuts[gate].channels
        runs = channels.runs(subnet.widths)
        if len(runs) == 1 and runs[0][0] == 0:
            return None
        places = channels.places(subnet.widths)
        return ChannelPlaces(places.to(next(self.parameters()).device), channels.max_size)

    def cut_own_upto_gate(self, gate: int, subnet: Subnet) -> nn.Module:
        """The graph up to a cut as plain modules."""
        return PlainPooled(self._plain_part(gate, subnet), self._cuts[gate].hidden)

    def cut_own_head(self, subnet: Subnet) -> nn.Module:
        """The graph after the last cut as a plain `torch.fx` module."""
        return self._plain_part(len(self._cuts), subnet)

    def _plain_part(self, number: int, subnet: Subnet) -> fx.GraphModule:
        graph = _part_graph(self.body, own_gates(self.spec), number)
        return plain_graph(self.body, graph, subnet.widths, self._own)

    def axes(self) -> Mapping[str, Axes]:
        """The axes of every tensor that is sliced."""
        return {f"{BODY}{name}": axes for name, axes in self._own.items()} | {
            f"{name}.{leaf}": axes
            for name, layer in self.named_modules()
            if isinstance(layer, Sliced)
            for leaf, axes in layer.axes().items()
        }

    def channel_scales(self) -> frozenset[str]:
        """The tensors of the traced module that no layer holds."""
        return frozenset(f"{BODY}{name}" for name in self._own)


@lru_cache(maxsize=64)
def traced_graph(
    model: str,
    num_classes: int,
    in_channels: int,
    image_size: ImageSize,
    streams: str,
    options: OwnOptions = (),
    kernels: tuple[int, ...] = (),
) -> TracedGraph:
    """The graph of a network by name with the channels of its values; its parameters have shapes,
    but no values. A process traces each network once.

    Args:
        model: a name for `make_plain`.
        num_classes: number of logits.
        in_channels: channels of the image.
        image_size: size of the image.
        streams: one of `dsnet.network.channels.STREAMS`.
        options: options for `make_plain`.
        kernels: sizes in pixels, rising, to which depthwise kernels can be sliced.

    Raises:
        ConfigError: the network cannot be made, traced or analysed.
    """
    plain = make_plain(model, num_classes, in_channels, 0, options)
    graph = trace(plain, example_image(in_channels, image_size))
    for parameter in graph.parameters():
        parameter.data = parameter.data.new_zeros(()).expand(parameter.shape)
    return analyse(graph, streams, kernels)


def sliced_graph(traced: TracedGraph, plain: nn.Module, spec: SupernetSpec, subnets: SubnetSet) -> fx.GraphModule:
    """The graph of a traced module in which the sliced layers take the widths as a second argument.

    Args:
        traced: the graph with the channels of its values.
        plain: the module, or one like it: the weights, and the layers that are not sliced.
        spec: made of the graph, or of it with smaller groups.
        subnets: sets of which the norms keep statistics.
    """
    layers = _sliced_layers(traced, plain, spec, subnets)
    graph = copy.deepcopy(traced.module.graph)
    images = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_after(images):
        widths = graph.placeholder("widths")
    sums = {f"{UNION}{name}": added for name, added in _union_sums(traced, spec).items()}
    layers |= sums
    for node in graph.nodes:
        if (target := f"{UNION}{node.name}") in sums:
            node.op, node.target, node.args, node.kwargs = "call_module", target, (*node.args[:2], widths), {}
        elif node.op == "call_module" and str(node.target) in layers:
            node.args = (*node.args, widths)
        elif node.target is F.layer_norm and not node.meta.get(UNKNOWN):
            _let_norm_be_narrow(node)
    held = _held(traced.module, graph)
    held |= {**dict(plain.named_modules()), **dict(plain.named_parameters()), **dict(plain.named_buffers())}
    for name, axes in own_axes(traced, spec).items():
        index = tuple(slice(None if axis is None else axis.max_size) for axis in axes)
        held[name] = _copied(held[name][index], held[name])
    module = fx.GraphModule({**held, **layers}, graph)
    module.train(True)
    return module


def _sliced_layers(
    traced: TracedGraph, plain: nn.Module, spec: SupernetSpec, subnets: SubnetSet
) -> dict[str, nn.Module]:
    """The layers that are sliced, by their names in the module."""
    targets = {node.name: str(node.target) for node in traced.module.graph.nodes if node.op == "call_module"}
    layers = {
        targets[op.name]: slice_layer(plain.get_submodule(targets[op.name]), op, spec, subnets)
        for op in spec.ops
        if op.name in targets
    }
    return {name: layer for name, layer in layers.items() if layer is not None}


def _let_norm_be_narrow(node: fx.Node) -> None:
    """Make a call of `F.layer_norm`, which is given a number of channels, one of `layer_norm`."""
    _, weight, bias, eps = norm_arguments(node)
    node.target, node.args, node.kwargs = layer_norm, (node.args[0], weight, bias, eps), {}


def own_axes(traced: TracedGraph, spec: SupernetSpec) -> dict[str, Axes]:
    """The axes of the tensors that the module itself holds and that are sliced, by name."""
    nodes = {node.name: node for node in traced.module.graph.nodes if OWN in node.meta}
    return {
        str(nodes[op.name].target): (*(None,) * nodes[op.name].meta[OWN].dim, Axis.read_by(op, spec))
        for op in spec.ops
        if op.kind == "scale" and op.name in nodes
    }


def _union_sums(traced: TracedGraph, spec: SupernetSpec) -> dict[str, TracedSum]:
    """The sums whose two values have different channels, by the names of their nodes."""
    found: dict[str, TracedSum] = {}
    for node in traced.module.graph.nodes:
        if node.target not in SUMS and not (node.op == "call_method" and node.target in SUM_METHODS):
            continue
        values = [value for value in node.args[:2] if has_channels(value)]
        if len(values) < 2 or not has_channels(node) or node.meta.get(UNKNOWN):
            continue
        if len({channel_dim(value) for value in (*values, node)}) > 1:
            continue  # one of them has all of its channels along every dimension
        parts = [traced.groups_of(parts_of(value)) for value in (*values, node)]
        if parts[0] != parts[1] and _are_divided_alike(*values):
            first, second, whole = (Axis.of(pairs, spec, unions) for pairs, unions in parts)
            is_minus = "sub" in getattr(node.target, "__name__", str(node.target))
            factor = float(node.kwargs.get("alpha", 1)) * (-1 if is_minus else 1)
            behind = len(shape_of(node)) - 1 - channel_dim(node)
            found[node.name] = TracedSum((first, second), whole, spec.groups, factor, behind)
    return found


def _are_divided_alike(first: fx.Node, second: fx.Node) -> bool:
    """Whether two values have parts of the same sizes; otherwise each has all of its channels."""
    sizes = ([(part.count, part.repeat) for part in parts_of(value)] for value in (first, second))
    return next(sizes) == next(sizes)


def _held(module: fx.GraphModule, graph: fx.Graph) -> dict[str, Any]:
    """The modules and tensors to which the nodes of a graph refer, by name."""
    tensors = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    return {**dict(module.named_modules()), **{name: attribute(module, name) for name in tensors}}


def slice_layer(plain: nn.Module, op: Op, spec: SupernetSpec, subnets: SubnetSet) -> Sliced | None:
    """The sliced form of a layer; None for a layer that is the same at every width."""
    num_in = Axis.read_by(op, spec)
    match plain:
        case nn.Conv2d() if op.kind == "conv":
            return TracedConv2d(plain, num_in, Axis.of(((op.out_group, 1),), spec))
        case nn.Conv2d() if op.kind == "depthwise":
            kernel = None if op.kernel_group is None else Axis.kernel(op.kernel_group, spec)
            return TracedConv2d(plain, num_in, Axis.read_by(op, spec, op.divisions), kernel)
        case nn.Linear() if op.kind in ("linear", "conv"):
            return TracedLinear(plain, num_in, Axis.of(((op.out_group, 1),), spec))
        case nn.BatchNorm2d() | nn.BatchNorm1d() if op.kind == "norm":
            if spec.norm == "group_norm":
                return TracedGroupNorm(num_in)
            return TracedNorm(plain, num_in, op.depends, subnets)
        case nn.LayerNorm() if op.kind == "scale":
            return TracedLayerNorm(plain, num_in)
    return None


def _part_graph(body: fx.GraphModule, cuts: Sequence[str], number: int) -> fx.Graph:
    """The graph of a part; that of the whole body where there are no cuts."""
    if not cuts:
        return copy.deepcopy(body.graph)
    bounds = (None, *cuts, None)
    return part_of(body.graph, bounds[number], bounds[number + 1])


def _parts_of(body: fx.GraphModule, cuts: Sequence[str]) -> tuple[_Part, ...]:
    """The parts of the sliced graph between the cuts; tensors that no layer holds become their
    arguments, so that they are always the body's own, and slices of them."""
    if not cuts and not any(node.op == "get_attr" for node in body.graph.nodes):
        return (_Part(body, ()),)
    parts = []
    for number in range(len(cuts) + 1):
        graph = _part_graph(body, cuts, number)
        last_input = [node for node in graph.nodes if node.op == "placeholder"][-1]
        tensors = {str(node.target): node for node in graph.nodes if node.op == "get_attr"}
        for node in [node for node in graph.nodes if node.op == "get_attr"]:
            if tensors[str(node.target)] is node:
                with graph.inserting_after(last_input):
                    tensors[str(node.target)] = last_input = graph.placeholder(node.name)
            node.replace_all_uses_with(tensors[str(node.target)])
            graph.erase_node(node)
        parts.append(_Part(fx.GraphModule(_held(body, graph), graph), tuple(tensors)))
    return tuple(parts)


def plain_graph(
    body: fx.GraphModule, graph: fx.Graph, widths: tuple[int, ...], own: Mapping[str, Axes]
) -> fx.GraphModule:
    """A sub-network's part of the body as plain modules, with weights of its own.

    Args:
        body: holds the sliced layers.
        graph: the part, which is changed.
        widths: the sub-network's width of every channel group.
        own: the axes of the tensors that no layer holds.
    """
    layers = _held(body, graph)
    layers |= {
        name: _copied(take(layers[name], axes, widths), layers[name]) for name, axes in own.items() if name in layers
    }
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        layer = body.get_submodule(str(node.target))
        if isinstance(layer, TracedSum):
            node.args = node.args[:2]
            layers[str(node.target)] = layer.cut(widths)
        elif isinstance(layer, Sliced):
            node.args = node.args[:1]
            cut = layer.cut(layer.key_of(widths)) if isinstance(layer, TracedNorm) else layer.cut(widths)
            layers[str(node.target)] = cut
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.target == "widths":
            graph.erase_node(node)
    used = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    return fx.GraphModule({name: copy.deepcopy(layers[name]) for name in used}, graph).train(body.training)
