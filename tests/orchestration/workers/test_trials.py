"""Trials on a real Ray cluster: every way in which one can end, and what is left when the cluster
stops."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError

from dsnet.arithmetic import MKL_MODE, mkl_mode
from dsnet.errors import ConfigError, PreflightError, StoppedError, StorageError
from dsnet.import_path import WORKER_HOOK
from orchestration.environment import prepare_environment
from orchestration.workers.nodes import Node
from orchestration.workers.runtime import RaySettings, _connect, _environment_of_workers
from orchestration.workers.trials import Actors, RayRunner, TrialLimits, TrialWorker, _cause_of_loss, _resource_options
from search.gate_check import GateCheck
from search.study.engine import Budget, Search
from search.study.runner import Runner, SerialRunner, TrialOutcome, TrialSpec
from search.study.study import Objective, StudyJournal, StudySettings
from search.suggest.samplers import SamplerSettings
from search.suggest.space import parse_space
from tests.dsnet.samples import needs_products_apart
from tests.orchestration.workers.gate_studies import SPACE, gate_study, gate_trials
from tests.orchestration.workers.scripted import (
    ScriptedCohort,
    die_while_building,
    hang_while_building,
    one_by_one,
    refuse_to_build,
)
from tests.search.contracts import RunnerContract, make_walks

pytestmark = pytest.mark.ray

ARRAYS: dict[str, np.ndarray] = {"ce": np.arange(200_000, dtype=np.float32).reshape(-1, 4), "labels": np.arange(50_000)}
REPOSITORY = Path(__file__).parents[3]
TIMEOUT_S = 2.0
"""Time of a trial of the shared runners."""


class SharedRunners:
    """The runners of this module's tests, whose actors stay for the next test: two of them take
    seconds to start.

    Only one runner at a time has actors, because the cluster has two CPUs.
    """

    def __init__(self, place: Path) -> None:
        self._runners = {
            "one by one": self._runner(one_by_one, place),
            "cohort": self._runner(ScriptedCohort, place),
        }

    @staticmethod
    def _runner(make: Callable[..., Any], place: Path) -> RayRunner:
        return RayRunner(
            functools.partial(make, place=place),
            arrays=ARRAYS,
            actors=Actors(number=2),
            limits=TrialLimits(timeout_s=TIMEOUT_S, retries=1),
        )

    def only(self, name: str) -> RayRunner:
        """The runner of this name with both actors ready; the other one has none."""
        self.close(name)
        runner = self._runners[name]
        runner._open()
        while runner._jobs:  # the successors of those that the test before has killed
            runner._wait(deque())
        return runner

    def close(self, keep: str | None = None) -> None:
        """End the actors of all other runners."""
        for name, runner in self._runners.items():
            if name != keep:
                runner.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that names the folder of the running test."""
    return tmp_path_factory.mktemp("shared") / "place"


@pytest.fixture(scope="module")
def shared(ray_cluster: None, place: Path) -> Iterator[SharedRunners]:
    made = SharedRunners(place)
    yield made
    made.close()


@pytest.fixture
def folder(place: Path, tmp_path: Path) -> Path:
    """The folder that counts the attempts of this test's trials."""
    attempts = tmp_path / "attempts"
    attempts.mkdir()
    place.write_text(str(attempts), encoding="utf-8")
    return attempts


@pytest.fixture
def runner(shared: SharedRunners, folder: Path) -> RayRunner:
    return shared.only("one by one")


@pytest.fixture
def cohort_runner(shared: SharedRunners, folder: Path) -> RayRunner:
    return shared.only("cohort")


@pytest.fixture
def empty_cluster(shared: SharedRunners) -> None:
    """The cluster without actors, for tests with runners of their own."""
    shared.close()


def specs(*actions: str) -> list[TrialSpec]:
    return [TrialSpec(slot, seed=100 + slot, params={"do": action}) for slot, action in enumerate(actions)]


def by_slot(outcomes: Iterator[TrialOutcome]) -> dict[int, TrialOutcome]:
    collected = list(outcomes)
    answered = {outcome.slot: outcome for outcome in collected}
    assert len(answered) == len(collected)
    return answered


def num_attempts(folder: Path, slot: int) -> int:
    return len(list(folder.glob(f"{slot}-*")))


def test_a_cluster_leaves_the_signal_handlers_of_the_program(ray_cluster: None) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        assert not getattr(handler, "__module__", "").startswith("ray"), handler


def test_results_equal_those_of_the_serial_runner_and_actors_stay_warm(runner: RayRunner, place: Path) -> None:
    serial = by_slot(SerialRunner(one_by_one(ARRAYS, place)).run(specs(*["work"] * 6)))
    pids = set()
    for _ in range(2):
        outcomes = by_slot(runner.run(specs(*["work"] * 6)))
        assert outcomes.keys() == serial.keys()
        for slot, outcome in outcomes.items():
            assert outcome.state == "complete"
            assert outcome.metrics["madds_m"] == serial[slot].metrics["madds_m"]
            np.testing.assert_array_equal(outcome.arrays["weight"], serial[slot].arrays["weight"])
            pids.add(outcome.metrics["pid"])
    assert len(pids) <= 2
    assert os.getpid() not in pids


def test_a_stream_gives_a_worker_its_next_trial_while_others_are_busy(runner: RayRunner, folder: Path) -> None:
    scripted = iter(specs("wait", *["work"] * 6))
    ended: list[int] = []
    for outcome in runner.stream(lambda: [spec] if (spec := next(scripted, None)) else ()):
        ended.append(outcome.slot)
        if len(ended) == 6:
            assert ended == [1, 2, 3, 4, 5, 6], "nobody waited for the slow one"
            (folder / "go").touch()
    assert ended[6:] == [0]


@pytest.mark.parametrize("how", ["run", "stream"])
def test_a_trial_is_run_again_where_the_machine_is_to_blame_and_otherwise_fails_alone(
    runner: RayRunner, folder: Path, how: str
) -> None:
    actions = ["work", "die_once", "raise", "die", "hang", "nan", "work"]
    scripted = iter(specs(*actions))
    outcomes = by_slot(
        runner.run(specs(*actions))
        if how == "run"
        else runner.stream(lambda: [spec] if (spec := next(scripted, None)) else ())
    )
    assert {slot: (outcome.state, outcome.reason) for slot, outcome in outcomes.items() if outcome.reason} == {
        2: ("failed", "ValueError: no route is right"),
        3: ("failed", "lost its worker 2 times: its process ended unexpectedly (ActorDiedError)"),
        4: ("failed", "time-out after 2 s"),
    }
    assert [outcomes[slot].state for slot in (0, 1, 5, 6)] == ["complete"] * 4
    assert np.isnan(outcomes[5].metrics["top1"])
    assert [num_attempts(folder, slot) for slot in range(7)] == [1, 2, 1, 2, 1, 1, 1]
    assert TIMEOUT_S <= outcomes[4].duration_s < 3 * TIMEOUT_S + 6
    assert vanishes(int(next(folder.glob("4-*")).name.split("-")[2]))
    assert by_slot(runner.run(specs("work", "work")))[1].state == "complete"


def test_a_stream_that_has_nothing_for_now_is_asked_again_after_the_next_outcome(
    runner: RayRunner, folder: Path
) -> None:
    ended: list[int] = []
    asked: list[int] = []
    scripted = iter([specs("wait"), (), specs("work", "work")[1:], ()])

    def take() -> Sequence[TrialSpec]:
        asked.append(len(ended))
        if len(asked) == 2:
            (folder / "go").touch()
        return next(scripted, ())

    for outcome in runner.stream(take):
        ended.append(outcome.slot)
    assert ended == [0, 1]
    assert asked[:2] == [0, 0], "the second worker was free and got nothing"
    assert set(asked[2:]) == {1, 2}
    assert len(asked) <= 5


def test_a_stream_that_nobody_reads_any_more_is_abandoned(runner: RayRunner, folder: Path) -> None:
    scripted = iter(specs("hang", "work"))
    outcomes = runner.stream(lambda: [spec] if (spec := next(scripted, None)) else ())
    assert next(outcomes).slot == 1
    assert appears(folder, "0-*")
    outcomes.close()
    (started,) = folder.glob("0-*")
    assert vanishes(int(started.name.split("-")[2]))
    assert by_slot(runner.run(specs("work")))[0].state == "complete"


def test_trials_that_nobody_waits_for_any_more_are_abandoned(runner: RayRunner, folder: Path) -> None:
    outcomes = runner.run(specs("work", "hang", "work", "work"))
    assert next(outcomes).state == "complete"
    outcomes.close()
    for started in folder.glob("1-*"):
        assert vanishes(int(started.name.split("-")[2]))
    assert by_slot(runner.run(specs("work", "work")))[0].state == "complete"


def test_a_sweep_on_ray_makes_the_study_of_a_serial_one(runner: RayRunner, place: Path, tmp_path: Path) -> None:
    actions = ["work", "raise", "nan", "die_once"]
    settings = StudySettings(
        name="ray",
        space=parse_space({"do": {"choice": actions}, "gate.target": {"uniform": [0.0, 1.0]}}),
        objectives=(Objective("top1", "maximize"), Objective("madds_m", "minimize")),
        sampler=SamplerSettings(startup=4),
        cohort=4,
    )

    def made_by(name: str, some_runner: Any) -> list[tuple[Any, ...]]:
        journal = StudyJournal.open(tmp_path / name, settings)
        records = Search(journal=journal, runner=some_runner).run(Budget(6)).records
        return [(r.slot, r.state, r.params, r.values, r.reason) for r in records]

    on_ray = made_by("ray", runner)
    assert "die_once" in {params["do"] for _, _, params, *_ in on_ray}
    # Every slot has been tried here, so that `die_once` works at the first attempt of this process.
    assert made_by("serial", SerialRunner(one_by_one(ARRAYS, place))) == on_ray


def batches(folder: Path) -> set[tuple[int, ...]]:
    return {tuple(map(int, path.name.partition("-")[2].split(","))) for path in folder.glob("batch-*")}


def test_a_cohort_is_divided_over_the_actors_and_gives_what_single_trials_give(
    cohort_runner: RayRunner, place: Path, folder: Path
) -> None:
    serial = by_slot(SerialRunner(one_by_one(ARRAYS, place)).run(specs(*["work"] * 12)))
    outcomes = by_slot(cohort_runner.run(specs(*["work"] * 12)))
    assert batches(folder) == {(0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11)}
    assert outcomes.keys() == serial.keys()
    for slot, outcome in outcomes.items():
        assert outcome.metrics["madds_m"] == serial[slot].metrics["madds_m"]
        assert outcome.metrics["pid"] != os.getpid()


def test_a_trial_that_kills_the_worker_of_its_batch_fails_alone(cohort_runner: RayRunner, folder: Path) -> None:
    outcomes = by_slot(cohort_runner.run(specs("work", "work", "die", "work", "work", "raise", "work", "work")))
    failed = {slot: outcome.reason for slot, outcome in outcomes.items() if outcome.state == "failed"}
    assert failed == {
        2: "lost its worker 2 times: its process ended unexpectedly (ActorDiedError)",
        5: "ValueError: no route is right",
    }
    assert len(outcomes) == 8
    assert batches(folder) == {(0, 1, 2, 3), (4, 5, 6, 7), (0,), (1,), (2,), (3,)}
    assert num_attempts(folder, 2) == 1 + 2, "the batch that was lost counts against none of its trials"
    assert num_attempts(folder, 5) == 1


def test_a_batch_whose_worker_is_lost_by_chance_completes(cohort_runner: RayRunner, folder: Path) -> None:
    outcomes = by_slot(cohort_runner.run(specs("work", "die_once", "work", "work", "work")))
    assert {outcome.state for outcome in outcomes.values()} == {"complete"}
    assert len(outcomes) == 5


def test_an_endless_trial_times_out_alone(cohort_runner: RayRunner, folder: Path) -> None:
    started_s = time.monotonic()
    outcomes = by_slot(cohort_runner.run(specs("work", "hang", "work", "work", "work", "work")))
    assert {slot: outcome.reason for slot, outcome in outcomes.items() if outcome.state == "failed"} == {
        1: "time-out after 2 s"
    }
    assert len(outcomes) == 6
    assert time.monotonic() - started_s >= (3 + 1) * TIMEOUT_S, (
        "a batch of three has the time of three trials, then the trial its own"
    )
    assert num_attempts(folder, 1) == 2


def test_a_full_disk_of_a_worker_ends_the_search_and_no_trial_has_failed_by_it(runner: RayRunner, folder: Path) -> None:
    outcomes = []
    with pytest.raises(StorageError, match="cannot use /spilled: the disk is full"):
        outcomes.extend(runner.run(specs("fill", "work")))
    assert [outcome.state for outcome in outcomes if outcome.state != "complete"] == []


def test_an_exception_out_of_a_batch_fails_the_trial_that_raises_alone(cohort_runner: RayRunner, folder: Path) -> None:
    outcomes = by_slot(cohort_runner.run(specs("work", "spoil", "work", "work", "work", "work")))
    failed = {slot: outcome.reason for slot, outcome in outcomes.items() if outcome.state == "failed"}
    assert failed == {1: "RuntimeError: the program ended"}
    assert batches(folder) == {(0, 1, 2), (0,), (1,), (2,), (3, 4, 5)}
    assert [num_attempts(folder, slot) for slot in range(6)] == [1, 0, 1, 1, 1, 1]


def test_batches_that_nobody_waits_for_any_more_are_abandoned(cohort_runner: RayRunner, folder: Path) -> None:
    outcomes = cohort_runner.run(specs("work", "work", "hang", "work"))
    first = next(outcomes)
    assert first.slot in (0, 1)
    outcomes.close()
    for started in folder.glob("2-*"):
        assert vanishes(int(started.name.split("-")[2]))
    assert len(by_slot(cohort_runner.run(specs(*["work"] * 8)))) == 8


def test_a_batch_of_a_stream_that_loses_its_worker_goes_back_one_by_one(cohort_runner: RayRunner, folder: Path) -> None:
    batches_left = iter([specs("work", "die", "work"), specs(*["work"] * 5)[3:]])
    outcomes = by_slot(cohort_runner.stream(lambda: next(batches_left, ())))
    assert {slot: outcome.reason for slot, outcome in outcomes.items() if outcome.reason} == {
        1: "lost its worker 2 times: its process ended unexpectedly (ActorDiedError)"
    }
    assert sorted(outcomes) == [0, 1, 2, 3, 4]
    assert batches(folder) == {(0, 1, 2), (0,), (1,), (2,), (3, 4)}


def test_more_trials_than_a_program_takes_are_several_batches_of_a_stream(
    cohort_runner: RayRunner, folder: Path
) -> None:
    all_at_once = iter([specs(*["work"] * 9)])
    assert len(by_slot(cohort_runner.stream(lambda: next(all_at_once, ())))) == 9
    assert sorted(len(batch) for batch in batches(folder)) == [3, 3, 3]


class TestRayRunner(RunnerContract):
    """The real thing under the contract of all runners."""

    @pytest.fixture(scope="class")
    def warm(self, shared: SharedRunners) -> Iterator[Runner]:
        shared.close()
        made = RayRunner(make_walks, arrays={}, actors=Actors(number=2))
        yield made
        made.close()

    @pytest.fixture
    def walking(self, warm: Runner) -> Runner:
        return warm


def test_an_actor_that_wants_what_the_cluster_lacks_is_refused(empty_cluster: None) -> None:
    for num_actors, message in ((None, "one process needs 1 CPU and 2 of board"), (2, "2 processes need .* each")):
        runner = RayRunner(make_walks, arrays={}, actors=Actors(number=num_actors, resources={"board": 2}))
        with pytest.raises(
            PreflightError, match=rf"{message}.*1 node with 2 CPUs and 0 of board.*trial_resources\.board"
        ):
            next(runner.run(specs("work")))


def test_actors_are_as_many_as_the_scarcest_resource_allows() -> None:
    nodes = [Node("a", {"CPU": 4.0, "GPU": 1.0, "memory": 4e9})]

    def places(**options: Any) -> int:
        return Actors(**options).places(nodes)

    assert places() == 4
    assert places(threads=2) == 2
    assert places(resources={"GPU": 0.5}) == 2
    assert places(resources={"GPU": 0.5, "memory": 3e9}) == 1
    assert places(resources={"GPU": 0.1}) == 4
    assert _resource_options({"GPU": 0.5, "memory": 3e9, "board": 1}) == {
        "num_gpus": 0.5,
        "memory": 3e9,
        "resources": {"board": 1},
    }


def test_actors_read_the_arrays_in_place_with_the_threads_that_they_take(
    empty_cluster: None, place: Path, folder: Path
) -> None:
    """Without a time limit: the trial imports torch."""
    make = functools.partial(one_by_one, place=place)
    runner = RayRunner(make, arrays=ARRAYS, actors=Actors(number=1))
    assert by_slot(runner.run(specs("look")))[0].metrics == {
        "owns_data": 0,
        "writeable": 0,
        "tensor_shares": 1,
        "torch_threads": 1,
        "omp_threads": 1,
        "has_mkl_mode": 1,
        "in_shared_memory": 1,
        "sum": float(ARRAYS["ce"].sum(dtype=np.float64)),
    }
    runner.close()
    runner = RayRunner(make, arrays=ARRAYS, actors=Actors(threads=2))
    facts = by_slot(runner.run(specs("look")))[0].metrics
    assert (facts["torch_threads"], facts["omp_threads"]) == (2, 2)
    assert facts["has_mkl_mode"]
    runner.close()
    with pytest.raises(
        PreflightError, match=r"gate\.end_to_end\.threads 3: one process needs 3 CPUs, but .*1 node with 2 CPUs"
    ):
        list(RayRunner(make, arrays=ARRAYS, actors=Actors(threads=3)).run(specs("work")))


@pytest.mark.skipif(mkl_mode() is None, reason="MKL does not run on this processor")
def test_a_worker_on_another_machine_chooses_mkls_mode_by_itself_unless_the_user_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(MKL_MODE)
    TrialWorker(make_walks, {}, num_threads=1)
    assert os.environ[MKL_MODE] == mkl_mode()
    hook = {"worker_process_setup_hook": WORKER_HOOK}
    assert _environment_of_workers({MKL_MODE: str(mkl_mode())}) == {"runtime_env": hook}
    chosen = {"env_vars": {MKL_MODE: "COMPATIBLE"}}
    assert _environment_of_workers({MKL_MODE: "COMPATIBLE"}) == {"runtime_env": hook | chosen}


def finders_and_path() -> tuple[list[str], str | None]:
    """Of the process that runs it: the finders before Python's search of sys.path, and
    PYTHONSAFEPATH."""
    names = [getattr(finder, "__name__", type(finder).__name__) for finder in sys.meta_path]
    return names[: names.index("PathFinder")], os.environ.get("PYTHONSAFEPATH")


def test_workers_search_for_our_packages_before_the_working_directory(empty_cluster: None) -> None:
    import ray

    before, is_safe = ray.get(ray.remote(num_cpus=0)(finders_and_path).remote())
    assert "InstalledFirst" in before
    assert is_safe == "1"


def test_an_error_while_the_function_is_built_reaches_the_caller_as_it_is(empty_cluster: None) -> None:
    runner = RayRunner(refuse_to_build, arrays=ARRAYS, actors=Actors(number=1))
    with pytest.raises(ConfigError, match="unknown router 'mpl'"):
        list(runner.run(specs("work")))
    runner.close()


def test_workers_that_die_while_they_start_end_the_sweep(empty_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestration.workers.trials.MAX_STARTS_LOST", 2)
    runner = RayRunner(die_while_building, arrays=ARRAYS, actors=Actors(number=1))
    with pytest.raises(PreflightError, match="trial workers failed to start 2 times"):
        list(runner.run(specs("work")))
    runner.close()


def test_workers_that_do_not_start_in_time_are_told_and_then_end_the_sweep(
    empty_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestration.workers.trials.START_TIMEOUT_S", 0.3)
    told: list[str] = []
    runner = RayRunner(hang_while_building, arrays=ARRAYS, actors=Actors(number=1), tell=told.append)
    with pytest.raises(PreflightError, match=r"did not start within 0\.3 s, 2 times in a row"):
        list(runner.run(specs("work")))
    runner.close()
    assert told == ["a trial worker did not start within 0.3 s; another one is started"]


def test_a_stop_request_ends_trials_that_need_longer(
    empty_cluster: None, folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestration.workers.trials.STOP_PATIENCE_S", 0.2)
    make = functools.partial(one_by_one, place=place)
    stop = folder.with_name("stop")
    runner = RayRunner(make, arrays=ARRAYS, actors=Actors(number=1), should_stop=stop.exists)
    outcomes = runner.run(specs("work", "hang"))
    assert next(outcomes).slot == 0
    stop.touch()
    began_s = time.monotonic()
    with pytest.raises(StoppedError, match="finished trials are kept"):
        next(outcomes)
    assert time.monotonic() - began_s < 5.0
    runner.close()


def test_more_actors_than_cpus_are_refused(empty_cluster: None) -> None:
    with pytest.raises(PreflightError, match=r"ray\.trial_actors 3: 3 processes need 1 CPU each, but .* room for 2"):
        list(RayRunner(refuse_to_build, arrays=ARRAYS, actors=Actors(number=3)).run(specs("work")))


def test_the_out_of_memory_killer_is_named() -> None:
    assert _cause_of_loss(OutOfMemoryError("...")) == "killed because the machine ran out of memory"
    assert _cause_of_loss(ActorDiedError()) == "its process ended unexpectedly (ActorDiedError)"


@pytest.mark.long
@needs_products_apart
def test_a_search_over_real_gate_trials_is_the_same_with_1_and_3_workers(tmp_path: Path) -> None:
    script = (
        "import json, sys; from pathlib import Path; from orchestration.environment import prepare_environment\n"
        "prepare_environment()\n"
        "from tests.orchestration.workers.gate_studies import studies_by_workers\n"
        "Path(sys.argv[1], 'studies.json').write_text(json.dumps(studies_by_workers(Path(sys.argv[1]))))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    studies = json.loads((tmp_path / "studies.json").read_text())
    make, arrays = gate_trials()
    here = make(arrays)
    findings = studies.pop("findings")
    assert len(findings) >= 2
    own = GateCheck.of_space(parse_space(SPACE))(here)
    assert all(found == [own.digest, []] for found in findings), "every worker rounds as this process does"
    trials, front = gate_study(tmp_path / "serial.log", SerialRunner(here))
    assert studies == {num_actors: [trials, front] for num_actors in ("1", "3")}
    assert len(front) >= 2
    assert {state for _, state, *_ in trials} == {"complete", "failed"}
    assert {params["gate.router"] for *_, params, _, _ in trials[8:]} == {"gate", "cascade"}


# --- the cluster itself ---


def appears(folder: Path, pattern: str, within_s: float = 15.0) -> bool:
    """Whether a file that matches the pattern is written within some seconds."""
    deadline = time.monotonic() + within_s
    while not any(folder.glob(pattern)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return any(folder.glob(pattern))


def vanishes(pid: int, within_s: float = 15.0) -> bool:
    """Whether a process ends (or is only waited for) within some seconds."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


LIFE_OF_A_CLUSTER = """
import json, os, pathlib, sys
from orchestration.workers.nodes import Node
from orchestration.workers.runtime import RaySettings, ray_session

def children(pid):
    found = []
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return [pid for child in found for pid in (child, *children(child))]

def listening_addresses(pids):
    inodes = set()
    for pid in pids:
        for link in pathlib.Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    addresses = []
    for table in ("tcp", "tcp6"):
        for line in pathlib.Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                addresses.append(fields[1].split(":")[0])
    return addresses

WATCHER, INTERVAL = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
os.environ[INTERVAL] = "7"
with ray_session(RaySettings(num_cpus=1, object_store_mib=75)):
    assert (os.environ[WATCHER], os.environ[INTERVAL]) == ("0", "7"), "the user's own value stays"
    import ray
    ray.get(ray.remote(lambda: None).remote())
    with ray_session(RaySettings()):
        assert ray.cluster_resources()["CPU"] == 1, "an inner session joins the outer one"
    assert ray.is_initialized()
    store = ray.cluster_resources()["object_store_memory"]
    pids = children(os.getpid())
    print(json.dumps({"pids": pids, "store": store, "addresses": listening_addresses([os.getpid(), *pids])}))
assert not ray.is_initialized()
assert WATCHER not in os.environ
"""


def test_a_cluster_listens_on_localhost_only_and_leaves_no_process_behind() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ended = subprocess.run(
        [sys.executable, "-c", LIFE_OF_A_CLUSTER],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    facts = json.loads(ended.stdout.splitlines()[-1])
    assert len(facts["pids"]) >= 3
    assert all(vanishes(pid) for pid in facts["pids"])
    assert facts["store"] == 75 * 2**20
    assert facts["addresses"], "a cluster must listen somewhere"
    localhost = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
    assert set(facts["addresses"]) <= localhost


def test_the_users_own_environment_wins() -> None:
    environment = {"RAY_USAGE_STATS_ENABLED": "1"}
    prepare_environment(environment)
    assert environment["RAY_USAGE_STATS_ENABLED"] == "1"
    assert environment.get(MKL_MODE) == mkl_mode()
    assert environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"object_store_mib": 74}, "object_store_mib is 74.*75 or more"), ({"num_cpus": 0}, r"ray\.num_cpus is 0")],
)
def test_settings_that_ray_would_refuse_are_refused_first(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RaySettings(**changes)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "[::1]:1"])
def test_an_address_where_nobody_answers_is_named(address: str) -> None:
    with pytest.raises(PreflightError, match="no Ray cluster answers at") as caught:
        _connect(RaySettings(address=address))
    assert f"'{address}'" in str(caught.value)


def test_importing_the_runtime_does_not_import_ray() -> None:
    code = "import sys, orchestration.workers.runtime, orchestration.workers.trials; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0
