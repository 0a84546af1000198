"""Warnings about the training of a run's supernet, derived from the run folder, so that runs of
earlier releases have them too."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from dsnet.errors import DsnetError
from dsnet.files import read_json_lines, read_object, read_stored, understood
from dsnet.measure.settings import TRAIN_SAMPLE_FILE
from dsnet.stored.names import FINAL, STRUCTURE
from orchestration.results.run import RunResults, subnets_in
from search.training_checks import Score, TrainingFacts, TrainingWarning, training_warnings

LOSS = "loss/"
LABELLED = "largest"
"""Curve of the sub-network that learns from the labels if the largest one is not a route; the curve
of a route has the name of that route."""


def review(results: RunResults) -> tuple[TrainingWarning, ...]:
    """Warnings about the training; empty before it has ended.

    Accuracies are used once the measure stage is done, and answers to single images once the table
    stage is.
    """
    if not results.is_done("supernet"):
        return ()
    return training_warnings(facts_of(results))


def facts_of(results: RunResults) -> TrainingFacts:
    """The facts that the checks read, as far as the run has them; the supernet's stage must be
    done."""
    key = results.done_key("supernet")
    made = results.supernet
    facts = TrainingFacts()
    if made is not None:
        train, curves = made.run.train, read_curves(results.run.curves_jsonl(key), made.run.train.epochs)
        facts = TrainingFacts(
            num_steps=curves[0],
            epochs=train.epochs,
            batch_size=train.batch_size,
            is_from_scratch=_is_from_scratch(results, made.run.origin),
            teacher=made.run.regime.teacher,
            trust=made.run.bootstrapping.trust,
            curves=curves[1],
        )
    return facts if not results.subnets else _with_accuracies(results, facts)


def _is_from_scratch(results: RunResults, origin: Mapping[str, Any]) -> bool:
    """Whether a supernet began with fresh weights, perhaps by way of a choice of sub-networks."""
    is_chosen = str(origin.get("file", "")).startswith(STRUCTURE)
    return not origin or (is_chosen and results.config.supernet.init_from is None)


def read_curves(path: Path, epochs: int) -> tuple[int, dict[str, tuple[list[float], list[float]]]]:
    """(number of training steps, curve of each sub-network, the one that learns from the labels
    first); (0, {}) if there are no curves."""
    rows: dict[int, Mapping[str, Any]] = {}
    curves: dict[str, tuple[list[float], list[float]]] = {}
    with understood(path):
        for row in read_json_lines(path) if epochs else ():
            rows[int(row["step"])] = row
        for step in sorted(rows):
            for name, loss in rows[step]["metrics"].items():
                if name.startswith(LOSS):
                    steps, losses = curves.setdefault(name.removeprefix(LOSS), ([], []))
                    steps.append(float(step))
                    losses.append(float(loss))
        first = LABELLED if LABELLED in curves else max(curves, default="", key=lambda name: len(curves[name][0]))
        ordered = {first: curves[first], **curves} if curves else {}
        return max((int(row["num_steps"]) for row in rows.values()), default=0), ordered


def _with_accuracies(results: RunResults, facts: TrainingFacts) -> TrainingFacts:
    routes, num_val = results.members, results.num_val
    outside = next((subnet for subnet in results.subnets if subnet.is_teacher), None)
    names = [subnet.name for subnet in routes]
    sample = results.run.subnets_json(results.done_key("measure")).with_name(TRAIN_SAMPLE_FILE)
    return replace(
        facts,
        routes=[Score(subnet.name, subnet.top1, num_val) for subnet in routes],
        pairs=_nested_pairs(results, names),
        correct=_correct(results, names),
        outside=None if outside is None else Score(outside.name, outside.top1, num_val),
        train=read_stored(sample, _train_score) if sample.is_file() else None,
    )


def _train_score(stored: Mapping[str, Any]) -> Score:
    return Score(stored["name"], stored["top1"], stored["num_images"])


def _nested_pairs(results: RunResults, names: Sequence[str]) -> list[tuple[int, int]]:
    """(narrow, wide) positions of sub-networks where no layer of the wide one is narrower, so that
    it should be at least as accurate."""
    meta = read_object(results.run.stage_dir("supernet", results.done_key("supernet")) / f"{FINAL}.json")
    try:
        subnets = subnets_in(meta)
    except (DsnetError, KeyError, TypeError, ValueError):  # another release wrote it
        return []
    widths = {subnet.name: subnet.widths for subnet in subnets}
    return [
        (narrow, wide)
        for wide in range(len(names))
        for narrow in range(wide)
        if all(a <= b for a, b in zip(widths[names[narrow]], widths[names[wide]], strict=True))
    ]


def _correct(results: RunResults, names: Sequence[str]) -> NDArray[np.bool_] | None:
    """Whether each route is right [N, K] on `val`, read from the table without its other arrays;
    None before the table stage, or if it cannot be read."""
    if not results.is_done("table"):
        return None
    try:
        with safe_open(results.run.table(results.done_key("table"), "val"), framework="numpy") as stored:
            told = json.loads((stored.metadata() or {})["routing_table"])["routes"]
            correct = np.asarray(stored.get_tensor("correct1"), dtype=bool)
        return correct[:, [told.index(name) for name in names]]
    except (SafetensorError, OSError, ValueError, KeyError):
        return None
