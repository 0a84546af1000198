"""Operating points of a bundle: routers over the same sub-networks with their measured numbers, and
the choice of one of them for a budget (docs/definitions.md, Operating point)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any, overload

from jaxtyping import Shaped
from torch import Tensor

from dsnet.errors import ConfigError, NotFoundError
from dsnet.routers.base import Router
from dsnet.routers.kinds import router_from_arrays
from dsnet.stored.checkpoint import tensors_below
from dsnet.wording import plural, shown, way_out

SHARED_CLAIM = "data"
"""The claim that is the same for all points of a bundle: on which data they were measured."""
LATENCY_CLAIM = "expected_latency"
"""The claim with the latencies by which a point is chosen: name of the device ("" for the main one)
-> `device` (its model), `threads` and `batches_ms`, the time of a batch by its size."""


_MORE_POINTS = "export all gates of the front as one bundle: dsnet-orch export RUN --pick front"


@dataclass(frozen=True)
class OperatingPoint:
    """A router over the sub-networks of a bundle, with the numbers with which it was exported. The
    router of a static sub-network always takes the same route."""

    name: str
    """`trial-0042` for a gate; the name of the sub-network for a static one."""
    router: Router
    claims: Mapping[str, Any]
    """Its accuracies, MAdds and latencies, as in the claims of a bundle."""

    @property
    def top1(self) -> float | None:
        """Top-1 on `val`, 0..1; None if it is not recorded."""
        return self._of_val("top1")

    @property
    def test_top1(self) -> float | None:
        """Top-1 on `test`, 0..1; None if it was not verified there. No point is chosen by it."""
        return self.claims.get("test", {}).get("top1")

    @property
    def madds_m(self) -> float | None:
        """Mean MAdds of an image on `val`, in millions; None if it is not recorded."""
        return self._of_val("madds_m")

    @property
    def latency_ms(self) -> float | None:
        """Latency of one image on the main device, in ms; None if it was not measured."""
        return self.latencies().get(1)

    def latencies(self, device: str = "") -> Mapping[int, float]:
        """Milliseconds of a batch, by its size.

        A static sub-network's are times of whole calls, a gate's are expected from the times of its
        parts (docs/definitions.md, Latency).

        Args:
            device: the name of a device of `measure.devices`; empty for the main one.
        """
        recorded = self.claims.get(LATENCY_CLAIM)
        if recorded is not None:
            return {int(size): ms for size, ms in recorded.get(device, {}).get("batches_ms", {}).items()}
        ms = self._of_val("latency_ms")
        return {} if ms is None or device else {1: ms}

    def _of_val(self, metric: str) -> float | None:
        return self.claims.get("val", {}).get(metric)

    def __repr__(self) -> str:
        """Without the weights of the router and the claims, which fill pages in an interpreter."""
        return f"OperatingPoint({self})"

    def __str__(self) -> str:
        numbers = [
            "" if self.madds_m is None else f"{self.madds_m:.3g} M MAdds",
            "" if self.top1 is None else f"top-1 {100 * self.top1:.1f} % on val",
        ]
        known = ", ".join(filter(None, numbers))
        return f"{self.name} ({known})" if known else self.name


class OperatingPoints(Sequence[OperatingPoint]):
    """The operating points of a bundle by increasing MAdds; printed, it is a table.

    Args:
        points: at least one.

    Raises:
        ValueError: two points have the same name, or there is none.
    """

    def __init__(self, points: Sequence[OperatingPoint]) -> None:
        names = [point.name for point in points]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"operating points need different names, and at least one, but are {names}")
        self._points = tuple(sorted(points, key=lambda point: _or_inf(point.madds_m)))

    def __len__(self) -> int:
        return len(self._points)

    def __iter__(self) -> Iterator[OperatingPoint]:
        return iter(self._points)

    @overload
    def __getitem__(self, index: int) -> OperatingPoint: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[OperatingPoint, ...]: ...

    def __getitem__(self, index: int | slice) -> OperatingPoint | tuple[OperatingPoint, ...]:
        return self._points[index]

    def __repr__(self) -> str:
        return f"OperatingPoints({', '.join(map(str, self))})"

    def __str__(self) -> str:
        """A table with a line for each point; columns without any value are left out."""
        sizes = sorted({size for point in self for size in point.latencies()})
        columns: dict[str, Callable[[OperatingPoint], str]] = {
            "point": lambda point: point.name,
            "router": lambda point: point.router.kind,
            "MAdds M": lambda point: _number(point.madds_m),
            "top-1 % val": lambda point: _percent(point.top1),
            "top-1 % test": lambda point: _percent(point.test_top1),
        }
        columns |= {f"ms batch {size}": _latency_column(size) for size in sizes}
        table = [[title, *map(of_point, self)] for title, of_point in columns.items()]
        filled = [column for column in table if any(column[1:])]
        widths = [max(map(len, column)) for column in filled]
        lines = (
            "  ".join(
                cell.ljust(width) if number < 2 else cell.rjust(width)
                for number, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in zip(*filled, strict=True)
        )
        return "\n".join((*lines, *self._timed_on()))

    def _timed_on(self) -> list[str]:
        """A line with the device and the threads of the latencies in the table, if known."""
        recorded = (point.claims.get(LATENCY_CLAIM, {}).get("") for point in self)
        found = next(filter(None, recorded), None)
        return [] if found is None else [f"ms on {found['device']}, {plural(found['threads'], 'thread')}"]

    def named(self, name: str) -> OperatingPoint:
        """The point of this name.

        Raises:
            NotFoundError: there is none.
        """
        if name not in self._by_name:
            raise NotFoundError(f"no operating point {name!r}{way_out(name, list(self._by_name))}")
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, OperatingPoint]:
        return {point.name: point for point in self}

    @property
    def best(self) -> OperatingPoint:
        """The point with the highest top-1 on `val`, of equal ones the cheapest; the first if no
        top-1 is recorded."""
        return min(self, key=lambda point: (-(point.top1 or 0.0), _or_inf(point.madds_m)))

    def choose(
        self,
        *,
        madds_m: float | None = None,
        latency_ms: float | None = None,
        top1: float | None = None,
        batch_size: int = 1,
        device: str = "",
    ) -> OperatingPoint:
        """Choose a point by its numbers on `val`; `test` is never used.

        Give exactly one of the first three arguments. For a budget it is the point within it that
        has the highest top-1, and of equal ones the cheapest; for `top1`, the point with the fewest
        MAdds that reaches it, and of equal ones the most accurate.

        Args:
            madds_m: largest mean MAdds of an image, in millions; inf sets no limit.
            latency_ms: largest latency of a batch, in ms.
            top1: smallest top-1, 0..1.
            batch_size: images in this batch; only sizes that were measured.
            device: the name of the device of `measure.devices` on which it was measured; empty for
                the main one.

        Raises:
            ConfigError: not exactly one is given, or its value is out of range.
            NotFoundError: no point fulfils it, or no point has this number.
        """
        _check_request({"madds_m": madds_m, "latency_ms": latency_ms, "top1": top1})
        if top1 is not None:
            return self._reaching(top1)
        if madds_m is not None:
            return self._within(madds_m, "M MAdds", lambda point: point.madds_m, "export the bundle again")
        assert latency_ms is not None
        where = f" on device {device!r}" if device else ""
        unit = "ms" if batch_size == 1 else f"ms for a batch of {batch_size}"
        return self._within(
            latency_ms,
            unit + where,
            lambda point: point.latencies(device).get(batch_size),
            self._latency_advice(device),
        )

    def _within(
        self, budget: float, unit: str, cost_of: Callable[[OperatingPoint], float | None], advice: str
    ) -> OperatingPoint:
        costs = {point.name: cost for point in self if (cost := cost_of(point)) is not None}
        rated = [point for point in self if point.name in costs and point.top1 is not None]
        if not rated:
            raise NotFoundError(f"no operating point has a recorded top-1 on val and a cost in {unit}; {advice}")
        allowed = [point for point in rated if costs[point.name] <= budget]
        if not allowed:
            first, last = (pick(rated, key=lambda point: costs[point.name]) for pick in (min, max))
            least = f"allow at least {_outward(costs[first.name], math.ceil)}"
            raise NotFoundError(
                f"no operating point costs at most {budget:g} {unit}: "
                + (
                    f"they cost from {costs[first.name]:.4g} ({first.name}) to {costs[last.name]:.4g} ({last.name}); {least}"
                    if len(self) > 1
                    else f"the bundle has only one, {first.name}, which costs {costs[first.name]:.4g}; {least}, or {_MORE_POINTS}"
                )
            )
        return min(allowed, key=lambda point: (-_known(point.top1), costs[point.name], _or_inf(point.madds_m)))

    def _reaching(self, top1: float) -> OperatingPoint:
        rated = [point for point in self if point.top1 is not None]
        if not rated:
            raise NotFoundError("no operating point has a recorded top-1 on val; export the bundle again")
        enough = [point for point in rated if _known(point.top1) >= top1]
        if not enough:
            first, last = (pick(rated, key=lambda point: _known(point.top1)) for pick in (min, max))
            most = f"ask for at most {_outward(_known(last.top1), math.floor)}"
            raise NotFoundError(
                f"no operating point reaches top-1 {top1:g} on val: "
                + (
                    f"they reach from {first.top1:.4g} ({first.name}) to {last.top1:.4g} ({last.name}); {most}"
                    if len(self) > 1
                    else f"the bundle has only one, {first.name}, which reaches {first.top1:.4g}; {most}, or {_MORE_POINTS}"
                )
            )
        return min(enough, key=lambda point: (_or_inf(point.madds_m), -_known(point.top1)))

    def _latency_advice(self, device: str) -> str:
        sizes = sorted({size for point in self for size in point.latencies(device)})
        if sizes:
            known = ", ".join(map(str, sizes))
            return (
                f"batches of {known} were measured: choose one of these as batch_size, or add it to measure.batch_sizes"
            )
        return "measure it with `dsnet-orch measure RUN` (devices: measure.devices) and export the bundle again"


def _check_request(values: Mapping[str, float | None]) -> None:
    given = {name: value for name, value in values.items() if value is not None}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise ConfigError(f"{name} must be a number, but is {shown(value)}")
    if len(given) != 1:
        told = ", ".join(f"{name}={value:g}" for name, value in given.items()) or "none"
        raise ConfigError(f"give exactly one of madds_m, latency_ms and top1; got {told}")
    ((name, value),) = given.items()
    if name == "top1" and not 0 <= value <= 1:
        raise ConfigError(f"top1 is a fraction from 0 to 1, e.g. 0.75, but got {value:g}")
    if name != "top1" and not value > 0:
        raise ConfigError(f"{name} must be above 0, but got {value:g}")


def _known(value: float | None) -> float:
    assert value is not None
    return value


def _or_inf(value: float | None) -> float:
    return math.inf if value is None else value


def _outward(value: float, rounding: Callable[[float], int]) -> str:
    """A number with four significant digits that is not below `value` (`math.ceil`) or not above it
    (`math.floor`)."""
    if value <= 0:
        return f"{value:g}"
    scale = 10.0 ** (3 - math.floor(math.log10(value)))
    return f"{rounding(value * scale) / scale:.4g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _latency_column(size: int) -> Callable[[OperatingPoint], str]:
    return lambda point: _number(point.latencies().get(size))


def store_points(
    first: str, further: Sequence[OperatingPoint]
) -> tuple[list[dict[str, Any]], dict[str, Shaped[Tensor, "*_"]]]:
    """The manifest's entry `points` and the tensors `point.N.*` of a bundle with several points.

    The first entry, N = 0, has only a name: its router and claims are the bundle's own. A release
    that knows no operating points therefore reads the bundle as this point.

    Args:
        first: name of the bundle's own router.
        further: the other points, over the bundle's route ids.
    """
    entries: list[dict[str, Any]] = [{"name": first}]
    stored: dict[str, Tensor] = {}
    for number, point in enumerate(further, start=1):
        tensors, values = point.router.to_arrays()
        claims = {name: value for name, value in point.claims.items() if name != SHARED_CLAIM}
        entries.append({"name": point.name, "router": values, "claims": claims})
        stored |= {f"{prefix_of(number)}{name}": value.contiguous() for name, value in tensors.items()}
    return entries, stored


def read_points(
    own: OperatingPoint, entries: Sequence[Mapping[str, Any]] | None, tensors: Mapping[str, Shaped[Tensor, "*_"]]
) -> tuple[OperatingPoint, ...]:
    """The points of a bundle in the order of its manifest, its own first.

    Args:
        own: the bundle's own router and claims, with the name that it has if no points are stored.
        entries: the manifest's entry `points`; None if it has none.
        tensors: all tensors of the bundle.

    Raises:
        CheckpointError: a router cannot be rebuilt.
        KeyError: an entry is incomplete.
    """
    if entries is None:
        return (own,)
    shared = {name: value for name, value in own.claims.items() if name == SHARED_CLAIM}
    further = (
        OperatingPoint(
            entry["name"],
            router_from_arrays(tensors_below(tensors, prefix_of(number)), entry["router"]),
            {**shared, **entry["claims"]},
        )
        for number, entry in enumerate(entries[1:], start=1)
    )
    return (OperatingPoint(entries[0]["name"], own.router, own.claims), *further)


def prefix_of(number: int) -> str:
    """Prefix of the tensors of a point, in weights and examples, by its number in the manifest; 0,
    the bundle's own point, has none."""
    return f"point.{number}." if number else ""
