"""The run folder: where everything lies, who drives it, and what is recorded about it."""

from __future__ import annotations

import difflib
import json
import os
import platform
import re
import secrets
import socket
import sys
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from dsnet.arithmetic import arithmetic_facts
from dsnet.environment import installed_versions as versions_of
from dsnet.errors import CheckpointError, ConfigError, LockedError, NotFoundError, PreflightError
from dsnet.files import atomic_write_json, exclusive, read_json

RUN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
MLFLOW_DATABASE = "mlflow.db"
MLFLOW_ARTIFACTS = "mlruns-artifacts"
KEY_CHARACTERS = 12
"""Characters of a stage key that name its folder."""

RECORDED_PACKAGES = (
    "dsnet-orch", "torch", "numpy", "ray", "optuna", "mlflow", "pandas", "plotly", "pyarrow", "safetensors",
    "scikit-learn", "Pillow", "pydantic", "moocore",
)  # fmt: skip
_MANIFEST_SCHEMA = 1


def now_iso() -> str:
    """The present moment in UTC, ISO 8601, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class RunDir:
    """Paths of one run below the runs folder. Nothing is created or read until a method says so.

    Args:
        root: The runs folder (`storage.runs`).
        name: The run's name: 1 to 64 of `A-Z a-z 0-9 . _ -`, not starting with a dot.

    Raises:
        ConfigError: The name cannot be a folder's name.
    """

    def __init__(self, root: Path, name: str) -> None:
        if not RUN_NAME.fullmatch(name) or name == MLFLOW_ARTIFACTS:
            raise ConfigError(
                f"name: {name!r} cannot name a run; use 1 to 64 letters, digits, '.', '_' or '-', "
                f"not starting with '.', and not {MLFLOW_ARTIFACTS!r}."
            )
        self.root = root.expanduser().absolute()
        self.name = name
        self.path = self.root / name

    def create(self) -> None:
        """Make the run folder where it is missing; an existing one is kept as it is.

        Raises:
            PreflightError: The runs folder cannot be written. Nothing is left behind.
        """
        made: list[Path] = []
        try:
            for folder in [*reversed(self.root.parents), self.root, self.path]:
                if not folder.exists():
                    folder.mkdir(exist_ok=True)
                    made.append(folder)
            _probe_writable(self.path)
        except OSError as error:
            for folder in reversed(made):
                with suppress(OSError):
                    folder.rmdir()
            raise PreflightError(
                f"storage.runs: cannot write run {self.name!r} below {self.root}: {error.strerror or error}. "
                "Choose another folder with --set storage.runs=FOLDER, or mend its permissions."
            ) from error

    def open_existing(self) -> None:
        """Check that the run exists.

        Raises:
            NotFoundError: It does not; the message lists the runs that do.
        """
        if not self.manifest_path.is_file():
            known = list_runs(self.root)
            close = difflib.get_close_matches(self.name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            listed = f"runs there: {', '.join(known)}" if known else "there are no runs there"
            way_out = "" if known else f"; `dsnet-orch launch {self.name}.yaml` makes it"
            raise NotFoundError(f"no run {self.name!r} in {self.root}{hint} ({listed}){way_out}")

    # Files of the run as a whole.
    @property
    def sweep_yaml(self) -> Path:
        return self.path / "sweep.yaml"

    @property
    def manifest_path(self) -> Path:
        return self.path / "manifest.json"

    @property
    def lock_path(self) -> Path:
        return self.path / "driver.lock"

    @property
    def stop_path(self) -> Path:
        return self.path / "stop"

    @property
    def progress_json(self) -> Path:
        """How far the newest task of a launch has come (`orchestration.progress`)."""
        return self.path / "progress.json"

    @property
    def splits_json(self) -> Path:
        return self.path / "data" / "splits.json"

    @property
    def points_parquet(self) -> Path:
        return self.path / "points.parquet"

    @property
    def report_html(self) -> Path:
        return self.path / "report.html"

    @property
    def front_png(self) -> Path:
        return self.path / "front.png"

    @property
    def export_dir(self) -> Path:
        return self.path / "export"

    # Files of a sweep of supernets.
    @property
    def supernets_json(self) -> Path:
        """The members of a sweep of supernets; other runs have none."""
        return self.path / "supernets.json"

    @property
    def supernets_dir(self) -> Path:
        """The runs folder of its members."""
        return self.path / "supernets"

    @property
    def tune_dir(self) -> Path:
        """What the supernets reported while they trained."""
        return self.path / "tune"

    @property
    def merged_journal(self) -> Path:
        """All its trials in one study."""
        return self.path / "study.journal"

    @property
    def front_json(self) -> Path:
        """The front over all supernets, frozen before `test` was opened."""
        return self.path / "front.json"

    # Files of a stage; `key` is the whole stage key.
    def stage_dir(self, stage: str, key: str) -> Path:
        return self.path / stage / key[:KEY_CHARACTERS]

    def curves_jsonl(self, key: str) -> Path:
        return self.stage_dir("supernet", key) / "curves.jsonl"

    def subnets_json(self, key: str) -> Path:
        return self.stage_dir("measure", key) / "subnets.json"

    def latency_json(self, key: str, device: str = "") -> Path:
        """The latency table of the main device, or of one of `measure.devices`."""
        return self.stage_dir("measure", key) / (f"latency-{device}.json" if device else "latency.json")

    def timed_again_json(self, key: str) -> Path:
        """What `dsnet-orch measure` found for a result of the measure stage."""
        return self.stage_dir("measure", key) / "timed_again.json"

    def table(self, key: str, split: str) -> Path:
        """The routing table of the `gate` or `val` split. The test split's is only behind `sealed_table`."""
        if split not in ("gate", "val"):
            raise ValueError(f"the open tables are 'gate' and 'val', not {split!r}")
        return self.stage_dir("table", key) / f"{split}.safetensors"

    def sealed_table(self, key: str) -> Path:
        """The test split's table. Only verify and report ask for it, and count the opening in the manifest."""
        return self.stage_dir("table", key) / "sealed" / "test.safetensors"

    def study_journal(self, key: str) -> Path:
        return self.stage_dir("search", key) / "study.journal"

    def search_end_json(self, key: str) -> Path:
        """What ended the search, by which rules and after how many trials; written when it ends."""
        return self.stage_dir("search", key) / "end.json"

    def queue_jsonl(self, key: str) -> Path:
        """Points that a person asked for (`orchestration.runs.queue`)."""
        return self.stage_dir("search", key) / "queue.jsonl"

    def gate_weights(self, key: str, slot: int) -> Path:
        return self.stage_dir("search", key) / "gates" / f"slot-{slot:05d}.safetensors"

    def chosen_json(self, key: str) -> Path:
        """In a member of a sweep of supernets: which gates of this search are to run on `test`."""
        return self.stage_dir("search", key) / "chosen.json"

    def verify_json(self, key: str) -> Path:
        return self.stage_dir("verify", key) / "verify.json"

    # A request to stop, from any process that can write the folder.
    def request_stop(self) -> None:
        """Ask the driver to stop at its next step or trial boundary."""
        try:
            self.stop_path.touch()
        except OSError as error:
            raise PreflightError(f"cannot write {self.stop_path}: {error.strerror}.") from error

    def stop_requested(self) -> bool:
        return self.stop_path.exists()

    def clear_stop(self) -> None:
        """Forget an earlier request; the driver calls it when it starts."""
        self.stop_path.unlink(missing_ok=True)


def list_runs(root: Path) -> list[str]:
    """Names of the runs below the runs folder, sorted; empty where there is no such folder."""
    return sorted(manifest.parent.name for manifest in root.expanduser().glob("*/manifest.json"))


def mlflow_store_uri(root: Path) -> str:
    """The default MLflow store: an SQLite database in the runs folder.

    Raises:
        PreflightError: The folder's path cannot be written in a database URI.
    """
    database = root.expanduser().absolute() / MLFLOW_DATABASE
    if set("%?") & set(str(database)):
        raise PreflightError(
            f"storage.runs: MLflow cannot open a database below {root}, whose path holds '%' or '?'; "
            "choose another folder, name a server in tracking.uri, or set tracking.mlflow to false."
        )
    return f"sqlite:///{database}"


def mlflow_artifact_root(root: Path) -> Path:
    """Where the default store keeps artifacts."""
    return root.expanduser().absolute() / MLFLOW_ARTIFACTS


def _probe_writable(folder: Path) -> None:
    probe = folder / f".probe-{os.getpid()}-{secrets.token_hex(4)}"
    probe.touch()
    probe.unlink()


@dataclass(frozen=True)
class LockHolder:
    """Who holds a run folder.

    A pid alone is not an identity: it is used again after the process is gone. With the process's start time (clock
    ticks since boot) and the boot's id it is.
    """

    pid: int
    start_time: int | None
    boot_id: str
    host: str
    command: str
    since: str

    @classmethod
    def this_process(cls, command: str) -> LockHolder:
        pid = os.getpid()
        return cls(pid, process_start_time(pid), _boot_id(), socket.gethostname(), command, now_iso())

    def is_on_another_host(self) -> bool:
        """True unless it surely ran here.

        A lock of the same host name but another boot is ours only if it is older than this boot: a younger one belongs
        to a machine that happens to have the same name.
        """
        if self.host != socket.gethostname():
            return True
        return self.boot_id != _boot_id() and datetime.fromisoformat(self.since).timestamp() >= _boot_time()

    def is_alive(self) -> bool:
        """Whether that very process still runs. Only meaningful on its own host."""
        if self.boot_id != _boot_id():
            return False
        if self.start_time is None:
            return _pid_exists(self.pid)
        return process_start_time(self.pid) == self.start_time

    def __str__(self) -> str:
        since = datetime.fromisoformat(self.since).astimezone().strftime("%Y-%m-%d %H:%M:%S")  # local time
        return f"process {self.pid} on {self.host} since {since} ({self.command})"


class DriverLock:
    """Context manager: at most one driver per run folder.

    Args:
        run: The run; its folder exists.
        command: What the user typed, shown to whoever meets the lock.
        take_over: Also replace a lock of another host, or one that cannot be read. A process known to be alive on this
            host is never robbed.

    Attributes:
        taken_over_from: The dead holder whose lock was replaced, or None.

    Raises:
        LockedError: On entering, when another driver holds the folder.
    """

    def __init__(self, run: RunDir, command: str, *, take_over: bool = False) -> None:
        self._run = run
        self._path = run.lock_path
        self._command = command
        self._take_over = take_over
        self._holder: LockHolder | None = None
        self.taken_over_from: LockHolder | None = None

    def __enter__(self) -> DriverLock:
        with exclusive(self._run.path):
            # `exclusive` orders the processes of this host; hosts sharing the folder are ordered by link(2), which is
            # atomic on network file systems too.
            holder = LockHolder.this_process(self._command)
            if not self._try_create(holder):
                self.taken_over_from = self._holder_to_replace()
                atomic_write_json(self._path, asdict(holder))
            self._holder = holder
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._run.path.is_dir():  # the user may have deleted the run under us; that must not hide `error`
            with exclusive(self._run.path):
                if read_lock(self._path) == self._holder:
                    self._path.unlink()
        self._holder = None

    def _try_create(self, holder: LockHolder) -> bool:
        draft = self._path.with_name(f".{self._path.name}.{holder.pid}")
        atomic_write_json(draft, asdict(holder))
        try:
            os.link(draft, self._path)
        except FileExistsError:
            return False
        except OSError as error:
            raise PreflightError(
                f"cannot create {self._path}: {error.strerror}. The run folder needs a POSIX file system with hard "
                "links; set storage.runs to a folder on a local disk."
            ) from error
        finally:
            draft.unlink()
        return True

    def _holder_to_replace(self) -> LockHolder | None:
        holder = read_lock(self._path)
        if holder is None:
            if self._take_over:
                return None
            if not self._path.exists():
                raise LockedError(f"run {self._run.name!r} was released this very moment; launch again.")
            raise LockedError(
                f"run {self._run.name!r}: {self._path} exists but cannot be read. If no driver is running, "
                "launch again with --take-over."
            )
        if holder.is_on_another_host():
            if not self._take_over:
                raise LockedError(
                    f"run {self._run.name!r} is held by {holder}. Whether it lives cannot be seen from here: "
                    "if it is surely gone, launch again with --take-over."
                )
        elif holder.is_alive():
            raise LockedError(
                f"run {self._run.name!r} is held by {holder}. Wait for it, stop it with `kill -TERM {holder.pid}`, "
                "or launch under another name."
            )
        return holder


def read_lock(path: Path) -> LockHolder | None:
    """The holder recorded in a lock file; None if there is no file or it cannot be understood."""
    try:
        return LockHolder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def process_start_time(pid: int) -> int | None:
    """Clock ticks between boot and the start of a process; None if it is gone, a zombie, or there is no /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field is the command in parentheses and may hold spaces and parentheses itself.
    fields = stat.rpartition(")")[2].split()
    state, start_time = fields[0], int(fields[19])
    return None if state in ("Z", "X") else start_time


def _pid_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _boot_time() -> float:
    """Seconds since the epoch at which this machine started; 0 where that cannot be known."""
    try:
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) for line in lines if line.startswith("btime ")), 0.0)


class Manifest:
    """manifest.json of a run: what made it, and what was done.

    Every change is a read-modify-write under a short file lock, so the driver and a `verify` or `report` beside it
    never lose each other's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self, *, seed: int, hardware: Mapping[str, Any], versions: Mapping[str, str] | None = None) -> None:
        """Write a fresh manifest; that of an earlier launch is kept, and given today's versions and hardware."""
        facts = {"versions": dict(versions or installed_versions()), "seed": seed, "hardware": dict(hardware)}
        if self.path.exists():
            self.update(**facts)
            return
        atomic_write_json(
            self.path,
            {
                "schema": _MANIFEST_SCHEMA,
                "run_id": uuid.uuid4().hex,
                "created_at": now_iso(),
                **facts,
                "data_hashes": {},
                "stages": {},
                "test_openings": 0,
                "test_opened_by": [],
            },
        )

    def read(self) -> dict[str, Any]:
        """The whole manifest.

        Raises:
            CheckpointError: It is missing, torn, or of another schema.
        """
        content = read_json(self.path)
        if not isinstance(content, dict) or content.get("schema") != _MANIFEST_SCHEMA:
            schema = content.get("schema") if isinstance(content, dict) else None
            raise CheckpointError(
                f"{self.path} has schema {schema!r}, but this release reads {_MANIFEST_SCHEMA}. "
                "Launch under another name, or use the release that made it."
            )
        return content

    def update(self, **sections: Any) -> None:
        """Replace whole top-level sections."""
        with exclusive(self.path.parent):
            atomic_write_json(self.path, {**self.read(), **sections})

    def record_stage(self, name: str, record: Mapping[str, Any]) -> None:
        """Set one stage's {key, dir, status, started_at, seconds}."""
        with exclusive(self.path.parent):
            content = self.read()
            content["stages"][name] = dict(record)
            atomic_write_json(self.path, content)

    def count_test_opening(self, who: str) -> int:
        """Record that the sealed test split was read.

        Returns:
            How many times it has been read, this time included.
        """
        with exclusive(self.path.parent):
            content = self.read()
            content["test_openings"] += 1
            content["test_opened_by"].append({"who": who, "at": now_iso()})
            atomic_write_json(self.path, content)
        return int(content["test_openings"])


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the main packages, without importing any of them."""
    return versions_of(RECORDED_PACKAGES)


def describe_hardware(gpu: str | None = None) -> dict[str, Any]:
    """CPU model, usable cores, memory in GiB, MKL's mode, and the GPU's name (which the caller knows, if torch is loaded)."""
    return {
        "cpu": _cpu_model(),
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": gpu,
        "platform": f"{platform.system()} {platform.machine()}",
        "executable": Path(sys.executable).name,
        **arithmetic_facts(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
