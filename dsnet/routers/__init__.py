"""Routers: what maps an image's evidence to a route. One interface for gates and cascades.

The interface is defined in docs/definitions.md, Router.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from dsnet.errors import CheckpointError
from dsnet.routers.base import STOP, Evidence, Executed, Router, summary_of
from dsnet.routers.cascade import CascadeRouter, LearnedCascadeRouter
from dsnet.routers.gate import RICH_EVIDENCE, EvidenceGateRouter, GateRouter
from dsnet.routers.head import Head
from dsnet.routers.tree import GatesRouter

__all__ = [
    "RICH_EVIDENCE",
    "ROUTER_KINDS",
    "STOP",
    "CascadeRouter",
    "Evidence",
    "EvidenceGateRouter",
    "Executed",
    "GateRouter",
    "GatesRouter",
    "Head",
    "LearnedCascadeRouter",
    "Router",
    "router_from_arrays",
    "summary_of",
]

_KINDS: dict[str, Callable[[Mapping[str, Tensor], Mapping[str, Any]], Router]] = {
    "gate": GateRouter.from_arrays,
    "evidence_gate": EvidenceGateRouter.from_arrays,
    "gates": GatesRouter.from_arrays,
    "evidence_gates": GatesRouter.from_arrays,
    "cascade": CascadeRouter.from_arrays,
    "learned_cascade": LearnedCascadeRouter.from_arrays,
}
ROUTER_KINDS = tuple(_KINDS)
"""Names of `gate.router`."""


def router_from_arrays(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Router:
    """Rebuild a router.

    Raises:
        CheckpointError: unknown kind, or parts that are missing or no such thing.
    """
    try:
        return _KINDS[values["kind"]](tensors, values)
    except KeyError as error:
        raise CheckpointError(
            f"the stored router {dict(values)} cannot be rebuilt: {error} is unknown or missing"
        ) from error
    except (TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"the stored router {dict(values)} cannot be rebuilt: {error}") from error
