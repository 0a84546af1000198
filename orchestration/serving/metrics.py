"""What the server counts, and its text for Prometheus (text format, version 0.0.4).

A replica adds what it counts to a tally of its own and sends it to the one that `/metrics` shows:
the numbers are those of all replicas, and a replica that ends loses almost nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of the buckets of latencies."""
IMAGES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
"""Upper bounds of the buckets of batch sizes."""


@dataclass
class Histogram:
    """Counts of values by bucket, with their sum."""

    bounds: Sequence[float]
    """Upper bounds of the buckets, increasing; a further bucket has no bound."""
    counts: list[int] = field(default_factory=list)
    """Values per bucket, not cumulative."""
    total: float = 0.0

    def __post_init__(self) -> None:
        if not self.counts:
            self.counts = [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def merge(self, other: Histogram) -> None:
        """Add the counts of another histogram with the same bounds."""
        self.counts = [own + more for own, more in zip(self.counts, other.counts, strict=True)]
        self.total += other.total


@dataclass
class Tally:
    """Numbers of requests, answers and batches."""

    requests: Counter[int] = field(default_factory=Counter)
    """Requests for predictions by the status of their answer."""
    images: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Classified images by (operating point, route)."""
    madds: Counter[tuple[str, str]] = field(default_factory=Counter)
    """MAdds spent on them."""
    seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    """Latencies of answered requests, from their first byte in the replica to the answer."""
    batches: Histogram = field(default_factory=lambda: Histogram(IMAGES))
    """Sizes of the batches."""

    def answered(self, status: int, seconds: float | None = None) -> None:
        """Count a request; its latency only where it got predictions."""
        self.requests[status] += 1
        if seconds is not None:
            self.seconds.add(seconds)

    def classified(self, point: str, route: str, madds: int) -> None:
        """Count an image that ran at an operating point."""
        self.images[point, route] += 1
        self.madds[point, route] += madds

    def merge(self, other: Tally) -> None:
        """Add all numbers of another tally."""
        self.requests.update(other.requests)
        self.images.update(other.images)
        self.madds.update(other.madds)
        self.seconds.merge(other.seconds)
        self.batches.merge(other.batches)

    def text(self) -> str:
        """All numbers in the format that Prometheus reads."""
        images = sum(self.images.values())
        mean = sum(self.madds.values()) / images if images else 0.0
        lines = [
            *_header("dsnet_requests_total", "counter", "Requests for predictions by the status of the answer."),
            *(f'dsnet_requests_total{{status="{status}"}} {self.requests[status]}' for status in sorted(self.requests)),
            *_header("dsnet_images_total", "counter", "Classified images by operating point and route."),
            *_by_route("dsnet_images_total", self.images),
            *_header("dsnet_madds_total", "counter", "MAdds spent on classified images."),
            *_by_route("dsnet_madds_total", self.madds),
            *_header("dsnet_mean_madds", "gauge", "Mean MAdds of an image since the start."),
            f"dsnet_mean_madds {mean:.17g}",
            *_histogram("dsnet_request_seconds", "Latency of answered requests, without the HTTP proxy.", self.seconds),
            *_histogram("dsnet_batch_images", "Images in a batch.", self.batches),
        ]
        return "\n".join(lines) + "\n"


def _header(name: str, kind: str, meaning: str) -> tuple[str, str]:
    return f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"


def _by_route(name: str, counts: Mapping[tuple[str, str], int]) -> list[str]:
    return [
        f'{name}{{point="{_escaped(point)}",route="{_escaped(route)}"}} {count}'
        for (point, route), count in sorted(counts.items())
    ]


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _histogram(name: str, meaning: str, histogram: Histogram) -> list[str]:
    lines, below = [*_header(name, "histogram", meaning)], 0
    for bound, count in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
        below += count
        lines.append(f'{name}_bucket{{le="{"+Inf" if bound == float("inf") else f"{bound:g}"}"}} {below}')
    return [*lines, f"{name}_sum {histogram.total:.17g}", f"{name}_count {below}"]
