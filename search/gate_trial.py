"""One trial of the search: hyperparameters in, a trained gate and its exact metrics out. A pure function of the routing tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dsnet.cost import shared_params
from dsnet.latency import LatencyTable
from dsnet.routers import GateRouter
from dsnet.routing_table import RoutingTable
from dsnet.space import SubnetSet
from dsnet.training.gate import GateSettings, fit_gate
from search.runner import TrialSpec

Scalar = float | int | str | bool | None

FIELDS: Mapping[str, str] = {
    "gate.target": "target",
    "gate.sgs.t_easy": "t_easy",
    "gate.sgs.t_hard": "t_hard",
    "gate.sgs.strategy": "strategy",
    "gate.sgs.target": "sgs_target",
    "gate.losses.cls": "lambda_cls",
    "gate.losses.sgs": "lambda_sgs",
    "gate.losses.complexity": "lambda_complexity",
    "gate.losses.form": "complexity_form",
    "gate.optimizer.name": "optimizer",
    "gate.optimizer.lr": "lr",
    "gate.optimizer.weight_decay": "weight_decay",
    "gate.optimizer.steps": "steps",
    "gate.optimizer.batch_size": "batch_size",
    "gate.temperature.start": "temperature_start",
    "gate.temperature.end": "temperature_end",
}
"""Configuration key -> field of `GateSettings`."""
ROUTING_KEYS = ("gate.routing.first", "gate.routing.last", "gate.routing.stride")


def routing_ids(num_routes: int, first: int, last: int, stride: int) -> tuple[int, ...]:
    """Members first, first + stride, ... up to `last` (inclusive; negative counts from the end).

    Raises:
        ValueError: nothing is left of the routing space.
    """
    stop = last if last >= 0 else num_routes + last
    ids = tuple(range(first, min(stop, num_routes - 1) + 1, stride))
    if not ids:
        raise ValueError(
            f"the routing space first={first}, last={last}, stride={stride} holds none of the {num_routes} sub-networks"
        )
    return ids


def gate_settings(
    params: Mapping[str, Scalar], defaults: Mapping[str, Scalar], num_routes: int, seed: int
) -> GateSettings:
    """A trial's settings: its parameters over the configuration's `gate` section.

    Args:
        params: dotted configuration keys, as the sampler suggested them.
        defaults: every key of `FIELDS` and `ROUTING_KEYS`.
        num_routes: K.
        seed: decides the order of the training images.

    Raises:
        ValueError: an unknown parameter, or an empty routing space.
    """
    unknown = [key for key in params if key not in FIELDS and key not in ROUTING_KEYS]
    if unknown:
        raise ValueError(f"unknown trial parameters {unknown}; known: {[*FIELDS, *ROUTING_KEYS]}")
    merged = {**defaults, **params}
    first, last, stride = (int(merged[key]) for key in ROUTING_KEYS)  # type: ignore[arg-type]
    fields: dict[str, Any] = {field: merged[key] for key, field in FIELDS.items()}
    return GateSettings(**fields, routes=routing_ids(num_routes, first, last, stride), seed=seed)


@dataclass(frozen=True)
class GateTrial:
    """What every trial of a sweep shares; calling it runs one trial."""

    gate_table: RoutingTable
    val_table: RoutingTable
    subnets: SubnetSet
    latency: LatencyTable
    defaults: Mapping[str, Scalar]

    def __call__(self, spec: TrialSpec) -> tuple[dict[str, float], dict[str, NDArray[Any]]]:
        """Train, calibrate and score the gate of `spec`.

        Returns:
            its metrics, and its arrays: weight, offset, routes, histogram.

        Raises:
            NonFiniteLossError: training diverged.
            ValueError: parameters out of their range.
        """
        settings = gate_settings(spec.params, self.defaults, self.val_table.num_routes, spec.seed)
        result = fit_gate(self.gate_table, self.val_table, settings)
        router = result.router
        metrics = {
            **result.metrics,
            "params_m": (
                shared_params(self.subnets.spec, [self.subnets[k] for k in router.routes]) + router.weight.numel()
            )
            / 1e6,
            "latency_ms": self.latency.batch1_ms(result.histogram, self.val_table.routes),
        }
        arrays = {
            "weight": router.weight.numpy(),
            "offset": router.offset.numpy(),
            "routes": np.array(router.routes, dtype=np.int64),
            "histogram": result.histogram,
        }
        return metrics, arrays


def router_of(arrays: Mapping[str, NDArray[Any]]) -> GateRouter:
    """The router that a trial's arrays hold."""
    return GateRouter(
        torch.from_numpy(np.array(arrays["weight"])),
        torch.from_numpy(np.array(arrays["offset"])),
        tuple(int(route) for route in arrays["routes"]),
    )
