"""Gates and cascades as functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dsnet.errors import CheckpointError
from dsnet.routers import STOP, CascadeRouter, Executed, GateRouter, Router, router_from_arrays


def gate(num_routes: int = 3, hidden: int = 5, seed: int = 0) -> GateRouter:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn((num_routes, hidden), generator=generator, dtype=torch.float64)
    offset = torch.randn((num_routes,), generator=generator, dtype=torch.float64)
    return GateRouter(weight, offset, tuple(2 * k + 1 for k in range(num_routes)))


def hidden_vectors(count: int = 20) -> Tensor:
    return torch.rand((count, 5), generator=torch.Generator().manual_seed(1))


def test_a_gate_takes_the_largest_calibrated_logit() -> None:
    router, hidden = gate(), hidden_vectors()
    scores = hidden.double().numpy() @ router.weight.numpy().T - router.offset.numpy()
    routes = router.step({"hidden": hidden}, ())
    assert routes.tolist() == [router.routes[k] for k in np.argmax(scores, axis=1)]
    assert len(set(routes.tolist())) > 1
    ordered = np.sort(scores, axis=1)
    np.testing.assert_allclose(router.margin(hidden).numpy(), ordered[:, -1] - ordered[:, -2])


def test_a_gate_decides_once_and_then_stops() -> None:
    router, hidden = gate(), hidden_vectors()
    routes = router.step({"hidden": hidden}, ())
    again = router.step({"hidden": hidden}, [Executed(routes, torch.zeros(20, 4))])
    assert set(again.tolist()) == {STOP}


def test_a_gate_decides_each_image_on_its_own() -> None:
    router, hidden = gate(), hidden_vectors()
    together = router.step({"hidden": hidden}, ())
    assert [int(router.step({"hidden": row[None]}, ())) for row in hidden] == together.tolist()


def test_a_gate_of_one_route_has_no_ties() -> None:
    router = gate(num_routes=1)
    assert torch.isinf(router.margin(hidden_vectors())).all()
    assert set(router.step({"hidden": hidden_vectors()}, ()).tolist()) == {1}


def test_a_cascade_runs_the_second_where_the_first_is_unsure() -> None:
    router = CascadeRouter(0, 3, 0.6)
    logits = torch.tensor([[4.0, 0.0], [0.1, 0.0], [0.0, 3.0]])
    evidence = {"hidden": torch.zeros(3, 5)}
    first = router.step(evidence, ())
    second = router.step(evidence, [Executed(first, logits)])
    assert first.tolist() == [0, 0, 0]
    assert second.tolist() == [STOP, 3, STOP]
    assert router.step(evidence, [Executed(first, logits), Executed(second, logits)]).tolist() == [STOP] * 3
    assert router.decision_madds == 0


@pytest.mark.parametrize("router", [gate(), CascadeRouter(1, 2, 0.75)])
def test_a_router_survives_its_arrays(router: Router) -> None:
    again = router_from_arrays(*router.to_arrays())
    assert type(again) is type(router)
    assert again.needs == router.needs
    assert again.decision_madds == router.decision_madds
    evidence = {"hidden": hidden_vectors()}
    assert torch.equal(again.step(evidence, ()), router.step(evidence, ()))


@pytest.mark.parametrize("values", [{"kind": "oracle"}, {"kind": "gate", "routes": [0]}, {"kind": "cascade"}, {}])
def test_an_unknown_or_incomplete_router_is_a_checkpoint_error(values: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="cannot be rebuilt"):
        router_from_arrays({}, values)


def test_decision_madds_are_one_product_with_the_head() -> None:
    assert gate(num_routes=4).decision_madds == 20
