"""Simulation of routers on a routing table: dynamic inference without a network."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dsnet.routers.base import STOP, Evidence, Executed, Router
from dsnet.routing.routing_table import RoutingTable
from dsnet.routing.table_run import TableRun


def run_on_table(router: Router, table: RoutingTable) -> TableRun:
    """Route every image of a table, with the same decision code as dynamic inference.

    Raises:
        RuntimeError: the router stops before any route has run.
    """
    run = _TableRouting(router, table)
    executed: list[Executed] = []
    for _ in range(router.max_runs):
        chosen = run.choose(executed)
        if not executed and bool((chosen == STOP).any()):
            raise RuntimeError(f"the router {type(router).__name__} stops before any route has run")
        if bool((chosen == STOP).all()):
            break
        run.execute(chosen)
        executed.append(run.answers(chosen))
    return run.result()


class _TableRouting:
    """State of routing a table: routes that ran and smallest margins so far."""

    def __init__(self, router: Router, table: RoutingTable) -> None:
        self.router = router
        self.table = table
        self.routes = np.full(table.num_images, STOP, dtype=np.int64)
        self.ran = np.zeros((table.num_images, table.num_routes), dtype=bool)
        self.lead = np.full(table.num_images, np.inf)

    def choose(self, executed: list[Executed]) -> Tensor:
        """The next route of every image; STOP stays STOP."""
        rows = torch.arange(self.table.num_images)
        chosen = self._ask(0, STOP, rows, executed)
        for gate in range(1, self.router.num_gates if not executed else 1):
            node_of = torch.tensor(self.table.tree.gates[gate].node_of)
            nodes = node_of[chosen]
            for node in torch.unique(nodes).tolist():
                inside = torch.nonzero(nodes == node)[:, 0]
                chosen[inside] = self._ask(gate, int(chosen[inside[0]]), inside, executed)
        return torch.where(executed[-1].routes == STOP, STOP, chosen) if executed else chosen

    def _ask(self, gate: int, route: int, rows: Tensor, executed: list[Executed]) -> Tensor:
        """The router's decisions for the images `rows`, which are at the node of `route`; notes
        their margins."""
        index = rows.numpy()
        node = self.table.tree.gates[gate].node_of[route] if gate > 0 else 0
        parts = {
            name: torch.from_numpy(np.ascontiguousarray(self.table.part(name, gate, node)[index]))
            for name in self.router.needs
        }
        evidence = Evidence(parts, len(rows), gate=gate, route=route)
        margin = self.router.margin(evidence, executed).double().numpy() / self.router.tie
        if executed:
            margin = np.where(executed[-1].routes.numpy() == STOP, np.inf, margin)
        self.lead[index] = np.minimum(self.lead[index], margin)
        return self.router.step(evidence, executed)

    def execute(self, chosen: Tensor) -> None:
        """Record which route each image runs."""
        rows = np.flatnonzero(chosen.numpy() != STOP)
        self.routes[rows] = chosen.numpy()[rows]
        self.ran[rows, self.routes[rows]] = True

    def answers(self, chosen: Tensor) -> Executed:
        """The stored answers of the newest routes."""
        rows = np.arange(self.table.num_images)
        stored = {
            name: torch.from_numpy(getattr(self.table, name)[rows, self.routes])
            for name in ("confidence", "margin", "entropy")
        }
        logits = torch.from_numpy(self.table.logits[rows, self.routes])
        return Executed(chosen, logits, stored)

    def result(self) -> TableRun:
        """The result, with all costs summed."""
        tails = self.table.madds - self.table.trunk_madds
        decisions = self.router.decision_madds(torch.from_numpy(self.routes)).numpy()
        madds = self.table.trunk_madds + self.ran @ tails + decisions
        return TableRun(self.routes, self.ran, madds, self.lead < 1.0, self.lead)
