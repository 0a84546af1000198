"""The conditions that the trials of a sweep must meet, and their evaluation for a trial."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dsnet.errors import ConfigError
from search.conditions.expressions import Comparison, Interval, Metric, Number

BASELINE = "baseline."
"""Prefix of the names of the baseline's metrics; the baseline is the widest routable static
sub-network."""


@dataclass(frozen=True)
class ConstraintSet:
    """Conditions over a trial's metrics and those of the baseline.

    Attributes:
        soft: conditions that are reported to the sampler; a trial that violates one is never on the
            front.
        hard: conditions that, in addition, end a trial at once if it violates one.
        baseline: values of the baseline's metrics by name, such as "baseline.top1"; it must hold
            every such name that a condition reads.

    Raises:
        ConfigError: a condition reads a metric of the baseline that was not measured.
    """

    soft: tuple[Comparison, ...] = ()
    hard: tuple[Comparison, ...] = ()
    baseline: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for comparison in self.all:
            for name in sorted(comparison.names):
                if name.startswith(BASELINE) and name not in self.baseline:
                    known = ", ".join(self.baseline) or "none"
                    raise ConfigError(f"condition '{comparison}': {name} was not measured; known: {known}")

    @property
    def all(self) -> tuple[Comparison, ...]:
        """All conditions, first the soft, then the hard ones."""
        return self.soft + self.hard

    def violations(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Violation of each condition, by its text (<= 0: it holds); the names and their order are
        the same for every trial.

        A violation is NaN if a metric is NaN or missing; the trial must then not be told to a
        sampler.
        """
        values = self._values(metrics)
        return {comparison.text: comparison.violation(values) for comparison in self.all}

    def hold(self, metrics: Mapping[str, float]) -> bool:
        """Whether all conditions hold."""
        values = self._values(metrics)
        return all(comparison.holds(values) for comparison in self.all)

    def broken(self, metrics: Mapping[str, float]) -> str | None:
        """Message with the first hard condition that a trial violates and the values in it; None if
        they all hold.

        Conditions on metrics that are not among `metrics` yet are skipped.
        """
        values = self._values(metrics)
        for comparison in self.hard:
            if comparison.names <= values.keys() and not comparison.holds(values):
                return f"violates {comparison}: {_values_of(comparison, values)}"
        return None

    def impossible(self, ranges: Mapping[str, Interval]) -> tuple[str, ...]:
        """The hard conditions that no point of these ranges of the metrics can meet."""
        known = {name: (value, value) for name, value in self.baseline.items()} | dict(ranges)
        return tuple(comparison.text for comparison in self.hard if comparison.least_violation(known) > 0)

    def _values(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return {**metrics, **self.baseline}


def _values_of(comparison: Comparison, values: Mapping[str, float]) -> str:
    if isinstance(comparison.left, Metric) and isinstance(comparison.right, Number):
        return f"it is {values[comparison.left.name]:.6g}"
    return ", ".join(f"{name} is {values[name]:.6g}" for name in sorted(comparison.names))
