"""The runs of `alone`: supernets, and each of their sub-networks as a separate network, one run
after the other until all are done.

It imports only torch and dsnet, so that it runs on a GPU machine without the platform's other
packages.
Several processes may share a folder: each run is claimed by a lock file, continues from its last
checkpoint, and leaves one JSON file.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import combinations, product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.regime_runs import RUNS, Material, divided
from dsnet.data.registry import load_images
from dsnet.data.settings import Augmentation, SplitSizes
from dsnet.errors import NonFiniteLossError
from dsnet.families import create
from dsnet.files import atomic_write_json, read_json
from dsnet.image_size import ImageSize
from dsnet.measure.latency import device_name
from dsnet.network.batchnorm import recalibrate
from dsnet.network.supernet import Supernet
from dsnet.space.cost import subnet_cost
from dsnet.space.spec import Subnet
from dsnet.space.subnet_set import SubnetSet
from dsnet.stored.checkpoint import load_supernet
from dsnet.training.settings import REGIMES, BootstrapSettings, Regime, TrainSettings
from dsnet.training.supernet import TrainingCallbacks, recalibration_batches, train_supernet
from dsnet.training.supernet_run import SupernetRun
from dsnet.training.train_cost import step_madds

EVALUATION_BATCH = 256
NUM_LOOKS = 6
"""Number of points of a curve over steps, without the end."""
LOOK_IMAGES = 1_000
"""Number of images of `val`, and of `train` for recalibration, at such a point."""
RATE_FACTORS = (0.5, 1.0, 2.0)
"""Learning rates from which the best is chosen, relative to the scale's."""
ALONE = "alone"


@dataclass(frozen=True)
class Arm:
    """One way of training the supernet."""

    regime: Regime
    bootstrapping: BootstrapSettings = field(default_factory=BootstrapSettings)
    cost_share: float | None = None
    """Compute of training the supernet, as a share of training every sub-network alone; it
    determines the number of steps. None = as many steps as a network alone."""


ARMS: Mapping[str, Arm] = MappingProxyType(
    {
        "ib": Arm(REGIMES["ib"]),
        "ib_published": Arm(replace(REGIMES["ib"], num_random=2), BootstrapSettings(trust="full")),
        "ce": Arm(REGIMES["ce"]),
        "ib_third": Arm(REGIMES["ib"], cost_share=1 / 3),
        "ib_equal_cost": Arm(REGIMES["ib"], cost_share=1.0),
        "ib_full_trust": Arm(REGIMES["ib"], BootstrapSettings(trust="full")),
        "ib_two_random": Arm(replace(REGIMES["ib"], num_random=2)),
        "ib_labels": Arm(replace(REGIMES["ib"], teacher="none")),
        "ib_inplace": Arm(replace(REGIMES["ib"], teacher="inplace")),
        "ib_largest_first": Arm(REGIMES["ib"], BootstrapSettings(largest_first=0.25)),
        "ieb": Arm(REGIMES["ieb"]),
    }
)
"""`ib` is in-place bootstrapping with our defaults; `ib_published` has the published soft labels
and two random sub-networks; `ce` trains every width with labels. `ib_third` costs a third of
training all alone, `ib_equal_cost` as much. The others change one thing of `ib`: full soft labels,
two random sub-networks, labels for all sub-networks of the sandwich, the current largest
sub-network as teacher, a quarter of the steps for the largest alone, and the ensemble."""
USUAL_ARMS = ("ib", "ib_published", "ce", "ib_third", "ib_equal_cost")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Settings that are the same for all runs of a folder."""

    data: str
    """Name of a data set."""
    path: str | None = None
    """Default folder of the images; `--data` takes precedence. None for data sets that need no
    folder."""
    image_size: ImageSize | None = None
    """Size of the images; None for the data set's own."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Numbers of images of splits that differ from the data set's default."""
    is_balanced: bool = False
    """Whether accuracy is the mean over classes of the accuracy within each class, for data in
    which one class dominates."""
    augmentation: Mapping[str, Any] | None = None
    """Settings of `dsnet.data.settings.Augmentation`; None: the data's usual ones."""
    family: str
    options: Mapping[str, Any] = field(default_factory=dict)
    train: TrainSettings
    lengths: tuple[float, ...] = (1.0,)
    """Shares of `train.epochs`: supernets are trained at each of these lengths, networks alone at
    the first."""
    alone: tuple[str, ...] | None = None
    """Names of the sub-networks that are trained alone; None: all of them."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-able mapping."""
        return asdict(self)


CIFAR = Scale(
    data="cifar10",
    sizes={"train": 8000, "gate": 1000, "val": 2000, "test": 10_000},
    family="ds_resnet",
    options={"depth": 8, "width": 2.0, "stem": "large"},
    train=TrainSettings(
        epochs=24, batch_size=64, lr=0.1, weight_decay=0.0023, warmup_epochs=1, channels_last=True, precision="bf16"
    ),
    lengths=(1.0, 1 / 12),
)

SCALES: Mapping[str, Scale] = MappingProxyType(
    {
        "quick": Scale(
            data="digits",
            sizes={"train": 320, "gate": 100, "val": 100, "test": 300},
            family="ds_tiny",
            options={"num_routes": 2},
            train=TrainSettings(epochs=3, batch_size=64, warmup_epochs=0.5),
        ),
        "digits": Scale(
            data="digits",
            family="ds_tiny",
            train=TrainSettings(epochs=30, batch_size=64, lr=0.2, weight_decay=0.008, warmup_epochs=2),
            lengths=(1.0, 1 / 3),
        ),
        "cifar": CIFAR,
        "cifar_paths": replace(
            CIFAR,
            options={
                **CIFAR.options,
                "paths": [path for path in product(range(4), repeat=3) if sorted(path) == list(path)],
            },
            lengths=(1.0,),
            alone=("path-000", "path-111", "path-222", "path-333"),
        ),
        "photos": Scale(
            data="image_folder",
            image_size=48,
            is_balanced=True,
            family="ds_resnet",
            options={"depth": 8, "width": 2.0, "stem": "large", "ratios": [0.25, 0.5, 1.0]},
            train=TrainSettings(
                epochs=96,
                batch_size=32,
                lr=0.1,
                weight_decay=0.0032,
                warmup_epochs=5,
                channels_last=True,
                precision="bf16",
            ),
        ),
        "gpu": Scale(
            data="cifar10",
            family="ds_resnet",
            options={"depth": 20, "width": 2.0, "ratios": [0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0]},
            train=TrainSettings(
                epochs=60,
                batch_size=256,
                lr=0.2,
                weight_decay=4e-4,
                warmup_epochs=3,
                precision="bf16",
                channels_last=True,
            ),
            lengths=(1.0, 1 / 6),
        ),
    }
)
"""`quick`: seconds; `digits`, `cifar`, `photos`: a few seconds to a few minutes a run on one
thread; `cifar_paths` has the same network with 20 sub-networks (every path along which the stages'
ratios do not fall), four of them also alone; `photos` reads a folder with one folder of images per
class (`--data`); `gpu`: all of CIFAR-10."""


def load_material(scale: Scale, path: Path | None) -> Material:
    """Read the data set.

    Raises:
        DataError: the images are not there.
    """
    path = path if path is not None or scale.path is None else Path(scale.path)
    augmentation = None if scale.augmentation is None else Augmentation(**scale.augmentation)
    return divided(load_images(scale.data, path, scale.image_size), SplitSizes(**scale.sizes), augmentation)


@dataclass(frozen=True)
class Job:
    """One run to do: a supernet (`arm` names how), or one sub-network alone (`arm` is `alone`)."""

    arm: str
    seed: int
    length: float
    subnet: str | None = None
    """The sub-network that is trained alone."""
    factor: float | None = None
    """Learning rate relative to the scale's; None = the best one of the first seed on `val`."""

    @property
    def name(self) -> str:
        """Name of the run's files."""
        parts = [self.arm, *([self.subnet] if self.subnet else []), f"length{self.length:.3g}"]
        rate = "best" if self.factor is None else f"rate{self.factor:g}"
        return "-".join([*parts, rate, f"seed{self.seed}"])


def jobs(arms: Sequence[str], subnets: Sequence[str], seeds: Sequence[int], lengths: Sequence[float]) -> list[Job]:
    """All runs: every learning rate for the first seed, and the best one for later seeds.

    Args:
        arms: ways of training the supernet.
        subnets: names of the sub-networks.
        seeds: one after the other.
        lengths: the first is also that of the networks alone; arms that are defined by their cost
            run at the first only.
    """
    found = []
    for number, seed in enumerate(seeds):
        factors: Sequence[float | None] = RATE_FACTORS if number == 0 else (None,)
        found += [Job(arm, seed, lengths[0], None, factor) for arm in arms for factor in factors]
        found += [Job(ALONE, seed, lengths[0], name, factor) for name in subnets for factor in factors]
        shorter = [arm for arm in arms if ARMS[arm].cost_share is None]
        found += [
            Job(arm, seed, length, None, factor) for length in lengths[1:] for arm in shorter for factor in factors
        ]
    return found


def alone(supernet: Supernet, subnet: Subnet, seed: int) -> Supernet:
    """One sub-network as a separate network with fresh weights: a supernet of one member, which
    every training loop accepts."""
    groups = tuple(
        replace(group, max_width=width) for group, width in zip(supernet.spec.groups, subnet.widths, strict=True)
    )
    spec = replace(supernet.spec, groups=groups)
    return type(supernet)(spec, SubnetSet(spec, (subnet,)), torch.Generator().manual_seed(seed))  # type: ignore[call-arg]


def image_madds(supernet: Supernet, regime: Regime, largest_first: float = 0.0) -> float:
    """MAdds of training for one image of a batch, mean over the random sub-networks of the sandwich
    rule and over the steps.

    Args:
        supernet: the supernet that is trained.
        regime: the sub-networks and the teacher of a step.
        largest_first: share of the steps in which the largest sub-network trains alone.
    """
    subnets = supernet.subnets
    smallest = subnets[subnets.by_madds()[0]]
    between = [subnet for subnet in subnets if subnet not in (smallest, subnets.largest)]
    count = len(between) if regime.widths == "all" else min(regime.num_random, len(between))
    ends = [subnets.largest, *([smallest] if smallest != subnets.largest else [])]
    costs = []
    for picks in combinations(between, count):
        taught = {"ema": [subnets.largest], "ema_ensemble": [subnets.largest, *picks]}.get(regime.teacher, [])
        if len(subnets.all) == 1:
            taught = []
        costs.append(step_madds(supernet.spec, [*ends, *picks], taught, supernet.spec.image_size))
    first = step_madds(supernet.spec, [subnets.largest], [], supernet.spec.image_size)
    return largest_first * first + (1.0 - largest_first) * float(np.mean(costs))


@dataclass(frozen=True)
class _Looks:
    """The points of a run's curve, stored in a file because a run may take several calls."""

    path: Path

    def keep(self, steps: int, val: Mapping[str, float]) -> None:
        """Store the accuracies after a number of steps; a repeated point replaces the earlier
        one."""
        found = {row["steps"]: row for row in self.rows()} | {steps: {"steps": steps, "val": dict(val)}}
        atomic_write_json(self.path, sorted(found.values(), key=lambda row: row["steps"]))

    def rows(self) -> list[Mapping[str, Any]]:
        """All points by increasing steps."""
        return read_json(self.path) if self.path.exists() else []


@dataclass(frozen=True, eq=False)
class Trainer:
    """Trains and tests one run."""

    scale: Scale
    material: Material
    device: torch.device
    folder: Path
    """Folder of the records; the learning rate of a later seed is read from those of the first."""
    first_seed: int

    @cached_property
    def blueprint(self) -> Supernet:
        """An untrained supernet, from which sub-networks and costs are read."""
        return create(self.scale.family, self.material.task, self.scale.options, seed=0)

    @cached_property
    def all_alone_madds(self) -> float:
        """MAdds of training every sub-network alone for one image, summed over the
        sub-networks."""
        return sum(image_madds(alone(self.blueprint, subnet, 0), REGIMES["ce"]) for subnet in self.blueprint.subnets)

    def __call__(self, job: Job, folder: Path, should_stop: Callable[[], bool]) -> dict[str, Any] | None:
        """Train, from the last checkpoint in `folder`, and then test every width; None if it was
        stopped, or has to wait for other runs."""
        factor = self._factor(job)
        if factor is None:
            return None
        network = self._network(job)
        run = self._settings(job, factor, network)
        looks = _Looks(folder / "looks.json")
        steps_per_epoch = len(self.material.data.labels("train")) // run.train.batch_size
        images = steps_per_epoch * run.train.batch_size
        own_madds = image_madds(network, run.regime, run.bootstrapping.largest_first)
        every = max(1, run.train.epochs // (NUM_LOOKS + 1))

        def look(epochs: int, kept: Supernet) -> None:
            if epochs % every == 0:
                looks.keep(epochs * steps_per_epoch, self._look(kept, run))

        record: dict[str, Any] = {
            "arm": job.arm,
            "seed": job.seed,
            "length": job.length,
            "subnet": job.subnet,
            "factor": factor,
            "settings": run.to_json(),
            "steps": run.train.epochs * steps_per_epoch,
            "train_pmadds": run.train.epochs * images * own_madds / 1e15,
            "all_alone_pmadds": self._epochs(job) * images * self.all_alone_madds / 1e15,
            "device": device_name(self.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        try:
            final = train_supernet(
                network,
                self.material.training,
                run,
                folder=folder,
                device=self.device,
                callbacks=TrainingCallbacks(should_stop=should_stop, on_epoch=look),
            )
        except NonFiniteLossError as error:
            return record | {"error": str(error), "subnets": []}
        if final is None:
            return None
        trained = load_supernet(final)[0].to(self.device)
        return record | {"curve": looks.rows(), "subnets": list(self._tested(trained))}

    def _factor(self, job: Job) -> float | None:
        """Learning rate of a run relative to the scale's; None if the runs from which it is chosen
        are not done."""
        if job.factor is not None:
            return job.factor
        found = {}
        for factor in RATE_FACTORS:
            path = self.folder / RUNS / f"{replace(job, seed=self.first_seed, factor=factor).name}.json"
            if not path.exists():
                return None
            found[factor] = score(read_json(path))
        return max(found, key=lambda factor: found[factor])

    def _epochs(self, job: Job) -> int:
        """Epochs of a network alone at the job's length."""
        return max(1, round(self.scale.train.epochs * job.length))

    def _network(self, job: Job) -> Supernet:
        if job.subnet is None:
            regime = ARMS[job.arm].regime
            return create(self.scale.family, self.material.task, self.scale.options, norm=regime.norm, seed=job.seed)
        (subnet,) = (subnet for subnet in self.blueprint.subnets.all if subnet.name == job.subnet)
        return alone(self.blueprint, subnet, job.seed)

    def _settings(self, job: Job, factor: float, network: Supernet) -> SupernetRun:
        train = self.scale.train
        arm = ARMS["ce"] if job.subnet is not None else ARMS[job.arm]
        epochs = self._epochs(job)
        if arm.cost_share is not None:
            share = arm.cost_share * self.all_alone_madds
            epochs = max(1, round(epochs * share / image_madds(network, arm.regime, arm.bootstrapping.largest_first)))
        return SupernetRun(
            train=replace(
                train,
                epochs=epochs,
                lr=train.lr * factor,
                warmup_epochs=min(train.warmup_epochs * epochs / train.epochs, epochs),
                checkpoint_every=max(1, epochs // 4),
            ),
            regime=arm.regime,
            bootstrapping=arm.bootstrapping,
            augmentation=self.material.training.augmentation,
            normalization=self.material.normalization,
            seed=job.seed,
            keep_checkpoints=1,
        )

    def _look(self, kept: Supernet, run: SupernetRun) -> dict[str, float]:
        """Accuracy of every sub-network on some images of `val` during training, with BatchNorm
        statistics from some of `train`."""
        network = copy.deepcopy(kept)
        settings = replace(run, recalibration_images=LOOK_IMAGES)
        recalibrate(network, recalibration_batches(self.material.training, settings, self.device))
        return {
            subnet.name: self._accuracy(network, subnet, "val", LOOK_IMAGES) for subnet in network.eval().subnets.all
        }

    def _tested(self, network: Supernet) -> Iterator[dict[str, Any]]:
        for subnet in network.subnets.all:
            cost = subnet_cost(network.spec, subnet, self.material.task.image_size)
            yield {
                "name": subnet.name,
                "is_member": subnet in network.subnets.members,
                "madds": cost.madds,
                "params": cost.params,
                "val": self._accuracy(network, subnet, "val"),
                "top1": self._accuracy(network, subnet, "test"),
            }

    @torch.no_grad()
    def _accuracy(self, network: Supernet, subnet: Subnet, split: str, limit: int | None = None) -> float:
        network.eval()
        apply = self.material.normalization.apply
        predicted, labels, seen = [], [], 0
        for batch in self.material.data.batches(split, EVALUATION_BATCH):
            predicted.append(network(apply(batch.images.to(self.device)), subnet).argmax(1).cpu())
            labels.append(batch.labels.cpu())
            seen += len(batch.labels)
            if limit is not None and seen >= limit:
                break
        return accuracy(torch.cat(predicted), torch.cat(labels), self.scale.is_balanced)


def score(record: Mapping[str, Any]) -> float:
    """Mean `val` accuracy over the run's routable sub-networks, by which its learning rate is
    chosen; -1 if the run diverged."""
    members = [row["val"] for row in record["subnets"] if row["is_member"]]
    return float(np.mean(members)) if members else -1.0


def accuracy(predicted: Tensor, labels: Tensor, is_balanced: bool) -> float:
    """Accuracy as a fraction; if balanced, the mean over classes of the accuracy within each. Both
    tensors are int64 [N]."""
    right = (predicted == labels).double()
    if not is_balanced:
        return float(right.mean())
    return float(torch.stack([right[labels == label].mean() for label in labels.unique()]).mean())


def load_records(folder: Path) -> list[Mapping[str, Any]]:
    """The finished runs of a folder."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / RUNS).glob("*.json"))]
