"""The search space of a sweep whose file has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsnet.routers.kinds import kind_names
from orchestration.config.distribution import Distribution
from orchestration.config.space import ROUTER_KEY, readers

_DEFAULT_SPACE: Mapping[str, Distribution] = {
    "gate.target": Distribution("uniform", (0.05, 0.9)),
    "gate.sgs.t_easy": Distribution("uniform", (0.0, 0.9)),
    "gate.sgs.t_hard": Distribution("uniform", (0.0, 0.5)),
    "gate.sgs.strategy": Distribution("choice", ("try_best", "give_up")),
    "gate.sgs.target": Distribution("choice", ("extremes", "cheapest")),
    "gate.optimizer.lr": Distribution("loguniform", (1.0e-3, 0.3)),
}
"""Default dimensions besides the kinds of router. `space.readers` gives the kinds that read a key,
from which conditions follow."""


def default_routers() -> tuple[str, ...]:
    """The default kinds of router, which every network supports: the published gate, and those that
    were above the static line on the measured data (benchmarks/RESULTS.md). `gates` and
    `evidence_gates` need several gates, and were not."""
    return kind_names(lambda kind: kind.is_default)


def default_space(layers: Sequence[Mapping[str, Any]] = ()) -> dict[str, Distribution]:
    """The default space, given the settings of a file, a preset or the command line.

    A setting that is given is not swept: `gate.router` removes the kinds and every key that the
    given kind does not read; `gate.target_madds_m` removes `gate.target`. End-to-end training has
    no cascades, so there the router is not swept either.

    Args:
        layers: the given settings, those that are laid over the others last.
    """
    space = {ROUTER_KEY: Distribution("choice", default_routers()), **_DEFAULT_SPACE}
    if any(_gate(layer).get("target_madds_m") is not None for layer in layers):
        del space["gate.target"]
    routers = [_gate(layer)["router"] for layer in layers if "router" in _gate(layer)]
    trainers = [_gate(layer)["trainer"] for layer in layers if "trainer" in _gate(layer)]
    if not routers and trainers[-1:] != ["end_to_end"]:
        return space
    del space[ROUTER_KEY]
    if any(ROUTER_KEY in _section(layer, "space") for layer in layers):
        return space  # that entry says which kinds there are
    router = routers[-1] if routers else "gate"
    return {key: value for key, value in space.items() if router in (readers(key) or (router,))}


def _gate(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    return _section(layer, "gate")


def _section(layer: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section as given; empty if it is missing or not a mapping, which the configuration refuses
    later."""
    section = layer.get(name)
    return section if isinstance(section, Mapping) else {}
