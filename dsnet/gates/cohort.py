"""Training a cohort of routers in one program, by the exact expected Stage II loss of each.

The loss is defined in docs/methods.md, section 5.

On a routing table every term of the loss is a sum over routes of stored constants times softmax
probabilities: no Gumbel noise, no masks, no forward pass of the network. The gradient with respect
to a decision's logits has a closed form, so there is no autograd either: for q = softmax(l / tau)
and V = the expected loss from a decision on,

    dV/dl_c = reach * q_c * (V_c - V) / tau,

where V_c is the expected loss after choice c and reach the probability of getting to the decision.
Each trial is a *lane*, an index of the first dimension of every tensor. All lanes see the same
images in the same order, so that two trials differ only by their settings (ours). Lanes are
computed independently, so that a trial's result is bit-identical alone and in any cohort: the
matrix products of the lanes are batched and not fused into one, because a library's result for a
row may depend on the number of rows. That a product does not depend on the others of its batch must
hold in the library: `dsnet.arithmetic` sets MKL's mode for it, and every worker of a search checks
it (`search.gate_check`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from dsnet.gates.losses import PAPER_UNIT, PAPER_WIDEST
from dsnet.gates.problem import Node, Problem
from dsnet.gates.settings import GateSettings

LANES = 8
"""Largest number of trials in one program: more do not fit into the cache, fewer do not use the
processor fully."""
MIN_LANES = 2
"""Smallest number of trials in one program. A single trial is trained twice, side by side, because
a batch of one product takes another code path, whose sums differ in the last bits."""
ORDER_SEED = 0
"""Seed of the order of the images, the same for every trial."""
TINY = 1e-20
"""Probabilities below this are set to 0: their gradients are negligible, and arithmetic on denormal
numbers is slow."""
MOMENTUM = 0.9
ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-8


@dataclass(frozen=True)
class TrialSetup:
    """Settings and routing space of one trial; costs are relative to the widest route of the
    set."""

    settings: GateSettings
    allowed: Bool[Tensor, " routes"]
    """bool [K]: the routing space."""
    madds: Float[Tensor, " routes"]
    """[K]: relative cost of each route."""
    target: float
    """Target cost, relative."""
    targets: Int64[Tensor, " images"]
    """int64 [N]: the target route of each image for SGS (sandwich gate sparsification)."""
    widest_madds: float
    """MAdds of the widest route, the unit of the relative costs."""


@dataclass(frozen=True)
class CohortData:
    """Decisions, features and stored results of the routes, shared by all lanes of a cohort."""

    problem: Problem
    features: Sequence[Float[Tensor, "images _features"]]
    """Scaled features of each node, [N, D]."""
    ce: Float[Tensor, "images routes"]
    """[N, K]: cross-entropy of each route on each image."""
    correct: Float[Tensor, "images routes"]
    """float [N, K]: 1 where a route's prediction is correct, else 0."""

    @property
    def num_images(self) -> int:
        """Number of images, N."""
        return len(self.ce)


@dataclass(frozen=True)
class TrainedHead:
    """A trained head of one lane, for scaled features."""

    weight: Float[Tensor, "choices inputs"]
    bias: Float[Tensor, " choices"] | None = None
    inner_weight: Float[Tensor, "inputs features"] | None = None
    inner_bias: Float[Tensor, " inputs"] | None = None


def train_cohort(data: CohortData, lanes: Sequence[TrialSetup]) -> list[list[TrainedHead]]:
    """Train the heads of every lane; lanes share optimiser, steps, batch size and hidden units.

    Returns:
        for each lane its heads, in the order of the problem; their weights are not finite where
            training diverged.
    """
    trained: list[list[TrainedHead]] = []
    for start in range(0, len(lanes), LANES):
        own = list(lanes[start : start + LANES])
        padded = own + own[:1] * (MIN_LANES - len(own))
        trained += _Program(data, padded).run()[: len(own)]
    return trained


class _LinearHead:
    """The published slimming head: one layer without bias per lane, initialised to zero."""

    def __init__(self, num_features: int, num_choices: int, lanes: Sequence[TrialSetup]) -> None:
        self.parameters = [torch.zeros(len(lanes), num_choices, num_features)]
        self.gradients = [torch.zeros_like(self.parameters[0])]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map features [B, D] to logits [T, C, B]; the second result is `x`, which `backward` does
        not need."""
        (weight,) = self.parameters
        return torch.bmm(weight, x.T.expand(len(weight), -1, -1)), x

    def backward(self, x: Tensor, memory: Tensor, gradient: Tensor) -> None:
        """Add the parameters' gradients, from that of the logits [T, C, B]."""
        self.gradients[0].baddbmm_(gradient, x.expand(len(gradient), -1, -1))

    def trained(self, lane: int) -> TrainedHead:
        return TrainedHead(self.parameters[0][lane].clone())


class _PerceptronHead:
    """A perceptron of two layers per lane; the first is initialised at random and the second to
    zero, so that all choices are equally likely at first."""

    def __init__(self, num_features: int, num_choices: int, lanes: Sequence[TrialSetup]) -> None:
        hidden = lanes[0].settings.hidden_units
        draws = [torch.Generator().manual_seed(lane.settings.seed) for lane in lanes]
        inner = torch.stack([torch.randn(hidden, num_features, generator=draw) for draw in draws])
        self.parameters = [
            inner * (2.0 / num_features) ** 0.5,
            torch.zeros(len(lanes), hidden, 1),
            torch.zeros(len(lanes), num_choices, hidden),
            torch.zeros(len(lanes), num_choices, 1),
        ]
        self.gradients = [torch.zeros_like(parameter) for parameter in self.parameters]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map features [B, D] to logits [T, C, B]; the second result is the hidden layer
        [T, hidden, B], which `backward` needs."""
        inner, inner_bias, outer, outer_bias = self.parameters
        active = torch.bmm(inner, x.T.expand(len(inner), -1, -1)).add_(inner_bias).relu_()
        return torch.baddbmm(outer_bias, outer, active), active

    def backward(self, x: Tensor, memory: Tensor, gradient: Tensor) -> None:
        """Add the parameters' gradients, from that of the logits [T, C, B]."""
        below = torch.bmm(self.parameters[2].mT, gradient).mul_(memory > 0)
        self.gradients[0].baddbmm_(below, x.expand(len(below), -1, -1))
        self.gradients[1] += below.sum(2, keepdim=True)
        self.gradients[2].baddbmm_(gradient, memory.mT)
        self.gradients[3] += gradient.sum(2, keepdim=True)

    def trained(self, lane: int) -> TrainedHead:
        inner, inner_bias, outer, outer_bias = (parameter[lane].clone() for parameter in self.parameters)
        return TrainedHead(outer, outer_bias[:, 0], inner, inner_bias[:, 0])


@dataclass
class _Pass:
    """Forward pass of one node in one training step; T lanes, C choices, B images."""

    logits: Tensor
    """[T, C, B]"""
    q: Tensor
    """[T, C, B]: softmax at the step's temperature."""
    memory: Tensor
    """The second result of the head's `forward`."""
    branch_ce: Tensor
    """[C, B] or [T, C, B]: expected cross-entropy after each choice."""
    branch_cost: Tensor
    """[T, C, 1] or [T, C, B]: expected cost after each choice."""
    ce: Tensor
    """[T, 1, B]: expected cross-entropy from this node on."""
    cost: Tensor
    """[T, 1, B]: expected cost from this node on."""


class _Program:
    """Joint training of up to `LANES` trials."""

    def __init__(self, data: CohortData, lanes: Sequence[TrialSetup]) -> None:
        self.data = data
        self.nodes = data.problem.nodes
        self.lanes = lanes
        kind = _PerceptronHead if data.problem.is_perceptron else _LinearHead
        shapes: dict[int, tuple[int, int]] = {}
        for node, features in zip(self.nodes, data.features, strict=True):
            shapes.setdefault(node.head, (features.shape[1], node.num_choices))
        self.heads = [kind(*shapes[index], lanes) for index in range(data.problem.num_heads)]
        self.madds = torch.stack([lane.madds for lane in lanes])
        self.targets = torch.stack([lane.targets for lane in lanes])
        shares = [self._shares(node) for node in self.nodes]
        self.is_open = [(share > 0).any(2, keepdim=True) for share in shares]
        self.masks = [_mask(is_open) for is_open in self.is_open]
        self.choice_of = [self._choice_of(node) for node in self.nodes]
        self.choice_routes = [
            _ChoiceRoutes.of(node, share, self.madds) for node, share in zip(self.nodes, shares, strict=True)
        ]
        self.weights = _Weights(lanes)
        self.optimizer = _Optimizer(lanes, self.heads)

    def _choice_of(self, node: Node) -> Tensor:
        """int64 [K]: the choice of a node that leads to each route; -1 where none does."""
        choice_of = torch.full((self.data.ce.shape[1],), -1, dtype=torch.int64)
        for choice, routes in self.data.problem.routes_behind(node).items():
            choice_of[routes] = choice
        return choice_of

    def _shares(self, node: Node) -> Tensor:
        """[T, C, K]: averaging weights of the routes behind each choice: 1 / n for each of the n
        allowed ones, zeros where there are none."""
        allowed = torch.stack([lane.allowed for lane in self.lanes]).float()
        shares = torch.zeros(len(self.lanes), node.num_choices, allowed.shape[1])
        for choice, routes in self.data.problem.routes_behind(node).items():
            shares[:, choice, routes] = allowed[:, routes]
        return shares / shares.sum(2, keepdim=True).clamp_min(1.0)

    def run(self) -> list[list[TrainedHead]]:
        settings = self.lanes[0].settings
        for step, rows in enumerate(batches(self.data.num_images, settings.batch_size, settings.steps)):
            self._step(rows, self.weights.temperatures[step])
            self.optimizer.step()
        return [[head.trained(lane) for head in self.heads] for lane in range(len(self.lanes))]

    def _step(self, rows: Tensor, temperature: Tensor) -> None:
        """Add the gradients of one batch to those that the heads hold."""
        images = [features.index_select(0, rows) for features in self.data.features]
        ce = self.data.ce.index_select(0, rows).T
        targets = self.targets[:, rows]
        quality = self._quality(rows, ce)
        passes: dict[int, _Pass] = {}
        for position in reversed(range(len(self.nodes))):
            passes[position] = self._forward_node(position, images[position], ce, temperature, passes)
        slope = self.weights.slope(passes[0].cost.mean((1, 2))) / (temperature * len(rows))
        cls = self.weights.cls / (temperature * len(rows))
        reach: dict[int, Tensor] = {}
        for position, node in enumerate(self.nodes):
            done = passes.pop(position)
            gradient = _gradient(done, cls, slope)
            if position > 0:
                gradient *= reach[position]
            for choice, child in node.children:
                own = done.q[:, choice : choice + 1]
                reach[child] = own if position == 0 else own * reach[position]
            self._add_sgs(gradient, done.logits, self.choice_of[position][targets])
            self._add_quality(gradient, done.logits, position, quality)
            self.heads[node.head].backward(images[position], done.memory, gradient)

    def _forward_node(
        self, position: int, x: Tensor, ce: Tensor, temperature: Tensor, passes: dict[int, _Pass]
    ) -> _Pass:
        """Forward pass of one node; `passes` holds those of its children."""
        logits, memory = self.heads[self.nodes[position].head].forward(x)
        logits += self.masks[position]
        q = _softmax(logits / temperature)
        branch_ce, branch_cost = self._branches(position, ce, q, passes)
        return _Pass(
            logits,
            q,
            memory,
            branch_ce,
            branch_cost,
            (q * branch_ce).sum(1, keepdim=True),
            (q * branch_cost).sum(1, keepdim=True),
        )

    def _branches(self, position: int, ce: Tensor, q: Tensor, passes: dict[int, _Pass]) -> tuple[Tensor, Tensor]:
        """Expected cross-entropy and cost after each choice; arbitrary finite values for a choice
        that the node does not have."""
        choice_routes = self.choice_routes[position]
        if choice_routes.cost is not None:
            return choice_routes.of_routes(ce, 0), choice_routes.cost
        node = self.nodes[position]
        branch_ce, branch_cost = torch.zeros_like(q), torch.zeros_like(q)
        for choice, child in node.children:
            branch_ce[:, choice] = passes[child].ce[:, 0]
            branch_cost[:, choice] = passes[child].cost[:, 0]
        return branch_ce, branch_cost

    def _add_sgs(self, gradient: Tensor, logits: Tensor, choices: Tensor) -> None:
        """Add the gradient of the SGS loss, the cross-entropy of the logits against the target
        choices [T, B], for images whose target path passes the node (choice >= 0)."""
        if not self.weights.has_sgs:
            return
        error = _softmax(logits)
        is_on_path = (choices >= 0)[:, None]
        error.scatter_add_(1, choices.clamp_min(0)[:, None], torch.full_like(error[:, :1], -1.0))
        gradient.addcmul_(error, self.weights.sgs * is_on_path, value=1.0 / choices.shape[1])

    def _quality(self, rows: Tensor, ce: Tensor) -> Tensor | None:
        """[T, K, B]: quality of each route's answer, its correctness or the probability of the
        label; None if no lane has a quality loss."""
        if not self.weights.has_quality:
            return None
        correct = self.data.correct.index_select(0, rows).T
        return torch.where(self.weights.is_probability, ce.neg().exp_(), correct)

    def _add_quality(self, gradient: Tensor, logits: Tensor, position: int, quality: Tensor | None) -> None:
        """Add the gradient of the quality loss: half the squared difference between each logit and
        the mean quality of the routes behind its choice."""
        if quality is None:
            return
        difference = logits - self.choice_routes[position].mean(quality)
        difference = torch.where(self.is_open[position], difference, 0.0)
        gradient.addcmul_(difference, self.weights.quality, value=1.0 / logits.shape[2])


def _softmax(logits: Tensor) -> Tensor:
    """Softmax over the choices of logits [T, C, B]; probabilities of at most `TINY` become 0."""
    return F.threshold(torch.softmax(logits, dim=1), TINY, 0.0, inplace=True)


def _gradient(done: _Pass, cls: Tensor, slope: Tensor) -> Tensor:
    """[T, C, B]: the temperature times the gradient of cls * CE + slope * cost, expected from this
    node on, with respect to the node's logits."""
    value = torch.addcmul(slope * done.branch_cost, cls, done.branch_ce)
    return value.sub_(cls * done.ce + slope * done.cost).mul_(done.q)


def _mask(is_open: Tensor) -> Tensor:
    """[T, C, 1]: mask to add to logits: 0 for a choice that leads to an allowed route, -inf for
    others; all zeros where the node itself cannot be reached."""
    is_shut = ~is_open & is_open.any(1, keepdim=True)
    return torch.zeros(is_open.shape).masked_fill_(is_shut, -torch.inf)


@dataclass(frozen=True)
class _ChoiceRoutes:
    """The routes behind the choices of one node."""

    shares: Tensor
    """[T, C, K]: averaging weights of the allowed routes behind each choice."""
    cost: Tensor | None
    """[T, C, 1]: cost of each choice's route; None where the choices lead to further nodes."""
    route_of: Tensor | None
    """int64 [C]: route of each choice, an arbitrary one for a choice that the node does not have;
    None where the choices are all routes in order, or lead to further nodes."""

    @classmethod
    def of(cls, node: Node, shares: Tensor, madds: Tensor) -> _ChoiceRoutes:
        """Collect the routes behind a node's choices; `madds` [T, K] are the costs of all
        routes."""
        if node.children:
            return cls(shares, None, None)
        if node.leaves == tuple((route, route) for route in range(madds.shape[1])):
            return cls(shares, madds[:, :, None], None)
        route_of = torch.zeros(node.num_choices, dtype=torch.int64)
        for choice, route in node.leaves:
            route_of[choice] = route
        return cls(shares, madds[:, route_of, None], route_of)

    def of_routes(self, values: Tensor, dim: int) -> Tensor:
        """Select the values of the choices' routes from those of all routes along `dim`."""
        return values if self.route_of is None else values.index_select(dim, self.route_of)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the allowed routes behind each choice: [T, K, B] -> [T, C, B]."""
        return torch.bmm(self.shares, values) if self.cost is None else self.of_routes(values, 1)


class _Weights:
    """Weights, temperatures and targets of the loss, a value per lane."""

    def __init__(self, lanes: Sequence[TrialSetup]) -> None:
        settings = [lane.settings for lane in lanes]
        self.cls = _column([item.lambda_cls for item in settings])
        self.sgs = _column([item.lambda_sgs for item in settings])
        self.has_sgs = any(item.lambda_sgs for item in settings)
        self.quality = _column([item.lambda_quality for item in settings])
        self.has_quality = any(item.lambda_quality for item in settings)
        self.is_probability = _column([item.quality_of == "probability" for item in settings])
        self.temperatures = [
            _column([item.temperature(step) for item in settings]) for step in range(settings[0].steps)
        ]
        self._complexity = torch.tensor([item.lambda_complexity for item in settings])
        self._target = torch.tensor([lane.target for lane in lanes])
        has_target = [item.complexity_form in ("hinge", "quadratic") for item in settings]
        self._has_target = torch.tensor(has_target)
        self._floor = torch.tensor([0.0 if item.complexity_form == "hinge" else -torch.inf for item in settings])
        self._unit = torch.tensor([_paper_unit(lane) for lane in lanes])

    def slope(self, expected: Tensor) -> Tensor:
        """[T, 1, 1]: lambda * dC/dE for the mean expected cost [T] of a batch
        (`dsnet.gates.losses.complexity`)."""
        excess = torch.maximum(expected / self._target - 1.0, self._floor)
        slope = torch.where(self._has_target, 2.0 * excess / self._target, 2.0 * expected / self._unit**2)
        return (self._complexity * slope)[:, None, None]


def _paper_unit(lane: TrialSetup) -> float:
    """Divisor of the cost in the published complexity terms, in units of the widest route."""
    unit = PAPER_UNIT / lane.widest_madds
    return unit if lane.settings.complexity_form == "paper_raw" else unit * lane.widest_madds / PAPER_WIDEST


def _column(values: Sequence[float]) -> Tensor:
    """A tensor [T, 1, 1] of one value per lane."""
    return torch.tensor(values)[:, None, None]


class _Optimizer:
    """Adam, or SGD with Nesterov momentum, with the update rules of torch, and a learning rate and
    a weight decay per lane."""

    def __init__(self, lanes: Sequence[TrialSetup], heads: Sequence[_LinearHead | _PerceptronHead]) -> None:
        self._is_adam = lanes[0].settings.optimizer == "adam"
        self._lr = _column([lane.settings.lr for lane in lanes])
        self._decay = _column([lane.settings.weight_decay for lane in lanes])
        self._parameters = [parameter for head in heads for parameter in head.parameters]
        self._gradients = [gradient for head in heads for gradient in head.gradients]
        self._first = [torch.zeros_like(parameter) for parameter in self._parameters]
        self._second = [torch.zeros_like(parameter) for parameter in self._parameters] if self._is_adam else []
        self._num_steps = 0

    def step(self) -> None:
        """Update the parameters and clear their gradients."""
        self._num_steps += 1
        for index, (parameter, gradient) in enumerate(zip(self._parameters, self._gradients, strict=True)):
            gradient += self._decay * parameter
            parameter -= self._lr * (self._adam(index, gradient) if self._is_adam else self._nesterov(index, gradient))
            gradient.zero_()

    def _adam(self, index: int, gradient: Tensor) -> Tensor:
        first_beta, second_beta = ADAM_BETAS
        first = self._first[index].mul_(first_beta).add_(gradient, alpha=1.0 - first_beta)
        second = self._second[index].mul_(second_beta).addcmul_(gradient, gradient, value=1.0 - second_beta)
        root = (second / (1.0 - second_beta**self._num_steps)).sqrt_().add_(ADAM_EPS)
        return first / (1.0 - first_beta**self._num_steps) / root

    def _nesterov(self, index: int, gradient: Tensor) -> Tensor:
        momentum = self._first[index].mul_(MOMENTUM).add_(gradient)
        return gradient + MOMENTUM * momentum


def batches(num_images: int, batch_size: int, steps: int) -> Iterator[Int64[Tensor, " batch"]]:
    """Yield the rows of each step's batch: every epoch is in a fixed random order, and its
    incomplete last batch is left out."""
    generator = torch.Generator().manual_seed(ORDER_SEED)
    size = min(batch_size, num_images)
    order, start = torch.randperm(num_images, generator=generator), 0
    for _ in range(steps):
        if start + size > num_images:
            order, start = torch.randperm(num_images, generator=generator), 0
        yield order[start : start + size]
        start += size
