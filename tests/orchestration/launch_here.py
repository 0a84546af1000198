"""A launch in this process without Ray, through the real command line: for tests of many launches,
and of faults in the driver."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dsnet.data.training_images import TrainingImages
from dsnet.errors import StoppedError
from dsnet.stored.names import FINAL
from dsnet.training.supernet import TrainingCallbacks, train_supernet
from orchestration.pipeline import launch, search, supernet
from orchestration.runs.curves import CurvePoint, CurveTail
from orchestration.workers.nodes import Node
from orchestration.workers.supernet import SupernetJob, first_supernet
from search.study.runner import SerialRunner
from tests.orchestration.samples import ONLY_BUNDLES

SMALL = f"""\
version: 1
name: tiny
data: {{name: digits, limit: 160}}
supernet:
  model: ds_tiny
  options: {{num_routes: 2}}
  train: {{epochs: 2, batch_size: 32, warmup_epochs: 0.5}}
  bootstrapping: {{teacher_min_updates: 2}}
measure: {{batch_sizes: [1], group_sizes: [1], repeats: 1, warmup: 0}}
gate:
  router: gate
  optimizer: {{steps: 20, batch_size: 64}}
sampler: {{name: random, cohort: 2}}
budget: {{trials: 4}}
tracking: {{mlflow: false}}
{ONLY_BUNDLES}"""
"""The smallest sweep that has every kind of file."""


def _train_here(
    job: SupernetJob,
    data: TrainingImages,
    *,
    on_points: Callable[[list[CurvePoint]], None],
    should_stop: Callable[[], bool],
    **_: Any,
) -> Path:
    """As `train_on_ray` with one worker, in this process."""
    job.folder.mkdir(parents=True, exist_ok=True)
    stem = train_supernet(
        first_supernet(job, None),
        data,
        job.run,
        folder=job.folder,
        device="cpu",
        callbacks=TrainingCallbacks(should_stop=should_stop),
    )
    on_points(CurveTail(job.folder / "curves.jsonl").read())
    if stem is None:
        raise StoppedError("training was stopped")
    return job.folder / FINAL


@contextmanager
def _no_cluster(*_: Any) -> Iterator[None]:
    yield


def _serial_runner(make: Callable[[Mapping[str, Any]], Any], *, arrays: Mapping[str, Any], **_: Any) -> SerialRunner:
    return SerialRunner(make(arrays))


def launch_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every launch of this process train and search here."""
    monkeypatch.setattr(launch, "ray_where_needed", _no_cluster)
    monkeypatch.setattr(supernet, "train_on_ray", _train_here)
    monkeypatch.setattr(supernet, "cluster_nodes", lambda: (Node("127.0.0.1", {"CPU": 1.0}),))
    monkeypatch.setattr(search, "RayRunner", _serial_runner)
