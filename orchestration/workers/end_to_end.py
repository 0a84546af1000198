"""Trials with end-to-end training: the supernet and the images of the gate split come from arrays
that all trials share.

Calibration and scoring on the `val` table are the same as for trials on routing tables.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dsnet.data.normalization import Normalization
from dsnet.errors import NonFiniteLossError
from dsnet.gates.end_to_end import GateImages, train_stage
from dsnet.gates.fit import calibrate_heads
from dsnet.gates.settings import EndToEndSettings
from dsnet.network.supernet import Supernet
from orchestration.workers.self_check import REPEATED
from orchestration.workers.sent_network import SentNetwork
from search.gate_check import Finding
from search.gate_trial import GateTrial, arrays_of, gate_settings
from search.study.runner import PROGRESS, CohortFunction, OneByOne, TrialSpec

IMAGES, LABELS = "gate_images", "gate_labels"
"""Names of the shared arrays: uint8 [N, C, H, W] and int64 [N]."""


@dataclass(frozen=True)
class EndToEndTrial:
    """The state that all end-to-end trials of a sweep share; calling it runs one trial."""

    tables: GateTrial
    """The routing tables, the default settings, and the computation of metrics."""
    supernet: Supernet
    data: GateImages
    rules: EndToEndSettings

    def __call__(self, spec: TrialSpec) -> tuple[dict[str, float], dict[str, NDArray[Any]]]:
        """Train the gate of `spec` on images, then calibrate and score it on the `val` table;
        returns metrics and arrays.

        A trial that `spec.until` ends early is scored like a complete one, and its arrays include
        those from which it resumes.

        Raises:
            NonFiniteLossError: training diverged.
            ValueError: parameters out of their range.
        """
        settings = gate_settings(spec.params, self.tables.defaults, self.tables.gate_table, spec.seed)
        start = {name.removeprefix(PROGRESS): array for name, array in spec.progress.items()} or None
        stage = train_stage(self.supernet, self.data, settings, self.rules, start=start, until=spec.until)
        fit = calibrate_heads(self.tables.val_table, settings, stage.heads)
        arrays = arrays_of(fit)
        if spec.until is not None:
            arrays |= {PROGRESS + name: array for name, array in stage.progress.items()}
        return self.tables.scores.metrics(fit), arrays


@dataclass(frozen=True)
class MakeEndToEndTrial:
    """Builds the trial function inside a worker; it can be pickled, and holds no weights or images
    itself."""

    make_tables: Callable[[Mapping[str, NDArray[Any]]], GateTrial]
    """Builds table trials from the shared arrays."""
    network: SentNetwork
    """The trained and recalibrated supernet, whose weights are among the shared arrays."""
    normalization: Normalization
    rules: EndToEndSettings

    def __call__(self, arrays: Mapping[str, NDArray[Any]]) -> OneByOne:
        """Build the trial function over the shared arrays.

        Raises:
            CheckpointError: the supernet's weights are not those of the specification.
        """
        supernet = self.network.build(arrays)
        # Copies: shared arrays are read-only, which a tensor cannot be.
        images, labels = (torch.from_numpy(np.array(arrays[name])) for name in (IMAGES, LABELS))
        data = GateImages(images, labels, self.normalization)
        return OneByOne(EndToEndTrial(self.make_tables(arrays), supernet, data, self.rules))


@dataclass(frozen=True)
class EndToEndCheck:
    """Check of a worker: trains a gate on a few images twice, because the result must depend on the
    trial alone."""

    num_images: int = 16

    def __call__(self, function: CohortFunction) -> Finding:
        """Digest of the first training, and whether the second gave another result."""
        assert isinstance(function, OneByOne)
        trial = function.function
        assert isinstance(trial, EndToEndTrial)
        data = replace(
            trial.data, images=trial.data.images[: self.num_images], labels=trial.data.labels[: self.num_images]
        )
        own = gate_settings({}, trial.tables.defaults, trial.tables.gate_table, seed=0)
        settings = replace(own, router="gate", batch_size=max(1, len(data.labels) // 2))
        try:
            stages = [train_stage(trial.supernet, data, settings, trial.rules, until=1) for _ in range(2)]
        except (NonFiniteLossError, ValueError):
            return Finding("")  # trials fail with these settings too
        first, second = (b"".join(head.numpy().tobytes() for head in stage.heads) for stage in stages)
        return Finding(hashlib.sha256(first).hexdigest(), () if first == second else (REPEATED,))


def shared_images(data: GateImages) -> dict[str, NDArray[Any]]:
    """The gate split as the arrays that `MakeEndToEndTrial` reads."""
    return {IMAGES: data.images.cpu().numpy(), LABELS: data.labels.cpu().numpy()}
