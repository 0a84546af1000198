"""The reachable ceiling: the best router that we find if it may read the answers of *all* routes
and its own cost is not counted.

The oracle knows the labels and so also profits from chance; no router can reach it. The ceiling
instead reads the logits of every route, which no router that saves compute can, but has to learn
from `gate` which route will be right. It estimates how much routing on this supernet can gain.

A small model predicts for every route the probability of being right, and an image takes
argmax_k(p_k - beta * cost_k). The model is cross-fitted: its size and training length are chosen by
its accuracy over all budgets on images that it was not trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dsnet.routing.routing_table import RoutingTable
from search.front.controls import StaticLine

Floats = NDArray[np.float64]

NUM_FOLDS: Final = 5
CHECKPOINTS: Final = (25, 75, 200)
"""Training lengths to choose from, in steps."""
BATCH_SIZE: Final = 512
LEARNING_RATE: Final = 0.01
MAX_LOGITS: Final = 1024
"""Largest number of logits (routes times classes) from which the components are computed; if there
are more, only the logits of some routes are read."""
NUM_BUDGETS: Final = 40
TINY: Final = 1e-4


class Shape(NamedTuple):
    """Size and regularisation of one candidate for the model."""

    num_components: int
    """Number of principal components of all features of an image; the score of each route also
    reads the route's own features."""
    num_hidden: int
    """Number of hidden units between the components and the scores; 0 = linear."""
    weight_decay: float


SHAPES: Final = (Shape(0, 0, 0.0), Shape(24, 0, 0.01), Shape(24, 24, 0.1), Shape(96, 32, 0.1))


@dataclass(frozen=True)
class CeilingCurve:
    """Cost and top-1 of the ceiling on one split; between two points, images are assigned to either
    at random, as on the static line."""

    madds: Floats
    """[V] mean MAdds, increasing."""
    top1: Floats
    """[V] top-1 as fractions."""

    def at(self, budget: ArrayLike) -> Floats:
        """Top-1 at mean-MAdds budgets of any shape; NaN below the cheapest route."""
        wanted = np.asarray(budget, dtype=np.float64)
        return np.where(wanted >= self.madds[0], np.interp(wanted, self.madds, self.top1), np.nan)


@dataclass(frozen=True)
class RouteForecast:
    """The fitted model, which predicts the probability that each route is right."""

    shape: Shape
    num_steps: int
    _features: _Features
    _weights: _Weights

    @classmethod
    def fit(cls, gate: RoutingTable, seed: int = 0) -> RouteForecast:
        """Train on the table of `gate`, on one thread; equal arguments give equal forecasts.

        Args:
            gate: table of `NUM_FOLDS` images or more.
            seed: seed of the folds, the initial weights and the batches.
        """
        if gate.num_images < NUM_FOLDS:
            raise ValueError(
                f"The {gate.split} table holds {gate.num_images} images, but must hold at least {NUM_FOLDS}."
            )
        with _one_thread():
            features = _Features.fit(gate)
            own, components = features.of(gate)
            right = torch.from_numpy(gate.correct1).float()
            fold_of = torch.randperm(gate.num_images, generator=_generator(seed)) % NUM_FOLDS
            best: tuple[float, Shape, int, _Weights] | None = None
            for shape in SHAPES:
                for num_steps, weights in _trained(shape, own, components, right, fold_of, seed):
                    unseen = weights.scores(own, components)[fold_of, torch.arange(len(right))]
                    score = _mean_over_budgets(unseen.sigmoid().double().numpy(), gate)
                    if best is None or score > best[0]:
                        best = (score, shape, num_steps, weights)
        assert best is not None
        return cls(best[1], best[2], features, best[3])

    def probabilities(self, table: RoutingTable) -> Floats:
        """Probabilities [N, K] that each route is right: the mean over the models of the folds."""
        with _one_thread():
            own, components = self._features.of(table)
            return self._weights.scores(own, components).sigmoid().mean(0).double().numpy()

    def curve(self, val: RoutingTable, reported: RoutingTable) -> CeilingCurve:
        """The ceiling on a split.

        Operating points are calibrated to budgets on `val`; like the vertices of the static line,
        those that are kept form the upper concave envelope on `val`. The static sub-networks are
        among the candidates, because a router may also use one route for all images.

        Args:
            val: table on which operating points are chosen.
            reported: table of the split of the numbers.
        """
        on_val = RoutingPath.of(self.probabilities(val), val.madds)
        betas = on_val.betas_at(np.linspace(val.madds.min(), val.madds.max(), NUM_BUDGETS))
        val_madds, val_top1 = on_val.run(betas, val.correct1)
        kept = StaticLine.through(np.r_[val.madds, val_madds], np.r_[val.top1(), val_top1]).vertices
        on_reported = RoutingPath.of(self.probabilities(reported), reported.madds)
        madds, top1 = on_reported.run(betas, reported.correct1)
        costs, accuracies = np.r_[reported.madds, madds][list(kept)], np.r_[reported.top1(), top1][list(kept)]
        order = np.argsort(costs, kind="stable")  # points that are close on `val` may have another order here
        return CeilingCurve(costs[order], accuracies[order])


@dataclass(frozen=True)
class RoutingPath:
    """The moves of the images of a split from route to route, as beta in argmax_k(p_k - beta *
    cost_k) falls to 0.

    At a large beta every image takes the cheapest route. It leaves a route for a costlier one when
    beta falls below the gain per additional cost; images move one after another, so that every mean
    cost is found exactly, without a search.
    """

    start: int
    """The cheapest route."""
    costs: Floats
    """[K] cost of each route."""
    slope: Floats
    """[M] beta of each move, decreasing; above 0."""
    image: NDArray[np.intp]
    """[M] the image that moves."""
    before: NDArray[np.intp]
    """[M] the route that the image leaves."""
    after: NDArray[np.intp]
    """[M] the route that the image takes."""
    num_images: int

    @classmethod
    def of(cls, scores: Floats, madds: ArrayLike) -> RoutingPath:
        """Compute all moves.

        Args:
            scores: [N, K] score of each route for each image.
            madds: [K] cost of each route.
        """
        costs = np.asarray(madds, dtype=np.float64)
        rows = np.arange(len(scores))
        start = int(np.argmin(costs))
        route = np.full(len(scores), start)
        moves: list[tuple[Floats, NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]] = []
        while len(rows):
            gain = scores[rows] - scores[rows, route[rows]][:, None]
            price = costs - costs[route[rows]][:, None]
            slope = np.where(price > 0, gain / np.where(price > 0, price, 1.0), -np.inf)
            # Of equal slopes the costliest route: the others lie on the way to it.
            after = len(costs) - 1 - np.argmax(slope[:, ::-1], axis=1)
            best = slope[np.arange(len(rows)), after]
            is_moving = best > 0
            rows, after, best = rows[is_moving], after[is_moving], best[is_moving]
            moves.append((best, rows, route[rows], after))
            route[rows] = after
        slope, image, before, after = (np.concatenate(parts) for parts in zip(*moves, strict=True))
        order = np.argsort(-slope, kind="stable")
        return cls(start, costs, slope[order], image[order], before[order], after[order], len(scores))

    def curve(self, correct: NDArray[np.bool_]) -> tuple[Floats, Floats]:
        """(mean MAdds, top-1), [M + 1] each: before the first move, and after every move."""
        paid = np.cumsum(self.costs[self.after] - self.costs[self.before]) / self.num_images
        won = (
            np.cumsum(correct[self.image, self.after].astype(int) - correct[self.image, self.before]) / self.num_images
        )
        return np.r_[0.0, paid] + self.costs[self.start], np.r_[0.0, won] + correct[:, self.start].mean()

    def betas_at(self, madds: Floats) -> Floats:
        """The smallest beta, up to the spacing of moves, at which the mean cost is at most each of
        these mean MAdds; no labels are needed."""
        paid = np.r_[0.0, np.cumsum(self.costs[self.after] - self.costs[self.before])] / self.num_images
        num_moves = np.searchsorted(paid + self.costs[self.start], madds * (1 + 1e-12), side="right") - 1
        ends = np.r_[np.inf, self.slope, 0.0]
        # Halfway between the last move that is made and the first that is not.
        last, following = ends[num_moves], ends[num_moves + 1]
        prices: NDArray[np.float64] = np.where(np.isinf(last), 2 * following + 1.0, (last + following) / 2)
        return prices

    def run(self, betas: Floats, correct: NDArray[np.bool_]) -> tuple[Floats, Floats]:
        """(mean MAdds, top-1) of the images at given betas."""
        num_moves = np.searchsorted(-self.slope, -betas, side="left")
        madds, top1 = self.curve(correct)
        return madds[num_moves], top1[num_moves]


def _mean_over_budgets(probabilities: Floats, table: RoutingTable) -> float:
    """Mean top-1 over equally spaced budgets, which is the area above any fixed line up to a
    constant."""
    madds, top1 = RoutingPath.of(probabilities, table.madds).curve(table.correct1)
    return float(np.interp(np.linspace(table.madds.min(), table.madds.max(), NUM_BUDGETS), madds, top1).mean())


@dataclass(frozen=True)
class _Features:
    """Scaling of the inputs of the model: own features of every route, and principal components of
    the features and logits of all routes together."""

    logit_routes: tuple[int, ...]
    """The routes whose logits are read; none if the table stores only the largest logits."""
    own_mean: Tensor
    own_scale: Tensor
    all_mean: Tensor
    all_scale: Tensor
    basis: Tensor
    """[D, C] projection to components of unit variance."""

    @classmethod
    def fit(cls, table: RoutingTable) -> _Features:
        """Compute means, scales and components on a table, without its labels."""
        num_routes, num_classes = table.logits.shape[1:]
        num_read = 0 if table.logit_classes.shape[2] else max(1, min(num_routes, MAX_LOGITS // num_classes))
        logit_routes = tuple(np.unique(np.linspace(0, num_routes - 1, num_read).round().astype(int)).tolist())
        own = own_features(table)
        raw = _all_features(table, own, logit_routes)
        all_mean, all_scale = _moments(raw)
        centred = (raw - all_mean) / all_scale
        values, vectors = torch.linalg.eigh((centred.T @ centred / len(centred)).double())
        kept = values.flip(0)[: max(shape.num_components for shape in SHAPES)]
        kept = kept[kept > 1e-6 * kept[0]]
        basis = (vectors.flip(1)[:, : len(kept)] / kept.sqrt()).float()
        return cls(logit_routes, *_moments(own), all_mean, all_scale, basis)

    def of(self, table: RoutingTable) -> tuple[Tensor, Tensor]:
        """(own features [N, K, F], components [N, C]) of a table, float32."""
        own = own_features(table)
        everything = (_all_features(table, own, self.logit_routes) - self.all_mean) / self.all_scale
        return (own - self.own_mean) / self.own_scale, everything @ self.basis


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over images; the deviation of a constant feature is set to 1."""
    scale = values.std(0, correction=0)
    return values.mean(0), torch.where(scale > 1e-6, scale, 1.0)


def own_features(table: RoutingTable) -> Tensor:
    """Features of every route: confidence as log-odds, margin, entropy, agreement, consensus, and
    the consensus on the best other answer.

    *Agreement* is the share of routes with the same answer, *consensus* the mean over routes of the
    probability of that answer, as log-odds. All of them can be computed if a table stores only the
    largest logits.

    Returns:
        float32 [N, K, 6].
    """
    consensus = _mean_probability(table)
    rows = np.arange(table.num_images)[:, None]
    mine = consensus[rows, table.predicted]
    agreement = (table.predicted[:, :, None] == table.predicted[:, None, :]).mean(2)
    largest = np.partition(consensus, -2, axis=1)[:, -2:]
    rival = np.where(mine >= largest[:, 1:], largest[:, :1], largest[:, 1:])
    columns = [_log_odds(table.confidence), table.margin, table.entropy, agreement, _log_odds(mine), _log_odds(rival)]
    return torch.from_numpy(np.stack(columns, axis=2).astype(np.float32))


def _mean_probability(table: RoutingTable) -> NDArray[np.float32]:
    """[N, classes] mean probabilities over all routes; classes that are not among the stored logits
    count as 0."""
    logits = table.logits.astype(np.float32)
    # The largest logit and its probability are always stored; they give the scale of the others.
    probability: NDArray[np.float32] = np.exp(logits - logits.max(2, keepdims=True)) * table.confidence[:, :, None]
    if table.logit_classes.shape[2] == 0:
        mean: NDArray[np.float32] = probability.mean(1)
        return mean
    dense = np.zeros((table.num_images, table.num_classes), dtype=np.float32)
    rows = np.arange(table.num_images)[:, None]
    for route in range(table.num_routes):
        dense[rows, table.logit_classes[:, route]] += probability[:, route] / table.num_routes
    return dense


def _log_odds(share: NDArray[np.floating]) -> NDArray[np.floating]:
    clipped = np.clip(share, TINY, 1 - TINY)
    odds: NDArray[np.floating] = np.log(clipped / (1 - clipped))
    return odds


def _all_features(table: RoutingTable, own: Tensor, logit_routes: tuple[int, ...]) -> Tensor:
    """[N, D] own features of all routes, and centred logits of some of them."""
    logits = torch.from_numpy(table.logits[:, list(logit_routes)].astype(np.float32))
    return torch.cat([own.flatten(1), (logits - logits.mean(2, keepdim=True)).flatten(1)], dim=1)


@dataclass(frozen=True)
class _Weights:
    """Weights of the models of all folds, stacked."""

    own: Tensor
    """[folds, K, F]"""
    bias: Tensor
    """[folds, K]"""
    layers: tuple[Tensor, ...]
    """[folds, components, K], or [folds, components, hidden] and [folds, hidden, K]."""

    @classmethod
    def initial(cls, shape: Shape, own: Tensor, num_components: int, right: Tensor, seed: int) -> _Weights:
        """Initial weights, with which the score of each route is its accuracy for all images."""
        num_routes, num_features = own.shape[1:]
        sizes = [num_components, shape.num_hidden, num_routes] if shape.num_hidden else [num_components, num_routes]
        generator = _generator(seed + 1)
        layers = [
            torch.randn((NUM_FOLDS, ins, outs), generator=generator) / max(ins, 1) ** 0.5
            for ins, outs in pairwise(sizes)
        ]
        layers[-1].zero_()
        bias = right.mean(0).clamp(TINY, 1 - TINY).logit().expand(NUM_FOLDS, -1).clone()
        return cls(torch.zeros(NUM_FOLDS, num_routes, num_features), bias, tuple(layers))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.own, self.bias, *self.layers)

    def frozen(self) -> _Weights:
        """A detached copy, which does not change with further training."""
        own, bias, *layers = (tensor.detach().clone() for tensor in self.tensors)
        return _Weights(own, bias, tuple(layers))

    def scores(self, own: Tensor, components: Tensor) -> Tensor:
        """Logits [folds, N, K] from features [N, K, F] and components [N, C] that all folds share,
        or [folds, N, K, F] and [folds, N, C] for each fold."""
        hidden = components[..., : self.layers[0].shape[1]].expand(NUM_FOLDS, -1, -1)
        for layer in self.layers[:-1]:
            hidden = torch.bmm(hidden, layer).relu()
        direct = (own * self.own[:, None]).sum(-1)
        return torch.baddbmm(direct + self.bias[:, None], hidden, self.layers[-1])


def _trained(
    shape: Shape, own: Tensor, components: Tensor, right: Tensor, fold_of: Tensor, seed: int
) -> Iterator[tuple[int, _Weights]]:
    """Train the model of each fold on the images of the other folds; yields (steps, weights) at
    each of `CHECKPOINTS`."""
    num_components = min(shape.num_components, components.shape[1])
    weights = _Weights.initial(shape, own, num_components, right, seed)
    components = components[:, :num_components].contiguous()
    train_rows = [torch.nonzero(fold_of != fold)[:, 0] for fold in range(NUM_FOLDS)]
    size = min(BATCH_SIZE, *(len(rows) for rows in train_rows))
    generator = _generator(seed + 2)
    for tensor in weights.tensors:
        tensor.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights.tensors, lr=LEARNING_RATE, weight_decay=shape.weight_decay)
    for step in range(1, CHECKPOINTS[-1] + 1):
        rows = torch.stack(
            [own_rows[torch.randint(len(own_rows), (size,), generator=generator)] for own_rows in train_rows]
        )
        scores = weights.scores(own[rows], components[rows])
        loss = F.binary_cross_entropy_with_logits(scores, right[rows], reduction="sum") / (size * right.shape[1])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step in CHECKPOINTS:
            yield step, weights.frozen()


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Context in which torch uses one thread, so that sums have one order and the forecast does not
    depend on the number of cores."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
