"""Time of a suggestion: each sampler, after 100, 1,000 and 10,000 finished trials, suggests a
cohort as in a sweep.

The finished trials are synthetic: random points of a space like the digits example's, with noisy
objectives. One suggestion before the timed ones includes imports and the work done once per
generation (choosing parents); the timed ones are then typical of a sweep.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, create_trial

from benchmarks.harness import Headline, Options, Report, Samples, Section, run_benchmark
from search.study.engine import Mirror
from search.study.study import Objective, StudySettings
from search.suggest.samplers import KNOWN_SAMPLERS, SamplerSettings
from search.suggest.space import Scalar, Space, at_share, parse_space

BENCHMARK = "milliseconds for a suggestion of each sampler after 100, 1,000 and 10,000 trials (goal: 15 ms for the default after 1,000)"
GOAL_MS = 15.0
COHORT = 64
GP_COHORT = 8
"""Cohort for the Gaussian process, which takes longer for a suggestion than a gate takes to
train."""
GP_TRIALS = (100, 300)
OBJECTIVES = (Objective("top1", "maximize"), Objective("madds_m", "minimize"))
SPACE: Mapping[str, Any] = {
    "gate.router": {"choice": ["gate", "cascade"]},
    "gate.target": {"uniform": [0.05, 0.9]},
    "gate.routing.first": {"int": [0, 3]},
    "gate.sgs.t_easy": {"uniform": [0.0, 0.9], "when": {"gate.router": "gate"}},
    "gate.sgs.t_hard": {"uniform": [0.0, 0.5], "when": {"gate.router": "gate"}},
    "gate.sgs.strategy": {"choice": ["try_best", "give_up"], "when": {"gate.router": "gate"}},
    "gate.sgs.target": {"choice": ["extremes", "cheapest"], "when": {"gate.router": "gate"}},
    "gate.optimizer.lr": {"loguniform": [0.001, 0.3], "when": {"gate.router": "gate"}},
}


def finished_trials(space: Space, number: int, seed: int) -> list[FrozenTrial]:
    """Synthetic trials whose accuracy increases with the target and is noisy; each has the
    generation that a genetic sampler would note."""
    rng = np.random.default_rng(seed)
    trials = []
    for index in range(number):
        point: dict[str, Scalar] = {}
        for name, distribution in space.distributions.items():
            if space.has(name, point):
                point[name] = at_share(distribution, float(rng.random()))
        target = float(point["gate.target"])
        notes = {f"Replayable{name}:generation": index // COHORT for name in ("NSGAII", "NSGAIII")}
        trials.append(
            create_trial(
                values=[0.6 + 0.3 * target**0.5 + rng.normal(scale=0.02), 50.0 + 250.0 * target],
                params=point,
                distributions={name: space.distributions[name] for name in point},
                system_attrs=notes,
            )
        )
    return trials


def ask_seconds(
    settings: SamplerSettings, num_finished: int, *, cohort: int = COHORT, seed: int = 0, space: Space | None = None
) -> list[float]:
    """Seconds of each suggestion of one cohort.

    Args:
        settings: settings of the sampler.
        num_finished: number of trials in the study.
        cohort: number of suggestions that are made without results of each other.
        seed: seed of the synthetic trials and of the sweep.
        space: search space, which must hold gate.target; None = `SPACE`.
    """
    space = parse_space(SPACE) if space is None else space
    study = StudySettings(
        name="ask", space=space, objectives=OBJECTIVES, sampler=settings, seed=seed, order="asynchronous"
    )
    mirror = Mirror(study, finished_trials(space, num_finished, seed))
    mirror.ask_slots([num_finished])
    seconds = []
    for slot in range(num_finished + 1, num_finished + 1 + cohort):
        start = time.perf_counter()
        mirror.ask_slots([slot])
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(options: Options) -> Report:
    """Time all samplers; the headline is that of the default one."""
    sizes = (100, 1000) if options.quick else (100, 1000, 10_000)
    samples: dict[str, Samples] = {}
    rows = []
    for name in KNOWN_SAMPLERS:
        is_slow = name == "gp"
        own: Sequence[int] = GP_TRIALS[: 1 if options.quick else None] if is_slow else sizes
        cohort = (2 if options.quick else GP_COHORT) if is_slow else COHORT
        cells = []
        for size in own:
            seconds = ask_seconds(SamplerSettings(name), size, cohort=cohort, seed=options.seed)
            samples[f"{name}/{size}"] = Samples({"ask": 1e3 * np.array(seconds)})
            median = f"{samples[f'{name}/{size}'].median_ms('ask').value:.1f}"
            cells.append(f"{median} (after {size:,})" if is_slow else median)
        rows.append((name, str(cohort), *cells, *[""] * (len(sizes) - len(cells))))
    return Report(
        [
            Section(
                "Median milliseconds for a suggestion", ("sampler", "cohort", *(f"after {n:,}" for n in sizes)), rows
            )
        ],
        Headline(
            f"a suggestion of {SamplerSettings().name} after 1,000 trials",
            samples[f"{SamplerSettings().name}/1000"].median_ms("ask"),
            " ms",
            GOAL_MS,
        ),
        {"ask": {name: own.figures()["ask"] for name, own in samples.items()}},
    )


if __name__ == "__main__":
    run_benchmark(BENCHMARK, measure, threads=1)
