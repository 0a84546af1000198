import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsnet.errors import CheckpointError
from orchestration.runs.folder import RunDir
from orchestration.runs.manifest import Manifest
from orchestration.runs.stages import (
    StageDefinition,
    StageDir,
    StagePlan,
    canonical_settings,
    mend_stages,
    plan_stages,
    run_stage,
    stage_key,
)

SUPERNET = StageDefinition(
    "supernet", 1, {"supernet": {"model": "ds_tiny", "train": {"lr": 0.1, "epochs": 30}}}, "data-1"
)
TABLE = StageDefinition("table", 1, {"recalibration": {"images": None}}, "data-1", ("supernet",))
SEARCH = StageDefinition("search", 2, {"space": {"gate.target": {"uniform": [0.05, 0.9]}}}, "data-1", ("table",))

scalars = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | st.text(max_size=3)
names = st.text(alphabet="abcdef", min_size=1, max_size=3)
configs = st.dictionaries(
    names, st.recursive(scalars, lambda inner: st.dictionaries(names, inner, max_size=3)), max_size=4
)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path, "digits")
    run.create()
    Manifest(run.manifest_path).create(seed=0, hardware={}, versions={"python": "3"})
    return run


def write_result(folder: Path) -> Sequence[Path]:
    (folder / "checkpoint").mkdir(exist_ok=True)
    outputs = [folder / "result.json", folder / "checkpoint" / "weights.safetensors"]
    for path in outputs:
        path.write_text(f"made by {folder.parent.name}")
    (folder / "scratch").write_text("not an output")
    return outputs


def run_all(run: RunDir, definitions: Sequence[StageDefinition]) -> list[str]:
    """Run a pipeline; returns the names of the stages that did work."""
    worked = []

    def work(folder: Path) -> Sequence[Path]:
        worked.append(folder.parent.name)
        return write_result(folder)

    for plan in plan_stages(run, definitions):
        run_stage(run, plan, work)
    return worked


def statuses(plans: Sequence[StagePlan]) -> dict[str, str]:
    return {plan.name: plan.status for plan in plans}


def shuffled(config: dict[str, Any]) -> dict[str, Any]:
    return {key: shuffled(value) if isinstance(value, dict) else value for key, value in reversed(config.items())}


@settings(deadline=None)
@given(configs)
def test_a_key_does_not_depend_on_the_order_of_a_mapping(config: dict[str, Any]) -> None:
    assert stage_key("s", 1, config, "d", []) == stage_key("s", 1, shuffled(config), "d", [])


@settings(deadline=None)
@given(configs)
def test_a_key_survives_writing_the_configuration_as_json(config: dict[str, Any]) -> None:
    assert stage_key("s", 1, config, "d", []) == stage_key("s", 1, json.loads(json.dumps(config)), "d", [])


@pytest.mark.slow
@settings(deadline=None)
@given(configs, configs)
def test_two_keys_are_equal_exactly_when_the_flat_configurations_are(one: dict[str, Any], two: dict[str, Any]) -> None:
    def typed(config: dict[str, Any]) -> dict[str, Any]:
        return {key: (isinstance(value, bool), value) for key, value in canonical_settings(config).items()}

    assert (stage_key("s", 1, one, "d", []) == stage_key("s", 1, two, "d", [])) == (typed(one) == typed(two))


def test_a_key_depends_on_each_of_its_parts() -> None:
    keys = {
        stage_key("table", 1, {"a": 1}, "d", ["p"]),
        stage_key("search", 1, {"a": 1}, "d", ["p"]),
        stage_key("table", 2, {"a": 1}, "d", ["p"]),
        stage_key("table", 1, {"a": 2}, "d", ["p"]),
        stage_key("table", 1, {"a": True}, "d", ["p"]),
        stage_key("table", 1, {"a": "1"}, "d", ["p"]),
        stage_key("table", 1, {"a": 1}, "e", ["p"]),
        stage_key("table", 1, {"a": 1}, "d", []),
        stage_key("table", 1, {"a": 1}, "d", ["p", "q"]),
        stage_key("table", 1, {"a": 1}, "d", ["q", "p"]),
    }
    assert len(keys) == 10
    assert all(len(key) == 64 for key in keys)


def test_equal_numbers_make_equal_keys() -> None:
    plain = stage_key("s", 1, {"lr": 1, "zero": 0, "widths": [1, 2], "x": 0.1}, "d", [])
    assert plain == stage_key("s", 1, {"lr": 1.0, "zero": -0.0, "widths": (1.0, 2), "x": np.float64(0.1)}, "d", [])
    assert plain == stage_key("s", 1, {"x": 0.1, "zero": np.int64(0), "widths": [np.float32(1), 2], "lr": 1}, "d", [])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_without_a_canonical_form_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="stage key"):
        stage_key("s", 1, {"lr": value}, "d", [])


def test_a_key_is_stable_across_releases() -> None:
    # If this changes, every user's finished stage is thrown away: only ever on purpose.
    key = stage_key("supernet", 1, {"train": {"lr": 0.1, "epochs": 30}, "model": "ds_tiny"}, "data", ["parent"])
    assert key[:12] == "8ef431eb650a"


def test_a_new_run_has_everything_to_do_and_planning_writes_nothing(tmp_path: Path) -> None:
    plans = plan_stages(RunDir(tmp_path / "runs", "digits"), [SUPERNET, TABLE, SEARCH])
    assert statuses(plans) == {"supernet": "run", "table": "run", "search": "run"}
    assert list(tmp_path.iterdir()) == []


def test_a_second_launch_repeats_nothing(run: RunDir) -> None:
    assert run_all(run, [SUPERNET, TABLE, SEARCH]) == ["supernet", "table", "search"]
    assert run_all(run, [SUPERNET, TABLE, SEARCH]) == []
    stages = Manifest(run.manifest_path).read()["stages"]
    assert {name: entry["status"] for name, entry in stages.items()} == dict.fromkeys(stages, "done")
    for name, entry in stages.items():
        assert run.path / entry["dir"] == run.stage_dir(name, entry["key"])
        assert entry["seconds"] >= 0


def test_a_change_invalidates_the_stage_and_those_below_and_says_why(run: RunDir) -> None:
    run_all(run, [SUPERNET, TABLE, SEARCH])
    config = {"supernet": {"model": "ds_tiny", "train": {"lr": 0.05, "epochs": 30, "momentum": 0.9}}}
    plans = plan_stages(run, [replace(SUPERNET, config=config), TABLE, SEARCH])
    assert statuses(plans) == {"supernet": "invalidated", "table": "invalidated", "search": "invalidated"}
    reasons = {plan.name: plan.reasons for plan in plans}
    assert reasons["supernet"] == ("supernet.train.lr: 0.1 -> 0.05", "supernet.train.momentum: (absent) -> 0.9")
    assert reasons["table"] == ("it reads the supernet stage, which changed",)
    assert reasons["search"] == ("it reads the table stage, which changed",)


def test_a_changed_digest_is_told_in_words(run: RunDir) -> None:
    before = replace(SUPERNET, config={"layout": "a" * 64, "start": None, "bases": ["b" * 64]})
    run_all(run, [before])
    after = replace(before, config={"layout": "c" * 64, "start": "d" * 64, "bases": ["b" * 64]})
    assert plan_stages(run, [after])[0].reasons == ("the network's layout changed", "the start weights changed")


def test_changing_the_space_leaves_the_supernet_alone(run: RunDir) -> None:
    run_all(run, [SUPERNET, TABLE, SEARCH])
    search = replace(SEARCH, config={"space": {"gate.target": {"uniform": [0.1, 0.9]}}})
    plans = plan_stages(run, [SUPERNET, TABLE, search])
    assert statuses(plans) == {"supernet": "done", "table": "done", "search": "invalidated"}
    assert plans[2].reasons == ("space.gate.target.uniform: [0.05, 0.9] -> [0.1, 0.9]",)
    assert run_all(run, [SUPERNET, TABLE, search]) == ["search"]


def test_a_new_code_version_and_new_data_are_named(run: RunDir) -> None:
    run_all(run, [SUPERNET])
    plan = plan_stages(run, [replace(SUPERNET, version=2, data_fingerprint="data-2")])[0]
    assert plan.reasons == ("the stage's code changed: version 1 -> 2", "the data changed")


def test_going_back_to_an_earlier_configuration_finds_its_result(run: RunDir) -> None:
    run_all(run, [SUPERNET])
    first = Manifest(run.manifest_path).read()["stages"]["supernet"]
    run_all(run, [replace(SUPERNET, version=2)])
    assert run_all(run, [SUPERNET]) == []
    assert Manifest(run.manifest_path).read()["stages"]["supernet"] == first


def test_an_interrupted_stage_resumes_in_its_own_folder(run: RunDir) -> None:
    def interrupted(folder: Path) -> Sequence[Path]:
        (folder / "checkpoint-1").write_text("half of it")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(run, plan_stages(run, [SUPERNET])[0], interrupted)
    plan = plan_stages(run, [SUPERNET])[0]
    assert (plan.status, plan.reasons) == ("resume", ("it began but did not finish",))
    assert Manifest(run.manifest_path).read()["stages"]["supernet"]["status"] == "running"

    def resumed(folder: Path) -> Sequence[Path]:
        assert (folder / "checkpoint-1").read_text() == "half of it"
        return write_result(folder)

    folder = run_stage(run, plan, resumed)
    record = folder.record()
    assert record is not None
    assert (record.status, record.num_starts) == ("done", 2)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), "output result.json is missing"),
        (lambda path: path.write_text("short"), "output result.json has 5 bytes, not 16"),
    ],
)
def test_a_damaged_output_is_made_again(run: RunDir, damage: Any, reason: str) -> None:
    run_all(run, [SUPERNET])
    damage(plan_stages(run, [SUPERNET])[0].folder.path / "result.json")
    plan = plan_stages(run, [SUPERNET])[0]
    assert (plan.status, plan.reasons) == ("resume", (reason,))
    assert run_all(run, [SUPERNET]) == ["supernet"]
    assert plan_stages(run, [SUPERNET])[0].is_done


def test_an_interrupted_repair_is_not_taken_for_the_old_result(run: RunDir) -> None:
    run_all(run, [SUPERNET])
    (plan_stages(run, [SUPERNET])[0].folder.path / "result.json").unlink()

    def interrupted(folder: Path) -> Sequence[Path]:
        write_result(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(run, plan_stages(run, [SUPERNET])[0], interrupted)
    assert plan_stages(run, [SUPERNET])[0].status == "resume"


def test_a_changed_byte_is_found_by_its_hash(run: RunDir) -> None:
    run_all(run, [SUPERNET])
    folder = plan_stages(run, [SUPERNET])[0].folder
    folder.check()
    assert set(folder.outputs()) == {"result.json", "checkpoint/weights.safetensors"}
    weights = folder.outputs()["checkpoint/weights.safetensors"]
    weights.write_text(weights.read_text().replace("made", "Made"))
    assert not folder.is_done(), "although the size is the same"
    with pytest.raises(CheckpointError, match=r"weights\.safetensors has another SHA-256 .* launch the sweep again"):
        folder.check()
    assert run_all(run, [SUPERNET, TABLE]) == ["supernet", "table"], "before the stage that reads it"
    kept = weights.with_name("weights.safetensors.damaged-1")
    assert kept.read_text() == "Made by supernet"
    assert weights.read_text() == "made by supernet"


def test_a_stage_does_not_begin_on_a_damaged_output_of_another(run: RunDir) -> None:
    run_all(run, [SUPERNET])
    plans = plan_stages(run, [SUPERNET, TABLE])
    (plans[0].folder.path / "result.json").write_text("Made by supernet")
    with pytest.raises(CheckpointError, match=r"result\.json has another SHA-256"):
        run_stage(run, plans[1], write_result)
    assert not plans[1].folder.path.exists()


def test_a_result_of_weights_that_were_made_again_with_other_bits_is_refused(run: RunDir) -> None:
    run_all(run, [SUPERNET, TABLE, SEARCH])
    plans = plan_stages(run, [SUPERNET, TABLE, SEARCH])
    weights = plans[0].folder.path / "checkpoint" / "weights.safetensors"
    weights.write_text("damaged")
    assert [told.partition(" has")[0] for told in mend_stages(run)] == [str(weights)]
    assert [plan.is_done for plan in plan_stages(run, [SUPERNET, TABLE, SEARCH])] == [False, True, True]

    def with_other_bits(folder: Path) -> Sequence[Path]:
        outputs = write_result(folder)
        weights.write_text("made by another")
        return outputs

    run_stage(run, plan_stages(run, [SUPERNET])[0], with_other_bits)
    for plan in plan_stages(run, [SUPERNET, TABLE, SEARCH])[1:]:
        with pytest.raises(CheckpointError, match="other files than the supernet stage has now"):
            run_stage(run, plan, write_result)
    run_stage(run, replace(plans[0], status="resume"), write_result)
    assert run_all(run, [SUPERNET, TABLE, SEARCH]) == [], "the same bits again"


def test_an_intact_output_need_not_be_made_again_while_another_was_lost(run: RunDir) -> None:
    run_all(run, [SUPERNET])
    folder = plan_stages(run, [SUPERNET])[0].folder
    assert folder.intact_outputs() == {}, "nothing was lost"
    (folder.path / "result.json").unlink()
    assert mend_stages(run) == [f"{folder.path / 'result.json'} is missing; it is made again"]
    assert mend_stages(run) == []
    assert Manifest(run.manifest_path).read()["stages"]["supernet"]["status"] == "running"

    def mended(path: Path) -> Sequence[Path]:
        assert set(folder.intact_outputs()) == {"checkpoint/weights.safetensors"}
        return write_result(path)

    run_stage(run, plan_stages(run, [SUPERNET])[0], mended)
    assert folder.is_done()
    assert folder.intact_outputs() == {}


def test_a_lost_stage_json_is_written_again_with_the_start_of_the_first(run: RunDir) -> None:
    run_all(run, [SUPERNET])
    folder = plan_stages(run, [SUPERNET])[0].folder
    record = folder.record()
    folder.stage_json.write_bytes(folder.stage_json.read_bytes().replace(b'"lr"', b'"lq"').replace(b"30", b"31"))
    (told,) = mend_stages(run)
    assert "stage.json has changed since it was written" in told
    assert run_all(run, [SUPERNET]) == []
    assert folder.record() == record


def test_a_stage_that_did_not_write_what_it_said_is_not_done(run: RunDir) -> None:
    plan = plan_stages(run, [SUPERNET])[0]
    with pytest.raises(CheckpointError, match=r"nothing\.json"):
        run_stage(run, plan, lambda folder: [folder / "nothing.json"])
    assert not plan.folder.is_done()


def test_a_kill_between_the_marker_and_the_manifest_is_mended(run: RunDir) -> None:
    run_all(run, [SUPERNET])
    manifest = Manifest(run.manifest_path)
    done = manifest.read()["stages"]["supernet"]
    manifest.record_stage("supernet", {**done, "status": "running", "seconds": None})
    assert run_all(run, [SUPERNET]) == []
    assert manifest.read()["stages"]["supernet"] == done


@pytest.mark.parametrize("name", ["stage.json", "done"])
def test_a_torn_record_is_named(run: RunDir, name: str) -> None:
    run_all(run, [SUPERNET])
    (plan_stages(run, [SUPERNET])[0].folder.path / name).write_text('{"stage": "sup')
    if name == "done":
        with pytest.raises(CheckpointError, match="done is not valid JSON"):
            plan_stages(run, [SUPERNET])
    else:
        with pytest.raises(CheckpointError, match=r"stage\.json is not valid JSON"):
            plan_stages(run, [replace(SUPERNET, version=2)])


def test_a_folder_with_another_key_inside_is_refused(run: RunDir) -> None:
    run_all(run, [SUPERNET])
    plan = plan_stages(run, [SUPERNET])[0]
    with pytest.raises(CheckpointError, match="copied or renamed"):
        StageDir(plan.folder.path).begin(replace(plan.record, key="f" * 64))
