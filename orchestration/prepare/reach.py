"""Bounds of each metric of any router on a network, known before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dsnet.gates.tree import NUM_EXTRA_POOLINGS
from dsnet.image_size import ImageSize
from dsnet.measure.latency_table import BatchClock, LatencyTable, latency_metric
from dsnet.measure.settings import MAIN_DEVICE
from dsnet.metrics import metrics
from dsnet.routers.cascade import num_answer_features
from dsnet.routers.gate import RICH_EVIDENCE
from dsnet.routers.kinds import router_kind
from dsnet.space.cost import evidence_channels, gate_madds, pooling_madds, shared_params, subnet_cost
from dsnet.space.route_tree import RouteTree
from dsnet.space.spec import Subnet, SupernetSpec
from dsnet.space.subnet_set import SubnetSet
from orchestration.config.resolve import constraint_set, target_set
from orchestration.config.space import possible_routers
from orchestration.config.sweep import SweepConfig
from search.conditions.constraints import BASELINE
from search.gate_trial import ROUTING_KEYS, routing_ids

Range = tuple[float, float]
"""(lowest, highest), both inclusive."""
_FIXED_HEADS: Mapping[str, Range] = {"none": (0.0, 0.0), "own": (0.0, math.inf)}
"""MAdds of one decision, for heads whose size is not derived here."""
_ROUNDING = 1e-9
"""Relative widening of the ranges, because sums in another order round differently."""


def layout_ranges(config: SweepConfig, subnets: SubnetSet, image_size: ImageSize) -> dict[str, Range]:
    """`metric_ranges` before anything is measured, and ranges of the names `baseline.*`, exact
    where the layout decides the metric."""
    ranges = metric_ranges(config, subnets, image_size)
    widest = subnets[subnets.by_madds()[-1]]
    cost = subnet_cost(subnets.spec, widest, image_size)
    exact = {"madds_m": cost.madds / 1e6, "p95_madds_m": cost.madds / 1e6, "params_m": cost.params / 1e6}
    known = {name: (value, value) for name, value in exact.items()}
    static = {
        name: known.get(name, (0.0, math.inf) if name not in metrics() else metrics()[name].range) for name in ranges
    }
    return ranges | {f"{BASELINE}{name}": reach for name, reach in static.items()}


def hopeless_conditions(config: SweepConfig, subnets: SubnetSet, image_size: ImageSize) -> Iterator[str]:
    """Warnings about soft constraints and targets that no router over this layout can meet, so that
    the search finds nothing or does not end."""
    ranges = layout_ranges(config, subnets, image_size)
    unmeasured = {name: math.nan for name in ranges if name.startswith(BASELINE)}
    for key, these, end in (
        ("constraints", constraint_set(config, unmeasured), "no trial will be feasible"),
        ("budget.target", target_set(config, unmeasured), "no trial will meet it"),
    ):
        for comparison in these.soft:
            if comparison.least_violation(ranges) > 0:
                reach = spoken_reach(comparison.names, ranges)
                yield f"{key}: no router of this network can satisfy {comparison} (reachable values: {reach}): {end}"


def spoken_reach(names: Collection[str], ranges: Mapping[str, Range]) -> str:
    """The ranges of some metrics, in words."""
    return ", ".join(
        f"{name} {ranges[name][0]:.4g} to {ranges[name][1]:.4g}" for name in sorted(names) if name in ranges
    )


def metric_ranges(
    config: SweepConfig, subnets: SubnetSet, image_size: ImageSize, latencies: Mapping[str, LatencyTable] | None = None
) -> dict[str, Range]:
    """Bounds of each metric that hold for every trial of the sweep, whatever its router learns;
    used to refuse impossible conditions early.

    Args:
        config: its kinds of router, routing space and perceptron sizes.
        subnets: the routes.
        image_size: size of the images.
        latencies: latency tables by device; None before they are measured, when any latency above 0
            is possible.
    """
    bounds = _CostBounds.of(config, subnets, image_size)
    kinds = possible_routers(config.gate, config.space)
    madds, params = _union(bounds.madds(kind) for kind in kinds), _union(bounds.params(kind) for kind in kinds)
    in_m = {"madds_m": madds, "p95_madds_m": madds, "params_m": params}
    ranges = {
        **{name: metric.range for name, metric in metrics().items()},
        **{name: _wider(a / 1e6, b / 1e6) for name, (a, b) in in_m.items()},
    }
    if latencies is None:
        devices, sizes = (MAIN_DEVICE, *config.measure.devices), sorted({1, *config.measure.batch_sizes})
        return ranges | {latency_metric(size, device): (0.0, math.inf) for device in devices for size in sizes}
    names = [subnets[route].name for route in bounds.routes]
    for device, table in latencies.items():
        for size in table.batch_sizes:
            clock = table.clock(size, names)
            ranges[latency_metric(size, device)] = _wider(*_union(_latency_range(clock, kind) for kind in kinds))
    return ranges


def _latency_range(clock: BatchClock, kind: str) -> Range:
    """Range of a batch's latency: every image runs at least one route, and at most as many as the
    kind of router allows; each route that runs is one call."""
    tails = clock.tails_ms[:, 1:]
    num_images = tails.shape[1]
    num_runs = min(router_kind(kind).max_runs, len(tails))
    share = tails / np.arange(1, num_images + 1)
    dearest_calls = np.sort(tails.max(1))[::-1][: num_runs * num_images]
    fixed = clock.fixed_ms(kind)
    most = min(float(dearest_calls.sum()), num_runs * num_images * float(share.max()))
    return fixed + num_images * float(share.min()), fixed + most


@dataclass(frozen=True)
class _CostBounds:
    """Bounds of the costs of routers over a set of sub-networks."""

    subnets: SubnetSet
    image_size: ImageSize
    routes: tuple[int, ...]
    """Routes that a trial may have."""
    is_exact: bool
    """Whether every trial has all of these routes; else some have fewer."""
    units: tuple[int, int]
    """Smallest and largest number of hidden units of a perceptron."""

    @classmethod
    def of(cls, config: SweepConfig, subnets: SubnetSet, image_size: ImageSize) -> _CostBounds:
        routing, space = config.gate.routing, config.space
        key = "gate.perceptron.hidden_units"
        units = [int(n) for n in space[key].edge_values()] if key in space else [config.gate.perceptron.hidden_units]
        is_exact = routing.beam is None and not any(key in space for key in ROUTING_KEYS)
        every = range(len(subnets))
        routes = routing_ids(every, routing.first, routing.last, routing.stride) if is_exact else tuple(every)
        return cls(subnets, image_size, routes, is_exact, (min(units), max(units)))

    def madds(self, kind: str) -> Range:
        """Range of the MAdds of one image, and so of the mean and of any percentile over images."""
        costs = [subnet_cost(self.spec, self.subnets[route], self.image_size) for route in self.routes]
        decisions = [self._decision(kind, route) for route in self.routes]
        totals = [cost.madds for cost in costs]
        tails = sorted((cost.madds - cost.trunk_madds for cost in costs), reverse=True)
        highest = costs[0].trunk_madds + sum(tails[: router_kind(kind).max_runs]) + max(most for _, most in decisions)
        return min(total + least for total, (least, _) in zip(totals, decisions, strict=True)), highest

    def params(self, kind: str) -> Range:
        """Range of the parameters of the smallest supernet with the router's routes, plus those of
        the router."""
        members = [self.subnets[route] for route in self.routes]
        most = shared_params(self.spec, members)
        has_all = self.is_exact and router_kind(kind).max_runs == 1
        least = most if has_all else min(shared_params(self.spec, [member]) for member in members)
        fewest, highest = self._numbers(kind)
        return least + fewest, most + highest

    @property
    def spec(self) -> SupernetSpec:
        return self.subnets.spec

    @cached_property
    def _tree(self) -> RouteTree:
        return RouteTree.of(self.subnets)

    @property
    def _options(self) -> tuple[int, int]:
        """Smallest and largest number of routes between which one decision chooses."""
        return len(self.routes) if self.is_exact else 1, len(self.routes)

    def _decision(self, kind: str, route: int) -> Range:
        """Range of the MAdds of all decisions on the way to a route."""
        subnet = self.subnets[route]
        if router_kind(kind).is_tree:
            costs = [
                self._head_madds(kind, number, subnet, branches.num_choices)
                for number, branches in enumerate(self._tree.gates)
            ]
            return sum(least for least, _ in costs), sum(most for _, most in costs)
        fewest, most = self._options
        if router_kind(kind).reads_answer:
            fewest = min(fewest, 2)
        return self._head_madds(kind, 0, subnet, fewest)[0], self._head_madds(kind, 0, subnet, most)[1]

    def _head_madds(self, kind: str, gate: int, subnet: Subnet, num_options: int) -> Range:
        known = router_kind(kind)
        if known.head in _FIXED_HEADS:
            return _FIXED_HEADS[known.head]
        size = self._num_features(kind, gate, subnet)
        if known.head == "linear":
            return (gate_madds(size, num_options),) * 2
        pooled = 0 if known.reads_answer else pooling_madds(self.spec, subnet, gate, self.image_size)
        few, many = (
            NUM_EXTRA_POOLINGS * pooled + gate_madds(size, units) + gate_madds(units, num_options)
            for units in self.units
        )
        return few, many

    def _num_features(self, kind: str, gate: int, subnet: Subnet) -> int:
        """Number of features that a decision reads at a gate, on the path of a sub-network."""
        site = self.spec.gates[gate]
        if router_kind(kind).head == "linear":
            return site.hidden
        if router_kind(kind).reads_answer:
            return num_answer_features(self.spec.num_classes) + site.hidden
        return (len(RICH_EVIDENCE) - 1) * evidence_channels(self.spec, subnet, gate) + site.hidden

    def _numbers(self, kind: str) -> Range:
        """Range of the number of values that a router stores."""
        known = router_kind(kind)
        if known.head == "none":
            return 1, 1  # a threshold
        if not known.is_tree:
            fewest, most = self._options
            if known.reads_answer:
                fewest = min(fewest, 2)
            first = self.subnets[self.routes[0]]
            return self._head_numbers(kind, 0, first, fewest)[0], self._head_numbers(kind, 0, first, most)[1]
        one_path, every_node = [], 0.0
        for route in self.routes:
            subnet = self.subnets[route]
            heads = [
                self._head_numbers(kind, gate, subnet, branches.num_choices)
                for gate, branches in enumerate(self._tree.gates)
            ]
            one_path.append(sum(least for least, _ in heads))
        for gate, branches in enumerate(self._tree.gates):
            nodes = {branches.node_of[route]: self.subnets[route] for route in self.routes}
            every_node += sum(self._head_numbers(kind, gate, own, branches.num_choices)[1] for own in nodes.values())
        return min(one_path), every_node

    def _head_numbers(self, kind: str, gate: int, subnet: Subnet, num_options: int) -> Range:
        """Range of the number of weights, biases and offsets of one decision."""
        if router_kind(kind).head == "own":
            return 0.0, math.inf
        size = self._num_features(kind, gate, subnet)
        if router_kind(kind).head == "linear":
            return ((size + 1) * num_options,) * 2
        few, many = self.units
        return size * few + few * (num_options + 1) + num_options, size * many + many * (
            num_options + 1
        ) + 2 * num_options


def _union(ranges: Iterable[Range]) -> Range:
    lows, highs = zip(*ranges, strict=True)
    return min(lows), max(highs)


def _wider(low: float, high: float) -> Range:
    return low * (1 - _ROUNDING), high * (1 + _ROUNDING)
