"""Bundles in a run's export folder that were made before its settings changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestration.results.exported import outdated_bundles, outdated_part
from orchestration.runs.manifest import Manifest
from tests.orchestration.samples import Finished, call, results_in


@pytest.mark.parametrize("stage", ["supernet", "search"])
def test_a_bundle_of_an_earlier_supernet_or_search_is_named_and_stays(
    finished: Finished, tmp_path: Path, stage: str
) -> None:
    folder = finished.copy(tmp_path)
    run = folder / "runs" / "tiny"
    knee = run / "export" / "knee"
    assert outdated_bundles(results_in(folder)) == []
    assert "warning" not in call(folder, "verify", knee).out
    manifest = Manifest(run / "manifest.json")
    manifest.record_stage(stage, {**manifest.read()["stages"][stage], "key": "0" * 64})
    bundle = run / "export" / knee.readlink()
    assert outdated_bundles(results_in(folder)) == [bundle], "the link is not a bundle of its own"
    status = " ".join(call(folder, "status", "tiny").out.split())
    assert (
        f"the supernet or the search of this run has changed since these bundles in {run / 'export'} were exported: {bundle.name};"
        in status
    )
    answer = call(folder, "verify", knee)
    assert (answer.code, f"has another {stage} now" in answer.out) == (0, True)
    assert bundle.is_dir()


def test_of_a_bundle_that_does_not_say_where_it_comes_from_only_another_family_is_noticed(finished: Finished) -> None:
    results = finished.results
    spec = results.trained_subnets.spec.to_json()
    assert outdated_part(results, {"claims": {}, "spec": spec}) is None
    assert outdated_part(results, {"claims": {}, "spec": {**spec, "family": "ds_mbnet"}}) == "supernet"
