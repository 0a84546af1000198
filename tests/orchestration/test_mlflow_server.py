import os
import socket
import time
import urllib.request
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from dsnet.errors import ConfigError, PreflightError
from orchestration.mlflow_server import free_port, serve_ui
from orchestration.tracking import MlflowTracker, TrackedRun, TrackingSummary

NOW_MS = 1_700_000_000_000
LOOPBACK_HEX = "0100007F"


def process_tree(pid: int) -> set[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {pid}.union(*(process_tree(int(child)) for child in children))


def sockets_of(pids: set[int]) -> set[str]:
    """Inodes of the sockets that these processes have open."""
    links = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                links.add(os.readlink(descriptor))
            except FileNotFoundError:
                continue
    return {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:")}


def listening_addresses(pids: set[int]) -> set[tuple[str, int]]:
    """(address in the kernel's hex, port) of every listening TCP socket of these processes."""
    inodes, found = sockets_of(pids), set()
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = row.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, _, port = fields[1].partition(":")
                found.add((address, int(port, 16)))
    return found


def fetch(url: str) -> bytes:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as answer:
        return bytes(answer.read())


def write_through_server(url: str, folder: Path) -> TrackingSummary:
    """A tiny sweep over HTTP, as `tracking.uri: http://...` does it."""
    tracker = MlflowTracker(url, "over HTTP", folder, "digits", warn=pytest.fail)
    tracker.parent(TrackedRun("digits", "digits", "sweep", NOW_MS))
    for slot in range(2):
        tracker.trial(TrackedRun(f"digits/{slot}", f"trial-{slot}", "trial", NOW_MS, NOW_MS, metrics={"top1": 0.5}))
    return tracker.close("FINISHED", NOW_MS, 60)


def test_the_page_is_served_to_this_machine_alone_shows_the_artifacts_and_goes_away(tmp_path: Path) -> None:
    uri, artifacts = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "artifacts"
    report = tmp_path / "report.html"
    report.write_text("<h1>the front</h1>")
    tracker = MlflowTracker(uri, "digits", artifacts, "digits", warn=pytest.fail)
    tracker.parent(TrackedRun("digits", "digits", "sweep", NOW_MS))
    tracker.artifact(report)
    assert tracker.close("FINISHED", NOW_MS, 60).num_unsent == 0
    run_id = next(path.parent.parent.name for path in artifacts.rglob("report.html"))

    us = os.getpid()
    before = process_tree(us)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy_port = taken.getsockname()[1]
        with serve_ui(uri, artifacts, port=busy_port) as url:
            servers = process_tree(us) - before
            port = int(url.rpartition(":")[2])
            assert port != busy_port
            assert listening_addresses(servers) == {(LOOPBACK_HEX, port)}
            assert b"<title>MLflow</title>" in fetch(url)
            assert fetch(f"{url}/get-artifact?path=report.html&run_uuid={run_id}") == report.read_bytes()
            assert [write_through_server(url, tmp_path).num_unsent for _ in range(2)] == [0, 0]
    assert servers
    client = MlflowClient(uri)
    through_server = client.get_experiment_by_name("over HTTP")
    assert through_server is not None
    assert len(client.search_runs([through_server.experiment_id])) == 3
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in servers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process_tree(us) == before
    assert listening_addresses(servers & process_tree(us)) == set()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="ended with status"), serve_ui("nonsense://x", tmp_path, port=0):
        pass


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.2"])
def test_no_other_host_is_served(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="ssh -L"), serve_ui("sqlite:///x.db", tmp_path, host=host):
        pass


def test_a_store_that_is_a_server_is_not_served_again(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="open it in a browser"), serve_ui("http://127.0.0.1:5000", tmp_path):
        pass


def test_a_free_port_is_kept_and_a_busy_one_replaced() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = taken.getsockname()[1]
        assert free_port(busy) not in (0, busy)
    assert free_port(busy) == busy
