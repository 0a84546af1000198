"""The files of examples/cluster, as far as they can be checked without a cluster."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml

from orchestration.cli import cli
from orchestration.config.resolve import known_fields
from tests.docs.blocks import REPOSITORY

FOLDER = REPOSITORY / "examples" / "cluster"
KUBERNETES = ("raycluster.yaml", "rayjob.yaml")


def documents(name: str) -> dict[str, Any]:
    """The documents of a file, by kind."""
    return {content["kind"]: content for content in yaml.safe_load_all((FOLDER / name).read_text())}


def cluster_spec(name: str) -> dict[str, Any]:
    found = documents(name)
    spec: dict[str, Any] = (
        found["RayJob"]["spec"]["rayClusterSpec"] if name == "rayjob.yaml" else found["RayCluster"]["spec"]
    )
    return spec


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    assert found
    return found[1]


def check_launch(words: list[str]) -> dict[str, str]:
    """The settings of a launch, all of which exist."""
    assert words[:2] == ["dsnet-orch", "launch"]
    command = cli.commands["launch"]
    assert isinstance(command, click.Command)
    command.make_context("launch", list(words[2:]))
    settings = dict(value.split("=", 1) for option, value in pairwise(words) if option == "--set")
    assert settings.keys() <= known_fields().keys()
    return settings


def test_ray_up_reads_the_cluster_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    content = yaml.safe_load((FOLDER / "ray-up.yaml").read_text())
    prepared = prepare_config(content)
    validate_config(prepared)
    (nodes,) = prepared["available_node_types"].values()
    assert content["min_workers"] == content["max_workers"] == len(content["provider"]["worker_ips"])
    assert nodes["min_workers"] == nodes["max_workers"] == content["min_workers"]
    assert any("RAY_AUTH_MODE=token" in command for command in content["setup_commands"])
    assert "~/.ray/auth_token" in content["file_mounts"]
    with pytest.raises(jsonschema.ValidationError):
        validate_config({**prepared, "worker_ips": []})


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_the_nodes_of_ray_up_are_started_with_options_that_ray_has(kind: str) -> None:
    from ray.scripts.scripts import start

    content = yaml.safe_load((FOLDER / "ray-up.yaml").read_text())
    commands = [part.strip() for line in content[f"{kind}_start_ray_commands"] for part in line.split(";")]
    (started,) = (shlex.split(command) for command in commands if command.startswith("ray start"))
    start.make_context("start", started[2:])
    assert ("--head" in started) == (kind == "head")


@pytest.mark.parametrize("name", KUBERNETES)
def test_the_pods_of_a_cluster_are_equal_and_have_this_ray(name: str) -> None:
    spec = cluster_spec(name)
    assert spec["rayVersion"] == pinned("ray")
    assert spec["authOptions"] == {"mode": "token"}
    head, (workers,) = spec["headGroupSpec"], spec["workerGroupSpecs"]
    (head_container,), (worker_container,) = (group["template"]["spec"]["containers"] for group in (head, workers))
    assert head_container["image"] == worker_container["image"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"]
    assert all(isinstance(value, str) for group in (head, workers) for value in group["rayStartParams"].values())
    for container in (head_container, worker_container):
        assert container["resources"]["limits"] == container["resources"]["requests"]
    mounted = {mount["name"]: mount["mountPath"] for mount in head_container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in head["template"]["spec"]["volumes"]}
    assert mounted.keys() == volumes.keys()
    claim = documents(name)["PersistentVolumeClaim"]["metadata"]["name"]
    assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == claim
    assert "volumeMounts" not in worker_container, "workers need no disk of the driver"


def test_the_job_launches_a_sweep_whose_folder_outlives_the_pods() -> None:
    job = documents("rayjob.yaml")["RayJob"]
    assert job["apiVersion"] == documents("raycluster.yaml")["RayCluster"]["apiVersion"] == "ray.io/v1"
    words = shlex.split(job["spec"]["entrypoint"])
    settings = check_launch(words)
    (head,) = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    mounts = {mount["mountPath"] for mount in head["volumeMounts"]}
    assert settings == {"ray.address": "auto", "storage.runs": "/runs"}
    assert settings["storage.runs"] in mounts
    assert str(Path(words[2]).parent) in mounts
    (told,) = re.findall(r"-- (dsnet-orch launch .*)$", (FOLDER / "raycluster.yaml").read_text(), re.MULTILINE)
    assert check_launch(shlex.split(told)) == settings


def test_both_files_describe_one_cluster() -> None:
    assert cluster_spec("raycluster.yaml") == cluster_spec("rayjob.yaml")


def test_the_image_has_the_pinned_versions() -> None:
    text = (FOLDER / "Dockerfile").read_text()
    assert "--constraint constraints.txt" in text
    assert "FROM python:3.11" in text
    assert re.search(r"useradd .*--uid 1000", text), "the group of the volume"
