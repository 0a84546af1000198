"""A sweep from its configuration to its front: stages in order, each done once, each continued where it was stopped."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save

from dsnet.checkpoint import load_supernet
from dsnet.cost import subnet_cost
from dsnet.data import TensorData
from dsnet.errors import NothingFeasibleError, StoppedError, TooManyFailedTrialsError
from dsnet.files import atomic_write_bytes, atomic_write_json, atomic_write_text
from dsnet.latency import LatencyTable, measure_latency
from dsnet.routing_table import RoutingTable
from dsnet.space import SubnetSet
from dsnet.supernet import Supernet
from dsnet.training.evaluate import build_routing_table, subnet_accuracy
from dsnet.training.supernet import FINAL
from orchestration.config import SweepConfig, to_yaml
from orchestration.export import export_bundles, picked_slots
from orchestration.preparation import (
    Prepared,
    latency_settings,
    prepare,
    resolve_device,
    stage_definitions,
    supernet_run,
    verify_definition,
    write_splits,
)
from orchestration.progress import Bar, ProgressView
from orchestration.projection import (
    make_tracker,
    subnet_rows,
    supernet_row,
    sweep_row,
    trial_row,
    write_front,
    write_widths,
)
from orchestration.ray_runtime import RaySettings, ray_session
from orchestration.ray_supernet import SupernetJob, train_on_ray
from orchestration.ray_trials import RayRunner
from orchestration.reporting import write_report
from orchestration.results import RunResults, load_router
from orchestration.rundir import DriverLock, Manifest, RunDir, describe_hardware
from orchestration.signals import StopRequest
from orchestration.stages import StagePlan, flatten, plan_stage, plan_stages, run_stage
from orchestration.tracking import CurvePoint, Tracker
from orchestration.verification import check_agreement, time_front
from search.analysis import analyse_split
from search.engine import Budget, Search
from search.gate_trial import GateTrial
from search.points import save_points, trial_name
from search.space import parse_space
from search.study import Objective, StudyJournal, StudySettings, TrialRecord, load_records

TRACKING_TIMEOUT_S = 30.0
EVALUATION_BATCH = 256


@dataclass(frozen=True)
class LaunchResult:
    """What a finished launch leaves behind."""

    run: RunDir
    results: RunResults
    bundles: tuple[Path, ...]
    num_failed: int


@dataclass(frozen=True)
class _Launch:
    """What the stages of one launch share."""

    prepared: Prepared
    run: RunDir
    manifest: Manifest
    tracker: Tracker
    progress: ProgressView
    stop: StopRequest

    @property
    def config(self) -> SweepConfig:
        return self.prepared.config

    def check_stop(self) -> None:
        """Raise StoppedError where a stop was asked for."""
        if self.stop():
            raise StoppedError("the sweep was stopped")


def launch(
    config: SweepConfig,
    *,
    command: str,
    progress: ProgressView,
    stop: Callable[[RunDir], AbstractContextManager[StopRequest]],
    take_over: bool = False,
) -> LaunchResult:
    """Run a sweep, or continue it.

    Args:
        config: resolved.
        command: what the user typed, for the lock.
        progress: what a person sees.
        stop: gives, for the run folder, a context manager that yields a `StopRequest`.
        take_over: take the lock of another host.

    Raises:
        StoppedError: stopped early; launching again continues.
        VerificationError, NothingFeasibleError, TooManyFailedTrialsError, LockedError, PreflightError, ...: see dsnet.errors.
    """
    prepared = prepare(config)
    run = RunDir(Path(config.storage.runs), config.name)
    run.create()
    with DriverLock(run, command, take_over=take_over) as lock:
        if lock.taken_over_from is not None:
            progress.say(f"continuing after {lock.taken_over_from}, which is gone")
        run.clear_stop()
        with stop(run) as request:
            manifest = _write_facts(prepared, run)
            tracker = make_tracker(config, run, progress.warn)
            work = _Launch(prepared, run, manifest, tracker, progress, request)
            with _closing(work):
                return _run_stages(work)


def _write_facts(prepared: Prepared, run: RunDir) -> Manifest:
    """The run's own files: resolved configuration, manifest, splits."""
    manifest = Manifest(run.manifest_path)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    manifest.create(seed=prepared.config.seed, hardware=describe_hardware(gpu))
    manifest.update(data_hashes={"images": prepared.image_set.fingerprint, "splits": prepared.splits.hash})
    atomic_write_text(run.sweep_yaml, to_yaml(prepared.config))
    write_splits(run.splits_json, prepared.splits)
    return manifest


@contextmanager
def _closing(work: _Launch) -> Iterator[None]:
    """Whatever ends the launch, MLflow hears how."""
    status: Any = "FAILED"
    try:
        yield
        status = "FINISHED"
    except (StoppedError, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        summary = work.tracker.close(status, int(time.time() * 1000), TRACKING_TIMEOUT_S)
        if summary.num_unsent:
            work.progress.warn(
                f"{summary.num_unsent} writes to MLflow were not made; later: dsnet-orch sync {work.run.sweep_yaml.parent}"
            )


def _run_stages(work: _Launch) -> LaunchResult:
    config, run = work.config, work.run
    plans = {plan.name: plan for plan in plan_stages(run, stage_definitions(config, work.prepared.fingerprint))}
    work.tracker.parent(sweep_row(work.manifest.read(), run, config))
    needs_ray = not plans["supernet"].is_done or _trials_left(run, plans["search"], config) > 0
    with _ray_where_needed(needs_ray, config, work.prepared, work.progress):
        _supernet_stage(work, plans["supernet"])
        supernet = load_supernet(plans["supernet"].folder.path / FINAL)[0]
        _measure_stage(work, plans["measure"], supernet)
        _table_stage(work, plans["table"], supernet)
        _search_stage(work, plans["search"], plans["table"])
    results = RunResults(run)
    if not results.completed:
        raise NothingFeasibleError(_nothing_completed(results))
    _verify_stage(work, plans, supernet, results.front)
    return _finish(work)


@contextmanager
def _ray_where_needed(is_needed: bool, config: SweepConfig, prepared: Prepared, progress: ProgressView) -> Iterator[None]:
    """Ray, where a stage still needs it."""
    if not is_needed:
        yield
        return
    images = prepared.data.images("train")
    needed_mib = int(1.5 * images.numel() / 2**20) + 100  # the training images lie in the object store once
    progress.say("starting Ray ...")
    settings = RaySettings(
        address=config.ray.address,
        num_cpus=config.ray.num_cpus,
        object_store_mib=max(config.ray.object_store_mib, needed_mib),
    )
    with ray_session(settings):
        yield


def _supernet_stage(work: _Launch, plan: StagePlan) -> None:
    config, run = work.config, work.run
    if plan.is_done:
        work.progress.say(f"supernet: done before ({plan.key[:12]})")
    training = supernet_run(work.prepared)
    device = resolve_device(config.supernet.device)
    threads = config.supernet.threads or max(1, (config.ray.num_cpus or _num_cores()) // config.supernet.workers)

    def train(folder: Path) -> Sequence[Path]:
        manifest = work.manifest.read()
        work.tracker.supernet(supernet_row(manifest, run, config, is_done=False))
        job = SupernetJob(
            subnets=work.prepared.subnets,
            run=training,
            folder=folder,
            stop_file=run.stop_path,
            device=device,
            threads=threads,
            workers=config.supernet.workers,
        )
        epochs = training.train.epochs
        with work.progress.bar("supernet (epochs)", epochs) as bar:

            def on_points(points: list[CurvePoint]) -> None:
                work.tracker.curve(points)
                if points:
                    bar.update(points[-1].metrics["epoch"] or 0.0, _losses(points[-1]))

            data = work.prepared.data
            stem = train_on_ray(
                job, data.images("train"), data.labels("train"), on_points=on_points, should_stop=work.stop
            )
        return [stem.with_name(stem.name + suffix) for suffix in (".safetensors", ".json")]

    was_done = plan.is_done
    folder = run_stage(run, plan, train)
    # Also where it was done before: the row may have been lost with an earlier store.
    work.tracker.supernet(supernet_row(work.manifest.read(), run, config, is_done=True))
    if not was_done:
        work.progress.say(f"supernet: trained in {folder.seconds() or 0:.0f} s")


def _losses(point: CurvePoint) -> str:
    losses = {
        name.removeprefix("loss/"): value
        for name, value in point.metrics.items()
        if name.startswith("loss/") and value is not None
    }
    shown = [name for name in losses if name in ("largest", min(losses))]
    return "  ".join(f"{name} {losses[name]:.3f}" for name in shown)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


def _measure_stage(work: _Launch, plan: StagePlan, supernet: Supernet) -> None:
    work.check_stop()
    data, subnets, size = work.prepared.data, work.prepared.subnets, work.prepared.image_size

    def measure(folder: Path) -> Sequence[Path]:
        rows = []
        with work.progress.bar("measure: accuracy", len(subnets.all)) as bar:
            for number, subnet in enumerate(subnets.all):
                work.check_stop()
                top1, top5 = subnet_accuracy(
                    supernet, subnet, data, "val", work.prepared.normalization, EVALUATION_BATCH
                )
                cost = subnet_cost(supernet.spec, subnet, size)
                is_teacher = subnet == subnets.teacher
                rows.append(
                    {
                        "name": subnet.name,
                        "top1": top1,
                        "top5": top5,
                        "madds": cost.madds,
                        "params": cost.params,
                        "is_teacher": is_teacher,
                    }
                )
                bar.update(number + 1)
        settings = latency_settings(work.config)
        with work.progress.bar("measure: latency", len(settings.batch_sizes) + len(settings.group_sizes)) as bar:
            latency = measure_latency(supernet, size, settings, lambda done, total: bar.update(done))
        supernet.cpu()
        outputs = [folder / "subnets.json", folder / "latency.json"]
        atomic_write_json(outputs[0], {"split": "val", "num_images": data.num_images("val"), "subnets": rows})
        atomic_write_json(outputs[1], latency.to_json())
        return outputs

    run_stage(work.run, plan, measure)
    results = RunResults(work.run)
    rows = subnet_rows(results.manifest, work.run, results)
    for row in rows:
        work.tracker.subnet(row)
    write_widths(work.tracker, results, rows[0].end_ms or rows[0].start_ms)
    widest = max((subnet for subnet in results.subnets if not subnet.is_teacher), key=lambda subnet: subnet.madds)
    work.progress.say(
        f"measure: {len(subnets)} sub-networks, {widest.name} (widest) has top-1 {100 * widest.top1:.1f} % on val at {widest.madds / 1e6:.3g} M MAdds"
    )


def _table_stage(work: _Launch, plan: StagePlan, supernet: Supernet) -> None:
    work.check_stop()

    def tabulate(folder: Path) -> Sequence[Path]:
        return [
            _build_table(work, supernet, work.prepared.data, split, work.run.table(plan.key, split))
            for split in ("gate", "val")
        ]

    run_stage(work.run, plan, tabulate)


def _build_table(work: _Launch, supernet: Supernet, data: TensorData, split: str, path: Path) -> Path:
    supernet = supernet.to(resolve_device(work.config.supernet.device))
    with work.progress.bar(f"table: {split}", data.num_images(split)) as bar:
        table = build_routing_table(
            supernet,
            data,
            split,
            work.prepared.normalization,
            batch_size=EVALUATION_BATCH,
            on_progress=lambda done, total: bar.update(done),
        )
    supernet.cpu()
    table.save(path)
    return path


def _trials_left(run: RunDir, plan: StagePlan, config: SweepConfig) -> int:
    """Trials that the budget still asks for."""
    journal = run.study_journal(plan.key)
    done = len(load_records(journal)) if journal.exists() else 0
    return max(0, config.budget.trials - done)


def _search_stage(work: _Launch, plan: StagePlan, table_plan: StagePlan) -> None:
    work.check_stop()
    config, run = work.config, work.run
    if plan.is_done and _trials_left(run, plan, config) > 0:
        plan = replace(plan, status="resume", reasons=("the budget was raised",))

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
        cohort=config.sampler.cohort,
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
        return GateTrial(gate, val, self.subnets, self.latency, self.defaults)


def _trial_runner(work: _Launch, table_plan: StagePlan) -> RayRunner:
    config = work.config
    latency = RunResults(work.run).latency
    assert latency is not None
    tables = {split: RoutingTable.load(work.run.table(table_plan.key, split)) for split in ("gate", "val")}
    make = MakeGateTrial(
        {split: table.meta() for split, table in tables.items()}, work.prepared.subnets, latency, gate_defaults(config)
    )
    return RayRunner(
        make,
        arrays={f"{split}/{name}": array for split, table in tables.items() for name, array in table.arrays().items()},
        num_actors=config.ray.trial_actors or config.ray.num_cpus or _num_cores(),
        timeout_s=config.trial.timeout_s,
        retries=config.trial.retries,
    )


class _Observer:
    """Shows and tracks each recorded trial."""

    def __init__(self, work: _Launch, bar: Bar) -> None:
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


def _nothing_completed(results: RunResults) -> str:
    reasons = [record.reason for record in results.records if record.reason]
    return (
        f"none of the {len(results.records)} trials completed; the last reason: {reasons[-1] if reasons else 'unknown'}"
    )


def _verify_stage(work: _Launch, plans: Mapping[str, StagePlan], supernet: Supernet, front: tuple[int, ...]) -> None:
    """Freeze the front, open the sealed split, run the front for real."""
    work.check_stop()
    config, run, prepared = work.config, work.run, work.prepared
    definition = verify_definition(config, prepared.fingerprint, front)
    plan = plan_stage(run, definition, {"search": plans["search"].key})

    def verify(folder: Path) -> Sequence[Path]:
        num_openings = work.manifest.count_test_opening("verify")
        data = prepared.open_test()
        table_key, search_key = plans["table"].key, plans["search"].key
        sealed = run.sealed_table(table_key)
        if not sealed.exists():
            _build_table(work, supernet, data, "test", sealed)
        test, val = RoutingTable.load(sealed), RoutingTable.load(run.table(table_key, "val"))
        routers = {slot: load_router(run.gate_weights(search_key, slot)) for slot in front}
        agreements = []
        with work.progress.bar("verify: the front on test", len(routers)) as bar:
            for slot, router in routers.items():
                work.check_stop()
                net = supernet.to(resolve_device(config.supernet.device))
                agreements.append(check_agreement(slot, net, router, test, data.images("test"), prepared.normalization))
                bar.update(len(agreements))
        latency = time_front(supernet, routers, data.images("test"), prepared.normalization, latency_settings(config))
        num_classes = prepared.image_set.num_classes
        content = {
            "front": list(front),
            "num_openings": num_openings,
            "agreements": [asdict(agreement) for agreement in agreements],
            "latency": latency.to_json(),
            "val": analyse_split(val, val, routers, num_classes=num_classes).to_json(),
            "test": analyse_split(val, test, routers, num_classes=num_classes).to_json(),
        }
        output = folder / "verify.json"
        atomic_write_json(output, content)
        return [output]

    run_stage(run, plan, verify)
    verified = RunResults(run).verified
    assert verified is not None
    ties = sum(agreement.num_ties for agreement in verified.agreements)
    work.progress.say(
        f"verify: {len(front)} gates ran on {verified.test.num_images} test images as the table said, image by image"
        + (f" ({ties} numerical ties)" if ties else "")
    )


def _finish(work: _Launch) -> LaunchResult:
    """Points, report, bundles, MLflow: projections of what the stages found."""
    run, config = work.run, work.config
    results = RunResults(run)
    save_points(run.points_parquet, results.points())
    write_report(results, work.prepared.image_set.class_names, work.prepared.notes(), "complete")
    bundles = export_bundles(work.prepared, results, picked_slots(results, config.export.picks), run.export_dir)
    write_front(work.tracker, results, results.finished_ms)
    for path in (run.sweep_yaml, run.points_parquet, run.report_html):
        work.tracker.artifact(path)
    num_failed = len(results.records) - len(results.completed)
    return LaunchResult(run, results, tuple(bundles), num_failed)


def check_failures(result: LaunchResult) -> None:
    """Raise where more trials failed than the budget allows; the sweep itself is finished and reported.

    Raises:
        TooManyFailedTrialsError: it says how many, and the commonest reason.
    """
    total, allowed = len(result.results.records), result.results.config.budget.max_failed
    if result.num_failed > allowed * total:
        reasons = Counter(record.reason for record in result.results.records if record.reason)
        raise TooManyFailedTrialsError(
            f"{result.num_failed} of {total} trials failed, more than budget.max_failed {allowed:g} allows; "
            f"most often: {reasons.most_common(1)[0][0]}"
        )
