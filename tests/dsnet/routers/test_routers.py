"""The contract of every kind of router, and the decisions of each kind against a separate
calculation in numpy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor

from dsnet.errors import CheckpointError
from dsnet.network.supernet import EVIDENCE_PARTS
from dsnet.routers.base import STOP, Evidence, Executed, Router, summary_of
from dsnet.routers.cascade import CascadeRouter, LearnedCascadeRouter, answer_features
from dsnet.routers.gate import EvidenceGateRouter, GateRouter
from dsnet.routers.head import Head
from dsnet.routers.kinds import router_from_arrays
from dsnet.routers.tree import GatesRouter
from dsnet.routing.routing_table import RoutingTable
from tests.dsnet.samples import ROUTER_KINDS, random_router, random_table, stored_answers, table_evidence

SPACES = {1: (None, (0, 2, 3)), 3: (None, (1, 4, 5, 7))}
"""Routing spaces by number of gates; in the second of three gates the router's nodes have other
numbers than the table's."""


@lru_cache
def table_of(num_gates: int) -> RoutingTable:
    return random_table(40, 8 if num_gates == 3 else 4, num_gates=num_gates, seed=1)


@dataclass(frozen=True)
class Case:
    """A router on the table that it was made for."""

    kind: str
    num_gates: int
    space: tuple[int, ...] | None

    def __str__(self) -> str:
        return f"{self.kind}-{self.num_gates} gates-{'all' if self.space is None else 'some'}"

    @property
    def table(self) -> RoutingTable:
        return table_of(self.num_gates)

    @property
    def router(self) -> Router:
        return random_router(self.kind, self.table, routes=self.space)


CASES = [Case(kind, num_gates, space) for kind in ROUTER_KINDS for num_gates in SPACES for space in SPACES[num_gates]]
"""Every kind of router; one that decides once must also do so in a network of three gates."""


@dataclass(frozen=True)
class Asked:
    """One call of a router, and its answers."""

    evidence: Evidence
    executed: tuple[Executed, ...]
    routes: Tensor
    margin: Tensor


def round_of(
    router: Router, table: RoutingTable, rows: Sequence[int], executed: tuple[Executed, ...], ids: Sequence[int]
) -> tuple[list[Asked], Tensor]:
    """All calls of a router in one round for images of a table, and the route that each image runs.

    `ids` holds the router's id of each of the table's routes.
    """

    def ask(evidence: Evidence) -> Tensor:
        asked.append(Asked(evidence, executed, router.step(evidence, executed), router.margin(evidence, executed)))
        return asked[-1].routes

    asked: list[Asked] = []
    chosen = ask(table_evidence(router, table, rows)).clone()
    for gate in range(1, 1 if executed else router.num_gates):
        node_of = table.tree.gates[gate].node_of
        nodes = [node_of[ids.index(route)] for route in chosen.tolist()]
        for node in set(nodes):
            inside = [index for index, met in enumerate(nodes) if met == node]
            own_rows = [rows[index] for index in inside]
            chosen[inside] = ask(table_evidence(router, table, own_rows, gate, int(chosen[inside[0]]), node))
    return asked, chosen


def journey(
    router: Router, table: RoutingTable, rows: Sequence[int], ids: Sequence[int] | None = None
) -> tuple[list[Asked], list[list[int]]]:
    """All calls until every image has stopped, and the routes that each image ran."""
    ids = range(table.num_routes) if ids is None else ids
    questions: list[Asked] = []
    ran: list[list[int]] = [[] for _ in rows]
    executed: tuple[Executed, ...] = ()
    for _ in range(4):
        asked, chosen = round_of(router, table, rows, executed, ids)
        questions += asked
        running = [
            route if len(own) == len(executed) else STOP for route, own in zip(chosen.tolist(), ran, strict=True)
        ]
        if set(running) == {STOP}:
            assert len(executed) <= router.max_runs
            return questions, ran
        for own, route in zip(ran, running, strict=True):
            own += [route] if route != STOP else []
        answers = stored_answers(table, torch.tensor([ids.index(own[-1]) for own in ran]), rows)
        executed = (*executed, replace(answers, routes=torch.tensor(running)))
    raise AssertionError("the router does not stop")


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


class TestRouterContract:
    """Contract of all kinds of router in `ROUTER_KINDS`."""

    def test_its_name_is_its_kind(self, case: Case) -> None:
        assert case.router.kind == case.kind

    def test_it_reads_parts_that_exist(self, case: Case) -> None:
        assert set(case.router.needs) <= set(EVIDENCE_PARTS)

    def test_it_decides_at_no_gate_that_the_network_lacks(self, case: Case) -> None:
        assert case.router.num_gates in (1, case.num_gates)

    def test_it_runs_only_its_routes_and_more_than_one_of_them(self, case: Case) -> None:
        router = case.router
        _, ran = journey(router, case.table, range(40))
        met = {route for own in ran for route in own}
        assert met <= set(router.routes)
        assert len(met) > 1
        assert list(router.routes) == sorted(router.routes)
        assert set(router.routes) <= set(range(case.table.num_routes) if case.space is None else case.space)

    def test_every_image_runs_a_route_and_none_runs_twice(self, case: Case) -> None:
        _, ran = journey(case.router, case.table, range(40))
        assert all(1 <= len(own) <= 2 and len(set(own)) == len(own) for own in ran)

    def test_stop_is_absorbing(self, case: Case) -> None:
        router, rows = case.router, range(40)
        _, ran = journey(router, case.table, rows)
        executed: list[Executed] = []
        for number in range(4):
            evidence = table_evidence(router, case.table, rows)
            routes = torch.tensor([own[number] if number < len(own) else STOP for own in ran])
            last = torch.tensor([own[: number + 1][-1] for own in ran])
            executed.append(replace(stored_answers(case.table, last), routes=routes))
            following = router.step(evidence, executed)
            has_ended = torch.tensor([len(own) <= number + 1 for own in ran])
            assert (following[has_ended & (routes != STOP)] == STOP).all()
            if number >= 1:
                assert (following == STOP).all()
                assert torch.isinf(router.margin(evidence, executed)).all()

    def test_one_by_one_equals_together(self, case: Case) -> None:
        router, table = case.router, case.table
        questions, ran = journey(router, table, range(40))
        margins = margin_of_images(router, table, range(40))
        for row in range(40):
            _, (alone,) = journey(router, table, [row])
            assert alone == ran[row]
            assert margin_of_images(router, table, [row]) == pytest.approx([margins[row]], rel=1e-9)
        assert any(torch.isfinite(asked.margin).any() for asked in questions)

    def test_arrays_survive_a_file_and_json(self, case: Case) -> None:
        router, table = case.router, case.table
        tensors, values = router.to_arrays()
        again = router_from_arrays(load(save(tensors)), json.loads(json.dumps(values)))
        assert type(again) is type(router)
        for name in ("kind", "needs", "num_gates", "routes", "tie"):
            assert getattr(again, name) == getattr(router, name)
        routes = torch.tensor(router.routes)
        assert torch.equal(again.decision_madds(routes), router.decision_madds(routes))
        before, ran = journey(router, table, range(40))
        after, ran_again = journey(again, table, range(40))
        assert ran_again == ran
        assert all(torch.equal(old.margin, new.margin) for old, new in zip(before, after, strict=True))

    @pytest.mark.parametrize("is_reversed", [False, True])
    def test_over_renumbers_the_routes_and_nothing_else(self, case: Case, is_reversed: bool) -> None:
        router, table = case.router, case.table
        ids = [3 * route + 5 for route in range(table.num_routes)][:: -1 if is_reversed else 1]
        other = router.over({route: ids[route] for route in router.routes})
        assert sorted(other.routes) == sorted(ids[route] for route in router.routes)
        _, ran = journey(router, table, range(40))
        _, ran_other = journey(other, table, range(40), ids)
        assert ran_other == [[ids[route] for route in own] for own in ran]
        for route in router.routes:
            assert other.decision_madds(torch.tensor([ids[route]])) == router.decision_madds(torch.tensor([route]))

    def test_margin_is_float64_positive_and_infinite_where_there_is_no_choice(self, case: Case) -> None:
        router = case.router
        questions, _ = journey(router, case.table, range(40))
        for asked in questions:
            assert asked.margin.dtype == torch.float64
            assert asked.margin.shape == (asked.evidence.num_images,)
            assert (asked.margin > 0).all()
            has_choice = len(options_of(router, asked)) > 1
            assert torch.isfinite(asked.margin).all() == has_choice

    def test_a_step_equals_the_calculation_in_numpy(self, case: Case) -> None:
        router = case.router
        questions, _ = journey(router, case.table, range(40))
        for asked in questions:
            options, scores = options_of(router, asked), scores_of(router, asked)
            assert asked.routes.tolist() == [options[k] for k in np.argmax(scores, axis=1)]

    def test_margin_vanishes_exactly_where_a_tiny_change_of_a_constant_flips_the_decision(self, case: Case) -> None:
        router = case.router
        questions, _ = journey(router, case.table, range(40))
        checked = 0
        for asked in questions:
            options, scores = options_of(router, asked), scores_of(router, asked)
            if len(options) < 2:
                continue
            for image in range(0, asked.evidence.num_images, 7):
                winner = int(scores[image].argmax())
                gap = scores[image, winner] - np.delete(scores[image], winner).max()
                on_edge, behind, ahead = (
                    with_offset(router, asked, winner, gap + shift) for shift in (0.0, 1e-9, -1e-9)
                )
                assert float(on_edge.margin(asked.evidence, asked.executed)[image]) < 1e-7 < router.tie
                assert int(ahead.step(asked.evidence, asked.executed)[image]) == options[winner]
                assert int(behind.step(asked.evidence, asked.executed)[image]) != options[winner]
                checked += 1
        assert checked > 0

    def test_errors_a_tenth_of_the_margin_do_not_change_a_decision_and_ten_times_it_do(self, case: Case) -> None:
        router = case.router
        questions, _ = journey(router, case.table, range(40))
        moved = still = 0
        for asked in questions:
            if not torch.isfinite(asked.margin).all() or isinstance(router, (CascadeRouter, LearnedCascadeRouter)):
                continue  # what an answer's error does is asked of `answer_error_sizes`
            generator = torch.Generator().manual_seed(0)
            for image in range(asked.evidence.num_images):
                near = router.step(disturbed(asked.evidence, 0.1 * float(asked.margin[image]), generator), ())[image]
                assert int(near) == int(asked.routes[image])
                far = router.step(disturbed(asked.evidence, 10 * float(asked.margin[image]), generator), ())[image]
                moved += int(far) != int(asked.routes[image])
                still += int(far) == int(asked.routes[image])
        assert moved >= 0.3 * (moved + still)
        assert (moved + still > 0) == ("cascade" not in case.kind)

    def test_decision_madds_equal_a_count(self, case: Case) -> None:
        router, routes = case.router, torch.tensor(case.router.routes)
        madds = router.decision_madds(routes)
        assert madds.dtype == torch.int64
        assert madds.tolist() == [counted_decision(case, router, int(route)) for route in routes]

    def test_it_does_not_change_what_it_is_given(self, case: Case) -> None:
        questions, _ = journey(case.router, case.table, range(40))
        for asked in questions:
            before = {name: part.clone() for name, part in asked.evidence.parts.items()}
            case.router.step(asked.evidence, asked.executed)
            case.router.margin(asked.evidence, asked.executed)
            assert all(torch.equal(before[name], part) for name, part in asked.evidence.parts.items())


def margin_of_images(router: Router, table: RoutingTable, rows: Sequence[int]) -> list[float]:
    """The smallest margin of every image, asked at the first gate, and once the first route has
    run."""
    evidence = table_evidence(router, table, rows)
    first = router.step(evidence, ())
    answers = stored_answers(table, first, rows)
    both = torch.minimum(router.margin(evidence, ()), router.margin(evidence, [answers]))
    return both.tolist()


def disturbed(evidence: Evidence, relative: float, generator: torch.Generator) -> Evidence:
    parts = {
        name: part.double() * (1 + relative * torch.randn(part.shape, generator=generator, dtype=torch.float64))
        for name, part in evidence.parts.items()
    }
    return replace(evidence, parts=parts)


def options_of(router: Router, asked: Asked) -> list[int]:
    """The options of a router in a call, in the order of its scores."""
    if isinstance(router, GatesRouter):
        if asked.executed:
            return [STOP]
        branches = router.tree.gates[asked.evidence.gate]
        routes = range(len(router.routes))
        if asked.evidence.gate > 0:
            here = branches.node_of[router.routes.index(asked.evidence.route)]
            routes = [column for column in routes if branches.node_of[column] == here]
        first = {branches.choice_of[column]: router.routes[column] for column in reversed(routes)}
        return [first[choice] for choice in sorted(first)]
    match router:
        case CascadeRouter():
            return [[router.first], [STOP, router.second], [STOP]][min(len(asked.executed), 2)]
        case LearnedCascadeRouter():
            go_on = [STOP if option == router.first else option for option in router.options]
            return [[router.first], go_on, [STOP]][min(len(asked.executed), 2)]
    return [STOP] if asked.executed else list(router.routes)


def scores_of(router: Router, asked: Asked) -> NDArray[np.float64]:
    """The calibrated scores of `options_of`, in numpy."""
    options = options_of(router, asked)
    if len(options) == 1:
        return np.zeros((asked.evidence.num_images, 1))
    features = np.concatenate(
        [np.zeros((asked.evidence.num_images, 0)), *(asked.evidence[part].double().numpy() for part in router.needs)],
        axis=1,
    )
    match router:
        case GateRouter():
            return features @ router.weight.numpy().T - router.offset.numpy()
        case EvidenceGateRouter():
            return head_in_numpy(router.head, features) - router.offset.numpy()
        case GatesRouter():
            gate, node = place_of(router, asked)
            branches = router.tree.gates[gate]
            present = sorted({branches.choice_of[column] for column in branches.routes_at(node)})
            scores = head_in_numpy(router.heads[gate][node], features) - router.offsets[gate][node].numpy()
            assert np.isneginf(np.delete(scores, present, axis=1)).all()
            return scores[:, present]
        case CascadeRouter():
            confidence = asked.executed[0].summary["confidence"].double().numpy()
            return np.stack([confidence, np.full_like(confidence, router.threshold)], axis=1)
        case LearnedCascadeRouter():
            answer = answer_in_numpy(asked.executed[0])
            return (
                head_in_numpy(router.head, np.concatenate([answer, features], axis=1).astype(np.float64))
                - router.offset.numpy()
            )
    raise AssertionError(f"say here what {type(router).__name__} calculates")


def place_of(router: GatesRouter, asked: Asked) -> tuple[int, int]:
    gate = asked.evidence.gate
    if gate == 0:
        return 0, 0
    return gate, router.tree.gates[gate].node_of[router.routes.index(asked.evidence.route)]


def head_in_numpy(head: Head, x: NDArray[np.float64]) -> NDArray[np.float64]:
    if head.inner_weight is not None and head.inner_bias is not None:
        x = np.maximum(x @ head.inner_weight.numpy().T + head.inner_bias.numpy(), 0)
    return x @ head.weight.numpy().T + (0 if head.bias is None else head.bias.numpy())


def answer_in_numpy(answer: Executed) -> NDArray[np.float32]:
    logits = answer.logits.numpy().astype(np.float16).astype(np.float32)
    ranked = -np.sort(-logits, axis=1)[:, :10]
    summary = [answer.summary[name].numpy()[:, None] for name in ("confidence", "margin", "entropy")]
    centred = logits - logits.mean(1, keepdims=True)
    return np.concatenate([*summary, ranked[:, 1:] - ranked[:, :1], centred], axis=1)


def with_offset(router: Router, asked: Asked, winner: int, shift: float) -> Router:
    """The same router with the score of its winning option lowered by `shift`."""
    match router:
        case CascadeRouter():
            return replace(router, threshold=router.threshold + (shift if winner == 0 else -shift))
        case GatesRouter():
            gate, node = place_of(router, asked)
            present = sorted({router.tree.gates[gate].choice_of[k] for k in router.tree.gates[gate].routes_at(node)})
            offsets = [list(row) for row in router.offsets]
            offsets[gate][node] = shifted(offsets[gate][node], present[winner], shift)
            return replace(router, offsets=tuple(tuple(row) for row in offsets))
        case GateRouter() | EvidenceGateRouter() | LearnedCascadeRouter():
            return replace(router, offset=shifted(router.offset, winner, shift))
    raise AssertionError(f"say here what shifts a score of {type(router).__name__}")


def shifted(offset: Tensor, index: int, shift: float) -> Tensor:
    offset = offset.clone()
    offset[index] += shift
    return offset


def counted_decision(case: Case, router: Router, route: int) -> int:
    """MAdds of all decisions on the way to a route: products, and two poolings of 4 x 4 positions
    where they are read."""
    hidden, channels, positions = 6, 3, 16
    num_routes = len(router.routes)
    match case.kind:
        case "gate":
            return hidden * num_routes
        case "evidence_gate":
            return 2 * channels * positions + (3 * channels + hidden) * 5 + 5 * num_routes
        case "cascade":
            return 0
        case "learned_cascade":
            answer = 3 + 6 + 7  # summary, ranked logits, logits by class
            return 2 * channels * positions + (answer + 3 * channels + hidden) * 6 + 6 * num_routes
    total = 0
    for gate in case.table.tree.gates:
        num_choices = 1 + max(gate.choice_of[member] for member in router.routes)
        channels = 3 + gate.node_of[route]
        total += (
            hidden * num_choices
            if case.kind == "gates"
            else 2 * channels * positions + (3 * channels + hidden) * 5 + 5 * num_choices
        )
    return total


@pytest.mark.parametrize("kind", ["gate", "evidence_gate", "gates", "evidence_gates", "learned_cascade"])
def test_a_router_of_one_route_has_no_ties(kind: str) -> None:
    table = table_of(1)
    router = random_router(kind, table, routes=(2,))
    questions, ran = journey(router, table, range(40))
    assert ran == [[2]] * 40
    assert all(torch.isinf(asked.margin).all() for asked in questions)


def test_a_cascade_of_one_route_runs_it_once() -> None:
    questions, ran = journey(CascadeRouter(1, 1, 0.9), table_of(1), range(40))
    assert ran == [[1]] * 40
    assert all(torch.isinf(asked.margin).all() for asked in questions)


@pytest.mark.parametrize(("threshold", "ran"), [(-np.inf, [0]), (np.inf, [0, 3])])
def test_an_infinite_threshold_always_decides_the_same_and_survives_its_arrays(
    threshold: float, ran: list[int]
) -> None:
    router = CascadeRouter(0, 3, threshold)
    tensors, values = router.to_arrays()
    again = router_from_arrays(tensors, json.loads(json.dumps(values, allow_nan=False)))
    for own in (router, again):
        questions, met = journey(own, table_of(1), range(40))
        assert met == [ran] * 40
        assert all(torch.isinf(asked.margin).all() for asked in questions)


def test_a_cascade_runs_the_second_where_the_first_is_unsure() -> None:
    router = CascadeRouter(0, 3, 0.6)
    logits = torch.tensor([[4.0, 0.0], [0.1, 0.0], [0.0, 3.0]])
    evidence = Evidence({}, 3)
    first = router.step(evidence, ())
    second = router.step(evidence, [Executed(first, logits)])
    assert first.tolist() == [0, 0, 0]
    assert second.tolist() == [STOP, 3, STOP]


def test_a_confidence_at_the_threshold_is_enough() -> None:
    """The threshold is a float64, a confidence a float32 one: neither is rounded to the other."""
    confidence = torch.tensor([0.7])
    answer = Executed(torch.tensor([0]), torch.zeros(1, 2), {"confidence": confidence})
    exact = float(confidence.double())
    for threshold, following in ((exact, STOP), (exact + 1e-12, 1), (exact - 1e-12, STOP)):
        assert CascadeRouter(0, 1, threshold).step(Evidence({}, 1), [answer]).tolist() == [following]


def test_a_summary_equals_the_calculation_in_numpy() -> None:
    logits = 3 * torch.randn((9, 5), generator=torch.Generator().manual_seed(0))
    p = np.exp(logits.double().numpy())
    p /= p.sum(1, keepdims=True)
    ordered = np.sort(p, axis=1)
    summary = summary_of(logits)
    np.testing.assert_allclose(summary["confidence"], ordered[:, -1], rtol=1e-5)
    np.testing.assert_allclose(summary["margin"], ordered[:, -1] - ordered[:, -2], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(summary["entropy"], -(p * np.log(p)).sum(1), rtol=1e-5)
    assert {value.dtype for value in summary.values()} == {torch.float32}


@pytest.mark.parametrize("seed", range(3))
def test_a_learned_cascade_that_is_no_tie_survives_the_other_rounding_of_a_logit(seed: int) -> None:
    """Between a table's half precision and another processor's float32 a logit may come out as the
    next half number."""
    table = table_of(1)
    router = random_router("learned_cascade", table, seed)
    assert isinstance(router, LearnedCascadeRouter)
    evidence = table_evidence(router, table, range(40))
    answer = stored_answers(table, router.step(evidence, ()))
    question = Asked(evidence, (answer,), router.step(evidence, [answer]), router.margin(evidence, [answer]))
    scores = scores_of(router, question)
    flipped = dict.fromkeys((0.02, 1.0), 0)
    for image in range(40):
        winner = int(scores[image].argmax())
        gap = scores[image, winner] - np.delete(scores[image], winner).max()
        for share in flipped:
            wanted = share * router.tie / float(question.margin[image])
            near = with_offset(router, question, winner, gap * (1 - wanted))
            assert float(near.margin(evidence, [answer])[image]) == pytest.approx(share * router.tie, rel=1e-3)
            for column in range(table.num_classes):
                for step in (-1, 1):
                    logits = answer.logits.numpy().copy()
                    logits[:, column] = np.nextafter(logits[:, column], np.float16(step * np.inf))
                    other = replace(answer, logits=torch.from_numpy(logits))
                    flipped[share] += int(near.step(evidence, [other])[image]) != int(question.routes[image])
    assert flipped[1.0] == 0
    assert flipped[0.02] > 0


def test_a_learned_cascade_reads_logits_as_a_table_keeps_them() -> None:
    logits = 5 * torch.randn((8, 7), generator=torch.Generator().manual_seed(0))
    summary = summary_of(logits)
    exact = answer_features(Executed(torch.zeros(8).long(), logits), 7)
    stored = answer_features(Executed(torch.zeros(8).long(), logits.half(), summary), 7)
    assert torch.equal(exact, stored)


def test_a_gates_head_that_nodes_share_is_stored_once() -> None:
    table = table_of(3)
    router = random_router("gates", table)
    tensors, _ = router.to_arrays()
    assert sum(name.startswith("head.") for name in tensors) == 3
    assert sum(name.startswith("offset.") for name in tensors) == 1 + 2 + 4
    again = router_from_arrays(*router.to_arrays())
    assert isinstance(again, GatesRouter)
    assert all(len({id(head) for head in row}) == 1 for row in again.heads)


def test_a_learned_cascade_whose_first_route_is_no_option_is_refused() -> None:
    router = random_router("learned_cascade", table_of(1))
    with pytest.raises(ValueError, match="first route 9 must be among the options"):
        replace(router, first=9)  # type: ignore[type-var]


BROKEN: Sequence[Mapping[str, Any]] = (
    {"kind": "oracle"},
    {"kind": "gate", "routes": [0]},
    {"kind": "cascade"},
    {"kind": "gates", "owners": [[0]]},
    {"kind": "gates", "owners": 3},
    {"kind": "gate", "routes": None},
    {},
)


@pytest.mark.parametrize("values", BROKEN)
def test_an_unknown_or_incomplete_router_is_a_checkpoint_error(values: Mapping[str, Any]) -> None:
    tensors = {} if values != BROKEN[5] else {"weight": torch.zeros(1, 1), "offset": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="cannot be rebuilt"):
        router_from_arrays(tensors, values)
