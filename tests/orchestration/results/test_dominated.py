"""Gates that are worse than a static sub-network, by the front's own objectives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from orchestration.results.dominated import dominated_gates, dominated_warnings
from orchestration.results.report import headline
from orchestration.results.run import RunResults
from search.study.study import TrialRecord
from tests.orchestration.samples import Finished, results_in


def with_records(finished: Finished, change: Callable[[TrialRecord], TrialRecord]) -> RunResults:
    """The results of the run as if its trials had ended otherwise."""
    results = results_in(finished.folder)
    results.__dict__["records"] = [change(record) for record in results.records]
    return results


def changed(record: TrialRecord, **metrics: float) -> TrialRecord:
    return replace(record, metrics={**record.metrics, **metrics})


def test_a_knee_that_costs_more_than_an_equally_good_static_subnetwork_is_told_with_its_name(
    finished: Finished,
) -> None:
    widest = finished.results.widest
    cost = widest.madds / 1e6
    worse = with_records(
        finished, lambda record: changed(record, top1=widest.top1, madds_m=1.1 * cost, max_route_share=1.0)
    )
    (found,) = dominated_gates(worse)
    assert (found.gate.slot, found.is_knee, found.is_collapsed) == (worse.knee, True, True)
    row = {name: (gate, static) for name, gate, static in found.values}
    assert row["top1"][1] >= row["top1"][0] == widest.top1
    assert row["madds_m"][1] <= cost < row["madds_m"][0]
    assert found.static in {subnet.name for subnet in worse.members}
    (text,) = dominated_warnings(worse)
    assert f"is worse than the static sub-network {found.static} on val" in text
    assert f"dsnet-orch export {worse.run.path} --pick members" in text
    assert headline(worse).warnings == (f"{text[0].upper()}{text[1:]}.",)


def test_a_gate_that_is_as_good_as_a_static_subnetwork_or_better_is_not_told(finished: Finished) -> None:
    widest = finished.results.widest
    cost = widest.madds / 1e6
    for top1, madds_m in ((widest.top1, cost), (1.0, 2 * cost), (0.0, 1e-6)):
        assert not dominated_gates(with_records(finished, lambda at: changed(at, top1=top1, madds_m=madds_m)))  # noqa: B023


def test_only_static_subnetworks_that_hold_the_constraints_count(finished: Finished) -> None:
    widest = finished.results.widest
    worse = with_records(finished, lambda record: changed(record, top1=widest.top1, madds_m=1.1 * widest.madds / 1e6))
    worse.config = worse.config.model_copy(update={"constraints": ("madds_m <= 0.000001",)})
    assert not dominated_gates(worse)
