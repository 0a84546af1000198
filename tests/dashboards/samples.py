"""A synthetic run: 6 routes, 64 trials, 270 images a split. Only tests use it; nothing here is a
result."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dashboards.front import Curve, DynamicPoint, FrontInfo, FrontPanel, StaticPoint
from dashboards.headline import Estimate, Headline, Latency, Row, Scores
from dashboards.hypervolume import HypervolumeInfo
from dashboards.report import ReportData
from dashboards.routers import RouterResult, RoutersInfo
from dashboards.routes import RoutesInfo, routes_info
from dashboards.speedups import SpeedPanel, SpeedPoint, SpeedupsInfo
from dashboards.training import TrainingInfo, training_info
from dashboards.widths import LatencySeries, WidthsInfo

NUM_IMAGES = 270
NUM_TRIALS = 64
NUM_CLASSES = 10
MADDS_M = np.array([0.21, 0.31, 0.44, 0.60, 0.79, 1.02])
ROUTES = tuple(f"subnet-{k:02d}" for k in range(len(MADDS_M)))
FAILED = {17: "timed out after 120 s", 41: "loss became NaN at step 83"}
KINDS = ("gate", "evidence_gate", "cascade", "learned_cascade")
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Split:
    """Per image and route: correctness; per image: how hard it looks; per trial: the route of each
    image."""

    name: str
    correct: npt.NDArray[np.bool_]
    labels: npt.NDArray[np.int64]
    routes: dict[int, npt.NDArray[np.int64]]


def make_split(name: str, seed: int) -> Split:
    rng = np.random.default_rng(seed)
    difficulty = rng.beta(1.2, 2.2, NUM_IMAGES)
    strength = np.array([0.70, 0.76, 0.80, 0.83, 0.85, 0.86])
    luck = rng.normal(0, 0.03, (NUM_IMAGES, len(MADDS_M)))
    trial_rng = np.random.default_rng(99)
    routes = {}
    for trial in range(NUM_TRIALS):
        bias, gain, noise = trial_rng.uniform(0, 5), trial_rng.uniform(0, 9), trial_rng.uniform(0.02, 0.4)
        seen = difficulty + rng.normal(0, noise, NUM_IMAGES)
        routes[trial] = np.clip(np.round(bias + gain * (seen - 0.45)), 0, 5).astype(np.int64)
    return Split(name, difficulty[:, None] + luck < strength, rng.integers(0, NUM_CLASSES, NUM_IMAGES), routes)


def scores(split: Split, trial: int) -> tuple[float, float]:
    """(top-1, mean MAdds in M) of one trial's gate."""
    route = split.routes[trial]
    return float(split.correct[np.arange(NUM_IMAGES), route].mean()), float(MADDS_M[route].mean())


def estimate(values: FloatArray) -> Estimate:
    rng = np.random.default_rng(0)
    means = values[rng.integers(0, len(values), (400, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high))


def front_trials(split: Split) -> list[int]:
    """Non-dominated trials, cheapest first (brute force)."""
    points = {t: scores(split, t) for t in range(NUM_TRIALS) if t not in FAILED}
    keep = [
        t
        for t, (a, m) in points.items()
        if not any(a2 >= a and m2 <= m and (a2, m2) != (a, m) for a2, m2 in points.values())
    ]
    return sorted(keep, key=lambda t: points[t][1])


def envelope(val: Split) -> list[int]:
    """Vertices of the upper concave envelope of the static sub-networks on val."""
    top1 = val.correct.mean(axis=0)
    chain: list[int] = []
    for k in range(len(MADDS_M)):
        while len(chain) > 1 and _is_below(chain[-1], chain[-2], k, top1):
            chain.pop()
        chain.append(k)
    return chain


def _is_below(middle: int, left: int, right: int, top1: FloatArray) -> bool:
    share = (MADDS_M[middle] - MADDS_M[left]) / (MADDS_M[right] - MADDS_M[left])
    return bool(top1[middle] <= (1 - share) * top1[left] + share * top1[right])


def static_line_values(split: Split, vertices: list[int], madds_m: float) -> FloatArray:
    """Per image: expected correctness of the mix of two vertices that costs `madds_m`."""
    cost = MADDS_M[vertices]
    right = int(np.clip(np.searchsorted(cost, madds_m), 1, len(cost) - 1))
    share = (madds_m - cost[right - 1]) / (cost[right] - cost[right - 1])
    pair = split.correct[:, [vertices[right - 1], vertices[right]]].astype(float)
    return (1 - share) * pair[:, 0] + share * pair[:, 1]


def make_panel(split: Split, val: Split) -> FrontPanel:
    front = front_trials(val)
    vertices = envelope(val)
    top1 = split.correct.mean(axis=0)
    dynamic = []
    for trial in range(NUM_TRIALS):
        if trial in FAILED:
            continue
        accuracy, madds_m = scores(split, trial)
        spread = estimate(split.correct[np.arange(NUM_IMAGES), split.routes[trial]].astype(float))
        dynamic.append(
            DynamicPoint(
                name=f"trial-{trial:04d}",
                madds_m=madds_m,
                top1=accuracy,
                is_front=trial in front,
                interval=(spread.low, spread.high) if trial in front else None,
                latency_ms=2.0 + 5 * madds_m if trial in front else None,
                params=(("gate.target", 0.05 + 0.85 * trial / NUM_TRIALS), ("gate.sgs.strategy", "try_best")),
                router=KINDS[trial % len(KINDS)],
            )
        )
    return FrontPanel(
        split=split.name,
        num_images=NUM_IMAGES,
        static=tuple(
            StaticPoint(n, float(m), float(a), 1 + 6 * float(m)) for n, m, a in zip(ROUTES, MADDS_M, top1, strict=True)
        ),
        static_line=Curve(tuple(map(float, MADDS_M[vertices])), tuple(float(top1[k]) for k in vertices)),
        dynamic=tuple(dynamic),
        random=_random_curve(split, front),
        cascade=_cascade_curve(top1),
        oracle=_oracle_curve(split),
        reachable=_reachable_curve(split),
    )


def _reachable_curve(split: Split) -> Curve:
    top1, highest = split.correct.mean(axis=0), float(split.correct.any(axis=1).mean())
    values = top1[0] + np.array([0.0, 0.7, 0.95, 1.05]) * (top1[-1] - top1[0])
    return Curve((0.21, 0.28, 0.4, 0.7), tuple(np.minimum(values, highest).tolist()))


def _cascade_curve(top1: FloatArray) -> Curve:
    gains = np.array([0.0, 0.4, 0.7, 0.95, 1.02, 1.02])
    values = top1[0] + gains * (top1[-1] - top1[0])
    return Curve((0.24, 0.30, 0.40, 0.55, 0.8, 1.3), tuple(np.minimum(values, 1.0).tolist()))


def _random_curve(split: Split, front: list[int]) -> Curve:
    top1 = split.correct.mean(axis=0)
    shares = [np.bincount(split.routes[t], minlength=len(MADDS_M)) / NUM_IMAGES for t in front]
    return Curve(tuple(float(s @ MADDS_M) for s in shares), tuple(float(s @ top1) for s in shares))


def _oracle_curve(split: Split) -> Curve:
    first = np.where(split.correct.any(axis=1), split.correct.argmax(axis=1), 0)
    extra = np.sort((MADDS_M[first] - MADDS_M[0])[first > 0])
    base = float(split.correct[:, 0].mean())
    costs = MADDS_M[0] + np.concatenate([[0.0], np.cumsum(extra)]) / NUM_IMAGES
    return Curve(tuple(map(float, costs)), tuple(base + k / NUM_IMAGES for k in range(len(costs))))


def make_front(is_verified: bool = True) -> FrontInfo:
    val, test = make_split("val", 1), make_split("test", 2)
    return FrontInfo(make_panel(val, val), make_panel(test, val) if is_verified else None)


def make_hypervolume() -> HypervolumeInfo:
    rng = np.random.default_rng(5)
    running = np.maximum.accumulate(
        0.69 + 0.08 * (1 - np.exp(-np.arange(NUM_TRIALS) / 14)) * rng.uniform(0.7, 1, NUM_TRIALS)
    )
    for trial in sorted(FAILED):
        running[trial] = running[trial - 1]
    return HypervolumeInfo(
        slots=tuple(range(NUM_TRIALS)),
        hypervolume=tuple(np.maximum.accumulate(running).tolist()),
        failures=tuple(sorted(FAILED.items())),
        split="val",
        num_images=NUM_IMAGES,
        reference=(0.0, 1.07),
        static_hypervolume=0.745,
    )


def make_speedups() -> SpeedupsInfo:
    split = make_split("val", 1)
    static = tuple(
        SpeedPoint(name, 0.5 + 2.0 * madds_m, float(top1))
        for name, madds_m, top1 in zip(ROUTES, MADDS_M, split.correct.mean(axis=0), strict=True)
    )
    found = [(trial, *scores(split, trial)) for trial in front_trials(split)]
    routers = tuple(SpeedPoint(f"trial-{trial:04d}", 0.6 + 2.0 * madds_m, top1) for trial, top1, madds_m in found)
    panels = tuple(SpeedPanel(size, static, {KINDS[0]: routers}) for size in (1, 64))
    return SpeedupsInfo("val", NUM_IMAGES, "Example CPU, 1 thread", panels)


def make_routers() -> RoutersInfo:
    test = make_split("test", 2)
    results = []
    for kind in range(len(KINDS)):
        for share, budget in zip(
            (0.25, 0.5, 0.75), MADDS_M.min() + np.array([0.25, 0.5, 0.75]) * np.ptp(MADDS_M), strict=True
        ):
            trial = _best_within(test, budget, kind)
            top1, madds_m = scores(test, trial)
            line = static_line_values(test, envelope(make_split("val", 1)), madds_m)
            right = test.correct[np.arange(NUM_IMAGES), test.routes[trial]].astype(float)
            gain = estimate(right - line)
            static, oracle = float(line.mean()), float(test.correct.any(axis=1).mean())
            reachable = static + 0.9 * (oracle - static)
            results.append(
                RouterResult(
                    router=KINDS[kind],
                    budget_share=share,
                    name=f"trial-{trial:04d}",
                    madds_m=madds_m,
                    top1=top1,
                    static_top1=static,
                    reachable_top1=reachable,
                    oracle_top1=oracle,
                    gain=(gain.value, gain.low, gain.high),
                    reachable_share=(top1 - static) / (reachable - static),
                    oracle_share=(top1 - static) / (oracle - static),
                )
            )
    return RoutersInfo("test", NUM_IMAGES, tuple(results))


def _best_within(split: Split, budget: float, kind: int) -> int:
    points = {t: scores(split, t) for t in range(kind, NUM_TRIALS, len(KINDS)) if t not in FAILED}
    return max((t for t in points if points[t][1] <= budget), key=lambda t: points[t][0])


def make_routes() -> RoutesInfo:
    val = make_split("val", 1)
    chosen = {f"trial-{t:04d}": val.routes[t] for t in front_trials(val)}
    classes = [str(c) for c in range(NUM_CLASSES)]
    return routes_info(chosen, ROUTES, list(map(float, MADDS_M)), "val", val.labels, classes)


def make_widths() -> WidthsInfo:
    val = make_split("val", 1)
    top1 = val.correct.mean(axis=0)
    series = []
    for batch_size, fixed, slope in ((1, 0.9, 0.6), (64, 3.0, 19.0)):
        median = fixed + slope * MADDS_M
        series.append(LatencySeries(batch_size, tuple(median), tuple(0.97 * median), tuple(1.06 * median)))
    return WidthsInfo(
        split="val",
        num_images=NUM_IMAGES,
        device="cpu, 1 thread",
        subnets=ROUTES,
        madds_m=tuple(map(float, MADDS_M)),
        params_m=tuple(0.02 + 0.08 * MADDS_M),
        top1=tuple(map(float, top1)),
        top5=tuple(map(float, 1 - (1 - top1) / 9)),
        latency=tuple(series),
    )


def make_training() -> TrainingInfo:
    rng = np.random.default_rng(8)
    rows = []
    for step in range(240):
        base = 0.55 + 1.8 * np.exp(-step / 40)
        names = {"largest": base, "subnet-05": base * 1.02, "subnet-02": base * 1.1, "smallest": base * 1.25}
        metrics = {f"loss/{name}": float(v + rng.normal(0, 0.03)) for name, v in names.items()}
        rows.append({"step": step, "epoch": step / 8, "time_ms": 0, "metrics": {**metrics, "lr": 0.1}})
    return training_info(rows)


def make_headline(is_verified: bool = True) -> Headline:
    val, test = make_split("val", 1), make_split("test", 2)
    trials = front_trials(val)
    rows = tuple(_row(t, val, test if is_verified else None) for t in trials)
    widest = [estimate(s.correct[:, -1].astype(float)) for s in (val, test)]
    madds_m = float(MADDS_M[-1])
    baseline = Row(
        name=ROUTES[-1],
        chosen=Scores(widest[0], madds_m),
        reported=Scores(widest[1], madds_m) if is_verified else None,
        latency=Latency(64, 22.4, 22.4, 7.0),
    )
    return Headline(baseline, rows, rows[len(rows) // 2].name)


def _row(trial: int, val: Split, test: Split | None) -> Row:
    share = float(np.bincount(val.routes[trial]).max() / NUM_IMAGES)
    madds_m = scores(val, trial)[1]
    return Row(
        name=f"trial-{trial:04d}",
        chosen=_scores(trial, val, val),
        reported=None if test is None else _scores(trial, test, val),
        latency=None if test is None else Latency(64, 4.4 + 19 * madds_m, 22.4, 7.0),
        max_route_share=share,
        is_collapsed=share > 0.98,
        router=KINDS[trial % len(KINDS)],
    )


def _scores(trial: int, split: Split, val: Split) -> Scores:
    top1, madds_m = scores(split, trial)
    values = split.correct[np.arange(NUM_IMAGES), split.routes[trial]].astype(float)
    line = static_line_values(split, envelope(val), madds_m)
    shares = np.bincount(split.routes[trial], minlength=len(MADDS_M)) / NUM_IMAGES
    return Scores(
        top1=estimate(values),
        madds_m=madds_m,
        gain=estimate(values - line),
        random_top1=float(shares @ split.correct.mean(axis=0)),
        cascade_top1=min(top1 + 0.004, 1.0),
        oracle_top1=float(split.correct.any(axis=1).mean()),
        reachable_top1=min(top1 + 0.03, 1.0),
        reachable_share=0.31,
        oracle_share=0.12,
    )


def make_report(is_verified: bool = True) -> ReportData:
    return ReportData(
        run_name="digits",
        status="complete",
        created="2026-11-21 14:02 UTC",
        data_name="digits",
        model="ds_tiny",
        headline=make_headline(is_verified),
        num_completed=NUM_TRIALS - len(FAILED),
        num_failed=len(FAILED),
        num_test_openings=int(is_verified),
        front=make_front(is_verified),
        hypervolume=make_hypervolume(),
        routers=make_routers() if is_verified else None,
        speedups=make_speedups(),
        routes=make_routes(),
        widths=make_widths(),
        training=make_training(),
        notes=("Few images: 270 in val and 270 in test, so that one image is 0.37 points.",),
        commands=(
            ("Continue this run, or repeat what has changed", "dsnet-orch launch examples/digits.yaml"),
            ("Export the knee as a bundle that runs", "dsnet-orch export digits --pick knee"),
            ("Open the tracked runs in MLflow", "dsnet-orch ui"),
        ),
        versions=(("dsnet-orch", "0.1.0"), ("torch", "2.13.0+cpu"), ("ray", "2.60.0"), ("optuna", "5.0.0")),
        hardware=(("Processor", "Example CPU, 2 cores, 1 thread in measurements"), ("Memory", "8 GiB")),
        seeds=(("Seed", "0"), ("Configuration", "sha256 3f9a60c1d2e4"), ("Data", "sha256 9bd01122aa34")),
    )
