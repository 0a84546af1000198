"""Gates that a static sub-network beats on `val`: a router that is not worth its cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsnet.metrics import find_metric
from orchestration.config.command_lines import command_line, has_own_code
from orchestration.config.resolve import constraint_set
from orchestration.results.gate_id import GateId
from orchestration.results.protocol import Results
from orchestration.results.run import RunResults
from search.conditions.constraints import BASELINE
from search.front.analysis_records import is_collapsed

UNITS = {"madds_m": "M MAdds", "params_m": "M parameters"}
"""Units of metrics, where they are not the metric's name."""


@dataclass(frozen=True)
class DominatedGate:
    """A gate, and a static sub-network that is at least as good in every objective and better in
    one."""

    gate: GateId
    is_knee: bool
    is_collapsed: bool
    static: str
    """Name of the static sub-network; in a sweep of several supernets it begins with its
    supernet."""
    values: tuple[tuple[str, float, float], ...]
    """(objective, value of the gate, value of the static sub-network), on `val`."""

    def __str__(self) -> str:
        role = f"the knee, {self.gate.name}," if self.is_knee else f"{self.gate.name}, which is exported,"
        compared = " and ".join(_compared(name, static, own) for name, own, static in self.values)
        collapsed = ", and it sends nearly all images down one route" if self.is_collapsed else ""
        return f"{role} is worse than the static sub-network {self.static} on val, which has {compared}{collapsed}"


def dominated_gates(results: Results) -> tuple[DominatedGate, ...]:
    """Those of the knee and the gates that `export.picks` names which a static sub-network
    dominates on `val` in the objectives of the sweep; the knee first.

    Static sub-networks that violate a constraint do not count. Of several the one that is best in
    the first objective is named, then in the second.
    """
    goals = [(metric.name, -1.0 if metric.goal == "maximize" else 1.0) for metric in results.config.metrics]
    static = {
        f"{supernet}/{name}" if supernet else name: row
        for supernet, own in results.supernets.items()
        for name, row in allowed_static(own).items()
    }
    found = []
    for number, gate in enumerate(results.named_gates):
        metrics = results.supernets[gate.supernet].record(gate.slot).metrics
        own = [sign * metrics[name] for name, sign in goals]
        better = []
        for name, row in static.items():
            costs = [sign * row[metric] for metric, sign in goals]
            if costs != own and all(cost <= limit for cost, limit in zip(costs, own, strict=True)):
                better.append((costs, name))
        if better:
            best = min(better)[1]
            values = tuple((name, metrics[name], static[best][name]) for name, _ in goals)
            found.append(DominatedGate(gate, number == 0, is_collapsed(metrics), best, values))
    return tuple(found)


def dominated_warnings(results: Results) -> tuple[str, ...]:
    """A sentence about each dominated gate, with the ways out; without the full stop."""
    run, own_code = results.run.path, has_own_code(results.config)
    export = command_line("export", run, "--pick", "members", own_code=own_code)
    extend = command_line("extend", run, "--trials", "+N", own_code=own_code)
    return tuple(
        f"{gate}; export the static sub-networks instead ({export}), or train the supernet longer (supernet.train.epochs) "
        f"and give the search more trials ({extend})"
        for gate in dominated_gates(results)
    )


def allowed_static(results: RunResults) -> dict[str, Mapping[str, float]]:
    """The metrics on `val` of the static sub-networks that hold every constraint, by name, from the
    cheapest to the widest; empty before the measure stage."""
    if not results.subnets:
        return {}
    constraints = constraint_set(results.config, {BASELINE + name: value for name, value in results.baseline.items()})
    rows = {subnet.name: results.static_metrics(subnet) for subnet in results.members}
    return {name: row for name, row in rows.items() if constraints.hold(row)}


def _compared(name: str, static: float, gate: float) -> str:
    """A metric of the static sub-network, with its unit, and of the gate."""
    found = find_metric(name)
    if found is not None and found.is_share:
        return f"{100 * static:.1f} % {found.noun} (gate: {100 * gate:.1f} %)"
    return f"{static:.4g} {UNITS.get(name, name)} (gate: {gate:.4g})"
