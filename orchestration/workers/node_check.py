"""Comparison of the nodes of a cluster that was joined with this machine: a worker with another
Python, another torch or another copy of this package would fail late, or compute something else."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dsnet.errors import PreflightError
from dsnet.import_path import OWN_PACKAGES, ROOT
from dsnet.wording import plural

ANSWER_TIMEOUT_S = 90.0
"""Seconds in which every node must answer; the first process of a node takes some to start."""
_PACKAGES = ("torch", "numpy", "ray", "safetensors")


def facts_of_this_machine() -> dict[str, str]:
    """What must be equal on all nodes, by name."""
    return {
        "Python": ".".join(platform.python_version_tuple()[:2]),
        **{name: _version(name) for name in _PACKAGES},
        "the files of dsnet-orch": code_digest(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def code_digest(root: Path = Path(ROOT)) -> str:
    """The first digits of a SHA-256 over the files of our packages below a folder."""
    digest = hashlib.sha256()
    for package in OWN_PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root).as_posix()}\n".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def differences(there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """What differs between two machines, a phrase for each."""
    return [
        f"{name} {there.get(name, 'absent')} there, {value} here"
        for name, value in here.items()
        if there.get(name) != value
    ]


def check_nodes(timeout_s: float = ANSWER_TIMEOUT_S) -> None:
    """Start a process on every node, and compare what it says with this machine.

    Raises:
        PreflightError: a node does not answer in time or cannot import this package, or something
            differs there; the message names the node.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(num_cpus=0, max_retries=0)(facts_of_this_machine)
    asked = {
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(): node[
            "NodeManagerAddress"
        ]
        for node in ray.nodes()
        if node["Alive"]
    }
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)
    if silent:
        raise PreflightError(
            f"ray.address: {plural(len(silent), 'node')} of the cluster did not start a process within {timeout_s:g} s "
            f"({', '.join(asked[ref] for ref in silent)}); see the logs in its Ray folder, or take it out of the cluster"
        )
    own = facts_of_this_machine()
    for ref in answered:
        try:
            there = ray.get(ref)
        except RayError as error:
            lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise PreflightError(
                f"ray.address: the node {asked[ref]} cannot run this package ({lines[-1].strip()}); install the same release of "
                "dsnet-orch in the environment of its Ray (docs/cluster.md)"
            ) from error
        differing = differences(there, own)
        if differing:
            raise PreflightError(
                f"ray.address: the node {asked[ref]} differs from this machine: {'; '.join(differing)}; all nodes need the same "
                "(docs/cluster.md)"
            )
