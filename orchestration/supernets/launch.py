"""Launch of a sweep of supernets: train each distinct one once, measure it, sweep its gates, and
find one front over all of them.

Every member is a complete run of its own below `supernets/` of the sweep's folder. The sweep's
folder itself holds what is common: the list of members, the front over all of them, one study, one
points file and the report.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from dsnet.environment import resolve_device
from dsnet.errors import (
    CheckpointError,
    ConfigError,
    DsnetError,
    NotFoundError,
    NothingFeasibleError,
    StoppedError,
    StorageError,
)
from dsnet.files import read_sealed, write_sealed
from dsnet.stop_signals import StopRequest
from dsnet.stored.checkpoint import load_supernet
from dsnet.stored.names import FINAL
from dsnet.wording import plural
from orchestration.config.export import gate_picks, point_sets
from orchestration.config.resolve import supernet_space
from orchestration.config.schedulers import check_scheduler
from orchestration.config.sweep import SweepConfig
from orchestration.pipeline.context import Launch
from orchestration.pipeline.export import Formats, export_bundles, export_point_sets, link_knee
from orchestration.pipeline.launch import (
    TRACKING_TIMEOUT_S,
    LaunchResult,
    anchored,
    clear_drafts,
    closing_tracker,
    launch,
    ray_where_needed,
    run_copies,
    stage_plans,
    supersede_others,
    write_facts,
    write_outputs,
)
from orchestration.pipeline.measure_and_table import measure_stage, table_stage
from orchestration.pipeline.placement import artifacts_url, training_threads
from orchestration.pipeline.run_copies import RunCopies
from orchestration.pipeline.search import needs_workers, refuse_impossible_layout, search_stage
from orchestration.pipeline.storage_watch import StorageWatch, check_reserve, run_reserve, watched
from orchestration.pipeline.structure import structure_stage
from orchestration.pipeline.supernet import done_sentence, supernet_outputs
from orchestration.pipeline.verify import verify_stage
from orchestration.prepare.preparation import Images, Prepared, load_images
from orchestration.progress import Bar, FiledProgress, ProgressView, Task
from orchestration.results.mlflow_store import store_uri
from orchestration.results.run import RunResults
from orchestration.results.supernet_facts import SupernetFacts
from orchestration.runs.curves import CurvePoint
from orchestration.runs.folder import RunDir
from orchestration.runs.lock import DriverLock
from orchestration.runs.manifest import Manifest
from orchestration.runs.stages import StageDir, StagePlan, begin_stage, finish_stage, record_done
from orchestration.supernets.entries import MemberEntry, read_entries, write_entries
from orchestration.supernets.members import Member, draw_members
from orchestration.supernets.report import write_supernets_report
from orchestration.supernets.results import GateId, SupernetSweepResults
from orchestration.supernets.study import SupernetStudy
from orchestration.supernets.tracking import (
    TreeTrackers,
    replay_supernets,
    running_row,
    standing_of,
    supernets_end_ms,
    track_fate,
    write_global_front,
    write_global_overview,
)
from orchestration.tracking.missing import MissingRows
from orchestration.tracking.protocol import Tracker
from orchestration.tracking.rows import (
    Standing,
    data_rows,
    sweep_end_ms,
    sweep_row,
    sweep_uid,
    unix_ms,
    write_artifacts,
    write_bundles,
)
from orchestration.workers.nodes import cluster_nodes
from orchestration.workers.runtime import LOCAL
from orchestration.workers.supernet import SupernetJob
from orchestration.workers.training_watch import StallRules
from orchestration.workers.tune_ledger import MemberFate, TuneRules, ledger_folder
from orchestration.workers.tune_supernets import (
    SweepCallbacks,
    TuneMember,
    ValImages,
    stored_fates,
    train_members,
)
from search.front.points import trial_name
from search.front.points_file import save_points
from search.study.study import TrialRecord

Stop = Callable[[RunDir], AbstractContextManager[StopRequest]]


def launch_sweep(
    config: SweepConfig, *, command: str, progress: ProgressView, stop: Stop, take_over: bool = False
) -> LaunchResult:
    """Run a sweep of either kind, or continue it; arguments and errors are those of
    `orchestration.pipeline.launch.launch`."""
    run = launch_supernets if supernet_space(config) else launch
    return run(config, command=command, progress=progress, stop=stop, take_over=take_over)


def launch_supernets(
    config: SweepConfig, *, command: str, progress: ProgressView, stop: Stop, take_over: bool = False
) -> LaunchResult:
    """Run a sweep of supernets, or continue it; arguments and errors are those of
    `orchestration.pipeline.launch.launch`."""
    config = anchored(config)
    check_supernets(config)
    run = RunDir(Path(config.storage.runs), config.name)
    images = load_images(config)
    members = draw_members(config, run, images, progress.warn)
    usable = [member for member in members if member.prepared is not None]
    if not usable:
        reasons = "\n".join(f"  {_told(member.settings)}: {member.problem}" for member in members)
        raise NothingFeasibleError(f"none of {plural(len(members), 'supernet')} has valid settings:\n{reasons}")
    if config.tracking.mlflow:
        store_uri(config, run)  # refuses a path that no database URI can hold, before anything is written
    check_reserve(run_reserve(config))
    run.create()
    with ExitStack() as stack:
        lock = stack.enter_context(DriverLock(run, command, take_over=take_over))
        watch = stack.enter_context(watched(run, run_reserve(config)))
        if lock.taken_over_from is not None:
            progress.say(f"continuing the run of {lock.taken_over_from}, which no longer runs")
        for member in usable:  # so that no other driver launches a member alone
            member.run.create()
            stack.enter_context(DriverLock(member.run, command, take_over=take_over))
            member.run.clear_stop()
        run.clear_stop()
        clear_drafts(run, config)
        request = stack.enter_context(stop(run))
        request.add(watch)
        progress = FiledProgress(progress, run.progress_json)
        sweep = _SupernetsLaunch.begin(config, watch, images, members, progress, request, stack)
        return sweep.run_all()


def check_supernets(config: SweepConfig) -> None:
    """Refuse settings that a sweep of supernets does not support, before anything is loaded.

    Raises:
        ConfigError: an unknown scheduler or option, or several workers for one supernet.
    """
    rules = config.supernets
    check_scheduler(rules.scheduler, rules.options)
    if config.supernet.workers != 1:
        raise ConfigError(
            f"supernet.workers is {config.supernet.workers}, but in a sweep of supernets each trains in one process; "
            "set it to 1, and set supernets.concurrent to train several at a time"
        )


def tune_rules(config: SweepConfig) -> TuneRules:
    """The rules by which the supernets of a sweep are scheduled."""
    rules = config.supernets
    return TuneRules(rules.scheduler, rules.options, rules.concurrent, rules.report_every, config.seed)


def tune_member(member: Member, plan: StagePlan, stop_file: Path, threads: int) -> TuneMember:
    """The description of a member that the scheduler takes."""
    prepared = member.prepared
    assert prepared is not None
    job = SupernetJob(
        subnets=prepared.subnets,
        run=prepared.supernet_run,
        folder=plan.folder.path,
        stop_file=stop_file,
        device=resolve_device(prepared.config.supernet.device),
        threads=threads,
        workers=1,
        is_local=prepared.config.ray.address == LOCAL,
        init_from=None if prepared.start is None else prepared.start.path,
        artifacts=artifacts_url(prepared.config, plan.folder.path),
        data_path=prepared.config.data.path,
    )
    return TuneMember(member.name, member.key, job, is_done=plan.is_done)


class _MemberRecords:
    """Records of the sweep's members; every change is written to the sweep's folder."""

    def __init__(self, run: RunDir, members: tuple[Member, ...]) -> None:
        self._run = run
        earlier = {entry.key: entry for entry in read_entries(run, everything=True)}
        self._entries = {member.name: _entry(member, earlier.get(member.key)) for member in members}
        write_entries(run, list(self._entries.values()))

    @property
    def entries(self) -> list[MemberEntry]:
        """The records of all members, in order."""
        return list(self._entries.values())

    def __getitem__(self, name: str) -> MemberEntry:
        return self._entries[name]

    def update(self, entry: MemberEntry) -> None:
        """Replace a member's record and write the file if it changed."""
        if self._entries[entry.name] != entry:
            self._entries[entry.name] = entry
            write_entries(self._run, self.entries)


def _entry(member: Member, earlier: MemberEntry | None) -> MemberEntry:
    if member.prepared is None:
        return MemberEntry(member.name, member.key, dict(member.settings), "failed", member.problem)
    entry = MemberEntry(
        member.name, member.key, dict(member.settings), epochs=member.prepared.supernet_run.train.epochs
    )
    if earlier is None:
        return entry
    return replace(earlier, settings=entry.settings, epochs=entry.epochs)


class _PrefixedProgress:
    """A progress view for one member: its label precedes every line and title."""

    def __init__(self, progress: ProgressView, label: str) -> None:
        self._progress = progress
        self._label = label

    def say(self, text: str) -> None:
        """Print a line."""
        self._progress.say(f"{self._label}: {text}")

    def warn(self, text: str) -> None:
        """Print a warning."""
        self._progress.warn(f"{self._label}: {text}")

    def bar(self, task: Task) -> AbstractContextManager[Bar]:
        """Show a progress bar for the length of a with-block."""
        return self._progress.bar(replace(task, title=f"{self._label}: {task.title}"))


def _replay_all(
    results: SupernetSweepResults,
    own: Mapping[str, Tracker],
    trackers: TreeTrackers,
    missing: MissingRows,
    progress: ProgressView,
) -> None:
    """Write all rows of a sweep with the trackers of its launch, `own`; members that the launch
    does not have get trackers that are closed here."""
    warn = missing.warned(progress.warn)
    for tracker, status, end_ms in replay_supernets(results, lambda name: own.get(name) or trackers.make(warn)):
        if tracker not in own.values():
            missing.add(tracker.close(status, end_ms, TRACKING_TIMEOUT_S))


@dataclass
class _TestOpeningCounter:
    """Counts in the manifest that the sweep reads `test`: once per launch, however many members
    have gates on the front."""

    manifest: Manifest
    _count: int | None = field(default=None, init=False)

    def __call__(self) -> int:
        if self._count is None:
            self._count = self.manifest.count_test_opening("verify: the front over all supernets")
        return self._count


@dataclass(frozen=True)
class _SupernetsLaunch:
    """One launch of a sweep of supernets."""

    config: SweepConfig
    results: SupernetSweepResults
    members: dict[str, Member]
    """Members whose settings make a valid supernet, by name; replaced when their sub-networks are
    chosen, and removed if that fails."""
    launches: dict[str, Launch]
    """What the stages of each member share, by the member's name."""
    manifest: Manifest
    tracker: Tracker
    progress: ProgressView
    stop: StopRequest
    storage: StorageWatch
    records: _MemberRecords
    study: SupernetStudy
    copies: RunCopies | None
    """The copies of what the sweep has beside its members; None without `storage.artifacts`."""

    @classmethod
    def begin(
        cls,
        config: SweepConfig,
        watch: StorageWatch,
        images: Images,
        members: tuple[Member, ...],
        progress: ProgressView,
        request: StopRequest,
        stack: ExitStack,
    ) -> _SupernetsLaunch:
        """Write the run's own files and open the outputs of the launch; `stack` closes them."""
        run = watch.run
        copies = run_copies(config, run, progress, "ledger")
        usable = {member.name: _in_one_experiment(member, config) for member in members if member.prepared is not None}
        first = next(iter(usable.values())).prepared
        assert first is not None
        for warning in dict.fromkeys(text for item in usable.values() for text in _prepared(item).warnings()):
            progress.warn(warning)
        manifest = write_facts(replace(first, config=config), run, progress.warn)
        records = _MemberRecords(run, members)
        study = SupernetStudy.open(run, config, records.entries)
        trackers = TreeTrackers(config, run)
        stack.callback(trackers.end)
        missing = MissingRows(run)
        tracker = trackers.make(missing.warned(progress.warn))
        parent = sweep_row(manifest.read(), run, config)
        tracker.parent(parent)
        tracker.datasets(data_rows(manifest.read()))
        own_progress = {name: _PrefixedProgress(progress, member.label) for name, member in usable.items()}
        own_copies = {name: run_copies(config, member.run, own_progress[name]) for name, member in usable.items()}
        manifests = {name: write_facts(_prepared(member), member.run, progress.warn) for name, member in usable.items()}
        opened = {name: RunResults(member.run, member.config) for name, member in usable.items()}
        results = SupernetSweepResults(run, opened)
        stack.enter_context(closing_tracker(run, tracker, missing, progress, lambda: supernets_end_ms(results)))
        launches = {}
        for name, member in usable.items():
            own = manifests[name]
            work = Launch(
                _prepared(member),
                opened[name],
                own,
                trackers.make(missing.warned(own_progress[name].warn)),
                own_progress[name],
                request,
                watch,
                on_record=_shown_in(study, name),
                copies=own_copies[name],
            )
            work.tracker.parent(replace(sweep_row(own.read(), member.run, member.config), under=parent))
            work.tracker.datasets(data_rows(own.read()))
            stack.enter_context(closing_tracker(member.run, work.tracker, missing, own_progress[name], _end_of(own)))
            launches[name] = work
        if config.tracking.mlflow:
            opened_trackers = {"": tracker} | {name: work.tracker for name, work in launches.items()}
            missing.repeat(lambda: _replay_all(results, opened_trackers, trackers, missing, progress), progress)
        return cls(
            config, results, usable, launches, manifest, tracker, progress, request, watch, records, study, copies
        )

    @property
    def run(self) -> RunDir:
        """The sweep's run folder."""
        return self.results.run

    def run_all(self) -> LaunchResult:
        """Train the supernets, sweep their gates, verify the front and write the report."""
        self._tell_members()
        plans = {name: stage_plans(work) for name, work in self.launches.items()}
        self._supersede_others(plans)
        is_idle = self._is_idle(plans)
        first = _prepared(next(iter(self.members.values())))
        at_a_time = min(self.config.supernets.concurrent, len(self.members))
        on_ray = self._stages_on_ray(plans)
        with ray_where_needed(on_ray, self.config, first, self.progress, self.storage, at_a_time=at_a_time):
            for name in list(self.members):
                self._choose_subnets(name, plans[name])
            trained = self._train(plans)
            for name in [] if is_idle else trained:
                self._sweep_gates(name)
        if is_idle:
            self._complete_copies(trained, plans)
            self.progress.say("all supernets, all trials and the front are done; nothing is left to do")
        self.results.refresh()
        self.study.add_missing(self.results)
        if not self.results.feasible:
            raise NothingFeasibleError(self._nothing_feasible())
        self._freeze()
        self._verify()
        return self._finish()

    def _supersede_others(self, plans: Mapping[str, Mapping[str, StagePlan]]) -> None:
        """Mark the rows of MLflow that belong to other supernets or settings than the present
        ones."""
        self.tracker.supersede([sweep_uid(work.manifest.read(), work.run) for work in self.launches.values()])
        for name, work in self.launches.items():
            supersede_others(work, plans[name])

    def _tell_members(self) -> None:
        for entry in self.records.entries:
            if entry.name in self.members:
                self.progress.say(f"{entry.name}: {_told(entry.settings)}")
            else:
                self.progress.warn(f"{entry.name}: {_told(entry.settings)} is invalid: {entry.reason}")

    def _choose_subnets(self, name: str, plans: Mapping[str, StagePlan]) -> None:
        """Choose the sub-networks of a member, where its settings have a choice. If that fails, the
        member has failed, and the others go on."""
        work = self.launches[name]
        if work.prepared.structure is None:
            return
        try:
            self._take_from_another(name, plans["structure"])
            chosen = structure_stage(work, stage_plans(work)["structure"])
            refuse_impossible_layout(chosen.config, chosen.prepared.subnets, chosen.prepared.image_size)
        except (StoppedError, StorageError):
            raise
        except DsnetError as error:
            work.progress.warn(str(error))
            self.records.update(replace(self.records[name], state="failed", reason=str(error)))
            del self.members[name], self.launches[name]
            if not self.members:
                raise NothingFeasibleError(self._nothing_feasible()) from error
            return
        self.launches[name] = chosen
        self.members[name] = replace(self.members[name], prepared=chosen.prepared)

    def _take_from_another(self, name: str, plan: StagePlan) -> None:
        """Copy the choice of sub-networks from a member that has made the same one: their settings
        differ in nothing on which it depends."""
        others = [StageDir(work.run.stage_dir("structure", plan.key)) for work in self.launches.values()]
        done = next((folder for folder in others if folder.is_done()), None)
        if plan.is_done or done is None:
            return

        def copied(folder: Path) -> list[Path]:
            shutil.copytree(done.path, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("stage.json", "done"))
            return [folder / file for file in done.outputs()]

        self.launches[name].run_stage(plan, copied)

    def _tune_members(self, plans: Mapping[str, Mapping[str, StagePlan]], threads: int) -> list[TuneMember]:
        return [
            tune_member(member, plans[name]["supernet"], self.run.stop_path, threads)
            for name, member in self.members.items()
        ]

    def _known_fates(self, plans: Mapping[str, Mapping[str, StagePlan]]) -> dict[str, MemberFate]:
        return stored_fates(self._tune_members(plans, 1), tune_rules(self.config), self.run.tune_dir)

    def _needs_ray(self, plans: Mapping[str, Mapping[str, StagePlan]]) -> bool:
        known = self._known_fates(plans)
        if known.keys() != self.members.keys():
            return True
        return any(
            needs_workers(self.launches[name].run, plans[name]["search"], self.launches[name].config)
            for name, fate in known.items()
            if fate.state == "trained"
        )

    def _stages_on_ray(self, plans: Mapping[str, Mapping[str, StagePlan]]) -> set[str]:
        """Names of the stages that need Ray in some member."""
        if not self._needs_ray(plans):
            return set()
        is_training = self._known_fates(plans).keys() != self.members.keys()
        is_choosing = any("structure" in own and not own["structure"].is_done for own in plans.values())
        return {"search", *(["supernet"] if is_training else []), *(["structure"] if is_choosing else [])}

    def _is_idle(self, plans: Mapping[str, Mapping[str, StagePlan]]) -> bool:
        """Whether earlier launches have done everything, and the last of them with these
        settings."""
        if self._needs_ray(plans):
            return False
        trained = [name for name, fate in self._known_fates(plans).items() if fate.state == "trained"]
        are_done = all(
            plan.is_done and self.launches[name].results.stage_key(plan.name) == plan.key
            for name in trained
            for plan in plans[name].values()
        )
        return are_done and self.results.is_verified

    def _train(self, plans: Mapping[str, Mapping[str, StagePlan]]) -> list[str]:
        """Train the supernets without an outcome, under the scheduler; returns the names of the
        trained ones."""
        rules = tune_rules(self.config)
        known = self._known_fates(plans)
        training = _TrainingListener(self, plans, known)
        if known.keys() == self.members.keys():
            fates = [known[name] for name in self.members]
        else:
            threads = training_threads(self.config, cluster_nodes(), self.config.supernets.concurrent)
            prepared = _prepared(next(iter(self.members.values())))
            data = prepared.data
            total = sum(entry.epochs for entry in self.records.entries if entry.name in self.members)
            with self.progress.bar(Task("supernets", total, "epoch", line_every=1)) as bar:
                training.bar = bar
                fates = train_members(
                    self._tune_members(plans, threads),
                    rules,
                    data=prepared.training_images(),
                    val=ValImages(data.images("val"), data.labels("val")),
                    folder=self.run.tune_dir,
                    callbacks=SweepCallbacks(
                        on_report=training.on_report,
                        on_points=training.on_points,
                        on_counted=training.on_counted,
                        on_stored=self._copy_reports,
                        on_fate=training.on_fate,
                        should_stop=self.stop,
                        stalls=StallRules(tell=lambda text: self.progress.warn(f"supernets: the worker of {text}")),
                    ),
                )
        self._complete_reports()
        for fate in fates:  # also those that an earlier launch has recorded
            training.on_fate(fate)
        for entry in self.records.entries:  # in the order of drawing, not the order in which they ended
            self.study.add_supernet(entry)
        trained = [fate.name for fate in fates if fate.state == "trained"]
        if not trained:
            reasons = "; ".join(f"{self.records[fate.name].label}: {fate.reason}" for fate in fates)
            raise NothingFeasibleError(f"no supernet completed its training; {reasons}")
        return trained

    def _copy_reports(self, folder: Path) -> None:
        if self.copies is not None:
            self.copies.keep(folder)

    def _complete_reports(self) -> None:
        """Copy the ledger of earlier launches, where they knew of no `storage.artifacts`."""
        folder = ledger_folder(self.run.tune_dir, tune_rules(self.config))
        if self.copies is not None and folder.is_dir() and not self.copies.has(folder):
            self.copies.keep(folder)

    def _complete_copies(self, trained: Sequence[str], plans: Mapping[str, Mapping[str, StagePlan]]) -> None:
        """Copy the stages that earlier launches have done, where they knew of no
        `storage.artifacts`."""
        for name in trained:
            for plan in plans[name].values():
                self.launches[name].keep(plan)

    def _sweep_gates(self, name: str) -> None:
        """Measure a trained supernet, build its routing tables, and search its gates."""
        work = self.launches[name]
        plans = stage_plans(work)
        for record in work.results.records:  # the merged study may lack some after a kill
            self.study.add_gate(name, record)
        supernet = load_supernet(plans["supernet"].folder.path / FINAL)[0]
        measure_stage(work, plans["measure"], supernet)
        table_stage(work, plans["table"], supernet)
        try:
            search_stage(work, plans["search"], plans["table"])
        except NothingFeasibleError as error:  # another supernet may have feasible gates
            work.progress.warn(str(error))
            self.records.update(replace(self.records[name], reason=str(error)))

    def _nothing_feasible(self) -> str:
        results = self.results
        broken = Counter(
            text
            for member in results.supernets.values()
            for record in member.records
            for text, value in record.constraints.items()
            if value > 0
        )
        most = f"; {broken.most_common(1)[0][1]} violate {broken.most_common(1)[0][0]}" if broken else ""
        reasons = [entry.reason for entry in results.entries if entry.reason]
        last = f"; reason of the last supernet that failed: {reasons[-1]}" if reasons else ""
        searched = plural(len(results.supernets), "supernet")
        if results.num_trials == 0:
            return f"no gate of {searched} was tried{last}"
        return f"none of the {plural(results.num_trials, 'trial')} of {searched} is feasible{most}{last}"

    def _freeze(self) -> None:
        """Write the front over all supernets, and for each member the gates that will run on
        `test`, before `test` is opened."""
        results = self.results
        names = [metric.name for metric in self.config.metrics]
        content = {
            "metrics": [[metric.name, metric.goal] for metric in self.config.metrics],
            "front": [
                _gate_json(gate) | {"values": [results.feasible[gate].metrics[name] for name in names]}
                for gate in results.front_gates
            ],
            "sample": [_gate_json(gate) for gate in results.front_sample],
        }
        _write_changed(self.run.front_json, content)
        for name, member in results.supernets.items():
            if member.is_done("search"):
                slots = sorted(gate.slot for gate in results.front_sample if gate.supernet == name)
                _write_changed(member.run.chosen_json(member.done_key("search")), {"slots": slots})
        shares = Counter(gate.supernet for gate in results.front_gates)
        told = ", ".join(f"{count} of {results.entry(name).label}" for name, count in shares.items())
        self.progress.say(
            f"front over {plural(len(results.supernets), 'supernet')}: {plural(len(results.front_gates), 'gate')} ({told})"
        )

    def _verify(self) -> None:
        counter = _TestOpeningCounter(self.manifest)
        self.results.refresh()  # the members read which of their gates were chosen
        chosen = {gate.supernet for gate in self.results.front_sample}
        for name in [name for name in self.results.supernets if name in chosen]:
            work = replace(self.launches[name], on_test_opening=counter)
            plans = stage_plans(work)
            supernet = load_supernet(plans["supernet"].folder.path / FINAL)[0]
            verify_stage(work, plans, supernet)
        if self.copies is not None:
            self.copies.keep_manifest()  # it counts the readings of test

    def _finish(self) -> LaunchResult:
        """Write points, reports, bundles and MLflow rows, all derived from the results of the
        stages."""
        results = self.results
        results.refresh()
        self.study.add_missing(results)
        for name in results.supernets:
            self._finish_member(name, standing_of(results, name))
        save_points(self.run.points_parquet, results.points())
        first = _prepared(next(iter(self.members.values())))
        write_supernets_report(results, first.notes(), "complete")
        prepared = {name: _prepared(member) for name, member in self.members.items()}
        formats = Formats(self.config.export.formats, say=self.progress.say)
        bundles = export_gates(results, self.config.export.picks, prepared, self.run.export_dir, formats)
        write_global_front(self.tracker, results)
        write_artifacts(self.tracker, self.run)
        if self.config.tracking.mlflow:
            write_global_overview(self.tracker, results, redraw=True)
        write_bundles(self.tracker, bundles, self.run.export_dir, self.config.export.register_as)
        return LaunchResult(results, tuple(bundles))

    def _finish_member(self, name: str, standing: Standing) -> None:
        work = self.launches[name]
        note = f"One supernet of the sweep {self.run.name}; its gates on the front over all supernets ran on test."
        write_outputs(work, (*work.prepared.notes(), note), standing)
        work.tracker.close("FINISHED", sweep_end_ms(work.results.manifest), TRACKING_TIMEOUT_S)


class _TrainingListener:
    """Records events of the supernets' training: reports, points of loss curves, and outcomes."""

    def __init__(
        self, sweep: _SupernetsLaunch, plans: Mapping[str, Mapping[str, StagePlan]], known: Mapping[str, MemberFate]
    ) -> None:
        self._sweep = sweep
        self._plans = plans
        self._began_s: dict[str, float] = {}
        self._epochs = {name: float(fate.reports[-1][0]) if fate.reports else 0.0 for name, fate in known.items()}
        self._ended: set[str] = set()
        self.bar: Bar | None = None
        for name in sweep.members:
            if name not in known:
                sweep.records.update(replace(sweep.records[name], state="waiting", reason=None))

    def on_report(self, name: str, epoch: int, value: float) -> None:
        """Record a report: the hypervolume of a supernet's static sub-networks after an epoch."""
        entry = self._sweep.records[name]
        reports = tuple(sorted({**dict(entry.reports), epoch: value}.items()))
        self._sweep.records.update(replace(entry, reports=reports))
        self._show(name, epoch, f"static hypervolume {value:.4f}")

    def on_points(self, name: str, points: list[CurvePoint]) -> None:
        """Show new points of a supernet's loss curves."""
        self._begin(name)
        if points:
            self._show(name, points[-1].metrics.get("epoch") or 0.0, "")

    def on_counted(self, name: str, points: list[CurvePoint]) -> None:
        """Record the points of a supernet's loss curves that count."""
        self._begin(name)
        self._sweep.launches[name].tracker.curve(points)

    def on_fate(self, fate: MemberFate) -> None:
        """Record the outcome of a supernet's training; a second call for the same one does
        nothing."""
        if fate.name in self._ended:
            return
        self._ended.add(fate.name)
        sweep, work, plan = self._sweep, self._sweep.launches[fate.name], self._plans[fate.name]["supernet"]
        is_new = not plan.is_done and sweep.records[fate.name].state != fate.state
        if fate.state == "trained":
            self._finish_training(fate.name, plan)
        entry = replace(sweep.records[fate.name], state=fate.state, reason=fate.reason, reports=fate.reports)
        entry = _with_times(entry, work)
        sweep.records.update(entry)
        if fate.state == "trained":
            work.keep(plan)
        elif work.copies is not None:
            work.copies.keep_manifest()  # with the time of the training
        self._track(entry, work)
        if is_new:
            self._tell(entry, work)

    def _finish_training(self, name: str, plan: StagePlan) -> None:
        work = self._sweep.launches[name]
        if plan.is_done:
            record_done(work.run, plan)
            return
        self._begin(name)
        seconds = time.monotonic() - self._began_s[name]
        stem = plan.folder.path / FINAL
        finish_stage(work.run, plan, supernet_outputs(stem), seconds)

    def _begin(self, name: str) -> None:
        if name in self._began_s:
            return
        self._began_s[name] = time.monotonic()
        work = self._sweep.launches[name]
        begin_stage(work.run, self._plans[name]["supernet"])
        work.tracker.supernet(running_row(work.run, work.manifest, work.config))

    def _track(self, entry: MemberEntry, work: Launch) -> None:
        track_fate(work.tracker, entry, work)
        if entry.state != "trained":
            work.tracker.close("FAILED" if entry.state == "failed" else "FINISHED", entry.end_ms, TRACKING_TIMEOUT_S)

    def _tell(self, entry: MemberEntry, work: Launch) -> None:
        if entry.state == "trained":
            seconds = (entry.end_ms - entry.start_ms) / 1000
            work.progress.say(f"supernet: {done_sentence(SupernetFacts.of_prepared(work.prepared), seconds)}")
        else:
            work.progress.warn(f"supernet {entry.state}: {entry.reason}")

    def _show(self, name: str, epoch: float, text: str) -> None:
        self._epochs[name] = max(epoch, self._epochs.get(name, 0.0))
        if self.bar is not None:
            self.bar.update(sum(self._epochs.values()), f"{self._sweep.records[name].label}  epoch {epoch:.3g}  {text}")


def _with_times(entry: MemberEntry, work: Launch) -> MemberEntry:
    """The entry with the start and end of its training; times that are set do not change, as rows
    repeat them."""
    if entry.start_ms and entry.end_ms:
        return entry
    stage = work.manifest.read()["stages"].get("supernet")
    start_ms = round(1000 * time.time()) if stage is None else unix_ms(stage["started_at"])
    if stage is not None and stage["seconds"] is not None:
        return replace(entry, start_ms=start_ms, end_ms=start_ms + round(1000 * stage["seconds"]))
    return replace(entry, start_ms=start_ms, end_ms=round(1000 * time.time()))


def export_gates(
    results: SupernetSweepResults,
    picks: Sequence[str],
    prepared: Mapping[str, Prepared],
    folder: Path,
    formats: Formats,
) -> list[Path]:
    """Write a bundle for each picked gate, in one folder per supernet; returns the bundles'
    folders.

    A set of operating points is one bundle for each supernet with a gate on the front over all
    supernets, because its points share their weights: `front` has the gates of this front that are
    the supernet's, `members` all static sub-networks of the supernet.

    Args:
        results: results of the sweep.
        picks: see `SupernetSweepResults.picked`; also `members` and `front`.
        prepared: data and layout of the supernets of these gates, and of `picked_supernets`.
        folder: receives the folders of the supernets.
        formats: the formats of each bundle.

    Raises:
        NotFoundError: a pick selects nothing.
    """
    slots: dict[str, list[int]] = {}
    for gate in results.picked(gate_picks(picks)):
        slots.setdefault(gate.supernet, []).append(gate.slot)
    bundles = {
        (name, slot): path
        for name, own in slots.items()
        for slot, path in zip(
            own,
            export_bundles(prepared[name], results.supernets[name], own, folder / name, formats),
            strict=True,
        )
    }
    paths = list(bundles.values())
    sets = point_sets(picks)
    for name in picked_supernets(results, sets):
        own, front = results.supernets[name], results.front_slots[name]
        paths += export_point_sets(prepared[name], own, sets, front, folder / name, formats)
    knee = results.knee
    if knee is not None:
        link_knee(folder, folder / knee.supernet / trial_name(knee.slot))
    return paths


def picked_supernets(results: SupernetSweepResults, picks: Sequence[str]) -> list[str]:
    """Names of the supernets of which bundles are written.

    Raises:
        ConfigError, NotFoundError: as `SupernetSweepResults.picked`; or a set of operating points
            is picked, and there is no front.
    """
    names = [gate.supernet for gate in results.picked(gate_picks(picks))]
    sets = point_sets(picks)
    if sets and not results.front_slots:
        raise NotFoundError(f"pick {sets[0]!r}: the sweep {results.run.name!r} has no gate on a front yet")
    return list(dict.fromkeys([*names, *(results.front_slots if sets else ())]))


def _prepared(member: Member) -> Prepared:
    assert member.prepared is not None
    return member.prepared


def _in_one_experiment(member: Member, config: SweepConfig) -> Member:
    """The member with the sweep's experiment, so that it writes to the same rows when launched or
    synced alone; its store is that of the sweep (`orchestration.results.mlflow_store`)."""
    prepared = _prepared(member)
    if not config.tracking.mlflow:
        return member
    tracking = config.tracking.model_copy(update={"experiment": config.tracking.experiment or config.name})
    own = prepared.config.model_copy(update={"tracking": tracking})
    return replace(member, prepared=replace(prepared, config=own))


def _shown_in(study: SupernetStudy, name: str) -> Callable[[TrialRecord], None]:
    return lambda record: study.add_gate(name, record)


def _end_of(manifest: Manifest) -> Callable[[], int]:
    return lambda: sweep_end_ms(manifest.read())


def _gate_json(gate: GateId) -> dict[str, object]:
    return {"supernet": gate.supernet, "slot": gate.slot}


def _write_changed(path: Path, content: dict[str, object]) -> None:
    """Write a sealed JSON file if it is missing, damaged, or has other content."""
    plain = json.loads(json.dumps(content))
    with suppress(CheckpointError):  # a damaged file is replaced: all of it is known
        if path.is_file() and read_sealed(path) == plain:
            return
    write_sealed(path, plain)


def _told(settings: Mapping[str, object]) -> str:
    return ", ".join(f"{key.removeprefix('supernet.')} {value}" for key, value in settings.items())
