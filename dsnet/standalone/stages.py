"""The pipeline's first stages (structure, supernet, measure, table) without Ray.

Every call continues where the previous one stopped, at a step, a sub-network or a piece of a table.
On the CPU the results are bit-identical however the work was divided into calls, with the same
number of threads and the same kind of processor.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dsnet.arithmetic import arithmetic_facts
from dsnet.data.normalization import Normalization
from dsnet.data.settings import Augmentation, written_normalization
from dsnet.data.sources import ImageSource, load_source
from dsnet.data.splits import Splits, data_fingerprint, splits_of
from dsnet.data.tensors import Batch, TensorData
from dsnet.data.training_images import InMemoryImages, TrainingImages
from dsnet.environment import installed_versions, resolve_device
from dsnet.errors import StoppedError
from dsnet.families import Task
from dsnet.files import atomic_write_json, read_json
from dsnet.image_size import image_size_of
from dsnet.measure.evaluate import (
    EVALUATION_BATCH,
    build_routing_table,
    join_tables,
    measure_subnets,
    sample_training_images,
)
from dsnet.measure.latency import device_name, measure_latency
from dsnet.measure.latency_table import latency_file
from dsnet.measure.settings import TRAIN_SAMPLE_FILE
from dsnet.network.supernet import Supernet
from dsnet.routing.routing_table import RoutingTable
from dsnet.settings import Device
from dsnet.standalone.output_folder import STAGES, OutputFolder
from dsnet.standalone.resolved import StandaloneConfig
from dsnet.stored.checkpoint import load_supernet
from dsnet.stored.names import FINAL, STRUCTURE
from dsnet.structure.method import Base, Candidate, Score, StructureProblem
from dsnet.structure.methods import check_structure
from dsnet.structure.problem import structure_problem
from dsnet.structure.scoring import HoldOutScorer, holdout_warning
from dsnet.structure.search import Scorer
from dsnet.structure.stage import HeldOut, StructureWork
from dsnet.training.normalizing import choose_normalization
from dsnet.training.start import Start, check_start, first_weights, lay_out, load_start
from dsnet.training.supernet import TrainingCallbacks, train_supernet
from dsnet.training.supernet_run import SupernetRun

PACKAGES = ("dsnet-orch", "torch", "numpy", "safetensors", "Pillow", "pyarrow", "scikit-learn")
PIECE_BATCHES = 8
"""Batches per stored piece of a table; a call that is stopped loses at most one piece."""
LOSS_LINES_EVERY_S = 5.0
"""Minimum number of seconds between two lines about the losses."""


def run_standalone(
    config: StandaloneConfig,
    out: Path,
    *,
    device: Device = "auto",
    should_stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda text: None,
) -> OutputFolder:
    """Train, measure and tabulate a supernet, or continue an earlier call; the test split is never
    read.

    Args:
        config: the configuration.
        out: the output folder (see `dsnet.standalone.output_folder`).
        device: cpu, cuda or auto, for training, evaluation and tables. Latency is measured on
            `measure.device`.
        should_stop: called at every step, batch and timed call.
        say: called with single lines about the progress.

    Returns:
        the folder, with all stages finished.

    Raises:
        StoppedError: `should_stop` returned True; calling again continues.
        ConfigError, DataError, CheckpointError, PreflightError, LockedError, NonFiniteLossError:
        see `dsnet.errors`.
    """
    folder = OutputFolder(out)
    with folder.held():
        runner = _StageRunner(config, folder, resolve_device(device), should_stop, say)
        runner.begin()
        makers: dict[str, Callable[[], Sequence[Path]]] = {
            "structure": runner.choose,
            "supernet": runner.train,
            "measure": runner.measure,
            "table": runner.tabulate,
        }
        for stage in STAGES if runner.is_chosen else STAGES[1:]:
            if not folder.is_done(stage):
                if folder.is_outdated(stage):
                    say(f"{stage}: made by another release, which gives other results; made again")
                _run_stage(folder, stage, makers[stage])
                say(f"{stage}: done")
    return folder


def _run_stage(folder: OutputFolder, stage: str, make: Callable[[], Sequence[Path]]) -> None:
    started = time.monotonic()
    folder.begin_stage(stage)
    try:
        outputs = make()
    except StoppedError:
        folder.record(stage, time.monotonic() - started)
        raise
    folder.record(stage, time.monotonic() - started, outputs)


@dataclass(frozen=True)
class Given:
    """Network, training settings and start weights before sub-networks are chosen."""

    first: Supernet
    """The network with its initial weights and the sub-networks that its family declares."""
    run: SupernetRun
    stem: Path | None
    """Stem of the start weights; None for fresh ones."""


@dataclass(frozen=True)
class _StageRunner:
    """Runs the stages of one call; data and networks are loaded when they are first needed."""

    config: StandaloneConfig
    folder: OutputFolder
    device: Device
    should_stop: Callable[[], bool]
    say: Callable[[str], None]

    def begin(self) -> None:
        """Check everything that can be checked before the first step, and begin the folder."""
        self.folder.check_config(self.config)
        self.config.measure.by_device(resolve_device)  # raises if a device is missing
        if self.is_chosen and not self.folder.is_done("structure"):
            check_structure(self.problem)
        elif not self.folder.is_done("supernet"):
            _ = self.first  # raises if start weights do not fit
        facts = {
            "versions": installed_versions(PACKAGES),
            "device": {"kind": self.device, "name": device_name(self.device), "threads": torch.get_num_threads()},
            "arithmetic": arithmetic_facts(),
            "data": {
                "fingerprint": data_fingerprint(self.images.fingerprint, self.splits),
                "splits": self.splits.hash,
                "num_images": {name: len(self.splits[name]) for name in ("train", "gate", "val")},
            },
        }
        self.folder.begin(self.config, facts)

    @cached_property
    def images(self) -> ImageSource:
        data = self.config.data
        threads = torch.get_num_threads()
        return load_source(
            data.name,
            data.path,
            data.image_size,
            stream=data.stream,
            num_threads=threads,
            crop_fraction=data.crop_fraction,
            options=data,
        )

    @cached_property
    def splits(self) -> Splits:
        data = self.config.data
        return splits_of(self.images, data.splits, self.config.seed, data.limit)

    @cached_property
    def data(self) -> TensorData:
        """The splits in memory, without test, and without train if it is streamed."""
        return self.images.tensor_data(self.splits)

    @property
    def is_chosen(self) -> bool:
        """Whether a stage chooses the sub-networks."""
        return self.config.supernet.structure.is_chosen

    @cached_property
    def given(self) -> Given:
        """Network, training settings and start weights before sub-networks are chosen."""
        supernet, images = self.config.supernet, self.images
        channels, size = images.image_shape[0], image_size_of(images.image_shape)
        task = Task(num_classes=images.num_classes, in_channels=channels, image_size=size)
        start = None if supernet.init_from is None else load_start(Path(supernet.init_from))
        subnets = lay_out(supernet.model, task, supernet.options, supernet.regime.norm, start)
        written = written_normalization(self.config.data.normalization)
        chosen = choose_normalization(written, images, self.splits, start)
        run = self.config.supernet_run(images, chosen.normalization, None if start is None else start.origin())
        first, fresh = first_weights(subnets, run.seed, start)
        check_start(run, start, fresh, task.num_classes)
        if start is not None:
            if chosen.warning is not None:
                self.say(f"warning: {chosen.warning}")
            self.say(
                f"supernet: starts from {start.stem}" + (f"; newly initialised: {', '.join(fresh)}" if fresh else "")
            )
        return Given(first, run, None if start is None else start.stem)

    @cached_property
    def problem(self) -> StructureProblem:
        """The choice of sub-networks."""
        size = image_size_of(self.images.image_shape)
        return structure_problem(self.given.first.subnets, self.config.supernet.structure, self.given.run, size)

    @cached_property
    def first(self) -> tuple[Supernet, SupernetRun]:
        """The supernet with its initial weights, and the settings of its training."""
        if not self.is_chosen:
            return self.given.first, self.given.run
        start = load_start(self.folder.structure / STRUCTURE)
        assert isinstance(start, Start)
        run = replace(self.given.run, origin=start.origin())
        return first_weights(start.subnets, run.seed, start)[0], run

    @cached_property
    def trained(self) -> tuple[Supernet, Normalization]:
        """The finished supernet, on the device."""
        supernet, meta = load_supernet(self.folder.supernet / FINAL)
        return supernet.to(self.device), Normalization.from_json(meta["run"]["normalization"])

    def check_stop(self) -> None:
        if self.should_stop():
            raise StoppedError("stopped; repeat the command to continue")

    def choose(self) -> Sequence[Path]:
        """Choose the sub-networks; see `dsnet.structure.stage`."""

        def train(base: Base, folder: Path, stem: Path | None, kept: Splits) -> None:
            start = None if stem is None else load_start(stem)
            supernet, _ = first_weights(base.subnets, base.run.seed, start)
            self._train(supernet, base.run, kept, folder)

        said: list[str] = []

        @contextmanager
        def scorer(network: Supernet, held_out: HeldOut) -> Iterator[Scorer]:
            images, labels = held_out
            own = HoldOutScorer(network, images, labels, self.given.run.normalization, device=self.device)

            def score(candidates: Sequence[Candidate]) -> Iterator[Score]:
                if not said and (warning := holdout_warning(len(labels))) is not None:
                    said.append(warning)
                    self.say(f"structure: {warning}")
                for candidate in candidates:
                    yield own.score(candidate.widths)

            yield score

        return StructureWork(
            problem=self.problem,
            source=self.images,
            splits=self.splits,
            start=self.given.stem,
            folder=self.folder.structure,
            train=train,
            scorer=scorer,
            should_stop=self.should_stop,
        ).choose()

    def train(self) -> Sequence[Path]:
        """Train the supernet."""
        stem = self._train(*self.first, self.splits, self.folder.supernet)
        return [stem.with_name(stem.name + suffix) for suffix in (".safetensors", ".json")]

    def _train(self, supernet: Supernet, run: SupernetRun, splits: Splits, folder: Path) -> Path:
        """Train a network; returns the stem of its final checkpoint."""
        images = self.images.training_images(splits, run.augmentation)
        stem = train_supernet(
            supernet,
            _StoppableImages(images, self.check_stop),
            run,
            folder=folder,
            device=self.device,
            callbacks=TrainingCallbacks(reporter=_LossLines(self.say), should_stop=self.should_stop),
        )
        if stem is None:
            raise StoppedError("training was stopped; repeat the command to continue")
        return stem

    def measure(self) -> Sequence[Path]:
        folder = self.folder.measure
        supernet, normalization = self.trained
        unfinished, subnets = folder / "rows.json", folder / "subnets.json"
        total = len(supernet.subnets.all)

        def on_row(rows: list[Mapping[str, Any]]) -> None:
            atomic_write_json(unfinished, rows)
            self.say(f"measure: {len(rows)}/{total} {rows[-1]['name']} top-1 {100 * rows[-1]['top1']:.2f} %")
            self.check_stop()

        if not subnets.exists():
            self.check_stop()
            known = read_json(unfinished) if unfinished.exists() else []
            atomic_write_json(
                subnets, measure_subnets(supernet, self.data, "val", normalization, known=known, on_row=on_row)
            )
        unfinished.unlink(missing_ok=True)
        return [subnets, self._train_sample(), *self._latencies()]

    def _train_sample(self) -> Path:
        """Evaluate the widest route on a sample of its training images; returns the file."""
        path = self.folder.measure / TRAIN_SAMPLE_FILE
        if not path.exists():
            supernet, normalization = self.trained
            images: TrainingImages
            if self.config.data.stream:
                images = self.images.training_images(self.splits, Augmentation())
            else:
                images = InMemoryImages(self.data.images("train"), self.data.labels("train"), Augmentation())
            atomic_write_json(path, sample_training_images(supernet, images, normalization))
        return path

    def _latencies(self) -> list[Path]:
        """Measure the latency table of each device, unless an earlier call has; returns the
        files."""
        paths = []
        for name, settings in self.config.measure.by_device(resolve_device).items():
            path = self.folder.measure / latency_file(name)
            paths.append(path)
            if path.exists():
                continue
            supernet, on = self.trained[0], f" on {name}" if name else ""
            table = measure_latency(
                supernet,
                image_size_of(self.data.image_shape),
                settings,
                lambda done, of, on=on: self.say(f"measure: latency{on} {done}/{of}"),  # type: ignore[misc]
                before_each=self.check_stop,
            )
            supernet.to(self.device)
            atomic_write_json(path, table.to_json())
        return paths

    def tabulate(self) -> Sequence[Path]:
        paths = [self.folder.table / f"{split}.safetensors" for split in ("gate", "val")]
        for path in paths:
            if not path.exists():
                pieces = [self._piece(path.stem, first) for first in self._piece_starts(path.stem)]
                join_tables(pieces).save(path)
        shutil.rmtree(self.folder.table / "pieces", ignore_errors=True)
        return paths

    def _piece_starts(self, split: str) -> range:
        return range(0, self.data.num_images(split), PIECE_BATCHES * EVALUATION_BATCH)

    def _piece(self, split: str, first: int) -> RoutingTable:
        """The piece of a table from image `first` on; stored by an earlier call, or computed and
        stored now."""
        path = self.folder.table / "pieces" / f"{split}-{first:08d}.safetensors"
        if path.exists():
            return RoutingTable.load(path)
        supernet, normalization = self.trained
        rows = slice(first, first + PIECE_BATCHES * EVALUATION_BATCH)
        part = Batch(*(tensor[rows] for tensor in self.data.splits[split]))
        data = replace(self.data, splits=MappingProxyType({split: part}))
        self.check_stop()
        table = build_routing_table(
            supernet, data, split, normalization, on_progress=lambda done, total: self.check_stop()
        )
        table.save(path)
        self.say(f"table: {split} {first + table.num_images}/{self.data.num_images(split)}")
        return table


class _StoppableImages:
    """Training images that also check for a stop during recalibration, which may take minutes."""

    def __init__(self, images: TrainingImages, check_stop: Callable[[], None]) -> None:
        self._images = images
        self._check_stop = check_stop

    @property
    def labels(self) -> Tensor:
        return self._images.labels

    def augmented(self, batches: Iterable[tuple[Tensor, int]], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """See `TrainingImages.augmented`; the training loop itself checks for a stop at every
        step."""
        return self._images.augmented(batches, device)

    def clean(self, rows: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
        """See `TrainingImages.clean`; checks for a stop at every batch."""
        for images in self._images.clean(rows, device):
            self._check_stop()
            yield images


class _LossLines:
    """Reporter that writes the losses as lines of text, at most one every `LOSS_LINES_EVERY_S`
    seconds."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._said_at = float("-inf")

    def on_curve(self, record: Mapping[str, Any]) -> None:
        """See `dsnet.training.curves.Reporter`."""
        is_last = record["step"] == record["num_steps"]
        if not is_last and time.monotonic() - self._said_at < LOSS_LINES_EVERY_S:
            return
        self._said_at = time.monotonic()
        losses = {name.removeprefix("loss/"): value for name, value in record["metrics"].items() if "loss/" in name}
        shown = "  ".join(f"{name} {value:.3f}" for name, value in list(losses.items())[:: max(1, len(losses) - 1)])
        self._say(f"supernet: epoch {record['epoch']:.2f}  step {record['step']}/{record['num_steps']}  {shown}")
