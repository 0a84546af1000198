"""Workers on a real cluster of two nodes of one CPU each on this machine: nothing waits for a place
that there cannot be, and a training whose files go through a store ends like one at home."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hostile import REPOSITORY

PROGRAM = """
import json, sys
from pathlib import Path
from orchestration.environment import prepare_environment
prepare_environment()
import ray
from ray.cluster_utils import Cluster
from dsnet.errors import PreflightError
from dsnet.files import file_sha256
from orchestration.config.loading import load_config
from orchestration.pipeline.placement import refuse_what_cannot_fit, training_threads
from orchestration.workers.node_check import check_nodes
from orchestration.workers.nodes import cluster_nodes, nodes_in_words
from orchestration.workers.runtime import RaySettings, ray_session
from orchestration.workers.supernet import train_on_ray
from tests.orchestration.workers.tune_sweep import Sweep
from dataclasses import replace

folder, sweep_file = Path(sys.argv[1]), Path(sys.argv[2])
config = load_config(sweep_file, known_models=("ds_tiny",)).config
cluster = Cluster()
for _ in range(2):
    cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
facts = {}
try:
    with ray_session(RaySettings(address=cluster.address)):
        check_nodes()
        nodes = cluster_nodes()
        facts["nodes"] = nodes_in_words(nodes, {"CPU": 1})
        facts["threads"] = training_threads(config, nodes)
        refuse_what_cannot_fit(config, ["supernet", "search"])
        wide = config.model_copy(update={"supernet": config.supernet.model_copy(update={"threads": 2})})
        try:
            refuse_what_cannot_fit(wide, ["supernet", "search"])
        except PreflightError as error:
            facts["refused"] = str(error)
        finals = []
        for name, changes in (
            ("home", {}),
            ("driver", {"is_local": False}),
            ("url", {"artifacts": (folder / "elsewhere").as_uri()}),
        ):
            sweep = Sweep(folder / name, {"first": 0.1})
            job = replace(sweep.members[0].job, threads=facts["threads"], **changes)
            points = []
            train_on_ray(job, sweep.train, on_points=points.extend, should_stop=lambda: False)
            finals.append(file_sha256(job.folder / "final.safetensors"))
            facts[name] = sorted(path.name for path in job.folder.iterdir())
            facts[f"{name} steps"] = sorted({point.step for point in points})
        facts["finals"] = len(set(finals))
        facts["elsewhere"] = sorted(path.name for path in (folder / "elsewhere").iterdir())
finally:
    cluster.shutdown()
(folder / "facts.json").write_text(json.dumps(facts))
"""


@pytest.mark.ray
@pytest.mark.long
def test_two_nodes_of_one_cpu_train_with_default_settings_wherever_the_files_go(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("version: 1\nname: two\ndata: {name: digits}\nsupernet: {model: ds_tiny}\n")
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), str(sweep)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["nodes"] == "2 nodes with 1 CPU each"
    assert facts["threads"] == 1
    assert facts["refused"].startswith("supernet.workers 1 x supernet.threads 2: one process needs 2 CPUs")
    assert facts["finals"] == 1, "the same bits, wherever the files are kept"
    assert facts["home steps"] == facts["driver steps"] == facts["url steps"] != []
    assert "final.json" in facts["driver"]
    assert {name for name in facts["url"] if name.startswith("epoch")} == set(), "checkpoints stay at the URL"
    assert {"curves.jsonl", "final.json", "final.safetensors"} <= set(facts["url"])
    assert any(name.startswith("epoch") for name in facts["elsewhere"])
