"""Verify detects every image whose run differs from the routing table, and accepts differences that
rounding explains."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dsnet.data.tensors import TensorData
from dsnet.deploy.dynamic import DynamicNet
from dsnet.errors import VerificationError
from dsnet.files import atomic_write_json
from dsnet.measure.evaluate import build_routing_table
from dsnet.measure.latency import device_name, measure_latency
from dsnet.measure.settings import LatencySettings
from dsnet.network.batchnorm import recalibrate
from dsnet.network.supernet import Supernet
from dsnet.routers.base import Router
from dsnet.routers.cascade import CascadeRouter
from dsnet.routers.gate import GateRouter
from dsnet.routing.routing_table import RoutingTable
from dsnet.routing.table_routing import run_on_table
from orchestration.pipeline.agreement import CLASS_TIE, check_agreement, drawn_batches, time_front
from orchestration.pipeline.verify import known_agreements
from orchestration.results.verified import Agreement, DynamicLatency
from orchestration.runs.folder import RunDir
from orchestration.runs.manifest import Manifest
from orchestration.runs.stages import StageDefinition, plan_stage, run_stage
from search.front.analysis import analyse_split
from search.front.ceiling import RouteForecast
from tests.dsnet.measure.clocked_engine import NAME, STATIC_MS, TAIL_MS, TRUNK_MS, ClockedEngine
from tests.dsnet.samples import (
    NORMALIZATION,
    ROUTER_KINDS,
    batch1_ms,
    random_router,
    small_supernet,
    tensor_data,
    three_gate_supernet,
)

SLOT = 42


def calibrated(supernet: Supernet, data: TensorData) -> Supernet:
    """The supernet with statistics of these images, without which all images give similar
    outputs."""
    recalibrate(supernet, [NORMALIZATION.apply(data.images("val"))])
    return supernet.eval()


@pytest.fixture(scope="module")
def supernet(data: TensorData) -> Supernet:
    return calibrated(small_supernet(), data)


@pytest.fixture(scope="module")
def data() -> TensorData:
    return tensor_data(40)


@pytest.fixture(scope="module")
def table(supernet: Supernet, data: TensorData) -> RoutingTable:
    return build_routing_table(supernet, data, "val", NORMALIZATION, batch_size=16)


@pytest.fixture(scope="module")
def router(table: RoutingTable) -> GateRouter:
    """A gate that uses all three routes."""
    hidden = torch.from_numpy(table.part("hidden").copy()).double()
    weight = torch.randn((3, hidden.shape[1]), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    router = GateRouter(weight, (hidden @ weight.T).mean(0), (0, 1, 2))
    assert set(run_on_table(router, table).routes.tolist()) == {0, 1, 2}
    return router


def agree(supernet: Supernet, router: Router, table: RoutingTable, data: TensorData, batch_size: int = 256):  # type: ignore[no-untyped-def]
    return check_agreement(SLOT, supernet, router, table, data.images("val"), NORMALIZATION, batch_size)


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_what_really_runs_is_what_the_table_says_whatever_the_batch(
    supernet: Supernet, router: GateRouter, table: RoutingTable, data: TensorData, batch_size: int
) -> None:
    found = agree(supernet, router, table, data, batch_size)
    routes = run_on_table(router, table).routes
    rows = np.arange(table.num_images)
    assert found.slot == SLOT
    assert found.num_images == 40
    assert found.num_ties == 0
    assert found.top1 == pytest.approx(table.correct1[rows, routes].mean())
    assert found.madds_m == pytest.approx((table.madds[routes] + router.weight.numel()).mean() / 1e6)


@pytest.mark.slow
@pytest.mark.parametrize("make", [small_supernet, three_gate_supernet])
@pytest.mark.parametrize("kind", ROUTER_KINDS)
def test_every_router_does_image_by_image_what_the_table_says_and_a_changed_table_is_noticed(
    data: TensorData, kind: str, make: Callable[[], Supernet]
) -> None:
    supernet = calibrated(make(), data)
    table = build_routing_table(supernet, data, "val", NORMALIZATION)
    router = random_router(kind, table)
    run = run_on_table(router, table)
    found = agree(supernet, router, table, data, batch_size=16)
    assert found.num_ties <= run.is_tie.sum() < 10
    assert found.madds_m == pytest.approx(run.madds.mean() / 1e6, rel=0.1 * found.num_ties + 1e-9)
    assert found.top1 == pytest.approx(table.correct1[np.arange(40), run.routes].mean(), abs=found.num_ties / 40)
    with pytest.raises(VerificationError, match="40 of 40"):
        agree(supernet, router, replace(table, madds=table.madds + 1), data)
    with pytest.raises(VerificationError, match="1 of 40"):
        agree(supernet, router, tampered_class(table, router, int(run.lead.argmax())), data)


def test_an_undecided_cascade_may_stop_or_go_on_and_each_has_its_own_price(
    supernet: Supernet, table: RoutingTable, data: TensorData
) -> None:
    confidence = float(table.confidence[5, 0])
    clear = np.abs(np.delete(table.confidence[:, 0], 5) - confidence).min()
    assert clear > 1e-5
    stored = table.confidence.copy()
    stored[5, 0] = confidence - 4e-6  # in the table image 5 is unsure, in the run it is sure enough
    told = replace(table, confidence=stored)
    router = CascadeRouter(0, 2, confidence - 2e-6)
    assert run_on_table(router, told).routes[5] == 2
    found = agree(supernet, router, told, data)
    assert found.num_ties == 1
    assert found.madds_m == pytest.approx(run_on_table(router, table).madds.mean() / 1e6)
    stored[5, 0] = confidence - 0.01
    with pytest.raises(VerificationError, match=r"1 of 40 .* expected subnet-02 .* got subnet-00"):
        agree(supernet, router, told, data)


def tampered_class(table: RoutingTable, router: Router, row: int) -> RoutingTable:
    """The table claims another class for one image on the route that it takes."""
    predicted = table.predicted.copy()
    route = run_on_table(router, table).routes[row]
    predicted[row, route] = (predicted[row, route] + 1) % 10
    return replace(table, predicted=predicted)


def test_a_wrong_class_in_the_table_is_an_error_that_names_trial_image_and_both_answers(
    supernet: Supernet, router: GateRouter, table: RoutingTable, data: TensorData
) -> None:
    wrong = tampered_class(table, router, 11)
    assert wrong.margin[11].min() > CLASS_TIE
    route = run_on_table(router, table).routes[11]
    with pytest.raises(VerificationError) as caught:
        agree(supernet, router, wrong, data)
    message = str(caught.value)
    name = table.routes[route]
    assert "trial-0042: 1 of 40 images of val" in message
    assert f"image {table.image_ids[11]}: " in message
    assert f"{name} -> class {wrong.predicted[11, route]}" in message
    assert f"{name} -> class {table.predicted[11, route]}" in message
    assert VerificationError.exit_code == 7


def test_a_class_that_the_table_itself_was_undecided_about_is_counted_as_a_tie(
    supernet: Supernet, router: GateRouter, table: RoutingTable, data: TensorData
) -> None:
    wrong = tampered_class(table, router, 11)
    margin = wrong.margin.copy()
    margin[11] = CLASS_TIE / 2
    assert agree(supernet, router, replace(wrong, margin=margin), data).num_ties == 1


def test_evidence_that_was_changed_sends_images_elsewhere_and_is_noticed(
    supernet: Supernet, router: GateRouter, table: RoutingTable, data: TensorData
) -> None:
    evidence = table.evidence.copy()
    start, stop = table.gates[0].layouts[0]["hidden"]
    evidence[:, start:stop] = np.roll(evidence[:, start:stop], 1, axis=0)
    with pytest.raises(VerificationError, match=r"differ between the routing table and the actual run.* more"):
        agree(supernet, router, replace(table, evidence=evidence), data)


def test_an_undecided_gate_excuses_another_route_but_not_a_wrong_class_on_it(
    supernet: Supernet, router: GateRouter, table: RoutingTable, data: TensorData
) -> None:
    # Every image's two best scores are equal up to 1e-9: the run may take either route.
    start, stop = table.gates[0].layouts[0]["hidden"]
    weight = router.weight[:1].repeat(2, 1)
    weight[1] += 1e-9
    undecided = GateRouter(weight, torch.zeros(2, dtype=torch.float64), (0, 2))
    evidence = table.evidence.copy()
    evidence[0, start:stop] = 0.0  # the first image: an exact tie in the table, which the run breaks
    tied = replace(table, evidence=evidence)
    assert run_on_table(undecided, tied).routes[0] == 0
    assert run_on_table(undecided, table).routes[0] == 2
    assert agree(supernet, undecided, tied, data).num_ties == 1
    predicted = tied.predicted.copy()
    predicted[0, 2] = (predicted[0, 2] + 1) % 10
    with pytest.raises(VerificationError, match="1 of 40"):
        agree(supernet, undecided, replace(tied, predicted=predicted), data)


def test_costs_that_were_changed_are_noticed(
    supernet: Supernet, router: GateRouter, table: RoutingTable, data: TensorData
) -> None:
    with pytest.raises(VerificationError, match="40 of 40"):
        agree(supernet, router, replace(table, madds=table.madds + 1), data)


def test_weights_that_were_changed_are_noticed(router: GateRouter, table: RoutingTable, data: TensorData) -> None:
    with pytest.raises(VerificationError, match="differ"):
        agree(small_supernet(seed=1), router, table, data)


def test_the_front_is_timed_beside_the_static_extremes_at_every_batch_size(
    supernet: Supernet, router: GateRouter, data: TensorData
) -> None:
    threads = torch.get_num_threads()
    settings = LatencySettings(batch_sizes=(1, 64), repeats=2, warmup=0)
    found = time_front(supernet, {3: router, 8: router}, data.images("val"), NORMALIZATION, settings)
    assert list(found.gates) == list(found.widest) == list(found.cheapest) == [1, 64]
    assert all(set(row) == {3, 8} for row in found.gates.values())
    timings = [
        *found.widest.values(),
        *found.cheapest.values(),
        *(t for row in found.gates.values() for t in row.values()),
    ]
    assert all(timing.median_ms > 0 and timing.repeats == 2 for timing in timings)
    assert torch.get_num_threads() == threads
    assert DynamicLatency.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.slow
def test_the_front_and_the_extremes_are_timed_as_graphs_of_the_engine(
    supernet: Supernet, router: GateRouter, data: TensorData, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript", reason="extra deploy is not installed")
    images, sizes = data.images("val"), (1, 8)
    with monkeypatch.context() as patch:
        engine = ClockedEngine(patch)
        settings = LatencySettings(batch_sizes=sizes, repeats=1, warmup=0, engine=NAME, threads=2)
        found = time_front(supernet, {3: router}, images, NORMALIZATION, settings)
    assert found.device == f"{device_name('cpu')}, {engine.title}"
    assert engine.threads == {2}
    cheapest, *_, widest = supernet.subnets.by_madds()
    net = DynamicNet(supernet, router)
    for size in sizes:
        assert found.widest[size].median_ms == pytest.approx(size * (STATIC_MS + widest))
        assert found.cheapest[size].median_ms == pytest.approx(size * (STATIC_MS + cheapest))
        routes = [net(NORMALIZATION.apply(batch)).routes for batch in drawn_batches(images, size)]
        assert len(torch.cat(routes).unique()) > 1
        expected = torch.cat(routes).double().mean() + TRUNK_MS + TAIL_MS
        assert found.gates[size][3].median_ms == pytest.approx(size * float(expected))


@pytest.mark.slow
def test_what_the_parts_add_up_to_stands_beside_what_was_measured(
    supernet: Supernet, router: GateRouter, table: RoutingTable, data: TensorData
) -> None:
    settings = LatencySettings(batch_sizes=(1, 8), group_sizes=(1, 8), repeats=1, warmup=0)
    parts = measure_latency(supernet, 16, settings)
    found = time_front(supernet, {3: router}, data.images("val"), NORMALIZATION, settings)
    forecast = RouteForecast.fit(table)
    analysis = analyse_split(forecast, table, table, {3: router}, {}, num_classes=10)
    beside = found.beside(parts, analysis.points, table.routes)
    runs = run_on_table(router, table).runs
    assert beside.ideal == {
        1: {3: pytest.approx(batch1_ms(parts, runs, table.routes))},
        8: {3: pytest.approx(parts.ideal_ms(8, runs, table.routes))},
    }
    assert replace(beside, ideal={}) == found
    assert DynamicLatency.from_json(json.loads(json.dumps(beside.to_json()))) == beside


def test_a_gate_that_agreed_with_the_same_tables_once_is_known_and_one_of_another_search_is_not(tmp_path: Path) -> None:
    run = RunDir(tmp_path, "t")
    run.create()
    Manifest(run.manifest_path).create(seed=0, hardware={})

    def finish(front: list[int], search: str, *, version: int = 1, content: object = None) -> None:
        plan = plan_stage(
            run, StageDefinition("verify", version, {"front": front}, "d", ("search",)), {"search": search}
        )
        agreements = [asdict(Agreement(slot, 100, 0, 0.9, 1.5)) for slot in front]

        def write(folder: Path) -> list[Path]:
            atomic_write_json(folder / "verify.json", {"agreements": agreements} if content is None else content)
            return [folder / "verify.json"]

        run_stage(run, plan, write)

    finish([1, 5], "a")
    finish([5, 7], "a")
    finish([9], "b")
    finish([11], "a", version=2)
    finish([13], "a", content={"agreements": [{"slot": 13}]})
    wanted = plan_stage(run, StageDefinition("verify", 1, {"front": [1, 20]}, "d", ("search",)), {"search": "a"})
    assert sorted(known_agreements(run, wanted.record)) == [1, 5, 7]
    assert known_agreements(run, wanted.record)[5] == Agreement(5, 100, 0, 0.9, 1.5)
