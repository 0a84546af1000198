"""Trials of the search: a pure function of the routing tables that maps hyperparameters to a
trained router and its exact metrics."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dsnet.gates.fit import GateFit, fit_gates
from dsnet.gates.problem import beam
from dsnet.gates.settings import GateSettings
from dsnet.measure.latency_table import BatchClock, LatencyTable, latency_metric
from dsnet.measure.settings import MAIN_DEVICE
from dsnet.routers.base import Router
from dsnet.routers.kinds import router_from_arrays
from dsnet.routing.routing_table import RoutingTable
from dsnet.space.cost import shared_params
from dsnet.space.subnet_set import SubnetSet
from search.study.runner import TrialOutcome, TrialSpec, describe_error

Scalar = float | int | str | bool | None

FIELDS: Mapping[str, str] = {key: field for field, key in GateSettings.KEYS.items()}
"""Configuration key -> field of `GateSettings`."""
ROUTING_KEYS = ("gate.routing.first", "gate.routing.last", "gate.routing.stride", "gate.routing.beam")
LANES = 32
"""Largest number of trials in one call; those of the same kind among them train together."""
ROUTER_VALUES = "router"
"""Name of the array that holds a router's JSON values, as UTF-8 bytes."""
NOT_OF_ROUTER = ("histogram", "runs", ROUTER_VALUES)


def routing_ids(kept: Sequence[int], first: int, last: int, stride: int) -> tuple[int, ...]:
    """Select from the routes `kept` those at positions first, first + stride, ... up to last
    (inclusive; negative counts from the end); the ids are returned in increasing order.

    Raises:
        ValueError: the selection is empty.
    """
    stop = last if last >= 0 else len(kept) + last
    ids = tuple(sorted(kept[first : min(stop, len(kept) - 1) + 1 : stride])) if stop >= 0 else ()
    if not ids:
        raise ValueError(
            f"gate.routing first={first}, last={last}, stride={stride} selects none of the {len(kept)} sub-networks"
        )
    return ids


def gate_settings(
    params: Mapping[str, Scalar], defaults: Mapping[str, Scalar], table: RoutingTable, seed: int
) -> GateSettings:
    """A trial's settings: its parameters over the configuration's `gate` section.

    Args:
        params: dotted configuration keys, as the sampler suggested them.
        defaults: every key of `FIELDS` and `ROUTING_KEYS`.
        table: table of the `gate` split, by whose labels a beam of routes is chosen.
        seed: seed of the trial, for the initial weights of a perceptron.

    Raises:
        ValueError: a parameter is unknown, or the routing space is empty.
    """
    known = (*FIELDS, *ROUTING_KEYS)
    unknown = [key for key in params if key not in known]
    if unknown:
        raise ValueError(f"unknown trial parameters {unknown}; known: {list(known)}")
    merged = {**defaults, **params}
    first, last, stride = (int(merged[key]) for key in ROUTING_KEYS[:3])  # type: ignore[arg-type]
    size = merged["gate.routing.beam"]
    kept = tuple(range(table.num_routes)) if size is None else beam(table, int(size))
    fields: dict[str, Any] = {field: merged[key] for key, field in FIELDS.items()}
    return GateSettings(**fields, routes=routing_ids(kept, first, last, stride), seed=seed)


@dataclass(frozen=True)
class GateScores:
    """Sub-networks and latency tables from which the metrics of a fitted router are computed."""

    subnets: SubnetSet
    latency: LatencyTable
    """Latencies on the main device."""
    devices: Mapping[str, LatencyTable] = field(default_factory=dict)
    """Latencies on further devices, by name."""

    def metrics(self, fit: GateFit) -> dict[str, float]:
        """The metrics of the fit, the number of parameters of its bundle, and the ideal latency for
        each batch size on each device (`latency_metric`)."""
        tensors, _ = fit.router.to_arrays()
        members = [self.subnets[route] for route in fit.router.routes]
        params = shared_params(self.subnets.spec, members) + sum(value.numel() for value in tensors.values())
        return {
            **fit.metrics,
            "params_m": params / 1e6,
            **{name: clock.ms(fit.run.runs, fit.router.kind) for name, clock in self._clocks.items()},
        }

    @cached_property
    def _clocks(self) -> dict[str, BatchClock]:
        """Name of each latency metric -> the clock that computes it; built once, because thousands
        of trials use it."""
        routes = [subnet.name for subnet in self.subnets]
        return {
            latency_metric(size, device): table.clock(size, routes)
            for device, table in {MAIN_DEVICE: self.latency, **self.devices}.items()
            for size in table.batch_sizes
        }


def arrays_of(fit: GateFit) -> dict[str, NDArray[Any]]:
    """The arrays to store for a trial: the router, `histogram` [K] of the answering routes, and
    `runs` [K], the share of images that ran each route."""
    tensors, values = fit.router.to_arrays()
    return {
        **{name: value.numpy() for name, value in tensors.items()},
        ROUTER_VALUES: np.frombuffer(json.dumps(values).encode(), dtype=np.uint8),
        "histogram": fit.run.histogram,
        "runs": fit.run.runs,
    }


def router_of(arrays: Mapping[str, NDArray[Any]]) -> Router:
    """Rebuild the router from the arrays of a trial.

    Raises:
        CheckpointError: the router is of an unknown kind, or incomplete.
    """
    values = json.loads(bytes(np.asarray(arrays[ROUTER_VALUES])).decode())
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in arrays.items() if name not in NOT_OF_ROUTER}
    return router_from_arrays(tensors, values)


@dataclass(frozen=True)
class GateTrial:
    """The trial function of a sweep, with the data that all its trials share; a call runs several
    trials on the routing tables."""

    gate_table: RoutingTable
    val_table: RoutingTable
    scores: GateScores
    defaults: Mapping[str, Scalar]

    lanes = LANES

    def __call__(self, specs: Sequence[TrialSpec]) -> Sequence[TrialOutcome]:
        """Train, calibrate and score the router of each spec; a trial that diverges or has
        impossible settings fails alone."""
        start = time.perf_counter()
        settings: dict[int, GateSettings] = {}
        results: dict[int, GateFit | Exception] = {}
        for spec in specs:
            try:
                settings[spec.slot] = gate_settings(spec.params, self.defaults, self.gate_table, spec.seed)
            except ValueError as error:
                results[spec.slot] = error
        fits = fit_gates(self.gate_table, self.val_table, list(settings.values()))
        results |= dict(zip(settings, fits, strict=True))
        share_s = (time.perf_counter() - start) / len(specs)
        return [self._outcome(spec.slot, results[spec.slot], share_s) for spec in specs]

    def _outcome(self, slot: int, result: GateFit | Exception, duration_s: float) -> TrialOutcome:
        if isinstance(result, Exception):
            return TrialOutcome.failed(slot, describe_error(result), duration_s)
        return TrialOutcome(slot, "complete", self.scores.metrics(result), None, arrays_of(result), duration_s)
