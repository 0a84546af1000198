"""What a launch asks of the nodes before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dsnet.errors import PreflightError
from orchestration.config.sweep import SweepConfig
from orchestration.pipeline import placement
from orchestration.pipeline.placement import artifacts_url, refuse_what_cannot_fit, training_threads
from orchestration.workers.nodes import Node

TWO = (Node("a", {"CPU": 1.0}), Node("b", {"CPU": 1.0}))
ALL = ("structure", "supernet", "search")


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
