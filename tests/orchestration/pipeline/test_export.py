"""Bundles of a finished sweep: they classify like the verified gates, claim the run's results, and
work without the run."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML

import dsnet
from benchmarks.dynamic_inference import of_run
from dsnet.deploy import int8
from dsnet.deploy.bundle import NUM_EXAMPLES
from dsnet.deploy.onnx_graphs import SegmentGraphs
from dsnet.errors import ConfigError, NotFoundError
from dsnet.routers.cascade import CascadeRouter
from dsnet.routers.fixed import FixedRouter
from dsnet.routing.routing_table import RoutingTable
from dsnet.routing.table_routing import run_on_table
from dsnet.stored.checkpoint import load_supernet
from dsnet.stored.names import FINAL
from orchestration.commands.planning import prepare_again
from orchestration.pipeline.claims import bundle_claims
from orchestration.pipeline.export import CLEAR_LEAD, example_rows, link_knee, router_facts
from orchestration.pipeline.int8_accuracy import BundleSource, further_static
from orchestration.results.run import RunResults, picked_slots
from orchestration.runs.folder import RunDir
from search.front.controls import StaticLine
from search.front.points import trial_name
from tests.dsnet.samples import ROUTER_KINDS, random_router, random_table
from tests.orchestration.samples import WITHOUT_MLFLOW, Finished, call, problems_of_message


@pytest.fixture(scope="module")
def bundles(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of the front, exported outside the run."""
    out = tmp_path_factory.mktemp("bundles")
    answer = call(finished.folder, "export", "tiny", "--pick", "all", "--out", out)
    assert answer.code == 0, answer.err
    names = [Path(line).name for line in answer.out.split()]
    assert sorted(names) == sorted(trial_name(slot) for slot in finished.results.front)
    return out


def test_the_knee_is_a_point_of_the_front_and_what_the_launch_exported(finished: Finished) -> None:
    (knee,) = picked_slots(finished.results, ["knee"])
    assert knee in finished.results.front
    assert {path.name for path in finished.run.export_dir.iterdir()} == {trial_name(knee), "knee"}
    assert (finished.run.export_dir / "knee").readlink() == Path(trial_name(knee)), (
        "relative: a run folder may be moved"
    )


def test_the_link_to_the_knee_follows_it_and_replaces_nothing_but_a_link(tmp_path: Path) -> None:
    for name in ("trial-0001", "s0/trial-0002"):
        (tmp_path / name).mkdir(parents=True)
        link_knee(tmp_path, tmp_path / name)
        assert (tmp_path / "knee").resolve() == tmp_path / name
    link_knee(tmp_path, tmp_path / "trial-0003")
    assert not (tmp_path / "knee").is_symlink(), "a link to an earlier knee would give the wrong bundle"
    (tmp_path / "knee").mkdir()
    link_knee(tmp_path, tmp_path / "trial-0001")
    assert not (tmp_path / "knee").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["knee", "s0", "trial-0001"]


def test_picks_are_read_on_val_and_each_trial_is_taken_once(finished: Finished) -> None:
    results = finished.results
    assert sorted(picked_slots(results, ["all", "knee"])) == sorted(results.front)
    assert picked_slots(results, ["trial-0003", "trial-0003"]) == [3]
    (best,) = picked_slots(results, ["max:top1"])
    assert results.record(best).metrics["top1"] == max(record.metrics["top1"] for record in results.completed)
    limit = float(np.median([record.metrics["madds_m"] for record in results.completed]))
    (chosen,) = picked_slots(results, [f"max:top1 where madds_m<={limit}"])
    allowed = [record for record in results.completed if record.metrics["madds_m"] <= limit]
    assert results.record(chosen).metrics["madds_m"] <= limit
    assert results.record(chosen).metrics["top1"] == max(record.metrics["top1"] for record in allowed)


@pytest.mark.parametrize(
    ("pick", "error", "part"),
    [
        ("max:topp1", (ConfigError, NotFoundError), "topp1"),
        ("max:top1 where madds_m<0", (NotFoundError,), "madds_m"),
        ("trial-9999", (NotFoundError,), "trial-9999"),
        ("max:top1 where madds_m is small", (ConfigError,), "madds_m is small"),
        ("", (ConfigError, NotFoundError), "pick"),
        ("kneee", (ConfigError,), "did you mean 'knee'?"),
        ("kneee", (ConfigError,), "members, front"),
    ],
)
def test_a_pick_that_means_nothing_is_refused_and_writes_nothing(
    finished: Finished, tmp_path: Path, pick: str, error: tuple[type[ConfigError], ...], part: str
) -> None:
    answer = call(finished.folder, "export", "tiny", "--pick", pick, "--out", tmp_path / "out")
    assert answer.code in {kind.exit_code for kind in error}
    assert problems_of_message(answer, [part]) == []
    assert not (tmp_path / "out").exists()


def test_a_bundle_classifies_every_image_of_val_as_the_verified_run_did(finished: Finished, bundles: Path) -> None:
    results = finished.results
    prepared = prepare_again(results)
    table = RoutingTable.load(results.run.table(results.done_key("table"), "val"))
    rows = np.arange(table.num_images)
    for slot in results.front:
        bundle = dsnet.load_bundle(bundles / trial_name(slot))
        found = bundle(prepared.data.images("val"))
        run = run_on_table(results.router(slot), table)
        routes = run.routes
        decided = table.margin[rows, routes] > 1e-4
        assert [bundle.route_names[route] for route in found.routes] == [table.routes[route] for route in routes]
        assert np.array_equal(found.classes.numpy()[decided], table.predicted[rows, routes][decided])
        assert np.array_equal(found.madds.numpy(), run.madds)
        assert bundle.class_names == prepared.image_set.class_names


@pytest.mark.parametrize("kind", ROUTER_KINDS)
@pytest.mark.parametrize("num_gates", [1, 2])
def test_examples_are_clear_ones_of_every_route_that_has_some(kind: str, num_gates: int) -> None:
    table = random_table(400, 4, num_gates=num_gates)
    router = random_router(kind, table)
    rows, run = example_rows([router], table), run_on_table(router, table)
    assert len(rows) == NUM_EXAMPLES
    assert (np.diff(rows) > 0).all()
    is_clear = run.lead >= CLEAR_LEAD
    num_clear = np.bincount(run.routes[is_clear], minlength=4)
    chosen = np.bincount(run.routes[rows], minlength=4)
    if is_clear.sum() < NUM_EXAMPLES:
        assert set(np.flatnonzero(is_clear)) <= set(rows)
        assert run.lead[rows].min() >= np.sort(run.lead)[-NUM_EXAMPLES]
        return
    assert is_clear[rows].all()
    # Taken in turn: no route has two examples more than another route with clear images left.
    for route in range(4):
        assert chosen[route] == num_clear[route] or chosen[route] >= chosen.max() - 1


def test_where_nothing_is_clear_the_clearest_are_examples() -> None:
    distance = np.random.default_rng(0).uniform(-1e-4, 1e-4, (60, 4)).astype(np.float32)
    table = replace(random_table(60, 4), confidence=0.5 + distance)
    undecided = CascadeRouter(1, 3, 0.5)
    assert run_on_table(undecided, table).lead.max() < CLEAR_LEAD
    clearest = np.argsort(-np.abs(table.confidence[:, 1] - 0.5), kind="stable")
    assert set(example_rows([undecided], table)) == set(clearest[:NUM_EXAMPLES])


def test_a_table_of_few_images_gives_all_of_them() -> None:
    table = random_table(5, 4)
    assert example_rows([random_router("cascade", table)], table).tolist() == [0, 1, 2, 3, 4]


def test_verify_says_so_where_a_bundle_stores_no_examples(finished: Finished, tmp_path: Path) -> None:
    results = finished.results
    prepared = prepare_again(results)
    claims = bundle_claims(prepared, results, results.front[0])
    path = _export_with(prepared, results, results.front[0], claims, tmp_path, num_examples=0)
    answer = call(tmp_path, "verify", path)
    assert answer.code == 0, answer.err
    assert "0 images are stored" in answer.out


def test_a_bundle_claims_what_verify_found(finished: Finished, bundles: Path) -> None:
    verified = finished.results.verified
    assert verified is not None
    for point in verified.test.points:
        claims = dsnet.load_bundle(bundles / trial_name(point.slot)).claims
        assert claims["test"]["top1"] == point.top1.value
        assert claims["test"]["top1_interval"] == [point.top1.low, point.top1.high]
        assert claims["test"]["madds_m"] == point.metrics["madds_m"]
        assert claims["test"]["num_images"] == verified.test.num_images
        assert claims["val"]["top1"] == finished.results.record(point.slot).metrics["top1"]
        assert claims["data"]["crop_fraction"] == finished.results.config.data.crop_fraction
        gate_ms = claims["latency"]["batches"]["8"]["gate_ms"]["median_ms"]
        assert gate_ms == verified.latency.gates[8][point.slot].median_ms
        found = {"": claims["latency"], **claims["device_latency"]}
        assert {name: own["threads"] for name, own in found.items()} == {"": 1, "two": 2}
        for name, table in finished.results.latencies.items():
            ideal_ms = table.ideal_ms(8, np.array(point.runs), verified.test.routes, point.router)
            assert found[name]["batches"]["8"]["ideal_ms"] == pytest.approx(ideal_ms)


def test_gate_yaml_is_yaml_that_says_what_the_gate_is(finished: Finished, bundles: Path) -> None:
    for slot in finished.results.front:
        content = YAML(typ="safe", pure=True).load(bundles / trial_name(slot) / "gate.yaml")
        record = finished.results.record(slot)
        assert content["name"] == trial_name(slot)
        assert content["gate"]["target"] == record.params["gate.target"]
        assert content["gate"]["sgs"]["strategy"] == record.params["gate.sgs.strategy"]
        assert [route["name"] for route in content["routes"]] == ["subnet-00", "subnet-01", "subnet-02"]
        assert content["router"] == {"kind": "gate", "reads": ["hidden"], "gates": 1}
        assert content["claims"]["val"]["top1"] == record.metrics["top1"]
        manifest = json.loads((bundles / trial_name(slot) / "bundle.json").read_text())
        assert json.loads(json.dumps(content["claims"])) == manifest["claims"]


@pytest.mark.parametrize("kind", ROUTER_KINDS)
def test_gate_yaml_says_how_the_router_decides(kind: str) -> None:
    names = [f"net {k}" for k in range(4)]
    router = random_router(kind, random_table(40, 4, num_gates=2), routes=(0, 2, 3))
    facts = router_facts(router, names)
    assert (facts["kind"], tuple(facts["reads"])) == (kind, router.needs)
    if kind == "cascade":
        assert (facts["first"], facts["second"], facts["threshold"]) == ("net 0", "net 3", router.threshold)  # type: ignore[attr-defined]
    elif kind == "learned_cascade":
        assert (facts["first"], facts["then_one_of"]) == ("net 0", ["net 2", "net 3"])
    else:
        assert facts["gates"] == (2 if kind in ("gates", "evidence_gates") else 1)


def test_a_bundle_is_verified_from_any_folder_after_its_run_is_gone(finished: Finished, tmp_path: Path) -> None:
    folder = finished.copy(tmp_path / "sweep")
    answer = call(folder, "export", "tiny", "--out", tmp_path / "kept")
    assert answer.code == 0, answer.err
    shutil.rmtree(folder)
    (bundle,) = (path for path in (tmp_path / "kept").iterdir() if not path.is_symlink())  # beside it: knee
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    checks = call(elsewhere, "verify", bundle, "--json").json
    assert [check["name"] for check in checks] == ["files", "examples"]
    answer = call(elsewhere, "verify", bundle, "--data")
    assert answer.code == 0, answer.err
    assert [line.split()[1] for line in answer.out.splitlines()] == ["files:", "examples:", "val:", "test:"]
    assert call(elsewhere, "verify", Path("..") / "kept" / bundle.name).code == 0


def test_a_bundle_needs_none_of_the_platforms(bundles: Path) -> None:
    code = (
        "import sys, dsnet\n"
        "dsnet.load_bundle(sys.argv[1])\n"
        "heavy = {'ray', 'mlflow', 'optuna', 'plotly', 'pydantic', 'yaml', 'ruamel', 'pandas', 'orchestration'}\n"
        "print(*sorted(heavy & set(sys.modules)))\n"
    )
    path = next(bundles.iterdir())
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


EXPORTED: list[SegmentGraphs] = []
"""The graphs in float32 of the bundle below, on which most of the time of its export is spent."""


@pytest.fixture(scope="module")
def in_int8(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sweep, whose launch again exported the knee in int8; only to be read."""
    pytest.importorskip("onnxscript", reason="extra deploy is not installed")
    folder = finished.copy(tmp_path_factory.mktemp("int8"))
    formats = ("--set", "export={formats: [bundle, onnx_int8]}")
    export = SegmentGraphs.of

    def exported(*args: Any, **options: Any) -> SegmentGraphs:
        EXPORTED.append(export(*args, **options))
        return EXPORTED[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SegmentGraphs, "of", exported)
        answer = call(folder, "launch", "tiny.yaml", *formats, *WITHOUT_MLFLOW)
    assert answer.code == 0, answer.err
    (knee,) = picked_slots(finished.results, ["knee"])
    assert f"{trial_name(knee)} in int8" in re.sub(r"\s+", " ", answer.err + answer.out)
    return folder


@pytest.mark.slow
def test_the_time_in_int8_is_told_beside_float32_and_the_widest_static_sub_network(
    finished: Finished, in_int8: Path
) -> None:
    content = json.loads((in_int8 / "runs" / "tiny" / "export" / "knee" / "onnx_int8" / "accuracy.json").read_text())
    timed = content["latency"]
    assert timed["threads"] == finished.results.config.measure.threads
    assert "ONNX Runtime" in timed["device"]
    assert set(timed["ms"]) == {str(size) for size in finished.results.config.measure.batch_sizes}
    for rows in timed["ms"].values():
        assert set(rows) == {"widest", *content["points"]}
        for row in rows.values():
            low, high = row["ratio_interval"]
            assert 0 < low <= high
            assert row["ratio"] == pytest.approx(row["int8"]["median_ms"] / row["float32"]["median_ms"])


@pytest.mark.slow
def test_the_accuracy_in_int8_is_that_of_the_int8_network_beside_its_own_controls(
    finished: Finished, in_int8: Path
) -> None:
    path = in_int8 / "runs" / "tiny" / "export" / "knee"
    content = json.loads((path / "onnx_int8" / "accuracy.json").read_text())
    results = RunResults(RunDir(in_int8 / "runs", "tiny"))
    prepared, (slot,) = prepare_again(results), picked_slots(results, ["knee"])
    openings = [before.manifest["test_openings"] for before in (finished.results, results)]
    assert openings[1] == openings[0] + 1, "test was read, and this is counted"
    bundle, float32 = (dsnet.load_bundle(path, precision=precision) for precision in ("int8", "float32"))
    (claims,) = content["points"].values()
    assert set(claims) == {"val", "test"}
    data = prepared.open_test()
    for split, own in claims.items():
        pixels, labels = data.images(split), data.labels(split).numpy()
        answer, before = bundle(pixels), float32(pixels)
        right, right_before = (each.classes.numpy() == labels for each in (answer, before))
        assert own["num_images"] == len(labels)
        assert own["top1"] == pytest.approx(right.mean())
        assert own["madds_m"] == pytest.approx(answer.madds.numpy().mean() / 1e6)
        assert own["float32_top1"] == pytest.approx(right_before.mean())
        assert own["difference"] == pytest.approx(right.mean() - right_before.mean())
        low, high = own["difference_interval"]
        assert low <= own["difference"] <= high
        error = (right.astype(float) - right_before).std() / len(labels) ** 0.5
        assert high - low == pytest.approx(3.92 * error, abs=2.5 / len(labels))
        assert own["same_route_share"] == pytest.approx(np.mean(answer.routes.numpy() == before.routes.numpy()))
        static = {}
        for route, name in enumerate(bundle.route_names):
            alone = bundle.net.with_router(FixedRouter(route))(bundle.normalization.apply(pixels))
            static[name] = (int(alone.madds[0]) / 1e6, float((alone.logits.argmax(1).numpy() == labels).mean()))
        told = {row["name"]: (row["madds_m"], row["top1"]) for row in content["static"][split]}
        np.testing.assert_allclose([told[name] for name in static], list(static.values()))
        shares = np.bincount(answer.routes.numpy(), minlength=len(static)) / len(labels)
        assert own["random_routing_top1"] == pytest.approx(shares @ [top1 for _, top1 in static.values()])
        if split == "val":  # on which the line is chosen: the best mixture of any two at this cost
            assert own["top1"] - own["gain_over_static"] == pytest.approx(_best_mixture(told.values(), own["madds_m"]))
        assert own["other_route_when_grouped"] == own["other_class_when_grouped"] == 0
        assert bundle.claims[split] == own
    assert "latency" not in bundle.claims
    assert slot == results.knee


@pytest.mark.slow
def test_static_sub_networks_that_a_bundle_does_not_have_are_quantised_as_its_own(in_int8: Path) -> None:
    """They are on the static line of the run, which a line over the bundle's routes could
    miss."""
    results = RunResults(RunDir(in_int8 / "runs", "tiny"))
    prepared = prepare_again(results)
    val = RoutingTable.load(results.run.table(results.done_key("table"), "val"))
    on_line = [val.routes[route] for route in StaticLine.fit(val.madds, val.correct1).vertices]
    bundle = dsnet.load_bundle(in_int8 / "runs" / "tiny" / "export" / "knee", precision="int8")
    without = replace(bundle, route_names=tuple(name for name in val.routes if name != on_line[-1]))
    supernet, _ = load_supernet(results.run.stage_dir("supernet", results.done_key("supernet")) / FINAL)
    source = BundleSource(prepared, results, supernet, {})
    ((table,),) = further_static(source, without, prepared.data, val, ["val"]).values()
    assert table.routes == (on_line[-1],)
    accuracy = json.loads((bundle.graphs / "accuracy.json").read_text())
    (told,) = (row["top1"] for row in accuracy["static"]["val"] if row["name"] == on_line[-1])
    assert table.top1() == pytest.approx([told])
    assert further_static(source, bundle, prepared.data, val, ["val"]) == {}


def _best_mixture(points: Iterable[tuple[float, float]], budget: float) -> float:
    """The highest mean top-1 of two points, mixed so that the mean cost is at most the budget."""
    known, best = list(points), -1.0
    for cost, top1 in known:
        for other_cost, other in known:
            if cost <= budget:
                share = 1.0 if other_cost <= budget else (budget - cost) / (other_cost - cost)
                best = max(best, (1 - share) * top1 + share * other, top1)
    return best


@pytest.mark.slow
def test_a_bundle_in_int8_is_verified_and_predicts(in_int8: Path, tmp_path: Path) -> None:
    path = in_int8 / "runs" / "tiny" / "export" / "knee"
    answer = call(tmp_path, "verify", path, "--data")
    assert answer.code == 0, answer.err
    names = [line.split(":")[0].split(maxsplit=1)[1] for line in answer.out.splitlines()]
    assert names == ["files", "examples", "onnx_int8", "val", "test", "val in int8", "test in int8"]
    pixels = prepare_again(RunResults(RunDir(in_int8 / "runs", "tiny"))).data.images("val")[:1]
    Image.fromarray(pixels[0, 0].numpy()).save(tmp_path / "scan.png")
    (row,) = call(tmp_path, "predict", path, "scan.png", "--json", "--precision", "int8").json["predictions"]
    expected = dsnet.load_bundle(path, precision="int8")(pixels)
    assert row["probability"] == pytest.approx(float(expected.probabilities.max()), rel=1e-5)
    answer = call(tmp_path, "predict", path, "scan.png", "--precision", "int7")
    assert answer.code == ConfigError.exit_code
    assert problems_of_message(answer, ["int7", "int8"]) == []

    boasting = tmp_path / "boasting"
    shutil.copytree(path, boasting)
    file = boasting / "onnx_int8" / "accuracy.json"
    content = json.loads(file.read_text())
    (claims,) = content["points"].values()
    claims["val"]["top1"] += 0.1
    file.write_text(json.dumps({**content, "points": {"any name": claims}}))
    assert call(tmp_path, "verify", boasting).code == 0
    answer = call(tmp_path, "verify", boasting, "--data")
    assert answer.code == 7
    assert problems_of_message(answer, ["on val", "claims", "reaches"]) == []


@pytest.mark.slow
def test_an_accuracy_that_quantisation_destroys_is_told(
    in_int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibrated on black images, whose ranges no other image fits."""
    monkeypatch.setattr(int8, "calibration_images", torch.zeros_like)
    graphs = iter(EXPORTED)
    monkeypatch.setattr(SegmentGraphs, "of", lambda *args, **options: next(graphs))
    answer = call(in_int8, "export", "tiny", "--format", "onnx_int8", "--out", tmp_path)
    assert answer.code == 0, answer.err
    content = json.loads((tmp_path / "knee" / "onnx_int8" / "accuracy.json").read_text())
    (claims,) = content["points"].values()
    assert claims["test"]["difference_interval"][1] < -0.2
    said = re.sub(r"\s+", " ", answer.err)
    assert f"in int8 loses accuracy: top-1 {100 * claims['test']['top1']:.1f} % on test" in said
    assert f"difference {100 * claims['test']['difference']:+.1f} points" in said
    assert "loses accuracy" in str(dsnet.load_bundle(tmp_path / "knee"))


def test_predict_answers_photos_as_the_bundle_answers_the_data_and_names_what_it_cannot_read(
    finished: Finished, bundles: Path, tmp_path: Path
) -> None:
    pixels = prepare_again(finished.results).data.images("val")[:6]
    for index, image in enumerate(pixels):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"scan-{index}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    path = next(bundles.iterdir())
    bundle = dsnet.load_bundle(path)
    expected = bundle(pixels)

    answer = call(finished.folder, "predict", path, tmp_path, "--json")
    assert answer.code == 3
    assert [Path(item["file"]).name for item in answer.json["unreadable"]] == ["broken.png"]
    rows = answer.json["predictions"]
    assert [Path(row["file"]).name for row in rows] == [f"scan-{index}.png" for index in range(6)]
    assert [row["class"] for row in rows] == [bundle.class_names[label] for label in expected.classes.tolist()]
    assert [row["route"] for row in rows] == [bundle.route_names[route] for route in expected.routes.tolist()]
    assert [row["madds"] for row in rows] == expected.madds.tolist()
    assert [row["probability"] for row in rows] == pytest.approx(expected.probabilities.amax(1).tolist(), rel=1e-5)
    assert all(0 < row["milliseconds"] < 10_000 for row in rows)
    written = call(finished.folder, "predict", path, tmp_path / "scan-0.png", tmp_path / "scan-1.png", "--csv")
    assert written.code == 0
    first, _ = csv.DictReader(written.out.splitlines())
    assert list(first) == list(rows[0])
    assert (first["class"], int(first["madds"])) == (rows[0]["class"], rows[0]["madds"])

    answer = call(finished.folder, "predict", path, tmp_path / "scan-0.png", tmp_path / "gone.png")
    assert answer.code == 3
    assert answer.out.splitlines()[1].split()[:2] == [str(tmp_path / "scan-0.png"), rows[0]["class"]]
    assert f"{tmp_path / 'gone.png'}: cannot be read" in answer.err
    assert call(finished.folder, "predict", path, tmp_path / "scan-0.png").code == 0
    assert call(finished.folder, "predict", tmp_path / "none", tmp_path / "scan-0.png").code == 9
    by_torch = call(finished.folder, "predict", path, tmp_path / "scan-0.png", "--engine", "torch", "--json")
    assert by_torch.json["predictions"][0]["class"] == rows[0]["class"]
    unknown = call(finished.folder, "predict", path, tmp_path / "scan-0.png", "--engine", "torhc")
    assert unknown.code == 2
    assert problems_of_message(unknown, ["unknown engine 'torhc'", "did you mean 'torch'"]) == []


@pytest.mark.parametrize(
    ("name", "code"),
    [("weights.safetensors", 3), ("examples.safetensors", 7), ("gate.yaml", 7), ("bundle.json", 3)],
)
def test_every_file_of_a_bundle_that_is_tampered_with_is_noticed_and_named(
    bundles: Path, tmp_path: Path, name: str, code: int
) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(next(bundles.iterdir()), copy)
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 0x01
    (copy / name).write_bytes(content)
    answer = call(tmp_path, "verify", "bundle")
    assert answer.code == code
    assert problems_of_message(answer, [name]) == []
    (copy / name).unlink()
    answer = call(tmp_path, "verify", "bundle")
    assert answer.code in (3, 7)
    assert problems_of_message(answer, [name]) == []


def test_claims_that_the_data_does_not_bear_out_are_an_error(finished: Finished, tmp_path: Path) -> None:
    # Exported by someone who wrote better numbers into the claims: files and examples are in order,
    # the accuracy is not.
    results = finished.results
    prepared = prepare_again(results)
    slot = results.front[0]
    honest = bundle_claims(prepared, results, slot)
    boasting = {**honest, "val": {**honest["val"], "top1": honest["val"]["top1"] + 0.1}}
    path = _export_with(prepared, results, slot, boasting, tmp_path)
    assert call(tmp_path, "verify", path).code == 0
    answer = call(tmp_path, "verify", path, "--data")
    assert answer.code == 7
    assert problems_of_message(answer, ["on val", "claims", "reaches"]) == []
    elsewhere = {**honest, "data": {**honest["data"], "seed": 1}}
    answer = call(tmp_path, "verify", _export_with(prepared, results, slot, elsewhere, tmp_path), "--data")
    assert answer.code == 3
    assert problems_of_message(answer, ["digits", "fingerprint", "--data"]) == []


def _export_with(  # type: ignore[no-untyped-def]
    prepared, results: RunResults, slot: int, claims: dict[str, object], folder: Path, num_examples: int = 16
) -> Path:
    from dsnet.deploy.bundle import BundleContents, save_bundle
    from dsnet.stored.checkpoint import load_supernet

    supernet, _ = load_supernet(results.run.stage_dir("supernet", results.done_key("supernet")) / "final")
    path = folder / "boasting"
    contents = BundleContents(
        supernet=supernet,
        router=results.router(slot),
        normalization=prepared.normalization,
        class_names=prepared.image_set.class_names,
        examples=prepared.data.images("val")[:num_examples],
    )
    save_bundle(path, contents, claims=claims, gate_yaml="claims: more than true\n")
    return path


def test_a_folder_that_is_no_bundle_is_not_overwritten(finished: Finished, tmp_path: Path) -> None:
    (slot,) = picked_slots(finished.results, ["knee"])
    precious = tmp_path / trial_name(slot) / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years of work")
    answer = call(finished.folder, "export", "tiny", "--out", tmp_path)
    assert answer.code == 3
    assert problems_of_message(answer, [trial_name(slot), "not a bundle"]) == []
    assert precious.read_text() == "years of work"


@pytest.mark.slow
def test_formats_of_an_earlier_export_are_kept_unless_they_are_damaged(
    finished: Finished, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("onnxscript", reason="extra deploy is not installed")
    assert call(finished.folder, "export", "tiny", "--format", "onnx_single", "--out", tmp_path).code == 0
    graph = tmp_path / "knee" / "onnx_single" / "classifier.onnx"
    content = graph.read_bytes()
    answer = call(finished.folder, "export", "tiny", "--out", tmp_path)
    assert (answer.code, graph.read_bytes()) == (0, content)
    refused = call(finished.folder, "export", "tiny", "--format", "onnx_photo", "--out", tmp_path)  # digits are grey
    assert (refused.code, graph.read_bytes()) == (2, content)

    graph.write_bytes(content[: len(content) // 2])
    answer = call(finished.folder, "export", "tiny", "--out", tmp_path)
    assert answer.code == 0, answer.err
    assert "onnx_single of an earlier export is damaged" in caplog.text
    assert "--format onnx_single" in caplog.text
    assert not graph.exists()


def test_a_format_of_a_bundle_with_other_content_is_removed_and_named(
    finished: Finished, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (slot,) = picked_slots(finished.results, ["knee"])
    assert call(finished.folder, "export", "tiny", "--out", tmp_path).code == 0
    manifest = tmp_path / trial_name(slot) / "bundle.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"sha256": "of another content"}))
    (manifest.parent / "static").mkdir()
    answer = call(finished.folder, "export", "tiny", "--out", tmp_path)
    assert answer.code == 0, answer.err
    assert "static of an earlier export was made from another content" in caplog.text
    assert not (manifest.parent / "static").exists()


def test_a_run_is_timed_on_its_own_images_beside_its_own_sub_networks(finished: Finished) -> None:
    results = finished.results
    supernet = load_supernet(results.run.stage_dir("supernet", results.done_key("supernet")) / FINAL)[0].eval()
    name = supernet.subnets[1].name
    work = of_run(finished.run.path, None, name, "cpu")
    assert len(work.pool) == results.num_val
    batch = work.batches(16, seed=0)[0]
    assert {call.partition("/")[0] for call in work.contenders.calls([batch])} >= {
        "dynamic",
        "ideal",
        "static widest",
        "static cheapest",
        "static equal",
    }
    order = supernet.subnets.by_madds()
    for label, route in (("static widest", order[-1]), ("static cheapest", order[0]), ("static equal", 1)):
        expected = supernet(batch, supernet.subnets[route])
        torch.testing.assert_close(work.contenders.static[label](batch), expected, rtol=1e-4, atol=1e-4)
    assert work.contenders.memory_bytes["cut"] > work.contenders.memory_bytes["sliced"]
    with pytest.raises(click.BadParameter, match=f"no sub-network 'nope'; it has .*{name}"):
        of_run(finished.run.path, None, "nope", "cpu")
