"""Gates trained on images, against the routing table, against slicing image by image, and against
finite differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from dsnet.data.settings import Augmentation
from dsnet.errors import NonFiniteLossError, StoppedError
from dsnet.gates import end_to_end as gate_end_to_end
from dsnet.gates.end_to_end import (
    GateCallbacks,
    GateImages,
    GateObjective,
    PathCosts,
    frozen,
    seconds_per_epoch,
    sgs_targets,
    train_end_to_end,
    train_stage,
)
from dsnet.gates.fit import calibrate_heads
from dsnet.gates.gumbel import gumbel_noise, straight_through
from dsnet.gates.losses import complexity
from dsnet.gates.mixing import Chooser, GatedSupernet
from dsnet.gates.settings import EndToEndSettings, GateSettings
from dsnet.image_size import ImageSize
from dsnet.measure.evaluate import build_routing_table
from dsnet.network.supernet import Supernet
from dsnet.seeds import derive_seed
from dsnet.space.cost import gate_madds, subnet_cost
from dsnet.space.route_tree import RouteTree
from tests.dsnet.cases import CASES, Case
from tests.dsnet.samples import NORMALIZATION, random_images, random_labels, random_pixels, small_supernet, tensor_data
from tests.shapes import unchecked_shapes

ONE_EPOCH = EndToEndSettings(epochs=1)
ALL_PATHS = {"depth": 8, "width": 0.5, "ratios": [0.5, 1.0], "paths": "all"}
"""Three gates with two choices each."""
THREE_RATIOS = {"depth": 8, "width": 1.0, "ratios": [0.25, 0.5, 1.0], "paths": "all"}
UNEVEN = {
    "depth": 8,
    "width": 0.5,
    "ratios": [0.5, 1.0],
    "paths": [[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 1], [1, 1, 0]],
}
"""Some nodes have one choice only."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def residual(options: dict[str, Any], seed: int = 0) -> Supernet:
    """A DS-ResNet of a few thousand weights."""
    return Case("end to end", "ds_resnet", options, None).supernet(seed=seed)


def gate_images(count: int = 24, size: ImageSize = 16) -> GateImages:
    return GateImages(random_pixels(count, size), random_labels(count), NORMALIZATION)


def random_choosers(
    gated: GatedSupernet, count: int, seed: int = 0, temperature: float = 0.7, dtype: torch.dtype = torch.float32
) -> list[Chooser]:
    """Heads that choose differently for different images."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Chooser(
            torch.randn(shape, generator=generator, dtype=dtype).requires_grad_(),
            gumbel_noise((count, shape[0]), generator).to(dtype),
            temperature,
        )
        for shape in gated.head_shapes
    ]


# ---- straight-through choices


@given(st.integers(1, 5), st.floats(0.1, 3.0), st.integers(0, 2**31))
@hypothesis_settings(max_examples=40, deadline=None)
def test_weights_are_exactly_one_hot_and_their_gradient_is_the_softmax_one(
    num_choices: int, temperature: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((6, num_choices), generator=generator, requires_grad=True)
    noise = gumbel_noise((6, num_choices), generator)
    scores = torch.randn((6, num_choices), generator=generator)
    weights = straight_through(logits, noise, temperature)
    expected = F.one_hot((logits + noise).argmax(1), num_choices).float()
    assert torch.equal(weights.detach(), expected)
    (met,) = torch.autograd.grad((weights * scores).sum(), logits)
    soft = ((logits + noise) / temperature).softmax(1)
    (wanted,) = torch.autograd.grad((soft * scores).sum(), logits)
    assert torch.allclose(met, wanted, atol=1e-6)


def test_what_cannot_be_chosen_gets_neither_weight_nor_gradient() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0]], requires_grad=True)
    masked = logits.masked_fill(torch.tensor([False, True, False]), -torch.inf)
    weights = straight_through(masked, torch.zeros(1, 3), 1.0)
    weights[0, 2].backward()
    assert weights.tolist() == [[0.0, 0.0, 1.0]]
    assert logits.grad is not None
    assert logits.grad[0, 1] == 0.0
    assert torch.isfinite(logits.grad).all()


def test_gumbel_noise_samples_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0])
    noise = gumbel_noise((40_000, 3), torch.Generator().manual_seed(0))
    assert torch.isfinite(noise).all()
    share = torch.bincount((logits + noise).argmax(1), minlength=3) / 40_000
    assert torch.allclose(share, logits.softmax(0), atol=0.01)


# ---- forward: really slicing


MULTI_GATE_CASES = [case for case in CASES if len(case.subnets().spec.gates) > 1]


@pytest.mark.slow
@pytest.mark.parametrize("case", MULTI_GATE_CASES, ids=str)
def test_mixing_says_what_each_images_own_path_says(case: Case) -> None:
    supernet = case.supernet()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        images = random_images(7).to(dtype)
        supernet.to(dtype)
        with frozen(supernet), torch.no_grad():
            gated = GatedSupernet(supernet, range(len(supernet.subnets)), decides_once=False)
            mixed = gated.mix_segments(gated.answers(images, [0]).trunk, random_choosers(gated, 7, dtype=dtype))
            scale = max(1.0, float(mixed.logits.abs().max()))
            for row, position in enumerate(mixed.positions.tolist()):
                alone = supernet(images[row : row + 1], supernet.subnets[position])
                assert float((mixed.logits[row] - alone[0]).abs().max()) < tolerance * scale


@pytest.mark.parametrize("options", [ALL_PATHS, THREE_RATIOS, UNEVEN], ids=["all", "three ratios", "uneven"])
def test_the_chosen_paths_follow_the_heads_gate_by_gate(options: dict[str, Any]) -> None:
    supernet = residual(options)
    images = random_images(12)
    tree = RouteTree.of(supernet.subnets)
    with frozen(supernet), torch.no_grad():
        gated = GatedSupernet(supernet, range(len(supernet.subnets)), decides_once=False)
        choosers = random_choosers(gated, len(images), seed=3)
        mixed = gated.mix_segments(gated.answers(images, [0]).trunk, choosers)
        for row in range(len(images)):
            routes = list(range(len(supernet.subnets)))
            features = images[row : row + 1]
            for gate, (chooser, branches) in enumerate(zip(choosers, tree.gates, strict=True)):
                output = supernet.upto_gate(gate, features, supernet.subnets[routes[0]])
                scores = (output.hidden @ chooser.weight.T + chooser.noise[row])[0]
                choice = max({branches.choice_of[route] for route in routes}, key=lambda k: float(scores[k]))
                routes = [route for route in routes if branches.choice_of[route] == choice]
                features = output.features
                assert mixed.weights[gate][row].tolist() == F.one_hot(torch.tensor(choice), len(scores)).tolist()
            assert routes == [mixed.positions[row].item()]
    assert len(set(mixed.positions.tolist())) > 2


def test_one_gate_says_what_each_images_own_route_says() -> None:
    supernet = small_supernet("ds_tiny")
    images = random_images(9)
    with frozen(supernet):
        for routes, once in (((0, 1, 2), True), ((0, 2), True), ((0, 2), False)):
            gated = GatedSupernet(supernet, routes, decides_once=once)
            order = list(range(len(routes)))[::-1]
            mixed = gated.mix_answers(gated.answers(images, order), order, random_choosers(gated, 9, seed=2)[0])
            assert len(set(mixed.positions.tolist())) > 1
            for row, position in enumerate(mixed.positions.tolist()):
                alone = supernet(images[row : row + 1], supernet.subnets[routes[position]])
                assert torch.allclose(mixed.logits[row], alone[0], atol=1e-5)


# ---- the loss and its gradient


def switched_madds(supernet: Supernet, path: Sequence[int], gate: int, choice: int, size: int) -> int:
    """MAdds of a path of ratios with one exchanged, by the name of the sub-network that takes
    it."""
    other = list(path)
    other[gate] = choice
    name = "path-" + "".join(map(str, other))
    (subnet,) = (subnet for subnet in supernet.subnets if subnet.name == name)
    return subnet_cost(supernet.spec, subnet, size).madds


RELAXED_SIZE = (12, 20)
"""Height and width of the images of `PlainRelaxation`."""


class PlainRelaxation:
    """The loss near a sample, image by image and without autograd: every gate's weights are its
    one-hot sample at the heads `start`, plus what softmax has moved since. Its slope is what
    straight-through training must follow."""

    def __init__(self, supernet: Supernet, objective: GateObjective, images: Tensor, labels: Tensor) -> None:
        self.supernet, self.objective, self.images, self.labels = supernet, objective, images, labels
        self.paths = {tuple(map(int, subnet.name.removeprefix("path-"))): subnet for subnet in supernet.subnets}
        self.anchors: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.num_gates = len(supernet.spec.gates)

    def _weights(self, row: int, gate: int, hidden: Tensor, head: Tensor, chooser: Chooser) -> Tensor:
        p = ((head @ hidden[0] + chooser.noise[row]) / chooser.temperature).softmax(0)
        if (row, gate) not in self.anchors:
            self.anchors[row, gate] = (F.one_hot(p.argmax(), len(p)).to(p.dtype), p)
        hard, first = self.anchors[row, gate]
        return hard + p - first

    def _mixed(self, row: int, heads: Sequence[Tensor], choosers: Sequence[Chooser]) -> tuple[Tensor, list[Tensor]]:
        """Logits [1, C] and the weights of all gates."""
        path: tuple[int, ...] = ()
        weights = []
        any_path = next(iter(self.paths.values()))
        output = self.supernet.upto_gate(0, self.images[row : row + 1], any_path)
        features, hidden = output.features, output.hidden
        for gate in range(self.num_gates):
            own = self._weights(row, gate, hidden, heads[gate], choosers[gate])
            weights.append(own)
            results: list[tuple[Tensor, ...]] = []
            for choice in range(len(own)):
                subnet = next(subnet for key, subnet in self.paths.items() if key[: gate + 1] == (*path, choice))
                if gate + 1 == self.num_gates:
                    results.append((self.supernet.head(features, subnet),))
                else:
                    output = self.supernet.upto_gate(gate + 1, features, subnet)
                    results.append((output.features, output.hidden))
            path = (*path, int(self.anchors[row, gate][0].argmax()))
            mixed = []
            for parts in zip(*results, strict=True):
                total = torch.zeros_like(max(parts, key=lambda part: part.shape[1]))
                for weight, part in zip(own, parts, strict=True):
                    total[:, : part.shape[1]] += weight * part
                mixed.append(total)
            features, hidden = mixed if len(mixed) == 2 else (mixed[0], mixed[0])
        return features, weights

    def _sgs(self, row: int, heads: Sequence[Tensor]) -> float:
        """Summed over the gates on the target path, from really running it."""
        gate_settings = self.objective.settings
        madds = {
            path: subnet_cost(self.supernet.spec, subnet, RELAXED_SIZE).madds for path, subnet in self.paths.items()
        }
        small, large = min(madds, key=lambda path: madds[path]), max(madds, key=lambda path: madds[path])
        image, label = self.images[row : row + 1], int(self.labels[row])
        small_right, large_right = (
            int(self.supernet(image, self.paths[path]).argmax()) == label for path in (small, large)
        )
        hard = large if gate_settings.strategy == "try_best" else small
        target = small if small_right else large if large_right else hard
        total = 0.0
        features = image
        for gate, choice in enumerate(target):
            output = self.supernet.upto_gate(gate, features, self.paths[target])
            total -= float((heads[gate] @ output.hidden[0]).log_softmax(0)[choice])
            features = output.features
        return total

    @torch.no_grad()
    def __call__(self, heads: Sequence[Tensor], choosers: Sequence[Chooser]) -> float:
        chosen = self.objective.settings
        every = [subnet_cost(self.supernet.spec, subnet, RELAXED_SIZE).madds for subnet in self.supernet.subnets]
        decision = sum(gate.hidden * len(head) for gate, head in zip(self.supernet.spec.gates, heads, strict=True))
        cls = sgs = madds = 0.0
        for row in range(len(self.images)):
            logits, weights = self._mixed(row, heads, choosers)
            cls += float(F.cross_entropy(logits, self.labels[row : row + 1]))
            sgs += self._sgs(row, heads)
            for path, subnet in self.paths.items():
                share = math.prod(float(weights[gate][choice]) for gate, choice in enumerate(path))
                madds += share * (subnet_cost(self.supernet.spec, subnet, RELAXED_SIZE).madds + decision)
        count = len(self.images)
        target = min(every) + chosen.target * (max(every) - min(every))
        cost = complexity(torch.tensor(madds / count, dtype=torch.float64), target, max(every), chosen.complexity_form)
        return (
            chosen.lambda_cls * cls / count + chosen.lambda_sgs * sgs / count + chosen.lambda_complexity * float(cost)
        )


@pytest.mark.slow
@pytest.mark.parametrize("options", [ALL_PATHS, THREE_RATIOS], ids=["two ratios", "three ratios"])
@pytest.mark.parametrize("strategy", ["try_best", "give_up"])
def test_the_gradient_of_several_gates_is_that_of_the_soft_relaxation(options: dict[str, Any], strategy: str) -> None:
    supernet = residual(options).double()
    images, labels = random_images(4, RELAXED_SIZE).double(), random_labels(4)
    gate = GateSettings(
        router="gates", strategy=strategy, lambda_cls=1.3, lambda_sgs=0.3, complexity_form="quadratic", target=0.4
    )
    with frozen(supernet):
        objective = GateObjective(supernet, gate, RELAXED_SIZE)
        choosers = random_choosers(objective.gated, len(images), seed=5, temperature=1.5, dtype=torch.float64)
        loss = objective(images, labels, choosers)
        loss.backward()
        plain = PlainRelaxation(supernet, objective, images, labels)
        heads = [chooser.weight.detach().clone() for chooser in choosers]
        assert plain(heads, choosers) == pytest.approx(loss.item(), rel=1e-9)
        generator = torch.Generator().manual_seed(1)
        for number, chooser in enumerate(choosers):
            direction = torch.randn(chooser.weight.shape, generator=generator, dtype=torch.float64)
            step = 1e-5
            ends = []
            for sign in (1, -1):
                moved = [head + sign * step * direction * (index == number) for index, head in enumerate(heads)]
                ends.append(plain(moved, choosers))
            assert chooser.weight.grad is not None
            slope = float((chooser.weight.grad * direction).sum())
            assert abs(slope) > 1e-4
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=1e-4)


def test_the_task_reaches_earlier_gates_through_later_ones() -> None:
    supernet = residual(ALL_PATHS)
    with frozen(supernet):
        gate = GateSettings(router="gates", lambda_sgs=0.0, lambda_complexity=0.0)
        objective = GateObjective(supernet, gate, 16)
        choosers = random_choosers(objective.gated, 6)
        objective(random_images(6), random_labels(6), choosers).backward()
        assert all(chooser.weight.grad is not None and chooser.weight.grad.any() for chooser in choosers)
        assert all(parameter.grad is None for parameter in supernet.parameters())


def test_expected_madds_are_those_of_the_chosen_routes_with_every_decision() -> None:
    supernet = residual(UNEVEN)
    with frozen(supernet):
        objective = GateObjective(supernet, GateSettings(router="gates"), 16)
        gated = objective.gated
        mixed = gated.mix_segments(gated.answers(random_images(8), [0]).trunk, random_choosers(gated, 8))
    decision = sum(gate_madds(gate.hidden, 2) for gate in supernet.spec.gates)
    chosen = [supernet.subnets[position] for position in mixed.positions.tolist()]
    exact = np.mean([subnet_cost(supernet.spec, subnet, 16).madds + decision for subnet in chosen])
    assert float(objective.costs.expected(mixed).detach()) == pytest.approx(exact, rel=1e-6)


def test_a_switched_route_costs_what_the_route_with_that_choice_costs() -> None:
    supernet = residual(THREE_RATIOS)
    with frozen(supernet):
        costs = GateObjective(supernet, GateSettings(router="gates"), 16).costs
    decision = sum(gate_madds(gate.hidden, 3) for gate in supernet.spec.gates)
    for position, subnet in enumerate(supernet.subnets):
        path = [int(digit) for digit in subnet.name.removeprefix("path-")]
        for gate in range(3):
            for choice in range(3):
                expected = switched_madds(supernet, path, gate, choice, 16) + decision
                assert costs.switched[gate][position, choice] == expected


def test_the_target_is_clamped_into_the_routing_space() -> None:
    supernet = small_supernet("ds_tiny")
    every = [subnet_cost(supernet.spec, subnet, 16).madds for subnet in supernet.subnets]
    hidden = supernet.spec.gates[0].hidden
    with frozen(supernet):
        low = GateObjective(supernet, GateSettings(target=0.0, routes=(1, 2)), 16).costs
        high = GateObjective(supernet, GateSettings(target=1.0, routes=(0, 1)), 16).costs
        given = GateObjective(supernet, GateSettings(target_madds_m=every[1] / 1e6), 16).costs
    assert low.target == every[1] + gate_madds(hidden, 2)
    assert high.target == every[1] + gate_madds(hidden, 2)
    assert low.widest == high.widest == every[2]
    assert given.target == pytest.approx(every[1])


# ---- sandwich gate sparsification


@given(st.integers(0, 2**31), st.sampled_from(["try_best", "give_up"]), st.sampled_from(["extremes", "cheapest"]))
@hypothesis_settings(max_examples=30, deadline=None)
def test_sgs_targets_follow_the_precedence_image_by_image(seed: int, strategy: str, target: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn((30, 3, 4), generator=generator)
    labels = torch.randint(4, (30,), generator=generator)
    gate = GateSettings(strategy=strategy, sgs_target=target, t_easy=0.5, t_hard=0.4)
    met = sgs_targets(logits, labels, gate).tolist()
    for row in range(30):
        p = [float(logits[row, route].softmax(0)[labels[row]]) for route in range(3)]
        right = [int(logits[row, route].argmax()) == int(labels[row]) for route in range(3)]
        given_up = 2 if strategy == "try_best" else 0
        if target == "cheapest":
            assert met[row] == (right.index(True) if any(right) else given_up)
        elif right[0] and p[0] >= 0.5:
            assert met[row] == 0
        elif not right[2] or p[2] < 0.4:
            assert met[row] == given_up
        else:
            assert met[row] == 2


@pytest.mark.parametrize("sgs_target", ["extremes", "cheapest"])
@pytest.mark.parametrize("options", [UNEVEN, ALL_PATHS], ids=["uneven", "all"])
def test_the_sgs_loss_is_minus_the_log_probability_of_the_target_path(options: dict[str, Any], sgs_target: str) -> None:
    supernet = residual(options)
    images, labels = random_images(10), random_labels(10)
    gate = GateSettings(router="gates", lambda_cls=0.0, lambda_complexity=0.0, sgs_target=sgs_target)
    tree = RouteTree.of(supernet.subnets)
    with frozen(supernet), torch.no_grad():
        objective = GateObjective(supernet, gate, 16)
        choosers = random_choosers(objective.gated, 10)
        met = float(objective(images, labels, choosers))
        order = supernet.subnets.by_madds(16)
        answers = torch.stack([supernet(images, supernet.subnets[route]) for route in order], dim=1)
        total = 0.0
        for row, column in enumerate(sgs_targets(answers, labels, gate).tolist()):
            target = order[column]
            features = images[row : row + 1]
            for number, branches in enumerate(tree.gates):
                output = supernet.upto_gate(number, features, supernet.subnets[target])
                logits = (choosers[number].weight @ output.hidden[0]).tolist()
                has = {branches.choice_of[route] for route in branches.routes_at(branches.node_of[target])}
                total += math.log(sum(math.exp(logits[choice]) for choice in has)) - logits[branches.choice_of[target]]
                features = output.features
    assert met == pytest.approx(total / 10, rel=1e-4)


# ---- training


def test_one_gate_trains_as_on_the_routing_table_with_the_same_choices() -> None:
    supernet = small_supernet("ds_tiny")
    data = tensor_data(40, split="gate")
    gate = GateSettings(
        routes=(0, 2), optimizer="sgd", lr=0.5, weight_decay=0.01, batch_size=16, target=0.3, t_easy=0.1, seed=4
    )
    rules = EndToEndSettings(epochs=4)
    images = GateImages(data.images("gate"), data.labels("gate"), NORMALIZATION)
    (head,) = train_end_to_end(supernet, images, gate, rules)

    table = build_routing_table(supernet, data, "gate", NORMALIZATION)
    hidden = torch.from_numpy(table.part("hidden").copy())
    scale = hidden.pow(2).mean(0).sqrt().clamp_min(1e-6)
    with torch.no_grad():
        pixels = NORMALIZATION.apply(data.images("gate"))
        logits = torch.stack([supernet(pixels, supernet.subnets[route]) for route in gate.routes], dim=1)
    madds = torch.from_numpy(table.madds[list(gate.routes)] + gate_madds(hidden.shape[1], 2)).double()
    low, high = table.madds.min(), table.madds.max()
    wanted = float(np.clip(low + gate.target * (high - low), madds.min(), madds.max()))
    easy = table.correct1[:, 0] & (np.exp(-table.ce[:, 0]) >= gate.t_easy)
    targets = torch.from_numpy(np.where(easy, 0, 1))
    weight = torch.zeros(2, hidden.shape[1], requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.5, momentum=0.9, nesterov=True, weight_decay=0.01)
    order, noise = (torch.Generator().manual_seed(derive_seed(4, "end_to_end", name)) for name in ("order", "noise"))
    taus = np.geomspace(gate.temperature_start, gate.temperature_end, 4 * 3).tolist()
    for _ in range(4):
        for rows in torch.randperm(40, generator=order).split(16):
            own = (hidden[rows] / scale) @ weight.T
            drawn = gumbel_noise((len(rows), 2), noise)
            p = ((own + drawn) / taus.pop(0)).softmax(1)
            choice = p.argmax(1)
            ce = torch.from_numpy(table.ce[rows.numpy()][np.arange(len(rows)), np.array(gate.routes)[choice.numpy()]])
            # The slope of CE along another route's logits, at the chosen route's logits.
            chosen = logits[rows, choice]
            slope = chosen.softmax(1) - F.one_hot(torch.from_numpy(table.labels)[rows], 10)
            gain = (logits[rows] * slope[:, None]).sum(2)
            cls = (ce + (gain * (p - p.detach())).sum(1)).mean()
            one_hot = F.one_hot(choice, 2) + p - p.detach()
            cost = complexity((one_hot.double() @ madds).mean(), wanted, float(high), gate.complexity_form)
            loss = cls + F.cross_entropy(own, targets[rows]) + 0.5 * cost
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert not taus
    expected = weight.detach().double() / scale.double()
    assert float((head - expected).abs().max()) < 1e-3 * float(expected.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("router", ["gate", "gates"])
@pytest.mark.parametrize("family", ["ds_tiny", "ds_mbnet", "ds_resnet"])
def test_nothing_of_the_supernet_changes_and_only_heads_get_gradients(family: str, router: str) -> None:
    supernet = small_supernet(family).train()
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    heads = train_end_to_end(supernet, gate_images(), GateSettings(router=router, batch_size=10), ONE_EPOCH)
    after = supernet.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in supernet.parameters())
    assert all(module.training for module in supernet.modules())
    assert any(bool(head.any()) for head in heads)
    assert all(head.dtype == torch.float64 for head in heads)


def test_a_failure_leaves_the_supernet_as_it_was() -> None:
    supernet = small_supernet("ds_tiny").train()
    next(supernet.parameters()).requires_grad_(False)
    with pytest.raises(StoppedError):
        train_end_to_end(
            supernet, gate_images(), GateSettings(), ONE_EPOCH, callbacks=GateCallbacks(should_stop=lambda: True)
        )
    assert supernet.training
    assert [parameter.requires_grad for parameter in supernet.parameters()].count(False) == 1


@pytest.mark.parametrize("router", ["gate", "gates"])
def test_heads_have_a_row_per_route_or_per_choice(router: str) -> None:
    supernet = residual(ALL_PATHS)
    hidden = [gate.hidden for gate in supernet.spec.gates]
    gate = GateSettings(router=router, routes=(0, 1, 3))  # 000, 001, 011
    heads = train_end_to_end(supernet, gate_images(), gate, ONE_EPOCH)
    expected = [(3, hidden[0])] if router == "gate" else [(2, size) for size in hidden]
    assert [tuple(head.shape) for head in heads] == expected


@pytest.mark.slow
def test_training_is_repeatable_and_depends_on_the_seed() -> None:
    supernet = residual(ALL_PATHS)
    gate = GateSettings(router="gates", batch_size=10)
    rules = EndToEndSettings(epochs=1, augmentation=Augmentation(crop_padding=2, flip=True))
    first, again, other, plain = (
        train_end_to_end(supernet, gate_images(), replace(gate, seed=seed), use)
        for seed, use in ((0, rules), (0, rules), (1, rules), (0, ONE_EPOCH))
    )
    for one, two, three, four in zip(first, again, other, plain, strict=True):
        assert torch.equal(one, two)
        assert not torch.equal(one, three)
        assert not torch.equal(one, four)


@pytest.mark.slow
@pytest.mark.parametrize("router", ["gate", "gates"])
def test_training_lowers_the_deployed_loss(router: str) -> None:
    supernet = residual(ALL_PATHS)
    data = gate_images(64)
    gate = GateSettings(
        router=router, lr=0.05, batch_size=32, lambda_complexity=2.0, complexity_form="quadratic", target=0.5
    )
    heads = train_end_to_end(supernet, data, gate, EndToEndSettings(epochs=12))
    with frozen(supernet), torch.no_grad():
        objective = GateObjective(supernet, gate, 16)

        def loss(weights: Sequence[Tensor]) -> float:
            noiseless = [Chooser(weight.float(), torch.zeros(64, len(weight)), 1.0) for weight in weights]
            return float(objective(NORMALIZATION.apply(data.images), data.labels, noiseless))

        assert loss(heads) < loss([torch.zeros_like(head) for head in heads]) - 0.1


def test_progress_is_heard_and_a_stop_comes_before_the_next_step() -> None:
    heard: list[tuple[int, int]] = []
    with pytest.raises(StoppedError):
        train_end_to_end(
            small_supernet("ds_tiny"),
            gate_images(),
            GateSettings(batch_size=10),
            EndToEndSettings(epochs=3),
            callbacks=GateCallbacks(
                should_stop=lambda: len(heard) == 4,
                on_progress=lambda done, total: heard.append((done, total)),
            ),
        )
    assert heard == [(1, 9), (2, 9), (3, 9), (4, 9)]


def test_the_temperature_falls_geometrically_over_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[float] = []

    def noting(weight: Tensor, noise: Tensor, temperature: float) -> Chooser:
        met.append(temperature)
        return Chooser(weight, noise, temperature)

    monkeypatch.setattr(gate_end_to_end, "Chooser", noting)
    gate = GateSettings(batch_size=10, temperature_start=2.0, temperature_end=0.25)
    train_end_to_end(small_supernet("ds_tiny"), gate_images(), gate, EndToEndSettings(epochs=2))
    assert (met[0], met[-1]) == (2.0, pytest.approx(0.25))
    assert np.allclose([b / a for a, b in pairwise(met)], (0.25 / 2.0) ** (1 / 5))


def test_a_diverging_loss_is_an_error_that_names_the_step_and_the_way_out() -> None:
    supernet = small_supernet("ds_tiny")
    gate = GateSettings(optimizer="sgd", lr=1e6, lambda_cls=1e38, batch_size=8)
    with pytest.raises(NonFiniteLossError, match=r"step \d+; lower gate.optimizer.lr \(now 1000000\.0\)"):
        train_end_to_end(supernet, gate_images(), gate, EndToEndSettings(epochs=3))


def test_bad_settings_say_what_is_wrong() -> None:
    supernet = small_supernet("ds_tiny")
    with pytest.raises(ValueError, match="gate and gates, not 'cascade'"):
        train_end_to_end(supernet, gate_images(), GateSettings(router="cascade"), ONE_EPOCH)
    with pytest.raises(ValueError, match=r"losses\.quality is 0\.5"):
        train_end_to_end(supernet, gate_images(), GateSettings(lambda_quality=0.5), ONE_EPOCH)
    for routes in ((0, 9), (1, 0), (-1, 1)):
        with pytest.raises(ValueError, match=r"increasing ids in 0\.\.2"):
            train_end_to_end(supernet, gate_images(), GateSettings(routes=routes), ONE_EPOCH)
    with pytest.raises(ValueError, match="epochs is 0"):
        EndToEndSettings(epochs=0)
    with pytest.raises(ValueError, match="got 0 images and 0 labels"):
        GateImages(random_pixels(0), random_labels(0), NORMALIZATION)
    with unchecked_shapes(), pytest.raises(ValueError, match="got 3 images and 2 labels"):
        GateImages(random_pixels(3), random_labels(2), NORMALIZATION)


def test_the_costs_of_training_are_those_of_the_images_that_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[PathCosts] = []
    count = PathCosts.of

    def noted(*args: Any) -> PathCosts:
        met.append(count(*args))
        return met[-1]

    monkeypatch.setattr(PathCosts, "of", noted)
    supernet, size = residual(ALL_PATHS), (12, 20)
    gate = GateSettings(router="gates", batch_size=8)
    train_end_to_end(supernet, gate_images(8, size), gate, ONE_EPOCH)
    assert met[0].widest == max(subnet_cost(supernet.spec, subnet, size).madds for subnet in supernet.subnets)


def test_a_routing_space_of_one_route_trains_without_a_choice() -> None:
    for router in ("gate", "gates"):
        supernet = residual(ALL_PATHS)
        heads = train_end_to_end(supernet, gate_images(8), GateSettings(router=router, routes=(5,)), ONE_EPOCH)
        assert all(torch.isfinite(head).all() for head in heads)


@pytest.mark.parametrize("router", ["gate", "gates"])
@pytest.mark.parametrize("routes", [(), (0, 1, 3)], ids=["all", "some"])
def test_calibration_takes_the_heads_and_counts_the_same_cost(router: str, routes: tuple[int, ...]) -> None:
    supernet = residual(ALL_PATHS)
    gate = GateSettings(router=router, routes=routes, target=0.4)
    heads = train_end_to_end(supernet, gate_images(), gate, ONE_EPOCH)
    table = build_routing_table(supernet, tensor_data(30), "val", NORMALIZATION)
    fit = calibrate_heads(table, gate, heads)
    with frozen(supernet):
        costs = GateObjective(supernet, gate, 16).costs
    assert fit.router.kind == router
    assert fit.metrics["target_madds_m"] == pytest.approx(costs.target / 1e6, rel=1e-12)
    by_route = dict(zip(routes or range(8), costs.madds.tolist(), strict=True))
    assert [by_route[route] for route in fit.run.routes.tolist()] == fit.run.madds.tolist()


def test_an_epochs_time_grows_with_the_images() -> None:
    supernet = small_supernet("ds_tiny")
    gate = GateSettings(batch_size=8)
    few, many = (seconds_per_epoch(supernet, gate_images(count), gate, ONE_EPOCH) for count in (8, 80))
    assert many > 2 * few > 0


# ---- in stages


STAGED = EndToEndSettings(epochs=5, augmentation=Augmentation(crop_padding=2, flip=True))
SMALL_STEPS = GateSettings(batch_size=10, lr=0.02, weight_decay=0.01, temperature_end=0.2, seed=3)
"""Three steps an epoch, the last of which is smaller."""


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("router", ["gate", "gates"])
def test_stages_end_bit_by_bit_where_one_pass_ends(router: str, optimizer: str) -> None:
    supernet = residual(ALL_PATHS)
    gate = replace(SMALL_STEPS, router=router, optimizer=optimizer)
    at_once = train_end_to_end(supernet, gate_images(), gate, STAGED)
    progress = None
    for until in (1, 3, None):
        stage = train_stage(supernet, gate_images(), gate, STAGED, start=progress, until=until)
        from_the_start = train_stage(supernet, gate_images(), gate, STAGED, until=until)
        for one, other in zip(stage.heads, from_the_start.heads, strict=True):
            assert torch.equal(one, other)
        assert stage.progress.keys() == from_the_start.progress.keys()
        assert all(np.array_equal(array, from_the_start.progress[name]) for name, array in stage.progress.items())
        progress = stage.progress
        for array in progress.values():
            array.flags.writeable = False  # as they come back from the object store
    for one, other in zip(stage.heads, at_once, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("left_out", ["optimizer/0/exp_avg", "random/order", "random/noise", "random/augmentation"])
def test_every_part_of_the_progress_matters(left_out: str) -> None:
    supernet = residual(ALL_PATHS)
    stage = train_stage(supernet, gate_images(), SMALL_STEPS, STAGED, until=2)
    begun = train_stage(supernet, gate_images(), replace(SMALL_STEPS, seed=9), STAGED, until=1)
    spoilt = {**stage.progress, left_out: begun.progress[left_out]}
    (right,), (wrong,) = (
        train_stage(supernet, gate_images(), SMALL_STEPS, STAGED, start=start, until=3).heads
        for start in (stage.progress, spoilt)
    )
    assert not torch.equal(right, wrong)


def test_a_stage_is_the_beginning_of_the_whole_and_not_a_shorter_one() -> None:
    supernet = small_supernet("ds_tiny")
    (stage,) = train_stage(supernet, gate_images(), SMALL_STEPS, STAGED, until=2).heads
    (shorter,) = train_end_to_end(supernet, gate_images(), SMALL_STEPS, replace(STAGED, epochs=2))
    assert not torch.equal(stage, shorter)


def test_a_stage_that_is_done_is_repeated_without_a_step() -> None:
    supernet = small_supernet("ds_tiny")
    stage = train_stage(supernet, gate_images(), SMALL_STEPS, STAGED, until=2)
    heard: list[tuple[int, int]] = []
    again = train_stage(
        supernet,
        gate_images(),
        SMALL_STEPS,
        STAGED,
        start=stage.progress,
        until=2,
        callbacks=GateCallbacks(on_progress=lambda done, total: heard.append((done, total))),
    )
    assert heard == []
    assert torch.equal(again.heads[0], stage.heads[0])


def test_a_later_stage_counts_its_steps_within_the_whole() -> None:
    supernet = small_supernet("ds_tiny")
    start = train_stage(supernet, gate_images(), SMALL_STEPS, STAGED, until=3).progress
    heard: list[tuple[int, int]] = []
    train_stage(
        supernet,
        gate_images(),
        SMALL_STEPS,
        STAGED,
        start=start,
        until=4,
        callbacks=GateCallbacks(on_progress=lambda done, total: heard.append((done, total))),
    )
    assert heard == [(10, 15), (11, 15), (12, 15)]


def test_the_progress_is_small_and_a_copy() -> None:
    supernet = residual(ALL_PATHS)
    gate = replace(SMALL_STEPS, router="gates")
    first = train_stage(supernet, gate_images(), gate, STAGED, until=1).progress
    kept = {name: array.copy() for name, array in first.items()}
    train_stage(supernet, gate_images(), gate, STAGED, start=first, until=4)
    assert all(np.array_equal(array, kept[name]) for name, array in first.items())
    weights = sum(array.nbytes for name, array in first.items() if name.startswith("head/"))
    assert sum(array.nbytes for array in first.values()) < 16_000 + 5 * weights


def test_a_gate_without_a_choice_trains_in_stages_too() -> None:
    supernet = residual(ALL_PATHS)
    gate = replace(SMALL_STEPS, router="gates", routes=(5,))
    start = train_stage(supernet, gate_images(8), gate, STAGED, until=1).progress
    (*staged,) = train_stage(supernet, gate_images(8), gate, STAGED, start=start).heads
    at_once = train_end_to_end(supernet, gate_images(8), gate, STAGED)
    assert all(torch.equal(one, other) for one, other in zip(staged, at_once, strict=True))


def test_impossible_stages_say_what_is_wrong() -> None:
    supernet = small_supernet("ds_tiny")
    for until in (0, 6):
        with pytest.raises(ValueError, match=rf"ends after epoch {until}, but must end in 1\.\.5"):
            train_stage(supernet, gate_images(), SMALL_STEPS, STAGED, until=until)
    start = train_stage(supernet, gate_images(), SMALL_STEPS, STAGED, until=3).progress
    with pytest.raises(ValueError, match="ends after epoch 2, but starts after 3"):
        train_stage(supernet, gate_images(), SMALL_STEPS, STAGED, start=start, until=2)
    with pytest.raises(ValueError, match="heads of the shapes"):
        train_stage(supernet, gate_images(), replace(SMALL_STEPS, routes=(0, 2)), STAGED, start=start)
