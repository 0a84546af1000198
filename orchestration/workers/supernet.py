"""Stage I on Ray: the loop of `dsnet.training` in one task, or data-parallel on workers of Ray
Train, with its curves followed while it runs."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dsnet import errors
from dsnet.arithmetic import fix_arithmetic
from dsnet.data.settings import Augmentation
from dsnet.data.training_images import InMemoryImages, TrainingImages
from dsnet.errors import DsnetError, PreflightError, StoppedError
from dsnet.files import atomic_write_json, read_object
from dsnet.network.supernet import Supernet
from dsnet.space.subnet_set import SubnetSet
from dsnet.stored.names import FINAL
from dsnet.training.supernet_run import SupernetRun
from dsnet.wording import plural
from orchestration.runs.curves import CurvePoint, CurveTail

POLL_S = 0.3
STOP_GRACE_S = 8.0
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
    """Folder of the stage, on storage that driver and workers share."""
    stop_file: Path
    """A file whose existence asks the workers to stop."""
    device: str
    threads: int
    workers: int
    is_local: bool = True
    """Whether all workers run on this machine; their group then listens on the loopback interface
    only."""
    init_from: Path | None = None
    """The checkpoint to start from, on storage that driver and workers share; None for fresh
    weights."""


def train_on_ray(
    job: SupernetJob,
    data: TrainingImages,
    *,
    on_points: Callable[[list[CurvePoint]], None],
    should_stop: Callable[[], bool],
    on_counted: Callable[[list[CurvePoint]], None] = lambda points: None,
) -> Path:
    """Train the supernet on `job.workers` Ray workers; Ray must be initialised.

    One worker is a plain task: Ray Train would start five more processes for it, and takes three
    times as long to begin. Several are workers of Ray Train.

    Args:
        job: the settings.
        data: the training split; if it is not in memory, it is pickled for the workers.
        on_points: called with new points of the loss curves.
        should_stop: called several times a second; True stops training at the next step.
        on_counted: called with the points that count, each once: those of steps that are not done
            again.

    Returns:
        the stem of the recalibrated checkpoint.

    Raises:
        StoppedError: it was stopped; the checkpoints stay, and the next launch continues.
        PreflightError: the cluster has too few CPUs or GPUs for the workers.
        NonFiniteLossError, CheckpointError: as the training loop.
        DsnetError: the workers failed for another reason.
    """
    import ray

    _check_room(job, ray.cluster_resources())
    outcome = job.folder / "outcome.json"
    outcome.unlink(missing_ok=True)
    job.folder.mkdir(parents=True, exist_ok=True)
    config = {"job": job, **send_images(data)}
    failures: list[BaseException] = []
    is_abandoned = threading.Event()
    fit = partial(_fit_alone, is_abandoned=is_abandoned) if job.workers == 1 else _fit_group
    thread = threading.Thread(target=fit, args=(config, failures), name="ray-train", daemon=True)
    tail = CurveTail(job.folder / "curves.jsonl")

    def pass_on() -> None:
        on_points(tail.read())
        on_counted(tail.counted())

    thread.start()
    try:
        _follow(thread, pass_on, should_stop, job.stop_file)
    finally:
        is_abandoned.set()
        pass_on()
        shutil.rmtree(job.folder / "ray", ignore_errors=True)
    if outcome.exists():
        _raise_outcome(read_object(outcome))
    if should_stop():
        raise StoppedError("training was stopped; its checkpoints are kept")
    if failures:
        workers = "worker" if job.workers == 1 else "workers"
        raise DsnetError(f"the training {workers} failed: {root_cause(failures[0])}") from failures[0]
    return job.folder / FINAL


def send_images(data: TrainingImages) -> dict[str, Any]:
    """Convert the training split to a form that Ray can send to workers; `receive_images` reverses
    it."""
    import ray

    if not isinstance(data, InMemoryImages):
        return {"data": data}
    # numpy arrays are shared through the object store without a copy; tensors are not.
    return {"images": ray.put(data.images.numpy()), "labels": ray.put(data.labels.numpy())}


def receive_images(sent: Mapping[str, Any], augmentation: Augmentation) -> TrainingImages:
    """The training split on a worker; images in memory are augmented by `augmentation`."""
    import ray
    import torch

    if "data" in sent:
        streamed: TrainingImages = sent["data"]
        return streamed
    images, labels = (torch.from_numpy(ray.get(sent[name]).copy()) for name in ("images", "labels"))
    return InMemoryImages(images, labels, augmentation)


def first_supernet(job: SupernetJob) -> Supernet:
    """The network that a job's training starts from."""
    from dsnet.training.start import first_weights, load_start

    start = None if job.init_from is None else load_start(job.init_from)
    supernet, _ = first_weights(job.subnets, job.run.seed, start)
    return supernet


def _check_room(job: SupernetJob, resources: Mapping[str, float]) -> None:
    """Raise PreflightError if the cluster can never place the workers; Ray would wait forever."""
    num_cpus, num_gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    if job.workers * job.threads > num_cpus:
        raise PreflightError(
            f"supernet.workers {job.workers} x supernet.threads {job.threads} need {job.workers * job.threads} CPUs, "
            f"but the Ray cluster has {num_cpus}; lower them, or raise ray.num_cpus"
        )
    if job.device == "cuda" and job.workers > num_gpus:
        raise PreflightError(
            f"supernet.workers is {job.workers} on cuda, but the Ray cluster has {plural(num_gpus, 'GPU')}; lower supernet.workers"
        )


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
            ray.get(task.remote(config))
        except Exception as error:  # noqa: BLE001 - reported by the main thread, whatever it is
            if attempt == WORKER_RETRIES or is_abandoned.is_set():
                failures.append(error)
                return
        else:
            return


def _fit_group(config: dict[str, Any], failures: list[BaseException]) -> None:
    """Run the trainer. Must not run in the main thread, where Ray would replace our handler of
    Ctrl-C."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from orchestration.workers.loopback_group import LoopbackConfig

    job: SupernetJob = config["job"]
    meeting = job.folder / "ray"
    meeting.mkdir(parents=True, exist_ok=True)
    failure_limits: dict[str, Any] = {"max_failures": WORKER_RETRIES, "controller_failure_limit": WORKER_RETRIES}
    trainer = TorchTrainer(
        _train_loop,
        train_loop_config=config,
        torch_config=LoopbackConfig(folder=str(meeting)) if job.is_local else TorchConfig(),
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
    pass_on: Callable[[], None],
    should_stop: Callable[[], bool],
    stop_file: Path,
) -> None:
    asked_at: float | None = None
    while thread.is_alive():
        thread.join(POLL_S)
        pass_on()
        if asked_at is None and should_stop():
            stop_file.touch()
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
    outcome = job.folder / "outcome.json"
    if outcome.exists():
        return  # an earlier attempt of this launch failed with an error that would occur again
    torch.set_num_threads(job.threads)
    workers = SingleWorker() if job.workers == 1 else DistributedWorkers()
    try:
        train_supernet(
            first_supernet(job),
            receive_images(config, job.run.augmentation),
            job.run,
            folder=job.folder,
            device=job.device,
            workers=workers,
            callbacks=TrainingCallbacks(should_stop=job.stop_file.exists),
        )
    except DsnetError as error:
        record = {"error": type(error).__name__, "message": str(error), "rank": workers.rank}
        atomic_write_json(outcome, record)
        if job.workers > 1:
            raise  # the others wait in an all-reduce; the group must end


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
