"""The search stage: trials on persistent Ray actors that share the routing tables."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from dsnet.data.settings import Augmentation
from dsnet.errors import CheckpointError, NothingFeasibleError, StoppedError
from dsnet.files import atomic_write_bytes, known_sha256, set_aside
from dsnet.gates.end_to_end import GateImages
from dsnet.gates.settings import EndToEndSettings
from dsnet.image_size import ImageSize
from dsnet.measure.settings import MAIN_DEVICE
from dsnet.routing.routing_table import RoutingTable
from dsnet.space.subnet_set import SubnetSet
from dsnet.stored.checkpoint import load_supernet
from dsnet.stored.names import FINAL
from dsnet.wording import plural
from orchestration.config.command_lines import command_line, has_own_code
from orchestration.config.resolve import (
    constraint_set,
    enqueued_points,
    gate_space,
    resolve_cohort,
    resolve_halving,
    resolve_timeout_s,
    resolve_trials,
    target_set,
)
from orchestration.config.sweep import SweepConfig
from orchestration.pipeline.context import Launch
from orchestration.prepare.preparation import Prepared
from orchestration.prepare.reach import layout_ranges, spoken_reach
from orchestration.progress import Bar, Task
from orchestration.results.run import RunResults, load_router
from orchestration.results.search_end import SearchEnd, read_end, write_end
from orchestration.runs.folder import RunDir
from orchestration.runs.queue import read_queue
from orchestration.runs.stages import StageDir, StagePlan, canonical_settings
from orchestration.tracking.rows import trial_row
from orchestration.workers.end_to_end import EndToEndCheck, MakeEndToEndTrial, shared_images
from orchestration.workers.gate_trials import MakeGateTrial
from orchestration.workers.self_check import ArithmeticReport, StartCheck
from orchestration.workers.sent_network import SentNetwork, network_arrays
from orchestration.workers.trials import Actors, MakeCohortFunction, RayRunner, TrialLimits
from search.conditions.constraints import BASELINE, ConstraintSet
from search.front.points import trial_name
from search.gate_check import Finding, GateCheck
from search.study.engine import Budget, Search
from search.study.runner import TrialOutcome
from search.study.stopping import Plateau, StopRules
from search.study.study import Objective, StudyJournal, StudySettings, TrialRecord, has_study, load_records
from search.suggest.samplers import SamplerSettings
from search.suggest.space import parse_space

FOUND_ENOUGH = ("plateau", "target", "space")
"""Reasons for which a search ends for good although the budget has trials left."""
LATENCY = "latency_ms"
"""Prefix of the names of latency metrics."""
RULE_OFF = {"plateau": ("--set", "budget.plateau=null"), "target": ("--set", "budget.target=[]")}
"""Option and value that remove a stop rule, by the reason for which the rule ends a search."""


def trials_left(run: RunDir, plan: StagePlan, config: SweepConfig) -> int:
    """Number of trials that the budget still asks for; 0 if the search ended before under the same
    stop rules."""
    journal = run.study_journal(plan.key)
    records = load_records(journal) if has_study(journal) else []
    if _has_found_enough(run, plan, config, len(records)):
        return 0
    return max(0, resolve_trials(config) - len(records))


def needs_workers(run: RunDir, plan: StagePlan, config: SweepConfig) -> bool:
    """Whether a search has trials to run: further ones, or those whose gates were lost."""
    return trials_left(run, plan, config) > 0 or bool(trials_without_gate(run, plan))


def trials_without_gate(run: RunDir, plan: StagePlan) -> list[TrialRecord]:
    """The trials whose gate is missing, or is not the one that they stored."""
    journal = run.study_journal(plan.key)
    records = load_records(journal) if has_study(journal) else []
    return [record for record in records if _lacks_gate(run.gate_weights(plan.key, record.slot), record)]


def _lacks_gate(path: Path, record: TrialRecord) -> bool:
    if record.arrays_sha256 is None and record.state != "complete":
        return False
    if record.arrays_sha256 is not None:  # with its hash, it need not be read any further
        return not path.is_file() or known_sha256(path) != record.arrays_sha256
    try:
        load_router(path, record.arrays_sha256)
    except CheckpointError:
        return True
    return False


def _has_found_enough(run: RunDir, plan: StagePlan, config: SweepConfig, num_trials: int) -> bool:
    path = run.search_end_json(plan.key)
    if not path.exists():
        return False
    end = read_end(path)
    if end.reason == "space" and len(read_queue(run.queue_jsonl(plan.key))) > end.enqueued:
        return False  # enqueued points are tried even if the grid has none left
    return end.reason in FOUND_ENOUGH and end.rules == _rules_json(config) and end.trials == num_trials


def _rules_json(config: SweepConfig) -> dict[str, Any]:
    """The stop rules that end a search before its budget, in a form that can be compared."""
    references = {metric.name: metric.ref for metric in config.metrics}
    return {**config.budget.model_dump(mode="json", include={"plateau", "target"}), "references": references}


def continued(run: RunDir, plan: StagePlan, config: SweepConfig) -> StagePlan:
    """The plan of the search: it is not done while the budget still asks for trials."""
    left = trials_left(run, plan, config)
    if not plan.is_done or left == 0:
        return plan
    return replace(plan, status="resume", reasons=(f"{left} of {resolve_trials(config)} trials remain",))


def search_stage(work: Launch, plan: StagePlan, table_plan: StagePlan) -> None:
    """Search until the budget is spent or a stop rule ends the search; continues a study that has
    fewer trials.

    Raises:
        NothingFeasibleError: no router of these sub-networks can satisfy a hard constraint.
        StoppedError: a stop was requested.
    """
    work.check_stop()
    config, run = work.config, work.run
    plan = continued(run, plan, config)
    results = work.results
    constraints = constraint_set(config, named_baseline(results))
    _make_gates_again(work, plan, table_plan)

    def search(folder: Path) -> Sequence[Path]:
        # As part of the stage, so that trials of an earlier search, which obeyed other constraints,
        # are not taken for the trials of this one.
        refuse_impossible(constraints, results.metric_ranges)
        journal = StudyJournal.open(run.study_journal(plan.key), study_settings(config))
        report = ArithmeticReport(folder / "arithmetic.json", work.progress.warn)
        num_finished = len(journal.trials())
        task = Task("search", resolve_trials(config), "trial", line_every=resolve_cohort(config), start=num_finished)
        with closing(_trial_runner(work, table_plan, report)) as runner, work.progress.bar(task) as bar:
            result = Search(
                journal=journal,
                runner=runner,
                constraints=constraints,
                save_arrays=lambda slot, arrays: save_gate(run.gate_weights(plan.key, slot), arrays),
                progress=ProgressFiles(folder / "progress"),
                queue=lambda: [item["params"] for item in read_queue(run.queue_jsonl(plan.key))],
                observer=_Observer(work, bar, num_finished, plan.folder),
                should_stop=work.stop,
            ).run(Budget(resolve_trials(config), config.budget.time_s, stop_rules(results)))
        if result.stop_reason == "stop":
            raise StoppedError("the search was stopped; its finished trials are kept")
        end = SearchEnd(result.stop_reason, _rules_json(config), len(result.records), len(journal.enqueued))
        write_end(run.search_end_json(plan.key), end)
        if result.stop_reason in _END_SENTENCES:
            told = f"{_END_SENTENCES[result.stop_reason]} after {plural(len(result.records), 'trial')}"
            if len(result.records) == num_finished and result.stop_reason in RULE_OFF:
                more = ("--trials", "+N", *RULE_OFF[result.stop_reason])
                extend = command_line("extend", "RUN", *more, own_code=has_own_code(config))
                told += f"; to add trials, use: {extend}"
            work.progress.say(f"search: {told}")
        return [run.study_journal(plan.key), run.search_end_json(plan.key)]

    work.run_stage(plan, search)
    # Rows that an earlier launch could not write; those that MLflow has are not written twice.
    for record in results.records:
        work.tracker.trial(trial_row(results.manifest, run, record, results.kind_of(record)))
    work.progress.say(f"search: {count_sentence(results)}, {plural(len(results.front), 'gate')} on the front")


def _make_gates_again(work: Launch, plan: StagePlan, table_plan: StagePlan) -> None:
    """Run the trials again whose gates were lost; their records stay as they are.

    A gate with other bits than before is kept if its metrics are those of the record, which a
    processor that rounds differently need not reach; else the trial stays without a gate.
    """
    run, lost = work.run, trials_without_gate(work.run, plan)
    if not lost:
        return
    told = ", ".join(trial_name(record.slot) for record in lost[:MAX_NAMED]) + (
        ", ..." if len(lost) > MAX_NAMED else ""
    )
    paths = {record.slot: run.gate_weights(plan.key, record.slot) for record in lost}
    kept = [set_aside(path).name for path in paths.values() if path.exists()]
    work.progress.warn(
        f"search: the gates of {plural(len(lost), 'trial')} are missing or are not those that the trials stored ({told}); they "
        "are made again"
        + (f", and the damaged files are kept ({kept[0]}{', ...' if len(kept) > 1 else ''})" if kept else "")
    )
    report = ArithmeticReport(plan.folder.path / "arithmetic.json", work.progress.warn)
    journal = StudyJournal.open(run.study_journal(plan.key), study_settings(work.config))
    with closing(_trial_runner(work, table_plan, report)) as runner:
        for record, outcome in Search(journal=journal, runner=runner).rerun(lost):
            work.check_stop()
            if not _gives(outcome, record):
                work.progress.warn(
                    f"search: {trial_name(record.slot)} run again gives another gate than before (another processor, or other "
                    "libraries), so that it has none now; restore its file from a copy, or launch on a machine like the first"
                )
                continue
            sha256 = save_gate(paths[record.slot], outcome.arrays)
            if sha256 is not None and sha256 != record.arrays_sha256:
                journal.note_arrays(record.slot, sha256)


MAX_NAMED = 5
"""Largest number of trials that a warning names."""


def _gives(outcome: TrialOutcome, record: TrialRecord) -> bool:
    """Whether a trial run again has the metrics of its record; latencies are left out, because the
    parts may have been timed again since."""
    return outcome.state == "complete" and all(
        math.isclose(outcome.metrics.get(name, math.nan), value, rel_tol=0.0) or math.isnan(value)
        for name, value in record.metrics.items()
        if not name.startswith(LATENCY)
    )


_END_SENTENCES = {
    "plateau": "the hypervolume of the front no longer grows (budget.plateau)",
    "target": "a trial meets budget.target",
    "space": "every point of the grid was tried",
    "time": "the time limit was reached (budget.time_s)",
}


def count_sentence(results: RunResults) -> str:
    """A text that counts the trials by outcome."""
    counts = {
        "infeasible": len(results.completed) - len(results.feasible),
        "pruned": len(results.pruned),
        "failed": len(results.failed),
    }
    return ", ".join(
        [plural(len(results.completed), "trial"), *(f"{number} {what}" for what, number in counts.items() if number)]
    )


def named_baseline(results: RunResults) -> dict[str, float]:
    """Every metric of the widest static sub-network under its name in conditions."""
    return {f"{BASELINE}{name}": value for name, value in results.baseline.items()}


def refuse_impossible_layout(config: SweepConfig, subnets: SubnetSet, image_size: ImageSize) -> None:
    """Raise, before anything is trained, if no router over this layout can satisfy a hard
    constraint.

    Raises:
        NothingFeasibleError: the message names the constraints.
    """
    ranges = layout_ranges(config, subnets, image_size)
    unmeasured = {name: math.nan for name in ranges if name.startswith(BASELINE)}
    refuse_impossible(constraint_set(config, unmeasured), ranges)


def refuse_impossible(constraints: ConstraintSet, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Raise if no metrics within `ranges` can satisfy a hard constraint, because then no trial
    would be feasible.

    Raises:
        NothingFeasibleError: the message names the constraints, and the ranges of their metrics.
    """
    impossible = constraints.impossible(ranges)
    if impossible:
        names = {name for comparison in constraints.hard if comparison.text in impossible for name in comparison.names}
        raise NothingFeasibleError(
            f"constraints: no router of this network can satisfy {' or '.join(impossible)} (reachable values: "
            f"{spoken_reach(names, ranges)}); "
            "loosen it, or change the network"
        )


def study_settings(config: SweepConfig) -> StudySettings:
    """Everything on which the study's suggestions depend."""
    space = {key: distribution.written() for key, distribution in gate_space(config).items()}
    return StudySettings(
        name=config.name,
        space=parse_space(space),
        objectives=[Objective(metric.name, metric.goal) for metric in config.metrics],
        sampler=SamplerSettings(config.sampler.name, config.sampler.options, config.sampler.startup),
        seed=config.seed,
        cohort=resolve_cohort(config),
        order=config.sampler.order,
        enqueue=enqueued_points(config),
        halving=resolve_halving(config),
    )


def stop_rules(results: RunResults) -> StopRules:
    """The rules that end the search before its budget."""
    config = results.config
    rules = config.budget.plateau
    plateau = None if rules is None else Plateau(rules.trials, rules.gain, results.reference_point)
    return StopRules(plateau, target_set(config, named_baseline(results)))


class ProgressFiles:
    """Files in the search's folder with the arrays from which staged trials resume, so that a
    resumed sweep need not train them again. The name of a file has its SHA-256, and one that does
    not fit is not used."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, slot: int, rung: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Store a slot's arrays at a rung and remove those of earlier rungs."""
        self.forget(slot)
        if arrays:
            data = _safetensors(arrays)
            self._folder.mkdir(exist_ok=True)
            atomic_write_bytes(
                self._folder / f"slot-{slot:05d}-{rung}-{hashlib.sha256(data).hexdigest()}.safetensors", data
            )

    def load(self, slot: int, rung: int) -> Mapping[str, NDArray[Any]]:
        """The arrays stored at a rung; empty if there are none that can be read."""
        for path in self._folder.glob(f"slot-{slot:05d}-{rung}-*.safetensors"):
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() == path.stem.rpartition("-")[2]:
                return load(data)
        return {}

    def forget(self, slot: int) -> None:
        """Remove the files of a trial that has ended."""
        for path in self._folder.glob(f"slot-{slot:05d}-*.safetensors"):
            path.unlink(missing_ok=True)


def gate_defaults(config: SweepConfig) -> dict[str, Any]:
    """Every gate setting by its dotted key, for trials to override."""
    return canonical_settings({"gate": config.gate.model_dump(mode="json")})


def trial_actors(config: SweepConfig) -> Actors:
    """Number and size of the actors that run the trials of a search."""
    threads = config.gate.end_to_end.threads if config.gate.trainer == "end_to_end" else 1
    return Actors(number=config.ray.trial_actors, threads=threads, resources=config.ray.trial_resources)


def _trial_runner(work: Launch, table_plan: StagePlan, report: ArithmeticReport) -> RayRunner:
    config, prepared = work.config, work.prepared
    results = work.results
    assert results.latency is not None
    tables = {split: RoutingTable.load(work.run.table(table_plan.key, split)) for split in ("gate", "val")}
    metas = {split: table.meta() for split, table in tables.items()}
    devices = {name: table for name, table in results.latencies.items() if name != MAIN_DEVICE}
    tables_only = MakeGateTrial(metas, prepared.subnets, results.latency, gate_defaults(config), devices)
    make: MakeCohortFunction = tables_only
    arrays = {f"{split}/{name}": array for split, table in tables.items() for name, array in table.arrays().items()}
    look: Callable[[Any], Finding] = GateCheck.of_space(study_settings(config).space)
    if config.gate.trainer == "end_to_end":
        rules = config.gate.end_to_end
        settings = EndToEndSettings(
            epochs=rules.epochs, augmentation=_augmentation(prepared) if rules.augment else None
        )
        supernet, _ = load_supernet(work.run.stage_dir("supernet", results.done_key("supernet")) / FINAL)
        make = MakeEndToEndTrial(tables_only, SentNetwork.of(supernet), prepared.normalization, settings)
        data = prepared.data
        arrays |= network_arrays(supernet) | shared_images(
            GateImages(data.images("gate"), data.labels("gate"), prepared.normalization)
        )
        look = EndToEndCheck()
    return RayRunner(
        make,
        arrays=arrays,
        actors=trial_actors(config),
        limits=TrialLimits(timeout_s=resolve_timeout_s(config), retries=config.trial.retries),
        check=StartCheck(look, report.hear),
        should_stop=work.stop,
        tell=lambda text: work.progress.warn(f"search: {text}"),
    )


def _augmentation(prepared: Prepared) -> Augmentation:
    return Augmentation.for_images(prepared.image_set, **prepared.config.data.augment.model_dump())


class _Observer:
    """Shows each recorded trial as progress, writes it to the tracker, and copies the search now
    and then."""

    def __init__(self, work: Launch, bar: Bar, num_finished: int, folder: StageDir) -> None:
        self._work = work
        self._folder = folder
        self._bar = bar
        self._manifest = work.manifest.read()
        self._num_finished = num_finished

    def on_trial(self, record: TrialRecord) -> None:
        """Handle a recorded trial."""
        self._work.tracker.trial(trial_row(self._manifest, self._work.run, record, self._work.results.kind_of(record)))
        self._work.on_record(record)
        self._work.keep_search(self._folder)
        self._num_finished += 1
        if record.state == "complete":
            metrics = record.metrics
            text = f"last: top-1 {100 * metrics['top1']:.1f} %  {metrics['madds_m']:.3g} M MAdds"
            self._bar.update(self._num_finished, text)
            return
        if record.state == "failed":
            self._work.progress.warn(f"{trial_name(record.slot)} failed: {record.reason}")
        self._bar.update(self._num_finished)


def save_gate(path: Path, arrays: Mapping[str, NDArray[Any]]) -> str | None:
    """Store the arrays of a trial; returns the SHA-256 of the file, or None if there are no
    arrays."""
    if not arrays:
        return None
    data = _safetensors(arrays)
    path.parent.mkdir(exist_ok=True)
    atomic_write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


def _safetensors(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
