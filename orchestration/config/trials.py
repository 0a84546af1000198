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
    """Sampler that suggests the trials."""

    name: Text = "tpe"
    """random | grid | qmc | tpe | nsga2 | nsga3 | gp, or the import path of an Optuna sampler."""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Keyword arguments of the sampler's constructor; for grid `points`, the number of values of
    each continuous parameter."""
    cohort: PositiveInt | None = None
    """Number of trials that are suggested and run together. Results depend on it, but not on the
    number of workers. null = 64, or 8 with sampler gp or gate.trainer end_to_end."""
    startup: NonNegativeInt = 16
    """Random trials before tpe and gp use their model; population size of nsga2 and nsga3."""
    order: Literal["cohorts", "asynchronous"] = "cohorts"
    """cohorts: reproducible with any number of workers | asynchronous: no worker waits, but results
    depend on the order in which trials finish."""
    enqueue: Annotated[tuple[dict[str, PointValue], ...], FROM_LIST] | None = None
    """Points {key: value} that are tried first; the sampler draws keys that a point leaves out. []
    = none; null = the published settings, as far as the space contains them (with grid: none)."""


class PlateauConfig(Section):
    """Stop the search when the front no longer improves."""

    trials: PositiveInt = 200
    """Number of most recent trials."""
    gain: PositiveFraction = 0.001
    """Minimum relative increase of the feasible hypervolume over these trials, (0, 1]."""


class BudgetConfig(Section):
    """Rules that end the search."""

    trials: PositiveInt = 256
    """Number of trials, failed ones included."""
    time_s: PositiveFloat | None = None
    """Maximum time of the search in seconds; null = no limit."""
    plateau: PlateauConfig | None = None
    """{trials: 200, gain: 0.001}: stop when the last 200 trials have added less than 0.1 % to the
    hypervolume; null = never."""
    target: Annotated[tuple[Text, ...], FROM_LIST] = ()
    """Conditions, written like constraints; the search ends when one trial satisfies all of them.
    [] = never."""
    max_failed: Fraction = 0.5
    """Share of failed trials, [0, 1], above which the sweep counts as failed (exit code 4)."""
    verify: PositiveInt | None = 32
    """Approximate number of gates, evenly spaced along the front, that run on `test`; both ends,
    the knee and the gates of export.picks are always included. null = all."""


class PrunerConfig(Section):
    """Early stopping of worse trials; for gate.trainer end_to_end, whose trials are long."""

    name: Literal["none", "pareto_halving"] = "none"
    """none | pareto_halving: at each rung the best 1/factor of the trials by Pareto rank continue.
    """
    factor: Annotated[int, Field(ge=2)] = 3
    """One in `factor` trials of each rung continues, at least 2."""
    first_epochs: PositiveInt = 3
    """Epochs of the first rung; the others lie at first_epochs * factor^k, below
    gate.end_to_end.epochs."""


class TrialConfig(Section):
    """Limits of one trial."""

    timeout_s: PositiveFloat | None = None
    """Timeout in seconds, after which a trial fails; null = 120, or 4 hours with gate.trainer
    end_to_end."""
    retries: NonNegativeInt = 2
    """Number of new attempts after a worker was lost; a trial that fails by itself is not repeated.
    """
