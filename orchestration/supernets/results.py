"""Results of a sweep of supernets, read from its folder: one front over all members. Reads only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsnet.errors import NotFoundError
from dsnet.files import read_sealed, understood
from orchestration.config.export import gate_picks
from orchestration.config.sweep import SweepConfig
from orchestration.results.gate_id import GateId
from orchestration.results.protocol import Results
from orchestration.results.run import RunResults, refuse_unreadable, refuse_unusable
from orchestration.results.stored_config import stored_config
from orchestration.runs.folder import RunDir
from orchestration.runs.manifest import Manifest
from orchestration.supernets.entries import MemberEntry, read_entries
from search.front.pareto import apply_pick, parse_pick
from search.front.points import PointRow, trial_name
from search.front.selection import front_slots, pickable, spread_along_front
from search.study.study import TrialRecord


class SupernetSweepResults:
    """The results of a sweep of supernets so far.

    What was read is kept until `refresh`, so that one object serves a whole launch.

    Args:
        run: an existing run.
        opened: results of members that are open already, by name; the others are opened here.

    Raises:
        NotFoundError: there is no such run, or it is no sweep of supernets.
    """

    def __init__(self, run: RunDir, opened: Mapping[str, RunResults] | None = None) -> None:
        run.open_existing()
        if not run.supernets_json.is_file():
            raise NotFoundError(f"run {run.name!r} in {run.root} is not a sweep of several supernets")
        self.run = run
        self._opened = dict(opened or {})
        self.manifest: dict[str, Any] = Manifest(run.manifest_path).read()

    def refresh(self) -> None:
        """Read the folders of the sweep and of its members again; called when a stage has
        finished."""
        for results in self._opened.values():
            results.refresh()
        for name in vars(self).keys() - {"run", "config", "_opened"}:
            delattr(self, name)
        self.manifest = Manifest(self.run.manifest_path).read()

    @cached_property
    def config(self) -> SweepConfig:
        """The resolved configuration of the last launch."""
        return stored_config(self.run, self.manifest)

    @cached_property
    def entries(self) -> tuple[MemberEntry, ...]:
        """The records of all members, in the order of drawing."""
        return read_entries(self.run)

    @cached_property
    def supernets(self) -> dict[str, RunResults]:
        """The members whose supernet is trained and usable under the settings of the last launch,
        by name, in the order of drawing."""
        usable = [entry.name for entry in self.entries if entry.state not in ("failed", "stopped")]
        known = {name: self.member(name) for name in usable}
        return {name: own for name, own in known.items() if own is not None and own.is_done("supernet")}

    def member(self, name: str) -> RunResults | None:
        """The results of a member in any state; None if it has no run folder."""
        run = RunDir(self.run.supernets_dir, name)
        if name not in self._opened and run.manifest_path.is_file():
            self._opened[name] = RunResults(run)
        return self._opened.get(name)

    @property
    def search_end(self) -> None:
        """None: each search of a sweep of supernets ends by itself."""
        return None

    def entry(self, name: str) -> MemberEntry:
        """The record of a member."""
        return next(entry for entry in self.entries if entry.name == name)

    @cached_property
    def feasible(self) -> dict[GateId, TrialRecord]:
        """All gates that hold every constraint, ordered by supernet, then by slot."""
        return {
            GateId(name, record.slot): record for name, results in self.supernets.items() for record in results.feasible
        }

    @cached_property
    def front_slots(self) -> dict[str, tuple[int, ...]]:
        """The front over all supernets as slots by supernet, in the order of `front_gates`; only
        supernets with a gate on it."""
        slots: dict[str, tuple[int, ...]] = {}
        for gate in self.front_gates:
            slots[gate.supernet] = (*slots.get(gate.supernet, ()), gate.slot)
        return slots

    @property
    def num_trials(self) -> int:
        """Finished trials of all members."""
        return sum(len(results.records) for results in self.supernets.values())

    @property
    def num_failed(self) -> int:
        """Failed trials of all members."""
        return sum(len(results.failed) for results in self.supernets.values())

    @cached_property
    def front_gates(self) -> tuple[GateId, ...]:
        """The front over all supernets on `val`, the first metric's best last; of equal gates the
        one whose supernet was drawn first."""
        gates = list(self.feasible)
        order = front_slots(range(len(gates)), self._values(gates), [metric.goal for metric in self.config.metrics])
        return tuple(gates[position] for position in order)

    def _values(self, gates: Sequence[GateId]) -> NDArray[np.float64]:
        names = [metric.name for metric in self.config.metrics]
        return np.array([[self.feasible[gate].metrics[name] for name in names] for gate in gates])

    @cached_property
    def front_sample(self) -> tuple[GateId, ...]:
        """The gates of the front that run on `test`: about `budget.verify` of them, spread evenly
        along it; always both ends, the knee and the picks of `export.picks`."""
        size = self.config.budget.verify
        if size is None or len(self.front_gates) <= size:
            return self.front_gates
        kept = [self.front_gates.index(gate) for gate in self.named_gates if gate in self.front_gates]
        return tuple(
            self.front_gates[position] for position in spread_along_front(self._values(self.front_gates), size, kept)
        )

    @cached_property
    def named_gates(self) -> tuple[GateId, ...]:
        """The knee of the front over all supernets, then the gates that `export.picks` selects,
        other than `all`; empty if there is no front."""
        if not self.front_gates:
            return ()
        gates = [] if self.knee is None else [self.knee]
        for text in gate_picks(self.config.export.picks):
            try:
                gates += [] if text.strip() == "all" else self.picked([text])
            except NotFoundError:  # the export will say so, when everything else is done
                continue
        return tuple(dict.fromkeys(gates))

    @cached_property
    def knee(self) -> GateId | None:
        """The front's knee; None if there is no front."""
        return self.picked(["knee"])[0] if self.front_gates else None

    @cached_property
    def frozen(self) -> tuple[GateId, ...]:
        """The gates that the last launch chose to run on `test`; empty if it has not chosen yet."""
        if not self.run.front_json.is_file():
            return ()
        content = read_sealed(self.run.front_json)
        with understood(self.run.front_json):
            return tuple(GateId(item["supernet"], item["slot"]) for item in content["sample"])

    @property
    def is_verified(self) -> bool:
        """Whether the current front ran on `test`."""
        names = {gate.supernet for gate in self.frozen}
        return (
            bool(names)
            and self.frozen == self.front_sample
            and all(self.supernets[name].verified is not None for name in names)
        )

    def picked(self, picks: Sequence[str]) -> list[GateId]:
        """The gates selected by `picks`, each once, in the order of the picks.

        Args:
            picks: as for any run, over all supernets; a trial by its whole name
                (`s0-3fa29c01/trial-0042`, `s0/trial-0042`), or without its supernet where only one
                has such a trial.

        Raises:
            ConfigError: a pick cannot be read.
            NotFoundError: nothing matches, or the supernet of a trial is not said.
        """
        rows = [{"name": gate.name, "gate": gate, **record.metrics} for gate, record in self.feasible.items()]
        on_front = [row for row in rows if row["gate"] in self.front_gates]
        objectives = tuple((metric.name, metric.goal) for metric in self.config.metrics)
        gates: list[GateId] = []
        for text in picks:
            if "/" in text and ":" not in text:
                gates.append(self._by_name(text.strip()))
                continue
            pick = parse_pick(text)
            if pick.kind == "name":
                refuse_unreadable(text)
                gates.append(self._by_name(pick.name))
                continue
            chosen = apply_pick(pick, pickable(pick, rows, on_front), objectives)
            gates += [row["gate"] for row in chosen]
        return list(dict.fromkeys(gates))

    def _by_name(self, text: str) -> GateId:
        supernet, _, trial = text.rpartition("/")
        found = [
            gate
            for gate in self.feasible
            if trial_name(gate.slot) == trial and supernet in ("", gate.supernet, gate.supernet.partition("-")[0])
        ]
        if len(found) == 1:
            return found[0]
        if found:
            listed = ", ".join(gate.name for gate in found[:4]) + (", ..." if len(found) > 4 else "")
            raise NotFoundError(f"pick {text!r}: {len(found)} supernets have such a trial; write one of {listed}")
        refuse_unusable(
            text,
            [
                record
                for name, results in self.supernets.items()
                for record in results.records
                if trial_name(record.slot) == trial and supernet in ("", name, name.partition("-")[0])
            ],
        )
        known = ", ".join(self.supernets) or "none yet"
        raise NotFoundError(
            f"pick {text!r}: no feasible trial of this name; write SUPERNET/trial-NNNN with one of the supernets {known}"
        )

    def points(self) -> list[PointRow]:
        """All rows of all members with their supernet; `is_front` refers to the front over all
        supernets."""
        rows: list[PointRow] = []
        for name, results in self.supernets.items():
            for row in results.points():
                if row["kind"] == "gate":
                    row = {**row, "is_front": GateId(name, row["slot"]) in self.front_gates}
                rows.append({**row, "supernet": name})
        return rows


def results_at(run: RunDir) -> Results:
    """The results of an existing run, of one supernet or of several.

    Raises:
        NotFoundError: there is no such run.
    """
    return SupernetSweepResults(run) if run.supernets_json.is_file() else RunResults(run)
