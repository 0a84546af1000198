"""`dsnet-orch measure`: new times are shown, and the metrics of the search do not change."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dsnet.measure.latency_table import MachineLoad
from orchestration.commands.measure_again import study_sentence
from orchestration.results.report import widths_of
from orchestration.results.timing_doubt import timing_doubt
from tests.orchestration.samples import Finished, call, results_in

pytestmark = pytest.mark.ray


def test_measuring_again_changes_what_is_shown_and_nothing_of_the_study(finished: Finished, tmp_path: Path) -> None:
    folder = finished.copy(tmp_path)
    before = results_in(folder)
    verified = before.verified
    assert verified is not None
    answer = call(folder, "measure", "tiny")
    assert answer.code == 0, answer.err
    assert all(subnet.name in answer.out for subnet in before.members)
    assert "no objective or constraint uses a latency" in answer.out
    after = results_in(folder)
    assert after.latencies == before.latencies, "the study's"
    assert after.records == before.records
    assert all(after.is_done(stage) for stage in ("measure", "table", "search", "verify"))
    assert after.manifest["test_openings"] == before.manifest["test_openings"], "it needs no image of test"
    assert after.newest_latencies.keys() == before.latencies.keys()
    newest, widths = after.newest_latencies[""], widths_of(after)
    assert newest.load is not None
    assert widths is not None
    assert widths.latency[0].median_ms == tuple(newest.subnets[1][subnet.name].median_ms for subnet in after.members)
    assert after.verified is not None
    assert (verified.latency.split, after.verified.latency.split) == ("test", "val")
    assert after.verified.test == verified.test
    assert call(folder, "pareto", "tiny").code == 0


def test_times_of_another_front_are_not_shown_as_those_of_this_one(finished: Finished, tmp_path: Path) -> None:
    results = results_in(finished.copy(tmp_path))
    assert results.verified is not None
    front = {"": replace(results.verified.latency, gates={1: {}, 8: {}}, split="val").to_json()}
    path = results.run.timed_again_json(results.done_key("measure"))
    path.write_text(json.dumps({"tables": {}, "front": front}), encoding="utf-8")
    again = results_in(tmp_path)
    assert again.verified is not None
    assert again.verified.latency.split == "test"


def test_a_study_that_reads_a_latency_is_said_to_keep_the_first_timing(finished: Finished) -> None:
    config = finished.results.config
    latency = config.metrics[1].model_copy(update={"name": "latency_ms_batch8"})
    told = study_sentence(config.model_copy(update={"metrics": (config.metrics[0], latency)}), "tiny")
    assert "based on the first timing (latency_ms_batch8)" in told
    bounded = config.model_copy(update={"constraints": ("latency_ms <= baseline.latency_ms",)})
    assert "(baseline.latency_ms, latency_ms)" in study_sentence(bounded, "tiny")


def test_a_busy_machine_is_told_with_the_command_that_measures_again(finished: Finished) -> None:
    results = results_in(finished.folder)
    busy = {"": replace(results.latencies[""], load=MachineLoad(40.0, 2))}
    results.__dict__["newest_latencies"] = busy
    doubt = timing_doubt(results)
    assert doubt is not None
    assert "load average 40.0 on 2 cores" in doubt
    assert f"dsnet-orch measure {results.run.path}" in doubt
