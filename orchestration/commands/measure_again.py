"""`dsnet-orch measure`: time the sub-networks and the front of a run again, without training;
metrics that the search was given do not change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsnet.files import write_sealed
from dsnet.measure.latency import measure_latency
from dsnet.measure.latency_table import LatencyTable
from dsnet.network.supernet import Supernet
from dsnet.stored.checkpoint import load_supernet
from dsnet.stored.names import FINAL
from orchestration.commands.planning import prepare_again, report_again
from orchestration.config.resolve import conditions
from orchestration.config.sweep import SweepConfig
from orchestration.pipeline.agreement import time_front
from orchestration.pipeline.search import LATENCY
from orchestration.prepare.preparation import Prepared, latency_settings
from orchestration.progress import ProgressView, Task
from orchestration.results.run import RunResults
from orchestration.results.verified import DynamicLatency
from orchestration.runs.lock import DriverLock
from orchestration.runs.manifest import now_iso


@dataclass(frozen=True)
class MeasuredAgain:
    """The first and the new timing, by the name of the device."""

    before: Mapping[str, LatencyTable]
    after: Mapping[str, LatencyTable]
    front: Mapping[str, DynamicLatency]
    """New timing of the verified front; empty if there is none."""
    study: str
    """A sentence about what the new timing means for the study."""


def measure_again(results: RunResults, progress: ProgressView) -> MeasuredAgain:
    """Time everything on every device, store the result beside the first timing, and rebuild the
    report.

    The front runs on images of `val`, because a new timing is no reason to read `test` again.

    Raises:
        NotFoundError: the run has not finished its measure stage.
        LockedError: a driver is at work.
        DataError, PreflightError: see `prepare_again` and `latency_settings`.
    """
    run, key = results.run, results.done_key("measure")
    with DriverLock(run, f"dsnet-orch measure {run.name}"):
        prepared = prepare_again(results)
        supernet = load_supernet(run.stage_dir("supernet", results.done_key("supernet")) / FINAL)[0]
        tables: dict[str, LatencyTable] = {}
        for name, settings in latency_settings(results.config).items():
            with progress.bar(Task(f"measure: latency {name}".rstrip(), settings.num_rounds, "round")) as bar:
                tables[name] = measure_latency(
                    supernet,
                    prepared.image_size,
                    settings,
                    lambda done, total, bar=bar: bar.update(done),  # type: ignore[misc]
                )
        front = _time_front(results, prepared, supernet, tables)
        content = {
            "at": now_iso(),
            "tables": {name: table.to_json() for name, table in tables.items()},
            "front": {name: latency.to_json() for name, latency in front.items()},
        }
        write_sealed(run.timed_again_json(key), content)
    results.refresh()
    report_again(results)
    return MeasuredAgain(results.latencies, results.newest_latencies, front, study_sentence(results.config, run.name))


def _time_front(
    results: RunResults, prepared: Prepared, supernet: Supernet, tables: Mapping[str, LatencyTable]
) -> dict[str, DynamicLatency]:
    verified = results.verified
    if verified is None:
        return {}
    routers = {slot: results.router(slot) for slot in verified.front}
    images = prepared.data.images("val")
    return {
        name: time_front(supernet, routers, images, prepared.normalization, settings, split="val").beside(
            tables[name], verified.val.points, verified.val.routes
        )
        for name, settings in latency_settings(results.config).items()
    }


def study_sentence(config: SweepConfig, run: str) -> str:
    """A sentence: which metrics keep the timing of the search, and how to search with the new
    one."""
    read = [metric.name for metric in config.metrics if metric.name.startswith(LATENCY)]
    for comparison in conditions(config):
        read += [name for name in sorted(comparison.names) if LATENCY in name]
    if not read:
        return "no objective or constraint uses a latency, so the study is unchanged; latency_ms of the trials is from the first timing"
    told = ", ".join(dict.fromkeys(read))
    return (
        f"the study of {run} and its front are based on the first timing ({told}) and are unchanged; "
        "to search with the new timing, launch the sweep under another name (--name)"
    )
