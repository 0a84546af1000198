"""Axes of weights: which channels of which groups lie along a dimension, and how a sub-network
slices them.

Everything that copies weights from one network to another reads this table: the slices of a call,
cut networks, smaller supernets (`restrict`, bundles) and other orders of channels
(`dsnet.structure.order`). There are four rules. Channels of a group are a prefix; those that are
the first ones of a stream share its order (`Axis.within`). Those of a stream that several groups
write in one order are as many as those of the widest (`Axis.union`). Those of a stream whose
writers have their own channels are their union (`Stream`). The pixels of a kernel are its centre
(`Axis.is_centred`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from dsnet.network.slicing import corner
from dsnet.space.spec import CLASSES, IMAGE_CHANNELS, Op, Pair, SupernetSpec

Widths = tuple[int, ...] | Mapping[int, int]
"""A width for every channel group: the widths of a sub-network, or those of some groups by
number."""
MANY_RUNS = 4
"""Number of slices of a dimension from which on they are taken by an index."""


@dataclass(frozen=True)
class Stream:
    """A residual stream whose writers each have their own channels of it.

    Its channels are in the stream's order, whichever order the groups have.
    """

    groups: tuple[int, ...]
    ids: tuple[tuple[int, ...], ...]
    """For each group the channels of the stream that it has here, from its first one on."""
    _known: dict[tuple[int, ...], tuple[Pair, ...]] = field(default_factory=dict, compare=False, repr=False)
    """Slices by the groups' widths: every call of a layer needs them."""

    @classmethod
    def of(cls, groups: Sequence[int], spec: SupernetSpec) -> Stream:
        """The stream that these groups of a supernet write."""
        own = [spec.groups[group] for group in groups]
        return cls(tuple(groups), tuple(tuple(group.channels(group.max_width)) for group in own))

    def channels(self, widths: Widths | None = None) -> tuple[int, ...]:
        """The channels of a sub-network, rising; without widths all of them."""
        own = (
            ids if widths is None else ids[: widths[group]] for group, ids in zip(self.groups, self.ids, strict=True)
        )
        return tuple(sorted(set(chain.from_iterable(own))))

    def narrowed(self, widths: Widths) -> Stream:
        """The stream of a tensor that has only the channels of a sub-network."""
        own = zip(self.groups, self.ids, strict=True)
        return Stream(self.groups, tuple(ids[: widths[group]] for group, ids in own))

    def runs(self, widths: Widths) -> tuple[Pair, ...]:
        """(start, length) of the slices of a sub-network."""
        key = tuple(widths[group] for group in self.groups)
        if key not in self._known:
            place = {channel: number for number, channel in enumerate(self.channels())}
            self._known[key] = tuple(_joined((place[channel], 1) for channel in self.channels(widths)))
        return self._known[key]


@dataclass(frozen=True)
class Axis:
    """The channels along one dimension of a weight: parts, one after the other, that a sub-network
    slices."""

    parts: tuple[tuple[int, int, int], ...]
    """(channel group, repeats of each of its channels, channels of the group that the weight has);
    group -1 is the image, -2 the classes, and neither is sliced."""
    union: tuple[int, ...] = ()
    """Further groups that write the channels of the only part in one order, so that it is as wide
    as the widest of all of them: a residual stream."""
    within: tuple[int, ...] = ()
    """Groups with whose order that of the only part agrees, although its width is its own: the
    stream of which a block reads and writes the first channels."""
    streams: tuple[Stream | None, ...] = ()
    """For each part the stream that it is, None where it is a group's channels alone; empty where
    all are."""
    is_centred: bool = False
    """Whether the only part is the pixels of a kernel, of which a sub-network uses the centre."""

    @classmethod
    def of(cls, parts: Iterable[Pair], spec: SupernetSpec, unions: Sequence[Sequence[int]] = ()) -> Axis:
        """The axis of (group, repeat) pairs in a supernet; `unions` has for each of them the
        further groups that write it, each into its own channels."""
        pairs = tuple(parts)
        whole = {IMAGE_CHANNELS: spec.in_channels, CLASSES: spec.num_classes}
        if not any(unions):
            return cls(
                tuple(
                    (group, repeat, whole[group] if group in whole else spec.groups[group].max_width)
                    for group, repeat in pairs
                )
            )
        streams = tuple(
            Stream.of((group, *others), spec) if others else None
            for (group, _), others in zip(pairs, unions, strict=True)
        )
        alone = cls.of(pairs, spec)
        sizes = (
            (group, repeat, size if stream is None else len(stream.channels()))
            for (group, repeat, size), stream in zip(alone.parts, streams, strict=True)
        )
        return cls(tuple(sizes), streams=streams)

    @classmethod
    def read_by(cls, op: Op, spec: SupernetSpec, repeat: int = 1) -> Axis:
        """The axis of the input of an op of a traced network; each channel `repeat` times."""
        return cls.of(((group, own * repeat) for group, own in op.parts), spec, op.unions)

    @classmethod
    def stream(cls, groups: Sequence[int], spec: SupernetSpec) -> Axis:
        """The axis of a stream that several groups write in one order."""
        first, *others = groups
        return cls(((first, 1, max(spec.groups[group].max_width for group in groups)),), tuple(others))

    @classmethod
    def slice_of(cls, stream: int, group: int, spec: SupernetSpec) -> Axis:
        """The axis of the first channels of a stream, as many as the width of `group`."""
        return replace(cls.of(((group, 1),), spec), within=(stream,))

    @classmethod
    def kernel(cls, group: int, spec: SupernetSpec) -> Axis:
        """The axis of the height or width of a kernel whose size is the width of a group."""
        return cls(((group, 1, spec.groups[group].max_width),), is_centred=True)

    def stream_of(self, part: int) -> Stream | None:
        """The stream that a part is; None where it is a group's channels alone."""
        return self.streams[part] if self.streams else None

    def writers(self, part: int) -> tuple[int, ...]:
        """All groups that write a part; none of the image and of the classes."""
        group = self.parts[part][0]
        stream = self.stream_of(part)
        own = (group, *self.union) if stream is None else stream.groups
        return tuple(each for each in own if each >= 0)

    def narrowed(self, widths: Widths) -> Axis:
        """The axis of a tensor that has only the channels of a sub-network."""
        sizes = (sum(length for _, length in self._slices(number, widths)) for number in range(len(self.parts)))
        parts = tuple((group, repeat, size) for (group, repeat, _), size in zip(self.parts, sizes, strict=True))
        streams = tuple(None if stream is None else stream.narrowed(widths) for stream in self.streams)
        return replace(self, parts=parts, streams=streams)

    def _slices(self, number: int, widths: Widths) -> Sequence[Pair]:
        """(start, length) of the slices of one part, in channels."""
        group, _, whole = self.parts[number]
        if group < 0:
            return ((0, whole),)
        if (stream := self.stream_of(number)) is not None:
            return stream.runs(widths)
        width = max(widths[each] for each in (group, *self.union)) if self.union else widths[group]
        width = min(width, whole)
        if not self.is_centred:
            return ((0, width),)
        if (whole - width) % 2:
            raise ValueError(f"a kernel of {width} pixels has no place in the centre of one of {whole}")
        return (((whole - width) // 2, width),)

    def runs(self, widths: Widths) -> list[Pair]:
        """(start, length) of the slices of a sub-network; neighbours are joined."""
        slices: list[Pair] = []
        offset = 0
        for number, (_, repeat, whole) in enumerate(self.parts):
            own = self._slices(number, widths)
            slices += [(offset + start * repeat, length * repeat) for start, length in own]
            offset += repeat * whole
        return _joined(slices)

    def places(self, widths: Widths) -> Int64[Tensor, " channels"]:
        """The places along the whole dimension that a sub-network uses."""
        return torch.cat([torch.arange(start, start + length) for start, length in self.runs(widths)])

    def size(self, widths: Widths) -> int:
        """Number of channels of a sub-network."""
        return sum(length for _, length in self.runs(widths))

    @property
    def max_size(self) -> int:
        """Number of channels of the whole weight."""
        return sum(repeat * whole for _, repeat, whole in self.parts)


def _joined(slices: Iterable[Pair]) -> list[Pair]:
    """(start, length) pairs with neighbours joined."""
    runs: list[Pair] = []
    for start, length in slices:
        if runs and sum(runs[-1]) == start:
            runs[-1] = (runs[-1][0], runs[-1][1] + length)
        else:
            runs.append((start, length))
    return runs


Axes = Sequence[Axis | None]
"""The axis of each of the first dimensions of a tensor; None keeps a dimension whole."""


def prefixed(prefix: str, axes: Mapping[str, Axes]) -> dict[str, Axes]:
    """The axes of a part's tensors under their names in the whole network."""
    return {f"{prefix}.{name}": value for name, value in axes.items()}


def take(weight: Shaped[Tensor, "*_"], axes: Axes, widths: Widths) -> Shaped[Tensor, "*_"]:
    """The slice of a weight that a sub-network uses.

    Args:
        weight: the whole weight.
        axes: the axis of each of its first dimensions; None keeps a dimension whole.
        widths: the sub-network's width of every channel group.
    """
    sizes = []
    for dimension, axis in enumerate(axes):
        runs = [(0, weight.shape[dimension])] if axis is None else axis.runs(widths)
        if len(runs) > MANY_RUNS:
            assert axis is not None
            weight = weight.index_select(dimension, axis.places(widths).to(weight.device))
        elif len(runs) > 1:
            weight = torch.cat([weight.narrow(dimension, start, length) for start, length in runs], dimension)
        elif runs[0][0] > 0:
            weight = weight.narrow(dimension, *runs[0])
        sizes.append(sum(length for _, length in runs))
    return corner(weight, *sizes)
