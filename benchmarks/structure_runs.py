"""The runs of `structure`: one way of getting sub-networks with one seed each, all at the same
total cost of training.

It imports only torch and dsnet, so that it runs on a GPU machine without the platform's other
packages.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from benchmarks.alone_runs import alone
from benchmarks.regime_runs import Job, Material, divided
from dsnet.data.registry import load_images
from dsnet.data.settings import SplitSizes
from dsnet.data.sources import ImageSource, InMemorySource
from dsnet.data.splits import Splits, splits_of
from dsnet.data.training_images import TrainingImages
from dsnet.errors import ConfigError, NonFiniteLossError, StoppedError
from dsnet.families import layout, rebuild
from dsnet.image_size import ImageSize
from dsnet.measure.evaluate import subnet_accuracy
from dsnet.measure.latency import device_name
from dsnet.network.supernet import Supernet
from dsnet.seeds import derive_seed
from dsnet.space.cost import subnet_cost
from dsnet.space.spec import Subnet
from dsnet.space.subnet_set import SubnetSet
from dsnet.space.width_space import WidthSpace
from dsnet.stored.checkpoint import load_supernet
from dsnet.structure.data import num_held_out
from dsnet.structure.method import EPOCHS, TOLERANCE, Base, Candidate, Score, StructureProblem, Target, Widths
from dsnet.structure.methods import check_structure, structure_method
from dsnet.structure.methods.uniform import Ladder
from dsnet.structure.scoring import HoldOutScorer
from dsnet.structure.search import Scorer, load_structure
from dsnet.structure.settings import (
    MULTI_BASE,
    PROGRESSIVE,
    BasesSettings,
    ProgressiveSettings,
    StructureSettings,
)
from dsnet.structure.stage import HeldOut, StructureWork
from dsnet.training.settings import REGIMES, BootstrapSettings, Regime, TrainSettings
from dsnet.training.start import first_weights, load_start
from dsnet.training.supernet import TrainingCallbacks, train_supernet
from dsnet.training.supernet_run import SupernetRun
from dsnet.training.train_cost import training_madds

ALONE = "alone"
BASELINE = "uniform_ib"
CONTROL = "s_net_kd"
"""Uniform widths with the joint training of SP-Net."""
RANDOM = "random"
"""The source of widths that is no structure method: random ones."""
LEVELS = 10
"""Largest number of widths of one channel group in a search."""
MOST_MOVES = 200
"""Moves of one random draw of widths, after which it begins anew."""
MOST_DRAWS = 200


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of getting sub-networks."""

    label: str
    """Description of the way in the report."""
    method: str = "uniform"
    """The source of the widths: a structure method, or `random`."""
    regime: Regime
    any_width: bool = False
    """Whether the random sub-networks of a step have any widths of the space, not those of the
    members."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the joint training that differ from the scale's."""
    bootstrapping: BootstrapSettings = field(default_factory=BootstrapSettings)
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the network's family."""
    structure: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of the structure method; targets, steps and hold-out are the scale's."""
    control: str = BASELINE
    """The arm of uniform widths with the same joint training, to which it is compared."""


def sp_net_training() -> dict[str, Any]:
    """SP-Net's joint training, as fields of an arm: all widths in every step, the largest first;
    the others learn 0.9 from it and 0.1 from the labels. BatchNorm has private statistics and a
    shared scale and shift, which is the default of plain networks."""
    return {
        "regime": Regime(widths="all", num_random=0, teacher="inplace"),
        "train": {"soft_weight": 0.9},
        "bootstrapping": BootstrapSettings(trust="full"),
        "control": CONTROL,
    }


def progressive(label: str, *, levels: int | None = LEVELS, **parts: Any) -> Arm:
    """The progressive search, or the same without one of its parts.

    Args:
        label: what it does.
        levels: see `StructureSettings`.
        parts: fields of `ProgressiveSettings`.
    """
    settings = {"levels": levels, "progressive": ProgressiveSettings(**parts)}
    return Arm(label=label, method=PROGRESSIVE, regime=REGIMES["ib"], structure=settings)


ARMS: Mapping[str, Arm] = MappingProxyType(
    {
        ALONE: Arm(label="one network per target, uniform widths, labels", regime=REGIMES["ce"]),
        "s_net": Arm(
            label="uniform widths, all of them in every step, labels, private BatchNorm",
            regime=REGIMES["s_net"],
        ),
        CONTROL: Arm(
            label="uniform widths, all of them in every step, 0.9 distilled from the largest and 0.1 labels",
            **sp_net_training(),
        ),
        "us_net": Arm(
            label="any widths, in-place distillation, tested at uniform widths",
            regime=REGIMES["us_net"],
            any_width=True,
        ),
        BASELINE: Arm(label="uniform widths, in-place bootstrapping", regime=REGIMES["ib"]),
        "autoslim": Arm(
            label="AutoSlim's greedy search in a us_net, then in-place bootstrapping",
            method="greedy",
            regime=REGIMES["ib"],
        ),
        RANDOM: Arm(label="random widths, in-place bootstrapping", method=RANDOM, regime=REGIMES["ib"]),
        "sp_net": Arm(
            label=f"SP-Net's pruning of one base per target, then the training of {CONTROL}",
            method=MULTI_BASE,
            options={"streams": "ids"},
            **sp_net_training(),
        ),
        "sp_net_one_shot": Arm(
            label=f"SP-Net's pruning of the widest base for all targets, then the training of {CONTROL}",
            method=MULTI_BASE,
            options={"streams": "ids"},
            structure={"bases": BasesSettings(widths=(1.0,))},
            **sp_net_training(),
        ),
        "sp_net_fresh": Arm(
            label=f"the widths of sp_net, then the training of {CONTROL} from fresh weights",
            method=MULTI_BASE,
            options={"streams": "ids"},
            structure={"start": "fresh"},
            **sp_net_training(),
        ),
        "progressive": progressive("progressive search, then in-place bootstrapping"),
        "progressive_no_noise": progressive("without trainable noise: channels ranked by weights", ranking="weight_l1"),
        "progressive_no_groups": progressive("without channel groups: single steps", levels=None),
        "progressive_no_tuning": progressive("without fine-tuning during the search", threshold=None),
        "progressive_no_reselection": progressive("without re-selection", reselection=False),
    }
)
"""The ways by name, in the order of the tables."""
QUICK_ARMS = (ALONE, "s_net", "us_net", BASELINE, "autoslim", RANDOM, "sp_net", "progressive_no_noise")
"""The ways of a quick look, without those that run no other code."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Settings that all runs of a folder share."""

    data: str
    """Name of a data set."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Numbers of images of splits that differ from the data set's default."""
    model: str
    """A network by name or import path."""
    train: TrainSettings
    """The training of `uniform_ib`, whose cost is everyone's budget; others have other numbers of
    epochs."""
    targets: tuple[float, ...]
    """MAdds of the sub-networks as shares of the widest's; one ratio for all groups meets them to
    within 1 %."""
    step: int
    levels: int = LEVELS
    min_share: float = 0.1
    holdout: float = 0.1
    """Share of the training images on which the search scores."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-able mapping."""
        return asdict(self)


NETWORKS = "benchmarks.plain_networks"
SCALES: Mapping[str, Scale] = MappingProxyType(
    {
        "quick": Scale(
            data="digits",
            sizes={"train": 240, "gate": 60, "val": 100, "test": 200},
            model=f"{NETWORKS}:resnet8_digits",
            train=TrainSettings(epochs=8, batch_size=48, lr=0.1, weight_decay=0.005, warmup_epochs=1),
            targets=(0.52, 1.0),
            step=1,
            levels=5,
            holdout=0.2,
        ),
        "digits": Scale(
            data="digits",
            sizes={"train": 400, "gate": 60, "val": 337, "test": 1000},
            model=f"{NETWORKS}:resnet8_digits",
            train=TrainSettings(epochs=50, batch_size=32, lr=0.1, weight_decay=0.01, warmup_epochs=2),
            targets=(0.0867, 0.25, 0.52, 1.0),
            step=1,
            holdout=0.25,
        ),
        "cifar": Scale(
            data="cifar10",
            sizes={"train": 8000, "gate": 1000, "val": 2000, "test": 10_000},
            model=f"{NETWORKS}:resnet8_cifar",
            train=TrainSettings(
                epochs=10,
                batch_size=64,
                lr=0.1,
                weight_decay=0.0056,
                warmup_epochs=1,
                precision="bf16",
                channels_last=True,
            ),
            targets=(0.104, 0.253, 0.506, 1.0),
            step=2,
        ),
        "gpu": Scale(
            data="cifar10",
            model=f"{NETWORKS}:resnet18_cifar",
            train=TrainSettings(
                epochs=60,
                batch_size=256,
                lr=0.2,
                weight_decay=4e-4,
                warmup_epochs=3,
                precision="bf16",
                channels_last=True,
            ),
            targets=(0.1, 0.25, 0.5, 1.0),
            step=4,
        ),
    }
)
"""`quick`: seconds; `digits`, `cifar`: half a minute and about two minutes a run on one thread;
`gpu`: a ResNet-18 on all of CIFAR-10."""


@dataclass(frozen=True, eq=False)
class Images:
    """The images with their splits, which are the same for all runs."""

    material: Material
    source: ImageSource
    splits: Splits

    @property
    def split_hash(self) -> str:
        """Identifies images and splits."""
        return self.material.split_hash


def load_split_images(scale: Scale, path: Path | None) -> Images:
    """Read the data set.

    Raises:
        DataError: the images are not there.
    """
    images, sizes = load_images(scale.data, path), SplitSizes(**scale.sizes)
    splits = splits_of(images, sizes)
    return Images(divided(images, sizes), InMemorySource(images), splits)


def jobs(arms: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """All arms with the first seed, then with the next, so that unfinished runs can already be
    compared."""
    return [Job(arm, seed) for seed in seeds for arm in arms]


def random_widths(problem: StructureProblem, target: Target, generator: random.Random) -> Widths:
    """Random widths whose MAdds differ from a target by at most 1 %.

    Every channel group draws one of its widths, with every step, as for `uniform`; then a random
    group gives or gets one step of channels, again and again, until the target is met. The widest
    sub-network is taken where it meets the target.

    Raises:
        ConfigError: no draw met the target.
    """
    if abs(problem.madds(problem.widest) - target.madds) <= TOLERANCE * target.madds:
        return problem.widest
    options = problem.options(None)
    for _ in range(MOST_DRAWS):
        places = [generator.randrange(len(widths)) for widths in options]
        for _ in range(MOST_MOVES):
            widths = tuple(possible[place] for possible, place in zip(options, places, strict=True))
            missing = target.madds - problem.madds(widths)
            if abs(missing) <= TOLERANCE * target.madds:
                return widths
            move = 1 if missing > 0 else -1
            free = [number for number, place in enumerate(places) if 0 <= place + move < len(options[number])]
            places[generator.choice(free)] += move
    raise ConfigError(f"no random sub-network met the target of {target.madds / 1e6:.4g} M MAdds: use a smaller step")


@dataclass(frozen=True)
class Spent:
    """Cost of a run in MAdds, without recalibration and tests."""

    bases: float = 0.0
    """Networks that were trained for the search."""
    search: float = 0.0
    """Forward passes of the candidates."""
    training: float = 0.0
    """Training of the sub-networks that are tested."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.bases + self.search + self.training


@dataclass(frozen=True, eq=False)
class _Trained:
    """The tested networks of a run, with what they cost."""

    networks: tuple[tuple[Supernet, Subnet], ...]
    """For every target the network and the sub-network in it."""
    spent: Spent
    epochs: int
    summary: Mapping[str, Any]
    """The record of the search; empty where nothing was searched."""


@dataclass(frozen=True, eq=False)
class Trainer:
    """Trains and tests one run."""

    scale: Scale
    images: Images
    device: torch.device

    def __call__(self, job: Job, folder: Path, should_stop: Callable[[], bool]) -> dict[str, Any] | None:
        """Train, from where an earlier call stopped, and then test every sub-network; None if it
        was stopped. Recalibration and tests are not interrupted."""
        record: dict[str, Any] = {
            "arm": job.arm,
            "seed": job.seed,
            "budget_madds": self.budget,
            "device": device_name(self.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "num_test_images": self.images.material.data.num_images("test"),
        }
        run = _Run(self, job, folder, should_stop)
        try:
            trained = run.alone() if job.arm == ALONE else run.shared()
        except NonFiniteLossError as error:
            return record | {"error": str(error), "subnets": []}
        except StoppedError:
            return None
        targets = self.problem(ARMS[BASELINE], job.seed).targets
        return record | {
            "epochs": trained.epochs,
            "spent_madds": {**asdict(trained.spent), "total": trained.spent.total},
            "search": dict(trained.summary),
            "subnets": [self._tested(target, *pair) for target, pair in zip(targets, trained.networks, strict=True)],
        }

    @cached_property
    def budget(self) -> float:
        """MAdds that every run may spend: those of `uniform_ib` for the scale's epochs."""
        problem = self.problem(ARMS[BASELINE], 0)
        return self.cost(problem.run, uniform_set(problem), self.num_images)

    @property
    def num_images(self) -> int:
        """Images of `train`."""
        return len(self.images.splits.train)

    @property
    def image_size(self) -> ImageSize:
        """Size of the images."""
        return self.images.material.task.image_size

    def cost(self, run: SupernetRun, subnets: SubnetSet, num_images: int) -> float:
        """MAdds of a training."""
        return training_madds(run, subnets, num_images, self.image_size)

    def epoch_cost(self, run: SupernetRun, subnets: SubnetSet, num_images: int) -> float:
        """MAdds of one epoch of a training."""
        return self.cost(run, subnets, num_images) / run.train.epochs

    def run(self, arm: Arm, seed: int, epochs: int) -> SupernetRun:
        """The settings of an arm's joint training; warm-up is a fixed share of it."""
        train, scale = self.scale.train, self.scale
        return SupernetRun(
            train=replace(
                train,
                epochs=epochs,
                warmup_epochs=min(train.warmup_epochs * epochs / train.epochs, epochs),
                checkpoint_every=max(1, epochs // 4),
                **arm.train,
            ),
            regime=arm.regime,
            bootstrapping=arm.bootstrapping,
            augmentation=self.images.material.training.augmentation,
            normalization=self.images.material.normalization,
            seed=seed,
            keep_checkpoints=1,
            width_space=WidthSpace(scale.min_share, scale.step, scale.levels) if arm.any_width else None,
        )

    def problem(self, arm: Arm, seed: int) -> StructureProblem:
        """The problem of an arm's structure method.

        The epochs of the joint training are those that the budget leaves beside the networks that
        the method trains, if the members were uniform; a fifth of them are each such network's.
        What a search leaves of the budget is known only after it, and goes to the joint training.
        """
        problem = self._problem(arm, seed, self.scale.train.epochs)
        bases = structure_method(problem.settings.method).bases(problem)
        if not bases:
            return problem
        joint_cost = self.epoch_cost(problem.run, uniform_set(problem), self.num_images)
        num_kept = self.num_images - num_held_out(problem, self.num_images)
        base_cost = sum(self.epoch_cost(base.run, base.subnets, num_kept) for base in bases)
        epochs = max(1, round(self.budget / (joint_cost + EPOCHS * base_cost)))
        return self._problem(arm, seed, epochs)

    def _problem(self, arm: Arm, seed: int, epochs: int) -> StructureProblem:
        scale = self.scale
        subnets = layout(scale.model, self.images.material.task, arm.options, arm.regime.norm)
        widths: dict[str, Any] = {"step": scale.step, "levels": scale.levels, "min_share": scale.min_share}
        settings = StructureSettings(
            method="uniform" if arm.method == RANDOM else arm.method,
            targets=scale.targets,
            holdout=scale.holdout,
            **{**widths, **arm.structure},
        )
        problem = StructureProblem(subnets, settings, self.run(arm, seed, epochs), self.image_size)
        if arm.method == RANDOM:
            generator = random.Random(derive_seed(seed, "random widths"))
            drawn = {target.name: random_widths(problem, target, generator) for target in problem.targets}
            problem = replace(problem, settings=StructureSettings(method="list", widths=drawn, **widths))
        check_structure(problem)
        return problem

    def _tested(self, target: Target, network: Supernet, subnet: Subnet) -> dict[str, Any]:
        data, normalization = self.images.material.data, self.images.material.normalization
        cost = subnet_cost(network.spec, subnet, self.image_size)
        val, test = (subnet_accuracy(network, subnet, data, split, normalization)[0] for split in ("val", "test"))
        return {
            "name": target.name,
            "target_madds": target.madds,
            "madds": cost.madds,
            "params": cost.params,
            "widths": list(subnet.widths),
            "val": val,
            "top1": test,
        }


def uniform_set(problem: StructureProblem) -> SubnetSet:
    """The sub-networks with one ratio for all channel groups that are nearest to the targets."""
    ladder = Ladder(problem)
    found = problem.found([Subnet(target.name, ladder.nearest(target)) for target in problem.targets])
    return SubnetSet(problem.spec, found.members, found.teacher)


@dataclass(frozen=True)
class _Run:
    """One run in progress."""

    trainer: Trainer
    job: Job
    folder: Path
    should_stop: Callable[[], bool]

    def alone(self) -> _Trained:
        """Train one network per target, all for equally many epochs.

        Raises:
            StoppedError: it was stopped.
        """
        trainer, arm = self.trainer, ARMS[ALONE]
        problem = trainer.problem(arm, self.job.seed)
        whole = rebuild(problem.subnets)
        networks = [alone(whole, subnet, self.job.seed) for subnet in uniform_set(problem)]
        costs = [trainer.epoch_cost(problem.run, network.subnets, trainer.num_images) for network in networks]
        run = trainer.run(arm, self.job.seed, max(1, round(trainer.budget / sum(costs))))
        images = trainer.images.material.training
        trained = [self._trained(network, run, images, self.folder / network.subnets[0].name) for network in networks]
        return _Trained(
            tuple((network, network.subnets[0]) for network in trained),
            Spent(training=run.train.epochs * sum(costs)),
            run.train.epochs,
            {},
        )

    def shared(self) -> _Trained:
        """Choose the sub-networks, and train them together for what is left of the budget.

        Raises:
            StoppedError: it was stopped.
        """
        trainer, arm = self.trainer, ARMS[self.job.arm]
        problem = trainer.problem(arm, self.job.seed)
        chosen = self.folder / "structure"
        StructureWork(
            problem=problem,
            source=trainer.images.source,
            splits=trainer.images.splits,
            start=None,
            folder=chosen,
            train=self._train_base,
            scorer=self._scorer,
            should_stop=self.should_stop,
        ).choose()
        found = load_structure(chosen)
        spent = Spent(bases=found.summary["train_madds"], search=found.summary["madds"])
        one = trainer.run(arm, self.job.seed, 1)
        cost = trainer.epoch_cost(one, found.subnets, trainer.num_images)
        epochs = max(1, round((trainer.budget - spent.total) / cost))
        start = load_start(chosen)
        run = replace(trainer.run(arm, self.job.seed, epochs), origin=start.origin())
        network = first_weights(found.subnets, self.job.seed, start)[0]
        trained = self._trained(network, run, trainer.images.material.training, self.folder / "joint")
        return _Trained(
            tuple((trained, subnet) for subnet in trained.subnets),
            replace(spent, training=epochs * cost),
            epochs,
            found.summary,
        )

    def _trained(self, network: Supernet, run: SupernetRun, images: TrainingImages, folder: Path) -> Supernet:
        """Train one network; finished work in the folder is kept.

        Raises:
            StoppedError: it was stopped.
        """
        final = train_supernet(
            network,
            images,
            run,
            folder=folder,
            device=self.trainer.device,
            callbacks=TrainingCallbacks(should_stop=self.should_stop),
        )
        if final is None:
            raise StoppedError("the training was stopped; its checkpoint is kept")
        return load_supernet(final)[0].to(self.trainer.device)

    def _train_base(self, base: Base, folder: Path, stem: Path | None, kept: Splits) -> None:
        """Train a network for the search."""
        start = None if stem is None else load_start(stem)
        network = first_weights(base.subnets, self.job.seed, start)[0]
        images = self.trainer.images.source.training_images(kept, base.run.augmentation)
        self._trained(network, base.run, images, folder)

    @contextmanager
    def _scorer(self, network: Supernet, held_out: HeldOut) -> Iterator[Scorer]:
        """Score candidates in this process."""
        normalization = self.trainer.images.material.normalization
        scorer = HoldOutScorer(network, *held_out, normalization, device=self.trainer.device)

        def score(candidates: Sequence[Candidate]) -> Iterable[Score]:
            return (scorer.score(candidate.widths) for candidate in candidates)

        yield score
