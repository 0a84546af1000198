"""Retracing: ties are broken towards the recorded routes, clear decisions do not change, and
nothing else of the router changes."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsnet.routers.base import Router
from dsnet.routers.cascade import CascadeRouter
from dsnet.routers.head import Head
from dsnet.routers.tree import GatesRouter
from dsnet.routing.retrace import Retrace
from dsnet.routing.table_routing import run_on_table
from tests.dsnet.samples import ROUTER_KINDS, random_router, random_table

TABLES = {1: random_table(40, 4), 2: random_table(40, 4, num_gates=2)}


def with_tie(router: Router, tie: float) -> Router:
    """A copy with another tie threshold."""
    twin = copy.copy(router)
    object.__setattr__(twin, "tie", tie)
    return twin


@pytest.mark.parametrize("num_gates", TABLES)
@pytest.mark.parametrize("kind", ROUTER_KINDS)
def test_where_everything_is_a_tie_every_route_in_use_can_be_retraced(kind: str, num_gates: int) -> None:
    table = TABLES[num_gates]
    router = with_tie(random_router(kind, table), 1e9)
    for route in router.routes:
        assert set(run_on_table(Retrace(router, route, table.tree), table).routes.tolist()) == {route}


@pytest.mark.parametrize("num_gates", TABLES)
@pytest.mark.parametrize("kind", ROUTER_KINDS)
def test_where_nothing_is_a_tie_the_router_decides(kind: str, num_gates: int) -> None:
    table = TABLES[num_gates]
    router = with_tie(random_router(kind, table), 1e-30)
    plain = run_on_table(router, table)
    for route in router.routes:
        again = run_on_table(Retrace(router, route, table.tree), table)
        np.testing.assert_array_equal(again.routes, plain.routes)
        np.testing.assert_array_equal(again.madds, plain.madds)


@given(st.sampled_from(ROUTER_KINDS), st.sampled_from([1, 2]), st.integers(0, 5), st.floats(1e-3, 1.0))
def test_only_tied_images_move_and_only_towards_the_recorded_route(
    kind: str, num_gates: int, seed: int, tie: float
) -> None:
    table = TABLES[num_gates]
    router = with_tie(random_router(kind, table, seed), tie)
    plain = run_on_table(router, table)
    for route in router.routes:
        again = run_on_table(Retrace(router, route, table.tree), table)
        moved = again.routes != plain.routes
        assert not moved[~plain.is_tie].any()
        if router.num_gates == 1:
            assert set(again.routes[moved].tolist()) <= {route}
        tails = again.ran @ (table.madds - table.trunk_madds)
        decisions = router.decision_madds(torch.from_numpy(again.routes)).numpy()
        np.testing.assert_array_equal(again.madds, table.trunk_madds + tails + decisions)


def test_an_undecided_cascade_retraced_to_its_first_route_pays_for_that_alone() -> None:
    table = TABLES[1]
    router = CascadeRouter(0, 3, float(table.confidence[7, 0]) + 1e-7)
    assert run_on_table(router, table).routes[7] == 3
    back = run_on_table(Retrace(router, 0, table.tree), table)
    assert (back.routes[7], back.madds[7]) == (0, table.madds[0])
    forth = run_on_table(Retrace(router, 3, table.tree), table)
    assert (forth.routes[7], forth.madds[7]) == (3, table.madds[0] + table.madds[3] - table.trunk_madds)


def test_at_a_later_gate_only_images_on_the_recorded_path_follow_it() -> None:
    # Gate 0 decides clearly, the second gate's scores are all equal: images that gate 0 sends
    # elsewhere keep the router's own choice there.
    table = TABLES[2]
    router = random_router("gates", table)
    assert isinstance(router, GatesRouter)
    flat, zeros = Head(torch.zeros_like(router.heads[1][0].weight)), torch.zeros(2, dtype=torch.float64)
    router = replace(router, heads=(router.heads[0], (flat, flat)), offsets=(router.offsets[0], (zeros, zeros)))
    plain = run_on_table(router, table)
    assert plain.is_tie.all()
    assert set(plain.routes.tolist()) == {0, 2}
    again = run_on_table(Retrace(router, 3, table.tree), table)
    np.testing.assert_array_equal(again.routes, np.where(plain.routes == 2, 3, 0))


def test_it_is_the_inner_router_in_everything_but_ties() -> None:
    table = TABLES[2]
    for kind in ROUTER_KINDS:
        router = random_router(kind, table, routes=(1, 2, 3))
        twin = Retrace(router, 2, table.tree)
        assert (twin.kind, twin.needs, twin.num_gates) == (kind, router.needs, router.num_gates)
        assert (twin.routes, twin.tie) == (router.routes, router.tie)
        assert twin.to_arrays()[1] == router.to_arrays()[1]
        moved = twin.over({1: 0, 2: 1, 3: 2})
        assert (moved.routes, moved.recorded) == (router.over({1: 0, 2: 1, 3: 2}).routes, 1)
        assert moved.tree == table.tree.subset((1, 2, 3))
