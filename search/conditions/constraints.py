"""The conditions that a sweep's trials have to meet, and what each trial makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dsnet.errors import ConfigError
from search.conditions.expressions import Comparison, Interval, Metric, Number

BASELINE = "baseline."
"""What names of the widest routable static sub-network's metrics begin with."""


@dataclass(frozen=True)
class ConstraintSet:
    """Conditions over a trial's metrics and those of the baseline.

    Attributes:
        soft: reported to the sampler; a trial that breaks one is never on the front.
        hard: also end a trial that breaks one at once.
        baseline: "baseline.top1" -> value; every such name that a condition reads.

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
        """Soft ones, then hard ones."""
        return self.soft + self.hard

    def violations(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """By the condition's text how much it is broken (<= 0: it holds); the same names in the
        same order for every trial.

        NaN where a metric is NaN or missing: the trial is then nothing that a sampler may be told
        of.
        """
        values = self._values(metrics)
        return {comparison.text: comparison.violation(values) for comparison in self.all}

    def hold(self, metrics: Mapping[str, float]) -> bool:
        """Whether all conditions hold."""
        values = self._values(metrics)
        return all(comparison.holds(values) for comparison in self.all)

    def broken(self, metrics: Mapping[str, float]) -> str | None:
        """What a trial breaks first of the hard conditions, with the values that do it; None where
        they all hold.

        A condition that reads a metric that is not among `metrics` yet is passed over.
        """
        values = self._values(metrics)
        for comparison in self.hard:
            if comparison.names <= values.keys() and not comparison.holds(values):
                return f"breaks {comparison}: {_values_of(comparison, values)}"
        return None

    def impossible(self, ranges: Mapping[str, Interval]) -> tuple[str, ...]:
        """The hard conditions that nothing in these ranges of the metrics can hold."""
        known = {name: (value, value) for name, value in self.baseline.items()} | dict(ranges)
        return tuple(comparison.text for comparison in self.hard if comparison.least_violation(known) > 0)

    def _values(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return {**metrics, **self.baseline}


def _values_of(comparison: Comparison, values: Mapping[str, float]) -> str:
    if isinstance(comparison.left, Metric) and isinstance(comparison.right, Number):
        return f"it is {values[comparison.left.name]:.6g}"
    return ", ".join(f"{name} is {values[name]:.6g}" for name in sorted(comparison.names))
