"""The sections `sampler`, `budget`, `pruner` and `trial`: which points are tried, how many, and how
long."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    JsonValue,
)

from dsnet.settings import Fraction, NonNegativeInt, PositiveFloat, PositiveFraction, PositiveInt
from orchestration.config.section import FROM_LIST, PointValue, Section, Text


class SamplerConfig(Section):
    """Who suggests the trials."""

    name: Text = "tpe"
    """random | grid | qmc | tpe | nsga2 | nsga3 | gp, or the import path of a class of Optuna's
    kind."""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Keyword arguments of the sampler's constructor; of grid `points`, how many each continuous
    dimension gets."""
    cohort: PositiveInt | None = None
    """Trials asked for, run and told together; results depend on it, and not on the number of
    actors. null = 64, or 8 with sampler gp or gate.trainer end_to_end."""
    startup: NonNegativeInt = 16
    """Random trials before tpe and gp start to model, and the size of a generation of nsga2 and
    nsga3."""
    order: Literal["cohorts", "asynchronous"] = "cohorts"
    """cohorts: reproducible, with any number of workers | asynchronous: no worker waits, but
    results depend on who finishes first."""
    enqueue: Annotated[tuple[dict[str, PointValue], ...], FROM_LIST] | None = None
    """Points {key: value} that are tried first; keys that a point leaves out are drawn. [] = none;
    null = the published settings, as far as the space holds them (with grid: none)."""


class PlateauConfig(Section):
    """Stop when the front stands still."""

    trials: PositiveInt = 200
    """The last so many trials ..."""
    gain: PositiveFraction = 0.001
    """... have added less than this share, (0, 1], to the hypervolume of the feasible ones."""


class BudgetConfig(Section):
    """When the sweep ends."""

    trials: PositiveInt = 256
    """Number of trials, failed ones included."""
    time_s: PositiveFloat | None = None
    """Seconds of searching; null = no limit."""
    plateau: PlateauConfig | None = None
    """{trials: 200, gain: 0.001}: stop when the last 200 trials have added less than 0.1 % to the
    hypervolume; null = never."""
    target: Annotated[tuple[Text, ...], FROM_LIST] = ()
    """Conditions, written as constraints, that one trial must meet together: then the sweep ends.
    [] = never."""
    max_failed: Fraction = 0.5
    """Share of failed trials, [0, 1], above which the sweep counts as failed (exit code 4)."""
    verify: PositiveInt | None = 32
    """About so many gates of the front run for real on `test`, evenly along it; both ends, the knee
    and what export.picks names always. null = all."""


class PrunerConfig(Section):
    """Ends trials early that fall behind; for gate.trainer end_to_end, whose trials are long."""

    name: Literal["none", "pareto_halving"] = "none"
    """none | pareto_halving: at each rung the best 1/factor by Pareto rank goes on."""
    factor: Annotated[int, Field(ge=2)] = 3
    """Of each rung about one in so many goes on, at least 2."""
    first_epochs: PositiveInt = 3
    """Epochs of the first rung; the others lie at first_epochs * factor^k, below
    gate.end_to_end.epochs."""


class TrialConfig(Section):
    """What one trial may cost."""

    timeout_s: PositiveFloat | None = None
    """Seconds, after which the trial has failed; null = 120, or 4 hours with gate.trainer
    end_to_end."""
    retries: NonNegativeInt = 2
    """New attempts after a lost worker; an error of the trial itself is not repeated."""
