"""Trial run: a few timed steps, to estimate time and memory of a training in advance."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch

from dsnet.data.tensors import Batch, TensorData
from dsnet.data.training_images import TrainingImages
from dsnet.families import rebuild
from dsnet.measure.evaluate import build_routing_table
from dsnet.measure.latency import waiter
from dsnet.network.batchnorm import recalibrate
from dsnet.network.supernet import Supernet
from dsnet.process_memory import peak_bytes, restart_peak
from dsnet.space.subnet_set import SubnetSet
from dsnet.training.supernet import TrainingCallbacks, recalibration_batches, train_supernet
from dsnet.training.supernet_run import SupernetRun

MAX_STEPS = 8
"""Maximum number of timed steps, after a first one that is not timed since it is slower."""
MIN_STEPS = 4
"""Number of timed steps that are made even if they take longer than `MAX_SECONDS`."""
MAX_SECONDS = 2.0
"""Time after which no further step begins, if `MIN_STEPS` are timed."""
LONGEST_S = 15.0
"""Time after which no further step begins, if one is timed."""
NUM_CALLS = 3
"""Timed calls of what is timed as a whole; no further one begins after `MAX_SECONDS`."""
EVALUATED_IMAGES = 64
"""Images on which every sub-network is evaluated; fewer where there are many sub-networks."""
EVALUATED_ANSWERS = 512
"""Maximum of images times sub-networks that are evaluated, but at least 2 images."""


@dataclass(frozen=True)
class TrialRun:
    """Measurements of a trial run."""

    device: str
    """cpu or cuda."""
    threads: int
    num_steps: int
    """Steps that were timed."""
    step_s: float
    """Seconds of the fastest timed optimiser step, including the transfer of the images to the
    device: other work on the machine makes steps slower, never faster."""
    recalibration_image_s: float
    """Seconds of recalibration per image, for all sub-networks."""
    table_image_s: float
    """Seconds of building a routing table per image, for all sub-networks."""
    table_image_bytes: float
    """Bytes of a routing table per image."""
    checkpoint_bytes: int
    """Bytes of the tensors of one training checkpoint."""
    peak_bytes: int
    """Peak memory while training: of this process, including its images, or on a GPU that of the
    GPU."""


def trial_run(
    subnets: SubnetSet,
    run: SupernetRun,
    *,
    training: TrainingImages,
    data: TensorData,
    device: str,
    threads: int,
    workers: int = 1,
) -> TrialRun:
    """Time a few training steps, recalibration and the routing table of a fresh supernet on a few
    images.

    Args:
        subnets: the sub-networks to train.
        run: the settings; 0 epochs are treated as 1.
        training: the training split.
        data: data with the split `val`.
        device: cpu or cuda.
        threads: torch threads during the trial run; the previous number is restored afterwards.
        workers: number of processes among which a step's images are divided.
    """
    train = run.train
    share = max(2 * train.accumulate, train.batch_size // workers // train.accumulate * train.accumulate)
    settings = replace(train, epochs=max(1, train.epochs), batch_size=share, checkpoint_every=max(1, train.epochs))
    settings = replace(settings, warmup_epochs=min(settings.warmup_epochs, settings.epochs))
    usual = replace(run.bootstrapping, largest_first=0.0)  # steps of the largest alone are cheaper than the others
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        supernet = rebuild(subnets)
        clock = _StepClock(waiter(torch.device(device)))
        restart_peak(device)
        with tempfile.TemporaryDirectory() as folder:
            train_supernet(
                supernet,
                training,
                replace(run, train=settings, bootstrapping=usual, origin={}),
                folder=Path(folder),
                device=device,
                callbacks=TrainingCallbacks(should_stop=clock.should_stop),
            )
            peak = peak_bytes(device)
            checkpoint_bytes = max((file.stat().st_size for file in Path(folder).glob("*.safetensors")), default=0)
        few = _few_images(subnets)
        recalibration_s = _recalibration_s(supernet, training, replace(run, train=settings), few, device)
        table_s, table_bytes = _table(supernet, data, run, few)
    finally:
        torch.set_num_threads(threads_before)
    return TrialRun(
        device,
        threads,
        len(clock.intervals),
        clock.step_s,
        recalibration_s,
        table_s,
        table_bytes,
        checkpoint_bytes,
        peak,
    )


class _StepClock:
    """Records the time of every step, as the `should_stop` of a training, and stops it after enough
    steps."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self._synchronize = synchronize
        self._times: list[float] = []

    def should_stop(self) -> bool:
        """Record the time; returns whether enough steps have been timed."""
        self._synchronize()
        self._times.append(time.monotonic())
        num_timed, seconds = len(self._times) - 2, self._times[-1] - self._times[0]
        is_late = seconds > MAX_SECONDS and num_timed >= MIN_STEPS
        return num_timed >= MAX_STEPS or is_late or (seconds > LONGEST_S and num_timed >= 1)

    @property
    def intervals(self) -> list[float]:
        """Seconds of the timed steps; the first step is left out if there are others."""
        found = [later - earlier for earlier, later in zip(self._times, self._times[1:], strict=False)]
        return found[1:] or found

    @property
    def step_s(self) -> float:
        """Seconds of the fastest timed step; 0 if no step was timed."""
        return min(self.intervals, default=0.0)


def _few_images(subnets: SubnetSet) -> int:
    return max(2, min(EVALUATED_IMAGES, EVALUATED_ANSWERS // len(subnets.all)))


def _recalibration_s(supernet: Supernet, training: TrainingImages, run: SupernetRun, few: int, device: str) -> float:
    """Seconds of recalibration per image, timed on the second of two runs on the same batch."""
    one = replace(run, recalibration_images=few, recalibration_batch=few)
    images = next(recalibration_batches(training, one, torch.device(device)))
    recalibrate(supernet, [images])
    return _seconds(lambda: recalibrate(supernet, [images]), device) / len(images)


def _table(supernet: Supernet, data: TensorData, run: SupernetRun, few: int) -> tuple[float, float]:
    """(seconds, bytes) of a routing table per image."""
    part = Batch(*(tensor[:few] for tensor in data.splits["val"]))
    small = replace(data, splits=MappingProxyType({"val": part}))
    device = next(supernet.parameters()).device
    tables = []
    seconds = _seconds(
        lambda: tables.append(build_routing_table(supernet, small, "val", run.normalization)), device.type
    )
    num_bytes = sum(array.nbytes for array in tables[0].arrays().values())
    return seconds / len(part.labels), num_bytes / len(part.labels)


def _seconds(call: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of a few calls."""
    synchronize = waiter(torch.device(device))
    found: list[float] = []
    while len(found) < NUM_CALLS and sum(found) < MAX_SECONDS:
        synchronize()
        start = time.monotonic()
        call()
        synchronize()
        found.append(time.monotonic() - start)
    return max(min(found), math.ulp(1.0))
