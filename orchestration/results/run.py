"""Results of a run, read from its folder, for status, pareto, report, export and sync. Reads only,
and never the sealed table.

What needs torch is imported where it is used, so that lists and tables do not wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from dsnet.errors import CheckpointError, ConfigError, NotFoundError
from dsnet.files import known_sha256, read_object, read_sealed, read_stored, reading, understood
from dsnet.measure.latency_table import BatchClock, LatencyTable, device_of, latency_metric
from dsnet.measure.settings import MAIN_DEVICE
from dsnet.metrics import added_values
from dsnet.routing.routing_table import RoutingTable
from dsnet.routing.table_run import static_run
from dsnet.space.spec import SupernetSpec
from dsnet.space.subnet_set import SubnetSet
from dsnet.stored.names import FINAL
from orchestration.config.command_lines import launch_command
from orchestration.config.export import check_pick, gate_picks
from orchestration.config.sweep import SweepConfig
from orchestration.results.gate_id import GateId
from orchestration.results.measured import MeasuredSubnet, MeasuredSubnets, static_metrics
from orchestration.results.search_end import read_end
from orchestration.results.stored_config import stored_config
from orchestration.results.supernet_facts import SupernetFacts
from orchestration.results.verified import DynamicLatency, Verified
from orchestration.runs.folder import RunDir
from orchestration.runs.manifest import Manifest
from orchestration.runs.queue import read_queue
from orchestration.runs.stages import StageDir, check_origins
from search.front.analysis_records import BudgetPick
from search.front.pareto import REFERENCE_MARGIN, apply_pick, parse_pick
from search.front.points import PointRow, control_points, gate_points, subnet_points, trial_name
from search.front.selection import budget_picks, front_slots, pickable, spread_along_front
from search.study.study import TrialRecord, has_study, load_enqueued, load_records

if TYPE_CHECKING:
    from dsnet.routers.base import Router
    from orchestration.prepare.reach import Range


class RunResults:
    """The results of one run so far.

    What was read is kept until `refresh`, so that one object serves a whole launch.

    Args:
        run: an existing run.
        config: its resolved configuration; None reads it from the run folder.

    Raises:
        NotFoundError: there is no such run.
    """

    def __init__(self, run: RunDir, config: SweepConfig | None = None) -> None:
        run.open_existing()
        self.run = run
        self.manifest: dict[str, Any] = Manifest(run.manifest_path).read()
        if config is not None:
            self.config = config

    def refresh(self) -> None:
        """Read the run folder again; called when a stage has finished."""
        for name in vars(self).keys() - {"run", "config"}:
            delattr(self, name)
        self.manifest = Manifest(self.run.manifest_path).read()

    @cached_property
    def config(self) -> SweepConfig:
        """The resolved configuration of the last launch.

        Raises:
            CheckpointError: the stored file is not what the last launch wrote.
        """
        return stored_config(self.run, self.manifest)

    @property
    def supernets(self) -> dict[str, RunResults]:
        """This run under the empty name, as `orchestration.results.protocol` requires."""
        return {"": self}

    def stage_key(self, stage: str) -> str | None:
        """The key of the stage's current result, or None."""
        entry = self.manifest["stages"].get(stage)
        return None if entry is None else str(entry["key"])

    def is_done(self, stage: str) -> bool:
        """Whether the stage is complete, for the current results of its parents.

        Raises:
            CheckpointError: it was, but a file of it is missing or has changed since.
        """
        if not self.is_current(stage):
            return False
        folder = self._folder(stage)
        self._check_marker(stage, folder)
        folder.check()
        is_done = self._is_marked(stage)
        if is_done:
            check_origins(self.run, folder)
        return is_done

    def _is_marked(self, stage: str) -> bool:
        """Whether a current stage and all its ancestors have finished and no launch has set a file
        of them aside; their files are checked by whoever reads them."""
        folder = self._folder(stage)
        self._check_marker(stage, folder)
        record = folder.record()
        return folder.is_marked() and record is not None and all(map(self._is_marked, record.parent_keys))

    def _check_marker(self, stage: str, folder: StageDir) -> None:
        """Raise CheckpointError if the marker of a finished stage is missing."""
        if not folder.done_marker.exists() and self.manifest["stages"][stage]["status"] == "done":
            raise CheckpointError(
                f"{folder.done_marker} is missing, although {self.run.manifest_path.name} says that the stage has finished; "
                "restore it, or launch the sweep again"
            )

    def _folder(self, stage: str) -> StageDir:
        return StageDir(self.run.stage_dir(stage, self.stage_key(stage) or ""))

    def is_current(self, stage: str) -> bool:
        """Whether the stage's last result was made from the last results of all its ancestors."""
        if self.stage_key(stage) is None:
            return False
        folder = self._folder(stage)
        record = folder.record()
        if record is None and folder.path.is_dir() and self.manifest["stages"][stage]["status"] == "done":
            raise CheckpointError(
                f"{folder.stage_json} is missing; restore it, or launch the sweep again, which writes it again"
            )
        return record is not None and all(
            self.stage_key(name) == key and self.is_current(name) for name, key in record.parent_keys.items()
        )

    def done_key(self, stage: str) -> str:
        """The key of a finished stage.

        Raises:
            NotFoundError: it has not finished.
        """
        key = self.stage_key(stage)
        if key is None or not self.is_done(stage):
            raise NotFoundError(
                f"run {self.run.name!r} has not finished its {stage} stage; continue it with: "
                f"{launch_command(self.config, self.run.sweep_yaml)}"
            )
        return key

    @cached_property
    def supernet(self) -> SupernetFacts | None:
        """Facts about how the supernet was made; None before its stage is done, or if another
        release made it."""
        return SupernetFacts.of_stage(self._folder("supernet").path) if self.is_done("supernet") else None

    @cached_property
    def trained_subnets(self) -> SubnetSet:
        """The sub-networks of the trained supernet.

        Raises:
            NotFoundError: the supernet stage has not finished.
        """
        return read_stored(self.run.stage_dir("supernet", self.done_key("supernet")) / f"{FINAL}.json", subnets_in)

    @property
    def structure_dir(self) -> Path | None:
        """The folder of the finished structure stage; None where there is none."""
        return self._folder("structure").path if self.is_done("structure") else None

    @cached_property
    def subnets(self) -> tuple[MeasuredSubnet, ...]:
        """The measured sub-networks in the set's order, the teacher last; empty before the measure
        stage."""
        return self._measured.subnets

    @property
    def members(self) -> tuple[MeasuredSubnet, ...]:
        """The measured sub-networks by ascending MAdds, without the teacher."""
        return tuple(sorted((item for item in self.subnets if not item.is_teacher), key=lambda item: item.madds))

    @property
    def widest(self) -> MeasuredSubnet:
        """The baseline: the widest routable sub-network."""
        return self.members[-1]

    @property
    def num_val(self) -> int:
        """Number of images in `val`; 0 before the measure stage."""
        return self._measured.num_images

    @cached_property
    def _measured(self) -> MeasuredSubnets:
        if not self.is_done("measure"):
            return MeasuredSubnets((), 0)
        return read_stored(self.run.subnets_json(self.done_key("measure")), MeasuredSubnets.from_json)

    @cached_property
    def latencies(self) -> dict[str, LatencyTable]:
        """The latency tables by the name of the device, the main one under `MAIN_DEVICE`; empty
        before the measure stage."""
        if not self.is_done("measure"):
            return {}
        return {
            name: read_stored(path, LatencyTable.from_json)
            for file, path in sorted(self._folder("measure").outputs().items())
            if (name := device_of(file)) is not None
        }

    @property
    def latency(self) -> LatencyTable | None:
        """The main device's latency table; None before the measure stage."""
        return self.latencies.get(MAIN_DEVICE)

    @cached_property
    def _timed_again(self) -> dict[str, Any]:
        """Timings stored by `dsnet-orch measure`; empty if there are none."""
        path = self.run.timed_again_json(self.done_key("measure")) if self.is_done("measure") else None
        return read_sealed(path) if path is not None and path.is_file() else {}

    @cached_property
    def newest_latencies(self) -> dict[str, LatencyTable]:
        """`latencies`, replaced by later timings of `dsnet-orch measure`, for display. The study
        keeps those with which it was searched."""
        latencies, again = self.latencies, self._timed_again
        if not again:
            return latencies
        with understood(self.run.timed_again_json(self.done_key("measure"))):
            return latencies | {name: LatencyTable.from_json(table) for name, table in again["tables"].items()}

    @cached_property
    def records(self) -> list[TrialRecord]:
        """All finished trials by slot, including those of a search that still runs.

        Raises:
            CheckpointError: the study, or another file of the finished search, is not what was
                written.
        """
        if not self.is_current("search"):
            return []
        self._folder("search").check()
        journal = self.run.study_journal(self.stage_key("search") or "")
        return load_records(journal) if has_study(journal) else []

    @property
    def search_end(self) -> str | None:
        """The reason for which the search ended: `trials`, `time`, `plateau`, ...; None before its
        end."""
        path = self.run.search_end_json(self.stage_key("search") or "")
        return read_end(path).reason if path.is_file() else None

    @property
    def num_waiting(self) -> int:
        """Number of enqueued points that have no trial yet."""
        key = self.stage_key("search") or ""
        journal, queue = self.run.study_journal(key), read_queue(self.run.queue_jsonl(key))
        return len(queue) - len(load_enqueued(journal)) if queue and journal.is_file() else len(queue)

    @property
    def completed(self) -> list[TrialRecord]:
        """The trials that ran to their end, whether they hold the constraints or not."""
        return [record for record in self.records if record.state == "complete"]

    @property
    def feasible(self) -> list[TrialRecord]:
        """The completed trials that hold all constraints; only these may be on a front, picked or
        exported."""
        return [record for record in self.records if record.is_feasible]

    @property
    def pruned(self) -> list[TrialRecord]:
        """The trials that were ended early by the pruner or by a hard constraint."""
        return [record for record in self.records if record.state == "pruned"]

    @property
    def failed(self) -> list[TrialRecord]:
        """The trials that gave no result."""
        return [record for record in self.records if record.state == "failed"]

    @cached_property
    def front(self) -> tuple[int, ...]:
        """Slots of the front on `val`, the first metric's best last."""
        metrics, feasible = self.config.metrics, self.feasible
        values = np.array([[record.metrics[metric.name] for metric in metrics] for record in feasible])
        return front_slots([record.slot for record in feasible], values, [metric.goal for metric in metrics])

    @property
    def front_gates(self) -> tuple[GateId, ...]:
        """The front as gates, as `orchestration.results.protocol` requires."""
        return tuple(GateId("", slot) for slot in self.front)

    @property
    def num_trials(self) -> int:
        """Number of finished trials."""
        return len(self.records)

    @property
    def num_failed(self) -> int:
        """Number of failed trials."""
        return len(self.failed)

    @property
    def is_verified(self) -> bool:
        """Whether the current front ran on `test`."""
        return self.verified is not None

    @cached_property
    def reference_point(self) -> tuple[float, ...]:
        """Reference point of the hypervolume: as configured, else 0 for a maximised metric and 1.05
        x the widest sub-network for a minimised one.

        For a latency, the widest is timed as a gate runs it, with the decision, so that the savings
        of a router are separated from the cost of deciding. For parameters it is the largest number
        that a trial may have, because a router and the norms of all its routes are added to the
        widest.
        """
        names = [subnet.name for subnet in self.subnets if not subnet.is_teacher]
        always_widest = np.array([float(name == self.widest.name) for name in names])
        dynamic = {metric: clock.ms(always_widest) for metric, clock in self._clocks.items()}
        costs = {name: max(value, dynamic.get(name, value)) for name, value in self.baseline.items()}
        if any(metric.name == "params_m" for metric in self.config.metrics):
            costs["params_m"] = max(costs["params_m"], self.metric_ranges["params_m"][1])
        return tuple(
            metric.ref
            if metric.ref is not None
            else (0.0 if metric.goal == "maximize" else REFERENCE_MARGIN * costs[metric.name])
            for metric in self.config.metrics
        )

    @cached_property
    def baseline(self) -> dict[str, float]:
        """Every metric of the widest routable static sub-network on `val`: the values of
        `baseline.*` in constraints.

        Raises:
            NotFoundError: the measure stage has not finished.
        """
        self.done_key("measure")
        return self.static_metrics(self.widest)

    def static_metrics(self, subnet: MeasuredSubnet) -> dict[str, float]:
        """Every metric of a static sub-network on `val`."""
        return static_metrics(subnet, self.latencies) | self._added_metrics(subnet)

    def _added_metrics(self, subnet: MeasuredSubnet) -> dict[str, float]:
        """Values of `dsnet.metrics.added_metrics` for a static sub-network on `val`; empty before
        the table stage, and for the teacher, which the routing table does not have."""
        table = self._val_table_if_done
        if table is None or subnet.is_teacher:
            return {}
        return added_values(static_run(table, table.routes.index(subnet.name)), table)

    @cached_property
    def _val_table_if_done(self) -> RoutingTable | None:
        return self.val_table if self.is_done("table") else None

    @cached_property
    def val_table(self) -> RoutingTable:
        """The routing table of `val`.

        Raises:
            NotFoundError: the table stage has not finished.
        """
        return RoutingTable.load(self.run.table(self.done_key("table"), "val"))

    @cached_property
    def metric_ranges(self) -> dict[str, Range]:
        """An interval that contains each metric of any router of this run, latencies included.

        Raises:
            NotFoundError: the measure stage has not finished.
        """
        from orchestration.prepare.reach import metric_ranges

        self.done_key("measure")
        subnets = self.trained_subnets
        return metric_ranges(self.config, subnets, subnets.spec.image_size, self.latencies)

    @cached_property
    def front_sample(self) -> tuple[int, ...]:
        """The gates of the front that run on `test`: about `budget.verify` of them, spread evenly
        along it.

        Both ends, the knee and the picks of `export.picks` other than `all` are always among them.
        In a member of a sweep of supernets: the gates chosen from the front over all supernets.
        """
        chosen = self.run.chosen_json(self.stage_key("search") or "")
        if chosen.is_file():
            content = read_sealed(chosen)
            with understood(chosen):
                return tuple(slot for slot in self.front if slot in content["slots"])
        size = self.config.budget.verify
        if size is None or len(self.front) <= size:
            return self.front
        names = [metric.name for metric in self.config.metrics]
        values = np.array([[self.record(slot).metrics[name] for name in names] for slot in self.front])
        kept = [self.front.index(slot) for slot in self._named_slots if slot in self.front]
        return tuple(self.front[position] for position in spread_along_front(values, size, kept))

    @property
    def named_gates(self) -> tuple[GateId, ...]:
        """The knee and the picked gates, as `orchestration.results.protocol` requires."""
        return tuple(GateId("", slot) for slot in self._named_slots) if self.front else ()

    @cached_property
    def _named_slots(self) -> list[int]:
        slots = [] if self.knee is None else [self.knee]
        for text in gate_picks(self.config.export.picks):
            try:
                slots += [] if parse_pick(text).kind == "all" else picked_slots(self, [text])
            except NotFoundError:  # the export reports it, when everything else is done
                continue
        return list(dict.fromkeys(slots))

    @cached_property
    def contenders(self) -> tuple[BudgetPick, ...]:
        """The trials that represent each kind of router at the budgets, chosen on `val`."""
        trials = [(record.slot, self.kind_of(record), record.metrics) for record in self.feasible]
        return budget_picks(trials, np.array([subnet.madds for subnet in self.members]))

    @cached_property
    def knee(self) -> int | None:
        """The slot of the front's knee; None if there is no front."""
        return picked_slots(self, ["knee"])[0] if self.front else None

    @cached_property
    def verified(self) -> Verified | None:
        """The result of the verify stage; None if it has not run, or if the front has changed
        since."""
        if not self.is_done("verify"):
            return None
        try:
            verified = Verified.from_json(read_object(self.run.verify_json(self.done_key("verify"))))
        except (KeyError, TypeError, AttributeError, ValueError):
            return None  # another release wrote it: the next launch verifies again
        is_current = verified.front == self.front_sample and verified.contenders == self.contenders
        return self._with_newest_latencies(verified) if is_current else None

    def _with_newest_latencies(self, verified: Verified) -> Verified:
        """The result with later timings of `dsnet-orch measure`, if these cover all gates of the
        front."""
        with understood(self.run.timed_again_json(self.done_key("measure"))):
            again = {name: DynamicLatency.from_json(item) for name, item in self._timed_again.get("front", {}).items()}
        of_front = {
            name: latency
            for name, latency in again.items()
            if all(set(verified.front) <= set(row) for row in latency.gates.values())
        }
        return replace(verified, latencies={**verified.latencies, **of_front})

    @property
    def finished_ms(self) -> int:
        """Unix time in ms at which the last trial ended."""
        return max(record.finished_ms for record in self.records)

    def record(self, slot: int) -> TrialRecord:
        """The record of the trial with this slot."""
        return self._records_by_slot[slot]

    @cached_property
    def _records_by_slot(self) -> dict[int, TrialRecord]:
        return {record.slot: record for record in self.records}

    def router_kind(self, slot: int) -> str:
        """The kind of a trial's router."""
        return self.kind_of(self.record(slot))

    def kind_of(self, record: TrialRecord) -> str:
        """The kind of the router of a trial that was read already."""
        return str(record.params.get("gate.router", self.config.gate.router))

    def router(self, slot: int) -> Router:
        """The router of a trial.

        Raises:
            CheckpointError: its file is missing or damaged.
        """
        return load_router(self.run.gate_weights(self.stage_key("search") or "", slot), self.record(slot).arrays_sha256)

    def points(self) -> list[PointRow]:
        """All rows of points.parquet: static sub-networks, gates and controls, on `val` and, once
        verified, on `test`."""
        rows: list[PointRow] = []
        members = self.members
        if members:
            rows += subnet_points(
                "val",
                [subnet.name for subnet in members],
                [subnet.top1 for subnet in members],
                [subnet.madds for subnet in members],
                top5=[subnet.top5 for subnet in members],
                params=[subnet.params for subnet in members],
                metrics={
                    **self._static_latencies([subnet.name for subnet in members]),
                    **_columns([self._added_metrics(subnet) for subnet in members]),
                },
            )
        completed = self.completed
        rows += gate_points(
            "val",
            [record.slot for record in completed],
            [record.metrics for record in completed],
            [record.params for record in completed],
            [record.slot in self.front for record in completed],
            [record.is_feasible for record in completed],
        )
        return rows + (self._verified_points(self.verified) if self.verified is not None else [])

    def _static_latencies(self, names: Sequence[str]) -> dict[str, list[float]]:
        """Every latency of the named static sub-networks, by metric: [K] for K names. They were
        measured once, for all splits."""
        return {
            latency_metric(size, device): [table.static_ms(name, size) for name in names]
            for device, table in self.latencies.items()
            for size in table.batch_sizes
        }

    @cached_property
    def _clocks(self) -> dict[str, BatchClock]:
        """A function for each latency metric that gives a gate's ideal latency, as for trials.
        Measured times of whole batches are in `verified.latency`."""
        names = [subnet.name for subnet in self.subnets if not subnet.is_teacher]
        return {
            latency_metric(size, device): table.clock(size, names)
            for device, table in self.latencies.items()
            for size in table.batch_sizes
        }

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
            metrics={**self._static_latencies(test.routes), **_columns(test.static_added)},
        )
        metrics = [
            {
                **point.metrics,
                "params_m": self.record(point.slot).metrics["params_m"],
                **{name: clock.ms(np.array(point.runs), point.router) for name, clock in self._clocks.items()},
            }
            for point in test.points
        ]
        slots = [point.slot for point in test.points]
        rows += gate_points("test", slots, metrics, [self.record(slot).params for slot in slots], [True] * len(slots))
        for analysis in (verified.val, test):
            for name in ("cascade", "reachable", "oracle"):
                madds_m, top1 = getattr(analysis, f"{name}_madds_m"), getattr(analysis, f"{name}_top1")
                rows += control_points(analysis.split, name, [1e6 * cost for cost in madds_m], top1)
        return rows


def _columns(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """The values of K rows by column, each [K]; NaN where a row has no value."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name, math.nan) for row in rows] for name in names}


def picked_slots(results: RunResults, picks: Sequence[str]) -> list[int]:
    """The slots of the trials selected by `picks`, each once, in the order of the picks.

    Args:
        results: a run with a front.
        picks: `knee`, `all`, `max:top1 where madds_m<=200`, `trial-0042`, ...; all read the metrics
            on `val`.

    Raises:
        ConfigError: a pick cannot be read.
        NotFoundError: nothing matches.
    """
    rows = [{"name": trial_name(record.slot), "slot": record.slot, **record.metrics} for record in results.feasible]
    on_front = [row for row in rows if row["slot"] in results.front]
    objectives = tuple((metric.name, metric.goal) for metric in results.config.metrics)
    slots: list[int] = []
    for text in picks:
        pick = parse_pick(text)
        if pick.kind == "name":
            refuse_unreadable(text)
            refuse_unusable(text, [record for record in results.records if trial_name(record.slot) == pick.name])
        chosen = apply_pick(pick, pickable(pick, rows, on_front), objectives)
        slots += [int(row["slot"]) for row in chosen if row["slot"] not in slots]
    return slots


def refuse_unreadable(pick: str) -> None:
    """Raise if a pick is neither a keyword nor the name of a trial.

    Raises:
        ConfigError: the message lists the keywords.
    """
    try:
        check_pick(pick)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def refuse_unusable(pick: str, records: Sequence[TrialRecord]) -> None:
    """Raise if a pick names trials that exist, but are all failed, pruned or infeasible.

    Raises:
        NotFoundError: the message gives the state of the first one.
    """
    if not records or any(record.is_feasible for record in records):
        return
    record = records[0]
    broken = [text for text, violation in record.constraints.items() if not violation <= 0]
    standing = {
        "complete": f"is infeasible: violates {' and '.join(broken)}",
        "pruned": "was pruned",
        "failed": "failed",
    }[record.state]
    why = f": {record.reason}" if record.reason else ""
    raise NotFoundError(f"pick {pick!r}: {trial_name(record.slot)} {standing}{why}; only feasible trials can be picked")


def load_router(path: Path, sha256: str | None) -> Router:
    """Load the router that a trial stored.

    Args:
        path: its file.
        sha256: the SHA-256 that the trial's record has of it; None in studies of earlier releases.

    Raises:
        CheckpointError: the file is missing, or is not the one that the trial stored.
    """
    from search.gate_trial import router_of

    way_out = "restore it from a copy; or launch the sweep again, which runs this trial again"
    if not path.is_file():
        raise CheckpointError(f"{path}: the gate of this trial is missing; {way_out}")
    if sha256 is not None and known_sha256(path) != sha256:
        raise CheckpointError(f"{path}: is not the gate that the trial stored (its SHA-256 differs); {way_out}")
    try:
        with reading(path):
            return router_of(load_file(path))
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, CheckpointError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); {way_out}") from error


def subnets_in(meta: Mapping[str, Any]) -> SubnetSet:
    """The sub-networks in the JSON file of a stored supernet."""
    return SubnetSet.from_json(SupernetSpec.from_json(meta["spec"]), meta["subnets"])
