"""Stage II on the routing table: a router is trained, calibrated to its target MAdds, and scored by
its deployed routes.

Whole cohorts of trials are fitted at once; each has the result that it would have alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float64
from numpy.typing import NDArray
from torch import Tensor

from dsnet.errors import NonFiniteLossError
from dsnet.gates.cohort import CohortData, TrainedHead, TrialSetup, train_cohort
from dsnet.gates.problem import (
    Costs,
    Problem,
    Scaling,
    check_choice,
    costs_of,
    node_features,
    problem_of,
    routing_space,
    sgs_targets,
)
from dsnet.gates.settings import GateSettings
from dsnet.gates.tree import NUM_EXTRA_POOLINGS, PricedTree
from dsnet.metrics import added_values
from dsnet.routers.base import CalibratedHead, Router
from dsnet.routers.cascade import CASCADE_EVIDENCE, CascadeRouter, num_answer_features
from dsnet.routers.head import Head
from dsnet.routers.kinds import kind_names
from dsnet.routing.calibration import calibrate, confidence_threshold, nearest_price
from dsnet.routing.routing_table import RoutingTable
from dsnet.routing.table_routing import run_on_table
from dsnet.routing.table_run import TableRun
from dsnet.space.cost import gate_madds


@dataclass(frozen=True)
class GateFit:
    """A trained and calibrated router, with its routes and metrics on the calibration split."""

    router: Router
    metrics: Mapping[str, float]
    run: TableRun


def fit_gates(
    gate_table: RoutingTable, val_table: RoutingTable, settings: Sequence[GateSettings]
) -> list[GateFit | Exception]:
    """Run whole trials: train each router on `gate`, calibrate and score it on `val`.

    Trials of one kind with equal optimiser, steps, batch size and hidden units train together;
    trials with small routing spaces only with those of the same routing space. Beside the metrics
    of the deployed routes, a trained router reports the expectation over its softmax (`soft_top1`,
    `soft_madds_m`), which shows the soft-hard gap.

    Returns:
        for each trial, in order, its result, or the error because of which it has none:
            NonFiniteLossError, or ValueError for a setting out of its range.
    """
    results: dict[int, GateFit | Exception] = {}
    classes: dict[tuple[object, ...], list[tuple[int, _Plan]]] = {}
    for index, own in enumerate(settings):
        if own.kind.fit is not None:
            results[index] = _fit_own(gate_table, val_table, own)
            continue
        try:
            plan = _Plan.of(gate_table, own)
        except ValueError as error:
            results[index] = error
            continue
        if own.kind.head == "none":
            results[index] = _fit_cascade(val_table, plan)
        else:
            classes.setdefault(plan.trains_with, []).append((index, plan))
    for members in classes.values():
        plans = [plan for _, plan in members]
        try:
            fits = _fit_class(gate_table, val_table, plans)
        except ValueError as error:  # the table lacks evidence that all of them need
            fits = [error] * len(plans)
        results |= {index: fit for (index, _), fit in zip(members, fits, strict=True)}
    return [results[index] for index in range(len(settings))]


def fit_gate(gate_table: RoutingTable, val_table: RoutingTable, settings: GateSettings) -> GateFit:
    """Run one trial.

    Raises:
        NonFiniteLossError, ValueError: as `fit_gates`.
    """
    (fit,) = fit_gates(gate_table, val_table, [settings])
    if isinstance(fit, Exception):
        raise fit
    return fit


def train_heads(gate_table: RoutingTable, lanes: Sequence[GateSettings]) -> list[list[Head]]:
    """Train variants of a router in one program, without calibrating or scoring them.

    Args:
        gate_table: routing table on which the heads are trained.
        lanes: settings that differ in `lr` and `seed` alone.

    Returns:
        for each lane its heads.

    Raises:
        ValueError: a setting out of its range, or a table that lacks what the kind of router needs.
    """
    plan = _Plan.of(gate_table, lanes[0])
    return _train(gate_table, [replace(plan, settings=own) for own in lanes])


def calibrate_heads(
    val_table: RoutingTable, settings: GateSettings, heads: Sequence[Float64[Tensor, "_choices _hidden"]]
) -> GateFit:
    """Calibrate and score a gate whose slimming heads were trained elsewhere, end to end.

    Args:
        val_table: routing table on which the router is calibrated and scored.
        settings: settings of the trial; its router must be one that trains end to end, as `gate`
            and `gates`.
        heads: float64 weights: [R, hidden] of the routing space for `gate`; one [choices, hidden]
            per gate for `gates`.

    Raises:
        NonFiniteLossError: a weight is NaN or infinite.
        ValueError: the kind of router cannot be trained end to end.
    """
    kind = settings.kind
    if not kind.trains_end_to_end:
        able = " or ".join(kind_names(lambda each: each.trains_end_to_end))
        raise ValueError(f"gate.router {kind.name} cannot be trained end to end; use {able}")
    plan = _Plan.of(val_table, settings)
    if not kind.is_tree:
        full = torch.zeros(len(plan.columns), heads[0].shape[1], dtype=torch.float64)
        full[plan.places] = heads[0].double()
        heads = [full]
    calibration = _CalibrationData(val_table, node_features(val_table, plan.problem))
    fit = _finish(calibration, plan, [Head(head.double()) for head in heads])
    if isinstance(fit, Exception):
        raise fit
    return fit


@dataclass(frozen=True)
class _Plan:
    """Routes, decisions and costs of a trial, fixed before it trains."""

    settings: GateSettings
    routes: tuple[int, ...]
    """The routing space; for a learned cascade the routes on which it may end, for a plain one its
    two routes."""
    problem: Problem
    decision: NDArray[np.int64]
    """[K]: MAdds of all decisions on the way to each route."""
    costs: Costs
    first: int | None
    """The route that a cascade runs first; None for other kinds."""
    columns: tuple[int, ...]
    """The routes that the training program holds: all routes of the table, of which a lane allows
    some; or the routing space alone where that is at most half of them and the router decides once.
    The latter is less work, but such a trial trains together only with those of the same routing
    space."""

    @classmethod
    def of(cls, table: RoutingTable, settings: GateSettings) -> _Plan:
        """Choose the first route of a cascade by the labels of `table`, and count the cost of
        decisions."""
        routes, first = routing_space(table, settings), None
        no_decision = np.zeros(table.num_routes, dtype=np.int64)
        kind = settings.kind
        if kind.max_runs > 1:
            target = costs_of(table, settings, routes, no_decision, None).target
            first, second = best_pair(table, routes, target)
            wider = tuple(route for route in routes if table.madds[route] > table.madds[first])
            routes = tuple(sorted((first, *wider))) if kind.is_trained else (first, second)
        columns = tuple(range(table.num_routes))
        if not kind.is_tree and 2 * len(routes) <= table.num_routes:
            columns = routes
        problem = problem_of(table, kind, first, len(columns))
        decision = _decision_madds(table, settings, problem, routes) if kind.is_trained else no_decision
        costs = costs_of(table, settings, routes, decision, first)
        return cls(settings, routes, problem, decision, costs, first, columns)

    @property
    def trains_with(self) -> tuple[object, ...]:
        """Trials with equal values train in one program."""
        own = self.settings
        hidden = own.hidden_units if own.kind.head == "perceptron" else None
        return own.router, self.first, self.columns, own.optimizer, own.steps, own.batch_size, hidden

    @property
    def places(self) -> list[int]:
        """Positions of the routing space's routes among the columns."""
        return [self.columns.index(route) for route in self.routes]

    def setup(self, table: RoutingTable) -> TrialSetup:
        """The trial as the trainer needs it; `table` is that of the `gate` split."""
        allowed = torch.zeros(len(self.columns), dtype=torch.bool)
        allowed[self.places] = True
        targets = sgs_targets(table, self.routes, self.settings, self.costs.madds)
        return TrialSetup(
            self.settings,
            allowed,
            torch.from_numpy(self.costs.madds[list(self.columns)] / self.costs.widest).float(),
            self.costs.target / self.costs.widest,
            torch.from_numpy(np.searchsorted(self.columns, targets)),
            self.costs.widest,
        )


def best_pair(table: RoutingTable, routes: Sequence[int], target: float) -> tuple[int, int]:
    """(first, second) of the confidence cascade with the most right answers on `table` at a mean
    cost of `target`, by its labels.

    Raises:
        ValueError: fewer than two routes of different cost.
    """
    by_cost = sorted(routes, key=lambda route: (table.madds[route], route))
    correct = np.ascontiguousarray(table.correct1.T)
    best, pair = -1, None
    for position, first in enumerate(by_cost):
        wider = [route for route in by_cost[position + 1 :] if table.madds[route] > table.madds[first]]
        if not wider:
            continue
        extra = (table.madds[wider] - table.trunk_madds).astype(np.float64)
        share = np.clip((target - table.madds[first]) / extra, 0.0, 1.0)
        if table.madds[first] > target and pair is not None:
            break  # the first route alone costs more than the target, and so do all that follow
        images = np.argsort(table.confidence[:, first], kind="stable")
        stays = correct[first].take(images)
        for second, count in zip(wider, np.rint(share * table.num_images).astype(int), strict=True):
            goes_on = correct[second].take(images[:count])
            right = int(np.count_nonzero(stays[count:]) + np.count_nonzero(goes_on))
            if right > best:
                best, pair = right, (first, second)
    if pair is None:
        raise ValueError(
            f"a cascade needs two routes of different cost, but gate.routing leaves {list(routes)}; widen it"
        )
    return pair


def _decision_madds(
    table: RoutingTable, settings: GateSettings, problem: Problem, routes: Sequence[int]
) -> NDArray[np.int64]:
    """[K] MAdds of all decisions on the way to each route."""
    madds = np.zeros(table.num_routes, dtype=np.int64)
    is_tree = settings.kind.is_tree
    for node in problem.nodes:
        num_choices = node.num_choices if is_tree else len(routes)
        cost = _head_madds(table, settings, problem, (node.gate, node.node), num_choices)
        passing = table.tree.gates[node.gate].routes_at(node.node) if is_tree else range(table.num_routes)
        madds[list(passing)] += cost
    return madds


def _head_madds(
    table: RoutingTable, settings: GateSettings, problem: Problem, place: tuple[int, int], num_choices: int
) -> int:
    columns = table.gates[place[0]].layouts[place[1]]
    if not problem.is_perceptron:
        return gate_madds(_length(columns["hidden"]), num_choices)
    pooling = 0
    if problem.first is not None:
        size = num_answer_features(table.num_classes) + sum(_length(columns[part]) for part in CASCADE_EVIDENCE)
    else:
        size = sum(map(_length, columns.values()))
        pooling = NUM_EXTRA_POOLINGS * table.gates[place[0]].pooling_madds[place[1]]
    return pooling + gate_madds(size, settings.hidden_units) + gate_madds(settings.hidden_units, num_choices)


def _length(span: tuple[int, int]) -> int:
    return span[1] - span[0]


def _fit_class(gate_table: RoutingTable, val_table: RoutingTable, plans: Sequence[_Plan]) -> list[GateFit | Exception]:
    """Train plans that train together, then finish each."""
    heads_of = _train(gate_table, plans)
    calibration = _CalibrationData(val_table, node_features(val_table, plans[0].problem))
    return [_finish(calibration, plan, heads) for plan, heads in zip(plans, heads_of, strict=True)]


def _train(gate_table: RoutingTable, plans: Sequence[_Plan]) -> list[list[Head]]:
    """Train plans that train together; returns for each its heads, for raw features."""
    problem = plans[0].problem
    features = node_features(gate_table, problem)
    scalings = _scalings(problem, features)
    scaled = [scalings[node.head].apply(own) for node, own in zip(problem.nodes, features, strict=True)]
    columns = list(plans[0].columns)
    correct = torch.from_numpy(gate_table.correct1[:, columns].astype(np.float32))
    data = CohortData(problem, scaled, torch.from_numpy(gate_table.ce[:, columns].copy()), correct)
    trained = train_cohort(data, [plan.setup(gate_table) for plan in plans])
    return [[_unscaled(head, scaling) for head, scaling in zip(heads, scalings, strict=True)] for heads in trained]


@dataclass(frozen=True)
class _CalibrationData:
    """Routing table and features on which the trials of one problem are calibrated and scored."""

    table: RoutingTable
    features: Sequence[Tensor]
    """Features of each node of the problem, [N, D]."""


def _scalings(problem: Problem, features: Sequence[Tensor]) -> list[Scaling]:
    """One scaling for each head, over all nodes that share the head."""
    shared: list[list[Tensor]] = [[] for _ in range(problem.num_heads)]
    for node, own in zip(problem.nodes, features, strict=True):
        shared[node.head].append(own)
    return [Scaling.of(torch.cat(parts), is_centred=problem.is_perceptron) for parts in shared]


def _unscaled(head: TrainedHead, scaling: Scaling) -> Head:
    """The equivalent head for raw features: the scaling is folded exactly into the first layer."""
    scale, mean = scaling.scale.double(), scaling.mean.double()
    if head.inner_weight is None or head.inner_bias is None:
        return Head(head.weight.double() / scale)
    inner = head.inner_weight.double() / scale
    bias = None if head.bias is None else head.bias.double()
    return Head(head.weight.double(), bias, inner, head.inner_bias.double() - inner @ mean)


def _finish(calibration: _CalibrationData, plan: _Plan, heads: Sequence[Head]) -> GateFit | Exception:
    """Calibrate on `val`, without its labels, and score."""
    if not all(bool(torch.isfinite(part).all()) for head in heads for part in head.tensors("").values()):
        own = plan.settings
        return NonFiniteLossError(
            f"the router's weights are not finite after training; lower gate.optimizer.lr (now {own.lr})"
        )
    is_tree = plan.settings.kind.is_tree
    router, beta, soft = (
        _calibrated_tree(calibration, plan, heads) if is_tree else _calibrated_flat(calibration, plan, heads[0])
    )
    val = calibration.table
    run = run_on_table(router, val)
    metrics = score_run(run, val) | _target_metrics(plan) | {"beta": beta}
    correct, cost = val.correct1[:, list(plan.routes)], plan.costs.madds[list(plan.routes)]
    metrics |= {"soft_top1": float((soft * correct).sum(1).mean()), "soft_madds_m": float((soft @ cost).mean() / 1e6)}
    return GateFit(router, metrics, run)


def _target_metrics(plan: _Plan) -> dict[str, float]:
    return {"target_madds_m": plan.costs.target / 1e6, "target_clamped": float(plan.costs.is_clamped)}


def _calibrated_flat(
    calibration: _CalibrationData, plan: _Plan, head: Head
) -> tuple[Router, float, NDArray[np.float64]]:
    """Calibrate a router that decides once.

    Returns:
        the router, its beta, and its softmax at the last temperature [N, R].
    """
    rows = plan.places
    own = Head(head.weight[rows], None if head.bias is None else head.bias[rows], head.inner_weight, head.inner_bias)
    logits = own(calibration.features[0])
    madds = plan.costs.madds[list(plan.routes)]
    beta = calibrate(logits.numpy(), madds, plan.costs.target)
    offset = torch.from_numpy(beta * madds / madds.max())
    soft = ((logits - offset) / plan.settings.temperature_end).softmax(1).numpy()
    return _flat_router(calibration.table, plan, own, offset), beta, soft


def _flat_router(val: RoutingTable, plan: _Plan, head: Head, offset: Tensor) -> Router:
    trained = CalibratedHead(
        head=head,
        offset=offset,
        routes=plan.routes,
        first=plan.first,
        num_classes=val.num_classes,
        pooling_madds=NUM_EXTRA_POOLINGS * val.gates[0].pooling_madds[0],
    )
    router: Router = plan.settings.kind.router_class.from_head(trained)
    return router


def _calibrated_tree(
    calibration: _CalibrationData, plan: _Plan, heads: Sequence[Head]
) -> tuple[Router, float, NDArray[np.float64]]:
    """Calibrate a router that decides at every gate.

    Returns:
        the router, its beta, and the probabilities of its paths at the last temperature [N, R].
    """
    logits = [heads[node.head](own).numpy() for node, own in zip(plan.problem.nodes, calibration.features, strict=True)]
    priced = PricedTree(plan.problem, plan.routes, plan.costs.madds, logits)
    beta = nearest_price(priced.mean_cost, plan.costs.target, priced.bound)
    router = priced.router(beta, calibration.table, heads)
    return router, beta, priced.softmax(beta, plan.settings.temperature_end)


def _fit_own(gate_table: RoutingTable, val_table: RoutingTable, settings: GateSettings) -> GateFit | Exception:
    """Run a trial of a kind of router with its own training function (`RouterKind.fit`)."""
    assert settings.kind.fit is not None
    try:
        check_choice(gate_table.routes)
        fit: GateFit = settings.kind.fit(gate_table, val_table, settings)
    except (ValueError, NonFiniteLossError) as error:
        return error
    return fit


def _fit_cascade(val: RoutingTable, plan: _Plan) -> GateFit:
    """Calibrate a plain cascade, whose pair of routes is already chosen: the threshold is set so
    that the mean cost on `val` meets the target."""
    first, second = plan.routes
    extra = float(val.madds[second] - val.trunk_madds)
    threshold = confidence_threshold(val.confidence[:, first], float(val.madds[first]), extra, plan.costs.target)
    router = CascadeRouter(first, second, threshold)
    run = run_on_table(router, val)
    return GateFit(router, score_run(run, val) | _target_metrics(plan), run)


def score_run(run: TableRun, table: RoutingTable) -> dict[str, float]:
    """Exact metrics of a routing: top1, top5, ce, madds_m, p95_madds_m, route_entropy and
    max_route_share (of the answering routes), and the metrics that plugins add."""
    rows = np.arange(table.num_images)
    share = run.histogram
    used = share[share > 0]
    return {
        "top1": float(table.correct1[rows, run.routes].mean()),
        "top5": float(table.correct5[rows, run.routes].mean()),
        "ce": float(table.ce[rows, run.routes].mean()),
        "madds_m": float(run.madds.mean() / 1e6),
        "p95_madds_m": float(np.percentile(run.madds, 95) / 1e6),
        "route_entropy": float(-(used * np.log(used)).sum()) + 0.0,
        "max_route_share": float(share.max()),
        **added_values(run, table),
    }
