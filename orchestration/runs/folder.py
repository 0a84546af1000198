"""The run folder: the paths of everything in it."""

from __future__ import annotations

import os
import re
import secrets
from contextlib import suppress
from pathlib import Path

from dsnet.errors import CheckpointError, ConfigError, NotFoundError, PreflightError
from dsnet.wording import did_you_mean

RUN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
MLFLOW_DATABASE = "mlflow.db"
MLFLOW_ARTIFACTS = "mlruns-artifacts"
KNEE = "knee"
"""Name of the link to the bundle of the front's knee, beside the bundles: a path that is known
before the run."""
CURVES = "curves.jsonl"
"""Name of the file with the loss curves of a supernet."""
KEY_CHARACTERS = 12
"""Number of characters of a stage key in the name of its folder."""


class RunDir:
    """Paths of one run below the runs folder. Creating the object touches no file.

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
        """Create the run folder if it is missing; an existing one is kept.

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
                "Choose another folder with --set storage.runs=FOLDER, or change its permissions."
            ) from error

    def open_existing(self) -> None:
        """Check that the run exists.

        Raises:
            NotFoundError: It does not; the message lists the runs that do.
            CheckpointError: Its manifest is missing.
        """
        if not self.manifest_path.is_file():
            if self.sweep_yaml.is_file():
                raise CheckpointError(
                    f"{self.manifest_path} is missing; restore it, or launch the sweep again: its stages are found again, but how "
                    "often test was read is not known any more"
                )
            known = list_runs(self.root)
            hint = did_you_mean(self.name, known)
            listed = f"runs there: {', '.join(known)}" if known else "there are no runs there"
            way_out = "" if known else f"; `dsnet-orch launch {self.name}.yaml` creates it"
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
        """State of the newest task of a launch (see `orchestration.progress`)."""
        return self.path / "progress.json"

    @property
    def unsent_json(self) -> Path:
        """A mark: MLflow lacks rows of the run (see `orchestration.tracking.missing`)."""
        return self.path / "unsent.json"

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
    def knee_bundle(self) -> Path:
        """The link to the bundle of the front's knee."""
        return self.export_dir / KNEE

    @property
    def export_dir(self) -> Path:
        return self.path / "export"

    # Files of a sweep of supernets.
    @property
    def supernets_json(self) -> Path:
        """The members of a sweep of supernets; other runs do not have this file."""
        return self.path / "supernets.json"

    @property
    def supernets_dir(self) -> Path:
        """The runs folder of the members."""
        return self.path / "supernets"

    @property
    def tune_dir(self) -> Path:
        """Ledgers of the supernets' reports while they trained."""
        return self.path / "tune"

    @property
    def merged_journal(self) -> Path:
        """One study with all trials of all members."""
        return self.path / "study.journal"

    @property
    def front_json(self) -> Path:
        """The front over all supernets, frozen before `test` was opened."""
        return self.path / "front.json"

    # Files of a stage; `key` is the whole stage key.
    def stage_dir(self, stage: str, key: str) -> Path:
        return self.path / stage / key[:KEY_CHARACTERS]

    def curves_jsonl(self, key: str) -> Path:
        return self.stage_dir("supernet", key) / CURVES

    def subnets_json(self, key: str) -> Path:
        return self.stage_dir("measure", key) / "subnets.json"

    def latency_json(self, key: str, device: str = "") -> Path:
        """The latency table of the main device, or of one of `measure.devices`."""
        return self.stage_dir("measure", key) / (f"latency-{device}.json" if device else "latency.json")

    def timed_again_json(self, key: str) -> Path:
        """Later timings of `dsnet-orch measure`, beside a result of the measure stage."""
        return self.stage_dir("measure", key) / "timed_again.json"

    def elsewhere_dir(self, key: str) -> Path:
        """Timings of a supernet on other devices, beside its checkpoint; one file for each device,
        engine and number of threads."""
        return self.stage_dir("supernet", key) / "elsewhere"

    def kits_dir(self, key: str) -> Path:
        """Descriptions of the kits of a supernet that were exported to be timed elsewhere."""
        return self.stage_dir("supernet", key) / "kits"

    def table(self, key: str, split: str) -> Path:
        """The routing table of the `gate` or `val` split; that of `test` is behind
        `sealed_table`."""
        if split not in ("gate", "val"):
            raise ValueError(f"the open tables are 'gate' and 'val', not {split!r}")
        return self.stage_dir("table", key) / f"{split}.safetensors"

    def sealed_table(self, key: str) -> Path:
        """The routing table of `test`. Only verify and report call this, and they count the opening
        in the manifest."""
        return self.stage_dir("table", key) / "sealed" / "test.safetensors"

    def study_journal(self, key: str) -> Path:
        return self.stage_dir("search", key) / "study.journal"

    def search_end_json(self, key: str) -> Path:
        """The reason for which the search ended, its rules and its number of trials; written when
        it ends."""
        return self.stage_dir("search", key) / "end.json"

    def queue_jsonl(self, key: str) -> Path:
        """Points that a user enqueued (see `orchestration.runs.queue`)."""
        return self.stage_dir("search", key) / "queue.jsonl"

    def gate_weights(self, key: str, slot: int) -> Path:
        return self.stage_dir("search", key) / "gates" / f"slot-{slot:05d}.safetensors"

    def chosen_json(self, key: str) -> Path:
        """In a member of a sweep of supernets: the gates of this search that run on `test`."""
        return self.stage_dir("search", key) / "chosen.json"

    def verify_json(self, key: str) -> Path:
        return self.stage_dir("verify", key) / "verify.json"

    # Any process that can write the folder asks the driver to stop with the file `stop`.
    def stop_requested(self) -> bool:
        return self.stop_path.exists()

    def clear_stop(self) -> None:
        """Remove an earlier request to stop; the driver calls it when it starts."""
        self.stop_path.unlink(missing_ok=True)


def list_runs(root: Path) -> list[str]:
    """Names of the runs below the runs folder, sorted; empty if there is no such folder."""
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
    """Artifact folder of the default MLflow store."""
    return root.expanduser().absolute() / MLFLOW_ARTIFACTS


def _probe_writable(folder: Path) -> None:
    probe = folder / f".probe-{os.getpid()}-{secrets.token_hex(4)}"
    probe.touch()
    probe.unlink()
