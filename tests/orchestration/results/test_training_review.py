"""Warnings about the training of a real run, where they are shown, and runs that lack what they are
derived from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsnet.files import atomic_write_json, read_sealed
from orchestration.results.training_review import facts_of, review
from tests.orchestration.samples import Finished, call, results_in

pytestmark = pytest.mark.ray


def test_a_short_training_on_digits_is_warned_about_wherever_its_numbers_are_shown(finished: Finished) -> None:
    found = review(finished.results)
    (few,) = (warning for warning in found if warning.code == "few_steps")
    assert "for only 40 steps" in few.text
    assert f"warning: {few}" in finished.answer.err.replace("\n", " "), "as soon as it is known"
    assert f"warning   {few}" in finished.answer.out
    assert f"warning   {few}" in call(finished.folder, "status", "tiny").out
    told = call(finished.folder, "status", "tiny", "--json").json["warnings"]
    assert told == [json.loads(json.dumps(warning.to_json())) for warning in found]
    report = finished.run.report_html.read_text(encoding="utf-8")
    assert few.way_out in report
    assert report.index(few.way_out) < report.index("<h2"), "at the top of the page"


def test_the_facts_are_those_of_the_run(finished: Finished) -> None:
    facts, results = facts_of(finished.results), finished.results
    assert (facts.num_steps, facts.epochs, facts.batch_size) == (40, 8, 40)
    assert next(iter(facts.curves)) == "largest"
    assert [score.name for score in facts.routes] == [subnet.name for subnet in results.members]
    assert facts.correct is not None
    shares = facts.correct.mean(0)
    assert shares.tolist() == pytest.approx([score.top1 for score in facts.routes])
    assert facts.pairs == [(0, 1), (0, 2), (1, 2)]
    assert facts.train is not None
    assert (facts.train.name, facts.train.num_images) == (results.widest.name, 200)


def test_a_run_of_an_earlier_release_is_read_without_what_it_did_not_store(finished: Finished, tmp_path: Path) -> None:
    folder = finished.copy(tmp_path)
    results = results_in(folder)
    sample = results.run.subnets_json(results.done_key("measure")).with_name("train_sample.json")
    for path in (sample, results.run.curves_jsonl(results.done_key("supernet"))):
        done = path.with_name("done")
        listed = read_sealed(done)
        del listed["files"][path.name]
        atomic_write_json(done, listed)
        path.unlink()
    facts = facts_of(results_in(folder))
    assert facts.train is None
    assert (facts.num_steps, facts.curves) == (0, {})
    assert "few_steps" not in [warning.code for warning in review(results_in(folder))]
