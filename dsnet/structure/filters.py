"""Which filters write a channel, and which channel groups share one order.

A filter is a row of a parameter of two or more dimensions. Channel groups that are added to each
other in a residual stream must share one order; they are an *order group*. Where the writers of a
stream have their own channels (`ChannelGroup.ids`), each is an order group of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dsnet.network.axes import Axis
from dsnet.network.supernet import Supernet
from dsnet.space.spec import ChannelGroup

Batches = Iterable[tuple[Float[Tensor, "_batch channels height width"], Int64[Tensor, " _batch"]]]
"""Normalised images with their labels."""


_KEPT = {"kernel": "it is the size of a kernel", "depth": "it is a number of blocks"}
"""Why groups of a kind cannot change their order."""


def order_groups(supernet: Supernet) -> tuple[tuple[int, ...], ...]:
    """The channel groups that share one order, rising; every channel group is in one of them."""
    root = list(range(len(supernet.spec.groups)))
    for axes in supernet.axes().values():
        for axis in axes:
            if axis is not None and (axis.union or axis.within):
                joined = {root[group] for group in (axis.parts[0][0], *axis.union, *axis.within)}
                root = [min(joined) if own in joined else own for own in root]
    return tuple(tuple(group for group, own in enumerate(root) if own == first) for first in sorted(set(root)))


def why_kept(group: ChannelGroup) -> str:
    """Why the channels of a group keep their order; empty where they can move."""
    return group.pinned or _KEPT.get(group.kind, "")


def filters(supernet: Supernet) -> dict[str, Float[Tensor, "_filters ..."]]:
    """The parameters whose rows are filters that write channels, by name."""
    axes, scales = supernet.axes(), supernet.channel_scales()
    return {
        name: value
        for name, value in supernet.named_parameters()
        if value.ndim > 1 and name not in scales and name in axes and axes[name][0] is not None
    }


def written_rows(
    axis: Axis, groups: Sequence[ChannelGroup]
) -> Iterator[tuple[int, Int64[Tensor, "_channels _repeats"]]]:
    """The rows that write the channels of each channel group along an axis.

    Args:
        axis: the first axis of a parameter.
        groups: all channel groups of the supernet.

    Yields:
        the number of a group, and for its first channels, as many as the axis has, their rows. A
        group that stands several times along the axis is yielded several times; image channels and
        classes are left out.
    """
    start = 0
    for part, (_, repeat, present) in enumerate(axis.parts):
        for group in axis.writers(part):
            places = _places(axis, part, group, groups[group].max_width)
            yield group, start + places[:, None] * repeat + torch.arange(repeat)
        start += repeat * present


def _places(axis: Axis, part: int, group: int, width: int) -> Int64[Tensor, " channels"]:
    """Where the channels of a group, from its first one on, lie along one part of an axis."""
    if (stream := axis.stream_of(part)) is None:
        return torch.arange(min(axis.parts[part][2], width))
    place = {channel: number for number, channel in enumerate(stream.channels())}
    return torch.tensor([place[channel] for channel in stream.ids[stream.groups.index(group)]])
