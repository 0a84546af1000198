"""A tiny sweep, the real command line inside this process or in one of its own, and what a process
leaves on the machine."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.processes import Answer, Command
from dsnet.files import file_sha256
from orchestration.cli import main
from orchestration.progress import Bar, Task
from orchestration.results.run import RunResults
from orchestration.runs.folder import RunDir
from orchestration.runs.manifest import Manifest
from tests.hostile import write_hostile_modules

ONLY_BUNDLES = "export: {formats: [bundle]}\n"
"""Graphs for inference engines take seconds; few tests need them."""
TINY = f"""\
version: 1
name: tiny
data: {{name: digits, limit: 200}}
supernet:
  model: ds_tiny
  options: {{num_routes: 3}}
  train: {{epochs: 8, batch_size: 40, warmup_epochs: 0.5}}
  bootstrapping: {{teacher_min_updates: 2}}
measure: {{batch_sizes: [1, 8], group_sizes: [1, 8], repeats: 2, warmup: 1, devices: {{two: {{threads: 2}}}}}}
gate:
  router: gate
  optimizer: {{steps: 60, batch_size: 128}}
sampler: {{cohort: 4, startup: 8}}
budget: {{trials: 12}}
ray: {{trial_actors: 1}}
{ONLY_BUNDLES}"""
SWEEP = "tiny.yaml"
WITHOUT_MLFLOW = ("--set", "tracking.mlflow=false")
HOME = "home"
"""Name of the home folder of the finished sweep, in its folder."""


def write_sweep(folder: Path, text: str = TINY, name: str = SWEEP) -> Path:
    """A sweep file in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def call(folder: Path, *arguments: str | Path) -> Answer:
    """The entry point of `dsnet-orch` inside this process: quick, and a launch shares the tests'
    Ray cluster.

    An exception that the entry point does not handle fails the test.
    """
    out, err, argv, code = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = ["dsnet-orch", *map(str, arguments)]
    try:
        with chdir(folder), redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else 0
    finally:
        sys.argv = argv
    return Answer(code, out.getvalue(), err.getvalue())


class Listeners:
    """Collects, in a thread, the addresses at which a command's processes listen while it runs, and
    those to which they connect or try to: also an attempt that nobody answers, which lasts a second
    or longer."""

    def __init__(self, command: Command, interval_s: float = 0.7) -> None:
        self.addresses: set[str] = set()
        self.remotes: set[str] = set()
        self._command = command
        self._interval_s = interval_s
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> frozenset[str]:
        """All addresses seen."""
        self._is_over.set()
        self._thread.join()
        return frozenset(self.addresses)

    def _watch(self) -> None:
        while not self._is_over.wait(self._interval_s):
            inodes = {inode for pid in self._command.pids() for inode in _socket_inodes(pid)}
            listening, connected = _sockets()
            self.addresses |= {address for inode, address in listening.items() if inode in inodes}
            self.remotes |= {address for inode, address in connected.items() if inode in inodes}


def _socket_inodes(pid: int) -> set[str]:
    inodes = set()
    with suppress(OSError):
        for entry in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                target = os.readlink(f"/proc/{pid}/fd/{entry}")
                if target.startswith("socket:["):
                    inodes.add(target[8:-1])
    return inodes


def _sockets() -> tuple[dict[str, str], dict[str, str]]:
    """Inode -> address of every listening TCP socket of the machine, and the remote address of
    every other socket that has one, as /proc writes them."""
    listening, connected = {}, {}
    for table in ("tcp", "tcp6", "udp", "udp6"):
        with suppress(OSError):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and table.startswith("tcp"):
                    listening[fields[9]] = fields[1].partition(":")[0]
                elif set(remote := fields[2].partition(":")[0]) != {"0"}:
                    connected[fields[9]] = remote
    return listening, connected


AT_WORK = shutil.ignore_patterns("driver.lock", "mlflow.db-*")
"""Files that exist only while a launch runs; another process of the tests may launch the finished
sweep again, which changes nothing else."""
LOOPBACK = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")
"""127.0.0.1, ::1 and ::ffff:127.0.0.1 as /proc writes them on a little-endian machine."""


@dataclass(frozen=True)
class Finished:
    """A sweep that ran to its end in a process of its own."""

    folder: Path
    """Holds the sweep file and `runs/`; only to be read."""
    answer: Answer
    listeners: frozenset[str]
    remotes: frozenset[str]
    left_behind: tuple[str, ...]

    @property
    def run(self) -> RunDir:
        """Its run folder."""
        return RunDir(self.folder / "runs", "tiny")

    @property
    def results(self) -> RunResults:
        """The results of the sweep."""
        return RunResults(self.run)

    def save(self, path: Path) -> None:
        """Write what the command answered, for other processes of the tests."""
        facts = asdict(self) | {
            "folder": str(self.folder),
            "listeners": sorted(self.listeners),
            "remotes": sorted(self.remotes),
        }
        path.write_text(json.dumps(facts), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Finished:
        """See `save`."""
        facts = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            Path(facts["folder"]),
            Answer(**facts["answer"]),
            frozenset(facts["listeners"]),
            frozenset(facts["remotes"]),
            tuple(facts["left_behind"]),
        )

    def copy(self, folder: Path) -> Path:
        """A copy that a test may change: `folder` with the sweep file and `runs/`, MLflow left
        out."""
        write_sweep(folder)
        shutil.copytree(self.run.path, folder / "runs" / "tiny", symlinks=True, ignore=AT_WORK)
        return folder


def run_tiny_sweep(folder: Path) -> Finished:
    """Launch the tiny sweep and wait for its end, in a folder whose modules have the names of ours
    and of what we need, with an empty home folder."""
    write_sweep(folder)
    home = folder / HOME
    home.mkdir(exist_ok=True)
    write_hostile_modules(folder)
    command = Command(folder, "launch", SWEEP, python_path=[folder], variables={"HOME": str(home)})
    listeners = Listeners(command)
    try:
        answer = command.wait()
        addresses = listeners.stop()
        return Finished(folder, answer, addresses, frozenset(listeners.remotes), tuple(command.left_behind()))
    finally:
        listeners.stop()
        command.end()


def results_in(folder: Path, name: str = "tiny") -> RunResults:
    """The results of a run below `folder`/runs."""
    return RunResults(RunDir(folder / "runs", name))


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Relative path -> (size, modification time in ns) of every file below a folder."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def record_config(path: Path) -> None:
    """Make the run's record fit its changed sweep.yaml, as a launch of the changed file would."""
    Manifest(path.with_name("manifest.json")).update(sweep_sha256=[file_sha256(path)])


TIMES = "latency_ms"
"""Prefix of the metrics that differ between runs: latencies of all batch sizes and devices."""


def study_of(results: RunResults) -> list[tuple[Any, ...]]:
    """A study without the values that depend on measured times."""

    def timeless(metrics: Mapping[str, float]) -> dict[str, float]:
        return {name: value for name, value in metrics.items() if not name.startswith(TIMES)}

    return [
        (record.slot, record.state, dict(record.params), timeless(record.metrics), record.reason)
        for record in results.records
    ]


def problems_of_message(answer: Answer, parts: Sequence[str]) -> list[str]:
    """The faults of a refusal: a traceback, an internal error, more than one message, missing
    parts."""
    problems = [f"{bad!r} in stderr" for bad in ("Traceback", "internal error") if bad in answer.err]
    if sum(line.lower().startswith("error:") for line in answer.err.splitlines()) != 1:
        problems.append("not exactly one message")
    problems += [f"{part!r} is not said" for part in parts if part not in answer.err]
    return [*problems, answer.err] if problems else []


class _SilentBar:
    def update(self, done: float, text: str = "") -> None:
        """Nothing."""


class SilentProgress:
    """A progress view that shows nothing and remembers what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        """Remember a line."""
        self.lines.append(text)

    def warn(self, text: str) -> None:
        """Remember a warning."""
        self.lines.append(f"warning: {text}")

    @contextmanager
    def bar(self, task: Task) -> Iterator[Bar]:
        """A bar that shows nothing."""
        yield _SilentBar()
