"""Regimes side by side: the statistics against scipy, claims and resume with a fake run, and a
small real one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks import supernet_accuracy
from benchmarks.regime_report import (
    Results,
    error_ratio,
    make_report,
    make_sections,
    regimes_info,
    t_interval,
    t_quantile,
)
from benchmarks.regime_runs import (
    ARMS,
    SCALES,
    WORK,
    Job,
    Material,
    Trainer,
    begin,
    claimed,
    do_jobs,
    jobs,
    load_material,
    passes_of,
    record_path,
    run_settings,
)
from dsnet.errors import ConfigError, NonFiniteLossError, PreflightError
from dsnet.families import create
from dsnet.stored.checkpoint import load_checkpoint
from dsnet.training.supernet import train_supernet

TINY = replace(SCALES["quick"], num_train=96, train=replace(SCALES["quick"].train, epochs=2, batch_size=32))
WIDTHS = ("subnet-00", "subnet-01", "largest")


@pytest.fixture(scope="module")
def material() -> Material:
    return load_material(TINY, None)


@pytest.fixture
def threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def record(regime: str, seed: int, top1: tuple[float, ...]) -> dict[str, Any]:
    rows = [
        {
            "name": name,
            "is_member": name != "largest",
            "madds": 1000 * (k + 1),
            "params": 10,
            "top1": value,
            "top5": 1.0,
        }
        for k, (name, value) in enumerate(zip(WIDTHS, top1, strict=True))
    ]
    return {
        "regime": regime,
        "seed": seed,
        "norm": "private_stats",
        "passes": {"trained": 4, "taught": 1},
        "device": "cpu",
        "threads": 1,
        "subnets": rows[::-1],
        "num_test_images": 100,
        "steps": 50,
        "seconds_per_step": 0.01 * (seed + 1),
    }


def made_up(num_seeds: int = 4) -> Results:
    """Results in which seeds differ by far more than regimes."""
    rng = np.random.default_rng(3)
    records = []
    for seed in range(num_seeds):
        of_seed = rng.uniform(0.3, 0.7, 3)
        for shift, regime in enumerate(("ib", "ce", "inplace")):
            top1 = of_seed + 0.01 * shift + rng.normal(0, 0.002, 3)
            records.append(record(regime, seed, tuple(top1.tolist())))
    return Results.from_records(TINY.to_json(), records)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 10, 31, 100])
@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
def test_t_quantiles_equal_scipy(level: float, degrees: int) -> None:
    assert t_quantile(level, degrees) == pytest.approx(stats.t.ppf(0.5 + level / 2, degrees), rel=1e-10)


def test_an_interval_equals_scipy() -> None:
    values = [0.61, 0.55, 0.58, 0.70]
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    found = t_interval(values)
    assert found.half is not None
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))


def test_one_seed_has_a_mean_and_no_interval() -> None:
    found = t_interval([0.4])
    assert (found.mean, found.half, found.num_seeds) == (0.4, None, 1)
    assert not found.excludes_zero
    with pytest.raises(ValueError, match="at least one"):
        t_interval([])


def test_differences_are_paired_by_seed_as_scipys_paired_test_does() -> None:
    results = made_up()
    found = results.difference("ib", "ce")[0]
    ours, theirs = ([rows[seed][0] for seed in range(4)] for rows in (results.top1("ib"), results.top1("ce")))
    test = stats.ttest_rel(ours, theirs)
    low, high = test.confidence_interval(0.95)
    assert found.half is not None
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert found.excludes_zero == (test.pvalue < 0.05)
    unpaired = results.accuracy("ib")[0].half
    assert unpaired is not None
    assert found.half < unpaired / 5


def test_only_seeds_of_both_are_compared() -> None:
    records = [record("ce", seed, (0.1, 0.2, 0.3)) for seed in (0, 1, 2)]
    records += [record("ib", seed, (0.2, 0.3, 0.4)) for seed in (2, 5)]
    results = Results.from_records(TINY.to_json(), records)
    found = results.difference("ib", "ce")
    assert [part.num_seeds for part in found] == [1] * 4
    assert found[0].mean == pytest.approx(0.1)
    alone = Results.from_records(TINY.to_json(), [record("ce", 0, (0.1, 0.2, 0.3)), record("ib", 1, (0.2, 0.3, 0.4))])
    assert alone.comparisons() == {"ce": {}}
    assert len(make_sections(alone)) == 2


def test_widths_lie_by_rising_cost_and_the_mean_leaves_out_a_largest_that_only_teaches() -> None:
    results = Results.from_records(TINY.to_json(), [record("ce", 0, (0.1, 0.3, 0.9))])
    assert results.widths == WIDTHS
    assert results.top1("ce")[0] == pytest.approx([0.1, 0.3, 0.9, 0.2])


def test_the_headline_is_the_ratio_of_errors_of_the_same_seed() -> None:
    records = [record("inplace", seed, (0.5, 0.5, 0.0)) for seed in (0, 1)]
    records += [record("ib", 0, (0.6, 0.6, 0.0)), record("ib", 1, (0.55, 0.55, 0.0))]
    results = Results.from_records(TINY.to_json(), records)
    assert error_ratio(results).mean == pytest.approx((0.8 + 0.9) / 2)
    headline = make_report(results).headline.estimate
    assert headline.low < headline.value < headline.high


def test_tables_and_figure_say_the_same_numbers() -> None:
    results = made_up()
    sections = make_sections(results)
    assert sections[0].columns == ("", "ce", "inplace", "ib")
    info = regimes_info(results)
    accuracy = results.accuracy("ib")
    assert sections[0].rows[1][3] == f"{100 * accuracy[1].mean:.1f} ±{100 * (accuracy[1].half or 0):.1f}"
    assert info.accuracy[2].means == tuple(part.mean for part in accuracy[:3])
    assert [group.baseline for group in info.differences] == ["ce", "inplace"]
    num_stars = sum(cell.endswith("*") for row in sections[1].rows for cell in row[1:])
    assert f": {num_stars} of 8" in sections[1].title


def test_times_are_medians_over_runs_relative_to_ce() -> None:
    cost = make_sections(made_up(num_seeds=3))[-1]
    assert [row[5:8] for row in cost.rows] == [("20.0", "1.00", "1")] * 3


def test_failed_runs_are_listed_and_count_nowhere() -> None:
    records = [record("ce", 0, (0.1, 0.2, 0.3)), {"regime": "ib", "seed": 0, "error": "the loss is NaN at step 7"}]
    results = Results.from_records(TINY.to_json(), records)
    assert results.regimes == ("ce",)
    assert make_sections(results)[-1].rows == [("ib", "0", "the loss is NaN at step 7")]
    with pytest.raises(PreflightError, match="none of 1 run has been trained"):
        Results.from_records(TINY.to_json(), records[1:])


class FakeRun:
    """A run of three steps, counted in the run's folder; stops after `budget` steps in all."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.seen: list[str] = []

    def __call__(self, job: Job, folder: Path, should_stop: Callable[[], bool]) -> dict[str, Any] | None:
        self.seen.append(job.name)
        folder.mkdir(parents=True, exist_ok=True)
        counter = folder / "steps"
        for step in range(int(counter.read_text()) if counter.exists() else 0, 3):
            if self.is_spent():
                return None
            self.budget -= 1
            counter.write_text(str(step + 1))
        return {"regime": job.arm, "seed": job.seed, "subnets": [{"top1": 0.5}]}

    def is_spent(self) -> bool:
        return self.budget <= 0


def test_a_cut_call_continues_where_it_stood_and_repeats_nothing(tmp_path: Path, material: Material) -> None:
    begin(tmp_path, TINY, material)
    todo = jobs(["ce", "ib"], [0, 1])
    assert [job.name for job in todo] == ["ce-seed0", "ib-seed0", "ce-seed1", "ib-seed1"]
    heard: list[str] = []
    first = FakeRun(budget=4)
    assert do_jobs(tmp_path, todo, first, first.is_spent, heard.append) == todo[1:]
    second = FakeRun(budget=8)
    assert do_jobs(tmp_path, todo, second, second.is_spent, heard.append) == []
    assert (first.seen, second.seen) == (["ce-seed0", "ib-seed0"], ["ib-seed0", "ce-seed1", "ib-seed1"])
    assert second.budget == 0
    assert len(heard) == 4
    assert heard[-1].endswith("4 of 4 runs are done")
    assert [path.suffix for path in (tmp_path / WORK).iterdir()] == [".lock"] * 4


def test_a_run_that_another_process_holds_is_left_to_it(tmp_path: Path, material: Material) -> None:
    begin(tmp_path, TINY, material)
    todo = jobs(["ce", "ib"], [0])
    with claimed(tmp_path / WORK / "ce-seed0.lock") as is_mine:
        assert is_mine
        run = FakeRun(budget=100)
        assert do_jobs(tmp_path, todo, run, say=lambda _: None) == todo[:1]
        assert run.seen == ["ib-seed0"]
    assert do_jobs(tmp_path, todo, run, say=lambda _: None) == []


def test_a_killed_process_lets_go_of_its_run(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    code = "import fcntl,sys,time; f=open(sys.argv[1],'w'); fcntl.flock(f,fcntl.LOCK_EX); print(1,flush=True); time.sleep(99)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    with holder.stdout:
        holder.stdout.readline()
        with claimed(path) as is_mine:
            assert not is_mine
        holder.kill()
        holder.wait()
    with claimed(path) as is_mine:
        assert is_mine


def test_a_folder_takes_runs_of_one_plan_only(tmp_path: Path, material: Material) -> None:
    begin(tmp_path, TINY, material)
    begin(tmp_path, TINY, material)
    with pytest.raises(ConfigError, match="made with another train, images"):
        begin(tmp_path, replace(TINY, train=SCALES["gpu"].train), replace(material, split_hash="other"))


def train_and_test(trainer: Trainer, folder: Path, job: Job, stop_after: int | None = None) -> Any:
    calls = 0

    def should_stop() -> bool:
        nonlocal calls
        calls += 1
        return stop_after is not None and calls > stop_after

    return trainer(job, folder, should_stop)


@pytest.mark.slow
def test_a_stopped_real_run_ends_with_the_same_accuracies(tmp_path: Path, material: Material) -> None:
    trainer = Trainer(TINY, material, torch.device("cpu"))
    job = Job("ieb", 1)
    whole = train_and_test(trainer, tmp_path / "whole", job)
    assert train_and_test(trainer, tmp_path / "cut", job, stop_after=4) is None
    cut = train_and_test(trainer, tmp_path / "cut", job)
    assert whole["subnets"] == cut["subnets"]
    assert [row["name"] for row in whole["subnets"]][-1] == "largest"
    assert (whole["steps"], whole["num_test_images"]) == (6, material.data.num_images("test"))
    assert whole["seconds_per_step"] > 0
    json.dumps(whole)


@pytest.mark.slow
def test_us_net_and_inplace_distillation_are_one_regime_once_recalibrated(tmp_path: Path, material: Material) -> None:
    trainer = Trainer(TINY, material, torch.device("cpu"))
    us_net, inplace, ib = (train_and_test(trainer, tmp_path / arm, Job(arm, 0)) for arm in ("us_net", "inplace", "ib"))
    weights = [
        {key: value for key, value in stored_tensors(tmp_path / arm).items() if "running" not in key}
        for arm in ("us_net", "inplace", "ib")
    ]
    assert us_net["subnets"] == inplace["subnets"]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not all(torch.equal(weights[1][key], weights[2][key]) for key in weights[1])
    assert ib["regime"] == "ib"


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "final")[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ARMS)
def test_passes_are_those_that_a_step_runs(name: str, tmp_path: Path, material: Material) -> None:
    arm = ARMS[name]
    supernet = create(TINY.family, material.task, TINY.options, norm=arm.regime.norm)
    counted: Counter[bool] = Counter()
    classifier = supernet.get_submodule("classifier")
    classifier.register_forward_hook(lambda *_: counted.update([torch.is_grad_enabled()]))
    settings = run_settings(arm, 0, replace(TINY, recalibration_images=0), material)
    train_supernet(supernet, material.training, settings, folder=tmp_path)
    expected = passes_of(arm.regime, supernet.subnets)
    assert (counted[True] / 6, counted[False] / 6) == (expected.trained, expected.taught)


def test_a_diverged_run_is_a_finding(tmp_path: Path, material: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(*_: object, **__: object) -> None:
        raise NonFiniteLossError("the loss of largest is nan at step 3")

    monkeypatch.setattr("benchmarks.regime_runs.train_supernet", diverge)
    begin(tmp_path, TINY, material)
    todo = jobs(["ce"], [0])
    heard: list[str] = []
    assert do_jobs(tmp_path, todo, Trainer(TINY, material, torch.device("cpu")), say=heard.append) == []
    found = json.loads(record_path(tmp_path, todo[0]).read_text())
    assert found["error"] == "the loss of largest is nan at step 3"
    assert heard == ["ce-seed0: failed: the loss of largest is nan at step 3; 1 of 1 runs are done"]


@pytest.mark.slow
@pytest.mark.usefixtures("threads_restored")
def test_the_commands_stop_continue_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs"
    small = [
        "--scale",
        "quick",
        "--epochs",
        "1",
        "--train-images",
        "96",
        "--regimes",
        "inplace",
        "ib",
        "--seeds",
        "0",
        "1",
    ]
    command = ["train", "--folder", str(folder), *small]
    assert supernet_accuracy.main(["report", "--folder", str(folder)]) == 3
    assert "has no runs; run `train` first" in capsys.readouterr().err
    assert supernet_accuracy.main([*command, "--max-seconds", "0"]) == 6
    assert "0 of 4 runs are done; left: inplace-seed0, ib-seed0" in capsys.readouterr().err
    assert supernet_accuracy.main(["report", "--folder", str(folder)]) == 3
    assert supernet_accuracy.main(command) == 0
    assert capsys.readouterr().out.endswith("all 4 runs are done\n")
    assert supernet_accuracy.main(command) == 0
    assert supernet_accuracy.main(["report", "--folder", str(folder)]) == 0
    assert "| subnet-00 (" in capsys.readouterr().out
    numbers = json.loads((folder / "report.json").read_text())
    assert len(numbers["runs"]) == 4
    assert numbers["differences"]["inplace"]["ib"][-1]["num_seeds"] == 2
    assert (folder / "report.md").read_text().count("\n|") > 10
    assert "Training regimes at equal steps" in (folder / "figure.html").read_text()


def test_a_missing_gpu_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert supernet_accuracy.main(["train", "--folder", str(tmp_path), "--scale", "quick", "--device", "cuda"]) == 2
    assert "--device is cuda, but torch sees no GPU here" in capsys.readouterr().err


@pytest.mark.slow
def test_training_needs_torch_and_dsnet_alone() -> None:
    forbidden = "plotly click rich ray mlflow optuna pandas pydantic scipy sklearn dashboards search orchestration"
    code = f"import sys, benchmarks.supernet_accuracy; print(*sorted(set({forbidden.split()!r}) & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
