"""The check before a search: it reports products that depend on the other rows of their batch, and
only those."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsnet.arithmetic import MKL_MODE
from search.gate_check import MAX_SHAPES, Finding, GateCheck
from search.gate_trial import GateScores, GateTrial
from search.suggest.space import parse_space
from tests.dsnet.samples import needs_products_apart, random_table, small_set
from tests.search.samples import DEFAULTS, latency

LEARNING = ["gate", "evidence_gate", "gates", "evidence_gates", "learned_cascade"]
SMALL = {**DEFAULTS, "gate.optimizer.batch_size": 17, "gate.perceptron.hidden_units": 3}
"""Sizes at which, without `MKL_CBWR`, MKL's kernels for AMD processors round differently alone and
in a batch."""


def check_of(**space: Any) -> GateCheck:
    return GateCheck.of_space(
        parse_space({"gate.optimizer.lr": {"loguniform": [0.01, 0.3]}, **{f"gate.{k}": v for k, v in space.items()}})
    )


def trial_of(num_routes: int = 8, num_gates: int = 3, defaults: dict[str, Any] = SMALL) -> GateTrial:
    subnets = small_set("ds_tiny")
    table = random_table(51, num_routes, seed=1, num_gates=num_gates)
    return GateTrial(table, table, GateScores(subnets, latency(subnets)), defaults)


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make a product of torch round differently if more than two of them share a call."""

    def replace(name: str) -> None:
        real = getattr(torch.Tensor if name.endswith("_") else torch, name)

        def rounded(*operands: Tensor, **options: Any) -> Tensor:
            product: Tensor = real(*operands, **options)
            return product.mul_(1.0 + 2.0**-23) if len(product) > 2 else product

        monkeypatch.setattr(torch.Tensor if name.endswith("_") else torch, name, rounded)

    return replace


@needs_products_apart
def test_routers_of_every_kind_are_the_same_in_company_on_this_machine() -> None:
    check, trial = check_of(router={"choice": [*LEARNING, "cascade"]}), trial_of()
    assert {own.router for own in check.shapes(trial)} == set(LEARNING)
    finding = check(trial)
    assert finding.unequal == (), f"set {MKL_MODE} as dsnet.arithmetic chooses it"
    assert check(trial) == finding, "the same on every call"


@pytest.mark.parametrize("product", ["bmm", "baddbmm", "baddbmm_"])
def test_a_product_that_rounds_by_its_company_is_found(product: str, rounding: Callable[[str], None]) -> None:
    check = check_of(router={"choice": ["gate", "evidence_gate"]})
    rounding(product)
    only_perceptrons_use_it = product == "baddbmm"
    assert check(trial_of(4, 1)).unequal == (
        ("evidence_gate",) if only_perceptrons_use_it else ("evidence_gate", "gate")
    )


def test_another_rounding_that_is_the_same_for_all_shows_in_the_digest_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    check, trial = check_of(router={"choice": ["gate"]}), trial_of(4, 1)
    before = check(trial)
    real = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *operands: real(*operands).mul_(1.0 + 2.0**-23))
    after = check(trial)
    assert (before.unequal, after.unequal) == ((), ())
    assert before.digest != after.digest


def test_every_shape_is_looked_at_and_kinds_come_before_sizes() -> None:
    check = check_of(
        router={"choice": ["gate", "evidence_gate"]},
        **{"perceptron.hidden_units": {"choice": [3, 5, 7]}, "optimizer.batch_size": {"choice": [16, 17, 64]}},
    )
    shapes = check.shapes(trial_of())
    assert len(shapes) == MAX_SHAPES
    assert {own.router for own in shapes[:2]} == {"gate", "evidence_gate"}
    assert {own.batch_size for own in shapes} == {16, 17, 64}


def test_trials_that_cannot_be_made_or_learn_nothing_are_passed_over() -> None:
    impossible = check_of(**{"routing.first": {"fixed": 99}})
    assert impossible(trial_of()) == Finding(check_of(router={"fixed": "cascade"})(trial_of()).digest)
    one_route = check_of(router={"fixed": "learned_cascade"}, **{"routing.first": {"fixed": 7}})
    assert one_route(trial_of()).unequal == ()
