"""Stored results of the analysis of a front on one split. All are JSON-able, and need no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dsnet.gates.settings import COLLAPSE_SHARE
from search.front.statistics import significant_sign, unpaired_difference


@dataclass(frozen=True)
class Interval:
    """A value (fraction) with its 95 % bootstrap interval over images."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PointAnalysis:
    """Metrics of one router on one split, beside those of its controls. All routes that run for an
    image are paid for; the last one answers."""

    slot: int
    router: str
    """Its kind, as in `gate.router`."""
    metrics: dict[str, float]
    """Metrics as of a trial: top1, top5, ce, madds_m, p95_madds_m, route_entropy, max_route_share,
    and those that plugins add."""
    top1: Interval
    gain: Interval | None
    """Gain in top-1 over the static line at the same mean MAdds; None below the cheapest
    sub-network, where there is no line."""
    gain_over_random: Interval
    """Gain in top-1 over random routing with the same histogram."""
    random_top1: float
    """Expected top-1 of random routing with the same histogram: images are assigned to the
    answering routes at random. For a cascade that is a cascade which sends the same share of the
    images on, but drawn at random: it runs as much, and answers with the same routes equally
    often."""
    cascade_top1: float | None
    """Top-1 of the confidence cascade whose pair and threshold were chosen on `val` for the same
    budget; None if no cascade is as cheap."""
    cascade_madds_m: float | None
    """Mean MAdds of that cascade on this split, in millions: the budget holds on `val`."""
    cascade_escalated: float | None
    """Share of the images that it sends on to its second route."""
    oracle_top1: float | None
    """Top-1 of the oracle at the same mean MAdds."""
    share_of_oracle_gap: float | None
    """Share of the gap from the static line to the oracle that the router closes."""
    reachable_top1: float | None
    """Top-1 of the reachable ceiling at the same mean MAdds."""
    share_of_reachable_gap: float | None
    """Share of the gap from the static line to the reachable ceiling that the router closes; None
    if the ceiling is not above the line by more than one image."""
    stability: float
    """Share of resamples in which the point is not dominated by another point of the front, in the
    objectives of the sweep."""
    ties: tuple[int, ...]
    """Slots of the other points, and of the trials that represent a kind of router, that are tied
    with this one: the 95 % interval of the paired difference in top-1 includes 0, and mean MAdds is
    within 1 %. Ties are not transitive."""
    histogram: tuple[float, ...]
    """Share of the images by the route that answers."""
    runs: tuple[float, ...]
    """Share of the images that run each route; the shares of a cascade add up to more than one."""
    over_widest: Interval | None = None
    """Gain in top-1 over the widest static sub-network on the same images; None in results of an
    earlier release."""

    @property
    def static_top1(self) -> float | None:
        """Top-1 of the static line at the same mean MAdds; None below the cheapest sub-network."""
        return None if self.gain is None else self.top1.value - self.gain.value

    @property
    def clear_share_of_oracle_gap(self) -> float | None:
        """`share_of_oracle_gap`, but None where the gap is within its noise: see `_clear_share`."""
        return _clear_share(self.share_of_oracle_gap, self.static_top1, self.oracle_top1, self.gain)

    @property
    def clear_share_of_reachable_gap(self) -> float | None:
        """`share_of_reachable_gap`, but None where the gap is within its noise: see
        `_clear_share`."""
        return _clear_share(self.share_of_reachable_gap, self.static_top1, self.reachable_top1, self.gain)

    @property
    def is_collapsed(self) -> bool:
        """See `is_collapsed`."""
        return is_collapsed(self.metrics)

    @property
    def is_cascade_collapsed(self) -> bool:
        """Whether the confidence cascade of the same budget stops, or goes on, for more than 99 %
        of the images."""
        share = self.cascade_escalated
        return share is not None and max(share, 1 - share) > COLLAPSE_SHARE


def is_collapsed(metrics: Mapping[str, float]) -> bool:
    """Whether one route answers more than 99 % of the images, by the metrics of a gate
    (docs/definitions.md, Router)."""
    return metrics["max_route_share"] > COLLAPSE_SHARE


@dataclass(frozen=True)
class BudgetPick:
    """The trial that represents a kind of router at a budget, chosen on `val`."""

    router: str
    """The kind of router."""
    budget_share: float
    """The budget as a share of the range of MAdds."""
    slot: int


@dataclass(frozen=True)
class RouterShare:
    """Result of a kind of router at a budget, beside its controls at the mean MAdds that it spends
    on the split."""

    router: str
    budget_share: float
    budget_m: float
    """The budget in million MAdds; it holds on `val`."""
    slot: int
    madds_m: float
    top1: float
    static_top1: float | None
    """Top-1 of the static line at `madds_m`; None below the cheapest sub-network, like the fields
    that follow, except `is_collapsed`."""
    oracle_top1: float | None
    reachable_top1: float | None
    gain: Interval | None
    """Paired gain in top-1 over the static line."""
    share_of_oracle_gap: float | None
    share_of_reachable_gap: float | None
    is_collapsed: bool

    @property
    def clear_share_of_oracle_gap(self) -> float | None:
        """`share_of_oracle_gap`, but None where the gap is within its noise: see `_clear_share`."""
        return _clear_share(self.share_of_oracle_gap, self.static_top1, self.oracle_top1, self.gain)

    @property
    def clear_share_of_reachable_gap(self) -> float | None:
        """`share_of_reachable_gap`, but None where the gap is within its noise: see
        `_clear_share`."""
        return _clear_share(self.share_of_reachable_gap, self.static_top1, self.reachable_top1, self.gain)


def _clear_share(share: float | None, static: float | None, limit: float | None, gain: Interval | None) -> float | None:
    """A share of the gap from the static line to a limit (the reachable ceiling or the oracle);
    None if the gap is within its noise.

    The noise of the gap is estimated by the interval of the router's own gain over the same line at
    the same cost: both are paired differences of a router and the line over the same images, and so
    vary alike. An interval of that width around the gap must exclude 0, as shown.
    """
    if share is None or static is None or limit is None or gain is None:
        return None
    gap, half = limit - static, (gain.high - gain.low) / 2
    return share if significant_sign(gap - half, gap + half) > 0 else None


@dataclass(frozen=True)
class SplitAnalysis:
    """The static sub-networks, the controls and the routers on one split."""

    split: str
    num_images: int
    routes: tuple[str, ...]
    static_madds_m: tuple[float, ...]
    static_top1: tuple[Interval, ...]
    static_top5: tuple[float, ...]
    line_madds_m: tuple[float, ...]
    """Vertices of the static line, chosen on val."""
    line_top1: tuple[float, ...]
    cascade_madds_m: tuple[float, ...]
    cascade_top1: tuple[float, ...]
    oracle_madds_m: tuple[float, ...]
    oracle_top1: tuple[float, ...]
    reachable_madds_m: tuple[float, ...]
    """Points of the reachable ceiling; between two of them, images are assigned to either at
    random."""
    reachable_top1: tuple[float, ...]
    budgets_m: tuple[float, ...]
    """25, 50 and 75 % of the range of MAdds, in millions."""
    points: tuple[PointAnalysis, ...]
    mean_top1: Interval | None
    """Mean top-1 of the points, all on the same resampled images; None without a point."""
    routers: tuple[RouterShare, ...]
    """Every kind of router that the sweep has tried, at those budgets."""
    class_counts: tuple[tuple[tuple[int, ...], ...], ...] = ()
    """[points][classes][routes] numbers of images."""
    static_added: tuple[Mapping[str, float], ...] = ()
    """[routes] values of `dsnet.metrics.added_metrics` (`balanced_top1` and metrics of plugins) by
    name; empty in results of earlier releases."""

    def static_metrics(self, name: str) -> dict[str, float]:
        """The metrics of a static sub-network on this split, under the names that trials use.

        Those that the release which wrote the results did not compute are missing.
        """
        index = self.routes.index(name)
        return {
            "top1": self.static_top1[index].value,
            "top5": self.static_top5[index],
            "madds_m": self.static_madds_m[index],
            "p95_madds_m": self.static_madds_m[index],
            **(self.static_added[index] if self.static_added else {}),
        }

    def to_json(self) -> dict[str, Any]:
        """A JSON-able mapping."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SplitAnalysis:
        """Rebuild an analysis from the result of `to_json`."""
        fields = {name: _tuples(value) for name, value in data.items()}
        fields["static_top1"] = tuple(Interval(**item) for item in data["static_top1"])
        fields["points"] = tuple(_point(item) for item in data["points"])
        fields["mean_top1"] = _interval_or_none(data["mean_top1"])
        fields["routers"] = tuple(
            RouterShare(**{**item, "gain": _interval_or_none(item["gain"])}) for item in data["routers"]
        )
        return cls(**fields)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _point(item: Mapping[str, Any]) -> PointAnalysis:
    intervals = {name: _interval_or_none(item[name]) for name in ("top1", "gain", "gain_over_random")}
    intervals["over_widest"] = _interval_or_none(item.get("over_widest"))
    tuples = {name: tuple(item[name]) for name in ("ties", "histogram", "runs")}
    return PointAnalysis(**{**item, **intervals, **tuples})


def _interval_or_none(item: Mapping[str, float] | None) -> Interval | None:
    return None if item is None else Interval(**item)


def optimism(chosen: SplitAnalysis, reported: SplitAnalysis) -> Interval | None:
    """Optimism of the front on the split that it was chosen on: mean top-1 of its points there,
    minus that on the other split; None without a point.

    The two splits share no image, so nothing is paired: each mean, over all points, has the
    interval over its own images, and `unpaired_difference` combines the two.
    """
    if chosen.mean_top1 is None or reported.mean_top1 is None:
        return None
    ends = [(mean.value, mean.low, mean.high) for mean in (chosen.mean_top1, reported.mean_top1)]
    return Interval(*unpaired_difference(*ends))
