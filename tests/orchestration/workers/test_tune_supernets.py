"""A fixed list of supernets under Ray Tune's schedulers: who is stopped, what is stored, and that a
later launch does the same."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ray.exceptions import OutOfMemoryError
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler

from benchmarks.processes import Command
from dsnet.arithmetic import MKL_MODE, mkl_mode
from dsnet.data.training_images import InMemoryImages
from dsnet.errors import CheckpointError, ConfigError, DsnetError, PreflightError, StoppedError, StorageError
from dsnet.families import rebuild
from dsnet.network.batchnorm import recalibrate
from dsnet.space.cost import subnet_cost
from dsnet.space.spec import NORMS
from dsnet.stored.checkpoint import load_supernet
from dsnet.stored.names import FINAL
from dsnet.training.supernet import recalibration_batches
from orchestration.config.schedulers import check_scheduler
from orchestration.workers import tune_supernets
from orchestration.workers.life import Pulse
from orchestration.workers.schedulers import make_scheduler
from orchestration.workers.supernet import STOP_GRACE_S, SupernetJob, _train_loop, root_cause, train_on_ray
from orchestration.workers.tune_ledger import End, Ledger, MemberFate, Report, TuneRules
from orchestration.workers.tune_schedule import Member, ReplayingScheduler
from orchestration.workers.tune_supernets import (
    MemberWork,
    _train_member,
    _tune_error,
    measurable,
    static_hypervolume,
    stored_fates,
)
from orchestration.workers.workplaces import SharedFolder
from tests.orchestration.workers.tune_sweep import ASHA, EPOCHS, Dies, DiesLater, Sweep


@dataclass(frozen=True)
class Swept:
    """A sweep without interruption."""

    sweep: Sweep
    answer: list[MemberFate]
    home_before: list[str]

    @property
    def reports(self) -> list[tuple[str, int, float]]:
        return self.sweep.reports


def _home() -> list[str]:
    return sorted(str(path) for path in (Path.home() / "ray_results").rglob("*"))


@pytest.fixture(scope="module")
def swept(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    sweep, home = Sweep(tmp_path_factory.mktemp("swept")), _home()
    return Swept(sweep, sweep.launch(), home)


@pytest.mark.ray
def test_a_poor_supernet_is_stopped_and_the_others_are_trained(swept: Swept) -> None:
    assert [(fate.name, fate.state) for fate in swept.answer] == [
        ("first", "trained"),
        ("poor", "stopped"),
        ("third", "trained"),
    ]
    epochs = [[epoch for epoch, _ in fate.reports] for fate in swept.answer]
    assert epochs == [[1, 2, 3], [1], [1, 2, 3]]
    assert "stopped it after epoch 1" in (swept.answer[1].reason or "")
    assert not (swept.sweep.folder / "poor" / f"{FINAL}.json").exists()


@pytest.mark.ray
def test_whoever_listens_hears_everything_once(swept: Swept) -> None:
    assert swept.reports == [(fate.name, *report) for fate in swept.answer for report in fate.reports]
    assert swept.sweep.fates == swept.answer
    assert swept.sweep.curves == {"first", "poor", "third"}


@pytest.mark.ray
def test_the_last_report_is_that_of_the_final_checkpoint(swept: Swept) -> None:
    for fate in (swept.answer[0], swept.answer[2]):
        supernet, _ = load_supernet(swept.sweep.final(fate.name))
        assert fate.reports[-1] == (
            EPOCHS,
            static_hypervolume(supernet, swept.sweep.val, swept.sweep.run.normalization),
        )


@pytest.mark.ray
def test_the_checkpoint_is_the_one_that_training_alone_makes_although_its_worker_is_lost(
    swept: Swept, tmp_path: Path
) -> None:
    job = replace(swept.sweep.members[0].job, folder=tmp_path / "supernet")
    train = swept.sweep.train
    assert isinstance(train, InMemoryImages)
    data = Dies(InMemoryImages(train.images, train.labels, job.run.augmentation), tmp_path / "deaths")
    train_on_ray(job, data, on_points=lambda points: None, should_stop=lambda: False)
    assert data.deaths == 1
    assert json.loads((tmp_path / "supernet" / f"{FINAL}.json").read_text())["sha256"] == swept.sweep.sha256("first")


@pytest.mark.ray
def test_a_worker_that_is_lost_three_times_ends_training_with_the_reason(swept: Swept, tmp_path: Path) -> None:
    job = replace(swept.sweep.members[0].job, folder=tmp_path / "supernet")
    data = Dies(swept.sweep.train, tmp_path / "deaths", times=9)
    with pytest.raises(DsnetError, match=r"the training worker failed: .*died"):
        train_on_ray(job, data, on_points=lambda points: None, should_stop=lambda: False)
    assert data.deaths == 3


@pytest.mark.ray
def test_a_worker_that_is_lost_after_the_launch_has_ended_is_not_started_again(
    swept: Swept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestration.workers.supernet.STOP_GRACE_S", 0.1)
    job = replace(swept.sweep.members[0].job, folder=tmp_path / "supernet", stop_file=tmp_path / "stop")
    data = DiesLater(swept.sweep.train, tmp_path / "deaths", times=9)
    with pytest.raises(StoppedError):
        train_on_ray(job, data, on_points=lambda points: None, should_stop=lambda: data.deaths == 1)
    (training,) = (thread for thread in threading.enumerate() if thread.name == "ray-side-train")
    job.stop_file.unlink()
    (tmp_path / "may-die").touch()
    training.join(30.0)
    assert not training.is_alive()
    assert data.deaths == 1


@pytest.mark.ray
def test_tune_leaves_nothing_but_the_ledger(swept: Swept) -> None:
    assert [path.name for path in (swept.sweep.folder / "tune").rglob("*") if path.is_file()] == ["reports.jsonl"]
    assert _home() == swept.home_before


@pytest.mark.ray
def test_a_second_launch_finds_everything_and_trains_nothing(swept: Swept) -> None:
    again = Sweep(swept.sweep.folder)
    changed = {path: path.stat().st_mtime_ns for path in again.folder.rglob("*")}
    assert again.launch() == swept.answer
    assert (again.reports, again.fates) == ([], [])
    assert {path: path.stat().st_mtime_ns for path in again.folder.rglob("*")} == changed
    assert stored_fates(again.members, ASHA, again.folder / "tune") == {fate.name: fate for fate in swept.answer}


KILLED = """
import os, signal, sys
from pathlib import Path
from orchestration.workers.runtime import RaySettings, ray_session
from tests.orchestration.workers.tune_sweep import Sweep

sweep = Sweep(Path(sys.argv[1]))
with ray_session(RaySettings(num_cpus=2, object_store_mib=100)):
    sweep.launch(should_stop=lambda: len(sweep.reports) >= 2 and os.kill(os.getpid(), signal.SIGKILL))
"""


@pytest.mark.long
@pytest.mark.ray
def test_a_sweep_that_is_killed_and_stopped_goes_on_as_if_it_had_not_been(swept: Swept, tmp_path: Path) -> None:
    command = Command(Path.cwd(), tmp_path, program=(sys.executable, "-c", KILLED))
    try:
        answer = command.wait()
        assert answer.code == -signal.SIGKILL, answer.err
    finally:
        command.end()
    stopped = Sweep(tmp_path)
    ledger = Ledger.of(tmp_path / "tune", ASHA)
    before = [(member.name, *report) for member in stopped.members for report in ledger.reports(member.key)]
    assert before == swept.reports[: len(before)]
    assert len(before) >= 2
    asked: list[float] = []

    def should_stop() -> bool:
        if len(before) + len(stopped.reports) >= 5:
            asked.append(time.monotonic())
        return bool(asked)

    with pytest.raises(StoppedError, match="kept"):
        stopped.launch(should_stop=should_stop)
    assert time.monotonic() - asked[0] < STOP_GRACE_S + 1
    resumed = Sweep(tmp_path)
    assert resumed.launch() == swept.answer
    assert resumed.reports
    assert before + stopped.reports + resumed.reports == swept.reports
    assert resumed.sha256("third") == swept.sweep.sha256("third")


@pytest.mark.ray
def test_a_lost_worker_is_replaced_and_a_failing_supernet_fails_alone(ray_cluster: None, tmp_path: Path) -> None:
    rules = TuneRules(scheduler="none", concurrent=2, report_every=2)
    sweep = Sweep(tmp_path, {"good": 0.1, "diverges": 9e5})
    sweep.train = dies = Dies(sweep.train, tmp_path / "deaths")
    good, diverges = sweep.launch(rules)
    assert dies.deaths == 1
    assert (good.state, [epoch for epoch, _ in good.reports]) == ("trained", [2, EPOCHS])
    assert diverges.state == "failed"
    assert "lower supernet.train.lr" in (diverges.reason or "")
    again = Sweep(tmp_path, {"good": 0.1, "diverges": 9e5})
    assert again.launch(rules) == [good, diverges]
    assert again.fates == []


class PausesAll(FIFOScheduler):
    """Pauses everybody after the first report; when all have made theirs, the worst ends and the
    others go on."""

    def __init__(self) -> None:
        super().__init__()
        self._first: dict[Trial, float] = {}
        self._num_trials = 0

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        self._num_trials += 1

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if trial in self._first:
            return str(self.CONTINUE)
        self._first[trial] = result[self._metric]
        if not self._has_all:
            return str(self.PAUSE)
        worst = min(self._first, key=lambda known: self._first[known])
        if worst is trial:
            return str(self.STOP)
        tune_controller.stop_trial(worst)
        return str(self.CONTINUE)

    @property
    def _has_all(self) -> bool:
        return len(self._first) == self._num_trials

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        wanted = (Trial.PENDING, Trial.PAUSED) if self._has_all else (Trial.PENDING,)
        return next((trial for trial in tune_controller.get_trials() if trial.status in wanted), None)


PAUSES_ALL = f"{__name__}.PausesAll"


@pytest.mark.ray
@pytest.mark.long  # without processes: the cases `own` below
def test_a_scheduler_that_pauses_trains_the_survivors_to_the_end(ray_cluster: None, tmp_path: Path) -> None:
    rates = {"poor": 1e-6, "first": 0.1, "third": 0.07}
    sweep, rules = Sweep(tmp_path, rates), TuneRules(scheduler=PAUSES_ALL)
    with pytest.raises(StoppedError):
        sweep.launch(rules, should_stop=lambda: len(sweep.reports) >= 4)
    resumed = Sweep(tmp_path, rates)
    assert [fate.state for fate in resumed.launch(rules)] == ["stopped", "trained", "trained"]
    assert [report[:2] for report in sweep.reports + resumed.reports] == [
        ("poor", 1),
        ("first", 1),
        *[("third", epoch) for epoch in (1, 2, 3)],
        *[("first", epoch) for epoch in (2, 3)],
    ]


class SmallTune:
    """Tune's side of the list, without processes: trials report as soon as they may, in an order
    drawn by `rng`."""

    def __init__(self, ledger: Ledger, rules: TuneRules, curves: Mapping[str, list[float]], seed: int) -> None:
        self.ledger = ledger
        self.curves = curves
        self.rng = np.random.default_rng(seed)
        self.is_killed = False
        keys = {name: f"key-of-{name}" for name in curves}
        members = [
            Member(name, keys[name], len(curve), is_pending=ledger.end(keys[name]) is None)
            for name, curve in curves.items()
        ]
        self.inner = make_scheduler(rules, max(map(len, curves.values())))
        self.scheduler = ReplayingScheduler(
            self.inner,
            members,
            ledger,
            rules,
            is_stopping=lambda: False,
            outcome_of=lambda name: None,
            hear=lambda name, event: None,
        )
        self.trials = [Trial("none", config={"member": name}, trial_id=name, stub=True) for name in curves]
        self.started: list[Trial] = []
        self.scheduler.adopt(self.trials)

    def run(self, reports: int | None = None) -> None:
        """All of it, or until so many reports were made in this launch."""
        made = 0
        while made != reports and self._make_room():
            running = [trial for trial in self.started if trial.status == Trial.RUNNING]
            self._report(running[self.rng.integers(len(running))])
            made += 1

    def _make_room(self) -> bool:
        """Start whatever may start; whether anything runs."""
        while (trial := self.scheduler.next_waiting()) is not None:
            self.started.append(trial)
            self._start_pending()
        while (chosen := self.scheduler.choose_trial_to_run(self)) is not None:
            chosen.set_status(Trial.RUNNING)
        self._start_pending()
        return any(trial.status == Trial.RUNNING for trial in self.started)

    def _start_pending(self) -> None:
        for trial in self.started:
            if trial.status == Trial.PENDING:
                trial.set_status(Trial.RUNNING)

    def _report(self, trial: Trial) -> None:
        name = trial.config["member"]
        epoch = len(self.ledger.reports(f"key-of-{name}")) + 1
        result = {"epoch": epoch, "static_hypervolume": self.curves[name][epoch - 1]}
        decision = self.scheduler.on_trial_result(self, trial, result)
        if decision == "STOP":
            self.stop_trial(trial)
        elif decision == "PAUSE":
            trial.set_status(Trial.PAUSED)

    def get_trials(self) -> list[Trial]:
        return self.started

    def get_live_trials(self) -> set[Trial]:
        return {trial for trial in self.started if not trial.is_finished()}

    def stop_trial(self, trial: Trial) -> None:
        if trial.status == Trial.RUNNING:
            self.scheduler.on_trial_complete(self, trial, {})
        else:
            self.scheduler.on_trial_remove(self, trial)
        trial.set_status(Trial.TERMINATED)


def _curves(seed: int, members: int = 9, epochs: int = 9) -> dict[str, list[float]]:
    rng = np.random.default_rng(seed)
    return {f"m{number}": np.sort(rng.random(epochs)).tolist() for number in range(members)}


def _lines(ledger: Ledger) -> list[str]:
    return ledger.path.read_text(encoding="utf-8").splitlines()


RULES = {
    "none": TuneRules("none"),
    "asha": TuneRules("asha", {"reduction_factor": 2}),
    "asha_brackets": TuneRules("asha", {"brackets": 3, "grace_period": 1}),
    "median": TuneRules("median"),
    "median_pausing": TuneRules("median", {"hard_stop": False}),
    "hyperband": TuneRules("hyperband"),
    "own": TuneRules(PAUSES_ALL),
}


@pytest.mark.slow
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_a_sweep_killed_anywhere_ends_as_an_uninterrupted_one(rules: TuneRules, tmp_path: Path) -> None:
    curves = _curves(1)
    whole = Ledger(tmp_path / "whole.jsonl")
    SmallTune(whole, rules, curves, seed=0).run()
    num_reports = sum(isinstance(event, Report) for event in whole.events())
    assert all(whole.end(f"key-of-{name}") is not None for name in curves)
    for kill in range(1, num_reports, 5):
        path = tmp_path / f"{kill}.jsonl"
        SmallTune(Ledger(path), rules, curves, seed=0).run(kill)
        SmallTune(Ledger(path), rules, curves, seed=0).run()
        assert _lines(Ledger(path)) == _lines(whole)


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_what_is_stored_holds_also_where_the_order_of_arrival_is_chance(rules: TuneRules, tmp_path: Path) -> None:
    rules, curves, path = replace(rules, concurrent=3), _curves(2), tmp_path / "reports.jsonl"
    for launch, reports in enumerate((7, 9, None)):
        before = list(Ledger(path).events())
        SmallTune(Ledger(path), rules, curves, seed=launch).run(reports)
        events = list(Ledger(path).events())
        assert events[: len(before)] == before
        told = [(event.key, event.epoch) for event in events if isinstance(event, Report)]
        ended = [event.key for event in events if isinstance(event, End)]
        assert len(set(told)) == len(told)
        assert len(set(ended)) == len(ended)
        for end in (event for event in before if isinstance(event, End)):
            assert Ledger(path).reports(end.key) == tuple(
                (event.epoch, event.value) for event in before if isinstance(event, Report) and event.key == end.key
            )
    assert set(ended) == {f"key-of-{name}" for name in curves}


def test_the_replayed_scheduler_stands_where_it_stood(tmp_path: Path) -> None:
    rules = TuneRules("asha", {"brackets": 2, "grace_period": 1}, concurrent=3)
    path = tmp_path / "reports.jsonl"
    live = SmallTune(Ledger(path), rules, _curves(3), seed=5)
    live.run(20)
    replayed = SmallTune(Ledger(path), rules, _curves(3), seed=6)

    def rungs(small: SmallTune) -> list[Any]:
        return [bracket._rungs for bracket in small.inner._brackets]

    assert rungs(replayed) == rungs(live)
    assert any(recorded for bracket in rungs(live) for _, recorded in bracket)


def test_a_poor_curve_is_stopped_and_a_good_one_never(tmp_path: Path) -> None:
    curves = {f"m{number}": [0.1 * (9 - number) + 0.001 * epoch for epoch in range(9)] for number in range(9)}
    for name in ("asha", "median"):
        ledger = Ledger(tmp_path / f"{name}.jsonl")
        SmallTune(ledger, RULES[name], curves, seed=0).run()
        states = {curve: ledger.end(f"key-of-{curve}").state for curve in curves}  # type: ignore[union-attr] # all ended
        assert states["m0"] == "trained"
        assert states["m8"] == "stopped"


def test_the_global_generator_of_numpy_is_left_alone(tmp_path: Path) -> None:
    np.random.seed(1)
    before = np.random.get_state()[1].tolist()
    SmallTune(Ledger(tmp_path / "reports.jsonl"), RULES["asha"], _curves(1), seed=0)
    assert np.random.get_state()[1].tolist() == before


def test_a_torn_last_line_is_cut_off_and_an_edited_one_refused(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "reports.jsonl")
    ledger.append(Report("a", 1, 0.1 + 0.2, "CONTINUE"))
    with open(ledger.path, "ab") as file:
        file.write(b'{"event": "report", "key": "a", "epo')
    torn = Ledger(ledger.path)
    assert torn.reports("a") == ((1, 0.1 + 0.2),)
    torn.append(End("a", "failed", "lost", is_lasting=False))
    assert list(Ledger(ledger.path).events()) == [
        Report("a", 1, 0.1 + 0.2, "CONTINUE"),
        End("a", "failed", "lost", False),
    ]
    assert Ledger(ledger.path).end("a") is None
    ledger.path.write_text('{"event": "report", "key": "a"}\n')
    with pytest.raises(CheckpointError, match="line 1"):
        Ledger(ledger.path)


@pytest.mark.parametrize("norm", NORMS)
def test_static_hypervolume_is_the_area_under_the_stairs(norm: str, tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, norm=norm)
    torch.manual_seed(0)
    supernet = rebuild(sweep.subnets)
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    supernet.train()
    measured = measurable(supernet, sweep.run, sweep.train)
    value = static_hypervolume(measured, sweep.val, sweep.run.normalization)
    assert supernet.training
    assert all(torch.equal(before[name], now) for name, now in supernet.state_dict().items())

    if norm == "recalibrate":  # fewer than 512 images: all of them, in an order that sums to the same bits
        recalibrate(supernet, recalibration_batches(sweep.train, sweep.run, torch.device("cpu")))
    supernet.eval()
    points = []
    for subnet in sweep.subnets:
        with torch.no_grad():
            logits = supernet(sweep.run.normalization.apply(sweep.val.images), subnet)
        top1 = float((logits.argmax(1) == sweep.val.labels).double().mean())
        points.append((subnet_cost(sweep.subnets.spec, subnet, 8).madds, top1))
    worst = 1.05 * max(cost for cost, _ in points)
    # The best accuracy that is to be had at each price, averaged over all prices up to the
    # reference.
    costs = [*sorted(cost for cost, _ in points), worst]
    stairs = [(end - start) * max(t for c, t in points if c <= start) for start, end in pairwise(costs)]
    assert value == pytest.approx(sum(stairs) / worst, rel=1e-9)
    assert 0 < value < 1


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("ahsa", {}, ("did you mean 'asha'",)),
        ("asha", {"grace_perod": 2}, ("supernets.options.grace_perod", "did you mean 'grace_period'")),
        ("asha", {"grace_period": 0}, ("supernets.options.grace_period", "0")),
        ("asha", {"reduction_factor": 1}, ("supernets.options.reduction_factor", "1")),
        ("asha", {"max_t": 5}, ("supernets.options.max_t", "set by the sweep")),
        ("none", {"grace_period": 1}, ("supernets.options.grace_period", "none")),
        ("median", {"hard_stop": 1}, ("supernets.options.hard_stop", "true or false")),
        ("ray.tune.schedulers.PopulationBasedTraining", {}, ("changes the settings of running trials",)),
        ("ray.tune.schedulers.pb2.PB2", {}, ("changes the settings of running trials",)),
        ("ray.tune.schedulers.HyperBandForBOHB", {}, ("hyperband",)),
        ("ray.tune.schedulers.Nothing", {}, ("cannot be imported",)),
        ("json.JSONDecoder", {}, ("not a Ray Tune scheduler",)),
        ("ray.tune.schedulers.MedianStoppingRule", {"grace": 1}, ("supernets.options.grace",)),
        ("ray.tune.schedulers.AsyncHyperBandScheduler", {"reduction_factor": 0.5}, ("reduction_factor=0.5",)),
    ],
)
def test_a_scheduler_that_cannot_be_made_is_refused_with_the_way_out(
    name: str, options: dict[str, Any], parts: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as refused:
        check_scheduler(name, options)
    assert all(part in str(refused.value) for part in parts), refused.value


@pytest.mark.parametrize("name", ["none", "asha", "median", "hyperband", "ray.tune.schedulers.ASHAScheduler"])
@pytest.mark.parametrize("epochs", [1, 2, 9, 30])
def test_every_known_scheduler_can_be_made_for_every_length(name: str, epochs: int) -> None:
    check_scheduler(name, {})
    assert make_scheduler(TuneRules(name), epochs).metric == "static_hypervolume"


def test_known_schedulers_are_checked_without_ray() -> None:
    code = (
        "import sys; from orchestration.config.schedulers import check_scheduler; "
        "check_scheduler('asha', {'grace_period': 2}); sys.exit('ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_grace_beyond_the_training_is_refused() -> None:
    with pytest.raises(ConfigError, match="grace_period=5"):
        make_scheduler(TuneRules("asha", {"grace_period": 5}), 4)


def test_other_rules_have_a_ledger_of_their_own_and_the_number_at_a_time_has_not(tmp_path: Path) -> None:
    path = Ledger.of(tmp_path, ASHA).path
    assert Ledger.of(tmp_path, replace(ASHA, concurrent=4)).path == path
    for other in ({"scheduler": "none"}, {"options": {}}, {"report_every": 2}, {"seed": 1}):
        assert Ledger.of(tmp_path, replace(ASHA, **other)).path != path


@pytest.mark.ray
def test_more_at_a_time_than_the_cluster_can_hold_are_refused(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match=r"supernets\.concurrent"):
        Sweep(tmp_path).launch(TuneRules(concurrent=3))


@pytest.mark.skipif(mkl_mode() is None, reason="MKL does not run on this processor")
def test_training_workers_choose_mkls_mode_before_they_do_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outcome.json").touch()  # an attempt that failed: both return at once
    job: Any = SimpleNamespace(threads=1, workers=1)
    place = SharedFolder(tmp_path, tmp_path / "stop")
    for train in (
        lambda: _train_loop({"job": job, "place": place}),
        lambda: _train_member({"member": "m"}, {"m": MemberWork(job, "k", place, None, tmp_path)}, {}, 1, {}),
    ):
        monkeypatch.delenv(MKL_MODE, raising=False)
        train()
        assert os.environ[MKL_MODE] == mkl_mode()


def test_a_full_disk_is_no_outcome_of_the_training_that_met_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "epoch-00001.safetensors"))

    monkeypatch.setattr("orchestration.workers.tune_supernets._train_and_report", full)
    job: Any = SimpleNamespace(threads=1)
    work = MemberWork(job, "key", SharedFolder(tmp_path, tmp_path / "stop"), None, tmp_path / "reports.jsonl")
    with pytest.raises(StorageError, match="epoch-00001"):
        _train_member({"member": "m"}, {"m": work}, {}, 1, {"m": Pulse.new()})
    assert list(tmp_path.iterdir()) == []
    lost = RuntimeError("Tune")
    lost.__cause__ = StorageError("the disk is full")
    assert type(_tune_error(lost)) is StorageError
    assert type(_tune_error(RuntimeError("of Tune"))) is DsnetError


def test_a_machine_without_memory_is_told_from_a_gpu_without_memory() -> None:
    outer = RuntimeError("a worker failed")
    outer.__cause__ = OutOfMemoryError("page\nafter page\nof documentation")
    assert "the machine ran out of memory" in root_cause(outer)
    assert "documentation" not in root_cause(outer)
    assert root_cause(torch.OutOfMemoryError("CUDA out of memory")) == "OutOfMemoryError: CUDA out of memory"


@pytest.mark.ray
def test_an_error_before_tune_begins_is_told(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(job: SupernetJob) -> None:
        raise CheckpointError(f"the start weights of {job.folder.name} are damaged")

    monkeypatch.setattr(tune_supernets, "send_start", refuse)
    with pytest.raises(CheckpointError, match="the start weights of first are damaged"):
        Sweep(tmp_path).launch()
