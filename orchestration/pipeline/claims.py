"""The claims of bundles: what a run measured about its gates and its static sub-networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from dsnet.deploy.layout import ORIGIN_CLAIM
from dsnet.deploy.operating_points import LATENCY_CLAIM, SHARED_CLAIM
from dsnet.measure.latency_table import LatencyTable
from dsnet.measure.settings import MAIN_DEVICE
from dsnet.routing.routing_table import RoutingTable
from dsnet.routing.table_routing import run_on_table
from orchestration.prepare.preparation import Prepared
from orchestration.results.exported import origin_claim
from orchestration.results.measured import MeasuredSubnet
from orchestration.results.run import RunResults
from orchestration.results.verified import DynamicLatency
from search.front.analysis_records import PointAnalysis, SplitAnalysis


def bundle_claims(prepared: Prepared, results: RunResults, slot: int) -> dict[str, Any]:
    """The claims of a gate: its results on `val`, and on `test` if the trial was verified."""
    record = results.record(slot)
    names = ("top1", "top5", "madds_m", "p95_madds_m", "params_m", "latency_ms")
    claims: dict[str, Any] = {
        SHARED_CLAIM: data_claim(prepared),
        ORIGIN_CLAIM: origin_claim(results, is_gate=True),
        "val": {"num_images": len(prepared.splits.val), **{name: record.metrics[name] for name in names}},
    }
    verified = results.verified
    if verified is None:
        return claims
    point = next((point for point in verified.test.points if point.slot == slot), None)
    if point is not None:
        claims["test"] = _test_claims(point, verified.test.num_images)
        claims["latency"] = _latency_claims(verified.latency, slot)
        further = {name: own for name, own in verified.latencies.items() if name != MAIN_DEVICE}
        if further:
            claims["device_latency"] = {name: _latency_claims(own, slot) for name, own in further.items()}
    return claims


def data_claim(prepared: Prepared) -> dict[str, Any]:
    """The data on which the claims of a run were measured, so that they can be checked."""
    config = prepared.config
    options = config.data.file_options().written
    return {
        "name": prepared.image_set.name,
        "image_size": config.data.image_size,
        "stream": config.data.stream,
        "crop_fraction": config.data.crop_fraction,
        **({"files": options} if options else {}),
        "sizes": config.data.splits.model_dump(mode="json"),
        "seed": config.seed,
        "limit": config.data.limit,
        "fingerprint": prepared.image_set.fingerprint,
        "splits": prepared.splits.hash,
    }


def gate_point_claims(prepared: Prepared, results: RunResults, slot: int, val: RoutingTable) -> dict[str, Any]:
    """The claims of a gate as an operating point: those of its bundle, and its expected latencies.

    Args:
        prepared: the run's data.
        results: the run.
        slot: the trial.
        val: the routing table of `val`.
    """
    router = results.router(slot)
    runs = run_on_table(router, val).runs
    latencies = {
        name: _expected_latency(
            table, {size: table.ideal_ms(size, runs, val.routes, router.kind) for size in table.batch_sizes}
        )
        for name, table in results.newest_latencies.items()
    }
    return {**bundle_claims(prepared, results, slot), LATENCY_CLAIM: latencies}


def member_claims(prepared: Prepared, results: RunResults, subnet: MeasuredSubnet) -> dict[str, Any]:
    """The claims of a static sub-network as an operating point: its results on `val`, and on `test`
    if the run was verified.

    Args:
        prepared: the run's data.
        results: the run, with its measure stage done.
        subnet: the sub-network; not the teacher, which was not timed.
    """
    madds_m = subnet.madds / 1e6
    claims: dict[str, Any] = {
        SHARED_CLAIM: data_claim(prepared),
        ORIGIN_CLAIM: origin_claim(results, is_gate=False),
        "val": {
            "num_images": len(prepared.splits.val),
            "top1": subnet.top1,
            "top5": subnet.top5,
            "madds_m": madds_m,
            "p95_madds_m": madds_m,
            "params_m": subnet.params / 1e6,
        },
        LATENCY_CLAIM: {
            name: _expected_latency(table, {size: table.static_ms(subnet.name, size) for size in table.batch_sizes})
            for name, table in results.newest_latencies.items()
        },
    }
    if results.verified is not None:
        claims["test"] = _static_test_claims(results.verified.test, subnet.name)
    return claims


def _expected_latency(table: LatencyTable, ms: Mapping[int, float]) -> dict[str, Any]:
    return {
        "device": table.device,
        "threads": table.threads,
        "batches_ms": {str(size): value for size, value in ms.items()},
    }


def _static_test_claims(test: SplitAnalysis, name: str) -> dict[str, Any]:
    index = test.routes.index(name)
    top1 = test.static_top1[index]
    return {
        "num_images": test.num_images,
        "top1": top1.value,
        "top1_interval": [top1.low, top1.high],
        "top5": test.static_top5[index],
        "madds_m": test.static_madds_m[index],
    }


def _latency_claims(latency: DynamicLatency, slot: int) -> dict[str, Any]:
    """Measured latency of a batch on one device, beside that of the static extremes and the sum of
    the measured parts (`ideal_ms`)."""
    return {
        "device": latency.device,
        "threads": latency.threads,
        "batches": {
            str(size): {
                "gate_ms": asdict(row[slot]),
                "ideal_ms": latency.ideal[size][slot],
                "widest_ms": asdict(latency.widest[size]),
                "cheapest_ms": asdict(latency.cheapest[size]),
            }
            for size, row in latency.gates.items()
        },
    }


def _test_claims(point: PointAnalysis, num_images: int) -> dict[str, Any]:
    gain = point.gain
    return {
        "num_images": num_images,
        "top1": point.top1.value,
        "top1_interval": [point.top1.low, point.top1.high],
        "top5": point.metrics["top5"],
        "madds_m": point.metrics["madds_m"],
        "gain_over_static": None if gain is None else gain.value,
        "gain_over_static_interval": None if gain is None else [gain.low, gain.high],
        "random_routing_top1": point.random_top1,
        "is_collapsed": point.is_collapsed,
    }
