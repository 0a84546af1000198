"""Timings of a run's supernet on other devices, stored beside its checkpoint, and the front of
the run there. They change nothing of the study."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsnet.deploy.engines import TORCH
from dsnet.errors import CheckpointError
from dsnet.files import atomic_write_bytes, file_sha256, known_sha256, read_object, read_sealed, write_sealed
from dsnet.measure.latency import LatencySamples
from dsnet.routing.routing_table import RoutingTable
from dsnet.routing.table_routing import run_on_table
from dsnet.wording import plural
from orchestration.results.run import RunResults
from orchestration.runs.manifest import now_iso
from search.front.latency_front import Candidate, TimedPoint, latency_fronts
from search.front.points import trial_name

VERSION = 1
MAX_NAME = 120
"""Largest number of characters of a file's name without its suffix."""


@dataclass(frozen=True)
class TimedElsewhere:
    """One timing on another device."""

    at: str
    """Time at which it was stored."""
    engine: str
    """Name of the engine, as in `measure.engine`."""
    is_by_kit: bool
    """Whether the script of a kit timed it; the router's decision is then not timed."""
    samples: LatencySamples

    @property
    def file_name(self) -> str:
        """Its file, named by device, engine and threads; a later timing of the same replaces it."""
        way = " by kit" if self.is_by_kit else ""
        text = f"{self.title}{way}".lower()
        return re.sub(r"[^a-z0-9]+", "-", text)[:MAX_NAME].strip("-") + ".json"

    @property
    def title(self) -> str:
        """Device, engine and threads."""
        engine = f", {TORCH}" if self.engine == TORCH else ""  # the device names the others
        return f"{self.samples.device}{engine}, {plural(self.samples.threads, 'thread')}"

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON."""
        facts = {"version": VERSION, "at": self.at, "engine": self.engine, "is_by_kit": self.is_by_kit}
        return {**facts, "samples": self.samples.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TimedElsewhere:
        """Build it from the result of `to_json`."""
        return cls(data["at"], data["engine"], data["is_by_kit"], LatencySamples.from_json(data["samples"]))


def store_timing(results: RunResults, engine: str, samples: LatencySamples, *, is_by_kit: bool) -> TimedElsewhere:
    """Store a timing in the folder of the run.

    Raises:
        NotFoundError: the run has not finished its supernet stage.
    """
    timed = TimedElsewhere(now_iso(), engine, is_by_kit, samples)
    folder = results.run.elsewhere_dir(results.done_key("supernet"))
    folder.mkdir(exist_ok=True)
    write_sealed(folder / timed.file_name, timed.to_json())
    return timed


def stored_timings(results: RunResults) -> list[TimedElsewhere]:
    """All stored timings on other devices, by the name of their file.

    Raises:
        NotFoundError: the run has not finished its supernet stage.
        CheckpointError: a file is damaged, or of another release.
    """
    found = []
    for path in sorted(results.run.elsewhere_dir(results.done_key("supernet")).glob("*.json")):
        try:
            data = read_sealed(path)
            if data["version"] != VERSION:
                raise ValueError(f"version {data['version']!r}, but this release reads {VERSION}")
            found.append(TimedElsewhere.from_json(data))
        except (CheckpointError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: no complete timing ({error!r}); delete it, and measure that device again"
            ) from error
    return found


def store_kit(results: RunResults, description: Path) -> str:
    """Remember the description of an exported kit; returns its SHA-256.

    Raises:
        NotFoundError: the run has not finished its supernet stage.
    """
    sha = file_sha256(description)
    folder = results.run.kits_dir(results.done_key("supernet"))
    folder.mkdir(exist_ok=True)
    atomic_write_bytes(folder / f"{sha}.json", description.read_bytes())
    return sha


def stored_kits(results: RunResults) -> dict[str, Mapping[str, Any]]:
    """The descriptions of all kits that were exported from the present supernet, by their SHA-256.

    Raises:
        NotFoundError: the run has not finished its supernet stage.
        CheckpointError: a description has changed since it was stored.
    """
    folder = results.run.kits_dir(results.done_key("supernet"))
    kits: dict[str, Mapping[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        if known_sha256(path) != path.stem:
            raise CheckpointError(
                f"{path}: is not the description that was stored; delete it, and export that kit again"
            )
        kits[path.stem] = read_object(path)
    return kits


def fronts_of(results: RunResults, timed: TimedElsewhere) -> dict[int, tuple[TimedPoint, ...]]:
    """The gates of the run's front and all static sub-networks with their latencies on another
    device, by batch size, as `search.front.latency_front` computes them.

    Raises:
        NotFoundError: the run has not finished its measure or table stage.
    """
    results.done_key("measure")
    table = RoutingTable.load(results.run.table(results.done_key("table"), "val"))
    gates = []
    for slot in results.front:
        router, metrics = results.router(slot), results.record(slot).metrics
        runs = tuple(map(float, run_on_table(router, table).runs))
        gates.append(Candidate(trial_name(slot), metrics["top1"], metrics["madds_m"], runs, router.kind))
    static = [Candidate(subnet.name, subnet.top1, subnet.madds / 1e6) for subnet in results.members]
    return latency_fronts(timed.samples, [*gates, *static], table.routes)
