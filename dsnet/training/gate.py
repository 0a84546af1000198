"""Stage II on the routing table: training a gate by its exact expected loss, calibrating it to a target, scoring its deployed routes.

With one gate on a frozen supernet every term of the Stage II loss is a sum over routes of stored constants times softmax
probabilities (METHODS 5): no Gumbel noise, no masks, no forward pass of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dsnet.cost import gate_madds
from dsnet.errors import NonFiniteLossError
from dsnet.losses import complexity
from dsnet.routers import GateRouter
from dsnet.routing_table import RoutingTable

COLLAPSE_SHARE = 0.99
"""A gate that sends a larger share of the images down one route is flagged as collapsed."""


@dataclass(frozen=True, kw_only=True)
class GateSettings:
    """One gate's hyperparameters."""

    target: float = 0.5
    """t in [0, 1]: MAdds_min + t (MAdds_max - MAdds_min) over the whole SubnetSet (the user's "target FLOPs")."""
    routes: tuple[int, ...] = ()
    """The routing space: increasing ids of the SubnetSet; empty takes all."""
    t_easy: float = 0.0
    """SGS: an image is easy iff the smallest route is right with p(y) >= t_easy; 0 is the paper's rule."""
    t_hard: float = 0.0
    """SGS: an image is hard iff the largest route is wrong or has p(y) < t_hard."""
    strategy: str = "try_best"
    """Hard images go to the largest (`try_best`) or the smallest (`give_up`) route."""
    sgs_target: str = "extremes"
    """`extremes` as published, or `cheapest`: the cheapest right route (ours)."""
    lambda_cls: float = 1.0
    lambda_sgs: float = 1.0
    lambda_complexity: float = 0.5
    complexity_form: str = "hinge"
    optimizer: str = "adam"
    """`adam` or `sgd` (Nesterov momentum 0.9)."""
    lr: float = 0.05
    weight_decay: float = 0.0
    steps: int = 200
    batch_size: int = 512
    temperature_start: float = 1.0
    temperature_end: float = 0.3
    """The softmax temperature falls geometrically, so that its expectation approaches the deployed argmax."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.strategy not in ("try_best", "give_up"):
            raise ValueError(f"unknown gate.sgs.strategy {self.strategy!r}; known: try_best, give_up")
        if self.sgs_target not in ("extremes", "cheapest"):
            raise ValueError(f"unknown gate.sgs.target {self.sgs_target!r}; known: extremes, cheapest")
        if not 0.0 <= self.target <= 1.0:
            raise ValueError(f"gate.target is {self.target}, but must lie in 0..1")
        if min(self.temperature_start, self.temperature_end) <= 0:
            raise ValueError("gate.temperature must be above 0 at its start and its end")


@dataclass(frozen=True)
class RouteCosts:
    """MAdds of every route of a routing space, the decision included, and the target in the same unit."""

    madds: NDArray[np.float64]
    """[R]"""
    decision: int
    target: float
    """Clamped into the routing space's range."""
    is_clamped: bool
    widest: float
    """MAdds of the costliest member of the whole set."""


def route_costs(table: RoutingTable, settings: GateSettings) -> RouteCosts:
    """What each route of the gate's routing space costs an image, and the gate's target (CONTRACTS, Target)."""
    routes = routing_space(table, settings)
    decision = gate_madds(table.part("hidden").shape[1], len(routes))
    madds = table.madds[list(routes)].astype(np.float64) + decision
    low, high = float(table.madds.min()), float(table.madds.max())
    wanted = low + settings.target * (high - low)
    target = min(max(wanted, float(madds.min())), float(madds.max()))
    return RouteCosts(madds, decision, target, target != wanted, high)


def routing_space(table: RoutingTable, settings: GateSettings) -> tuple[int, ...]:
    """The gate's routes: as set, or all.

    Raises:
        ValueError: an id that the table does not hold, or not increasing ids.
    """
    routes = settings.routes or tuple(range(table.num_routes))
    if list(routes) != sorted(set(routes)) or not 0 <= routes[0] <= routes[-1] < table.num_routes:
        raise ValueError(f"the routing space {routes} must be increasing ids in 0..{table.num_routes - 1}")
    return routes


def sgs_targets(table: RoutingTable, routes: Sequence[int], settings: GateSettings) -> NDArray[np.int64]:
    """[N] the column of the routing space that sandwich gate sparsification asks for (precedence easy > hard > dependent).

    Smallest and largest are the routing space's cheapest and costliest route; `cheapest` falls back to the strategy where no route is
    right.
    """
    order = np.argsort(table.madds[list(routes)], kind="stable")
    correct = table.correct1[:, list(routes)]
    probability = np.exp(-table.ce[:, list(routes)])
    small, large = int(order[0]), int(order[-1])
    given_up = large if settings.strategy == "try_best" else small
    if settings.sgs_target == "cheapest":
        first = order[np.argmax(correct[:, order], axis=1)]
        return np.where(correct.any(1), first, given_up).astype(np.int64)
    easy = correct[:, small] & (probability[:, small] >= settings.t_easy)
    hard = ~correct[:, large] | (probability[:, large] < settings.t_hard)
    return np.where(easy, small, np.where(hard, given_up, large)).astype(np.int64)


@dataclass(frozen=True)
class GateData:
    """A table's columns of one routing space, as tensors."""

    hidden: Tensor
    """[N, H] scaled to unit root mean square."""
    ce: Tensor
    """[N, R]"""
    targets: Tensor
    """int64 [N]"""
    madds: Tensor
    """[R] relative to the set's widest."""
    scale: Tensor
    """[H] what `hidden` was divided by."""


def gate_data(table: RoutingTable, settings: GateSettings, costs: RouteCosts) -> GateData:
    """Prepare the gate split; scaling the evidence is ours and folds exactly into the bias-free head."""
    routes = list(routing_space(table, settings))
    hidden = torch.from_numpy(table.part("hidden").copy())
    scale = hidden.pow(2).mean(0).sqrt().clamp_min(1e-6)
    return GateData(
        hidden / scale,
        torch.from_numpy(table.ce[:, routes].copy()),
        torch.from_numpy(sgs_targets(table, routes, settings)),
        torch.from_numpy(costs.madds / costs.widest).float(),
        scale,
    )


def expected_loss(
    logits: Tensor, data: GateData, rows: Tensor, settings: GateSettings, costs: RouteCosts, temperature: float
) -> Tensor:
    """The exact expected Stage II loss of a batch (scalar): lambda_cls E[CE] + lambda_sgs SGS + lambda_complexity C(E[MAdds])."""
    p = (logits / temperature).softmax(1)
    cls = (p * data.ce[rows]).sum(1).mean()
    sgs = F.cross_entropy(logits, data.targets[rows])
    expected_madds = (p @ data.madds).mean() * costs.widest
    cost = complexity(expected_madds, costs.target, costs.widest, settings.complexity_form)
    return settings.lambda_cls * cls + settings.lambda_sgs * sgs + settings.lambda_complexity * cost


def train_gate(table: RoutingTable, settings: GateSettings) -> Tensor:
    """Train a slimming head on the `gate` split's table.

    Returns:
        float64 [R, hidden]: its weight, for raw hidden vectors.

    Raises:
        NonFiniteLossError: the loss became NaN or infinite.
        ValueError: a setting out of its range.
    """
    costs = route_costs(table, settings)
    data = gate_data(table, settings, costs)
    weight = torch.zeros(len(costs.madds), data.hidden.shape[1], requires_grad=True)
    optimizer = _optimizer(weight, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    batch_size = min(settings.batch_size, table.num_images)
    for step in range(settings.steps):
        rows = torch.randperm(table.num_images, generator=generator)[:batch_size]
        ratio = step / max(1, settings.steps - 1)
        temperature = settings.temperature_start * (settings.temperature_end / settings.temperature_start) ** ratio
        optimizer.zero_grad()
        loss = expected_loss(data.hidden[rows] @ weight.T, data, rows, settings, costs, temperature)
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"the gate's loss is {loss.item()} at step {step}; lower gate.optimizer.lr (now {settings.lr})"
            )
        loss.backward()
        optimizer.step()
    if not torch.isfinite(weight).all():
        raise NonFiniteLossError(
            f"the gate's weights are not finite after training; lower gate.optimizer.lr (now {settings.lr})"
        )
    return weight.detach().double() / data.scale.double()


def _optimizer(weight: Tensor, settings: GateSettings) -> torch.optim.Optimizer:
    match settings.optimizer:
        case "adam":
            return torch.optim.Adam([weight], lr=settings.lr, weight_decay=settings.weight_decay)
        case "sgd":
            return torch.optim.SGD(
                [weight], lr=settings.lr, momentum=0.9, nesterov=True, weight_decay=settings.weight_decay
            )
    raise ValueError(f"unknown gate optimizer {settings.optimizer!r}; known: adam, sgd")


def calibrate(scores: NDArray[np.float64], madds: NDArray[np.float64], target: float) -> float:
    """The beta for which routes argmax_k(l_k - beta * cost_k) have a mean cost nearest to `target`; needs no labels.

    The mean cost falls with beta in steps; the middle of the nearest step is returned, away from its ties.

    Args:
        scores: [N, R] gate logits.
        madds: [R] cost of each route; beta is in logits per cost of the widest of them.
        target: wanted mean, in the unit of `madds`.
    """
    cost = madds / madds.max()
    wanted = target / madds.max()

    def mean_cost(beta: float) -> float:
        return float(cost[np.argmax(scores - beta * cost, axis=1)].mean())

    if len(cost) == 1:
        return 0.0
    spread = float(scores.max() - scores.min()) + 1.0
    gap = float(np.diff(np.unique(cost)).min(initial=1.0))
    bound = 2.0 * spread / gap
    above, below = _bisect(mean_cost, -bound, bound, wanted)
    nearest = min((above, below), key=lambda beta: abs(mean_cost(beta) - wanted))
    left, right = _step_around(mean_cost, nearest, bound)
    if right - left <= 4e-12 * bound:
        # A step of no width is a tie of scores that rounding decides, not a choice: the nearer of its neighbours is taken.
        neighbours = (left - 1e-11 * bound, right + 1e-11 * bound)
        nearest = min(neighbours, key=lambda beta: abs(mean_cost(beta) - wanted))
        left, right = _step_around(mean_cost, nearest, bound)
    return 0.5 * (left + right)


def _step_around(falling: Callable[[float], float], inside: float, bound: float) -> tuple[float, float]:
    """The ends of the step of a falling step function that holds `inside`, within -bound..bound."""
    level = falling(inside)
    left = -bound if falling(-bound) <= level else _bisect(falling, -bound, inside, np.nextafter(level, np.inf))[1]
    right = bound if falling(bound) >= level else _bisect(falling, inside, bound, np.nextafter(level, -np.inf))[0]
    return left, right


def _bisect(falling: Callable[[float], float], low: float, high: float, level: float) -> tuple[float, float]:
    """(a, b), adjacent up to 1e-12 of the bracket, with falling(a) >= level >= falling(b) wherever the bracket allows it."""
    tolerance = 1e-12 * max(abs(low), abs(high), 1.0)
    while high - low > tolerance:
        middle = 0.5 * (low + high)
        if falling(middle) >= level:
            low = middle
        else:
            high = middle
    return low, high


@dataclass(frozen=True)
class GateResult:
    """A trained and calibrated gate and what it scores on the calibration split."""

    router: GateRouter
    metrics: dict[str, float]
    histogram: NDArray[np.float64]
    """[K] share of the images of the split by route of the whole SubnetSet."""


def calibrated_router(weight: Tensor, table: RoutingTable, settings: GateSettings) -> tuple[GateRouter, float]:
    """The deployed router, its offsets calibrated on `table` (the `val` split), and beta."""
    costs = route_costs(table, settings)
    hidden = torch.from_numpy(table.part("hidden").copy())
    scores = (hidden.double() @ weight.T).numpy()
    beta = calibrate(scores, costs.madds, costs.target)
    offset = torch.from_numpy(beta * costs.madds / costs.madds.max())
    return GateRouter(weight, offset, routing_space(table, settings)), beta


def choose_routes(router: GateRouter, table: RoutingTable) -> NDArray[np.int64]:
    """[N] the route each image of a table takes, by the same code that decides in dynamic inference."""
    hidden = torch.from_numpy(table.part("hidden").copy())
    return router.step({"hidden": hidden}, ()).numpy()


def score_routes(routes: NDArray[np.int64], table: RoutingTable, decision_madds: int) -> dict[str, float]:
    """Metrics of a routing decision [N], exact: top1, top5, ce, madds_m, p95_madds_m, route_entropy, max_route_share."""
    rows = np.arange(table.num_images)
    madds = (table.madds[routes] + decision_madds) / 1e6
    share = np.bincount(routes, minlength=table.num_routes) / table.num_images
    used = share[share > 0]
    return {
        "top1": float(table.correct1[rows, routes].mean()),
        "top5": float(table.correct5[rows, routes].mean()),
        "ce": float(table.ce[rows, routes].mean()),
        "madds_m": float(madds.mean()),
        "p95_madds_m": float(np.percentile(madds, 95)),
        "route_entropy": float(-(used * np.log(used)).sum()) + 0.0,
        "max_route_share": float(share.max()),
    }


def fit_gate(gate_table: RoutingTable, val_table: RoutingTable, settings: GateSettings) -> GateResult:
    """A whole gate trial: train on `gate`, calibrate and score on `val`.

    Beside the deployed argmax's metrics it reports the softmax expectation (`soft_top1`, `soft_madds_m`): the soft-hard gap.

    Raises:
        NonFiniteLossError, ValueError: as `train_gate`.
    """
    weight = train_gate(gate_table, settings)
    costs = route_costs(val_table, settings)
    router, beta = calibrated_router(weight, val_table, settings)
    routes = choose_routes(router, val_table)
    metrics = score_routes(routes, val_table, costs.decision)
    hidden = torch.from_numpy(val_table.part("hidden").copy())
    soft = (router.scores(hidden) / settings.temperature_end).softmax(1).numpy()
    correct = val_table.correct1[:, list(router.routes)]
    metrics |= {
        "soft_top1": float((soft * correct).sum(1).mean()),
        "soft_madds_m": float((soft @ costs.madds).mean() / 1e6),
        "beta": beta,
        "target_madds_m": costs.target / 1e6,
        "target_clamped": float(costs.is_clamped),
    }
    histogram = np.bincount(routes, minlength=val_table.num_routes) / val_table.num_images
    return GateResult(router, metrics, histogram)
