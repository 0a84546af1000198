"""Resources that the stages of a launch need on the nodes of the Ray cluster: threads that fit on a
node, and a refusal before anything starts if something fits on none."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from dsnet.environment import resolve_device
from dsnet.errors import PreflightError
from orchestration.config.sweep import SweepConfig
from orchestration.pipeline.search import trial_actors
from orchestration.workers.file_stores import CLIENT_NEEDS_URL
from orchestration.workers.joining import CLIENT, joined_address
from orchestration.workers.nodes import Need, Node, cluster_nodes, most_threads, refuse_without_room
from orchestration.workers.structure import scorer_need
from orchestration.workers.supernet import training_need, training_resources
from orchestration.workers.tune_supernets import members_need


def training_threads(config: SweepConfig, nodes: Sequence[Node], at_a_time: int = 1) -> int:
    """Threads of each process that trains a network: `supernet.threads`, or its share of its node.

    Args:
        config: configuration of the sweep.
        nodes: what the cluster has.
        at_a_time: number of networks that are trained at the same time.
    """
    if config.supernet.threads is not None:
        return config.supernet.threads
    others = training_resources(0, resolve_device(config.supernet.device))
    return most_threads(nodes, config.supernet.workers * at_a_time, others)


def refuse_what_cannot_fit(config: SweepConfig, stages: Collection[str], at_a_time: int | None = None) -> None:
    """Raise if a stage that will run could never place its processes; Ray must be initialised.

    Args:
        config: configuration of the sweep.
        stages: names of the stages that will run.
        at_a_time: number of supernets that a sweep of supernets trains at the same time; None: the
            sweep has one supernet.

    Raises:
        PreflightError: what does not fit, what the nodes have, and the setting to change.
    """
    nodes = cluster_nodes()
    for need in _needs(config, stages, nodes, at_a_time):
        refuse_without_room(need, nodes)


def refuse_client(config: SweepConfig, stages: Collection[str], at_a_time: int | None = None) -> None:
    """Raise if a stage that will run cannot be driven by a client of a cluster (ray://), which is
    on none of its nodes; needs no Ray.

    Args:
        config: configuration of the sweep.
        stages: names of the stages that will run.
        at_a_time: see `refuse_what_cannot_fit`.

    Raises:
        PreflightError: supernets would be scheduled, or the files of a training have no place.
    """
    address = joined_address(config.ray.address)
    if not address.startswith(CLIENT):
        return
    # For a client, Ray runs Tune in a task on the head, and would send the scheduler there.
    if at_a_time is not None and "supernet" in stages:
        raise PreflightError(
            f"ray.address: {address} makes this launch a client of the cluster, for which Ray runs the scheduler of several supernets "
            "on the cluster's head; its decisions are kept in the run folder, which is not there. Launch on a node of the cluster, with "
            "ray.address: HOST:PORT or auto, or train one supernet per launch"
        )
    if config.storage.artifacts is None and not {"structure", "supernet"}.isdisjoint(stages):
        raise PreflightError(CLIENT_NEEDS_URL)


def _needs(
    config: SweepConfig, stages: Collection[str], nodes: Sequence[Node], at_a_time: int | None
) -> Iterator[Need]:
    device, workers = resolve_device(config.supernet.device), config.supernet.workers
    if "structure" in stages:
        yield scorer_need(device)
    if not {"structure", "supernet"}.isdisjoint(stages):
        if at_a_time is None:
            yield training_need(workers, training_threads(config, nodes), device)
        else:
            yield members_need(at_a_time, training_threads(config, nodes, at_a_time), device)
    if "search" in stages:
        yield trial_actors(config).need()


def artifacts_url(config: SweepConfig, folder: Path) -> str | None:
    """URL for the files of a training with this folder: below `storage.artifacts`, as the folder is
    below the runs folder; None if the setting is null."""
    if config.storage.artifacts is None:
        return None
    below = folder.absolute().relative_to(Path(config.storage.runs).absolute()).as_posix()
    return f"{config.storage.artifacts.rstrip('/')}/{below}"
