"""Fine-tuning of a pretrained plain network as a supernet, against the same supernet from fresh
weights: accuracy of every sub-network, at equal steps with and without those of the pretraining.

A small plain residual network is trained with cross-entropy in plain PyTorch. Its state dict is
then the start of a supernet with three sub-networks (structure method `uniform`). Images,
augmentation, batch size and the rules for the other settings are equal for all; test images are
read once per run, and nothing is chosen on them.

    DSNET_DATA=DIR python -m benchmarks.pretrained --folder F
    python -m benchmarks.pretrained --quick
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Estimate, Headline, Options, Report, Section, run_benchmark
from benchmarks.regime_report import t_interval
from dsnet.data.settings import Augmentation, SplitSizes
from dsnet.data.sources import ImageSource, load_source
from dsnet.data.splits import Splits, splits_of
from dsnet.data.tensors import TensorData
from dsnet.data.training_images import InMemoryImages
from dsnet.families import Task
from dsnet.files import atomic_write_json, read_json
from dsnet.import_path import ALLOW_IMPORTS
from dsnet.measure.evaluate import measure_subnets
from dsnet.network.supernet import Supernet
from dsnet.stored.checkpoint import load_supernet
from dsnet.stored.names import FINAL, STRUCTURE
from dsnet.structure.method import StructureProblem
from dsnet.structure.settings import Order, StructureSettings
from dsnet.structure.stage import StructureWork
from dsnet.training.data_defaults import EPOCHS, RATE, WARMUP, WEIGHT_DECAY, DataFacts, data_defaults
from dsnet.training.settings import TrainSettings
from dsnet.training.start import lay_out, load_start
from dsnet.training.supernet import train_supernet
from dsnet.training.supernet_run import SupernetRun
from dsnet.training.train_cost import BACKWARD, training_madds

BENCHMARK = "supernet from a pretrained network: test error over that of fresh weights, at equal steps in total (goal: at most 1)"
MODEL = "benchmarks.pretrained:SmallResNet"
BATCH = 64
NUM_SEEDS = 3
TARGETS = (0.3, 0.6, 1.0)


class _Block(nn.Module):
    """Two convolutions with a shortcut."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_out)
        self.shortcut = nn.Conv2d(num_in, num_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class SmallResNet(nn.Module):
    """A plain residual network of three blocks with 16, 32 and 64 channels."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 16, 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(_Block(16, 16, 2), _Block(16, 32, 2), _Block(32, 64, 2))
        self.fc = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.blocks(F.relu(self.bn(self.stem(images)))).mean((2, 3)))


@dataclass(frozen=True)
class Scale:
    """Settings that are the same for all runs."""

    data: str
    sizes: SplitSizes
    before: int
    """Epochs of the pretraining."""
    after: int
    """Epochs of the fine-tuning."""


SCALES: Mapping[str, Scale] = {
    "quick": Scale("digits", SplitSizes(train=320, gate=100, val=100, test=300), 2, 1),
    "cifar": Scale("cifar10", SplitSizes(train=3000, gate=100, val=100, test=2000), 6, 3),
}


@dataclass(frozen=True)
class Arm:
    """One way to train the supernet."""

    is_pretrained: bool = True
    rate_factor: float = 1.0
    """Learning rate relative to the default."""
    order: Order = "none"
    trains_longer: bool = False
    """Whether the steps of the pretraining are added to its own."""


ARMS: Mapping[str, Arm] = {
    "pretrained": Arm(),
    "pretrained, lr / 4, sorted": Arm(rate_factor=0.25, order="weight_l1"),
    "fresh, equal steps": Arm(is_pretrained=False, trains_longer=True),
    "fresh, without them": Arm(is_pretrained=False),
}
REFERENCE = "fresh, equal steps"
CHOSEN = "pretrained, lr / 4, sorted"


@dataclass(frozen=True)
class Material:
    """Images and their splits."""

    scale: Scale
    source: ImageSource
    splits: Splits
    data: TensorData
    """With the test split."""

    @classmethod
    def load(cls, scale: Scale) -> Material:
        """Read the images."""
        source = load_source(scale.data)
        splits = splits_of(source, scale.sizes)
        return cls(scale, source, splits, source.tensor_data(splits, open_test=True))

    @property
    def task(self) -> Task:
        """The task of the networks."""
        channels, _, size = self.data.image_shape
        return Task(self.source.num_classes, channels, size)

    @property
    def training(self) -> InMemoryImages:
        """The training split with its usual augmentation."""
        return InMemoryImages(
            self.data.images("train"), self.data.labels("train"), Augmentation.for_images(self.source)
        )


def settings(material: Material, epochs: int, rate_factor: float, seed: int, madds_m: float) -> SupernetRun:
    """The settings of a training, by the defaults for these images."""
    size = material.task.image_size
    facts = DataFacts(
        num_train=len(material.splits.train),
        num_classes=material.task.num_classes,
        smallest_class=1,
        image_size=size,
        channels=material.task.in_channels,
        can_mirror=material.training.augmentation.flip,
        madds_m=madds_m,
    )
    given: dict[str, Any] = {EPOCHS: epochs, "supernet.train.batch_size": BATCH}
    rate = rate_factor * data_defaults(facts, MODEL, given)[RATE].value
    found = data_defaults(facts, MODEL, {**given, RATE: rate})
    return SupernetRun(
        train=TrainSettings(
            epochs=epochs,
            batch_size=BATCH,
            lr=rate,
            weight_decay=found[WEIGHT_DECAY].value,
            warmup_epochs=found[WARMUP].value,
        ),
        augmentation=material.training.augmentation,
        normalization=material.source.normalization(material.splits),
        seed=seed,
        recalibration_images=min(4000, len(material.splits.train)),
    )


def pretrain(material: Material, seed: int, path: Path) -> None:
    """Train the plain network alone with cross-entropy, and write its state dict."""
    torch.manual_seed(seed)
    task, images, labels = material.task, material.data.images("train"), material.data.labels("train")
    run = settings(material, material.scale.before, 1.0, seed, 1.0)
    net = SmallResNet(task.num_classes, task.in_channels)
    optimizer = torch.optim.SGD(net.parameters(), run.train.lr, 0.9, nesterov=True, weight_decay=run.train.weight_decay)
    num_steps = run.train.epochs * (len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, run.train.lr, total_steps=num_steps)
    side = images.shape[-1]
    padding = run.augmentation.crop_padding
    for _ in range(run.train.epochs):
        for rows in torch.randperm(len(labels))[: len(labels) // BATCH * BATCH].view(-1, BATCH):
            top, left = torch.randint(0, 2 * padding + 1, (2,)).tolist()
            seen = F.pad(images[rows].float(), (padding,) * 4, mode="reflect")[
                ..., top : top + side, left : left + side
            ]
            seen = seen.to(torch.uint8)
            if run.augmentation.flip:
                seen = torch.where(torch.rand(BATCH, 1, 1, 1) < 0.5, seen.flip(3), seen)
            optimizer.zero_grad()
            F.cross_entropy(net(run.normalization.apply(seen)), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    torch.save(net.state_dict(), path)


def train_arm(material: Material, arm: Arm, seed: int, source: Path, folder: Path) -> dict[str, Any]:
    """Train a supernet, and measure its sub-networks on test."""
    scale, task = material.scale, material.task
    start = source if arm.is_pretrained else None
    epochs = scale.after + (scale.before if arm.trains_longer else 0)
    run = settings(material, epochs, arm.rate_factor, seed, 10.0)
    wanted = StructureSettings(method="uniform", targets=TARGETS, order=arm.order)
    problem, supernet = chosen(material, wanted, run, start)
    begin = accuracies(material, supernet, run)
    train_supernet(supernet, material.training, run, folder=folder / FINAL)
    trained, _ = load_supernet(folder / FINAL / FINAL)
    num_train, widest = len(material.splits.train), problem.madds(problem.widest)
    num_shown = scale.before * (num_train // BATCH) * BATCH
    return {
        "top1": accuracies(material, trained, run),
        "top1_before": begin,
        "madds_m": [problem.madds(member.widths) / 1e6 for member in trained.subnets],
        "tmadds": {
            "pretraining": (1 + BACKWARD) * widest * num_shown / 1e12 if arm.is_pretrained else 0.0,
            "supernet": training_madds(run, trained.subnets, num_train, task.image_size) / 1e12,
        },
        "train": asdict(run.train),
    }


def chosen(
    material: Material, wanted: StructureSettings, run: SupernetRun, start: Path | None
) -> tuple[StructureProblem, Supernet]:
    """The sub-networks that a method finds which trains nothing, in a supernet with start weights
    or fresh ones; the statistics of BatchNorm are not estimated anew."""
    subnets = lay_out(MODEL, material.task, {}, None, None if start is None else load_start(start))
    problem = StructureProblem(subnets, wanted, run, material.task.image_size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        StructureWork(
            problem, material.source, material.splits, start, folder, _trains_nothing, _no_scores, lambda: False
        ).choose()
        return problem, load_supernet(folder / STRUCTURE)[0]


def _trains_nothing(*_: object) -> None:
    raise AssertionError("uniform trains no network")


@contextmanager
def _no_scores(*_: object) -> Iterator[Any]:
    yield lambda candidates: ()


def accuracies(material: Material, supernet: Supernet, run: SupernetRun) -> list[float]:
    """Top-1 on test of the sub-networks that were chosen, 0..1."""
    rows = measure_subnets(supernet.eval(), material.data, "test", run.normalization)["subnets"]
    return [float(row["top1"]) for row in rows[: len(supernet.subnets)]]


def results_in(folder: Path, material: Material, seeds: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """The results of every arm for every seed; those that the folder has are not made again."""
    os.environ[ALLOW_IMPORTS] = "1"
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        source = folder / f"plain-{seed}.pth"
        if not source.is_file():
            pretrain(material, seed, source)
        for number, (name, arm) in enumerate(ARMS.items()):
            path = folder / f"arm-{number}-{seed}.json"
            if not path.is_file():
                with tempfile.TemporaryDirectory() as work:
                    result = train_arm(material, replace(arm), seed, source, Path(work))
                atomic_write_json(path, result)
            found[name].append(read_json(path))
            print(f"seed {seed}, {name}: {found[name][-1]['top1']}", file=sys.stderr, flush=True)
    return found


def measure(options: Options, folder: Path | None = None) -> Report:
    """Train all arms with three seeds: on digits with --quick, otherwise on CIFAR-10 from
    DSNET_DATA."""
    material = Material.load(SCALES["quick" if options.quick else "cifar"])
    seeds = range(options.seed, options.seed + NUM_SEEDS)
    if folder is not None:
        return report(results_in(folder, material, seeds))
    with tempfile.TemporaryDirectory() as temporary:
        return report(results_in(Path(temporary), material, seeds))


def report(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> Report:
    """Tables of accuracies, and of differences paired by seed, with t-intervals over seeds."""
    first = next(iter(results.values()))[0]
    members = [f"{target:g} ({madds:.3g} M MAdds)" for target, madds in zip(TARGETS, first["madds_m"], strict=True)]
    before = [
        (name, *(shown([100 * run["top1_before"][place] for run in runs]) for place in range(len(TARGETS))))
        for name, runs in results.items()
    ]
    rows = [
        (
            name,
            f"{runs[0]['train']['lr']:.2g}",
            f"{sum(runs[0]['tmadds'].values()):.3g}",
            *(shown([100 * run["top1"][place] for run in runs]) for place in range(len(TARGETS))),
        )
        for name, runs in results.items()
    ]
    differences = [
        (f"{name} - {other}", *(shown(paired(results[name], results[other], place)) for place in range(len(TARGETS))))
        for name in results
        if ARMS[name].is_pretrained
        for other in results
        if not ARMS[other].is_pretrained
    ]
    return Report(
        [
            Section("top-1 on test before training, %", ("start", *members), before),
            Section("top-1 on test, %", ("arm", "lr", "TMAdds", *members), rows),
            Section("difference, paired by seed, points", ("arms", *members), differences),
        ],
        Headline("error of pretrained over fresh, equal steps", _ratio(results[CHOSEN], results[REFERENCE]), "", 1.0),
        {"results": {name: list(runs) for name, runs in results.items()}},
    )


def paired(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], place: int) -> list[float]:
    """The differences of a sub-network's top-1 for each seed, in points."""
    return [100 * (a["top1"][place] - b["top1"][place]) for a, b in zip(one, other, strict=True)]


def shown(values: Sequence[float]) -> str:
    """The mean of one value per seed with its t-interval."""
    found = t_interval(values)
    return f"{found.mean:.1f}" + ("" if found.half is None else f" ±{found.half:.1f}")


def _ratio(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> Estimate:
    """The ratio of mean errors over all sub-networks, with its t-interval over seeds."""
    errors = [[1 - sum(run["top1"]) / len(TARGETS) for run in runs] for runs in (one, other)]
    found = t_interval([a / b for a, b in zip(*errors, strict=True)])
    half = found.half or 0.0
    return Estimate(found.mean, found.mean - half, found.mean + half)


if __name__ == "__main__":
    run_benchmark(
        BENCHMARK,
        measure,
        threads=1,
        params=[
            click.Option(
                ["--folder"],
                type=click.Path(path_type=Path),
                help="Keep the results here; another call continues.",
            )
        ],
    )
