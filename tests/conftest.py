"""Set-up of all tests: one thread per process, MKL's mode, checks of shapes, no telemetry, one
small Ray cluster, and the distribution of tests over the processes of `pytest -n 2`."""

from __future__ import annotations

import gc
import os
import signal
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

pytest.register_assert_rewrite("tests.search.contracts")

# Before anything imports numpy, torch, ray or mlflow. On two shared cores more threads are not
# faster.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DSNET_ALLOW_IMPORTS", "1")  # small networks to trace lie in tests/dsnet/nets.py
os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")

# A shell ignores Ctrl-C for what it runs in the background, and every program that a test starts
# would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from tests.shapes import check_shapes_of, next_test  # noqa: E402

check_shapes_of("dsnet")  # before its first import

from orchestration.environment import prepare_environment  # noqa: E402
from orchestration.workers.runtime import RaySettings, ray_session  # noqa: E402

prepare_environment()  # sets MKL's mode too, as in every process of the product

# The normal suite tests the same cases every time; HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("suite", derandomize=True, deadline=None)  # a busy machine is no fault
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


RAY_GROUP = "@ray"
"""Ending of the names of the tests that share the Ray cluster, if several processes run the
suite."""


_RAY_FIXTURES = {"ray_cluster", "finished"}
"""Fixtures that start a cluster, in this process or in one of their own."""


class ByFile(LoadScopeScheduling):  # type: ignore[misc]
    """Gives all tests of the Ray cluster to one process, and the tests of a file, which share
    fixtures, to one process."""

    def _split_scope(self, nodeid: str) -> str:
        return "ray" if nodeid.endswith(RAY_GROUP) else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile | None:
    """The distribution for `--dist loadgroup`."""
    return ByFile(config, log) if config.getoption("dist") == "loadgroup" else None


@pytest.hookimpl(tryfirst=True)  # before `-m` selects, and before xdist writes groups into names
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests that need Ray through a fixture; for several processes also group the tests of the
    Ray cluster, and put the longest first: this group, then the files that start programs, then
    those with the most slow tests."""
    for item in items:
        if not _RAY_FIXTURES.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker("ray")
    if not config.getoption("loadgroup", default=False):  # one process: the order of the files
        return
    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("ray"))
    long_files = {item.path for item in items if item.get_closest_marker("ray")}
    waiting = {item.path for item in items if "finished" in getattr(item, "fixturenames", ())}
    num_slow = Counter(item.path for item in items if item.get_closest_marker("slow"))

    def rank(item: pytest.Item) -> tuple[int, int]:
        """What reads the finished sweep comes last in the group of the cluster and first elsewhere:
        if both processes needed it at the same time, one would only wait."""
        group = 0 if item.get_closest_marker("xdist_group") else 1 if item.path in long_files else 2
        is_first = (item.path in waiting) == (group > 0)
        return 2 * group + (not is_first), -num_slow[item.path] if group == 2 else 0

    items.sort(key=rank)


def pytest_collection_finish() -> None:
    """Leave what was imported and collected out of later garbage collections, which would look
    through all of it again and again."""
    gc.collect()
    gc.freeze()
