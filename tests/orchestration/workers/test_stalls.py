"""Silent workers: when one is told and replaced, and that nothing else changes."""

from __future__ import annotations

import functools
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dsnet.data.training_images import InMemoryImages
from dsnet.stored.names import FINAL
from orchestration.workers.life import Listener, Pulse, Sign
from orchestration.workers.runtime import RaySettings, ray_session
from orchestration.workers.stalls import StallLimits, Stalls
from orchestration.workers.supernet import SupernetJob, train_on_ray
from orchestration.workers.training_watch import StallRules, TrainingWatch
from orchestration.workers.trials import Actors, RayRunner, TrialLimits
from orchestration.workers.tune_ledger import TuneRules
from search.study.runner import SerialRunner, TrialOutcome, TrialSpec
from tests.orchestration.workers.scripted import one_by_one
from tests.orchestration.workers.tune_sweep import Stops, Sweep

LIMITS = StallLimits(tell_s=30, least_s=60, factor=5, most_s=600)
ARRAYS = {"ce": np.arange(400, dtype=np.float32).reshape(-1, 4)}


class Clock:
    """A clock that stands still until it is put forward."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Watched:
    """`Stalls` with a clock of its own, and what was told."""

    def __init__(self, limits: StallLimits = LIMITS) -> None:
        self.clock = Clock()
        self.told: list[str] = []
        self.stalls = Stalls(limits, self.told.append, self.clock)

    def after(self, seconds: float) -> list[object]:
        """What is overdue so many seconds later."""
        self.clock.now_s += seconds
        return list(self.stalls.overdue())


def test_silence_is_told_once_and_then_the_work_is_given_to_another_worker() -> None:
    watched = Watched()
    watched.stalls.begin("a", "the worker of trial-0007")
    assert watched.after(29) == []
    assert watched.told == []
    assert watched.after(1) == []
    assert watched.after(20) == []
    (told,) = watched.told
    assert told == (
        "the worker of trial-0007 has given no sign of life for 30 s; after 1 min of silence it is ended, and another worker "
        "continues the work"
    )
    assert watched.after(10) == ["a"]
    watched.stalls.drop("a")
    assert watched.after(1000) == []
    assert len(watched.told) == 1


def test_signs_of_life_keep_long_work_alive() -> None:
    watched = Watched()
    watched.stalls.begin("a", "the worker of trial-0007")
    for _ in range(100):
        watched.clock.now_s += 5
        watched.stalls.hear("a", silent_s=1.0)
        assert watched.stalls.overdue() == []
    assert watched.told == []
    assert watched.after(40) == []
    watched.stalls.hear("a", silent_s=0.0)
    assert watched.after(1) == []
    assert [text.endswith("works again") for text in watched.told] == [False, True]


@pytest.mark.parametrize(
    ("longest_s", "num_stalls", "limit_s"),
    [(0.1, 0, 60), (12, 0, 60), (20, 0, 100), (4000, 0, 600), (20, 1, 200), (0.1, 3, 480)],
)
def test_the_limit_grows_with_what_a_trial_has_taken_and_with_every_stall(
    longest_s: float, num_stalls: int, limit_s: float
) -> None:
    assert LIMITS.limit_s(longest_s, num_stalls) == limit_s


def test_what_work_has_taken_counts_for_each_unit_of_it() -> None:
    watched = Watched()
    watched.stalls.begin("a", "a worker", size=4)
    watched.clock.now_s += 80
    watched.stalls.end("a")
    watched.stalls.begin("one", "a worker")
    watched.stalls.begin("four", "a worker", size=4)
    assert watched.stalls.limit_s("one") == 5 * 20
    assert watched.stalls.limit_s("four") == 5 * 80
    assert watched.after(100) == ["one"]


def test_a_listener_hears_new_signs_only() -> None:
    store: dict[str, bytes] = {}
    listener, pulse = Listener(0.02, store.get), Pulse("a", 0.0)
    try:
        listener.add(pulse)
        assert listener.silent_s(pulse) is None
        first = Sign("node", 1, 2, 1)
        store["a"] = first.encoded()
        assert heard(listener, pulse) == first
        time.sleep(0.2)
        assert (listener.silent_s(pulse) or 0.0) > 0.1, "the same sign is not heard twice"
        store["a"] = Sign("node", 1, 2, 2).encoded()
        time.sleep(0.1)
        assert (listener.silent_s(pulse) or 9.0) < 0.15
        listener.remove(pulse)
        listener.add(pulse, unlike=Sign("node", 1, 2, 2))
        time.sleep(0.1)
        assert listener.newest(pulse) is None, "the last sign of an earlier worker"
    finally:
        listener.close()


def heard(listener: Listener, pulse: Pulse, within_s: float = 5.0) -> Sign | None:
    deadline = time.monotonic() + within_s
    while (sign := listener.newest(pulse)) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return sign


def test_only_training_workers_that_are_at_work_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    store: dict[str, bytes] = {}
    killed: list[Sign] = []
    told: list[str] = []
    monkeypatch.setattr("orchestration.workers.life._read", store.get)
    monkeypatch.setattr("orchestration.workers.training_watch.kill_worker", killed.append)
    pulses = {name: Pulse(name, 0.0) for name in ("silent", "ended", "paused", "waiting")}
    rules = StallRules(StallLimits(tell_s=0.2, least_s=0.4), told.append, beat_s=0.02)
    watch = TrainingWatch(pulses, rules)
    for name in ("silent", "ended", "paused"):
        store[name] = Sign("node", 1, 2, 1, is_last=name == "ended").encoded()
    deadline = time.monotonic() + 10
    while not killed and time.monotonic() < deadline:
        watch.look(lambda name: name != "paused")
        time.sleep(0.02)
    for _ in range(20):
        watch.look(lambda name: name != "paused")
        time.sleep(0.02)
    watch.close()
    assert killed == [Sign("node", 1, 2, 1)]
    assert [text.startswith("silent has given no sign") for text in told] == [True]


def specs(*actions: str) -> list[TrialSpec]:
    return [TrialSpec(slot, seed=100 + slot, params={"do": action}) for slot, action in enumerate(actions)]


def results(outcomes: list[TrialOutcome]) -> dict[int, tuple[object, ...]]:
    return {
        outcome.slot: (outcome.state, outcome.metrics["madds_m"], outcome.arrays["weight"].tolist())
        for outcome in outcomes
    }


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.parametrize("by", ["silence", "time-out"])
def test_a_stopped_trial_worker_is_told_and_its_trial_run_by_another(
    ray_cluster: None, tmp_path: Path, by: str
) -> None:
    attempts, place, told = tmp_path / "attempts", tmp_path / "place", list[str]()
    attempts.mkdir()
    place.write_text(str(attempts))
    serial = results(list(SerialRunner(one_by_one(ARRAYS, place)).run(specs(*["work"] * 4))))
    for path in attempts.iterdir():
        path.unlink()
    limits = {
        "silence": TrialLimits(timeout_s=600.0, stalls=StallLimits(tell_s=1.0, least_s=2.0)),
        "time-out": TrialLimits(timeout_s=3.0),
    }
    runner = RayRunner(
        functools.partial(one_by_one, place=place),
        arrays=ARRAYS,
        actors=Actors(number=2),
        limits=limits[by],
        tell=told.append,
    )
    outcomes = list(runner.run(specs("work", "stop_once", "work", "work")))
    runner.close()
    assert results(outcomes) == serial
    assert len(list(attempts.glob("1-*"))) == 2
    if by == "silence":
        assert [text.partition(" for ")[0] for text in told] == ["the worker of trial-0001 has given no sign of life"]


def job_in(sweep: Sweep, folder: Path, workers: int) -> SupernetJob:
    return replace(sweep.members[0].job, folder=folder, stop_file=folder.with_suffix(".stop"), workers=workers)


def augmented(sweep: Sweep) -> InMemoryImages:
    """The training split as workers augment it."""
    assert isinstance(sweep.train, InMemoryImages)
    return InMemoryImages(sweep.train.images, sweep.train.labels, sweep.run.augmentation)


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.parametrize("workers", [1, 2])
def test_a_stopped_training_worker_is_told_and_replaced(ray_cluster: None, tmp_path: Path, workers: int) -> None:
    sweep, told = Sweep(tmp_path, {"first": 0.1}), list[str]()
    job, images = job_in(sweep, tmp_path / "stalled", workers), augmented(sweep)
    train_on_ray(
        job_in(sweep, tmp_path / "straight", workers), images, on_points=lambda points: None, should_stop=lambda: False
    )
    stops = Stops(images, tmp_path / "stops")
    rules = StallRules(StallLimits(tell_s=3.0, least_s=6.0), told.append, beat_s=0.5)
    train_on_ray(job, stops, on_points=lambda points: None, should_stop=lambda: False, stalls=rules)
    assert stops.deaths >= 1
    name = "the training worker" if workers == 1 else "training worker "
    assert any(text.startswith(name) and "no sign of life" in text for text in told), told
    hashes = [json.loads((tmp_path / run / f"{FINAL}.json").read_text())["sha256"] for run in ("straight", "stalled")]
    assert hashes[0] == hashes[1]


@pytest.mark.long
@pytest.mark.ray
def test_a_stopped_worker_of_a_sweep_of_supernets_is_told_and_replaced(ray_cluster: None, tmp_path: Path) -> None:
    rules = TuneRules(scheduler="none", concurrent=2)
    straight, sweep, told = Sweep(tmp_path / "straight"), Sweep(tmp_path / "stalled"), list[str]()
    wanted = straight.launch(rules)
    sweep.train = stops = Stops(augmented(sweep), tmp_path / "stops")
    stalls = StallRules(StallLimits(tell_s=3.0, least_s=6.0), told.append, beat_s=0.5)
    assert sweep.launch(rules, stalls=stalls) == wanted
    assert stops.deaths == 1
    assert [text.partition(" has ")[0] in ("first", "poor") for text in told] == [True], told
    assert [sweep.sha256(name) for name in ("first", "third")] == [straight.sha256(name) for name in ("first", "third")]


@pytest.mark.long
@pytest.mark.ray
def test_work_that_takes_long_is_no_stall() -> None:
    """In a session of its own, so that the signs go through a real store."""
    with ray_session(RaySettings(num_cpus=1, object_store_mib=100)):
        import ray

        pulse, listener = Pulse.new(0.2), Listener(0.2)
        listener.add(pulse)
        longest_s = 0.0
        work = ray.remote(_long_work).remote(pulse)
        while not ray.wait([work], timeout=0.1)[0]:
            if (silent_s := listener.silent_s(pulse)) is not None:
                longest_s = max(longest_s, silent_s)
        assert 0.0 < longest_s < 1.5
        deadline = time.monotonic() + 5
        while (sign := listener.newest(pulse)) is not None and not sign.is_last and time.monotonic() < deadline:
            time.sleep(0.05)
        assert sign is not None
        assert sign.is_last
        listener.close()


def _long_work(pulse: Pulse) -> None:
    with pulse.beating():
        time.sleep(4.0)
