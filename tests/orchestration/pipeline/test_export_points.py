"""Bundles with several operating points of a finished sweep: all static sub-networks, and the whole
front."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML

import dsnet
from dsnet.deploy.bundle import Bundle
from dsnet.routing.routing_table import RoutingTable
from dsnet.routing.table_routing import run_on_table
from orchestration.commands.planning import prepare_again
from orchestration.config.export import ExportConfig
from orchestration.pipeline.export import example_rows
from search.front.points import trial_name
from tests.dsnet.samples import random_router, random_table
from tests.orchestration.samples import Finished, call, problems_of_message


@pytest.fixture(scope="module")
def sets(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both sets, and the knee, exported outside the run."""
    out = tmp_path_factory.mktemp("sets")
    answer = call(
        finished.folder, "export", "tiny", *["--pick", "members", "--pick", "front", "--pick", "knee", "--out"], out
    )
    assert answer.code == 0, answer.err
    names = [Path(line).name for line in answer.out.split()]
    assert names == [trial_name(finished.results.knee or 0), "members", "front"]
    return out


def load(sets: Path, name: str) -> Bundle:
    return dsnet.load_bundle(sets / name)


def test_the_members_are_the_static_sub_networks_with_what_was_measured(finished: Finished, sets: Path) -> None:
    results, bundle = finished.results, load(sets, "members")
    verified = results.verified
    assert verified is not None
    assert [point.name for point in bundle.operating_points] == [subnet.name for subnet in results.members]
    assert bundle.operating_point.top1 == max(subnet.top1 for subnet in results.members)
    for point, subnet in zip(bundle.operating_points, results.members, strict=True):
        val, test = point.claims["val"], point.claims["test"]
        assert (val["top1"], val["top5"], 1e6 * val["madds_m"]) == (subnet.top1, subnet.top5, subnet.madds)
        assert test["top1"] == verified.test.static_top1[verified.test.routes.index(subnet.name)].value
        for device, table in results.newest_latencies.items():
            assert point.latencies(device) == {size: table.static_ms(subnet.name, size) for size in (1, 8)}
    content = YAML(typ="safe", pure=True).load(sets / "members" / "gate.yaml")
    assert [point["router"]["route"] for point in content["points"]] == [subnet.name for subnet in results.members]


def test_a_member_within_a_budget_answers_val_as_the_table_has_it(finished: Finished, sets: Path) -> None:
    results, bundle = finished.results, load(sets, "members")
    pixels = prepare_again(results).data.images("val")
    table = RoutingTable.load(results.run.table(results.done_key("table"), "val"))
    for subnet in results.members:
        answer = bundle.at(top1=subnet.top1)(pixels)
        (route,) = {bundle.route_names[k] for k in answer.routes}
        allowed = [own for own in results.members if own.top1 >= subnet.top1]
        assert route == min(allowed, key=lambda own: own.madds).name
        column = table.routes.index(route)
        decided = table.margin[:, column] > 1e-4
        assert np.array_equal(answer.classes.numpy()[decided], table.predicted[decided, column])


def test_the_points_of_the_front_are_its_gates_with_the_metrics_of_the_study(finished: Finished, sets: Path) -> None:
    results, bundle = finished.results, load(sets, "front")
    pixels = prepare_again(results).data.images("val")
    assert {point.name for point in bundle.operating_points} == {trial_name(slot) for slot in results.front}
    assert bundle.operating_point.top1 == max(results.record(slot).metrics["top1"] for slot in results.front)
    for slot in results.front:
        metrics, own = results.record(slot).metrics, bundle.at(trial_name(slot))
        point = own.operating_point
        assert (point.top1, point.madds_m) == (metrics["top1"], metrics["madds_m"])
        assert point.latency_ms == pytest.approx(metrics["latency_ms"])
        assert point.latencies("two")[8] == pytest.approx(metrics["latency_ms_batch8.two"])
        assert float(own(pixels).madds.double().mean()) / 1e6 == pytest.approx(metrics["madds_m"])
    knee = trial_name(results.knee or 0)
    own, alone = bundle.at(knee)(pixels), load(sets, knee)(pixels)
    assert own.routes.tolist() == alone.routes.tolist()
    assert own.madds.tolist() == alone.madds.tolist()
    content = YAML(typ="safe", pure=True).load(sets / "front" / "gate.yaml")
    assert {point["gate"]["target"] for point in content["points"]} == {
        results.record(slot).params["gate.target"] for slot in results.front
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["members", "front"])
def test_verify_checks_every_point(finished: Finished, sets: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(sets / name, tmp_path / name)
    checks = call(tmp_path, "verify", name, "--data", "--json").json
    bundle = load(sets, name)
    points = bundle.operating_points
    assert [check["name"] for check in checks] == [
        "files",
        "examples",
        *(split for point in points for split in ("val", "test") if split in point.claims),
    ]
    assert f"at each of {len(points)} operating points" in checks[1]["finding"]
    told = " ".join(check["finding"] for check in checks)
    assert all(f"operating point {point.name}, top-1 {100 * (point.top1 or 0):.2f} %" in told for point in points)


def test_predict_takes_a_budget(finished: Finished, sets: Path, tmp_path: Path) -> None:
    pixels = prepare_again(finished.results).data.images("val")[0]
    Image.fromarray(pixels[0].numpy()).save(tmp_path / "scan.png")
    points = load(sets, "members").operating_points
    for option, budget, expected in (
        ("--budget-madds", points[0].madds_m, points[0]),
        ("--budget-latency", 1e6, points.best),
    ):
        answer = call(tmp_path, "predict", sets / "members", "scan.png", option, str(budget), "--json")
        assert answer.code == 0, answer.err
        assert answer.json["predictions"][0]["route"] == expected.name
    answer = call(tmp_path, "predict", sets / "members", "scan.png", "--budget-madds", "1e-6")
    assert answer.code == 9
    assert problems_of_message(answer, ["at most 1e-06 M MAdds", points[0].name, "allow at least"]) == []
    both = call(tmp_path, "predict", sets / "members", "scan.png", "--budget-madds", "1", "--budget-latency", "1")
    assert both.code == 2


def test_the_sets_are_picks_of_a_sweep_too_and_a_similar_word_is_not(finished: Finished) -> None:
    assert ExportConfig(picks=("members", "front", "knee")).picks == ("members", "front", "knee")
    with pytest.raises(ValueError, match="did you mean 'members'"):
        ExportConfig(picks=("member",))
    with pytest.raises(ValueError, match="did you mean 'front'"):
        ExportConfig(picks=("fronts",))
    answer = call(finished.folder, "validate", "tiny.yaml", "--set", "export.picks=[members,front]")
    assert answer.code == 0, answer.err


def test_examples_of_several_routers_show_many_combinations_of_their_routes() -> None:
    table = random_table(400, 4, num_gates=2)
    routers = [random_router(kind, table, seed) for seed, kind in enumerate(("gate", "gates", "learned_cascade"))]
    runs = [run_on_table(router, table) for router in routers]
    rows = example_rows(routers, table)
    combinations = list(zip(*(run.routes[rows].tolist() for run in runs), strict=True))
    assert len(rows) == 16
    assert len(set(combinations)) == 16, "of the 64 combinations, most of which have images"
    assert min(run.lead[rows].min() for run in runs) >= 100
