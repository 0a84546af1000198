"""Sweeps whose processes are killed at random moments, compared with a sweep that nobody disturbed.

A victim is drawn at random: the driver, its supervisor (the process that waits for it), a worker of
Ray that has work, the raylet, the GCS (Ray's global control service), or the process that writes to
MLflow. It gets SIGKILL at a random moment of a launch. A launch that ended is repeated with the
same command, until the sweep is complete. Then everything that it stored is compared with the
undisturbed sweep: weights, trials, front, results on val and test, loss curves, and the rows of
MLflow. Measured times are not compared.

The seconds that a kill costs are those since the last stored state (an epoch of the training, a
cohort of trials, a finished stage): this work is done again. They are compared with the longest
such step of the undisturbed sweep.
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.harness import Estimate, Headline, Options, Report, Section, run_benchmark
from benchmarks.processes import Answer, Command
from dsnet.files import file_sha256, read_json_lines
from orchestration.progress import read_task_state
from orchestration.results.run import RunResults
from orchestration.runs.folder import MLFLOW_DATABASE, RunDir
from search.study.study import TrialRecord

BENCHMARK = (
    "50 random kills of driver, supervisor, worker, raylet, GCS and MLflow writer: results lost, duplicated or changed, and seconds redone "
    "(goals: 0, 0, 0; one epoch or cohort)"
)
NAME = "tiny"
SWEEP = f"""\
version: 1
name: {NAME}
data: {{name: digits, limit: 200}}
supernet:
  model: ds_tiny
  options: {{num_routes: 3}}
  train: {{epochs: 8, batch_size: 40, warmup_epochs: 0.5}}
  bootstrapping: {{teacher_min_updates: 2}}
measure: {{batch_sizes: [1, 8], group_sizes: [1, 8], repeats: 2, warmup: 1}}
gate:
  router: gate
  optimizer: {{steps: 60, batch_size: 128}}
sampler: {{cohort: 4, startup: 8}}
budget: {{trials: 12}}
export: {{formats: [bundle]}}
"""
FILE = "tiny.yaml"
NUM_KILLS = 50
NUM_QUICK_KILLS = 4
EARLIEST_S = 2.0
"""Earliest moment of a launch for a kill: before it Python imports modules."""
END_S = 240.0
"""Time limit of a launch, and for the end of one that lost its Ray cluster."""
RESUMABLE = 6
STORED = ("*/*/done", "supernet/*/epoch-*.json", "search/*/study.journal")
"""Files of a run that are written when something is finished for good."""
TIMES = ("latency", "test/latency")
"""Prefixes of metrics that are measured times."""


@dataclass(frozen=True)
class Victim:
    """A kind of process that is killed."""

    name: str
    part: str
    """Part of its command line; empty for the driver and its parent."""
    ends_launch: bool
    """Whether the launch ends with it."""

    def pids(self, command: Command) -> list[int]:
        """The processes of this kind that a launch has at present."""
        if self is SUPERVISOR:
            return [command.process.pid]
        if not self.part:
            return children(command.process.pid)
        others = ("IDLE", "Agent")  # workers without work, and Ray's own agents
        return [
            pid
            for pid, line in _command_lines(command)
            if self.part in line and not any(other in line for other in others)
        ]


SUPERVISOR = Victim("supervisor", "", ends_launch=True)
"""The parent of the driver."""
VICTIMS = (
    Victim("driver", "", ends_launch=True),
    SUPERVISOR,
    Victim("raylet", "/raylet/raylet", ends_launch=True),
    Victim("GCS", "gcs_server", ends_launch=True),
    Victim("worker", "ray::", ends_launch=False),
    Victim("MLflow writer", "orchestration.tracking.process", ends_launch=False),
)


@dataclass(frozen=True)
class Kill:
    """One kill."""

    victim: str
    stage: str
    """Title of the work that was being done."""
    redone_s: float
    """Seconds of work since the last stored state."""


@dataclass
class Watch:
    """Follows what a launch stores, to know how old the last stored state is."""

    run: RunDir
    started: float = field(default_factory=time.time)
    longest_s: dict[str, float] = field(default_factory=dict)
    """By stage, the longest time between two stored states."""
    _newest: float = 0.0

    def look(self) -> None:
        """Note the time between the last two stored states, if there is a new one."""
        newest = self._newest_file()
        if newest > self._newest:
            since = self._since(self._newest)
            if since is not None:
                stage = self.stage
                self.longest_s[stage] = max(self.longest_s.get(stage, 0.0), newest - since)
            self._newest = newest

    @property
    def stage(self) -> str:
        """The stage at work, by the title of its progress bar."""
        state = read_task_state(self.run.progress_json)
        return "start" if state is None else state.title.partition(":")[0]

    def redone_s(self) -> float:
        """Seconds of work that a kill at this moment costs; 0 before any work of this launch."""
        since = self._since(self._newest_file())
        return 0.0 if since is None else time.time() - since

    def _since(self, stored: float) -> float | None:
        """When the work since a stored state began; the launch's own start does not count."""
        began = _modified(self.run.progress_json)
        if began is None or began < self.started:
            return None
        return max(stored, self.started)

    def _newest_file(self) -> float:
        found = (_modified(path) for pattern in STORED for path in self.run.path.glob(pattern))
        return max((moment for moment in found if moment is not None), default=0.0)


@dataclass(frozen=True)
class Contents:
    """Everything that a finished sweep stored, without measured times: name -> value."""

    values: Mapping[str, Any]
    duplicates: tuple[str, ...]
    """Names that were stored more than once."""

    @classmethod
    def of(cls, run: RunDir) -> Contents:
        """Read a finished sweep and its rows in MLflow."""
        found: list[tuple[str, Any]] = [*_files(run), *_trials(run), *_curves(run), *_rows(run)]
        counts = Counter(name for name, _ in found)
        return cls(dict(found), tuple(sorted(name for name, count in counts.items() if count > 1)))


@dataclass(frozen=True)
class Difference:
    """Names of the stored values in which a disturbed sweep differs from the undisturbed one."""

    lost: tuple[str, ...]
    duplicated: tuple[str, ...]
    changed: tuple[str, ...]

    @classmethod
    def between(cls, own: Contents, whole: Contents) -> Difference:
        """Compare the contents of two sweeps; what only the disturbed one has counts as changed."""
        both = own.values.keys() & whole.values.keys()
        changed = {name for name in both if own.values[name] != whole.values[name]}
        further = own.values.keys() - whole.values.keys()
        return cls(
            tuple(sorted(whole.values.keys() - own.values.keys())),
            own.duplicates,
            tuple(sorted(changed | further)),
        )


@dataclass(frozen=True)
class Outcome:
    """Kills, differences and launches of all sweeps."""

    kills: tuple[Kill, ...]
    differences: tuple[Difference, ...]
    """One per sweep."""
    num_launches: int
    untold: tuple[str, ...]
    """Exit code and stderr of each launch that ended after a kill with an exit code that means
    neither success nor that launching again continues."""
    longest_s: Mapping[str, float]
    """By stage, the longest time between two stored states of the undisturbed sweep."""

    def count(self, what: str) -> int:
        """Number of values that were `lost`, `duplicated` or `changed` in all sweeps."""
        return sum(len(getattr(difference, what)) for difference in self.differences)

    def worst_share(self) -> float:
        """The longest time redone after a kill, over the longest step of the undisturbed sweep."""
        longest = max(self.longest_s.values())
        return max((kill.redone_s for kill in self.kills), default=0.0) / longest


@dataclass(frozen=True)
class Whole:
    """The undisturbed sweep."""

    text: str
    """Its sweep file."""
    run: RunDir
    seconds: float
    """Length of its launch: kills come at a moment within this time."""
    longest_s: Mapping[str, float]
    """By stage, the longest time between two stored states."""


def undisturbed(folder: Path) -> Whole:
    """Run the sweep to its end without a kill."""
    run = _write(folder, SWEEP)
    watch = Watch(run)
    command = Command(folder, "launch", FILE)
    try:
        _ended(command, watch, END_S)
        _check(command.wait())
    finally:
        command.end()
    return Whole(SWEEP, run, time.time() - watch.started, watch.longest_s)


def crash(
    folder: Path, whole: Whole, num_kills: int, draw: random.Random, victims: Sequence[Victim] = VICTIMS
) -> Outcome:
    """Kill processes of sweeps at random moments until there were enough kills.

    Args:
        folder: receives a folder for each sweep.
        whole: the sweep to compare with.
        num_kills: number of kills in all sweeps together, >= 1.
        draw: draws victims and moments.
        victims: kinds of processes to kill.

    Raises:
        RuntimeError: a launch that nobody disturbed failed.
    """
    contents = Contents.of(whole.run)
    kills: list[Kill] = []
    differences: list[Difference] = []
    untold: list[str] = []
    num_launches = 0
    while len(kills) < num_kills:
        own = folder / f"sweep-{len(differences)}"
        run = _write(own, whole.text)
        is_complete = False
        while not is_complete:
            num_launches += 1
            answer, further = _launch_and_kill(own, run, draw, whole.seconds, num_kills - len(kills), victims)
            kills += further
            if not further:
                _check(answer)
            elif answer.code not in (0, RESUMABLE, -signal.SIGKILL):
                untold.append(f"{answer.code}: {answer.err}")
            is_complete = answer.code == 0
        differences.append(Difference.between(Contents.of(run), contents))
    return Outcome(tuple(kills), tuple(differences), num_launches, tuple(untold), whole.longest_s)


def _launch_and_kill(
    folder: Path, run: RunDir, draw: random.Random, longest_s: float, num_left: int, victims: Sequence[Victim]
) -> tuple[Answer, list[Kill]]:
    """Launch the sweep once, with up to `num_left` kills; returns its answer, and the kills."""
    watch = Watch(run)
    kills: list[Kill] = []
    command = Command(folder, "launch", FILE)
    try:
        while len(kills) < num_left and not _ended(command, watch, draw.uniform(EARLIEST_S, longest_s)):
            victim, pid = _chosen(command, draw, victims)
            kill = Kill(victim.name, watch.stage, watch.redone_s())
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:  # it ended by itself in the meantime
                continue
            kills.append(kill)
            if victim.ends_launch:
                break
        return command.wait(END_S), kills
    finally:
        command.end()


def _chosen(command: Command, draw: random.Random, victims: Sequence[Victim]) -> tuple[Victim, int]:
    """A kind of process that is there, and one of its processes; the supervisor if none is."""
    for victim in draw.sample(victims, len(victims)):
        if pids := victim.pids(command):
            return victim, draw.choice(sorted(pids))
    return SUPERVISOR, command.process.pid


def children(pid: int) -> list[int]:
    """The processes that a process without threads has started; empty if it has ended."""
    with suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _ended(command: Command, watch: Watch, seconds: float) -> bool:
    """Wait until a launch has ended or the time is over; returns whether it has ended."""
    deadline = time.monotonic() + seconds
    while command.process.poll() is None and time.monotonic() < deadline:
        watch.look()
        time.sleep(0.02)
    return command.process.poll() is not None


def _check(answer: Answer) -> None:
    if answer.code != 0:
        raise RuntimeError(f"a launch that nobody disturbed ended with exit code {answer.code}:\n{answer.err}")


def _write(folder: Path, text: str) -> RunDir:
    folder.mkdir(parents=True)
    (folder / FILE).write_text(text, encoding="utf-8")
    return RunDir(folder / "runs", NAME)


def _command_lines(command: Command) -> Iterator[tuple[int, str]]:
    for pid in command.pids():
        with suppress(OSError):
            yield pid, Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _files(run: RunDir) -> Iterator[tuple[str, Any]]:
    """Hashes of the files that hold no measured times."""
    for pattern in ("supernet/*/final.safetensors", "table/*/*.safetensors", "search/*/gates/*.safetensors"):
        for path in sorted(run.path.glob(pattern)):
            yield str(path.relative_to(run.path)), file_sha256(path)


def _trials(run: RunDir) -> Iterator[tuple[str, Any]]:
    results = RunResults(run)
    for record in results.records:
        yield f"trial {record.slot}", (record.state, dict(record.params), _timeless(record), record.reason)
    yield "front", results.front
    if results.verified is not None:
        yield "verified", (results.verified.val, results.verified.test)


def _timeless(record: TrialRecord) -> dict[str, float]:
    return {name: value for name, value in record.metrics.items() if not name.startswith(TIMES)}


def _curves(run: RunDir) -> Iterator[tuple[str, Any]]:
    for path in sorted(run.path.glob("*/*/curves.jsonl")):
        for line in read_json_lines(path):
            for name, value in line["metrics"].items():
                yield f"{path.relative_to(run.path)}: {name} at step {line['step']}", value


_ROWS = """
SELECT uid.value, metrics.key, metrics.step, metrics.value
FROM metrics JOIN tags AS uid ON uid.run_uuid = metrics.run_uuid AND uid.key = 'uid'
"""
_STATES = "SELECT uid.value, runs.status FROM runs JOIN tags AS uid ON uid.run_uuid = runs.run_uuid AND uid.key = 'uid'"


def _rows(run: RunDir) -> Iterator[tuple[str, Any]]:
    """Every value in MLflow's database; the random part of a sweep's uid is left out."""
    with closing(sqlite3.connect(f"file:{run.root / MLFLOW_DATABASE}?mode=ro", uri=True)) as database:
        for uid, key, step, value in database.execute(_ROWS):
            if not key.startswith(TIMES):
                yield f"mlflow {_stable(uid)}: {key} at step {step}", value
        for uid, status in database.execute(_STATES):
            yield f"mlflow {_stable(uid)}: status", status


def _stable(uid: str) -> str:
    """A row's uid without the id of its run, which each run draws anew."""
    name, _, rest = uid.partition("/")
    return f"{name}/{rest.partition('/')[2]}"


def measure(options: Options, kills: int | None, folder: Path | None) -> Report:
    """Run the sweeps, and count what was lost.

    Args:
        options: the common options; the seed is that of victims and moments.
        kills: number of kills; None = 50, or 4 with `--quick`.
        folder: receives the sweeps; None = a temporary one.
    """
    number = kills if kills is not None else NUM_QUICK_KILLS if options.quick else NUM_KILLS
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary) if folder is None else folder
        outcome = crash(place, undisturbed(place / "whole"), number, random.Random(options.seed))
    return Report(_sections(outcome), _headline(outcome), _figures(outcome))


def _sections(outcome: Outcome) -> list[Section]:
    totals = [[what, str(outcome.count(what))] for what in ("lost", "duplicated", "changed")]
    totals.append(["launches that ended without saying that the next one continues", str(len(outcome.untold))])
    rows = []
    for stage in sorted({kill.stage for kill in outcome.kills}):
        own = [kill for kill in outcome.kills if kill.stage == stage]
        redone = [kill.redone_s for kill in own]
        step = outcome.longest_s.get(stage)
        rows.append(
            [
                stage,
                ", ".join(f"{count} {name}" for name, count in sorted(Counter(kill.victim for kill in own).items())),
                f"{np.median(redone):.2f}",
                f"{max(redone):.2f}",
                "" if step is None else f"{step:.2f}",
            ]
        )
    title = f"{len(outcome.kills)} kills in {len(outcome.differences)} sweeps, {outcome.num_launches} launches"
    return [
        Section(f"stored values, {title}", ("", "number"), totals),
        Section(
            "work done again",
            ("stage", "kills", "redone s, median", "longest", "longest step of the undisturbed"),
            rows,
        ),
    ]


def _headline(outcome: Outcome) -> Headline:
    share = outcome.worst_share()
    return Headline("longest work done again, in steps (epoch, cohort or stage)", Estimate.exact(share), "", 1.0)


def _figures(outcome: Outcome) -> dict[str, Any]:
    return {
        "kills": [asdict(kill) for kill in outcome.kills],
        "differences": [asdict(difference) for difference in outcome.differences],
        "num_launches": outcome.num_launches,
        "untold": outcome.untold,
        "longest_step_s": dict(outcome.longest_s),
    }


def main() -> None:
    """Run the benchmark from the command line."""
    run_benchmark(
        BENCHMARK,
        measure,
        params=[
            click.Option(["--kills"], type=click.IntRange(1), help="Number of kills; default 50, with --quick 4."),
            click.Option(
                ["--folder"],
                type=click.Path(path_type=Path),
                help="Keep the sweeps in this new folder, to look at them.",
            ),
        ],
    )


if __name__ == "__main__":
    main()
