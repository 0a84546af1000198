"""The forecast of a launch's costs from a few timed steps, and how `plan` shows it."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest

from dsnet.measure.latency_table import MachineLoad
from dsnet.training import trial_run as trial_run_module
from dsnet.training.trial_run import TrialRun
from orchestration.commands.planning import make_plan
from orchestration.config.loading import load_config
from orchestration.pipeline import forecast as forecast_module
from orchestration.pipeline.forecast import RAY_START_S, forecast, forecast_supernets
from orchestration.prepare.preparation import prepare, stage_definitions
from orchestration.runs.folder import RunDir
from orchestration.runs.stages import plan_stages
from tests.orchestration.samples import SWEEP, TINY, Finished, call, snapshot, write_sweep

TIMED = TrialRun(
    device="cpu",
    threads=2,
    num_steps=8,
    step_s=0.5,
    recalibration_image_s=0.01,
    table_image_s=0.1,
    table_image_bytes=1000.0,
    checkpoint_bytes=5_000_000,
    peak_bytes=400 * 2**20,
)


@pytest.mark.slow
def test_a_launch_is_forecast_from_steps_of_the_real_network(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    before = snapshot(tmp_path)
    plan = call(tmp_path, "plan", SWEEP, "--json").json
    assert snapshot(tmp_path) == before
    found = plan["forecast"]
    assert [stage["stage"] for stage in found["stages"]] == ["supernet", "measure", "table", "search", "verify"]
    assert all(stage["seconds"] > 0 and stage["memory_bytes"] > 2**28 for stage in found["stages"])
    assert all(stage["disk_bytes"] > 0 for stage in found["stages"])
    assert "steps of 40 images, timed on the CPU" in found["timed"]
    assert found["stages"][0]["disk_bytes"] < 2**25  # a network of a few thousand weights
    assert "forecast" in call(tmp_path, "plan", SWEEP).out
    assert call(tmp_path, "plan", SWEEP, "--dry", "--json").json["forecast"] is None


def test_steps_that_other_work_slows_down_do_not_count_if_a_faster_one_was_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = accumulate([0.0, 5.0, 3.0, 3.0, 0.4, 3.0, 3.0, 3.0])  # of which the first step is not timed
    monkeypatch.setattr(trial_run_module, "time", SimpleNamespace(monotonic=lambda: next(times)))
    clock = trial_run_module._StepClock(lambda: None)
    while not clock.should_stop():
        pass
    assert (len(clock.intervals), clock.step_s) == (4, pytest.approx(0.4))


def test_a_training_that_diverges_at_once_is_warned_of(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    answer = call(
        tmp_path, "plan", SWEEP, "--set", "supernet.train.lr=1.0e6", "--set", "supernet.train.warmup_epochs=0"
    )
    assert answer.code == 0, answer.err
    assert "no forecast: the training diverges in its first steps" in answer.err
    assert "it has not run yet" in answer.out


def test_twice_the_epochs_take_twice_the_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(forecast_module, "_timed", lambda prepared: TIMED)
    seconds = []
    for epochs in (10, 20):
        text = TINY.replace("epochs: 8", f"epochs: {epochs}")
        prepared = prepare(load_config(write_sweep(tmp_path, text)).config)
        found = forecast(prepared, plan_stages(RunDir(tmp_path, "t"), stage_definitions(prepared)))
        assert found is not None
        stage = found.of("supernet")
        assert stage is not None
        seconds.append(stage.seconds - RAY_START_S - 200 * TIMED.recalibration_image_s)
        table = found.of("table")
        assert table is not None
        assert (table.seconds, table.disk_bytes) == (pytest.approx(400 * 0.1), 400_000)
    assert seconds[1] == pytest.approx(2 * seconds[0])
    assert seconds[0] == pytest.approx(10 * 5 * TIMED.step_s)


def test_the_passes_that_sort_channels_take_time_in_proportion(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(forecast_module, "_timed", lambda prepared: TIMED)
    seconds = {}
    for order in ("random", "taylor", "noise"):
        structure = f"{{method: uniform, targets: [0.5, 1.0], pin: gate, step: 4, order: {order}}}"
        text = TINY.replace("{num_routes: 3}", f"{{num_routes: 3}}\n  structure: {structure}")
        prepared = prepare(load_config(write_sweep(tmp_path, text)).config)
        found = forecast(prepared, plan_stages(RunDir(tmp_path, "t"), stage_definitions(prepared)))
        assert found is not None
        stage = found.of("structure")
        assert stage is not None
        seconds[order] = stage.seconds
    assert seconds["random"] == 0
    assert 0 < seconds["taylor"] < 8 * TIMED.step_s * 128 / 40  # 8 batches of at most 128, steps of 40
    assert seconds["noise"] == pytest.approx(2 * 48 * seconds["taylor"] / 2)  # 180 images are 2 batches


def test_bases_that_are_trained_two_at_a_time_take_half_as_long(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Three bases of 1 + 0.81 + 0.49 of the work in two places, and trainings between rounds."""
    asked = []

    def timed(prepared: object, concurrent: int = 1) -> TrialRun:
        asked.append(concurrent)
        return TIMED

    monkeypatch.setattr(forecast_module, "_timed", timed)
    found = {}
    for rounds, concurrent in ((1, 1), (1, 2), (2, 1), (2, 2)):
        bases = f"bases: {{widths: [1.0, 0.9, 0.7], rounds: {rounds}}}, concurrent: {concurrent}"
        structure = f"{{method: multi_base, targets: [0.3, 0.5, 0.9], pin: gate, step: 1, epochs: 2, {bases}}}"
        text = TINY.replace("{num_routes: 3}", f"{{num_routes: 3}}\n  structure: {structure}")
        prepared = prepare(load_config(write_sweep(tmp_path, text)).config)
        forecasts = forecast(prepared, plan_stages(RunDir(tmp_path, "t"), stage_definitions(prepared)))
        assert forecasts is not None
        stage = forecasts.of("structure")
        assert stage is not None
        found[rounds, concurrent] = (stage.seconds - RAY_START_S, stage.memory_bytes, stage.disk_bytes)
    assert asked == [1, 1, 2, 1, 1, 2]
    assert 1.5 < found[1, 1][0] / found[1, 2][0] < 2
    assert 1.3 < found[2, 1][0] / found[1, 1][0] < 1.5, "half of the epochs, for smaller networks"
    assert 1.5 < found[2, 1][0] / found[2, 2][0] < 2
    assert found[1, 2][1] - found[1, 1][1] == pytest.approx(TIMED.peak_bytes, rel=0.1)
    assert (found[1, 1][2], found[2, 1][2]) == (4 * TIMED.checkpoint_bytes, 7 * TIMED.checkpoint_bytes)


def test_supernets_that_are_trained_two_at_a_time_take_half_as_long(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(forecast_module, "_timed", lambda prepared, concurrent=1: TIMED)
    prepared = prepare(load_config(write_sweep(tmp_path)).config)
    plans = plan_stages(RunDir(tmp_path, "t"), stage_definitions(prepared))
    one, two, both = (forecast_supernets([(prepared, plans)] * count, at) for count, at in ((1, 2), (4, 1), (4, 2)))
    assert one is not None
    assert two is not None
    assert both is not None

    parts = [found.of("supernet") for found in (one, two, both)]
    seconds = [part.seconds - RAY_START_S for part in parts if part is not None]
    assert seconds == pytest.approx([seconds[0], 4 * seconds[0], 2 * seconds[0]])
    memory = [part.memory_bytes for part in parts if part is not None]
    assert memory[2] - memory[1] == pytest.approx(TIMED.peak_bytes, rel=0.1), "two are in memory, not one"
    assert both.disk_bytes == two.disk_bytes == 4 * one.disk_bytes
    assert forecast_supernets([], 2) is None


def test_a_forecast_says_that_other_work_slowed_the_timed_steps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(forecast_module, "_timed", lambda prepared: TIMED)
    prepared = prepare(load_config(write_sweep(tmp_path)).config)
    plans = plan_stages(RunDir(tmp_path, "t"), stage_definitions(prepared))
    told = []
    for load in (MachineLoad(0.4, 2), MachineLoad(3.0, 2), None):
        monkeypatch.setattr(MachineLoad, "now", lambda load=load: load)
        found = forecast(prepared, plans)
        assert found is not None
        told.append(found.timed)
    assert told[0] == told[2] == "based on 8 steps of 40 images, timed on the CPU with 2 threads"
    assert "load average 3.0 on 2 cores" in told[1]


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_nothing_that_identifies_is_cut_on_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, columns: int
) -> None:
    write_sweep(tmp_path)
    monkeypatch.setattr(forecast_module, "_timed", lambda prepared: TIMED)
    for module in ("tables", "plan_view"):
        monkeypatch.setattr(f"orchestration.commands.{module}.terminal_width", lambda: columns)
    text = call(tmp_path, "plan", SWEEP, "--all").out
    settings = make_plan(load_config(tmp_path / SWEEP), is_dry=True).settings()
    assert all(key in text for key in settings)
    assert "…" not in text
    lines = [line for line in text.splitlines() if str(tmp_path) not in line]
    assert max(map(len, lines)) <= columns


def test_plan_shows_what_somebody_chose_first_and_what_nulls_stand_for(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    brief = call(tmp_path, "plan", SWEEP, "--dry").out
    whole = call(tmp_path, "plan", SWEEP, "--dry", "--all").out
    assert brief.index("supernet.train.epochs") < brief.index("derived from the data") < brief.index("--all shows them")
    assert "sampler.startup" in brief  # written
    assert "supernet.train.momentum" not in brief
    assert "supernet.train.momentum" in whole
    assert "classes   10: 0, 1, 2" in brief
    settings = call(tmp_path, "plan", SWEEP, "--dry", "--json").json["settings"]
    assert settings["supernet.train.teacher"]["effective"] == "ema"
    assert settings["data.splits.val"] == {"value": None, "origin": "default", "effective": 200}
    assert not [line for line in whole.splitlines() if line.split()[1:2] == ["null"]]


@pytest.mark.ray
def test_the_forecast_of_a_run_is_near_what_it_took(finished: Finished) -> None:
    plan = call(finished.folder, "plan", SWEEP, "--name", "afresh", "--json").json
    found = {stage["stage"]: stage for stage in plan["forecast"]["stages"]}
    took = {name: entry["seconds"] for name, entry in finished.results.manifest["stages"].items()}
    assert 1 / 20 < found["supernet"]["seconds"] / took["supernet"] < 20  # other work on the machine moves both
    stored = sum(file.stat().st_size for file in (finished.run.path / "table").rglob("*.safetensors"))
    assert found["table"]["disk_bytes"] == pytest.approx(stored, rel=0.5)
