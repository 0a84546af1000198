"""The result of a router on a routing table. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64

from dsnet.routing.routing_table import RoutingTable


@dataclass(frozen=True)
class TableRun:
    """Result of routing the N images of a table."""

    routes: Int64[np.ndarray, " images"]
    """[N] route whose answer counts: the last one that ran."""
    ran: Bool[np.ndarray, "images routes"]
    """[N, K] whether the route ran."""
    madds: Int64[np.ndarray, " images"]
    """[N] MAdds of everything that was executed: the trunk once, every tail, every decision."""
    is_tie: Bool[np.ndarray, " images"]
    """[N] whether a decision was a numerical tie, so that another processor may decide
    otherwise."""
    lead: Float64[np.ndarray, " images"]
    """[N] smallest margin of all decisions, relative to the router's `tie`."""

    @property
    def histogram(self) -> Float64[np.ndarray, " routes"]:
        """[K] share of the images whose answer comes from each route."""
        return np.bincount(self.routes, minlength=self.ran.shape[1]) / len(self.routes)

    @property
    def runs(self) -> Float64[np.ndarray, " routes"]:
        """[K] share of the images that ran each route; for a cascade the shares may sum to more
        than 1."""
        return self.ran.mean(0)


def static_run(table: RoutingTable, route: int) -> TableRun:
    """The run in which every image takes the same route, without a router."""
    ran = np.zeros((table.num_images, table.num_routes), dtype=bool)
    ran[:, route] = True
    return TableRun(
        routes=np.full(table.num_images, route, dtype=np.int64),
        ran=ran,
        madds=np.full(table.num_images, table.madds[route], dtype=np.int64),
        is_tie=np.zeros(table.num_images, dtype=bool),
        lead=np.full(table.num_images, np.inf),
    )
