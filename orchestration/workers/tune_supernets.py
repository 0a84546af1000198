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
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsnet.arithmetic import fix_arithmetic
from dsnet.data.normalization import Normalization
from dsnet.data.training_images import TrainingImages
from dsnet.errors import ConfigError, DsnetError, NonFiniteLossError, PreflightError, StoppedError
from dsnet.files import atomic_write_json, read_stored
from dsnet.image_size import image_size_of
from dsnet.measure.evaluate import EVALUATION_BATCH
from dsnet.network.batchnorm import recalibrate
from dsnet.network.precision import exact_float32
from dsnet.network.prefix_tree import each_logits
from dsnet.network.supernet import Supernet
from dsnet.space.cost import subnet_cost
from dsnet.stored.checkpoint import load_supernet
from dsnet.training.supernet import FINAL, TrainingCallbacks, recalibration_batches, train_supernet
from dsnet.training.supernet_run import SupernetRun
from dsnet.wording import plural
from orchestration.runs.curves import CurvePoint, CurveTail
from orchestration.workers.runtime import variables_set
from orchestration.workers.supernet import (
    POLL_S,
    STOP_GRACE_S,
    WORKER_RETRIES,
    SupernetJob,
    first_supernet,
    receive_images,
    root_cause,
    send_images,
)
from orchestration.workers.tune_ledger import End, Ledger, MemberFate, Report, TuneRules, known_fates
from search.front.pareto import DEFAULT_OBJECTIVES, REFERENCE_MARGIN, hypervolume

if TYPE_CHECKING:
    from orchestration.workers.tune_schedule import Outcome
from orchestration.workers.schedulers import make_scheduler

CALIBRATION_IMAGES = 512
"""Number of training images from which statistics are estimated if a norm keeps none while it
trains."""
OUTCOME = "outcome.json"
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
    """Functions that a training of several supernets calls, all in its caller's thread; by default
    it runs to its end and reports nothing."""

    on_report: Callable[[str, int, float], None] = lambda name, epoch, value: None
    """Called with (member, epoch, value) for each report of this call."""
    on_points: Callable[[str, list[CurvePoint]], None] = lambda name, points: None
    """Called with (member, new points of its loss curves)."""
    on_fate: Callable[[MemberFate], None] = lambda fate: None
    """Called with a member's outcome as soon as its training has ended in this call."""
    should_stop: Callable[[], bool] = lambda: False
    """Called several times a second; True stops all training at the next step."""


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
        folder: on storage that driver and workers share; the ledger of these rules lies in `<digest
            of the rules>/reports.jsonl`.
        callbacks: functions that receive its progress and may stop it.

    Returns:
        the outcomes of all members, in their order. A member whose own training failed stays failed
        in later calls; one whose worker was lost too often, or whose folder could not be written,
        is tried again.

    Raises:
        StoppedError: it was stopped; the next call continues.
        PreflightError: the cluster has too few CPUs or GPUs.
        ConfigError: the scheduler cannot be made, or several workers were asked for.
        CheckpointError: the ledger cannot be read or written.
        DsnetError: Tune itself failed.
    """
    import ray

    ledger = Ledger.of(folder, rules)
    known = _known(members, ledger)
    pending = [member for member in members if member.name not in known]
    if pending:
        _check_members(members, rules, ray.cluster_resources())
        tune_run = _TuneRun(members, pending, rules, ledger, callbacks)
        tune_run.run(
            {
                "train": send_images(data),
                "val": {name: ray.put(getattr(val, name).numpy()) for name in ("images", "labels")},
            }
        )
        known |= tune_run.fates
    return [known[member.name] for member in members]


def _check_members(members: Sequence[TuneMember], rules: TuneRules, resources: Mapping[str, float]) -> None:
    names, keys = [member.name for member in members], [member.key for member in members]
    assert len(set(names)) == len(set(keys)) == len(members), "each supernet is trained once"
    if any(member.job.workers != 1 for member in members):
        raise ConfigError(
            "supernet.workers must be 1 in a sweep of supernets; to train several at a time, set supernets.concurrent"
        )
    threads, num_cpus = max(member.job.threads for member in members), int(resources.get("CPU", 0))
    at_a_time = min(rules.concurrent, len(members))
    if at_a_time * threads > num_cpus:
        raise PreflightError(
            f"{at_a_time} supernets at a time (supernets.concurrent) x supernet.threads {threads} need {at_a_time * threads} CPUs, "
            f"but the Ray cluster has {num_cpus}; lower them, or raise ray.num_cpus"
        )
    num_gpus = int(resources.get("GPU", 0))
    if any(member.job.device == "cuda" for member in members) and at_a_time > num_gpus:
        raise PreflightError(
            f"supernets.concurrent is {at_a_time} on cuda, but the Ray cluster has {plural(num_gpus, 'GPU')}; lower supernets.concurrent"
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
        self._tune_folder = ledger.path.parent / "tune"
        self._asked_to_stop = threading.Event()
        self.fates: dict[str, MemberFate] = {}

    def run(self, images: Mapping[str, Any]) -> None:
        """Run until every pending member has its outcome.

        Raises:
            StoppedError: it was stopped before.
        """
        scheduler = self._scheduler()
        for member in self._pending.values():
            member.job.folder.mkdir(parents=True, exist_ok=True)
            (member.job.folder / OUTCOME).unlink(missing_ok=True)
        shutil.rmtree(self._tune_folder, ignore_errors=True)
        self._tune_folder.mkdir(parents=True)
        failures: list[BaseException] = []
        # Not in the main thread: there Tune would replace our handler of Ctrl-C by its own.
        thread = threading.Thread(target=self._tune, args=(scheduler, images, failures), name="ray-tune", daemon=True)
        with variables_set(_ENVIRONMENT):
            thread.start()
            try:
                self._follow(thread)
            finally:
                self._pass_on()
                if not thread.is_alive():
                    shutil.rmtree(self._tune_folder, ignore_errors=True)
        missing = [name for name in self._pending if name not in self.fates]
        if missing and self._is_stopping():
            raise StoppedError("training of the supernets was stopped; checkpoints and reports are kept")
        if failures:
            if isinstance(failures[0], DsnetError):
                raise failures[0]
            raise DsnetError(f"Ray Tune failed: {root_cause(failures[0])}") from failures[0]
        if missing:
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
            outcome_of=lambda name: _outcome_of(self._pending[name].job),
            hear=lambda name, event: self._heard.put((name, event)),
        )

    def _is_stopping(self) -> bool:
        return self._asked_to_stop.is_set() or any(path.exists() for path in self._stop_files)

    def _tune(self, scheduler: Any, images: Mapping[str, Any], failures: list[BaseException]) -> None:
        """The work of the side thread."""
        from ray import tune

        from orchestration.workers.tune_schedule import MEMBER, FixedList, LossWatch, WhenIdle

        jobs = {name: member.job for name, member in self._pending.items()}
        keys = {name: member.key for name, member in self._pending.items()}
        threads = max(job.threads for job in jobs.values())
        is_on_gpu = any(job.device == "cuda" for job in jobs.values())
        try:
            tune.run(
                tune.with_parameters(
                    _train_member,
                    jobs=jobs,
                    keys=keys,
                    images=dict(images),
                    ledger_path=self._ledger.path,
                    report_every=self._rules.report_every,
                ),
                name="supernets",
                config={MEMBER: tune.grid_search([member.name for member in self._members])},
                search_alg=FixedList(scheduler),
                scheduler=scheduler,
                stop=WhenIdle(scheduler),
                callbacks=[LossWatch(scheduler, _describe_failure)],
                resources_per_trial={"cpu": threads, "gpu": 1 if is_on_gpu else 0},
                storage_path=str(self._tune_folder.absolute()),
                max_failures=WORKER_RETRIES,
                reuse_actors=True,  # a new process for each supernet would take seconds longer to start
                raise_on_failed_trial=False,
                verbose=0,
                trial_dirname_creator=lambda trial: trial.trial_id,
            )
        except Exception as error:  # noqa: BLE001 - reported by the caller's thread, whatever it is
            failures.append(error)

    def _follow(self, thread: threading.Thread) -> None:
        asked_at: float | None = None
        while thread.is_alive():
            thread.join(POLL_S)
            self._pass_on()
            if asked_at is None and self._callbacks.should_stop():
                self._asked_to_stop.set()
                for path in self._stop_files:
                    path.touch()
                asked_at = time.monotonic()
            if asked_at is not None and time.monotonic() - asked_at > STOP_GRACE_S:
                return

    def _pass_on(self) -> None:
        """Pass new points, reports and outcomes to the callbacks."""
        for name, tail in self._tails.items():
            points = tail.read()
            if points:
                self._callbacks.on_points(name, points)
        while not self._heard.empty():
            name, event = self._heard.get()
            if isinstance(event, Report):
                self._callbacks.on_report(name, event.epoch, event.value)
            else:
                reports = self._ledger.reports(event.key)
                self.fates[name] = MemberFate(name, event.state, reports, event.reason)
                self._callbacks.on_fate(self.fates[name])


def _describe_failure(trial: Any) -> str:
    error = trial.get_pickled_error() or trial.get_error()
    why = f": {root_cause(error)}" if error is not None else ""
    return f"its worker failed {WORKER_RETRIES + 1} times{why}"


def _outcome_of(job: SupernetJob) -> Outcome | None:
    """The outcome that a trial left when it returned; None if it was interrupted."""
    from orchestration.workers.tune_schedule import Outcome

    outcome = job.folder / OUTCOME
    if outcome.exists():
        return read_stored(outcome, lambda record: Outcome("failed", record["message"], record["is_lasting"]))
    if _final_json(job).exists():
        return Outcome("trained")
    return None


def _train_member(
    config: Mapping[str, Any],
    jobs: Mapping[str, SupernetJob],
    keys: Mapping[str, str],
    images: Mapping[str, Any],
    ledger_path: Path,
    report_every: int,
) -> None:
    """The function of a trial: trains one supernet, from its checkpoint if it has one. Errors are
    recorded, not raised, because Tune would start it again."""
    fix_arithmetic()
    name = config["member"]
    job = jobs[name]
    if (job.folder / OUTCOME).exists():
        return  # an earlier attempt of this launch failed with an error that would occur again
    torch.set_num_threads(job.threads)
    try:
        # Read anew by every attempt: values reported before this worker started are not repeated.
        told = dict(Ledger(ledger_path).reports(keys[name]))
        _train_and_report(job, images, told, report_every)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other members continue
        message = str(error) if isinstance(error, DsnetError) else root_cause(error)
        record = {"error": type(error).__name__, "message": message, "is_lasting": isinstance(error, _LASTING)}
        atomic_write_json(job.folder / OUTCOME, record)


def _train_and_report(
    job: SupernetJob, images: Mapping[str, Any], told: Mapping[int, float], report_every: int
) -> None:
    import ray

    data = receive_images(images["train"], job.run.augmentation)
    val = ValImages(*(torch.from_numpy(ray.get(images["val"][part]).copy()) for part in ("images", "labels")))

    def on_epoch(epochs: int, supernet: Supernet) -> None:
        if epochs % report_every == 0 and epochs not in told:
            _report(epochs, static_hypervolume(measurable(supernet, job.run, data), val, job.run.normalization))

    stem = train_supernet(
        first_supernet(job),
        data,
        job.run,
        folder=job.folder,
        device=job.device,
        callbacks=TrainingCallbacks(should_stop=job.stop_file.exists, on_epoch=on_epoch),
    )
    if stem is not None and job.run.train.epochs not in told:
        supernet, _ = load_supernet(stem)
        value = static_hypervolume(supernet.to(job.device), val, job.run.normalization)
        _report(job.run.train.epochs, value)


def _report(epoch: int, value: float) -> None:
    """Report a value to the driver; returns when it is stored and the trial may continue, else the
    process ends here."""
    from ray import tune

    from orchestration.config.schedulers import TIME
    from orchestration.workers.tune_schedule import METRIC

    tune.report({TIME: epoch, METRIC: value})
