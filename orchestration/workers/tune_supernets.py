"""Training of a fixed list of supernets, in which schedulers of Ray Tune stop those that fall
behind.

Tune only decides which supernets continue. Each supernet is a trial in a separate process that
trains as `dsnet.training` does and regularly reports its *static hypervolume*: the hypervolume of
the points (top-1 on val, MAdds) of all its static sub-networks, as a share of the box between the
reference (0, 1.05 x the widest one's MAdds) and a perfect network without cost. It lies in [0, 1],
and is comparable between supernets of equal widest MAdds.

The driver stores reports and decisions before they take effect (`tune_ledger`). A later launch
trains nothing twice and stops the same supernets: it replays the stored events in the stored order
and continues from the checkpoints. With several supernets at a time the decisions of an
asynchronous scheduler depend on the order of the reports, hence on speed, and two sweeps of equal
seed may differ. With one at a time (`concurrent: 1`), or with `scheduler: none`, they do not.
"""

from __future__ import annotations

import copy
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsnet.arithmetic import fix_arithmetic
from dsnet.data.normalization import Normalization
from dsnet.data.training_images import TrainingImages
from dsnet.errors import ClusterLostError, ConfigError, DsnetError, NonFiniteLossError, StoppedError, StorageError
from dsnet.files import read_stored
from dsnet.image_size import image_size_of
from dsnet.measure.evaluate import EVALUATION_BATCH
from dsnet.network.batchnorm import recalibrate
from dsnet.network.precision import exact_float32
from dsnet.network.prefix_tree import each_logits
from dsnet.network.supernet import Supernet
from dsnet.space.cost import subnet_cost
from dsnet.storage_faults import storage_error
from dsnet.stored.checkpoint import load_supernet
from dsnet.stored.names import FINAL
from dsnet.training.supernet import TrainingCallbacks, recalibration_batches, train_supernet
from dsnet.training.supernet_run import SupernetRun
from orchestration.runs.curves import CurvePoint, CurveTail
from orchestration.workers.cluster_watch import check_cluster
from orchestration.workers.file_stores import DriverStore
from orchestration.workers.life import Pulse
from orchestration.workers.nodes import (
    PLACE_TIMEOUT_S,
    Need,
    cluster_nodes,
    no_place,
    refuse_without_room,
    room,
)
from orchestration.workers.runtime import side_thread, variables_set
from orchestration.workers.sent_images import receive_images, send_images
from orchestration.workers.supernet import (
    POLL_S,
    STOP_GRACE_S,
    WORKER_RETRIES,
    SupernetJob,
    first_supernet,
    root_cause,
    send_start,
    training_resources,
)
from orchestration.workers.training_watch import StallRules, TrainingWatch
from orchestration.workers.tune_ledger import LEDGER_FILE, End, Ledger, MemberFate, Report, TuneRules, known_fates
from orchestration.workers.workplaces import OUTCOME, Place, Workplace
from search.front.pareto import DEFAULT_OBJECTIVES, REFERENCE_MARGIN, hypervolume

if TYPE_CHECKING:
    from orchestration.workers.tune_schedule import Outcome
from orchestration.workers.schedulers import make_scheduler

CALIBRATION_IMAGES = 512
"""Number of training images from which statistics are estimated if a norm keeps none while it
trains."""
LOOK_S = 5.0
"""Seconds between two looks at the nodes."""
IDLE_TIMEOUT_S = 2 * PLACE_TIMEOUT_S
"""Seconds without a supernet that trains, after which others must be using the nodes."""
_LASTING = (NonFiniteLossError, ConfigError)
"""Errors of a member itself, which would occur again in a later launch."""
_ENVIRONMENT = {
    # Its loggers would write a folder of CSV, JSON and TensorBoard files beside each trial.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # A trial that ends before its first report is no error of the sweep.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # The state that Tune would write all the time is not read: a launch continues from the ledger.
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


@dataclass(frozen=True)
class TuneMember:
    """A supernet of the sweep."""

    name: str
    key: str
    """Key of its supernet stage, under which its events are stored."""
    job: SupernetJob
    """Its training: `job.folder` is its stage folder and `job.workers` is 1; members may share a
    `stop_file`."""
    is_done: bool = False
    """Whether its supernet stage is done, so that it is not trained."""


@dataclass(frozen=True)
class ValImages:
    """Images and labels of `val`, on which supernets are compared."""

    images: Tensor
    """uint8 [N, C, H, W], on the CPU."""
    labels: Tensor
    """int64 [N], on the CPU."""


def stored_fates(members: Sequence[TuneMember], rules: TuneRules, folder: Path) -> dict[str, MemberFate]:
    """Outcomes, by name, of the members that earlier launches have finished; needs no Ray.

    Raises:
        CheckpointError: the ledger was edited.
    """
    return _known(members, Ledger.of(folder, rules))


def _known(members: Sequence[TuneMember], ledger: Ledger) -> dict[str, MemberFate]:
    finished = [member.name for member in members if member.is_done or _is_trained(member, ledger)]
    return known_fates(ledger, {member.name: member.key for member in members}, finished)


def _is_trained(member: TuneMember, ledger: Ledger) -> bool:
    end = ledger.end(member.key)
    return end is not None and end.state == "trained" and _final_json(member.job).exists()


def _final_json(job: SupernetJob) -> Path:
    return job.folder / f"{FINAL}.json"


@exact_float32()
@torch.no_grad()
def static_hypervolume(supernet: Supernet, val: ValImages, normalization: Normalization) -> float:
    """The share of the reference box that the static sub-networks dominate, in [0, 1].

    Args:
        supernet: in eval mode, with statistics that every sub-network can run on; it is not
            changed.
        val: the split on which supernets are compared.
        normalization: normalisation with which the supernet is trained.
    """
    device = next(supernet.parameters()).device
    members = supernet.subnets.members
    num_right = dict.fromkeys((subnet.name for subnet in members), 0)
    for start in range(0, len(val.labels), EVALUATION_BATCH):
        rows = slice(start, start + EVALUATION_BATCH)
        images, labels = normalization.apply(val.images[rows].to(device)), val.labels[rows].to(device)
        for subnet, logits in each_logits(supernet, images, members):
            num_right[subnet.name] += int((logits.argmax(1) == labels).sum())
    size = image_size_of(val.images.shape)
    madds = [subnet_cost(supernet.spec, subnet, size).madds for subnet in members]
    points = [(num_right[subnet.name] / len(val.labels), cost) for subnet, cost in zip(members, madds, strict=True)]
    worst = REFERENCE_MARGIN * max(madds)
    return hypervolume(points, [goal for _, goal in DEFAULT_OBJECTIVES], (0.0, worst)) / worst


def measurable(supernet: Supernet, run: SupernetRun, data: TrainingImages) -> Supernet:
    """A copy of a network in training whose sub-networks can be measured; the training is not
    affected.

    Private statistics are taken as they are; if a norm keeps none, they are estimated from a few
    hundred training images.
    """
    measured = copy.deepcopy(supernet).eval()
    if measured.spec.norm == "recalibrate":
        few = min(run.recalibration_images or CALIBRATION_IMAGES, CALIBRATION_IMAGES)
        device = next(measured.parameters()).device
        recalibrate(measured, recalibration_batches(data, replace(run, recalibration_images=few), device))
    return measured


@dataclass(frozen=True, kw_only=True)
class SweepCallbacks:
    """Functions that a training of several supernets calls, in its caller's thread where they do
    not say otherwise; by default it runs to its end and reports nothing."""

    on_report: Callable[[str, int, float], None] = lambda name, epoch, value: None
    """Called with (member, epoch, value) for each report of this call."""
    on_points: Callable[[str, list[CurvePoint]], None] = lambda name, points: None
    on_counted: Callable[[str, list[CurvePoint]], None] = lambda name, points: None
    """Called with (member, new points of its loss curves)."""
    on_stored: Callable[[Path], None] = lambda folder: None
    """Called with the folder of the ledger when an event was stored there, before it takes effect;
    in another thread than the other functions."""
    on_fate: Callable[[MemberFate], None] = lambda fate: None
    """Called with a member's outcome as soon as its training has ended in this call."""
    should_stop: Callable[[], bool] = lambda: False
    """Called several times a second; True stops all training at the next step."""
    stalls: StallRules = field(default_factory=StallRules)
    """How silent workers are noticed, and told by the name of their member."""


def train_members(
    members: Sequence[TuneMember],
    rules: TuneRules,
    *,
    data: TrainingImages,
    val: ValImages,
    folder: Path,
    callbacks: SweepCallbacks,
) -> list[MemberFate]:
    """Train every member without an outcome as far as the scheduler allows; Ray must be
    initialised.

    A member that was trained has its final checkpoint in its folder, bit for bit as
    `orchestration.workers.supernet.train_on_ray` leaves it with one worker on the same CPU with the
    same threads. The report of the last epoch is of that checkpoint; earlier reports are of the
    weights at that time.

    Args:
        members: in the order in which they start.
        rules: rules by which they are scheduled.
        data: the training split, of all members; each augments as its own settings say.
        val: the split on which they are compared.
        folder: on the driver's machine; the ledger of these rules lies in `<digest of the
            rules>/reports.jsonl`.
        callbacks: functions that receive its progress and may stop it.

    Returns:
        the outcomes of all members, in their order. A member whose own training failed stays failed
        in later calls; one whose worker was lost too often, or whose folder could not be written,
        is tried again.

    Raises:
        StoppedError: it was stopped; the next call continues.
        ClusterLostError: the cluster was lost.
        PreflightError: the cluster has too few CPUs or GPUs.
        ConfigError: the scheduler cannot be made, or several workers were asked for.
        CheckpointError: the ledger cannot be read or written.
        StorageError: a disk is full, read-only or failing, or a folder is gone.
        DsnetError: Tune itself failed.
    """
    import ray

    ledger = Ledger.of(folder, rules)
    known = _known(members, ledger)
    pending = [member for member in members if member.name not in known]
    if pending:
        _check_members(members)
        jobs = [member.job for member in members]
        threads, device = (
            max(job.threads for job in jobs),
            "cuda" if any(job.device == "cuda" for job in jobs) else "cpu",
        )
        refuse_without_room(members_need(min(rules.concurrent, len(members)), threads, device), cluster_nodes())
        tune_run = _TuneRun(members, pending, rules, ledger, callbacks)
        tune_run.run(
            {
                "train": send_images(data, members[0].job.data_path),
                "val": {name: ray.put(getattr(val, name).numpy()) for name in ("images", "labels")},
            }
        )
        known |= tune_run.fates
    return [known[member.name] for member in members]


def members_need(at_a_time: int, threads: int, device: str) -> Need:
    """What the cluster must have for the supernets that train at the same time."""
    lower = [*(["supernets.concurrent"] if at_a_time > 1 else []), *(["supernet.threads"] if threads > 1 else [])]
    more = "add nodes with a GPU" if device == "cuda" else "raise ray.num_cpus"
    return Need(
        what=f"supernets.concurrent {at_a_time} x supernet.threads {threads}"
        + (" on cuda" if device == "cuda" else ""),
        number=at_a_time,
        each=training_resources(threads, device),
        remedy=f"lower {' or '.join(lower)}, or {more}" if lower else more,
    )


def _check_members(members: Sequence[TuneMember]) -> None:
    names, keys = [member.name for member in members], [member.key for member in members]
    assert len(set(names)) == len(set(keys)) == len(members), "each supernet is trained once"
    if any(member.job.workers != 1 for member in members):
        raise ConfigError(
            "supernet.workers must be 1 in a sweep of supernets; to train several at a time, set supernets.concurrent"
        )


class _TuneRun:
    """One launch of Ray Tune in a side thread; the callbacks run in the caller's thread."""

    def __init__(
        self,
        members: Sequence[TuneMember],
        pending: Sequence[TuneMember],
        rules: TuneRules,
        ledger: Ledger,
        callbacks: SweepCallbacks,
    ) -> None:
        self._members = members
        self._pending = {member.name: member for member in pending}
        self._rules = rules
        self._ledger = ledger
        self._callbacks = callbacks
        self._heard: queue.SimpleQueue[tuple[str, Report | End]] = queue.SimpleQueue()
        self._tails = {member.name: CurveTail(member.job.folder / "curves.jsonl") for member in pending}
        self._stop_files = {member.job.stop_file for member in pending}
        self._files = {member.name: member.job.files() for member in pending}
        self._each = training_resources(
            max(member.job.threads for member in pending),
            "cuda" if any(member.job.device == "cuda" for member in pending) else "cpu",
        )
        self._tune_folder = ledger.path.parent / ".tune"
        self._asked_to_stop = threading.Event()
        self._fault: StorageError | None = None
        self._pulses = {member.name: Pulse.new(callbacks.stalls.beat_s) for member in pending}
        self.fates: dict[str, MemberFate] = {}

    def run(self, images: Mapping[str, Any]) -> None:
        """Run until every pending member has its outcome.

        Raises:
            StoppedError: it was stopped before.
        """
        scheduler = self._scheduler()
        for files in self._files.values():
            files.begin()
        shutil.rmtree(self._tune_folder, ignore_errors=True)
        self._tune_folder.mkdir(parents=True)
        failures: list[BaseException] = []
        # Not in the main thread: there Tune would replace our handler of Ctrl-C by its own.
        thread = side_thread(partial(self._tune, scheduler, images, failures), "tune")
        watch = TrainingWatch(self._pulses, self._callbacks.stalls)
        with variables_set(_ENVIRONMENT):
            thread.start()
            try:
                self._follow(thread, scheduler, lambda: watch.look(scheduler.is_running))
            finally:
                watch.close()
                self._pass_on()
                if not thread.is_alive():
                    shutil.rmtree(self._tune_folder, ignore_errors=True)
        missing = [name for name in self._pending if name not in self.fates]
        if missing and self._is_stopping():
            raise StoppedError("training of the supernets was stopped; checkpoints and reports are kept")
        if self._fault is not None:
            raise self._fault
        if failures:
            check_cluster()
            if isinstance(failures[0], DsnetError):
                raise failures[0]
            raise _tune_error(failures[0]) from failures[0]
        if missing:
            check_cluster()
            raise DsnetError(f"Ray Tune ended without a result for {', '.join(missing)}; launch again")

    def _scheduler(self) -> Any:
        from orchestration.workers.tune_schedule import Member, ReplayingScheduler

        epochs = max(1, *(member.job.run.train.epochs for member in self._members))
        members = [
            Member(member.name, member.key, member.job.run.train.epochs, member.name in self._pending)
            for member in self._members
        ]
        return ReplayingScheduler(
            make_scheduler(self._rules, epochs),
            members,
            self._ledger,
            self._rules,
            is_stopping=self._is_stopping,
            outcome_of=self._outcome_of,
            hear=self._hear,
        )

    def _hear(self, name: str, event: Report | End) -> None:
        self._callbacks.on_stored(self._ledger.path.parent)
        self._heard.put((name, event))

    def _outcome_of(self, name: str) -> Outcome | None:
        self._files[name].fetch(everything=True)
        return _outcome_of(self._pending[name].job)

    def _is_stopping(self) -> bool:
        return self._asked_to_stop.is_set() or any(path.exists() for path in self._stop_files)

    def _tune(self, scheduler: Any, images: Mapping[str, Any], failures: list[BaseException]) -> None:
        """The work of the side thread."""
        from ray import tune

        from orchestration.workers.tune_schedule import MEMBER, FixedList, LossWatch, WhenIdle

        is_local = all(member.job.is_local for member in self._pending.values())
        try:
            ledger = self._ledger.path if is_local else DriverStore.start(self._ledger.path.parent)
            works = {
                name: MemberWork(member.job, member.key, self._files[name].place, send_start(member.job), ledger)
                for name, member in self._pending.items()
            }
            tune.run(
                tune.with_parameters(
                    _train_member,
                    works=works,
                    images=dict(images),
                    report_every=self._rules.report_every,
                    pulses=self._pulses,
                ),
                name="supernets",
                config={MEMBER: tune.grid_search([member.name for member in self._members])},
                search_alg=FixedList(scheduler),
                scheduler=scheduler,
                stop=WhenIdle(scheduler),
                callbacks=[LossWatch(scheduler, self._describe_failure)],
                resources_per_trial={"cpu": self._each["CPU"], "gpu": self._each.get("GPU", 0)},
                storage_path=str(self._tune_folder.absolute()),
                max_failures=WORKER_RETRIES,
                reuse_actors=True,  # a new process for each supernet would take seconds longer to start
                raise_on_failed_trial=False,
                verbose=0,
                trial_dirname_creator=lambda trial: trial.trial_id,
            )
        except Exception as error:  # noqa: BLE001 - reported by the caller's thread, whatever it is
            failures.append(error)

    def _describe_failure(self, trial: Any) -> str:
        error = trial.get_pickled_error() or trial.get_error()
        if error is not None and self._fault is None:
            self._fault = storage_error(error)
        why = f": {root_cause(error)}" if error is not None else ""
        return f"its worker failed {WORKER_RETRIES + 1} times{why}"

    def _follow(self, thread: threading.Thread, scheduler: Any, look: Callable[[], None]) -> None:
        asked_at: float | None = None
        places = _PlaceWatch(self._each)
        while thread.is_alive():
            thread.join(POLL_S)
            for files in self._files.values():
                files.fetch()
            self._pass_on()
            if not self._is_stopping():
                check_cluster()
                look()
                places.look(is_idle=scheduler.is_idle)
            if asked_at is None and self._callbacks.should_stop():
                self._asked_to_stop.set()
                for path in self._stop_files:
                    path.touch()
                for files in self._files.values():
                    files.ask_to_stop()
                asked_at = time.monotonic()
            if asked_at is not None and time.monotonic() - asked_at > STOP_GRACE_S:
                return

    def _pass_on(self) -> None:
        """Pass new points, reports and outcomes to the callbacks."""
        for name, tail in self._tails.items():
            points = tail.read()
            if points:
                self._callbacks.on_points(name, points)
            counted = tail.counted()
            if counted:
                self._callbacks.on_counted(name, counted)
        while not self._heard.empty():
            name, event = self._heard.get()
            if isinstance(event, Report):
                self._callbacks.on_report(name, event.epoch, event.value)
            else:
                reports = self._ledger.reports(event.key)
                self.fates[name] = MemberFate(name, event.state, reports, event.reason)
                self._callbacks.on_fate(self.fates[name])


def _tune_error(failure: BaseException) -> DsnetError:
    """The failure of Ray Tune itself as an error of ours."""
    if (fault := storage_error(failure)) is not None:
        return fault
    return DsnetError(f"Ray Tune failed: {root_cause(failure)}")


class _PlaceWatch:
    """Notices that no supernet can train any more: Ray Tune would wait for ever for a place."""

    def __init__(self, each: Mapping[str, float]) -> None:
        self._each = each
        self._looked_s = self._had_place_s = self._was_busy_s = time.monotonic()

    def look(self, *, is_idle: bool) -> None:
        """Look at the nodes, at most every `LOOK_S` seconds.

        Args:
            is_idle: whether no supernet trains at present.

        Raises:
            ClusterLostError: no node has had room for one, or none has trained, for too long.
        """
        now_s = time.monotonic()
        if not is_idle:
            self._was_busy_s = now_s
        if now_s - self._looked_s < LOOK_S:
            return
        self._looked_s = now_s
        if room(cluster_nodes(), self._each) > 0:
            self._had_place_s = now_s
        for since_s, patience_s in ((self._had_place_s, PLACE_TIMEOUT_S), (self._was_busy_s, IDLE_TIMEOUT_S)):
            if now_s - since_s > patience_s:
                raise ClusterLostError(no_place(self._each, "the training of supernets", patience_s))


def _outcome_of(job: SupernetJob) -> Outcome | None:
    """The outcome that a trial left when it returned; None if it was interrupted."""
    from orchestration.workers.tune_schedule import Outcome

    outcome = job.folder / OUTCOME
    if outcome.exists():
        return read_stored(outcome, lambda record: Outcome("failed", record["message"], record["is_lasting"]))
    if _final_json(job).exists():
        return Outcome("trained")
    return None


@dataclass(frozen=True)
class MemberWork:
    """What the worker of a supernet needs; it can be pickled."""

    job: SupernetJob
    key: str
    place: Workplace
    start: Any
    """From `send_start`."""
    ledger: Path | DriverStore
    """The ledger's file, or a store with it."""

    def told(self) -> dict[int, float]:
        """Epoch -> value of the reports that are stored by now."""
        if isinstance(self.ledger, Path):
            return dict(Ledger(self.ledger).reports(self.key))
        with tempfile.TemporaryDirectory() as folder:
            copied = Path(folder) / LEDGER_FILE
            copied.write_bytes(self.ledger.read(LEDGER_FILE) or b"")
            return dict(Ledger(copied).reports(self.key))


def _train_member(
    config: Mapping[str, Any],
    works: Mapping[str, MemberWork],
    images: Mapping[str, Any],
    report_every: int,
    pulses: Mapping[str, Pulse],
) -> None:
    """The function of a trial: trains one supernet, from its checkpoint if it has one. Errors are
    recorded, not raised, because Tune would start it again."""
    fix_arithmetic()
    name = config["member"]
    work = works[name]
    with work.place.opened() as place:
        if (place.folder / OUTCOME).exists():
            return  # an earlier attempt of this launch failed with an error that would occur again
        torch.set_num_threads(work.job.threads)
        try:
            # Read anew by every attempt: values reported before this worker are not repeated.
            told = work.told()
            with pulses[name].beating(at_once=True):
                _train_and_report(work, place, images, told, report_every)
        except Exception as error:  # whatever it is, the other members continue
            if (fault := storage_error(error)) is not None:
                raise fault from error  # nothing could be recorded, and the other members meet it too
            message = str(error) if isinstance(error, DsnetError) else root_cause(error)
            place.record({"error": type(error).__name__, "message": message, "is_lasting": isinstance(error, _LASTING)})


def _train_and_report(
    work: MemberWork, place: Place, images: Mapping[str, Any], told: Mapping[int, float], report_every: int
) -> None:
    import ray

    job = work.job
    data = receive_images(images["train"], job.run.augmentation)
    val = ValImages(*(torch.from_numpy(ray.get(images["val"][part]).copy()) for part in ("images", "labels")))

    def on_epoch(epochs: int, supernet: Supernet) -> None:
        if epochs % report_every == 0 and epochs not in told:
            place.send()
            _report(epochs, static_hypervolume(measurable(supernet, job.run, data), val, job.run.normalization))

    stem = train_supernet(
        first_supernet(job, work.start),
        data,
        job.run,
        folder=place.folder,
        device=job.device,
        callbacks=TrainingCallbacks(should_stop=place.should_stop, on_epoch=on_epoch),
    )
    if stem is not None and job.run.train.epochs not in told:
        supernet, _ = load_supernet(stem)
        value = static_hypervolume(supernet.to(job.device), val, job.run.normalization)
        place.send()
        _report(job.run.train.epochs, value)


def _report(epoch: int, value: float) -> None:
    """Report a value to the driver; returns when it is stored and the trial may continue, else the
    process ends here."""
    from ray import tune

    from orchestration.config.schedulers import TIME
    from orchestration.workers.tune_schedule import METRIC

    tune.report({TIME: epoch, METRIC: value})
