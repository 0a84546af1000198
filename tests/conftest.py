"""What all tests share: one thread per process, MKL's mode, checks of shapes, no telemetry, and one
small Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

# Before anything imports numpy, torch, ray or mlflow. Two shared cores: more threads only wait for
# each other.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")

from tests.shapes import check_shapes_of, next_test  # noqa: E402

check_shapes_of("dsnet")  # before its first import

from orchestration.environment import prepare_environment  # noqa: E402
from orchestration.workers.runtime import RaySettings, ray_session  # noqa: E402

prepare_environment()  # MKL's mode too, as wherever the product starts

# The suite that decides looks at the same cases every time; HYPOTHESIS_PROFILE=explore looks for
# new ones.
settings.register_profile("suite", derandomize=True)
settings.register_profile("explore")
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


@pytest.fixture(autouse=True)
def shapes_checked() -> None:
    """Shapes of tensors are checked in the first calls of every function in each test."""
    next_test()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray cluster of this process: 2 CPUs, a small object store, no dashboard; stopped when the
    last test is done."""
    with ray_session(RaySettings(num_cpus=2, object_store_mib=100)):
        yield
