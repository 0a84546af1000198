"""Sweeps of supernets whose members differ in how their sub-networks are chosen."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dsnet.files import file_sha256
from orchestration.runs.folder import RunDir
from orchestration.supernets.results import SupernetSweepResults
from tests.orchestration.samples import WITHOUT_MLFLOW, call, write_sweep

STRUCTURES = """\
version: 1
name: nets
data: {name: digits, limit: 200}
supernet:
  model: ds_tiny
  structure: {method: uniform, targets: [0.5, 1.0], pin: gate, step: 16, levels: 3, epochs: 1, holdout: 0.2}
  train: {epochs: 2, batch_size: 40, warmup_epochs: 0.5}
  bootstrapping: {teacher_min_updates: 2}
supernets: {number: 3, scheduler: none, sampler: grid, concurrent: 2}
measure: {batch_sizes: [1], group_sizes: [1, 8], repeats: 2, warmup: 1}
gate: {router: gate, optimizer: {steps: 40, batch_size: 128}}
space:
  supernet.structure.method: {choice: [uniform, greedy]}
  supernet.regime: {choice: [ib, ieb]}
  gate.target: {uniform: [0.1, 0.9]}
sampler: {cohort: 4, startup: 8}
budget: {trials: 4}
ray: {trial_actors: 1}
"""
SWEEP = "nets.yaml"


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_methods_meet_on_one_front_and_equal_choices_are_made_once(tmp_path: Path) -> None:
    write_sweep(tmp_path, STRUCTURES, SWEEP)
    answer = call(tmp_path, "launch", SWEEP, *WITHOUT_MLFLOW)
    assert answer.code == 0, answer.err
    results = SupernetSweepResults(RunDir(tmp_path / "runs", "nets"))
    methods = {entry.name: entry.settings["supernet.structure.method"] for entry in results.entries}
    assert sorted(set(map(str, methods.values()))) == ["greedy", "uniform"]
    assert all(entry.state == "trained" for entry in results.entries)
    chosen: dict[str, set[str]] = {}
    for name, member in results.supernets.items():
        stage = member.run.stage_dir("structure", member.done_key("structure"))
        chosen.setdefault(str(methods[name]), set()).add(file_sha256(stage / "structure.safetensors"))
        assert [subnet.name for subnet in member.members] == ["0.5", "1"]
    assert {method: len(files) for method, files in chosen.items()} == {"uniform": 1, "greedy": 1}
    assert answer.err.count("structure: us_net") <= 2, "one network of one epoch is trained, for both members"
    page = (tmp_path / "runs" / "nets" / "report.html").read_text()
    assert "Sub-networks (MAdds)" in page
    assert "stops the worse ones" not in page
    for name, method in methods.items():
        assert re.search(rf"^{name} \({method}\b.*\): search:", answer.err, re.MULTILINE)
    assert all(f"{gate.supernet} ({methods[gate.supernet]}" in answer.out for gate in results.front_gates)
    assert call(tmp_path, "launch", SWEEP, *WITHOUT_MLFLOW).code == 0
