"""Links to the points of runs, from a run folder and its database."""

from pathlib import Path

import pytest

from dsnet.errors import ConfigError
from orchestration.results.mlflow_store import store_uri, whole_sweep
from orchestration.runs.folder import RunDir
from orchestration.runs.manifest import Manifest
from orchestration.tracking.links import certain_link, link_to, newest_links, open_in_browser
from orchestration.tracking.rows import sweep_uid
from orchestration.tracking.view import view_path
from tests.orchestration.samples import Finished


def test_a_launch_leaves_a_page_of_its_points_and_the_newest_runs_are_found(finished: Finished) -> None:
    results = finished.results
    uri = store_uri(results.config, results.run)
    link = link_to(results, uri)
    assert link is not None
    assert (link.name, link.path) == ("tiny", view_path("1", sweep_uid(results.manifest, results.run)))
    assert link.path.startswith(link.runs)
    assert newest_links(results.run.root, uri) == [link]
    assert certain_link(results, uri, write=pytest.fail) == link


def test_a_run_whose_points_are_not_there_is_written_first(finished: Finished, tmp_path: Path) -> None:
    calls: list[str] = []
    empty = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert newest_links(finished.run.root, empty) == []
    assert certain_link(finished.results, empty, write=lambda: calls.append("written")) is None
    assert calls == ["written"]


def test_one_of_several_supernets_is_tracked_with_its_sweep_where_that_lies_today(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = RunDir(tmp_path / "moved", "sweep")
    member = RunDir(whole.supernets_dir, "s0-3432dade")
    tracking = finished.results.config.tracking.model_copy(update={"uri": "sqlite:////gone/mlflow.db"})
    config = finished.results.config.model_copy(update={"tracking": tracking})
    assert whole_sweep(member) is member
    assert store_uri(config, member) == "sqlite:////gone/mlflow.db"
    member.path.mkdir(parents=True)
    whole.supernets_json.write_text("{}")
    Manifest(whole.manifest_path).create(seed=0, hardware={})
    whole.sweep_yaml.write_text(finished.run.sweep_yaml.read_text())
    assert whole_sweep(member).path == whole.path
    assert store_uri(config, member) == f"sqlite:///{tmp_path}/moved/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///here.db")
    monkeypatch.chdir(tmp_path)
    assert store_uri(config, member) == f"sqlite:///{tmp_path}/here.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mlruns")
    with pytest.raises(ConfigError, match=r"^\$MLFLOW_TRACKING_URI: 'mlruns' is a path and no URI"):
        store_uri(config, member)


def test_no_browser_is_opened_without_a_screen_or_for_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("webbrowser.open", lambda url: pytest.fail(f"opened {url}"))
    for screen in (":0", ""):
        monkeypatch.setenv("DISPLAY", screen)
        monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
        assert not open_in_browser("http://127.0.0.1:1")  # the output of a test is no terminal
