"""The identity of a gate in a sweep of one supernet or of several."""

from __future__ import annotations

from dataclasses import dataclass

from search.front.points import trial_name


@dataclass(frozen=True, order=True)
class GateId:
    """Identifies a gate of a sweep by its supernet and its slot."""

    supernet: str
    """Name of the supernet; empty in a sweep of one."""
    slot: int

    @property
    def name(self) -> str:
        """The gate's name in every table: trial-0042, or s0-3fa29c01/trial-0042 in a sweep of
        several supernets."""
        trial = trial_name(self.slot)
        return f"{self.supernet}/{trial}" if self.supernet else trial
