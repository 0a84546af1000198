"""Quick reading of the trials in a journal of ours.

Optuna builds objects for every trial and every distribution of it, which takes seconds for ten
thousand trials. The lines that this program writes are of four kinds only, and are read here
directly; a journal with other lines (another program wrote to the study) is left to Optuna.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from optuna.distributions import json_to_distribution

from search.suggest.space import Scalar

CREATE_STUDY, STUDY_USER_ATTR, STUDY_SYSTEM_ATTR, CREATE_TRIAL = 0, 2, 3, 4
"""Optuna's numbers of the operations that are understood here, `op_code` in a line."""
CONSTRAINT = "constraints:"
"""Prefix with which Optuna stores the constraints of a trial among its system attributes."""
LINES_PER_PARSE = 500
"""Lines that are parsed at once: their keys are then shared strings, and the parsed text need not
be in memory as a whole."""


@dataclass(frozen=True)
class JournalTrial:
    """A finished trial as its line holds it.

    Attributes:
        state: number of Optuna's `TrialState`.
        values: values of the objectives; None unless complete.
        params: parameter values by name.
        user_attrs: our own values (`search.study.study`).
        constraints: constraint values by name.
        finished_ms: Unix time in ms at which it ended; 0 if it is not known.
    """

    state: int
    values: tuple[float, ...] | None
    params: Mapping[str, Scalar]
    user_attrs: Mapping[str, Any]
    constraints: Mapping[str, float]
    finished_ms: int


@dataclass
class JournalContent:
    """The study in a journal."""

    trials: list[JournalTrial] = field(default_factory=list)
    """In the order of their numbers."""
    user_attrs: dict[str, Any] = field(default_factory=dict)
    """Attributes of the study."""


def read_lines(lines: Sequence[bytes]) -> JournalContent | None:
    """The study in the lines of a journal; None if there is anything that only Optuna understands,
    damaged lines included."""
    reader = _Reader()
    try:
        for start in range(0, len(lines), LINES_PER_PARSE):
            for operation in json.loads(b"[" + b",".join(lines[start : start + LINES_PER_PARSE]) + b"]"):
                reader.apply(operation)
    except (_UnknownOperationError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return reader.content


class _UnknownOperationError(Exception):
    """An operation that is left to Optuna."""


class _Reader:
    """Applies operations one after the other."""

    def __init__(self) -> None:
        self.content = JournalContent()
        self._external = _ExternalValues()
        self._has_study = False

    def apply(self, operation: Mapping[str, Any]) -> None:
        """Apply one operation; raises an error if it is not understood."""
        code = operation["op_code"]
        if code == CREATE_STUDY and not self._has_study:
            self._has_study = True
            return
        if not self._has_study or operation["study_id"] != 0:
            raise _UnknownOperationError
        if code == CREATE_TRIAL:
            self.content.trials.append(_trial(operation, self._external))
        elif code == STUDY_USER_ATTR:
            self.content.user_attrs |= operation["user_attr"]
        elif code != STUDY_SYSTEM_ATTR:
            raise _UnknownOperationError


class _ExternalValues:
    """Functions that convert stored values of parameters, by the text of their distribution; a
    study has few different ones."""

    def __init__(self) -> None:
        self._known: dict[str, Callable[[float], Any]] = {}

    def of(self, distribution: str) -> Callable[[float], Any]:
        """The function for a distribution in JSON."""
        known = self._known.get(distribution)
        if known is None:
            known = self._known[distribution] = json_to_distribution(distribution).to_external_repr
        return known


def _trial(log: Mapping[str, Any], external: _ExternalValues) -> JournalTrial:
    """The trial of a line."""
    notes: Mapping[str, Any] = log["system_attrs"]
    if CONSTRAINT[:-1] in notes:  # the form of earlier releases of Optuna
        raise _UnknownOperationError
    values = log["values"] if log["value"] is None else [log["value"]]
    distributions = log["distributions"]
    constraints = {name.removeprefix(CONSTRAINT): value for name, value in notes.items() if name.startswith(CONSTRAINT)}
    return JournalTrial(
        state=log["state"],
        values=None if values is None else tuple(values),
        params={name: external.of(distributions[name])(value) for name, value in log["params"].items()},
        user_attrs=log["user_attrs"],
        constraints=constraints,
        finished_ms=round(1000 * datetime.fromisoformat(log["datetime_complete"]).timestamp()),
    )
