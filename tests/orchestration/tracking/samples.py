"""The rows of a small sweep."""

from dataclasses import replace
from typing import Any

from orchestration.runs.curves import CurvePoint
from orchestration.tracking.protocol import TrackedRun

NOW_MS = 1_700_000_000_000
POINTS = [CurvePoint(step, NOW_MS + step, {"loss/largest": 2.0 / step, "lr": 0.1}) for step in range(1, 6)]
NUM_TRIALS = 4


def parent_run(sweep: str) -> TrackedRun:
    return TrackedRun(sweep, sweep, "sweep", NOW_MS, params={"seed": 0, "budget.trials": 64}, tags={"model": "ds_tiny"})


def supernet_run(sweep: str, status: Any) -> TrackedRun:
    end_ms = None if status == "RUNNING" else NOW_MS + 100
    return TrackedRun(f"{sweep}/aaaa/supernet", "supernet", "supernet", NOW_MS, end_ms, status)


def subnet_run(sweep: str, index: int) -> TrackedRun:
    metrics = {"top1": 0.9 + index / 100, "madds_m": 1.0 + index, "params_m": 0.1, "latency_ms": None}
    name = f"subnet-{index:02d}"
    return TrackedRun(f"{sweep}/bbbb/{name}", name, "subnet", NOW_MS + 200, NOW_MS + 210, metrics=metrics)


def trial_run(sweep: str, slot: int) -> TrackedRun:
    name, start_ms = f"trial-{slot:04d}", NOW_MS + 300 + 10 * slot
    params = {"gate.target": 0.1 * slot, "gate.sgs.strategy": "try_best"}
    run = TrackedRun(f"{sweep}/cccc/{name}", name, "trial", start_ms, start_ms + 9, params=params)
    if slot == 2:
        return replace(run, status="FAILED", reason="the loss became NaN at step 7")
    return replace(run, metrics={"top1": 0.95, "madds_m": 1.5, "params_m": 0.2, "latency_ms": 3.0})
