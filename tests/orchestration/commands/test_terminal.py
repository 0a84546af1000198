"""What commands print for people."""

from __future__ import annotations

import re
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsnet.files import atomic_write_json, read_sealed, write_sealed
from orchestration.commands.messages import complain
from orchestration.commands.supernet_tables import show_supernets_status
from orchestration.commands.sweep import find_run
from orchestration.commands.terminal import metric_head, say_mlflow, say_places, show_front
from orchestration.config.sweep import SweepConfig
from orchestration.results.report import bundle_commands
from orchestration.results.run import RunResults
from orchestration.runs.folder import RunDir
from orchestration.runs.lock import LockHolder
from orchestration.runs.manifest import Manifest
from tests.orchestration.samples import Finished, call, results_in


def sweep(**sections: Any) -> SweepConfig:
    """A sweep of digits, with other sections."""
    return SweepConfig.model_validate(
        {"version": 1, "name": "mine", "data": {"name": "digits"}, "supernet": {"model": "ds_tiny"}, **sections}
    )


@pytest.mark.parametrize(("data", "takes_photos"), [("image_folder", True), ("cifar10", True), ("digits", False)])
def test_the_end_of_a_launch_names_commands_that_can_be_pasted(
    data: str, takes_photos: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(Path("/my runs"), "mine")
    more = {
        "digits": {},
        "cifar10": {"path": "/photos"},
        "image_folder": {"path": "/photos", "image_size": 64},
    }[data]
    results: Any = SimpleNamespace(run=run, config=sweep(data={"name": data, **more}))
    say_places(results, [run.export_dir / "trial-0004"])
    say_mlflow(results)
    told = capsys.readouterr().out
    assert ("dsnet-orch predict '/my runs/mine/export/trial-0004' PHOTO..." in told) == takes_photos
    assert "dsnet-orch ui '/my runs/mine'" in told
    assert "imports" not in told
    own: Any = SimpleNamespace(run=run, config=sweep(data={"name": data, **more}, supernet={"model": "mine:net"}))
    say_places(own, [run.export_dir / "trial-0004"])
    told = capsys.readouterr().out
    assert "(python, with DSNET_ALLOW_IMPORTS=1: dsnet.load_bundle(" in told
    assert ("PHOTO... --allow-imports" in told) == takes_photos
    for of_run, allows in ((results, False), (own, True)):
        commands = [shlex.split(command) for _, command in bundle_commands(run, of_run.config)]
        assert [command[1] for command in commands] == (["predict", "serve"] if takes_photos else ["serve"])
        assert all(command[2] == str(run.knee_bundle) for command in commands)
        assert all((command[-1] == "--allow-imports") == allows for command in commands)


@pytest.mark.parametrize("width", [60, 80, None])
def test_only_columns_that_are_shown_are_explained(
    finished: Finished, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int | None
) -> None:
    monkeypatch.setattr("orchestration.commands.tables.terminal_width", lambda: width)
    show_front(finished.results, (), as_json=False)
    told = capsys.readouterr().out
    left_out = " ".join(re.findall(r"no room at \d+\s+columns\s+for:([^(]*)", told))
    assert bool(left_out) == (width is not None)
    for explained in ("speed-up", "on front"):
        assert (f"\n{explained}: " in told) == (explained not in left_out)
    assert "an estimate and not a bound" in told


def with_balanced_top1(finished: Finished) -> RunResults:
    """The run as if balanced top-1 were its first objective, with the same front."""
    results, before = RunResults(finished.run), finished.results
    metrics = before.config.metrics
    first = metrics[0].model_copy(update={"name": "balanced_top1"})
    results.__dict__ |= {
        "config": before.config.model_copy(update={"metrics": (first, *metrics[1:])}),
        "front": before.front,
        "verified": before.verified,
    }
    return results


def test_the_front_has_balanced_top1_in_percent_on_both_splits_also_of_the_widest_static(
    finished: Finished, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestration.commands.tables.terminal_width", lambda: None)
    results = with_balanced_top1(finished)
    verified = results.verified
    assert verified is not None
    show_front(results, (), as_json=False)
    told = capsys.readouterr().out.replace("\N{NO-BREAK SPACE}", " ")
    assert "balanced_top1" not in told.split("warning")[0]
    title, *rows = told.splitlines()[1 : 2 + len(verified.test.points) + 1]
    assert "MAdds M test  balanced top-1 % val  balanced top-1 % test" in title
    assert "\nbalanced top-1: mean over the classes" in told
    static = verified.test.static_metrics(results.widest.name)["balanced_top1"]
    pairs = [(results.baseline["balanced_top1"], static)]
    pairs += [
        (results.record(slot).metrics["balanced_top1"], point.metrics["balanced_top1"])
        for slot in sorted(results.front, key=lambda slot: results.record(slot).metrics["madds_m"])
        for point in verified.test.points
        if point.slot == slot
    ]
    ends = [title.index(f"balanced top-1 % {split}") + len(f"balanced top-1 % {split}") for split in ("val", "test")]
    for row, values in zip(rows, pairs, strict=True):
        assert [row[:end].split()[-1] for end in ends] == [f"{100 * value:.1f}" for value in values]
    old = {"verified": replace(verified, test=replace(verified.test, static_added=()))}  # of an earlier release
    results.__dict__ |= old
    show_front(results, (), as_json=False)
    row = capsys.readouterr().out.splitlines()[2]
    assert [row[:end].split()[-1] for end in ends] == [f"{100 * pairs[0][0]:.1f}", "-"]


def test_a_front_that_is_not_verified_names_balanced_top1_as_trials_does(
    finished: Finished, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestration.commands.tables.terminal_width", lambda: None)
    results = with_balanced_top1(finished)
    results.__dict__["verified"] = None
    show_front(results, (), as_json=False)
    title = capsys.readouterr().out.splitlines()[1]
    head = metric_head("balanced_top1").replace("\N{NO-BREAK SPACE}", " ")
    assert title.endswith(head)
    assert head == "balanced top-1 % val"


@pytest.mark.parametrize(
    ("uri", "place", "way"),
    [
        (None, "/my runs/mlflow.db", "open: dsnet-orch ui '/my runs/mine'"),
        ("sqlite:////elsewhere/mlflow.db", "/elsewhere/mlflow.db", "open: dsnet-orch ui '/my runs/mine'"),
        ("https://mlflow.example", "https://mlflow.example", "open it in a browser"),
        ("$https://me:pw@mlflow.example", "https://***@mlflow.example", "open it in a browser"),
    ],
)
def test_the_way_to_mlflow_leads_to_this_run_in_its_own_store(
    uri: str | None, place: str, way: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if uri is not None and uri.startswith("$"):  # by the environment
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri[1:])
        uri = None
    results: Any = SimpleNamespace(
        run=RunDir(Path("/my runs"), "mine"), config=SimpleNamespace(tracking=SimpleNamespace(mlflow=True, uri=uri))
    )
    say_mlflow(results)
    assert capsys.readouterr().out == f"mlflow    {place}   ({way})\n"


def test_the_printed_command_finds_a_run_outside_the_runs_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path / "else where", "mine")
    run.create()
    Manifest(run.manifest_path).create(seed=0, hardware={})
    tracking = SimpleNamespace(mlflow=True, uri="sqlite:////elsewhere/mlflow.db")
    say_mlflow(SimpleNamespace(run=run, config=SimpleNamespace(tracking=tracking)))  # type: ignore[arg-type]
    command = shlex.split(capsys.readouterr().out.rpartition("open: ")[2].strip().removesuffix(")"))
    assert command[:2] == ["dsnet-orch", "ui"]
    assert find_run(command[2], "runs").path == run.path


def test_the_status_of_supernets_shows_how_to_continue_after_the_driver_was_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path, "sweep")
    run.create()
    results: Any = SimpleNamespace(
        run=run,
        entries=(),
        num_trials=0,
        num_failed=0,
        front_gates=(),
        named_gates=(),
        supernets={},
        is_verified=False,
        config=sweep(budget={"trials": 4}),
        manifest={"test_openings": 0},
    )
    atomic_write_json(run.lock_path, asdict(replace(LockHolder.this_process("dsnet-orch launch"), start_time=1)))
    show_supernets_status(results, as_json=False)
    told = capsys.readouterr().out
    assert "which no longer runs" in told
    assert f"continue  dsnet-orch launch {shlex.quote(str(run.sweep_yaml))}" in told
    atomic_write_json(run.lock_path, asdict(LockHolder.this_process("dsnet-orch launch")))
    show_supernets_status(results, as_json=False)
    assert "continue" not in capsys.readouterr().out, "a driver works on it"


@pytest.mark.ray
def test_the_status_shows_how_to_continue_after_the_driver_was_killed(finished: Finished, tmp_path: Path) -> None:
    folder = finished.copy(tmp_path)
    run = results_in(folder).run
    manifest = read_sealed(run.manifest_path)
    del manifest["stages"]["verify"]
    write_sealed(run.manifest_path, manifest)
    killed = replace(LockHolder.this_process("dsnet-orch launch"), start_time=1)
    atomic_write_json(run.lock_path, asdict(killed))
    told = call(folder, "status", "tiny").out
    assert "which no longer runs" in told
    assert f"continue  dsnet-orch launch {shlex.quote(str(run.sweep_yaml))}" in told
    atomic_write_json(run.lock_path, asdict(LockHolder.this_process("dsnet-orch launch")))
    assert "continue  " not in call(folder, "status", "tiny").out, "a driver works on it"


def test_messages_are_wrapped_on_a_terminal_and_whole_in_a_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "error: a message that is longer than the forty columns of this terminal\nand has two lines"
    complain(text)
    assert capsys.readouterr().err == f"{text}\n"
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    monkeypatch.setenv("COLUMNS", "40")
    complain(text)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) <= 40
    assert " ".join(lines) == " ".join(text.split())
