"""A fixed list of small supernets that Ray Tune trains."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dsnet.data.settings import Augmentation
from dsnet.data.sources import load_source
from dsnet.data.splits import SplitSizes, make_splits
from dsnet.data.training_images import InMemoryImages, TrainingImages
from dsnet.families import Task
from dsnet.stored.names import FINAL
from dsnet.training.settings import BootstrapSettings, TrainSettings
from dsnet.training.start import lay_out
from dsnet.training.supernet_run import SupernetRun
from orchestration.workers.supernet import SupernetJob
from orchestration.workers.training_watch import StallRules
from orchestration.workers.tune_ledger import MemberFate, TuneRules
from orchestration.workers.tune_supernets import (
    SweepCallbacks,
    TuneMember,
    ValImages,
    train_members,
)

EPOCHS = 3
RATES = {"first": 0.1, "poor": 1e-6, "third": 0.07}
ASHA = TuneRules(scheduler="asha", options={"grace_period": 1, "reduction_factor": 2})


class Sweep:
    """Members that differ in their learning rate, on 200 digits, in folders below one; keeps what
    it hears."""

    def __init__(self, folder: Path, rates: Mapping[str, float] = RATES, norm: str | None = None) -> None:
        source = load_source("digits")
        splits = make_splits(source.labels.numpy(), None, SplitSizes(), 0, 200)
        data = source.tensor_data(splits)
        self.folder = folder
        self.stop_file = folder / "stop"
        self.train: TrainingImages = InMemoryImages(data.images("train"), data.labels("train"), Augmentation())
        self.val = ValImages(data.images("val"), data.labels("val"))
        task = Task(num_classes=10, in_channels=1, image_size=8)
        self.subnets = lay_out("ds_tiny", task, {"num_routes": 3}, norm)
        self.run = SupernetRun(
            train=TrainSettings(epochs=EPOCHS, batch_size=10, warmup_epochs=0.0),
            bootstrapping=BootstrapSettings(teacher_min_updates=2),
            augmentation=Augmentation(crop_padding=1),
            normalization=source.normalization(splits),
        )
        self.members = [self._member(name, lr) for name, lr in rates.items()]
        self.reports: list[tuple[str, int, float]] = []
        self.fates: list[MemberFate] = []
        self.curves: set[str] = set()

    def _member(self, name: str, lr: float) -> TuneMember:
        run = replace(self.run, train=replace(self.run.train, lr=lr))
        job = SupernetJob(
            self.subnets, run, folder=self.folder / name, stop_file=self.stop_file, device="cpu", threads=1, workers=1
        )
        return TuneMember(name, f"key-of-{name}", job)

    def launch(
        self,
        rules: TuneRules = ASHA,
        should_stop: Callable[[], bool] = lambda: False,
        stalls: StallRules | None = None,
    ) -> list[MemberFate]:
        """Every launch begins without the stop file, as the command line's do."""
        self.stop_file.unlink(missing_ok=True)
        return train_members(
            self.members,
            rules,
            data=self.train,
            val=self.val,
            folder=self.folder / "tune",
            callbacks=SweepCallbacks(
                on_report=lambda *report: self.reports.append(report),
                on_points=lambda name, points: self.curves.add(name),
                on_fate=self.fates.append,
                should_stop=should_stop,
                stalls=stalls if stalls is not None else StallRules(),
            ),
        )

    def final(self, name: str) -> Path:
        return self.folder / name / FINAL

    def sha256(self, name: str) -> str:
        """SHA-256 of a trained member's tensors."""
        return str(json.loads((self.folder / name / f"{FINAL}.json").read_text())["sha256"])


class Dies:
    """A training split that kills the worker that trains with it, a number of times."""

    def __init__(self, images: TrainingImages, record: Path, times: int = 1) -> None:
        self._images = images
        self._record = record
        """A file with one character for each time."""
        self._times = times

    @property
    def deaths(self) -> int:
        return self._record.stat().st_size if self._record.exists() else 0

    @property
    def labels(self) -> Tensor:
        return self._images.labels

    def augmented(self, batches: Iterable[tuple[Tensor, int]], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(self._images.augmented(batches, device)):
            if number == 3 and self.deaths < self._times:
                with open(self._record, "a") as record:
                    record.write("x")
                self.die()
            yield batch

    def die(self) -> None:
        """End the worker."""
        os.kill(os.getpid(), signal.SIGKILL)

    def clean(self, rows: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
        return self._images.clean(rows, device)


class Stops(Dies):
    """A training split that stops the worker that trains with it, as SIGSTOP from outside does."""

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)


class DiesLater(Dies):
    """A training split that ignores requests to stop, and kills its worker once it may."""

    def die(self) -> None:
        may_die = self._record.with_name("may-die")
        while not may_die.exists():
            time.sleep(0.02)
        super().die()
