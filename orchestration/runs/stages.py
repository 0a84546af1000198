"""Stages: the key of a result (all that it depends on), whether the result is there already, and
why it is not.

A stage's folder is named after its key. A changed configuration thus starts a new folder beside the
old one, and a return to the old configuration finds the old result. An invalidation never
overwrites anything.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from dsnet.dotted import flatten
from dsnet.errors import CheckpointError
from dsnet.files import (
    file_sha256,
    known_sha256,
    plain_value,
    read_sealed,
    reading,
    set_aside,
    understood,
    write_sealed,
    writing,
)
from orchestration.runs.folder import CURVES, RunDir
from orchestration.runs.manifest import Manifest, now_iso

STAGE_FILE = "stage.json"
DONE_FILE = "done"
KEPT_FILES = (CURVES,)
"""Outputs that are not made again when they are damaged, because the whole stage would have to run
again: the stage stays done without them."""


@dataclass(frozen=True)
class StageDefinition:
    """Everything a stage's result depends on, and nothing else.

    Ray, the number of workers, the budget, tracking and export must not enter `config`
    (docs/definitions.md, Pipeline and storage).
    """

    name: str
    version: int
    """Version of the stage's code, raised by hand when its results change."""
    config: Mapping[str, Any]
    """The part of the configuration it reads, nested or flat."""
    data_fingerprint: str
    parents: tuple[str, ...] = ()
    """Names of the stages whose output it reads."""


@dataclass(frozen=True)
class StageRecord:
    """Content of stage.json: the key of a stage's folder and everything that entered the key."""

    stage: str
    key: str
    version: int
    config: dict[str, Any]
    """Values by dotted key."""
    data_fingerprint: str
    parent_keys: dict[str, str]
    status: str = "running"
    started_at: str = ""
    num_starts: int = 0
    made_from: dict[str, str] = field(default_factory=dict)
    """For each stage above, a SHA-256 of the weights or tables from which the result was made;
    empty in records of earlier releases."""


@dataclass(frozen=True)
class Damage:
    """An output of a finished stage that is not what the stage wrote."""

    path: Path
    name: str
    """Relative to the stage's folder."""
    reason: str
    """The end of a sentence about the output."""

    def __str__(self) -> str:
        return f"output {self.name} {self.reason}"


@dataclass(frozen=True)
class StagePlan:
    """The plan of a launch for one stage, and the reasons."""

    record: StageRecord
    status: Literal["done", "resume", "run", "invalidated"]
    reasons: tuple[str, ...]
    """Empty when done. For `invalidated`: the differences from the newest earlier result of this
    stage."""
    folder: StageDir

    @property
    def name(self) -> str:
        return self.record.stage

    @property
    def key(self) -> str:
        return self.record.key

    @property
    def is_done(self) -> bool:
        return self.status == "done"


def stage_key(
    stage: str, version: int, config_subset: Mapping[str, Any], data_fingerprint: str, parent_keys: Sequence[str]
) -> str:
    """The stage's identity: sha256 over the canonical JSON of all it depends on, as 64 hex digits.

    The order of mapping keys does not matter, nor whether a subset is nested or dotted, nor whether
    a whole number was written 1 or 1.0.

    Raises:
        ValueError: The subset holds NaN or infinity.
    """
    content = {
        "stage": stage,
        "version": version,
        "config": canonical_settings(config_subset),
        "data": data_fingerprint,
        "parents": list(parent_keys),
    }
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def canonical_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A nested mapping as {dotted key: canonical JSON value}, sorted. An empty mapping is kept as a
    value."""
    return dict(sorted((key, _canonical(value)) for key, value in flatten(config).items()))


def _canonical(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} cannot enter a stage key")
        return int(value) if value.is_integer() else value
    if isinstance(value, Mapping):
        return {str(key): _canonical(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, Sequence):
        return [_canonical(item) for item in value]
    return _canonical(plain_value(value))


class StageDir:
    """A stage's folder: `stage.json` from the start, `done` when its outputs are complete.

    A stage works inside the folder (the supernet resumes from its checkpoints there), so only the
    marker, written last and atomically, shows that the outputs are complete. It holds size and
    SHA-256 of every output. Outputs that were found damaged are listed there as lost until the
    stage has made them again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def stage_json(self) -> Path:
        return self.path / STAGE_FILE

    @property
    def done_marker(self) -> Path:
        return self.path / DONE_FILE

    def begin(self, record: StageRecord) -> StageRecord:
        """Create the folder, or continue in it; damaged outputs are set aside, and an earlier
        `done` marker is removed first, unless it says which outputs are intact.

        Returns:
            The record as written: running, with its start time.
        """
        earlier = self.record()
        if earlier is not None and earlier.key != record.key:
            raise CheckpointError(
                f"{self.stage_json} records key {earlier.key}, not {record.key}; the folder was copied or renamed. "
                "Move it away and launch again."
            )
        with writing(self.path):
            for folder in (self.path.parent, self.path):  # no further: a run folder that was deleted stays deleted
                folder.mkdir(exist_ok=True)
            self.mend()
            if self.done_marker.exists() and not self._lost():
                self.done_marker.unlink()
        num_starts = 1 + (earlier.num_starts if earlier else 0)
        started = replace(record, status="running", started_at=now_iso(), num_starts=num_starts)
        write_sealed(self.stage_json, asdict(started))
        return started

    def finish(self, outputs: Sequence[Path], seconds: float) -> None:
        """Mark the stage done.

        Args:
            outputs: Files below the folder that make up the result and will not change any more.
            seconds: Wall-clock time of the work.

        Raises:
            CheckpointError: An output is missing.
        """
        files = {}
        for path in sorted(outputs):
            relative = path.relative_to(self.path).as_posix()
            files[relative] = {"bytes": _size(path), "sha256": file_sha256(path)}
        write_sealed(self.done_marker, {"finished_at": now_iso(), "seconds": round(seconds, 3), "files": files})
        record = self.record()
        if record is not None:
            write_sealed(self.stage_json, asdict(replace(record, status="done")))

    def record(self) -> StageRecord | None:
        """The content of stage.json; None if the stage never began.

        Raises:
            CheckpointError: The file is damaged.
        """
        if not self.stage_json.exists():
            return None
        content = read_sealed(self.stage_json)
        with understood(self.stage_json):
            return StageRecord(**content)

    def outputs(self) -> dict[str, Path]:
        """Paths of the finished stage's files by relative name; empty while it is not done."""
        return {name: self.path / name for name in self._marked_files()}

    def intact_outputs(self) -> dict[str, Path]:
        """Paths of the outputs that a stage need not make again, by relative name: those that are
        intact while others of a finished stage were lost."""
        damaged = {item.name for item in self.damage()}
        return {name: path for name, path in self.outputs().items() if name not in damaged} if self._lost() else {}

    def seconds(self) -> float | None:
        """Wall-clock time of the finished work (of its last start); None while it is not done."""
        if not self.done_marker.exists():
            return None
        content = read_sealed(self.done_marker)
        with understood(self.done_marker):
            return float(content["seconds"])

    def is_done(self) -> bool:
        """Whether the marker is there and every file that it lists is what the stage wrote."""
        return self.is_marked() and not self.damage()

    def is_marked(self) -> bool:
        """Whether the stage has finished, whatever became of its files since."""
        return self.done_marker.exists() and not self._lost()

    def damage(self) -> tuple[Damage, ...]:
        """Outputs of a marked stage that are missing, or have another size or SHA-256 than was
        recorded; each file is read once per process.

        Raises:
            CheckpointError: The marker is damaged.
        """
        problems = []
        for name, facts in self._marked_files().items():
            path = self.path / name
            with understood(self.done_marker):
                size, sha256 = int(facts["bytes"]), str(facts["sha256"])
            if not path.is_file():
                problems.append(Damage(path, name, "is missing"))
            elif path.stat().st_size != size:
                problems.append(Damage(path, name, f"has {path.stat().st_size} bytes, not {size}"))
            elif known_sha256(path) != sha256:
                problems.append(Damage(path, name, "has another SHA-256 than its stage recorded"))
        return tuple(problems)

    def check(self) -> None:
        """Compare every output with its record.

        Raises:
            CheckpointError: One differs, or is missing; the message names the file.
        """
        damage = self.damage()
        if damage:
            first, others = damage[0], [str(item.path) for item in damage[1:]]
            also = f" (and so is it with {', '.join(others)})" if others else ""
            raise CheckpointError(
                f"{first.path} {first.reason}{also}: it is not what the stage wrote. Restore it from a copy; or launch the "
                f"sweep again, which keeps the damaged file as {first.path.name}.damaged-1 and makes it again."
            )

    def mend(self) -> list[str]:
        """Set damaged outputs aside, and list them as lost, so that the stage makes them again; a
        damaged `done` or `stage.json` is set aside too. Only for the process that holds the run's
        lock.

        Returns:
            What was found, a sentence per file.
        """
        told = []
        for path, read, then in (
            (self.stage_json, self.record, "written again"),
            (self.done_marker, self.damage, "written again when the stage has run again from the files that it left"),
        ):
            try:
                read()
            except CheckpointError as error:
                told.append(f"{error} It is kept as {set_aside(path).name}, and {then}")
        damage = self.damage()
        if not damage:
            return told
        content = read_sealed(self.done_marker)
        for item in damage:
            if item.name not in content["files"]:  # lost with the other part of its checkpoint
                continue
            kept = f"; it is kept as {set_aside(item.path).name}" if item.path.exists() else ""
            facts = content["files"].pop(item.name)
            if item.name in KEPT_FILES:
                told.append(
                    f"{item.path} {item.reason}{kept}. It cannot be made again without training again, so the report is "
                    f"without it; to have it back, restore it from a copy before the next launch, or delete {self.path}"
                )
                continue
            content.setdefault("lost", {})[item.name] = facts
            told.append(f"{item.path} {item.reason}{kept}; it is made again")
            # The JSON file of a checkpoint says that its tensors are complete.
            meta = item.path.with_suffix(".json")
            name = meta.relative_to(self.path).as_posix()
            if item.path.suffix == ".safetensors" and name in content["files"]:
                content["lost"][name] = content["files"].pop(name)
                meta.unlink(missing_ok=True)
        write_sealed(self.done_marker, content)
        return told

    def tensors_sha256(self) -> str | None:
        """SHA-256 over those of all tensor files among the outputs; None if there are none."""
        files = {name: facts["sha256"] for name, facts in self._marked_files().items() if name.endswith(".safetensors")}
        return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest() if files else None

    def recorded_sha256(self, name: str) -> str | None:
        """The recorded SHA-256 of an output; None if the stage is not done or the record cannot be
        read."""
        try:
            facts = self._marked_files().get(name, {})
        except CheckpointError:  # `mend` sets the marker aside
            return None
        return facts.get("sha256")

    def reopen(self) -> None:
        """Remove the `done` marker, so that the stage continues."""
        self.done_marker.unlink(missing_ok=True)

    def _lost(self) -> dict[str, Any]:
        """Outputs that were set aside and not made again yet, with their records."""
        if not self.done_marker.exists():
            return {}
        content = read_sealed(self.done_marker)
        with understood(self.done_marker):
            return dict(content.get("lost", {}))

    def _marked_files(self) -> dict[str, dict[str, Any]]:
        if not self.done_marker.exists():
            return {}
        content = read_sealed(self.done_marker)
        with understood(self.done_marker):
            return {str(name): dict(facts) for name, facts in dict(content["files"]).items()}


def _size(path: Path) -> int:
    with reading(path):
        return path.stat().st_size


def plan_stages(run: RunDir, definitions: Sequence[StageDefinition]) -> list[StagePlan]:
    """Plan each stage; reads the run folder and writes nothing.

    Args:
        run: The run, which need not exist yet.
        definitions: In order: a stage after all its parents.
    """
    records: dict[str, StageRecord] = {}
    plans = []
    for definition in definitions:
        record = stage_record(definition, {name: records[name].key for name in definition.parents})
        records[definition.name] = record
        plans.append(_plan_one(run, record))
    return plans


def plan_stage(run: RunDir, definition: StageDefinition, parent_keys: Mapping[str, str]) -> StagePlan:
    """Plan one stage whose parents have these keys."""
    return _plan_one(run, stage_record(definition, parent_keys))


def stage_record(definition: StageDefinition, parent_keys: Mapping[str, str]) -> StageRecord:
    """The record with which a stage with these parents would begin."""
    key = stage_key(
        definition.name,
        definition.version,
        definition.config,
        definition.data_fingerprint,
        [parent_keys[name] for name in definition.parents],
    )
    return StageRecord(
        stage=definition.name,
        key=key,
        version=definition.version,
        config=canonical_settings(definition.config),
        data_fingerprint=definition.data_fingerprint,
        parent_keys=dict(parent_keys),
    )


def _plan_one(run: RunDir, record: StageRecord) -> StagePlan:
    folder = StageDir(run.stage_dir(record.stage, record.key))

    def plan(status: Literal["done", "resume", "run", "invalidated"], *reasons: str) -> StagePlan:
        return StagePlan(record, status, reasons, folder)

    if folder.is_done():
        return plan("done")
    if damage := folder.damage():
        return plan("resume", *map(str, damage))
    if folder.record() is not None:
        return plan("resume", "it began but did not finish")
    earlier = newest_record(run.path / record.stage)
    if earlier is None:
        return plan("run", "it has not run yet")
    return plan("invalidated", *differences(earlier, record))


def newest_record(stage_root: Path) -> StageRecord | None:
    """The record of the stage's most recently started folder."""
    records = [record for folder in stage_root.glob("*/") if (record := StageDir(folder).record()) is not None]
    return max(records, key=lambda record: record.started_at, default=None)


_DIGEST = re.compile(r"\b[0-9a-f]{64}\b")
_DIGESTED = {
    "layout": "the network's layout",
    "start": "the start weights",
    "bases": "what trains to choose sub-networks",
}
"""Keys whose value holds a SHA-256 -> what it is of, for messages."""


def differences(old: StageRecord, new: StageRecord) -> tuple[str, ...]:
    """Why the keys of two records differ: configuration keys, code version, data, parents."""
    return tuple(_differences(old, new))


def _differences(old: StageRecord, new: StageRecord) -> Iterator[str]:
    for key in sorted(old.config.keys() | new.config.keys()):
        before, after = (record.config.get(key, "(absent)") for record in (old, new))
        if before == after:
            continue
        if any(_DIGEST.search(str(value)) for value in (before, after)):  # its digits say nothing
            yield f"{_DIGESTED.get(key, key)} changed"
        else:
            yield f"{key}: {_shown(before)} -> {_shown(after)}"
    if old.version != new.version:
        yield f"the stage's code changed: version {old.version} -> {new.version}"
    if old.data_fingerprint != new.data_fingerprint:
        yield "the data changed"
    for name, parent_key in new.parent_keys.items():
        if old.parent_keys.get(name) != parent_key:
            yield f"it reads the {name} stage, which changed"


def _shown(value: Any) -> str:
    return value if value == "(absent)" else json.dumps(value, ensure_ascii=False)


def mend_stages(run: RunDir) -> list[str]:
    """Set aside the damaged outputs of the run's present stages, so that a launch makes them again.

    Only for the process that holds the run's lock.

    Returns:
        What was found, a sentence per file.
    """
    manifest, told = Manifest(run.manifest_path), []
    for name, entry in manifest.read()["stages"].items():
        folder = StageDir(run.stage_dir(name, entry["key"]))
        told += folder.mend()
        if entry["status"] == "done" and not (folder.is_done() and folder.stage_json.exists()):
            manifest.record_stage(name, {**entry, "status": "running", "seconds": None})
    return told


def run_stage(run: RunDir, plan: StagePlan, work: Callable[[Path], Sequence[Path]]) -> StageDir:
    """Run a planned stage unless it is done, and record it in its folder and in the manifest.

    Args:
        run: The run, with its manifest written and its lock held.
        plan: From `plan_stages`.
        work: Does the work in the folder it is given, and returns its output files. It may find its
            own unfinished files there and continue from them.

    Returns:
        The stage's folder, done.
    """
    if plan.is_done:
        check_origins(run, plan.folder)
        record_done(run, plan)
        return plan.folder
    begin_stage(run, plan)
    clock_start = time.monotonic()
    outputs = work(plan.folder.path)
    finish_stage(run, plan, outputs, time.monotonic() - clock_start)
    return plan.folder


def check_origins(run: RunDir, folder: StageDir) -> None:
    """Compare the weights and tables above a stage with those from which it was made: a damaged
    supernet that was trained again may have other bits on a GPU, or on another processor.

    Raises:
        CheckpointError: they differ; the message names the folders to delete.
    """
    record = folder.record()
    if record is None:
        return
    now = _origins(run, record)
    for name, sha256 in record.made_from.items():
        if name in now and now[name] != sha256:
            raise CheckpointError(
                f"{folder.path}: was made from other files than the {name} stage has now; that stage was made again, with other "
                f"bits, on this machine. Restore the {name} stage from a copy, or delete {folder.path} and launch again."
            )


def _origins(run: RunDir, record: StageRecord) -> dict[str, str]:
    """SHA-256 of the weights and tables of all stages above one that are complete."""
    origins: dict[str, str] = {}
    for name, key in record.parent_keys.items():
        parent = StageDir(run.stage_dir(name, key))
        above = parent.record()
        origins |= {} if above is None else _origins(run, above)
        sha256 = parent.tensors_sha256() if parent.is_marked() else None
        origins |= {} if sha256 is None else {name: sha256}
    return origins


def begin_stage(run: RunDir, plan: StagePlan) -> None:
    """Record in folder and manifest that a stage runs; for work that does not fit into one call,
    such as supernets that train side by side.

    Raises:
        CheckpointError: an output of a stage that it reads is not what that stage wrote.
    """
    for parent, key in plan.record.parent_keys.items():
        StageDir(run.stage_dir(parent, key)).check()
    check_origins(run, plan.folder)
    started = plan.folder.begin(replace(plan.record, made_from=_origins(run, plan.record)))
    Manifest(run.manifest_path).record_stage(plan.name, _manifest_entry(run, plan, "running", started.started_at, None))


def finish_stage(run: RunDir, plan: StagePlan, outputs: Sequence[Path], seconds: float) -> None:
    """Record that a stage is done; arguments as for `StageDir.finish`."""
    plan.folder.finish(outputs, seconds)
    record_done(run, plan)


def record_done(run: RunDir, plan: StagePlan) -> None:
    """Record a finished stage in the manifest if it is not there: after a kill before this, or a
    return to an earlier configuration."""
    manifest = Manifest(run.manifest_path)
    record = plan.folder.record()
    if record is None:  # it was lost; everything in it but the time of the start is known
        began = manifest.read()["stages"].get(plan.name, {}).get("started_at", "")
        record = replace(plan.record, status="done", started_at=began, num_starts=1)
        write_sealed(plan.folder.stage_json, asdict(record))
    started_at = record.started_at
    entry = _manifest_entry(run, plan, "done", started_at, plan.folder.seconds())
    if manifest.read()["stages"].get(plan.name) != entry:
        manifest.record_stage(plan.name, entry)


def _manifest_entry(
    run: RunDir, plan: StagePlan, status: str, started_at: str, seconds: float | None
) -> dict[str, Any]:
    folder = plan.folder.path.relative_to(run.path).as_posix()
    return {"key": plan.key, "dir": folder, "status": status, "started_at": started_at, "seconds": seconds}
