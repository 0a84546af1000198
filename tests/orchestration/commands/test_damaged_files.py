"""A file of a finished run that was damaged is refused by name, made again, or of no influence:
never an internal error, and never another number."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsnet.files import file_sha256, read_sealed, write_sealed
from orchestration.results.run import RunResults
from tests.orchestration.commands.damage import (
    CORRUPTIONS,
    LAUNCH,
    READ_ONLY,
    RUN,
    UNREAD,
    damaged,
    problems,
    stored_files,
    values,
)
from tests.orchestration.samples import WITHOUT_MLFLOW, Finished, call, results_in, snapshot, study_of


@pytest.fixture(scope="module")
def folder(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished sweep; a test leaves it as it was."""
    return finished.copy(tmp_path_factory.mktemp("damaged"))


@pytest.fixture(scope="module")
def right(folder: Path) -> dict[str, Any]:
    """The values of every command on the undamaged run."""
    answers = {command: call(folder, *arguments) for command, arguments in READ_ONLY.items()}
    assert {answer.code for answer in answers.values()} == {0}
    return {command: values(folder, command, answer) for command, answer in answers.items()}


def file_named(folder: Path, pattern: str) -> Path:
    (found,) = (folder / RUN).glob(pattern)
    return found.relative_to(folder / RUN)


def test_each_file_is_refused_by_name_or_has_no_influence(folder: Path, right: dict[str, Any]) -> None:
    """One kind of damage and one command that only reads; `make test-long` tries all of them."""
    found = []
    for number, file in enumerate(stored_files(folder)):
        kind = list(CORRUPTIONS)[number % len(CORRUPTIONS)]
        command = "verify" if file.parts[0] == "export" else ("pareto", "status")[number % 2]
        with damaged(folder, file, CORRUPTIONS[kind]):
            found += problems(folder, command, call(folder, *READ_ONLY[command]), right[command], file)
    assert found == []


def test_a_finished_stage_whose_marker_is_missing_is_refused_by_the_readers_of_later_stages(folder: Path) -> None:
    marker = file_named(folder, "measure/*/done")
    with damaged(folder, marker, CORRUPTIONS["removed"]):
        for command in ("pareto", "status"):
            answer = call(folder, *READ_ONLY[command])
            assert answer.code == 3
            assert f"{marker} is missing, although" in answer.err


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_every_damage_of_every_file_is_refused_or_has_no_influence(
    folder: Path, right: dict[str, Any], kind: str
) -> None:
    found = []
    for file in stored_files(folder):
        for command, arguments in READ_ONLY.items():
            with damaged(folder, file, CORRUPTIONS[kind]):
                if command == "export" and file.parts[0] == "export":
                    continue  # it is replaced, and `damaged` would bring the old one back
                found += problems(folder, command, call(folder, *arguments), right[command], file)
    assert found == []


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_launch_notices_every_damage_and_ends_with_the_right_values(
    finished: Finished, folder: Path, right: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    found = []
    for number, file in enumerate(stored_files(folder)):
        own = finished.copy(tmp_path / f"{number}")
        path = own / RUN / file
        changed = CORRUPTIONS[kind](path.read_bytes())
        path.unlink()
        if changed is not None:
            path.write_bytes(changed)
        answer = call(own, *LAUNCH)
        found += [
            f"{file}: {bad} in {answer.err[-800:]}" for bad in ("Traceback", "internal error") if bad in answer.err
        ]
        if answer.code != 0:
            found += problems(own, "launch", answer, None, file)
            continue
        is_unread = any(file.match(pattern) for pattern in UNREAD)
        name = file.stem.replace("slot-0", "trial-") if "gates" in file.parts else file.name
        if not is_unread and file.parts[0] != "export" and name not in answer.err and path.name not in MADE_AGAIN:
            found.append(f"{file}: {kind} was not noticed")
        if file.name == "curves.jsonl":
            continue  # they are lost, which is said
        for command in ("status", "pareto", "verify"):
            found += problems(own, command, call(own, *READ_ONLY[command]), right[command], file)
    assert found == []


MADE_AGAIN = ("sweep.yaml", "stage.json", "done", "arithmetic.json", "test.safetensors", "test.safetensors.json")
"""Files that a launch writes from what it knows, or that it reads only when it continues."""


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_launch_makes_damaged_files_again_and_keeps_them(
    finished: Finished, right: dict[str, Any], tmp_path: Path
) -> None:
    folder = finished.copy(tmp_path)
    run = folder / RUN
    named = {
        "measure/*/subnets.json": CORRUPTIONS["flipped"],
        "table/*/val.safetensors": CORRUPTIONS["halved"],
        "table/*/stage.json": CORRUPTIONS["latin"],
        "search/*/study.journal": CORRUPTIONS["halved"],
        "search/*/gates/slot-00000.safetensors": CORRUPTIONS["flipped"],
    }
    files = {file_named(folder, pattern): corruption for pattern, corruption in named.items()}
    latency = (run / file_named(folder, "measure/*/latency.json")).read_bytes()
    for file, corruption in files.items():
        content = corruption((run / file).read_bytes())
        assert content is not None
        (run / file).write_bytes(content)
    before = snapshot(run)
    for command in ("status", "pareto", "export"):
        answer = call(folder, *READ_ONLY[command])
        assert answer.code == 3
        assert any(str(run / file) in answer.err for file in files)
        assert "internal error" not in answer.err
    assert snapshot(run) == before, "commands that only read change nothing"

    answer = call(folder, *LAUNCH)
    assert answer.code == 0, answer.err
    assert "continues from the" in answer.err
    for file in files:
        assert str(run / file) in answer.err or "trial-0000" in answer.err
        assert (run / file).with_name(f"{file.name}.damaged-1").is_file(), file
        assert (run / file).is_file()
    assert (run / file_named(folder, "measure/*/latency.json")).read_bytes() == latency, "what is whole is kept"
    assert study_of(results_in(folder)) == study_of(finished.results)
    for command in ("status", "pareto", "export", "verify"):
        assert problems(folder, command, call(folder, *READ_ONLY[command]), right[command], Path("x")) == []
    again = call(folder, *LAUNCH)
    assert again.code == 0
    assert "damaged" not in again.err


def test_a_changed_gate_is_not_exported_with_the_claims_of_the_first(folder: Path, finished: Finished) -> None:
    knee = finished.results.knee
    file = file_named(folder, f"search/*/gates/slot-{knee:05d}.safetensors")
    with damaged(folder, file, CORRUPTIONS["flipped"]):
        answer = call(folder, "export", "tiny", "--pick", "knee")
    assert answer.code == 3
    assert f"{file.name}: is not the gate that the trial stored" in answer.err


def test_lost_loss_curves_are_said_and_do_not_train_the_supernet_again(finished: Finished, tmp_path: Path) -> None:
    folder = finished.copy(tmp_path)
    file = file_named(folder, "supernet/*/curves.jsonl")
    path = folder / RUN / file
    path.write_bytes(path.read_bytes()[:-20])
    assert call(folder, "report", "tiny").code == 3
    answer = call(folder, *LAUNCH)
    assert answer.code == 0, answer.err
    assert "curves.jsonl.damaged-1" in answer.err
    assert "supernet: already done" in answer.err
    assert call(folder, "report", "tiny").code == 0


@pytest.mark.parametrize("has_seal", [True, False])
def test_a_line_of_the_curves_that_was_torn_by_a_kill_is_left_out(
    finished: Finished, tmp_path: Path, has_seal: bool
) -> None:
    """As in a run of an earlier release, which recorded no hash of the curves."""
    folder = finished.copy(tmp_path)
    path = folder / RUN / file_named(folder, "supernet/*/curves.jsonl")
    done = path.with_name("done")
    content = read_sealed(done)
    del content["files"]["curves.jsonl"]
    if has_seal:
        write_sealed(done, content)
    else:
        done.write_text(json.dumps(content))
    warnings = call(folder, "status", "tiny", "--json").json["warnings"]
    with path.open("ab") as file:
        file.write(b'{"step": 40, "met')
    assert call(folder, "status", "tiny", "--json").json["warnings"] == warnings
    assert call(folder, "report", "tiny").code == 0
    path.write_bytes(b"[" * 50_000 + b"\n" + path.read_bytes())
    answer = call(folder, "report", "tiny")
    assert answer.code == 3
    assert "curves.jsonl, line 1, is not valid JSON (nested too deeply)" in answer.err


def test_commands_that_show_a_run_write_nothing(finished: Finished, tmp_path: Path) -> None:
    folder = finished.copy(tmp_path)
    before = snapshot(folder)
    for command in ("status", "pareto"):
        assert call(folder, *READ_ONLY[command]).code == 0
    assert snapshot(folder) == before


def test_a_changed_sweep_yaml_is_refused_until_it_is_launched(finished: Finished, tmp_path: Path) -> None:
    folder = finished.copy(tmp_path)
    path = folder / RUN / "sweep.yaml"
    path.write_text(path.read_text().replace("trials: 12", "trials: 11"))
    answer = call(folder, "status", "tiny")
    assert answer.code == 3
    assert "sweep.yaml is not what the last launch wrote" in answer.err
    assert call(folder, "launch", path, "--runs", folder / "runs", *WITHOUT_MLFLOW).code == 0
    assert call(folder, "status", "tiny", "--json").json["trials"]["budget"] == 11


Edit = Callable[[dict[str, Any]], None]


@pytest.mark.parametrize(
    ("pattern", "edit"),
    [
        ("measure/*/subnets.json", lambda content: content["subnets"].clear()),
        ("measure/*/subnets.json", lambda content: content["subnets"][0].pop("top1")),
        ("measure/*/latency.json", lambda content: content.update(trunk={"a": 1})),
        ("verify/*/verify.json", lambda content: content.update(val=3)),
        ("supernet/*/final.json", lambda content: content.update(subnets={"members": 4})),
        ("search/*/end.json", lambda content: content.pop("reason")),
    ],
)
def test_values_of_another_form_whose_hashes_fit_are_refused_by_name(
    finished: Finished, tmp_path: Path, pattern: str, edit: Edit
) -> None:
    folder = finished.copy(tmp_path)
    path = folder / RUN / file_named(folder, pattern)
    content = read_sealed(path) if path.name == "end.json" else json.loads(path.read_text())
    edit(content)
    write = write_sealed if path.name == "end.json" else lambda at, value: at.write_text(json.dumps(value))
    write(path, content)
    record_again(results_in(folder), path)
    for command in ("status", "pareto", "report"):
        answer = call(folder, *READ_ONLY[command])
        assert "internal error" not in answer.err
        assert answer.code in (0, 3)
        assert answer.code == 0 or path.name in answer.err
    assert any(call(folder, *READ_ONLY[command]).code == 3 for command in ("status", "report")) or "verify" in pattern


def record_again(results: RunResults, path: Path) -> None:
    """Make the record of a stage fit its changed file."""
    done = path.with_name("done")
    content = read_sealed(done)
    content["files"][path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    write_sealed(done, content)
    assert results.run.path in path.parents
