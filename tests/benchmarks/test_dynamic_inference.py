"""The calls that the benchmark of dynamic inference times: real group sizes, every round of a
cascade."""

from __future__ import annotations

import click
import pytest
import torch

from benchmarks.dynamic_inference import (
    VIT,
    WIDE_LIST,
    Contenders,
    InEngine,
    Network,
    Spy,
    spread_gate,
    synthetic,
    workloads,
)
from benchmarks.harness import Options
from dsnet.deploy.engines import TORCH, graph_engines
from dsnet.families import Task, create
from dsnet.routers.base import Evidence
from dsnet.routers.cascade import CascadeRouter
from dsnet.space.cost import subnet_cost
from tests.dsnet.samples import random_images, random_supernet_router, small_supernet


@pytest.mark.parametrize("num_routes", [2, 4, 14])
def test_the_spread_gate_gives_every_route_an_equal_share(num_routes: int) -> None:
    hidden = torch.rand(420, 66, generator=torch.Generator().manual_seed(0))
    gate = spread_gate(hidden, tuple(range(num_routes)))
    counts = torch.bincount(gate.step(Evidence({"hidden": hidden}, len(hidden)), ()))
    assert int(counts.max() - counts.min()) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("network", [WIDE_LIST, VIT])
def test_a_synthetic_batch_has_equal_shares_and_the_answers_of_its_routes(network: Network) -> None:
    work = synthetic(network, "cpu", seed=0)
    (batch,) = work.batches(10, seed=0)
    assert sorted(torch.bincount(work.contenders.dynamic(batch).routes).tolist()) == [2, 2, 3, 3]
    singles = work.batches(1, seed=0)
    assert [work.contenders.dynamic(single).routes.tolist() for single in singles] == [[0], [1], [2], [3]]
    assert work.contenders.largest_difference(batch) < 1e-4
    assert work.contenders.masked is None


def test_a_network_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(click.BadParameter, match="no network is called 'VGG'; known: DS-MBNet, DS-ResNet-8, DS-ViT"):
        workloads(Options(quick=True, threads=1, seed=0), None, None, None, TORCH, "VGG")


def test_the_named_width_list_leaves_room_for_an_acceleration() -> None:
    supernet = create(WIDE_LIST.family, Task(10, 3, 32), dict(WIDE_LIST.options))
    costs = [subnet_cost(supernet.spec, subnet, 32).madds for subnet in supernet.subnets]
    assert costs[WIDE_LIST.routes[-1]] > 10 * costs[WIDE_LIST.routes[0]]


@torch.no_grad()
def test_the_ideal_of_a_cascade_is_every_tail_that_ran_at_its_size() -> None:
    supernet, images = small_supernet(), random_images(9)
    confidence = supernet(images, supernet.subnets[0]).softmax(1).amax(1)
    router = CascadeRouter(0, 2, float(confidence.sort().values[3:5].mean()))
    calls = Contenders(supernet, router).calls([images])
    ideal = {name.removeprefix("ideal/0/"): call for name, call in calls.items() if name.startswith("ideal/")}
    assert set(ideal) == {"trunk", "decide", "tail 0 0", "tail 1 2"}
    assert len(ideal["tail 0 0"]()) == 9  # type: ignore[arg-type]
    assert len(ideal["tail 1 2"]()) == 4  # type: ignore[arg-type]


@pytest.mark.slow
@torch.inference_mode()
def test_the_ideal_in_an_engine_is_all_up_to_the_decision_and_the_tails_that_follow() -> None:
    pytest.importorskip("onnxruntime", reason="extra deploy is not installed")
    pytest.importorskip("onnxscript", reason="extra deploy is not installed")
    supernet, images = small_supernet().eval(), random_images(9)
    confidence = supernet(images, supernet.subnets[0]).softmax(1).amax(1)
    router = CascadeRouter(0, 2, float(confidence.sort().values[3:5].mean()))
    contenders = InEngine(supernet, router, graph_engines()[0], 1, 16)
    calls = contenders.calls([images])
    assert {name for name in calls if name.startswith("ideal")} == {"ideal/0/entry", "ideal/0/tail 2"}
    assert len(calls["ideal/0/tail 2"]()) == 4  # type: ignore[arg-type]
    assert contenders.largest_difference(images) < 1e-4
    (logits,) = calls["static widest/0"]()  # type: ignore[misc]
    torch.testing.assert_close(logits, supernet(images, supernet.subnets[2]), rtol=1e-3, atol=1e-4)


def test_a_spy_times_the_decisions_and_not_the_stop() -> None:
    supernet = small_supernet()
    spy = Spy(random_supernet_router("gate", supernet))
    Contenders(supernet, spy.router).dynamic.with_router(spy)(random_images(4))
    assert len(spy.asked) == 1
    assert len(spy.executed) == 1
