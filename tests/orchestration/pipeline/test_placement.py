"""What a launch asks of the nodes before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dsnet.errors import PreflightError
from orchestration.config.sweep import SweepConfig
from orchestration.pipeline import placement
from orchestration.pipeline.placement import artifacts_url, refuse_client, refuse_what_cannot_fit, training_threads
from orchestration.workers.nodes import Node
from tests.orchestration.samples import SWEEP, TINY, call, problems_of_message, write_sweep

TWO = (Node("a", {"CPU": 1.0}), Node("b", {"CPU": 1.0}))
ALL = ("structure", "supernet", "search")
NOBODY = "ray://192.0.2.1:10001"
"""A client's address at which nobody answers (RFC 5737)."""
SPACE = "space: {supernet.options.width: {choice: [1.0, 0.5]}, gate.target: 0.5}\nsupernets: {number: 2, sampler: grid, scheduler: none}\n"


def config(**sections: Any) -> SweepConfig:
    whole: dict[str, Any] = {"version": 1, "name": "n", "data": {"name": "digits"}}
    whole["supernet"] = {"model": "ds_tiny", "device": "cpu", **sections.pop("supernet", {})}
    return SweepConfig.model_validate({**whole, **sections})


@pytest.fixture(autouse=True)
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "cluster_nodes", lambda: TWO)


def test_default_settings_fit_on_two_nodes_of_one_cpu() -> None:
    assert training_threads(config(), TWO) == 1
    refuse_what_cannot_fit(config(), ALL)
    refuse_what_cannot_fit(config(), ALL, at_a_time=2)


@pytest.mark.parametrize(
    ("sections", "stages", "said"),
    [
        ({"supernet": {"threads": 2}}, ALL, r"supernet\.threads 2: one process needs 2 CPUs"),
        ({"supernet": {"workers": 3}}, ALL, r"supernet\.workers 3 .*room for 2"),
        ({"ray": {"trial_actors": 3}}, ("search",), r"ray\.trial_actors 3"),
        ({"ray": {"trial_resources": {"board": 1}}}, ("search",), r"1 of board"),
        (
            {"gate": {"trainer": "end_to_end", "end_to_end": {"threads": 2}}},
            ("search",),
            r"gate\.end_to_end\.threads 2",
        ),
    ],
)
def test_what_fits_on_no_node_is_refused_where_its_stage_runs(
    sections: dict[str, Any], stages: tuple[str, ...], said: str
) -> None:
    with pytest.raises(PreflightError, match=rf"{said}.*2 nodes with 1 CPU"):
        refuse_what_cannot_fit(config(**sections), stages)
    others = {"search"} if stages == ALL else {"supernet"}
    refuse_what_cannot_fit(config(**sections), others)


def test_supernets_at_the_same_time_are_counted_together() -> None:
    with pytest.raises(PreflightError, match=r"supernets\.concurrent 3 x supernet\.threads 1.*room for 2"):
        refuse_what_cannot_fit(config(), ["supernet"], at_a_time=3)


def test_the_files_of_a_training_lie_below_the_url_as_below_the_runs_folder(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "n" / "supernet" / "abc"
    without = config(storage={"runs": str(tmp_path / "runs")})
    assert artifacts_url(without, folder) is None
    with_url = config(storage={"runs": str(tmp_path / "runs"), "artifacts": "s3://bucket/below/"})
    assert artifacts_url(with_url, folder) == "s3://bucket/below/n/supernet/abc"


def test_a_client_needs_a_place_for_the_files_of_a_training_and_cannot_schedule_supernets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for ray in ({}, {"address": "auto"}, {"address": "10.0.0.1:6379"}):
        refuse_client(config(ray=ray), ALL, at_a_time=2)
    client, url = {"address": NOBODY}, {"artifacts": "s3://bucket/below"}
    for stage in ("structure", "supernet"):
        with pytest.raises(PreflightError, match=r"client of a cluster \(ray://\).*set storage\.artifacts to a URL"):
            refuse_client(config(ray=client), [stage])
    refuse_client(config(ray=client), ["search"])
    refuse_client(config(ray=client, storage=url), ALL)
    with pytest.raises(PreflightError, match=r"client of the cluster.*Launch on a node of the cluster"):
        refuse_client(config(ray=client, storage=url), ALL, at_a_time=1)
    refuse_client(config(ray=client, storage=url), ["search"], at_a_time=1)
    monkeypatch.setenv("RAY_ADDRESS", NOBODY)  # which auto means then
    with pytest.raises(PreflightError, match=f"ray.address: {NOBODY} makes this launch a client"):
        refuse_client(config(ray={"address": "auto"}, storage=url), ALL, at_a_time=1)
    for ray in ({}, {"address": "10.0.0.1:6379"}):
        refuse_client(config(ray=ray), ALL, at_a_time=1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TINY, ["set storage.artifacts to a URL that this machine and all nodes can read and write"]),
        (
            f"{TINY}storage: {{artifacts: memory://below}}\n{SPACE}",
            [NOBODY, "runs the scheduler of several supernets", "with ray.address: HOST:PORT or auto"],
        ),
    ],
    ids=["no place for files", "several supernets"],
)
def test_a_client_is_refused_before_the_cluster_is_joined(tmp_path: Path, text: str, said: list[str]) -> None:
    write_sweep(tmp_path, text.replace("ray: {trial_actors: 1}", f"ray: {{address: '{NOBODY}'}}"))
    answer = call(tmp_path, "launch", SWEEP, "--set", "tracking.mlflow=false")
    assert answer.code == 3, answer.err
    assert problems_of_message(answer, said) == []
    assert "starting Ray" not in answer.err
