"""Orders of channels: which channels stand first and so belong to the narrow sub-networks, and the
exact permutation of a network's weights.

A permutation lists, for every place of the new order, the channel of the old one. Channel groups of
one order group (`dsnet.structure.filters`) share it. Where the writers of a stream have their own
channels, each has its own order: the stream keeps its own, and the groups note which of its
channels are theirs (`ChannelGroup.ids`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float64, Shaped
from torch import Tensor

from dsnet.errors import ConfigError
from dsnet.families import rebuild
from dsnet.network.axes import Axes, Axis, Stream, take
from dsnet.network.batchnorm import batch_statistics
from dsnet.network.layers import BatchNormBank, SlicedGroupNorm, key_suffix
from dsnet.network.supernet import Supernet
from dsnet.seeds import derive_seed
from dsnet.space.spec import SupernetSpec
from dsnet.space.subnet_set import SubnetSet
from dsnet.structure.filters import Batches, filters, order_groups, why_kept, written_rows
from dsnet.structure.method import StructureProblem
from dsnet.structure.noise import noise_tolerances

Orders = tuple[tuple[int, ...], ...]
"""For every channel group the permutation of its channels."""

SETTING = "supernet.structure.order"


def no_order(supernet: Supernet) -> Orders:
    """The order that the channels have."""
    return tuple(tuple(range(group.max_width)) for group in supernet.spec.groups)


def channel_orders(problem: StructureProblem, supernet: Supernet, batches: Batches = ()) -> Orders:
    """The order of the settings, from the most important channel of every group.

    Channels of a pinned group and the pixels of a kernel keep their order. Where the groups of a
    stream with one order have unequal widths, channels are sorted among those that the same groups
    have. Channels that are equally important keep their order.

    Args:
        problem: the settings, and the seed of orders `random` and `noise`.
        supernet: the network by whose weights channels are sorted; not changed.
        batches: for orders `taylor` and `noise`.

    Raises:
        ConfigError: `taylor` or `noise` has no batch, or the family does not say which channels its
            tensors have.
    """
    if problem.settings.order == "none":
        return no_order(supernet)
    if not supernet.axes():
        raise ConfigError(
            f"{SETTING} is {problem.settings.order}, but family {supernet.spec.family} does not say which channels its tensors have "
            "(Supernet.axes): use order none"
        )
    return orders_by(supernet, channel_scores(supernet, problem.settings.order, problem.seed, batches))


def orders_by(
    supernet: Supernet, scores: Mapping[int, Float64[Tensor, " _scored"]], first: Sequence[int] | None = None
) -> Orders:
    """The order by the scores of channels, as `channel_orders`; a channel group without scores
    keeps its order, or that of the groups with which it shares one.

    Args:
        supernet: the network.
        scores: for channel groups the scores of their first channels.
        first: for every channel group how many of its channels may be scored; these stay before the
            others. None: all.
    """
    groups = supernet.spec.groups
    orders = list(no_order(supernet))
    for stream in order_groups(supernet):
        if any(why_kept(groups[group]) for group in stream):
            continue
        ends = [groups[group].max_width for group in stream]
        widths = sorted({*ends, *([] if first is None else [first[group] for group in stream])})
        total = torch.zeros(widths[-1], dtype=torch.float64)
        for group in stream:
            if group in scores:
                total[: len(scores[group])] += scores[group]
        parts = [
            low + torch.argsort(total[low:high], descending=True, stable=True) for low, high in pairwise((0, *widths))
        ]
        order = torch.cat(parts).tolist()
        for group in stream:
            orders[group] = tuple(order[: groups[group].max_width])
    return tuple(orders)


def channel_scores(
    supernet: Supernet, kind: str, seed: int = 0, batches: Batches = ()
) -> dict[int, Float64[Tensor, " _channels"]]:
    """The importance of every channel, for every channel group.

    Args:
        supernet: the network; not changed.
        kind: one of `dsnet.structure.settings.Order` except `none`. `weight_l1` is the sum of the
            absolute weights of the filters that write the channel, over all weights of two or more
            dimensions whose rows are these channels; `bn_gamma` the sum of the absolute scales of
            the norms on it; `taylor` the sum of abs(gradient * weight) over the same weights as
            `weight_l1` and over all batches, for the cross-entropy of the widest to the labels;
            `noise` the negative logarithm of the noise that the channel tolerates on the same
            weights (`dsnet.structure.noise`), one number for all groups that share one order.
        seed: seed of `random` and `noise`.
        batches: for `taylor` and `noise`.

    Raises:
        ConfigError: `taylor` or `noise` has no batch.
    """
    groups = supernet.spec.groups
    if kind == "random":
        return {
            number: torch.rand(
                group.max_width,
                generator=torch.Generator().manual_seed(derive_seed(seed, "order", number)),
                dtype=torch.float64,
            )
            for number, group in enumerate(groups)
        }
    if kind == "noise":
        return {group: -tolerance for group, tolerance in noise_tolerances(supernet, batches, seed).items()}
    if kind == "taylor":
        tensors = _sensitivities(supernet, batches)
    else:
        tensors = {name: value.detach().abs() for name, value in _sources(supernet, kind).items()}
    return _summed(supernet, tensors)


def mean_scales(supernet: Supernet) -> dict[int, Float64[Tensor, " _channels"]]:
    """The mean of the absolute scales of the norms on every channel, for the channel groups that
    have a norm on every channel."""
    scales = _sources(supernet, "bn_gamma")
    sums = _summed(supernet, {name: value.detach().abs() for name, value in scales.items()})
    numbers = _summed(supernet, {name: torch.ones_like(value) for name, value in scales.items()})
    return {group: sums[group] / number for group, number in numbers.items() if (number > 0).all()}


def _summed(supernet: Supernet, tensors: Mapping[str, Tensor]) -> dict[int, Float64[Tensor, " _channels"]]:
    """The sum of all numbers in the rows that write a channel, for every channel group."""
    groups, axes = supernet.spec.groups, supernet.axes()
    scores = {number: torch.zeros(group.max_width, dtype=torch.float64) for number, group in enumerate(groups)}
    for name, value in tensors.items():
        axis = axes[name][0]
        assert axis is not None
        sums = value.double().cpu().reshape(len(value), -1).sum(1)
        for group, rows in written_rows(axis, groups):
            scores[group][: len(rows)] += sums[rows].sum(1)
    return scores


def _sources(supernet: Supernet, kind: str) -> dict[str, Tensor]:
    """The parameters from which channels get their scores: scales of norms, or filters."""
    if kind == "bn_gamma":
        parameters = dict(supernet.named_parameters())
        scales: dict[str, Tensor] = {}
        for name, norm in _banks(supernet).items():
            key = norm.key_of(supernet.spec.max_widths)
            leaf = f"weight_{key_suffix(key)}" if norm.private_affine else "weight"
            if f"{name}.{leaf}" in parameters:
                scales[f"{name}.{leaf}"] = parameters[f"{name}.{leaf}"]
        return scales
    return filters(supernet)


def _sensitivities(supernet: Supernet, batches: Batches) -> dict[str, Tensor]:
    """The absolute products of gradients and weights, summed over the batches, for every filter."""
    own = filters(supernet)
    found = {name: torch.zeros_like(value) for name, value in own.items()}
    device = next(supernet.parameters()).device
    widest = supernet.subnets.at(supernet.spec.max_widths)
    num_batches = 0
    with batch_statistics(supernet), torch.enable_grad():
        for images, labels in batches:
            num_batches += 1
            loss = F.cross_entropy(supernet(images.to(device), widest), labels.to(device))
            gradients = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
            for (name, value), gradient in zip(own.items(), gradients, strict=True):
                if gradient is not None:
                    found[name] += (gradient * value.detach()).abs()
    if num_batches == 0:
        raise ConfigError(f"{SETTING} taylor needs at least one batch of images with labels")
    return found


def reorder(supernet: Supernet, orders: Orders) -> Supernet:
    """The same network with the channels of every group in another order.

    The widest sub-network computes the same. A narrower one that keeps the same channels, since the
    order changes only among those that it has and among the others, computes the same too; any
    other one consists of other channels now, and its statistics count no update.

    Raises:
        ValueError: an order does not fit the network.
    """
    return transfer(supernet, supernet.subnets, orders)


@torch.no_grad()
def transfer(supernet: Supernet, subnets: SubnetSet, orders: Orders | None = None) -> Supernet:
    """The weights of a network with its channels in another order, in a network for another set of
    sub-networks.

    Statistics and private affine pairs of widths that the source lacks, or whose channels change,
    are those of the same channels in the source's widest sub-network, and count no update: training
    and recalibration estimate them anew.

    Args:
        supernet: the source; not changed.
        subnets: the set; its spec may differ from the source's in the norm.
        orders: for every channel group the permutation of its channels; None keeps their order.

    Raises:
        ValueError: an order does not fit the network, or the sub-networks do not.
    """
    orders = no_order(supernet) if orders is None else orders
    _check_permutations(supernet, orders)
    target = rebuild(with_ids(subnets, supernet.spec, orders)).to(next(supernet.parameters()))
    source, axes = supernet.state_dict(), supernet.axes()
    moved = {
        name: _permuted(value, axes.get(name, ()), orders)
        for name, value in source.items()
        if _keeps_channels(axes.get(name, ()), orders)
    }
    state = {name: moved.get(name, value) for name, value in target.state_dict().items()}
    banks = _banks(supernet)
    for name, norm in _banks(target).items():
        if name in banks:
            whole = banks[name].key_of(supernet.spec.max_widths)
            state |= _Bank(name, banks[name], whole, axes, moved, target.spec).tensors(norm, orders)
    target.load_state_dict(state)
    return target.train(supernet.training)


@dataclass(frozen=True)
class _Bank:
    """The tensors of a source's norm, in the new order."""

    name: str
    norm: BatchNormBank
    whole: tuple[int, ...]
    """The key of the widest sub-network, which the norm need not have."""
    axes: Mapping[str, Axes]
    moved: Mapping[str, Tensor]
    spec: SupernetSpec
    """That of the new network."""

    def tensors(self, target: BatchNormBank, orders: Orders) -> dict[str, Tensor]:
        """The tensors of a target's norm; without those that the source cannot give."""
        found: dict[str, Tensor | None] = {}
        if self.norm.private_affine and not target.private_affine:
            found |= {
                part: self.moved.get(f"{self.name}.{part}_{key_suffix(self.whole)}") for part in ("weight", "bias")
            }
        parts = ("weight", "bias", "mean", "var") if target.private_affine else ("mean", "var")
        known, wanted = self.norm.keys(), target.keys()
        for key in wanted:
            suffix, widths = key_suffix(key), target.widths_of(key)
            is_same = key in known and all(_keeps(orders[group], width) for group, width in widths.items())
            for part in parts:
                found[f"{part}_{suffix}"] = self._part(part, suffix if is_same else None, widths)
            updates = self.norm.get_buffer(f"updates_{suffix}") if is_same else None
            found[f"updates_{suffix}"] = torch.zeros((), dtype=torch.int64) if updates is None else updates
        return {f"{self.name}.{leaf}": value for leaf, value in found.items() if value is not None}

    def _part(self, part: str, suffix: str | None, widths: Mapping[int, int]) -> Tensor | None:
        """One tensor of a key: the source's own, or the channels of its widest."""
        is_shared = part in ("weight", "bias") and not self.norm.private_affine
        if suffix is not None and not is_shared:
            return self.moved[f"{self.name}.{part}_{suffix}"]
        whole = f"{self.name}.{part}" if is_shared else f"{self.name}.{part}_{key_suffix(self.whole)}"
        if whole not in self.moved:
            return None
        return take(self.moved[whole], [_renamed(axis, self.spec) for axis in self.axes[whole]], widths)


def with_ids(subnets: SubnetSet, source: SupernetSpec, orders: Orders) -> SubnetSet:
    """The set with the ids that its groups have after a change of their order.

    MAdds depend on them: a stream has every channel that one of its writers has.

    Args:
        subnets: the set.
        source: the spec before the change.
        orders: for every channel group the permutation of its channels.
    """
    in_streams = {group for op in source.ops for part, others in zip(op.parts, op.unions, strict=False) if others
                  for group in (part[0], *others)}  # fmt: skip
    groups = list(subnets.spec.groups)
    for number in in_streams:
        own = source.groups[number].channels(source.groups[number].max_width)
        ids = tuple(own[place] for place in orders[number])
        groups[number] = replace(groups[number], ids=() if list(ids) == sorted(range(len(ids))) else ids)
    spec = replace(subnets.spec, groups=tuple(groups))
    return subnets if spec == subnets.spec else replace(subnets, spec=spec)


def _renamed(axis: Axis | None, spec: SupernetSpec) -> Axis | None:
    """An axis of all channels with the ids of a spec, whose groups are those of the axis."""
    if axis is None or not axis.streams:
        return axis
    streams = (None if stream is None else Stream.of(stream.groups, spec) for stream in axis.streams)
    return replace(axis, streams=tuple(streams))


def _banks(supernet: Supernet) -> dict[str, BatchNormBank]:
    return {name: module for name, module in supernet.named_modules() if isinstance(module, BatchNormBank)}


def _keeps(order: Sequence[int], width: int) -> bool:
    """Whether the first `width` channels are the same ones in another order."""
    return width >= len(order) or max(order[:width], default=-1) < width


def _order_of(axis: Axis, orders: Orders, group: int) -> tuple[int, ...]:
    """The order of the channels of one part of an axis; the longest one of a stream."""
    return max((orders[each] for each in (group, *axis.union)), key=len)


def _keeps_channels(axes: Axes, orders: Orders) -> bool:
    """Whether a tensor has the same channels in the new order; else its sub-network changes."""
    return all(_keeps_part(axis, part, orders) for axis in axes if axis is not None for part in range(len(axis.parts)))


def _keeps_part(axis: Axis, part: int, orders: Orders) -> bool:
    """Whether one part of an axis has the same channels in the new order."""
    group, _, present = axis.parts[part]
    if (stream := axis.stream_of(part)) is not None:
        own = zip(stream.groups, stream.ids, strict=True)
        return all(_keeps(orders[each], len(ids)) for each, ids in own)
    return group < 0 or _keeps(_order_of(axis, orders, group), present)


def _permuted(tensor: Shaped[Tensor, "*_"], axes: Axes, orders: Orders) -> Tensor:
    for dimension, axis in enumerate(axes):
        if axis is not None:
            tensor = tensor.index_select(dimension, _rows(axis, orders).to(tensor.device))
    return tensor


def _rows(axis: Axis, orders: Orders) -> Tensor:
    """The old place of every place along an axis."""
    parts, start = [], 0
    for part, (group, repeat, present) in enumerate(axis.parts):
        is_fixed = group < 0 or axis.stream_of(part) is not None  # a stream has an order of its own
        order = range(present) if is_fixed else _order_of(axis, orders, group)[:present]
        channels = torch.tensor(list(order), dtype=torch.int64)
        parts.append((start + channels[:, None] * repeat + torch.arange(repeat)).flatten())
        start += repeat * present
    return torch.cat(parts)


def _check_permutations(supernet: Supernet, orders: Orders) -> None:
    groups = supernet.spec.groups
    if len(orders) != len(groups):
        raise ValueError(
            f"{len(orders)} orders of channels, but {supernet.spec.family} has {len(groups)} channel groups"
        )
    for group, order in zip(groups, orders, strict=True):
        if sorted(order) != list(range(group.max_width)):
            raise ValueError(
                f"the order of channel group {group.name!r} is no permutation of {group.max_width} channels"
            )
        if (reason := why_kept(group)) and list(order) != sorted(order):
            raise ValueError(f"channel group {group.name!r} keeps its order: {reason}")
    for stream in order_groups(supernet):
        longest = max((orders[group] for group in stream), key=len)
        if any(orders[group] != longest[: len(orders[group])] for group in stream):
            names = ", ".join(groups[each].name for each in stream)
            raise ValueError(f"the channel groups {names} are one stream and must share one order")
    if orders != no_order(supernet) and any(isinstance(part, SlicedGroupNorm) for part in supernet.modules()):
        raise ValueError("GroupNorm normalises neighbouring channels together, so that they cannot change their order")


def compose(first: Orders, second: Orders) -> Orders:
    """The order that results from `first` and then `second`."""
    return tuple(tuple(old[place] for place in new) for old, new in zip(first, second, strict=True))
