"""The runs of `supernet_accuracy`: regimes, scales, and the loop that does one run after the other
until all are done.

It imports only torch and dsnet, so that it runs on a GPU machine without the platform's other
packages. A run is one (regime, seed). Several processes may share a folder: each run is claimed by
a lock file, continues from its last checkpoint, and leaves one JSON file.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from dsnet.data.images import ImageSet
from dsnet.data.normalization import Normalization
from dsnet.data.registry import load_images
from dsnet.data.settings import Augmentation, SplitSizes
from dsnet.data.splits import splits_of
from dsnet.data.tensors import TensorData
from dsnet.data.training_images import InMemoryImages
from dsnet.errors import ConfigError, NonFiniteLossError, PreflightError
from dsnet.families import Task, create
from dsnet.files import atomic_write_json, exclusive, read_json
from dsnet.measure.evaluate import subnet_accuracy
from dsnet.measure.latency import device_name
from dsnet.space.cost import subnet_cost
from dsnet.space.subnet_set import SubnetSet
from dsnet.stored.checkpoint import load_supernet
from dsnet.training.settings import REGIMES, BootstrapSettings, Regime, TrainSettings
from dsnet.training.supernet import TrainingCallbacks, train_supernet
from dsnet.training.supernet_run import SupernetRun

PLAN = "plan.json"
RUNS = "runs"
WORK = "work"


@dataclass(frozen=True)
class Arm:
    """One way of training that is compared with the others."""

    regime: Regime
    ema_warmup: bool = True
    """Whether the EMA decay is warmed up; False = the published fixed decay, for the teacher and
    for the averaged weights that are tested."""


ARMS: Mapping[str, Arm] = MappingProxyType(
    {
        "ce": Arm(REGIMES["ce"]),
        "s_net": Arm(REGIMES["s_net"]),
        "us_net": Arm(replace(REGIMES["us_net"], num_random=REGIMES["ib"].num_random)),
        "inplace": Arm(replace(REGIMES["ib"], teacher="inplace")),
        "ib": Arm(REGIMES["ib"]),
        "ieb": Arm(REGIMES["ieb"]),
        "ib_gn": Arm(replace(REGIMES["ib"], norm="group_norm")),
        "ieb_gn": Arm(replace(REGIMES["ieb"], norm="group_norm")),
        "ib_fixed_ema": Arm(REGIMES["ib"], ema_warmup=False),
    }
)
"""Ways of training by name, in the order of the tables: the named regimes; `inplace` is `ib` with
the current largest sub-network as teacher, so that the two differ only in the teacher; `_gn`
normalises in groups of channels instead of over the batch."""
USUAL_ARMS = tuple(name for name in ARMS if name not in ("us_net", "ib_fixed_ema"))
"""Ways of training that are compared by default. `us_net` is left out: it differs from `inplace`
only in running statistics, which no student reads and recalibration replaces, so that their tested
weights are equal to the bit. The fixed decay is an option."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Settings that all runs of a folder share."""

    data: str
    """Name of a data set."""
    num_train: int | None
    """Number of training images; None for the data set's default."""
    family: str
    options: Mapping[str, Any] = field(default_factory=dict)
    train: TrainSettings
    recalibration_images: int | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON-able mapping."""
        return asdict(self)


SCALES: Mapping[str, Scale] = MappingProxyType(
    {
        "quick": Scale(
            data="digits",
            num_train=None,
            family="ds_tiny",
            options={"num_routes": 4},
            train=TrainSettings(epochs=3, batch_size=64, warmup_epochs=0.5),
        ),
        "cpu": Scale(
            data="cifar10",
            num_train=6400,
            family="ds_mbnet",
            options={"width": 0.25, "stem_stride": 1, "num_routes": 4},
            train=TrainSettings(epochs=3, batch_size=64, warmup_epochs=0.5, channels_last=True),
            recalibration_images=1600,
        ),
        "gpu": Scale(
            data="cifar10",
            num_train=40_000,
            family="ds_mbnet",
            options={"stem_stride": 1},
            train=TrainSettings(
                epochs=30,
                batch_size=512,
                lr=0.08,
                warmup_epochs=2.0,
                precision="bf16",
                channels_last=True,
                checkpoint_every=5,
            ),
        ),
    }
)
"""`quick`: seconds a run on one thread; `cpu`: about a minute and a half a run on one thread;
`gpu`: the full network, minutes a run."""


@dataclass(frozen=True, eq=False)
class Material:
    """The images with their splits, which are the same for all runs: the seed of a run decides
    weights, order and augmentation, but not the split."""

    training: InMemoryImages
    data: TensorData
    """Tensors of all splits; on the test split nothing is chosen."""
    task: Task
    normalization: Normalization
    split_hash: str


def load_material(scale: Scale, path: Path | None) -> Material:
    """Read the data set; CIFAR-10's test split is its official 10,000 images, digits' a stratified
    15 %.

    Raises:
        DataError: the images are not there.
    """
    return divided(load_images(scale.data, path), SplitSizes(train=scale.num_train))


def divided(image_set: ImageSet, sizes: SplitSizes, augmentation: Augmentation | None = None) -> Material:
    """Split a data set for all runs of a folder; an augmentation of None is the data's usual
    one."""
    splits = splits_of(image_set, sizes)
    data = TensorData.from_images(image_set, splits, open_test=True)
    images = data.images("train")
    channels, _, size = data.image_shape
    return Material(
        training=InMemoryImages(images, data.labels("train"), augmentation or Augmentation.for_images(image_set)),
        data=data,
        task=Task(data.num_classes, channels, size),
        normalization=Normalization.from_images(images),
        split_hash=f"{image_set.fingerprint}/{splits.hash}",
    )


@dataclass(frozen=True)
class Passes:
    """Forward and backward passes of one training step, in which regimes of equal steps differ."""

    trained: int
    """Number of sub-networks that run forward and backward."""
    taught: int
    """Number of forward passes of the EMA teacher."""


def passes_of(regime: Regime, subnets: SubnetSet) -> Passes:
    """The passes of one step of a regime on a set of sub-networks."""
    ends = {subnets.largest.name, subnets[subnets.by_madds()[0]].name}
    num_between = sum(subnet.name not in ends for subnet in subnets)
    picks = num_between if regime.widths == "all" else min(regime.num_random, num_between)
    teaching = {"ema": 1, "ema_ensemble": 1 + picks}
    return Passes(len(ends) + picks, teaching.get(regime.teacher, 0))


def run_settings(arm: Arm, seed: int, scale: Scale, material: Material) -> SupernetRun:
    """Stage I's settings of one run; within a folder only regime, EMA warm-up and seed differ."""
    return SupernetRun(
        train=scale.train,
        regime=arm.regime,
        bootstrapping=BootstrapSettings(ema_warmup=arm.ema_warmup),
        augmentation=material.training.augmentation,
        normalization=material.normalization,
        seed=seed,
        recalibration_images=scale.recalibration_images,
        keep_checkpoints=1,
    )


@dataclass(frozen=True)
class Job:
    """One run to do."""

    arm: str
    seed: int

    @property
    def name(self) -> str:
        """Name of the run's files."""
        return f"{self.arm}-seed{self.seed}"


class Named(Protocol):
    """A run to do, of this benchmark or another."""

    @property
    def name(self) -> str:
        """Name of the run's files."""


JobT = TypeVar("JobT", bound=Named)

Runner = Callable[[JobT, Path, Callable[[], bool]], dict[str, Any] | None]
"""(job, folder for checkpoints, should_stop) -> the run's record, or None if it was stopped."""


@dataclass(frozen=True, eq=False)
class Trainer:
    """Trains and tests one run: a `Runner`."""

    scale: Scale
    material: Material
    device: torch.device

    def __call__(self, job: Job, folder: Path, should_stop: Callable[[], bool]) -> dict[str, Any] | None:
        """Train, from the last checkpoint in `folder`, and then test every width. Recalibration and
        test are not interrupted.

        A loss that is not finite is a result about the regime: it is recorded under `error`, and
        the other runs go on.
        """
        arm, scale = ARMS[job.arm], self.scale
        supernet = create(scale.family, self.material.task, scale.options, norm=arm.regime.norm, seed=job.seed)
        run = run_settings(arm, job.seed, scale, self.material)
        record = {
            "regime": job.arm,
            "seed": job.seed,
            "settings": run.to_json(),
            "norm": supernet.spec.norm,
            "passes": asdict(passes_of(arm.regime, supernet.subnets)),
            "device": device_name(self.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        try:
            final = train_supernet(
                supernet,
                self.material.training,
                run,
                folder=folder,
                device=self.device,
                callbacks=TrainingCallbacks(should_stop=should_stop),
            )
        except NonFiniteLossError as error:
            return record | {"error": str(error)}
        return None if final is None else record | self._tested(final) | speed(folder / "curves.jsonl")

    def _tested(self, final: Path) -> dict[str, Any]:
        """Top-1 and top-5 of every width, including the largest."""
        data, normalization = self.material.data, self.material.normalization
        supernet = load_supernet(final)[0].to(self.device)
        rows = []
        for subnet in supernet.subnets.all:
            top1, top5 = subnet_accuracy(supernet, subnet, data, "test", normalization)
            cost = subnet_cost(supernet.spec, subnet, self.material.task.image_size)
            is_member = any(subnet.name == member.name for member in supernet.subnets)
            rows.append(
                {
                    "name": subnet.name,
                    "is_member": is_member,
                    "madds": cost.madds,
                    "params": cost.params,
                    "top1": top1,
                    "top5": top5,
                }
            )
        return {"subnets": rows, "num_test_images": data.num_images("test")}


def speed(curves: Path) -> dict[str, Any]:
    """Number of steps, and the median seconds of a step between two rows of the curves, on which a
    pause between two launches has no influence."""
    rows = [json.loads(line) for line in curves.read_text(encoding="utf-8").splitlines()]
    found = [(b["time_ms"] - a["time_ms"]) / 1e3 / (b["step"] - a["step"]) for a, b in pairwise(rows)]
    return {"steps": rows[-1]["num_steps"], "seconds_per_step": float(np.median(found)) if found else None}


def jobs(arms: Iterable[str], seeds: Sequence[int]) -> list[Job]:
    """All regimes with the first seed, then with the next, so that unfinished runs can already be
    compared."""
    names = list(arms)
    return [Job(name, seed) for seed in seeds for name in names]


class _Described(Protocol):
    def to_json(self) -> dict[str, Any]: ...


class _Divided(Protocol):
    @property
    def split_hash(self) -> str: ...


def begin(folder: Path, scale: _Described, material: _Divided) -> None:
    """Make the folder, or check that it was made with the same settings and images.

    Raises:
        ConfigError: the folder was made with other settings or images.
    """
    (folder / RUNS).mkdir(parents=True, exist_ok=True)
    (folder / WORK).mkdir(exist_ok=True)
    plan = json.loads(json.dumps({"scale": scale.to_json(), "images": material.split_hash}))
    with exclusive(folder):
        if not (folder / PLAN).exists():
            atomic_write_json(folder / PLAN, plan)
            return
    begun = read_json(folder / PLAN)
    changed = [key for key, value in plan["scale"].items() if begun["scale"].get(key) != value]
    changed += ["images"] * (begun["images"] != plan["images"])
    if changed:
        raise ConfigError(
            f"{folder} was made with another {', '.join(changed)}, and the runs of one folder must be comparable; choose another --folder"
        )


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Try to take the lock file at `path` without waiting; yields whether this process holds it.
    The kernel releases it when the process ends.

    Raises:
        PreflightError: the file cannot be made, or its file system has no locks.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise PreflightError(
            f"cannot make the lock file {path}: {error.strerror}; choose a writable --folder"
        ) from error
    try:
        yield _try_lock(descriptor, path)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise PreflightError(
            f"{path} is on a file system without file locks ({error.strerror}); choose a --folder on a local disk"
        ) from error
    return True


def record_path(folder: Path, job: Named) -> Path:
    """Path of a finished run's record."""
    return folder / RUNS / f"{job.name}.json"


def do_jobs(
    folder: Path,
    todo: Sequence[JobT],
    run: Runner[JobT],
    should_stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = print,
) -> list[JobT]:
    """Do the jobs that are neither done nor held by another process, in order, until told to stop.

    Args:
        folder: folder made by `begin`.
        todo: the wanted runs.
        run: the function that does one run.
        should_stop: called before every run and at every step.
        say: called with a line for each finished run.

    Returns:
        the jobs without a record when the call ends, including those that other processes hold.
    """
    for job in todo:
        target, work = record_path(folder, job), folder / WORK / job.name
        if should_stop():
            break
        if target.exists():
            continue
        with claimed(folder / WORK / f"{job.name}.lock") as is_mine:
            if not is_mine or target.exists():
                continue  # another process does it, or has just done it
            record = run(job, work, should_stop)
            if record is None:
                break
            atomic_write_json(target, record)
            shutil.rmtree(work, ignore_errors=True)
            num_done = sum(record_path(folder, other).exists() for other in todo)
            say(f"{job.name}: {_outcome(record)}; {num_done} of {len(todo)} runs are done")
    return [job for job in todo if not record_path(folder, job).exists()]


def _outcome(record: Mapping[str, Any]) -> str:
    if "error" in record:
        return f"failed: {record['error']}"
    if not record.get("subnets"):
        return "measured"
    return "top-1 " + ", ".join(f"{100 * row['top1']:.1f}" for row in record["subnets"]) + " %"
