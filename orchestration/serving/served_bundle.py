"""The bundle that is served. Importing this imports no Ray, so that errors are told before it
starts."""

from __future__ import annotations

from pathlib import Path

from dsnet.deploy.bundle import Bundle, load_bundle
from orchestration.serving.settings import ServeSettings


def opened(path: Path, settings: ServeSettings, threads: int | None = None) -> Bundle:
    """The bundle at the operating point of requests without a budget.

    Args:
        path: its folder.
        settings: with the budget, if there is one.
        threads: threads of a batch; None: those of torch.

    Raises:
        CheckpointError: it cannot be read.
        ConfigError: two budgets, or one out of range; or the bundle does not have the precision.
        NotFoundError: no point is within the budget.
    """
    bundle = load_bundle(path, threads=threads, precision=settings.precision)
    if settings.madds_m is not None or settings.latency_ms is not None:
        bundle.set_budget(madds_m=settings.madds_m, latency_ms=settings.latency_ms)
    return bundle
