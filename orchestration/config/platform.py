"""The sections `ray`, `storage` and `tracking`: where a launch runs and where its results go."""

from __future__ import annotations

from typing import Annotated

from pydantic import (
    Field,
)

from dsnet.disk_room import DEFAULT_RESERVE_MIB
from dsnet.settings import LARGEST_COUNT, PositiveFloat, PositiveInt
from orchestration.config.section import Section, Text


class RayConfig(Section):
    """Ray cluster on which the work runs; has no influence on results."""

    address: Text = "local"
    """local = a private cluster on 127.0.0.1 for this run; else the address of a running one."""
    num_cpus: PositiveInt | None = None
    """Cores of the local cluster; null = all."""
    object_store_mib: Annotated[int, Field(ge=75, le=LARGEST_COUNT)] = 200
    """Shared memory in MiB, at least 75."""
    start_timeout_s: PositiveFloat = 120.0
    """Seconds that starting Ray, or joining its cluster, may take."""
    trial_actors: PositiveInt | None = None
    """Processes that run trials; null = one per core."""
    trial_resources: dict[Text, PositiveFloat] = Field(default_factory=dict)
    """Further resources of each of these processes, under Ray's names: GPU (0.5 = two processes
    share one), memory (bytes), or a custom resource of the cluster."""


class StorageConfig(Section):
    """Location of the runs."""

    runs: Text = "runs"
    """Folder that holds one folder per run; `~` and $VARIABLES are expanded."""
    min_free_mib: Annotated[int, Field(ge=0, le=LARGEST_COUNT)] = DEFAULT_RESERVE_MIB
    """Room in MiB that a launch leaves free on the disks of the runs folder and of Ray's folder: it
    does not begin with less, and stops when less is left; 0 = none."""
    artifacts: Text | None = None
    """URL of a folder for the checkpoints of training and for copies of the finished stages, which
    this machine and all nodes of the cluster can read and write, e.g. s3://bucket/folder (see
    docs/cluster.md); null = the run folder."""


class TrackingConfig(Section):
    """Tracking with MLflow."""

    mlflow: bool = True
    """Record the sweep in MLflow while it runs; `dsnet-orch sync` can do so later."""
    uri: Text | None = None
    """Tracking server or database, without a password; null = $MLFLOW_TRACKING_URI, or else sqlite
    in the runs folder."""
    experiment: Text | None = None
    """Name of the experiment; null = the name of the sweep."""
