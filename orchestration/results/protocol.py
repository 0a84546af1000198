"""The interface to the results of a sweep, the same for one supernet and for several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from orchestration.config.sweep import SweepConfig
from orchestration.results.gate_id import GateId
from orchestration.results.run import RunResults
from orchestration.runs.folder import RunDir


class Results(Protocol):
    """Results of a sweep so far. `RunResults` are those of one supernet,
    `orchestration.supernets.results.SupernetSweepResults` those of several."""

    run: RunDir
    manifest: dict[str, Any]

    @property
    def config(self) -> SweepConfig:
        """The resolved configuration of the last launch."""
        ...

    @property
    def supernets(self) -> Mapping[str, RunResults]:
        """The results of each trained supernet by its name; of a sweep of one, the run's own under
        the empty name."""
        ...

    @property
    def front_gates(self) -> tuple[GateId, ...]:
        """The front over all supernets on `val`, the first metric's best last."""
        ...

    @property
    def named_gates(self) -> tuple[GateId, ...]:
        """The knee of the front, then the gates that `export.picks` selects, other than `all`;
        empty if there is no front."""
        ...

    @property
    def num_trials(self) -> int:
        """Number of finished trials of all supernets."""
        ...

    @property
    def num_failed(self) -> int:
        """Number of failed trials of all supernets."""
        ...

    @property
    def search_end(self) -> str | None:
        """The reason for which the search ended: `trials`, `time`, `plateau`, ...; None before its
        end, and in a sweep of several supernets, where each search ends by itself."""
        ...

    @property
    def is_verified(self) -> bool:
        """Whether the current front ran on `test`."""
        ...
