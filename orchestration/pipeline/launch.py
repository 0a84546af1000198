"""A sweep from its configuration to its front: stages in order, each run once and continued where
it was stopped."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from dsnet.data.splits import SPLIT_NAMES
from dsnet.errors import NothingFeasibleError, StoppedError, TooManyFailedTrialsError
from dsnet.files import remove_drafts
from dsnet.stop_signals import StopRequest
from dsnet.storage_faults import storage_error
from dsnet.stored.checkpoint import load_supernet
from dsnet.stored.names import FINAL
from dsnet.wording import plural
from orchestration.config.command_lines import command_line, has_own_code
from orchestration.config.sweep import SweepConfig
from orchestration.pipeline.context import Launch
from orchestration.pipeline.export import Formats, export_picks
from orchestration.pipeline.measure_and_table import measure_stage, table_stage
from orchestration.pipeline.mending import mend_run, mend_search
from orchestration.pipeline.placement import artifacts_url, refuse_client, refuse_what_cannot_fit
from orchestration.pipeline.run_copies import RunCopies
from orchestration.pipeline.search import needs_workers, refuse_impossible_layout, search_stage
from orchestration.pipeline.storage_watch import StorageWatch, check_reserve, ray_reserve, run_reserve, watched
from orchestration.pipeline.structure import structure_stage
from orchestration.pipeline.supernet import supernet_stage
from orchestration.pipeline.verify import verify_stage
from orchestration.prepare.adoption import adopt
from orchestration.prepare.preparation import Prepared, prepare, stage_definitions, write_splits
from orchestration.progress import FiledProgress, ProgressView
from orchestration.results.mlflow_store import store_uri, whole_sweep
from orchestration.results.protocol import Results
from orchestration.results.report import write_report
from orchestration.results.run import RunResults
from orchestration.results.stored_config import store_config
from orchestration.runs.folder import RunDir
from orchestration.runs.lock import DriverLock
from orchestration.runs.manifest import Manifest, describe_hardware
from orchestration.runs.stages import StagePlan, plan_stages
from orchestration.tracking.missing import MissingRows
from orchestration.tracking.protocol import Status, Tracker
from orchestration.tracking.rows import (
    Standing,
    data_rows,
    make_tracker,
    replay,
    stage_uid,
    sweep_end_ms,
    sweep_row,
    write_artifacts,
    write_bundles,
    write_front,
    write_overview,
    write_subnets,
)
from orchestration.workers.joining import joined_address
from orchestration.workers.node_check import check_nodes
from orchestration.workers.nodes import cluster_nodes, nodes_in_words
from orchestration.workers.ray_folder import ray_folder
from orchestration.workers.runtime import LOCAL, RaySettings, ray_session
from search.front.points_file import save_points

TRACKING_TIMEOUT_S = 30.0
STOPPED_TRACKING_TIMEOUT_S = 3.0
"""Seconds that MLflow may take for what is left after a stop request; the next launch writes the
rest."""


@dataclass(frozen=True)
class LaunchResult:
    """Results and bundles of a finished launch, of one supernet or of several."""

    results: Results
    bundles: tuple[Path, ...]


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
        progress: shows progress to the user.
        stop: gives, for the run folder, a context manager that yields a `StopRequest`.
        take_over: take the lock of another host.

    Raises:
        StoppedError: stopped early, also by its storage; launching again continues.
        VerificationError, NothingFeasibleError, TooManyFailedTrialsError, LockedError,
        PreflightError, ...: see dsnet.errors.
    """
    config = anchored(config)
    run = RunDir(Path(config.storage.runs), config.name)
    prepared = prepare(config, run, progress.warn)
    config = prepared.config
    if decided := prepared.decided_by_data():
        progress.say(f"derived from the data: {decided} (dsnet-orch plan shows the reasons)")
    for warning in prepared.warnings():
        progress.warn(warning)
    if config.tracking.mlflow:
        store_uri(config, run)  # refuses a path that cannot be part of a database URI, before anything is written
    check_reserve(run_reserve(config))
    run.create()
    with ExitStack() as stack:
        lock = stack.enter_context(DriverLock(run, command, take_over=take_over))
        watch = stack.enter_context(watched(run, run_reserve(config)))
        if lock.taken_over_from is not None:
            progress.say(f"continuing the run of {lock.taken_over_from}, which no longer runs")
        run.clear_stop()
        clear_drafts(run, config)
        request = stack.enter_context(stop(run))
        request.add(watch)
        copies = run_copies(config, run, progress)
        manifest = write_facts(prepared, run, progress.warn)
        missing = MissingRows(run)
        tracker = make_tracker(config, run, missing.warned(progress.warn))
        results = RunResults(run, config)
        filed = FiledProgress(progress, run.progress_json)
        work = Launch(prepared, results, manifest, tracker, filed, request, watch, copies=copies)
        stack.enter_context(closing_tracker(run, tracker, missing, progress, lambda: sweep_end_ms(manifest.read())))
        if config.tracking.mlflow:
            missing.repeat(lambda: replay(results, tracker), progress)
        return _run_stages(work)


OLD_DRAFT_S = 600.0
"""Age from which an unfinished file is removed where other machines may be writing."""


def clear_drafts(run: RunDir, config: SweepConfig) -> None:
    """Remove the unfinished files that killed processes left in the run folder, whose lock is
    held."""
    remove_drafts(run.path, 0.0 if config.ray.address == LOCAL else OLD_DRAFT_S)


def run_copies(config: SweepConfig, run: RunDir, progress: ProgressView, told: str = "stage") -> RunCopies | None:
    """The copies of a run at `storage.artifacts`, from which a run folder that is new is restored;
    None without that setting.

    Args:
        config: configuration of the run, or of the sweep of supernets that it belongs to.
        run: a run whose lock is held.
        progress: is told what was restored.
        told: what each copy is called there.
    """
    url = artifacts_url(config, run.path)
    if url is None:
        return None
    copies = RunCopies(run, url, progress.warn)
    restored = copies.restore()
    if restored is not None:
        progress.say(f"continues the run of which {url} has {plural(restored, told)}")
    return copies


def write_facts(prepared: Prepared, run: RunDir, warn: Callable[[str], None]) -> Manifest:
    """Write the run's own files: resolved configuration, manifest, splits; set damaged files of its
    stages aside, each with a warning, so that the launch makes them again."""
    manifest = Manifest(run.manifest_path)
    if run.sweep_yaml.is_file() and not run.manifest_path.exists():
        warn(
            f"{run.manifest_path} is missing and is written again; how often test was read before is not known any more"
        )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    manifest.create(seed=prepared.config.seed, hardware=describe_hardware(gpu))
    images, splits = prepared.image_set, prepared.splits
    manifest.update(
        data_hashes={"images": images.fingerprint, "splits": splits.hash},
        data={
            "name": images.name,
            "path": prepared.config.data.path,
            "fingerprint": prepared.fingerprint,
            "image_shape": list(images.image_shape),
            "num_classes": len(images.class_names),
            "num_images": {name: len(splits[name]) for name in SPLIT_NAMES},
        },
    )
    store_config(run, manifest, prepared.config)
    write_splits(run.splits_json, prepared.splits)
    for text in mend_run(run):
        warn(text)
    return manifest


def anchored(config: SweepConfig) -> SweepConfig:
    """The configuration with absolute folders, so that the stored sweep.yaml means the same in any
    working directory."""
    runs = _absolute(config.storage.runs)
    path, init_from = _absolute(config.data.path), _absolute(config.supernet.init_from)
    return config.model_copy(
        update={
            "storage": config.storage.model_copy(update={"runs": runs}),
            "data": config.data.model_copy(update={"path": path}),
            "supernet": config.supernet.model_copy(update={"init_from": init_from}),
        }
    )


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().absolute())


@contextmanager
def closing_tracker(
    run: RunDir,
    tracker: Tracker,
    missing: MissingRows,
    progress: ProgressView,
    finished_ms: Callable[[], int],
) -> Iterator[None]:
    """Close the tracker at the end of the block, with the status in which the launch ended.

    Args:
        run: the run folder, which a warning names.
        tracker: tracker to close.
        missing: the mark of the run for writes that are missing.
        progress: receives a warning about missing writes.
        finished_ms: when the work ended; not the present time, so that a launch that had nothing to
            do changes nothing.
    """
    status: Status = "FAILED"
    end_ms: int | None = None
    try:
        yield
        status, end_ms = "FINISHED", finished_ms()
    except (StoppedError, KeyboardInterrupt):
        status = "KILLED"
        raise
    except Exception as error:
        status = "FAILED" if storage_error(error) is None else "KILLED"  # the next launch continues
        raise
    finally:
        timeout_s = STOPPED_TRACKING_TIMEOUT_S if status == "KILLED" else TRACKING_TIMEOUT_S
        summary = tracker.close(status, end_ms or int(time.time() * 1000), timeout_s)
        missing.add(summary)
        if summary.num_unsent:
            progress.warn(
                f"{plural(summary.num_unsent, 'write')} to MLflow failed; the next launch of this run repeats them, and so does: "
                f"{command_line('sync', run.path)}"
            )
        if whole_sweep(run) is run:  # its tracker is closed last
            missing.settle()


def _run_stages(work: Launch) -> LaunchResult:
    config, run = work.config, work.run
    plans = stage_plans(work)
    _say_what_runs_again(work, plans)
    manifest = work.manifest.read()
    work.tracker.parent(sweep_row(manifest, run, config))
    work.tracker.datasets(data_rows(manifest))
    prepared = work.prepared
    refuse_impossible_layout(config, prepared.subnets, prepared.image_size)
    supersede_others(work, plans)
    on_ray: list[str] = [name for name in ("structure", "supernet") if name in plans and not plans[name].is_done]
    on_ray += ["search"] if needs_workers(run, plans["search"], config) else []
    with ray_where_needed(on_ray, config, work.prepared, work.progress, work.storage):
        if prepared.structure is not None:
            work = structure_stage(work, plans["structure"])
            refuse_impossible_layout(config, work.prepared.subnets, prepared.image_size)
        supernet_stage(work, plans["supernet"])
        supernet = load_supernet(plans["supernet"].folder.path / FINAL)[0]
        measure_stage(work, plans["measure"], supernet)
        table_stage(work, plans["table"], supernet)
        search_stage(work, plans["search"], plans["table"])
    results = work.results
    if not results.feasible:
        raise NothingFeasibleError(_nothing_feasible(results))
    if results.front_sample:  # a member of a sweep of supernets may have no gate on the front over all
        verify_stage(work, plans, supernet)
    return _finish(work)


def supersede_others(work: Launch, plans: Mapping[str, StagePlan]) -> None:
    """Mark the rows of MLflow that belong to other settings of the run than those of the plans."""
    manifest = work.manifest.read()
    work.tracker.supersede([stage_uid(manifest, work.run, plan.key) for plan in plans.values()])


def _say_what_runs_again(work: Launch, plans: Mapping[str, StagePlan]) -> None:
    """Report the first stage whose earlier result is outdated, and why; the later stages depend on
    it."""
    outdated = next((plan for plan in plans.values() if plan.status == "invalidated"), None)
    if outdated is not None:
        work.progress.say(f"{outdated.name}: runs again, because this changed: {'; '.join(outdated.reasons)}")


def stage_plans(work: Launch) -> dict[str, StagePlan]:
    """Plan the stages, after taking over those that `supernet.init_from` has finished already."""
    definitions = stage_definitions(work.prepared)
    plans = {plan.name: plan for plan in plan_stages(work.run, definitions)}
    for text in mend_search(work.run, plans["search"].key):  # of an earlier configuration that is used again
        work.progress.warn(text)
    adoption = work.prepared.adoption
    if adoption is None or not (taken := adopt(work.run, plans, adoption)):
        return plans
    outdated = ", ".join(adoption.outdated)
    again = f"; {outdated} run again, because another release made them" if outdated else ""
    work.progress.say(f"taken over from {work.config.supernet.init_from}: {', '.join(taken)}{again}")
    return {plan.name: plan for plan in plan_stages(work.run, definitions)}


@contextmanager
def ray_where_needed(
    stages: Collection[str],
    config: SweepConfig,
    prepared: Prepared,
    progress: ProgressView,
    storage: StorageWatch,
    *,
    at_a_time: int | None = None,
) -> Iterator[None]:
    """A Ray session for the length of the block, whose cluster can place everything that runs.

    Args:
        stages: names of the stages that need Ray; without any there is no session.
        config: configuration of the sweep.
        prepared: its training split decides the size of a local object store.
        progress: says that Ray starts, and what a cluster has that was joined.
        at_a_time: see `refuse_what_cannot_fit`.

    Raises:
        PreflightError: Ray does not start, a node differs, something fits on no node, or a client
            of a cluster cannot drive a stage.
    """
    if not stages:
        yield
        return
    refuse_client(config, stages, at_a_time)
    num_bytes = 0 if config.data.stream else prepared.data.images("train").numel()
    needed_mib = int(1.5 * num_bytes / 2**20) + 100  # the object store holds the training images once
    progress.say("starting Ray ...")
    settings = RaySettings(
        address=joined_address(config.ray.address),
        num_cpus=config.ray.num_cpus,
        object_store_mib=max(config.ray.object_store_mib, needed_mib),
        start_timeout_s=config.ray.start_timeout_s,
    )
    if settings.address == LOCAL:
        reserve = ray_reserve(config, ray_folder())
        check_reserve(reserve)
        storage.add(reserve)
    with ray_session(settings):
        if settings.address != LOCAL:
            check_nodes()
            progress.say(f"the Ray cluster has {nodes_in_words(cluster_nodes(), {'CPU': 1.0, 'GPU': 1.0})}")
        refuse_what_cannot_fit(config, stages, at_a_time)
        yield


def _nothing_feasible(results: RunResults) -> str:
    """A message for a search without a feasible trial, with ways out if trials completed."""
    if not results.completed and not results.pruned:
        reasons = [record.reason for record in results.failed if record.reason]
        last = reasons[-1] if reasons else "unknown"
        return f"none of {plural(len(results.records), 'trial')} completed; reason of the last failure: {last}"
    broken = Counter(
        name for record in results.records for name, value in record.constraints.items() if value > 0
    ).most_common(1)
    name, count = broken[0] if broken else ("being best at a rung", len(results.pruned))
    extend = command_line("extend", results.run.name, "--trials", "+N", own_code=has_own_code(results.config))
    return (
        f"none of {plural(len(results.records), 'trial')} is feasible; {count} violate {name}. Relax it, run more trials "
        f"({extend}), or enqueue a point that should satisfy it"
    )


def _finish(work: Launch) -> LaunchResult:
    """Write points, report, bundles and MLflow rows, all derived from the results of the stages."""
    results = work.results
    write_outputs(work, work.prepared.notes(), Standing.of(results))
    export, folder = work.config.export, work.run.export_dir
    formats = Formats(export.formats, say=work.progress.say)
    bundles = export_picks(work.prepared, results, export.picks, folder, formats)
    write_bundles(work.tracker, bundles, folder, export.register_as)
    return LaunchResult(results, tuple(bundles))


def write_outputs(work: Launch, notes: tuple[str, ...], standing: Standing) -> None:
    """Write points, report and MLflow rows of a supernet and its gates, as far as it has results.

    Args:
        work: the launch, its stages done.
        notes: notes of the report.
        standing: standing of the trials on the front of the sweep.
    """
    run, results = work.run, work.results
    save_points(run.points_parquet, results.points())
    write_report(results, work.prepared.image_set.class_names, notes, "complete")
    if results.subnets:
        write_subnets(work.tracker, results)  # again, now with metrics on test
    if results.records:
        write_front(work.tracker, results, standing, results.finished_ms)
    write_artifacts(work.tracker, run)
    if work.config.tracking.mlflow:
        write_overview(work.tracker, results, redraw=True)


def check_failures(results: Results) -> None:
    """Raise if more trials failed than the budget allows; the sweep is finished and reported by
    then.

    Raises:
        TooManyFailedTrialsError: the message has the number, and the commonest reason.
    """
    allowed = results.config.budget.max_failed
    if results.num_failed > allowed * results.num_trials:
        reasons = Counter(record.reason for own in results.supernets.values() for record in own.failed)
        raise TooManyFailedTrialsError(
            f"{results.num_failed} of {results.num_trials} trials failed, more than budget.max_failed {allowed:g} allows; "
            f"the most frequent reason: {reasons.most_common(1)[0][0]}"
        )
