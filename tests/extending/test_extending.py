"""A family, a kind of router, a metric and an exporter from one file outside of the packages:
sweep, report and export with them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.processes import Answer, Command
from dsnet.deploy.bundle import load_bundle
from dsnet.errors import DsnetError
from tests.hostile import REPOSITORY

SWEEP = """\
version: 1
name: mine
data: {name: digits, limit: 300}
supernet:
  model: my_tiny
  train: {epochs: 4, batch_size: 40, warmup_epochs: 0.5}
  bootstrapping: {teacher_min_updates: 2}
measure: {batch_sizes: [1], group_sizes: [1, 8], repeats: 2, warmup: 1}
gate: {optimizer: {steps: 20, batch_size: 128}}
space:
  gate.router: {choice: [gate, sum]}
  gate.target: {uniform: [0.1, 0.9]}
metrics:
  - {name: top1, goal: maximize}
  - {name: madds_m, goal: minimize}
  - {name: worst_class, goal: maximize}
constraints: ["worst_class >= baseline.worst_class - 0.9"]
sampler: {name: random, cohort: 4}
budget: {trials: 8}
export: {picks: [all], formats: [bundle, facts]}
tracking: {mlflow: false}
"""


@dataclass(frozen=True)
class Mine:
    """The finished run, and what the commands say of it; only to be read."""

    folder: Path
    """Holds the user's module, the sweep file and `runs/`."""
    trials: list[Any]
    front: Any


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Mine:
    """The run is launched and read in one process: each takes seconds to start."""
    folder = tmp_path_factory.mktemp("extending")
    shutil.copy(Path(__file__).with_name("my_extension.py"), folder)
    (folder / "mine.yaml").write_text(SWEEP, encoding="utf-8")
    answer = run(folder, ["launch", "mine.yaml"], ["trials", "mine", "--json"], ["pareto", "mine", "--json"])
    assert answer.code == 0, answer
    trials, front = documents(answer.out)
    return Mine(folder, trials, front)


def run(folder: Path, *commands: list[str]) -> Answer:
    """Commands in a process of its own, which knows the module by its environment alone."""
    program = """if True:
        import json, os, sys
        os.environ["DSNET_PLUGINS"] = "my_extension"
        from dsnet_orch import main
        code = 0
        for command in json.loads(sys.argv[1]):
            sys.argv = ["dsnet-orch", *command]
            try:
                main()
            except SystemExit as end:
                code = code or end.code
        sys.exit(code)
    """
    return Command(folder, json.dumps(commands), program=(sys.executable, "-c", program), python_path=[folder]).wait()


def documents(out: str) -> list[Any]:
    """The JSON documents at the end of an output; each begins on a line of its own, without
    blanks before it."""
    decoder, found = json.JSONDecoder(), []
    start = re.search(r"^[\[{]$", out, re.MULTILINE)
    rest = out[start.start() :] if start else ""
    while rest:
        value, end = decoder.raw_decode(rest)
        found.append(value)
        rest = rest[end:].lstrip()
    return found


@pytest.mark.ray
def test_a_sweep_tries_the_router_on_the_family_and_optimises_the_metric(mine: Mine) -> None:
    trials, front = mine.trials, mine.front
    assert {trial["state"] for trial in trials} == {"complete"}
    assert {trial["params"]["gate.router"] for trial in trials} == {"gate", "sum"}
    assert all(0.0 <= trial["metrics"]["worst_class"] <= trial["metrics"]["top1"] for trial in trials)
    assert front["is_verified"], "the router ran for real as its table said"
    assert [each["metric"] for each in front["objectives"]] == ["top1", "madds_m", "worst_class"]


@pytest.mark.ray
def test_the_report_shows_them(mine: Mine) -> None:
    page = (mine.folder / "runs" / "mine" / "report.html").read_text(encoding="utf-8")
    assert "sum of the hidden vector" in page
    assert "worst_class" in page


@pytest.mark.ray
def test_the_exporter_writes_beside_the_bundle_which_loads_where_the_module_is_named(mine: Mine) -> None:
    folder = mine.folder
    bundles = sorted((folder / "runs" / "mine" / "export").glob("trial-*"))
    facts = [json.loads((bundle / "facts" / "facts.json").read_text()) for bundle in bundles]
    assert all(0.0 < each["val"]["top1"] <= 1.0 for each in facts)
    kinds = {bundle: json.loads((bundle / "bundle.json").read_text())["router"]["kind"] for bundle in bundles}
    own = next(bundle for bundle, kind in kinds.items() if kind == "sum")
    assert run(folder, ["verify", str(own), "--data"]).code == 0
    code = "import dsnet, sys; dsnet.load_bundle(sys.argv[1])"
    path = os.pathsep.join([str(folder), str(REPOSITORY)])
    environment = {**os.environ, "PYTHONPATH": path, "DSNET_PLUGINS": "my_extension"}
    assert subprocess.run([sys.executable, "-c", code, str(own)], env=environment, check=False).returncode == 0
    with pytest.raises(DsnetError, match="unknown model 'my_tiny'"):  # this process has no such variable
        load_bundle(own)


def test_a_plugin_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    code = "import os; os.environ['DSNET_PLUGINS'] = 'not_there'\nfrom dsnet_orch import main; main()"
    (tmp_path / "mine.yaml").write_text(SWEEP, encoding="utf-8")
    answer = Command(tmp_path, "validate", "mine.yaml", program=(sys.executable, "-c", code)).wait()
    assert answer.code == 2
    assert "'not_there', named by the environment variable DSNET_PLUGINS, cannot be imported" in answer.err
