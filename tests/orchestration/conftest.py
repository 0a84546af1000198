"""One tiny sweep, run to its end once in a process of its own, for all tests that only look at
it."""

from __future__ import annotations

import pytest

from tests.orchestration.samples import Finished, run_tiny_sweep


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The finished sweep; copy it before changing anything."""
    return run_tiny_sweep(tmp_path_factory.mktemp("finished"))
