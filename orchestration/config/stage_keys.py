"""The part of the configuration that each stage depends on."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any, Literal, get_args

from pydantic import (
    JsonValue,
)

from dsnet.data.settings import FileOptions
from dsnet.measure.settings import without_default_engines
from dsnet.structure.settings import without_unread
from dsnet.training.settings import without_added, without_published
from orchestration.config.resolve import enqueued_points, halving_rungs, resolve_cohort, resolve_space
from orchestration.config.supernet import (
    REGIME_KEYS,
    resolve_regime,
)
from orchestration.config.sweep import SweepConfig

Stage = Literal["structure", "supernet", "measure", "table", "search", "verify"]


# Settings of the supernet that say where and how safely it is trained, not what is trained; and
# those that stand for something else: the names of a regime for its parts, the path of a checkpoint
# for its tensors; and the choice of sub-networks, which is a stage of its own.
_NOT_IN_SUPERNET_KEY: dict[str, Any] = {
    "workers": True,
    "threads": True,
    "device": True,
    "keep_checkpoints": True,
    "init_from": True,
    "structure": True,
    "regime": True,
    "train": {"checkpoint_every", *REGIME_KEYS},
    "bootstrapping": {"mode", "num_random"},
}


_NOT_IN_DATA_KEY = {"path", "crop_fraction", "normalization", "balance", *(each.name for each in fields(FileOptions))}
"""Settings of the data on which its fingerprint depends, and those that enter in another form."""


def stage_subset(config: SweepConfig, stage: Stage) -> dict[str, JsonValue]:
    """The part of the configuration on which a stage's result depends and that enters its key,
    JSON-able.

    The pipeline adds the parents, the fingerprints of the data and of the start weights (hence no
    `data.path`, `data.crop_fraction`, options of files or `supernet.init_from`) and the stage's
    version. Ray, workers, the device of training, budget, tracking and export never enter: the same
    sweep run elsewhere, or for longer, is the same sweep.
    """
    if stage == "supernet":
        supernet = config.supernet.model_dump(mode="json", exclude=_NOT_IN_SUPERNET_KEY)
        supernet["train"] = without_added(supernet["train"])
        supernet["bootstrapping"] = without_published(supernet["bootstrapping"])
        data = config.data.model_dump(mode="json", exclude=_NOT_IN_DATA_KEY)
        return {
            "seed": config.seed,
            "data": data | _normalization(config) | _balance(config),
            "supernet": {**supernet, "regime": resolve_regime(config.supernet).to_json()},
        }
    if stage == "structure":
        structure = without_unread(config.supernet.structure.model_dump(mode="json", exclude={"concurrent"}))
        chosen: dict[str, JsonValue] = {"seed": config.seed, "supernet": {"structure": structure}}
        return chosen | ({"data": own} if (own := _normalization(config) | _balance(config)) else {})
    if stage == "measure":
        return {"measure": _measure_subset(config)}
    if stage == "search":
        return _search_subset(config)
    if stage == "verify":
        return {"measure": {key: value for key, value in _measure_subset(config).items() if key != "group_sizes"}}
    if stage == "table":
        return {}
    raise ValueError(f"unknown stage {stage!r}; known: {', '.join(get_args(Stage))}")


def _normalization(config: SweepConfig) -> dict[str, Any]:
    """The written normalisation, whichever way it is written; nothing for null, so that keys from
    before that setting stay valid."""
    written = config.data.written_normalization()
    return {} if written is None else {"normalization": asdict(written)}


def _balance(config: SweepConfig) -> dict[str, Any]:
    """The treatment of uneven classes; nothing for none, so that keys from before that setting stay
    valid."""
    balance = config.data.balance
    return {} if balance == "none" else {"balance": balance}


def _measure_subset(config: SweepConfig) -> dict[str, JsonValue]:
    """The measurement settings, without `devices` if there are none and without an `engine` that is
    torch, so that keys from before these settings stay valid."""
    subset = without_default_engines(config.measure.model_dump(mode="json"))
    if not subset["devices"]:
        del subset["devices"]
    return subset


def _search_subset(config: SweepConfig) -> dict[str, JsonValue]:
    """The settings of the search with defaults resolved, and without reference points, which only
    score it."""
    subset: dict[str, Any] = config.model_dump(
        mode="json", include={"seed", "gate", "constraints", "sampler", "pruner"}
    )
    subset["space"] = {key: distribution.written() for key, distribution in resolve_space(config).items()}
    subset["metrics"] = [{"name": metric.name, "goal": metric.goal} for metric in config.metrics]
    subset["sampler"] |= {"cohort": resolve_cohort(config), "enqueue": enqueued_points(config)}
    rungs = list(halving_rungs(config))
    subset["pruner"] = {"name": "none"}
    if config.pruner.name != "none":
        subset["pruner"] = {"name": config.pruner.name, "factor": config.pruner.factor, "rungs": rungs}
    if config.gate.trainer == "table":
        del subset["gate"]["end_to_end"]
    else:
        del subset["gate"]["end_to_end"]["threads"]
    return subset
