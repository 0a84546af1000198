"""Stage I on Ray: the loop of `dsnet.training` in one task, or data-parallel on workers of Ray
Train, with its curves followed while it runs."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dsnet import errors
from dsnet.arithmetic import fix_arithmetic
from dsnet.data.training_images import TrainingImages
from dsnet.errors import ClusterLostError, DsnetError, PreflightError, StoppedError, StorageError
from dsnet.files import read_object
from dsnet.network.supernet import Supernet
from dsnet.space.subnet_set import SubnetSet
from dsnet.storage_faults import storage_error
from dsnet.stored.names import FINAL
from dsnet.training.supernet_run import SupernetRun
from orchestration.runs.curves import CurvePoint, CurveTail
from orchestration.workers.cluster_watch import check_cluster, lost_sentence
from orchestration.workers.life import Pulse
from orchestration.workers.nodes import Need, cluster_nodes, place_kept, refuse_without_room
from orchestration.workers.runtime import side_thread
from orchestration.workers.sent_images import receive_images, send_images
from orchestration.workers.training_watch import StallRules, TrainingWatch
from orchestration.workers.workplaces import OUTCOME, JobFiles, job_files

MEETING = "ray"
"""Folder of Ray Train in the stage's folder while it runs."""
POLL_S = 0.3
STOP_GRACE_S = 4.0
"""Seconds that training may take to reach its next step boundary after it was asked to stop."""
WORKER_RETRIES = 2
"""Number of times that lost workers are replaced; training then continues from the newest
checkpoint."""


@dataclass(frozen=True)
class SupernetJob:
    """Everything that the workers need to train a supernet; it can be pickled."""

    subnets: SubnetSet
    run: SupernetRun
    folder: Path
    """Folder of the stage on the driver's machine."""
    stop_file: Path
    """A file of the driver's machine whose existence asks workers of this machine to stop."""
    device: str
    threads: int
    workers: int
    is_local: bool = True
    """Whether all workers run on this machine; their group then listens on the loopback interface
    only."""
    init_from: Path | None = None
    """The checkpoint to start from, on the driver's machine; None for fresh weights."""
    artifacts: str | None = None
    """URL of a folder for the files of this training; None: `folder`. See
    `orchestration.workers.workplaces.job_files`."""
    data_path: str | None = None
    """`data.path`, under which workers look for the files of a streamed training split."""

    @property
    def each(self) -> dict[str, float]:
        """What one worker takes on its node."""
        return training_resources(self.threads, self.device)

    def files(self) -> JobFiles:
        """The files of the training as the driver sees them."""
        return job_files(self.folder, self.stop_file, is_local=self.is_local, artifacts=self.artifacts)


def training_resources(threads: int, device: str) -> dict[str, float]:
    """What one training worker takes on its node, under Ray's names."""
    return {"CPU": float(threads), **({"GPU": 1.0} if device == "cuda" else {})}


def training_need(workers: int, threads: int, device: str) -> Need:
    """What the cluster must have for the workers of one training."""
    lower = [*(["supernet.workers"] if workers > 1 else []), *(["supernet.threads"] if threads > 1 else [])]
    more = "add nodes with a GPU" if device == "cuda" else "raise ray.num_cpus"
    return Need(
        what=f"supernet.workers {workers} x supernet.threads {threads}" + (" on cuda" if device == "cuda" else ""),
        number=workers,
        each=training_resources(threads, device),
        remedy=f"lower {' or '.join(lower)}, or {more}" if lower else more,
    )


def train_on_ray(
    job: SupernetJob,
    data: TrainingImages,
    *,
    on_points: Callable[[list[CurvePoint]], None],
    should_stop: Callable[[], bool],
    stalls: StallRules | None = None,
    on_counted: Callable[[list[CurvePoint]], None] = lambda points: None,
) -> Path:
    """Train the supernet on `job.workers` Ray workers; Ray must be initialised.

    One worker is a plain task: Ray Train would start five more processes for it, and takes three
    times as long to begin. Several are workers of Ray Train.

    Args:
        job: the settings.
        data: the training split.
        on_points: called with new points of the loss curves.
        should_stop: called several times a second; True stops training at the next step.
        stalls: how silent workers are noticed; None = `StallRules()`.
        on_counted: called with the points that count, each once: those of steps that are not done
            again.

    Returns:
        the stem of the recalibrated checkpoint.

    Raises:
        StoppedError: it was stopped; the checkpoints stay, and the next launch continues.
        ClusterLostError: the cluster, or the controller of Ray Train, was lost.
        PreflightError: the cluster has too few CPUs or GPUs for the workers.
        NonFiniteLossError, CheckpointError, StorageError: as the training loop.
        DsnetError: the workers failed for another reason.
    """

    refuse_without_room(training_need(job.workers, job.threads, job.device), cluster_nodes())
    files = job.files()
    files.begin()
    rules = stalls if stalls is not None else StallRules()
    pulse = Pulse.new(rules.beat_s)
    config = {
        "job": job,
        "pulse": pulse,
        "place": files.place,
        "start": send_start(job),
        **send_images(data, job.data_path),
    }
    failures: list[BaseException] = []
    is_abandoned = threading.Event()
    fit = partial(_fit_alone, is_abandoned=is_abandoned) if job.workers == 1 else _fit_group
    thread = side_thread(partial(fit, config, failures), "train")
    tail = CurveTail(job.folder / "curves.jsonl")
    watch = TrainingWatch(
        {
            "the training worker" if job.workers == 1 else f"training worker {rank} of {job.workers}": pulse.of_rank(
                rank
            )
            for rank in range(job.workers)
        },
        rules,
    )

    def pass_on() -> bool:
        """Hand new points on; returns whether there were any."""
        points = tail.read()
        on_points(points)
        on_counted(tail.counted())
        return bool(points)

    thread.start()
    try:
        _follow(thread, pass_on, should_stop, files, watch)
    finally:
        watch.close()
        is_abandoned.set()
        files.fetch(everything=True)
        pass_on()
        shutil.rmtree(job.folder / MEETING, ignore_errors=True)
    outcome = job.folder / OUTCOME
    if outcome.exists():
        _raise_outcome(read_object(outcome))
    if should_stop():
        raise StoppedError("training was stopped; its checkpoints are kept")
    if failures:
        if isinstance(failures[0], DsnetError):
            raise failures[0]
        raise _as_ours(failures[0], job.workers) from failures[0]
    return job.folder / FINAL


def _as_ours(failure: BaseException, num_workers: int) -> DsnetError:
    """The failure of a training, which Ray reports, as an error of ours.

    Raises:
        ClusterLostError: the cluster was lost.
    """
    if (fault := storage_error(failure)) is not None:
        return fault
    check_cluster()
    if _is_controller_lost(failure):
        return ClusterLostError(lost_sentence("the controller of Ray Train has ended"))
    workers = "worker" if num_workers == 1 else "workers"
    return DsnetError(f"the training {workers} failed: {root_cause(failure)}")


def send_start(job: SupernetJob) -> Any:
    """The start weights of a job in the object store; None for fresh weights.

    Raises:
        CheckpointError: the checkpoint is damaged or missing.
    """
    import ray

    from dsnet.training.start import load_start

    return None if job.init_from is None else ray.put(load_start(job.init_from))


def first_supernet(job: SupernetJob, start: Any) -> Supernet:
    """The network that a job's training starts from.

    Args:
        job: the training.
        start: from `send_start`.
    """
    import ray

    from dsnet.training.start import first_weights

    supernet, _ = first_weights(job.subnets, job.run.seed, None if start is None else ray.get(start))
    return supernet


def _fit_alone(config: dict[str, Any], failures: list[BaseException], is_abandoned: threading.Event) -> None:
    """Train in one task, which is started again if its worker is lost.

    It is not started again once `is_abandoned` is set: the end of the Ray session loses the worker
    too, and a new task would start another cluster.
    """
    import ray

    job: SupernetJob = config["job"]
    task = ray.remote(num_cpus=job.threads, num_gpus=int(job.device == "cuda"), max_retries=0)(_train_loop)
    for attempt in range(WORKER_RETRIES + 1):
        try:
            with place_kept(job.each, "the training worker") as place:
                ray.get(task.options(scheduling_strategy=place).remote(config))
        except DsnetError as error:  # would occur again
            found = getattr(error, "cause", error)
            failures.append(
                ClusterLostError(str(found)) if attempt > 0 and isinstance(found, PreflightError) else found
            )
            return
        except Exception as error:  # noqa: BLE001 - reported by the main thread, whatever it is
            if attempt == WORKER_RETRIES or is_abandoned.is_set() or storage_error(error) is not None:
                failures.append(error)
                return
        else:
            return


def _fit_group(config: dict[str, Any], failures: list[BaseException]) -> None:
    """Run the trainer. Must not run in the main thread, where Ray would replace our handler of
    Ctrl-C."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from orchestration.workers.loopback_group import LoopbackConfig
    from orchestration.workers.node_group import NodesConfig

    job: SupernetJob = config["job"]
    # Every process of Ray Train writes a marker there, on its own machine; nothing is read.
    meeting = job.folder / MEETING if job.is_local else Path(tempfile.gettempdir()) / "dsnet-ray-train"
    meeting.mkdir(parents=True, exist_ok=True)
    failure_limits: dict[str, Any] = {"max_failures": WORKER_RETRIES, "controller_failure_limit": WORKER_RETRIES}
    trainer = TorchTrainer(
        _train_loop,
        train_loop_config=config,
        torch_config=LoopbackConfig(folder=str(meeting)) if job.is_local else NodesConfig(),
        scaling_config=ScalingConfig(
            num_workers=job.workers, use_gpu=job.device == "cuda", resources_per_worker={"CPU": job.threads}
        ),
        run_config=RunConfig(
            name="train",
            storage_path=str(meeting),
            failure_config=FailureConfig(**failure_limits),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:  # noqa: BLE001 - reported by the main thread, whatever it is
        failures.append(error)


def _follow(
    thread: threading.Thread,
    pass_on: Callable[[], bool],
    should_stop: Callable[[], bool],
    files: JobFiles,
    watch: TrainingWatch,
) -> None:
    asked_at: float | None = None
    last_s = time.monotonic()
    while thread.is_alive():
        thread.join(POLL_S)
        files.fetch()
        if pass_on():
            watch.took(time.monotonic() - last_s)
            last_s = time.monotonic()
        if not (asked_at is not None or should_stop()):
            check_cluster()
            watch.look()
        if asked_at is None and should_stop():
            files.ask_to_stop()
            asked_at = time.monotonic()
        if asked_at is not None and time.monotonic() - asked_at > STOP_GRACE_S:
            return


def _train_loop(config: Mapping[str, Any]) -> None:
    """The function of each worker. Errors of the user are recorded, not raised, because the worker
    would be started again."""
    fix_arithmetic()
    import torch

    from dsnet.training.supernet import TrainingCallbacks, train_supernet
    from dsnet.training.workers import DistributedWorkers, SingleWorker

    job: SupernetJob = config["job"]
    torch.set_num_threads(job.threads)
    workers = SingleWorker() if job.workers == 1 else DistributedWorkers()
    with config["place"].opened(is_writer=workers.rank == 0) as place:
        outcome = place.folder / OUTCOME
        if outcome.exists():
            return  # an earlier attempt of this launch failed with an error that would occur again
        try:
            pulse: Pulse = config["pulse"]
            with pulse.of_rank(workers.rank).beating(at_once=True):
                train_supernet(
                    first_supernet(job, config["start"]),
                    receive_images(config, job.run.augmentation),
                    job.run,
                    folder=place.folder,
                    device=job.device,
                    workers=workers,
                    callbacks=TrainingCallbacks(should_stop=place.should_stop),
                )
        except StorageError:
            raise  # where it could be recorded, nothing can be written
        except DsnetError as error:
            place.record({"error": type(error).__name__, "message": str(error), "rank": workers.rank})
            if job.workers > 1:
                raise  # the others wait in an all-reduce; the group must end


def _is_controller_lost(error: BaseException) -> bool:
    """Whether the actor of Ray Train that directs the workers has ended. Lost workers come as
    errors of Ray Train."""
    from ray.exceptions import RayActorError

    return isinstance(error, RayActorError)


def _raise_outcome(record: Mapping[str, Any]) -> None:
    kind = getattr(errors, record["error"], DsnetError)
    raise kind(record["message"])


def root_cause(error: BaseException) -> str:
    """The innermost message of Ray's nested errors, on one line."""
    workers = getattr(error, "worker_failures", None)
    if workers:
        error = next(iter(workers.values()))
    while error.__cause__ is not None:
        error = error.__cause__
    is_memory = type(error).__name__ == "OutOfMemoryError" and type(error).__module__.startswith("ray.")
    if is_memory or "low on memory" in str(error):
        return (
            "a process was ended because the machine ran out of memory; close other programs, or lower supernet.train.batch_size, "
            "and launch again: training continues from its newest checkpoint"
        )
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{type(error).__name__}: {lines[-1]}"
