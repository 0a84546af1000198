"""Adoption of results of `python -m dsnet.training` as finished stages, instead of computing them
again.

`supernet.init_from` may name its output folder. If that was trained with this sweep's own settings,
images and network, its files become the outputs of the stages. If anything differs, the folder only
gives start weights.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dsnet.errors import CheckpointError, ConfigError
from dsnet.files import file_sha256, read_object, read_stored, replacing
from dsnet.measure.settings import LatencySettings
from dsnet.space.subnet_set import SubnetSet
from dsnet.standalone.output_folder import OutputFolder
from dsnet.standalone.resolved import StandaloneConfig
from dsnet.stored.names import FINAL, STRUCTURE
from dsnet.structure.settings import StructureSettings
from dsnet.training.supernet_run import SupernetRun
from orchestration.config.supernet import REGIME_KEYS, resolve_regime
from orchestration.config.sweep import SweepConfig
from orchestration.runs.folder import CURVES, RunDir
from orchestration.runs.stages import StagePlan, run_stage


def standalone_config(config: SweepConfig) -> StandaloneConfig:
    """The part of a sweep that `python -m dsnet.training` runs, in its own settings; the same sweep
    can adopt the result.

    Args:
        config: configuration from `prepare`, with defaults derived from the data filled in.
    """
    supernet = config.supernet
    train = supernet.train.model_dump(mode="json", exclude=set(REGIME_KEYS))
    bootstrapping = supernet.bootstrapping.model_dump(mode="json", exclude={"mode", "num_random"})
    kept = ("model", "options", "init_from", "weights", "recalibration", "keep_checkpoints")
    return StandaloneConfig.from_json(
        {
            "seed": config.seed,
            "data": config.data.model_dump(mode="json"),
            "supernet": {
                **supernet.model_dump(mode="json", include=set(kept)),
                "train": train,
                "regime": resolve_regime(supernet).to_json(),
                "bootstrapping": bootstrapping,
                "structure": asdict(supernet.structure.settings()),
            },
            "measure": config.measure.model_dump(mode="json"),
        }
    )


@dataclass(frozen=True)
class Adoption:
    """An output folder whose supernet is the one that a sweep would train."""

    folder: OutputFolder
    origin: Mapping[str, Any]
    """Start weights of that training; empty if it began with fresh ones. They take the place of
    `init_from` in the supernet's key."""
    stages: tuple[str, ...]
    """Names of the stages that can be taken over, always including the supernet."""
    outdated: tuple[str, ...] = ()
    """Names of the stages that another release made with different results; they run again."""


@dataclass(frozen=True)
class Wanted:
    """The supernet that a sweep would train."""

    run: SupernetRun
    """The settings; the origin is ignored."""
    subnets: SubnetSet
    """The sub-networks that the family declares."""
    structure: StructureSettings
    """How sub-networks are chosen, if they are."""
    fingerprint: str
    """Fingerprint of the images and splits."""


def find_adoption(source: Path, wanted: Wanted, measure: LatencySettings) -> Adoption | None:
    """Check whether `init_from` names a finished training of exactly this supernet.

    Args:
        source: `supernet.init_from`.
        wanted: the supernet that the sweep would train.
        measure: measurement settings of the sweep.

    Returns:
        None otherwise, also if another release wrote the folder; the source then gives start
        weights only.

    Raises:
        CheckpointError: a file of the folder is damaged.
    """
    folder = OutputFolder(Path(os.path.expandvars(source)).expanduser())
    if not folder.is_readable() or not folder.is_done("supernet"):
        return None
    meta = read_object(folder.supernet / f"{FINAL}.json")
    settings = read_object(folder.resolved_path)
    try:
        theirs, resolved = SupernetRun.from_json(meta["run"]), StandaloneConfig.from_json(settings)
    except ConfigError:  # another release has other settings
        return None
    is_same = (
        folder.manifest()["data"]["fingerprint"] == wanted.fingerprint
        and resolved.supernet.structure == wanted.structure
        and _has_subnets(meta, wanted)
        and _without_housekeeping(wanted.run) == _without_housekeeping(theirs)
    )
    if not is_same:
        return None
    stages, origin = ["supernet"], theirs.origin
    if wanted.structure.is_chosen:
        if not folder.is_done("structure"):
            return None
        stages.insert(0, "structure")
        path = folder.structure / f"{STRUCTURE}.json"
        origin = read_stored(path, lambda content: dict(content["structure"]["summary"]["origin"]))
    if folder.is_done("measure") and resolved.measure == measure:
        stages.append("measure")
    if folder.is_done("table"):
        stages.append("table")
    outdated = tuple(stage for stage in ("measure", "table") if folder.is_outdated(stage))
    return Adoption(folder, origin, tuple(stages), outdated)


def _has_subnets(meta: Mapping[str, Any], wanted: Wanted) -> bool:
    """Whether a trained supernet has the wanted sub-networks; where these are chosen, the wanted
    network."""
    if wanted.structure.is_chosen:
        return bool(meta["spec"] == json.loads(json.dumps(wanted.subnets.spec.to_json())))
    return bool(meta["subnets"] == json.loads(json.dumps(wanted.subnets.to_json())))  # with the layout's fingerprint


def _without_housekeeping(run: SupernetRun) -> SupernetRun:
    """The settings that influence the weights, except the origin."""
    return replace(run, origin={}, keep_checkpoints=1, train=replace(run.train, checkpoint_every=1))


def adopt(run: RunDir, plans: Mapping[str, StagePlan], adoption: Adoption) -> list[str]:
    """Copy finished stages into a run that does not have them yet.

    Args:
        run: the run; its manifest is written and its lock is held.
        plans: made with `adoption.origin` as the start weights.
        adoption: result of `find_adoption`.

    Returns:
        the names of the stages that were taken over.

    Raises:
        CheckpointError: a file is not what its training wrote; nothing is marked done then.
    """
    taken = [name for name in adoption.stages if not plans[name].is_done]
    for name in taken:
        source = adoption.folder.path / name
        recorded = adoption.folder.manifest()["stages"][name]["files"]

        def copy(target: Path, source: Path = source, recorded: Mapping[str, Any] = recorded) -> list[Path]:
            if (source / CURVES).is_file():
                shutil.copyfile(source / CURVES, target / CURVES)
            copied = [_copied(source / file, target / file, facts["sha256"]) for file, facts in recorded.items()]
            return [*copied, *([target / CURVES] if (target / CURVES).is_file() else [])]

        run_stage(run, plans[name], copy)
    return taken


def _copied(source: Path, target: Path, sha256: str) -> Path:
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)
        if file_sha256(temporary) != sha256:
            raise CheckpointError(
                f"{source} has changed since its training wrote it (sha256 differs); restore it or train again"
            )
    return target
