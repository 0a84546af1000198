"""What a search says about workers that do not round alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsnet.arithmetic import MKL_MODE
from dsnet.files import atomic_write_json, read_json
from orchestration.workers.life import Pulse
from orchestration.workers.self_check import REPEATED, ArithmeticReport
from orchestration.workers.trials import TrialWorker
from search.gate_check import Finding
from search.study.runner import TrialOutcome, TrialSpec


def report_on(path: Path) -> tuple[ArithmeticReport, list[str]]:
    told: list[str] = []
    return ArithmeticReport(path / "arithmetic.json", told.append), told


def test_workers_that_round_alike_are_no_news(tmp_path: Path) -> None:
    for _ in range(2):  # a resumed search, too
        report, told = report_on(tmp_path)
        report.hear(Finding("a"))
        report.hear(Finding("a"))
        assert told == []
    assert read_json(tmp_path / "arithmetic.json")["digest"] == "a"


def test_routers_that_differ_in_company_are_told_once_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MKL_MODE, "AVX2")
    report, told = report_on(tmp_path)
    for _ in range(3):
        report.hear(Finding("a", ("evidence_gate", "gates")))
    (text,) = told
    assert "evidence_gate, gates; MKL_CBWR is AVX2" in text
    assert "whatever the number of workers" in text
    assert "unset MKL_CBWR or set it to COMPATIBLE" in text
    monkeypatch.delenv(MKL_MODE)
    report, told = report_on(tmp_path)
    report.hear(Finding("a", ("gate",)))
    assert "set MKL_CBWR=COMPATIBLE" in told[0]


def test_machines_of_two_kinds_are_told(tmp_path: Path) -> None:
    report, told = report_on(tmp_path)
    for digest in "abb":
        report.hear(Finding(digest))
    (text,) = told
    assert "two workers round differently" in text


def test_a_search_that_goes_on_elsewhere_is_told_unless_the_check_itself_is_another(tmp_path: Path) -> None:
    report_on(tmp_path)[0].hear(Finding("a"))
    report, told = report_on(tmp_path)
    report.hear(Finding("b"))
    (text,) = told
    assert "rounds differently from the one that began this search" in text
    assert read_json(tmp_path / "arithmetic.json")["digest"] == "a", "the beginning stays what it was"
    atomic_write_json(tmp_path / "arithmetic.json", {"version": 0, "digest": "a", "mkl_cbwr": "not set"})
    report, told = report_on(tmp_path)
    report.hear(Finding("b"))
    assert told == []


def test_an_end_to_end_gate_that_comes_out_twice_otherwise_is_told(tmp_path: Path) -> None:
    report, told = report_on(tmp_path)
    report.hear(Finding("a", (REPEATED,)))
    (text,) = told
    assert "training the same gate twice" in text


class Counting:
    """A trial function that reports how many trials its program held."""

    lanes = 8

    def __call__(self, specs: list[TrialSpec]) -> list[TrialOutcome]:
        return [TrialOutcome(spec.slot, "complete", {"company": float(len(specs))}) for spec in specs]


@pytest.mark.parametrize(("unequal", "company"), [((), 3.0), (("gate",), 1.0)])
def test_where_trials_differ_in_company_a_worker_runs_them_one_by_one(unequal: tuple[str, ...], company: float) -> None:
    worker = TrialWorker(lambda arrays: Counting(), {}, 1, look=lambda function: Finding("a", unequal))
    assert worker.prepare() == (8, Finding("a", unequal))
    outcomes = worker.run([TrialSpec(slot, seed=slot, params={}) for slot in range(3)], Pulse.new())
    assert outcomes is not None
    assert [outcome.metrics["company"] for outcome in outcomes] == [company] * 3
    assert [outcome.slot for outcome in outcomes] == [0, 1, 2]
