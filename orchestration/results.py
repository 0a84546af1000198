"""What a run folder holds, read back: for status, pareto, report, export and sync. Reads only, and never the sealed table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from dsnet.errors import CheckpointError, NotFoundError
from dsnet.files import read_json
from dsnet.latency import LatencyTable
from dsnet.routers import Router
from orchestration.config import SweepConfig
from orchestration.config_loading import load_config
from orchestration.rundir import Manifest, RunDir
from orchestration.stages import StageDir
from orchestration.supernet_facts import SupernetFacts
from orchestration.verification import Agreement, DynamicLatency
from search.analysis import BudgetPick, SplitAnalysis, budget_picks, front_slots, spread_along_front
from search.gate_trial import router_of
from search.pareto import apply_pick, parse_pick
from search.points import PointRow, control_points, gate_points, subnet_points, trial_name
from search.study import TrialRecord, load_records


@dataclass(frozen=True)
class MeasuredSubnet:
    """One sub-network as the measure stage found it on `val`."""

    name: str
    top1: float
    top5: float
    madds: int
    params: int
    is_teacher: bool


@dataclass(frozen=True)
class Verified:
    """What the verify stage found."""

    front: tuple[int, ...]
    contenders: tuple[BudgetPick, ...]
    val: SplitAnalysis
    test: SplitAnalysis
    latency: DynamicLatency
    agreements: tuple[Agreement, ...]
    num_openings: int

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Verified:
        """Rebuild it from verify.json."""
        return cls(
            front=tuple(data["front"]),
            contenders=tuple(BudgetPick(**item) for item in data["contenders"]),
            val=SplitAnalysis.from_json(data["val"]),
            test=SplitAnalysis.from_json(data["test"]),
            latency=DynamicLatency.from_json(data["latency"]),
            agreements=tuple(Agreement(**item) for item in data["agreements"]),
            num_openings=data["num_openings"],
        )


class RunResults:
    """The results of one run, as far as it has come.

    Args:
        run: an existing run.

    Raises:
        NotFoundError: there is no such run.
    """

    def __init__(self, run: RunDir) -> None:
        run.open_existing()
        self.run = run
        self.manifest: dict[str, Any] = Manifest(run.manifest_path).read()

    @cached_property
    def config(self) -> SweepConfig:
        """The resolved configuration of the last launch."""
        return load_config(self.run.sweep_yaml).config

    def stage_key(self, stage: str) -> str | None:
        """The key of the stage's current result, or None."""
        entry = self.manifest["stages"].get(stage)
        return None if entry is None else str(entry["key"])

    def is_done(self, stage: str) -> bool:
        """Whether the stage is complete, and for the very parents that are current."""
        return self._is_current(stage) and self._folder(stage).is_done()

    def _folder(self, stage: str) -> StageDir:
        return StageDir(self.run.stage_dir(stage, self.stage_key(stage) or ""))

    def _is_current(self, stage: str) -> bool:
        """Whether the stage's last result belongs to the last results of all the stages above it."""
        if self.stage_key(stage) is None:
            return False
        record = self._folder(stage).record()
        return record is not None and all(
            self.stage_key(name) == key and self._is_current(name) for name, key in record.parent_keys.items()
        )

    def done_key(self, stage: str) -> str:
        """The key of a finished stage.

        Raises:
            NotFoundError: it has not finished.
        """
        key = self.stage_key(stage)
        if key is None or not self.is_done(stage):
            raise NotFoundError(
                f"run {self.run.name!r} has not finished its {stage} stage; continue it with: dsnet-orch launch {self.run.sweep_yaml}"
            )
        return key

    @cached_property
    def supernet(self) -> SupernetFacts | None:
        """How the supernet was made; None before its stage is done, or where another release made it."""
        return SupernetFacts.of_stage(self._folder("supernet").path) if self.is_done("supernet") else None

    @cached_property
    def subnets(self) -> tuple[MeasuredSubnet, ...]:
        """The measured sub-networks in the set's order, the teacher last; empty before the measure stage."""
        return tuple(MeasuredSubnet(**item) for item in self._measured["subnets"])

    @property
    def members(self) -> tuple[MeasuredSubnet, ...]:
        """The measured sub-networks by rising MAdds, without the teacher."""
        return tuple(sorted((item for item in self.subnets if not item.is_teacher), key=lambda item: item.madds))

    @property
    def widest(self) -> MeasuredSubnet:
        """The baseline: the widest routable sub-network."""
        return self.members[-1]

    @property
    def num_val(self) -> int:
        """Images of `val`; 0 before the measure stage."""
        return int(self._measured["num_images"])

    @cached_property
    def _measured(self) -> dict[str, Any]:
        if not self.is_done("measure"):
            return {"subnets": [], "num_images": 0}
        return _read(self.run.subnets_json(self.done_key("measure")))

    @cached_property
    def latency(self) -> LatencyTable | None:
        """The latency table; None before the measure stage."""
        if not self.is_done("measure"):
            return None
        return LatencyTable.from_json(_read(self.run.latency_json(self.done_key("measure"))))

    @cached_property
    def records(self) -> list[TrialRecord]:
        """All finished trials in slot order; a search that still runs is read as far as it is."""
        journal = self.run.study_journal(self.stage_key("search") or "")
        return load_records(journal) if self._is_current("search") and journal.exists() else []

    @property
    def completed(self) -> list[TrialRecord]:
        """The trials that have metrics."""
        return [record for record in self.records if record.state == "complete"]

    @cached_property
    def front(self) -> tuple[int, ...]:
        """Slots of the front on `val`, by rising accuracy."""
        metrics = self.config.metrics
        values = np.array([[record.metrics[metric.name] for metric in metrics] for record in self.completed])
        return front_slots([record.slot for record in self.completed], values, [metric.goal for metric in metrics])

    @cached_property
    def front_sample(self) -> tuple[int, ...]:
        """The gates of the front that run on `test`: about as many as `budget.verify` says, evenly along it.

        Both ends, the knee and what `export.picks` asks for by more than `all` are among them.
        """
        size = self.config.budget.verify
        if size is None or len(self.front) <= size:
            return self.front
        names = [metric.name for metric in self.config.metrics]
        values = np.array([[self.record(slot).metrics[name] for name in names] for slot in self.front])
        kept = [self.front.index(slot) for slot in self._named_slots() if slot in self.front]
        return tuple(self.front[position] for position in spread_along_front(values, size, kept))

    def _named_slots(self) -> list[int]:
        slots = [] if self.knee is None else [self.knee]
        for text in self.config.export.picks:
            try:
                slots += [] if parse_pick(text).kind == "all" else picked_slots(self, [text])
            except NotFoundError:  # the export will say so, when everything else is done
                continue
        return list(dict.fromkeys(slots))

    @cached_property
    def contenders(self) -> tuple[BudgetPick, ...]:
        """The trials that speak for each kind of router at the budgets, chosen on `val`."""
        trials = [(record.slot, self.router_kind(record.slot), record.metrics) for record in self.completed]
        return budget_picks(trials, np.array([subnet.madds for subnet in self.members]))

    @cached_property
    def knee(self) -> int | None:
        """The slot of the front's knee; None without a front."""
        return picked_slots(self, ["knee"])[0] if self.front else None

    @cached_property
    def verified(self) -> Verified | None:
        """What verify found; None where it has not run, or the trials that it is about have changed since."""
        if not self.is_done("verify"):
            return None
        try:
            verified = Verified.from_json(_read(self.run.verify_json(self.done_key("verify"))))
        except (KeyError, TypeError):  # another release wrote it: launching again verifies anew
            return None
        is_current = verified.front == self.front_sample and verified.contenders == self.contenders
        return verified if is_current else None

    @property
    def finished_ms(self) -> int:
        """Unix time in ms at which the last trial ended."""
        return max(record.finished_ms for record in self.records)

    def record(self, slot: int) -> TrialRecord:
        """One trial by its slot."""
        return next(record for record in self.records if record.slot == slot)

    def router_kind(self, slot: int) -> str:
        """The kind of a trial's router."""
        return str(self.record(slot).params.get("gate.router", self.config.gate.router))

    def router(self, slot: int) -> Router:
        """The router of a trial.

        Raises:
            CheckpointError: its file is missing or damaged.
        """
        return load_router(self.run.gate_weights(self.stage_key("search") or "", slot))

    def points(self) -> list[PointRow]:
        """All rows of points.parquet: static sub-networks, gates and controls, on `val` and, once verified, on `test`."""
        rows: list[PointRow] = []
        members = self.members
        if members:
            latency = None
            if self.latency is not None and 1 in self.latency.subnets:
                latency = [self.latency.subnets[1][subnet.name].median_ms for subnet in members]
            rows += subnet_points(
                "val",
                [subnet.name for subnet in members],
                [subnet.top1 for subnet in members],
                [subnet.madds for subnet in members],
                top5=[subnet.top5 for subnet in members],
                params=[subnet.params for subnet in members],
                latency_ms=latency,
            )
        completed = self.completed
        rows += gate_points(
            "val",
            [record.slot for record in completed],
            [record.metrics for record in completed],
            [record.params for record in completed],
            [record.slot in self.front for record in completed],
        )
        return rows + (self._verified_points(self.verified) if self.verified is not None else [])

    def _ideal_latency_ms(self, runs: Sequence[float]) -> float:
        """Batch 1, as for trials: the measured parts of all that runs. What whole batches really took is in `verified.latency`."""
        assert self.latency is not None
        return self.latency.batch1_ms(np.array(runs), [subnet.name for subnet in self.subnets if not subnet.is_teacher])

    def _verified_points(self, verified: Verified) -> list[PointRow]:
        test = verified.test
        params = {subnet.name: subnet.params for subnet in self.subnets}
        rows = subnet_points(
            "test",
            test.routes,
            [interval.value for interval in test.static_top1],
            [1e6 * cost for cost in test.static_madds_m],
            top5=test.static_top5,
            params=[params[name] for name in test.routes],
        )
        metrics = []
        for point in test.points:
            metrics.append(
                {
                    **point.metrics,
                    "params_m": self.record(point.slot).metrics["params_m"],
                    "latency_ms": self._ideal_latency_ms(point.runs),
                }
            )
        slots = [point.slot for point in test.points]
        rows += gate_points("test", slots, metrics, [self.record(slot).params for slot in slots], [True] * len(slots))
        for analysis in (verified.val, test):
            for name in ("cascade", "reachable", "oracle"):
                madds_m, top1 = getattr(analysis, f"{name}_madds_m"), getattr(analysis, f"{name}_top1")
                rows += control_points(analysis.split, name, [1e6 * cost for cost in madds_m], top1)
        return rows


def picked_slots(results: RunResults, picks: Sequence[str]) -> list[int]:
    """The trials that `picks` mean, each once, in the order of the picks.

    Args:
        results: a run with a front.
        picks: `knee`, `all`, `max:top1 where madds_m<=200`, `trial-0042`, ...; all read the metrics on `val`.

    Raises:
        ConfigError: a pick cannot be read.
        NotFoundError: nothing matches.
    """
    rows = [{"name": trial_name(record.slot), "slot": record.slot, **record.metrics} for record in results.completed]
    on_front = [row for row in rows if row["slot"] in results.front]
    objectives = tuple((metric.name, metric.goal) for metric in results.config.metrics)
    slots: list[int] = []
    for text in picks:
        pick = parse_pick(text)
        # A front's own rows only where the pick asks for the front: copies of a front point are not exported twice.
        chosen = apply_pick(pick, on_front if pick.kind in ("all", "knee") else rows, objectives)
        slots += [int(row["slot"]) for row in chosen if row["slot"] not in slots]
    return slots


def load_router(path: Path) -> Router:
    """The router that a trial stored.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path}: the gate of this trial is missing; delete the run's search folder and launch again"
        )
    try:
        return router_of(load_file(path))
    except (SafetensorError, OSError, ValueError, KeyError, CheckpointError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); delete the run's search folder and launch again"
        ) from error


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path)
    assert isinstance(content, dict)
    return content
