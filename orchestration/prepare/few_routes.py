"""Settings of `gate.routing` that leave a router too few routes, known before anything is
trained."""

from __future__ import annotations

from collections.abc import Iterator

from dsnet.routers.kinds import router_kind
from dsnet.wording import plural
from orchestration.config.gate import RoutingConfig
from orchestration.config.space import ROUTER_KEY, Point, listed_settings
from orchestration.config.sweep import SweepConfig
from search.gate_trial import ROUTING_KEYS, routing_ids


def few_routes_warning(config: SweepConfig, num_subnets: int) -> Iterator[str]:
    """At most one warning: how many of the settings that the space allows leave no route, or one
    where a cascade needs two; such trials fail.

    Args:
        config: configuration of the sweep.
        num_subnets: number of sub-networks of the network.
    """
    settings = list(listed_settings(config.space, [ROUTER_KEY, *ROUTING_KEYS]))
    short = [point for point in settings if _num_routes(config, point, num_subnets) < _num_needed(config, point)]
    if short:
        routing = _routing(config, short[0])
        example = f"first {routing.first}, last {routing.last}, stride {routing.stride} with router {_router(config, short[0])}"
        leave = "leaves" if len(short) == 1 else "leave"
        yield (
            f"gate.routing: {len(short)} of {plural(len(settings), 'setting')} of router and routing {leave} too few of the {num_subnets} "
            f"sub-networks, such as {example}; a cascade needs two, other routers one. Such trials fail: narrow the space"
        )


def _num_routes(config: SweepConfig, point: Point, num_subnets: int) -> int:
    """Number of routes, at most; `beam` may keep fewer."""
    routing = _routing(config, point)
    kept = range(min(num_subnets, routing.beam or num_subnets))
    try:
        return len(routing_ids(kept, routing.first, routing.last, routing.stride))
    except ValueError:
        return 0


def _num_needed(config: SweepConfig, point: Point) -> int:
    return 2 if router_kind(_router(config, point)).max_runs > 1 else 1


def _router(config: SweepConfig, point: Point) -> str:
    return str(point.get(ROUTER_KEY, config.gate.router))


def _routing(config: SweepConfig, point: Point) -> RoutingConfig:
    drawn = {key.rpartition(".")[2]: point[key] for key in ROUTING_KEYS if key in point}
    return config.gate.routing.model_copy(update=drawn)
