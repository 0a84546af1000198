"""Vectorised training against autograd, torch's optimisers, and itself in other cohorts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsnet.gates.cohort import LANES, CohortData, TrialSetup, batches, train_cohort
from dsnet.gates.fit import GateFit, fit_gates
from dsnet.gates.losses import complexity
from dsnet.gates.problem import node_features, problem_of, sgs_targets
from dsnet.gates.settings import GateSettings
from dsnet.routers.gate import RICH_EVIDENCE
from dsnet.routers.kinds import router_kind
from dsnet.routing.routing_table import RoutingTable
from tests.dsnet.samples import ROUTER_KINDS, needs_products_apart, random_table

TARGET = 0.4
"""Target, as a share of the widest route's MAdds."""
LEARNING = ("gate", "evidence_gate", "gates", "evidence_gates", "learned_cascade")


def big_table(num_routes: int, num_gates: int = 1) -> RoutingTable:
    """Costs of a size at which the published complexity terms count."""
    table = random_table(40, num_routes, num_gates=num_gates, hidden=5)
    return replace(table, madds=table.madds * 100_000, trunk_madds=50_000_000)


def lane_of(table: RoutingTable, settings: GateSettings) -> TrialSetup:
    widest = float(table.madds.max())
    allowed = torch.zeros(table.num_routes, dtype=torch.bool)
    allowed[list(settings.routes)] = True
    targets = torch.from_numpy(sgs_targets(table, settings.routes, settings))
    return TrialSetup(settings, allowed, torch.from_numpy(table.madds / widest).float(), TARGET, targets, widest)


def trained(table: RoutingTable, kind: str, lanes: Sequence[GateSettings]) -> list[list[dict[str, Tensor]]]:
    """For each lane and head the parameters after training."""
    problem = problem_of(table, router_kind(kind))
    correct = torch.from_numpy(table.correct1.astype(np.float32))
    data = CohortData(problem, node_features(table, problem), torch.from_numpy(table.ce), correct)
    heads_of = train_cohort(data, [lane_of(table, settings) for settings in lanes])
    names = ("inner_weight", "inner_bias", "weight", "bias")
    return [
        [{name: getattr(head, name) for name in names if getattr(head, name) is not None} for head in heads]
        for heads in heads_of
    ]


@dataclass
class Spelled:
    """Stage II on one gate or a tree of gates as docs/methods.md, section 5, writes it, in float64,
    by autograd."""

    table: RoutingTable
    settings: GateSettings
    kind: str

    def __post_init__(self) -> None:
        is_rich = self.kind.startswith("evidence")
        self.parts = RICH_EVIDENCE if is_rich else ("hidden",)
        self.is_tree = self.kind.endswith("gates")
        self.heads: dict[tuple[int, int], dict[str, Tensor]] = {}
        for gate, branches in enumerate(self.table.tree.gates if self.is_tree else self.table.tree.gates[:1]):
            num_choices = branches.num_choices if self.is_tree else self.table.num_routes
            for node in range(branches.num_nodes if is_rich else 1):
                size = self.features(gate, node, torch.arange(1)).shape[1]
                self.heads[gate, node] = self.first_weights(size, num_choices, is_rich)

    def first_weights(self, size: int, num_choices: int, is_rich: bool) -> dict[str, Tensor]:
        if not is_rich:
            return {"weight": torch.zeros(num_choices, size, dtype=torch.float64)}
        units = self.settings.hidden_units
        inner = torch.randn(units, size, generator=torch.Generator().manual_seed(self.settings.seed))
        return {
            "inner_weight": inner.double() * (2.0 / size) ** 0.5,
            "inner_bias": torch.zeros(units, dtype=torch.float64),
            "weight": torch.zeros(num_choices, units, dtype=torch.float64),
            "bias": torch.zeros(num_choices, dtype=torch.float64),
        }

    def features(self, gate: int, node: int, rows: Tensor) -> Tensor:
        own = [torch.from_numpy(self.table.part(name, gate, node)) for name in self.parts]
        return torch.cat(own, dim=1)[rows].double()

    def logits(self, gate: int, node: int, rows: Tensor) -> Tensor:
        """[B, choices], -inf for a choice that leads to no allowed route."""
        head = self.heads[gate, node] if (gate, node) in self.heads else self.heads[gate, 0]
        x = self.features(gate, node, rows)
        if "inner_weight" in head:
            x = torch.relu(x @ head["inner_weight"].T + head["inner_bias"])
        scores = x @ head["weight"].T
        scores = scores + head["bias"] if "bias" in head else scores
        shut = [choice for choice in range(scores.shape[1]) if not self.behind(gate, node, choice)]
        return scores.index_fill(1, torch.tensor(shut, dtype=torch.int64), -torch.inf)

    def behind(self, gate: int, node: int, choice: int) -> list[int]:
        return [r for r in self.settings.routes if self.path(r)[gate] == (node, choice)]

    def path(self, route: int) -> list[tuple[int, int]]:
        """(node, choice) at every gate."""
        if not self.is_tree:
            return [(0, route)]
        return [(gate.node_of[route], gate.choice_of[route]) for gate in self.table.tree.gates]

    def loss(self, rows: Tensor, temperature: float) -> Tensor:
        own, table = self.settings, self.table
        places = sorted({(g, node) for r in own.routes for g, (node, _) in enumerate(self.path(r))})
        logits = {place: self.logits(*place, rows) for place in places}
        ce = torch.from_numpy(table.ce).double()[rows]
        cls = madds = torch.zeros((), dtype=torch.float64)
        for route in own.routes:
            p = torch.ones(len(rows), dtype=torch.float64)
            for gate, (node, choice) in enumerate(self.path(route)):
                p = p * torch.softmax(logits[gate, node] / temperature, dim=1)[:, choice]
            cls = cls + (p * ce[:, route]).mean()
            madds = madds + (p * float(table.madds[route])).mean()
        widest = float(table.madds.max())
        cost = complexity(madds, TARGET * widest, widest, own.complexity_form)
        return (
            own.lambda_cls * cls
            + own.lambda_sgs * self.sgs(logits, rows)
            + own.lambda_complexity * cost
            + own.lambda_quality * self.quality(logits, rows)
        )

    def sgs(self, logits: Mapping[tuple[int, int], Tensor], rows: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        targets = sgs_targets(self.table, self.settings.routes, self.settings)
        for index, row in enumerate(rows.tolist()):
            for gate, (node, choice) in enumerate(self.path(int(targets[row]))):
                scores = logits[gate, node][index : index + 1]
                total = total + F.cross_entropy(scores, torch.tensor([choice])) / len(rows)
        return total

    def quality(self, logits: Mapping[tuple[int, int], Tensor], rows: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        probability = np.exp(-self.table.ce.astype(np.float64))
        good = self.table.correct1 if self.settings.quality_of == "correct" else probability
        for (gate, node), scores in logits.items():
            for choice in range(scores.shape[1]):
                routes = self.behind(gate, node, choice)
                if routes:
                    wanted = torch.from_numpy(good[rows.numpy()][:, routes].mean(1))
                    total = total + 0.5 * (scores[:, choice] - wanted).square().mean()
        return total

    def train(self) -> list[dict[str, Tensor]]:
        own = self.settings
        parameters = [value.requires_grad_() for head in self.heads.values() for value in head.values()]
        optimizer: torch.optim.Optimizer
        if own.optimizer == "adam":
            optimizer = torch.optim.Adam(parameters, lr=own.lr, weight_decay=own.weight_decay)
        else:
            optimizer = torch.optim.SGD(
                parameters, lr=own.lr, weight_decay=own.weight_decay, momentum=0.9, nesterov=True
            )
        for step, rows in enumerate(batches(self.table.num_images, own.batch_size, own.steps)):
            optimizer.zero_grad()
            self.loss(rows, own.temperature(step)).backward()
            optimizer.step()
        return [{name: value.detach() for name, value in head.items()} for head in self.heads.values()]


BASE = GateSettings(
    steps=6,
    batch_size=11,
    optimizer="sgd",
    lr=0.2,
    weight_decay=0.02,
    hidden_units=4,
    lambda_cls=0.7,
    lambda_sgs=0.4,
    lambda_complexity=1.5,
    lambda_quality=0.6,
    complexity_form="quadratic",
    temperature_start=1.7,
    temperature_end=0.4,
    t_easy=0.3,
    seed=3,
)
PARTIAL = {1: (0, 1, 3), 3: (1, 2, 4, 7)}
"""Routing spaces that leave choices and, with three gates, whole nodes unused."""


def assert_as_spelled(kind: str, num_gates: int, settings: GateSettings) -> None:
    table = big_table(8 if num_gates == 3 else 4, num_gates)
    (ours,) = trained(table, kind, [settings])
    expected = Spelled(table, settings, kind).train()
    for mine, reference in zip(ours, expected, strict=True):
        for name, value in mine.items():
            torch.testing.assert_close(value.double(), reference[name], rtol=2e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("is_partial", [False, True])
@pytest.mark.parametrize(
    ("kind", "num_gates"),
    [("gate", 1), ("evidence_gate", 1), ("gates", 1), ("gate", 3), ("gates", 3), ("evidence_gates", 3)],
)
def test_training_follows_the_gradient_of_the_spelled_out_loss(kind: str, num_gates: int, is_partial: bool) -> None:
    routes = PARTIAL[num_gates] if is_partial else tuple(range(8 if num_gates == 3 else 4))
    assert_as_spelled(kind, num_gates, replace(BASE, routes=routes))


@pytest.mark.parametrize("kind", ["gate", "gates"])
@pytest.mark.parametrize("form", ["hinge", "quadratic", "paper", "paper_raw"])
def test_every_complexity_form_and_quality_is_followed(form: str, kind: str) -> None:
    changed = replace(BASE, complexity_form=form, quality_of="probability", lambda_complexity=8.0)
    assert_as_spelled(kind, 3, replace(changed, routes=(0, 1, 5, 6, 7), strategy="give_up"))


@pytest.mark.parametrize("name", ["lambda_cls", "lambda_sgs", "lambda_complexity", "lambda_quality"])
def test_each_term_alone_is_followed(name: str) -> None:
    alone: dict[str, Any] = dict.fromkeys(("lambda_cls", "lambda_sgs", "lambda_complexity", "lambda_quality"), 0.0)
    settings = replace(BASE, routes=tuple(range(8)), **{**alone, name: 1.0})
    assert_as_spelled("gates", 3, settings)


@pytest.mark.parametrize("kind", ["gate", "evidence_gate", "gates"])
def test_adam_is_torchs(kind: str) -> None:
    settings = replace(BASE, optimizer="adam", lr=0.03, routes=(0, 1, 2, 3), steps=12)
    assert_as_spelled(kind, 1, settings)


def test_choices_that_are_not_numbered_as_the_routes_are_still_their_own() -> None:
    table = big_table(4)
    tree = replace(table.tree.gates[0], choice_of=(2, 0, 3, 1))
    permuted = replace(table, tree=replace(table.tree, gates=(tree,)))
    settings = replace(BASE, routes=(0, 1, 2, 3))
    (plain,), (moved,) = trained(table, "gates", [settings])[0], trained(permuted, "gates", [settings])[0]
    torch.testing.assert_close(moved["weight"][[2, 0, 3, 1]], plain["weight"], rtol=1e-4, atol=1e-6)


def varied(kind: str, count: int, num_routes: int) -> list[GateSettings]:
    """Lanes that differ in every setting in which lanes of one cohort may differ."""
    rng = np.random.default_rng(7)
    return [
        GateSettings(
            router=kind,
            steps=6,
            batch_size=17,
            hidden_units=3,
            target=float(rng.random()),
            routes=tuple(sorted(rng.choice(num_routes, int(rng.integers(2, num_routes + 1)), replace=False).tolist())),
            lr=float(rng.choice([0.01, 0.1])),
            weight_decay=float(rng.choice([0.0, 0.01])),
            lambda_sgs=float(index % 3),
            lambda_quality=float(index % 4 == 1),
            quality_of=str(rng.choice(["correct", "probability"])),
            complexity_form=str(rng.choice(["hinge", "quadratic", "paper", "paper_raw"])),
            temperature_start=float(rng.choice([1.0, 2.0])),
            strategy=str(rng.choice(["try_best", "give_up"])),
            seed=index,
        )
        for index in range(count)
    ]


def bits(fit: GateFit | Exception) -> dict[str, Any]:
    """Every number of a trial."""
    assert isinstance(fit, GateFit), fit
    tensors, values = fit.router.to_arrays()
    arrays = {name: value.numpy().tobytes() for name, value in tensors.items()}
    return {**arrays, "values": values, "metrics": dict(fit.metrics), "routes": fit.run.routes.tobytes()}


@pytest.mark.slow
@needs_products_apart
@pytest.mark.parametrize("num_gates", [1, 3])
@pytest.mark.parametrize("kind", ROUTER_KINDS)
def test_a_trial_is_the_same_to_the_bit_alone_and_in_any_company(kind: str, num_gates: int) -> None:
    assert torch.get_num_threads() == 1
    gate, val = (random_table(51, 8, seed=seed, num_gates=num_gates) for seed in (1, 2))
    lanes = varied(kind, 2 * LANES + 4, 8)
    alone = [bits(fit_gates(gate, val, [own])[0]) for own in lanes]
    assert [bits(fit) for fit in fit_gates(gate, val, lanes)] == alone
    assert [bits(fit) for fit in fit_gates(gate, val, lanes[::-1])] == alone[::-1]
    for size in (3, LANES):
        assert [bits(fit) for fit in fit_gates(gate, val, lanes[5 : 5 + size])] == alone[5 : 5 + size]


@pytest.mark.slow
@needs_products_apart
@pytest.mark.parametrize(("num_routes", "hidden", "batch_size"), [(2, 66, 100), (3, 1, 7), (14, 66, 270), (5, 64, 1)])
def test_the_bits_hold_at_sizes_where_fused_products_would_change_them(
    num_routes: int, hidden: int, batch_size: int
) -> None:
    gate, val = (random_table(300, num_routes, seed=seed, hidden=hidden) for seed in (1, 2))
    for kind in ("gate", "evidence_gate"):
        lanes = [replace(own, batch_size=batch_size, hidden_units=1) for own in varied(kind, 5, num_routes)]
        together = fit_gates(gate, val, lanes)
        assert [bits(fit) for fit in together] == [bits(fit_gates(gate, val, [own])[0]) for own in lanes]


@needs_products_apart
def test_kinds_and_step_counts_may_be_mixed_in_one_call() -> None:
    gate, val = (random_table(51, 8, seed=seed, num_gates=3) for seed in (1, 2))
    mixed = [replace(varied(kind, 1, 8)[0], steps=3 + index % 2) for index, kind in enumerate(2 * ROUTER_KINDS)]
    assert [bits(fit) for fit in fit_gates(gate, val, mixed)] == [bits(fit_gates(gate, val, [own])[0]) for own in mixed]


@pytest.mark.slow
@needs_products_apart
@pytest.mark.parametrize("kind", LEARNING)
def test_a_lane_that_diverges_fails_alone_and_moves_no_bit_of_its_neighbours(kind: str) -> None:
    gate, val = (random_table(51, 8, seed=seed, num_gates=3) for seed in (1, 2))
    calm = [replace(own, optimizer="sgd", steps=40) for own in varied(kind, 4, 8)]
    wild = replace(calm[1], lr=1e6, lambda_quality=1.0, routes=tuple(range(8)))
    fits = fit_gates(gate, val, [*calm[:2], wild, *calm[2:]])
    assert type(fits[2]).__name__ == "NonFiniteLossError"
    assert "gate.optimizer.lr (now 1000000.0)" in str(fits[2])
    assert [bits(fit) for fit in (*fits[:2], *fits[3:])] == [bits(fit) for fit in fit_gates(gate, val, calm)]


def test_batches_are_whole_epochs_in_random_order_without_a_remainder() -> None:
    met = list(batches(10, 4, 5))
    assert [len(rows) for rows in met] == [4] * 5
    assert len(set(torch.cat(met[:2]).tolist())) == 8
    assert len(set(torch.cat(met[2:4]).tolist())) == 8
    assert met[0].tolist() != met[2].tolist()
    assert [len(rows) for rows in batches(3, 512, 2)] == [3, 3]


def test_training_neither_reads_nor_moves_the_global_generators() -> None:
    gate, val = (random_table(51, 4, seed=seed) for seed in (1, 2))
    lanes = [own for kind in ROUTER_KINDS for own in varied(kind, 1, 4)]
    torch.manual_seed(1)
    np.random.seed(1)
    first = [bits(fit) for fit in fit_gates(gate, val, lanes)]
    torch.manual_seed(2)
    np.random.seed(2)
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
    assert [bits(fit) for fit in fit_gates(gate, val, lanes)] == first
    assert torch.equal(before, torch.get_rng_state())
    assert np.random.get_state()[1].tolist() == before_numpy  # type: ignore[index]


def test_a_perceptrons_first_weights_follow_the_seed_and_a_linear_head_has_none() -> None:
    table = random_table(60)
    for kind, differs in (("gate", False), ("evidence_gate", True)):
        settings = GateSettings(router=kind, steps=5, batch_size=20)
        first, second = fit_gates(table, table, [settings, replace(settings, seed=1)])
        values = bits(first), bits(second)
        assert (values[0] != values[1]) is differs
