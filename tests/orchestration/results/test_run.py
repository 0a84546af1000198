"""The results read from a run folder after each stage."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dashboards.report import build_report
from dsnet.errors import CheckpointError, NotFoundError
from dsnet.files import file_sha256
from dsnet.gates.fit import fit_gate
from dsnet.gates.settings import GateSettings
from dsnet.routing.routing_table import RoutingTable
from dsnet.routing.table_routing import run_on_table
from dsnet.space.cost import subnet_cost
from orchestration.commands.planning import prepare_again
from orchestration.results.measured import static_metrics
from orchestration.results.report import hypervolume_of, report_data
from orchestration.results.run import RunResults, load_router, refuse_unusable
from orchestration.results.trial_list import TrialList
from orchestration.runs.folder import RunDir
from orchestration.runs.manifest import Manifest
from orchestration.runs.stages import StageDir
from search.front.pareto import hypervolume
from search.front.points import trial_name
from search.front.points_file import save_points
from search.gate_trial import arrays_of
from tests.dsnet.samples import ROUTER_KINDS, random_table
from tests.orchestration.samples import Finished, results_in

STAGES = ("supernet", "measure", "table", "search", "verify")


def without(finished: Finished, folder: Path, *stages: str) -> RunResults:
    """The run as it was before `stages` were begun."""
    copy = finished.copy(folder)
    manifest = Manifest(copy / "runs" / "tiny" / "manifest.json")
    for stage in stages:
        shutil.rmtree(copy / "runs" / "tiny" / stage)
    left = {name: entry for name, entry in manifest.read()["stages"].items() if name not in stages}
    manifest.update(stages=left)
    return results_in(copy)


def test_a_run_that_does_not_exist_is_refused_with_those_that_do(finished: Finished) -> None:
    with pytest.raises(NotFoundError, match="did you mean 'tiny'"):
        RunResults(RunDir(finished.run.root, "tinny"))


def test_measured_subnets_agree_with_the_table_and_the_analytic_cost(finished: Finished) -> None:
    results = finished.results
    table = RoutingTable.load(results.run.table(results.done_key("table"), "val"))
    prepared = prepare_again(results)
    assert [subnet.name for subnet in results.subnets if not subnet.is_teacher] == list(table.routes)
    by_name = {subnet.name: subnet for subnet in results.subnets}
    for subnet in prepared.subnets.all:
        cost = subnet_cost(prepared.subnets.spec, subnet, prepared.image_size)
        measured = by_name[subnet.name]
        assert (measured.madds, measured.params) == (cost.madds, cost.params)
    for route, name in enumerate(table.routes):
        assert by_name[name].top1 == pytest.approx(table.top1()[route])
        assert by_name[name].top5 == pytest.approx(table.correct5[:, route].mean())
    assert results.widest.madds == max(table.madds)
    assert results.num_val == table.num_images


def balanced(table: RoutingTable) -> dict[str, float]:
    """By route, the mean over classes of the share of the class's images that are right."""
    labels = np.asarray(table.labels)
    right = np.array([np.asarray(table.correct1)[labels == label].mean(0) for label in np.unique(labels)])
    return dict(zip(table.routes, right.mean(0).tolist(), strict=True))


def test_static_subnetworks_have_balanced_top1_on_both_splits(finished: Finished) -> None:
    results = finished.results
    tables = {
        "val": results.val_table,
        "test": RoutingTable.load(results.run.sealed_table(results.done_key("table"))),
    }
    expected = {split: balanced(table) for split, table in tables.items()}
    found = {
        split: {
            row["name"]: row["metric.balanced_top1"]
            for row in results.points()
            if (row["kind"], row["split"]) == ("subnet", split)
        }
        for split in tables
    }
    assert found == {split: pytest.approx(values) for split, values in expected.items()}
    for subnet in results.subnets:
        metrics = results.static_metrics(subnet)
        if subnet.is_teacher:
            assert "balanced_top1" not in metrics
        else:
            assert metrics["balanced_top1"] == pytest.approx(expected["val"][subnet.name])


def test_a_run_that_was_verified_by_an_earlier_release_has_no_balanced_top1_of_static_ones_on_test(
    finished: Finished,
) -> None:
    results = RunResults(finished.run)
    verified = results.verified
    assert verified is not None
    old = {split: replace(getattr(verified, split), static_added=()) for split in ("val", "test")}
    results.__dict__["verified"] = replace(verified, **old)
    static = [row for row in results.points() if row["kind"] == "subnet"]
    assert {row["split"] for row in static if "metric.balanced_top1" in row} == {"val"}
    assert {row["split"] for row in static} == {"val", "test"}


def test_every_trials_gate_is_stored_and_decides_as_its_metrics_say(finished: Finished) -> None:
    results = finished.results
    table = RoutingTable.load(results.run.table(results.done_key("table"), "val"))
    rows = np.arange(table.num_images)
    for record in results.records:
        routes = run_on_table(results.router(record.slot), table).routes
        assert table.correct1[rows, routes].mean() == pytest.approx(record.metrics["top1"])


@pytest.mark.parametrize("num_done", range(len(STAGES) + 1))
def test_a_run_that_stopped_after_any_stage_can_be_read(finished: Finished, tmp_path: Path, num_done: int) -> None:
    results = without(finished, tmp_path, *STAGES[num_done:])
    assert [results.is_done(stage) for stage in STAGES] == [index < num_done for index in range(5)]
    assert bool(results.subnets) == bool(results.num_val) == (results.latency is not None) == (num_done >= 2)
    assert len(results.records) == (12 if num_done >= 4 else 0)
    assert results.front == (finished.results.front if num_done >= 4 else ())
    assert (results.verified is not None) == (num_done == 5)
    kinds = {(row["kind"], row["split"]) for row in results.points()}
    assert ("gate", "val") in kinds or num_done < 4
    assert {split for _, split in kinds} <= ({"val", "test"} if num_done == 5 else {"val"})
    save_points(tmp_path / "points.parquet", results.points())
    data = report_data(results, tuple("0123456789"), (), "stopped")
    assert (data.front is not None) == (num_done >= 2)
    assert (data.routes is not None) == (num_done == 5)
    assert (data.classes is not None) == (num_done >= 3)
    if data.classes is not None and results.knee is not None:
        claimed = results.record(results.knee).metrics["balanced_top1"]
        assert sum(data.classes.routed) / len(data.classes.routed) == pytest.approx(claimed)
        assert sum(data.classes.num_images) == results.num_val
    if num_done < 5:
        with pytest.raises(NotFoundError, match=f"not finished its {STAGES[num_done]} stage.*dsnet-orch launch"):
            results.done_key(STAGES[num_done])


def test_a_stage_that_was_remade_above_leaves_nothing_current_below(finished: Finished, tmp_path: Path) -> None:
    copy = finished.copy(tmp_path)
    manifest = Manifest(copy / "runs" / "tiny" / "manifest.json")
    manifest.record_stage("table", {**manifest.read()["stages"]["table"], "key": "f" * 64})
    results = results_in(copy)
    assert results.subnets
    assert (results.records, results.front, results.verified) == ([], (), None)


def test_a_front_that_is_not_the_verified_one_is_not_called_verified(finished: Finished, tmp_path: Path) -> None:
    copy = finished.copy(tmp_path)
    results = results_in(copy)
    path = results.run.verify_json(results.done_key("verify"))
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "front": content["front"][:-1]}))
    StageDir(path.parent).finish([path], 1.0)
    assert results_in(copy).is_done("verify")
    assert results_in(copy).verified is None


def test_a_missing_gate_file_says_what_to_do(finished: Finished, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="launch the sweep again"):
        load_router(tmp_path / "slot-00001.safetensors", None)
    assert finished.results.router(1).routes == (0, 1, 2)


@pytest.mark.parametrize("kind", ROUTER_KINDS)
def test_a_stored_router_of_every_kind_decides_as_it_did_when_it_was_fitted(tmp_path: Path, kind: str) -> None:
    gate_table, table = random_table(80, 4, num_gates=2), random_table(80, 4, seed=1, split="val", num_gates=2)
    fit = fit_gate(gate_table, table, GateSettings(router=kind, steps=10))
    arrays = arrays_of(fit)
    save_file(arrays, tmp_path / "slot-00001.safetensors")
    router = load_router(tmp_path / "slot-00001.safetensors", file_sha256(tmp_path / "slot-00001.safetensors"))
    assert router.kind == kind
    run = run_on_table(router, table)
    np.testing.assert_array_equal(run.routes, fit.run.routes)
    np.testing.assert_array_equal(run.madds, fit.run.madds)
    values = np.frombuffer(b'{"kind": "cake"}', dtype=np.uint8)
    save_file({**arrays, "router": values}, tmp_path / "slot-00001.safetensors")
    with pytest.raises(CheckpointError, match=r"slot-00001.*'cake'.*launch the sweep again"):
        load_router(tmp_path / "slot-00001.safetensors", None)


def test_hypervolume_begins_at_the_static_ones_never_falls_and_ends_with_that_of_both_together(
    finished: Finished,
) -> None:
    results = finished.results
    info = hypervolume_of(results)
    assert info is not None
    values = list(info.hypervolume)
    assert values == sorted(values)
    assert info.static_hypervolume is not None
    assert 0 < info.static_hypervolume <= values[0]
    # Independent: area of the union of rectangles between all points and the reference.
    _, worst = results.reference_point
    routers = [
        (results.record(slot).metrics["madds_m"], results.record(slot).metrics["top1"]) for slot in results.front
    ]
    points = sorted([*routers, *((subnet.madds / 1e6, subnet.top1) for subnet in results.members)])
    edges = [*(madds for madds, _ in points[1:]), worst]
    best = np.maximum.accumulate([top1 for _, top1 in points])
    area = sum(
        (min(edge, worst) - madds) * top1
        for (madds, _), edge, top1 in zip(points, edges, best, strict=True)
        if madds < worst
    )
    assert values[-1] == pytest.approx(area)
    assert worst == pytest.approx(1.05 * results.widest.madds / 1e6)


def test_names_of_trials_are_those_of_their_slots(finished: Finished) -> None:
    names = [row["name"] for row in finished.results.points() if row["kind"] == "gate" and row["split"] == "val"]
    assert names == [trial_name(slot) for slot in range(12)]


def test_trials_are_listed_where_the_weights_of_the_supernet_are_gone(finished: Finished, tmp_path: Path) -> None:
    results = results_in(finished.copy(tmp_path))
    (results.run.stage_dir("supernet", results.done_key("supernet")) / "final.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"final\.safetensors is missing"):
        results.is_done("supernet")
    assert [trial.record for trial in TrialList.of(results).trials] == finished.results.records


def test_of_a_long_front_only_some_gates_run_on_test(finished: Finished) -> None:
    results = RunResults(finished.run)
    assert len(results.front) >= 3
    whole = results.config
    results.__dict__["config"] = whole.model_copy(update={"budget": whole.budget.model_copy(update={"verify": 2})})
    sample = results.front_sample
    assert {results.front[0], results.front[-1], results.knee} == set(sample)
    assert results.verified is None or sample == results.front  # what ran was another sample
    results = RunResults(finished.run)
    results.__dict__["config"] = whole.model_copy(update={"budget": whole.budget.model_copy(update={"verify": None})})
    assert results.front_sample == results.front
    assert results.verified is not None


def with_three_objectives(finished: Finished) -> RunResults:
    """The run as if it had minimised latency too, its first trial had been pruned and half of the
    others broke a constraint."""
    results = RunResults(finished.run)
    config = results.config
    latency = config.metrics[1].model_copy(update={"name": "latency_ms_batch8", "ref": 1e3})
    results.__dict__["config"] = config.model_copy(update={"metrics": (*config.metrics, latency)})
    first, *others = results.records
    changed = [replace(first, state="pruned", values=None, reason="13th of 12 after 3 epochs")]
    changed += [replace(record, constraints={"top1 >= 2": 1.0 if record.slot % 2 else -1.0}) for record in others]
    results.__dict__["records"] = changed
    return results


def test_infeasible_and_pruned_trials_are_on_no_front_and_add_no_hypervolume(finished: Finished) -> None:
    results = with_three_objectives(finished)
    feasible = [record for record in results.records if record.slot % 2 == 0 and record.slot > 0]
    assert set(results.front) <= {record.slot for record in feasible}
    info = hypervolume_of(results)
    assert info is not None
    assert info.objectives == ("top1", "madds_m", "latency_ms_batch8")
    assert info.pruned == ((0, "13th of 12 after 3 epochs"),)
    assert info.num_infeasible == 6
    static = [static_metrics(subnet, results.latencies) for subnet in results.members]
    rows = [*(record.metrics for record in feasible), *static]
    values = np.array([[row[name] for name in info.objectives] for row in rows])
    assert info.hypervolume[-1] == pytest.approx(
        hypervolume(values, ("maximize", "minimize", "minimize"), info.reference)
    )
    grows = np.diff([info.static_hypervolume, *info.hypervolume]) > 0
    assert set(np.flatnonzero(grows)) <= {record.slot for record in feasible}


def test_no_trial_lies_behind_the_reference_because_of_its_parameters(finished: Finished) -> None:
    results = with_three_objectives(finished)
    params = results.config.metrics[1].model_copy(update={"name": "params_m", "ref": None})
    gate = results.config.gate  # a perceptron is no part of any static sub-network
    large = gate.model_copy(
        update={"router": "evidence_gate", "perceptron": gate.perceptron.model_copy(update={"hidden_units": 512})}
    )
    metrics = (*finished.results.config.metrics, params)
    results.__dict__["config"] = results.config.model_copy(update={"metrics": metrics, "gate": large})
    most = results.metric_ranges["params_m"][1]
    assert most > 1.05 * results.baseline["params_m"], "else there is nothing to show"
    assert results.reference_point[2] == pytest.approx(1.05 * most)


def test_the_report_of_three_objectives_shows_constraints_and_intervals_before_test_is_read(finished: Finished) -> None:
    results = with_three_objectives(finished)
    assert results.verified is None  # what ran on test was another front
    data = report_data(results, tuple("0123456789"), (), "stopped")
    assert (data.num_completed, data.num_infeasible, data.num_pruned, data.num_failed) == (11, 6, 1, 0)
    assert data.constraints == (("top1 >= 2", 6),)
    assert data.endings == (("pruned", "13th of 12 after 3 epochs", 1),)
    assert data.front is not None
    assert data.front.further is not None
    by_name = {point.name: point for point in data.front.chosen.dynamic}
    assert len(by_name) == 11
    for record in results.completed:
        point = by_name[trial_name(record.slot)]
        assert point.further == record.metrics["latency_ms_batch8"]
        assert point.is_feasible == (not point.broken) == record.is_feasible
    for row in data.headline.rows:
        assert row.chosen.top1.low <= row.chosen.top1.value <= row.chosen.top1.high
        assert row.further[0][0] == "latency_ms_batch8"
    assert "Grey crosses" in build_report(data)


def test_whoever_picks_a_trial_that_cannot_be_used_hears_why(finished: Finished) -> None:
    record = finished.results.records[3]
    broken = replace(record, constraints={"madds_m <= 1": 0.5, "top1 >= 0": -1.0})
    failed = replace(record, state="failed", reason="loss is nan")
    pruned = replace(record, state="pruned", reason="fell behind at rung 3")
    for unusable, why in (
        (broken, "trial-0003 is infeasible: violates madds_m <= 1; only feasible trials can be picked"),
        (failed, "trial-0003 failed: loss is nan;"),
        (pruned, "trial-0003 was pruned: fell behind at rung 3;"),
    ):
        with pytest.raises(NotFoundError, match="pick 'trial-0003'") as caught:
            refuse_unusable("trial-0003", [unusable])
        assert why in str(caught.value)
    refuse_unusable("trial-0003", [])
    refuse_unusable("trial-0003", [broken, record])
