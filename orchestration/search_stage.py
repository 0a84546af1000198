"""The search stage: trials on warm Ray actors that share the routing tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from dsnet.data import Augmentation
from dsnet.errors import StoppedError
from dsnet.files import atomic_write_bytes
from dsnet.latency import LatencyTable
from dsnet.routing_table import RoutingTable
from dsnet.space import SubnetSet
from dsnet.training.gate_end_to_end import EndToEndSettings, GateImages
from dsnet.training.supernet import FINAL
from orchestration.config import SweepConfig, resolve_cohort, resolve_timeout_s
from orchestration.end_to_end_trials import MakeEndToEndTrial, shared_images
from orchestration.launch_context import Launch
from orchestration.preparation import Prepared
from orchestration.progress import Bar
from orchestration.projection import trial_row
from orchestration.ray_trials import MakeCohortFunction, RayRunner
from orchestration.results import RunResults
from orchestration.rundir import RunDir
from orchestration.stages import StagePlan, flatten, run_stage
from search.engine import Budget, Search
from search.gate_trial import GateScores, GateTrial
from search.points import trial_name
from search.space import parse_space
from search.study import Objective, StudyJournal, StudySettings, TrialRecord, load_records


def trials_left(run: RunDir, plan: StagePlan, config: SweepConfig) -> int:
    """Trials that the budget still asks for."""
    journal = run.study_journal(plan.key)
    done = len(load_records(journal)) if journal.exists() else 0
    return max(0, config.budget.trials - done)


def continued(run: RunDir, plan: StagePlan, config: SweepConfig) -> StagePlan:
    """The plan of the search, which is not done while the budget still asks for trials."""
    left = trials_left(run, plan, config)
    if not plan.is_done or left == 0:
        return plan
    return replace(plan, status="resume", reasons=(f"{left} of {config.budget.trials} trials are left",))


def search_stage(work: Launch, plan: StagePlan, table_plan: StagePlan) -> None:
    """Search until the budget is spent; continues a study that has fewer trials."""
    work.check_stop()
    config, run = work.config, work.run
    plan = continued(run, plan, config)

    def search(folder: Path) -> Sequence[Path]:
        journal = StudyJournal.open(run.study_journal(plan.key), study_settings(config))
        with (
            closing(_trial_runner(work, table_plan)) as runner,
            work.progress.bar("search (trials)", config.budget.trials) as bar,
        ):
            result = Search(
                journal=journal,
                runner=runner,
                save_arrays=lambda slot, arrays: _save_gate(run.gate_weights(plan.key, slot), arrays),
                observer=_Observer(work, bar),
                should_stop=work.stop,
            ).run(Budget(config.budget.trials, config.budget.time_s))
        if result.stop_reason == "stop":
            raise StoppedError("the search was stopped; its finished trials are kept")
        return [run.study_journal(plan.key)]

    run_stage(run, plan, search)
    results = RunResults(run)
    for (
        record
    ) in results.records:  # rows that an earlier launch could not write; those that MLflow has are not written twice
        work.tracker.trial(trial_row(results.manifest, run, record))
    num_failed = len(results.records) - len(results.completed)
    failed = f", {num_failed} failed" if num_failed else ""
    work.progress.say(f"search: {len(results.completed)} trials{failed}, {len(results.front)} gates on the front")


def study_settings(config: SweepConfig) -> StudySettings:
    """What the study's suggestions depend on."""
    return StudySettings(
        name=config.name,
        space=parse_space({key: distribution.written() for key, distribution in config.space.items()}),
        objectives=[Objective(metric.name, metric.goal) for metric in config.metrics],
        sampler=config.sampler.name,
        seed=config.seed,
        cohort=resolve_cohort(config),
        startup=config.sampler.startup,
    )


def gate_defaults(config: SweepConfig) -> dict[str, Any]:
    """Every gate setting by its dotted key, for trials to override."""
    return flatten({"gate": config.gate.model_dump(mode="json")})


@dataclass(frozen=True)
class MakeGateTrial:
    """Puts a trial function together inside a worker, from arrays that lie in the object store."""

    metas: dict[str, dict[str, Any]]
    subnets: SubnetSet
    latency: LatencyTable
    defaults: dict[str, Any]

    def __call__(self, arrays: Mapping[str, NDArray[Any]]) -> GateTrial:
        """The trial function over the shared tables."""
        gate, val = (
            RoutingTable.from_arrays(
                {name: arrays[f"{split}/{name}"] for name in RoutingTable.ARRAYS}, self.metas[split]
            )
            for split in ("gate", "val")
        )
        return GateTrial(gate, val, GateScores(self.subnets, self.latency), self.defaults)


def _trial_runner(work: Launch, table_plan: StagePlan) -> RayRunner:
    config, prepared = work.config, work.prepared
    results = RunResults(work.run)
    assert results.latency is not None
    tables = {split: RoutingTable.load(work.run.table(table_plan.key, split)) for split in ("gate", "val")}
    metas = {split: table.meta() for split, table in tables.items()}
    tables_only = MakeGateTrial(metas, prepared.subnets, results.latency, gate_defaults(config))
    make: MakeCohortFunction = tables_only
    arrays = {f"{split}/{name}": array for split, table in tables.items() for name, array in table.arrays().items()}
    threads = 1
    if config.gate.trainer == "end_to_end":
        rules = config.gate.end_to_end
        settings = EndToEndSettings(
            epochs=rules.epochs, augmentation=_augmentation(prepared) if rules.augment else None
        )
        checkpoint = work.run.stage_dir("supernet", results.done_key("supernet")) / FINAL
        make = MakeEndToEndTrial(tables_only, checkpoint.absolute(), prepared.normalization, settings)
        data = prepared.data
        arrays |= shared_images(GateImages(data.images("gate"), data.labels("gate"), prepared.normalization))
        threads = rules.threads
    return RayRunner(
        make,
        arrays=arrays,
        num_actors=config.ray.trial_actors,
        threads=threads,
        timeout_s=resolve_timeout_s(config),
        retries=config.trial.retries,
    )


def _augmentation(prepared: Prepared) -> Augmentation:
    return Augmentation.for_images(prepared.image_set, **prepared.config.data.augment.model_dump())


class _Observer:
    """Shows and tracks each recorded trial."""

    def __init__(self, work: Launch, bar: Bar) -> None:
        self._work = work
        self._bar = bar
        self._manifest = work.manifest.read()

    def on_trial(self, record: TrialRecord) -> None:
        """A trial was recorded."""
        self._work.tracker.trial(trial_row(self._manifest, self._work.run, record))
        if record.state == "failed":
            self._work.progress.warn(f"{trial_name(record.slot)} failed: {record.reason}")
            self._bar.update(record.slot + 1)
        else:
            metrics = record.metrics
            self._bar.update(record.slot + 1, f"top1 {100 * metrics['top1']:.1f} %  {metrics['madds_m']:.3g} M MAdds")


def _save_gate(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    if arrays:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(path, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))
