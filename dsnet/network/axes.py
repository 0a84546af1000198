"""Axes of weights: which channels of which groups lie along a dimension, and how a sub-network
slices them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor

from dsnet.network.slicing import corner
from dsnet.space.spec import CLASSES, IMAGE_CHANNELS, Pair, SupernetSpec

Widths = tuple[int, ...] | Mapping[int, int]
"""A width for every channel group: the widths of a sub-network, or those of some groups by
number."""


@dataclass(frozen=True)
class Axis:
    """The channels along one dimension of a weight: parts that are sliced to prefixes, one after
    the other."""

    parts: tuple[tuple[int, int, int], ...]
    """(channel group, repeats of each of its channels, channels of the group that the weight has);
    group -1 is the image, -2 the classes, and neither is sliced."""
    union: tuple[int, ...] = ()
    """Further groups that write the channels of the only part, which is as wide as the widest of
    all of them: a residual stream."""

    @classmethod
    def of(cls, parts: Iterable[Pair], spec: SupernetSpec) -> Axis:
        """The axis of (group, repeat) pairs in a supernet."""
        whole = {IMAGE_CHANNELS: spec.in_channels, CLASSES: spec.num_classes}
        return cls(
            tuple(
                (group, repeat, whole[group] if group in whole else spec.groups[group].max_width)
                for group, repeat in parts
            )
        )

    @classmethod
    def stream(cls, groups: Sequence[int], spec: SupernetSpec) -> Axis:
        """The axis of a stream that several groups write."""
        first, *others = groups
        return cls(((first, 1, max(spec.groups[group].max_width for group in groups)),), tuple(others))

    def narrowed(self, widths: Widths) -> Axis:
        """The axis of a tensor that has only the channels of a sub-network."""
        return Axis(
            tuple((group, repeat, self._width(group, whole, widths)) for group, repeat, whole in self.parts), self.union
        )

    def _width(self, group: int, whole: int, widths: Widths) -> int:
        if group < 0:
            return whole
        width = max(widths[each] for each in (group, *self.union)) if self.union else widths[group]
        return min(width, whole)

    def runs(self, widths: Widths) -> list[Pair]:
        """(start, length) of the slices of a sub-network; neighbours are joined."""
        runs: list[Pair] = []
        start = 0
        for group, repeat, whole in self.parts:
            length = repeat * self._width(group, whole, widths)
            if runs and sum(runs[-1]) == start:
                runs[-1] = (runs[-1][0], runs[-1][1] + length)
            else:
                runs.append((start, length))
            start += repeat * whole
        return runs

    def size(self, widths: Widths) -> int:
        """Number of channels of a sub-network."""
        return sum(length for _, length in self.runs(widths))

    @property
    def max_size(self) -> int:
        """Number of channels of the whole weight."""
        return sum(repeat * whole for _, repeat, whole in self.parts)


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
        if len(runs) > 1:
            weight = torch.cat([weight.narrow(dimension, start, length) for start, length in runs], dimension)
            sizes.append(weight.shape[dimension])
        else:
            sizes.append(runs[0][1])
    return corner(weight, *sizes)
