"""The registry of the kinds of router, with the facts about each kind that the rest of the program
needs. It needs no torch.

A new kind is a class that fulfils `dsnet.routers.base.Router` and one call of `register`, from
inside or outside of this package (`dsnet.plugins`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dsnet.errors import CheckpointError
from dsnet.plugins import load_plugins

if TYPE_CHECKING:
    from jaxtyping import Shaped
    from torch import Tensor

    from dsnet.routers.base import Router

Head = Literal["none", "linear", "perceptron", "own"]


@dataclass(frozen=True, kw_only=True)
class RouterKind:
    """Record of a kind of router: the facts that hold for all routers of the kind."""

    name: str
    """Its name in `gate.router` and in stored files."""
    label: str
    """Its name in figures and tables."""
    router: str | type
    """The class, or its import path "module:Class"."""
    head: Head
    """Type of its head: `none` (nothing is trained), `linear`, `perceptron`, or `own`: trained by
    the kind's `fit`, with a cost that is not known before."""
    symbol: str = "hexagon"
    """Its marker in figures, one of Plotly's."""
    is_tree: bool = False
    """Whether it decides at every gate of the network, each time on the widths of the next
    stage."""
    max_runs: int = 1
    """Largest number of routes that it runs for an image."""
    reads_answer: bool = False
    """Whether its head reads the answer of the first route."""
    trains_end_to_end: bool = False
    """Whether its heads can be trained on images (`gate.trainer: end_to_end`)."""
    is_default: bool = False
    """Whether it is in the default search space, for sweeps that do not write a space."""
    is_offered: bool = True
    """Whether a sweep may use it. False for a kind that is only stored in bundles: it is not in
    `router_kinds`, and so is never searched, trained or timed."""
    fit: Callable[..., Any] | None = None
    """`fit(gate_table, val_table, settings) -> dsnet.gates.fit.GateFit` in place of the common
    training."""

    @property
    def is_trained(self) -> bool:
        """Whether it has a head to train, and so uses the settings of losses, labels and
        optimiser."""
        return self.head != "none"

    @property
    def router_class(self) -> type[Any]:
        """The class of its routers, imported if it is given as a path."""
        if isinstance(self.router, type):
            return self.router
        module, _, name = self.router.partition(":")
        found: type[Any] = getattr(importlib.import_module(module), name)
        return found


_KINDS: dict[str, RouterKind] = {}


def register(kind: RouterKind) -> RouterKind:
    """Register a kind of router under its name; returns the kind.

    Raises:
        ValueError: another kind has this name.
    """
    known = _KINDS.setdefault(kind.name, kind)
    if known != kind:
        raise ValueError(f"there is a kind of router {kind.name!r} already; choose another name")
    return kind


def router_kinds() -> Mapping[str, RouterKind]:
    """The kinds that a sweep may use, by name, those of plugins last."""
    load_plugins()
    return {name: kind for name, kind in _KINDS.items() if kind.is_offered}


def router_kind(name: str) -> RouterKind:
    """The kind of this name, whether a sweep may use it or not.

    Raises:
        KeyError: there is none.
    """
    load_plugins()
    return _KINDS[name]


def kind_names(matches: Callable[[RouterKind], bool] = lambda kind: True) -> tuple[str, ...]:
    """Names of the kinds that a sweep may use and that match, in the order of their
    registration."""
    return tuple(name for name, kind in router_kinds().items() if matches(kind))


def router_from_arrays(tensors: Mapping[str, Shaped[Tensor, "*_"]], values: Mapping[str, Any]) -> Router:
    """Rebuild a router from the result of its `to_arrays`.

    Raises:
        CheckpointError: the kind is unknown, or parts are missing or invalid.
    """
    try:
        router: Router = router_kind(values["kind"]).router_class.from_arrays(tensors, values)
    except KeyError as error:
        raise CheckpointError(
            f"the stored router {dict(values)} cannot be rebuilt: {error} is unknown or missing"
        ) from error
    except (TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"the stored router {dict(values)} cannot be rebuilt: {error}") from error
    return router


register(
    RouterKind(
        name="gate",
        label="gate",
        symbol="circle",
        router="dsnet.routers.gate:GateRouter",
        head="linear",
        trains_end_to_end=True,
        is_default=True,
    )
)
register(
    RouterKind(
        name="evidence_gate",
        label="gate with richer evidence",
        symbol="diamond",
        router="dsnet.routers.gate:EvidenceGateRouter",
        head="perceptron",
        is_default=True,
    )
)
register(
    RouterKind(
        name="gates",
        label="gate at every stage",
        symbol="square",
        router="dsnet.routers.tree:GatesRouter",
        head="linear",
        is_tree=True,
        trains_end_to_end=True,
    )
)
register(
    RouterKind(
        name="evidence_gates",
        label="gate at every stage, richer evidence",
        symbol="pentagon",
        router="dsnet.routers.tree:GatesRouter",
        head="perceptron",
        is_tree=True,
    )
)
register(
    RouterKind(
        name="cascade",
        label="cascade",
        symbol="triangle-up",
        router="dsnet.routers.cascade:CascadeRouter",
        head="none",
        max_runs=2,
        is_default=True,
    )
)
register(
    RouterKind(
        name="learned_cascade",
        label="learned cascade",
        symbol="star",
        router="dsnet.routers.cascade:LearnedCascadeRouter",
        head="perceptron",
        max_runs=2,
        reads_answer=True,
        is_default=True,
    )
)
register(
    RouterKind(
        name="fixed",
        label="static sub-network",
        router="dsnet.routers.fixed:FixedRouter",
        head="none",
        is_offered=False,
    )
)
